"""Pickled files, read without running anything that is in them. The only module that imports torch."""

from __future__ import annotations

import io
import pathlib
import pickle
import pickletools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fot_jax.files import first_line
from fot_jax.formats.source import Tensor

# Of a pickle of values, which is a configuration: those have some kilobytes, and hardly ever a tuple twice.
_MAX_VALUES_BYTES, _MAX_TUPLES, _MAX_SHARED = 2**20, 10_000, 8


def read_tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors by name of a file that `torch.save` wrote, mapped, not read.

    Raises:
        ValueError: damaged; a pickle that holds code; not tensors by name; written by torch before 1.6, whose files
            cannot be mapped.
        ImportError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading pickled checkpoints needs torch; install it, or store safetensors"
        ) from error
    with path.open("rb") as file:
        head = file.read(4)
    if head != b"PK\3\4":  # a zip file, which torch.save writes since 1.6
        raise ValueError(
            f"{path}: not a pickled checkpoint, or a damaged one, or of torch before 1.6, whose files can only be read "
            "whole; wanted a zip file, which torch.save(torch.load(FILE, weights_only=True), FILE) makes of an old one"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
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

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


# What configurations are pickled with; everything else that names a class or function is refused.
_KNOWN = {
    ("collections", "OrderedDict"): _Inert,
    ("builtins", "set"): list,
    ("builtins", "frozenset"): list,
    ("ml_collections.config_dict.config_dict", "ConfigDict"): _Inert,
    ("ml_collections.config_dict.config_dict", "FrozenConfigDict"): _Inert,
    # A placeholder, with the type that its value is to have: a name stands for that, so that it cannot be called.
    ("ml_collections.config_dict.config_dict", "FieldReference"): _Inert,
    **{("builtins", name): name for name in ("str", "int", "float", "bool")},
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")  # Python 2's name, and that of protocols up to 2
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}; wanted plain values only")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside itself")


def _check_cost(data: bytes) -> None:
    """Refuses a pickle that takes the unpickler far more time or memory than its length says."""
    if len(data) > _MAX_VALUES_BYTES:
        raise pickle.UnpicklingError(f"it has {len(data):,} bytes; wanted at most {_MAX_VALUES_BYTES:,}")
    # To hash a tuple, as a key, is to go down into it: of one tuple twice, which holds another twice, and so on, that
    # takes 2^n, and of one in one in one the whole of the stack.
    hashed: dict[int, bool] = {}  # number of an object -> whether it may be a tuple
    tuples, shared, on_top = 0, 0, True
    for opcode, argument, _ in pickletools.genops(data):  # fails where a length is beyond the end
        name = opcode.name
        if name in ("DUP", "POP", "POP_MARK"):  # written for values that contain themselves alone
            raise pickle.UnpicklingError(f"it has the operation {name}")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            number = len(hashed) if argument is None else int(argument)
            if number > len(data):  # the unpickler would at once make room for that many objects
                raise pickle.UnpicklingError(f"it numbers an object {number}")
            hashed[number] = on_top
        elif name not in ("PROTO", "FRAME"):
            if name in ("GET", "BINGET", "LONG_BINGET"):
                shared += hashed.get(int(argument), True)
                if shared > _MAX_SHARED:
                    raise pickle.UnpicklingError(f"it uses tuples again more than {_MAX_SHARED} times")
            on_top = name not in _NOT_TUPLES
            tuples += "TUPLE" in name
            if tuples > _MAX_TUPLES:
                raise pickle.UnpicklingError(f"it has more than {_MAX_TUPLES} tuples")


# Operations that leave on the stack what is neither a tuple nor may hold one and be hashed.
_NOT_TUPLES = {
    *("EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST", "EMPTY_SET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ"),
    *(op.name for op in pickletools.opcodes if op.stack_after and "str" in op.stack_after[0].name),
    *(op.name for op in pickletools.opcodes if op.stack_after and "bytes" in op.stack_after[0].name),
}


def read_values(path: pathlib.Path) -> Any:
    """Plain Python values of a pickle: numbers, texts, containers; configuration objects as dictionaries.

    Raises:
        ValueError: damaged, or a pickle that names any other class or function (it is not run).
    """
    try:
        data = path.read_bytes()
        _check_cost(data)
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path}: not a pickle of plain values, or a damaged one ({first_line(error)})") from error
