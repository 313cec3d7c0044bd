"""Exact top-k search of a memory, beside torch (matrix product, then topk) and FAISS (IndexFlatIP), and the time of
reading the keys once.

    pip install '.[bench]' && python bench/topk.py       # 32 queries and one, 262144 keys of 128 numbers, k 128
    python bench/topk.py --keys 4194304 --contenders ours torch reading     # on a GPU, which FAISS's package is not for

Where there is a GPU, torch and we use it, and the keys are in its memory. Each contender is a process of its own, so
that no thread pool disturbs another's; they take turns, round after round, and medians are compared. Ours is checked
against the slots of FAISS, or else of torch, and the memory that its program takes beyond keys and result against the
budget it is given (`score_bytes`). Prints a table and, as its last line, JSON: ours_ms, torch_ms, faiss_ms,
ours_one_query_ms, torch_one_query_ms, faiss_one_query_ms, read_keys_once_ms, temporary_bytes, score_bytes, device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

QUERIES = 32
TURN = 3  # searches of a contender before the next one's turn


def data(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Queries [QUERIES, K] and keys [M, K]: the same in every process."""
    rng = np.random.default_rng(0)
    draw = lambda rows: rng.standard_normal((rows, args.size), np.float32)
    return draw(QUERIES), draw(args.keys)


# Each returns (search, note): search takes the number of queries and gives slots [queries, k]; note is for the table.
Contender = Callable[[argparse.Namespace], tuple[Callable[[int], Any], dict[str, Any]]]


def ours(args: argparse.Namespace) -> tuple[Callable[[int], Any], dict[str, Any]]:
    import jax
    import jax.numpy as jnp

    from fot_jax import memory
    from fot_jax.host import keep_freed_memory

    keep_freed_memory()
    q, keys = data(args)
    arrays = jnp.asarray(keys.T[None, None]), jnp.asarray([args.keys], jnp.int32)  # slots last, as caches have them
    del keys

    def search(q_BHTK: jax.Array, k_BGKM: jax.Array, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return memory.search(q_BHTK, k_BGKM, length_B, k=args.k, score_bytes=args.score_bytes)

    programs, note = {}, {"device": jax.devices()[0].device_kind}
    for n in (QUERIES, 1):
        queries = jnp.asarray(q[None, None, :n])
        program = jax.jit(search).lower(queries, *arrays).compile()
        note[f"temporary_bytes_{n}"] = program.memory_analysis().temp_size_in_bytes
        programs[n] = program, queries
    return lambda n: np.asarray(programs[n][0](programs[n][1], *arrays)[0])[0, 0], note


def torch(args: argparse.Namespace) -> tuple[Callable[[int], Any], dict[str, Any]]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, keys = (torch.from_numpy(x).to(device) for x in data(args))
    note = {"threads": torch.get_num_threads(), "device": device}
    return lambda n: (q[:n] @ keys.T).topk(args.k).indices.cpu().numpy(), note


def faiss(args: argparse.Namespace) -> tuple[Callable[[int], Any], dict[str, Any]]:
    import faiss

    q, keys = data(args)
    index = faiss.IndexFlatIP(args.size)
    index.add(keys)
    return lambda n: index.search(q[:n], args.k)[1], {"threads": faiss.omp_get_max_threads()}


def reading(args: argparse.Namespace) -> tuple[Callable[[int], Any], dict[str, Any]]:
    """The greatest of all keys, a thread a core, or on a GPU: what reading them once takes."""
    import jax
    import jax.numpy as jnp

    _, keys = data(args)
    if jax.default_backend() != "cpu":
        on_device, greatest = jnp.asarray(keys), jax.jit(jnp.max)
        return lambda n: np.asarray(greatest(on_device))[None], {}
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(keys.reshape(-1), threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    return lambda n: np.array([list(pool.map(np.max, parts))]), {"threads": threads}


CONTENDERS: dict[str, Contender] = {"ours": ours, "torch": torch, "faiss": faiss, "reading": reading}


def work(args: argparse.Namespace) -> None:
    """A contender: answers each line of stdin, a number of queries, with a line of JSON."""
    search, note = CONTENDERS[args.worker](args)
    for n in (QUERIES, 1):
        search(n)
    print(json.dumps(note), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(TURN):
            start = time.perf_counter()
            found = search(int(line))
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "slots": found.tolist()}), flush=True)


def main() -> None:
    """All contenders in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=2**18)
    parser.add_argument("--size", type=int, default=128, help="numbers of a key")
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--score-bytes", type=int, default=80 * 2**20, help="budget that our search is given")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    workers, notes = {}, {}
    for name in args.contenders:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        share = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # of a GPU's memory, all at once
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        workers[name] = subprocess.Popen(command, env=share, **pipes)
        if not (ready := workers[name].stdout.readline()):
            raise SystemExit(f"{name} ended: see above")
        notes[name] = json.loads(ready)

    def ask(name: str, n: int) -> dict[str, Any]:
        print(n, file=workers[name].stdin, flush=True)
        return json.loads(workers[name].stdout.readline())

    times: dict[tuple[str, int], list[float]] = {(name, n): [] for name in args.contenders for n in (QUERIES, 1)}
    reference = next((name for name in ("faiss", "torch") if name in args.contenders), None)
    for _ in range(args.rounds):
        for n in (QUERIES, 1):
            answers = {name: ask(name, n) for name in args.contenders}
            for name, answer in answers.items():
                times[name, n] += [1e3 * seconds for seconds in answer["seconds"]]
            if reference and "ours" in answers:  # float32 cannot tell some apart
                differing = np.mean(np.array(answers["ours"]["slots"]) != np.array(answers[reference]["slots"]))
                assert differing < 1e-3, f"{differing:.1%} of slots are not those of {reference}"
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()

    median = {key: float(np.median(values)) for key, values in times.items()}
    print(f"{args.keys} keys of {args.size} numbers, k {args.k}; medians of {TURN * args.rounds}, ms (least, greatest)")
    for name in args.contenders:
        row = [
            f"{n} queries {median[name, n]:7.1f} ({min(times[name, n]):.1f}, {max(times[name, n]):.1f})"
            for n in (QUERIES, 1)
        ]
        print(f"{name:8s} {'   '.join(row)}")
    result = {f"{name}_ms": median[name, QUERIES] for name in args.contenders if name != "reading"}
    result |= {f"{name}_one_query_ms": median[name, 1] for name in args.contenders if name != "reading"}
    if "reading" in args.contenders:
        result["read_keys_once_ms"] = median["reading", 1]
    temporary = 0
    if "ours" in args.contenders:
        temporary = max(notes["ours"][f"temporary_bytes_{n}"] for n in (QUERIES, 1))
        within = "within" if temporary <= args.score_bytes else "BEYOND"
        print(
            f"ours takes {temporary / 2**20:.1f} MiB beyond keys and result, {within} its "
            f"{args.score_bytes / 2**20:.0f}"
        )
        result |= {"temporary_bytes": temporary, "score_bytes": args.score_bytes, "device": notes["ours"]["device"]}
    print(json.dumps(result))
    sys.exit(temporary > args.score_bytes)


if __name__ == "__main__":
    main()
