r"""Attention to the document's own context among d of them (arXiv 2307.03170, figure 3), of any model.

    python eval.py --config=configs/eval/distraction.py --checkpoint=results/quickstart/fot2

Two CPU cores: ten seconds; with `--config.options.windows=32` the quickstart's fot2 gives 0.24 of it to its own of 16
contexts, standard2 0.12, and 1/16 is 0.06.

With enough documents of your own (`--config.data.sources`), up to 64 of them side by side, as in the paper:
`--config.options.rows=64 --config.options.contexts="(1,2,4,8,16,32,64)"`; `windows` and `batches` take more of them.
Of a model without memory layers say which layers to look at: `--config.options.layers="(6,12,18)"`.
"""

from ml_collections import ConfigDict

from configs.eval import base
from fot_jax.evals import distraction, texts


def get_config() -> ConfigDict:
    """The configuration."""
    config = base.get_config("distraction", distraction.default_options())
    config.data = texts.data_options("python:validation")
    config.options.update(rows=16, contexts=(1, 2, 4, 8, 16))  # the held-out packages are few
    return config
