"""The training loss: cross entropy of the next token, its head taken some tokens at a time."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from fot_jax import crossbatch, model, sharding
from fot_jax.config import ModelConfig

Array = jax.Array
PyTree = Any
LOGIT_BYTES = 2**27  # of logits at a time, where no gradient is wanted
Batch = dict[str, Any]


def head_sums(
    config: ModelConfig, params: PyTree, hidden_BTD: Array, targets_BT: Array, mask_BT: Array
) -> tuple[Array, Array]:
    """Cross entropy summed over unmasked tokens, and how many of them have the target as the highest logit; float32."""
    loss_BT, right_BT = cross_entropy(model.logits(config, params, hidden_BTD), targets_BT)
    return jnp.where(mask_BT, loss_BT, 0.0).sum(), (mask_BT & right_BT).sum(dtype=jnp.float32)


@jax.custom_vjp
def cross_entropy(logits_BTV: Array, targets_BT: Array) -> tuple[Array, Array]:
    """-log softmax(logits)[target], and whether the target's logit is the highest, [B, T].

    The gradient, softmax(logits) - one_hot(target), is written out: autodiff would scatter the target's part.
    """
    return _cross_entropy_forward(logits_BTV, targets_BT)[0]


def token_losses(config: ModelConfig, params: PyTree, hidden_BTD: Array, targets_BT: Array) -> tuple[Array, Array]:
    """`cross_entropy` of the logits of some tokens at a time, `LOGIT_BYTES` of them or one of every row."""
    T = targets_BT.shape[1]
    chunks = _chunks(LOGIT_BYTES // (4 * config.vocab_size), hidden_BTD, targets_BT)
    found = jax.lax.map(lambda x: cross_entropy(model.logits(config, params, x[0]), x[1]), chunks)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :T] for x in found)


def _cross_entropy_forward(logits_BTV, targets_BT):
    highest_BT = logits_BTV.max(axis=-1)
    lse_BT = jnp.log(jnp.exp(logits_BTV - highest_BT[..., None]).sum(axis=-1)) + highest_BT
    target_BT = jnp.where(_is_target(logits_BTV, targets_BT), logits_BTV, 0.0).sum(axis=-1)
    known_BT = (targets_BT >= 0) & (targets_BT < logits_BTV.shape[-1])
    target_BT = jnp.where(known_BT, target_BT, jnp.nan)  # a token beyond the vocabulary stops training
    return (lse_BT - target_BT, target_BT >= highest_BT), (logits_BTV, lse_BT, targets_BT)


def _cross_entropy_backward(saved, cotangents):
    logits_BTV, lse_BT, targets_BT = saved
    softmax_BTV = jnp.exp(logits_BTV - lse_BT[..., None])
    return (softmax_BTV - _is_target(logits_BTV, targets_BT)) * cotangents[0][..., None], None


def _is_target(logits_BTV: Array, targets_BT: Array) -> Array:
    return jnp.arange(logits_BTV.shape[-1], dtype=jnp.int32)[None, None, :] == targets_BT[..., None]


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_head_sums(
    config: ModelConfig, chunk: int, params: PyTree, hidden_BTD: Array, targets_BT: Array, mask_BT: Array
) -> tuple[Array, Array]:
    """`head_sums` over `chunk` tokens at a time, so that logits of no more than that exist, or of one token of every
    row, forward and backward.

    The gradient is taken chunk by chunk in the forward pass, while the chunk's logits are there: nothing is recomputed.
    Chunks are cut along time: every chunk has all rows, and keeps their sharding.
    """
    chunks, params = _chunks(chunk, hidden_BTD, targets_BT, mask_BT), _gathered(params, hidden_BTD.dtype)
    sums = jax.lax.map(lambda arrays: head_sums(config, params, *arrays), chunks)
    return sums[0].sum(), sums[1].sum()


def _gathered(params: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
    """The head's parameters as products take them: gathered once for all chunks."""
    return sharding.constrain_params(jax.tree.map(lambda x: x.astype(dtype), params), gather=True)


