"""Checkpoints for object stores that Orbax cannot write to: written to a disk, then copied, and read the same way back.

A copy is complete when it has the file `COMMITTED`, written last, as Orbax itself marks those in Google's store.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import queue
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import fsspec

from fot_jax import files

COMMITTED = "commit_success.txt"
_FOLDER = "FOT_JAX_STAGING"
_TRANSFERS = 8  # files at a time


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
    found = sorted(p for p in step.rglob("*") if p.is_file() and p != step / COMMITTED)
    _at_once(lambda file: store.put_file(str(file), f"{path}/{file.relative_to(step).as_posix()}"), found)
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

    def fetch(name: str) -> None:
        inner = name.removeprefix(path.rstrip("/") + "/")
        if inner != COMMITTED and inner.partition("/")[0] not in without:
            (partial / inner).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(name, str(partial / inner))

    try:
        _at_once(fetch, store.find(path))
        shutil.rmtree(step, ignore_errors=True)
        partial.rename(step)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _at_once(transfer: Callable[[Any], None], names: Iterable[Any]) -> None:
    """Some files at a time; the first error, when all that were begun are through. A program that ends does not wait
    for these threads, if for the one that waits here.
    """
    left, errors = queue.SimpleQueue(), []
    for name in names:
        left.put(name)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while not errors:
                name = left.get_nowait()
                try:
                    transfer(name)
                except Exception as error:
                    errors.append(error)

    threads = [threading.Thread(target=work, name="transfer", daemon=True) for _ in range(_TRANSFERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def copied(
    saving: Any, step: pathlib.Path, there: files.Location, kept: Callable[[list[int]], Collection[int]]
) -> None:
    """Waits for a save to the disk, and copies it to a URL, where older checkpoints are removed.

    Args:
        saving: what Orbax gives of the save.
        step, there: from where and to where.
        kept: of all steps, which to keep.
    """
    saving.result()
    upload(step, there)
    found = {int(entry.name): entry for entry in there.parent.iterdir() if entry.name.isdecimal()}
    for number in sorted(set(found) - set(kept(list(found)))):
        remove(found[number])
