"""Hugging Face LLaMA and LongLLaMA directories: table of names, reader and writer.

A tensor of that layout is one layer's `[out, in]` matrix or a vector; ours are `[in, out]`, split into heads, with the
layers of a segment stacked. Rotary pairs are halves of a head in both, so nothing is permuted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fot_jax import config as config_lib
from fot_jax import files
from fot_jax.formats import pickles
from fot_jax.formats.fields import read_json
from fot_jax.formats.layout import Layout, flatten, leaf_shapes, table
from fot_jax.formats.source import Source, Tensor

LAYOUT = Layout(
    "Hugging Face",
    {
        "embed/embedding": "model.embed_tokens.weight",
        "attention_norm/scale": "model.layers.{}.input_layernorm.weight",
        "attention/q": "model.layers.{}.self_attn.q_proj.weight",
        "attention/k": "model.layers.{}.self_attn.k_proj.weight",
        "attention/v": "model.layers.{}.self_attn.v_proj.weight",
        "attention/o": "model.layers.{}.self_attn.o_proj.weight",
        "attention/temperature": "model.layers.{}.self_attn.temperature",
        "mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
        "mlp/gate": "model.layers.{}.mlp.gate_proj.weight",
        "mlp/up": "model.layers.{}.mlp.up_proj.weight",
        "mlp/down": "model.layers.{}.mlp.down_proj.weight",
        "norm/scale": "model.norm.weight",
        "head/kernel": "lm_head.weight",
    },
    outputs_first=True,
    adjacent_pairs=False,
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # a buffer that old exports carry
)

MAX_SHARD_BYTES = 5 * 10**9


# Reading


def open_directory(directory: str | os.PathLike) -> Source:
    """The checkpoint in a directory: `model.safetensors` or `pytorch_model.bin`, or shards of either with their index.
    Safetensors are taken where both are there.

    Raises:
        FileNotFoundError: no configuration or checkpoint there, or a shard of it missing.
        ValueError: an unreadable file; a configuration this model does not have; a tensor twice there; an index entry
            that points outside the directory.
        ImportError: `.bin` files where torch is not installed.
    """
    directory = pathlib.Path(directory)
    fields = read_json(directory / "config.json")
    try:
        config = config_lib.from_hf(dict(fields.values))
    except ValueError as error:
        raise ValueError(f"{fields.file}: {str(error).removeprefix('config.json: ')}") from error
    states = fields.values.get("model_type") == "longllama" or "mem_dtype" in fields
    tokenizer = lambda to: files.copy_tokenizer(directory, to)
    source = Source(directory, LAYOUT, config, _tensors(directory), tokenizer, states_memory_dtype=states)
    return source if "dtype" in fields or "torch_dtype" in fields else source.in_its_dtype()


def is_checkpoint(directory: pathlib.Path) -> bool:
    """Whether there are weights in a directory, under one of the names that are looked for."""
    wholes = ("model.safetensors", "pytorch_model.bin")
    return any((directory / name).is_file() for whole in wholes for name in (whole, f"{whole}.index.json"))


def _tensors(directory: pathlib.Path) -> dict[str, Tensor]:
    for whole, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", pickles.read_tensors)):
        index = directory / f"{whole}.index.json"
        single = directory / whole
        if single.is_file() and index.is_file():
            raise ValueError(f"{directory}: {whole} and {index.name} are both there; wanted one of them")
        if single.is_file():
            return read(single)
        if index.is_file():
            listed = _read_index(index)
            return _join(index, listed, {file: read(directory / file) for file in listed})
    raise FileNotFoundError(
        f"{directory}: no checkpoint; wanted model.safetensors, pytorch_model.bin, or shards of one with an index"
    )


def _join(index: pathlib.Path, listed: dict[str, set[str]], shards: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all shards, each where the index says that it is, and once."""
    out: dict[str, Tensor] = {}
    for file, names in listed.items():
        if absent := names - set(shards[file]):
            raise ValueError(f"{index.parent / file}: tensor {min(absent)} missing; {index.name} says it is there")
        for name, tensor in shards[file].items():
            if name in out:
                first = pathlib.Path(out[name].file).name
                raise ValueError(f"{index.parent}: tensor {name} is in {first} and in {file}; wanted it once")
            out[name] = tensor
    return out


class _Twice(Exception):
    """A name for the second time."""


