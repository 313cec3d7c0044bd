r"""Perplexity by memory length on held-out documents, of a checkpoint of train.py or a Hugging Face directory.

    python eval.py --config=configs/eval/perplexity.py --checkpoint=/tmp/tiny \
        --config.options.memory_tokens="(0,256,1024)"

Two CPU cores, a small model: a few thousand tokens a second for every memory length.
"""

from ml_collections import ConfigDict

from configs.eval import base
from fot_jax.evals import perplexity, texts


def get_config() -> ConfigDict:
    """The configuration."""
    config = base.get_config("perplexity", perplexity.default_options())
    config.data = texts.data_options("python:validation")
    return config
