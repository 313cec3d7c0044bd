"""Scripts in launch/, run as far as this machine goes: with a `srun` that starts processes here, a `gcloud` that writes
down what it is asked.
"""

from __future__ import annotations

import os
import pathlib
import signal
import string
import subprocess
import sys
import time

import pytest
import toy

from fot_jax import checkpoint, training

ROOT = pathlib.Path(__file__).parent.parent
SRUN = """#!/usr/bin/env bash
# Starts two tasks, with what SLURM tells them, and passes on signals; the greatest status is its own.
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=$PORT SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids[i]=$!; done
trap 'kill -TERM "${pids[@]}"' TERM
status=0
for pid in "${pids[@]}"; do
  until code=0; wait "$pid" || code=$?; ! kill -0 "$pid" 2>/dev/null; do :; done
  ((code > status)) && status=$code
done
exit $status
"""


def script(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def flags(tmp_path):
    """Of a small run of train.py, for eight devices."""
    options = {
        **toy.data_options(tmp_path),
        "steps": 60,
        "batch.rows": 16,
        "mesh.fsdp": 8,
        "checkpoint.every": 50,
    }
    base = [f"--config={ROOT / 'tests' / 'toy.py'}", f"--workdir={tmp_path / 'run'}"]
    return [*base, *(f"--config.{key}={value}" for key, value in options.items())]


def environment(tmp_path, **more):
    port = str(20000 + os.getpid() % 20000)
    paths = os.pathsep.join([str(tmp_path), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    flags = "--xla_backend_optimization_level=0"
    told = {"PORT": port, "JAX_COORDINATOR_PORT": port, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PATH": paths}
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        **told,
        **more,
    }


def started_steps(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def stopped(process, tmp_path):
    """Sends SIGTERM once steps are done; the status, and what was said."""
    deadline = time.monotonic() + 240
    while process.poll() is None and not started_steps(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


@pytest.mark.slow
def test_local_processes_are_stopped_together(flags, tmp_path):
    command = [str(ROOT / "launch" / "local.sh"), "2", *flags, "--stopped_status=75"]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status, errors = stopped(subprocess.Popen(command, env=environment(tmp_path), **pipes), tmp_path)
    assert status == 75 and errors.count("stopped by SIGTERM") == 1, errors
    assert checkpoint.steps(tmp_path / "run")[-1] < 60


@pytest.mark.slow
def test_slurm_puts_a_stopped_job_back(flags, tmp_path):
    script(tmp_path, "srun", SRUN)
    script(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    told = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "FOT_JAX_VENV": str(tmp_path / "venv")}
    flags_of_devices = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=4"
    env = environment(tmp_path, XLA_FLAGS=flags_of_devices, **told)
    command = [str(ROOT / "launch" / "slurm.sbatch"), *flags]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    deadline = time.monotonic() + 240
    while process.poll() is None and not started_steps(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    subprocess.run(["pkill", "-TERM", "-g", str(process.pid), "-f", "train.py"], check=True)  # as --signal=TERM does
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75 and errors.count("stopped by SIGTERM") == 1, errors
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_commands_for_a_tpu_pod(tmp_path):
    script(tmp_path, "gcloud", f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/asked\necho ACTIVE\n')
    env = environment(tmp_path, NAME="fot", ZONE="us-west4-a", TYPE="v5litepod-64")

    def asked(*arguments, **more):
        command = [str(ROOT / "launch" / "tpu_pod.sh"), *arguments]
        ran = subprocess.run(command, env={**env, **more}, capture_output=True, text=True)
        path = tmp_path / "asked"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return ran.returncode, found, ran.stderr

    status, (create, wait), _ = asked("create", SPOT="1")
    assert status == 0 and wait.startswith("compute tpus queued-resources describe fot --zone=us-west4-a")
    assert create == (
        "compute tpus queued-resources create fot --node-id=fot --zone=us-west4-a --accelerator-type=v5litepod-64 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    status, (train,), _ = asked("train", "--config=configs/a.py", "--config.data.train=('a b',)")
    assert status == 0 and "--worker=all" in train and r"--config.data.train=\(\'a\ b\'\,\)" in train
    status, (copy,), _ = asked("copy", "a b.model")
    assert (
        status == 0
        and copy == "compute tpus tpu-vm scp --recurse a b.model fot:fot_jax/ --zone=us-west4-a --worker=all"
    )
    # What is set up on a worker: here, in a home of its own, twice.
    home = tmp_path / "home"
    (home / "fot_jax").mkdir(parents=True)
    (home / "fot_jax" / "copied.model").write_text("")
    script(tmp_path, "uv", f'#!/bin/sh\necho uv "$@" >> {tmp_path}/asked\n')
    script(
        tmp_path,
        "gcloud",
        '#!/bin/sh\ncd "$HOME"\n'
        'for last; do case "$last" in --command=*) exec sh -c "${last#--command=}" ;; esac; done\n'
        'cp "$5" "$HOME/fot_jax.tar.gz"\n',
    )
    for _ in range(2):
        status, (venv, install), said = asked("setup", HOME=str(home))
        assert status == 0 and venv == "uv venv -q --clear --python 3.12 .venv", said
        assert install == "uv pip install -q --python .venv/bin/python .[tpu,gs]"
        assert (home / "fot_jax" / "train.py").exists() and (home / "fot_jax" / "copied.model").exists()
        assert not (home / "fot_jax" / "old.py").exists()
        (home / "fot_jax" / "old.py").write_text("")  # of the commit before
        with (home / "fot_jax" / ".brought").open("a") as brought:
            brought.write("old.py\n")
    script(tmp_path, "gcloud", f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/asked\necho ACTIVE\n')
    assert asked("go")[0] == 2 and "wanted create, setup" in asked("go")[2]
    assert asked("kill")[1][0].count("kill -KILL") == 1
    assert asked("stop")[1][0].count("kill -TERM") == 1 and asked("logs")[1][0].count("--worker=0") == 1
    status, nothing, printed = asked("delete", DRY_RUN="1")
    assert status == 0 and not nothing and "+ gcloud compute tpus queued-resources delete fot" in printed
    status, _, said = asked("create", TYPE="v3-8")
    assert status == 1 and "wanted v4-N, v5litepod-N, v5p-N or v6e-N" in said
    status, _, said = asked(NAME="", ZONE="")
    assert (
        status == 2 and "launch/tpu_pod.sh create" in said and "DRY_RUN=1 nothing is.\n" in said and "set -" not in said
    )
    script(tmp_path, "gcloud", "#!/bin/sh\necho FAILED\n")
    assert asked("create")[0] == 1 and "there will be none" in asked("create")[2]


def test_what_gke_is_given():
    import yaml

    text = string.Template((ROOT / "launch" / "gke.yaml").read_text())
    named = dict(NAME="fot", IMAGE="image", HOSTS="16", CHIPS="4", ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="8x8")
    asked = yaml.safe_load(text.substitute(named, CONFIG="/fot_jax/configs/tiny.py", WORKDIR="gs://bucket/run"))
    job = asked["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (job["parallelism"], job["completions"]) == (16, 16) and container["resources"]["limits"][
        "google.com/tpu"
    ] == 4
    assert {"--workdir=gs://bucket/run", "--stopped_status=75"} <= set(container["args"])
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (
        rule["onExitCodes"]["values"] == [training.TrainingError.exit_status]
        and rule["onExitCodes"]["containerName"] == container["name"]
    )
