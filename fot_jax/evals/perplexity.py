"""Perplexity as a function of memory length (arXiv 2307.03170, sections 4.2 and 5).

Documents are read in windows of W tokens. Before each window, memory holds the last m tokens read: of the same document
(single-document: memory is cleared where one starts), or of whatever the row read before (multi-document). The
perplexity of memory length m is exp of the mean negative log-likelihood over all tokens but the first of each document.

*Recall tokens* are reported beside: a token that completes a trigram whose last earlier occurrence in the document ends
before the current window, so that only memory can show it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fot_jax import memory, model
from fot_jax.config import ModelConfig
from fot_jax.evals import Report
from fot_jax.generate import remember

Array = jax.Array


def default_options() -> ConfigDict:
    """Every option with its default."""
    return ConfigDict(
        dict(
            memory_tokens=(0, 64, 256, 1024, 4096),  # memory lengths, in tokens
            mode="single",  # "single": memory cleared at each document; "multi": kept across documents
            reading="dense",  # or "topk"
            k=32,  # slots a query retrieves, for "topk"
            memory_dtype="",  # what memory is stored in: float32, bfloat16, float16 or int8; "": the checkpoint's
            rows=16,  # documents read side by side; "multi" reads all of a row's documents with one memory
            max_tokens=0,  # tokens taken of each document, from its start; 0: all
        )
    )


class Windows(NamedTuple):
    """Documents cut into windows for rows to read in step; all [steps, rows, W] but the last."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the next token of the document
    counts: np.ndarray  # bool, whether there is a target
    recall: np.ndarray  # bool, whether the target is a recall token
    valid: np.ndarray  # bool, whether there is a token
    starts: np.ndarray  # bool [steps, rows], whether a document starts with the window


class Losses(NamedTuple):
    """Mean negative log-likelihoods, nats a token, and how many tokens they are over."""

    all: float
    recall: float
    tokens: int
    recall_tokens: int


def recall_targets(tokens: np.ndarray, window: int) -> np.ndarray:
    """bool [n], whether token i completes a trigram whose last earlier occurrence ends before the window that
    predicts it.

    The window that predicts token i is the one that holds token i - 1.
    """
    n = len(tokens)
    out = np.zeros(n, bool)
    if n < 4:
        return out
    ids = tokens.astype(np.int64)
    base = int(ids.max()) + 1
    code = (
        (np.unique(ids[:-2] * base + ids[1:-1], return_inverse=True)[1]) * base + ids[2:]
    )  # of the trigram that ends at i + 2
    order = np.argsort(code, kind="stable")
    same = code[order[1:]] == code[order[:-1]]
    at, before = order[1:][same] + 2, order[:-1][same] + 2
    out[at] = before < (at - 1) // window * window
    return out


