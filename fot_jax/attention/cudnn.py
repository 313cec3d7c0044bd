"""Attention by cuDNN's fused kernels, on NVIDIA GPUs.

JAX differentiates cuDNN's output, not its log-sum-exp, so that a merge of outputs under autodiff has wrong gradients.
The backward kernel itself takes output and log-sum-exp as arguments; given those of the merged softmax, it computes its
gradients.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.attention.partial import Kernel, Keys, Partial

try:  # not part of JAX's public interface
    from jax._src.cudnn import fused_attention_stablehlo as calls
except ImportError:
    calls = None

Array = jax.Array

MULTIPLE = 8  # of numbers of a head; 100 are filled up with zeros to 104
EVERYWHERE = 128  # numbers of a head that all GPUs take; from compute capability 9.0 on 256
_BEFORE = tuple("query key value bias q_seqlen kv_seqlen q_offsets kv_offsets page_table_k page_table_v".split())
_OPTIONS = ("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout", "sliding_window_length")


def _calls_take() -> dict[str, Any] | None:
    """What JAX's two calls take besides what ours give, looked at before it is relied on: nothing, or, in later
    versions, a function of scores. None: they take something else.
    """
    names = "_dot_product_attention_fwd_impl", "_dot_product_attention_bwd_impl"
    found = [
        tuple(inspect.signature(getattr(calls, name)).parameters) if hasattr(calls, name) else () for name in names
    ]
    merged = "activation", "fwd_output", "grad_output"
    for more in {}, {"score_mod": None}:
        arguments = [f"{name}_args" for name in more]
        forward = (*_BEFORE, *arguments, *_OPTIONS, *more, "is_training")
        if found == [forward, (*_BEFORE, *merged, *arguments, *_OPTIONS, *more)]:
            return more
    return None


def kernel(platform: str, length: int, head_size: int, dtype: np.dtype) -> Kernel:
    """This kernel.

    Raises:
        ValueError: a platform, GPU, cuDNN, window, head size or dtype that it is not made for, or a JAX that calls
            cuDNN with other arguments.
    """
    instead = "wanted attention 'xla'"
    if platform != "gpu":
        raise ValueError(f"cuDNN attention on a {platform}; it is for GPUs: {instead}, or 'splash' on a TPU")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"cuDNN attention in {dtype}; wanted bfloat16 or float16, or attention 'xla'")
    if length % 2:
        raise ValueError(f"cuDNN attention over a window of {length} tokens; wanted an even number, or attention 'xla'")
    if (more := _calls_take()) is None:
        raise ValueError(f"cuDNN is called by JAX {jax.__version__} in another way than by ours; {instead}")
    filled = head_size + -head_size % MULTIPLE
    shapes = [jax.ShapeDtypeStruct((1, 1, length, filled), dtype)] * 3
    try:
        if jax.default_backend() == platform:
            version = calls.check_cudnn_version()
            if not calls.check_compute_capability("8.0"):
                raise RuntimeError("the GPU is older than compute capability 8.0")
            calls.check_is_flash_attention(*shapes, calls.AttentionLayout.BNTH.value, version, True, True)
        elif filled > EVERYWHERE:  # only compiled for: there is no GPU to ask
            raise RuntimeError(f"a GPU that is not here takes {EVERYWHERE} for sure")
    except (NotImplementedError, RuntimeError) as error:  # JAX refuses by either, and so above
        raise ValueError(f"cuDNN attention with heads of {head_size}: {error}; {instead}") from error
    return Kernel("cudnn", functools.partial(_read, more), functools.partial(_gradients, more))


def _filled_up(x: Array) -> Array:
    """Heads of a multiple of 8 numbers."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % MULTIPLE)])


def _arguments(q_BHTK: Array, keys: Keys, causal: bool, scale: float) -> tuple[list[Array], dict[str, Any]]:
    """What both calls begin with, and their options; empty arrays stand for what is not used."""
    # Cut from the queries: new zeros would be made outside of shard_map, an array of a size of 0 split over devices, at
    # which the partitioner of JAX 0.11 crashes.
    nothing = q_BHTK[:0, 0, 0, 0]
    given = [*map(_filled_up, (q_BHTK, *keys[:2])), nothing]
    if masked := keys.kv_ids_BS is not None and keys.seen_by_row is None:
        # Added to scores: a large negative number where a query does not see a key.
        same = keys.q_ids_BT[:, None, :, None] == keys.kv_ids_BS[:, None, None, :]
        same = jnp.broadcast_to(same, (q_BHTK.shape[0], 1, q_BHTK.shape[2], keys.k_BGSK.shape[2]))
        given[3] = jnp.where(same, 0.0, calls.get_large_negative_number(q_BHTK.dtype))
    options = dict(
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(masked, False),
        mask_type=calls.MaskType.CAUSAL if causal else calls.MaskType.NO_MASK,
        layout=calls.AttentionLayout.BNTH.value,
        sliding_window_length=None,
    )
    return given + [nothing] * 6, options


def _read(more: dict[str, Any], q_BHTK: Array, keys: Keys, causal: bool, scale: float) -> Partial:
    arrays, options = _arguments(q_BHTK, keys, causal, scale)
    o, lse = calls._dot_product_attention_fwd_p_wrapper.bind(*arrays, **options, **more, is_training=True)
    o = o[..., : q_BHTK.shape[3]].astype(jnp.float32)
    return Partial(o, keys.hide(lse, -jnp.inf))


def _gradients(
    more: dict[str, Any],
    q_BHTK: Array,
    keys: Keys,
    causal: bool,
    scale: float,
    o_BHTK: Array,
    lse_BHT: Array,
    do_BHTK: Array,
) -> tuple[Array, Array, Array]:
    arrays, options = _arguments(q_BHTK, keys, causal, scale)
    lse_BHT = keys.hide(lse_BHT, float(jnp.finfo(jnp.float32).max))  # exp(s - max) = 0
    merged = lse_BHT, *(_filled_up(x.astype(q_BHTK.dtype)) for x in (o_BHTK, do_BHTK))
    grads = calls._dot_product_attention_bwd_p_wrapper.bind(*arrays, *merged, **options, **more)
    dq, dk, dv = (x[..., : q_BHTK.shape[3]] for x in grads)
    return dq, dk, dv
