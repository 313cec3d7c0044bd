"""Which tokens of memory a model's queries retrieve, how those score among their neighbours, and how many of the best
an approximate search finds.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import attention, model
from fot_jax import memory as memories
from fot_jax.config import ModelConfig
from fot_jax.generate import OPEN_TOKENS, Reader, _check_room, _check_rows, _check_tokens, _most_tokens, _with_room
from fot_jax.memory.stored import loaded

Array = jax.Array


class Retrieved(NamedTuple):
    """What the queries of a memory layer retrieve, best first.

    Attributes:
        layer: the layer, counted from 0 among all.
        slots_BHTN: int32, slots of memory, -1 where fewer than N are filled.
        scores_BHTN: float32, inner products, unscaled; -inf there.
        tokens_BHTN: int32, the tokens that the slots' keys were made of, -1 there; None where they are not known.
    """

    layer: int
    slots_BHTN: np.ndarray
    scores_BHTN: np.ndarray
    tokens_BHTN: np.ndarray | None


def retrieved(
    config: ModelConfig,
    params: Any,
    reader: Reader,
    tokens_BT: Any,
    *,
    k: int,
    reading: memories.Reading = memories.DENSE,
    read_BT: Any = None,
) -> list[Retrieved]:
    """The k slots of memory that score highest with each query of the next tokens, in every memory layer.

    Args:
        reader: what has been read; stays as it is.
        tokens_BT: integers [B, T], the tokens that follow, as many as the open window has room for once it has spilled.
        k: slots.
        reading: how the layers read memory meanwhile; what later ones retrieve depends on it.
        read_BT: integers [B, R], all tokens that each row has read, from the first, nothing evicted: then slot n of
            memory holds token n.

    Raises:
        ValueError: tokens that do not fit; k below 1.
    """
    memories.Reading("topk", k)
    tokens_BT = _next_tokens(config, reader, tokens_BT)
    held = int(np.max(np.asarray(reader.mem.length_B)))
    if read_BT is not None and (np.ndim(read_BT) != 2 or len(read_BT) != len(tokens_BT) or np.shape(read_BT)[1] < held):
        raise ValueError(f"tokens read are {np.shape(read_BT)}; wanted {len(tokens_BT)} rows of {held} at least")
    out = []
    (found,) = _retrieve(config, params, reader, tokens_BT, k=k, reading=reading, recalls=(None,))
    for layer, (slots, scores) in zip(config.mem_layers, found, strict=True):
        slots, tokens = np.asarray(slots), None
        if read_BT is not None:
            flat = np.take_along_axis(np.asarray(read_BT), np.maximum(slots, 0).reshape(len(slots), -1), axis=1)
            tokens = np.where(slots >= 0, flat.reshape(slots.shape), -1)
        out.append(Retrieved(layer, slots, np.asarray(scores), tokens))
    return out


class Surroundings(NamedTuple):
    """What some queries of a memory layer retrieve, best first, and how the keys round about score with them.

    Attributes:
        layer: the layer, counted from 0 among all.
        slots_BHQN: int32, slots of memory, -1 where fewer than N are filled.
        scores_BHQN: float32, scores as attention takes the softmax of them: inner products of a query, which carries
            the learned temperature where there is one, with keys, times `model.score_scale`; -inf there.
        around_BHQNR: the same of slots n - r .. n + r round the first of the slots n, R = 2 r + 1 and N as many as were
            asked for; -inf where memory has no such slot.
    """

    layer: int
    slots_BHQN: np.ndarray
    scores_BHQN: np.ndarray
    around_BHQNR: np.ndarray


def surroundings(
    config: ModelConfig,
    params: Any,
    reader: Reader,
    tokens_BT: Any,
    at_Q: Any,
    *,
    k: int,
    first: int,
    around: int,
    reading: memories.Reading = memories.DENSE,
) -> list[Surroundings]:
    """The k slots of memory that score highest with the queries of some of the next tokens, in every memory layer, and
    the scores of the keys round the first of them.

    Args:
        reader, tokens_BT, reading: as for `retrieved`.
        at_Q: integers [Q], the tokens whose queries are meant, counted from 0 in `tokens_BT`.
        k: slots.
        first: how many of them have their surroundings scored, 1..k.
        around: r, keys on either side.

    Raises:
        ValueError: tokens that do not fit; queries of none of them; `k`, `first` or `around` out of range.
    """
    memories.Reading("topk", k)
    if not 1 <= first <= k or around < 0:
        raise ValueError(f"first is {first} and around {around}; wanted 1..{k} (k) and at least 0")
    tokens_BT, at_Q = _next_tokens(config, reader, tokens_BT), np.asarray(at_Q)
    B, T = tokens_BT.shape
    if at_Q.ndim != 1 or not at_Q.size or at_Q.min() < 0 or at_Q.max() >= T:
        raise ValueError(f"queries are those of tokens {at_Q.tolist()}; wanted one or more of 0..{T - 1}")
    # Some tokens at a time, as their scores in the open window are bounded; few shapes, so that few programs serve all.
    width = min(_most_tokens(config, B), memories.power_of_two(max(T, OPEN_TOKENS)))
    options = dict(k=k, first=first, around=around, reading=reading)
    if np.any(np.asarray(reader.local.length_B) >= config.window):
        reader = _spilled(config, reader)
    found, asked = [], []
    for start in range(0, int(at_Q.max()) + 1, width):
        count = min(width, T - start)
        piece_BT = np.pad(tokens_BT[:, start : start + count], ((0, 0), (0, width - count)))
        here = np.flatnonzero(at_Q // width == start // width)
        here_Q = np.resize(at_Q[here] - start, len(here) and memories.power_of_two(len(here))).astype(np.int32)
        given = piece_BT, np.full(B, count, np.int32), here_Q
        local, seen = _surroundings(config, params, reader, *given, **options)
        reader = dataclasses.replace(reader, local=local)
        if len(here):
            asked.append(here)
            found.append([[np.asarray(x)[:, :, : len(here)] for x in each] for each in seen])
    order = np.argsort(np.concatenate(asked))
    whole = jax.tree.map(lambda *pieces: np.concatenate(pieces, axis=2)[:, :, order], *found)
    return [Surroundings(layer, *each) for layer, each in zip(config.mem_layers, whole, strict=True)]


def begun(reader: Reader, slots: int) -> Reader:
    """A reader with an empty open window after the first `slots` tokens of another's memory, where they lie: what the
    other was when it had read so many, whatever it has read since. The memory is shared; the scores of the next token
    are not known.

    Args:
        reader: one of whose memory nothing was evicted.

    Raises:
        ValueError: a memory with fewer tokens.
    """
    held = int(np.min(np.asarray(reader.mem.length_B)))
    if not 0 <= slots <= held:
        raise ValueError(f"{slots} tokens of a memory that holds {held}; wanted no more")
    pages, left = [], slots
    for page in reader.mem.pages:
        pages.append(dataclasses.replace(page, length_B=jnp.minimum(page.length_B, left)))
        left = max(left - page.capacity, 0)
    nothing = dataclasses.replace(reader.local, length_B=jnp.zeros_like(reader.local.length_B))
    parts = dict(length_B=jnp.full_like(reader.length_B, slots), logits_BV=jnp.full_like(reader.logits_BV, jnp.nan))
    return dataclasses.replace(reader, local=nothing, mem=reader.mem.with_pages(pages), shared=True, **parts)


def recall(
    config: ModelConfig, params: Any, reader: Reader, tokens_BT: Any, reading: memories.Reading
) -> dict[int, float]:
    """What approximate reading finds: for each memory layer, the share of the k best slots of exact top-k, over all
    queries of the next tokens. The search is made both ways, on the same queries.

    Args:
        reader, tokens_BT: as for `retrieved`.
        reading: an approximate one.

    Raises:
        ValueError: tokens that do not fit; a reading of another kind.
    """
    if reading.kind != "approximate":
        raise ValueError(f"memory reading is {reading.kind!r}; wanted 'approximate'")
    tokens_BT = _next_tokens(config, reader, tokens_BT)
    options = dict(k=reading.k, reading=reading, recalls=(None, reading.recall))
    exact, found = _retrieve(config, params, reader, tokens_BT, **options)
    out = {}
    for layer, (wanted, _), (slots, _) in zip(config.mem_layers, exact, found, strict=True):
        queries = [np.asarray(x).reshape(-1, reading.k) for x in (wanted, slots)]
        hits = sum(np.isin(w[w >= 0], s).sum() for w, s in zip(*queries, strict=True))
        there = np.sum(queries[0] >= 0)
        out[layer] = float(hits / there) if there else 1.0
    return out


def _next_tokens(config: ModelConfig, reader: Reader, tokens_BT: Any) -> np.ndarray:
    """Tokens [B, T] that may follow what has been read, checked."""
    tokens_BT, _, _ = _check_tokens(config, tokens_BT, None, None)
    W, T = config.window, tokens_BT.shape[1]
    open_B = np.asarray(reader.local.length_B) % W
    if int(open_B.max()) + T > W:
        raise ValueError(f"{T} tokens follow {int(open_B.max())} of the open window; wanted at most {W} together")
    _check_rows(reader, tokens_BT)
    _check_room(config, reader, T)
    return tokens_BT


@functools.partial(jax.jit, static_argnames=("config", "k", "reading", "recalls"))
def _retrieve(config, params, reader, tokens_BT, *, k, reading, recalls) -> list[list[tuple[Array, Array]]]:
    """For each of `recalls`, (slots, scores) of each memory layer."""
    local, mem = _with_room(config, reader, "block", jnp.ones_like(reader.ended_B))
    found: list[list[tuple[Array, Array]]] = [[] for _ in recalls]

    def watch(m: int, q_BHTK: Array) -> None:
        lies = dict(deals=mem.deals, seen=mem.each_seen)
        for each, share in zip(found, recalls, strict=True):
            of = dict(k=k, recall=share, score_bytes=reading.score_bytes, **lies)
            each.append(memories.search(q_BHTK, mem.keys[m], mem.length_B, **of))

    model.extend_window(config, params, tokens_BT, mem=mem, local=local, reading=reading, watch=watch)
    return found


@functools.partial(jax.jit, static_argnames=("config",))
def _spilled(config, reader) -> Reader:
    """The reader with room in its open window; its memory is copied."""
    local, mem = _with_room(config, reader, "block", jnp.ones_like(reader.ended_B))
    return memories.constrain(dataclasses.replace(reader, local=local, mem=mem))


@functools.partial(jax.jit, static_argnames=("config", "k", "first", "around", "reading"))
def _surroundings(config, params, reader, tokens_BT, count_B, at_Q, *, k, first, around, reading):
    """The open window after the first `count_B` tokens, and (slots, scores, scores round the first slots) of each
    memory layer, of the queries of tokens `at_Q`; of no layer where there are none.
    """
    mem, scale, found = reader.mem, model.score_scale(config), []

    def watch(m: int, q_BHTK: Array) -> None:
        if not at_Q.size:
            return
        q_BHQK = jnp.take(q_BHTK, at_Q, axis=2)
        of = dict(k=k, score_bytes=reading.score_bytes, deals=mem.deals, seen=mem.each_seen)
        slots, s = memories.search(q_BHQK, mem.keys[m], mem.length_B, **of)
        found.append((slots, s * scale, _around(mem, m, q_BHQK, slots[..., :first], around) * scale))

    options = dict(mem=mem, local=reader.local, count_B=count_B, reading=reading, watch=watch)
    _, local, _ = model.extend_window(config, params, tokens_BT, **options)
    return memories.constrain(local), found


def _around(mem: memories.Cache | memories.Pages, m: int, q_BHQK: Array, slots_BHQN: Array, around: int) -> Array:
    """Inner products [B, H, Q, N, R] of queries with the keys of layer m round slots, one slot of each row after
    another; -inf where there is no slot.
    """
    B, H, Q, N = slots_BHQN.shape
    R = 2 * around + 1
    if not mem.capacity:
        return jnp.full((*slots_BHQN.shape, R), -jnp.inf)
    keys = mem.with_pages([dataclasses.replace(page, keys=(page.keys[m],), values=()) for page in mem.pages])
    G, near_R = keys.pages[0].keys[0].shape[1], jnp.arange(R) - around
    seen_BM = memories.seen_slots(mem) if any(seen is not None for seen in mem.each_seen) else None

    def one(given: tuple[Array, Array, Array]) -> Array:
        head, query, slot_B = given
        (k_BGKR,), _ = memories.take(keys, slot_B - around, R)
        of_head = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 1)
        q_B11K = of_head(q_BHQK, head)[:, :, query][:, :, None]
        s_BR = attention.scores(q_B11K, of_head(loaded(k_BGKR), head // (H // G)), slots_last=True, exact=True)[:, 0, 0]
        slot_BR = slot_B[:, None] + near_R[None, :]
        there_BR = (slot_BR >= 0) & (slot_BR < mem.length_B[:, None]) & (slot_B >= 0)[:, None]
        if seen_BM is not None:
            there_BR &= jnp.take_along_axis(seen_BM, jnp.clip(slot_BR, 0, mem.capacity - 1), axis=1)
        return jnp.where(there_BR, s_BR, -jnp.inf)

    head, query, _ = (x.reshape(-1) for x in jnp.meshgrid(*map(jnp.arange, (H, Q, N)), indexing="ij"))
    s_nBR = jax.lax.map(one, (head, query, jnp.moveaxis(slots_BHQN, 0, -1).reshape(-1, B)))
    return jnp.moveaxis(s_nBR, 1, 0).reshape(B, H, Q, N, R)
