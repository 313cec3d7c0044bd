"""What a conversion will do, from the headers of the source alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from fot_jax import config as config_lib
from fot_jax import memory
from fot_jax.config import FLOAT_DTYPES, ModelConfig
from fot_jax.formats import hf
from fot_jax.formats.layout import AXES, OURS, Entry, table
from fot_jax.formats.source import Source, Tensor, cast
from fot_jax.host import row, size

TARGETS = ("orbax", "hf", "hf-llama")
DEVICE_GIB = (16, 80)  # of devices for which the plan says how much memory they have room for
# Python, NumPy, JAX and Orbax loaded.
_PROCESS_BYTES = 400 * 2**20


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor on its way.

    Attributes:
        entry: the tensor's place in the source's tree.
        tensor: the tensor.
        target: its place in the result.
        dtype: what it is stored in.
        repeat: how many times each key/value head is written.
    """

    entry: Entry
    tensor: Tensor
    target: Entry
    dtype: np.dtype
    repeat: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes in the result."""
        return math.prod(self.target.shape) * self.dtype.itemsize

    @property
    def source_nbytes(self) -> int:
        """Bytes in the source, as it is read."""
        return math.prod(self.tensor.shape) * self.tensor.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor in our orientation, heads repeated, in the dtype it is stored in."""
        array = cast(self.entry.to_ours(self.tensor.read()), self.dtype, self.entry.name)
        return array if self.repeat == 1 else np.repeat(array, self.repeat, axis=1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion.

    Attributes:
        source: what is read.
        to: the format written, one of `TARGETS`.
        config: the model written.
        pieces: every tensor, in the order of the source.
        dtype: what was asked for; None where dtypes are kept.
        notes: what the model written does not share with the one read, and nobody may expect.
    """

    source: Source
    to: str
    config: ModelConfig
    pieces: tuple[Piece, ...]
    dtype: str | None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in the result."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def parameters(self) -> int:
        """Numbers in the result."""
        return sum(math.prod(piece.target.shape) for piece in self.pieces)

    @property
    def memory_bytes(self) -> int:
        """Memory needed beyond mapped files: a tensor as it is read, in our orientation and in the result's; of our
        own checkpoints a whole leaf, where its layers lie in one piece.
        """
        read = max(piece.source_nbytes for piece in self.pieces)
        written = max(piece.nbytes for piece in self.pieces)
        return _PROCESS_BYTES + 2 * read + 2 * written + (self._largest_leaf() if self.source.layout is OURS else 0)

    def _largest_leaf(self) -> int:
        sizes: dict[tuple[str, ...], int] = {}
        for piece in self.pieces:
            sizes[piece.entry.path] = sizes.get(piece.entry.path, 0) + piece.source_nbytes
        return max(sizes.values())

    def _largest_memory(self, device_bytes: int) -> int:
        """Tokens of memory, of one row, that a device has room for beside the model."""
        params = self.parameters * np.dtype(self.config.dtypes.compute).itemsize
        return memory.forecast(self.config, device_bytes, params_bytes=params).tokens

    def summary(self) -> dict[str, Any]:
        """Everything worth knowing, for programs."""

        def by_dtype(sizes: list[tuple[str, int]]) -> dict[str, int]:
            return {name: sum(n for other, n in sizes if other == name) for name in sorted({name for name, _ in sizes})}

        found = [(piece.tensor.dtype.name, piece.source_nbytes) for piece in self.pieces]
        c = self.config
        return {
            "source": str(self.source.path),
            "source_format": self.source.layout.format,
            "to": self.to,
            "parameters": self.parameters,
            "tensors": len(self.pieces),
            "model": {
                **{f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name != "dtypes"},
                "memory_dtype": c.mem_dtype,
            },
            "source_bytes": by_dtype(found),
            "result_bytes": by_dtype([(piece.dtype.name, piece.nbytes) for piece in self.pieces]),
            "disk_bytes": self.nbytes,
            "memory_bytes": self.memory_bytes,
            "memory_token_bytes": memory.token_bytes(c),
            "largest_memory_tokens": {str(n): self._largest_memory(n * 2**30) for n in DEVICE_GIB},
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """The same, for people."""
        s, c = self.summary(), self.config
        sizes = lambda by: ", ".join(f"{name} {size(n)}" for name, n in by.items())
        layers = ", ".join(map(str, c.mem_layers)) or "none"
        grouped = f" ({c.n_kv_heads} for keys and values)" if c.n_kv_heads != c.n_heads else ""
        tokens = " (left out: LLaMA has none)" if c.mem_layers else ""
        if c.mem_layers and self.to != "hf-llama":
            room = " or ".join(f"{s['largest_memory_tokens'][str(n)]:,} in {n}" for n in DEVICE_GIB)
            tokens = f"; {s['memory_token_bytes'] / 1024:,.1f} KiB a token in {c.mem_dtype}, {room} GiB"
        rows = {
            "source": f"{s['source']} ({s['source_format']})",
            "result": {"orbax": "Orbax working directory", "hf": "Hugging Face LongLLaMA"}.get(
                self.to, "Hugging Face LLaMA"
            ),
            "parameters": f"{s['parameters']:,} in {s['tensors']} tensors",
            "model": f"{c.n_layers} layers, width {c.d_model}, feed-forward {c.d_ff}, "
            f"{c.n_heads} heads{grouped} of {c.head_size}",
            "vocabulary": f"{c.vocab_size}{', head tied to the embedding' if c.tie_embeddings else ''}",
            "window": f"{c.window}, rotary base {c.rope_base:g}",
            "memory layers": layers + tokens,
            "read": sizes(s["source_bytes"]),
            "written": sizes(s["result_bytes"]),
            "memory needed": size(s["memory_bytes"]),
        }
        lines = [*rows.items(), *(("note", note) for note in self.notes)]
        return "\n".join(row(name, value) for name, value in lines)


def make_plan(
    source: Source,
    to: str,
    *,
    dtype: str | None = None,
    memory_layers: tuple[int, ...] | None = None,
    memory_dtype: str | None = None,
    expand_kv_heads: bool = False,
) -> Plan:
    """Decides everything, and refuses what cannot be.

    Args:
        source: an opened checkpoint.
        to: "orbax", a working directory to train from or to evaluate; "hf", Hugging Face LongLLaMA for the published
            inference code; "hf-llama", Hugging Face LLaMA for stock transformers.
        dtype: of all tensors; None keeps each one's.
        memory_layers: layers that read memory; None keeps the source's.
        memory_dtype: what memory is kept in; None keeps the source's.
        expand_kv_heads: whether key/value heads are repeated until there is one for each query head.

    Raises:
        ValueError: an unknown target or dtype; tensors that are not those of the model; a model that the target cannot
            hold.
    """
    if to not in TARGETS:
        raise ValueError(f"target is {to!r}; wanted one of {', '.join(TARGETS)}")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(FLOAT_DTYPES)}")
    if to == "hf-llama" and (memory_layers or memory_dtype):
        raise ValueError("hf-llama has no memory; wanted no memory layers and no memory dtype, or another target")
    found = source.with_dtypes(dtype, memory_dtype).config
    repeat = found.n_heads // found.n_kv_heads if expand_kv_heads else 1
    config = found.replace(n_kv_heads=found.n_kv_heads * repeat)
    notes = []
    try:
        if to != "orbax":  # with the source's memory layers: without them it may be another model
            config_lib.check_target(config, to)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from error
    if memory_layers is not None:
        config = config.replace(mem_layers=memory_layers)
        if not config.mem_positionals and config.mem_layers != found.mem_layers:
            notes.append(
                "mem_positionals is False, so which layers have memory decides where positions are rotated: this is "
                "another model until it is tuned"
            )
    if to != "orbax" and not config_lib.holds_padding(config):
        notes.append(f"padding token {config.pad_id} is left out: PyTorch refuses one beyond {config.vocab_size} words")
        config = config.replace(pad_id=None)

    entries = source.entries()
    targets = {(e.part, e.layer): e for e in table(OURS if to == "orbax" else hf.LAYOUT, config)}
    # A stack of layers has one dtype: the one that holds all of theirs.
    joint: dict[tuple[str, ...], set[np.dtype]] = {}
    for entry, tensor in entries:
        joint.setdefault(targets[entry.part, entry.layer].path, set()).add(tensor.dtype)

    def stored(target: Entry, tensor: Tensor) -> np.dtype:
        if dtype is not None:
            return np.dtype(dtype)
        return tensor.dtype if to != "orbax" else _joint(joint[target.path])

    pieces = []
    for entry, tensor in entries:
        target = targets[entry.part, entry.layer]
        times = repeat if entry.part in ("attention/k", "attention/v") else 1
        pieces.append(Piece(entry, tensor, target, stored(target, tensor), times))
    return Plan(source, to, config, tuple(pieces), dtype, tuple(notes))


def _joint(dtypes: set[np.dtype]) -> np.dtype:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


# Every part has its place: a part that is added to one table only would be lost here.
assert set(OURS.names) == set(AXES) == set(hf.LAYOUT.names)
