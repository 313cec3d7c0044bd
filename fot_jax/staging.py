"""Checkpoints for object stores that Orbax cannot write to: written to a disk, then copied, and read the same way back.

A copy is complete when it has the file `COMMITTED`, written last, as Orbax itself marks those in Google's store.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import Any

import fsspec

from fot_jax import files

COMMITTED = "commit_success.txt"
_FOLDER = "FOT_JAX_STAGING"


def folder(workdir: str | os.PathLike) -> pathlib.Path:
    """Where the checkpoints of a working directory at a URL lie on the disk: in a folder of its own under the
    environment variable FOT_JAX_STAGING, or else in the user's cache. All processes of a run must share it.
    """
    root = os.environ.get(_FOLDER) or pathlib.Path.home() / ".cache" / "fot_jax" / "staging"
    return pathlib.Path(root) / hashlib.sha256(os.fspath(workdir).rstrip("/").encode()).hexdigest()[:16]


def upload(step: pathlib.Path, there: files.Location) -> None:
    """Copies a checkpoint to a URL, where what is left of another one of that name is removed first."""
    store, path = fsspec.core.url_to_fs(os.fspath(there))
    if store.exists(path):
        remove(there)
    for file in sorted(p for p in step.rglob("*") if p.is_file() and p != step / COMMITTED):
        store.put_file(str(file), f"{path}/{file.relative_to(step).as_posix()}")
    store.pipe_file(f"{path}/{COMMITTED}", b"")


def remove(there: files.Location) -> None:
    """Removes a checkpoint at a URL, first what makes it complete."""
    store, path = fsspec.core.url_to_fs(os.fspath(there))
    if store.exists(f"{path}/{COMMITTED}"):
        store.rm_file(f"{path}/{COMMITTED}")
    store.rm(path, recursive=True)


def download(there: files.Location, step: pathlib.Path, without: Sequence[str] = ()) -> None:
    """Copies a checkpoint from a URL, in place of what is there, but its parts `without`."""
    store, path = fsspec.core.url_to_fs(os.fspath(there))
    partial = step.with_name(f".{step.name}.partial-{os.getpid()}")
    for name in store.find(path):
        inner = name.removeprefix(path.rstrip("/") + "/")
        if inner == COMMITTED or inner.partition("/")[0] in without:
            continue
        (partial / inner).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(name, str(partial / inner))
    shutil.rmtree(step, ignore_errors=True)
    partial.rename(step)


class Copy:
    """A save under way, and the copy of it that follows; what Orbax gives of the save alone, it gives of both."""

    _threads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="upload")

    def __init__(
        self, saving: Any, step: pathlib.Path, there: files.Location, kept: Callable[[list[int]], Collection[int]]
    ):
        """Args: saving: what Orbax gives; step, there: from where and to where; kept: of all steps, which to keep."""
        self._copied = self._threads.submit(self._copy, saving, step, there, kept)

    @staticmethod
    def _copy(
        saving: Any, step: pathlib.Path, there: files.Location, kept: Callable[[list[int]], Collection[int]]
    ) -> None:
        saving.result()
        upload(step, there)
        found = {int(entry.name): entry for entry in there.parent.iterdir() if entry.name.isdecimal()}
        for number in sorted(set(found) - set(kept(list(found)))):
            remove(found[number])

    def result(self, timeout: float | None = None) -> None:
        """Waits for both; TimeoutError where they are not through in time, or what either of them raised."""
        self._copied.result(timeout)
