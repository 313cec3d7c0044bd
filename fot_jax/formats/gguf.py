"""GGUF files of LLaMA models, as llama.cpp writes them: full, half or quantised numbers.

The container is that of ggml's published `docs/gguf.md`, versions 2 and 3; names and fields are those of the
architecture 'llama' in `gguf-py/gguf/constants.py`. The file is parsed here, because a damaged one must end in an
error; the package gguf knows the number types and dequantises.
"""

from __future__ import annotations

import math
import os
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

from fot_jax.config import ModelConfig
from fot_jax.formats.fields import Fields
from fot_jax.formats.layout import Layout
from fot_jax.formats.mapped import Cursor
from fot_jax.formats.source import Source, Tensor

LAYOUT = Layout(
    "GGUF",
    {
        "embed/embedding": "token_embd.weight",
        "attention_norm/scale": "blk.{}.attn_norm.weight",
        "attention/q": "blk.{}.attn_q.weight",
        "attention/k": "blk.{}.attn_k.weight",
        "attention/v": "blk.{}.attn_v.weight",
        "attention/o": "blk.{}.attn_output.weight",
        "mlp_norm/scale": "blk.{}.ffn_norm.weight",
        "mlp/gate": "blk.{}.ffn_gate.weight",
        "mlp/down": "blk.{}.ffn_down.weight",
        "mlp/up": "blk.{}.ffn_up.weight",
        "norm/scale": "output_norm.weight",
        "head/kernel": "output.weight",
    },
    outputs_first=True,
    adjacent_pairs=True,  # llama.cpp's converter brings Hugging Face's halves into Meta's order
    ignored=r"rope_freqs\.weight",  # factors of the rotary angles; must be ones, see `_check_rope_freqs`
)

_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
# Rows dequantised at once, so that nothing of a tensor's size is held beside the result.
_ROWS = 512
# A text of a key or a name, and elements of a list; greater ones are damage.
_MAX_NAME, _MAX_LIST = 2**16 - 1, 2**24


def open_file(path: str | os.PathLike) -> Source:
    """The model in a GGUF file.

    Returns:
        The source. Tensors in F32, F16 and BF16 are mapped and keep their dtype; those in Q8_0, Q4_0, Q4_1, Q4_K and
        Q6_K are float32, dequantised at each read. Without a head the embedding is tied. The tokenizer is written from
        the file's vocabulary; a file without one gives no files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged or cut file; one of several parts; another architecture, number type or size than wanted;
            scaled rotary positions, experts, biases. Each names the file and what it found.
        ImportError: the package gguf is not installed.
    """
    path = pathlib.Path(path)
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"{path}: reading GGUF needs the package gguf; pip install 'fot-jax[convert]'") from error
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: shorter than a GGUF header; wanted 24 bytes at least")
    cursor = _Cursor(path)
    values, n_tensors = _read_metadata(cursor)
    fields = Fields(path, values)
    _check_supported(fields)
    tensors = _read_tensors(cursor, gguf, fields, n_tensors)
    config = _config(fields, tensors)
    _check_rope_freqs(tensors)
    source = Source(path, LAYOUT, config, tensors, lambda to: _write_tokenizer(to, path, values))
    source.entries()
    return source


# The file


