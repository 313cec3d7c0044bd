"""Attention for training: what a kernel is, and which one computes.

A kernel computes one softmax over a window's own keys, causally, and other sources of keys, and its gradients from the
output and the log-sum-exp of *all* that the softmax ranges over. Given those of a larger union, its gradients are those
of the larger softmax: that is how sources are read one after another (`crossbatch`).
"""

from __future__ import annotations

import logging

import jax.numpy as jnp
import jax.typing

from fot_jax import sharding
from fot_jax.attention import cudnn, plain, splash
from fot_jax.attention.partial import Kernel
from fot_jax.host import warn_once

_log = logging.getLogger(__name__)

NAMES = ("auto", "xla", "splash", "cudnn")


def kernel(name: str, length: int, head_size: int, dtype: jax.typing.DTypeLike, platform: str | None = None) -> Kernel:
    """The kernel of a name; "auto" is that of the platform: splash on a TPU, cuDNN on a GPU, else XLA's own.

    Args:
        name: one of `NAMES`.
        length: T, tokens of a window.
        head_size: K.
        dtype: of queries, keys and values.
        platform: kind of device; that of `sharding.platform` by default.

    Raises:
        ValueError: an unknown name, or what the kernel cannot compute.
    """
    if name not in NAMES:
        raise ValueError(f"attention kernel is {name!r}; wanted one of {', '.join(NAMES)}")
    platform = platform or sharding.platform()
    wanted = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla") if name == "auto" else name
    module = {"xla": plain, "splash": splash, "cudnn": cudnn}[wanted]
    try:
        return module.kernel(platform, length, head_size, jnp.dtype(dtype))
    except ValueError as error:
        if name != "auto":
            raise
        warn_once(_log, f"attention by XLA: {error}")
        return plain.kernel(platform, length, head_size, jnp.dtype(dtype))
