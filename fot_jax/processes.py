"""The processes of a run on several hosts: how they find each other, that they are of one mind, and that none is lost.

JAX's own start ends a process without a word on who is missing, and a process that dies leaves the others waiting in a
collective: on an accelerator for ever, or until JAX misses its heartbeat and aborts. So every process keeps a plain
connection to process 0, from before JAX starts until it is done. Over it they say what they are about to do, and go on
together or not at all; and when one of them closes, the others know at once, say so, and end.

The network is trusted, as JAX's own service trusts it: nothing here asks who is at the other end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from fot_jax import files

_log = logging.getLogger(__name__)
# How long a process that cannot reach process 0 waits before it tries again.
_RETRY_S = 0.2
# How long a process may take to end by itself once it or another has failed: all may be raising the same error.
_GRACE_S = 15.0
# How long process 0, which has JAX's service, stays after a loss, so that the others hear of it from us.
_FAREWELL_S = 5.0
# How many of the processes that did come a message names.
_NAMED = 8
# How long the news of a loss may take to come here, once its consequences have.
_NEWS_S = 3.0
_DAY_S = 24 * 3600.0
# How long who ends because of an error stays for a checkpoint that is being written.
_SAVE_S = 1800.0
# A host that lost power says nothing: the kernel asks it after so many seconds, so often, so many times.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class ProcessError(RuntimeError):
    """Processes that are missing, or that do not agree; the message names them."""


class Place(NamedTuple):
    """A process among those of a run.

    Attributes:
        coordinator: HOST:PORT of process 0.
        processes: how many there are.
        process: this one's number.
        local_devices: those of its host's devices that are its own; None: all.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


def place(
    coordinator: str = "", processes: int | None = None, process: int | None = None, timeout_s: float = 300.0
) -> Place | None:
    """Where this process is: as stated, or else as TPU pods, SLURM, Open MPI and Kubernetes say, by JAX's own finding.

    Args:
        coordinator: HOST:PORT of process 0; by default the environment variable JAX_COORDINATOR_ADDRESS. With it alone,
            the numbers are those of MPI's launchers.
        processes: how many there are; 1 alone says that there are no others, whatever the surroundings say.
        process: this one's number.
        timeout_s: how long process 0's host may take to be found, where its name comes from the surroundings.

    Returns:
        None where there are no others.

    Raises:
        ValueError: a part is stated and not the rest, or numbers that do not fit; or there are others, and nobody says
            where.
        ProcessError: the surroundings cannot be asked.
    """
    if processes == 1:
        return None
    coordinator, devices = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", ""), None
    if processes is None and process is None:
        launched, why = _launched(), ""
        # The part of JAX that asks clusters is not public; nothing else says it before JAX starts.
        from jax._src import clusters

        try:
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                coordinator_address=coordinator or None,
                num_processes=None,
                process_id=None,
                local_device_ids=None,
                cluster_detection_method=None,
                initialization_timeout=max(10, int(timeout_s)),
            )
        except (RuntimeError, OSError) as error:
            if "OMPI_COMM_WORLD_SIZE" not in os.environ:
                raise ProcessError(f"the other processes cannot be found: {error}") from error
            # For Open MPI 5 JAX wants mpi4py; the launcher says all but where process 0 is.
            found, why = (coordinator, None, None, None), f" ({error})"
        coordinator, processes, process, devices = found
        if processes is None and launched:
            if not coordinator:
                which = f"{launched[1]} of {launched[0]}" if launched[0] else str(launched[1])
                raise ValueError(
                    f"this is process {which}, as its launcher says, but not where process 0 is{why}; wanted "
                    "coordinator, HOST:PORT, or processes 1 where each is to run for itself"
                )
            processes, process, devices = launched
        if not coordinator or processes == 1:
            return None
    if not coordinator or processes is None or process is None:
        raise ValueError(
            f"coordinator is {coordinator!r}, processes {processes}, process {process}; wanted all, or none where "
            "TPU pods, SLURM, Open MPI or Kubernetes say them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator is {coordinator!r}; wanted HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}; wanted 0..{processes - 1}")
    return Place(coordinator, int(processes), int(process), None if devices is None else tuple(devices))


