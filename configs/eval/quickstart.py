"""Perplexity by memory length of the quickstart's models, on held-out packages of Python's library.

    python eval.py --config=configs/eval/quickstart.py --checkpoint=results/quickstart/fot2

`make quickstart` runs it. A minute or two on one CPU core.
"""

from ml_collections import ConfigDict

from configs.eval import perplexity


def get_config() -> ConfigDict:
    """The configuration."""
    config = perplexity.get_config()
    # 3072 tokens are four times what training ever showed a row (12 windows of 64). Each query reads its 16 best slots.
    config.options.update(reading="topk", k=16, rows=20, max_tokens=8192)
    config.options.memory_tokens = (0, 64, 256, 512, 1024, 2048, 3072)
    return config