def _read_index(index: pathlib.Path) -> dict[str, set[str]]:
    """Shard -> names of its tensors, from a `*.index.json`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in pairs:
            if name in out:
                raise _Twice(name)
            out[name] = value
        return out

    try:
        fields = files.read_json(index, no_duplicates)
    except _Twice as twice:
        raise ValueError(f"{index}: tensor {twice} is listed twice; wanted it once") from None
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map missing; wanted tensor names and their files")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # A plain name, so that a checkpoint cannot have any other file of the machine read (or unpickled).
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(
                f"{index}: tensor {name} is said to be in {file!r}; wanted the name of a file beside the index"
            )
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index.parent / file}: no such file; {index.name} says tensor {name} is there")
        shards.setdefault(file, set()).add(name)
    return shards


_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def _read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, framework="np")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from error
    out = {}
    for name, (shape, dtype) in found.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: tensor {name} is {dtype}; wanted floating point, {', '.join(_DTYPES)}")
        out[name] = Tensor(str(path), shape, _DTYPES[dtype], lambda name=name: file.get_tensor(name))
    return out


# Writing


class Writer:
    """Writes tensors one by one, in any order, into `model.safetensors`, or into shards of it with an index.

    Each file has its whole length from the start, so that a full disk shows at once, and nothing but the tensor at
    hand is held.

    Args:
        directory: where the files go.
        tensors: name -> (shape, dtype), in the order of the files.
        max_shard_bytes: of a file; a greater tensor has one for itself.

    Raises:
        OSError: the disk is full, or the like.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        tensors: Mapping[str, tuple[tuple[int, ...], Any]],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ):
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self._tensors = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in tensors.items()}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self._tensors.items()}
        shards: list[dict[str, int]] = [{}]
        for name, size in sizes.items():
            if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
                shards.append({})
            shards[-1][name] = size
        n = len(shards)
        self.files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        self._total = sum(sizes.values())
        self._file_of = {name: file for file, shard in zip(self.files, shards, strict=True) for name in shard}
        self._places: dict[str, tuple[int, int]] = {}  # name -> (descriptor, offset)
        try:
            for file, shard in zip(self.files, shards, strict=True):
                self._open(file, shard)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, file: str, sizes: dict[str, int]) -> None:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        # "pt" is what transformers asks for; it is about the layout, PyTorch's.
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in sizes.items():
            shape, dtype = self._tensors[name]
            header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [end, end := end + size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        with files.failing_as(self.directory / file):
            descriptor = os.open(self.directory / file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            self._stack.callback(os.close, descriptor)
            files.allocate(descriptor, start + end)
            files.write_at(descriptor, struct.pack("<Q", len(text)) + text, 0)
        for name in sizes:
            self._places[name] = descriptor, start + header[name]["data_offsets"][0]

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Writes one tensor, once. Raises OSError where the disk refuses it."""
        shape, dtype = self._tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"tensor {name} is {tensor.dtype}{tensor.shape}; wanted {dtype}{shape}")
        descriptor, offset = self._places.pop(name)
        with files.failing_as(self.directory / self._file_of[name]):
            files.write_at(descriptor, np.ascontiguousarray(tensor).reshape(-1).view(np.uint8), offset)

    def close(self) -> list[str]:
        """Ends the files when every tensor is written; their names, and the index's where there are several."""
        if self._places:
            raise ValueError(f"tensor {min(self._places)} was not written")
        self.abandon()
        out = list(self.files)
        if len(out) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._file_of}
            out.append("model.safetensors.index.json")
            (self.directory / out[-1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return out

    def abandon(self) -> None:
        """Closes the files, whole or not."""
        self._stack.close()


def write_config(directory: pathlib.Path, fields: Mapping[str, Any]) -> str:
    """Writes `config.json`; its name."""
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return "config.json"


def write_params(
    directory: pathlib.Path,
    config: config_lib.ModelConfig,
    tree: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Writes a tree shaped like params into a directory: `model.safetensors`, or shards of it and an index.

    Returns:
        The names of the files written.

    Raises:
        ValueError: a leaf that is missing, unknown or of another shape.
        OSError: the disk is full, or the like.
    """
    leaves, shapes = flatten(tree), leaf_shapes(config)
    for path in sorted({*leaves, *shapes}):
        found, wanted = tuple(leaves[path].shape) if path in leaves else "missing", shapes.get(path, "no such leaf")
        if found != wanted:
            raise ValueError(f"params {'/'.join(path)}: {found}; wanted {wanted}")
    entries = table(LAYOUT, config)
    tensors = {entry.name: (entry.their_shape, leaves[entry.path].dtype) for entry in entries}
    writer = Writer(directory, tensors, max_shard_bytes)
    try:
        for path, leaf in leaves.items():
            hosted = np.asarray(leaf)  # one leaf of a tree on devices at a time
            for entry in entries:
                if entry.path == path:
                    writer.write(entry.name, entry.to_theirs(hosted[entry.stack]))
        return writer.close()
    finally:
        writer.abandon()


def save(
    directory: str | os.PathLike,
    config: config_lib.ModelConfig,
    tree: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a LongLLaMA directory, `config.json` and weights; see `fot_jax.save_pretrained`."""
    directory = pathlib.Path(os.path.abspath(directory))
    with files.beside(directory) as partial:
        written = write_params(partial, config, tree, max_shard_bytes)
        written.append(write_config(partial, config_lib.to_hf(config)))
        files.sync(*(partial / file for file in written))
        if not directory.exists():
            partial.rename(directory)
        else:
            # The old configuration goes first and the new one comes last: in between nothing can be loaded.
            for stale in ("config.json", "model.safetensors", "model.safetensors.index.json"):
                (directory / stale).unlink(missing_ok=True)
            for stale in directory.glob("model-?????-of-?????.safetensors"):
                stale.unlink()
            for file in written:
                (partial / file).rename(directory / file)
        files.sync(directory, directory.parent)
