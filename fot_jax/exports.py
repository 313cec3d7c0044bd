"""Checkpoints of a training, made Hugging Face's while it goes on, by `fot-convert` in a process of its own.

The conversion reads what is on the disk, uses no accelerator, and yields to the training for the CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence

from fot_jax import checkpoint, files, staging

_log = logging.getLogger(__name__)
_NICE = 10
_END_S = 10.0  # how long a conversion may take to remove what it has begun; a copy from a URL is left


def exports_due(workdir: str | os.PathLike, every: int) -> list[int]:
    """Steps with a complete checkpoint that are to be exported, every so many, and are not; see `Exports`."""
    found = checkpoint.steps(workdir) if every else []
    return [step for step in found if _is_due(files.location(workdir), step, every)]


def _is_due(workdir: files.Location, step: int, every: int) -> bool:
    there = workdir / "exports" / str(step)
    done = there / staging.COMMITTED if files.store_of(there) else there
    return bool(every and step and step % every == 0 and not done.exists())


class Exports:
    """The exports of a run, one at a time, to `workdir/exports/STEP`; those that a killed run left out come first.

    An export that fails is a warning: training goes on, and a run that resumes tries again if the checkpoint is kept.

    Args:
        workdir: folder or URL.
        every: steps between exports, a multiple of those between checkpoints; 0 for none.
        to: 'hf' or 'hf-llama', see `fot-convert`.
        dtype: of the tensors; '' for that of training.
    """

    def __init__(self, workdir: str | os.PathLike, every: int, to: str, dtype: str):
        self._workdir, self._every, self._to, self._dtype = files.location(workdir), every, to, dtype
        self._due = exports_due(workdir, every)
        self._thread: threading.Thread | None = None
        self._command: subprocess.Popen | None = None
        self._stopped, self._starting = False, threading.Lock()
        folder = self._workdir / "exports"
        for left in folder.iterdir() if every and folder.is_dir() else ():
            if left.name.startswith(".") and ".partial-" in left.name:  # of a run that was killed
                left.rmtree(missing_ok=True)

    def poll(self, completed: Sequence[int] = ()) -> None:
        """Begins the next export, if one is due and none is under way; never waits.

        Args:
            completed: steps of checkpoints that are complete now.
        """
        self._due += [step for step in completed if _is_due(self._workdir, step, self._every)]
        if self._due and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._export, args=(self._due.pop(0),), name="export", daemon=True)
            self._thread.start()

    def close(self, completed: Sequence[int] = (), *, wait: Callable[[], bool]) -> None:
        """Finishes what is due as long as `wait()` is true, and leaves the rest to a run that resumes; see `poll`."""
        while wait():
            self.poll(completed)
            completed = ()
            if not (self._due or (self._thread and self._thread.is_alive())):
                break
            self._thread.join(1.0)
        with self._starting:
            self._stopped = True
            if self._command and self._command.poll() is None:
                self._command.terminate()
        if self._thread:
            self._thread.join(_END_S)

    def _export(self, step: int) -> None:
        there = self._workdir / "exports" / str(step)
        try:
            with contextlib.ExitStack() as stack:
                if not files.store_of(self._workdir):
                    self._convert(pathlib.Path(self._workdir), step, pathlib.Path(there))
                else:
                    # What is left behind copies there until the program ends.
                    folder = tempfile.TemporaryDirectory(prefix="fot_jax-", ignore_cleanup_errors=True)
                    here = pathlib.Path(stack.enter_context(folder))
                    checkpoint.fetch(self._workdir, here, step)
                    self._convert(here, step, here / "export")
                    staging.upload(here / "export", there)
            _log.info("step %d: exported to %s", step, there)
        except Exception as error:  # a full disk, a store out of reach, a checkpoint that was removed meanwhile
            if not self._stopped:
                _log.warning("step %d: the export to %s failed: %s", step, there, error)

    def _convert(self, workdir: pathlib.Path, step: int, destination: pathlib.Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "convert",
            str(workdir),
            str(destination),
            "--to",
            self._to,
            "--step",
            str(step),
        ]
        command += ["--dtype", self._dtype] if self._dtype else []
        if nice := shutil.which("nice"):
            command = [nice, "-n", str(_NICE), *command]
        with self._starting:
            if self._stopped:
                raise RuntimeError("the run ended before it began")
            self._command = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = self._command.communicate()[1].strip()
        if self._command.returncode:
            raise RuntimeError(errors.splitlines()[-1] if errors else f"ended with {self._command.returncode}")
