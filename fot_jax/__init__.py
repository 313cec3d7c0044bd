"""Focused Transformer in JAX: training with crossbatch, long context by memory layers.

The public names are imported when first used, so that a process that only reads data does not load the model.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it.
_NAMES = {
    "ModelConfig": "config",
    "DtypePolicy": "config",
    "named": "config",
    "load_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "LongLlama": "model",
    "init_params": "model",
    "forward": "model",
    "logits": "model",
    "long_forward": "generate",
    "generate": "generate",
    "crossbatch_forward": "model",
}
_MODULES = (
    "attention",
    "checkpoint",
    "config",
    "crossbatch",
    "data",
    "memory",
    "model",
    "pretrained",
    "sharding",
    "training",
)

__all__ = sorted({*_NAMES, *_MODULES})


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """`fot_jax.generate` is the function: importing the module of that name must not put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "generate" and isinstance(value, types.ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
