"""What a TPU's own compiler does badly, as Pallas kernels: the selection of top-k, and fetching values.

The scores of a window of queries are many times the bytes of keys, so that to write and read them costs more than the
products they come of; and to fetch columns of an array the compiler turns all of it round first. Here scores never
leave the chip, and a value costs the tile that it lies in.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fot_jax import sharding
from fot_jax.memory.cache import power_of_two
from fot_jax.memory.stored import LANES, Buffer, Int8, unscaled

Array = jax.Array

KEPT = 4  # best slots that are kept of every bin
MOST_BINS = 4096  # that are held for 32 queries, beside as many keys
TILE_SCORES = 2**17  # of a block of queries and a slot of every bin, in the chip's own memory
SCALARS = 2**15  # columns, and weights, that are given to a chip at a time
FEW = 16  # queries of a key/value head whose values are fetched; each value in a tile of 128
TURNED = 1024  # columns that are turned at a time
FETCHED = 8  # tiles of values under way while as many are used


def _interpreted() -> bool:
    """Whether kernels are only acted out, slowly: wherever there is no TPU to run them."""
    return sharding.platform() != "tpu"


def wanted(k: int, columns: int) -> bool:
    """Whether `best` is the way to select k of so many columns: on a TPU, unless there are so few that the bins would
    hold most of them, or so many bins that they have no room on the chip.
    """
    return sharding.platform() == "tpu" and bins(k) <= MOST_BINS and columns > 2 * KEPT * bins(k)


def query_bytes(k: int) -> int:
    """Bytes that `best` holds for a query of a head: what is kept of every bin, its floor, and both in order."""
    return 64 * bins(k)


def fetches(queries: int, columns: int) -> bool:
    """Whether `weighted_sum` is the way to average values: on a TPU, for so few queries that they fetch less than all
    values, of so many columns that tiles are whole.
    """
    return sharding.platform() == "tpu" and queries <= FEW and columns % LANES == 0


def bins(k: int) -> int:
    """Bins that k slots are selected with: eight times as many, or more than `KEPT` of them would often meet in one."""
    return max(LANES, power_of_two(8 * k))


def best(q_BGQK: Array, keys: Buffer, filled_B: Array, seen: Array | None, k: int) -> tuple[Array, Array]:
    """The k columns of greatest inner product, exactly, in one pass over keys but for rare chance.

    Column c belongs to bin c modulo `bins(k)`. A pass keeps the `KEPT` best of every bin, and the k best of those are
    the k best of all unless some bin had more of them. It had not if the last that it kept comes after the k-th best;
    otherwise one more pass finds the next best of every bin. Of k slots in random places one query in 500,000 / k needs
    a second pass; none needs more than k / KEPT of them.

    Args:
        q_BGQK: queries.
        keys: [B, G, K, M], in any format of memory.
        filled_B: int32, columns filled.
        seen: which columns count, bool [B, 1, 1, M]; None for all.
        k: at most M.

    Returns:
        Scores float32 [B, G, Q, k], greatest first, equal ones by column, -inf where fewer count; columns int32.
    """
    n = bins(k)
    B, G, Q, _ = q_BGQK.shape
    run = functools.partial(_of_bins, q_BGQK, keys, filled_B, seen, n=n)

    def more(state: tuple) -> Array:
        found, floor = state
        return jnp.any(_before(floor, tuple(x[..., -1:] for x in found)))

    def one_pass(state: tuple) -> tuple:
        found, floor = state
        kept = run(floor)
        # All of them are sorted: to gather some first would cost a TPU more.
        new = in_order(*(jnp.moveaxis(x, 2, 3).reshape(B, G, Q, KEPT * n) for x in kept), k)
        both = (jnp.concatenate(pair, axis=-1) for pair in zip(found, new, strict=True))
        return in_order(*both, k), tuple(x[:, :, -1] for x in kept)

    nothing = jnp.full((B, G, Q, k), -jnp.inf), jnp.full((B, G, Q, k), -1, jnp.int32)
    everything = jnp.full((B, G, Q, n), jnp.inf), jnp.full((B, G, Q, n), -1, jnp.int32)
    return jax.lax.while_loop(more, one_pass, one_pass((nothing, everything)))[0]


def _before(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Whether (score, column) a is selected before b: greater, or equal and of a lower column."""
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def in_order(s: Array, number: Array, k: int) -> tuple[Array, Array]:
    """The k greatest scores of the last axis and the numbers that go with them; of equal ones the lowest first."""
    falling, number = jax.lax.sort((-s, number), dimension=s.ndim - 1, num_keys=2)
    return -falling[..., :k], number[..., :k]


