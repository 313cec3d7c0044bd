# Everything runs in an environment made here, one for each version of Python:  make test PYTHON=python3.12
PYTHON ?= python3
EXTRAS ?= dev
OUT ?= results/quickstart

VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
comma := ,
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
PIP := $(VENV)/bin/python -m pip install --quiet --no-input --disable-pip-version-check

.PHONY: quickstart quickstart-long test nightly lint format bench clean

quickstart: $(RUN_STAMP)
	$(VENV)/bin/python -m fot_jax.evals.quickstart --out $(OUT)

quickstart-long: $(RUN_STAMP)
	$(VENV)/bin/python -m fot_jax.evals.quickstart --long --out $(OUT)-long

# Two processes: most of the time is compilation, which uses one core. Each file goes to one of them, so that what its
# tests share is made once. One that dies ends it all: the test is named, where xdist would wait for ever for another.
test: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --max-worker-restart=0 $(ARGS)

nightly: $(DEV_STAMP)
	XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=3" $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --max-worker-restart=0 -m "" $(ARGS)

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck launch/*.sh launch/*.sbatch

format: $(DEV_STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python bench/train_step.py
	$(VENV)/bin/python bench/inference.py
	$(VENV)/bin/python bench/topk.py

clean:
	rm -rf .venv-* build *.egg-info results/quickstart*

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "'$(PYTHON)' is not a Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make environments (no ensurepip); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): setup.py pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: setup.py pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$(subst -,$(comma),$*)]'
	@touch $@ $(RUN_STAMP)
