"""Distraction: how much of the attention to d contexts goes to the one that belongs to the document (arXiv 2307.03170,
sections 3.2 and 3.3, figure 3).

R documents are read side by side, as in crossbatch training (`crossbatch.block_plan`): of each a previous window, read
by itself, and the current one, whose memory layers read the previous windows of documents i, i+1, ... i+d-1 modulo R.
The first of these d contexts is the document's own, the positive. With w_ij the weight on key j of context i,

    r_d = sum_j w_1j / sum_i sum_j w_ij,

so that the weights on the current window itself, which shares the softmax, are left out. Where attention does not tell
contexts apart, r_d is 1/d.

The paper does not say over what it averages. Here r_d is that of each query of each head, and the mean is taken over
the queries of all current windows; the table has the mean over heads. Later memory layers see what earlier ones read at
the same d.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fot_jax import attention, model, sharding
from fot_jax.config import ModelConfig
from fot_jax.evals import Report, plots, texts
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject, check_reading
from fot_jax.tokenizer import Tokenizer

Array = jax.Array
KeysValues = tuple[Array, Array]  # un-rotated [R, G, T, K] each


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = dict(
        window=0,  # tokens of a window, at most the checkpoint's; 0: as many
        rows=64,  # R, documents whose previous windows are each other's contexts
        contexts=(1, 2, 4, 8, 16, 32, 64),  # d
        layers=(),  # that read contexts; (): the model's memory layers. To be stated for a model without
        batches=1,  # of as many documents as rows
        first=0,  # which window of a document is the previous one, counted from 0
        windows=1,  # so many, one after another, are the previous one in turn
        seed=0,  # documents are drawn among those that are long enough
    )
    return ConfigDict(options)


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> list[np.ndarray]:
    """Batches of windows; see `texts.documents` and `batches_of`."""
    documents = texts.documents(config.data, tokenizer, folder)
    return batches_of(documents, config.options, config.options.window or model.window)


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range, or no layer to read contexts.
    """
    check_reading(config, options)
    if not options.contexts or min(options.contexts) < 1 or max(options.contexts) > options.rows:
        raise ValueError(f"contexts is {options.contexts}; wanted numbers in 1..{options.rows} (rows)")
    if min(options.batches, options.windows) < 1 or min(options.first, options.seed) < 0:
        raise ValueError(
            f"batches is {options.batches}, windows {options.windows}, first {options.first} and seed {options.seed}; "
            f"wanted at least 1, 1, 0 and 0"
        )
    layers = reading_layers(config, options)
    if not layers:
        raise ValueError("the model has no memory layers (mem_layers is empty); wanted layers stated")
    if min(layers) < 0 or max(layers) >= config.n_layers:
        raise ValueError(f"layers is {options.layers}; wanted numbers in 0..{config.n_layers - 1} (n_layers)")


def reading_layers(config: ModelConfig, options: ConfigDict) -> tuple[int, ...]:
    """Layers that read contexts, in order."""
    return tuple(sorted(set(options.layers or config.mem_layers)))


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def previous(
    config: ModelConfig, params: model.Params, tokens_RT: Array, *, layers: tuple[int, ...]
) -> list[KeysValues]:
    """Keys and values of some layers, of windows that are each read by themselves. Every device has those of all rows,
    and its part of the heads.

    Args:
        tokens_RT: int32; devices divide the rows.
    """
    kept = _by_rows(config, lambda tokens_BT: _through(config, params, tokens_BT, layers)[0], tokens_RT)
    return jax.tree.map(lambda x: sharding.constrain(x, None, "kv_heads", None, None), kept)


