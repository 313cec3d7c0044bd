"""Writing a planned conversion, tensor by tensor."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from convert.plan import Plan
from fot_jax import checkpoint, files
from fot_jax import config as config_lib
from fot_jax.formats import hf
from fot_jax.formats.layout import leaf_shapes, table
from fot_jax.formats.source import Source


def write(plan: Plan, directory: pathlib.Path, progress: Callable[[int], None] = lambda nbytes: None) -> list[str]:
    """Writes all of a plan into an empty directory; nothing but one tensor is held at a time.

    Args:
        progress: called with the bytes of each tensor written.

    Returns:
        Names of the tokenizer's files that came along.

    Raises:
        ValueError: a tokenizer that cannot be written, before anything else is; damaged data in the source; numbers
            that the dtype asked for cannot hold.
        OSError: the disk is full, or the like.
    """
    tokenizer = write_tokenizer(plan.source, directory)
    plan.source.check_tied_head()
    (_write_orbax if plan.to == "orbax" else _write_hf)(plan, directory, progress)
    files.sync(*(path for path in directory.rglob("*")), directory)
    return tokenizer


def write_tokenizer(source: Source, directory: pathlib.Path) -> list[str]:
    """Writes the tokenizer's files; their names. Raises ValueError where it cannot be written."""
    try:
        return source.tokenizer(directory)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{error} (--no-tokenizer converts the model alone)") from error


def _write_orbax(plan: Plan, directory: pathlib.Path, progress: Callable[[int], None]) -> None:
    shapes = leaf_shapes(plan.config)
    leaves = {p.target.path: (shapes[p.target.path], p.dtype, len(p.target.stack)) for p in plan.pieces}
    writer = checkpoint.ParamsWriter(directory, plan.config, leaves)
    for piece in plan.pieces:
        writer.write(piece.target.path, piece.target.stack, piece.read())
        progress(piece.nbytes)
    writer.finish()


def _write_hf(plan: Plan, directory: pathlib.Path, progress: Callable[[int], None]) -> None:
    pieces = {piece.target.name: piece for piece in plan.pieces}
    names = [entry.name for entry in table(hf.LAYOUT, plan.config)]  # the usual order, whatever the source's
    writer = hf.Writer(directory, {name: (pieces[name].target.their_shape, pieces[name].dtype) for name in names})
    try:
        for name, piece in pieces.items():
            writer.write(name, piece.target.to_theirs(piece.read()))
            progress(piece.nbytes)
        writer.close()
    finally:
        writer.abandon()
    fields = config_lib.to_hf(plan.config) if plan.to == "hf" else config_lib.to_hf_llama(plan.config)
    hf.write_config(directory, fields)
