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


class Inert:
    """Stands for an object whose class is not loaded, and does nothing.

    Attributes:
        state: what was pickled as the object's; None where nothing was.
    """

    state: Any = None

    def __init__(self, *arguments: Any):
        pass


class _Ordered(dict):
    """Stands for an OrderedDict, filled item by item."""

    def __init__(self) -> None:
        super().__init__()


# What configurations are pickled with; everything else that names a class or function is refused.
_KNOWN = {
    ("collections", "OrderedDict"): _Ordered,
    ("builtins", "set"): Inert,
    ("builtins", "frozenset"): Inert,
    ("ml_collections.config_dict.config_dict", "ConfigDict"): Inert,
    ("ml_collections.config_dict.config_dict", "FrozenConfigDict"): Inert,
    # A placeholder, with the type that its value is to have: a name stands for that, so that it cannot be called.
    ("ml_collections.config_dict.config_dict", "FieldReference"): Inert,
    **{("builtins", name): name for name in ("str", "int", "float", "bool", "tuple", "list", "dict")},
}
_MAX_VALUES_BYTES = 2**20  # of a pickle of values, which is a configuration: those have some kilobytes


class _PlainUnpickler(pickle._Unpickler):
    """The unpickler that is written in Python, with all operations left out that take far more time or memory than
    their few bytes say: copies of what was there before, sets, and keys other than plain ones (to hash a tuple of one
    tuple twice, which holds another twice, and so on, is to look at 2^n).
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")  # Python 2's name, and that of protocols up to 2
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}; wanted plain values only")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to data outside itself")

    def _fill(self, items: list[Any]) -> None:
        filled = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(filled, dict) or not isinstance(key, (str, int, float, bytes, type(None))):
                raise pickle.UnpicklingError(f"a {type(filled).__name__} has a {type(key).__name__} for a key")
            filled[key] = value

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _set_items(self) -> None:
        self._fill(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _set(self) -> None:
        self.append(Inert())

    def _add(self) -> None:
        self.pop_mark()
        if not isinstance(self.stack[-1], Inert):
            raise pickle.UnpicklingError(f"it adds to a {type(self.stack[-1]).__name__} as to a set")

    def _frozen_set(self) -> None:
        self.pop_mark()
        self.append(Inert())

    def _build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if not isinstance(built, Inert):
            raise pickle.UnpicklingError(f"it gives a {type(built).__name__} a state")
        built.state = state

    dispatch |= {
        pickle.EMPTY_SET[0]: _set,
        pickle.ADDITEMS[0]: _add,
        pickle.FROZENSET[0]: _frozen_set,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.BUILD[0]: _build,
    }


def read_values(path: pathlib.Path) -> Any:
    """Plain Python values of a pickle: numbers, texts, lists, tuples, dictionaries; `Inert` for configuration objects
    and for sets.

    Raises:
        ValueError: damaged, or a pickle that names any other class or function (it is not run).
    """
    try:
        data = path.read_bytes()
        if len(data) > _MAX_VALUES_BYTES:
            raise pickle.UnpicklingError(f"it has {len(data):,} bytes; wanted at most {_MAX_VALUES_BYTES:,}")
        for _ in pickletools.genops(data):  # fails where a length is beyond the end
            pass
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path}: not a pickle of plain values, or a damaged one ({first_line(error)})") from error