@functools.partial(jax.jit, static_argnames=("config", "layers"))
def masses(
    config: ModelConfig,
    params: model.Params,
    tokens_RT: Array,
    contexts: list[KeysValues],
    d: Array,
    *,
    layers: tuple[int, ...],
) -> Array:
    """r_d, float32 [layers, H], the mean over all queries.

    Args:
        tokens_RT: int32, current windows; devices divide the rows.
        contexts: see `previous`; row i is the positive of row i.
        d: int32, contexts that a row reads, 1..R. No program depends on it.
        layers: that read contexts.
    """
    one = lambda tokens_BT, rows_B: _through(config, params, tokens_BT, layers, contexts, rows_B, d)[1]
    return jnp.stack([jnp.mean(r_RH, axis=0) for r_RH in _by_rows(config, one, tokens_RT, np.arange(len(tokens_RT)))])


def _by_rows(config: ModelConfig, f: Callable[..., Any], tokens_RT: Array, *more: Array) -> Any:
    """`f` of some rows of every device at a time: as many as keep scores of their windows within
    `model.WINDOW_SCORE_BYTES`, or one.
    """
    (R, T), ways = tokens_RT.shape, sharding.ways("batch")
    most = max(1, model.WINDOW_SCORE_BYTES // (4 * config.n_heads * T * T))
    n = next(n for n in range(1, R + 1) if R % (ways * n) == 0 and R // (ways * n) <= most)

    def swapped(x: Array, first: int, second: int) -> Array:
        return jnp.swapaxes(x.reshape(first, second, -1, *x.shape[1:]), 0, 1).reshape(x.shape)

    cut = [swapped(jnp.asarray(x), ways, n).reshape(n, R // n, *x.shape[1:]) for x in (tokens_RT, *more)]
    found = attention.one_by_one(lambda some: f(*some), cut)
    return jax.tree.map(lambda x: swapped(x.reshape(R, *x.shape[2:]), n, ways), found)


def _through(
    config: ModelConfig,
    params: model.Params,
    tokens_BT: Array,
    layers: tuple[int, ...],
    contexts: list[KeysValues] | None = None,
    rows_B: Array | None = None,
    d: Array | None = None,
) -> tuple[list[KeysValues], list[Array]]:
    """Rows of these numbers through the model up to the last of `layers`: their keys and values, and where there are
    contexts r_d, [B, H], the mean over queries.
    """
    T = tokens_BT.shape[1]
    table, everything = attention.rotary_angles(T, config.head_size, config.rope_base), jnp.ones((1, T, 1), bool)
    score_bytes = model.WINDOW_SCORE_BYTES * sharding.ways("batch")  # of all devices
    read = functools.partial(attention.attend_by_blocks, scale=model.score_scale(config), score_bytes=score_bytes)
    of_rows = lambda x: sharding.constrain(x, "batch", "kv_heads", None, None)
    kept: list[KeysValues] = []
    found: list[Array] = []

    def attend(number: int, q: Array, k: Array, v: Array) -> Array:
        rotates = config.mem_positionals or number not in config.mem_layers
        q, k_own = (attention.rotate(x, table) for x in (q, k)) if rotates else (q, k)
        partial = read(q, k_own, v, attention.causal_mask(T))
        if number in layers and contexts is not None:
            each = contexts[layers.index(number)]

            def context(c: Array | int) -> attention.Partial:
                return read(q, *(of_rows(x[(rows_B + c) % len(x)]) for x in each), everything)

            positive = context(0)
            far = jax.lax.fori_loop(1, d, lambda c, far: attention.merge(far, context(c)), positive)
            found.append(jnp.mean(jnp.exp(positive.lse_BHT - far.lse_BHT), axis=2))
            partial = attention.merge(partial, far)
        if number in layers:
            kept.append((k, v))
        return partial.o_BHTK.astype(q.dtype)

    x_BTD = model.embed(config, params, tokens_BT)
    for number, block in enumerate(model.layers(config, params)[: layers[-1] + 1]):
        x_BTD, _ = model.Block(config).apply({"params": block}, x_BTD, functools.partial(attend, number))
    return kept, found


def batches_of(documents: Sequence[np.ndarray], options: ConfigDict, window: int) -> list[np.ndarray]:
    """int32 [R, windows + 1, W] for each batch: windows of documents, those of a row one after another.

    Raises:
        ValueError: too few documents that are long enough.
    """
    first, end = options.first * window, (options.first + options.windows + 1) * window
    long = [document for document in documents if len(document) >= end]
    wanted = options.rows * options.batches
    if len(long) < wanted:
        raise ValueError(
            f"{len(long):,} of {len(documents):,} documents have {end:,} tokens ({options.first} + {options.windows} + "
            f"1 windows); wanted at least {wanted:,} (rows x batches)"
        )
    order = np.random.default_rng(options.seed).permutation(len(long))[:wanted]
    cut = np.stack([long[i][first:end].reshape(-1, window) for i in order])
    return list(cut.reshape(options.batches, options.rows, *cut.shape[1:]))


def run(subject: Subject, options: ConfigDict, batches: Sequence[np.ndarray], journal: Journal) -> Report:
    """r_d of every layer that reads contexts.

    Args:
        options: as `default_options`.
        batches: see `batches_of`.

    Raises:
        ValueError: see `check`; rows that devices do not divide.
    """
    config, window = subject.config, subject.config.window
    check(config, options)
    if options.rows % sharding.ways("batch"):
        mesh = dict(jax.sharding.get_abstract_mesh().shape)
        raise ValueError(
            f"rows is {options.rows}; wanted a multiple of {sharding.ways('batch')}, over which mesh {mesh} splits them"
        )
    layers = reading_layers(config, options)
    numbers = sorted(set(options.contexts))

    def measure(before_RT: np.ndarray, now_RT: np.ndarray) -> list[list[list[float]]]:
        """[d][layer][head]."""
        out = []
        with subject.clock.model():
            contexts = jax.block_until_ready(previous(config, subject.params, before_RT, layers=layers))
        subject.clock.count(before_RT.size)
        for d in numbers:
            with subject.clock.model():
                found = masses(config, subject.params, now_RT, contexts, np.int32(d), layers=layers)
                out.append(np.asarray(found).tolist())
            subject.clock.count(now_RT.size)
        return out

    parts = [
        Part(
            f"batch {i}, window {options.first + w}",
            (1 + len(numbers)) * options.rows * window,
            functools.partial(measure, batch[:, w], batch[:, w + 1]),
        )
        for i, batch in enumerate(batches)
        for w in range(options.windows)
    ]
    found = np.mean(journal.results(parts, "distraction", subject.clock), axis=0)  # [d, layer, head]
    mean = found.mean(axis=2)
    curves = {f"layer {layer}": dict(zip(map(str, numbers), mean[:, i].tolist())) for i, layer in enumerate(layers)}
    queries = options.rows * options.batches * options.windows * window
    title = (
        f"distraction: share of the attention to d contexts that goes to the document's own, window {window},\n"
        f"mean over heads and {queries:,} queries of {options.rows * options.batches} documents, of which "
        f"{options.rows} are side by side"
    )

    def plot(path: pathlib.Path) -> None:
        lines = {**curves, "1/d": {str(d): 1 / d for d in numbers}}
        y = "attention to the own previous window"
        panel = plots.Panel("distraction", "contexts, d", y, lines, limits=(-0.03, 1.03), dashed=("1/d",))
        plots.lines(path, [panel])

    return Report(
        title=title,
        columns=("contexts", "1/d", *curves),
        rows=tuple((d, 1 / d, *mean[i].tolist()) for i, d in enumerate(numbers)),
        values=dict(
            options=options.to_dict(),
            window=window,
            queries=queries,
            mass={str(layer): curves[f"layer {layer}"] for layer in layers},
            mass_of_heads={
                str(layer): {str(d): found[j, i].tolist() for j, d in enumerate(numbers)}
                for i, layer in enumerate(layers)
            },
        ),
        plot=plot,
    )
