"""Files that grow, where the working directory is at a URL: object stores take whole objects only."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
import threading

from fot_jax import files

_log = logging.getLogger(__name__)


class Mirror:
    """A folder on this machine's disk that is copied to a URL, every so often and at the end. Of a folder on a disk,
    it is the folder itself, and nothing is copied.

    What cannot be copied is said, and tried again; a run does not end of it.

    Args:
        target: the folder wanted.
        every_s: seconds between copies.

    Attributes:
        local: where to write.
    """

    def __init__(self, target: str | os.PathLike, every_s: float = 30.0):
        self._target, self._copied = files.location(target), {}
        self._over, self._copying = threading.Event(), threading.Lock()
        if not files.store_of(target):
            self.local = pathlib.Path(self._target)
            self.local.mkdir(parents=True, exist_ok=True)
            self._thread = None
            return
        self.local = pathlib.Path(tempfile.mkdtemp(prefix="fot_jax-"))
        self._thread = threading.Thread(target=self._copy_often, args=(every_s,), name="mirror", daemon=True)
        self._thread.start()

    def fetch(self, name: str) -> None:
        """Brings a file of the target here, if there is one."""
        if self._thread and (there := self._target / name).exists():
            (self.local / name).write_bytes(there.read_bytes())

    def copy(self) -> None:
        """Copies every file that changed since it was copied."""
        with self._copying:
            for path in sorted(self.local.rglob("*")):
                stat = path.stat()
                stamp = stat.st_mtime_ns, stat.st_size
                if path.is_file() and self._copied.get(path) != stamp:
                    there = self._target / path.relative_to(self.local).as_posix()
                    there.parent.mkdir(parents=True, exist_ok=True)
                    there.write_bytes(path.read_bytes())
                    self._copied[path] = stamp

    def _copy_often(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            self.try_copy()

    def try_copy(self) -> bool:
        """`copy`, where there is a URL; whether it could be done. What could not is said."""
        if not self._thread:
            return True
        try:
            self.copy()
            return True
        except Exception as error:  # fsspec's file systems raise many kinds
            _log.warning("%s: files were not copied there (%s); kept in %s", self._target, error, self.local)
            return False

    def close(self) -> None:
        """Copies for the last time; what could not be copied stays on this machine."""
        if self._thread:
            self._over.set()
            self._thread.join()
            if self.try_copy():
                with contextlib.suppress(OSError):
                    shutil.rmtree(self.local)
