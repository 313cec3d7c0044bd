"""Time to first token, and prefill and decoding speed, at growing lengths of memory, dense and top-k, beside the time
of reading weights, keys and values once.

    python bench/inference.py                        # 6 layers of width 256, window 512, one row; about 3 minutes
    python bench/inference.py --prompts 16384 --modes dense
    python bench/inference.py --size longllama_3b --dtype bfloat16 --k 128 --prompts 2048 16384 65536 262144

One program of prefill and one of decoding serve all lengths of a mode. Prints a table and, as its last line, JSON: of
the 16384-token prompt with dense memory (or what there is instead) prefill_tokens_per_second, decode_ms (a token),
read_once_ms (bytes of weights, filled local cache and memory over the read bandwidth measured in the same process),
decode_over_read_once, and peak_memory_bytes (of the device, or on a CPU of the process, resident); `cases` has the same
of every case, `growth` for each mode how many times longer a token takes, and how many times more bytes it reads, with
the longest memory than with the shortest. Bytes read are those of the least that must be: all keys, and with top-k the
values of k slots only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import model
from fot_jax.config import SIZES, DtypePolicy, ModelConfig
from fot_jax.generate import Reader, decode, prefill
from fot_jax.host import keep_freed_memory
from fot_jax.memory import Reading

SMALL = ModelConfig(
    vocab_size=4096, d_model=256, d_ff=688, n_layers=6, n_heads=4, window=512, mem_layers=(2, 4), eos_id=None
)
LAST_CONTEXT = 16
FAST_KEY = jax.random.key(0, impl="unsafe_rbg")  # weights by it are compiled in a third of the time


def read_bandwidth(nbytes: int, repeats: int = 15) -> float:
    """Bytes/s at which the device, or all cores together, a thread each, read an array of `nbytes`: the median of
    several maxima.
    """
    if jax.default_backend() != "cpu":
        return _device_bandwidth(nbytes, repeats)
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(nbytes // 4, np.float32), threads)
    rates = []
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(nbytes / (time.perf_counter() - start))
    return float(np.median(rates))


def _device_bandwidth(nbytes: int, repeats: int) -> float:
    """The same of an accelerator, with calls queued so that it never waits for the next."""
    x = jax.random.normal(jax.random.key(0), (max(1, nbytes // 2**20), 2**18), jnp.float32)
    greatest = jax.jit(jnp.max)
    jax.block_until_ready(greatest(x))
    start = time.perf_counter()
    jax.block_until_ready([greatest(x) for _ in range(repeats)])
    return x.nbytes * repeats / (time.perf_counter() - start)


def bytes_read(config: ModelConfig, params: Any, reader: Reader, reading: Reading) -> int:
    """The least that a token needs read: weights, one row of the embedding among them, and what is filled of the window
    and of memory; with top-k only the values of k slots for each head.
    """
    filled = lambda cache, arrays: sum(x.nbytes for x in arrays) * int(cache.length_B[0]) / cache.capacity
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    pages = reader.mem.pages
    keys = sum(filled(page, page.keys) for page in pages)
    values = sum(filled(page, page.values) for page in pages)
    if reading.k is not None:
        values = len(config.mem_layers) * config.n_heads * reading.k * config.head_size * pages[0].keys[0].itemsize
    return int(weights + filled(reader.local, (*reader.local.keys, *reader.local.values)) + keys + values)


def measure(
    config: ModelConfig,
    params: Any,
    reading: Reading,
    prompt: int,
    capacity: int,
    new_tokens: int,
    rounds: int,
    trace: pathlib.Path | None = None,
) -> dict[str, Any]:
    """One case: prefill of a prompt, then decoding in turn with the bandwidth, so that a busy machine slows both. With
    `trace`, a folder, decoding once more is recorded there by JAX's profiler.
    """
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (1, prompt), dtype=np.int32)
    read = functools.partial(
        prefill, config, params, tokens, LAST_CONTEXT, memory=reading.kind, k=reading.k, memory_capacity=capacity
    )
    step = functools.partial(decode, config, params, reading=reading)
    prefills, firsts = [], []
    for _ in range(3 if prompt <= 16384 else 1):
        reader = None
        start = time.perf_counter()
        reader = jax.block_until_ready(read())
        prefills.append(time.perf_counter() - start)
        out, reader = jax.block_until_ready(step(reader, max_new_tokens=1))
        firsts.append(time.perf_counter() - start)
    out, reader = jax.block_until_ready(step(reader, max_new_tokens=new_tokens))
    seconds, reads, bandwidths = [], [], []
    for _ in range(rounds):
        nbytes = bytes_read(config, params, reader, reading)
        bandwidths.append(read_bandwidth(nbytes))
        reads.append(nbytes / bandwidths[-1])
        start = time.perf_counter()
        out, reader = jax.block_until_ready(step(reader, max_new_tokens=new_tokens))
        seconds.append((time.perf_counter() - start) / new_tokens)
    if trace:
        with jax.profiler.trace(trace / f"{reading.kind}_{prompt}"):
            jax.block_until_ready(step(reader, max_new_tokens=new_tokens))
    decode_ms, read_once_ms = (1e3 * float(np.median(x)) for x in (seconds, reads))
    return {
        "memory": reading.kind,
        "prompt": prompt,
        "first_token_seconds": round(float(np.median(firsts)), 4),
        "prefill_tokens_per_second": round(prompt / float(np.median(prefills)), 1),
        "decode_ms": round(decode_ms, 3),
        "read_once_ms": round(read_once_ms, 3),
        "decode_over_read_once": round(decode_ms / read_once_ms, 3),
        "bytes_read": nbytes,
        "read_gb_per_second": round(float(np.median(bandwidths)) / 1e9, 2),
    }


def plot(path: pathlib.Path, cases: list[dict[str, Any]]) -> None:
    """Time a token, time to first token and prefill speed against the prompt's length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    shown = ("decode_ms", "ms a token"), ("first_token_seconds", "s to first token"), ("prefill_tokens_per_second", "")
    for axis, (name, label) in zip(axes, shown, strict=True):
        for mode in dict.fromkeys(case["memory"] for case in cases):
            mine = [case for case in cases if case["memory"] == mode]
            (line,) = axis.plot([c["prompt"] for c in mine], [c[name] for c in mine], "o-", label=mode)
            if name == "decode_ms":
                once = [c["read_once_ms"] for c in mine]
                axis.plot([c["prompt"] for c in mine], once, ":", color=line.get_color(), label=f"{mode}, read once")
        axis.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel=label or "prefill, tokens/s")
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Every mode at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens of prompts")
    parser.add_argument("--modes", nargs="+", choices=("dense", "topk"), default=["dense", "topk"])
    parser.add_argument("--size", choices=sorted(SIZES), help="a named model, with random weights, instead")
    parser.add_argument("--dtype", default="float32", help="of weights, activations and memory")
    parser.add_argument("--k", type=int, default=32, help="slots retrieved with topk")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens decoded at a time")
    parser.add_argument("--rounds", type=int, default=7, help="times decoding is measured")
    parser.add_argument("--png", type=pathlib.Path, help="file for a plot")
    parser.add_argument("--trace", type=pathlib.Path, help="folder for profiles of decoding, one for each case")
    args = parser.parse_args()
    keep_freed_memory()
    config = dataclasses.replace(SIZES[args.size] if args.size else SMALL, eos_id=None)
    config = dataclasses.replace(config, dtypes=DtypePolicy(*[args.dtype] * 3))
    params = jax.block_until_ready(jax.jit(functools.partial(model.init_params, config))(FAST_KEY))
    capacity = max(args.prompts) + (args.rounds + 3) * args.new_tokens
    limits = dict(capacity=capacity, new_tokens=args.new_tokens, rounds=args.rounds, trace=args.trace)
    measured = functools.partial(measure, config, params, **limits)
    cases = []
    for mode in args.modes:
        reading = Reading(mode, args.k if mode == "topk" else None)
        warm = prefill(
            config,
            params,
            np.ones((1, 2 * config.window), np.int32),
            LAST_CONTEXT,
            memory=mode,
            k=reading.k,
            memory_capacity=capacity,
        )
        jax.block_until_ready(decode(config, params, warm, reading=reading, max_new_tokens=args.new_tokens))
        del warm
        for prompt in sorted(args.prompts):
            cases.append(measured(reading, prompt))
            print("  ".join(f"{name} {value}" for name, value in cases[-1].items()), flush=True)

    growth = {}
    for mode in args.modes:
        first, *_, last = [case for case in cases if case["memory"] == mode] * 2
        growth[mode] = {name: round(last[name] / first[name], 2) for name in ("decode_ms", "bytes_read")}
    columns = list(cases[0])
    print("\n" + " ".join(f"{name:>{max(len(name), 8)}s}" for name in columns))
    for case in cases:
        print(" ".join(f"{case[name]!s:>{max(len(name), 8)}s}" for name in columns))
    for mode, times in growth.items():
        print(f"{mode}: {times['decode_ms']} times as long a token, {times['bytes_read']} times the bytes")
    if args.png:
        plot(args.png, cases)
    shown = next((case for case in cases if (case["memory"], case["prompt"]) == ("dense", 16384)), cases[0])
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    result = {
        **shown,
        "peak_memory_bytes": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
        "growth": growth,
        "cases": cases,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
