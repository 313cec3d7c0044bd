"""Number formats of memory: floating point, or int8 with a scale for each key and each value."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

LANES = 128  # columns of a TPU's tile


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Int8:
    """Vectors as whole numbers times a scale of each; what a buffer of keys or values is in that format.

    Attributes:
        numbers: int8 [B, G, K, M], -127 to 127.
        scale: bfloat16 [B, G, 1, M].
    """

    numbers: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, G, K, M]."""
        return self.numbers.shape

    @property
    def dtype(self) -> Any:
        """What `loaded` gives."""
        return jnp.dtype(jnp.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.numbers.nbytes + self.scale.nbytes


Buffer = Array | Int8


def empty(shape: tuple[int, ...], dtype: str) -> Buffer:
    """A buffer [B, G, K, M] of zeros."""
    if dtype != "int8":
        return jnp.zeros(shape, dtype)
    return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:2], 1, shape[3]), jnp.bfloat16))


def format_of(x: Buffer) -> str:
    """Name of a buffer's number format, as `empty` takes it."""
    return "int8" if isinstance(x, Int8) else jnp.dtype(x.dtype).name


def unscaled(x: Buffer, column_BGQN: Array, weight_BGQN: Array) -> tuple[Array, Array]:
    """The numbers of a buffer, and the weights of their columns (below 0: none) in a sum; of int8 with the scales in
    them. Others stay.
    """
    if not isinstance(x, Int8):
        return x, weight_BGQN
    scale_BGQN = jnp.take_along_axis(x.scale, jnp.maximum(column_BGQN, 0), axis=-1)
    return x.numbers, weight_BGQN * scale_BGQN.astype(jnp.float32)


def whole_tiles(size: int, dtype: str) -> int:
    """Dimensions of a vector, filled up to what a TPU's tiles hold whole: of another size it would make its tiles of
    other dimensions, and turn all of memory round for whatever wants to read it as it lies.
    """
    rows = 32 if dtype == "int8" else 8
    return -(-size // rows) * rows


def vector_bytes(size: int, dtype: str) -> int:
    """Bytes that a vector of so many dimensions takes."""
    return size + 2 if dtype == "int8" else size * jnp.dtype(dtype).itemsize


def stored(x_BGKT: Buffer, like: Buffer) -> Buffer:
    """Vectors in the format of a buffer. In int8 each is off by at most half its scale, a 252nd of its greatest
    number.
    """
    if not isinstance(like, Int8):
        return loaded(x_BGKT).astype(like.dtype)
    if isinstance(x_BGKT, Int8):
        return x_BGKT
    x = x_BGKT.astype(jnp.float32)
    # Rounded to bfloat16 a scale is off by 1/256 at most; this much greater, no number rounds beyond 127.
    scale = jnp.max(jnp.abs(x), axis=2, keepdims=True) * ((1 + 2**-8) / 127)
    # Cast there and back the compiler would divide by the scale that was not rounded.
    scale = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    numbers = jnp.round(x / jnp.where(scale == 0, 1.0, scale))
    return Int8(numbers.astype(jnp.int8), scale.astype(jnp.bfloat16))


def loaded(x: Buffer) -> Array:
    """The vectors: of int8 float32, exactly what is stored; of other formats the buffer itself."""
    return x.numbers.astype(jnp.float32) * x.scale.astype(jnp.float32) if isinstance(x, Int8) else x
