"""A checkpoint of any format, opened: what it holds is known, nothing of it is read yet."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fot_jax.config import FLOAT_DTYPES, DtypePolicy, ModelConfig
from fot_jax.formats.layout import Entry, Layout, flatten, is_ignored, leaf_shapes, nest, table

FLOATS = tuple(np.dtype(name) for name in ("float64", "float32", "float16", ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        file: where it is, for messages.
        shape: its shape there.
        dtype: what `read` gives.
        read: reads it, anew at each call; mapped from the file where that is possible.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: what was opened.
        layout: the format.
        config: the model it holds.
        tensors: by the format's names, in the order in which they are best read.
        tokenizer: writes the tokenizer's files that belong to the checkpoint into a directory and returns their names.
        states_memory_dtype: whether the files say what memory is kept in. Where they do not, it is kept in the dtype of
            the parameters.
    """

    path: pathlib.Path
    layout: Layout
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Callable[[pathlib.Path], list[str]]
    states_memory_dtype: bool = False

    def with_config(self, config: ModelConfig) -> Source:
        """The same tensors as another model, which must have the same parameters."""
        return dataclasses.replace(self, config=config)

    def with_window(self, window: int | None) -> Source:
        """The same model with another window; None keeps it."""
        if window is None:
            return self
        c = self.config
        # What the window of before had cut down begins anew.
        last = c.last_context_length if c.last_context_length < c.window else ModelConfig.last_context_length
        return self.with_config(c.replace(window=window, last_context_length=last))

    def with_dtypes(self, dtype: str | None = None, memory: str | None = None) -> Source:
        """The same model in other dtypes: parameters and computation in `dtype`, memory in `memory`; None keeps what
        the files state. A memory of which they state nothing follows the parameters.
        """
        found = self.config.dtypes
        if memory is None:
            memory = found.memory if self.states_memory_dtype or dtype is None else dtype
        return self.with_config(
            self.config.replace(dtypes=DtypePolicy(dtype or found.params, dtype or found.compute, memory))
        )

    def in_its_dtype(self) -> Source:
        """The same model computing in the dtype that most of its numbers have: for files that state none."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + math.prod(tensor.shape)
        dtype = max(sizes, key=sizes.__getitem__, default="float32")
        return self.with_dtypes(dtype if dtype in FLOAT_DTYPES else "float32")

    def entries(self, config: ModelConfig | None = None) -> list[tuple[Entry, Tensor]]:
        """Every tensor with its place in the tree of `config` (by default its own), in the order of `tensors`.

        Args:
            config: the same model, perhaps with other memory layers: they have no parameters of their own.

        Raises:
            ValueError: a tensor unknown, missing, of another shape or not floating point, named.
        """
        config = config or self.config
        if config.n_layers > len(self.tensors):  # before a table of as many as the file says is made
            raise ValueError(
                f"{self.path}: the configuration says {config.n_layers} layers; there are {len(self.tensors)} tensors "
                "in all, wanted at least one a layer"
            )
        wanted = {entry.name: entry for entry in table(self.layout, config)}
        head = self.layout.names["head/kernel"]
        out = []
        for name, tensor in self.tensors.items():
            if is_ignored(self.layout, name) or (name == head and self.config.tie_embeddings):
                continue
            if name not in wanted:
                raise ValueError(
                    f"{tensor.file}: tensor {name} is unknown; wanted only those of a LLaMA of this config"
                )
            entry = wanted.pop(name)
            if tensor.shape != entry.their_shape:
                raise ValueError(f"{tensor.file}: tensor {name} is {tensor.shape}; wanted {entry.their_shape}")
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{tensor.file}: tensor {name} is {tensor.dtype}; wanted floating point")
            out.append((entry, tensor))
        if wanted:
            more = f" and {len(wanted) - 5} more" if len(wanted) > 5 else ""
            raise ValueError(f"{self.path}: tensor missing: {', '.join([*wanted][:5])}{more}")
        return out

    def arrays(self, config: ModelConfig | None = None) -> Iterator[tuple[Entry, np.ndarray]]:
        """Every tensor in our orientation, one read at a time. Raises as `entries` and `check_tied_head`."""
        entries = self.entries(config)
        self.check_tied_head()
        for entry, tensor in entries:
            yield entry, entry.to_ours(tensor.read())

    def check_tied_head(self) -> None:
        """Reads head and embedding where both are there and the configuration ties them; ValueError if they differ."""
        names = self.layout.names
        head, embedding = (self.tensors.get(names[part]) for part in ("head/kernel", "embed/embedding"))
        if self.config.tie_embeddings and head is not None and embedding is not None:
            entry = table(self.layout, self.config.replace(tie_embeddings=False))[-1]
            if head.shape != entry.their_shape or not np.array_equal(entry.to_ours(head.read()).T, embedding.read()):
                raise ValueError(
                    f"{self.path}: tensor {names['head/kernel']} differs from {names['embed/embedding']}; "
                    "wanted them equal, as the configuration ties them"
                )


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """The array in another dtype, rounded to nearest; itself where it has that dtype.

    Raises:
        ValueError: a finite number that becomes infinite; the message names the tensor.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    # Only a narrower range can overflow.
    if ml_dtypes.finfo(dtype).max < ml_dtypes.finfo(array.dtype).max:
        overflown = ~np.isfinite(out) & np.isfinite(array)
        if overflown.any():
            raise ValueError(
                f"tensor {name} holds {array[overflown].flat[0]}, beyond {dtype}, whose greatest number is "
                f"{ml_dtypes.finfo(dtype).max}; wanted a dtype of greater range"
            )
    return out


