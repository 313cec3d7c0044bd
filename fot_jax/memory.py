"""Caches as pytrees of fixed capacity, and the two ways of reading memory: dense, and exact top-k.

Memory is what a memory layer keeps of everything before the open window: un-rotated keys, and values, both [B, G, K,
M], of which the first `length_B[b]` slots of row b are filled, oldest first. Local caches hold un-rotated keys too,
so that spilling a window into memory is a copy. Nothing here is mutable and no slot holds a sentinel: what is filled
is said by lengths alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import attention
from fot_jax.config import MAX_SIZE, ModelConfig

Array = jax.Array

SUB_BLOCK = 64  # slots whose greatest score is taken together in exact top-k
COPIED_BLOCK = 1024  # slots of a block that a single query reads of a page mostly empty: copies that stay in a cache
FIRST_PAGE_BYTES = 2**22  # of keys of a layer: less is read so fast that smaller pages would save nothing


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "length_B"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of some layers, appended to in place when donated.

    Attributes:
        keys, values: one [B, G, K, M] array a layer; un-rotated keys.
        length_B: int32, slots filled in every layer.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length_B: Array

    @property
    def capacity(self) -> int:
        """M, slots a row can hold."""
        return self.keys[0].shape[3] if self.keys else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for x in (*self.keys, *self.values))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["pages"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Pages:
    """A cache in pages, each as long as all before it together, filled one after another.

    For a single query a CPU reads arrays where they lie, at the speed of memory, but only whole ones: part of an array
    is copied first. Of pages, those that are empty are not read, so that what a token costs follows the fill however
    much there is room for, and no program depends on the fill.

    Attributes:
        pages: caches that follow one another.
    """

    pages: tuple[Cache, ...]

    @property
    def keys(self) -> tuple[tuple[Array, ...], ...]:
        """For each layer, its pages of keys."""
        return tuple(zip(*(page.keys for page in self.pages), strict=True))

    @property
    def values(self) -> tuple[tuple[Array, ...], ...]:
        """For each layer, its pages of values."""
        return tuple(zip(*(page.values for page in self.pages), strict=True))

    @property
    def length_B(self) -> Array:
        """int32, slots filled, all pages together."""
        return sum(page.length_B for page in self.pages)

    @property
    def capacity(self) -> int:
        """M, slots a row can hold."""
        return sum(page.capacity for page in self.pages)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(page.nbytes for page in self.pages)


def _check_capacity(capacity: int) -> None:
    if not 0 <= capacity <= MAX_SIZE:
        raise ValueError(f"memory capacity is {capacity} tokens; wanted 0..{MAX_SIZE}")


def init_cache(config: ModelConfig, batch: int, layers: int, capacity: int, dtype: str) -> Cache:
    """An empty cache of `layers` layers with room for `capacity` tokens a row.

    Raises:
        ValueError: a capacity that int32 slot numbers cannot address.
    """
    _check_capacity(capacity)
    shape = (batch, config.n_kv_heads, config.head_size, capacity)
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def init_memory(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """Empty memory of a model: its memory layers, in its memory dtype."""
    return init_cache(config, batch, len(config.mem_layers), capacity, config.mem_dtype)


def token_bytes(config: ModelConfig) -> int:
    """Bytes of memory that a token of a row takes: its keys and values in all memory layers."""
    return len(config.mem_layers) * 2 * config.n_kv_heads * config.head_size * jnp.dtype(config.mem_dtype).itemsize


def init_pages(config: ModelConfig, batch: int, capacity: int) -> Pages:
    """Empty memory of a model in pages, with room for `capacity` tokens a row, rounded up to whole windows; every page
    has room for a window.

    Raises:
        ValueError: as `init_cache`.
    """
    W, none = config.window, init_memory(config, batch, 0)
    capacity = -(-capacity // W) * W
    if not capacity or not config.mem_layers:
        return Pages((none,))
    _check_capacity(capacity)
    key_bytes = token_bytes(config) // (2 * len(config.mem_layers)) * batch * W
    sizes = [min(W * power_of_two(-(-FIRST_PAGE_BYTES // key_bytes)), capacity)]
    while sum(sizes) < capacity:
        sizes.append(min(sum(sizes), capacity - sum(sizes)))
    return Pages(tuple(init_memory(config, batch, size) for size in sizes))


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _write(buffer_GKM: Array, new_GKT: Array, start: Array, count: Array) -> Array:
    """`buffer` with the first `count` of `new` from slot `start` on, those that fall outside left out; all other slots
    as they were.
    """
    M, T = buffer_GKM.shape[2], new_GKT.shape[2]
    # dynamic_slice would move a slice that does not fit; take the last that does, and shift what is written into it.
    first = jnp.clip(start, 0, M - T)
    shift = start - first
    old = jax.lax.dynamic_slice_in_dim(buffer_GKM, first, T, axis=2)
    t = jnp.arange(T)[None, None, :]
    new = jnp.roll(new_GKT.astype(buffer_GKM.dtype), shift, axis=2)
    mixed = jnp.where((t >= shift) & (t < shift + count), new, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer_GKM, mixed, first, axis=2)


def append(
    cache: Cache | Pages, keys: Sequence[Array], values: Sequence[Array], count_B: Array | None = None
) -> Cache | Pages:
    """The cache with more tokens behind those it holds.

    Args:
        cache: donate it in a jitted caller and it is written in place.
        keys, values: one [B, G, K, T] array a layer, T at most the capacity, or that of the smallest page.
        count_B: int32, how many of the T tokens, from the first, each row takes. None: all.

    Returns:
        The new cache. A row holds at most its capacity: tokens beyond are not kept, so callers make room first.

    Raises:
        ValueError: layers or lengths that do not fit.
    """
    pages = cache.pages if isinstance(cache, Pages) else (cache,)
    layers = len(cache.keys), len(cache.values)
    if (len(keys), len(values)) != layers:
        raise ValueError(
            f"cache has {layers[0]} layers; wanted as many keys and values, found {len(keys)}, {len(values)}"
        )
    if not keys:
        return cache
    T, room = keys[0].shape[3], min(page.capacity for page in pages)
    if T > room:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {room}")
    length_B = cache.length_B
    count_B = jnp.full_like(length_B, T) if count_B is None else count_B
    out, first = [], 0
    for page in pages:
        start_B, end_B = length_B - first, jnp.clip(length_B + count_B - first, 0, page.capacity)
        write = functools.partial(_write_page, keys, values, start_B, count_B)
        buffers = page.keys, page.values
        if len(pages) > 1:
            buffers = jax.lax.cond(jnp.any(end_B > page.length_B), write, lambda buffers: buffers, buffers)
        else:
            buffers = write(buffers)
        out.append(Cache(*buffers, end_B))
        first += page.capacity
    return Pages(tuple(out)) if isinstance(cache, Pages) else out[0]


def _write_page(
    keys: Sequence[Array], values: Sequence[Array], start_B: Array, count_B: Array, buffers: tuple
) -> tuple:
    """(keys, values) of a cache with each row's first `count_B` new ones from slot `start_B` on."""
    write = jax.vmap(_write)
    return tuple(
        tuple(write(buffer, new, start_B, count_B) for buffer, new in zip(old, news, strict=True))
        for old, news in zip(buffers, (keys, values), strict=True)
    )


