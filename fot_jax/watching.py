"""What a process says of itself while it runs: where a step waits that takes too long, what memory holds, a profile."""

from __future__ import annotations

import collections
import contextlib
import logging
import pathlib
import resource
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

_log = logging.getLogger(__name__)
# A first step compiles, and says nothing of how long steps take.
_FIRST = 10


class Stalls:
    """Says, from a thread of its own, when a step takes far longer than steps did, and what this process waits for.

    Every process has its own: of many that wait for one another, the one with another reason is the one to look at.

    Args:
        factor: how many times the median of the last 64 steps a step may take; 0: nothing is said.
        seconds: that any step may take; a first one ten times as many.
    """

    def __init__(self, factor: float, seconds: float):
        self._factor, self._seconds = factor, seconds
        self._took: collections.deque[float] = collections.deque(maxlen=64)
        self._places: list[str] = []
        self._first = self._step = 0
        self._began, self._limit = 0.0, float("inf")
        self._thread, self._over = threading.get_ident(), threading.Event()
        if factor:
            threading.Thread(target=self._watch, name="stalls", daemon=True).start()

    def begin(self, step: int) -> None:
        """A step begins, and with it the one before has ended."""
        now = time.monotonic()
        if self._step > self._first:
            self._took.append(now - self._began)
        elif not self._step:
            self._first = step
        self._step, self._began = step, now
        usual = statistics.median(self._took) if self._took else 0.0
        self._limit = max(self._seconds, self._factor * usual) if usual else _FIRST * self._seconds

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Names what the process waits for inside."""
        self._places.append(place)
        try:
            yield
        finally:
            self._places.pop()

    @contextlib.contextmanager
    def paused(self, place: str) -> Iterator[None]:
        """What is inside is no part of the step, and may take as long as a first one; `place` as for `at`."""
        now, before = time.monotonic(), (self._began, self._limit)
        self._began, self._limit = now, _FIRST * self._seconds
        with self.at(place):
            yield
        self._began, self._limit = before[0] + time.monotonic() - now, before[1]

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if (took := time.monotonic() - self._began) > self._limit:
                self._limit = 2 * took
                _log.warning("%s", self._told(took))

    def _told(self, took: float) -> str:
        steps, places = tuple(self._took), tuple(self._places)  # the other thread changes them
        usual = f"steps take {statistics.median(steps):.3g} s" if steps else "none is done yet"
        place = places[-1] if places else "the program"
        frame = traceback.extract_stack(sys._current_frames()[self._thread])[-1]
        return (
            f"process {jax.process_index()}: step {self._step} has taken {took:.0f} s ({usual}); it waits for {place}, "
            f"in {frame.name} ({pathlib.Path(frame.filename).name}, line {frame.lineno})"
        )


def memory_in_use() -> dict[str, float]:
    """Bytes in use, and at most so far, of the fullest device of this process; of a CPU, the process's own."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if stats:
        keys = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
        return {name: float(max(found.get(key, 0) for found in stats)) for name, key in keys.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = pathlib.Path("/proc/self/statm")
    now = {"memory_bytes": float(statm.read_text().split()[1]) * resource.getpagesize()} if statm.exists() else {}
    return {**now, "memory_peak_bytes": float(peak)}


class Profile:
    """A trace of some steps, for TensorBoard's and XProf's viewers, and for Perfetto's.

    Args:
        folder: where it is written, in `plugins/profile/TIME`.
        steps: first and last step of it; None: no trace.
    """

    def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._running = folder, steps, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Round what starts a step."""
        if self._steps and not self._running and self._steps[0] <= number <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=jax.process_index() == 0)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def ended(self, number: int, state: object) -> None:
        """After a step was started: ends the trace with its last step, when its state is there."""
        if self._running and number >= self._steps[1]:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            self._running = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # a full disk; it is not worth a run
                _log.warning("the profile could not be written to %s: %s", self._folder, error)
                return
            _log.info("profile of steps %d to %d: %s", *self._steps, self._folder)


def steps_of_profile(text: str, steps: int) -> tuple[int, int] | None:
    """'100:105' -> (100, 105); '' -> None.

    Raises:
        ValueError: anything else, or steps that a run of `steps` does not have.
    """
    if not text:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"profile_steps is {text!r}; wanted FIRST:LAST, like 100:105")
    if int(last) > steps:
        raise ValueError(f"profile_steps is {text!r}; wanted steps of the run, 1 to {steps}")
    return int(first), int(last)
