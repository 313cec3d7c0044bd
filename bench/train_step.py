"""Crossbatch training speed, beside what the machine's matrix products can do, in one process.

    python bench/train_step.py            # 6 layers of width 256, batch 8 x 256, packing 2, range 3, float32, AdamW
    python bench/train_step.py --seconds=60
    python bench/train_step.py --config=configs/longllama_3b.py:h200:1 --config.batch.rows=16 \
        --config.batch.accumulate=1 --config.attention=cudnn

Prints as its last line JSON with tokens_per_second and share_of_peak: the FLOPs that the mathematics needs (matrix
products and attention, forward and backward, causal halves counted as halves, contexts as far as they are seen,
nothing recomputed) over those that a large matrix product of random numbers, in the dtype of activations, reaches on
this machine in the same process, each three steps beside the products before and after them; the median of these
ratios. temporary_bytes are the compiler's, peak_bytes what the device says was in use at most (0: it does not say).
"""

from __future__ import annotations

import json
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fot_jax import metrics, programs, run_config, sharding
from fot_jax.host import keep_freed_memory

_SECONDS = flags.DEFINE_float("seconds", 30.0, "how long to measure")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "measure what the compiler needs, and stop")
_TRACE = flags.DEFINE_string("trace", None, "folder for a profile of one step more")
_CONFIG = config_flags.DEFINE_config_file("config", help_string="file of a run to measure a step of, its data not read")


def small() -> ConfigDict:
    """What is measured if nothing else is asked for."""
    config = run_config.default_config()
    config.model.update(vocab_size=4096, d_model=256, d_ff=688, n_layers=6, n_heads=4, window=256, mem_layers=(2, 4))
    config.batch.update(rows=8, separate="none")
    config.crossbatch.update(kind="published", contexts=(3,), packing=2)
    config.optimizer.update(name="adamw", learning_rate=1e-4, weight_decay=0.01)
    config.update(loss_chunk=512, unroll=True)
    return config


class Matmul:
    """A square matrix product, large enough for the device."""

    def __init__(self, dtype: str):
        self.size = 2048 if sharding.platform() == "cpu" else 8192
        self.x = jax.random.normal(jax.random.key(0), (self.size, self.size), dtype)
        self.repeats = 3 if sharding.platform() == "cpu" else 10
        self.product = jax.jit(lambda a, b: a @ b)
        self.flops()

    def flops(self) -> float:
        """FLOP/s, the median of a few."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready([self.product(self.x, self.x) for _ in range(self.repeats)])
            times.append((time.perf_counter() - start) / self.repeats)
        return 2 * self.size**3 / float(np.median(times))


def main(_: list[str]) -> None:
    """Runs both in turn, so that a busy machine slows both."""
    keep_freed_memory()  # as train.py does
    config = _CONFIG.value or small()
    run_config.check_config(config)
    model_config = run_config.model_config(config)
    mesh = sharding.make_mesh(config.mesh)
    run_config.check_batch(config, model_config, mesh.shape)
    with jax.set_mesh(mesh):
        made, plan = programs.build(config, model_config, mesh), run_config.plan_at(config, 1)
        plan = plan and plan.dealt(sharding.ways("batch"))
        places = jax.tree.map(lambda x: x.sharding, made.state)
        A, B, T = made.batch["tokens"].shape
        tokens = np.random.default_rng(0).integers(3, model_config.vocab_size, (A, B, T + 1), dtype=np.int32)
        ones = np.ones((A, B, T), np.int32)
        batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "loss_mask": ones > 0, "segment_ids": ones}
        batch = {name: jax.device_put(x, made.batch[name].sharding) for name, x in batch.items()}
        start = time.perf_counter()
        compiled = made.step(plan).lower(made.state, made.batch).compile()
        compile_seconds = time.perf_counter() - start
        if _COMPILE_ONLY.value:
            temporary = compiled.memory_analysis().temp_size_in_bytes
            print(json.dumps({"compile_seconds": round(compile_seconds, 1), "temporary_bytes": temporary}))
            return
        matmul = Matmul(model_config.dtypes.compute)
        fast_key = jax.random.key(0, impl="unsafe_rbg")  # compiled in a third of the time
        state = jax.jit(made.initial, out_shardings=places)(fast_key)
        for _ in range(2):
            state, values = compiled(state, batch)
        jax.block_until_ready(values)

        # A shared machine drifts by a quarter within a minute: three steps are compared with the products round them.
        peaks, times, shares = [matmul.flops()], [], []
        of_token = metrics.flops_per_token(model_config, plan, T)
        needed, end = A * B * T * of_token / mesh.size, time.perf_counter() + _SECONDS.value
        while time.perf_counter() < end or len(shares) < 3:
            for _ in range(3):
                start = time.perf_counter()
                state, values = compiled(state, batch)
                jax.block_until_ready((state, values))
                times.append(time.perf_counter() - start)
            peaks.append(matmul.flops())
            shares.append(needed / np.median(times[-3:]) / np.mean(peaks[-2:]))
        if _TRACE.value:
            with jax.profiler.trace(_TRACE.value):
                state, values = jax.block_until_ready(compiled(state, batch))
    seconds, peak = float(np.median(times)), float(np.median(peaks))
    result = {
        "tokens_per_second": round(A * B * T / seconds, 1),
        "share_of_peak": round(float(np.median(shares)), 4),
        "step_ms": round(1e3 * seconds, 1),
        "best_step_ms": round(1e3 * min(times), 1),
        "flops_per_token": of_token,
        "matmul_gflops_per_second": round(peak / 1e9, 1),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0),
        "compile_seconds": round(compile_seconds, 1),
        "loss": float(values["loss"]),
        "rows": f"{A} x {B} x {T}",
        "attention": config.attention,
        "execution": config.crossbatch.execution,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }
    for name, value in result.items():
        print(f"{name:26s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    app.run(main)
