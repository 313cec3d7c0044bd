"""Which tokens of memory a model's queries retrieve, and how many of the best an approximate search finds."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import memory as memories
from fot_jax import model
from fot_jax.config import ModelConfig
from fot_jax.generate import Reader, _check_room, _check_rows, _check_tokens, make_room

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
    local, mem = make_room(config, reader.local, reader.mem, "block", jnp.ones_like(reader.ended_B))
    found: list[list[tuple[Array, Array]]] = [[] for _ in recalls]

    def watch(m: int, q_BHTK: Array) -> None:
        lies = dict(deals=mem.deals, seen=mem.each_seen)
        for each, share in zip(found, recalls, strict=True):
            of = dict(k=k, recall=share, score_bytes=reading.score_bytes, **lies)
            each.append(memories.search(q_BHTK, mem.keys[m], mem.length_B, **of))

    model.extend_window(config, params, tokens_BT, mem=mem, local=local, reading=reading, watch=watch)
    return found