def _launched() -> tuple[int | None, int, tuple[int, ...] | None] | None:
    """How many processes a launcher started that JAX does not know, which this is, and its devices, one each as JAX has
    it of those that it knows; None where it is alone.
    """
    number = lambda name: int(text) if (text := os.environ.get(name, "")).isdecimal() else None
    # Open MPI; MPICH and Intel's.
    for launcher, of_host in (("OMPI_COMM_WORLD", "OMPI_COMM_WORLD_LOCAL_RANK"), ("PMI", "MPI_LOCALRANKID")):
        count, mine, local = number(f"{launcher}_SIZE"), number(f"{launcher}_RANK"), number(of_host)
        if count is not None and mine is not None and count > 1:
            return count, mine, None if local is None else (local,)
    mine = number("JOB_COMPLETION_INDEX")  # of an indexed job of Kubernetes, which does not say how many there are
    return None if mine is None else (None, mine, None)


@contextlib.contextmanager
def together(
    at: Place | None,
    facts: dict[str, Any],
    *,
    timeout_s: float = 300.0,
    stopped_status: int = 0,
) -> Iterator[Group]:
    """Waits for all processes of a run, compares what they say, starts JAX's own service among them, and watches them.

    To be entered before anything that asks JAX for devices. As soon as another process is lost, this one says so and
    ends with status 1, wherever it is: a collective that waits for a dead process cannot be interrupted. An exception
    that leaves the block is logged and told to the others, and ends all of them, this process with the error's
    `exit_status`, by default 1. At the end of the block all wait for one another. Signals are taken inside, see
    `Group.signals`.

    Args:
        facts: JSON-able; what has to be the same everywhere, by name.
        timeout_s: how long to wait for the others.
        stopped_status: with which a signal before the first step ends all of them.

    Raises:
        ProcessError: processes that did not come, or say something else; every process that came raises it.
    """
    if at is None:
        group = Group(stopped_status=stopped_status)
        with group.signals():
            yield group
        return
    deadline = time.monotonic() + timeout_s
    lines, hosts = (_gathered if at.process == 0 else _joined)(at, deadline)
    group = Group(at, lines, hosts, stopped_status)
    with group.signals():
        try:
            group.agree(facts, timeout_s)
        except ProcessError:  # which all raise
            group.leave()
            raise
        try:
            jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM
            _let_abort_wait()
            jax.distributed.initialize(
                at.coordinator,
                at.processes,
                at.process,
                at.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=max(10, int(timeout_s)),
            )
            yield group
            group.wait()  # process 0 may still be writing, and JAX waits for minutes only
        except BaseException as error:
            group.leave(error)
            group.end()
    group.leave()


def _let_abort_wait() -> None:
    """Makes `abort` take six seconds.

    JAX, which can be told nothing else, aborts who loses process 0, and from a thread that does not wait for Python's
    lock. The thread that says what was lost, and ends the process, has to.
    """
    with_traces = faulthandler.is_enabled()
    faulthandler.disable()
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    # A handler is called with the signal's number, and may call nothing of Python's. When it returns, `abort` goes on.
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    if with_traces:
        faulthandler.enable()  # before it, as it was


