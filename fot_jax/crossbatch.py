"""Crossbatch: in memory layers a row of the batch also attends to whole windows of other rows (arXiv 2307.03170, section 3.2).

Earlier windows of the same document are positives, windows of other documents negatives; all of them, un-rotated and never
masked causally, share one softmax with the row's own causal window, and gradients reach their keys and values.

A plan says who reads whom. It is made of row *offsets*, so that it runs as rolls of keys and values along the batch axis (a
collective permute where rows are sharded) and not as a gather, for which a compiler would bring all keys to every device.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import attention

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows' windows a row reads besides its own. Hashable: a static argument of a jitted step.

    The batch is `blocks` blocks of `rows / blocks` rows. Rows of the last block read contexts; where there is only one block,
    all rows do. Context c of row i of that block is row i + offsets[c] (modulo the block) of block sources[c].

    Attributes:
        rows: B.
        blocks: number of row blocks.
        sources: [C] block that context c is taken from.
        offsets: [C] row offset of context c within its block.
        wraps: whether offsets wrap round the block. Where they do not, a context that would is not visible.
        seen: [B] how many contexts, from the first, a row sees.
    """

    rows: int
    blocks: int
    sources: tuple[int, ...]
    offsets: tuple[int, ...]
    wraps: bool
    seen: tuple[int, ...]

    @property
    def n_contexts(self) -> int:
        """C."""
        return len(self.offsets)

    @property
    def block_rows(self) -> int:
        """Rows of a block, which is also how many rows read contexts."""
        return self.rows // self.blocks

    @property
    def visible(self) -> np.ndarray:
        """bool [B, C], which contexts a row sees."""
        return np.arange(self.n_contexts)[None, :] < np.array(self.seen)[:, None]

    @property
    def context_rows(self) -> np.ndarray:
        """int [B, C], the batch row that each context is; -1 where it is not visible."""
        row = np.arange(self.rows)[:, None] % self.block_rows + np.array(self.offsets, int)[None, :]
        return np.where(self.visible, np.array(self.sources, int) * self.block_rows + row % self.block_rows, -1)


def pack_plan(rows: int, seen: tuple[int, ...]) -> Plan:
    """Packs of len(seen) consecutive rows, one document each; row j of a pack sees its seen[j] preceding rows.

    Preceding rows of the pack are positives, of earlier packs negatives; never more than exist before the row.

    Raises:
        ValueError: rows that the pack does not divide, or a negative count.
    """
    packing = len(seen)
    if packing < 1 or rows < 1 or rows % packing:
        raise ValueError(f"batch is {rows} rows; wanted a multiple of packing, {packing}")
    if min(seen) < 0:
        raise ValueError(f"rows of a pack see {seen} preceding rows; wanted no negative number")
    counts = tuple(min(seen[row % packing], row) for row in range(rows))
    most = max(counts)
    return Plan(rows, 1, (0,) * most, tuple(-c for c in range(1, most + 1)), wraps=False, seen=counts)


def published_plan(rows: int, range_: int, packing: int = 1, stepping: bool = False) -> Plan:
    """The published training code's scheme: row b sees rows b-1 ... b-range_, never below row 0.

    With stepping, row i of a pack of k = packing rows sees min(i ceil((range_+1) / max(k-1, 1)) + 1, range_+1) - 1 preceding
    rows: none at first, all at last. Packing 1 ignores stepping.

    Args:
        rows: B, a multiple of packing.
        range_: `cross_batch_range`, C.
        packing: `dataset_packing`: consecutive rows that one document owns.
        stepping: `cross_batch_stepping`.

    Raises:
        ValueError: rows that packing does not divide, or a negative range.
    """
    if range_ < 0 or packing < 1:
        raise ValueError(f"range_ is {range_} and packing {packing}; wanted range_ >= 0 and packing >= 1")
    seen = [range_] * packing
    if stepping and packing > 1:
        step = math.ceil((range_ + 1) / (packing - 1))
        seen = [min(i * step + 1, range_ + 1) - 1 for i in range(packing)]
    return pack_plan(rows, tuple(seen))


def longllama_3b_plan(rows: int) -> Plan:
    """LongLLaMA 3B: quarters of the batch with (positives, negatives) = (0, 0), (1, 1), (2, 1), (3, 0)."""
    return pack_plan(rows, (0, 2, 3, 3))


def longllama_7b_plan(rows: int) -> Plan:
    """LongLLaMA 7B: quarters of the batch with (positives, negatives) = (0, 0), (1, 2), (2, 5), (3, 4)."""
    return pack_plan(rows, (0, 3, 7, 7))


