"""Runs of several processes: they find each other or say who is missing, and do what one process does."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import toy
from test_object_stores import forgotten, gs, s3, store

import fot_jax
from fot_jax import checkpoint, files, processes

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 20
__all__ = ["forgotten", "gs", "s3", "store"]  # fixtures
# Runs train.py, and writes a checksum of every row of every batch that this process brings. A checkpoint takes a while
# to get its name, so that there is time to kill in. FAILS is a process that fails with its second batch; BUSY one that
# then has Python to itself for seconds at a time; NAN a step without a loss.
RECORD = """
import hashlib, json, os, sys, time
import jax, train
from absl import app, flags
from fot_jax import programs

path, rows, steps = sys.argv.pop(1), programs.Rows, []

class Recorded(rows):
    def together(self, batch):
        if os.environ.get("FAILS") == str(jax.process_index()) and steps:
            raise OSError("the disk of this host is gone")
        if os.environ.get("BUSY") == str(jax.process_index()) and steps:
            open(path + ".busy", "w").close()
            sys.setswitchinterval(2.0)
            while True:
                pass
        steps.append(1)
        sums = {int(n): hashlib.sha1(b"".join(batch[k][i].tobytes() for k in sorted(batch))).hexdigest()
                for i, n in enumerate(self.numbers)}
        with open(path, "a") as file:
            file.write(json.dumps(sums) + "\\n")
        return super().together(batch)

programs.Rows = Recorded
rename = os.rename

def slow_rename(source, *more, **options):
    if "orbax-checkpoint-tmp" in os.fspath(source):
        time.sleep(0.2)
    rename(source, *more, **options)

os.rename = slow_rename
step = programs.train_step

def bad(*args):
    state, values = step(*args)
    lost = state.step == int(os.environ["NAN"])
    return state, values | {"loss": jax.numpy.where(lost, jax.numpy.nan, values["loss"])}

programs.train_step = bad if "NAN" in os.environ else step
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
    options = {
        **toy.data_options(shared),
        "steps": STEPS,
        "batch.rows": 16,
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "data.prepared": shared / "prepared",
        "checkpoint.every": 5,
        # Steps that are small beside the parameters, as a real run's: of a gradient that is nearly zero Adam makes a
        # step of its rounding.
        "optimizer.learning_rate": 1e-3,
    }
    (shared / "record.py").write_text(RECORD)
    base = [f"--config={ROOT / 'tests' / 'toy.py'}", *(f"--config.{key}={value}" for key, value in options.items())]
    base.append(f"--compilation_cache={shared / 'compiled'}")

    def run(
        workdir,
        count,
        *more,
        devices=8,
        port=None,
        only=None,
        each=lambda i: (),
        folders=None,
        rows_at=None,
        **more_env,
    ):
        port = port or free_port()
        started = []
        for i in range(count) if only is None else only:
            flags = f"--xla_force_host_platform_device_count={devices // count} --xla_backend_optimization_level=0"
            env = {
                **os.environ,
                "XLA_FLAGS": flags,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
                **more_env,
            }
            where = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"] if count > 1 else []
            command = [sys.executable, str(shared / "record.py"), f"{rows_at or workdir}.{count}.{i}.rows", *base]
            command += [f"--workdir={workdir}", *where, *more, *each(i)]
            pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            cwd = folders[i] if folders else None
            started.append(subprocess.Popen(command, env=env, cwd=cwd, **pipes))
        return started

    return run


def finish(started):
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(errors)
    return errors


def rows(workdir, count):
    """For each step the checksum of every row, of all processes together; written anew by the next run."""
    paths = [pathlib.Path(f"{workdir}.{count}.{i}.rows") for i in range(count)]
    each = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    for path in paths:
        path.unlink()
    done = list(zip(*each, strict=False))  # of a step that was cut short, some may have no rows
    steps = [{k: v for part in parts for k, v in part.items()} for parts in done]
    assert all(sum(map(len, parts)) == len(step) for parts, step in zip(done, steps, strict=True))
    return steps


def losses(workdir):
    path = files.location(workdir) / "metrics.jsonl"
    found = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def wait_for(started, ready):
    """Until `ready` holds, or a process has ended; whether they all still run."""
    while all(process.poll() is None for process in started) and not ready():
        time.sleep(0.001)
    return all(process.poll() is None for process in started)