def read_params(
    source: Source,
    config: ModelConfig | None = None,
    dtype: str | None = None,
    shardings: Any = None,
) -> dict[str, Any]:
    """All parameters in our tree.

    Args:
        config: the model wanted, by default the source's own; memory layers may be others.
        dtype: of the arrays; None stands for `config.dtypes.params`.
        shardings: where the arrays shall lie: a tree shaped like params, or one sharding for all. A host then holds no
            more than one leaf's part of its own devices, and one tensor.

    Returns:
        NumPy arrays, or with `shardings` JAX arrays.

    Raises:
        ValueError: tensors that are not those of the model, named; numbers that the dtype cannot hold.
    """
    config = config or source.config
    dtype_ = np.dtype(dtype or config.dtypes.params)
    if shardings is not None:
        return nest(dict(_sharded(source, config, dtype_, shardings)))
    leaves = {path: np.empty(shape, dtype_) for path, shape in leaf_shapes(config).items()}
    for entry, array in source.arrays(config):
        leaves[entry.path][entry.stack] = cast(array, dtype_, entry.name)
    return nest(leaves)


def _sharded(
    source: Source, config: ModelConfig, dtype: np.dtype, shardings: Any
) -> Iterator[tuple[tuple[str, ...], Any]]:
    import jax  # here, because reading itself needs none

    shapes = leaf_shapes(config)
    one = isinstance(shardings, jax.sharding.Sharding)
    place = dict.fromkeys(shapes, shardings) if one else flatten(shardings)
    by_leaf: dict[tuple[str, ...], list[tuple[Entry, Tensor]]] = {}
    source.check_tied_head()
    for entry, tensor in source.entries(config):
        by_leaf.setdefault(entry.path, []).append((entry, tensor))
    for path, shape in shapes.items():
        places = place[path].addressable_devices_indices_map(shape)
        bounds = {device: tuple(part.indices(n)[:2] for part, n in zip(at, shape)) for device, at in places.items()}
        parts = {b: np.empty([stop - start for start, stop in b], dtype) for b in set(bounds.values())}
        for entry, tensor in by_leaf[path]:
            array = cast(entry.to_ours(tensor.read()), dtype, entry.name)
            for b, part in parts.items():
                stack, within = b[: len(entry.stack)], b[len(entry.stack) :]
                if all(start <= i < stop for i, (start, stop) in zip(entry.stack, stack)):
                    at = tuple(i - start for i, (start, _) in zip(entry.stack, stack))
                    part[at] = array[tuple(slice(*ends) for ends in within)]
        arrays = [jax.device_put(parts[b], device) for device, b in bounds.items()]
        leaf = jax.make_array_from_single_device_arrays(shape, place[path], arrays)
        yield path, jax.block_until_ready(leaf)  # or parts of several leaves would be held
