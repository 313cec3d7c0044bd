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
from fot_jax.config import ModelConfig

Array = jax.Array

SUB_BLOCK = 64  # slots whose greatest score is taken together in exact top-k
INT32_MAX = 2**31 - 1


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


def init_cache(config: ModelConfig, batch: int, layers: int, capacity: int, dtype: str) -> Cache:
    """An empty cache of `layers` layers with room for `capacity` tokens a row.

    Raises:
        ValueError: a capacity that int32 slot numbers cannot address.
    """
    if not 0 <= capacity <= INT32_MAX:
        raise ValueError(f"memory capacity is {capacity} tokens; wanted 0..{INT32_MAX}")
    shape = (batch, config.n_kv_heads, config.head_size, capacity)
    zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(layers))
    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def init_memory(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """Empty memory of a model: its memory layers, in its memory dtype."""
    return init_cache(config, batch, len(config.mem_layers), capacity, config.mem_dtype)


def _write(buffer_GKM: Array, new_GKT: Array, start: Array, count: Array) -> Array:
    """`buffer` with the first `count` of `new` from slot `start` on; all others as they were."""
    M, T = buffer_GKM.shape[2], new_GKT.shape[2]
    # dynamic_slice would move a slice that does not fit; take the last that does, and shift what is written into it.
    first = jnp.clip(start, 0, M - T)
    shift = start - first
    old = jax.lax.dynamic_slice_in_dim(buffer_GKM, first, T, axis=2)
    t = jnp.arange(T)[None, None, :]
    new = jnp.roll(new_GKT.astype(buffer_GKM.dtype), shift, axis=2)
    mixed = jnp.where((t >= shift) & (t < shift + count), new, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer_GKM, mixed, first, axis=2)


def append(cache: Cache, keys: Sequence[Array], values: Sequence[Array], count_B: Array | None = None) -> Cache:
    """The cache with more tokens behind those it holds.

    Args:
        cache: donate it in a jitted caller and it is written in place.
        keys, values: one [B, G, K, T] array a layer, T at most the capacity.
        count_B: int32, how many of the T tokens, from the first, each row takes. None: all.

    Returns:
        The new cache. A row holds at most its capacity: tokens beyond are not kept, so callers make room first.

    Raises:
        ValueError: layers or lengths that do not fit.
    """
    if len(keys) != len(cache.keys) or len(values) != len(cache.values):
        raise ValueError(
            f"cache has {len(cache.keys)} layers; wanted as many keys and values, found {len(keys)}, {len(values)}"
        )
    if not keys:
        return cache
    T = keys[0].shape[3]
    if T > cache.capacity:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {cache.capacity}")
    if count_B is None:
        count_B = jnp.full_like(cache.length_B, T)
    write = jax.vmap(_write)
    each = lambda buffers, news: tuple(write(b, n, cache.length_B, count_B) for b, n in zip(buffers, news, strict=True))
    length_B = jnp.minimum(cache.length_B + count_B, cache.capacity)
    return Cache(each(cache.keys, keys), each(cache.values, values), length_B)


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
        score_bytes: bytes of scores held at a time (None: 256 MiB, or 2 MiB for more than one query on a CPU); longer
            queries and memories are streamed in blocks.
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
    reading: Reading, q_BHTK: Array, k_BGKM: Array, v_BGKM: Array, length_B: Array, *, scale: float
) -> attention.Partial:
    """Attention over memory as a partial, to be merged with the local window's."""
    arrays = q_BHTK, k_BGKM, v_BGKM, length_B
    if reading.k is None:
        return dense(*arrays, scale=scale, score_bytes=reading.score_bytes)
    return topk(*arrays, k=reading.k, scale=scale, score_bytes=reading.score_bytes)[0]


def _blocks(queries: int, slots: int, rows: int, score_bytes: int | None) -> tuple[int, int]:
    """Sizes of query and key blocks for which `rows` x queries x slots float32 scores stay within the budget.

    Key blocks get no smaller than 256 slots, or matrix products would be; queries are split instead, down to one.
    """
    many = queries > 1
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


