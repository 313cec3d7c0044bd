"""The two ways of reading memory: dense, and exact top-k; on one device or on several.

On several, each scores the slots it holds. Dense partials merge to the softmax over all of them. For top-k each device
offers its k best, scores and slot numbers alone are gathered, so that every device knows the k best of all, and each
averages the values that it holds. Keys and values never move, and the slots are those that one device finds. Values in
the host's memory are read by top-k alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from fot_jax import attention, sharding
from fot_jax.memory import host, kernels
from fot_jax.memory.cache import Deal, check_deals, places, power_of_two
from fot_jax.memory.stored import Buffer, Int8, format_of, loaded, whole_tiles

Array = jax.Array

KINDS = ("dense", "topk", "approximate")
SUB_BLOCK = 64  # slots whose greatest score is taken together in exact top-k
SCORE_BYTES = 2**28  # of scores in top-k, what is selected of them, and keys
FEW_QUERIES, MOST_SLOTS = 16, 2**18  # queries and slots of a block that top-k is selected of
RETRIEVED_BYTES = 2**26  # of values that queries of a head have retrieved at a time
CONVERTED_BLOCK, CONVERTED_BYTES = 4096, 2**27  # slots that a single query has converted at a time; bytes of a block
SMALL_BLOCK, TAILS = 1024, 8  # slots of a block of a page mostly empty: copies that stay in a cache; pieces of a block


@dataclasses.dataclass(frozen=True)
class Reading:
    """How memory is read. Hashable: a static argument.

    Attributes:
        kind: "dense", all of memory; "topk", each query of each head its k best slots by inner product, exactly; or
            "approximate", k slots of which `recall` are expected to be among the k best, by `lax.approx_max_k`:
            made for TPUs; a CPU finds all of them, in no less time. What was found is measured by `inspection.recall`.
        k: slots a query retrieves, but for "dense".
        score_bytes: bytes of scores held at a time, and for top-k of keys that are copied to be read (None: 256 MiB,
            but for dense reading of more than one query on a CPU 2 MiB); longer queries and memories are streamed in
            blocks.
        recall: for "approximate", above 0 and below 1.
    """

    kind: str = "dense"
    k: int | None = None
    score_bytes: int | None = None
    recall: float = 0.95

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"memory reading is {self.kind!r}; wanted one of {', '.join(KINDS)}")
        if (self.kind == "dense") != (self.k is None):
            raise ValueError(
                f"memory reading {self.kind!r} with k={self.k}; wanted k for 'topk' and 'approximate', and only there"
            )
        _check_settings(self.k, self.recall, self.score_bytes)


def _check_settings(k: int | None = None, recall: float | None = None, score_bytes: int | None = None) -> None:
    for name, value in ("k", k), ("score_bytes", score_bytes):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"{name} is {value!r}; wanted a whole number of at least 1")
    if recall is not None and not 0 < recall < 1:
        raise ValueError(f"recall is {recall}; wanted above 0 and below 1")


DENSE = Reading()


def read(
    reading: Reading,
    q_BHTK: Array,
    k_BGKM: Buffer | tuple[Buffer, ...],
    v_BGKM: Buffer | tuple[Buffer, ...],
    length_B: Array,
    *,
    scale: float,
    deals: tuple[Deal, ...] = (),
    seen: Seen = (),
) -> attention.Partial:
    """Attention over memory, an array or its pages, as a partial, to be merged with the local window's.

    Args:
        q_BHTK: queries, B the rows of memory or a multiple of them: then as many rows that follow one another read one
            row of memory, each what it would read of a memory of its own.

    Raises:
        ValueError: rows of queries that the rows of memory do not divide.
    """
    rows = q_BHTK.shape[0]
    arrays, options = (_together(q_BHTK, length_B), k_BGKM, v_BGKM, length_B), dict(scale=scale, deals=deals, seen=seen)
    if reading.k is None:
        return _apart(rows, dense(*arrays, score_bytes=reading.score_bytes, **options))
    recall = reading.recall if reading.kind == "approximate" else None
    return _apart(rows, topk(*arrays, k=reading.k, score_bytes=reading.score_bytes, recall=recall, **options)[0])


def _together(q_BHTK: Array, length_B: Array) -> Array:
    """Queries of all rows that read one row of memory as those of one row."""
    B, H, T, K = q_BHTK.shape
    rows = length_B.shape[0]
    if B == rows:
        return q_BHTK
    if B % rows:
        raise ValueError(f"queries have {B} rows and memory {rows}; wanted a multiple")
    return jnp.swapaxes(q_BHTK.reshape(rows, B // rows, H, T, K), 1, 2).reshape(rows, H, -1, K)


def _apart(B: int, xs: Any) -> Any:
    """The other way: arrays [rows, H, B / rows * T, ...] as [B, H, T, ...]."""

    def one(x: Array) -> Array:
        rows, H, queries, *rest = x.shape
        if rows == B:
            return x
        return jnp.swapaxes(x.reshape(rows, H, B // rows, -1, *rest), 1, 2).reshape(B, H, -1, *rest)

    return jax.tree.map(one, xs)


# For each page of a memory which slots are read, bool [B, 1, 1, M] as they lie on devices, or None for all.
Seen = tuple[Array | None, ...]


def _pages(x: Buffer | tuple[Buffer, ...]) -> tuple[Buffer, ...]:
    return x if isinstance(x, tuple) else (x,)


def _dense_blocks(queries: int, slots: int, rows: int, score_bytes: int | None) -> tuple[int, int]:
    """Sizes of query and key blocks for which `rows` x queries x slots float32 scores stay within the budget.

    Key blocks get no smaller than 256 slots, or matrix products would be; queries are split instead, down to one.
    """
    many = queries > 1
    if score_bytes is None:
        # Of many queries a CPU's scores should stay in its cache; elsewhere large products and few steps count. A
        # single query has fewer scores than its keys have bytes, and a block of keys would be copied to be read.
        score_bytes = (2 if many and sharding.platform() == "cpu" else 256) * 2**20
    budget = max(score_bytes // (4 * rows), 1)
    slot_block = min(slots, max(budget // queries, 256), 2**15 if many else slots)  # no more: cost follows the fill
    return max(1, min(queries, budget // slot_block)), slot_block


def _topk_blocks(queries: int, parts: Sequence[_Part], rows: int, score_bytes: int | None) -> tuple[int, int]:
    """The same for top-k. Scores are there twice, as products and as numbers to compare, and what is selected of them
    takes an eighth of that; a block of keys is a copy, but where it is all there is.

    Selection is dear, and cheaper of one large block for a few queries than of many small ones.
    """
    budget = score_bytes or SCORE_BYTES
    largest, (B, G, K, _) = max(part.columns for part in parts), parts[0].arrays[0].shape
    converted = any(part.converted for part in parts)
    for few in (min(queries, FEW_QUERIES), 1):
        scores, copied = 9 * rows * few, 4 * B * G * K
        slot_block = min(largest, MOST_SLOTS, power_of_two(budget // (scores + copied) + 1) // 2)
        if not converted and largest <= min(MOST_SLOTS, budget // scores):
            slot_block, copied = largest, 0
        if slot_block >= 64 * SUB_BLOCK:
            break
    slot_block = max(slot_block, min(largest, 256))
    return max(1, min(queries, (budget - copied * slot_block) // (9 * rows * slot_block))), slot_block


class _Part(NamedTuple):
    """A page of memory, or what a device holds of one.

    Attributes:
        arrays: [B, G, K, n] each, read together, in the format of memory.
        filled_B: int32, columns filled, from the first.
        first: number of the page's first slot.
        slots: of the whole page.
        deal: how they lie on devices.
        device: which this is.
        seen: which columns are read, bool [B, 1, 1, n]; None for all.
    """

    arrays: tuple[Buffer, ...]
    filled_B: Array
    first: int
    slots: int
    deal: Deal
    device: Array | int
    seen: Array | None

    @property
    def columns(self) -> int:
        """n, columns that the device holds."""
        return self.arrays[0].shape[3]

    def number(self, column: Array) -> Array:
        """Numbers of the slots in columns."""
        return self.first + self.deal.slot(self.device, column)

    def column(self, number: Array) -> Array:
        """The other way: columns of slots, -1 for those that are not here."""
        slot = number - self.first
        here = (slot >= 0) & (slot < self.slots)
        if self.deal.ways > 1:
            here &= self.deal.device(slot) == self.device
        return jnp.where(here, self.deal.column(slot), -1)

    @property
    def converted(self) -> bool:
        """Whether its numbers are turned into float32 to be read: those of int8, and on a CPU of all other formats."""
        cpu = sharding.platform() == "cpu"
        return any(isinstance(x, Int8) or (cpu and x.dtype != jnp.float32) for x in self.arrays)

    @property
    def whole(self) -> tuple[tuple[Array, ...], _Part, int, Array]:
        """All of it in one block, as a `_Step` takes it."""
        counts = jnp.arange(self.columns)[None, :] < self.filled_B[:, None]
        return tuple(map(loaded, jax.tree.map(_as_it_lies, self.arrays))), self, 0, _and(counts, self.seen)


def _and(counts: Array | None, seen: Array | None) -> Array | None:
    """Columns [B, n] that both say count; None for all."""
    if seen is None:
        return counts
    return seen[:, 0, 0] if counts is None else counts & seen[:, 0, 0]


def _parts(
    pages: Sequence[tuple[tuple[Buffer, ...], Array | None]],
    length_B: Array,
    deals: Sequence[Deal],
    device: Array | int,
) -> list[_Part]:
    """The parts of pages, of which `length_B` slots are filled in all together."""
    out, first = [], 0
    for (arrays, seen), deal in zip(pages, deals, strict=True):
        slots = arrays[0].shape[3] * deal.ways
        filled_B = deal.before(jnp.clip(length_B - first, 0, slots), device)
        out.append(_Part(arrays, filled_B, first, slots, deal, device, seen))
        first += slots
    return out


def _convertible(size: int, parts: Sequence[_Part]) -> int:
    """Slots of a block, `size` or as many as may be converted at a time."""
    if not any(part.converted for part in parts):
        return size
    B, G, K, _ = parts[0].arrays[0].shape
    return min(size, max(CONVERTED_BLOCK, power_of_two(CONVERTED_BYTES // (4 * B * G * K) + 1) // 2))


# Takes what came of the slots so far, or None where this is all; a block of every array of a part; the part; the first
# of its columns; and which of the block's columns count, [B, size], or None where all do.
_Step = Callable[[Any, tuple[Array, ...], _Part, Array | int, Array | None], Any]


def _over_slots(step: _Step, carry: Any, parts: Sequence[_Part], size: int) -> Any:
    """`carry` after `step` over all filled slots, in blocks of at most `size`: for many queries."""
    for part in parts:
        fill, small = jnp.max(part.filled_B), part.columns // TAILS
        ways = [lambda carry: carry, lambda carry, part=part: step(carry, *part.whole)]
        if size < part.columns:
            carry = _over_blocks(step, carry, part, size)
        elif small < SMALL_BLOCK:
            carry = jax.lax.switch((fill > 0).astype(int), ways, carry)
        else:
            few = lambda carry, part=part, small=small: _over_blocks(step, carry, part, small)
            carry = jax.lax.switch((fill > 0).astype(int) + (fill > part.columns // 2), [ways[0], few, ways[1]], carry)
    return carry


def _each_part(step: _Step, nothing: Callable[[int], Any], parts: Sequence[_Part], size: int) -> list[Any]:
    """What `step` makes of each part: for a single query, which reads a part where it lies unless little of it is
    filled, or its numbers are converted.

    Args:
        nothing: what comes of an empty part of so many columns.
    """
    out = []
    for part in parts:
        fill = jnp.max(part.filled_B)
        if part.converted:
            size = min(size, CONVERTED_BLOCK)

        def whole(part=part) -> Any:
            return step(None, *part.whole)

        def blocks(size: int, part=part) -> Any:
            return _over_blocks(step, nothing(part.columns), part, size)

        empty = functools.partial(nothing, part.columns)
        if size < part.columns:
            out.append(blocks(size))
        elif part.columns <= 2 * SMALL_BLOCK:
            out.append(jax.lax.cond(fill > 0, whole, empty))
        else:  # a block costs twice its bytes: it is copied before it is read
            ways = [empty, functools.partial(blocks, SMALL_BLOCK), whole]
            out.append(jax.lax.switch((fill > 0).astype(int) + (fill > part.columns // 2), ways))
    return out


def _as_it_lies(x: Array) -> Array:
    """`x`, which a GPU's compiler must not turn round: for products in a loop it would turn all of memory before it."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if sharding.platform() == "gpu" else x


