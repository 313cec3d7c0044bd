"""What has been read, on disk: a long prompt is read once and asked about many times.

One safetensors file: filled slots of memory and of the open window, scores of the next token, tokens seen, and in its
metadata which model they belong to and a checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from fot_jax import files
from fot_jax import memory as memories
from fot_jax.config import ModelConfig
from fot_jax.generate import Reader, memory_tokens, new_reader, placed_with

FORMAT = "fot_jax reader 2"
_SAMPLES = 64  # elements of a parameter that its hash is made of
# What may differ between the model that wrote a file and the one that reads it: nothing that was read depends on it.
_FREE_FIELDS = {"last_context_length", "init_std", "bos_id", "eos_id", "pad_id"}
_ROW_ARRAYS = ("logits_BV", "seen_BV", "ended_B", "length_B")


class SavedMemoryError(ValueError):
    """A file that is no saved memory, is damaged, or belongs to another model; the message names it and says which."""


def fingerprint(config: ModelConfig, params: Any) -> dict[str, Any]:
    """What tells one model from another: fields of its configuration, and a hash of some elements of each parameter."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_FIELDS}
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        index = np.linspace(0, leaf.size - 1, min(_SAMPLES, leaf.size)).astype(np.int64)
        some = np.asarray(leaf[np.unravel_index(index, leaf.shape)])
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + some.tobytes())
    return {**json.loads(json.dumps(fields)), "parameters": sha.hexdigest()[:16]}


