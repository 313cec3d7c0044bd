"""Hugging Face LLaMA and LongLLaMA directories: one table of names, reader and writer.

A tensor of that layout is one layer's `[out, in]` matrix or a vector; ours are `[in, out]`, split into heads, with the
layers of a segment stacked. Rotary pairs are halves of a head in both, so nothing is permuted. `TOP` and `LAYER` say
everything else, and are read in both directions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fot_jax import config as config_lib

# Name -> (place in our tree, axes). Axes before the blank are the matrix's inputs, those after it its outputs; without
# a blank the tensor is kept as it is. D model, H query heads, G key/value heads, K head size, F feed-forward, V words.
TOP = {
    "model.embed_tokens.weight": ("embed/embedding", "VD"),
    "model.norm.weight": ("norm/scale", "D"),
    "lm_head.weight": ("head/kernel", "D V"),
}
LAYER = {
    "input_layernorm.weight": ("attention_norm/scale", "D"),
    "self_attn.q_proj.weight": ("attention/q", "D HK"),
    "self_attn.k_proj.weight": ("attention/k", "D GK"),
    "self_attn.v_proj.weight": ("attention/v", "D GK"),
    "self_attn.o_proj.weight": ("attention/o", "HK D"),
    # Not in LLaMA: the per-head temperature of models with query/key normalisation.
    "self_attn.temperature": ("attention/temperature", "H"),
    "post_attention_layernorm.weight": ("mlp_norm/scale", "D"),
    "mlp.gate_proj.weight": ("mlp/gate", "D F"),
    "mlp.up_proj.weight": ("mlp/up", "D F"),
    "mlp.down_proj.weight": ("mlp/down", "F D"),
}
# Buffers that old exports carry: a function of the configuration.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the Hugging Face layout and its place in our tree.

    Attributes:
        name: its name there.
        path: keys of the leaf in our tree.
        stack: index of this layer in the leaf's leading dimensions; () for a leaf that is not stacked.
        shape: our shape, without the leading dimensions.
        n_in: how many of `shape`'s dimensions are the matrix's inputs; 0 where the tensor is kept as it is.
    """

    name: str
    path: tuple[str, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    n_in: int

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if not self.n_in:
            return self.shape
        return math.prod(self.shape[self.n_in :]), math.prod(self.shape[: self.n_in])

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """From the Hugging Face orientation to ours; a view where NumPy can."""
        return tensor.T.reshape(self.shape) if self.n_in else tensor

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """From our orientation to Hugging Face's; a view where NumPy can."""
        return array.reshape(self.hf_shape[::-1]).T if self.n_in else array


def table(config: config_lib.ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of a model, in the order of a Hugging Face checkpoint; a bijection with our leaves' layers."""
    sizes = dict(
        V=config.vocab_size,
        D=config.d_model,
        F=config.d_ff,
        H=config.n_heads,
        G=config.n_kv_heads,
        K=config.head_size,
    )

    def entry(name: str, axes: str, path: str, stack: tuple[int, ...]) -> Entry:
        inputs, blank, _ = axes.partition(" ")
        shape = tuple(sizes[axis] for axis in axes.replace(" ", ""))
        return Entry(name, tuple(path.split("/")), stack, shape, len(inputs) if blank else 0)

    top = {name: entry(name, axes, path, ()) for name, (path, axes) in TOP.items()}
    layers = []
    for segment, layer, kind, stack in _places(config):
        for name, (path, axes) in LAYER.items():
            if name != "self_attn.temperature" or config.qk_norm:
                layers.append(entry(f"model.layers.{layer}.{name}", axes, f"segment_{segment}/{kind}/{path}", stack))
    out = [top["model.embed_tokens.weight"], *layers, top["model.norm.weight"]]
    return (*out, top["lm_head.weight"]) if not config.tie_embeddings else tuple(out)


def _places(config: config_lib.ModelConfig) -> Iterator[tuple[int, int, str, tuple[int, ...]]]:
    """(segment, layer, 'plain' or 'memory', index in the stack) of every layer, in order."""
    layer = 0
    for s, segment in enumerate(config.segments):
        for r in range(segment.repeats):
            for p in range(segment.plain):
                yield s, layer, "plain", (r, p)
                layer += 1
            if segment.memory:
                yield s, layer, "memory", (r,)
                layer += 1


def leaf_shapes(config: config_lib.ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every leaf of our tree, stacks included."""
    stacks: dict[tuple[str, ...], tuple[int, ...]] = {}
    shapes = {}
    for entry in table(config):
        # Entries come in order, so the last index seen is the greatest.
        stacks[entry.path] = tuple(i + 1 for i in entry.stack)
        shapes[entry.path] = stacks[entry.path] + entry.shape
    return shapes


def count_params(config: config_lib.ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(entry.shape) for entry in table(config))


# Reading


def read_params(
    directory: str | os.PathLike, config: config_lib.ModelConfig, dtype: str | None = None
) -> dict[str, Any]:
    """The parameters in a directory, as NumPy arrays in our tree.

    Files are mapped, not read into memory: at any moment at most the result and one tensor are held.

    Args:
        directory: holds `model.safetensors` or `pytorch_model.bin`, or shards of either with their index.
            Safetensors are taken where both are there.
        config: the sizes wanted, from `config.read_hf`.
        dtype: of the arrays; None stands for `config.dtypes.params`.

    Raises:
        FileNotFoundError: no checkpoint there, or a shard of it missing.
        ValueError: an unreadable file; a tensor unknown, missing, twice there or of another shape; an index entry that
            points outside the directory; a head that differs from the embedding it is tied to.
        ImportError: `.bin` files where torch is not installed.
    """
    directory = pathlib.Path(directory)
    dtype_ = np.dtype(dtype or config.dtypes.params)
    entries = {entry.name: entry for entry in table(config)}
    leaves = {path: np.empty(shape, dtype_) for path, shape in leaf_shapes(config).items()}
    tied_head = None
    seen: dict[str, str] = {}
    for file, name, read in _tensors(directory):
        if name in seen:
            raise ValueError(f"{directory}: tensor {name} is in {seen[name]} and in {file}; wanted it once")
        seen[name] = file
        if IGNORED.fullmatch(name):
            continue
        if name == "lm_head.weight" and config.tie_embeddings:
            tied_head = read()
            continue
        if name not in entries:
            raise ValueError(
                f"{directory / file}: tensor {name} is unknown; wanted only those of a LLaMA of this config"
            )
        entry, tensor = entries[name], read()
        if tensor.shape != entry.hf_shape:
            raise ValueError(f"{directory / file}: tensor {name} is {tensor.shape}; wanted {entry.hf_shape}")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{directory / file}: tensor {name} is {tensor.dtype}; wanted floating point")
        leaves[entry.path][entry.stack] = entry.to_ours(tensor)
    if missing := [name for name in entries if name not in seen]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{directory}: tensor missing: {', '.join(missing[:5])}{more}")
    if tied_head is not None:
        embedding = leaves["embed", "embedding"]
        if tied_head.shape != embedding.shape or not np.array_equal(tied_head.astype(dtype_), embedding):
            raise ValueError(
                f"{directory}: tensor lm_head.weight differs from model.embed_tokens.weight; "
                "wanted them equal, as config.json has tie_word_embeddings true"
            )
    return _nest(leaves)


_FLOATS = tuple(np.dtype(name) for name in ("float64", "float32", "float16", ml_dtypes.bfloat16))


def _tensors(directory: pathlib.Path) -> Iterator[tuple[str, str, Callable[[], np.ndarray]]]:
    """(file, tensor name, function that reads it) of every tensor in the directory's checkpoint."""
    for whole, opened in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        index = directory / f"{whole}.index.json"
        single = directory / whole
        if single.exists() and index.exists():
            raise ValueError(f"{directory}: {whole} and {index.name} are both there; wanted one of them")
        if single.exists():
            files = {whole: None}
        elif index.exists():
            files = _read_index(index)
        else:
            continue
        for file, names in files.items():
            with opened(directory / file) as tensors:
                if names is not None and (absent := names - set(tensors)):
                    raise ValueError(f"{directory / file}: tensor {min(absent)} missing; {index.name} says it is there")
                for name, read in tensors.items():
                    yield file, name, read
        return
    raise FileNotFoundError(
        f"{directory}: no checkpoint; wanted model.safetensors, pytorch_model.bin, or shards of one with an index"
    )


def _read_index(index: pathlib.Path) -> dict[str, set[str] | None]:
    """Shard -> names of its tensors, from a `*.index.json`."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in pairs:
            if name in out:
                raise ValueError(f"{index}: tensor {name} is listed twice; wanted it once")
            out[name] = value
        return out

    try:
        fields = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{index}: not JSON ({error})") from error
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map missing; wanted tensor names and their files")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        # A plain name, so that a checkpoint cannot have any other file of the machine read (or unpickled).
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise ValueError(
                f"{index}: tensor {name} is said to be in {file!r}; wanted the name of a file beside the index"
            )
        if not (index.parent / file).is_file():
            raise FileNotFoundError(f"{index.parent / file}: no such file; {index.name} says tensor {name} is there")
        files.setdefault(file, set()).add(name)
    return files


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[Mapping[str, Callable[[], np.ndarray]]]:
    try:
        with safe_open(path, framework="np") as file:
            yield {name: lambda name=name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({error})") from error


@contextlib.contextmanager
def _open_bin(path: pathlib.Path) -> Iterator[Mapping[str, Callable[[], np.ndarray]]]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading pickled checkpoints needs torch; install it, or store safetensors"
        ) from error
    try:
        # Only zip files, what torch.save writes since 1.6, can be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises pickle, zip, runtime, value, key and end-of-file errors alike
        raise ValueError(f"{path}: not a pickled checkpoint, or a damaged one ({error})") from error

    def read(name: str) -> np.ndarray:
        tensor = state[name].detach()
        if tensor.dtype == torch.bfloat16:  # NumPy has none of its own
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}; wanted tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}; wanted tensors by name")
    yield {name: lambda name=name: read(name) for name in state}


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    out = {}
    for key, value in tree.items():
        out.update(_flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value})
    return out


# Writing


def to_tensors(config: config_lib.ModelConfig, tree: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, tensor in that layout) of a tree shaped like params, one tensor at a time.

    Raises:
        ValueError: a leaf that is missing, unknown or of another shape.
    """
    leaves = _flatten(tree)
    shapes = leaf_shapes(config)
    for path in sorted({*leaves, *shapes}):
        found, wanted = tuple(leaves[path].shape) if path in leaves else "missing", shapes.get(path, "no such leaf")
        if found != wanted:
            raise ValueError(f"params {'/'.join(path)}: {found}; wanted {wanted}")
    hosted: dict[tuple[str, ...], np.ndarray] = {}
    for entry in table(config):
        if entry.path not in hosted:
            hosted[entry.path] = np.asarray(leaves[entry.path])
        yield entry.name, entry.to_hf(hosted[entry.path][entry.stack])


def write_params(
    directory: str | os.PathLike,
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
    directory = pathlib.Path(directory)
    sizes = {}
    leaves = _flatten(tree)
    for entry in table(config):
        itemsize = np.dtype(leaves[entry.path].dtype).itemsize if entry.path in leaves else 0
        sizes[entry.name] = math.prod(entry.shape) * itemsize
    shard_of, shard, filled = {}, 0, 0
    for name, size in sizes.items():
        if filled and filled + size > max_shard_bytes:
            shard, filled = shard + 1, 0
        shard_of[name] = shard
        filled += size
    n = shard + 1
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]

    def write(file: str, tensors: dict[str, np.ndarray]) -> None:
        try:
            # "pt" is what transformers asks for; it is about the layout, PyTorch's.
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{directory / file}: cannot be written ({error})") from error

    pending: dict[str, np.ndarray] = {}
    current = 0
    for name, tensor in to_tensors(config, tree):
        if shard_of[name] != current:
            write(files[current], pending)
            pending, current = {}, shard_of[name]
        # safetensors writes the buffer as it lies, whatever the strides.
        pending[name] = np.ascontiguousarray(tensor)
    write(files[current], pending)
    if n == 1:
        return files
    index = "model.safetensors.index.json"
    weight_map = {name: files[i] for name, i in shard_of.items()}
    text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2)
    (directory / index).write_text(text + "\n", encoding="utf-8")
    return [*files, index]


def save(
    directory: str | os.PathLike,
    config: config_lib.ModelConfig,
    tree: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a LongLLaMA directory, `config.json` and weights; see `fot_jax.save_pretrained`."""
    directory = pathlib.Path(os.path.abspath(directory))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        files = write_params(partial, config, tree, max_shard_bytes)
        fields = json.dumps(config_lib.to_hf(config), indent=2)
        (partial / "config.json").write_text(fields + "\n", encoding="utf-8")
        for file in (*files, "config.json"):
            _sync(partial / file)
        if not directory.exists():
            partial.rename(directory)
        else:
            # The old configuration goes first and the new one comes last: in between nothing can be loaded.
            for stale in ("config.json", "model.safetensors", "model.safetensors.index.json"):
                (directory / stale).unlink(missing_ok=True)
            for stale in directory.glob("model-?????-of-?????.safetensors"):
                stale.unlink()
            for file in (*files, "config.json"):
                (partial / file).rename(directory / file)
        _sync(directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