def block_plan(rows: int, contexts: int, windows: int = 1) -> Plan:
    """The paper's small models: `windows` blocks of earlier windows (C_prev), then a block of current ones (C_curr).

    Block j holds window j of the same R = rows / (windows + 1) documents. Row i of the last block reads rows i, i+1, ...,
    i+contexts-1 modulo R of every earlier block: the first is its own document (the positive), the others negatives. Rows of
    earlier blocks attend locally only.

    Args:
        rows: B, a multiple of windows + 1.
        contexts: d, from 1 to R.
        windows: w, earlier windows of each document.

    Raises:
        ValueError: sizes that do not fit.
    """
    blocks = windows + 1
    if windows < 1 or rows < 1 or rows % blocks:
        raise ValueError(f"batch is {rows} rows; wanted a multiple of {blocks} ({windows} earlier windows and the current one)")
    block_rows = rows // blocks
    if not 1 <= contexts <= block_rows:
        raise ValueError(f"contexts is {contexts}; wanted 1..{block_rows}, the documents in a batch of {rows} rows")
    total = windows * contexts
    return Plan(
        rows,
        blocks,
        # The nearest window first, so that the first context is the positive that came just before.
        sources=tuple(block for block in reversed(range(windows)) for _ in range(contexts)),
        offsets=tuple(range(contexts)) * windows,
        wraps=True,
        seen=(0,) * (rows - block_rows) + (total,) * block_rows,
    )


def contexts(plan: Plan, x_BHTK: Array, axis: int = 2) -> Array:
    """Every context of every reading row, side by side along `axis`: [B / blocks, ..., C x T, ...]."""
    blocks = jnp.split(x_BHTK, plan.blocks, axis=0)
    rolled = [jnp.roll(blocks[s], -offset, axis=0) for s, offset in zip(plan.sources, plan.offsets, strict=True)]
    return jnp.concatenate(rolled, axis=axis)


def crossbatch_attention(
    plan: Plan,
    q_BHTK: Array,
    k_BGTK: Array,
    v_BGTK: Array,
    angles: attention.Angles | None,
    segment_ids_BT: Array | None,
    *,
    scale: float,
) -> Array:
    """A memory layer's attention in training: one softmax over a row's own window and its contexts.

    Args:
        plan: who reads whom.
        q_BHTK, k_BGTK, v_BGTK: un-rotated.
        angles: rotation of local queries and keys by position in the window; None where the layer rotates nothing. The
            rotated query meets the contexts' un-rotated keys: memory counts as position 0.
        segment_ids_BT: int32 [B, T]; local attention stays within a segment, and tokens of segment 0 (padding) are seen by
            nobody. None: one segment, no padding.
        scale: what scores are multiplied by.

    Returns:
        [B, H, T, K] in the queries' dtype.

    Raises:
        ValueError: a batch that is not the plan's.
    """
    B, _, T, _ = q_BHTK.shape
    if B != plan.rows:
        raise ValueError(f"batch has {B} rows; the crossbatch plan is for {plan.rows}")
    visible_BTT = local_mask(T, segment_ids_BT)
    rotated = (lambda x: x) if angles is None else (lambda x: attention.rotate(x, angles))
    q, k = rotated(q_BHTK), rotated(k_BGTK)
    if not plan.n_contexts:
        return attention.attend(q, k, v_BGTK, visible_BTT, scale=scale).o_BHTK.astype(q.dtype)

    alone = B - plan.block_rows  # rows of earlier blocks, which read no context
    rows = slice(alone, None)
    R, C = plan.block_rows, plan.n_contexts
    context_visible = jnp.asarray(np.repeat(plan.visible[rows], T, axis=1))[:, None, :]
    if segment_ids_BT is not None:
        context_visible &= (contexts(plan, segment_ids_BT, axis=1) > 0)[:, None, :]
    own = visible_BTT if visible_BTT.shape[0] == 1 else visible_BTT[rows]
    visible = jnp.concatenate([jnp.broadcast_to(own, (R, T, T)), jnp.broadcast_to(context_visible, (R, T, C * T))], axis=2)
    o = attention.attend(
        q[rows],
        jnp.concatenate([k[rows], contexts(plan, k_BGTK)], axis=2),
        jnp.concatenate([v_BGTK[rows], contexts(plan, v_BGTK)], axis=2),
        visible,
        scale=scale,
    ).o_BHTK
    if alone:
        own = visible_BTT if visible_BTT.shape[0] == 1 else visible_BTT[:alone]
        o = jnp.concatenate([attention.attend(q[:alone], k[:alone], v_BGTK[:alone], own, scale=scale).o_BHTK, o])
    return o.astype(q.dtype)


def local_mask(length: int, segment_ids_BT: Array | None) -> Array:
    """bool [B or 1, T, T]: causal, and within a segment where segments are given. Padding sees only itself."""
    causal = attention.causal_mask(length)
    if segment_ids_BT is None:
        return causal
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return causal & same


def loss_rows(plan: Plan, loss_on_previous: bool) -> np.ndarray:
    """bool [B], the rows whose predictions count: all, or those of the last block only."""
    return np.full(plan.rows, True) if loss_on_previous else np.arange(plan.rows) >= plan.rows - plan.block_rows

