"""Evaluates a model.

    python eval.py --config=configs/eval/perplexity.py --checkpoint=WORKDIR --out=results/perplexity

The checkpoint is a working directory of train.py, or the URL of one, or a Hugging Face directory. Prints a table, and
writes the same as JSON and PNG. `--config.KEY=VALUE` replaces any key of the file; unknown keys are errors.
"""

from __future__ import annotations

import importlib
import pathlib

import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from fot_jax import data, evals, files, formats, run_config, sources
from fot_jax.host import keep_freed_memory
from fot_jax.pretrained import load_pretrained
from fot_jax.tokenizer import Tokenizer, check_vocab

_CONFIG = config_flags.DEFINE_config_file("config", None, "File in configs/eval/.", lock_config=True)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Working directory of train.py or its URL, or Hugging Face directory."
)
_OUT = flags.DEFINE_string("out", "", "Folder for the report; by default eval/ in the checkpoint's.")


def main(argv: list[str]) -> None:
    """Checks, then data, then the evaluation."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; overrides are written --config.KEY=VALUE")
    keep_freed_memory()
    logging.set_verbosity(logging.WARNING)  # Orbax has fifty lines to say about a checkpoint
    config = _CONFIG.value
    if config.evaluation not in evals.EVALUATIONS:
        raise ValueError(f"evaluation is {config.evaluation!r}; wanted one of {', '.join(sorted(evals.EVALUATIONS))}")
    evaluation = importlib.import_module(evals.EVALUATIONS[config.evaluation])
    if files.store_of(_CHECKPOINT.value) and not _OUT.value:
        raise ValueError(f"checkpoint is {_CHECKPOINT.value}; wanted --out too, a folder for the report")
    checkpoint = formats.local(_CHECKPOINT.value).absolute()
    out = pathlib.Path(_OUT.value or checkpoint / "eval")

    # Everything that can be wrong, before any long work.
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no such directory; wanted train.py's or a Hugging Face model's")
    evaluation.check(run_config.read_model(checkpoint), config.options)
    if not config.data.sources:
        raise ValueError("config key data.sources is empty; wanted at least one source")
    corpora = [sources.open_corpus(source, field=config.data.field) for source in config.data.sources]
    tokenizer = Tokenizer.load(config.data.tokenizer or checkpoint)
    model, params = load_pretrained(checkpoint, config.dtype)
    check_vocab(tokenizer, model.vocab_size, padded=True)

    prepared = config.data.prepared or out / "data"
    sets = [data.prepare(corpus, tokenizer, prepared, skip_short=config.data.skip_short) for corpus in corpora]
    mixture = data.Mixture([data.Source(documents) for documents in sets], seed=None, repeat=False)
    first = 0 if tokenizer.adds_bos else 1  # a set's documents begin with BOS; not every model expects it
    documents = [mixture.tokens(i)[first:] for i in range(mixture.n_documents)]

    report = evaluation.run(model, params, config.options, documents, progress=tqdm.tqdm)
    print(report.table())
    report.write(out, config.evaluation)
    print(f"written: {out / config.evaluation}.json and .png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "checkpoint"])
    app.run(main)