def evict_oldest(cache: Cache, count_B: Array) -> Cache:
    """The cache without the `count_B[b]` oldest tokens of each row; the others move up, so that slot 0 is the oldest
    again.
    """
    count_B = jnp.minimum(count_B, cache.length_B)
    shift = jax.vmap(lambda x_GKM, count: jnp.roll(x_GKM, -count, axis=2))
    each = lambda buffers: tuple(shift(b, count_B) for b in buffers)
    return Cache(each(cache.keys), each(cache.values), cache.length_B - count_B)


def clear(cache: Cache, row_B: Array) -> Cache:
    """The cache with the rows where `row_B` (bool) is True emptied."""
    return dataclasses.replace(cache, length_B=jnp.where(row_B, 0, cache.length_B))


def compact(xs: Sequence[Array], valid_BT: Array) -> tuple[Array, ...]:
    """[B, G, K, T] arrays with each row's valid tokens moved to the front, in order."""
    order_BT = jnp.argsort(~valid_BT, axis=1, stable=True)
    return tuple(jnp.take_along_axis(x, order_BT[:, None, None, :], axis=3) for x in xs)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How memory is read. Hashable: a static argument.

    Attributes:
        kind: "dense", all of memory; or "topk", each query of each head its k best slots by inner product, exactly.
        k: slots a query retrieves, for "topk".
        score_bytes: bytes of scores held at a time (None: 256 MiB, but for more than one query on a CPU 2 MiB, and 8
            MiB for "topk"); longer queries and memories are streamed in blocks.
    """

    kind: str = "dense"
    k: int | None = None
    score_bytes: int | None = None

    def __post_init__(self):
        if self.kind not in ("dense", "topk"):
            raise ValueError(f"memory reading is {self.kind!r}; wanted 'dense' or 'topk'")
        if (self.kind == "topk") != (self.k is not None):
            raise ValueError(f"memory reading {self.kind!r} with k={self.k}; wanted k for 'topk', and only there")
        if self.k is not None and (not isinstance(self.k, (int, np.integer)) or self.k < 1):
            raise ValueError(f"k is {self.k}; wanted at least 1")


DENSE = Reading()


def read(
    reading: Reading,
    q_BHTK: Array,
    k_BGKM: Array | tuple[Array, ...],
    v_BGKM: Array | tuple[Array, ...],
    length_B: Array,
    *,
    scale: float,
) -> attention.Partial:
    """Attention over memory, an array or its pages, as a partial, to be merged with the local window's."""
    arrays = q_BHTK, k_BGKM, v_BGKM, length_B
    if reading.k is None:
        return dense(*arrays, scale=scale, score_bytes=reading.score_bytes)
    return topk(*arrays, k=reading.k, scale=scale, score_bytes=reading.score_bytes)[0]


