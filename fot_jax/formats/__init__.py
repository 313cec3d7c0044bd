"""Checkpoint layouts: one table of names each, and readers. `open_checkpoint` recognises them."""

from __future__ import annotations

import os
import pathlib

from fot_jax import checkpoint, files, staging
from fot_jax.config import ModelConfig
from fot_jax.formats import easylm, gguf, hf, meta, ours
from fot_jax.formats.source import Source


def open_checkpoint(
    path: str | os.PathLike,
    *,
    size: ModelConfig | None = None,
    window: int | None = None,
    step: int | None = None,
) -> Source:
    """Opens a checkpoint of any format, recognised by what is there; reads no weights.

    Args:
        path: a working directory of `train.py` or of a conversion; a Hugging Face LLaMA or LongLLaMA directory; Meta's
            directory of `consolidated.*.pth`; an EasyLM checkpoint, or the directory of one; a GGUF file.
        size: the model's sizes, for an EasyLM checkpoint, instead of a configuration beside it.
        window: W, where the format does not say it (Meta's; 2048 if None) or another is wanted.
        step: which checkpoint of a working directory; the latest if None.

    Raises:
        FileNotFoundError: nothing there, or no checkpoint in it.
        ValueError: damaged files, or a model that this project does not have.
        CheckpointError: a damaged checkpoint of ours.
        ImportError: a package that this format needs is not installed.
    """
    return _open(local(path, step), size, step).with_window(window)


def local(path: str | os.PathLike, step: int | None = None) -> pathlib.Path:
    """The path of a checkpoint on a disk. Of a working directory at a URL, what an evaluation needs is copied first, to
    a folder that is kept (see `staging.folder`).

    Args:
        path: anything that `open_checkpoint` takes.
        step: which checkpoint of a working directory; the latest if None.

    Raises:
        FileNotFoundError: no such checkpoint at the URL.
        ImportError: the package for that store is not installed.
    """
    if not files.store_of(path):
        return pathlib.Path(path)
    found = checkpoint.steps(path)
    if not found:
        raise FileNotFoundError(
            f"{path}: no checkpoint; wanted a working directory of train.py, as only that is read at a URL"
        )
    step = found[-1] if step is None else step
    here = staging.folder(path) / f"fetched-{step}"
    here.mkdir(parents=True, exist_ok=True)
    with files.locked(here / ".lock"):  # of several processes one copies
        checkpoint.fetch(path, here, step)
    return here


def _open(path: pathlib.Path, size: ModelConfig | None, step: int | None) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory; wanted a checkpoint")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path}: a device or a pipe; wanted a file or a directory")
    if (path / "model.json").is_file():
        return ours.open_workdir(path, step)
    if step is not None:
        raise ValueError(f"step is {step}, and {path} is not a working directory, which has checkpoints of steps")
    if (path / "config.json").is_file() and hf.is_checkpoint(path):
        return hf.open_directory(path)

    if (path / "params.json").is_file() and any(path.glob("consolidated.*.pth")):
        return meta.open_directory(path).in_its_dtype()
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if _magic(path) == b"GGUF" else []
    if len(ggufs) == 1:
        return gguf.open_file(ggufs[0]).in_its_dtype()
    if streamed := easylm.find(path):
        return easylm.open_checkpoint(streamed, size=size).in_its_dtype()
    if path.is_file():
        raise ValueError(
            f"{path}: begins with {_magic(path)!r}, no checkpoint this project knows as a single file; wanted GGUF, "
            "EasyLM's streamed msgpack, or the directory that the file is in"
        )
    raise FileNotFoundError(
        f"{path}: no model; wanted config.json and weights (Hugging Face), model.json and a checkpoint of train.py, "
        "params.json and consolidated.*.pth (Meta), one GGUF file, or a streamed EasyLM checkpoint"
    )


def _magic(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)
