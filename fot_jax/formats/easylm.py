"""EasyLM's streamed msgpack checkpoints, in which OpenLLaMA is published for JAX.

The file is what `EasyLM/checkpoint.py` of young-geng/EasyLM writes: msgpack pairs one after the other, each of a key
(an array of strings) and the bytes that `flax.serialization.to_bytes` makes of one array. Names are those of
`EasyLM/models/llama/llama_model.py`; the fork that LongLLaMA was trained with (CStanKonrad/long_llama,
`fot_continued_pretraining`) adds `mem_layers` and `rope_theta` to the configuration.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fot_jax import files
from fot_jax.config import SIZES, ModelConfig
from fot_jax.formats import pickles
from fot_jax.formats.fields import Fields, read_json
from fot_jax.formats.layout import Layout, table
from fot_jax.formats.mapped import Cursor
from fot_jax.formats.source import FLOATS, Source, Tensor

LAYOUT = Layout(
    "EasyLM",
    {
        "embed/embedding": "transformer/wte/embedding",
        "attention_norm/scale": "transformer/h/{}/attention_norm/kernel",
        "attention/q": "transformer/h/{}/attention/wq/kernel",
        "attention/k": "transformer/h/{}/attention/wk/kernel",
        "attention/v": "transformer/h/{}/attention/wv/kernel",
        "attention/o": "transformer/h/{}/attention/wo/kernel",
        "mlp_norm/scale": "transformer/h/{}/ffn_norm/kernel",
        "mlp/gate": "transformer/h/{}/feed_forward/w1/kernel",
        "mlp/down": "transformer/h/{}/feed_forward/w2/kernel",
        "mlp/up": "transformer/h/{}/feed_forward/w3/kernel",
        "norm/scale": "transformer/ln_f/kernel",
        "head/kernel": "lm_head/kernel",
    },
    outputs_first=False,
    adjacent_pairs=True,
)

# What a training state (streaming_train_state) holds beside the parameters.
_NOT_PARAMETERS = ("opt_state", "step")
_DTYPES = {dtype.name: dtype for dtype in FLOATS}


def open_checkpoint(path: str | os.PathLike, *, size: ModelConfig | None = None) -> Source:
    """A streamed checkpoint, parameters alone or a whole training state, of which the optimizer's is left out.

    The configuration is that of the pickle EasyLM writes beside the file (metadata.pkl, metadata_STEP.pkl; no code in
    it is run), of llama_config.pkl or of config.json, in this order.

    Args:
        path: the file, or a directory that holds exactly one.
        size: the model's sizes, instead of a configuration beside the file.

    Returns:
        The source; tensors as wide as they are in the file.

    Raises:
        FileNotFoundError: no such file, or none in the directory.
        ValueError: a damaged file (with the byte where), sizes that are not those of the tensors, a configuration that
            this model does not have, or none; several checkpoints in the directory.
    """
    path = pathlib.Path(path)
    file = find(path)
    if file is None:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory; wanted an EasyLM checkpoint")
        if path.is_file():
            raise ValueError(f"{path}: not a streamed EasyLM checkpoint; wanted msgpack pairs of a key and an array")
        raise FileNotFoundError(f"{path}: no streamed EasyLM checkpoint; wanted one there")
    tensors = _index(file)
    config = size or _read_config(file, tensors)
    source = Source(file, LAYOUT, config, tensors, lambda to: files.copy_tokenizer(file.parent, to))
    source.entries()
    return source


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The streamed checkpoint that a path is, or that a directory holds; None if there is none.

    Raises:
        ValueError: several in the directory, named.
    """
    found = [p for p in (sorted(path.iterdir()) if path.is_dir() else [path]) if p.is_file() and _is_streamed(p)]
    if len(found) > 1:
        raise ValueError(f"{path}: holds {', '.join(p.name for p in found)}; wanted one checkpoint, or the file named")
    return found[0] if found else None


