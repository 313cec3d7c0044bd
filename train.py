"""Trains a Focused Transformer.

    python train.py --config=configs/tiny.py --workdir=/tmp/tiny --config.steps=100

The same command again goes on from the latest checkpoint in the working directory, with the same bits as if it had
never stopped. `--config.KEY=VALUE` replaces any key of the file; unknown keys are errors.
"""

from __future__ import annotations

import logging
import pathlib

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from fot_jax import checkpoint, data, run_config, training
from fot_jax.host import keep_freed_memory
from fot_jax.tokenizer import Tokenizer, check_vocab

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File in configs/, with a function get_config().", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and tokenised documents.")


def main(argv: list[str]) -> None:
    """Checks, then data, then training."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; overrides are written --config.KEY=VALUE")
    keep_freed_memory()
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax has fifty lines to say about a checkpoint
    log = logging.getLogger("fot_jax")
    log.setLevel(logging.INFO)
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value).absolute()

    # 1. Everything that can be wrong with the configuration, before any long work.
    model, mesh = training.check(config, workdir)
    if not config.data.tokenizer:
        raise ValueError("config key data.tokenizer is empty; wanted a SentencePiece model or a tokenizer.json")
    tokenizer = Tokenizer.load(config.data.tokenizer)
    check_vocab(tokenizer, model.vocab_size, padded=bool(config.init_from))
    if checkpoint.is_workdir(workdir):
        for kept in (workdir / name for name in ("tokenizer.model", "tokenizer.json")):
            if kept.exists() and Tokenizer.load(kept).fingerprint != tokenizer.fingerprint:
                raise ValueError(
                    f"{config.data.tokenizer} is another tokenizer than {kept}, which the checkpoints there are of"
                )
    splits = ("train", "validation") if config.validation.every else ("train",)
    corpora = {split: run_config.open_corpora(config, split) for split in splits}
    log.info("model %s on mesh %s", model, dict(mesh.shape))
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(workdir / tokenizer.file_name)

    # 2. Data: tokenised the first time, then opened. Batches are made ahead in a thread.
    prepared = config.data.prepared or workdir / "data"
    documents = run_config.data_source(config, "train", corpora["train"], tokenizer, prepared)
    batches = data.Batches(run_config.packed(config, model, documents))
    validation = ()
    if config.validation.every:
        held_out = run_config.data_source(config, "validation", corpora["validation"], tokenizer, prepared)
        validation = data.Batches(run_config.packed(config, model, held_out))

    # 3. Parameters, optimizer and data position: from the latest checkpoint in the working directory; else parameters
    #    from init_from; else initial ones. Then steps until config.steps, or SIGTERM.
    training.train(config, workdir, batches, validation)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
