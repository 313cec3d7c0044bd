"""Which tensor of a checkpoint is which part of our tree: what the name tables of all formats have in common.

A model has a fixed set of *parts*: a few of the whole model, the others of every layer. A format is a `Layout`: a
name for each part, and how its matrices lie. Names and parts are a bijection, so a table is read in both directions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fot_jax.config import ModelConfig

# Part -> axes. Axes before the blank are a matrix's inputs, those after it its outputs; without a blank the tensor is
# the same in every format. D model, H query heads, G key/value heads, K head size, F feed-forward, V words.
TOP = {"embed/embedding": "VD", "norm/scale": "D", "head/kernel": "D V"}
LAYER = {
    "attention_norm/scale": "D",
    "attention/q": "D HK",
    "attention/k": "D GK",
    "attention/v": "D GK",
    "attention/o": "HK D",
    # Not in LLaMA: the per-head temperature of models with query/key normalisation.
    "attention/temperature": "H",
    "mlp_norm/scale": "D",
    "mlp/gate": "D F",
    "mlp/up": "D F",
    "mlp/down": "F D",
}
AXES = {**TOP, **LAYER}
ROTATED = ("attention/q", "attention/k")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one format names and lays out the parts of a model.

    Attributes:
        format: what the format is called.
        names: part -> name; `{}` stands for the layer's number. A part without a name cannot be stored.
        outputs_first: matrices are [out, in] (PyTorch) or [in, out]; None: heads are apart, as in our tree.
        adjacent_pairs: rotary pairs are elements 2i and 2i + 1 of a head (Meta's way), not i and i + K/2 (ours).
        ignored: names of tensors that are a function of the configuration.
    """

    format: str
    names: Mapping[str, str]
    outputs_first: bool | None
    adjacent_pairs: bool
    ignored: str = r"(?!)"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a format and its place in our tree.

    Attributes:
        layout: the format.
        name: the tensor's name there.
        part: what it is, a key of `AXES`.
        layer: whose, counted from 0; None for a part of the whole model.
        path: keys of the leaf in our tree.
        stack: index of this layer in the leaf's leading dimensions; () for a leaf that is not stacked.
        shape: our shape, without the leading dimensions.
    """

    layout: Layout
    name: str
    part: str
    layer: int | None
    path: tuple[str, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def _inputs(self) -> int:
        """How many of `shape`'s dimensions are the matrix's inputs; 0 where the tensor is kept as it is."""
        inputs, blank, _ = AXES[self.part].partition(" ")
        return len(inputs) if blank and self.layout.outputs_first is not None else 0

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The tensor's shape in the format."""
        if not self._inputs:
            return self.shape
        matrix = math.prod(self.shape[: self._inputs]), math.prod(self.shape[self._inputs :])
        return matrix[::-1] if self.layout.outputs_first else matrix

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """From the format's orientation to ours; a view where NumPy can."""
        if not self._inputs:
            return tensor
        ours = (tensor.T if self.layout.outputs_first else tensor).reshape(self.shape)
        if self.layout.adjacent_pairs and self.part in ROTATED:
            ours = ours.reshape(*self.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(self.shape)
        return ours

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """From our orientation to the format's; a view where NumPy can."""
        if not self._inputs:
            return array
        if self.layout.adjacent_pairs and self.part in ROTATED:
            array = array.reshape(*self.shape[:-1], 2, -1).swapaxes(-1, -2)
        matrix = self.their_shape[::-1] if self.layout.outputs_first else self.their_shape
        return array.reshape(matrix).T if self.layout.outputs_first else array.reshape(matrix)


def table(layout: Layout, config: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of a model in a format, embedding first; a bijection with our leaves' layers.

    Raises:
        ValueError: the format has no name for a part of this model.
    """
    sizes = dict(
        V=config.vocab_size,
        D=config.d_model,
        F=config.d_ff,
        H=config.n_heads,
        G=config.n_kv_heads,
        K=config.head_size,
    )

    def entry(part: str, layer: int | None, path: str, stack: tuple[int, ...]) -> Entry:
        if part not in layout.names:
            raise ValueError(f"{layout.format} has no place for {part}, which this model has")
        shape = tuple(sizes[axis] for axis in AXES[part].replace(" ", ""))
        return Entry(layout, layout.names[part].format(layer), part, layer, tuple(path.split("/")), stack, shape)

    parts = [part for part in LAYER if part != "attention/temperature" or config.qk_norm]
    out = [entry("embed/embedding", None, "embed/embedding", ())]
    for segment, layer, kind, stack in _places(config):
        out += [entry(part, layer, f"segment_{segment}/{kind}/{part}", stack) for part in parts]
    out.append(entry("norm/scale", None, "norm/scale", ()))
    return (*out, entry("head/kernel", None, "head/kernel", ())) if not config.tie_embeddings else tuple(out)


def _places(config: ModelConfig) -> Iterator[tuple[int, int, str, tuple[int, ...]]]:
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


# Our own layout, a tensor a layer: names are places.
OURS = Layout(
    "fot_jax",
    {**{part: part for part in TOP}, **{part: "layer_{}/" + part for part in LAYER}},
    outputs_first=None,
    adjacent_pairs=False,
)


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every leaf of our tree, stacks included."""
    shapes = {}
    for entry in table(OURS, config):
        # Entries come in order, so the last index seen is the greatest.
        shapes[entry.path] = tuple(i + 1 for i in entry.stack) + entry.shape
    return shapes


def count_params(config: ModelConfig) -> int:
    """Number of parameters; a tied head counts once."""
    return sum(math.prod(shape) for shape in leaf_shapes(config).values())


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A tree of dictionaries from its leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Leaves of a tree of dictionaries by path."""
    out = {}
    for key, value in tree.items():
        out.update(flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value})
    return out


def is_ignored(layout: Layout, name: str) -> bool:
    """Whether a tensor of that name may be there and says nothing."""
    return re.fullmatch(layout.ignored, name) is not None