def assert_same_outcome(found, wanted):
    """The losses of all steps, and the parameters after the last, of two working directories."""
    np.testing.assert_allclose(list(losses(found).values()), list(losses(wanted).values()), rtol=1e-5)
    assert list(losses(found)) == list(range(1, STEPS + 1))
    ours, theirs = (jax.device_get(fot_jax.load_pretrained(workdir, None)[1]) for workdir in (found, wanted))
    # Of whole tensors: a single gradient that is nearly zero may round to the other sign, which Adam makes a step of.
    apart = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), ours, theirs)
    assert max(jax.tree.leaves(apart)) < 1e-5, apart


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run of one process that was never stopped: its working directory, and the rows of its steps."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(workdir, 1))
    return workdir, rows(workdir, 1)


def killed(start, workdir, which, ready, rows_at=None):
    """Two processes, of which one is killed when it is time: the other ends with a message. The rows of the steps that
    are saved; None if all was over before.
    """
    started = start(workdir, 2, rows_at=rows_at)
    if not wait_for(started, ready):
        finish(started)
        return None
    print("killed when steps were saved:", checkpoint.steps(workdir), "and being saved:", toy.being_saved(workdir))
    started[which].kill()
    when = time.monotonic()
    errors = started[1 - which].communicate(timeout=60)[1]
    assert time.monotonic() - when < 60 and started[1 - which].returncode == 1, errors
    assert f"process {which} on" in errors and "is gone, without a word" in errors
    started[which].communicate()
    saved = checkpoint.steps(workdir)
    # What is completed while it says so, it may not know of; of copies only process 0 hears.
    *_, said = errors.strip().splitlines()
    named = re.search(r"The checkpoint of step (\d+) is whole", said)
    if not named:
        unknown = files.store_of(workdir) == "s3" and which == 0
        assert "The same command for all processes resumes" in said
        assert unknown or ("There is no checkpoint" in said and saved in ([], [5]))
    else:
        assert int(named[1]) in saved and int(named[1]) >= saved[-1] - 5
    return rows(rows_at or workdir, 2)[: saved[-1] if saved else 0]


def test_killed_and_resumed_by_one_process(start, whole, tmp_path):
    workdir = tmp_path / "run"
    seen = killed(start, workdir, 1, lambda: max(losses(workdir), default=0) >= 7)
    finish(start(workdir, 1))
    assert seen and seen + rows(workdir, 1) == whole[1] and all(len(step) == 16 for step in whole[1])
    assert_same_outcome(workdir, whole[0])


@pytest.mark.slow
def test_two_processes_do_what_one_does(start, whole, tmp_path):
    finish(start(tmp_path / "two", 2))
    assert rows(tmp_path / "two", 2) == whole[1] and len(whole[1]) == STEPS
    assert_same_outcome(tmp_path / "two", whole[0])


@pytest.mark.slow
def test_stopped_and_resumed_by_other_numbers_of_processes(start, whole, tmp_path):
    """On another mesh each time, too."""
    workdir, seen = tmp_path / "run", []
    for count, *mesh in (2, 2, 4, 1), (1, 1, 8, 1), (4, 2, 2, 2):
        shape = zip(("data", "fsdp", "tensor"), mesh, strict=True)
        started = start(workdir, count, *(f"--config.mesh.{axis}={size}" for axis, size in shape))
        before = max(losses(workdir), default=0)
        if count != 4:
            assert wait_for(started, lambda before=before: max(losses(workdir), default=0) >= before + 4)
            started[-1].terminate()  # one of them is told, all stop
        told, *others = finish(started)
        assert ("stopped by SIGTERM" in told) == (count != 4)
        assert not any("stopped by" in text for text in others)  # process 0 speaks for all
        seen += rows(workdir, count)
        assert len(seen) == checkpoint.steps(workdir)[-1]
    assert seen == whole[1]
    assert_same_outcome(workdir, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_before_the_first_step_ends_all_at_once(start, tmp_path, told):
    started = start(tmp_path / "run", 2, "--stopped_status=75")
    for line in started[0].stderr:
        if "on mesh" in line:  # the processes have met; data, checkpoint and compiler are to come
            break
    started[told].terminate()
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [75, 75], errors
    assert all(f"process {told} on" in text and "stopped by SIGTERM before the first step" in text for text in errors)
    assert checkpoint.steps(tmp_path / "run") == []


@pytest.mark.slow
def test_a_run_of_two_processes_in_an_object_store(start, whole, store, tmp_path):
    url, at = store[0], tmp_path / "run"
    seen = killed(start, url, 0, lambda: len(checkpoint.steps(url)) > 1, rows_at=at)
    assert seen
    finish(start(url, 1, rows_at=at))
    assert seen + rows(at, 1) == whole[1]
    assert_same_outcome(url, whole[0])
    assert (files.location(url) / "tokenizer.model").exists()


@pytest.mark.slow
def test_an_upload_of_two_processes_that_is_refused(start, whole, store, tmp_path):
    (url, proxy), at = store, tmp_path / "run"
    proxy.refused = re.compile(r"checkpoints(/|%2[fF])10(/|%2[fF])params")
    started = start(url, 2, rows_at=at)
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], errors
    assert any(f"saving step 10 to {url}" in text for text in errors), errors
    assert checkpoint.steps(url) == [5]
    proxy.refused, seen = None, rows(at, 2)[:5]
    finish(start(url, 1, rows_at=at))
    assert seen + rows(at, 1) == whole[1]
    assert_same_outcome(url, whole[0])


