"""A memory of millions of tokens on one machine: seconds to fill it and to search it exactly, and memory taken.

    python bench/long_memory.py                                    # 1M to 16M tokens, int8, 8 heads of 64; 17 GiB
    python bench/long_memory.py --tokens 65536 262144 --dtype bfloat16

One layer of one row is filled from the start for every length. Then 256 queries of each head read it by top-k, and one
query of each head does; the first read of each kind compiles and is not counted. Slots of a few queries are checked
against a search of all stored keys in float64. Prints a table and, as its last line, JSON with all rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import memory
from fot_jax.config import MEMORY_DTYPES, DtypePolicy, ModelConfig
from fot_jax.memory.stored import loaded

CHUNK = 2**16  # tokens appended at a time


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def fill(mem: memory.Cache, heads: int, size: int, key: jax.Array) -> memory.Cache:
    """The memory with a chunk of random keys and values behind what it holds."""
    draw = lambda key: [jax.random.uniform(key, (1, heads, size, CHUNK), jnp.float32, -1, 1)]
    return memory.append(mem, *map(draw, jax.random.split(key)))


@functools.partial(jax.jit, static_argnames="k")
def read(q_BHTK: jax.Array, mem: memory.Cache, *, k: int) -> Any:
    arrays = q_BHTK, mem.keys[0], mem.values[0], mem.length_B
    return memory.topk(*arrays, k=k, scale=q_BHTK.shape[3] ** -0.5)


def seconds(f: Any) -> float:
    """How long `f` takes, the second time."""
    jax.block_until_ready(f())
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def check(q_BHTK: jax.Array, mem: memory.Cache, slots_BHTN: np.ndarray, queries: int) -> None:
    """Compares the slots of the first queries of head 0 with a search of all that is stored, in float64."""
    best, N = [], slots_BHTN.shape[3]
    q_TK = np.asarray(q_BHTK[0, 0, :queries], np.float64)
    for start in range(0, mem.capacity, CHUNK):
        part = jax.tree.map(lambda x, start=start: x[:, :1, :, start : start + CHUNK], mem.keys[0])
        best.append(q_TK @ np.asarray(loaded(part)[0, 0], np.float64))
    wanted = np.argsort(-np.concatenate(best, axis=1), axis=1, kind="stable")[:, :N]
    same = np.mean(wanted == slots_BHTN[0, 0, :queries])
    assert same > 0.99, f"{1 - same:.1%} of slots are not those of a float64 search"  # float32 cannot tell some apart


def measure(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Fills and reads a memory of so many tokens."""
    sizes = dict(vocab_size=1, d_model=1, d_ff=1, n_layers=1, n_heads=args.heads, head_size=args.size)
    config = ModelConfig(**sizes, mem_layers=(0,), dtypes=DtypePolicy(memory=args.dtype))
    fill(memory.init_memory(config, 1, tokens), args.heads, args.size, jax.random.key(0))  # compiles
    mem = memory.init_memory(config, 1, tokens)
    start = time.perf_counter()
    for i in range(0, tokens, CHUNK):
        mem = jax.block_until_ready(fill(mem, args.heads, args.size, jax.random.key(i)))
    filled = time.perf_counter() - start
    draw = lambda T: jax.random.normal(jax.random.key(T), (1, args.heads, T, args.size))
    many, one = draw(args.queries), draw(1)
    row = dict(tokens=tokens, nbytes=mem.nbytes, fill_seconds=filled)
    row["read_seconds"] = seconds(lambda: read(many, mem, k=args.k))
    row["one_query_seconds"] = seconds(lambda: read(one, mem, k=args.k))
    check(many, mem, np.asarray(read(many, mem, k=args.k)[1]), 2)
    return {**row, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def main() -> None:
    """One length after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**20 << i for i in range(5)])
    parser.add_argument("--dtype", choices=MEMORY_DTYPES, default="int8")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="numbers of a key")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    print(f"{args.dtype}, {args.heads} heads of {args.size}, k {args.k}; {args.queries} queries, and one, of each head")
    print(f"{'tokens':>10s} {'GiB':>6s} {'fill s':>8s} {'read s':>8s} {'one s':>8s} {'peak GiB':>9s}")
    rows = []
    for tokens in args.tokens:
        rows.append(row := measure(args, tokens))
        gib = lambda n: n / 2**30
        print(
            f"{tokens:10,d} {gib(row['nbytes']):6.2f} {row['fill_seconds']:8.1f} {row['read_seconds']:8.2f} "
            f"{row['one_query_seconds']:8.3f} {gib(row['peak_bytes']):9.2f}",
            flush=True,
        )
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
