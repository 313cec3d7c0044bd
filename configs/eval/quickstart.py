"""Perplexity by memory length of the quickstart's models, on held-out packages of Python's library.

    python eval.py --config=configs/eval/quickstart.py --checkpoint=results/quickstart/fot

`make quickstart` runs it. A minute or two on one CPU core.
"""

from ml_collections import ConfigDict

from configs.eval import perplexity


def get_config() -> ConfigDict:
    """The configuration."""
    config = perplexity.get_config()
    config.options.update(memory_tokens=(0, 64, 128, 256, 512, 1024, 2048), rows=20, max_tokens=8192)
    return config
