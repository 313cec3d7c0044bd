"""Perplexity by memory length of the quickstart's models, on held-out packages of Python's library.

    python eval.py --config=configs/eval/quickstart.py --checkpoint=results/quickstart/fot

`make quickstart` runs it. A minute or two on one CPU core.
"""

from ml_collections import ConfigDict

from configs.eval import perplexity


def get_config() -> ConfigDict:
    """The configuration."""
    config = perplexity.get_config()
    # 3072 tokens are four times the contexts that training showed. Each query reads its 16 best slots: dense reading is
    # as good to 1024 tokens, and loses 2% by 3072.
    config.options.update(reading="topk", k=16, rows=20, max_tokens=8192)
    config.options.memory_tokens = (0, 64, 256, 512, 1024, 2048, 3072)
    return config
