"""Parts of an evaluation, each written down as soon as it is measured, so that one that is stopped goes on there."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from fot_jax import files

REPORT_SECONDS = 5  # between lines of progress where stderr is no terminal


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured together.

    Attributes:
        key: its name among the parts of the evaluation.
        tokens: how many it reads, for progress.
        measure: gives what JSON can hold.
    """

    key: str
    tokens: int
    measure: Callable[[], Any]


class Journal:
    """Results of parts, a line of JSON each, in a file.

    The first line says what is evaluated and how: results of anything else are not taken over, and their file is begun
    anew. A line that was not written to its end is left out. One process has the file.
    """

    def __init__(self, path: str | os.PathLike | None = None, identity: Mapping[str, Any] | None = None):
        """
        Args:
            path: the file, or None where nothing is kept.
            identity: all that results depend on; JSON.

        Raises:
            ValueError: another process has the file.
        """
        self.path = None if path is None else pathlib.Path(path)
        self.done: dict[str, Any] = {}
        self.found, self._file = 0, None
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{self.path}: another process is at this evaluation; wanted one, or another folder"
            ) from error
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]  # what was written to its end
        first, *lines = whole.splitlines() or [b""]
        wanted = json.dumps({"identity": identity}, sort_keys=True).encode()
        if first == wanted:
            self.done = {line["key"]: line["result"] for line in map(json.loads, lines)}
            self._file.truncate(len(whole))
        else:
            self._file.truncate(0)
            self._write(wanted)
        self.found = len(self.done)

    def _write(self, line: bytes) -> None:
        with files.failing_as(self.path):
            self._file.write(line + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def results(self, parts: Sequence[Part], desc: str = "", clock: Any = None) -> list[Any]:
        """The results of all parts, of those that are not there yet by measuring them.

        Args:
            parts: their keys differ.
            desc: what is said of progress.
            clock: a `subject.Clock`, which is told whom to tell what was read.

        Raises:
            ValueError: two parts of one name.
        """
        keys = [part.key for part in parts]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two parts are called {next(key for key in keys if keys.count(key) > 1)!r}")
        missing = [part for part in parts if part.key not in self.done]
        if self.found and len(missing) < len(parts):
            print(f"{desc or 'parts'}: {len(parts) - len(missing)} of {len(parts)} were done before", file=sys.stderr)
        with progress(sum(part.tokens for part in missing), desc) as advance:
            before = getattr(clock, "progress", None)
            try:
                if clock is not None:
                    clock.progress = advance
                for part in missing:
                    self._add(part.key, part.measure())
            finally:
                if clock is not None:
                    clock.progress = before
        return [self.done[key] for key in keys]

    def _add(self, key: str, result: Any) -> None:
        line = json.dumps({"key": key, "result": result})
        if self._file is not None:
            self._write(line.encode())
        self.done[key] = json.loads(line)["result"]  # as it would be read again

    def close(self) -> None:
        """Removes the file: the evaluation is over, and its report written."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()


@contextlib.contextmanager
def progress(total: int, desc: str, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A function that is told how much more was done; a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        with tqdm.tqdm(total=total, desc=desc, unit=f" {unit}", unit_scale=True, file=sys.stderr) as bar:
            yield bar.update
        return
    done, begin = 0, time.monotonic()
    reported = begin

    def advance(more: int) -> None:
        nonlocal done, reported
        done += more
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS:
            reported = now
            rate = done / (now - begin)
            print(f"{desc}: {done:,} of {total:,} {unit}, {rate:,.0f} a second", file=sys.stderr, flush=True)

    yield advance
