"""Files and directories that never look complete before they are; JSON that somebody else wrote."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
from etils import epath

Location = epath.Path
# Object stores, and the packages through which fsspec knows them.
_STORES = {"gs": "gcsfs", "s3": "s3fs"}


def location(stated: str | os.PathLike) -> Location:
    """A file or folder, on a disk (made absolute) or at a URL like gs://BUCKET/NAME or s3://BUCKET/NAME.

    Raises:
        ImportError: the package for that store is not installed.
    """
    if not (store := store_of(stated)):
        return epath.Path(os.path.abspath(stated))
    if importlib.util.find_spec(_STORES[store]) is None:
        raise ImportError(f"{os.fspath(stated)}: wanted the package {_STORES[store]} (pip install {_STORES[store]})")
    # What other processes write is not in a list that was kept.
    for protocol in (store, _STORES[store].removesuffix("fs")):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return epath.Path(stated)


def store_of(stated: str | os.PathLike) -> str:
    """'gs' or 's3' for the URL of an object store, '' for a path on a disk."""
    scheme, found, _ = os.fspath(stated).partition("://")
    return scheme if found and scheme in _STORES else ""


# Files beside the weights that say how text becomes tokens and how it is asked for, in every layout that has any.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> list[str]:
    """Copies `TOKENIZER_FILES`, those that are there, from one directory to another; their names."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, directory / name)
    return found


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path to write, renamed to the one wanted when all is written, so that no reader and no crash ever sees half of
    it. Where a link is there, what it points to is replaced; a device or a pipe is written itself.
    """
    path = pathlib.Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Waits until no other process is inside with the same file, which is made; one that dies is inside no more."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def failing_as(path: str | os.PathLike) -> Iterator[None]:
    """Names the path in what a full disk and the like raise, as system calls on open files do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror})") from error


def write(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file, as `replacing` does; at a URL, an object, which is there whole or not at all."""
    if store_of(path):
        location(path).write_bytes(data)
        return
    with failing_as(path), replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file, as `replacing` does."""
    write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: pathlib.Path, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value in a JSON file.

    Args:
        pairs: makes an object of its names and values, in place of a dictionary.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON.
    """
    text = path.read_bytes()
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 and numbers of thousands of digits; deep nesting
        raise ValueError(f"{path}: not JSON ({error})") from error


@contextlib.contextmanager
def beside(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """An empty directory beside the one wanted, on the same disk; removed at the end, whatever happened, and with it
    the directories above that were made for it, if nothing else is in them.

    What is in it then is lost: rename it, or its files, before.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    made = [parent for parent in directory.parents if not parent.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # the result is in it
                parent.rmdir()


def put_in_place(partial: pathlib.Path, directory: str | os.PathLike, *, replace: bool = False) -> None:
    """Renames a whole directory to its name.

    Args:
        replace: whether one that is there makes way for it.

    Raises:
        FileExistsError: something is there, and shall not be replaced.
    """
    directory = pathlib.Path(os.path.abspath(directory))
    if os.path.lexists(directory) and not replace:
        raise FileExistsError(f"{directory} is there now; wanted a new directory")
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


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message, for messages of one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:400]}"


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
