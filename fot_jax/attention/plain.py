"""Attention by XLA's own operations, on any platform, for any shape: scores of one source exist at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.attention.partial import Kernel, Keys, Partial, Source, attend, grouped, made, product

Array = jax.Array


def _once_known(x: Array, y: Array) -> Array:
    """`x`, for use after `y`, of the same shape: recomputation that needs only `x` would otherwise be done as soon as
    `x` is there, and held until it is wanted. A CPU compiler drops barriers before it orders operations.
    """
    return jax.lax.platform_dependent(
        x, y, cpu=lambda x, y: x + 0 * y, default=lambda x, y: jax.lax.optimization_barrier((x, y))[0]
    )


def _turned(k_BGSK: Array, dv_BGSK: Array) -> Array:
    """Keys as [B, G, K, S]. On a CPU as a copy, which fast products want, made no sooner than `dv` is there."""
    return jax.lax.platform_dependent(
        k_BGSK,
        dv_BGSK.astype(k_BGSK.dtype),
        cpu=lambda k, dv: jax.lax.optimization_barrier(jnp.swapaxes(k + 0 * dv, 2, 3)),
        default=lambda k, dv: jnp.swapaxes(k, 2, 3),
    )


def _split_scale(scale: float) -> tuple[float, float]:
    """(power of two, rest) with scale as their product, for queries and for scores. Queries times the first are not
    rounded, and scores, which are larger, need no multiplication where heads have 4, 16, 64 or 256 dimensions.
    """
    mantissa, exponent = math.frexp(scale)
    return 2.0 ** (exponent - 1), 2 * mantissa


class _Part(NamedTuple):
    """Queries, as a slice of time, and the keys they can see."""

    time: slice
    source: Source

    def of(self, x: Array) -> Array:
        """The part's queries, or what belongs to them, of an array [B, H, T, ...]."""
        return x[:, :, self.time]


def _parts(keys: Keys, length: int, causal: bool) -> list[_Part]:
    """Of a causal triangle, the first quarter of the queries needs only the first quarter of the keys, and so on: 5/8
    of the square are computed. Short windows are halved, or left whole.
    """
    visible_BTS = _visible(keys, length, causal)
    n = 4 if length >= 128 else 2 if length >= 32 else 1  # smaller pieces cost more operations than they save work
    if not causal or n == 1:
        return [_Part(slice(0, length), Source(keys.k_BGSK, keys.v_BGSK, visible_BTS))]
    parts = []
    for time in (slice(length * i // n, length * (i + 1) // n) for i in range(n)):
        k, v = (x[:, :, : time.stop] for x in keys[:2])
        parts.append(_Part(time, Source(k, v, visible_BTS[:, time, : time.stop])))
    return parts


def _visible(keys: Keys, length: int, causal: bool) -> Array | None:
    """bool [B, T, S] or with axes of 1, which keys a query sees; None: all, or all or nothing."""
    before = jnp.asarray(np.tri(length, dtype=bool)[None]) if causal else None
    if keys.kv_ids_BS is None or keys.seen_by_row is not None:
        return before
    same = keys.q_ids_BT[:, :, None] == keys.kv_ids_BS[:, None, :]
    return same if before is None else before & same


def _read(q_BHTK: Array, keys: Keys, causal: bool, scale: float) -> Partial:
    power, rest = _split_scale(scale)
    scaled_BHTK = q_BHTK * power
    partials = [
        attend(part.of(scaled_BHTK), *part.source, scale=rest) for part in _parts(keys, q_BHTK.shape[2], causal)
    ]
    o, lse = (jnp.concatenate(x, axis=2) for x in zip(*partials, strict=True))
    return Partial(o, keys.hide(lse, -jnp.inf))


def _gradients(
    q_BHTK: Array, keys: Keys, causal: bool, scale: float, o_BHTK: Array, lse_BHT: Array, do_BHTK: Array
) -> tuple[Array, Array, Array]:
    power, rest = _split_scale(scale)
    scaled_BHTK = _once_known(q_BHTK, do_BHTK) * power
    # With o = sum p v, dp = do v and ds = p (dp - sum p dp) = p (dp - do o).
    delta_BHT = jnp.sum(do_BHTK.astype(jnp.float32) * o_BHTK.astype(jnp.float32), axis=-1)
    lse_BHT = keys.hide(lse_BHT, jnp.inf)  # exp(s - inf) = 0
    dqs, dk, dv = [], 0.0, 0.0
    for part in _parts(keys, q_BHTK.shape[2], causal):
        arrays = map(part.of, (scaled_BHTK, lse_BHT, delta_BHT, do_BHTK))
        dq, *of_keys = _part_gradients(part.source, *arrays, rest)
        later = keys.k_BGSK.shape[2] - part.source.k_BGSK.shape[2]
        wide = [jnp.pad(x, ((0, 0), (0, 0), (0, later), (0, 0))) if later else x for x in of_keys]
        dqs, dk, dv = [*dqs, dq], dk + wide[0], dv + wide[1]
    return jnp.concatenate(dqs, axis=2) * power, dk, dv


def _part_gradients(
    source: Source, q_BHTK: Array, lse_BHT: Array, delta_BHT: Array, do_BHTK: Array, scale: float
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv), float32, from the merged log-sum-exp and delta = do . o.

    Scores are [S, Q] here: every product but that for dq then reads its operands as they lie; that one takes keys
    turned, which are smaller than scores.
    """
    k, v, visible_BTS = source
    G, dtype = k.shape[1], q_BHTK.dtype
    q, do = grouped(q_BHTK, G), grouped(do_BHTK, G)
    lse, delta = (x.reshape(*q.shape[:2], 1, q.shape[2]) for x in (lse_BHT, delta_BHT))
    s_BGSQ = product("bgsk,bgqk->bgsq", k, q) * scale
    if visible_BTS is not None:
        repeats = q.shape[2] // visible_BTS.shape[1] if visible_BTS.shape[1] > 1 else 1
        visible_BSQ = jnp.tile(jnp.swapaxes(visible_BTS, 1, 2), (1, 1, repeats))
        s_BGSQ = jnp.where(visible_BSQ[:, None], s_BGSQ, -jnp.inf)
    p = made(jnp.exp(s_BGSQ - lse))
    dv = product("bgsq,bgqk->bgsk", p.astype(dtype), do)
    ds = made((p * (product("bgsk,bgqk->bgsq", v, do) - delta) * scale).astype(dtype))
    dk = product("bgsq,bgqk->bgsk", ds, q)
    dq = jnp.swapaxes(made(product("bgks,bgsq->bgkq", _turned(k, dv), ds)), 2, 3)
    return dq.reshape(q_BHTK.shape), dk, dv


def kernel(platform: str, length: int, head_size: int, dtype: np.dtype) -> Kernel:
    """This kernel, which computes anything anywhere."""
    return Kernel("xla", _read, _gradients)
