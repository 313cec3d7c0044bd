"""A place in a file that is mapped, not read: what the readers of binary formats have in common."""

from __future__ import annotations

import mmap
import pathlib


class Cursor:
    """A place in a mapped file.

    Attributes:
        path: the file, for messages.
        data: its bytes.
        at: where the next thing is read.
    """

    def __init__(self, path: pathlib.Path):
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.path = path
        self.at = 0

    def error(self, at: int, found: str, wanted: str) -> ValueError:
        """What to raise about the byte at `at`."""
        return ValueError(f"{self.path}: byte {at}: {found}; wanted {wanted}")
