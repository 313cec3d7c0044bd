"""Attention by cuDNN's fused kernels, on NVIDIA GPUs.

JAX differentiates cuDNN's output, not its log-sum-exp, so that a merge of outputs under autodiff has wrong gradients.
The backward kernel itself takes output and log-sum-exp as arguments; given those of the merged softmax, it computes its
gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from fot_jax.attention.partial import Kernel, Keys, Pair, Partial, merge, sources

Array = jax.Array

MULTIPLE = 8  # of numbers of a head; 100 are filled up with zeros to 104
LARGEST_HEAD = 128  # on every GPU that has these kernels
# Not part of JAX's public interface, so what it takes is looked at before it is relied on.
_FORWARD = (
    "query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k, page_table_v, scale, seed, "
    "dropout_rate, variadic_args, mask_type, layout, sliding_window_length, cudnn_version, return_residual"
)


def kernel(platform: str, length: int, head_size: int, dtype: np.dtype) -> Kernel:
    """This kernel.

    Raises:
        ValueError: a platform, head size or dtype that it is not made for.
    """
    instead = "wanted attention 'xla'"
    if platform != "gpu":
        raise ValueError(f"cuDNN attention on a {platform}; it is for GPUs: {instead}, or 'splash' on a TPU")
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"cuDNN attention in {dtype}; it computes in bfloat16 and float16: {instead}, or another dtype"
        )
    if head_size > LARGEST_HEAD:
        raise ValueError(f"cuDNN attention with heads of {head_size}; wanted at most {LARGEST_HEAD}, or {instead[7:]}")
    if length % 2:
        raise ValueError(f"cuDNN attention over a window of {length} tokens; wanted an even number: {instead}")
    if tuple(inspect.signature(cudnn._dot_product_attention_fwd).parameters) != tuple(_FORWARD.split(", ")):
        raise ValueError(f"cuDNN attention of JAX {jax.__version__} takes other arguments than ours gives: {instead}")
    return Kernel("cudnn", _forward, _backward)


def _forward(q_BHTK: Array, own: Keys | None, others: Sequence[Keys], scale: float) -> Partial:
    return merge(*(_read(q_BHTK, keys, causal, scale) for keys, causal in sources(own, others)))


def _backward(
    q_BHTK: Array,
    own: Keys | None,
    others: Sequence[Keys],
    scale: float,
    o_BHTK: Array,
    lse_BHT: Array,
    do_BHTK: Array,
) -> tuple[Array, Pair | None, tuple[Pair, ...]]:
    dq_BHTK, grads = jnp.zeros(q_BHTK.shape, jnp.float32), []
    for keys, causal in sources(own, others):
        dq, dk, dv = _gradients(q_BHTK, keys, causal, scale, o_BHTK, lse_BHT, do_BHTK)
        dq_BHTK += dq.astype(jnp.float32)
        grads.append((dk, dv))
    return dq_BHTK, *((None, tuple(grads)) if own is None else (grads[0], tuple(grads[1:])))


def _filled_up(x: Array) -> Array:
    """Heads of a multiple of 8 numbers."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, -x.shape[-1] % MULTIPLE)])


def _by_row(keys: Keys) -> Array | None:
    """bool [B, 1], of rows that see all or nothing of a source, which of them do; None where it differs by key."""
    if keys.kv_ids_BS is None or keys.kv_ids_BS.shape[1] > 1 or keys.q_ids_BT.shape[1] > 1:
        return None
    return keys.q_ids_BT == keys.kv_ids_BS


def _bias(q_BHTK: Array, keys: Keys) -> Array | None:
    """[B, 1, T, S] added to scores: a large negative number where a query does not see a key."""
    if keys.kv_ids_BS is None or _by_row(keys) is not None:
        return None
    rows, S = keys.k_BGSK.shape[0], keys.k_BGSK.shape[2]
    same = (keys.q_ids_BT[:, :, None] == keys.kv_ids_BS[:, None, :])[:, None]
    same = jnp.broadcast_to(same, (rows, 1, q_BHTK.shape[2], S))
    return jnp.where(same, jnp.zeros((), q_BHTK.dtype), cudnn.get_large_negative_number(q_BHTK.dtype))


def _options(bias: Array | None, causal: bool, scale: float) -> dict[str, Any]:
    return dict(
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(bias is not None, False),
        mask_type=cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        layout=cudnn.AttentionLayout.BNTH.value,
        sliding_window_length=None,
    )


def _arrays(q_BHTK: Array, keys: Keys, bias: Array | None) -> list[Array]:
    """What both kernels begin with; arrays of nothing stand for what is not used."""
    nothing = jnp.zeros(0, q_BHTK.dtype)
    given = [*map(_filled_up, (q_BHTK, keys.k_BGSK, keys.v_BGSK)), nothing if bias is None else bias]
    return given + [nothing] * 6


def _read(q_BHTK: Array, keys: Keys, causal: bool, scale: float) -> Partial:
    """The partial over one source."""
    B, _, _, K = q_BHTK.shape
    before = [(B - keys.k_BGSK.shape[0], 0)]
    q_BHTK = q_BHTK[before[0][0] :]
    bias, by_row = _bias(q_BHTK, keys), _by_row(keys)
    options = _options(bias, causal, scale)
    arrays = _arrays(q_BHTK, keys, bias)
    cudnn.check_is_flash_attention(*arrays[:3], options["layout"], cudnn.check_cudnn_version(), bias is not None, True)
    o, lse = cudnn._dot_product_attention_fwd_p_wrapper.bind(*arrays, **options, is_training=True)
    if by_row is not None:
        lse = jnp.where(by_row[:, :, None], lse, -jnp.inf)
    return Partial(
        jnp.pad(o[..., :K].astype(jnp.float32), before + [(0, 0)] * 3),
        jnp.pad(lse, before + [(0, 0)] * 2, constant_values=-jnp.inf),
    )


def _gradients(
    q_BHTK: Array, keys: Keys, causal: bool, scale: float, o_BHTK: Array, lse_BHT: Array, do_BHTK: Array
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of one source from the merged output and log-sum-exp."""
    B, _, _, K = q_BHTK.shape
    before = B - keys.k_BGSK.shape[0]
    q_BHTK, o_BHTK, lse_BHT, do_BHTK = (x[before:] for x in (q_BHTK, o_BHTK, lse_BHT, do_BHTK))
    bias, by_row = _bias(q_BHTK, keys), _by_row(keys)
    if by_row is not None:
        lse_BHT = jnp.where(by_row[:, :, None], lse_BHT, jnp.finfo(jnp.float32).max)  # exp(s - max) = 0
    merged = lse_BHT, *map(_filled_up, (o_BHTK.astype(q_BHTK.dtype), do_BHTK.astype(q_BHTK.dtype)))
    grads = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *_arrays(q_BHTK, keys, bias), *merged, **_options(bias, causal, scale)
    )
    dq, dk, dv = (x[..., :K] for x in grads)
    return jnp.pad(dq, [(before, 0)] + [(0, 0)] * 3), dk, dv
