"""Inputs of any length: windowed prefill, and generation that spills the open window into memory.

A prompt of n tokens with `last_context_length` c: its first max(n - c, 0) tokens go through the model in windows of W, each
window's keys and values entering memory after it; the last c tokens are the open window, to which generation appends.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import memory as memories
from fot_jax import model
from fot_jax.config import ModelConfig

Array = jax.Array

SPILLS = ("block", "sliding")


def _check_tokens(config: ModelConfig, tokens_BT: Any, last_context_length: int | None, attention_mask: Any) -> tuple:
    """(tokens int32 [B, T], mask bool [B, T], c), or an error that names what is wrong."""
    tokens_BT = np.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or not np.issubdtype(tokens_BT.dtype, np.integer) or not tokens_BT.size:
        raise ValueError(f"tokens have shape {tokens_BT.shape}, dtype {tokens_BT.dtype}; wanted integers [B, T], none of them empty")
    if tokens_BT.min() < 0 or tokens_BT.max() >= config.vocab_size:
        worst = tokens_BT.min() if tokens_BT.min() < 0 else tokens_BT.max()
        raise ValueError(f"token {worst} is outside the model's vocabulary of {config.vocab_size}")
    c = config.last_context_length if last_context_length is None else last_context_length
    if not 1 <= c <= config.window:
        raise ValueError(f"last_context_length is {c}; wanted 1..{config.window} (the window)")
    mask_BT = np.ones(tokens_BT.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask_BT.shape != tokens_BT.shape:
        raise ValueError(f"attention_mask has shape {mask_BT.shape}; wanted that of the tokens, {tokens_BT.shape}")
    return tokens_BT.astype(np.int32), mask_BT, c


def _memory_layers(config: ModelConfig, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(arrays[layer] for layer in config.mem_layers)


def remember(config: ModelConfig, mem: memories.Cache, keys: tuple, values: tuple, valid_BT: Array | None) -> memories.Cache:
    """Memory with a window's keys and values (one array for each of the model's layers) behind what it holds; padding is left out."""
    keys, values = _memory_layers(config, keys), _memory_layers(config, values)
    if valid_BT is None:
        return memories.append(mem, keys, values)
    both = memories.compact((*keys, *values), valid_BT)
    return memories.append(mem, both[: len(keys)], both[len(keys) :], jnp.sum(valid_BT, axis=1, dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "reading", "with_logits"), donate_argnames=("mem",))
def prefill_window(
    config: ModelConfig,
    params: Any,
    tokens_BT: Array,
    valid_BT: Array,
    mem: memories.Cache,
    *,
    reading: memories.Reading = memories.Reading(),
    with_logits: bool = False,
) -> tuple[memories.Cache, Array | None]:
    """One whole window through the model and into memory.

    Args:
        tokens_BT: int32 [B, W].
        valid_BT: bool; padding is seen by nobody and does not enter memory.
        mem: donated.
        reading: how memory is read.
        with_logits: whether to compute logits.

    Returns:
        Memory with the window in it; logits float32 [B, W, V], or None.
    """
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    out = model.logits(config, params, hidden) if with_logits else None
    return remember(config, mem, keys, values, valid_BT), out


@functools.partial(jax.jit, static_argnames=("config", "reading"))
def _open_window_logits(config, params, tokens_BT, valid_BT, mem, *, reading):
    hidden, _, _ = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    return model.logits(config, params, hidden)


def long_forward(
    config: ModelConfig,
    params: Any,
    tokens_BT: Any,
    last_context_length: int | None = None,
    attention_mask: Any = None,
    memory: str = "dense",
    k: int | None = None,
) -> Array:
    """Logits at every position of inputs of any length, windows cut by column as the published code does.

    Args:
        config, params: the model.
        tokens_BT: integers [B, T], T any length.
        last_context_length: c, tokens of the last window, 1..W; the config's by default.
        attention_mask: [B, T], 0 or False for padding. Columns count as positions, padding or not.
        memory: "dense" or "topk".
        k: slots a query retrieves, for "topk".

    Returns:
        float32 [B, T, V]; at padding, unspecified numbers.

    Raises:
        ValueError: input that does not fit; see the message.
    """
    tokens_BT, mask_BT, c = _check_tokens(config, tokens_BT, last_context_length, attention_mask)
    reading = memories.Reading(memory, k)
    (B, T), W = tokens_BT.shape, config.window
    prefix = max(T - c, 0)
    mem = memories.init_memory(config, B, -(-prefix // W) * W)
    out = []
    for start in range(0, prefix, W):
        columns = slice(start, min(start + W, prefix))
        size = columns.stop - columns.start
        pad = ((0, 0), (0, W - size))
        window = np.pad(tokens_BT[:, columns], pad), np.pad(mask_BT[:, columns], pad)
        mem, logits = prefill_window(config, params, *window, mem, reading=reading, with_logits=True)
        out.append(logits[:, :size])
    out.append(_open_window_logits(config, params, tokens_BT[:, prefix:], mask_BT[:, prefix:], mem, reading=reading))
    return jnp.concatenate(out, axis=1)


def generate(
    config: ModelConfig,
    params: Any,
    tokens_BT: Any,
    max_new_tokens: int,
    temperature: float = 0.0,
    last_context_length: int | None = None,
    attention_mask: Any = None,
    spill: str = "block",
    memory: str = "dense",
    k: int | None = None,
    key: Array | None = None,
    memory_capacity: int | None = None,
) -> Array:
    """New tokens after prompts of any length.

    Each row is cut into windows by its own length, so that a padded row gives what the row alone gives.

    Args:
        config, params: the model.
        tokens_BT: integers [B, T], prompts; shorter ones padded, at the left as a rule.
        max_new_tokens: N.
        temperature: 0 takes the likeliest token; else one is drawn from softmax(logits / temperature).
        last_context_length: c, tokens of the prompt left in the open window, 1..W; the config's by default.
        attention_mask: [B, T], 0 or False for padding.
        spill: what happens when the open window is full. "block": all of it enters memory and the next token starts a window
            (the published code). "sliding": the oldest eighth enters memory, so that the other layers keep seeing most of W.
        memory: "dense" or "topk".
        k: slots a query retrieves, for "topk".
        key: random key, needed when temperature > 0.
        memory_capacity: slots of memory to allocate; what the prompt and N new tokens can need, by default.

    Returns:
        int32 [B, N]: new tokens only. After `config.eos_id` a row is filled with `config.pad_id`; without an eos it never stops.

    Raises:
        ValueError: input that does not fit; prompt and new tokens beyond `memory_capacity`.
    """
    tokens_BT, mask_BT, c = _check_tokens(config, tokens_BT, last_context_length, attention_mask)
    reading = memories.Reading(memory, k)
    if spill not in SPILLS:
        raise ValueError(f"spill is {spill!r}; wanted one of {', '.join(SPILLS)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; wanted at least 1")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(f"temperature is {temperature} and key {key}; wanted temperature >= 0, and a key where it is above 0")
    length_B = mask_BT.sum(1)
    if not length_B.all():
        raise ValueError(f"row {int(np.argmin(length_B))} of the prompt has no token; wanted at least 1")
    W, B = config.window, len(tokens_BT)
    # What memory can come to hold: whole windows, so all of the prompt and of the new tokens, to a window's multiple.
    needed = -(-(int(length_B.max()) + max_new_tokens) // W) * W
    if memory_capacity is not None and config.mem_layers and memory_capacity < needed:
        raise ValueError(
            f"prompt of {length_B.max()} tokens and {max_new_tokens} new ones need a memory of {needed} slots; "
            f"memory_capacity is {memory_capacity}"
        )
    mem = memories.init_memory(config, B, memory_capacity or needed)

    # Rows flush left, so that column j of a row is its token j.
    order = np.argsort(~mask_BT, axis=1, kind="stable")
    tokens_BT = np.take_along_axis(tokens_BT, order, axis=1)
    prefix_B = np.maximum(length_B - c, 0)
    for start in range(0, prefix_B.max(), W):
        window = _columns(tokens_BT, np.full(B, start), W)
        mem, _ = prefill_window(config, params, window, start + np.arange(W) < prefix_B[:, None], mem, reading=reading)
    opened = _columns(tokens_BT, prefix_B, min(c, tokens_BT.shape[1]))
    options = dict(max_new_tokens=max_new_tokens, sample=temperature > 0, spill=spill, reading=reading)
    count_B = (length_B - prefix_B).astype(np.int32)
    key = jax.random.key(0) if key is None else key
    return _decode(config, params, opened, count_B, mem, jnp.float32(temperature or 1.0), key, **options)[0]


def _columns(tokens_BT: np.ndarray, start_B: np.ndarray, size: int) -> np.ndarray:
    """[B, size]: `size` tokens of each row from its own start on; any token beyond its end."""
    columns = np.minimum(start_B[:, None] + np.arange(size), tokens_BT.shape[1] - 1)
    return np.take_along_axis(tokens_BT, columns, axis=1)


def make_room(
    config: ModelConfig, local: memories.Cache, mem: memories.Cache, spill: str
) -> tuple[memories.Cache, memories.Cache]:
    """The open window and memory, with room in the window for one more token in every row.

    Rows whose window is full spill: all of it ("block"), or its oldest eighth ("sliding").
    """
    size = local.capacity if spill == "block" else max(1, local.capacity // 8)

    def do_spill(caches: tuple[memories.Cache, memories.Cache]) -> tuple[memories.Cache, memories.Cache]:
        local, mem = caches
        count_B = jnp.where(local.length_B >= local.capacity, size, 0)
        oldest = lambda arrays: tuple(x[:, :, :size] for x in _memory_layers(config, arrays))
        mem = memories.append(mem, oldest(local.keys), oldest(local.values), count_B)
        return memories.evict_oldest(local, count_B), mem

    return jax.lax.cond(jnp.any(local.length_B >= local.capacity), do_spill, lambda caches: caches, (local, mem))


@functools.partial(
    jax.jit, static_argnames=("config", "max_new_tokens", "sample", "spill", "reading"), donate_argnames=("mem",)
)
def _decode(config, params, tokens_BT, count_B, mem, temperature, key, *, max_new_tokens, sample, spill, reading):
    """The open window's tokens [B, <= W], of which each row has count_B, then the loop over new tokens: those, and memory."""
    B, T = tokens_BT.shape
    valid_BT = jnp.arange(T)[None, :] < count_B[:, None]
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    local = memories.init_cache(config, B, config.n_layers, config.window, config.dtypes.compute)
    local = memories.append(local, keys, values, count_B)
    last_B1D = jnp.take_along_axis(hidden, (count_B - 1)[:, None, None], axis=1)
    pad = jnp.int32(next((i for i in (config.pad_id, config.eos_id) if i is not None), 0))

    def choose(hidden_B1D, key):
        logits_BV = model.logits(config, params, hidden_B1D)[:, 0]
        if not sample:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)

    def more(carry):
        step, _, _, ended_B, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(ended_B)

    def put(out_BN, step, token_B, ended_B):
        token_B = jnp.where(ended_B, pad, token_B)
        ended_B = ended_B | (token_B == config.eos_id) if config.eos_id is not None else ended_B
        return jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1), token_B, ended_B

    def one(carry):
        step, out_BN, token_B, ended_B, key, local, mem = carry
        key, now = jax.random.split(key)
        local, mem = make_room(config, local, mem, spill)
        hidden, keys, values = model.read_window(config, params, token_B[:, None], mem=mem, local=local, reading=reading)
        local = memories.append(local, keys, values)
        return step + 1, *put(out_BN, step, choose(hidden, now), ended_B), key, local, mem

    out_BN = jnp.full((B, max_new_tokens), pad)
    key, now = jax.random.split(key)
    first = put(out_BN, 0, choose(last_B1D, now), jnp.zeros((B,), bool))
    carry = jax.lax.while_loop(more, one, (jnp.int32(1), *first, key, local, mem))
    return carry[1], carry[-1]  # memory goes back only so that its donated buffers serve the loop
