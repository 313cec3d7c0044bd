r"""Passkey retrieval by length and depth, of any model with a tokenizer.

    python eval.py --config=configs/eval/passkey.py --checkpoint=smollm --config.options.window=2048

Any hardware; a prompt costs what reading it costs. Of LongLLaMA 3B the paper reports 94.5% at 100,000 tokens and 73% at
256,000 (arXiv 2307.03170, section 4.2).
"""

from ml_collections import ConfigDict

from configs.eval import base
from fot_jax.evals import passkey


def get_config() -> ConfigDict:
    """The configuration."""
    return base.get_config("passkey", passkey.default_options())