@pytest.mark.slow
def test_every_process_keeps_its_part_of_a_bad_batch(start, tmp_path):
    started = start(tmp_path / "run", 2, NAN="6")
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert all("step 6: loss is nan" in text for text in errors) and all(p.returncode == 3 for p in started), errors
    kept = [np.load(tmp_path / "run" / "refused" / f"step_6.process_{i}.npz") for i in range(2)]
    assert sorted(row for part in kept for row in part["row"]) == list(range(16))
    assert checkpoint.steps(tmp_path / "run") == [5]  # which was being written


@pytest.mark.slow
def test_a_checkpoint_that_is_being_copied_is_completed_before_numbers_end_the_run(start, tmp_path, s3):
    url, proxy = s3
    proxy.seconds = 1.0  # of each upload: the copy takes longer than who fails first waits for others
    started = start(url, 2, rows_at=tmp_path / "run", NAN="6")
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert all("step 6: loss is nan" in text for text in errors) and all(p.returncode == 3 for p in started), errors
    assert checkpoint.steps(url) == [5]


@pytest.mark.slow
def test_all_of_many_processes_say_which_is_lost(start, tmp_path):
    started = start(tmp_path / "run", 4)
    assert wait_for(started, lambda: max(losses(tmp_path / "run"), default=0) >= 2)
    started[2].kill()
    killed = time.monotonic()
    for i in (0, 1, 3):
        errors = started[i].communicate(timeout=60)[1]
        assert started[i].returncode == 1 and "process 2 on" in errors and "is gone, without a word" in errors, errors
    assert time.monotonic() - killed < 60
    started[2].communicate()


@pytest.mark.slow
def test_who_is_busy_still_says_what_is_lost_before_jax_aborts(start, tmp_path):
    started = start(tmp_path / "run", 2, BUSY="1")
    assert wait_for(started, (tmp_path / "run.2.1.rows.busy").exists)
    started[0].kill()
    errors = started[1].communicate(timeout=60)[1]
    assert started[1].returncode == 1 and "process 0 on" in errors and "is gone, without a word" in errors, errors
    assert "Terminating process because" in errors  # JAX's
    started[0].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_random_moments(start, whole, tmp_path, seed):
    moments, workdir = random.Random(seed), tmp_path / "run"
    # Every other time while a checkpoint is written, of steps 5, 10, 15 or 20.
    step, which, saving = moments.randrange(STEPS - 2), moments.randrange(2), seed % 2
    later = moments.uniform(0.0, 0.2)

    def ready():
        if max(losses(workdir), default=0) < step or (saving and not toy.being_saved(workdir)):
            return False
        time.sleep(0 if saving else later)
        return True

    seen = killed(start, workdir, which, ready)
    assert seen is not None
    if seed % 4 == 3:  # once more while they start: they meet, read the checkpoint, or compile
        seen += killed_at_the_start(start, workdir, moments)
    finish(start(workdir, 2))
    assert seen + rows(workdir, 2) == whole[1]
    assert_same_outcome(workdir, whole[0])


