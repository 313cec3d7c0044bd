"""A run small enough to train in tests: its configuration, and batches that are a function of their number alone."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fot_jax.run_config import default_config

V, T = 32, 16


class Batches:
    """Endless batches of a language in which each token mostly follows from the one before; state is a number."""

    def __init__(self, rows: int = 8, length: int = T, seed: int = 0):
        self.rows, self.length, self.seed, self.n = rows, length, seed, 0

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        random = np.random.default_rng([self.seed, self.n])
        self.n += 1
        tokens = np.empty((self.rows, self.length + 1), np.int32)
        tokens[:, 0] = random.integers(1, V, self.rows)
        for t in range(self.length):
            noise = random.integers(1, V, self.rows)
            tokens[:, t + 1] = np.where(random.random(self.rows) < 0.9, (5 * tokens[:, t] + 3) % V, noise)
        mask = random.random((self.rows, self.length)) < 0.8  # uneven, so that weighting by tokens shows
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_mask": mask,
            "segment_ids": np.ones((self.rows, self.length), np.int32),
        }

    def get_state(self) -> dict[str, Any]:
        return {"n": self.n}

    def set_state(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def config(**changes: Any) -> ConfigDict:
    """A two-layer model with one memory layer; `changes` are keys with dots written as two underscores."""
    c = default_config()
    c.steps, c.log_every = 8, 1
    c.model.update(vocab_size=V, d_model=16, d_ff=32, n_layers=2, n_heads=4, n_kv_heads=2, window=T, mem_layers=(1,))
    c.batch.rows = 8
    c.crossbatch.update(kind="published", packing=2, contexts=(3,))
    c.optimizer.update(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)
    c.mesh.data = 1
    c.checkpoint.every = 2
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = c
        for name in parents:
            node = node[name]
        node[last] = value
    return c


def being_saved(workdir: Any, step: int | str = "*") -> bool:
    """Whether some bytes of a step's arrays are written, by default of any step's, but the checkpoint is not whole."""
    try:
        return any((pathlib.Path(workdir) / "checkpoints").glob(f"{step}.orbax-checkpoint-tmp/*/**/d/*"))
    except OSError:  # renamed meanwhile
        return False


def data_options(folder: pathlib.Path) -> dict[str, Any]:
    """Configuration keys of train.py for texts and a tokenizer that are made in a folder."""
    from fot_jax.tokenizer import train_tokenizer

    random = np.random.RandomState(0)
    words = ["".join(random.choice(list("aeioubdgklmnprst"), random.randint(2, 9))) for _ in range(300)]
    often = 1 / np.arange(1, 301)
    texts = [" ".join(random.choice(words, 1000, p=often / often.sum())) for _ in range(30)]
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number}.txt").write_text(text)
    train_tokenizer(texts, folder / "tokenizer.model", 400)
    return {
        "model.vocab_size": 400,
        "data.train": f"('{folder / 'text'}',)",
        "data.tokenizer": folder / "tokenizer.model",
        "data.skip_short": True,
    }


get_config = config  # what train.py calls


if __name__ == "__main__":  # python tests/toy.py WORKDIR KEY=VALUE ...: a run in a process of its own, to be killed
    import ast
    import logging
    import resource
    import signal

    from fot_jax import training

    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("fot_jax").setLevel(logging.INFO)
    stated = dict(pair.split("=") for pair in sys.argv[2:])
    if limit := int(stated.pop("file_size_limit", 0)):  # writes beyond it fail, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    c = config(**{key: ast.literal_eval(value) for key, value in stated.items()})
    training.train(c, sys.argv[1], Batches(c.batch.rows), Batches(c.batch.rows, seed=1))