def _cut(x: Array, first: Array, size: int) -> Array:
    """Columns of an array; of bfloat16 on a CPU as float32, by way of their bits: its compiler would rather convert all
    of memory, before any loop.
    """
    if x.dtype != jnp.bfloat16 or sharding.platform() != "cpu":
        return _as_it_lies(jax.lax.dynamic_slice_in_dim(x, first, size, axis=3))
    return _cut_by_bits(x, first, size)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _cut_by_bits(x: Array, first: Array, size: int) -> Array:
    x, first = jax.lax.optimization_barrier((x, first))  # nothing that a loop could do with all of it before it begins
    bits = jax.lax.dynamic_slice_in_dim(jax.lax.bitcast_convert_type(x, jnp.uint16), first, size, axis=3)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


@_cut_by_bits.defjvp
def _(size: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, first = primals
    slope = jax.lax.dynamic_slice_in_dim(tangents[0], first, size, axis=3).astype(jnp.float32)
    return _cut_by_bits(x, first, size), slope


def _over_blocks(step: _Step, carry: Any, part: _Part, size: int) -> Any:
    """`carry` after `step` over one part in blocks; those that no row fills are left out, and of a large one that is
    filled in part as many pieces as are.

    The last block is moved back to end with the part; columns it shares with the one before do not count twice.
    """

    def one(size: int, whole: bool, i: Array, carry: Any) -> Any:
        first = jnp.minimum(i * size, part.columns - size)
        column = first + jnp.arange(size)
        counts = None if whole else (column >= i * size)[None, :] & (column[None, :] < part.filled_B[:, None])
        block, seen = jax.tree.map(lambda x: _cut(x, first, size), (part.arrays, part.seen))
        return step(carry, tuple(map(loaded, block)), part, first, _and(counts, seen))

    def loop(carry: Any, size: int, whole: bool, first: Array | int, end: Array) -> Any:
        return jax.lax.fori_loop(first, end, functools.partial(one, size, whole), carry)

    least, most = jnp.min(part.filled_B), jnp.max(part.filled_B)
    piece = size // TAILS if size // TAILS >= SMALL_BLOCK else size
    size = piece * TAILS if piece < size else size  # whole pieces: the tail begins where the blocks end
    carry = loop(carry, size, True, 0, least // size)  # filled in every row: no mask
    if piece < size:
        carry = loop(carry, size, False, least // size, most // size)
        least = most // size * size
    return loop(carry, piece, False, least // piece, -(-most // piece))


def _filled_up(K: int, page: tuple[Buffer, ...]) -> int:
    """Dimensions that vectors of K have in a page of memory: on a TPU there may be more."""
    return whole_tiles(K, format_of(page[0])) if sharding.platform() == "tpu" else K


def _check_arrays(q_BHTK: Array, pages: Sequence[tuple[Buffer, ...]], length_B: Array, deals: Sequence[Deal]) -> None:
    """Refuses arrays that do not fit each other.

    Raises:
        ValueError: such arrays; no word of how memory lies on the devices of the mesh, where it is split.
    """
    B, H, T, K = q_BHTK.shape
    for page in pages:
        _, G, size, M = page[0].shape
        if {x.shape for x in page} != {(B, G, size, M)} or H % max(G, 1) or size not in (K, _filled_up(K, page)):
            raise ValueError(
                f"queries {q_BHTK.shape} and memory {' and '.join(str(x.shape) for x in page)} do not fit; wanted "
                "[B, H, T, K] and [B, G, K, M] with H a multiple of G"
            )
    if not B or not T:
        raise ValueError(f"queries are {q_BHTK.shape}; wanted at least one")
    if length_B.shape != (B,):
        raise ValueError(f"length_B has shape {length_B.shape}; wanted ({B},)")
    if not deals and any(page[0].shape[3] for page in pages) and (ways := sharding.ways("memory")) > 1:
        raise ValueError(f"the mesh splits memory {ways} ways and deals are not given; wanted the memory's")


# Reads what one device holds: (queries, parts of every page, mesh axes that memory is dealt over) -> arrays.
_Read = Callable[[Array, list[_Part], tuple[str, ...]], Any]


def _on_devices(
    read: _Read,
    q_BHTK: Array,
    pages: Sequence[tuple[Buffer, ...]],
    length_B: Array,
    deals: tuple[Deal, ...],
    seen: Seen,
) -> Any:
    """`read` on every device of the mesh of `jax.set_mesh`, each with its rows, heads and slots; what it returns is
    split as the queries' rows and heads are. Queries have zeros where vectors of memory are filled up.

    Raises:
        ValueError: a memory that was dealt to other devices than the mesh has.
    """
    _check_arrays(q_BHTK, pages, length_B, deals)
    K = max([q_BHTK.shape[3], *(page[0].shape[2] for page in pages)])
    q_BHTK = jnp.pad(q_BHTK, [(0, 0)] * 3 + [(0, K - q_BHTK.shape[3])])
    n = len(pages)
    whole = zip(pages, deals or (Deal(),) * n, seen or (None,) * n, strict=True)
    held = [page for page in whole if page[0][0].shape[3]]
    read_of, deals = [(arrays, seen) for arrays, _, seen in held], tuple(deal for _, deal, _ in held)
    check_deals(deals)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not held:
        return read(q_BHTK, _parts(read_of, length_B, deals, 0), ())
    where = places(q_BHTK.shape[0], read_of[0][0][0].shape[1])
    axes = where.axes if deals[0].ways > 1 else ()

    def body(q: Array, read_of: Any, length_B: Array) -> Any:
        device = jax.lax.axis_index(axes) if axes else 0
        return read(q, _parts(read_of, length_B, deals, device), axes)

    slots = [jax.tree.map(lambda _: where.slots if axes else where.heads, arrays) for arrays, _ in read_of]
    masks = [jax.tree.map(lambda _: where.seen if axes else where.rows, seen) for _, seen in read_of]
    specs = where.heads, list(zip(slots, masks, strict=True)), where.rows
    return jax.shard_map(body, in_specs=specs, out_specs=where.heads, check_vma=False)(q_BHTK, read_of, length_B)


def _merge_over(axes: tuple[str, ...], partial: attention.Partial) -> attention.Partial:
    """The partial over what all devices hold, from each one's own."""
    if not axes:
        return partial
    top = jax.lax.pmax(partial.lse_BHT, axes)
    weight = jnp.exp(partial.lse_BHT - jnp.where(top == -jnp.inf, 0.0, top))
    total = jax.lax.psum(weight, axes)
    safe = jnp.where(total == 0.0, 1.0, total)
    o = jax.lax.psum(weight[..., None] * partial.o_BHTK, axes) / safe[..., None]
    return attention.Partial(o, jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe)))


def dense(
    q_BHTK: Array,
    k_BGKM: Buffer | tuple[Buffer, ...],
    v_BGKM: Buffer | tuple[Buffer, ...],
    length_B: Array,
    *,
    scale: float,
    score_bytes: int | None = None,
    deals: tuple[Deal, ...] = (),
    seen: Seen = (),
) -> attention.Partial:
    """Attention over all filled slots, streamed over pages, blocks of slots and blocks of queries.

    Pages and blocks that no row fills are not read. Derivatives in reverse mode exist where memory is one block of
    fewer than 8192 slots and queries are several; forward mode always works.

    Args:
        q_BHTK: queries, rotated by their position in the window.
        k_BGKM, v_BGKM: memory, an array or its pages, any dtype; finite numbers beyond the fill too, as caches have.
        length_B: int32, filled slots of each row.
        scale: what scores are multiplied by.
        score_bytes: bytes of scores that a device holds at a time; None: see `Reading`.
        deals: how the slots of each page lie on the devices of the mesh, `mem.deals`; () where the mesh does not split
            memory.
        seen: which slots of each page are read, bool [B, 1, 1, M] as they lie; None or () for all that are filled.

    Returns:
        The partial; zero and -inf for a row whose memory is empty.

    Raises:
        ValueError: arrays that do not fit; memory that was dealt to other devices than the mesh has, or whose values
            are on the host.
    """
    _check_settings(score_bytes=score_bytes)
    pages = list(zip(_pages(k_BGKM), _pages(v_BGKM), strict=True))
    if any(values.shape[3] and host.holds(values) for _, values in pages):
        raise ValueError("values are on the host, of which dense reading would need all; wanted reading by top-k")
    partial = _on_devices(functools.partial(_dense, scale, score_bytes), q_BHTK, pages, length_B, deals, seen)
    return partial._replace(o_BHTK=partial.o_BHTK[..., : q_BHTK.shape[3]])


def _dense(
    scale: float, score_bytes: int | None, q_BHTK: Array, parts: list[_Part], axes: tuple[str, ...]
) -> attention.Partial:
    B, H, T, _ = q_BHTK.shape
    query_block, slot_block = _dense_blocks(T, max([1, *(part.columns for part in parts)]), B * H, score_bytes)

    def step(so_far: attention.Partial | None, arrays: tuple, part: _Part, first: Any, counts: Any, q: Array) -> Any:
        visible = None if counts is None else counts[:, None, :]
        partial = attention.attend(q, *arrays, visible, scale=scale, slots_last=True)
        return partial if so_far is None else attention.merge(so_far, partial)

    def read_block(q: Array) -> attention.Partial:
        one = functools.partial(step, q=q)
        nothing = attention.Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
        if T == 1 and parts:
            partial = attention.merge(*_each_part(one, lambda columns: nothing, parts, slot_block))
        else:
            partial = _over_slots(one, nothing, parts, _convertible(slot_block, parts))
        return _merge_over(axes, partial)

    return attention.over_query_blocks(read_block, q_BHTK, query_block)


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
    k_BGKM: Buffer | tuple[Buffer, ...],
    v_BGKM: Buffer | tuple[Buffer, ...],
    length_B: Array,
    *,
    k: int,
    scale: float,
    score_bytes: int | None = None,
    recall: float | None = None,
    deals: tuple[Deal, ...] = (),
    seen: Seen = (),
) -> tuple[attention.Partial, Array, Array]:
    """Attention of each query of each head over its k best filled slots by inner product, exactly (arXiv 2307.03170,
    section 3.1).

    Pages and blocks of slots are scored one after another, with the k best so far carried along, so that no more scores
    than `score_bytes` are held. Selection is by the unscaled inner product, ties go to the lowest slot. Derivatives
    exist in forward mode only.

    Args:
        q_BHTK, k_BGKM, v_BGKM, length_B, scale, score_bytes, deals, seen: as for `dense`.
        k: slots to retrieve, at least 1; may exceed what is filled.
        recall: share of the k best that each selection is to find, above 0 and below 1; None: all. See `Reading`.

    Returns:
        The partial; slots_BHTN int32, N = k, best first, -1 where fewer than k are filled; scores_BHTN float32,
        unscaled, -inf there.

    Raises:
        ValueError: k below 1, a recall or budget that is none; arrays that do not fit; memory that was dealt to other
            devices than the mesh has.
    """
    _check_settings(k, recall, score_bytes)
    B, H, T, _ = q_BHTK.shape
    pages = list(zip(_pages(k_BGKM), _pages(v_BGKM), strict=True))
    N = min(k, sum(keys.shape[3] for keys, _ in pages))
    if not N:
        nothing = jnp.full((B, H, T, k), -1, jnp.int32), jnp.full((B, H, T, k), -jnp.inf)
        return (dense(q_BHTK, k_BGKM, v_BGKM, length_B, scale=scale), *nothing)
    partial, slots, s = _on_devices(
        functools.partial(_topk, N, scale, score_bytes, recall), q_BHTK, pages, length_B, deals, seen
    )
    partial = partial._replace(o_BHTK=partial.o_BHTK[..., : q_BHTK.shape[3]])
    return partial, *_widened(k, slots, s)


def _search(
    N: int,
    score_bytes: int | None,
    recall: float | None,
    q_BHTK: Array,
    parts: list[_Part],
    axes: tuple[str, ...],
) -> tuple[Array, Array]:
    """Slots and scores [B, H, T, N], on every device the same."""
    B, H, T, _ = q_BHTK.shape
    G, budget = parts[0].arrays[0].shape[1], score_bytes or SCORE_BYTES
    keys = [part._replace(arrays=part.arrays[:1]) for part in parts]
    one_pass = recall is None and kernels.wanted(N, max(part.columns for part in parts))
    if one_pass:
        query_block = max(1, min(T, budget // (B * H * kernels.query_bytes(N))))
    else:
        query_block, slot_block = _topk_blocks(T, keys, B * H, score_bytes)
    best = _best if recall is None else functools.partial(jax.lax.approx_max_k, recall_target=recall)
    q_nBGQK = jax.vmap(functools.partial(attention.grouped, n_kv_heads=G))(attention.in_blocks(q_BHTK, query_block))
    if one_pass:
        s, slots = _select_in_one_pass(q_nBGQK, keys, N)
    elif T == 1 and 8 * B * H * sum(part.columns for part in parts) <= budget:  # scores of parts, and in one piece
        s, slots = (x[None] for x in _select_at_once(q_nBGQK[0], keys, N, best))
    else:
        s, slots = _select(q_nBGQK, keys, N, slot_block, best)

    def of_all(found: tuple[Array, Array]) -> tuple[Array, Array]:
        s, slots = _best_of_all(*found, N, axes) if axes else found
        heads = lambda x: x.reshape(B, H, query_block, N)
        return heads(jnp.where(s > -jnp.inf, slots, -1)), heads(s)

    return attention.joined(attention.one_by_one(of_all, (s, slots)), T)


def _scores(q_BGQK: Array, keys: Array, counts: Array | None, others: Array | float) -> Array:
    """Scores, with `others` where slots do not count."""
    s = attention.scores(q_BGQK, _as_it_lies(keys), slots_last=True, exact=True)  # in a loop over queries of its own
    s = jnp.where(s == 0.0, 0.0, s)  # lax.top_k puts -0.0 after 0.0; they are equal
    return s if counts is None else jnp.where(counts[:, None, None, :], s, others)


# Greatest scores of the last axis and their indices, of (scores, how many).
_Best = Callable[[Array, int], Sequence[Array]]


def _select(q_nBGQK: Array, parts: list[_Part], N: int, slot_block: int, best: _Best) -> tuple[Array, Array]:
    """The best slots of those that a device holds: scores, greatest first, -inf beyond what is filled, and numbers; N
    of them, or as many as it holds, [n, B, G, Q, N]. A block of keys is loaded once for all blocks of queries.
    """
    N = min(N, sum(part.columns for part in parts))

    def select(so_far: Any, arrays: tuple, part: _Part, first: Array | int, counts: Array | None) -> Any:
        def one(block: tuple[Array, tuple[Array, Array]]) -> tuple[Array, Array]:
            q_BGQK, so_far = block
            s = _scores(q_BGQK, arrays[0], counts, -jnp.inf)
            top, index = best(s, min(N, s.shape[-1]))
            return _better(so_far, (top, part.number(first + index)), N)

        return attention.one_by_one(one, (q_nBGQK, so_far))

    return _over_slots(select, _none_yet(q_nBGQK, N), parts, slot_block)


def _none_yet(q: Array, N: int) -> tuple[Array, Array]:
    """Scores and slots [..., N] of queries [..., K] before anything was read."""
    shape = (*q.shape[:-1], N)
    return jnp.full(shape, -jnp.inf), jnp.full(shape, -1, jnp.int32)


def _better(so_far: tuple[Array, Array], new: tuple[Array, Array], N: int) -> tuple[Array, Array]:
    """The N best of scores and slots, greatest first. So far comes first: among equals the earlier, lower slot wins."""
    s, slots = (jnp.concatenate(both, axis=-1) for both in zip(so_far, new, strict=True))
    top, chosen = _top_k(s, N)
    return top, jnp.take_along_axis(slots, chosen, axis=-1)


def _select_in_one_pass(q_nBGQK: Array, parts: list[_Part], N: int) -> tuple[Array, Array]:
    """The same by a kernel that holds no scores."""
    N = min(N, sum(part.columns for part in parts))

    def one(q_BGQK: Array) -> tuple[Array, Array]:
        found = _none_yet(q_BGQK, N)
        for part in parts:

            def select(found: tuple[Array, Array], part=part) -> tuple[Array, Array]:
                k = min(N, part.columns)
                s, column = kernels.best(q_BGQK, part.arrays[0], part.filled_B, part.seen, k)
                both = zip(found, (s, part.number(column)), strict=True)
                return kernels.in_order(*(jnp.concatenate(pair, axis=-1) for pair in both), N)

            found = jax.lax.cond(jnp.max(part.filled_B) > 0, select, lambda found: found, found)
        return found

    return attention.one_by_one(one, q_nBGQK)


def _select_at_once(q_BGQK: Array, parts: list[_Part], N: int, best: _Best) -> tuple[Array, Array]:
    """The same, [B, G, Q, N], of a query whose scores are so few that all are made before the selection."""

    def write(part_s: Array | None, arrays: tuple, part: _Part, first: Array | int, counts: Array | None) -> Array:
        if part_s is None:
            return _scores(q_BGQK, arrays[0], counts, -jnp.inf)
        old = jax.lax.dynamic_slice_in_dim(part_s, first, arrays[0].shape[3], axis=3)
        return jax.lax.dynamic_update_slice_in_dim(part_s, _scores(q_BGQK, arrays[0], counts, old), first, axis=3)

    nothing = lambda columns: jnp.full((*q_BGQK.shape[:3], columns), -jnp.inf)
    each_s = _each_part(write, nothing, parts, max(part.columns for part in parts))
    s, index = best(jnp.concatenate(each_s, axis=3), min(N, sum(part.columns for part in parts)))
    slots, start = parts[0].number(index), parts[0].columns
    for part in parts[1:]:
        slots = jnp.where(index >= start, part.number(index - start), slots)
        start += part.columns
    return s, slots


def _topk(
    N: int,
    scale: float,
    score_bytes: int | None,
    recall: float | None,
    q_BHTK: Array,
    parts: list[_Part],
    axes: tuple[str, ...],
) -> tuple[attention.Partial, Array, Array]:
    B, H, T, K = q_BHTK.shape
    G = parts[0].arrays[0].shape[1]
    slots, s = found = _search(N, score_bytes, recall, q_BHTK, parts, axes)
    of_heads = lambda x: x.reshape(B, G, -1, N)
    slots_BGQN, s_BGQN = of_heads(slots), of_heads(s) * scale
    top = jnp.max(s_BGQN, axis=-1, keepdims=True)
    p_BGQN = jnp.exp(s_BGQN - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(p_BGQN, axis=-1, keepdims=True)
    safe = jnp.where(total == 0.0, 1.0, total)
    weight_BGQN = jnp.where(slots_BGQN >= 0, p_BGQN / safe, 0.0)
    lse_BGQ = jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe))
    o_BGQK = jnp.zeros((*slots_BGQN.shape[:3], K), jnp.float32)
    dtype, budget = jnp.promote_types(q_BHTK.dtype, parts[0].arrays[1].dtype), score_bytes or RETRIEVED_BYTES
    for part in parts:
        values, column_BGQN = part.arrays[1], part.column(slots_BGQN)
        if host.holds(values):
            o_BGQK += host.weighted_sum(values, column_BGQN, weight_BGQN, part.filled_B, dtype, budget)
            continue

        def add(o_BGQK: Array, values=values, column_BGQN=column_BGQN) -> Array:
            return o_BGQK + _weighted_sum(values, column_BGQN, weight_BGQN, dtype, budget)

        o_BGQK = jax.lax.cond(jnp.any(column_BGQN >= 0), add, lambda o: o, o_BGQK)
    if axes:
        o_BGQK = jax.lax.psum(o_BGQK, axes)
    return attention.Partial(o_BGQK.reshape(q_BHTK.shape), lse_BGQ.reshape(B, H, T)), *found


def _weighted_sum(values: Buffer, column_BGQN: Array, weight_BGQN: Array, dtype: Any, budget: int) -> Array:
    """sum over n of weight x the value in a column (below 0: none): float32 [B, G, Q, K], of products in `dtype`.

    Many queries of a head have its values turned round first, so that each lies together; heads then go one by one, or
    a copy of all values would be there at a time, and queries in blocks that retrieve no more than `budget` bytes.
    """
    B, G, K, M = values.shape
    Q, N = column_BGQN.shape[2:]
    if kernels.fetches(Q, M):
        return kernels.weighted_sum(values, column_BGQN, weight_BGQN)
    turned = Q * N >= M or sharding.platform() == "tpu"  # whose compiler turns all of them to take a column

    def of_query(values: Buffer, column_N: Array, weight_N: Array) -> Array:
        index_N = jnp.maximum(column_N, 0)
        v_NK = loaded(jax.tree.map(lambda x: x[index_N] if turned else x[:, index_N].T, values))
        weight_N = jnp.where(column_N >= 0, weight_N, 0.0).astype(dtype)
        return jnp.einsum("n,nk->k", weight_N, v_NK.astype(dtype), preferred_element_type=jnp.float32)

    def of_head(head: tuple[Buffer, Array, Array]) -> Array:
        values, column_QN, weight_QN = head
        values = jax.tree.map(_as_it_lies, values)
        if turned:
            values = jax.tree.map(lambda x: kernels.turned(x) if kernels.turns(x) else x.T, values)
        block = max(1, min(Q, budget // (4 * N * K)))
        return jax.lax.map(lambda query: of_query(values, *query), (column_QN, weight_QN), batch_size=block)

    given = values, column_BGQN, weight_BGQN
    if not turned and 4 * B * G * Q * N * K <= budget:
        of_all = jax.vmap(of_query, in_axes=(None, 0, 0))
        return jax.vmap(jax.vmap(of_all))(*given)
    flat = jax.tree.map(lambda x: x.reshape(B * G, *x.shape[2:]), given)
    return attention.one_by_one(of_head, flat).reshape(B, G, Q, K)


def _best_of_all(s: Array, slots: Array, N: int, axes: tuple[str, ...]) -> tuple[Array, Array]:
    """The N best of what every device found, on all of them: greatest first, ties to the lowest slot."""
    s, slots = (jax.lax.all_gather(x, axes, axis=3, tiled=True) for x in (s, slots))
    return kernels.in_order(s, slots, N)


def search(
    q_BHTK: Array,
    k_BGKM: Buffer | tuple[Buffer, ...],
    length_B: Array,
    *,
    k: int,
    score_bytes: int | None = None,
    recall: float | None = None,
    deals: tuple[Deal, ...] = (),
    seen: Seen = (),
) -> tuple[Array, Array]:
    """The k best slots of each query by inner product, exactly: what `topk` selects, without values.

    Args:
        q_BHTK, k_BGKM, length_B, k, score_bytes, recall, deals, seen: as for `topk`.

    Returns:
        slots_BHTN int32, N = k, best first, -1 where fewer than k are filled; scores_BHTN float32, -inf there.

    Raises:
        ValueError: as for `topk`.
    """
    _check_settings(k, recall, score_bytes)
    pages = [(keys,) for keys in _pages(k_BGKM)]
    N = min(k, sum(keys.shape[3] for (keys,) in pages))
    shape = q_BHTK.shape[:3]
    if not N:
        return jnp.full((*shape, k), -1, jnp.int32), jnp.full((*shape, k), -jnp.inf)
    slots, s = _on_devices(functools.partial(_search, N, score_bytes, recall), q_BHTK, pages, length_B, deals, seen)
    return _widened(k, slots, s)


def _widened(k: int, slots: Array, s: Array) -> tuple[Array, Array]:
    """Slots and scores of fewer than k, with none in the places left."""
    pad = [(0, 0)] * 3 + [(0, k - s.shape[-1])]
    return jnp.pad(slots, pad, constant_values=-1), jnp.pad(s, pad, constant_values=-jnp.inf)


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
    _check_settings(k, score_bytes=score_bytes)
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
    partial, slots, _ = topk(*arrays, k=k, scale=scale, score_bytes=score_bytes, deals=(Deal(),))
    return major(partial.o_BHTK), major(partial.lse_BHT), major(slots)
