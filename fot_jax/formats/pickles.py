"""Pickled files, read without running anything that is in them. The only module that imports torch."""

from __future__ import annotations

import collections
import io
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fot_jax.checkpoint import first_line
from fot_jax.formats.source import Tensor

MAX_UNMAPPED_BYTES = 2**31


def read_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors by name of a file that `torch.save` wrote, mapped, not read (all but those of torch before 1.6).

    Raises:
        ValueError: damaged; a pickle that holds code; not tensors by name.
        ImportError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading pickled checkpoints needs torch; install it, or store safetensors"
        ) from error
    mapped = zipfile.is_zipfile(path)  # what torch.save writes since 1.6
    if not mapped and path.stat().st_size > MAX_UNMAPPED_BYTES:
        raise ValueError(
            f"{path}: written by torch before 1.6, which cannot be mapped, and of {path.stat().st_size:,} bytes; "
            f"wanted at most {MAX_UNMAPPED_BYTES:,}: save it anew with a later torch, or as safetensors"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises pickle, zip, runtime, value, key and end-of-file errors alike
        raise ValueError(f"{path}: not a pickled checkpoint, or a damaged one ({first_line(error)})") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: holds a {type(state).__name__}; wanted tensors by name")
    dtypes = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}
    out = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name} is a {type(value).__name__}; wanted tensors by name")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"{path}: tensor {name} is sparse, quantised or without data; wanted plain numbers")

        def read(value: Any = value) -> np.ndarray:
            value = value.detach()
            if value.dtype == torch.bfloat16:  # NumPy has none of its own
                return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return value.resolve_conj().resolve_neg().numpy()

        try:
            dtype = dtypes.get(value.dtype) or torch.empty(0, dtype=value.dtype).numpy().dtype
        except TypeError as error:
            raise ValueError(f"{path}: tensor {name} is {value.dtype}; wanted floating point") from error
        out[name] = Tensor(str(path), tuple(value.shape), dtype, read)
    return out


class _Inert(dict):
    """Stands for an object whose class is not loaded: keeps the state that was pickled, does nothing."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


# What configurations are pickled with; everything else that names a class or function is refused.
_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("ml_collections.config_dict.config_dict", "ConfigDict"): _Inert,
    ("ml_collections.config_dict.config_dict", "FrozenConfigDict"): _Inert,
    # A placeholder, with the type that its value is to have: a name stands for that, so that it cannot be called.
    ("ml_collections.config_dict.config_dict", "FieldReference"): _Inert,
    **{("builtins", name): name for name in ("str", "int", "float", "bool")},
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}; wanted plain values only")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside itself")


def read_values(path: pathlib.Path) -> Any:
    """Plain Python values of a pickle: numbers, texts, containers; configuration objects as dictionaries.

    Raises:
        ValueError: damaged, or a pickle that names any other class or function (it is not run).
    """
    try:
        data = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(data):  # fails where a length is beyond the end
            # The unpickler would at once make room for that many objects.
            if opcode.name in ("PUT", "LONG_BINPUT") and argument > len(data):
                raise pickle.UnpicklingError(f"it numbers an object {argument}")
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path}: not a pickle of plain values, or a damaged one ({first_line(error)})") from error
