"""Memory as an object: rows emptied, the oldest evicted, memories merged, reading restricted, slots taken out.

Pure functions from caches to caches, to be jitted; donate what is not needed any more.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fot_jax.memory import host
from fot_jax.memory.cache import Cache, Pages, append, check_deals, check_room, on_devices
from fot_jax.memory.stored import Buffer

Array = jax.Array

MERGED_SLOTS = 1024  # that are copied at a time


def clear(cache: Cache | Pages, row_B: Array) -> Cache | Pages:
    """The cache with the rows where `row_B` (bool) is True emptied.

    Raises:
        ValueError: other rows than the cache has.
    """
    if row_B.shape != cache.length_B.shape:
        raise ValueError(f"row_B is {row_B.shape}; wanted {cache.length_B.shape}, the rows of the cache")
    emptied = lambda page: dataclasses.replace(page, length_B=jnp.where(row_B, 0, page.length_B))
    return cache.with_pages([emptied(page) for page in cache.pages])


def evict_oldest(cache: Cache | Pages, count_B: Array) -> Cache | Pages:
    """The cache without the `count_B[b]` oldest tokens of each row; the others move up, so that slot 0 is the oldest
    again. Of a cache dealt to several devices whole rounds leave, so that no token moves to another device: the count
    is rounded up to a multiple of ways x block. Of pages exactly so many leave, and all others are copied.
    """
    check_deals(cache.deals)
    count_B = jnp.clip(count_B, 0, cache.length_B)
    if isinstance(cache, Pages):
        kept = _copied(clear(cache, jnp.ones_like(count_B, bool)), cache, count_B)
        if all(page.seen is None for page in cache.pages):
            return kept
        return restrict(kept, _moved(seen_slots(cache), count_B))
    deal = cache.deal
    round_ = deal.ways * deal.block if deal.ways > 1 else 1
    rounds_B = -(-count_B // round_)
    columns_B = rounds_B * (round_ // deal.ways)

    def shift(device: Array | int, columns_B: Array, buffers: tuple) -> tuple:
        roll = jax.vmap(lambda x_GKM, columns: jnp.roll(x_GKM, -columns, axis=2))
        return jax.tree.map(lambda x: (host.moved_down if host.holds(x) else roll)(x, columns_B), buffers)

    keys, values = on_devices(shift, cache, columns_B)
    gone_B, seen = rounds_B * round_, cache.seen
    if seen is not None:
        seen = deal.as_dealt(_moved(seen_slots(cache), gone_B)[:, None, None])
    length_B = jnp.maximum(cache.length_B - gone_B, 0)
    return dataclasses.replace(cache, keys=keys, values=values, length_B=length_B, seen=seen)


def _moved(seen_BM: Array, gone_B: Array) -> Array:
    """Which slots are read when the first `gone_B` are no more: the same tokens, and all that come after them."""
    M = seen_BM.shape[1]
    slot = gone_B[:, None] + jnp.arange(M)[None, :]
    return jnp.take_along_axis(seen_BM, jnp.minimum(slot, M - 1), axis=1) | (slot >= M)


def restrict(cache: Cache | Pages, seen_BM: Array | None) -> Cache | Pages:
    """The cache of which only some slots are read: a range of them, those of some documents. Tokens appended later are
    read if their slots are among them.

    Args:
        seen_BM: bool, by slot number, for all that there is room for. None: all are read again. A range of slots is
            `(slot >= first) & (slot < last)` of `slot = jnp.arange(cache.capacity)`, for each row; some documents are
            `jnp.isin(document_BM, wanted)` of numbers that say which document a slot's token is of.

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    shape = (cache.length_B.shape[0], cache.capacity)
    if seen_BM is not None and seen_BM.shape != shape:
        raise ValueError(f"mask of slots is {seen_BM.shape}; wanted {shape}, rows and slots of the memory")
    if seen_BM is not None and seen_BM.dtype != bool:
        raise ValueError(f"mask of slots is {seen_BM.dtype}; wanted bool")
    out, first = [], 0
    for page in cache.pages:
        seen = None
        if seen_BM is not None:
            seen = page.deal.as_dealt(seen_BM[:, None, None, first : first + page.capacity])
        out.append(dataclasses.replace(page, seen=seen))
        first += page.capacity
    return cache.with_pages(out)


