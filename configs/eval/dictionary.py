r"""Dictionary lookup by the size of the dictionary (arXiv 2307.03170, section 5.2), of a model trained for the task.

    python eval.py --config=configs/eval/dictionary.py --checkpoint=/tmp/dictionary \
        --config.options.dictionary_tokens="(256,4096,65536)"

The paper's FoT model of 37M parameters is above 92% at 2**24 tokens, its baseline fails at 16384. Memory of that model
takes 2 KiB a token in bfloat16 (`--config.options.memory_dtype=bfloat16`), for each of `rows` dictionaries: 2**24
tokens are read with rows=1.
"""

from ml_collections import ConfigDict

from configs.eval import base
from fot_jax.evals import dictionary


def get_config() -> ConfigDict:
    """The configuration."""
    config = base.get_config("dictionary", dictionary.default_options())
    del config.tokenizer  # texts are tokens
    return config
