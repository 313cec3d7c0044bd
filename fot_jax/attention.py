"""Rotary positions, masks, and attention in parts that merge exactly.

Every source of keys and values (local window, cache, memory, other rows of the batch) gives a `Partial`: its softmax average
and the log of its sum of exponentials. `merge` of partials is the softmax over the union of their keys, exactly: one
softmax over the local window and memory (arXiv 2307.03170, section 3.1), however the keys are stored.

Arrays are head-major: q_BHTK, k_BGSK, v_BGSK. Query head h reads key/value head h // (H / G).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Partial(NamedTuple):
    """Attention over one source of keys.

    Attributes:
        o_BHTK: float32, softmax-weighted values; zero where a query sees no key of the source.
        lse_BHT: float32, log of the sum of exponentials of the scores; -inf where a query sees no key.
    """

    o_BHTK: Array
    lse_BHT: Array


class Angles(NamedTuple):
    """cos and sin of the rotary angles, float32 [..., T, K/2], for positions of shape [..., T]."""

    cos: Array
    sin: Array


def rotary_angles(positions: Array, head_size: int, base: float) -> Angles:
    """Angles of pair i at position p: p * base ** (-2 i / K) (arXiv 2104.09864, section 3.2.2), always in float32.

    In bfloat16 the angle would be off by 0.57 radians at position 500.
    """
    inverse = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angles = positions.astype(jnp.float32)[..., None] * inverse.reshape((1,) * positions.ndim + (-1,))
    return Angles(jnp.cos(angles), jnp.sin(angles))


def rotate(x_BHTK: Array, angles: Angles) -> Array:
    """`x` with dimension i and i + K/2 rotated as a pair (the half-split layout of Hugging Face checkpoints).

    Args:
        x_BHTK: queries or keys, any dtype.
        angles: of shape [T, K/2], or [B, T, K/2] where rows are at positions of their own.

    Returns:
        [B, H, T, K] of x's dtype, computed in float32.
    """
    cos, sin = (a.reshape(-1, 1, *a.shape[-2:]) for a in angles)
    first, second = jnp.split(x_BHTK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BHTK.dtype)


def causal_mask(length: int) -> Array:
    """bool [1, T, T]: query t sees key s <= t."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def scores(q_BHTK: Array, k_BGSK: Array) -> Array:
    """Inner products, float32 [B, G, H/G, T, S]."""
    B, H, T, K = q_BHTK.shape
    G = k_BGSK.shape[1]
    if H % G or k_BGSK.shape[-1] != K:
        raise ValueError(f"queries {q_BHTK.shape} and keys {k_BGSK.shape} do not fit: wanted H a multiple of G, equal K")
    q_BGRTK = q_BHTK.reshape(B, G, H // G, T, K)
    # Operands of different dtypes meet in the wider one: what memory stores is what is compared.
    dtype = jnp.promote_types(q_BHTK.dtype, k_BGSK.dtype)
    q, k = q_BGRTK.astype(dtype), k_BGSK.astype(dtype)
    if T == 1:
        # One query: with the keys as left operand a CPU reads them where they lie, and does not transpose them first.
        s_BGSR = jnp.einsum("bgsk,bgrk->bgsr", k, q[:, :, :, 0], preferred_element_type=jnp.float32)
        return jnp.swapaxes(s_BGSR, 2, 3)[:, :, :, None]
    return jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)


def attend(q_BHTK: Array, k_BGSK: Array, v_BGSK: Array, visible_BTS: Array | None = None, *, scale: float) -> Partial:
    """softmax(scale q k^T) v over the visible keys, as a partial.

    Args:
        q_BHTK: queries.
        k_BGSK, v_BGSK: keys and values, of any dtype; products are taken in the queries' dtype, sums in float32.
        visible_BTS: bool, which keys a query sees; a first axis of 1 serves all rows. None: all of them.
        scale: what scores are multiplied by.
    """
    s_BGRTS = scores(q_BHTK, k_BGSK) * scale
    if visible_BTS is not None:
        s_BGRTS = jnp.where(visible_BTS[:, None, None], s_BGRTS, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s_BGRTS, axis=-1, keepdims=True))
    p_BGRTS = jnp.exp(s_BGRTS - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(p_BGRTS, axis=-1, keepdims=True)
    o_BGRTK = jnp.einsum(
        "bgrts,bgsk->bgrtk", p_BGRTS.astype(q_BHTK.dtype), v_BGSK.astype(q_BHTK.dtype), preferred_element_type=jnp.float32
    )
    o_BGRTK = o_BGRTK / jnp.where(total == 0.0, 1.0, total)
    lse = jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(jnp.where(total == 0.0, 1.0, total)))
    return Partial(o_BGRTK.reshape(q_BHTK.shape), lse.reshape(q_BHTK.shape[:-1]))


def merge(*partials: Partial) -> Partial:
    """The partial over the union of the sources: weights exp(lse_i - lse), lse = log sum exp lse_i. Not for autodiff of kernels."""
    lse_PBHT = jnp.stack([p.lse_BHT for p in partials])
    top = jnp.max(lse_PBHT, axis=0)
    weight_PBHT = jnp.exp(lse_PBHT - jnp.where(top == -jnp.inf, 0.0, top)[None])
    total = jnp.sum(weight_PBHT, axis=0)
    safe = jnp.where(total == 0.0, 1.0, total)
    o = sum(w[..., None] * p.o_BHTK for w, p in zip(weight_PBHT / safe[None], partials, strict=True))
    return Partial(o, jnp.where(top == -jnp.inf, -jnp.inf, top + jnp.log(safe)))
