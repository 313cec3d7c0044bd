"""Meta's directories of `consolidated.NN.pth` and `params.json`: LLaMA 1, Llama 2, Llama 3, Code Llama.

The layout is that of `llama/model.py` in Meta's published inference code. Several files are the parts of a model cut
for tensor parallelism: each matrix is cut along its outputs or its inputs, the norms are whole in every part.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from fot_jax import files
from fot_jax.config import ModelConfig
from fot_jax.formats import pickles
from fot_jax.formats.fields import Fields, read_json
from fot_jax.formats.layout import Layout, is_ignored
from fot_jax.formats.source import Source, Tensor

LAYOUT = Layout(
    "Meta",
    {
        "embed/embedding": "tok_embeddings.weight",
        "attention_norm/scale": "layers.{}.attention_norm.weight",
        "attention/q": "layers.{}.attention.wq.weight",
        "attention/k": "layers.{}.attention.wk.weight",
        "attention/v": "layers.{}.attention.wv.weight",
        "attention/o": "layers.{}.attention.wo.weight",
        "mlp_norm/scale": "layers.{}.ffn_norm.weight",
        "mlp/gate": "layers.{}.feed_forward.w1.weight",
        "mlp/down": "layers.{}.feed_forward.w2.weight",
        "mlp/up": "layers.{}.feed_forward.w3.weight",
        "norm/scale": "norm.weight",
        "head/kernel": "output.weight",
    },
    outputs_first=True,
    adjacent_pairs=True,
    ignored=r"rope\.freqs",  # a buffer
)

# Dimension along which parts are joined; None: every part holds the whole tensor. The embedding's depends on the model.
_JOINED = {
    "attention/q": 0,
    "attention/k": 0,
    "attention/v": 0,
    "attention/o": 1,
    "mlp/gate": 0,
    "mlp/down": 1,
    "mlp/up": 0,
    "head/kernel": 0,
    "attention_norm/scale": None,
    "mlp_norm/scale": None,
    "norm/scale": None,
}


def open_directory(directory: str | os.PathLike) -> Source:
    """The checkpoint in a directory, of one part or several.

    Returns:
        The source; tensors as wide as they are in the files, W `max_seq_len` of params.json, or 2048 where it does not
        say. The tokenizer's files are looked for in the directory, then in the one above, where Meta puts them.

    Raises:
        FileNotFoundError: no params.json, no part, or a number left out.
        ValueError: damaged files; sizes that are not those of the tensors; parts that do not fit together (norms that
            differ between them show when they are read); a model that is no LLaMA or has scaled rotary positions.
        ImportError: torch is not installed.
    """
    directory = pathlib.Path(directory)
    fields = read_json(directory / "params.json")
    parts = [(path, pickles.read_tensors(path)) for path in _part_files(directory)]
    dim = fields.whole("dim")
    tensors = {}
    for name, first in parts[0][1].items():
        tensors[name] = first if is_ignored(LAYOUT, name) else _join(name, parts, dim)
    for path, held in parts:
        if unknown := sorted({*held} - {*tensors}):
            raise ValueError(f"{path}: tensor {unknown[0]} is not in {parts[0][0].name}; wanted it in all parts")
    config = _config(fields, tensors)
    source = Source(directory, LAYOUT, config, tensors, lambda to: _copy_tokenizer(directory, to))
    source.entries()
    return source


def _part_files(directory: pathlib.Path) -> list[pathlib.Path]:
    paths = {}
    for path in directory.glob("consolidated.*.pth"):
        found = re.fullmatch(r"consolidated\.([0-9]{2})\.pth", path.name)
        if not found:
            raise ValueError(f"{path}: no part of a checkpoint by its name; wanted consolidated.00.pth and so on")
        paths[int(found[1])] = path
    if not paths:
        raise FileNotFoundError(f"{directory}: no consolidated.00.pth; wanted the checkpoint's parts there")
    if absent := sorted({*range(max(paths))} - {*paths}):
        raise FileNotFoundError(
            f"{directory}: consolidated.{absent[0]:02}.pth is missing; wanted it, as there is {paths[max(paths)].name}"
        )
    return [paths[number] for number in sorted(paths)]


def _join(name: str, parts: Sequence[tuple[pathlib.Path, dict[str, Tensor]]], dim: int) -> Tensor:
    """One tensor from the pieces in all parts."""
    by_name = {name: part for part, name in LAYOUT.names.items()}
    part = by_name.get(re.sub(r"^layers\.[0-9]+\.", "layers.{}.", name))
    if part is None:
        raise ValueError(f"{parts[0][0]}: tensor {name} is unknown; wanted only those of a LLaMA")
    pieces = []
    for path, held in parts:
        if name not in held:
            raise ValueError(f"{path}: tensor {name} is missing; wanted it, as it is in {parts[0][0].name}")
        pieces.append(held[name])
        first, here = pieces[0], held[name]
        if (here.shape, here.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{path}: tensor {name} is {here.dtype}{here.shape}; wanted {first.dtype}{first.shape}, as in "
                f"{parts[0][0].name}"
            )
    first, n = pieces[0], len(pieces)
    if n == 1:
        return first
    if part == "embed/embedding":
        axis = _embedding_axis(parts[0][0], first.shape, n, dim)
    else:
        axis = _JOINED[part]
    if axis is None:
        return Tensor(first.file, first.shape, first.dtype, lambda: _same(name, pieces))
    if len(first.shape) != 2:
        raise ValueError(f"{parts[0][0]}: tensor {name} is {first.shape}; wanted a matrix")
    shape = tuple(size * n if i == axis else size for i, size in enumerate(first.shape))
    return Tensor(
        str(parts[0][0].parent), shape, first.dtype, lambda: np.concatenate([p.read() for p in pieces], axis=axis)
    )


def _embedding_axis(file: pathlib.Path, shape: tuple[int, ...], n: int, dim: int) -> int:
    """LLaMA 1 and 2 cut the embedding's columns, Llama 3 its rows."""
    for axis, columns in ((0, dim), (1, dim / n)):
        if len(shape) == 2 and shape[1] == columns:
            return axis
    raise ValueError(
        f"{file}: tensor tok_embeddings.weight is {shape}; wanted {dim} columns (dim of params.json), or 1/{n} of them"
    )


