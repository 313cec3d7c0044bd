"""Attention over one source of keys, and the exact merge of several."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Partial(NamedTuple):
    """Attention over one source of keys.

    Attributes:
        o_BHTK: float32, softmax-weighted values; of `attend` and `merge` zero where a query sees no key of the source.
        lse_BHT: float32, log of the sum of exponentials of the scores; -inf where a query sees no key.
    """

    o_BHTK: Array
    lse_BHT: Array


class Source(NamedTuple):
    """Keys and values of one source, and who sees them, by a mask.

    Attributes:
        k_BGSK, v_BGSK: keys, rotated if they are to be, and values.
        visible_BTS: bool; axes of 1 serve all rows, queries or keys. None: all is seen.
    """

    k_BGSK: Array
    v_BGSK: Array
    visible_BTS: Array | None = None


class Keys(NamedTuple):
    """Keys and values of one source, and who sees them, by numbers: what kernels take.

    Attributes:
        k_BGSK, v_BGSK: keys, rotated if they are to be, and values. Where they have fewer rows than the queries, only
            the last so many rows of queries read them.
        q_ids_BT, kv_ids_BS: int32, of those rows; a query sees the keys of its own number. Axes of 1 serve all rows,
            queries or keys. None: all is seen.
    """

    k_BGSK: Array
    v_BGSK: Array
    q_ids_BT: Array | None = None
    kv_ids_BS: Array | None = None

    @property
    def seen_by_row(self) -> Array | None:
        """bool [B, 1], where rows see all or nothing, which of them do; None where that differs by query or key."""
        if self.kv_ids_BS is None or self.kv_ids_BS.shape[1] > 1 or self.q_ids_BT.shape[1] > 1:
            return None
        return self.q_ids_BT == self.kv_ids_BS

    def hide(self, lse_BHT: Array, instead: float) -> Array:
        """Log-sum-exp with `instead` in rows that see nothing: where `seen_by_row`, scores need no mask, sums do."""
        seen = self.seen_by_row
        return lse_BHT if seen is None else jnp.where(seen[:, :, None], lse_BHT, instead)


class Kernel(NamedTuple):
    """One way to compute attention, on one device: of one source, and so of several in one softmax.

    Attributes:
        name: see `attention.kernel`.
        read: (q_BHTK, keys, causal, scale) -> Partial: where `causal`, no query sees a later key; scores are multiplied
            by scale. What a query that sees no key gets weighs nothing in a merge: its lse is -inf, or far below any.
        gradients: (q_BHTK, keys, causal, scale, o_BHTK, lse_BHT, do_BHTK) -> (dq, dk, dv): of this source's part in a
            softmax whose output and log-sum-exp are o and lse, given the gradient of o.
    """

    name: str
    read: Callable[..., Partial]
    gradients: Callable[..., tuple[Array, Array, Array]]

    def forward(self, q_BHTK: Array, own: Keys | None, others: Sequence[Keys], scale: float) -> Partial:
        """One softmax over `own`, causal, if it is not None, and over all `others`."""
        B, partials = q_BHTK.shape[0], []
        for keys, causal in _sources(own, others):
            o, lse = self.read(q_BHTK[B - keys.k_BGSK.shape[0] :], keys, causal, scale)
            partials.append(Partial(_of_last_rows(o, B, 0.0), _of_last_rows(lse, B, -jnp.inf)))
        return merge(*partials)

    def backward(
        self,
        q_BHTK: Array,
        own: Keys | None,
        others: Sequence[Keys],
        scale: float,
        o_BHTK: Array,
        lse_BHT: Array,
        do_BHTK: Array,
    ) -> tuple[Array, list[tuple[Array, Array]]]:
        """(dq_BHTK float32, (dk, dv) of every source, `own` first if there is one), of o and lse of the whole softmax,
        which may range over more than these sources, and the gradient of o.
        """
        B, dq_BHTK, grads = q_BHTK.shape[0], jnp.zeros(q_BHTK.shape, jnp.float32), []
        for keys, causal in _sources(own, others):
            q, o, lse, do = (x[B - keys.k_BGSK.shape[0] :] for x in (q_BHTK, o_BHTK, lse_BHT, do_BHTK))
            dq, *of_keys = self.gradients(q, keys, causal, scale, o, lse, do)
            dq_BHTK += _of_last_rows(dq.astype(jnp.float32), B, 0.0)
            grads.append(tuple(of_keys))
        return dq_BHTK, grads


def _sources(own: Keys | None, others: Sequence[Keys]) -> list[tuple[Keys, bool]]:
    """Every source, and whether it is causal."""
    return ([] if own is None else [(own, True)]) + [(keys, False) for keys in others]


def _of_last_rows(x: Array, rows: int, others: float) -> Array:
    """`x`, of the last of `rows` rows, with `others` in those before."""
    return jnp.pad(x, [(rows - x.shape[0], 0)] + [(0, 0)] * (x.ndim - 1), constant_values=others)


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
    return product(equation, q_BGQK.astype(dtype), k_BGSK.astype(dtype), precision)


def product(equation: str, a: Array, b: Array, precision: jax.lax.Precision | None = None) -> Array:
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
    each_p = [made(jnp.exp(s_BGQS - jnp.where(top == -jnp.inf, 0.0, top))) for s_BGQS in each_s]
    total = sum(jnp.sum(p_BGQS, axis=-1, keepdims=True) for p_BGQS in each_p)
    safe = jnp.where(total == 0.0, 1.0, total)
    equation = "bgqs,bgks->bgqk" if slots_last else "bgqs,bgsk->bgqk"

    def average(p_BGQS: Array, v: Array) -> Array:
        dtype = jnp.promote_types(q_BHTK.dtype, v.dtype)
        return product(equation, p_BGQS.astype(dtype), v.astype(dtype))

    o_BGQK = sum(average(p, source.v_BGSK) for p, source in zip(each_p, sources, strict=True)) / safe
    lse = jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe))
    return Partial(o_BGQK.reshape(q_BHTK.shape), lse.reshape(q_BHTK.shape[:-1]))


def attend_by_blocks(
    q_BHTK: Array, k_BGSK: Array, v_BGSK: Array, visible_BTS: Array, *, scale: float, score_bytes: int
) -> Partial:
    """`attend`, with so many queries at a time that their scores take no more than `score_bytes`, or one query.

    Args:
        visible_BTS: see `attend`; its second axis has all queries.
    """
    B, H, T, _ = q_BHTK.shape
    size = min(T, max(1, score_bytes // (4 * B * H * k_BGSK.shape[2])))
    one = lambda x: attend(x[0], k_BGSK, v_BGSK, x[1][:, 0], scale=scale)
    return over_query_blocks(one, (q_BHTK, visible_BTS[:, None]), size)


def over_query_blocks(read_block: Callable[..., Any], xs: Any, size: int) -> Any:
    """`read_block` on blocks of `size` queries, one after another.

    Args:
        xs: an array [B, H, T, ...], or a tree of them.

    Returns:
        What the blocks give, joined along T, axis 2 of every array.
    """
    T = jax.tree.leaves(xs)[0].shape[2]
    return joined(one_by_one(read_block, in_blocks(xs, size)), T)


def in_blocks(xs: Any, size: int) -> Any:
    """[n, B, H, size, ...] of arrays [B, H, T, ...], with zeros after the last."""

    def split(x: Array) -> Array:
        B, H, T, *rest = x.shape
        n = -(-T // size)
        padded = jnp.pad(x, [(0, 0), (0, 0), (0, n * size - T), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(padded.reshape(B, H, n, size, *rest), 2, 0)

    return jax.tree.map(split, xs)


def joined(xs: Any, T: int) -> Any:
    """[B, H, T, ...] of arrays [n, B, H, size, ...]: the other way."""

    def join(x: Array) -> Array:
        n, B, H, size, *rest = x.shape
        return jnp.moveaxis(x, 0, 2).reshape(B, H, n * size, *rest)[:, :, :T]

    return jax.tree.map(join, xs)


def one_by_one(f: Callable[[Any], Any], xs: Any) -> Any:
    """`lax.map`, without a loop where there is one."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.map(f, xs)
    return jax.tree.map(lambda x: x[None], f(jax.tree.map(lambda x: x[0], xs)))


def made(x: Array) -> Array:
    """`x`, computed once: a CPU compiler would rather compute exponentials anew for every reader."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


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
