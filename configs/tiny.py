"""A model small enough for any machine, on Python's own library: to see every part of training work.

    python -m fot_jax.data train-tokenizer python:train --output=/tmp/tiny.model --vocab_size=1024
    python train.py --config=configs/tiny.py --workdir=/tmp/tiny --config.data.tokenizer=/tmp/tiny.model

Two CPU cores, about a minute; the loss falls from 6.9 (the logarithm of the vocabulary) to about
4.5, on held-out packages to about 5.1.
"""

from ml_collections import ConfigDict

from fot_jax.run_config import default_config


def get_config() -> ConfigDict:
    """The configuration."""
    config = default_config()
    config.steps = 200
    config.model.update(
        vocab_size=1024, d_model=64, d_ff=176, n_layers=3, n_heads=4, window=64, mem_layers=(1,), last_context_length=64
    )
    config.batch.rows = 16
    config.loss_chunk = 512
    config.crossbatch.update(kind="published", packing=2, contexts=(3,))
    config.optimizer.update(name="adamw", learning_rate=3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01)
    config.data.update(train=("python:train",), validation=("python:validation",), tokenizer="/tmp/tiny.model")
    config.validation.update(every=100, batches=4)
    config.checkpoint.every = 100
    return config