def _same(name: str, pieces: Sequence[Tensor]) -> np.ndarray:
    first = pieces[0].read()
    for piece in pieces[1:]:
        if piece.read().tobytes() != first.tobytes():  # as bytes, for NaN and -0
            raise ValueError(f"{piece.file}: tensor {name} differs from that in {pieces[0].file}; wanted it the same")
    return first


def _config(fields: Fields, tensors: dict[str, Tensor]) -> ModelConfig:
    for name in ("use_scaled_rope", "rope_scaling", "sliding_window", "moe"):
        fields.only(name, False)
    d_model = fields.whole("dim")
    n_heads = fields.whole("n_heads")
    vocab_size = _size(fields, tensors, "tok_embeddings.weight", 0)
    if fields.values.get("vocab_size") != -1 and fields.whole("vocab_size", vocab_size) != vocab_size:
        raise fields.error("vocab_size", f"{vocab_size}, rows of tok_embeddings.weight")
    d_ff = _size(fields, tensors, "layers.0.feed_forward.w1.weight", 0)
    if "multiple_of" in fields or "ffn_dim_multiplier" in fields:
        multiple = fields.whole("multiple_of", 256)
        scaled = fields.number("ffn_dim_multiplier", 1.0) * int(2 * (4 * d_model) / 3)
        # Before rounding, because the multiplier may be beyond any number of columns.
        wanted = multiple * math.ceil(int(scaled) / multiple) if scaled < 2**31 else scaled
        if wanted != d_ff:
            raise ValueError(
                f"{fields.file}: dim, multiple_of and ffn_dim_multiplier give a feed-forward of {wanted}; wanted "
                f"{d_ff}, rows of layers.0.feed_forward.w1.weight"
            )
    # The files name no special tokens. SentencePiece's of LLaMA 1 and 2 are the defaults; these are Llama 3's.
    special = dict(bos_id=128000, eos_id=128001) if vocab_size == 128256 else {}
    return fields.config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        n_layers=fields.whole("n_layers", most=len(tensors)),
        n_heads=n_heads,
        n_kv_heads=fields.whole("n_kv_heads", n_heads),
        head_size=fields.whole("head_dim", 0),
        window=fields.whole("max_seq_len", 2048),
        rope_base=fields.number("rope_theta", 10000.0),
        norm_eps=fields.number("norm_eps"),
        pad_id=None,
        **special,
    )


def _size(fields: Fields, tensors: dict[str, Tensor], name: str, axis: int) -> int:
    if name not in tensors:
        raise ValueError(f"{fields.file.parent}: tensor missing: {name}")
    if len(tensors[name].shape) != 2:
        raise ValueError(f"{tensors[name].file}: tensor {name} is {tensors[name].shape}; wanted a matrix")
    return tensors[name].shape[axis]


def _copy_tokenizer(directory: pathlib.Path, to: pathlib.Path) -> list[str]:
    return files.copy_tokenizer(directory, to) or files.copy_tokenizer(directory.absolute().parent, to)