def _of_bins(
    q_BGQK: Array,
    keys: Buffer,
    filled_B: Array,
    seen: Array | None,
    floor: tuple[Array, Array],
    *,
    n: int,
) -> tuple[Array, Array]:
    """Scores and columns [B, G, KEPT, Q, n]: the best of every bin that come after its `floor` [B, G, Q, n]."""
    numbers, scale = (keys.numbers, keys.scale) if isinstance(keys, Int8) else (keys, None)
    B, G, K, M = numbers.shape
    Q = q_BGQK.shape[2]
    size = min(Q, max(8, TILE_SCORES // n))

    def slots(b, g, i, j, filled):
        del i
        return b, g, 0, jnp.minimum(j, jnp.maximum(filled[b] - 1, 0) // n)  # what is not filled is not fetched

    of_queries = pl.BlockSpec((None, None, size, n), lambda b, g, i, j, _: (b, g, i, 0))
    given = [
        (q_BGQK, pl.BlockSpec((None, None, size, K), lambda b, g, i, j, _: (b, g, i, 0))),
        (numbers, pl.BlockSpec((None, None, K, n), slots)),
        (scale, pl.BlockSpec((None, None, 1, n), slots)),
        (
            None if seen is None else seen.astype(jnp.int32),
            pl.BlockSpec((None, None, 1, n), lambda b, g, i, j, filled: (b, 0, 0, slots(b, g, i, j, filled)[3])),
        ),
        (floor[0], of_queries),
        (floor[1], of_queries),
    ]
    there = tuple(x is not None for x, _ in given)
    given = [pair for pair in given if pair[0] is not None]
    kept = pl.BlockSpec((None, None, KEPT, size, n), lambda b, g, i, j, _: (b, g, 0, i, 0))
    return pl.pallas_call(
        functools.partial(_of_bins_kernel, there),
        out_shape=[jax.ShapeDtypeStruct((B, G, KEPT, Q, n), dtype) for dtype in (jnp.float32, jnp.int32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, pl.cdiv(Q, size), pl.cdiv(M, n)),
            in_specs=[spec for _, spec in given],
            out_specs=[kept, kept],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=_interpreted(),
    )(filled_B, *(x for x, _ in given))


def _of_bins_kernel(there: tuple[bool, ...], filled_ref, *refs):
    *given, s_ref, column_ref = refs
    given = iter(given)
    q_ref, numbers_ref, scale_ref, seen_ref, *floor = (next(given) if here else None for here in there)
    filled, j = filled_ref[pl.program_id(0)], pl.program_id(3)
    n = s_ref.shape[-1]

    @pl.when(j == 0)
    def _():
        s_ref[...] = jnp.full(s_ref.shape, -jnp.inf)
        column_ref[...] = jnp.full(column_ref.shape, -1, jnp.int32)

    @pl.when(j * n < filled)
    def _():
        s = _exact_product(q_ref[...], numbers_ref[...])
        if scale_ref is not None:
            s *= scale_ref[...].astype(jnp.float32)
        column = j * n + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        counts = (column < filled) & _before(tuple(x[...] for x in floor), (s, column))
        if seen_ref is not None:
            counts &= seen_ref[...] != 0
        s = jnp.where(counts, jnp.where(s == 0.0, 0.0, s), -jnp.inf)
        new, new_column = s, column
        for i in range(KEPT):  # after its equals, which are earlier, and all that it is better than one place down
            old, old_column = s_ref[i], column_ref[i]
            better = s > old
            s_ref[i], column_ref[i] = jnp.where(better, new, old), jnp.where(better, new_column, old_column)
            new, new_column = jnp.where(better, old, new), jnp.where(better, old_column, new_column)


def _exact_product(q_QK: Array, k_KS: Array) -> Array:
    """[Q, S] of numbers as they are: those that bfloat16 holds, int8 among them, in one pass of the matrix unit,
    others in as many as float32 takes.
    """
    dtype = jnp.bfloat16 if {q_QK.dtype, k_KS.dtype} <= {jnp.dtype("bfloat16"), jnp.dtype("int8")} else jnp.float32
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        q_QK.astype(dtype),
        k_KS.astype(dtype),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def weighted_sum(values: Buffer, column_BGQN: Array, weight_BGQN: Array) -> Array:
    """sum over n of weight x the value in a column: float32 [B, G, Q, K], for a few queries.

    Args:
        values: [B, G, K, M], M a multiple of 128, in any format of memory.
        column_BGQN: int32; below 0 for none.
        weight_BGQN: float32.
    """
    v_BGKM, weight_BGQN = unscaled(values, column_BGQN, weight_BGQN)
    B, G, K, _ = v_BGKM.shape
    Q, N = column_BGQN.shape[2:]
    n = B * G * Q
    wide = N + -N % FETCHED
    most = min(n, max(1, SCALARS // wide))  # queries at a time

    def some(block: tuple[Array, Array, Array]) -> Array:
        first, column_QN, weight_QN = block
        tiles_QKL = pl.pallas_call(
            functools.partial(_weighted_sum_kernel, wide, Q),
            out_shape=jax.ShapeDtypeStruct((most, K, LANES), jnp.float32),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(most,),
                in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
                out_specs=pl.BlockSpec((None, K, LANES), lambda i, *_: (i, 0, 0)),
                scratch_shapes=[
                    pltpu.VMEM((2, FETCHED, K, LANES), v_BGKM.dtype),
                    pltpu.SemaphoreType.DMA((2, FETCHED)),
                ],
            ),
            interpret=_interpreted(),
        )(first, column_QN.reshape(-1), weight_QN.reshape(-1), v_BGKM)
        return jnp.sum(tiles_QKL, axis=-1)

    def in_blocks(x_BGQN: Array, fill: float) -> Array:
        pad = (0, -n % most), (0, wide - N)
        return jnp.pad(x_BGQN.reshape(n, N), pad, constant_values=fill).reshape(-1, most, wide)

    first = jnp.arange(0, n, most, dtype=jnp.int32)[:, None]
    sums = jax.lax.map(some, (first, in_blocks(column_BGQN, -1), in_blocks(weight_BGQN, 0.0)))
    return sums.reshape(-1, K)[:n].reshape(B, G, Q, K)


def _weighted_sum_kernel(N, Q, first_ref, column_ref, weight_ref, v_ref, out_ref, tiles, arrived):
    query = first_ref[0] + pl.program_id(0)
    b, g = query // (Q * v_ref.shape[1]), query // Q % v_ref.shape[1]
    first = pl.program_id(0) * N  # of this query's columns

    def copy(n):
        """Of the tile that the query's n-th column lies in."""
        start = pl.multiple_of(column_ref[first + n] // LANES * LANES, LANES)
        place = n // FETCHED % 2, n % FETCHED
        return pltpu.make_async_copy(v_ref.at[b, g, :, pl.ds(start, LANES)], tiles.at[place], arrived.at[place])

    def each_of(group, do):
        """`do` for those of a group's columns that are there."""
        for t in range(FETCHED):
            n = group * FETCHED + t
            pl.when(column_ref[first + n] >= 0)(functools.partial(do, n))

    def fetch(group):
        each_of(group, lambda n: copy(n).start())

    def add(n):
        copy(n).wait()
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        tile = tiles[n // FETCHED % 2, n % FETCHED].astype(jnp.float32)
        out_ref[...] += jnp.where(lane == column_ref[first + n] % LANES, tile * weight_ref[first + n], 0.0)

    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
    fetch(0)

    @pl.loop(0, N // FETCHED)
    def _(group):
        pl.when(group + 1 < N // FETCHED)(lambda: fetch(group + 1))
        each_of(group, add)


def turns(x_KM: Array) -> bool:
    """Whether `turned` is the way to turn an array round: on a TPU, where it can."""
    return sharding.platform() == "tpu" and x_KM.shape[1] % TURNED == 0


def turned(x_KM: Array) -> Array:
    """[M, K], M a multiple of `TURNED`; of int8 in bfloat16, which has the same numbers. A TPU's compiler would turn
    what this was cut out of, all heads of it.
    """
    K, M = x_KM.shape
    dtype = jnp.bfloat16 if x_KM.dtype == jnp.int8 else x_KM.dtype

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...].astype(dtype).T

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((M, K), dtype),
        grid=(M // TURNED,),
        in_specs=[pl.BlockSpec((K, TURNED), lambda i: (0, i))],
        out_specs=pl.BlockSpec((TURNED, K), lambda i: (i, 0)),
        interpret=_interpreted(),
    )(x_KM)