def _is_streamed(path: pathlib.Path) -> bool:
    """By content, as such files have all sorts of names: an array of two, the first an array of strings."""
    with path.open("rb") as file:
        head = file.read(3)
    if len(head) < 3:
        return False
    return head[0] == 0x92 and 0x91 <= head[1] <= 0x9F and (0xA0 <= head[2] <= 0xBF or head[2] == 0xD9)


# The file


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Numbers that lie in a row: all of an array, or a chunk of it."""

    dtype: np.dtype
    start: int
    count: int


def _index(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors by name; one pass over the file's headers."""
    cursor = _Cursor(path)
    data = cursor.data
    out: dict[str, Tensor] = {}
    seen: dict[tuple[str, ...], int] = {}
    while cursor.at < len(data):
        at = cursor.at
        cursor.expect("array", 2)
        key = tuple(cursor.text() for _ in range(cursor.expect("array", most=32)))
        if key in seen:
            raise cursor.error(at, f"key {'/'.join(key)}, which is at byte {seen[key]} too", "every key once")
        seen[key] = at
        start, end = cursor.bytes("bin")
        if not key or key[0] not in _NOT_PARAMETERS:
            cursor.at = start
            for _ in range(2):
                key = key[1:] if key[:1] == ("params",) else key
            name = "/".join(key)
            if name in out:
                raise cursor.error(at, f"parameter {name} for the second time", "every parameter once")
            out[name] = _tensor(cursor, data, end)
            if cursor.at != end:
                raise cursor.error(at, f"an array up to byte {cursor.at}", f"one up to {end}, where its bytes end")
        cursor.at = end
    return out


def _tensor(cursor: _Cursor, data: mmap.mmap, end: int) -> Tensor:
    """An array as flax serialises it: one extension object, or above 2**30 bytes a map with chunks of it."""
    at = cursor.at
    kind, value = cursor.next()
    cursor.at = at
    if kind == "ext":
        shape, whole = _array(cursor)
        pieces = [whole]
    elif kind == "map":
        shape, pieces = _chunks(cursor)
    else:
        raise cursor.error(at, f"{kind} {value}", "an array (extension type 1, or a map with its chunks)")
    dtype = pieces[0].dtype

    def read() -> np.ndarray:
        views = [np.frombuffer(data, piece.dtype, piece.count, piece.start) for piece in pieces]
        return (views[0] if len(views) == 1 else np.concatenate(views)).reshape(shape)

    return Tensor(str(cursor.path), shape, dtype, read)


def _array(cursor: _Cursor) -> tuple[tuple[int, ...], _Piece]:
    """An extension object of type 1: (shape, dtype's name, buffer)."""
    at = cursor.at
    start, end = cursor.bytes("ext")
    cursor.at = start
    cursor.expect("array", 3)
    shape = tuple(cursor.whole() for _ in range(cursor.expect("array", most=32)))
    at_dtype = cursor.at
    name = cursor.text()
    if name not in _DTYPES:
        raise cursor.error(at_dtype, f"an array of {name!r}", f"floating point, {', '.join(_DTYPES)}")
    first, last = cursor.bytes("bin")
    dtype, count = _DTYPES[name], math.prod(shape)
    if last - first != count * dtype.itemsize or last != end:
        raise cursor.error(at, f"{last - first} bytes of numbers", f"{count * dtype.itemsize} for {dtype}{shape}")
    cursor.at = end
    return shape, _Piece(dtype, first, count)


