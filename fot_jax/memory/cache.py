"""Caches as pytrees of fixed capacity, on one device or dealt out to several.

Memory is what a memory layer keeps of everything before the open window: un-rotated keys, and values, both [B, G, K,
M], of which the first `length_B[b]` slots of row b are filled, oldest first. Local caches hold un-rotated keys too,
so that spilling a window into memory is a copy. Nothing here is mutable and no slot holds a sentinel: what is filled
is said by lengths alone.

Where the mesh of `jax.set_mesh` splits memory (`sharding.AXES["memory"]`), slots are dealt to its devices in blocks, in
turn, so that a memory filled in part keeps all of them busy. Slot numbers stay what they are on one device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fot_jax import sharding
from fot_jax.config import MAX_SIZE, ModelConfig
from fot_jax.memory import host
from fot_jax.memory.stored import Buffer, Int8, empty, stored, vector_bytes, whole_tiles

Array = jax.Array

FIRST_PAGE_BYTES = 2**22  # of keys of a layer: less is read so fast that smaller pages would save nothing
DEALT_SLOTS, DEALT_ROUNDS = 128, 8  # slots of a block that is dealt to one device; at least so many blocks for each


@dataclasses.dataclass(frozen=True)
class Deal:
    """How slots lie in an array that is split along them: in blocks, dealt to devices in turn. A device's part has its
    blocks one after another, so its columns are in the order of slots, and what is filled is its first columns.

    Attributes:
        ways: devices.
        block: slots of a block; divides those of a device.
    """

    ways: int = 1
    block: int = 1

    def slot(self, device: Array | int, column: Array) -> Array:
        """Number of the slot in a column of a device's part."""
        if self.ways == 1:
            return column
        return (column // self.block * self.ways + device) * self.block + column % self.block

    def column(self, slot: Array) -> Array:
        """The column that a slot has on its device."""
        return slot if self.ways == 1 else slot // (self.ways * self.block) * self.block + slot % self.block

    def device(self, slot: Array) -> Array:
        """The device that holds a slot."""
        return slot // self.block % self.ways

    def before(self, slot: Array, device: Array | int) -> Array:
        """How many slots of a lower number a device holds."""
        if self.ways == 1:
            return slot
        rounds, rest = slot // (self.ways * self.block), slot % (self.ways * self.block)
        return rounds * self.block + jnp.clip(rest - device * self.block, 0, self.block)

    def most_columns(self, slots: int) -> int:
        """As many columns of a device as can be among `slots` that follow one another."""
        return slots if self.ways == 1 else (-(-slots // (self.ways * self.block)) + 1) * self.block

    def in_order(self, x: Array) -> Array:
        """An array [..., M] as it lies on devices, in the order of slots."""
        parts = x.reshape(*x.shape[:-1], self.ways, -1, self.block)
        return parts.swapaxes(-2, -3).reshape(x.shape)

    def as_dealt(self, x: Array) -> Array:
        """An array [..., M] in the order of slots, as it lies on devices."""
        parts = x.reshape(*x.shape[:-1], -1, self.ways, self.block)
        return parts.swapaxes(-2, -3).reshape(x.shape)


def dealt(capacity: int) -> Deal:
    """How a memory of so many slots lies on the mesh of `jax.set_mesh`.

    Raises:
        ValueError: a capacity that the devices do not divide.
    """
    ways = sharding.ways("memory")
    if capacity % ways:
        raise ValueError(f"memory has {capacity} slots for {ways} devices; wanted a multiple")
    if ways == 1 or not capacity:
        return Deal()
    block = math.gcd(capacity // ways, DEALT_SLOTS)
    while block % 2 == 0 and capacity // ways < DEALT_ROUNDS * block:
        block //= 2
    return Deal(ways, block)


def check_deals(deals: Sequence[Deal]) -> None:
    """Refuses a memory that was dealt to other devices than the mesh of `jax.set_mesh` has: its slots would be taken
    for others.
    """
    found, ways = {deal.ways for deal in deals}, sharding.ways("memory")
    if not found <= {1} and found != {ways}:
        raise ValueError(f"memory was dealt to {max(found)} devices; the mesh has {ways} for it: wanted the same")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["keys", "values", "length_B", "seen"], meta_fields=["deal", "size"]
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of some layers, appended to in place when donated.

    Attributes:
        keys, values: one [B, G, K, M] array a layer, or `Int8`; un-rotated keys. Values may lie in the host's memory;
            see `init_memory`. On a TPU memory's K is filled up to whole tiles, with zeros.
        length_B: int32, slots filled in every layer.
        deal: how slots lie on devices.
        seen: which slots are read, bool [B, 1, 1, M] as they lie; None for all that are filled. See `restrict`.
        size: dimensions of a head; None: all of K.
    """

    keys: tuple[Buffer, ...]
    values: tuple[Buffer, ...]
    length_B: Array
    deal: Deal = Deal()
    seen: Array | None = None
    size: int | None = None

    @property
    def head_size(self) -> int | None:
        """Dimensions of a head; None where there are no layers."""
        return self.size or (self.keys[0].shape[2] if self.keys else None)

    @property
    def pages(self) -> tuple[Cache, ...]:
        """A cache is one page."""
        return (self,)

    def with_pages(self, pages: Sequence[Cache]) -> Cache:
        """The cache that is made of other pages, of which there is one."""
        (page,) = pages
        return page

    @property
    def each_seen(self) -> tuple[Array | None, ...]:
        """Which slots of each page are read, of which this has one."""
        return (self.seen,)

    @property
    def deals(self) -> tuple[Deal, ...]:
        """How the slots of each page lie, of which this has one."""
        return (self.deal,)

    @property
    def capacity(self) -> int:
        """M, slots a row can hold."""
        return self.keys[0].shape[3] if self.keys else 0

    @property
    def values_on_host(self) -> bool:
        """Whether values lie in the host's memory."""
        return any(map(host.holds, self.values))

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

    def with_pages(self, pages: Sequence[Cache]) -> Pages:
        """The cache that is made of other pages."""
        return Pages(tuple(pages))

    @property
    def keys(self) -> tuple[tuple[Buffer, ...], ...]:
        """For each layer, its pages of keys."""
        return tuple(zip(*(page.keys for page in self.pages), strict=True))

    @property
    def values(self) -> tuple[tuple[Buffer, ...], ...]:
        """For each layer, its pages of values."""
        return tuple(zip(*(page.values for page in self.pages), strict=True))

    @property
    def deals(self) -> tuple[Deal, ...]:
        """How the slots of each page lie on devices."""
        return tuple(page.deal for page in self.pages)

    @property
    def each_seen(self) -> tuple[Array | None, ...]:
        """Which slots of each page are read."""
        return tuple(page.seen for page in self.pages)

    @property
    def length_B(self) -> Array:
        """int32, slots filled, all pages together."""
        return sum(page.length_B for page in self.pages)

    @property
    def capacity(self) -> int:
        """M, slots a row can hold."""
        return sum(page.capacity for page in self.pages)

    @property
    def values_on_host(self) -> bool:
        """Whether values lie in the host's memory."""
        return any(page.values_on_host for page in self.pages)

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
    zeros = lambda: tuple(empty(shape, dtype) for _ in range(layers))
    return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


def init_memory(config: ModelConfig, batch: int, capacity: int, values_on_host: bool = False) -> Cache:
    """Empty memory of a model: its memory layers, in its memory dtype, dealt to the devices of the mesh's memory axis.

    Args:
        values_on_host: whether values lie in the host's memory, half of what memory takes. Top-k fetches those that it
            retrieves, or has all pass through the device where queries are many; dense reading is refused.

    Raises:
        ValueError: as `init_cache`; a capacity that the devices do not divide; values on a host whose memory the
            devices do not reach, or on a TPU's in int8 or with other than multiples of 128 slots on a device.
    """
    _check_capacity(capacity)
    deal, K, dtype = dealt(capacity), _held_size(config), config.mem_dtype
    if values_on_host:
        host.check(capacity // deal.ways, dtype)
    each = lambda make: tuple(make((batch, config.n_kv_heads, K, capacity), dtype) for _ in config.mem_layers)
    values = each(host.zeros if values_on_host else empty)
    return Cache(each(empty), values, jnp.zeros((batch,), jnp.int32), deal, size=config.head_size)


def _held_size(config: ModelConfig) -> int:
    """Dimensions that a head has in memory, on the platform that programs are made for."""
    K = config.head_size
    return whole_tiles(K, config.mem_dtype) if sharding.platform() == "tpu" else K


def token_bytes(config: ModelConfig) -> int:
    """Bytes of memory that a token of a row takes, its keys and values in all memory layers, on the platform that
    programs are made for.
    """
    return len(config.mem_layers) * 2 * config.n_kv_heads * vector_bytes(_held_size(config), config.mem_dtype)


def init_pages(config: ModelConfig, batch: int, capacity: int, values_on_host: bool = False) -> Pages:
    """Empty memory of a model in pages, with room for `capacity` tokens a row, rounded up to whole windows, and on a
    mesh to whole windows for each device of its memory axis; every page has room for a window.

    Args:
        values_on_host: as for `init_memory`.

    Raises:
        ValueError: as `init_memory`.
    """
    none, W = init_memory(config, batch, 0), math.lcm(config.window, sharding.ways("memory"))
    capacity = -(-capacity // W) * W
    if not capacity or not config.mem_layers:
        return Pages((none,))
    _check_capacity(capacity)
    key_bytes = token_bytes(config) // (2 * len(config.mem_layers)) * batch * W
    sizes = [min(W * power_of_two(-(-FIRST_PAGE_BYTES // key_bytes)), capacity)]
    while sum(sizes) < capacity:
        sizes.append(min(sum(sizes), capacity - sum(sizes)))
    return Pages(tuple(init_memory(config, batch, size, values_on_host) for size in sizes))


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _write(buffer: Array, new: Array, start_B: Array, count_B: Array, deal: Deal, device: Array | int) -> Array:
    """A device's `buffer` [B, G, K, M] with the first `count` of `new` [B, G, K, T] from slot `start` of each row on,
    those that fall outside left out; all other slots as they were.
    """
    M, T = buffer.shape[3], new.shape[3]
    size = host.span(min(M, deal.most_columns(T)), buffer)
    first_B = host.start(deal.before(jnp.maximum(start_B, 0), device), size, buffer)

    def mixed(old_GKS: Array, new_GKT: Array, first: Array, start: Array, count: Array) -> Array:
        t = deal.slot(device, first + jnp.arange(size)) - start
        new = jnp.take(new_GKT, jnp.clip(t, 0, T - 1), axis=2)
        return jnp.where(((t >= 0) & (t < count))[None, None, :], new, old_GKS)

    old = host.cut(buffer, first_B, size, new.shape[2])
    return host.put(buffer, jax.vmap(mixed)(old, new, first_B, start_B, count_B), first_B)


def append(
    cache: Cache | Pages, keys: Sequence[Array], values: Sequence[Array], count_B: Array | None = None
) -> Cache | Pages:
    """The cache with more tokens behind those it holds.

    Args:
        cache: donate it in a jitted caller and it is written in place.
        keys, values: one [B, G, K, T] array a layer, T at most the capacity, or that of the smallest page.
        count_B: int32, how many of the T tokens, from the first, each row takes: 0..T, and inside a program, which
            cannot refuse others, the nearest of those. None: all.

    Returns:
        The new cache. A row holds at most its capacity: inside a program, which cannot know, tokens beyond are not
        kept, so callers make room first.

    Raises:
        ValueError: layers, shapes or counts that do not fit; outside a program, rows without room.
    """
    pages, layers = cache.pages, (len(cache.keys), len(cache.values))
    if (len(keys), len(values)) != layers:
        raise ValueError(
            f"cache has {layers[0]} layers; wanted as many keys and values, found {len(keys)}, {len(values)}"
        )
    if not keys:
        return cache
    check_deals(cache.deals)
    B, G, K = *pages[0].keys[0].shape[:2], pages[0].head_size
    T, room = keys[0].shape[3], min(page.capacity for page in pages)
    for new in (*keys, *values):
        if new.shape != (B, G, K, T):
            raise ValueError(
                f"new keys or values are {new.shape}; wanted {(B, G, K)}, as the cache has, and {T} tokens"
            )
    if T > room:
        raise ValueError(f"{T} tokens do not fit a cache of capacity {room}")
    length_B = cache.length_B
    count_B = jnp.full_like(length_B, T) if count_B is None else count_B
    if count_B.shape != (B,):
        raise ValueError(f"count_B is {count_B.shape}; wanted ({B},), the rows of the cache")
    check_room(cache, count_B, T)
    if not T:
        return cache
    count_B = jnp.clip(count_B, 0, T)
    out, first = [], 0
    for page in pages:
        start_B, end_B = length_B - first, jnp.clip(length_B + count_B - first, 0, page.capacity)
        write = functools.partial(_write_page, (tuple(keys), tuple(values)), start_B, count_B)
        if len(pages) > 1:
            page = jax.lax.cond(jnp.any(end_B > page.length_B), write, lambda page: page, page)
        else:
            page = write(page)
        out.append(dataclasses.replace(page, length_B=end_B))
        first += page.capacity
    return cache.with_pages(out)


def check_room(cache: Cache | Pages, count_B: Array, most: int) -> None:
    """Refuses counts below 0 or above `most`, and tokens that a row has no room for, where numbers are known: outside
    of programs.

    Raises:
        ValueError: such a row.
    """
    length_B = cache.length_B
    if isinstance(length_B, jax.core.Tracer) or isinstance(count_B, jax.core.Tracer):
        return
    length_B, count_B = np.asarray(length_B), np.asarray(count_B)
    if count_B.min() < 0 or count_B.max() > most:
        raise ValueError(f"rows take {count_B.tolist()} tokens; wanted 0..{most} each")
    row = int(np.argmax(length_B + count_B))
    if length_B[row] + count_B[row] > cache.capacity:
        raise ValueError(
            f"row {row} has {length_B[row]} tokens and takes {count_B[row]} more; wanted at most {cache.capacity} "
            "together, the capacity"
        )


def _write_page(news: tuple, start_B: Array, count_B: Array, page: Cache) -> Cache:
    """A page with each row's first `count_B` of new (keys, values) from slot `start_B` on; its length as it was."""

    def write(device: Array | int, news: tuple, start_B: Array, count_B: Array, buffers: tuple) -> tuple:
        each = lambda buffer, new: _write(buffer, new, start_B, count_B, page.deal, device)
        return jax.tree.map(each, buffers, news)

    is_buffer = lambda x: isinstance(x, Int8)
    news = jax.tree.map(lambda like, new: stored(new, like), (page.keys, page.values), news, is_leaf=is_buffer)
    keys, values = on_devices(write, page, news, start_B, count_B)
    return dataclasses.replace(page, keys=keys, values=values)


class Places(NamedTuple):
    """How arrays that go with a memory lie on the mesh of `jax.set_mesh`; a dimension that its devices do not divide is
    not split.

    Attributes:
        slots: of [B, G, K, M], whose M is dealt.
        seen: of [B, 1, 1, M], the same.
        heads: of arrays whose first dimensions are B and G, or B and H.
        rows: of [B].
        axes: mesh axes that M is dealt over.
    """

    slots: P
    seen: P
    heads: P
    rows: P
    axes: tuple[str, ...]


def places(batch: int, kv_heads: int) -> Places:
    """The places of arrays of so many rows and key/value heads."""
    rows, heads, slots = (sharding.axes(logical) for logical in ("batch", "kv_heads", "memory"))
    rows = rows if batch % sharding.ways("batch") == 0 else ()
    heads = heads if kv_heads % sharding.ways("kv_heads") == 0 else ()

    def spec(*split: tuple[str, ...]) -> P:
        """As programs name what they return, or they would be compiled once more for it: nothing at the end that is
        not split, no tuples of one.
        """
        while split and not split[-1]:
            split = split[:-1]
        return P(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in split))

    of_slots = spec(rows, heads, (), slots), spec(rows, (), (), slots)
    return Places(*of_slots, spec(rows, heads), spec(rows), slots)


def specs(tree: Any) -> Any:
    """How the arrays of caches, anywhere in a tree, lie on the mesh of `jax.set_mesh`: a tree like it, of
    PartitionSpecs. Other arrays are whole on every device.
    """

    def one(x: Any) -> Any:
        if not isinstance(x, Cache):
            return P()
        where = places(x.length_B.shape[0], x.keys[0].shape[1] if x.keys else 1)
        each = lambda buffers: jax.tree.map(lambda _: where.slots if x.deal.ways > 1 else where.heads, buffers)
        seen = None if x.seen is None else where.seen if x.deal.ways > 1 else where.rows
        return dataclasses.replace(x, keys=each(x.keys), values=each(x.values), length_B=where.rows, seen=seen)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Cache))


def place(tree: Any) -> Any:
    """Caches and other arrays, put where `specs` says on the mesh of `jax.set_mesh`, those on the host staying there;
    the tree is used up. Without a mesh, the tree itself.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    where = jax.tree.map(lambda x, spec: host.of_kind(NamedSharding(mesh, spec), x), tree, specs(tree))
    return jax.device_put(tree, where, donate=True)


def constrain(tree: Any) -> Any:
    """The same inside a program: what comes out of it lies as what went in. Without a mesh, the tree itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, specs(tree))


def on_devices(f: Callable[..., tuple], cache: Cache, *arrays: Any, whole: bool = False) -> tuple:
    """`f(device, *arrays, (keys, values))` on every device's part of a cache's buffers.

    Args:
        arrays: those of one dimension are [B], others [B, G, ...].
        whole: whether what comes of all devices is added up; if not, it lies as the buffers do.

    Raises:
        ValueError: a memory that was dealt to other devices than the mesh has.
    """
    buffers = cache.keys, cache.values
    if cache.deal.ways == 1:
        return f(0, *arrays, buffers)
    check_deals(cache.deals)
    where = places(*cache.keys[0].shape[:2])
    given = jax.tree.map(lambda x: where.rows if x.ndim == 1 else where.heads, arrays)
    slots = jax.tree.map(lambda x: where.slots, buffers)

    def body(*args: Any) -> Any:
        out = f(jax.lax.axis_index(where.axes), *args)
        return jax.tree.map(lambda x: jax.lax.psum(x, where.axes).astype(x.dtype), out) if whole else out

    out = jax.tree.map(lambda _: where.heads, buffers) if whole else slots
    return jax.shard_map(body, in_specs=(*given, slots), out_specs=out, check_vma=False)(*arrays, buffers)


def compact(xs: Sequence[Array], valid_BT: Array) -> tuple[Array, ...]:
    """[B, G, K, T] arrays with each row's valid tokens moved to the front, in order."""
    order_BT = jnp.argsort(~valid_BT, axis=1, stable=True)
    return tuple(jnp.take_along_axis(x, order_BT[:, None, None, :], axis=3) for x in xs)
