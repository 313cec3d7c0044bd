"""Values in the host's memory: top-k reads k of them for a query, so a device need not hold all. And parts of arrays,
cut out and put in wherever they lie.

Programs do not compute with arrays that lie there (memory kind "pinned_host"): they copy parts of them to the device
and back. A TPU copies whole tiles, so that all copies begin and end at multiples of `LANES` columns. Scales of int8 are
few bytes, and stay on the device.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import compute_on as _compute_on
from jax.experimental.layout import Layout, with_layout_constraint

from fot_jax import sharding
from fot_jax.memory.stored import LANES, Buffer, Int8, empty, unscaled

Array = jax.Array

KIND = "pinned_host"
BLOCK_BYTES = 2**26  # of values that are on the device at a time, and of those that are fetched at once

# JAX 0.12 gave the one the name, and the place, of the other.
_on_host = functools.partial(
    getattr(_compute_on, "compute_on2", _compute_on.compute_on),
    compute_type="device_host",
    out_memory_spaces=jax.memory.Space.Device,
)


def holds(x: Buffer) -> bool:
    """Whether a buffer lies in the host's memory."""
    return any(jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in jax.tree.leaves(x))


def of_kind(where: jax.sharding.Sharding, x: Buffer) -> jax.sharding.Sharding:
    """A sharding, in the memory that an array lies in."""
    return where.with_memory_kind(KIND) if holds(x) else where


def zeros(shape: tuple[int, ...], dtype: str) -> Buffer:
    """A buffer [B, G, K, M] of zeros that never was on the device; not to be made inside a program.

    Raises:
        ValueError: devices that cannot reach such memory.
    """
    like = jax.eval_shape(lambda: empty(shape, dtype))
    nothing = lambda like: there(np.zeros(like.shape, like.dtype))
    if isinstance(like, Int8):
        return Int8(nothing(like.numbers), jnp.zeros(like.scale.shape, like.scale.dtype))
    return nothing(like)