def _slot_blocks(length_B: Array, slots: int, size: int) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """How many blocks of `size` slots are filled in any row, and for block i its first slot and which of its slots
    count, [B, size].

    The last block is moved back to end with the memory; slots it shares with the one before do not count twice.
    """
    n = -(-jnp.max(length_B) // size)

    def block(i: Array) -> tuple[Array, Array]:
        first = jnp.minimum(i * size, slots - size)
        slot = first + jnp.arange(size)
        return first, (slot >= i * size)[None, :] & (slot[None, :] < length_B[:, None])

    return n, block


def dense(
    q_BHTK: Array, k_BGKM: Array, v_BGKM: Array, length_B: Array, *, scale: float, score_bytes: int | None = None
) -> attention.Partial:
    """Attention over all filled slots, streamed over blocks of slots and of queries.

    Blocks that no row fills are not read; a single query on a memory whose scores fit `score_bytes` is one block.
    Derivatives in reverse mode exist where the memory is one block; forward mode always works.

    Args:
        q_BHTK: queries, rotated by their position in the window.
        k_BGKM, v_BGKM: memory, any dtype; finite numbers beyond the fill too, as caches have.
        length_B: int32, filled slots of each row.
        scale: what scores are multiplied by.
        score_bytes: bytes of scores held at a time; None: 256 MiB, or 2 MiB for more than one query on a CPU.

    Returns:
        The partial; zero and -inf for a row whose memory is empty.
    """
    B, H, T, _ = q_BHTK.shape
    M = k_BGKM.shape[3]
    if not M:
        return attention.Partial(jnp.zeros(q_BHTK.shape, jnp.float32), jnp.full((B, H, T), -jnp.inf))
    query_block, slot_block = _blocks(T, M, B * H, score_bytes)
    n_blocks, block = _slot_blocks(length_B, M, slot_block)

    def read_block(q: Array) -> attention.Partial:
        def step(whole: bool, i: Array, so_far: attention.Partial) -> attention.Partial:
            first, counts = block(i)
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, slot_block, axis=3) for x in (k_BGKM, v_BGKM))
            visible = None if whole else counts[:, None, :]
            return attention.merge(so_far, attention.attend(q, k, v, visible, scale=scale, slots_last=True))

        if slot_block == M:
            visible = (jnp.arange(M)[None, :] < length_B[:, None])[:, None, :]
            return attention.attend(q, k_BGKM, v_BGKM, visible, scale=scale, slots_last=True)
        nothing = attention.Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
        n_whole = jnp.min(length_B) // slot_block  # filled in every row: no mask
        so_far = jax.lax.fori_loop(0, n_whole, functools.partial(step, True), nothing)
        return jax.lax.fori_loop(n_whole, n_blocks, functools.partial(step, False), so_far)

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
    k_BGKM: Array,
    v_BGKM: Array,
    length_B: Array,
    *,
    k: int,
    scale: float,
    score_bytes: int | None = None,
) -> tuple[attention.Partial, Array, Array]:
    """Attention of each query of each head over its k best filled slots by inner product, exactly (arXiv 2307.03170,
    section 3.1).

    Blocks of slots are scored one after another, with the k best so far carried along, so that no more scores than
    `score_bytes` are held. Selection is by the unscaled inner product, ties go to the lowest slot. Derivatives exist in
    forward mode only.

    Args:
        q_BHTK, k_BGKM, v_BGKM, length_B, scale, score_bytes: as for `dense`.
        k: slots to retrieve, at least 1; may exceed what is filled.

    Returns:
        The partial; slots_BHTN int32, N = k, best first, -1 where fewer than k are filled; scores_BHTN float32,
        unscaled,
        -inf there.
    """
    B, H, T, K = q_BHTK.shape
    G, M = k_BGKM.shape[1], k_BGKM.shape[3]
    N = min(k, M)
    query_block, slot_block = _blocks(T, max(M, 1), B * H, score_bytes)
    # Retrieved values are [B, H, T, N, K] before they are averaged: they count towards the budget too.
    query_block = max(1, min(query_block, (score_bytes or 64 * 2**20) // (4 * B * H * max(N, 1) * K)))
    n_blocks, block = _slot_blocks(length_B, M, slot_block)

    v_BGMK = jnp.swapaxes(v_BGKM, 2, 3)

    def read_block(q: Array) -> tuple[attention.Partial, Array, Array]:
        q_BGQK = attention.grouped(q, G)
        shape = (*q_BGQK.shape[:3], N)

        def step(i: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
            first, counts = block(i)
            keys = k_BGKM if slot_block == M else jax.lax.dynamic_slice_in_dim(k_BGKM, first, slot_block, axis=3)
            s = attention.scores(q_BGQK, keys, slots_last=True)
            s = jnp.where(s == 0.0, 0.0, s)  # lax.top_k puts -0.0 after 0.0; they are equal
            s = jnp.where(counts[:, None, None, :], s, -jnp.inf)
            best, index = _best(s, min(N, slot_block))
            # So far comes first: among equals the earlier, lower slot wins.
            joined = jnp.concatenate([so_far[0], best], axis=-1), jnp.concatenate([so_far[1], first + index], axis=-1)
            values, chosen = _top_k(joined[0], N)
            return values, jnp.take_along_axis(joined[1], chosen, axis=-1)

        nothing = jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)
        s, slots = jax.lax.fori_loop(0, n_blocks, step, nothing)
        filled = s > -jnp.inf
        top = jnp.max(s * scale, axis=-1, keepdims=True, initial=-jnp.inf)
        p = jnp.exp(s * scale - jnp.where(top == -jnp.inf, 0.0, top))
        total = jnp.sum(p, axis=-1, keepdims=True)
        slots = jnp.maximum(slots, 0)
        if slots.shape[2] * N < M:  # a few columns of values
            v_BGKQN = jax.vmap(jax.vmap(lambda v_KM, slots_QN: v_KM[:, slots_QN]))(v_BGKM, slots)
            v_BGQNK = jnp.moveaxis(v_BGKQN, 2, 4)
        else:  # so many that the values are turned round first, once for all blocks of queries
            v_BGQNK = jax.vmap(jax.vmap(lambda v_MK, slots_QN: v_MK[slots_QN]))(v_BGMK, slots)
        weights = jnp.where(filled, p / jnp.where(total == 0.0, 1.0, total), 0.0)
        dtype = jnp.promote_types(q.dtype, v_BGKM.dtype)
        o = jnp.einsum(
            "bgqn,bgqnk->bgqk", weights.astype(dtype), v_BGQNK.astype(dtype), preferred_element_type=jnp.float32
        )
        lse = jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(jnp.where(total == 0.0, 1.0, total)))
        heads = lambda x: x.reshape(B, H, q.shape[2], *x.shape[3:])
        return attention.Partial(heads(o), heads(lse[..., 0])), heads(jnp.where(filled, slots, -1)), heads(s)

    if not N:
        nothing = jnp.full((B, H, T, k), -1, jnp.int32), jnp.full((B, H, T, k), -jnp.inf)
        return (dense(q_BHTK, k_BGKM, v_BGKM, length_B, scale=scale), *nothing)
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
        score_bytes: bytes of scores held at a time (None: 256 MiB, or 2 MiB for more than one query on a CPU); beyond,
            queries and slots are streamed in blocks.

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
