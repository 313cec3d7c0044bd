"""Inputs of any length: windowed prefill, and generation that spills the open window into memory.

A prompt of n tokens with `last_context_length` c: its first max(n - c, 0) tokens go through the model in windows of
W, each window's keys and values entering memory after it; the last c tokens are the open window, to which generation
appends.
"""

from __future__ import annotations

import dataclasses
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
        raise ValueError(
            f"tokens have shape {tokens_BT.shape}, dtype {tokens_BT.dtype}; wanted integers [B, T], none of them empty"
        )
    c = config.last_context_length if last_context_length is None else last_context_length
    if not isinstance(c, (int, np.integer)) or not 1 <= c <= config.window:
        raise ValueError(f"last_context_length is {c}; wanted 1..{config.window} (the window)")
    mask_BT = np.ones(tokens_BT.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask_BT.shape != tokens_BT.shape:
        raise ValueError(f"attention_mask has shape {mask_BT.shape}; wanted that of the tokens, {tokens_BT.shape}")
    outside_BT = mask_BT & ((tokens_BT < 0) | (tokens_BT >= config.vocab_size))
    if outside_BT.any():
        raise ValueError(f"token {tokens_BT[outside_BT][0]} is outside the model's vocabulary of {config.vocab_size}")
    return np.where(mask_BT, tokens_BT, 0).astype(np.int32), mask_BT, c


def _memory_layers(config: ModelConfig, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(arrays[layer] for layer in config.mem_layers)


def remember(
    config: ModelConfig, mem: memories.Cache, keys: tuple, values: tuple, valid_BT: Array | None
) -> memories.Cache:
    """Memory with a window's keys and values (one array for each of the model's layers) behind what it holds;
    padding is left out.
    """
    keys, values = _memory_layers(config, keys), _memory_layers(config, values)
    if valid_BT is None:
        return memories.append(mem, keys, values)
    both = memories.compact((*keys, *values), valid_BT)
    return memories.append(mem, both[: len(keys)], both[len(keys) :], jnp.sum(valid_BT, axis=1, dtype=jnp.int32))


def prefill_window(
    config: ModelConfig,
    params: Any,
    tokens_BT: Array,
    valid_BT: Array,
    mem: memories.Cache,
    *,
    reading: memories.Reading = memories.DENSE,
    with_logits: bool = False,
) -> tuple[memories.Cache, Array | None]:
    """One whole window through the model and into memory.

    Args:
        tokens_BT: int32 [B, W].
        valid_BT: bool; padding is seen by nobody and does not enter memory.
        mem: see `init_memory`.
        reading: how memory is read.
        with_logits: whether to compute logits.

    Returns:
        Memory with the window in it; logits float32 [B, W, V], or None.
    """
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    out = model.logits(config, params, hidden) if with_logits else None
    return remember(config, mem, keys, values, valid_BT), out


# In place where nobody needs the memory before; differentiation does (see memory.dense for how far it goes).
_STATIC = ("config", "reading", "with_logits")
_prefill_in_place = jax.jit(prefill_window, static_argnames=_STATIC, donate_argnames=("mem",))
_prefill_kept = jax.jit(prefill_window, static_argnames=_STATIC)


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
        mem, logits = _prefill_kept(config, params, *window, mem, reading=reading, with_logits=True)
        out.append(logits[:, :size])
    out.append(_open_window_logits(config, params, tokens_BT[:, prefix:], mask_BT[:, prefix:], mem, reading=reading))
    return jnp.concatenate(out, axis=1)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits_BV", "ended_B", "local", "mem"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Reader:
    """What has been read: everything that the next token depends on.

    Attributes:
        logits_BV: float32, scores of the next token.
        ended_B: bool, rows that are over.
        local: the open window, all layers.
        mem: memory before it.
    """

    logits_BV: Array
    ended_B: Array
    local: memories.Cache
    mem: memories.Cache


def prefill(
    config: ModelConfig,
    params: Any,
    tokens_BT: Any,
    last_context_length: int | None = None,
    attention_mask: Any = None,
    memory: str = "dense",
    k: int | None = None,
    room: int = 0,
    memory_capacity: int | None = None,
) -> Reader:
    """Reads prompts of any length; see `generate` for the arguments.

    Args:
        room: new tokens to make room for in memory.
        memory_capacity: slots of memory to allocate, rounded up to whole windows; what the prompt and `room` can need,
            by default.

    Raises:
        ValueError: input that does not fit; prompt and new tokens beyond `memory_capacity`.
    """
    tokens_BT, mask_BT, c = _check_tokens(config, tokens_BT, last_context_length, attention_mask)
    reading = memories.Reading(memory, k)
    length_B = mask_BT.sum(1)
    if not length_B.all():
        raise ValueError(f"row {int(np.argmin(length_B))} of the prompt has no token; wanted at least 1")
    W, B = config.window, len(tokens_BT)
    needed = int(length_B.max()) + room  # what memory can come to hold: all of the prompt and of the new tokens
    if memory_capacity is not None and config.mem_layers and memory_capacity < needed:
        raise ValueError(
            f"prompt of {length_B.max()} tokens and {room} new ones need a memory of {needed} slots; "
            f"memory_capacity is {memory_capacity}"
        )
    # Whole windows, because a prefill window is written whole.
    mem = memories.init_memory(config, B, -(-(memory_capacity or needed) // W) * W)

    # Rows flush left, so that column j of a row is its token j.
    order = np.argsort(~mask_BT, axis=1, kind="stable")
    tokens_BT = np.take_along_axis(tokens_BT, order, axis=1)
    prefix_B = np.maximum(length_B - c, 0)
    for start in range(0, prefix_B.max() if config.mem_layers else 0, W):  # nobody else sees what is behind the window
        window = _columns(tokens_BT, np.full(B, start), W)
        mem, _ = _prefill_in_place(
            config, params, window, start + np.arange(W) < prefix_B[:, None], mem, reading=reading
        )
    opened = _columns(tokens_BT, prefix_B, min(c, tokens_BT.shape[1]))
    return _open(config, params, opened, (length_B - prefix_B).astype(np.int32), mem, reading=reading)


def _columns(tokens_BT: np.ndarray, start_B: np.ndarray, size: int) -> np.ndarray:
    """[B, size]: `size` tokens of each row from its own start on; any token beyond its end."""
    columns = np.minimum(start_B[:, None] + np.arange(size), tokens_BT.shape[1] - 1)
    return np.take_along_axis(tokens_BT, columns, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "reading"), donate_argnames=("mem",))
def _open(config, params, tokens_BT, count_B, mem, *, reading) -> Reader:
    """Reads the open window: the first count_B tokens of each row of [B, <= W]."""
    B, T = tokens_BT.shape
    valid_BT = jnp.arange(T)[None, :] < count_B[:, None]
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    local = memories.init_cache(config, B, config.n_layers, config.window, config.dtypes.compute)
    local = memories.append(local, keys, values, count_B)
    last_B1D = jnp.take_along_axis(hidden, (count_B - 1)[:, None, None], axis=1)
    return Reader(model.logits(config, params, last_B1D)[:, 0], jnp.zeros((B,), bool), local, mem)


def make_room(
    config: ModelConfig, local: memories.Cache, mem: memories.Cache, spill: str
) -> tuple[memories.Cache, memories.Cache]:
    """The open window and memory, with room in the window for one more token in every row.

    Rows whose window is full spill: all of it ("block"), or its oldest eighth ("sliding").
    """
    size = local.capacity if spill == "block" else max(1, local.capacity // 8)
    count_B = jnp.where(local.length_B >= local.capacity, size, 0)
    oldest = lambda arrays: tuple(x[..., :size] for x in _memory_layers(config, arrays))
    room = lambda mem: memories.append(mem, oldest(local.keys), oldest(local.values), count_B)
    full = jnp.any(count_B > 0)
    mem = jax.lax.cond(full, room, lambda mem: mem, mem)
    if spill == "block":  # nothing stays, so nothing moves up
        return dataclasses.replace(local, length_B=local.length_B - count_B), mem
    return jax.lax.cond(full, lambda cache: memories.evict_oldest(cache, count_B), lambda cache: cache, local), mem


def decode(
    config: ModelConfig,
    params: Any,
    reader: Reader,
    temperature: Array,
    key: Array,
    *,
    max_new_tokens: int,
    sample: bool = False,
    spill: str = "block",
    reading: memories.Reading = memories.DENSE,
) -> tuple[Array, Reader]:
    """New tokens, one after another, and what has been read then; one compiled loop.

    Every token is read as soon as it is chosen, so that the reader returned goes on where this one ends.

    Args:
        reader: donated.
        temperature: float32 scalar, used where `sample`.
        key: random key, used where `sample`.

    Returns:
        int32 [B, max_new_tokens], padded after the eos; the reader after the last of them.

    Raises:
        ValueError: memory has no room for what the window and the new tokens can spill.
    """
    needed = int(jnp.max(reader.mem.length_B + reader.local.length_B)) + max_new_tokens
    if config.mem_layers and needed > reader.mem.capacity:
        raise ValueError(
            f"what was read and {max_new_tokens} new tokens need a memory of {needed} slots; it has "
            f"{reader.mem.capacity} (prefill's `room`)"
        )
    options = dict(max_new_tokens=max_new_tokens, sample=sample, spill=spill, reading=reading)
    return _decode(config, params, reader, temperature, key, **options)


@functools.partial(
    jax.jit,
    static_argnames=("config", "max_new_tokens", "sample", "spill", "reading"),
    donate_argnames=("reader",),
)
def _decode(config, params, reader, temperature, key, *, max_new_tokens, sample, spill, reading):
    blocks = model.layers(config, params)
    pad = jnp.int32(next((i for i in (config.pad_id, config.eos_id) if i is not None), 0))

    def more(carry):
        step, _, _, reader, _ = carry
        return (step < max_new_tokens) & ~jnp.all(reader.ended_B)

    def one(carry):
        step, out_BN, key, reader, rotated = carry
        key, now = jax.random.split(key)
        if sample:
            token_B = jax.random.categorical(now, reader.logits_BV / temperature).astype(jnp.int32)
        else:
            token_B = jnp.argmax(reader.logits_BV, axis=-1).astype(jnp.int32)
        token_B = jnp.where(reader.ended_B, pad, token_B)
        ended_B = reader.ended_B if config.eos_id is None else reader.ended_B | (token_B == config.eos_id)
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1)
        local, mem = make_room(config, reader.local, reader.mem, spill)
        if spill == "sliding":  # tokens that moved up are at other positions; after a block no token is left
            moved = jnp.any(local.length_B < reader.local.length_B)
            rotated = jax.lax.cond(moved, lambda: model.rotated_keys(config, local), lambda: rotated)
        hidden, local, rotated = model.extend_window(
            config, params, token_B[:, None], mem=mem, local=local, rotated=rotated, reading=reading, blocks=blocks
        )
        reader = Reader(model.logits(config, params, hidden)[:, 0], ended_B, local, mem)
        return step + 1, out_BN, key, reader, rotated

    out_BN = jnp.full((reader.ended_B.shape[0], max_new_tokens), pad)
    start = jnp.int32(0), out_BN, key, reader, model.rotated_keys(config, reader.local)
    _, out_BN, _, reader, _ = jax.lax.while_loop(more, one, start)
    return out_BN, reader


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
        spill: what happens when the open window is full. "block": all of it enters memory and the next token starts
            a window (the published code). "sliding": the oldest eighth enters memory, so that the other layers keep
            seeing most of W.
        memory: "dense" or "topk".
        k: slots a query retrieves, for "topk".
        key: random key, needed when temperature > 0.
        memory_capacity: slots of memory to allocate, rounded up to whole windows; what the prompt and N new tokens can
            need, by default.

    Returns:
        int32 [B, N]: new tokens only. After `config.eos_id` a row is filled with `config.pad_id`; without an eos it
        never stops.

    Raises:
        ValueError: input that does not fit; prompt and new tokens beyond `memory_capacity`.
    """
    if spill not in SPILLS:
        raise ValueError(f"spill is {spill!r}; wanted one of {', '.join(SPILLS)}")
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; wanted at least 1")
    if temperature < 0 or (temperature > 0 and key is None):
        raise ValueError(
            f"temperature is {temperature} and key {key}; wanted temperature >= 0, and a key where it is above 0"
        )
    reader = prefill(
        config, params, tokens_BT, last_context_length, attention_mask, memory, k, max_new_tokens, memory_capacity
    )
    return decode(
        config,
        params,
        reader,
        jnp.float32(temperature or 1.0),
        jax.random.key(0) if key is None else key,
        max_new_tokens=max_new_tokens,
        sample=temperature > 0,
        spill=spill,
        reading=memories.Reading(memory, k),
    )[0]
