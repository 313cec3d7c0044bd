r"""Few-shot classification and question answering, with as many demonstrations as fit the context.

    python eval.py --config=configs/eval/fewshot.py --checkpoint=longllama_3b \
        --config.options.train=train_5500.label --config.options.test=TREC_10.label

TREC's files are at cogcomp.seas.upenn.edu/Data/QA/QC, `--config.options.labels=fine` asks for its 50 classes. With
`--config.options.format=webqs` the files are WebQuestions', with `jsonl` any others; bench/brown_genres.py makes some.
`--config.options.lengths="()" --config.options.demonstrations="(1,2,4,8,16)"` counts demonstrations instead.

Of LongLLaMA 3B the paper reports 67.0, 71.6, 72.9 and 73.3% on TREC with contexts of 2K, 4K, 6K and 8K tokens, 21.2,
21.4, 22.2 and 22.4% on WebQuestions (arXiv 2307.03170, table 1).
"""

from ml_collections import ConfigDict

from configs.eval import base
from fot_jax.evals import fewshot


def get_config() -> ConfigDict:
    """The configuration."""
    return base.get_config("fewshot", fewshot.default_options())