def killed_at_the_start(start, workdir, moments):
    """The rows of the steps that a resumed run still saved, one of whose processes was killed within some seconds."""
    before, which = (checkpoint.steps(workdir) or [0])[-1], moments.randrange(2)
    started = start(workdir, 2, "--start_timeout=20")
    time.sleep(moments.uniform(1.0, 10.0))
    started[which].kill()
    errors = started[1 - which].communicate(timeout=60)[1]
    assert started[1 - which].returncode == 1, errors
    assert "is gone, without a word" in errors or "did not come" in errors, errors
    started[which].communicate()
    for i in range(2):
        pathlib.Path(f"{workdir}.2.{i}.rows").touch()
    return rows(workdir, 2)[: (checkpoint.steps(workdir) or [0])[-1] - before]


def test_a_missing_process_is_named(start, tmp_path):
    started = start(tmp_path, 3, "--start_timeout=5", only=(0, 2))
    for process in started:
        _, errors = process.communicate(timeout=60)  # with Python's start and JAX's
        assert process.returncode == 1 and "process 1 of 3 did not come; there are 0 on" in errors, errors
    assert not (tmp_path / "checkpoints").exists()
    (alone,) = start(tmp_path, 2, "--start_timeout=3", only=(1,))
    _, errors = alone.communicate(timeout=120)
    assert alone.returncode == 1 and "process 0 of 2 did not come to 127.0.0.1:" in errors


@pytest.mark.slow
def test_a_process_that_fails_tells_the_others(start, tmp_path):
    started = start(tmp_path / "run", 2, FAILS="1")
    whole, failed = (process.communicate(timeout=120)[1] for process in started)
    assert [process.returncode for process in started] == [1, 1]
    assert "OSError: the disk of this host is gone" in failed and "Traceback" in failed
    assert "ended: OSError: the disk of this host is gone; process 0 on" in whole
    assert "There is no checkpoint yet" in whole


def test_of_many_processes_those_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "a-host-whose-name-is-as-long-as-those-of-clouds")
    port, count, there = free_port(), 300, 120
    place = lambda i: processes.Place(f"127.0.0.1:{port}", count, i)

    def one(i):
        with pytest.raises(processes.ProcessError) as caught:
            (processes._joined if i else processes._gathered)(place(i), time.monotonic() + 8.0)
        return str(caught.value)

    with concurrent.futures.ThreadPoolExecutor(there) as pool:
        (said,) = set(pool.map(one, range(there)))
    assert said.startswith("processes 120, 121, ") and ", 299 of 300 did not come; there are 0 on a-host" in said
    assert said.endswith("7 on a-host-whose-name-is-as-long-as-those-of-clouds and 112 more")


def test_texts_that_differ_are_shown(start, tmp_path):
    for i in range(2):
        (tmp_path / str(i) / "text").mkdir(parents=True)
        (tmp_path / str(i) / "text" / "a.txt").write_text(f"A text that each host has {i + 1} times over. " * 200)
    stated = ["--config.data.train=('text',)", "--config.data.prepared=prepared"]
    folders = [tmp_path / "0", tmp_path / "1"]
    for process in start(tmp_path / "run", 2, *stated, folders=folders):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "process 1: data is" in errors, errors


def test_configurations_that_differ_are_shown(start, tmp_path):
    started = start(tmp_path, 2, each=lambda i: [f"--config.seed={i}", "--config.optimizer.b2=0.9"])
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1 and "process 1: config.seed is 1; process 0 has 0" in errors, errors


def in_company(count, act):
    """What `act(group)` gives, or raises, for each of some processes that are threads here."""
    coordinator = f"127.0.0.1:{free_port()}"

    def one(i):
        at, meet = processes.Place(coordinator, count, i), processes._joined if i else processes._gathered
        group = processes.Group(at, *meet(at, time.monotonic() + 20.0))
        try:
            return act(group)
        except processes.ProcessError as error:
            return error
        finally:
            group.leave()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("seed", range(4))
