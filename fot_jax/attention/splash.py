"""Attention by splash, JAX's sparse flash attention for TPUs: scores never leave the chip's own memory.

The kernels are JAX's; here several sources share one softmax. JAX differentiates splash's output alone, never its
log-sum-exp, so a merge of outputs under autodiff has wrong gradients. The backward kernels themselves take output and
log-sum-exp as arguments; given those of the merged softmax, they compute its gradients.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as calls
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from fot_jax.attention.partial import Kernel, Keys, Partial

Array = jax.Array

LANES = 128
_BLOCKS = (512, 384, 256, 128)  # of queries and of keys; the largest that divides is taken
# Not part of JAX's public interface, so what it takes is looked at before it is relied on.
_BACKWARD = (
    "save_residuals, mask_value, is_mqa, block_sizes, residual_checkpoint_name, mask_function, attn_logits_soft_cap, "
    "interpret, res, do"
)


def kernel(platform: str, length: int, head_size: int, dtype: np.dtype) -> Kernel:
    """This kernel; on a CPU interpreted, which is slow, and exact.

    Raises:
        ValueError: a platform, window or dtype that it is not made for, or a JAX whose kernels take other arguments.
    """
    if platform not in ("tpu", "cpu"):
        raise ValueError(f"splash attention on a {platform}; it is made for TPUs: wanted attention 'xla' or 'cudnn'")
    if length % LANES:
        raise ValueError(
            f"splash attention over a window of {length} tokens; wanted a multiple of {LANES}, or attention 'xla'"
        )
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"splash attention in {dtype}; wanted bfloat16 or float32, or attention 'xla'")
    found = inspect.signature(calls._splash_attention_bwd).parameters if hasattr(calls, "_splash_attention_bwd") else ()
    if tuple(found) != tuple(_BACKWARD.split(", ")):
        raise ValueError(
            f"splash attention of JAX {jax.__version__} has another backward pass than ours; wanted attention 'xla'"
        )
    interpret = platform != "tpu"
    return Kernel("splash", functools.partial(_read, interpret), functools.partial(_gradients, interpret))


def _scaled(q_BHTK: Array, scale: float) -> Array:
    """Splash multiplies scores by nothing."""
    return (q_BHTK.astype(jnp.float32) * scale).astype(q_BHTK.dtype)


def _of_row(q_BHTK: Array, keys: Keys, causal: bool, interpret: bool) -> calls.SplashAttentionKernel:
    """JAX's kernel for one row of a source."""
    (_, H, T, _), S = q_BHTK.shape, keys.k_BGSK.shape[2]
    mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    q_block, kv_block = (next(block for block in _BLOCKS if n % block == 0) for n in (T, S))
    blocks = calls.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    return calls.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=interpret,
    )


def _ids(q_BHTK: Array, keys: Keys) -> calls.SegmentIds | None:
    """Numbers of queries and keys, written out for each."""
    if keys.kv_ids_BS is None:
        return None
    B, _, S, _ = keys.k_BGSK.shape
    of_queries = jnp.broadcast_to(keys.q_ids_BT, (B, q_BHTK.shape[2]))
    return calls.SegmentIds(of_queries, jnp.broadcast_to(keys.kv_ids_BS, (B, S)))


def _read(interpret: bool, q_BHTK: Array, keys: Keys, causal: bool, scale: float) -> Partial:
    of_row = jax.vmap(_of_row(q_BHTK, keys, causal, interpret))
    o, (lse,) = of_row(_scaled(q_BHTK, scale), keys.k_BGSK, keys.v_BGSK, _ids(q_BHTK, keys))
    return Partial(o.astype(jnp.float32), lse)


def _gradients(
    interpret: bool,
    q_BHTK: Array,
    keys: Keys,
    causal: bool,
    scale: float,
    o_BHTK: Array,
    lse_BHT: Array,
    do_BHTK: Array,
) -> tuple[Array, Array, Array]:
    of_row = _of_row(q_BHTK, keys, causal, interpret)
    options = {"save_residuals": False, **{name: of_row.kwargs[name] for name in _BACKWARD.split(", ")[1:-2]}}

    def row(q: Array, k: Array, v: Array, ids: calls.SegmentIds | None, o: Array, lse: Array, do: Array) -> tuple:
        saved = (q, k, v, ids, None, o, lse, of_row.dq_mask_info, of_row.dkv_mask_info)
        return calls._splash_attention_bwd(**options, res=saved, do=do)[3:6]

    arrays = _scaled(q_BHTK, scale), keys.k_BGSK, keys.v_BGSK, _ids(q_BHTK, keys)
    dq, dk, dv = jax.vmap(row)(*arrays, o_BHTK, lse_BHT, do_BHTK)
    return dq.astype(jnp.float32) * scale, dk, dv
