"""The processes of a run on several hosts: how they find each other, and that they are of one mind.

JAX's own start ends a process without a word on who is missing. So the processes meet first at the coordinator's
address, over a plain socket, say what they are about to do, and go on together or not at all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

_log = logging.getLogger(__name__)
# How long a process that cannot reach another one's host waits before it tries again.
_RETRY_S = 0.2


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


def place(coordinator: str = "", processes: int | None = None, process: int | None = None) -> Place | None:
    """Where this process is: as stated, or else as TPU pods, SLURM, Open MPI and Kubernetes say, by JAX's own finding.

    Returns:
        None where nothing says that there are others.

    Raises:
        ValueError: a part is stated and not the rest, or numbers that do not fit.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    stated = (bool(coordinator), processes is not None, process is not None)
    if any(stated) and not all(stated):
        raise ValueError(
            f"coordinator is {coordinator!r}, processes {processes}, process {process}; wanted all, or none where "
            "TPU pods, SLURM, Open MPI or Kubernetes say them"
        )
    if not any(stated):
        return _detected()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator is {coordinator!r}; wanted HOST:PORT")
    if not 0 <= process < processes:
        raise ValueError(f"process is {process} of {processes}; wanted 0..{processes - 1}")
    return Place(coordinator, processes, process)


def _detected() -> Place | None:
    """What the cluster says, by the part of JAX that asks it (not public: a JAX that has it no more is told to start by
    itself, see `start`).
    """
    from jax._src import clusters

    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    coordinator, processes, process, devices = found
    if coordinator is None or processes is None or process is None:
        return None
    return Place(coordinator, int(processes), int(process), None if devices is None else tuple(devices))


def start(at: Place | None, facts: dict[str, Any], timeout_s: float = 300.0) -> None:
    """Waits for all processes of a run, compares what they say, and starts JAX's own service among them.

    Before anything that asks JAX for devices. Without others it does nothing.

    Args:
        facts: JSON-able; what has to be the same everywhere, by name.
        timeout_s: how long to wait for the others.

    Raises:
        ProcessError: processes that did not come, or say something else; every process that came raises it.
    """
    if at is None or at.processes == 1:
        return
    deadline = time.monotonic() + timeout_s
    mine = {"process": at.process, "host": socket.gethostname(), "facts": facts}
    answer = _received(at, mine, deadline) if at.process == 0 else _sent(at, mine, deadline)
    if answer:
        raise ProcessError(answer)
    jax.distributed.initialize(
        at.coordinator, at.processes, at.process, at.local_devices, initialization_timeout=max(10, int(timeout_s))
    )


def _received(at: Place, mine: dict[str, Any], deadline: float) -> str:
    """Process 0: takes what the others say, and tells all of them what is wrong; "" if nothing is."""
    said, lines = {0: mine}, []
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with contextlib.ExitStack() as stack:
        port = int(at.coordinator.rpartition(":")[2])
        server = stack.enter_context(
            socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=4096)
        )
        while len(said) < at.processes and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # a port is knocked at by others too
                connection, _ = server.accept()
                connection.settimeout(max(1.0, min(left, 10.0)))
                lines.append(stack.enter_context(connection.makefile("rw", encoding="utf-8")))
                one = json.loads(lines[-1].readline())
                said[one["process"]] = one
        answer = _verdict(at, said)
        for line in lines:
            with contextlib.suppress(OSError):
                line.write(json.dumps(answer) + "\n")
                line.flush()
    return answer


def _sent(at: Place, mine: dict[str, Any], deadline: float) -> str:
    """Another process: says what it has to say, and waits for the answer."""
    host, _, port = at.coordinator.rpartition(":")
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError):
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                # Process 0 answers when all are there or its time is over, which may have begun later.
                connection.settimeout(left + 30.0)
                with connection.makefile("rw", encoding="utf-8") as line:
                    line.write(json.dumps(mine) + "\n")
                    line.flush()
                    return json.loads(line.readline())
        time.sleep(_RETRY_S)
    return f"process 0 of {at.processes} did not come to {at.coordinator}; process {at.process} waited for it"


def _verdict(at: Place, said: dict[int, dict[str, Any]]) -> str:
    """What is wrong with the processes that came; "" if nothing is."""
    if missing := sorted(set(range(at.processes)) - set(said)):
        came = ", ".join(f"{number} on {one['host']}" for number, one in sorted(said.items()))
        names = ", ".join(map(str, missing))
        return f"process{'es' if len(missing) > 1 else ''} {names} of {at.processes} did not come; there are {came}"
    return differences({number: one["facts"] for number, one in said.items()})


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


def agree(name: str, value: str) -> None:
    """Refuses to go on unless every process has the same text.

    Raises:
        ProcessError: those that have another; every process raises it.
    """
    if jax.process_count() == 1:
        return
    given = np.zeros(256, np.uint8)
    encoded = np.frombuffer(value.encode()[:256], np.uint8)
    given[: len(encoded)] = encoded
    gathered = np.asarray(multihost_utils.process_allgather(given))
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered]
    if wrong := differences({number: {name: text} for number, text in enumerate(texts)}):
        raise ProcessError(wrong)
