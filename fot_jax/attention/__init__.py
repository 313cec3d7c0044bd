"""Rotary positions, and attention in parts that merge exactly.

Every source of keys and values (local window, cache, memory, other rows of the batch) gives a `Partial`: its softmax
average and the log of its sum of exponentials. `merge` of partials is the softmax over the union of their keys,
exactly: one softmax over the local window and memory (arXiv 2307.03170, section 3.1), however the keys are stored.

Arrays are head-major: q_BHTK, k_BGSK, v_BGSK. Query head h reads key/value head h // (H / G). Caches have their slots
last, [B, G, K, S]: a CPU reads them twice as fast for a single query, and no slower for many.

Inference merges `attend`'s partials, which JAX can differentiate. Training (`crossbatch`) goes through a `kernel`,
which has a backward pass of its own.
"""

from fot_jax.attention.kernels import NAMES, kernel
from fot_jax.attention.partial import (
    Kernel,
    Keys,
    Partial,
    Source,
    attend,
    attend_by_blocks,
    causal_mask,
    grouped,
    in_blocks,
    joined,
    merge,
    one_by_one,
    over_query_blocks,
    scores,
)
from fot_jax.attention.rotary import Angles, rotary_angles, rotate

__all__ = [
    "NAMES",
    "Angles",
    "Kernel",
    "Keys",
    "Partial",
    "Source",
    "attend",
    "attend_by_blocks",
    "causal_mask",
    "grouped",
    "in_blocks",
    "joined",
    "kernel",
    "merge",
    "one_by_one",
    "over_query_blocks",
    "rotary_angles",
    "rotate",
    "scores",
]
