"""A run that is killed and started again ends with the bits of one that never stopped."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy

import fot_jax
from fot_jax import checkpoint
from fot_jax.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Starts train.py in a process of its own; what is compiled or tokenised once is so for all."""
    shared = tmp_path_factory.mktemp("shared")
    flags = "--xla_backend_optimization_level=0"  # and one device
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    options = {
        **toy.data_options(shared),
        "steps": STEPS,
        "crossbatch.contexts": "(1,3)",
        "crossbatch.schedule": "draw",
        "data.prepared": shared / "prepared",
    }
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / 'tests' / 'toy.py'}"]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    command.append(f"--compilation_cache={shared / 'compiled'}")

    def start(workdir, *more):
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen([*command, f"--workdir={workdir}", *more], env=env, **pipes)

    start.compiled = lambda: {path.name for path in (shared / "compiled").glob("jit_train_step-*-cache")}
    return start


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return errors


def kill_when(process, ready):
    """SIGKILL as soon as `ready` holds; whether it came in time."""
    while process.poll() is None:
        if ready():
            process.kill()
            break
        time.sleep(0.0005)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def lines(workdir):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def outcome(workdir):
    """Every array of the last checkpoint and the data position, and the loss of every step."""
    assert checkpoint.steps(workdir)[-1] == STEPS
    last = pathlib.Path(workdir) / "checkpoints" / str(STEPS)
    data, told = (json.loads((last / part / "data.json").read_text()) for part in ("data", "run"))
    metrics = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    params = jax.device_get(fot_jax.load_pretrained(workdir, None)[1])
    return params, data, told, [(line["step"], line["loss"]) for line in metrics if "loss" in line]


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found[0], wanted[0])
    assert found[1:3] == wanted[1:3]  # the data position; the sums of the optimizer's bits among them
    assert found[3] == wanted[3] and [step for step, _ in wanted[3]] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    finish(run(workdir))
    return outcome(workdir)


def test_killed_between_saves_and_during_one(run, uninterrupted, tmp_path):
    assert kill_when(run(tmp_path), lambda: lines(tmp_path) >= 5)
    assert kill_when(run(tmp_path), lambda: toy.being_saved(tmp_path, 8))
    assert checkpoint.steps(tmp_path)[-1] < STEPS
    assert "resuming from step" in finish(run(tmp_path))
    assert_same(outcome(tmp_path), uninterrupted)

    # Another tokenizer of the same size is refused, and changes nothing there.
    kept = {name: (tmp_path / name).read_bytes() for name in ("tokenizer.model", "config.json")}
    other = tmp_path / "other.model"
    train_tokenizer((path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))), other, 400)
    refused = run(tmp_path, f"--config.data.tokenizer={other}", "--config.steps=13")
    assert "is another tokenizer than" in refused.communicate()[1] and refused.returncode
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}


def test_stopped_by_sigterm(run, uninterrupted, tmp_path):
    programs = run.compiled()
    assert len(programs) == 2  # for each number of contexts
    process = run(tmp_path)
    while process.poll() is None and lines(tmp_path) < 3:
        time.sleep(0.001)
    process.terminate()
    errors = finish(process)  # exit code 0
    if checkpoint.steps(tmp_path)[-1] < STEPS:
        assert "stopped by SIGTERM" in errors and "the same command resumes" in errors
        finish(run(tmp_path))
    assert_same(outcome(tmp_path), uninterrupted)
    assert run.compiled() == programs  # which were read again, not made again


class Later:
    """Whether some seconds are gone since the first line of metrics after this was made."""

    def __init__(self, seconds, workdir):
        self.seconds, self.workdir, self.lines, self.since = seconds, workdir, lines(workdir), None

    def __call__(self):
        if self.since is None and lines(self.workdir) != self.lines:
            self.since = time.perf_counter()
        return self.since is not None and time.perf_counter() - self.since > self.seconds


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(run, uninterrupted, tmp_path, seed):
    moments = random.Random(seed)
    for _ in range(4):
        process = run(tmp_path)
        if not kill_when(process, Later(moments.uniform(0.0, 1.5), tmp_path)):
            break
    if process.returncode:
        finish(run(tmp_path))
    assert_same(outcome(tmp_path), uninterrupted)