def _checksum(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    crc = zlib.crc32(json.dumps({k: v for k, v in metadata.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def save_reader(
    path: str | os.PathLike, config: ModelConfig, params: Any, reader: Reader, last_tokens: Sequence[Sequence[int]] = ()
) -> None:
    """Writes what has been read, beside and renamed: a file of that name is whole.

    Args:
        path: the file; an earlier one is replaced.
        config, params: the model that has read.
        reader: of any number of rows; stays as it is.
        last_tokens: the last few of each row, for those who turn the tokens that follow into text.

    Raises:
        OSError: the file cannot be written; a path that is no ordinary file's.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"saved memory {path}: a device or a directory; wanted a file")
    tensors = {name: np.asarray(getattr(reader, name)) for name in _ROW_ARRAYS}
    for kind, cache in (("memory", reader.mem), ("local", reader.local)):
        tensors[f"{kind}.length_B"] = np.asarray(cache.length_B)
        filled = int(tensors[f"{kind}.length_B"].max())
        for name in ("keys", "values"):
            for layer in range(len(getattr(cache, name))):
                buffers = [getattr(page, name)[layer] for page in cache.pages]
                for part in _PARTS if isinstance(buffers[0], memories.Int8) else ("",):
                    found = _filled(buffers, part, cache.deals, filled, config.head_size)
                    tensors[f"{kind}.{name}.{layer}{part}"] = found
    if any(seen is not None for seen in reader.mem.each_seen):
        tensors["memory.seen"] = np.asarray(memories.seen_slots(reader.mem))
    metadata = {
        "format": FORMAT,
        "model": json.dumps(fingerprint(config, params)),
        "last_tokens": json.dumps([[int(i) for i in row] for row in last_tokens]),
    }
    metadata["checksum"] = _checksum(tensors, metadata)
    try:
        with files.replacing(path) as partial:
            save_file(tensors, partial, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"saved memory {path}: cannot be written ({error})") from error


# What the arrays of a buffer in int8 are called, after the buffer.
_PARTS = {".numbers": "numbers", ".scale": "scale"}


def _filled(buffers: Sequence[Any], part: str, deals: tuple[memories.Deal, ...], filled: int, K: int) -> np.ndarray:
    """[B, G, K, filled] of the buffers of pages, or of a part of them, in the order of slots."""
    parts, start = [], 0
    for page, deal in zip(buffers, deals, strict=True):
        page = getattr(page, _PARTS[part]) if part else page
        if start < filled or not parts:
            whole = page if deal.ways == 1 else deal.in_order(np.asarray(page))
            parts.append(np.asarray(whole[:, :, :K, : filled - start]))
        start += page.shape[-1]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))


def check_saved(path: str | os.PathLike) -> dict[str, Any]:
    """Looks at the head of a saved memory.

    Returns:
        {"rows": B, "tokens": slots of memory and of the window together in the longest row, "model": the fingerprint,
        "last_tokens": those of each row, as they were given to `save_reader`}.

    Raises:
        FileNotFoundError: no such file.
        SavedMemoryError: not a saved memory, or a damaged one.
    """
    with _opened(path) as file, _damaged(path):
        tokens = file.get_tensor("memory.length_B") + file.get_tensor("local.length_B")
        model = json.loads(file.metadata()["model"])
        last = json.loads(file.metadata().get("last_tokens", "[]"))
        if not isinstance(model, dict) or tokens.ndim != 1:
            raise ValueError("no description of a model and of rows")
        if len(last) not in (0, len(tokens)) or not all(isinstance(i, int) for row in last for i in row):
            raise ValueError("last tokens of other rows")
        last = last or [[]] * len(tokens)
        return {"rows": len(tokens), "tokens": int(tokens.max()), "model": model, "last_tokens": last}


@contextlib.contextmanager
def _damaged(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except SavedMemoryError:
        raise
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise SavedMemoryError(f"saved memory {path}: damaged ({type(error).__name__}: {error})") from error


def check_model(path: str | os.PathLike, theirs: dict[str, Any], config: ModelConfig, params: Any = None) -> None:
    """Refuses a saved memory of another model: SavedMemoryError names what differs.

    Args:
        theirs: the fingerprint in the file.
        params: None compares configurations alone.
    """
    ours = fingerprint(config, params)
    for name in [*sorted({*theirs, *ours} - {"parameters"}), *(["parameters"] if params is not None else [])]:
        if theirs.get(name) != ours.get(name):
            raise SavedMemoryError(
                f"saved memory {path}: it is of another model: its {name} is {theirs.get(name)}, "
                f"the model's {ours.get(name)}"
            )


def _opened(path: str | os.PathLike) -> Any:
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"saved memory {path}: no such file")
    try:
        file = safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as error:
        raise SavedMemoryError(f"saved memory {path}: truncated, damaged or no safetensors file ({error})") from error
    found = (file.metadata() or {}).get("format")
    if found != FORMAT:
        raise SavedMemoryError(f"saved memory {path}: its format is {found!r}; wanted {FORMAT!r}")
    return file


def load_reader(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Any,
    *,
    rows: int | None = None,
    room: int = 0,
    memory_capacity: int | None = None,
) -> Reader:
    """What `save_reader` wrote, to go on from with `extend` and `decode`.

    Args:
        path: the file.
        config, params: the model, the one that wrote it.
        rows: how many rows are wanted, where the file has one: copies of it. None: as many as it has.
        room: tokens to make room for in memory.
        memory_capacity: slots of memory to allocate for each row, rounded up to whole windows; what is there and `room`
            can need, in powers of two, by default.

    Raises:
        FileNotFoundError: no such file.
        SavedMemoryError: not a saved memory, a damaged one, or one of another model; the message names what differs.
        ValueError: rows that it does not have; no room in `memory_capacity`.
    """
    head = check_saved(path)
    check_model(path, head["model"], config, params)
    if rows is not None and rows != head["rows"] != 1:
        raise ValueError(f"saved memory {path}: it has {head['rows']} rows; wanted {rows}, or 1 to be copied")
    needed = head["tokens"] + room
    if memory_capacity is not None and config.mem_layers and memory_capacity < needed:
        raise ValueError(
            f"saved memory {path}: {head['tokens']} tokens and {room} new ones need a memory of {needed} slots; "
            f"memory_capacity is {memory_capacity}"
        )
    with _opened(path) as file, _damaged(path):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _checksum(tensors, file.metadata()) != file.metadata()["checksum"]:
            raise ValueError("its checksum is not that of its contents")
    rows = head["rows"] if rows is None else rows
    copied = {name: np.repeat(x, rows, axis=0) if len(x) != rows else x for name, x in tensors.items()}
    empty = new_reader(config, rows, memory_capacity or memory_tokens(config, rows, needed))
    local = _put(empty.local, copied, "local")
    pages, first = [], 0
    for page in empty.mem.pages:
        pages.append(_put(page, copied, "memory", first))
        first += page.capacity
    arrays = {name: jnp.asarray(copied[name]) for name in _ROW_ARRAYS}
    mem = memories.Pages(tuple(pages))
    if "memory.seen" in copied:  # of slots that there was no room for, all
        seen = copied["memory.seen"][:, : mem.capacity]
        more = [(0, 0), (0, mem.capacity - seen.shape[1])]
        mem = memories.restrict(mem, jnp.asarray(np.pad(seen, more, constant_values=True)))
    return placed_with(params, Reader(**arrays, local=local, mem=mem))


def _put(cache: memories.Cache, tensors: dict[str, np.ndarray], kind: str, first: int = 0) -> memories.Cache:
    """A cache with the slots of a saved one from `first` on, as many as it has room for."""

    def page(x: np.ndarray) -> jax.Array:
        part = x[..., first : first + cache.capacity]
        return jnp.asarray(cache.deal.as_dealt(np.pad(part, [(0, 0)] * 3 + [(0, cache.capacity - part.shape[3])])))

    def buffers(name: str) -> tuple[Any, ...]:
        out = []
        for layer, empty in enumerate(getattr(cache, name)):
            read = lambda part, layer=layer: page(tensors[f"{kind}.{name}.{layer}{part}"])
            out.append(
                memories.Int8(*map(read, _PARTS)) if isinstance(empty, memories.Int8) else read("").astype(empty.dtype)
            )
        return tuple(out)

    # The window is full at most; without memory layers nothing is in memory.
    length_B = jnp.asarray(np.clip(tensors[f"{kind}.length_B"] - first, 0, cache.capacity), jnp.int32)
    return memories.Cache(buffers("keys"), buffers("values"), length_B, cache.deal)
