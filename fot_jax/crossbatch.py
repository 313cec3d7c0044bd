"""Crossbatch: in memory layers a row of the batch also attends to whole windows of other rows (arXiv 2307.03170,
section 3.2).

Earlier windows of the same document are positives, windows of other documents negatives; all of them, un-rotated and
never masked causally, share one softmax with the row's own causal window, and gradients reach their keys and values.

A plan says who reads whom. It is made of row *offsets*, so that it runs as rolls of keys and values along the batch
axis (a collective permute where rows are sharded) and not as a gather, for which a compiler would bring all keys to
every device.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import attention, sharding

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows' windows a row reads besides its own. Hashable: a static argument of a jitted step.

    The batch is `blocks` blocks of `rows / blocks` rows. Rows of the last block read contexts; where there is only
    one block, all rows do. Context c of row i of that block is row i + offsets[c] (modulo the block) of block
    sources[c].

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
        seen = np.arange(self.n_contexts)[None, :] < np.array(self.seen)[:, None]
        row = np.arange(self.rows)[:, None] % self.block_rows + np.array(self.offsets, int)[None, :]
        return seen & (self.wraps | (row >= 0) & (row < self.block_rows))

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

    With stepping, row i of a pack of k = packing rows sees min(i ceil((range_+1) / max(k-1, 1)) + 1, range_+1) - 1
    preceding
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

    Block j holds window j of the same R = rows / (windows + 1) documents. Row i of the last block reads rows i, i+1,
    ..., i+contexts-1 modulo R of every earlier block: the first is its own document (the positive), the others
    negatives. Rows of earlier blocks attend locally only.

    Args:
        rows: B, a multiple of windows + 1.
        contexts: d, from 1 to R.
        windows: w, earlier windows of each document.

    Raises:
        ValueError: sizes that do not fit.
    """
    blocks = windows + 1
    if windows < 1 or rows < 1 or rows % blocks:
        raise ValueError(
            f"batch is {rows} rows; wanted a multiple of {blocks} ({windows} earlier windows and the current one)"
        )
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


def contexts(plan: Plan, x_BHTK: Array, first_row: int = 0, axis: int = 2) -> Array:
    """Every context of every reading row from `first_row` on, side by side along `axis`: [rows, ..., C x T, ...]."""
    blocks = jnp.split(x_BHTK, plan.blocks, axis=0)
    rolled = [jnp.roll(blocks[s], -offset, axis=0) for s, offset in zip(plan.sources, plan.offsets, strict=True)]
    return jnp.concatenate([x[first_row:] for x in rolled], axis=axis)


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
        segment_ids_BT: int32 [B, T]; local attention stays within a segment, and tokens of segment 0 (padding) are
            seen by nobody. None: one segment, no padding.
        scale: what scores are multiplied by.

    Returns:
        [B, H, T, K] in the queries' dtype.

    Raises:
        ValueError: a batch that is not the plan's.
    """
    B, _, T, _ = q_BHTK.shape
    if B != plan.rows:
        raise ValueError(f"batch has {B} rows; the crossbatch plan is for {plan.rows}")
    rotated = (lambda x: x) if angles is None else (lambda x: attention.rotate(x, angles))
    own = attention.Source(rotated(k_BGTK), v_BGTK, local_mask(T, segment_ids_BT))
    return attention.attention(rotated(q_BHTK), own, _context_sources(plan, k_BGTK, v_BGTK, segment_ids_BT), scale)


# Contexts are read together as one source up to so many keys: enough for efficient matrix products, few enough for
# scores to stay in a CPU's cache (the concatenation of three contexts of 256 was five times slower).
_SOURCE_KEYS = 256


def _context_sources(
    plan: Plan, k_BGTK: Array, v_BGTK: Array, segment_ids_BT: Array | None
) -> tuple[attention.Source, ...]:
    """The contexts of the reading rows, un-rotated, a few to a source."""
    T, C = k_BGTK.shape[2], plan.n_contexts
    size = max(1, _SOURCE_KEYS // T)
    sources = []
    for first in range(0, C, size):
        some = dataclasses.replace(
            plan, sources=plan.sources[first : first + size], offsets=plan.offsets[first : first + size]
        )
        seen = plan.visible[plan.rows - plan.block_rows :, first : first + size]
        # Rows before the first that sees one of them need not read them; where rows are split over devices, all do, or
        # some devices would have less to do than others.
        first_row = 0 if sharding.ways("batch") > 1 else int(seen.any(1).argmax())
        seen = seen[first_row:]
        visible = None
        if not seen.all():
            # Of a single context a row sees all or nothing.
            visible = jnp.asarray(np.repeat(seen, T if size > 1 else 1, axis=1))[:, None, :]
        if segment_ids_BT is not None:
            written = (contexts(some, segment_ids_BT, first_row, axis=1) > 0)[:, None, :]
            visible = written if visible is None else visible & written
        sources.append(attention.Source(*(contexts(some, x, first_row) for x in (k_BGTK, v_BGTK)), visible))
    return tuple(sources)


def local_mask(length: int, segment_ids_BT: Array | None) -> Array:
    """bool [B or 1, T, T]: causal, and within a segment where segments are given. Padding sees only padding."""
    causal = jnp.asarray(np.tri(length, dtype=bool)[None])
    if segment_ids_BT is None:
        return causal
    return causal & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def loss_rows(plan: Plan, loss_on_previous: bool) -> np.ndarray:
    """bool [B], the rows whose predictions count: all, or those of the last block only."""
    return np.full(plan.rows, True) if loss_on_previous else np.arange(plan.rows) >= plan.rows - plan.block_rows