class _Cursor(Cursor):
    """A place in the file. Every method raises ValueError where the file ends before what it reads."""

    def skip(self, size: int, what: str) -> int:
        """Where `size` bytes begin that are then behind the cursor."""
        start, end = self.at, self.at + size
        if end > len(self.data):
            raise self.error(start, f"{what} of {size} bytes", f"at most {len(self.data) - start}: there the file ends")
        self.at = end
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code), "a number"))[0]

    def text(self, most: int | None = None) -> str:
        at = self.at
        length = self.scalar("Q")
        if most is not None and length > most:
            raise self.error(at, f"a name of {length} bytes", f"at most {most}")
        start = self.skip(length, "a text")
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.error(at, f"a text that is not UTF-8 ({error.reason})", "UTF-8") from error

    def value(self) -> Any:
        """A typed value: number, bool, text, list of texts or array of numbers (mapped)."""
        at = self.at
        kind = self.scalar("I")
        if kind == _LIST:
            return self._list()
        if kind == _TEXT:
            return self.text()
        if kind not in _SCALARS:
            raise self.error(at, f"a value of type {kind}", "one of 0 to 12")
        value = self.scalar(_SCALARS[kind])
        # 1e-5 in float32 is meant as 1e-5: the shortest number that gives it.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def _list(self) -> Any:
        at = self.at
        kind, length = self.scalar("I"), self.scalar("Q")
        if (kind not in _SCALARS and kind != _TEXT) or length > _MAX_LIST:
            raise self.error(at, f"a list of {length} values of type {kind}", f"texts or numbers, at most {_MAX_LIST}")
        if kind == _TEXT:
            return [self.text() for _ in range(length)]
        dtype = np.dtype("<" + _SCALARS[kind])
        return np.frombuffer(self.data, dtype, length, self.skip(dtype.itemsize * length, "a list"))


# Codes of a value's type; numbers as struct and NumPy name them.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_FLOAT32, _TEXT, _LIST = 6, 8, 9


def _read_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """Values by key, and how many tensors follow."""
    if cursor.data[:4] != b"GGUF":
        raise cursor.error(0, f"{cursor.data[:4]!r}", "b'GGUF'")
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise cursor.error(4, f"version {version}", "2 or 3, little-endian")
    n_tensors, n_values = cursor.scalar("Q"), cursor.scalar("Q")
    values: dict[str, Any] = {}
    for _ in range(n_values):
        at = cursor.at
        key = cursor.text(_MAX_NAME)
        if key in values:
            raise cursor.error(at, f"key {key} for the second time", "every key once")
        values[key] = cursor.value()
    return values, n_tensors


