"""Documents that evaluations read, of any source that training takes."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fot_jax import data, sources
from fot_jax.tokenizer import Tokenizer


def source_options(*default: str) -> dict[str, Any]:
    """Where documents come from; the part `data` of the configuration of an evaluation that reads them as text."""
    return dict(
        sources=default,  # as sources.open_corpus takes them: files, folders, python:SPLIT, tfds:NAME:SPLIT
        field="text",  # that holds the text, where documents have fields
    )


def data_options(*default: str) -> dict[str, Any]:
    """The same of one that reads `documents`."""
    return dict(
        **source_options(*default),
        skip_short=False,  # leave out documents of fewer than two tokens, instead of refusing them
        prepared="",  # folder for tokenised documents; by default data/ beside the report
    )


def corpora(options: ConfigDict) -> list[sources.Corpus]:
    """The sources, opened.

    Raises:
        ValueError: none stated.
        FileNotFoundError: one that is not there.
    """
    if not options.sources:
        raise ValueError("config key data.sources is empty; wanted at least one source")
    return [sources.open_corpus(source, field=options.field) for source in options.sources]


def documents(options: ConfigDict, tokenizer: Tokenizer, folder: pathlib.Path) -> list[np.ndarray]:
    """Documents as tokens, int32, each with its BOS, where the model expects one, and its EOS.

    Args:
        folder: where those that were tokenised are kept, unless `prepared` says.

    Raises:
        ValueError: a tokenizer without BOS or EOS; documents of fewer than two tokens.
    """
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise ValueError(
            f"the tokenizer's bos is {tokenizer.bos_id}, its eos {tokenizer.eos_id}; wanted both, for documents"
        )
    prepared = options.prepared or folder / "data"
    sets = [data.prepare(corpus, tokenizer, prepared, skip_short=options.skip_short) for corpus in corpora(options)]
    mixture = data.Mixture([data.Source(found) for found in sets], seed=None, repeat=False)
    first = 0 if tokenizer.adds_bos else 1  # a set's documents begin with BOS; not every model expects it
    return [mixture.tokens(i)[first:] for i in range(mixture.n_documents)]


def strings(options: ConfigDict) -> list[str]:
    """Documents as text."""
    return [document.text for corpus in corpora(options) for document in corpus.documents()]
