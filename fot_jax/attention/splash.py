"""Attention by splash, JAX's sparse flash attention for TPUs: scores never leave the chip's own memory.

The kernels are JAX's; here several sources share one softmax. JAX differentiates splash's output alone, never its
log-sum-exp, so a merge of outputs under autodiff has wrong gradients. The backward kernels themselves take output and
log-sum-exp as arguments; given those of the merged softmax, they compute its gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from fot_jax.attention.partial import Kernel, Keys, Pair, Partial, merge, sources

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
        ValueError: a platform, window or dtype that it is not made for.
    """
    instead = "wanted attention 'xla'"
    if platform not in ("tpu", "cpu"):
        raise ValueError(f"splash attention on a {platform}; it is made for TPUs: {instead}, or 'cudnn' on a GPU")
    if length % LANES:
        raise ValueError(f"splash attention over a window of {length} tokens; wanted a multiple of {LANES}: {instead}")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"splash attention in {dtype}; it computes in bfloat16 and float32: {instead}")
    if tuple(inspect.signature(splash._splash_attention_bwd).parameters) != tuple(_BACKWARD.split(", ")):
        raise ValueError(
            f"splash attention of JAX {jax.__version__} has another backward pass than ours takes: {instead}"
        )
    interpret = platform != "tpu"
    return Kernel("splash", functools.partial(_forward, interpret), functools.partial(_backward, interpret))


def _forward(interpret: bool, q_BHTK: Array, own: Keys | None, others: Sequence[Keys], scale: float) -> Partial:
    scaled_BHTK = _scaled(q_BHTK, scale)
    partials = [
        _read(_make(q_BHTK, keys, causal, interpret), scaled_BHTK, keys) for keys, causal in sources(own, others)
    ]
    return merge(*partials)


def _backward(
    interpret: bool,
    q_BHTK: Array,
    own: Keys | None,
    others: Sequence[Keys],
    scale: float,
    o_BHTK: Array,
    lse_BHT: Array,
    do_BHTK: Array,
) -> tuple[Array, Pair | None, tuple[Pair, ...]]:
    scaled_BHTK, dq_BHTK, grads = _scaled(q_BHTK, scale), 0.0, []
    for keys, causal in sources(own, others):
        made = _make(q_BHTK, keys, causal, interpret)
        dq, dk, dv = _gradients(made, scaled_BHTK, keys, o_BHTK, lse_BHT, do_BHTK)
        dq_BHTK += dq.astype(jnp.float32)
        grads.append((dk, dv))
    return dq_BHTK * scale, *((None, tuple(grads)) if own is None else (grads[0], tuple(grads[1:])))


def _scaled(q_BHTK: Array, scale: float) -> Array:
    """Splash multiplies scores by nothing."""
    return (q_BHTK.astype(jnp.float32) * scale).astype(q_BHTK.dtype)


def _make(q_BHTK: Array, keys: Keys, causal: bool, interpret: bool) -> splash.SplashAttentionKernel:
    """The kernel for a source, of one row."""
    (_, H, T, _), S = q_BHTK.shape, keys.k_BGSK.shape[2]
    mask = masks.CausalMask((T, S)) if causal else masks.FullMask((T, S))
    q_block, kv_block = (next(block for block in _BLOCKS if n % block == 0) for n in (T, S))
    blocks = splash.BlockSizes(
        block_q=q_block,
        block_kv=kv_block,
        block_kv_compute=kv_block,
        block_q_dkv=q_block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=kv_block,
        block_q_dq=q_block,
        block_kv_dq=kv_block,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=interpret,
    )


def _ids(q_BHTK: Array, keys: Keys) -> splash.SegmentIds | None:
    """Numbers of queries and keys, written out for each."""
    if keys.kv_ids_BS is None:
        return None
    rows, _, S, _ = keys.k_BGSK.shape
    of_queries = jnp.broadcast_to(keys.q_ids_BT, (rows, q_BHTK.shape[2]))
    return splash.SegmentIds(of_queries, jnp.broadcast_to(keys.kv_ids_BS, (rows, S)))


def _read(made: splash.SplashAttentionKernel, q_BHTK: Array, keys: Keys) -> Partial:
    """The partial over one source."""
    (B, *_), rows = q_BHTK.shape, keys.k_BGSK.shape[0]
    o, (lse,) = jax.vmap(made)(q_BHTK[B - rows :], keys.k_BGSK, keys.v_BGSK, _ids(q_BHTK, keys))
    before = [(B - rows, 0)]
    return Partial(
        jnp.pad(o.astype(jnp.float32), before + [(0, 0)] * 3),
        jnp.pad(lse, before + [(0, 0)] * 2, constant_values=-jnp.inf),
    )


def _gradients(
    made: splash.SplashAttentionKernel, q_BHTK: Array, keys: Keys, o_BHTK: Array, lse_BHT: Array, do_BHTK: Array
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv) of one source from the merged output and log-sum-exp."""
    (B, *_), rows = q_BHTK.shape, keys.k_BGSK.shape[0]
    options = {"save_residuals": False, **{name: made.kwargs[name] for name in _BACKWARD.split(", ")[1:-2]}}

    def of_row(q: Array, k: Array, v: Array, ids: splash.SegmentIds | None, o: Array, lse: Array, do: Array):
        saved = (q, k, v, ids, None, o, lse, made.dq_mask_info, made.dkv_mask_info)
        return splash._splash_attention_bwd(**options, res=saved, do=do)[3:6]

    mine = lambda x: x[B - rows :]
    arrays = mine(q_BHTK), keys.k_BGSK, keys.v_BGSK, _ids(q_BHTK, keys), *map(mine, (o_BHTK, lse_BHT, do_BHTK))
    dq, dk, dv = jax.vmap(of_row)(*arrays)
    return jnp.pad(dq, [(B - rows, 0)] + [(0, 0)] * 3), dk, dv
