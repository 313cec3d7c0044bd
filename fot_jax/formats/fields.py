"""Fields of a configuration that somebody else wrote: each is checked when it is taken, and errors name it."""

from __future__ import annotations

import pathlib
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

from fot_jax import files
from fot_jax.config import MAX_SIZE, ModelConfig

_REQUIRED: Any = object()
# For messages: nested and long values may come from files that somebody made to be so.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class Fields:
    """A configuration's fields by name.

    Args:
        file: where they are from, for messages.
        values: what was read; anything.

    Every method that takes a field raises ValueError where the field is of another kind than asked for, or not there
    without a default.
    """

    def __init__(self, file: pathlib.Path, values: Any):
        self.file = file
        if not isinstance(values, Mapping):
            raise ValueError(f"{file}: holds a {type(values).__name__}; wanted fields by name")
        self.values = values

    def __contains__(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self.values.get(name) is not None

    def error(self, name: str, wanted: str) -> ValueError:
        """What to raise about a field."""
        try:
            shown = _SHORT.repr(self.values[name]) if name in self.values else "missing"
        except ValueError:  # a whole number of thousands of digits
            shown = f"a very great {type(self.values[name]).__name__}"
        return ValueError(f"{self.file}: {name} is {shown}; wanted {wanted}")

    def whole(self, name: str, default: Any = _REQUIRED, least: int = 1, most: int = MAX_SIZE) -> int:
        """A whole number from `least` to `most`."""
        if name not in self and default is not _REQUIRED:
            return default
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.error(name, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number above 0."""
        if name not in self and default is not _REQUIRED:
            return default
        value = self.values.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.error(name, "a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false; false where it is not there."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(name, "true or false")
        return bool(value)

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A text."""
        if name not in self and default is not _REQUIRED:
            return default
        if not isinstance(self.values.get(name), str):
            raise self.error(name, "a text")
        return self.values[name]

    def only(self, name: str, allowed: Any) -> None:
        """Raises where a field changes the maths: not null, and another value than the one this model has."""
        value = self.values.get(name)
        if value is not None and not (isinstance(value, (bool, int, float, str)) and value == allowed):
            raise self.error(name, f"{allowed!r}, as this model has nothing else" if allowed else "none")

    def config(self, **sizes: Any) -> ModelConfig:
        """A `ModelConfig`, whose own errors then name the file."""
        try:
            return ModelConfig(**sizes)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error


def read_json(path: pathlib.Path) -> Fields:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object.
    """
    return Fields(path, files.read_json(path))
