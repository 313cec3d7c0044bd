"""Crossbatch: in memory layers a row of the batch also attends to whole windows of other rows (arXiv 2307.03170,
section 3.2).

Earlier windows of the same document are positives, windows of other documents negatives; all of them, un-rotated and
never masked causally, share one softmax with the row's own causal window, and gradients reach their keys and values.
`plans` says who reads whom, `reading` computes it.
"""

from fot_jax.crossbatch.plans import (
    Plan,
    block_plan,
    longllama_3b_plan,
    longllama_7b_plan,
    loss_rows,
    pack_plan,
    published_plan,
)
from fot_jax.crossbatch.reading import EXECUTIONS, SAVED, crossbatch_attention, together

__all__ = [
    "EXECUTIONS",
    "SAVED",
    "Plan",
    "block_plan",
    "crossbatch_attention",
    "longllama_3b_plan",
    "longllama_7b_plan",
    "loss_rows",
    "pack_plan",
    "published_plan",
    "together",
]
