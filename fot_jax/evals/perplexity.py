"""Perplexity by memory length and by position in the document (arXiv 2307.03170, sections 4.2, 5.1 and 5.3).

Documents are read in windows of W tokens. Before each window, memory holds the last m tokens read: of the same document
(single-document: memory is cleared where one starts), or of whatever the row read before (multi-document). The
perplexity of memory length m is exp of the mean negative log-likelihood over all tokens but the first of each document.

Windows follow one another, so that the first token of each sees memory alone; or, with `stride` s < W, each begins s
tokens after the one before and its last s tokens count, which have W - s tokens before them in the window (sliding). A
token's keys and values are those of the window that counts it, and enter memory when it leaves the window.

*Recall tokens* are reported beside: a token that completes a trigram whose last earlier occurrence in the document ends
before the current window, so that only memory can show it.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fot_jax import losses as losses_of
from fot_jax import memory, model, sharding
from fot_jax.config import ModelConfig
from fot_jax.evals import Report, plots, texts
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject, check_reading, described, reading_options
from fot_jax.generate import placed_with
from fot_jax.memory.cache import DEALT_SLOTS
from fot_jax.tokenizer import Tokenizer

Array = jax.Array

GROUP = 4  # documents of a row that are measured together, as many times the rows


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        memory_tokens=(0, 64, 256, 1024, 4096),  # memory lengths, in tokens
        mode="single",  # "single": memory cleared at each document; "multi": kept across documents
        stride=0,  # tokens from one window to the next; 0: the window's, so that windows follow one another
        rows=16,  # documents read side by side; "multi" reads all of a row's documents with one memory
        max_tokens=0,  # tokens taken of each document, from its start; 0: all
    )
    return ConfigDict(options)


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> list[np.ndarray]:
    """Documents as tokens; see `texts.documents`."""
    return texts.documents(config.data, tokenizer, folder)


class Windows(NamedTuple):
    """Documents cut into windows for rows to read in step; all [steps, rows, W] but the last two."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32, the next token of the document
    counts: np.ndarray  # bool, whether there is a target, which no window before has counted
    recall: np.ndarray  # bool, whether the target is a recall token
    valid: np.ndarray  # bool, whether there is a token
    position: np.ndarray  # int32, the token's place in its document
    starts: np.ndarray  # bool [steps, rows], whether a document starts with the window
    stride: int  # tokens from the start of a document's window to that of its next


class Losses(NamedTuple):
    """Mean negative log-likelihoods, nats a token, and how many tokens they are over."""

    all: float
    recall: float
    tokens: int
    recall_tokens: int


