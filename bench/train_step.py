"""Crossbatch training speed, beside what the machine's float32 matrix products can do, in one process.

    python bench/train_step.py            # 6 layers of width 256, batch 8 x 256, packing 2, range 3, float32, AdamW
    python bench/train_step.py --seconds=60

Prints as its last line JSON with tokens_per_second and share_of_peak: the FLOPs that the mathematics needs (matrix
products and attention, forward and backward, causal halves counted as halves, contexts as far as they are seen,
nothing recomputed) over those that a large matrix product reaches on this machine in the same process, each three
steps beside the products before and after them; the median of these ratios.
"""

from __future__ import annotations

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import crossbatch, model, run_config, training
from fot_jax.config import ModelConfig
from fot_jax.host import keep_freed_memory

CONFIG = ModelConfig(vocab_size=4096, d_model=256, d_ff=688, n_layers=6, n_heads=4, window=256, mem_layers=(2, 4))
ROWS = 8


def matmul_flops(size: int = 2048) -> float:
    """FLOP/s of one float32 matrix product of size x size."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / float(np.median(times))


def main() -> None:
    """Runs both in turn, so that a busy machine slows both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure")
    seconds = parser.parse_args().seconds
    keep_freed_memory()  # as train.py does
    config = run_config.default_config()
    config.optimizer.update(name="adamw", learning_rate=1e-4, weight_decay=0.01)
    optimizer, plan = training.make_optimizer(config), crossbatch.published_plan(ROWS, range_=3, packing=2)
    T = CONFIG.window
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, CONFIG.vocab_size, (1, ROWS, T + 1), dtype=np.int32)
    ones = np.ones((1, ROWS, T), np.int32)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "loss_mask": ones > 0, "segment_ids": ones}
    options = training.LossOptions(loss_chunk=512, separate="none", unroll=True)
    step = functools.partial(training.train_step, CONFIG, options, optimizer, training.learning_rate(config), plan)
    state = jax.jit(lambda key: training.new_state(model.init_params(CONFIG, key), optimizer))(jax.random.key(0))
    jitted = jax.jit(step, donate_argnums=0, compiler_options=training.compiler_options())
    compiled = jitted.lower(state, batch).compile()
    for _ in range(2):
        state, values = compiled(state, batch)
    jax.block_until_ready(values)

    # A shared machine drifts by a quarter within a minute: three steps are compared with the products round them.
    peaks, times, shares = [matmul_flops()], [], []
    needed, end = ROWS * T * training.flops_per_token(CONFIG, plan), time.perf_counter() + seconds
    while time.perf_counter() < end or len(shares) < 7:
        for _ in range(3):
            start = time.perf_counter()
            state, values = compiled(state, batch)
            jax.block_until_ready((state, values))
            times.append(time.perf_counter() - start)
        peaks.append(matmul_flops())
        shares.append(needed / np.median(times[-3:]) / np.mean(peaks[-2:]))
    seconds, peak = float(np.median(times)), float(np.median(peaks))
    result = {
        "tokens_per_second": round(ROWS * T / seconds, 1),
        "share_of_peak": round(float(np.median(shares)), 4),
        "step_ms": round(1e3 * seconds, 1),
        "best_step_ms": round(1e3 * min(times), 1),
        "flops_per_token": training.flops_per_token(CONFIG, plan),
        "matmul_gflops_per_second": round(peak / 1e9, 1),
        "loss": float(values["loss"]),
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }
    for name, value in result.items():
        print(f"{name:26s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
