"""Runs of several processes: they find each other or say who is missing, and do what one process does."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from fot_jax import processes
from fot_jax.tokenizer import train_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 20
# Runs train.py, and writes a checksum of every row of every batch that this process brings.
RECORD = """
import hashlib, json, sys
import train
from absl import app, flags
from fot_jax import training

path, rows = sys.argv.pop(1), training.Rows

class Recorded(rows):
    def together(self, batch):
        sums = {int(n): hashlib.sha1(b"".join(batch[k][i].tobytes() for k in sorted(batch))).hexdigest()
                for i, n in enumerate(self.numbers)}
        with open(path, "a") as file:
            file.write(json.dumps(sums) + "\\n")
        return super().together(batch)

training.Rows = Recorded
flags.mark_flags_as_required(["config"])
app.run(train.main)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the processes of a run, of `devices` CPU devices together."""
    shared = tmp_path_factory.mktemp("shared")
    (shared / "text").mkdir()
    sources = sorted((ROOT / "fot_jax").glob("*.py"))
    for path in sources:
        (shared / "text" / f"{path.stem}.txt").write_text(path.read_text())
    train_tokenizer((path.read_text() for path in sources), shared / "tokenizer.model", 400)
    options = {
        "steps": STEPS,
        "model.vocab_size": 400,
        "batch.rows": 16,
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "data.train": f"('{shared / 'text'}',)",
        "data.prepared": shared / "prepared",
        "data.tokenizer": shared / "tokenizer.model",
        "data.skip_short": True,
        "checkpoint.every": 5,
    }
    (shared / "record.py").write_text(RECORD)
    base = [f"--config={ROOT / 'tests' / 'toy.py'}", *(f"--config.{key}={value}" for key, value in options.items())]

    def run(workdir, count, *more, devices=8, port=None, only=None, each=lambda i: ()):
        port = port or free_port()
        started = []
        for i in range(count) if only is None else only:
            flags = f"--xla_force_host_platform_device_count={devices // count} --xla_backend_optimization_level=0"
            env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
            where = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"] if count > 1 else []
            command = [sys.executable, str(shared / "record.py"), str(workdir) + f".{count}.{i}.rows", *base]
            command += [f"--workdir={workdir}", *where, *more, *each(i)]
            pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(command, env=env, **pipes))
        return started

    return run


def finish(started):
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(errors)
    return errors


def rows(workdir, count):
    """For each step the checksum of every row, of all processes together."""
    paths = [pathlib.Path(f"{workdir}.{count}.{i}.rows") for i in range(count)]
    each = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    steps = [{k: v for part in parts for k, v in part.items()} for parts in zip(*each, strict=True)]
    assert all(sum(map(len, parts)) == len(step) for parts, step in zip(zip(*each, strict=True), steps, strict=True))
    return steps


def losses(workdir):
    found = map(json.loads, (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def test_two_processes_do_what_one_does(start, tmp_path):
    finish(start(tmp_path / "one", 1))
    finish(start(tmp_path / "two", 2))
    whole, parts = rows(tmp_path / "one", 1), rows(tmp_path / "two", 2)
    assert whole == parts and len(whole) == STEPS and all(len(step) == 16 for step in whole)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)


def test_a_missing_process_is_named(start, tmp_path):
    started = start(tmp_path, 3, "--start_timeout=8", only=(0, 2))
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "process 1 of 3 did not come; there are 0 on" in errors, errors
    assert not (tmp_path / "checkpoints").exists()
    (alone,) = start(tmp_path, 2, "--start_timeout=4", only=(1,))
    _, errors = alone.communicate(timeout=120)
    assert alone.returncode == 1 and "process 0 of 2 did not come to 127.0.0.1:" in errors


def test_configurations_that_differ_are_shown(start, tmp_path):
    started = start(tmp_path, 2, each=lambda i: [f"--config.seed={i}", "--config.optimizer.b2=0.9"])
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "process 1: config.seed is 1; process 0 has 0" in errors, errors


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (("host:1", None, None), "wanted all, or none"),
        (("host", 2, 0), "coordinator is 'host'; wanted HOST:PORT"),
        (("host:1", 2, 2), "process is 2 of 2; wanted 0..1"),
    ],
)
def test_places_that_there_are_not(stated, message):
    with pytest.raises(ValueError, match=message):
        processes.place(*stated)


def test_slurm_says_where_a_process_is(monkeypatch):
    says = dict(JOB_ID="7", STEP_NODELIST="node[3-4]", NTASKS="8", PROCID="5", LOCALID="1")
    for name, value in says.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = processes.place()
    assert (found.processes, found.process, found.local_devices) == (8, 5, (1,))
    assert found.coordinator.startswith("node3:")