def seen_slots(cache: Cache | Pages) -> Array:
    """Which slots are read, bool [B, M] by slot number, filled or not."""
    rows = cache.length_B.shape[0]

    def one(page: Cache) -> Array:
        if page.seen is None:
            return jnp.ones((rows, page.capacity), bool)
        return page.deal.in_order(page.seen)[:, 0, 0]

    return jnp.concatenate([one(page) for page in cache.pages], axis=1)


def take(cache: Cache | Pages, first_B: Array | int, size: int) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """Keys and values [B, G, K, size] of each layer, in the order of slots, from slot `first_B` of each row on; zeros
    where there is no such slot.

    Raises:
        ValueError: a size below 1; a memory without slots.
    """
    if size < 1:
        raise ValueError(f"size is {size}; wanted at least 1 slot to take")
    slot_BT = jnp.broadcast_to(jnp.asarray(first_B, jnp.int32), cache.length_B.shape)[:, None] + jnp.arange(size)[None]
    found, start = None, 0
    for page in cache.pages:
        if page.capacity:
            part = _take_of_page(page, slot_BT - start)
            found = part if found is None else jax.tree.map(lambda x, y: x + y, found, part)
        start += page.capacity
    if found is None:
        raise ValueError(f"a memory without slots; wanted one to take {size} of")
    return found


def _take_of_page(page: Cache, slot_BT: Array) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...]]:
    """Keys and values of the slots, with zeros for those of other pages."""
    first_B, t = slot_BT[:, 0], jnp.arange(slot_BT.shape[1])

    def read(device: Array | int, first_B: Array, buffers: tuple) -> tuple:
        slot_BT = first_B[:, None] + t[None]
        mine = (slot_BT >= 0) & (slot_BT < page.capacity) & (page.deal.device(slot_BT) == device)
        column_BT = jnp.where(mine, page.deal.column(slot_BT), 0)

        def each(x: Array) -> Array:
            size = host.span(min(x.shape[3], page.deal.most_columns(len(t))), x)
            before_B = page.deal.before(jnp.clip(first_B, 0, page.capacity), device)
            from_B = host.start(before_B, size, x)
            x = host.cut(x, from_B, size, page.head_size)
            column = jnp.where(mine, column_BT - from_B[:, None], 0)
            found = jnp.take_along_axis(x, column[:, None, None, :], axis=3)
            return jnp.where(mine[:, None, None, :], found, jnp.zeros((), x.dtype))

        return jax.tree.map(each, buffers)

    return on_devices(read, page, first_B, whole=True)


def _copied(cache: Cache | Pages, other: Cache | Pages, first_B: Array | int) -> Cache | Pages:
    """The first memory with the tokens of another, from `first_B` of each row on, behind its own."""
    length_B = jnp.maximum(other.length_B - first_B, 0)
    size = min(MERGED_SLOTS, *(page.capacity for page in cache.pages), other.capacity)

    def one(i: Array, cache: Cache | Pages) -> Cache | Pages:
        count_B = jnp.clip(length_B - i * size, 0, size)
        return append(cache, *take(other, first_B + i * size, size), count_B)

    return jax.lax.fori_loop(0, -(-jnp.max(length_B) // size), one, cache)


def merge(cache: Cache | Pages, other: Cache | Pages) -> Cache | Pages:
    """The first memory with the tokens of another behind its own, row by row; of both the same layers.

    Numbers are copied as they are stored where formats are the same. A row holds at most its capacity: inside a program
    tokens beyond are not kept, so callers see to it that there is room. Where reading of the first is restricted, the
    mask says of their slots whether the new tokens are read.

    Raises:
        ValueError: layers, rows or heads that do not fit; another memory of which only some slots are read; outside a
            program, rows without room.
    """
    if any(page.seen is not None for page in other.pages):
        raise ValueError("the other memory is restricted to some slots; wanted all to be read: restrict(other, None)")
    if len(cache.keys) != len(other.keys) or cache.length_B.shape != other.length_B.shape:
        raise ValueError(
            f"the other memory has {len(other.keys)} layers and {other.length_B.shape[0]} rows; wanted "
            f"{len(cache.keys)} and {cache.length_B.shape[0]}"
        )
    check_room(cache, other.length_B, other.capacity)
    if not other.keys or not other.capacity or not cache.capacity:
        return cache
    return _copied(cache, other, 0)