def _chunks(cursor: _Cursor) -> tuple[tuple[int, ...], list[_Piece]]:
    """A map {"__msgpack_chunked_array__": True, "shape": {"0": n, ...}, "chunks": {"0": array, ...}}."""
    at = cursor.at
    found: dict[str, Any] = {}
    for _ in range(cursor.expect("map", 3)):
        name = cursor.text()
        if name == "__msgpack_chunked_array__":
            found[name] = cursor.expect("bool", 1)
        elif name == "shape":
            found[name] = [n for _, n in cursor.numbered(cursor.whole, most=32)]
        elif name == "chunks":
            found[name] = cursor.numbered(lambda: _array(cursor), most=2**20)
    if len(found) != 3 or not found["chunks"]:
        raise cursor.error(at, f"a map of {', '.join(found) or 'nothing known'}", "a chunked array")
    shape = tuple(found["shape"])
    pieces = [piece for _, (_, piece) in found["chunks"]]
    count, dtypes = sum(piece.count for piece in pieces), {piece.dtype for piece in pieces}
    if count != math.prod(shape) or len(dtypes) > 1:
        raise cursor.error(
            at, f"chunks of {count} numbers, {' and '.join(sorted(map(str, dtypes)))}", f"one array of shape {shape}"
        )
    return shape, pieces


class _Cursor(Cursor):
    """A place in a msgpack file; reads heads of objects, never what long ones hold.

    Every method raises ValueError with the file and the byte where something else is than it reads.
    """

    def _number(self, size: int) -> int:
        if self.at + size > len(self.data):
            raise self.error(self.at, f"the file ends at byte {len(self.data)}", f"{size} bytes more, at least")
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "big")

    def next(self) -> tuple[str, int]:
        """(kind, value) of the object's head: a number's value, the length of a text, of bytes, of an array or map.

        An extension object's type is read, and must be 1, an array's.
        """
        at = self.at
        head = self._number(1)
        for kind, first, last in (("whole", 0, 0x7F), ("map", 0x80, 0x8F), ("array", 0x90, 0x9F), ("text", 0xA0, 0xBF)):
            if first <= head <= last:
                return kind, head - first
        if head in (0xC2, 0xC3):
            return "bool", head - 0xC2
        if head in _HEADS:
            kind, size = _HEADS[head]
            value = self._number(size) if size > 0 else -size
            if kind == "ext" and (type_ := self._number(1)) != 1:
                raise self.error(at, f"an object of extension type {type_}", "type 1, an array")
            return kind, value
        raise self.error(at, f"a msgpack object that begins with 0x{head:02x}", "a key and an array")

    def expect(self, kind: str, value: int | None = None, most: int | None = None) -> int:
        """Value of the next head, which must be of that kind; exactly `value`, or up to `most`."""
        at = self.at
        found_kind, found = self.next()
        if found_kind != kind or (value is not None and found != value) or (most is not None and found > most):
            bound = f" {value}" if value is not None else f" of at most {most}" if most is not None else ""
            raise self.error(at, f"{found_kind} {found}", kind + bound)
        return found

    def whole(self) -> int:
        return self.expect("whole")

    def text(self) -> str:
        start = self.at
        length = self.expect("text", most=255)
        end = self.at + length
        if end > len(self.data):
            raise self.error(start, f"a text of {length} bytes up to {end}", f"it to end by {len(self.data)}")
        raw, self.at = self.data[self.at : end], end
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(start, f"{raw!r}", "UTF-8") from error

    def bytes(self, kind: str) -> tuple[int, int]:
        """(start, end) of bytes ('bin') or of an extension object's ('ext'); the cursor is at the end."""
        at = self.at
        length = self.expect(kind)
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise self.error(at, f"{length} bytes up to {self.at}", f"them to end by {len(self.data)}, the file's end")
        return start, self.at

    def numbered(self, read: Any, most: int) -> list[tuple[int, Any]]:
        """A map whose keys are "0", "1" ... in any order, sorted; as flax writes a tuple."""
        at = self.at
        out = {}
        n = self.expect("map", most=most)
        for _ in range(n):
            name = self.text()
            out[name] = read()
        if set(out) != {str(i) for i in range(n)}:
            raise self.error(at, f"a map of {', '.join(sorted(out)[:5])}", f"keys 0 to {n - 1}")
        return [(i, out[str(i)]) for i in range(n)]