class Group:
    """The processes of a run, as one of them hears of the others: process 0 of all, the others of process 0.

    Attributes:
        at: this process.
        asked: the signal because of which the run is to end; "" for none.
        saving: whether a checkpoint is being written that may still be completed; who ends because of an error, its own
            or another's, stays until it is.
        broken: whether a checkpoint has failed here, so that the others' part of it will never be completed.
        saved: step of the last checkpoint that is known to be whole, 0 for none, None where it is not known. It may not
            ask a disk: JAX aborts who loses process 0, see `_let_abort_wait`.
    """

    def __init__(
        self,
        at: Place | None = None,
        lines: dict[int, socket.socket] | None = None,
        hosts: dict[int, str] | None = None,
        stopped_status: int = 0,
        begun: bool = False,
    ):
        self.at = at or Place("", 1, 0)
        self.saving: Callable[[], bool] = lambda: False
        self.saved: Callable[[], int | None] = lambda: None
        self.broken: Callable[[], bool] = lambda: False
        self._stopped_status, self._begun = stopped_status, begun
        self._status, self._failed = 1, False  # of a process that ends because of an error; whether of its own
        self._lines, self._hosts = lines or {}, hosts or {}
        self._said: dict[int, queue.SimpleQueue] = {number: queue.SimpleQueue() for number in self._lines}
        self._leaving, self._lost, self._speaking = threading.Event(), threading.Event(), threading.Lock()
        # Of `stop`: the last step that the run goes on after, here; those of all, at process 0; the step it ends with.
        self.asked, self._passed, self._reports, self._last = "", 0, {}, 0
        self._stopping, self._decided, self._taken = threading.Lock(), threading.Event(), False
        self._listeners = [
            threading.Thread(target=self._listen, args=(number,), name=f"process {number}", daemon=True)
            for number in self._lines
        ]
        for listener in self._listeners:
            listener.start()

    # -------------------------------------------------------------------------------------------------- agreement

    def agree(self, facts: dict[str, Any], timeout_s: float = 300.0) -> None:
        """Waits for every process to come here, and refuses to go on unless all say the same.

        Args:
            facts: JSON-able, by name; nested names are joined by dots in messages.
            timeout_s: how long to wait.

        Raises:
            ProcessError: processes that did not come, or each fact that one has otherwise than process 0.
        """
        if self.at.process:
            self._tell_all({"facts": facts})
            # Process 0 answers when all are there or its own time is over, which may have begun later.
            if answer := self._heard(timeout_s + _GRACE_S)["answer"]:
                raise ProcessError(answer)
            return
        deadline, said = time.monotonic() + timeout_s, {0: facts}
        for number, heard in self._said.items():
            with contextlib.suppress(queue.Empty):
                said[number] = heard.get(timeout=max(0.0, deadline - time.monotonic()))["facts"]
        if missing := [number for number in self._said if number not in said]:
            answer = f"no word for {timeout_s:.0f} s from {', '.join(map(self._named, missing))}"
        else:
            answer = differences(said)
        self._tell_all({"answer": answer})
        if answer:
            raise ProcessError(answer)

    def wait(self) -> None:
        """Waits for every process to come here, for as long as it takes. Needs no device."""
        self.agree({}, _DAY_S)

    def check_shared(self, folder: str | os.PathLike, timeout_s: float = 60.0) -> None:
        """Checks that a folder is the same one for all processes: that they see what process 0 writes there.

        Raises:
            ProcessError: names the processes that see another folder, or none.
            OSError: process 0 cannot write there.
        """
        if not self._lines:
            return
        path = files.location(folder)
        fact = f"seen in {path} what process 0 has written there"
        if self.at.process == 0:
            path.mkdir(parents=True, exist_ok=True)
            mark = path / f".shared-{secrets.token_hex(8)}"
            mark.write_text("")
            try:
                self._tell_all({"mark": mark.name})
                self.agree({fact: True}, 2 * timeout_s)
            finally:
                mark.unlink()
        else:
            mark, deadline = path / self._heard(2 * timeout_s)["mark"], time.monotonic() + timeout_s
            while not (there := mark.exists()) and time.monotonic() < deadline:  # NFS may take a while to show it
                time.sleep(_RETRY_S)
            self.agree({fact: there}, 2 * timeout_s)

    def _heard(self, timeout_s: float) -> dict[str, Any]:
        """What process 0 says next, to another process."""
        try:
            return self._said[0].get(timeout=timeout_s)
        except queue.Empty:
            raise ProcessError(f"no word for {timeout_s:.0f} s from {self._named(0)}") from None

    # ------------------------------------------------------------------------------------------------------- stop

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT inside: they ask the run to end, see `stop`. A second SIGINT is as without us; not
        so a second SIGTERM, which schedulers send while there is still time to save. Before the first step of what
        `together` has started there is nothing to save, and all processes end at once. A signal that is ignored
        (SIGINT, in what a shell starts in the background) stays so.

        (JAX's preemption service would do for SIGTERM, but for runs that resume: it counts steps from 0, and Orbax
        counts along.)
        """
        if self._taken:
            yield
            return

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT:
                signal.signal(number, before[number])
            # In a thread: this one may hold a lock.
            name = signal.Signals(number).name
            act = self._ask if self._begun else self._end_unbegun
            threading.Thread(target=act, args=(name,), name="stop", daemon=True).start()

        self._taken = True
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            self._taken = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, step: int) -> str:
        """Whether the run ends with this step, for each process to ask after each step; all get the same answer.

        When a process is asked to end, the others are told, and each says, from the thread that listens, which step it
        has last gone on after, and goes on after none before it knows the answer: the first step after all of these.

        Returns:
            The signal because of which it ends, or "".
        """
        self._begun = True
        with self._stopping:
            if not self.asked:
                self._passed = step
                return ""
        self._decided.wait()
        return self.asked if step >= self._last else ""

    def _end_unbegun(self, name: str) -> None:
        """Ends all processes before the first step."""
        self._leaving.set()
        what = f"{self._named(self.at.process)} was stopped by {name} before the first step of this run"
        _log.error("%s; the same command begins again", what)
        self._tell_all({"ended": what, "stopped": True})
        self._exit_stopped()

    def _exit_stopped(self) -> None:
        """Ends this process before the first step."""
        self._linger()
        sys.stderr.flush()
        os._exit(self._stopped_status)

    def _linger(self) -> None:
        """Has process 0, which has JAX's service, stay until the others are gone, which were told to go."""
        deadline = time.monotonic() + _FAREWELL_S
        for listener in self._listeners if self.at.process == 0 else ():
            if listener is not threading.current_thread():
                listener.join(max(0.0, deadline - time.monotonic()))

    def _ask(self, name: str) -> None:
        if self.at.process:
            self._tell_all({"stop": name})
            return
        with self._stopping:
            if self.asked:
                return
            self.asked, passed = name, self._passed
        self._tell_all({"stopping": name})
        self._report(0, passed)

    def _report(self, number: int, passed: int) -> None:
        """At process 0: takes the last step that a process has gone on after."""
        with self._stopping:
            self._reports[number] = passed
            if len(self._reports) < self.at.processes:
                return
            self._last = max(self._reports.values()) + 1
        self._tell_all({"last": self._last})
        self._decided.set()

    def _heed(self, number: int, said: dict[str, Any]) -> bool:
        """Whether a message was about the end of the run; does what it asks for."""
        if "stop" in said:
            self._ask(said["stop"])
        elif "passed" in said:
            self._report(number, said["passed"])
        elif "stopping" in said:
            with self._stopping:
                self.asked, passed = said["stopping"], self._passed
            self._tell_all({"passed": passed})
        elif "last" in said:
            self._last = said["last"]
            self._decided.set()
        else:
            return False
        return True

    # ------------------------------------------------------------------------------------------------------- loss

    def leave(self, error: BaseException | None = None) -> None:
        """Tells the others that this process is done, or why it ends; from then on it may lose them."""
        if not self._lines or self._leaving.is_set():
            return
        if error is None:
            self._leaving.set()
            self._tell_all({"done": True})
            return
        # A collective that fails because another process was lost may be quicker than the news of it.
        if self._lost.wait(_NEWS_S):
            return
        self._status, self._failed = getattr(error, "exit_status", 1), True
        expected = isinstance(error, ProcessError) or hasattr(error, "exit_status")  # all is in its message
        _log.critical("%s", error, exc_info=None if expected else error)
        self._leaving.set()
        ended = f"{self._named(self.at.process)} ended: {files.first_line(error)}"
        self._tell_all({"ended": ended, "status": self._status, "broken": self.broken()})
        self._exit_after(0.0 if self.broken() else _SAVE_S)

    def end(self) -> None:
        """Ends this process, which has failed and closed what it had: process 0 at once. The others stay until it has,
        as it may still be writing what they have written their part of, and JAX on it wants them there.
        """
        if self.at.process:
            self._listeners[0].join(_SAVE_S + 2 * _GRACE_S)
        elif self._lost.is_set():
            self._linger()
        self._exit()

    def _exit_after(self, saving_s: float, seconds: float = _GRACE_S) -> None:
        """Ends the process in a while, whatever it waits for: JAX would wait at its exit for processes that are gone,
        Orbax for their part of a checkpoint.

        Args:
            saving_s: how long a save that is under way may take; others than process 0 stay until it is gone.
            seconds: how long after that the process may take to end by itself.
        """

        def end() -> None:
            deadline = time.monotonic() + saving_s
            with contextlib.suppress(Exception):
                while (self.at.process or self.saving()) and time.monotonic() < deadline:
                    time.sleep(_RETRY_S)
            time.sleep(seconds)
            self._exit()

        threading.Thread(target=end, name="exit", daemon=True).start()

    def _named(self, number: int) -> str:
        return f"process {number} on {self._hosts.get(number) or socket.gethostname()}"

    def _tell_all(self, message: dict[str, Any]) -> None:
        with self._speaking:
            for line in self._lines.values():
                with contextlib.suppress(OSError):  # who is gone is noticed by `_listen`
                    _tell(line, message)

    def _listen(self, number: int) -> None:
        """Takes what a process says, until it is done, or lost."""
        told = False
        with contextlib.suppress(OSError, ValueError):
            for line in self._lines[number].makefile("r", encoding="utf-8"):
                said = json.loads(line)
                if "done" in said:
                    return
                if "ended" in said or "gone" in said:
                    told = True
                    self._lose(said)
                elif not self._heed(number, said):
                    self._said[number].put(said)
        if not told:
            self._lose({"gone": f"{self._named(number)} is gone, without a word"})
        if self.at.process and (told or self._failed):  # process 0 is through, and JAX is about to abort this one
            self._exit()

    def _lose(self, lost: dict[str, Any]) -> None:
        """Ends this process, in a while, because another one is "gone" or has "ended", for the reason there."""
        if self._leaving.is_set() or self._lost.is_set():
            return
        self._lost.set()
        # JAX may abort the process at any moment for the same reason: first what matters most.
        _log.critical("%s; %s ends too", lost.get("gone") or lost["ended"], self._named(self.at.process))
        if self.at.process == 0:
            self._tell_all(lost)
        if "stopped" in lost:
            self._exit_stopped()
        self._status = lost.get("status", 1)
        if "ended" in lost:  # this one may be raising the same error, which says more
            self._exit_after(0.0 if lost.get("broken") else _SAVE_S)
        elif self.at.process:
            self._exit()
        else:
            self._exit_after(0.0, _FAREWELL_S)

    def _exit(self) -> None:
        """Ends the process; says what is kept and how to go on, unless an error has said it."""
        if self._status == 1 and not self._failed:
            step = self.saved()
            kept = f"The checkpoint of step {step} is whole. " if step else "There is no checkpoint yet. "
            _log.critical("%sThe same command for all processes resumes.", "" if step is None else kept)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(self._status)


