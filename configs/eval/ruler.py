r"""RULER's synthetic tasks by length, of any model with a tokenizer; pip install 'fot_jax[ruler]' first.

    python eval.py --config=configs/eval/ruler.py --checkpoint=smollm --config.options.samples=20 \
        --config.options.lengths="(4096,8192)"
    python eval.py --config=configs/eval/ruler.py --checkpoint=smollm --config.data.sources="('essays',)" \
        --config.options.tasks="('niah_single_2','niah_multiquery')"

Any hardware; a sample costs what reading it costs, and up to 128 generated tokens. A model without memory layers reads
no more than its window. The second command hides needles in texts of a folder; RULER's are Paul Graham's essays.
"""

from ml_collections import ConfigDict

from configs.eval import base
from fot_jax.evals import ruler, texts


def get_config() -> ConfigDict:
    """The configuration."""
    config = base.get_config("ruler", ruler.default_options())
    config.data = texts.source_options()
    return config