def there(x: np.ndarray) -> Array:
    """An array in the host's memory, where the first device of the mesh of `jax.set_mesh` reaches it; not to be made
    inside a program.

    Raises:
        ValueError: a device that cannot reach such memory.
    """
    mesh = jax.sharding.get_mesh()
    device = jax.devices()[0] if mesh.empty else mesh.devices.flat[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if KIND not in kinds:
        raise ValueError(f"values on the host need memory of kind {KIND!r}; {device.platform} devices have {kinds}")
    return jax.device_put(x, jax.sharding.SingleDeviceSharding(device, memory_kind=KIND))


def check(columns: int, dtype: str) -> None:
    """Refuses memory of which a TPU could not copy parts as they lie.

    Args:
        columns: of a device.

    Raises:
        ValueError: columns that are not whole tiles; int8, of which parts get other tiles than the whole, so that all
            of it would be turned round on the device.
    """
    if sharding.platform() != "tpu":
        return
    if columns % LANES:
        raise ValueError(
            f"memory has {columns} slots on a device; with values on a TPU's host wanted a multiple of {LANES}"
        )
    if dtype == "int8":
        raise ValueError("memory is int8; with values on a TPU's host wanted one of float32, bfloat16, float16")


def to_host(x: Array) -> Array:
    """An array of a program, copied to the host's memory."""
    return jax.device_put(plain(x), jax.memory.Space.Host)


def to_device(x: Array) -> Array:
    """The other way."""
    return plain(jax.device_put(x, jax.memory.Space.Device))


def plain(x: Array) -> Array:
    """A part of an array, in the layout of the whole: a TPU's compiler that chose another for the part would choose it
    for the whole too, and turn all of that round.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def step(x: Array) -> int:
    """What copies of columns of an array begin at multiples of: on the host they are of whole tiles."""
    return LANES if holds(x) and x.shape[3] % LANES == 0 else 1


def span(size: int, x_BGKM: Array) -> int:
    """How many columns are copied so that `size` of them, from any on, are among them."""
    whole = step(x_BGKM)
    return min(x_BGKM.shape[3], -(-size // whole) * whole + (whole if whole > 1 else 0))


def start(first: Array, size: int, x_BGKM: Array) -> Array:
    """Where a copy of `size` columns (a `span`) begins, so that the column `first` is among them."""
    whole = step(x_BGKM)
    return jnp.clip(first, 0, x_BGKM.shape[3] - size) // whole * whole


def cut(x_BGKM: Array, first_B: Array, size: int, K: int) -> Array:
    """[B, G, K, size] on the device, of the array's K the first: columns of each row from its own `first` on."""
    G, whole = x_BGKM.shape[1:3]
    here = to_device if holds(x_BGKM) else plain

    def one(row: tuple[Array, Array]) -> Array:
        return here(jax.lax.dynamic_slice(x_BGKM, (row[0], 0, 0, row[1]), (1, G, whole, size)))[0, :, :K]

    return jax.lax.map(one, (jnp.arange(len(first_B)), first_B))


def put(x_BGKM: Array, new_BGKS: Array, first_B: Array) -> Array:
    """The array with columns from the device in the place of those from each row's `first` on."""
    there = to_host if holds(x_BGKM) else plain
    new_BGKS = jnp.pad(new_BGKS, [(0, 0), (0, 0), (0, x_BGKM.shape[2] - new_BGKS.shape[2]), (0, 0)])

    def one(b: Array, x_BGKM: Array) -> Array:
        new = there(jax.lax.dynamic_slice_in_dim(new_BGKS, b, 1))
        return jax.lax.dynamic_update_slice(x_BGKM, new, (b, 0, 0, first_B[b]))

    return jax.lax.fori_loop(0, len(first_B), one, x_BGKM)


def moved_down(x_BGKM: Array, columns_B: Array) -> Array:
    """The array with each row's columns moved down by so many; in the places left, any numbers."""
    B, _, K, M = x_BGKM.shape
    size = _block(x_BGKM)
    rest = M % size  # a block of its own: one that shares columns with another would read what that has written

    def one(size: int, first: Array | int, x_BGKM: Array) -> Array:  # made of what lies in its place or after it
        wider, from_B = span(size, x_BGKM), first + columns_B
        first_B = start(from_B, wider, x_BGKM)
        roll = jax.vmap(functools.partial(jnp.roll, axis=2))
        new_BGKS = roll(cut(x_BGKM, first_B, wider, K), first_B - from_B)[..., :size]
        return put(x_BGKM, new_BGKS, jnp.full((B,), first))

    x_BGKM = jax.lax.fori_loop(0, M // size, lambda i, x_BGKM: one(size, i * size, x_BGKM), x_BGKM)
    return one(rest, M - rest, x_BGKM) if rest else x_BGKM


def _block(x_BGKM: Array) -> int:
    """Columns that are copied at a time: all, or a power of two of them."""
    B, G, K, M = x_BGKM.shape
    most = max(BLOCK_BYTES // (B * G * K * x_BGKM.dtype.itemsize), LANES)
    return M if M <= most else 1 << most.bit_length() - 1


def weighted_sum(
    values: Buffer, column_BGQN: Array, weight_BGQN: Array, filled_B: Array, dtype: jnp.dtype, budget: int
) -> Array:
    """sum over n of weight x the value in a column: float32 [B, G, Q, K].

    A few values are fetched, by the host itself or, for a TPU, one by one in the tiles that they lie in: to compute
    with an array there, a TPU's host would turn all of it into another layout first. For many queries all values that
    are filled pass through the device, in blocks.

    Args:
        values: [B, G, K, M] on the host, in any format of memory.
        column_BGQN: int32; below 0 for none.
        weight_BGQN: float32.
        filled_B: int32, columns filled.
        dtype: what is multiplied; sums are float32.
        budget: bytes of the values of queries, picked out of a block, that are held at a time.
    """
    v_BGKM, weight_BGQN = unscaled(values, column_BGQN, weight_BGQN)
    B, G, K, M = v_BGKM.shape
    Q, N = column_BGQN.shape[2:]
    tiled = sharding.platform() == "tpu"
    if 4 * B * G * Q * N * K > BLOCK_BYTES or Q * N * (step(v_BGKM) if tiled else 1) >= M:
        return _from_blocks(v_BGKM, column_BGQN, weight_BGQN, filled_B, dtype, budget)
    if tiled:
        return _by_tiles(v_BGKM, column_BGQN, weight_BGQN)
    return _gathered(v_BGKM, column_BGQN, weight_BGQN, dtype)


def _gathered(v_BGKM: Array, column_BGQN: Array, weight_BGQN: Array, dtype: jnp.dtype) -> Array:
    """Of columns that the host picks out."""
    B, G, Q, N = column_BGQN.shape
    K = v_BGKM.shape[2]
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(3,),
        collapsed_slice_dims=(3,),
        start_index_map=(3,),
        operand_batching_dims=(0, 1),
        start_indices_batching_dims=(0, 1),
    )
    # In bounds: to check that, the host would need constants, which are the device's.
    sizes = dict(slice_sizes=(1, 1, K, 1), mode="promise_in_bounds")
    index = to_host(jnp.maximum(column_BGQN, 0).reshape(B, G, Q * N, 1))
    v_BGPK = _on_host(lambda v_BGKM, index: jax.lax.gather(v_BGKM, index, numbers, **sizes))(v_BGKM, index)
    weights = jnp.where(column_BGQN >= 0, weight_BGQN, 0.0).astype(dtype)
    v_BGQNK = v_BGPK.reshape(B, G, Q, N, K).astype(dtype)
    return jnp.einsum("bgqn,bgqnk->bgqk", weights, v_BGQNK, preferred_element_type=jnp.float32)


def _by_tiles(v_BGKM: Array, column_BGQN: Array, weight_BGQN: Array) -> Array:
    """Of columns whose tiles are copied to the device one after another, as many as there are."""
    B, G, K, M = v_BGKM.shape
    Q, N = column_BGQN.shape[2:]
    column, weight, size = column_BGQN.reshape(-1), weight_BGQN.reshape(-1), step(v_BGKM)
    order = jnp.argsort(column < 0)  # those that are here come first

    def add(i: Array, o: Array) -> Array:
        row, first = order[i] // N, column[order[i]] // size * size
        place = row // (G * Q), row // Q % G, 0, first
        tile_KS = to_device(jax.lax.dynamic_slice(v_BGKM, place, (1, 1, K, size)))[0, 0].astype(jnp.float32)
        mine = first + jnp.arange(size) == column[order[i]]
        return o.at[row].add(weight[order[i]] * jnp.sum(jnp.where(mine, tile_KS, 0.0), axis=1))

    o = jax.lax.fori_loop(0, jnp.sum(column >= 0), add, jnp.zeros((B * G * Q, K)))
    return o.reshape(B, G, Q, K)


def _from_blocks(
    v_BGKM: Array,
    column_BGQN: Array,
    weight_BGQN: Array,
    filled_B: Array,
    dtype: jnp.dtype,
    budget: int,
) -> Array:
    """Of columns in blocks of values, each of which is copied to the device once for all queries."""
    B, G, K, M = v_BGKM.shape
    Q, N = column_BGQN.shape[2:]
    size, at_once = _block(v_BGKM), max(1, budget // (4 * B * G * N * K))
    queries = tuple(jnp.moveaxis(x, 2, 0) for x in (column_BGQN, weight_BGQN))

    def add(i: Array, o_QBGK: Array) -> Array:
        first = jnp.minimum(i * size, M - size)  # the last ends with the array; what it shares does not count twice
        v_BGSK = jnp.swapaxes(to_device(jax.lax.dynamic_slice_in_dim(v_BGKM, first, size, axis=3)), 2, 3)

        def of_query(query: tuple[Array, Array]) -> Array:
            column_BGN, weight_BGN = query
            here = (column_BGN >= i * size) & (column_BGN < first + size)
            index = jnp.where(here, column_BGN - first, 0)
            v_BGNK = jnp.take_along_axis(v_BGSK, index[..., None], axis=2).astype(dtype)
            weights = jnp.where(here, weight_BGN, 0.0).astype(dtype)
            return jnp.einsum("bgn,bgnk->bgk", weights, v_BGNK, preferred_element_type=jnp.float32)

        return o_QBGK + jax.lax.map(of_query, queries, batch_size=min(at_once, Q))

    o_QBGK = jax.lax.fori_loop(0, -(-jnp.max(filled_B) // size), add, jnp.zeros((Q, B, G, K)))
    return jnp.moveaxis(o_QBGK, 0, 2)
