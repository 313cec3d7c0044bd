"""Attention by XLA's own operations, on any platform, for any shape: scores of one source exist at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.attention.partial import (
    Kernel,
    Keys,
    Pair,
    Partial,
    Source,
    attend,
    grouped,
    made,
    merge,
    product,
    sources,
)

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
    """Queries, as slices of rows and time, and the keys they can see."""

    rows: slice
    time: slice
    source: Source

    def of(self, x: Array) -> Array:
        """The part's queries, or what belongs to them, of an array [B, H, T, ...]."""
        return x[self.rows, :, self.time]


def _parts(keys: Keys, q_BHTK: Array, causal: bool) -> list[_Part]:
    """A source for the rows that read it; of a causal triangle, the first quarter of the queries needs only the first
    quarter of the keys, and so on: 5/8 of the square are computed. Short windows are halved, or left whole.
    """
    B, _, T, _ = q_BHTK.shape
    rows, visible_BTS = slice(B - keys.k_BGSK.shape[0], B), _visible(keys, T, causal)
    n = 4 if T >= 128 else 2 if T >= 32 else 1  # smaller pieces cost more operations than they save work
    if not causal or n == 1:
        return [_Part(rows, slice(0, T), Source(keys.k_BGSK, keys.v_BGSK, visible_BTS))]
    parts = []
    for time in (slice(T * i // n, T * (i + 1) // n) for i in range(n)):
        k, v = (x[:, :, : time.stop] for x in keys[:2])
        parts.append(_Part(rows, time, Source(k, v, visible_BTS[:, time, : time.stop])))
    return parts


def _visible(keys: Keys, length: int, causal: bool) -> Array | None:
    """bool [B, T, S] or with axes of 1, which keys a query sees; None: all."""
    before = jnp.asarray(np.tri(length, dtype=bool)[None]) if causal else None
    if keys.kv_ids_BS is None:
        return before
    same = keys.q_ids_BT[:, :, None] == keys.kv_ids_BS[:, None, :]
    return same if before is None else before & same


def _by_row(source: Source) -> bool:
    """Whether a row sees all or nothing of a source; then scores need no mask, only sums do."""
    return source.visible_BTS is not None and source.visible_BTS.shape[1:] == (1, 1)


def _of_last_rows(x: Array, rows: int, others: float) -> Array:
    """`x`, of the last of `rows` rows, with `others` in those before."""
    return jnp.pad(x, [(rows - x.shape[0], 0)] + [(0, 0)] * (x.ndim - 1), constant_values=others)


def _forward(q_BHTK: Array, own: Keys | None, others: Sequence[Keys], scale: float) -> Partial:
    B = q_BHTK.shape[0]
    power, rest = _split_scale(scale)
    scaled_BHTK, partials = q_BHTK * power, []
    for keys, causal in sources(own, others):
        pieces = []
        for part in _parts(keys, scaled_BHTK, causal):
            k, v, visible_BTS = part.source
            partial = attend(part.of(scaled_BHTK), k, v, None if _by_row(part.source) else visible_BTS, scale=rest)
            if _by_row(part.source):
                partial = partial._replace(lse_BHT=jnp.where(visible_BTS, partial.lse_BHT, -jnp.inf))
            pieces.append(partial)
        o, lse = (jnp.concatenate(x, axis=2) for x in zip(*pieces, strict=True))
        partials.append(Partial(_of_last_rows(o, B, 0.0), _of_last_rows(lse, B, -jnp.inf)))
    return merge(*partials)


def _backward(
    q_BHTK: Array,
    own: Keys | None,
    others: Sequence[Keys],
    scale: float,
    o_BHTK: Array,
    lse_BHT: Array,
    do_BHTK: Array,
) -> tuple[Array, Pair | None, tuple[Pair, ...]]:
    power, rest = _split_scale(scale)
    scaled_BHTK = _once_known(q_BHTK, do_BHTK) * power
    B = q_BHTK.shape[0]
    # With o = sum p v, dp = do v and ds = p (dp - sum p dp) = p (dp - do o).
    delta_BHT = jnp.sum(do_BHTK.astype(jnp.float32) * o_BHTK.astype(jnp.float32), axis=-1)
    dq_BHTK, grads = jnp.zeros(q_BHTK.shape, jnp.float32), []
    for keys, causal in sources(own, others):
        dqs, dk, dv = [], 0.0, 0.0
        for part in _parts(keys, scaled_BHTK, causal):
            dq, *dkv = _source_backward(part.source, *map(part.of, (scaled_BHTK, lse_BHT, delta_BHT, do_BHTK)), rest)
            later = keys.k_BGSK.shape[2] - part.source.k_BGSK.shape[2]
            wide = [jnp.pad(x, ((0, 0), (0, 0), (0, later), (0, 0))) if later else x for x in dkv]
            dqs, dk, dv = [*dqs, dq], dk + wide[0], dv + wide[1]
        dq_BHTK += _of_last_rows(jnp.concatenate(dqs, axis=2), B, 0.0)
        grads.append((dk, dv))
    return dq_BHTK * power, *((None, tuple(grads)) if own is None else (grads[0], tuple(grads[1:])))


def _source_backward(source, q_BHTK, lse_BHT, delta_BHT, do_BHTK, scale):
    """(dq, dk, dv) of one source, float32, from the merged log-sum-exp and delta = do . o.

    Scores are [S, Q] here: every product but that for dq then reads its operands as they lie; that one takes keys
    turned, which are smaller than scores.
    """
    k, v, visible_BTS = source
    G, dtype = k.shape[1], q_BHTK.dtype
    q, do = grouped(q_BHTK, G), grouped(do_BHTK, G)
    if _by_row(source):
        lse_BHT = jnp.where(visible_BTS, lse_BHT, jnp.inf)  # exp(s - inf) = 0
        visible_BTS = None
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
    return Kernel("xla", _forward, _backward)
