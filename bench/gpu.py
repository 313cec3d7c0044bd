"""What `results/gpu` shows, measured on a GPU: commands one after another, each with a limit, so that one that fails
costs no more than its own time.

    python bench/gpu.py --out DIR                     # everything
    python bench/gpu.py --out DIR --only train topk   # what has a name that begins so
    python bench/gpu.py --list

With --first SECONDS all of them run together for so long before, training steps only compiled; what they compile stays
in JAX's cache for the measurement, one by one.

Writes DIR/NAME.log, what each said, and DIR/summary.json: its seconds, exit status and last line, where that is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]


def training(rows: int, *settings: str) -> str:
    """A step of the 3B on one GPU, the batch in one piece."""
    settings = "model.dtypes.compute=bfloat16", "batch.accumulate=1", f"batch.rows={rows}", *settings
    stated = " ".join(f"--config.{setting}" for setting in settings)
    return f"bench/train_step.py --seconds=8 --config=configs/longllama_3b.py:h200:1 {stated}"


_3B = "bench/inference.py --size longllama_3b --dtype bfloat16 --k 128 --rounds 5 --prompts 2048 16384 65536 262144"
_TESTS = "-m pytest -v -p no:benchmark -p no:cacheprovider"
_TOPK = "bench/topk.py --contenders ours torch reading"

# In the order of their worth. Name: (seconds at most, arguments of python).
COMMANDS = {
    "devices": (60, "-c 'import jax, flax, optax; print(jax.__version__, flax.__version__, jax.devices())'"),
    "topk_256k": (60, f"{_TOPK} --keys 262144"),
    "topk_4m": (60, f"{_TOPK} --keys 4194304 --score-bytes 1073741824"),
    "inference_dense": (150, f"{_3B} --modes dense --trace OUT/trace_dense"),
    "inference_topk": (150, f"{_3B} --modes topk --trace OUT/trace_topk"),
    "train_cudnn_16": (120, training(16, "attention=cudnn", "crossbatch.execution=concatenate") + " --trace=OUT/trace"),
    "train_ring_16": (120, training(16, "attention=cudnn", "crossbatch.execution=ring")),
    "train_dots_12": (120, training(12, "attention=cudnn", "crossbatch.execution=ring", "remat=dots")),
    "train_dots_16": (120, training(16, "attention=cudnn", "crossbatch.execution=ring", "remat=dots")),
    "train_xla_16": (120, training(16, "attention=xla", "crossbatch.execution=concatenate")),
    "train_large_64": (120, training(64, "attention=cudnn", "crossbatch.execution=concatenate")),
    "quickstart": (400, "-m fot_jax.evals.quickstart --out /tmp/quickstart"),
    # Not for a GPU: several processes, and stores on this machine.
    "tests": (600, f"{_TESTS} -n 12 --ignore=tests/test_processes.py --ignore=tests/test_object_stores.py"),
}


def main() -> None:
    """Runs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for what they say")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--first", type=int, default=0, help="seconds to run all together, before anything is measured")
    parser.add_argument("--list", action="store_true", help="show the commands")
    args = parser.parse_args()
    chosen = {name: what for name, what in COMMANDS.items() if name.startswith(tuple(args.only))}
    if args.list:
        for name, (limit, words) in chosen.items():
            print(f"{name:16s} {limit:4d} s at most: python {words}")
        return
    if args.out is None:
        raise SystemExit("--out is missing; wanted a folder")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    env = {
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": str(args.out / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONUNBUFFERED": "1",
    }
    env = {**os.environ, **env}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))

    def start(name: str, limit: int, words: str) -> subprocess.Popen:
        with open(args.out / f"{name}.log", "w") as file:
            command = f"timeout -s INT -k 15 {limit} {sys.executable} {words.replace('OUT', str(args.out))}"
            return subprocess.Popen(command, shell=True, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)

    if args.first:
        together = {
            name: start(f"first_{name}", args.first, words + (" --compile_only" if name.startswith("train") else ""))
            for name, (_, words) in chosen.items()
        }
        for name, process in together.items():
            process.wait()
            print(f"first {name}: {process.returncode}", flush=True)
    summary = {}
    for name, (limit, words) in chosen.items():
        begin = time.monotonic()
        status = start(name, limit, words).wait()
        text = (args.out / f"{name}.log").read_text().strip()
        last = (text.splitlines() or [""])[-1]
        try:
            last = json.loads(last)
        except ValueError:
            pass
        summary[name] = {"seconds": round(time.monotonic() - begin, 1), "status": status, "result": last}
        print(name, json.dumps(summary[name])[:1500], flush=True)
        if status:
            print("\n".join(text.splitlines()[-8:])[:1500], flush=True)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