# First byte -> kind and how many bytes of length, or of value, follow; negative: the length itself.
_HEADS = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xD4 + i: ("ext", -(1 << i)) for i in range(5)},
    **{0xCC + i: ("whole", 1 << i) for i in range(4)},
    **{0xD9 + i: ("text", 1 << i) for i in range(3)},
    **{0xDC + i: ("array", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}


# The configuration


def _read_config(file: pathlib.Path, tensors: Mapping[str, Tensor]) -> ModelConfig:
    # A milestone streaming_params_1000 has metadata_1000.pkl.
    step = re.search(r"_[0-9]+$", file.stem)
    names = [f"metadata{step[0]}.pkl"] if step else []
    for name in (*names, "metadata.pkl", "llama_config.pkl", "config.json"):
        beside = file.with_name(name)
        if beside.is_file():
            fields = read_json(beside) if name.endswith(".json") else _unpickle(beside)
            return _config(fields, len(tensors))
    raise ValueError(
        f"{file}: no configuration beside it (metadata.pkl, llama_config.pkl or config.json), and the tensors "
        f"{_fitting(tensors)}; wanted a configuration, or its size named: --size NAME"
    )


def _unpickle(path: pathlib.Path) -> Fields:
    values = Fields(path, _fields_of(pickles.read_values(path))).values
    values = values.get("llama_config", values)
    return Fields(path, _fields_of(values))


def _fields_of(values: Any) -> Any:
    """Of an ml_collections.ConfigDict, which keeps its fields so; anything else itself."""
    state = values.state if isinstance(values, pickles.Inert) else None
    return state["_fields"] if isinstance(state, Mapping) and "_fields" in state else values


def _config(fields: Fields, n_tensors: int) -> ModelConfig:
    for name in ("rope_scaling", "attention_bias", "mlp_bias"):
        fields.only(name, False)
    fields.only("hidden_act", "silu")
    # EasyLM's name, and that of forks which follow transformers.
    window = "max_sequence_length" if "max_sequence_length" in fields else "max_position_embeddings"
    mem_layers = fields.values.get("mem_layers") or ()
    n_layers = fields.whole("num_hidden_layers", most=n_tensors)
    if not isinstance(mem_layers, (list, tuple)) or not all(type(i) is int and 0 <= i < n_layers for i in mem_layers):
        raise fields.error("mem_layers", f"a list of layers from 0 to {n_layers - 1}")

    def token(name: str, default: int | None) -> int | None:
        # Null and -1 say that there is none; a field left out says nothing.
        id_ = fields.whole(name, None if name in fields.values else default, least=-1)
        return None if id_ == -1 else id_

    return fields.config(
        vocab_size=fields.whole("vocab_size"),
        d_model=fields.whole("hidden_size"),
        d_ff=fields.whole("intermediate_size"),
        n_layers=n_layers,
        n_heads=fields.whole("num_attention_heads"),
        n_kv_heads=fields.whole("num_key_value_heads", 0),
        head_size=fields.whole("head_dim", 0),
        window=fields.whole(window, 2048),
        mem_layers=tuple(mem_layers),
        rope_base=fields.number("rope_theta", 10000.0),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        last_context_length=fields.whole("last_context_length", 1024),
        init_std=fields.number("initializer_range", 0.02),
        bos_id=token("bos_token_id", 1),
        eos_id=token("eos_token_id", 2),
        pad_id=token("pad_token_id", None),
    )


def _fitting(tensors: Mapping[str, Tensor]) -> str:
    found = {name: tensor.shape for name, tensor in tensors.items()}
    names = []
    for name, config in SIZES.items():
        # EasyLM has no models with query/key normalisation.
        if not config.qk_norm and {e.name: e.their_shape for e in table(LAYOUT, config)} == found:
            names.append(name)
    return f"fit {', '.join(names)}" if names else f"fit none of {', '.join(SIZES)}"
