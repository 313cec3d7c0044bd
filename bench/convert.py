"""Conversion of a full-size random model: seconds, bytes/s and greatest anonymous memory, beside a plain copy.

    python bench/convert.py --dir /tmp/bench                    # OpenLLaMA 3B in float16: 6.9 GB, four times on disk

Sharded safetensors and sharded `.bin` (where PyTorch is installed) are converted to Orbax, and the Orbax checkpoint
back to Hugging Face; every tensor that comes out is compared with the one that went in. `cp` copies the same bytes in
the same run, and syncs them. Prints a table, and JSON as its last line.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np

from fot_jax.config import DtypePolicy, named, to_hf
from fot_jax.formats import hf
from fot_jax.formats.layout import leaf_shapes, table


def random_tensor(i: int, shape: tuple[int, ...]) -> np.ndarray:
    """Tensor number `i` of the model, float16: the same at every call."""
    random = np.random.default_rng(i)
    # Normal numbers of the size that weights have; drawn in float32, which is twice as fast.
    return (random.standard_normal(math.prod(shape), np.float32) * 0.02).astype(np.float16).reshape(shape)


def make(directory: pathlib.Path, size: str, kind: str) -> None:
    """Writes the model as Hugging Face shards, safetensors or bin."""
    config = named(size).replace(dtypes=DtypePolicy("float16", "float16", "bfloat16"))
    directory.mkdir(parents=True)
    tensors = {entry.name: (entry.their_shape, np.float16) for entry in table(hf.LAYOUT, config)}
    hf.write_config(directory, to_hf(config))
    if kind == "safetensors":
        writer = hf.Writer(directory, tensors)
        for i, (name, (shape, _)) in enumerate(tensors.items()):
            writer.write(name, random_tensor(i, shape))
        writer.close()
        return
    import torch

    half = len(tensors) // 2
    weight_map = {}
    for shard, names in enumerate([list(tensors)[:half], list(tensors)[half:]]):
        file = f"pytorch_model-{shard + 1:05}-of-00002.bin"
        first = shard * half
        state = {name: torch.from_numpy(random_tensor(first + j, tensors[name][0])) for j, name in enumerate(names)}
        torch.save(state, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measured(command: list[str]) -> dict[str, float]:
    """Runs a command; its seconds, and the most anonymous memory it had resident, looked at 50 times a second."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = [int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(1024 * kib for kib in found)])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    watcher.join()
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def same_as_made(directory: pathlib.Path) -> bool:
    """Whether a Hugging Face directory holds the very tensors of `random_tensor`."""
    source = hf.open_directory(directory)
    return all(
        np.array_equal(source.tensors[entry.name].read(), random_tensor(i, entry.their_shape))
        for i, entry in enumerate(table(hf.LAYOUT, source.config))
    )


def main() -> None:
    """Makes the checkpoints, converts them, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="where to work; emptied at the end")
    parser.add_argument("--size", default="open_llama_3b", help="a named size")
    parser.add_argument("--kinds", default="safetensors,bin", help="of the sources")
    args = parser.parse_args()
    config = named(args.size)
    leaves = leaf_shapes(config).values()
    nbytes, largest = 2 * sum(map(math.prod, leaves)), 2 * max(map(math.prod, leaves))
    rows: dict[str, dict[str, float]] = {}
    work = args.dir / "bench-convert"
    convert = [sys.executable, "-m", "convert"]
    try:
        for kind in args.kinds.split(","):
            source, orbax, back = work / kind, work / "orbax", work / "back"
            make(source, args.size, kind)
            copy = f"cp -r {source} {work / 'copy'} && sync -f {work / 'copy'}"
            rows[f"cp {kind}"] = measured(["sh", "-c", copy])
            shutil.rmtree(work / "copy")
            rows[f"{kind} -> orbax"] = measured([*convert, str(source), str(orbax), "--to", "orbax"])
            shutil.rmtree(source)
            rows[f"orbax -> hf ({kind})"] = measured([*convert, str(orbax), str(back), "--to", "hf"])
            shutil.rmtree(orbax)
            if not same_as_made(back):
                raise SystemExit(f"{kind}: other tensors came out than went in")
            shutil.rmtree(back)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{nbytes / 1e9:.2f} GB, largest stacked array {largest / 1e9:.2f} GB; all tensors came back bit for bit")
    print(f"{'':28s} {'s':>8s} {'GB/s':>8s} {'peak GiB':>9s} {'above the largest array':>24s}")
    for name, row in rows.items():
        row["gb_per_second"] = nbytes / row["seconds"] / 1e9
        above = (row["peak_bytes"] - largest) / 2**30
        seconds, rate, peak = row["seconds"], row["gb_per_second"], row["peak_bytes"] / 2**30
        print(f"{name:28s} {seconds:8.1f} {rate:8.3f} {peak:9.2f} {above:24.2f}")
    print(json.dumps({"bytes": nbytes, "largest_array_bytes": largest, "runs": rows}))


if __name__ == "__main__":
    main()