def test_all_stop_with_the_same_step_whoever_is_asked(seed):
    random_, count, steps = random.Random(seed), 4, 60
    asked = {random_.randrange(count): random_.randrange(steps) for _ in range(1 + seed % 2)}
    meet = threading.Barrier(count)  # a step is done when all have started it

    def act(group):
        delays = random.Random(group.at.process)
        group.stop(100)  # resumed
        for step in range(101, 101 + steps):
            meet.wait(20)
            time.sleep(delays.uniform(0, 0.002))
            if asked.get(group.at.process) == step - 101:
                threading.Thread(target=group._ask, args=("SIGTERM",)).start()
            if group.stop(step):
                return step
        return None

    ended = in_company(count, act)
    assert len(set(ended)) == 1
    # What was asked during the last steps may come too late for any; else it is heeded within a few.
    assert ended[0] is None or 101 + min(asked.values()) <= ended[0]
    assert ended[0] is not None or min(asked.values()) > steps - 40


def test_a_group_of_one_stops_after_the_step_under_way():
    group, before = processes.Group(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with group.signals():
        assert group.stop(7) == ""
        os.kill(os.getpid(), signal.SIGTERM)
        while not group.asked:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing
        assert group.stop(8) == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]  # a second one is as without us
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with processes.Group().signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_folder_that_is_not_shared_is_told(tmp_path):
    assert in_company(3, lambda group: group.check_shared(tmp_path / "run")) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []
    apart = in_company(3, lambda group: group.check_shared(tmp_path / str(group.at.process == 2), timeout_s=1.0))
    for error in apart:
        assert (
            "process 2:" in str(error) and "process 1:" not in str(error) and "what process 0 has written" in str(error)
        )


def test_who_does_not_come_to_agree_is_named():
    def act(group):
        if group.at.process != 1:
            group.agree({"x": {"y": 1}}, timeout_s=1.0)

    first, absent, other = in_company(3, act)
    assert absent is None and str(first) == str(other) and str(first).startswith("no word for 1 s from process 1 on ")
    differing = in_company(3, lambda group: group.agree({"x": {"y": group.at.process // 2}}))
    assert {str(error) for error in differing} == {"process 2: x.y is 1; process 0 has 0"}


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


def test_launchers_say_where_a_process_is(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in dict(SIZE="4", RANK="3", LOCAL_RANK="1").items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    found = processes.place()
    assert found.coordinator.startswith("10.96.0.1:") and found[1:] == (4, 3, (1,))
    # Another Open MPI, of which JAX does not know: alone it would write what three others write.
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")
    with pytest.raises(ValueError, match="this is process 3 of 4, as its launcher says.* wanted coordinator"):
        processes.place()
    assert processes.place(processes=1) is None
    assert processes.place("host:1") == ("host:1", 4, 3, (1,))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert processes.place() is None
    for name in ("SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(f"OMPI_COMM_WORLD_{name}")
    assert processes.place() is None
    for number in "02":
        monkeypatch.setenv("JOB_COMPLETION_INDEX", number)
        with pytest.raises(ValueError, match=f"this is process {number}, as its launcher says"):
            processes.place()


def test_a_tpu_slice_of_gke_says_where_a_process_is(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name, value in dict(WORKER_HOSTNAMES="localhost,other", WORKER_ID="1", SKIP_MDS_QUERY="1").items():
        monkeypatch.setenv(f"TPU_{name}", value)
    for name, value in dict(NUM_SLICES="2", SLICE_ID="1", COORDINATOR_ADDRESS="localhost").items():
        monkeypatch.setenv(f"MEGASCALE_{name}", value)
    assert processes.place()[:3] == (f"localhost:{cloud_tpu_cluster.coordinator_port}", 4, 3)
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "nowhere.invalid")
    monkeypatch.setattr(cloud_tpu_cluster.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cloud_tpu_cluster.time, "time", iter(range(0, 10**6, 7)).__next__)
    with pytest.raises(processes.ProcessError, match="the other processes cannot be found: .* nowhere.invalid"):
        processes.place(timeout_s=20.0)


def test_slurm_says_where_a_process_is(monkeypatch):
    says = dict(JOB_ID="7", STEP_NODELIST="node[3-4]", NTASKS="8", PROCID="5", LOCALID="1")
    for name, value in says.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = processes.place()
    assert (found.processes, found.process, found.local_devices) == (8, 5, (1,))
    assert found.coordinator.startswith("node3:")
