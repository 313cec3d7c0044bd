"""Whole models from and to a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fot_jax import formats
from fot_jax.config import FLOAT_DTYPES, ModelConfig
from fot_jax.formats import hf
from fot_jax.formats.source import read_params

PyTree = Any


def load_pretrained(
    path: str | os.PathLike,
    dtype: str | None = "float32",
    shardings: Callable[[ModelConfig], PyTree] | None = None,
) -> tuple[ModelConfig, PyTree]:
    """A model's configuration and parameters from a checkpoint of any format.

    Args:
        path: a Hugging Face LLaMA or LongLLaMA directory (safetensors or `.bin`, single or sharded), a working
            directory of `train.py`, whose latest checkpoint is taken, or any other format of `formats.open_checkpoint`.
        dtype: of the parameters, and of the computation that the configuration asks for: float32, bfloat16 or
            float16. None leaves both as the checkpoint states them. The dtype of memory is the checkpoint's, or
            where it states none, as a LLaMA's, that of the parameters.
        shardings: for a model that does not fit one device: config -> tree of shardings shaped like params
            (`sharding.param_shardings` of `model.abstract_params`).

    Returns:
        config, and params, on the first device or as `shardings` says: exactly the checkpoint's elements, rounded
        to `dtype`, in the tree that `init_params` makes.

    Raises:
        FileNotFoundError: no such directory, or no model in it.
        ValueError: an unknown dtype; an architecture this model does not have; tensors unknown, missing, twice there or
            of another shape, each named.
        CheckpointError: a damaged checkpoint of `train.py`.
        ImportError: a package that the format needs is not installed: torch for `.bin` and `.pth`, gguf.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; wanted one of {', '.join(FLOAT_DTYPES)}")
    source = formats.open_checkpoint(path).with_dtypes(dtype)
    config = source.config
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return config, read_params(source, config, shardings=shardings(config) if shardings else first)


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
