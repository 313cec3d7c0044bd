"""What the results of an evaluation depend on, as a few hashes: two runs of the same identity have the same results."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import fot_jax
from fot_jax import host
from fot_jax.config import ModelConfig
from fot_jax.tokenizer import Tokenizer


def of(config: ConfigDict, model: ModelConfig, params: Any, inputs: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The evaluation's configuration, the model, what is read, what it runs on, and this package."""
    return json.loads(
        json.dumps(
            {
                "config": config.to_dict(),
                "platform": jax.default_backend(),
                "model": hashlib.sha256(repr(model).encode()).hexdigest()[:16],
                "params": fingerprint(params),
                "inputs": digest(inputs),
                "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
                "fot_jax": f"{fot_jax.__version__} {host.source()}",
            }
        )
    )


def digest(inputs: Any) -> str:
    """A hash of nested lists, tuples and dictionaries of arrays, text and numbers."""
    found = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, dict):
            x = ("dict", *(part for item in x.items() for part in item))
        if isinstance(x, (list, tuple)):
            found.update(f"[{len(x)}".encode())
            for part in x:
                add(part)
        elif isinstance(x, np.ndarray):
            found.update(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
        else:
            data = repr(x).encode()
            found.update(f"{len(data)}:".encode() + data)

    add(inputs)
    return found.hexdigest()[:16]


@jax.jit
def _bits(params: Any) -> Any:
    """For each leaf two sums of its numbers' bits, modulo 2**32, one of them weighted by their places: the same however
    it is split over devices.
    """

    def sums(x: jax.Array) -> jax.Array:
        kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        weighted = bits * (2 * place + 1)
        return jnp.stack([bits.sum(dtype=jnp.uint32), weighted.sum(dtype=jnp.uint32)])

    return jax.tree.map(sums, params)


def fingerprint(params: Any) -> str:
    """A hash of all parameters, of 8 to 32 bits each, the same on any mesh."""
    sums = jax.tree_util.tree_flatten_with_path(jax.device_get(_bits(params)))[0]
    return digest([(jax.tree_util.keystr(path), x.tolist()) for path, x in sums])
