"""Exact top-k of a million keys over 16 TPU chips, compiled ahead of time without any: what it sorts and what it takes.

    pip install '.[tpu]' && python bench/compiled_topk.py        # TPU v5e, 4 x 4 chips, k 128

Compiles `memory.topk` for one query and for a window of them, for 8 heads of 128 numbers and for the 32 of 100 that
LongLLaMA 3B has, in every format of memory, approximate too, and beside it the plain way (all scores, then
`lax.top_k`). Prints a table of a device's temporaries and of the longest thing that is sorted, and as its last line
JSON. Ends with 1 where ours sorts as much as a device has slots, or takes more than --most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time

# Without a chip libtpu would look for one, and for what it is called on the network.
os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fot_jax import memory, sharding
from fot_jax.config import DtypePolicy, ModelConfig

SIZES = dict(vocab_size=8, d_model=8, d_ff=8, n_layers=1, window=256, mem_layers=(0,))


def sorted_most(compiled: str) -> int:
    """The longest axis of whatever a program sorts, or looks for the greatest of."""
    most = 0
    for line in compiled.splitlines():
        if re.search(r"\bsort\(|custom_call_target=\"[^\"]*(TopK|PartialReduce)", line):
            shapes = re.findall(r"\[([0-9,]+)\]", line.split("metadata=")[0])
            most = max([most, *(int(n) for shape in shapes for n in shape.split(","))])
    return most


def compiled(args: argparse.Namespace, heads: int, size: int, kind: str, dtype: str, queries: int) -> dict[str, object]:
    """Figures of one program on the mesh that is set."""
    config = ModelConfig(**SIZES, n_heads=heads, head_size=size, dtypes=DtypePolicy(memory=dtype))
    mem = jax.eval_shape(lambda: memory.init_memory(config, 1, args.slots))
    mesh = jax.sharding.get_mesh()
    placed = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    mem = jax.tree.map(lambda x: placed(x, P(None, None, None, "context") if x.ndim == 4 else P()), mem)
    q = placed(jax.ShapeDtypeStruct((1, heads, queries, size), jnp.bfloat16), P())

    def plain(q: jax.Array, mem: memory.Cache) -> tuple[jax.Array, jax.Array]:
        q = jnp.pad(q, [(0, 0)] * 3 + [(0, mem.keys[0].shape[2] - size)])
        s = jnp.einsum("bhtk,bhkm->bhtm", q, mem.keys[0], preferred_element_type=jnp.float32)
        s, slots = jax.lax.top_k(jnp.where(jnp.arange(args.slots) < mem.length_B[0], s, -jnp.inf), args.k)
        values = jnp.take_along_axis(mem.values[0][:, :, None], slots[:, :, :, None], axis=4)
        return jnp.einsum("bhtn,bhtkn->bhtk", jax.nn.softmax(s), values), slots

    def ours(q: jax.Array, mem: memory.Cache) -> tuple[jax.Array, jax.Array]:
        recall = 0.95 if kind == "approximate" else None
        arrays = q, mem.keys[0], mem.values[0], mem.length_B
        options = dict(scale=0.1, score_bytes=args.score_bytes, deals=mem.deals, recall=recall)
        partial, slots, _ = memory.topk(*arrays, k=args.k, **options)
        return partial.o_BHTK, slots

    begin = time.perf_counter()
    program = jax.jit(plain if kind == "plain" else ours).lower(q, mem).compile()
    seconds, text = time.perf_counter() - begin, program.as_text()
    return {
        "heads": heads,
        "size": size,
        "way": kind,
        "dtype": dtype,
        "queries": queries,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "sorted_most": sorted_most(text),
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    """All programs, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--slots", type=int, default=2**20)
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--size", type=int, nargs="+", default=[128, 100], help="numbers of a head, for each --heads")
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--queries", type=int, nargs="+", default=[256, 1])
    parser.add_argument("--score-bytes", type=int, default=64 * 2**20, help="budget that our search is given")
    parser.add_argument("--most", type=int, default=256 * 10**6, help="bytes of temporaries a device")
    args = parser.parse_args()
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    except Exception as error:
        raise SystemExit(f"TPU {args.topology} cannot be compiled for ({error}): pip install '.[tpu]'") from error
    programs = [("topk", dtype) for dtype in ("bfloat16", "float32", "int8")]
    programs += [("approximate", "bfloat16"), ("plain", "bfloat16")]
    found, per_device = [], args.slots // len(chips)
    print(f"{args.slots} slots over {len(chips)} devices: {per_device} each; k {args.k}")
    print("heads     way          memory    queries  MB beside     sorts  kernels  compiled, s")
    with jax.set_mesh(sharding.make_mesh({"context": len(chips)}, list(chips))):
        for (heads, size), program, queries in itertools.product(
            zip(args.heads, args.size, strict=True), programs, args.queries
        ):
            one = compiled(args, heads, size, *program, queries)
            one["kept"] = one["temporary_bytes"] <= args.most and one["sorted_most"] < per_device
            found.append(one)
            row = f"{heads:2d} x {size:3d}  {one['way']:12s} {one['dtype']:9s} {queries:7d}"
            row += f" {one['temporary_bytes'] / 1e6:10.1f} {one['sorted_most']:9d} {one['kernels']:8d}"
            print(f"{row} {one['compile_seconds']:12.1f}", flush=True)
    print(json.dumps({"slots": args.slots, "devices": len(chips), "programs": found}))
    sys.exit(not all(one["kept"] for one in found if one["way"] != "plain"))


if __name__ == "__main__":
    main()
