"""Working directories of `train.py` and of conversions, read a layer at a time."""

from __future__ import annotations

import math
import os
import pathlib

from fot_jax import checkpoint, files
from fot_jax.formats.layout import OURS, leaf_shapes, table
from fot_jax.formats.source import Source, Tensor


def open_workdir(workdir: str | os.PathLike, step: int | None = None) -> Source:
    """The parameters of a checkpoint, the latest if `step` is None.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: damaged files, or arrays that are not those of its model.
    """
    workdir = pathlib.Path(workdir)
    reader = checkpoint.ParamsReader(workdir, step)
    found = {path: shape for path, (shape, _) in reader.leaves.items()}
    layers = sum(math.prod(shape[:-1]) for path, shape in found.items() if path[-2:] == ("mlp_norm", "scale"))
    if reader.config.n_layers != layers:
        raise checkpoint.CheckpointError(
            f"{workdir}: there are {layers} layers; model.json says {reader.config.n_layers}"
        )
    wanted = leaf_shapes(reader.config)
    for path in sorted({*found, *wanted}):
        if found.get(path) != wanted.get(path):
            raise checkpoint.CheckpointError(
                f"{workdir}: array {'/'.join(path)} is {found.get(path, 'absent')}; wanted "
                f"{wanted.get(path, 'no such array')}, by model.json"
            )
    tensors = {
        entry.name: Tensor(
            str(workdir), entry.shape, reader.leaves[entry.path][1], lambda e=entry: reader.read(e.path, e.stack)
        )
        # A leaf after the other, because layers of one may lie in one piece.
        for entry in sorted(table(OURS, reader.config), key=lambda entry: entry.path)
    }
    tokenizer = lambda to: files.copy_tokenizer(workdir, to)
    return Source(workdir, OURS, reader.config, tensors, tokenizer, states_memory_dtype=True)
