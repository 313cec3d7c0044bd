"""Evaluates a model.

    python eval.py --config=configs/eval/perplexity.py --checkpoint=WORKDIR --out=results/perplexity

The checkpoint is a working directory of train.py, or the URL of one, or a model in any format that fot-convert reads.
Prints a table, and writes the same as JSON and PNG. `--config.KEY=VALUE` replaces any key of the file; unknown keys are
errors. An evaluation that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import time

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fot_jax import evals, files, formats, host, model, run_config, sharding
from fot_jax.evals import identity
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject
from fot_jax.pretrained import load_pretrained
from fot_jax.tokenizer import check_vocab, open_tokenizer

_CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/eval/.", lock_config=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Working directory of train.py or its URL, or another model.")
_OUT = flags.DEFINE_string("out", "", "Folder for the report; by default eval/ in the checkpoint's.")


def main(argv: list[str]) -> None:
    """The command."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; overrides are written --config.KEY=VALUE")
    host.keep_freed_memory()
    logging.set_verbosity(logging.WARNING)  # Orbax has fifty lines to say about a checkpoint
    evaluate(_CONFIG.value, _CHECKPOINT.value, _OUT.value)


def evaluate(config: ConfigDict, stated: str, folder: str = "") -> None:
    """Checks, then data, then the evaluation.

    Args:
        config: of the evaluation, as the files in configs/eval make it.
        stated: the checkpoint.
        folder: for the report.
    """
    began, name = time.perf_counter(), config.evaluation
    if name not in evals.EVALUATIONS:
        raise ValueError(f"evaluation is {name!r}; wanted one of {', '.join(sorted(evals.EVALUATIONS))}")
    evaluation = importlib.import_module(evals.EVALUATIONS[name])
    if files.store_of(stated) and not folder:
        raise ValueError(f"checkpoint is {stated}; wanted --out too, a folder for the report")
    checkpoint = formats.local(stated).absolute()
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: no such directory; wanted train.py's or another model's")
    out = pathlib.Path(folder or checkpoint / "eval")

    # Everything that can be wrong, before any long work.
    found = run_config.read_model(checkpoint)
    evaluation.check(found, config.options)
    tokenizer = None
    if getattr(evaluation, "NEEDS_TOKENIZER", True):
        tokenizer = open_tokenizer(config.tokenizer or checkpoint)
        check_vocab(tokenizer, found.vocab_size, padded=True)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    inputs = evaluation.inputs(config, found, tokenizer, out)

    shardings = None
    if mesh.size > 1:
        shardings = lambda loaded: sharding.param_shardings(mesh, model.abstract_params(loaded))
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        loaded, params = load_pretrained(checkpoint, config.dtype, shardings)
        subject = Subject.of(loaded, params, tokenizer, config.options)
        same = identity.of(config, loaded, params, inputs, tokenizer)
        journal = Journal(out / f"{name}.{identity.digest(same)[:8]}.partial.jsonl", same)
        start = time.perf_counter()
        report = evaluation.run(subject, config.options, inputs, journal)
    speed = subject.clock.speed(time.perf_counter() - start)
    print(report.table())
    written = report.write(out, name)
    files.write_json(out / f"{name}.speed.json", speed)
    journal.close()
    print(f"{subject.clock.described(speed)}; {time.perf_counter() - began:,.0f} s in all")
    print(f"written: {', '.join(map(str, written))}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "checkpoint"])
    app.run(main)