def cut(documents: Sequence[np.ndarray], window: int, rows: int) -> Windows:
    """Documents, each starting a window, dealt to rows so that all end at about the same time (longest first).

    Args:
        documents: int token arrays with their bos and eos, at least two tokens each.
        window: W.
        rows: at most as many as documents are used.
    """
    short = [i for i, document in enumerate(documents) if len(document) < 2]
    if not documents or short:
        raise ValueError(f"document {short[0]} has fewer than two tokens" if short else "no document to evaluate on")
    rows = min(rows, len(documents))
    lengths = [-(-(len(document) - 1) // window) for document in documents]
    queues: list[list[int]] = [[] for _ in range(rows)]
    ends = np.zeros(rows, int)
    for i in np.argsort(lengths, kind="stable")[::-1]:
        row = int(np.argmin(ends))
        queues[row].append(int(i))
        ends[row] += lengths[i]
    shape = (int(ends.max()), rows, window)
    out = Windows(*(np.zeros(shape, t) for t in (np.int32, np.int32, bool, bool, bool)), np.zeros(shape[:2], bool))
    for row, queue in enumerate(queues):
        step = 0
        for i in queue:
            document, steps = documents[i], slice(step, step + lengths[i])
            recall = recall_targets(document, window)

            def put(array: np.ndarray, values: np.ndarray, steps=steps, row=row) -> None:
                padded = np.zeros((steps.stop - steps.start) * window, array.dtype)
                padded[: len(values)] = values
                array[steps, row] = padded.reshape(-1, window)

            put(out.tokens, document[:-1])
            put(out.targets, document[1:])
            put(out.recall, recall[1:])
            for array in (out.counts, out.valid):
                put(array, np.ones(len(document) - 1, bool))
            out.starts[step, row] = True
            step += lengths[i]
    return out


@functools.partial(jax.jit, static_argnames=("config", "reading"), donate_argnames=("mem",))
def _step(config, params, tokens_BT, targets_BT, valid_BT, mem, keep, *, reading):
    """(memory with the window in it, cut to its last `keep` tokens; losses [B, T])."""
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    log_p = jax.nn.log_softmax(model.logits(config, params, hidden))
    loss_BT = -jnp.take_along_axis(log_p, targets_BT[..., None], axis=-1)[..., 0]
    if mem.capacity:
        mem = remember(mem, keys, values, valid_BT)
        mem = memory.evict_oldest(mem, jnp.maximum(mem.length_B - keep, 0))
    return mem, loss_BT


def losses(
    config: ModelConfig,
    params: Any,
    windows: Windows,
    memory_tokens: int,
    *,
    reading: memory.Reading = memory.DENSE,
    clear_at_documents: bool = True,
    progress: Callable[[Iterator], Iterator] = iter,
) -> Losses:
    """Mean losses over windows read with the last `memory_tokens` tokens in memory."""
    if memory_tokens < 0:
        raise ValueError(f"memory_tokens is {memory_tokens}; wanted 0 or more")
    rows, W = windows.tokens.shape[1:]
    # Nothing is read of an empty memory, so memory length 0 needs none at all.
    mem = memory.init_memory(config, rows, memory_tokens + W if memory_tokens else 0)
    keep, out = jnp.int32(memory_tokens), []
    for step in progress(range(len(windows.tokens))):
        if clear_at_documents and windows.starts[step].any():
            mem = memory.clear(mem, jnp.asarray(windows.starts[step]))
        batch = windows.tokens[step], windows.targets[step], windows.valid[step]
        mem, loss = _step(config, params, *batch, mem, keep, reading=reading)
        out.append(loss)
    nll = np.concatenate([np.asarray(x)[None] for x in out]).astype(np.float64)
    recall = windows.counts & windows.recall
    mean = lambda mask: float(nll[mask].mean()) if mask.any() else float("nan")
    return Losses(mean(windows.counts), mean(recall), int(windows.counts.sum()), int(recall.sum()))


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range, or memory for a model without memory layers.
    """
    if options.mode not in ("single", "multi"):
        raise ValueError(f"mode is {options.mode!r}; wanted 'single' or 'multi'")
    if any(m < 0 for m in options.memory_tokens) or not options.memory_tokens:
        raise ValueError(f"memory_tokens is {options.memory_tokens}; wanted lengths of 0 or more")
    if any(options.memory_tokens) and not config.mem_layers:
        raise ValueError("the model has no memory layers (mem_layers is empty); wanted memory_tokens=(0,)")
    if options.rows < 1 or options.max_tokens < 0:
        raise ValueError(f"rows is {options.rows} and max_tokens {options.max_tokens}; wanted at least 1 and 0")
    memory.Reading(options.reading, options.k if options.reading == "topk" else None)
    _stored(config, options)


def _stored(config: ModelConfig, options: ConfigDict) -> ModelConfig:
    """The model with memory in the dtype that is asked for."""
    return config.replace(dtypes=dataclasses.replace(config.dtypes, memory=options.memory_dtype or config.mem_dtype))


def described(options: Any) -> str:
    """How memory is read, in words: "dense", or "top-k, k=16, int8"."""
    way = "dense" if options["reading"] == "dense" else f"top-k, k={options['k']}"
    return f"{way}, {options['memory_dtype']}" if options.get("memory_dtype") else way


def run(
    config: ModelConfig,
    params: Any,
    options: ConfigDict,
    documents: Sequence[np.ndarray],
    progress: Callable[..., Iterator] = lambda steps, **_: iter(steps),
) -> Report:
    """Perplexity at every memory length.

    Args:
        config, params: the model.
        options: as `default_options`.
        documents: int token arrays with bos and eos.
        progress: wraps the iterator over windows (tqdm), told `desc`.

    Raises:
        ValueError: see `check`; no usable document; "multi" with fewer than two documents a row.
    """
    check(config, options)
    config = _stored(config, options)
    reading = memory.Reading(options.reading, options.k if options.reading == "topk" else None)
    if options.mode == "multi" and 2 * options.rows > len(documents):
        raise ValueError(
            f"rows is {options.rows} for {len(documents)} documents; mode 'multi' wanted at least two documents a row"
        )
    documents = [document[: options.max_tokens or None] for document in documents]
    windows = cut(documents, config.window, options.rows)
    found = {}
    for m in sorted(set(options.memory_tokens)):
        found[m] = losses(
            config,
            params,
            windows,
            m,
            reading=reading,
            clear_at_documents=options.mode == "single",
            progress=functools.partial(progress, desc=f"memory {m}"),
        )
    perplexity = {str(m): float(np.exp(x.all)) for m, x in found.items()}
    recall = {str(m): float(np.exp(x.recall)) for m, x in found.items()}
    any_ = next(iter(found.values()))
    return Report(
        title=(
            f"perplexity by memory length: {options.mode}-document, {described(options)}, window {config.window},\n"
            f"{any_.tokens:,} tokens of {len(documents)} documents, {any_.recall_tokens:,} of them recall tokens"
        ),
        columns=("memory tokens", "perplexity", "on recall tokens"),
        rows=tuple((m, perplexity[str(m)], recall[str(m)]) for m in found),
        values=dict(
            options=options.to_dict(),
            window=config.window,
            tokens=any_.tokens,
            recall_tokens=any_.recall_tokens,
            perplexity=perplexity,
            recall=recall,
        ),
        plot=lambda path: plot(path, {"perplexity": perplexity, "recall tokens": recall}),
    )


def plot(path: pathlib.Path, curves: dict[str, dict[str, float]]) -> None:
    """One panel a curve or group: perplexity against memory tokens. Names `a: b` put curve a into panel b."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, curve in curves.items():
        label, _, panel = name.rpartition(": ")
        panels.setdefault(panel, {})[label] = curve
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (panel, lines) in zip(axes[0], panels.items(), strict=True):
        for label, curve in lines.items():
            tokens = [int(m) for m in curve]
            axis.plot(range(len(tokens)), list(curve.values()), marker="o", label=label or None)
            axis.set_xticks(range(len(tokens)), [f"{m:,}" for m in tokens], rotation=30)
        axis.set_title(panel)
        axis.set_xlabel("memory, tokens")
        axis.set_ylabel("perplexity")
        axis.grid(alpha=0.3)
        if any(lines):
            axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