def _read_tensors(cursor: _Cursor, gguf: Any, fields: Fields, n_tensors: int) -> dict[str, Tensor]:
    path, data = cursor.path, cursor.data
    found = {}
    for _ in range(n_tensors):
        at = cursor.at
        name = cursor.text(_MAX_NAME)
        n_dims = cursor.scalar("I")
        if n_dims > 4:
            raise cursor.error(at, f"tensor {name} of {n_dims} dimensions", "at most 4")
        # The file has the dimension that varies fastest first.
        shape = tuple(cursor.scalar("Q") for _ in range(n_dims))[::-1]
        if name in found:
            raise cursor.error(at, f"tensor {name} for the second time", "every tensor once")
        found[name] = shape, cursor.scalar("I"), cursor.scalar("Q")
    alignment = fields.whole("general.alignment", 32)
    if alignment & (alignment - 1):
        raise fields.error("general.alignment", "a power of two")
    begin = -(-cursor.at // alignment) * alignment
    out = {}
    for name, (shape, code, offset) in found.items():
        type_ = _number_type(path, gguf, name, code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        if not shape or shape[-1] % block:
            raise ValueError(f"{path}: tensor {name} is {shape} in {type_.name}; wanted rows of a multiple of {block}")
        count, row_bytes = math.prod(shape), shape[-1] // block * block_bytes
        start, size = begin + offset, math.prod(shape[:-1]) * row_bytes
        if not count or start + size > len(data):
            raise ValueError(
                f"{path}: tensor {name} is {shape} in {type_.name}, bytes {start} to {start + size}; wanted them "
                f"within the file, which has {len(data)}"
            )
        if type_.name in _PLAIN:
            dtype = _PLAIN[type_.name]
            read = lambda a=(data, dtype, count, start), shape=shape: np.frombuffer(*a).reshape(shape)
        else:
            dtype = np.dtype(np.float32)
            raw = (data, np.uint8, size, start)
            read = lambda raw=raw, shape=shape, type_=type_: _dequantise(gguf, np.frombuffer(*raw), shape, type_)
        out[name] = Tensor(str(path), shape, dtype, read)
    return out


def _number_type(path: pathlib.Path, gguf: Any, name: str, code: int) -> Any:
    try:
        type_ = gguf.GGMLQuantizationType(code)
    except ValueError:
        type_ = None
    if type_ is None or type_.name not in (*_PLAIN, *_QUANTISED):
        shown = f"number type {code}" if type_ is None else type_.name
        raise ValueError(f"{path}: tensor {name} is in {shown}; wanted {', '.join((*_PLAIN, *_QUANTISED))}")
    return type_


def _dequantise(gguf: Any, raw: np.ndarray, shape: tuple[int, ...], type_: Any) -> np.ndarray:
    rows = raw.reshape(math.prod(shape[:-1]), -1)
    out = np.empty((len(rows), shape[-1]), np.float32)
    for i in range(0, len(rows), _ROWS):
        out[i : i + _ROWS] = gguf.dequantize(rows[i : i + _ROWS], type_)
    return out.reshape(shape)


# What it holds


def _check_supported(fields: Fields) -> None:
    if fields.text("general.architecture") != "llama":
        raise fields.error("general.architecture", "'llama'")
    if fields.whole("split.count", 1, least=0) > 1:
        raise fields.error("split.count", "a model in one file; join its parts with `llama-gguf-split --merge`")
    fields.only("llama.expert_count", 0)
    fields.only("llama.rope.scaling.type", "none")
    if "llama.rope.scaling.type" not in fields:  # llama.cpp then takes it for linear
        for name in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
            fields.only(name, 1.0)


def _config(fields: Fields, tensors: dict[str, Tensor]) -> ModelConfig:
    embedding = tensors.get(LAYOUT.names["embed/embedding"])
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{fields.file}: {'no' if embedding is None else 'no matrix'} token_embd.weight; wanted one")
    d_model, n_heads = fields.whole("llama.embedding_length"), fields.whole("llama.attention.head_count")
    head_size = fields.whole("llama.attention.key_length", d_model // n_heads or 1)
    for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.whole(name, head_size) != head_size:
            raise fields.error(name, f"the head size, {head_size}")
    llama_tokens = fields.text("tokenizer.ggml.model", "llama") == "llama"
    return fields.config(
        vocab_size=embedding.shape[0],
        d_model=d_model,
        d_ff=fields.whole("llama.feed_forward_length"),
        n_layers=fields.whole("llama.block_count", most=len(tensors)),
        n_heads=n_heads,
        n_kv_heads=fields.whole("llama.attention.head_count_kv", n_heads),
        head_size=head_size,
        window=fields.whole("llama.context_length"),
        rope_base=fields.number("llama.rope.freq_base", 10000.0),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        tie_embeddings=LAYOUT.names["head/kernel"] not in tensors,
        # Where it does not say, SentencePiece's of LLaMA, as llama.cpp assumes.
        bos_id=fields.whole("tokenizer.ggml.bos_token_id", 1 if llama_tokens else None, least=0),
        eos_id=fields.whole("tokenizer.ggml.eos_token_id", 2 if llama_tokens else None, least=0),
        pad_id=fields.whole("tokenizer.ggml.padding_token_id", None, least=0),
    )


def _check_rope_freqs(tensors: dict[str, Tensor]) -> None:
    factors = tensors.get("rope_freqs.weight")
    if factors is not None and not (factors.read() == 1).all():
        raise ValueError(
            f"{factors.file}: tensor rope_freqs.weight is not all ones; wanted no scaled rotary positions, which this "
            "model does not have"
        )


def _write_tokenizer(directory: pathlib.Path, path: pathlib.Path, values: dict[str, Any]) -> list[str]:
    if "tokenizer.ggml.model" not in values:
        return []
    from fot_jax import tokenizer

    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}
    try:
        return tokenizer.write_from_gguf(directory, plain)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
