r"""Perplexity by memory length on held-out documents, of a checkpoint of train.py or a Hugging Face directory.

    python eval.py --config=configs/eval/perplexity.py --checkpoint=/tmp/tiny \
        --config.options.memory_tokens="(0,256,1024)"

Two CPU cores, a small model: a few thousand tokens a second for every memory length.
"""

from ml_collections import ConfigDict

from fot_jax.evals import perplexity


def get_config() -> ConfigDict:
    """The configuration."""
    return ConfigDict(
        dict(
            evaluation="perplexity",
            dtype="float32",  # parameters and computation
            data=dict(
                sources=(
                    "python:validation",
                ),  # as sources.open_corpus takes them: files, folders, python:SPLIT, tfds:NAME:SPLIT
                field="text",  # that holds the text, where documents have fields
                skip_short=False,  # leave out documents of fewer than two tokens, instead of refusing them
                tokenizer="",  # SentencePiece model, tokenizer.json or directory; the checkpoint's by default
                prepared="",  # folder for tokenised documents; by default data/ beside the report
            ),
            options=perplexity.default_options(),
        )
    )
