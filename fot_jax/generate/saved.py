"""What has been read, on disk: a long prompt is read once and asked about many times.

One safetensors file: filled slots of memory and of the open window, scores of the next token, tokens seen, and in its
metadata which model they belong to and a checksum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax.config import ModelConfig
from fot_jax.generate import Reader, memory_tokens, new_reader, placed_with
from fot_jax.memory import SavedMemoryError, saving

FORMAT = "fot_jax reader 2"
_SAMPLES = 64  # elements of a parameter that its hash is made of
# What may differ between the model that wrote a file and the one that reads it: nothing that was read depends on it.
_FREE_FIELDS = {"last_context_length", "init_std", "bos_id", "eos_id", "pad_id"}
_ROW_ARRAYS = ("logits_BV", "seen_BV", "ended_B", "length_B")


def fingerprint(config: ModelConfig, params: Any) -> dict[str, Any]:
    """What tells one model from another: fields of its configuration, and a hash of some elements of each parameter."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_FIELDS}
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        index = np.linspace(0, leaf.size - 1, min(_SAMPLES, leaf.size)).astype(np.int64)
        some = np.asarray(leaf[np.unravel_index(index, leaf.shape)])
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode() + some.tobytes())
    return {**json.loads(json.dumps(fields)), "parameters": sha.hexdigest()[:16]}


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
        ValueError: a reader that shares its memory with others.
        OSError: the file cannot be written; a path that is no ordinary file's.
    """
    if reader.shared:
        raise ValueError("the reader shares its memory with others (branches.branched); wanted one with its own")
    arrays = {name: np.asarray(getattr(reader, name)) for name in _ROW_ARRAYS}
    arrays |= saving.arrays_of(reader.mem, "memory") | saving.arrays_of(reader.local, "local")
    metadata = {
        "model": json.dumps(fingerprint(config, params)),
        "last_tokens": json.dumps([[int(i) for i in row] for row in last_tokens]),
    }
    saving.write(path, FORMAT, arrays, metadata)


def check_saved(path: str | os.PathLike) -> dict[str, Any]:
    """Looks at the head of a saved memory.

    Returns:
        {"rows": B, "tokens": slots of memory and of the window together in the longest row, "model": the fingerprint,
        "last_tokens": those of each row, as they were given to `save_reader`}.

    Raises:
        FileNotFoundError: no such file.
        SavedMemoryError: not a saved memory, or a damaged one.
    """
    with saving.opened(path, FORMAT) as file:
        tokens = file.get_tensor("memory.length_B") + file.get_tensor("local.length_B")
        model = json.loads(file.metadata()["model"])
        last = json.loads(file.metadata().get("last_tokens", "[]"))
        if not isinstance(model, dict) or tokens.ndim != 1:
            raise ValueError("no description of a model and of rows")
        if len(last) not in (0, len(tokens)) or not all(isinstance(i, int) for row in last for i in row):
            raise ValueError("last tokens of other rows")
        last = last or [[]] * len(tokens)
        return {"rows": len(tokens), "tokens": int(tokens.max()), "model": model, "last_tokens": last}


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


def load_reader(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Any,
    *,
    rows: int | None = None,
    room: int = 0,
    memory_capacity: int | None = None,
    values_on_host: bool = False,
) -> Reader:
    """What `save_reader` wrote, to go on from with `extend` and `decode`.

    Args:
        path: the file.
        config, params: the model, the one that wrote it.
        rows: how many rows are wanted, where the file has one: copies of it. None: as many as it has.
        room: tokens to make room for in memory.
        memory_capacity: slots of memory to allocate for each row, rounded up to whole windows; what is there and `room`
            can need, in powers of two, by default.
        values_on_host: whether memory's values are to lie in the host's memory; see `memory.init_memory`.

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
    rows = head["rows"] if rows is None else rows
    empty = jax.eval_shape(lambda: new_reader(config, rows, memory_capacity or memory_tokens(config, rows, needed)))
    with saving.opened(path, FORMAT) as file:
        arrays = saving.read(file)
        if rows != head["rows"]:
            arrays = {name: np.repeat(x, rows, axis=0) for name, x in arrays.items()}
        mem, local = (
            saving.filled(empty.mem, arrays, "memory", values_on_host),
            saving.filled(empty.local, arrays, "local"),
        )
        reader = Reader(**{name: arrays[name] for name in _ROW_ARRAYS}, local=local, mem=mem)
    return jax.tree.map(jnp.asarray, placed_with(params, reader))
