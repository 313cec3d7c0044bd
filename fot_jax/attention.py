"""Rotary positions, masks, and attention in parts that merge exactly.

Every source of keys and values (local window, cache, memory, other rows of the batch) gives a `Partial`: its softmax
average and the log of its sum of exponentials. `merge` of partials is the softmax over the union of their keys,
exactly: one softmax over the local window and memory (arXiv 2307.03170, section 3.1), however the keys are stored.

Arrays are head-major: q_BHTK, k_BGSK, v_BGSK. Query head h reads key/value head h // (H / G). Caches have their slots
last, [B, G, K, S]: a CPU reads them twice as fast for a single query, and no slower for many.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Partial(NamedTuple):
    """Attention over one source of keys.

    Attributes:
        o_BHTK: float32, softmax-weighted values; zero where a query sees no key of the source.
        lse_BHT: float32, log of the sum of exponentials of the scores; -inf where a query sees no key.
    """

    o_BHTK: Array
    lse_BHT: Array


class Source(NamedTuple):
    """Keys and values of one source, and who sees them.

    Attributes:
        k_BGSK, v_BGSK: keys, rotated if they are to be, and values. Where they have fewer rows than the queries, only
            the last so many rows of queries read them.
        visible_BTS: bool, of those rows; axes of 1 serve all rows, queries or keys. None: all is seen.
    """

    k_BGSK: Array
    v_BGSK: Array
    visible_BTS: Array | None = None


class Angles(NamedTuple):
    """cos and sin of the rotary angles, float32 [..., T, K/2]."""

    cos: Array | np.ndarray
    sin: Array | np.ndarray

    def at(self, positions: Array) -> Angles:
        """Of a table, the rows of `positions`, int32 [..., T]; beyond its ends, the nearest row."""
        return Angles(*(jnp.asarray(x).at[positions].get(mode="clip") for x in self))


@functools.lru_cache(maxsize=16)
def rotary_angles(length: int, head_size: int, base: float) -> Angles:
    """Table [length, K/2]: the angle of pair i at position p is p * base ** (-2 i / K) (arXiv 2104.09864, section
    3.2.2).

    In bfloat16 the angle would be off by 0.57 radians at position 500; here it is computed in float64, and cos and
    sin rounded to float32. They are constants: computed on the device, every layer that rotates would do so again for
    each row and head.
    """
    angles = np.arange(length)[:, None] * float(base) ** (-np.arange(0, head_size, 2) / head_size)[None, :]
    return Angles(np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def rotate(x_BHTK: Array, angles: Angles, slots_last: bool = False) -> Array:
    """`x` with dimension i and i + K/2 rotated as a pair (the half-split layout of Hugging Face checkpoints).

    Args:
        x_BHTK: queries or keys, any dtype.
        angles: of shape [T, K/2], or [B, T, K/2] where rows are at positions of their own.
        slots_last: whether x is [B, H, K, T], as caches are.

    Returns:
        An array like x, computed in float32.
    """
    cos, sin = (a.reshape(-1, 1, *a.shape[-2:]) for a in angles)
    if slots_last:
        cos, sin = jnp.swapaxes(cos, 2, 3), jnp.swapaxes(sin, 2, 3)
    axis = 2 if slots_last else 3
    first, second = jnp.split(x_BHTK.astype(jnp.float32), 2, axis=axis)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return rotated.astype(x_BHTK.dtype)


def causal_mask(length: int) -> Array:
    """bool [1, T, T]: query t sees key s <= t."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def grouped(q_BHTK: Array, n_kv_heads: int) -> Array:
    """[B, G, Q, K]: the queries of every key/value head in a row, Q = H / G x T."""
    B, H, T, K = q_BHTK.shape
    if H % n_kv_heads:
        raise ValueError(f"{H} query heads over {n_kv_heads} key/value heads; wanted a multiple")
    return q_BHTK.reshape(B, n_kv_heads, H // n_kv_heads * T, K)


def scores(q_BGQK: Array, k_BGSK: Array, slots_last: bool = False, exact: bool = False) -> Array:
    """Inner products, float32 [B, G, Q, S], with keys [B, G, S, K], or [B, G, K, S] if `slots_last`; if `exact` of the
    numbers as they are, where a TPU or GPU would round float32 before it multiplies.
    """
    # Operands of different dtypes meet in the wider one: what memory stores is what is compared.
    dtype = jnp.promote_types(q_BGQK.dtype, k_BGSK.dtype)
    equation = "bgqk,bgks->bgqs" if slots_last else "bgqk,bgsk->bgqs"
    precision = jax.lax.Precision.HIGHEST if exact else None
    return _product(equation, q_BGQK.astype(dtype), k_BGSK.astype(dtype), precision)


def _product(equation: str, a: Array, b: Array, precision: jax.lax.Precision | None = None) -> Array:
    """An einsum with float32 sums. Where the left operand has a single query, its axis is left out: a CPU then reads
    the other operand where it lies, at the speed of memory.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
    if equation.startswith("bgq") and a.shape[2] == 1:
        return product(equation.replace("q", ""), a[:, :, 0], b)[:, :, None]
    return product(equation, a, b)


def _seen(s_BGQS: Array, visible_BTS: Array | None) -> Array:
    """Scores with -inf where a query does not see a key."""
    if visible_BTS is None:
        return s_BGQS
    repeats = s_BGQS.shape[2] // visible_BTS.shape[1] if visible_BTS.shape[1] > 1 else 1
    return jnp.where(jnp.tile(visible_BTS, (1, repeats, 1))[:, None], s_BGQS, -jnp.inf)


def attend(
    q_BHTK: Array,
    k_BGSK: Array,
    v_BGSK: Array,
    visible_BTS: Array | None = None,
    *more: Source,
    scale: float,
    slots_last: bool = False,
) -> Partial:
    """softmax(scale q k^T) v over the visible keys, as a partial.

    Args:
        q_BHTK: queries.
        k_BGSK, v_BGSK: keys and values, of any dtype; products are taken in the wider dtype, sums in float32.
        visible_BTS: bool, which keys a query sees; axes of 1 serve all rows or queries. None: all of them.
        more: further keys and values in the same softmax, for all rows: fewer operations than merging partials.
        scale: what scores are multiplied by.
        slots_last: whether keys and values are [B, G, K, S], as caches are.
    """
    sources = (Source(k_BGSK, v_BGSK, visible_BTS), *more)
    q_BGQK = grouped(q_BHTK, k_BGSK.shape[1])
    each_s = [_seen(scores(q_BGQK, source.k_BGSK, slots_last) * scale, source.visible_BTS) for source in sources]
    top = functools.reduce(jnp.maximum, [jnp.max(s_BGQS, axis=-1, keepdims=True) for s_BGQS in each_s])
    each_p = [_made(jnp.exp(s_BGQS - jnp.where(top == -jnp.inf, 0.0, top))) for s_BGQS in each_s]
    total = sum(jnp.sum(p_BGQS, axis=-1, keepdims=True) for p_BGQS in each_p)
    safe = jnp.where(total == 0.0, 1.0, total)
    equation = "bgqs,bgks->bgqk" if slots_last else "bgqs,bgsk->bgqk"

    def average(p_BGQS: Array, v: Array) -> Array:
        dtype = jnp.promote_types(q_BHTK.dtype, v.dtype)
        return _product(equation, p_BGQS.astype(dtype), v.astype(dtype))

    o_BGQK = sum(average(p, source.v_BGSK) for p, source in zip(each_p, sources, strict=True)) / safe
    lse = jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe))
    return Partial(o_BGQK.reshape(q_BHTK.shape), lse.reshape(q_BHTK.shape[:-1]))


def _made(x: Array) -> Array:
    """`x`, computed once: a CPU compiler would rather compute exponentials anew for every reader."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


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


def merge(*partials: Partial) -> Partial:
    """The partial over the union of the sources: weights exp(lse_i - lse), lse = log sum exp lse_i."""
    if len(partials) == 1:
        return partials[0]
    lse_PBHT = jnp.stack([p.lse_BHT for p in partials])
    top = jnp.max(lse_PBHT, axis=0)
    weight_PBHT = jnp.exp(lse_PBHT - jnp.where(top == -jnp.inf, 0.0, top)[None])
    total = jnp.sum(weight_PBHT, axis=0)
    safe = jnp.where(total == 0.0, 1.0, total)
    o = sum(w[..., None] * p.o_BHTK for w, p in zip(weight_PBHT / safe[None], partials, strict=True))
    return Partial(o, jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q_BHTK: Array, own: Source, others: tuple[Source, ...], scale: float) -> Array:
    """One softmax over a window's own keys and those of other sources, differentiable in queries, keys and values.

    Scores of one source exist at a time, forward and backward: the backward pass computes a source's probabilities
    again from the *merged* log-sum-exp, which makes its gradients those of the softmax over the union.

    Args:
        q_BHTK: queries, rotated if they are to be.
        own: the window itself, S = T; no query sees a later key, and each sees one.
        others: any other sources.
        scale: what scores are multiplied by.

    Returns:
        [B, H, T, K] in the queries' dtype.
    """
    return _attention_forward(q_BHTK, own, others, scale)[0]


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


def _parts(source: Source, q_BHTK: Array, causal: bool) -> list[_Part]:
    """A source for the rows that read it; of a causal triangle, the first quarter of the queries needs only the first
    quarter of the keys, and so on: 5/8 of the square are computed. Short windows are halved, or left whole.
    """
    B, _, T, _ = q_BHTK.shape
    rows = slice(B - source.k_BGSK.shape[0], B)
    n = 4 if T >= 128 else 2 if T >= 32 else 1  # smaller pieces cost more operations than they save work
    if not causal or n == 1:
        return [_Part(rows, slice(0, T), source)]
    parts = []
    for time in (slice(T * i // n, T * (i + 1) // n) for i in range(n)):
        k, v = (x[:, :, : time.stop] for x in source[:2])
        parts.append(_Part(rows, time, Source(k, v, source.visible_BTS[:, time, : time.stop])))
    return parts


def _by_row(source: Source) -> bool:
    """Whether a row sees all or nothing of a source; then scores need no mask, only sums do."""
    return source.visible_BTS is not None and source.visible_BTS.shape[1:] == (1, 1)


def _of_last_rows(x: Array, rows: int, others: float) -> Array:
    """`x`, of the last of `rows` rows, with `others` in those before."""
    return jnp.pad(x, [(rows - x.shape[0], 0)] + [(0, 0)] * (x.ndim - 1), constant_values=others)


def _attention_forward(q_BHTK, own, others, scale):
    B = q_BHTK.shape[0]
    power, rest = _split_scale(scale)
    scaled_BHTK, partials = q_BHTK * power, []
    for source in (own, *others):
        pieces = []
        for part in _parts(source, scaled_BHTK, source is own):
            k, v, visible_BTS = part.source
            partial = attend(part.of(scaled_BHTK), k, v, None if _by_row(source) else visible_BTS, scale=rest)
            if _by_row(source):
                partial = partial._replace(lse_BHT=jnp.where(visible_BTS, partial.lse_BHT, -jnp.inf))
            pieces.append(partial)
        o, lse = (jnp.concatenate(x, axis=2) for x in zip(*pieces, strict=True))
        partials.append(Partial(_of_last_rows(o, B, 0.0), _of_last_rows(lse, B, -jnp.inf)))
    o, lse = merge(*partials)
    o = o.astype(q_BHTK.dtype)
    return o, (q_BHTK, own, others, o, lse)


def _attention_backward(scale, saved, do_BHTK):
    q_BHTK, own, others, o_BHTK, lse_BHT = saved
    power, rest = _split_scale(scale)
    scaled_BHTK = _once_known(q_BHTK, do_BHTK) * power
    B = q_BHTK.shape[0]
    # With o = sum p v, dp = do v and ds = p (dp - sum p dp) = p (dp - do o).
    delta_BHT = jnp.sum(do_BHTK.astype(jnp.float32) * o_BHTK.astype(jnp.float32), axis=-1)
    dq_BHTK, grads = jnp.zeros(q_BHTK.shape, jnp.float32), []
    for source in (own, *others):
        dqs, dk, dv = [], 0.0, 0.0
        for part in _parts(source, scaled_BHTK, source is own):
            dq, *dkv = _source_backward(part.source, *map(part.of, (scaled_BHTK, lse_BHT, delta_BHT, do_BHTK)), rest)
            later = source.k_BGSK.shape[2] - part.source.k_BGSK.shape[2]
            wide = [jnp.pad(x, ((0, 0), (0, 0), (0, later), (0, 0))) if later else x for x in dkv]
            dqs, dk, dv = [*dqs, dq], dk + wide[0], dv + wide[1]
        dq_BHTK += _of_last_rows(jnp.concatenate(dqs, axis=2), B, 0.0)
        grads.append(Source(dk.astype(source.k_BGSK.dtype), dv.astype(source.v_BGSK.dtype)))
    return (dq_BHTK * power).astype(q_BHTK.dtype), grads[0], tuple(grads[1:])


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
    s_BGSQ = _product("bgsk,bgqk->bgsq", k, q) * scale
    if visible_BTS is not None:
        repeats = q.shape[2] // visible_BTS.shape[1] if visible_BTS.shape[1] > 1 else 1
        visible_BSQ = jnp.tile(jnp.swapaxes(visible_BTS, 1, 2), (1, 1, repeats))
        s_BGSQ = jnp.where(visible_BSQ[:, None], s_BGSQ, -jnp.inf)
    p = _made(jnp.exp(s_BGSQ - lse))
    dv = _product("bgsq,bgqk->bgsk", p.astype(dtype), do)
    ds = _made((p * (_product("bgsk,bgqk->bgsq", v, do) - delta) * scale).astype(dtype))
    dk = _product("bgsq,bgqk->bgsk", ds, q)
    dq = jnp.swapaxes(_made(_product("bgks,bgsq->bgkq", _turned(k, dv), ds)), 2, 3)
    return dq.reshape(q_BHTK.shape), dk, dv


attention.defvjp(_attention_forward, _attention_backward)