def _first_window(position: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Number of the first window that holds a token."""
    return np.maximum(-(-(position + 1 - window) // stride), 0)


def recall_targets(tokens: np.ndarray, window: int, stride: int | None = None) -> np.ndarray:
    """bool [n], whether token i completes a trigram whose last earlier occurrence ends before the window that
    predicts it.

    The window that predicts token i is the first that holds token i - 1.
    """
    stride = stride or window
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
    out[at] = before < _first_window(at - 1, window, stride) * stride
    return out


def cut(documents: Sequence[np.ndarray], window: int, rows: int, stride: int | None = None) -> Windows:
    """Documents, each starting a window, dealt to rows so that all end at about the same time (longest first).

    Args:
        documents: int token arrays with their bos and eos, at least two tokens each.
        window: W.
        rows: at most as many as documents are used.
        stride: tokens from the start of a window to that of the next, at most W, which is the default.
    """
    stride = stride or window
    short = [i for i, document in enumerate(documents) if len(document) < 2]
    if not documents or short:
        raise ValueError(f"document {short[0]} has fewer than two tokens" if short else "no document to evaluate on")
    rows = min(rows, len(documents))
    lengths = [int(_first_window(np.array(len(document) - 2), window, stride)) + 1 for document in documents]
    queues: list[list[int]] = [[] for _ in range(rows)]
    ends = np.zeros(rows, int)
    for i in np.argsort(lengths, kind="stable")[::-1]:
        row = int(np.argmin(ends))
        queues[row].append(int(i))
        ends[row] += lengths[i]
    shape = (int(ends.max()), rows, window)
    kinds = (np.int32, np.int32, bool, bool, bool, np.int32)
    out = Windows(*(np.zeros(shape, kind) for kind in kinds), np.zeros(shape[:2], bool), stride)
    for row, queue in enumerate(queues):
        step = 0
        for i in queue:
            document, steps = documents[i], slice(step, step + lengths[i])
            n = len(document) - 1
            position = np.arange(lengths[i])[:, None] * stride + np.arange(window)[None, :]
            there, at = position < n, np.minimum(position, n - 1)
            out.tokens[steps, row] = np.where(there, document[at], 0)
            out.targets[steps, row] = np.where(there, document[at + 1], 0)
            out.recall[steps, row] = there & recall_targets(document, window, stride)[at + 1]
            out.valid[steps, row], out.position[steps, row] = there, position
            fresh = _first_window(position, window, stride) == np.arange(lengths[i])[:, None]
            out.counts[steps, row] = there & fresh
            out.starts[step, row] = True
            step += lengths[i]
    return out


class _Stream(NamedTuple):
    """What rows have read: memory, and of what they read last what has not entered it, [B, G, K, W - s] a layer."""

    mem: memory.Cache
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    waiting_B: Array


@functools.partial(jax.jit, static_argnames=("config", "reading", "clears"), donate_argnames=("stream",))
def _step(config, params, tokens_BT, targets_BT, valid_BT, starts_B, stream, keep, *, reading, clears):
    """(what rows have read, with the window in it, memory cut to its last `keep` tokens; losses [B, T])."""
    mem, waiting_B, W = stream.mem, stream.waiting_B, tokens_BT.shape[1]
    overlap = stream.keys[0].shape[3] if stream.keys else 0
    if mem.capacity and clears:
        mem, waiting_B = memory.clear(mem, starts_B), jnp.where(starts_B, 0, waiting_B)
    elif mem.capacity and overlap:  # what is left of the document before
        mem = memory.append(mem, stream.keys, stream.values, jnp.where(starts_B, waiting_B, 0))
        mem = _last(mem, keep)
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    loss_BT, _ = losses_of.token_losses(config, params, hidden, targets_BT)
    if not mem.capacity:
        return stream, loss_BT

    # Columns that an earlier window has read keep its keys and values.
    old = (jnp.arange(W) < overlap)[None, None, None, :] & ~starts_B[:, None, None, None]
    known = lambda before, now: jnp.where(old, jnp.pad(before, [(0, 0)] * 3 + [(0, W - overlap)]), now)
    keys, values = (tuple(map(known, *both)) for both in ((stream.keys, keys), (stream.values, values)))
    count_B = jnp.sum(valid_BT, axis=1, dtype=jnp.int32)
    leave_B = jnp.minimum(count_B, W - overlap)
    first, rest = (
        (lambda xs: [x[..., : W - overlap] for x in xs]),
        (lambda xs: tuple(x[..., W - overlap :] for x in xs)),
    )
    mem = memory.append(mem, first(keys), first(values), leave_B)
    stream = _Stream(_last(mem, keep), rest(keys), rest(values), count_B - leave_B)
    return memory.constrain(stream), loss_BT


def _last(mem: memory.Cache, keep: Array) -> memory.Cache:
    """Memory of which the last `keep` tokens are read. Where it is dealt to devices, whole rounds of slots are evicted,
    and what else is older is hidden.
    """
    mem, over_B = memory.restrict(mem, None), jnp.maximum(mem.length_B - keep, 0)
    if mem.deal.ways == 1:
        return memory.evict_oldest(mem, over_B)
    size = mem.deal.ways * mem.deal.block
    mem = memory.evict_oldest(mem, over_B // size * size)
    slot_BM = jnp.broadcast_to(jnp.arange(mem.capacity), (mem.length_B.shape[0], mem.capacity))
    return memory.restrict(mem, slot_BM >= (mem.length_B - keep)[:, None])


def token_losses(
    subject: Subject, windows: Windows, memory_tokens: int, *, clear_at_documents: bool = True
) -> np.ndarray:
    """Negative log-likelihoods, float64 [steps, rows, W], of windows read with the last `memory_tokens` tokens in
    memory; where nothing counts, unspecified numbers.
    """
    if memory_tokens < 0:
        raise ValueError(f"memory_tokens is {memory_tokens}; wanted 0 or more")
    config, (rows, W) = subject.config, windows.tokens.shape[1:]
    ways, dealt = sharding.ways("batch"), sharding.ways("memory")
    # Where memory is dealt, what is to leave may stay for a round of slots; see `_last`.
    capacity = memory_tokens + W
    if dealt > 1:
        capacity = (capacity // (dealt * DEALT_SLOTS) + 2) * dealt * DEALT_SLOTS
    capacity *= memory_tokens > 0
    padded = -(-rows // ways) * ways
    # Nothing is read of an empty memory, so memory length 0 needs none at all.
    mem = memory.init_memory(config, padded, capacity)
    overlap = (padded, config.n_kv_heads, config.head_size, W - windows.stride)
    waiting = lambda: tuple(jnp.zeros(overlap, config.dtypes.compute) for _ in config.mem_layers if capacity)
    stream = placed_with(subject.params, _Stream(mem, waiting(), waiting(), jnp.zeros(padded, jnp.int32)))
    keep, out = jnp.int32(memory_tokens), []
    with subject.clock.model():
        for step in range(len(windows.tokens)):
            given = (x[step] for x in (windows.tokens, windows.targets, windows.valid, windows.starts))
            batch = [np.pad(x, [(0, padded - rows)] + [(0, 0)] * (x.ndim - 1)) for x in given]
            options = dict(reading=subject.reading, clears=clear_at_documents)
            stream, loss = _step(config, subject.params, *batch, stream, keep, **options)
            out.append(loss)
            if step:  # one late, so that the device never waits
                jax.block_until_ready(out[step - 1])
            subject.clock.count(int(windows.counts[step].sum()))
        return np.stack([np.asarray(x)[:rows] for x in out]).astype(np.float64)


def losses(subject: Subject, windows: Windows, memory_tokens: int, *, clear_at_documents: bool = True) -> Losses:
    """Mean losses over windows read with the last `memory_tokens` tokens in memory."""
    nll = token_losses(subject, windows, memory_tokens, clear_at_documents=clear_at_documents)
    recall = windows.counts & windows.recall
    mean = lambda mask: float(nll[mask].mean()) if mask.any() else float("nan")
    return Losses(mean(windows.counts), mean(recall), int(windows.counts.sum()), int(recall.sum()))


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range, or memory for a model without memory layers.
    """
    config = check_reading(config, options)
    if options.mode not in ("single", "multi"):
        raise ValueError(f"mode is {options.mode!r}; wanted 'single' or 'multi'")
    if any(m < 0 for m in options.memory_tokens) or not options.memory_tokens:
        raise ValueError(f"memory_tokens is {options.memory_tokens}; wanted lengths of 0 or more")
    if any(options.memory_tokens) and not config.mem_layers:
        raise ValueError("the model has no memory layers (mem_layers is empty); wanted memory_tokens=(0,)")
    if options.max_tokens < 0:
        raise ValueError(f"max_tokens is {options.max_tokens}; wanted at least 1, or 0 for all")
    if not 0 <= options.stride <= config.window:
        raise ValueError(f"stride is {options.stride}; wanted 1..{config.window} (the window), or 0 for that")


def positions(length: int, window: int) -> list[int]:
    """First token of each range of positions that is reported: 0, W, 2 W, 4 W and so on."""
    edges = [0]
    while edges[-1] + (edges[-1] or window) < length:
        edges.append(edges[-1] + (edges[-1] or window))
    return edges


def run(subject: Subject, options: ConfigDict, documents: Sequence[np.ndarray], journal: Journal) -> Report:
    """Perplexity at every memory length, and by position in the document.

    Args:
        options: as `default_options`.
        documents: int token arrays with bos and eos.

    Raises:
        ValueError: see `check`; no usable document; "multi" with fewer than two documents a row.
    """
    check(subject.config, options)
    if options.mode == "multi" and 2 * options.rows > len(documents):
        raise ValueError(
            f"rows is {options.rows} for {len(documents)} documents; mode 'multi' wanted at least two documents a row"
        )
    documents = [document[: options.max_tokens or None] for document in documents]
    W, single = subject.config.window, options.mode == "single"
    edges = positions(max(map(len, documents), default=1) - 1, W)
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    size = GROUP * options.rows if single else max(len(documents), 1)  # a memory goes through all of a row's
    groups = [[documents[i] for i in order[at : at + size]] for at in range(0, len(order), size)] or [[]]
    windows = [cut(group, W, options.rows, options.stride or None) for group in groups]

    def sums(part: Windows, m: int) -> list[list[float]]:
        """For each range of positions: summed losses and how many, of all tokens and of recall tokens."""
        nll, found = token_losses(subject, part, m, clear_at_documents=single), []
        for first, end in zip(edges, [*edges[1:], np.inf], strict=True):
            here = part.counts & (part.position >= first) & (part.position < end)
            found.append([x for mask in (here, here & part.recall) for x in (float(nll[mask].sum()), int(mask.sum()))])
        return found

    lengths = sorted(set(options.memory_tokens))
    parts = [
        Part(f"memory {m}, group {i}", int(part.counts.sum()), functools.partial(sums, part, m))
        for m in lengths
        for i, part in enumerate(windows)
    ]
    found = np.array(journal.results(parts, "perplexity", subject.clock)).reshape(len(lengths), len(groups), -1, 4)
    by_position = found.sum(axis=1)  # [lengths, ranges, 4]
    with np.errstate(invalid="ignore"):
        mean = lambda sums: np.exp(sums[..., 0] / sums[..., 1]).tolist()
        total = by_position.sum(axis=1)
        perplexity, recall = (dict(zip(map(str, lengths), mean(total[:, i : i + 2]))) for i in (0, 2))
        at_positions = dict(zip(map(str, lengths), mean(by_position)))
    tokens, recall_tokens = int(total[0, 1]), int(total[0, 3])
    ranges = [f"{first:,}" for first in edges]
    return Report(
        title=(
            f"perplexity by memory length: {options.mode}-document, {described(options)}, window {W}"
            f"{f', stride {options.stride}' if options.stride else ''},\n"
            f"{tokens:,} tokens of {len(documents)} documents, {recall_tokens:,} of them recall tokens;\n"
            f"also of the tokens from each position in the document to the next that is named"
        ),
        columns=("memory tokens", "perplexity", "on recall tokens", *(f"from {name}" for name in ranges)),
        rows=tuple((m, perplexity[str(m)], recall[str(m)], *at_positions[str(m)]) for m in lengths),
        values=dict(
            options=options.to_dict(),
            window=W,
            tokens=tokens,
            recall_tokens=recall_tokens,
            perplexity=perplexity,
            recall=recall,
            positions=edges,
            tokens_at_positions=by_position[0, :, 1].astype(int).tolist(),
            perplexity_at_positions=at_positions,
        ),
        plot=lambda path: plot(
            path, {"perplexity": perplexity, "recall tokens": recall}, dict(zip(lengths, by_position)), edges
        ),
    )


def plot(
    path: pathlib.Path,
    curves: dict[str, dict[str, float]],
    positions: dict[int, np.ndarray] | None = None,
    edges: Sequence[int] = (),
) -> None:
    """One panel a curve or group: perplexity against memory tokens. Names `a: b` put curve a into panel b.

    Args:
        positions: memory length -> sums of losses and how many [ranges, 4], for one more panel.
        edges: where those ranges begin.
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for name, curve in curves.items():
        label, _, panel = name.rpartition(": ")
        panels.setdefault(panel, {})[label] = {f"{int(m):,}": y for m, y in curve.items()}
    drawn = [plots.Panel(panel, "memory, tokens", "perplexity", lines) for panel, lines in panels.items()]
    if positions and len(edges) > 1:
        lines = {
            f"memory {m:,}": {f"{edge:,}": float(np.exp(sums[0] / sums[1])) for edge, sums in zip(edges, ranges)}
            for m, ranges in positions.items()
        }
        drawn.append(plots.Panel("by position in the document", "from token", "perplexity", lines))
    plots.lines(path, drawn)
