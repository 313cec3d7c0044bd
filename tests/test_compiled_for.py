"""Programs compiled for chips that are not there, by their own compilers: what a CPU's compiler would not show.

`make nightly EXTRAS=dev,tpu,gpu_compiler`; every test is skipped where its compiler is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fot_jax import forecast, memory, sharding
from fot_jax.hardware import hardware
from fot_jax.memory.stored import empty

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
NO_GPU = importlib.util.find_spec("jax_cuda13_plugin") is None
NO_TPU = importlib.util.find_spec("libtpu") is None
SMALL = {
    "model.size": "", "model.d_model": 512, "model.d_ff": 1024, "model.n_layers": 8, "model.n_heads": 4,
    "model.head_size": 100, "model.vocab_size": 512, "model.window": 256, "model.mem_layers": (2, 5),
    "model.dtypes.compute": "bfloat16", "batch.rows": 32, "batch.accumulate": 1,
}  # fmt: skip


@pytest.mark.parametrize("execution", ["ring", "concatenate"])
@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        pytest.param("h100:8", "cudnn", marks=pytest.mark.skipif(NO_GPU, reason="no compiler for GPUs")),
        pytest.param("v5e:2x4", "splash", marks=pytest.mark.skipif(NO_TPU, reason="no libtpu")),
    ],
)
def test_a_training_step_with_the_chips_own_kernel(text, kernel, execution, tmp_path):
    settings = {**SMALL, "crossbatch.execution": execution, "attention": kernel}
    command = ["train.py", f"--config=configs/longllama_3b.py:{text}", "--compile_only", f"--report={tmp_path}/r.json"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    # A process of its own: compilers for chips that are not there are loaded for good.
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["attention"], found["execution"], found["contexts"]) == (kernel, execution, 3)
    # Each weight is gathered forward and where layers are recomputed; contexts travel.
    assert found["collectives"]["all-gather"]["count"] and found["collectives"]["collective-permute"]["count"]
    assert found["temporary_bytes"] < 2**30


@pytest.mark.skipif(NO_GPU, reason="no compiler for GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("T", [1, 32, 2048])
def test_memory_is_read_on_a_gpu_without_a_copy_of_it(T, dtype, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    place = jax.sharding.SingleDeviceSharding(forecast.devices(hardware("h100:1"))[0])
    B, H, K, M, budget = 1, 4, 64, 2**19, 2**24
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
    keys = shapes(jax.eval_shape(lambda: empty((B, H, K, M), dtype)))
    activations = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    q, length_B = shapes((jax.ShapeDtypeStruct((B, H, T, K), activations), jax.ShapeDtypeStruct((B,), jnp.int32)))

    def temporaries(read, *arrays):
        lowered = jax.jit(read).trace(*arrays).lower(lowering_platforms=("cuda",))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole, head = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(keys)), M * K * 4
    search = functools.partial(memory.search, k=5, score_bytes=budget)
    assert temporaries(search, q, keys, length_B) < min(whole, 3 * budget) / 2
    for reading in (memory.Reading("dense", None, budget), memory.Reading("topk", 32, budget)):
        read = functools.partial(memory.read, reading, scale=0.1)
        used = temporaries(lambda q, k, v, n, read=read: read(q, k, v, n), q, keys, keys, length_B)
        # Many queries have the values of one head turned round at a time; outputs are there in float32.
        assert used < (head if T > 32 and reading.k else 0) + 2 * budget + 4 * T * H * K * 4, (reading, used)
