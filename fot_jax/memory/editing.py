"""Memory as an object: rows emptied, the oldest evicted, memories merged, reading restricted, slots taken out.

Pure functions from caches to caches, to be jitted; donate what is not needed any more.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fot_jax.memory.cache import Cache, Pages, append, on_devices, places
from fot_jax.memory.stored import Buffer

Array = jax.Array

MERGED_SLOTS = 1024  # that are copied at a time


def clear(cache: Cache, row_B: Array) -> Cache:
    """The cache with the rows where `row_B` (bool) is True emptied."""
    return dataclasses.replace(cache, length_B=jnp.where(row_B, 0, cache.length_B))


def evict_oldest(cache: Cache, count_B: Array) -> Cache:
    """The cache without the `count_B[b]` oldest tokens of each row; the others move up, so that slot 0 is the oldest
    again. Of a memory dealt to several devices whole rounds leave, so that no token moves to another device: the count
    is rounded up to a multiple of ways x block.
    """
    deal = cache.deal
    round_ = deal.ways * deal.block if deal.ways > 1 else 1
    rounds_B = -(-jnp.minimum(count_B, cache.length_B) // round_)
    columns_B = rounds_B * (round_ // deal.ways)

    def shift(device: Array | int, columns_B: Array, buffers: tuple) -> tuple:
        one = jax.vmap(lambda x_GKM, columns: jnp.roll(x_GKM, -columns, axis=2))
        return jax.tree.map(lambda x: one(x, columns_B), buffers)

    keys, values = on_devices(shift, cache, columns_B)
    gone_B, seen = rounds_B * round_, cache.seen
    if seen is not None:  # which tokens are read stays, and those that come after them are
        slot = gone_B[:, None] + jnp.arange(cache.capacity)[None, :]
        moved = jnp.take_along_axis(deal.in_order(seen)[:, 0, 0], jnp.minimum(slot, cache.capacity - 1), axis=1)
        seen = deal.as_dealt((moved | (slot >= cache.capacity))[:, None, None])
    length_B = jnp.maximum(cache.length_B - gone_B, 0)
    return dataclasses.replace(cache, keys=keys, values=values, length_B=length_B, seen=seen)


def restrict(cache: Cache | Pages, seen_BM: Array | None) -> Cache | Pages:
    """The cache of which only some slots are read: a range of them, those of some documents. Tokens appended later are
    read if their slots are among them.

    Args:
        seen_BM: bool, by slot number, for all that there is room for. None: all are read again.

    Raises:
        ValueError: a mask of another shape.
    """
    pages = cache.pages if isinstance(cache, Pages) else (cache,)
    shape = (cache.length_B.shape[0], cache.capacity)
    if seen_BM is not None and seen_BM.shape != shape:
        raise ValueError(f"mask of slots is {seen_BM.shape}; wanted {shape}, rows and slots of the memory")
    out, first = [], 0
    for page in pages:
        seen = None
        if seen_BM is not None:
            seen = page.deal.as_dealt(seen_BM[:, None, None, first : first + page.capacity])
        out.append(dataclasses.replace(page, seen=seen))
        first += page.capacity
    return Pages(tuple(out)) if isinstance(cache, Pages) else out[0]


def take(cache: Cache, first: Array | int, size: int) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """Keys and values [B, G, K, size] of each layer, in the order of slots, from slot `first` on; zeros beyond the
    capacity.
    """
    deal, slot = cache.deal, first + jnp.arange(size)

    def read(device: Array | int, buffers: tuple) -> tuple:
        mine = (slot < cache.capacity) & (deal.device(slot) == device)
        column = jnp.where(mine, deal.column(slot), 0)
        part = lambda x: jnp.where(mine, jnp.take(x, column, axis=3), 0)
        if deal.ways == 1:
            return jax.tree.map(part, buffers)
        # One device holds each slot; the others add zeros.
        return jax.tree.map(lambda x: jax.lax.psum(part(x), axes).astype(x.dtype), buffers)

    axes = places(*cache.keys[0].shape[:2]).axes if deal.ways > 1 else ()
    return on_devices(read, cache, whole=True)


def merge(cache: Cache | Pages, other: Cache) -> Cache | Pages:
    """The first memory with the tokens of another behind its own, row by row; of both the same layers.

    Numbers are copied as they are stored where formats are the same. A row holds at most its capacity: tokens beyond
    are not kept, so callers see to it that there is room.

    Raises:
        ValueError: layers or heads that do not fit.
    """
    if not other.keys:
        return cache
    smallest = min(page.capacity for page in cache.pages) if isinstance(cache, Pages) else cache.capacity
    size = min(MERGED_SLOTS, smallest, other.capacity)

    def one(i: Array, cache: Cache | Pages) -> Cache | Pages:
        count_B = jnp.clip(other.length_B - i * size, 0, size)
        return append(cache, *take(other, i * size, size), count_B)

    return jax.lax.fori_loop(0, -(-jnp.max(other.length_B) // size), one, cache)
