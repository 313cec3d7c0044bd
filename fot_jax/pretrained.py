"""Whole models from and to a directory."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fot_jax import checkpoint
from fot_jax.config import FLOAT_DTYPES, ModelConfig, read_hf
from fot_jax.formats import hf

PyTree = Any


def load_pretrained(path: str | os.PathLike, dtype: str | None = "float32") -> tuple[ModelConfig, PyTree]:
    """A model's configuration and parameters from a directory.

    For a model that does not fit one device, `formats.hf.read_params` gives NumPy arrays to place on a mesh.

    Args:
        path: a Hugging Face LLaMA or LongLLaMA directory (safetensors or `.bin`, single or sharded), or a working
            directory of `train.py`, whose latest checkpoint is taken.
        dtype: of the parameters, and of the computation that the configuration asks for: float32, bfloat16 or
            float16. None leaves both as the directory states them. The dtype of memory is always the directory's.

    Returns:
        config, and params on the first device: exactly the checkpoint's elements, in the tree that `init_params` makes.

    Raises:
        FileNotFoundError: no such directory, or no model in it.
        ValueError: an unknown dtype; an architecture this model does not have; tensors unknown, missing, twice there or
            of another shape, each named.
        CheckpointError: a damaged checkpoint of `train.py`.
        ImportError: `.bin` files where torch is not installed.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(FLOAT_DTYPES)}")
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such directory; wanted a Hugging Face model or a working directory")
    if checkpoint.is_workdir(path):
        config, params = checkpoint.load_params(path)
        if dtype is not None:
            dtypes = config.dtypes.__class__(params=dtype, compute=dtype, memory=config.dtypes.memory)
            config = config.replace(dtypes=dtypes)
            params = jax.tree.map(lambda x: x.astype(dtype), params)
        return config, params
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: no model; wanted config.json and weights, or model.json and a checkpoint of train.py"
        )
    config = read_hf(path, dtype)
    return config, jax.tree.map(jnp.asarray, hf.read_params(path, config))


def save_pretrained(path: str | os.PathLike, config: ModelConfig, params: Mapping[str, Any]) -> None:
    """Writes a Hugging Face LongLLaMA directory: `config.json` and `model.safetensors`, in shards above 5 GB.

    Written beside and renamed, so that the directory never looks complete before it is. In a directory that is there,
    an earlier model is replaced and other files stay.

    Args:
        path: the directory.
        config: of the model.
        params: any tree shaped like its params, gradients too; the arrays' dtypes are kept.

    Raises:
        ValueError: a leaf that is missing, unknown or of another shape.
        OSError: the directory cannot be written, a full disk among the reasons.
    """
    hf.save(path, config, params)
