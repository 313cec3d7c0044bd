"""Rotary positions (arXiv 2104.09864)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


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