def _tell(line: socket.socket, message: dict[str, Any]) -> None:
    line.sendall(json.dumps(message).encode() + b"\n")


def _kept_alive(line: socket.socket) -> socket.socket:
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def _gathered(at: Place, deadline: float) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Process 0: waits for the others to come. Connections and hosts by number."""
    lines: dict[int, socket.socket] = {}
    hosts = {0: socket.gethostname()}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    where = "", int(at.coordinator.rpartition(":")[2])
    while True:
        try:
            server = socket.create_server(where, family=family, dualstack_ipv6=dual, backlog=4096)
            break
        except OSError as error:  # a run before this one may still be ending
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise ProcessError(f"process 0 cannot be found at {at.coordinator}: {error.strerror}") from error
            time.sleep(_RETRY_S)
    with server:
        while len(hosts) < at.processes and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a port is knocked at by others too
                line, _ = server.accept()
                line.settimeout(10.0)
                hello = _read_line(line)
                number = int(hello["process"])
                if number in lines and _closed(lines[number]):
                    del lines[number], hosts[number]  # it was started again
                if number in hosts or not 0 < number < at.processes:
                    _tell(line, {"answer": f"process {number} of {at.processes} is there already, or there is none"})
                    continue
                lines[number], hosts[number] = _kept_alive(line), str(hello["host"])
    answer = ""
    if missing := sorted(set(range(at.processes)) - set(hosts)):
        came = [f"{number} on {host}" for number, host in sorted(hosts.items())]
        more = f" and {len(came) - _NAMED} more" if len(came) > _NAMED else ""
        names = ", ".join(map(str, missing))
        answer = f"process{'es' if len(missing) > 1 else ''} {names} of {at.processes} did not come; there are "
        answer += ", ".join(came[:_NAMED]) + more
    for line in lines.values():
        with contextlib.suppress(OSError):
            _tell(line, {"answer": answer, "host": hosts[0]})
    if answer:
        raise ProcessError(answer)
    return lines, hosts


def _joined(at: Place, deadline: float) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Another process: comes to process 0, and waits until all have. Its connection, and both hosts."""
    host, _, port = at.coordinator.rpartition(":")
    mine, timeout_s, why = socket.gethostname(), deadline - time.monotonic(), ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = _kept_alive(socket.create_connection((host.strip("[]"), int(port)), timeout=left))
            _tell(line, {"process": at.process, "host": mine})
            line.settimeout(left + timeout_s + _GRACE_S)  # process 0 may have begun to wait just now
            answer = _read_line(line, 2**20)  # it may name thousands of processes
            if answer["answer"]:
                raise ProcessError(answer["answer"])
            line.settimeout(None)
            return {0: line}, {0: answer["host"], at.process: mine}
        except (OSError, ValueError, KeyError) as error:
            why = str(error)
        time.sleep(_RETRY_S)
    raise ProcessError(
        f"process 0 of {at.processes} did not come to {at.coordinator} ({why}); process {at.process} on {mine} waited "
        "for it"
    )


def _closed(line: socket.socket) -> bool:
    """Whether the process at the other end has closed a connection, over which it has nothing to say yet."""
    try:
        return not line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _read_line(line: socket.socket, longest: int = 4096) -> dict[str, Any]:
    """A message of at most so many bytes, and not a byte of the next."""
    said = b""
    while not said.endswith(b"\n"):
        if not (more := line.recv(1)) or len(said) > longest:
            raise ValueError("the connection closed, or says something else")
        said += more
    return json.loads(said)


def differences(facts: dict[int, dict[str, Any]]) -> str:
    """What processes say otherwise than process 0, a line for each process and name; "" for nothing."""
    wanted = _flat(facts[0])
    lines = []
    for number, found in sorted(facts.items()):
        found = _flat(found)
        lines += [
            f"process {number}: {name} is {found.get(name, 'missing')!r}; process 0 has {wanted.get(name, 'none')!r}"
            for name in sorted(wanted | found)
            if found.get(name, _flat) != wanted.get(name, _flat)
        ]
    return "\n".join(lines)


def _flat(facts: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, by names with dots."""
    if not isinstance(facts, dict):
        return {name: facts}
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found |= _flat(value, f"{name}.{key}" if name else str(key))
    return found
