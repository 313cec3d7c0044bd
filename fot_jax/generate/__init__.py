"""Inputs of any length: windowed prefill, and generation that spills the open window into memory.

A prompt of n tokens with `last_context_length` c: its first max(n - c, 0) tokens go through the model in windows of
W, each window's keys and values entering memory after it; the last c tokens are the open window, to which generation
appends.

No program depends on how long a prompt is, how full memory, or how few tokens are wanted: windows have one shape, the
open window's are powers of two, memory comes in powers of two of windows, decoding has room for 256 tokens or powers of
two above, and numbers are arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import memory as memories
from fot_jax import model, sharding
from fot_jax.config import ModelConfig
from fot_jax.generate import sampling as samplings
from fot_jax.generate.sampling import GREEDY, Sampling

Array = jax.Array

SPILLS = ("block", "sliding")
OPEN_TOKENS = 16  # least tokens of the open window read at a time; fewer cost no less
OPEN_BYTES = 2**29  # of scores within open windows, by which the tokens read at a time are bounded
OUT_TOKENS = 256  # least tokens that a decoding program has room for
# Memory allocated unless more is needed: 16 windows, if they are not very small or large.
MEMORY_WINDOWS, MEMORY_BYTES = 16, (16 * 2**20, 2**30)


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


def remember(
    mem: memories.Cache | memories.Pages, keys: tuple, values: tuple, valid_BT: Array | None
) -> memories.Cache | memories.Pages:
    """Memory with a window's keys and values (one array for each of its layers) behind what it holds; padding is left
    out.
    """
    if valid_BT is None:
        return memories.append(mem, keys, values)
    both = memories.compact((*keys, *values), valid_BT)
    return memories.append(mem, both[: len(keys)], both[len(keys) :], jnp.sum(valid_BT, axis=1, dtype=jnp.int32))


def prefill_window(
    config: ModelConfig,
    params: Any,
    tokens_BT: Array,
    valid_BT: Array,
    mem: memories.Cache | memories.Pages,
    *,
    reading: memories.Reading = memories.DENSE,
    with_logits: bool = False,
) -> tuple[memories.Cache | memories.Pages, Array | None]:
    """One whole window through the model and into memory.

    Args:
        tokens_BT: int32 [B, W].
        valid_BT: bool; padding is seen by nobody and does not enter memory.
        mem: see `memory.init_memory` and `memory.init_pages`.
        reading: how memory is read.
        with_logits: whether to compute logits.

    Returns:
        Memory with the window in it; logits float32 [B, W, V], or None.
    """
    hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem, valid_BT=valid_BT, reading=reading)
    out = model.logits(config, params, hidden) if with_logits else None
    return memories.constrain(remember(mem, keys, values, valid_BT)), out


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
        memory: "dense", "topk" or "approximate"; see `memory.Reading`.
        k: slots a query retrieves, but for "dense".

    Returns:
        float32 [B, T, V]; at padding, unspecified numbers.

    Raises:
        ValueError: input that does not fit; see the message.
    """
    tokens_BT, mask_BT, c = _check_tokens(config, tokens_BT, last_context_length, attention_mask)
    reading = memories.Reading(memory, k)
    (B, T), W = tokens_BT.shape, config.window
    prefix = max(T - c, 0)
    capacity = math.lcm(W, sharding.ways("memory"))
    mem = placed_with(params, memories.init_memory(config, B, -(-prefix // capacity) * capacity))
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
    jax.tree_util.register_dataclass,
    data_fields=["logits_BV", "seen_BV", "ended_B", "length_B", "local", "mem"],
    meta_fields=["shared"],
)
@dataclasses.dataclass(frozen=True)
class Reader:
    """What has been read: everything that the next token depends on.

    Attributes:
        logits_BV: float32, scores of the next token.
        seen_BV: bool, tokens that were read, for the repetition penalty.
        ended_B: bool, rows that are over.
        length_B: int32, tokens read.
        local: the open window, all layers.
        mem: memory before it.
        shared: whether it belongs to other readers too (`branches.branched`): it is only read, and may have fewer rows,
            of which each is read by as many rows as come on it.
    """

    logits_BV: Array
    seen_BV: Array
    ended_B: Array
    length_B: Array
    local: memories.Cache
    mem: memories.Pages
    shared: bool = False


def memory_tokens(config: ModelConfig, rows: int, needed: int) -> int:
    """Slots of memory to allocate for each row where `needed` can be filled: a power of two of windows, so that inputs
    of many lengths share a program; at least 16 windows, or what 16 MiB hold of very small ones, or 1 GiB of large.
    """
    window_bytes = max(memories.token_bytes(config), 1) * rows * config.window
    least = int(np.clip(MEMORY_WINDOWS * window_bytes, *MEMORY_BYTES)) // window_bytes
    rounded_down = memories.power_of_two(least + 1) // 2
    return config.window * max(memories.power_of_two(-(-needed // config.window)), rounded_down)


def new_reader(config: ModelConfig, rows: int, memory_capacity: int, values_on_host: bool = False) -> Reader:
    """A reader that has read nothing, with room for `memory_capacity` tokens a row in memory, rounded up to whole
    windows. For `values_on_host` see `memory.init_memory`.
    """
    zeros = lambda dtype, *shape: jnp.zeros((rows, *shape), dtype)
    return Reader(
        logits_BV=zeros(jnp.float32, config.vocab_size),
        seen_BV=zeros(bool, config.vocab_size),
        ended_B=zeros(bool),
        length_B=zeros(jnp.int32),
        local=memories.init_cache(config, rows, config.n_layers, config.window, config.dtypes.compute),
        mem=memories.init_pages(config, rows, memory_capacity, values_on_host),
    )


def placed_with(params: Any, tree: Any) -> Any:
    """Arrays on the devices that parameters were put on, or dealt out on the mesh of `jax.set_mesh`: programs would
    otherwise be compiled twice, for arrays that may be moved and for those that a program returned.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return memories.place(tree)
    leaf = jax.tree.leaves(params)[0]
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
        return tree
    where = leaf.sharding
    if isinstance(where, jax.sharding.NamedSharding):
        where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(tree, jax.tree.map(lambda x: memories.of_kind(where, x), tree), donate=True)


def prefill(
    config: ModelConfig,
    params: Any,
    tokens_BT: Any,
    last_context_length: Any = None,
    attention_mask: Any = None,
    memory: str = "dense",
    k: int | None = None,
    room: int = 0,
    memory_capacity: int | None = None,
    score_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
    values_on_host: bool = False,
) -> Reader:
    """Reads prompts of any length; see `generate` for the arguments.

    Args:
        last_context_length: one for all rows, or integers [B].
        room: new tokens to make room for in memory.
        memory_capacity: slots of memory to allocate for each row, rounded up to whole windows; `memory_tokens` of what
            the prompt and `room` can need, by default.
        progress: called after every window with how many tokens were read in it, all rows together; waits for it.

    Raises:
        ValueError: input that does not fit; prompt and new tokens beyond `memory_capacity`.
    """
    c_B = np.asarray(config.last_context_length if last_context_length is None else last_context_length)
    for c in {c_B.min().item(), c_B.max().item()}:
        tokens_BT, mask_BT, _ = _check_tokens(config, tokens_BT, c, attention_mask)
    if c_B.shape not in ((), (len(tokens_BT),)):
        raise ValueError(
            f"last_context_length has shape {c_B.shape}; wanted one for all {len(tokens_BT)} rows, or each"
        )
    reading = memories.Reading(memory, k, score_bytes)
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
    capacity = memory_capacity or memory_tokens(config, B, needed)
    reader = placed_with(params, new_reader(config, B, capacity, values_on_host))

    tokens_BT = _flush_left(tokens_BT, mask_BT)
    prefix_B, mem = np.maximum(length_B - c_B, 0), reader.mem
    for start in range(0, prefix_B.max() if config.mem_layers else 0, W):  # nobody else sees what is behind the window
        window = _columns(tokens_BT, np.full(B, start), W)
        valid_BT = start + np.arange(W) < prefix_B[:, None]
        mem, _ = _prefill_in_place(config, params, window, valid_BT, mem, reading=reading)
        if progress is not None:
            jax.block_until_ready(mem)
            progress(int(valid_BT.sum()))
    seen_BV = np.zeros((B, config.vocab_size), bool)
    for b in range(B):
        seen_BV[b, tokens_BT[b, : prefix_B[b]]] = True
    read = placed_with(params, {"seen_BV": jnp.asarray(seen_BV), "length_B": jnp.asarray(prefix_B, jnp.int32)})
    reader = dataclasses.replace(reader, mem=mem, **read)
    return _extend_rows(config, params, reader, tokens_BT, prefix_B, length_B, "block", reading, progress)[0]


def extend(
    config: ModelConfig,
    params: Any,
    reader: Reader,
    tokens_BT: Any,
    attention_mask: Any = None,
    spill: str = "block",
    memory: str = "dense",
    k: int | None = None,
    score_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reader:
    """Reads more tokens after what has been read, as if they had been generated: the open window fills, and spills when
    it is full.

    Args:
        reader: donated.
        tokens_BT: integers [B, T], any T.
        attention_mask: [B, T], 0 or False for padding; a row may have no token and stays as it is.
        spill, memory, k, score_bytes: as for `generate`.
        progress: as for `prefill`.

    Returns:
        The reader after them; rows that read something are not over.

    Raises:
        ValueError: input that does not fit; memory without room.
    """
    reading = memories.Reading(memory, k, score_bytes)
    tokens_BT, mask_BT = _check_next(config, reader, tokens_BT, attention_mask, spill)
    count_B = mask_BT.sum(1)
    given = _flush_left(tokens_BT, mask_BT), np.zeros_like(count_B), count_B
    return _extend_rows(config, params, reader, *given, spill, reading, progress)[0]


def _check_next(
    config: ModelConfig, reader: Reader, tokens_BT: Any, attention_mask: Any, spill: str
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, T], mask bool [B, T]) of what is to be read next, or an error that names what is wrong."""
    tokens_BT, mask_BT, _ = _check_tokens(config, tokens_BT, None, attention_mask)
    _check_spill(spill)
    _check_rows(reader, tokens_BT)
    _check_room(config, reader, mask_BT.sum(1))
    return tokens_BT, mask_BT


def _check_spill(spill: str) -> None:
    if spill not in SPILLS:
        raise ValueError(f"spill is {spill!r}; wanted one of {', '.join(SPILLS)}")


def _check_rows(reader: Reader, tokens_BT: np.ndarray) -> None:
    """Refuses tokens of other rows than what was read has."""
    if len(tokens_BT) != len(reader.length_B):
        raise ValueError(f"tokens have {len(tokens_BT)} rows; wanted the reader's {len(reader.length_B)}")


def _check_room(config: ModelConfig, reader: Reader, new_B: Any) -> None:
    """Refuses more tokens than memory could come to hold, or of rows that share one than the open window."""
    if reader.shared:
        room_B = reader.local.capacity - np.asarray(reader.local.length_B)
        if np.any(new_B > room_B):
            b = int(np.argmax(new_B - room_B))
            raise ValueError(
                f"{int(np.broadcast_to(new_B, room_B.shape)[b])} tokens follow in a window that has room for "
                f"{int(room_B[b])}, and rows that share a memory cannot spill into it: wanted fewer, or a smaller "
                f"last_context_length before them"
            )
        return
    needed = int(np.max(np.asarray(reader.mem.length_B) + np.asarray(reader.local.length_B) + new_B))
    if config.mem_layers and needed > reader.mem.capacity:
        raise ValueError(
            f"what was read and {int(np.max(new_B))} new tokens need a memory of {needed} slots; it has "
            f"{reader.mem.capacity} (memory_capacity, or prefill's `room`)"
        )


def _flush_left(tokens_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Tokens with each row's padding behind the others, so that column j of a row is its token j."""
    return np.take_along_axis(tokens_BT, np.argsort(~mask_BT, axis=1, kind="stable"), axis=1)


def _columns(tokens_BT: np.ndarray, start_B: np.ndarray, size: int) -> np.ndarray:
    """[B, size]: `size` tokens of each row from its own start on; any token beyond its end."""
    columns = np.minimum(start_B[:, None] + np.arange(size), tokens_BT.shape[1] - 1)
    return np.take_along_axis(tokens_BT, columns, axis=1)


def _most_tokens(config: ModelConfig, rows: int) -> int:
    """Tokens of each row that an open window takes at a time, by `OPEN_BYTES`: a power of two, or the window."""
    most = OPEN_BYTES // (4 * rows * config.n_heads * config.window)
    return min(config.window, max(memories.power_of_two(most + 1) // 2, OPEN_TOKENS))


def _extend_rows(
    config: ModelConfig,
    params: Any,
    reader: Reader,
    tokens_BT: np.ndarray,
    start_B: np.ndarray,
    end_B: np.ndarray,
    spill: str,
    reading: memories.Reading,
    progress: Callable[[int], None] | None,
    look: Callable[..., Any] | None = None,
) -> tuple[Reader, list[tuple[np.ndarray, np.ndarray, Any]]]:
    """The reader after tokens start_B .. end_B of each row, flush left, as many at a time as windows have room for.

    Also, for each time, the first token of each row, how many, and what `look` (see `_extend`) made of them.
    """
    W, local_B, looks = config.window, np.asarray(reader.local.length_B), []
    most = _most_tokens(config, len(local_B))
    while (start_B < end_B).any():
        full_B = (local_B >= W) & (start_B < end_B)
        local_B = local_B - full_B * _spilled(W, spill)
        count_B = np.minimum(np.minimum(W - local_B, end_B - start_B), most)
        size = min(most, memories.power_of_two(max(int(count_B.max()), OPEN_TOKENS)))
        tokens = _columns(tokens_BT, start_B, size)
        options = dict(spill=spill, reading=reading, look=look)
        reader, seen = _extend(config, params, reader, tokens, count_B.astype(np.int32), **options)
        looks.append((start_B, count_B, seen))
        start_B, local_B = start_B + count_B, local_B + count_B
        if progress is not None:
            jax.block_until_ready(reader)
            progress(int(count_B.sum()))
    return reader, looks


def _in_place(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function (config, params, reader, ...) -> (reader, more), which writes the reader in place; but a
    memory that is shared, which it gives back as it is, stays where it is and is not copied.
    """

    def compiled(f: Callable[..., tuple[Reader, Any]]) -> Callable[..., tuple[Reader, Any]]:
        own = jax.jit(f, static_argnames=("config", *static), donate_argnames=("reader",))

        @functools.partial(jax.jit, static_argnames=("config", *static), donate_argnames=("reader",))
        def beside(config, params, reader, mem, *arguments, **options):
            reader, more = f(config, params, dataclasses.replace(reader, mem=mem), *arguments, **options)
            return dataclasses.replace(reader, mem=None), more

        @functools.wraps(f)
        def call(config, params, reader, *arguments, **options):
            if not reader.shared:
                return own(config, params, reader, *arguments, **options)
            mem, rest = reader.mem, dataclasses.replace(reader, mem=None)
            rest, more = beside(config, params, rest, mem, *arguments, **options)
            return dataclasses.replace(rest, mem=mem), more

        call.programs = lambda: own._cache_size() + beside._cache_size()
        return call

    return compiled


def _with_room(
    config: ModelConfig, reader: Reader, spill: str, grows_B: Array
) -> tuple[memories.Cache, memories.Cache | memories.Pages]:
    """`make_room`, where memory is not shared; where it is, there is room (`_check_room`)."""
    return (reader.local, reader.mem) if reader.shared else make_room(config, reader.local, reader.mem, spill, grows_B)


@_in_place("spill", "reading", "look")
def _extend(config, params, reader, tokens_BT, count_B, *, spill, reading, look=None) -> tuple[Reader, Any]:
    """Reads the first count_B tokens of each row of [B, T], for which the open window has room once it has spilled.

    `look` (config, params, logits_BV before the tokens, hidden_BTD after each, tokens_BT) makes what is returned beside
    the reader; without it that is None.
    """
    local, mem = _with_room(config, reader, spill, count_B > 0)
    hidden, local, _ = model.extend_window(
        config, params, tokens_BT, mem=mem, local=local, count_B=count_B, reading=reading
    )
    seen = None if look is None else look(config, params, reader.logits_BV, hidden, tokens_BT)
    B, T = tokens_BT.shape
    last_B1D = jnp.take_along_axis(hidden, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    logits_BV = jnp.where(count_B[:, None] > 0, model.logits(config, params, last_B1D)[:, 0], reader.logits_BV)
    read_BT = jnp.arange(T)[None, :] < count_B[:, None]
    reader = Reader(
        logits_BV=logits_BV,
        seen_BV=reader.seen_BV.at[jnp.arange(B)[:, None], tokens_BT].max(read_BT),
        ended_B=reader.ended_B & (count_B == 0),
        length_B=reader.length_B + count_B,
        local=local,
        mem=mem,
        shared=reader.shared,
    )
    return memories.constrain(reader), seen


def _spilled(window: int, spill: str) -> int:
    """Tokens that leave a full window."""
    return window if spill == "block" else max(1, window // 8)


def make_room(
    config: ModelConfig,
    local: memories.Cache,
    mem: memories.Cache | memories.Pages,
    spill: str,
    grows_B: Array | None = None,
) -> tuple[memories.Cache, memories.Cache | memories.Pages]:
    """The open window and memory, with room in the window for one more token in every row, or where `grows_B` (bool) is
    True.

    Rows whose window is full spill: all of it ("block"), or its oldest eighth ("sliding").
    """
    size = _spilled(local.capacity, spill)
    full_B = local.length_B >= local.capacity
    count_B = jnp.where(full_B if grows_B is None else full_B & grows_B, size, 0)
    oldest = lambda arrays: tuple(arrays[layer][..., :size] for layer in config.mem_layers)
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
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    *,
    max_new_tokens: int,
    spill: str = "block",
    reading: memories.Reading = memories.DENSE,
) -> tuple[Array, Reader]:
    """New tokens, one after another, and what has been read then; one compiled loop.

    Every token is read as soon as it is chosen, so that the reader returned goes on where this one ends: two calls for
    n and m tokens with one key give what one call for n + m gives.

    Args:
        reader: donated.
        sampling: how a token is chosen.
        key: a random key, or one for each row, where a token is drawn; see `generate`.

    Returns:
        int32 [B, max_new_tokens], padded after the eos; the reader after the last of them.

    Raises:
        ValueError: memory has no room for what the window and the new tokens can spill; a draw without a key.
    """
    _check_spill(spill)
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"temperature is {sampling.temperature} and key None; wanted a key where it is above 0")
    _check_room(config, reader, max_new_tokens)
    key_B = samplings.row_keys(key, len(reader.length_B))
    size = memories.power_of_two(max(max_new_tokens, OUT_TOKENS))
    options = dict(size=size, steps=sampling.steps, spill=spill, reading=reading)
    reader, out = _decode(config, params, reader, sampling.values, key_B, np.int32(max_new_tokens), **options)
    return out[:, :max_new_tokens], reader


@_in_place("size", "steps", "spill", "reading")
def _decode(config, params, reader, values, key_B, max_new_tokens, *, size, steps, spill, reading):
    blocks = model.layers(config, params)
    pad = jnp.int32(next((i for i in (config.pad_id, *config.eos_ids) if i is not None), 0))
    eos = jnp.asarray(config.eos_ids, jnp.int32)
    rows = jnp.arange(reader.length_B.shape[0])
    # What the loop carries is copied unless it is donated: a memory that is only read stays outside.
    shared_mem = reader.mem if reader.shared else None
    carried = lambda reader: dataclasses.replace(reader, mem=None) if reader.shared else reader
    whole = lambda reader: dataclasses.replace(reader, mem=shared_mem) if reader.shared else reader

    def more(carry):
        step, _, reader, _ = carry
        return (step < max_new_tokens) & ~jnp.all(reader.ended_B)

    def one(carry):
        step, out_BN, reader, rotated = carry
        reader = whole(reader)
        # A draw depends on the row's key and how many tokens precede it: not on other rows, nor on where a call began.
        now_B = jax.vmap(jax.random.fold_in)(key_B, reader.length_B)
        token_B = samplings.choose(reader.logits_BV, reader.seen_BV, now_B, values, steps)
        grows_B = ~reader.ended_B
        token_B = jnp.where(grows_B, token_B, pad)
        ended_B = reader.ended_B | jnp.any(token_B[:, None] == eos[None], axis=1)
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], step, axis=1)
        local, mem = _with_room(config, reader, spill, grows_B)
        if spill == "sliding":  # tokens that moved up are at other positions; after a block no token is left
            moved = jnp.any(local.length_B < reader.local.length_B)
            rotated = jax.lax.cond(moved, lambda: model.rotated_keys(config, local), lambda: rotated)
        count_B = grows_B.astype(jnp.int32)
        hidden, local, rotated = model.extend_window(
            config,
            params,
            token_B[:, None],
            mem=mem,
            local=local,
            rotated=rotated,
            count_B=count_B,
            reading=reading,
            blocks=blocks,
        )
        reader = Reader(
            logits_BV=jnp.where(grows_B[:, None], model.logits(config, params, hidden)[:, 0], reader.logits_BV),
            seen_BV=reader.seen_BV.at[rows, token_B].max(grows_B),
            ended_B=ended_B,
            length_B=reader.length_B + count_B,
            local=local,
            mem=mem,
            shared=reader.shared,
        )
        return step + 1, out_BN, carried(reader), rotated

    out_BN = jnp.full((reader.ended_B.shape[0], size), pad)
    start = jnp.int32(0), out_BN, carried(reader), model.rotated_keys(config, reader.local)
    _, out_BN, reader, _ = jax.lax.while_loop(more, one, start)
    return memories.constrain((whole(reader), out_BN))


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
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    score_bytes: int | None = None,
    values_on_host: bool = False,
) -> Array:
    """New tokens after prompts of any length.

    Each row is cut into windows by its own length, so that a padded row gives what the row alone gives: the same
    likeliest tokens, up to the rounding of products of another shape. Drawn tokens depend on the row's key and on the
    tokens before them only; row b's key is fold_in(key, b), so that row 0 draws as it does alone, and another row where
    it is given the same key by itself.

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
        memory: "dense", "topk" or "approximate"; see `memory.Reading`.
        k: slots a query retrieves, but for "dense".
        key: random key, or [B] of them, one for each row; needed when temperature > 0.
        memory_capacity: slots of memory to allocate for each row, rounded up to whole windows; what the prompt and N
            new tokens can need by default, in powers of two (`memory_tokens`), so that prompts of many lengths share
            programs.
        top_k, top_p, repetition_penalty: see `Sampling`.
        score_bytes: bytes of scores over memory held at a time; see `memory.Reading`.
        values_on_host: whether memory's values lie in the host's memory, for top-k; see `memory.init_memory`.

    Returns:
        int32 [B, N]: new tokens only. After a token of `config.eos_ids` a row is filled with `config.pad_id`; where
        there is none it never stops.

    Raises:
        ValueError: input that does not fit; prompt and new tokens beyond `memory_capacity`.
    """
    _check_spill(spill)
    if not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; wanted at least 1")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if temperature > 0 and key is None:
        raise ValueError(f"temperature is {temperature} and key None; wanted a key where it is above 0")
    reading = memories.Reading(memory, k, score_bytes)
    inputs = tokens_BT, last_context_length, attention_mask, memory, k, max_new_tokens, memory_capacity, score_bytes
    reader = prefill(config, params, *inputs, values_on_host=values_on_host)
    options = dict(max_new_tokens=max_new_tokens, spill=spill, reading=reading)
    return decode(config, params, reader, sampling, key, **options)[0]