def _pages(x: Array | tuple[Array, ...]) -> tuple[Array, ...]:
    return x if isinstance(x, tuple) else (x,)


def _blocks(queries: int, slots: int, rows: int, score_bytes: int | None, k: int | None = None) -> tuple[int, int]:
    """Sizes of query and key blocks for which `rows` x queries x slots float32 scores stay within the budget.

    Key blocks get no smaller than 256 slots, or matrix products would be; queries are split instead, down to one.
    """
    many = queries > 1
    if score_bytes is None and k is not None and many and jax.default_backend() == "cpu":
        # Selection is dear, and cheaper of one large block than of many small ones.
        slot_block = min(slots, power_of_two(max(4096, 128 * k)))
        return max(1, min(queries, 2**23 // (4 * rows * slot_block))), slot_block
    if score_bytes is None:
        # Of many queries a CPU's scores should stay in its cache; elsewhere large products and few steps count. A
        # single query has fewer scores than its keys have bytes, and a block of keys would be copied to be read.
        score_bytes = (2 if many and jax.default_backend() == "cpu" else 256) * 2**20
    budget = max(score_bytes // (4 * rows), 1)
    slot_block = min(slots, max(budget // queries, 256), 2**15 if many else slots)  # no more: cost follows the fill
    return max(1, min(queries, budget // slot_block)), slot_block


def _over_query_blocks(read_block: Callable[[Array], Any], q_BHTK: Array, size: int) -> Any:
    """`read_block` on blocks of `size` queries, one after another, joined along T (axis 2 of every result)."""
    B, H, T, K = q_BHTK.shape
    if size >= T:
        return read_block(q_BHTK)
    n = -(-T // size)
    padded = jnp.pad(q_BHTK, ((0, 0), (0, 0), (0, n * size - T), (0, 0)))
    out = jax.lax.map(read_block, jnp.moveaxis(padded.reshape(B, H, n, size, K), 2, 0))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, H, n * size, *x.shape[4:])[:, :, :T], out)


# Takes what came of the slots so far, or None where this is all; a block of every array of a page; the number of its
# first slot; and which of its slots count, [B, size], or None where all do.
_Step = Callable[[Any, tuple[Array, ...], Array | int, Array | None], Any]


def _over_slots(step: _Step, carry: Any, pages: Sequence[tuple[Array, ...]], length_B: Array, size: int) -> Any:
    """`carry` after `step` over all filled slots, in blocks of at most `size`: for many queries.

    Args:
        pages: arrays [B, G, K, P] that are read together, for each page.
        length_B: slots filled in all pages together.
    """
    start = 0
    for arrays in pages:
        slots = arrays[0].shape[3]
        filled_B = jnp.clip(length_B - start, 0, slots)

        def whole(carry: Any, arrays=arrays, start=start, slots=slots, filled_B=filled_B) -> Any:
            return step(carry, arrays, start, jnp.arange(slots)[None, :] < filled_B[:, None])

        if size < slots:
            carry = _over_blocks(step, carry, arrays, start, filled_B, size)
        else:
            carry = jax.lax.cond(jnp.max(filled_B) > 0, whole, lambda carry: carry, carry)
        start += slots
    return carry


def _each_page(
    step: _Step, nothing: Callable[[int], Any], pages: Sequence[tuple[Array, ...]], length_B: Array, size: int
) -> list[Any]:
    """What `step` makes of each page: for a single query, which reads a page where it lies unless little of it is
    filled. Slots are numbered within the page.

    Args:
        nothing: what comes of an empty page of so many slots.
        pages, length_B, size: as for `_over_slots`.
    """
    out, start = [], 0
    for arrays in pages:
        slots = arrays[0].shape[3]
        filled_B = jnp.clip(length_B - start, 0, slots)
        fill = jnp.max(filled_B)

        def whole(arrays=arrays, slots=slots, filled_B=filled_B) -> Any:
            return step(None, arrays, 0, jnp.arange(slots)[None, :] < filled_B[:, None])

        def blocks(size: int, arrays=arrays, slots=slots, filled_B=filled_B) -> Any:
            return _over_blocks(step, nothing(slots), arrays, 0, filled_B, size)

        empty = functools.partial(nothing, slots)
        if size < slots:
            out.append(blocks(size))
        elif slots <= 2 * COPIED_BLOCK:
            out.append(jax.lax.cond(fill > 0, whole, empty))
        else:  # a block costs twice its bytes: it is copied before it is read
            ways = [empty, functools.partial(blocks, COPIED_BLOCK), whole]
            out.append(jax.lax.switch((fill > 0).astype(int) + (fill > slots // 2), ways))
        start += slots
    return out


def _over_blocks(step: _Step, carry: Any, arrays: tuple[Array, ...], start: int, filled_B: Array, size: int) -> Any:
    """`carry` after `step` over one page, whose first slot is number `start`, in blocks; those that no row fills are
    left out.

    The last block is moved back to end with the page; slots it shares with the one before do not count twice.
    """
    slots = arrays[0].shape[3]

    def one(whole: bool, i: Array, carry: Any) -> Any:
        first = jnp.minimum(i * size, slots - size)
        slot = first + jnp.arange(size)
        counts = None if whole else (slot >= i * size)[None, :] & (slot[None, :] < filled_B[:, None])
        block = tuple(jax.lax.dynamic_slice_in_dim(x, first, size, axis=3) for x in arrays)
        return step(carry, block, start + first, counts)

    n_whole, n = jnp.min(filled_B) // size, -(-jnp.max(filled_B) // size)  # filled in every row: no mask
    carry = jax.lax.fori_loop(0, n_whole, functools.partial(one, True), carry)
    return jax.lax.fori_loop(n_whole, n, functools.partial(one, False), carry)


def dense(
    q_BHTK: Array,
    k_BGKM: Array | tuple[Array, ...],
    v_BGKM: Array | tuple[Array, ...],
    length_B: Array,
    *,
    scale: float,
    score_bytes: int | None = None,
) -> attention.Partial:
    """Attention over all filled slots, streamed over pages, blocks of slots and blocks of queries.

    Pages and blocks that no row fills are not read. Derivatives in reverse mode exist where memory is one block and
    queries are several; forward mode always works.

    Args:
        q_BHTK: queries, rotated by their position in the window.
        k_BGKM, v_BGKM: memory, an array or its pages, any dtype; finite numbers beyond the fill too, as caches have.
        length_B: int32, filled slots of each row.
        scale: what scores are multiplied by.
        score_bytes: bytes of scores held at a time; None: see `Reading`.

    Returns:
        The partial; zero and -inf for a row whose memory is empty.
    """
    B, H, T, _ = q_BHTK.shape
    pages = [page for page in zip(_pages(k_BGKM), _pages(v_BGKM), strict=True) if page[0].shape[3]]
    query_block, slot_block = _blocks(T, max([1, *(k.shape[3] for k, _ in pages)]), B * H, score_bytes)

    def read_block(q: Array) -> attention.Partial:
        def step(
            so_far: attention.Partial | None, arrays: tuple, first: Array | int, counts: Array | None
        ) -> attention.Partial:
            visible = None if counts is None else counts[:, None, :]
            partial = attention.attend(q, *arrays, visible, scale=scale, slots_last=True)
            return partial if so_far is None else attention.merge(so_far, partial)

        nothing = attention.Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
        if T == 1 and pages:
            return attention.merge(*_each_page(step, lambda slots: nothing, pages, length_B, slot_block))
        return _over_slots(step, nothing, pages, length_B, slot_block)

    return _over_query_blocks(read_block, q_BHTK, query_block)


def _top_k(s: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of the last axis, in two dimensions: of more, a CPU makes a full sort, twenty times slower."""
    values, index = jax.lax.top_k(s.reshape(-1, s.shape[-1]), k)
    return values.reshape(*s.shape[:-1], k), index.reshape(*s.shape[:-1], k)


def _best(s: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` of the last axis by block maxima: the same values and indices, ties to the lowest index.

    The k best lie within the k sub-blocks of greatest maxima: any other sub-block has k elements before it that are
    greater, or equal and of lower index. The chosen sub-blocks are put in order before the second selection, or a
    tie would go to whichever sub-block has the greater maximum.
    """
    S = s.shape[-1]
    n = -(-S // SUB_BLOCK)
    if n <= 2 * k:
        return _top_k(s, k)
    padded = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, n * SUB_BLOCK - S)], constant_values=-jnp.inf)
    by_block = padded.reshape(*s.shape[:-1], n, SUB_BLOCK)
    chosen = jnp.sort(_top_k(jnp.max(by_block, axis=-1), k)[1], axis=-1)
    candidates = jnp.take_along_axis(by_block, chosen[..., None], axis=-2)
    values, index = _top_k(candidates.reshape(*s.shape[:-1], k * SUB_BLOCK), k)
    return values, jnp.take_along_axis(chosen, index // SUB_BLOCK, axis=-1) * SUB_BLOCK + index % SUB_BLOCK


def topk(
    q_BHTK: Array,
    k_BGKM: Array | tuple[Array, ...],
    v_BGKM: Array | tuple[Array, ...],
    length_B: Array,
    *,
    k: int,
    scale: float,
    score_bytes: int | None = None,
) -> tuple[attention.Partial, Array, Array]:
    """Attention of each query of each head over its k best filled slots by inner product, exactly (arXiv 2307.03170,
    section 3.1).

    Pages and blocks of slots are scored one after another, with the k best so far carried along, so that no more scores
    than `score_bytes` are held. Selection is by the unscaled inner product, ties go to the lowest slot. Derivatives
    exist in forward mode only.

    Args:
        q_BHTK, k_BGKM, v_BGKM, length_B, scale, score_bytes: as for `dense`.
        k: slots to retrieve, at least 1; may exceed what is filled.

    Returns:
        The partial; slots_BHTN int32, N = k, best first, -1 where fewer than k are filled; scores_BHTN float32,
        unscaled, -inf there.
    """
    B, H, T, K = q_BHTK.shape
    keys, values = _pages(k_BGKM), _pages(v_BGKM)
    G, M = keys[0].shape[1], sum(x.shape[3] for x in keys)
    N = min(k, M)
    if not N:
        nothing = jnp.full((B, H, T, k), -1, jnp.int32), jnp.full((B, H, T, k), -jnp.inf)
        return (dense(q_BHTK, k_BGKM, v_BGKM, length_B, scale=scale), *nothing)
    largest = max(x.shape[3] for x in keys)
    query_block, slot_block = _blocks(T, largest, B * H, score_bytes, N)
    # Retrieved values are [B, H, T, N, K] before they are averaged: they count towards the budget too.
    query_block = max(1, min(query_block, (score_bytes or 64 * 2**20) // (4 * B * H * N * K)))
    turned = tuple(jnp.swapaxes(v, 2, 3) for v in values)

    def read_block(q: Array) -> tuple[attention.Partial, Array, Array]:
        q_BGQK = attention.grouped(q, G)

        def scores(keys: Array, counts: Array | None, others: Array | float) -> Array:
            s = attention.scores(q_BGQK, keys, slots_last=True)
            s = jnp.where(s == 0.0, 0.0, s)  # lax.top_k puts -0.0 after 0.0; they are equal
            return s if counts is None else jnp.where(counts[:, None, None, :], s, others)

        def write(page_s: Array | None, arrays: tuple, first: Array | int, counts: Array | None) -> Array:
            if page_s is None:
                return scores(arrays[0], counts, -jnp.inf)
            old = jax.lax.dynamic_slice_in_dim(page_s, first, arrays[0].shape[3], axis=3)
            return jax.lax.dynamic_update_slice_in_dim(page_s, scores(arrays[0], counts, old), first, axis=3)

        def select(
            so_far: tuple[Array, Array], arrays: tuple, first: Array, counts: Array | None
        ) -> tuple[Array, Array]:
            s = scores(arrays[0], counts, -jnp.inf)
            best, index = _best(s, min(N, s.shape[-1]))
            # So far comes first: among equals the earlier, lower slot wins.
            joined = jnp.concatenate([so_far[0], best], axis=-1), jnp.concatenate([so_far[1], first + index], axis=-1)
            top, chosen = _top_k(joined[0], N)
            return top, jnp.take_along_axis(joined[1], chosen, axis=-1)

        nothing = lambda n: jnp.full((*q_BGQK.shape[:3], n), -jnp.inf)
        if T == 1 and slot_block == largest:  # scores are few: one selection for all pages
            each_s = _each_page(write, nothing, [(x,) for x in keys], length_B, slot_block)
            s, slots = _best(jnp.concatenate(each_s, axis=3), N)
        else:
            carry = nothing(N), jnp.full((*q_BGQK.shape[:3], N), -1, jnp.int32)
            s, slots = _over_slots(select, carry, [(x,) for x in keys], length_B, slot_block)
        filled = s > -jnp.inf
        top = jnp.max(s * scale, axis=-1, keepdims=True)
        p = jnp.exp(s * scale - jnp.where(top == -jnp.inf, 0.0, top))
        total = jnp.sum(p, axis=-1, keepdims=True)
        safe = jnp.where(total == 0.0, 1.0, total)
        weights = jnp.where(filled, p / safe, 0.0)
        dtype = jnp.promote_types(q.dtype, values[0].dtype)
        o, start = jnp.zeros(q_BGQK.shape, jnp.float32), 0
        for v_BGKP, v_BGPK in zip(values, turned, strict=True):
            size = v_BGKP.shape[3]
            here = filled & (slots >= start) & (slots < start + size)

            def add(o: Array, v_BGKP=v_BGKP, v_BGPK=v_BGPK, here=here, start=start, size=size) -> Array:
                index = jnp.where(here, slots - start, 0)
                if index.shape[2] * N < size:  # a few columns of values
                    v_BGKQN = jax.vmap(jax.vmap(lambda v_KM, slots_QN: v_KM[:, slots_QN]))(v_BGKP, index)
                    v_BGQNK = jnp.moveaxis(v_BGKQN, 2, 4)
                else:  # so many that the values are turned round first, once for all blocks of queries
                    v_BGQNK = jax.vmap(jax.vmap(lambda v_MK, slots_QN: v_MK[slots_QN]))(v_BGPK, index)
                mine = jnp.where(here, weights, 0.0).astype(dtype)
                sums = dict(preferred_element_type=jnp.float32)
                return o + jnp.einsum("bgqn,bgqnk->bgqk", mine, v_BGQNK.astype(dtype), **sums)

            o = jax.lax.cond(jnp.any(here), add, lambda o: o, o)
            start += size
        lse = jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe))
        heads = lambda x: x.reshape(B, H, q.shape[2], *x.shape[3:])
        return attention.Partial(heads(o), heads(lse[..., 0])), heads(jnp.where(filled, slots, -1)), heads(s)

    partial, slots, s = _over_query_blocks(read_block, q_BHTK, query_block)
    widen = lambda x, fill: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, k - N)), constant_values=fill)
    return partial, widen(slots, -1), widen(s, -jnp.inf)


def topk_attention(
    q_BTHK: Array,
    k_BMGK: Array,
    v_BMGK: Array,
    length_B: Array,
    *,
    k: int,
    scale: float | None = None,
    score_bytes: int | None = None,
) -> tuple[Array, Array, Array]:
    """Exact top-k attention over a memory, for use by itself; token-major arrays.

    Args:
        q_BTHK: queries; head h reads key/value head h // (H / G).
        k_BMGK, v_BMGK: keys and values.
        length_B: int32, the first length_B[b] slots of row b are filled.
        k: slots to retrieve, at least 1; may exceed what is filled.
        scale: what inner products are multiplied by in the softmax; K ** -0.5 by default. Selection is by the inner
            products themselves; ties go to the lowest slot, as in `jax.lax.top_k`.
        score_bytes: bytes of scores held at a time (None: see `Reading`); beyond, queries and slots are streamed in
            blocks.

    Returns:
        o_BTHK float32, softmax average of the retrieved values, zero where nothing is filled;
        lse_BTH float32, log of the sum of exponentials of their scaled scores, -inf there;
        slots_BTHN int32, N = k, best first, -1 beyond what is filled.

    Raises:
        ValueError: k below 1, or shapes that do not fit.
    """
    Reading("topk", k)
    B, M, G, K = k_BMGK.shape
    if v_BMGK.shape[:3] != (B, M, G) or q_BTHK.shape[0] != B or q_BTHK.shape[3] != K or q_BTHK.shape[2] % G:
        raise ValueError(
            f"queries {q_BTHK.shape}, keys {k_BMGK.shape} and values {v_BMGK.shape} do not fit: wanted "
            "[B, T, H, K] and twice [B, M, G, K] with H a multiple of G"
        )
    if length_B.shape != (B,):
        raise ValueError(f"length_B has shape {length_B.shape}; wanted ({B},)")
    q_BTHK, k_BMGK, v_BMGK = (
        x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x, jnp.float32) for x in (q_BTHK, k_BMGK, v_BMGK)
    )
    major = lambda x: jnp.swapaxes(x, 1, 2)
    cached = lambda x_BMGK: jnp.transpose(x_BMGK, (0, 2, 3, 1))
    scale = K**-0.5 if scale is None else scale
    arrays = major(q_BTHK), cached(k_BMGK), cached(v_BMGK), length_B
    partial, slots, _ = topk(*arrays, k=k, scale=scale, score_bytes=score_bytes)
    return major(partial.o_BHTK), major(partial.lse_BHT), major(slots)
