"""What command lines have in common: their lines, and the process that they run in."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import pathlib


def printable(value: object) -> str:
    """Text for a terminal, without what one obeys: names come from files that anybody may have written."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def row(name: str, value: object, width: int = 14) -> str:
    """A line of a table of names and values."""
    return f"{name:{width}s} {printable(value)}"


def size(nbytes: float) -> str:
    """'6.85 GB', '226.7 kB'."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}"
    return f"{nbytes / 1e3:,.1f} kB"


def one_line(error: BaseException) -> str:
    """An error's message as one line for a terminal."""
    return printable(" ".join(str(error).split()))


def versions(*packages: str) -> dict[str, str]:
    """Of those of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def source() -> str:
    """A hash of this package's modules, as two checkouts may have one version."""
    root, found = pathlib.Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def warn_once(log: logging.Logger, text: str) -> None:
    """Logs a warning the first time that the process has it: what is checked twice is said once."""
    log.warning(text)


def keep_freed_memory() -> None:
    """Tells glibc's allocator to keep what is freed and never to map large buffers anew; elsewhere does nothing. It
    changes the whole process: not for importing modules to call.

    On a CPU, XLA allocates one temporary buffer a call. Mapped anew each time, a training step of 670 MB of
    temporaries spends 0.3 s on page faults.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-8, 1)  # M_ARENA_MAX: one arena, so that freed buffers are found again
    mallopt(-4, 0)  # M_MMAP_MAX: no mapping of single buffers
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: memory is not given back
