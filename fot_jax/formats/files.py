"""Writing whole directories so that none ever looks complete before it is."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

# Files that say how text becomes tokens, in every layout that has any.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> list[str]:
    """Copies the tokenizer's files from one directory to another; their names."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, directory / name)
    return found


@contextlib.contextmanager
def beside(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """An empty directory beside the one wanted, on the same disk; removed at the end, whatever happened.

    What is in it then is lost: rename it, or its files, before.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: pathlib.Path, directory: str | os.PathLike) -> None:
    """Renames a whole directory to its name, in place of one that is there."""
    directory = pathlib.Path(os.path.abspath(directory))
    if directory.exists():
        old = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
        try:
            directory.rename(old)
            partial.rename(directory)
        except BaseException:
            if old.exists() and not directory.exists():
                old.rename(directory)
            raise
        sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(directory)
    sync(directory.parent)


def sync(*paths: pathlib.Path) -> None:
    """Waits until files or directories are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def allocate(descriptor: int, size: int) -> None:
    """Gives a file its whole length. Raises OSError at once where the disk has no room for it."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)


def write_at(descriptor: int, data: Any, offset: int) -> None:
    """Writes all bytes of a buffer at an offset; a single call may write fewer."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