def _chunks(chunk: int, *arrays: Array) -> tuple[Array, ...]:
    B, T = arrays[0].shape[:2]
    size = min(T, max(1, chunk // B))
    n = -(-T // size)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, n * size - T)) + ((0, 0),) * (x.ndim - 2))  # masked: zero is False
        return jnp.moveaxis(x.reshape(B, n, size, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _chunked_forward(config, chunk, params, hidden_BTD, targets_BT, mask_BT):
    B, T, D = hidden_BTD.shape
    # Each of W devices sums its own rows' gradient of the head over all chunks, and then one sum goes over devices.
    W = sharding.ways("batch")
    grad = jax.value_and_grad(functools.partial(head_sums, config), argnums=(0, 1), has_aux=True)
    grad = jax.vmap(grad, in_axes=(None, 0, 0, 0))

    def body(total, arrays):
        by_device = [x.reshape(W, B // W, *x.shape[1:]) for x in arrays]
        (loss_W, right_W), (params_grad, hidden_grad) = grad(whole, *by_device)
        total = jax.tree.map(jnp.add, total, (loss_W, right_W, params_grad))
        total = (*total[:2], sharding.constrain_params(total[2], "batch", gather=True))
        return total, hidden_grad.reshape(arrays[0].shape)

    whole, chunks = _gathered(params, hidden_BTD.dtype), _chunks(chunk, hidden_BTD, targets_BT, mask_BT)
    zero = jax.tree.map(lambda x: jnp.zeros((W, *x.shape), x.dtype), (jnp.float32(0), jnp.float32(0), params))
    (loss_W, right_W, params_grad), hidden_grad = jax.lax.scan(body, zero, chunks)
    params_grad = sharding.constrain_params(jax.tree.map(lambda x: x.sum(axis=0), params_grad))
    hidden_grad = jnp.moveaxis(hidden_grad, 0, 1).reshape(B, -1, D)[:, :T]
    return (loss_W.sum(), right_W.sum()), (params_grad, hidden_grad)


def _chunked_backward(config, chunk, grads, cotangents):
    params_grad, hidden_grad = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), grads)
    return params_grad, hidden_grad, None, None


chunked_head_sums.defvjp(_chunked_forward, _chunked_backward)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What the loss does besides the model; see `default_config`."""

    loss_chunk: int = 0
    remat: str = "none"
    unroll: bool = False
    separate: str = "padding"
    loss_on_previous: bool = True
    kernel: str = "auto"
    execution: str = "auto"


def loss_sums(
    config: ModelConfig, options: LossOptions, plan: crossbatch.Plan | None, params: PyTree, batch: Batch
) -> tuple[Array, dict[str, Array]]:
    """Summed cross entropy of a microbatch, with {'tokens', 'right'}: float32 scalars.

    Args:
        batch: tokens, targets, segment_ids int32 [B, T]; loss_mask bool [B, T].
    """
    mask_BT, segments_BT = batch["loss_mask"], batch["segment_ids"]
    if plan is not None and not options.loss_on_previous:
        mask_BT = mask_BT & crossbatch.loss_rows(plan, False)[:, None]
    if options.separate != "documents":
        segments_BT = (segments_BT > 0).astype(jnp.int32) if options.separate == "padding" else None
    hidden_BTD = model.forward(
        config,
        params,
        batch["tokens"],
        plan=plan,
        segment_ids_BT=segments_BT,
        remat=options.remat,
        unroll=options.unroll,
        kernel=options.kernel,
        execution=options.execution,
    )
    key = "embed" if config.tie_embeddings else "head"
    hidden_BTD, head = model.in_turn(hidden_BTD, {key: params[key]})
    arguments = (head, hidden_BTD, batch["targets"], mask_BT)
    if 0 < options.loss_chunk < mask_BT.size:
        loss, right = chunked_head_sums(config, options.loss_chunk, *arguments)
    else:
        loss, right = head_sums(config, *arguments)
    return loss, {"tokens": mask_BT.sum(dtype=jnp.float32), "right": right}
