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
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fot_jax import attention, crossbatch, model, sharding
from fot_jax.config import ModelConfig
from fot_jax.evals import Report, plots, texts
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject, check_reading, reading_options
from fot_jax.tokenizer import Tokenizer

Array = jax.Array
KeysValues = tuple[Array, Array]  # un-rotated [R, G, T, K] each

_MEANT = ("window", "rows")  # of `reading_options`: no memory is read, and no text but windows


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        rows=64,  # R, documents whose previous windows are each other's contexts
        contexts=(1, 2, 4, 8, 16, 32, 64),  # d
        layers=(),  # that read contexts; (): the model's memory layers. To be stated for a model without
        batches=1,  # of as many documents as rows
        first=0,  # which window of a document is the previous one, counted from 0
        windows=1,  # so many, one after another, are the previous one in turn
        seed=0,  # documents are drawn among those that are long enough
    )
    return ConfigDict(options)


def inputs(config: ConfigDict, tokenizer: Tokenizer, folder: pathlib.Path) -> list[np.ndarray]:
    """Documents as tokens; see `texts.documents`."""
    return texts.documents(config.data, tokenizer, folder)


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range, one of `reading_options` that has no meaning here, or no layer to read
            contexts.
    """
    check_reading(config, options)
    for name, default in reading_options().items():
        if name not in _MEANT and options[name] != default:
            raise ValueError(f"{name} is {options[name]!r}; wanted {default!r}: no memory is read")
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
    """Keys and values of some layers, of windows that are each read by themselves."""
    return _through(config, params, tokens_RT, layers, None, None)[0]


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
        tokens_RT: int32, current windows.
        contexts: see `previous`; row i is the positive of row i.
        d: int32, contexts that a row reads, 1..R. No program depends on it.
        layers: that read contexts.
    """
    return jnp.stack(_through(config, params, tokens_RT, layers, contexts, d)[1])


def _through(
    config: ModelConfig,
    params: model.Params,
    tokens_RT: Array,
    layers: tuple[int, ...],
    contexts: list[KeysValues] | None,
    d: Array | None,
) -> tuple[list[KeysValues], list[Array]]:
    """Through the model up to the last of `layers`: their keys and values, and where there are contexts r_d, [H]."""
    R, T = tokens_RT.shape
    table = attention.rotary_angles(T, config.head_size, config.rope_base)
    alone, scale = crossbatch.published_plan(R, 0), model.score_scale(config)
    kept: list[KeysValues] = []
    found: list[Array] = []

    def attend(number: int, q: Array, k: Array, v: Array) -> Array:
        angles = table if number not in layers or config.mem_positionals else None
        if number in layers:
            kept.append((k, v))
        if number not in layers or contexts is None:
            return crossbatch.crossbatch_attention(alone, q, k, v, angles, None, scale=scale)
        turned = (x if angles is None else attention.rotate(x, angles) for x in (q, k))
        kernel = attention.kernel("auto", T, config.head_size, q.dtype)
        read = functools.partial(_with_contexts, kernel, scale, sharding.axes("batch"))
        heads, kv_heads = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
        given, wanted = (heads, *[kv_heads] * 4, ()), (heads, ("batch", "heads", None))
        o, mass_RHT = sharding.each_device(read, given, wanted)(*turned, v, *contexts[layers.index(number)], d)
        found.append(jnp.mean(mass_RHT, axis=(0, 2)))
        return o

    x_RTD = model.embed(config, params, tokens_RT)
    for number, block in enumerate(model.layers(config, params)[: layers[-1] + 1]):
        x_RTD, _ = model.Block(config).apply({"params": block}, x_RTD, functools.partial(attend, number))
    return kept, found


def _with_contexts(
    kernel: attention.Kernel,
    scale: float,
    axes: tuple[str, ...],
    q: Array,
    k_own: Array,
    v_own: Array,
    k: Array,
    v: Array,
    d: Array,
) -> tuple[Array, Array]:
    """(o of one softmax over the own window and d contexts, r_d of each query [R, H, T]) of the rows of one device.

    Contexts go round from row to row, so that scores of one of them exist at a time.
    """
    own = kernel.read(q, attention.Keys(k_own, v_own), True, scale)

    def read(k: Array, v: Array) -> attention.Partial:
        partial = kernel.read(q, attention.Keys(k, v), False, scale)
        return attention.Partial(*(x.astype(jnp.float32) for x in partial))

    def another(_: Array, state: tuple) -> tuple:
        partial, *context = state
        context = [sharding.roll_rows(x, 1, axes) for x in context]
        return attention.merge(partial, read(*context)), *context

    positive = read(k, v)
    far, *_ = jax.lax.fori_loop(1, d, another, (positive, k, v))
    return attention.merge(own, far).o_BHTK.astype(q.dtype), jnp.exp(positive.lse_BHT - far.lse_BHT)


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


def run(subject: Subject, options: ConfigDict, documents: Sequence[np.ndarray], journal: Journal) -> Report:
    """r_d of every layer that reads contexts.

    Args:
        options: as `default_options`.
        documents: int token arrays.

    Raises:
        ValueError: see `check` and `batches_of`.
    """
    config, window = subject.config, subject.config.window
    check(config, options)
    batches, layers = batches_of(documents, options, window), reading_layers(config, options)
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
