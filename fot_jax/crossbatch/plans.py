"""Plans: which rows' windows a row of the batch reads besides its own.

A plan is made of row *offsets*, so that it runs as rolls of keys and values along the batch axis (a collective permute
where rows are sharded) and not as a gather, for which a compiler would bring all keys to every device.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which rows' windows a row reads besides its own. Hashable: a static argument of a jitted step.

    The batch is `blocks` blocks of `rows / blocks` rows. Rows of the last block read contexts; where there is only
    one block, all rows do. Context c of row i of that block is row i + offsets[c] (modulo the block) of block
    sources[c].

    Blocks lie one after another, or dealt to `shards`: the first shard of every block, then the second of every block,
    and so on (see `dealt`). Then devices that split the rows have equal shares of every block, and equal work.

    Attributes:
        rows: B.
        blocks: number of row blocks.
        sources: [C] block that context c is taken from.
        offsets: [C] row offset of context c within its block.
        wraps: whether offsets wrap round the block. Where they do not, a context that would is not visible.
        seen: [B] how many contexts, from the first, a row sees; of blocks one after another.
        shards: how many shards blocks are dealt to.
    """

    rows: int
    blocks: int
    sources: tuple[int, ...]
    offsets: tuple[int, ...]
    wraps: bool
    seen: tuple[int, ...]
    shards: int = 1

    @property
    def n_contexts(self) -> int:
        """C."""
        return len(self.offsets)

    @property
    def block_rows(self) -> int:
        """Rows of a block, which is also how many rows read contexts."""
        return self.rows // self.blocks

    @property
    def order(self) -> np.ndarray:
        """int [B], for each row of the batch its number among blocks that lie one after another."""
        return np.arange(self.rows).reshape(self.blocks, self.shards, -1).swapaxes(0, 1).reshape(-1)

    @property
    def readers(self) -> np.ndarray:
        """bool [B], the rows that read contexts: those of the last block."""
        return self.order >= self.rows - self.block_rows

    @property
    def visible(self) -> np.ndarray:
        """bool [B, C], which contexts a row sees."""
        return self._context_rows()[self.order] >= 0

    @property
    def context_rows(self) -> np.ndarray:
        """int [B, C], the batch row that each context is; -1 where it is not visible."""
        rows = self._context_rows()[self.order]
        return np.where(rows >= 0, np.argsort(self.order)[rows], -1)

    def _context_rows(self) -> np.ndarray:
        """The same of blocks that lie one after another."""
        seen = np.arange(self.n_contexts)[None, :] < np.array(self.seen)[:, None]
        row = np.arange(self.rows)[:, None] % self.block_rows + np.array(self.offsets, int)[None, :]
        visible = seen & (self.wraps | (row >= 0) & (row < self.block_rows))
        return np.where(visible, np.array(self.sources, int) * self.block_rows + row % self.block_rows, -1)

    def dealt(self, shards: int) -> Plan:
        """The same plan with blocks dealt to `shards`: of a batch whose row i is row `order[i]` of the one before.

        Raises:
            ValueError: rows of a block that `shards` does not divide.
        """
        if shards < 1 or self.block_rows % shards:
            raise ValueError(
                f"blocks of {self.block_rows} rows over {shards} shards; wanted a multiple (batch.rows, with "
                f"{self.blocks} blocks of rows, over mesh.data x mesh.fsdp)"
            )
        return dataclasses.replace(self, shards=shards if self.blocks > 1 else 1)


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

    With stepping, row i of a pack of k = packing rows sees min(i ceil((range_+1) / max(k-1, 1)) + 1, range_+1) - 1 rows
    before it: none at first, all at last. Packing 1 ignores stepping.

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


def loss_rows(plan: Plan, loss_on_previous: bool) -> np.ndarray:
    """bool [B], the rows whose predictions count: all, or those of the last block only."""
    return np.full(plan.rows, True) if loss_on_previous else plan.readers
