"""Prefill and decoding speed with dense float32 memory, beside the time of reading weights, keys and values once.

    python bench/inference.py             # 6 layers of width 256, window 512, one row, prompt of 16384 tokens

Prints as its last line JSON with prefill_tokens_per_second, decode_ms (a token), read_once_ms (bytes of weights,
filled local cache and memory over the read bandwidth measured in the same process) and peak_memory_bytes (of the
process, resident).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import model
from fot_jax.config import ModelConfig
from fot_jax.generate import decode, prefill
from fot_jax.host import keep_freed_memory

CONFIG = ModelConfig(
    vocab_size=4096, d_model=256, d_ff=688, n_layers=6, n_heads=4, window=512, mem_layers=(2, 4), eos_id=None
)


def read_bandwidth(nbytes: int, repeats: int = 15) -> float:
    """Bytes/s at which all cores together read an array of `nbytes`: the median of several maxima, a thread a core."""
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads)
    rates = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(nbytes / (time.perf_counter() - start))
    return float(np.median(rates))


def main() -> None:
    """Prefill, then decoding in turn with the bandwidth, so that a busy machine slows both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=16384, help="tokens of the prompt")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens decoded at a time")
    parser.add_argument("--rounds", type=int, default=7, help="times decoding is measured")
    args = parser.parse_args()
    keep_freed_memory()
    params = jax.jit(functools.partial(model.init_params, CONFIG))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (1, args.prompt), dtype=np.int32)
    read = functools.partial(prefill, CONFIG, params, last_context_length=16, room=(args.rounds + 1) * args.new_tokens)

    jax.block_until_ready(read(tokens))  # compiles
    prefills = []
    for _ in range(3):
        start = time.perf_counter()
        reader = jax.block_until_ready(read(tokens))
        prefills.append(time.perf_counter() - start)
    prefill_seconds = float(np.median(prefills))

    step = functools.partial(decode, CONFIG, params, max_new_tokens=args.new_tokens)
    out, reader = step(reader, jnp.float32(1), jax.random.key(0))  # compiles
    seconds, reads, bandwidths = [], [], []
    weights = (
        sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    )  # one row of it is read
    for _ in range(args.rounds):
        filled = sum(cache.nbytes * int(cache.length_B[0]) / cache.capacity for cache in (reader.mem, reader.local))
        bandwidths.append(read_bandwidth(int(weights + filled)))
        reads.append((weights + filled) / bandwidths[-1])
        start = time.perf_counter()
        out, reader = jax.block_until_ready(step(reader, jnp.float32(1), jax.random.key(0)))
        seconds.append((time.perf_counter() - start) / args.new_tokens)
    decode_ms = 1e3 * float(np.median(seconds))
    read_once_ms = 1e3 * float(np.median(reads))
    result = {
        "prefill_tokens_per_second": round(args.prompt / prefill_seconds, 1),
        "decode_ms": round(decode_ms, 3),
        "read_once_ms": round(read_once_ms, 3),
        "decode_over_read_once": round(decode_ms / read_once_ms, 3),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_read": int(weights + filled),
        "read_gb_per_second": round(float(np.median(bandwidths)) / 1e9, 2),
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }
    for name, value in result.items():
        print(f"{name:28s} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
