"""Reading a plan's contexts: one differentiable softmax over a row's own window and other rows' windows.

Contexts are rolled along the rows of the batch. "concatenate" brings all of them to the rows that read them and reads
them as one source; "ring" passes keys and values on from row to row and reads one context at a time, so that a device
holds one however many there are. The backward pass computes probabilities again from the log-sum-exp over all, one
source after another; gradients of a context's keys and values travel with it, and then home.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fot_jax import attention, sharding
from fot_jax.crossbatch.plans import Plan

Array = jax.Array

EXECUTIONS = ("auto", "concatenate", "ring")
# What a layer that is recomputed for its gradients keeps nevertheless, by `jax.ad_checkpoint.checkpoint_name`: contexts
# need not be read, nor sent round, a second time.
SAVED = "crossbatch"
# A CPU reads contexts together up to so many keys: enough for efficient matrix products, few enough for scores to stay
# in its cache (the concatenation of three contexts of 256 was five times slower).
_SOURCE_KEYS = 256
# Beyond so many sources a CPU's compiler takes longer than a loop over them costs.
_SOURCES = 16


def together(plan: Plan, length: int, execution: str, platform: str | None = None) -> int:
    """How many contexts are read together; 0 for a ring.

    Args:
        length: T, tokens of a window.
        execution: one of `EXECUTIONS`.
        platform: kind of device; that of `sharding.platform` by default.

    Raises:
        ValueError: an unknown execution.
    """
    if execution not in EXECUTIONS:
        raise ValueError(f"crossbatch execution is {execution!r}; wanted one of {', '.join(EXECUTIONS)}")
    if (platform or sharding.platform()) == "cpu":
        size = max(1, _SOURCE_KEYS // length)
        ring = execution == "ring" or execution == "auto" and plan.n_contexts > _SOURCES * size
    else:
        # A ring holds a context's keys and values and those on their way, and of both the gradients in float32.
        size = max(1, plan.n_contexts)
        ring = execution == "ring" or execution == "auto" and plan.n_contexts > 2
    return 0 if ring else size


class _How(NamedTuple):
    """What is decided before a program is made.

    Attributes:
        together: contexts read together; 0 for a ring.
        axes: of the mesh, that split rows.
    """

    plan: Plan
    scale: float
    kernel: attention.Kernel
    together: int
    axes: tuple[str, ...]

    @property
    def ring(self) -> bool:
        return not self.together and self.plan.n_contexts > 0


def crossbatch_attention(
    plan: Plan,
    q_BHTK: Array,
    k_BGTK: Array,
    v_BGTK: Array,
    angles: attention.Angles | None,
    segment_ids_BT: Array | None,
    *,
    scale: float,
    kernel: str = "auto",
    execution: str = "auto",
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
        kernel: what computes; see `attention.kernel`.
        execution: how contexts come to the rows that read them: "concatenate", all at once, and read as one source (on
            a CPU as sources of about 256 keys); "ring", one after another, each passed on from row to row, so that
            however many there are a device holds one and the next; "auto", the ring where there are more than two
            contexts, on a CPU where there are many.

    Returns:
        [B, H, T, K] in the queries' dtype.

    Raises:
        ValueError: a batch that is not the plan's, blocks that are not dealt to the devices of the mesh, an unknown
            execution, or what the kernel refuses.
    """
    B, _, T, K = q_BHTK.shape
    if B != plan.rows:
        raise ValueError(f"batch has {B} rows; the crossbatch plan is for {plan.rows}")
    ways = sharding.ways("batch")
    if plan.blocks > 1 and plan.shards != ways:
        raise ValueError(
            f"rows are split over {ways} devices, and the plan's {plan.blocks} blocks of them are dealt to "
            f"{plan.shards}; wanted plan.dealt({ways}), with rows in its order"
        )
    rotated = (lambda x: x) if angles is None else (lambda x: attention.rotate(x, angles))
    how = _How(
        plan,
        scale,
        attention.kernel(kernel, T, K, q_BHTK.dtype),
        together(plan, T, execution),
        sharding.axes("batch"),
    )
    seen_RC = plan.visible[plan.readers]
    visible_RC = None if seen_RC.all() else jnp.asarray(seen_RC, jnp.int32)
    return _attend(how, rotated(q_BHTK), rotated(k_BGTK), k_BGTK, v_BGTK, segment_ids_BT, visible_RC)


# q_BHTK and k_BGTK as local attention has them, k_BGTK and v_BGTK as contexts have them, segments_BT, visible_RC.
_HEADS, _KV_HEADS = ("batch", "heads", None, None), ("batch", "kv_heads", None, None)
_ARRAYS = (_HEADS, _KV_HEADS, _KV_HEADS, _KV_HEADS, ("batch", None), ("batch", None))
_LSE = ("batch", "heads", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, *arrays: Array | None) -> Array:
    """One softmax over a row's own window and its contexts. Its backward pass computes probabilities again, of the own
    window and of one context after another, from the log-sum-exp of them all.
    """
    return _attend_forward(how, *arrays)[0]


def _attend_forward(how, *arrays):
    o, lse = sharding.each_device(functools.partial(_forward, how), _ARRAYS, (_HEADS, _LSE))(*arrays)
    if how.plan.n_contexts:
        o, lse = (checkpoint_name(x, SAVED) for x in (o, lse))
    return o, (arrays, o, lse)


def _attend_backward(how, saved, do_BHTK):
    arrays, o, lse = saved
    backward = functools.partial(_backward, how)
    of_results = (*_ARRAYS, _HEADS, _LSE, _HEADS)
    grads = sharding.each_device(backward, of_results, _ARRAYS[:4])(*arrays, o, lse, do_BHTK)
    return *grads, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(how: _How, q: Array, k_own: Array, *contexts: Array | None) -> tuple[Array, Array]:
    """(o in the queries' dtype, lse) of the rows of one device."""
    _, v, segments, _ = contexts
    own = attention.Keys(k_own, v, segments, segments)
    if how.ring:
        partial = how.kernel.forward(q, own, (), how.scale)
        rows = q.shape[0] // how.plan.blocks
        far = _ring_forward(how, q[-rows:], *contexts)
        reading = attention.merge(attention.Partial(*(x[-rows:] for x in partial)), far)
        partial = attention.Partial(*(jnp.concatenate([x[:-rows], y]) for x, y in zip(partial, reading, strict=True)))
    else:
        groups = [keys for keys, _ in _groups(how, *contexts)]
        partial = how.kernel.forward(q, own, groups, how.scale)
    return partial.o_BHTK.astype(q.dtype), partial.lse_BHT


def _backward(how: _How, q: Array, k_own: Array, *arrays: Array | None) -> tuple[Array, Array, Array, Array]:
    """Gradients of queries, own keys, keys and values, of the rows of one device."""
    contexts, merged = arrays[:4], arrays[4:]
    k, v, segments, _ = contexts
    own = attention.Keys(k_own, v, segments, segments)
    if how.ring:
        dq, [(dk_own, dv_own)] = how.kernel.backward(q, own, (), how.scale, *merged)
        rows = q.shape[0] // how.plan.blocks
        far, home = _ring_backward(how, q[-rows:], *contexts, *(x[-rows:] for x in merged))
        dq = jnp.concatenate([dq[:-rows], dq[-rows:] + far])
    else:
        groups = list(_groups(how, *contexts))
        dq, [(dk_own, dv_own), *grads] = how.kernel.backward(q, own, [keys for keys, _ in groups], how.scale, *merged)
        home = _sent_home(how, [count for _, count in groups], grads, k, v)
    dk, dv = (jnp.concatenate(blocks) for blocks in home)
    return dq.astype(q.dtype), dk_own.astype(k.dtype), dk.astype(k.dtype), (dv + dv_own).astype(v.dtype)


def _blocks(how: _How, x: Array) -> list[Array]:
    return jnp.split(x, how.plan.blocks, axis=0)


def _nothing(how: _How, *arrays: Array) -> list[list[Array]]:
    """Of each array, gradients of its blocks before any is known."""
    return [[jnp.zeros(x.shape, jnp.float32) for x in _blocks(how, y)] for y in arrays]


# --------------------------------------------------------------------------------------------------- all together


def _hops(how: _How) -> list[tuple[int | None, int]]:
    """For each context, how it is reached: (block, rows to roll that block by); or, where devices share the rows and
    few are to be sent, from the context before (None, rows to roll it by).
    """
    hops, before = [], None
    for source, offset in zip(how.plan.sources, how.plan.offsets, strict=True):
        near = how.axes and before is not None and before[0] == source
        hops.append((None, offset - before[1]) if near else (source, offset))
        before = source, offset
    return hops


def _groups(
    how: _How, k: Array, v: Array, segments: Array | None, visible: Array | None
) -> Iterator[tuple[attention.Keys, int]]:
    """All contexts, `how.together` to a source, and how many there are in it. Rows before the first that sees one of
    them are left out; where rows are split over devices none are, or some would have less to do than others.
    """
    plan, now, gathered = how.plan, None, []
    arrays = [x for x in (k, v, segments) if x is not None]
    seen_RC = plan.visible[plan.readers]
    for c, (block, by) in enumerate(_hops(how)):
        start = now if block is None else [_blocks(how, x)[block] for x in arrays]
        now = [sharding.roll_rows(x, by, how.axes) for x in start]
        gathered.append(now)
        if len(gathered) < how.together and c + 1 < plan.n_contexts:
            continue
        some = slice(c + 1 - len(gathered), c + 1)
        first = 0 if how.axes else int(seen_RC[:, some].any(1).argmax())
        whole = not how.axes and seen_RC[first:, some].all()
        ids = [
            _ids(None if whole or visible is None else visible[:, i : i + 1], *here[2:])
            for i, here in zip(range(some.start, some.stop), gathered, strict=True)
        ]
        k_now, v_now = (jnp.concatenate([here[x][first:] for here in gathered], axis=2) for x in (0, 1))
        numbers = None
        if ids[0] is not None:
            if len(ids) > 1:  # of a single context a row may see all or nothing; of several, each key has a number
                ids = [jnp.broadcast_to(x, (x.shape[0], k.shape[2])) for x in ids]
            numbers = jnp.concatenate(ids, axis=1)[first:]
        yield _read_by_all(k_now, v_now, numbers), len(gathered)
        gathered = []


def _read_by_all(k: Array, v: Array, ids: Array | None) -> attention.Keys:
    """Keys that every query reads, or those of number 1."""
    return attention.Keys(k, v) if ids is None else attention.Keys(k, v, jnp.ones((1, 1), jnp.int32), ids)


def _ids(visible: Array | None, segments: Array | None = None) -> Array | None:
    """int32 [R, T] or [R, 1]: 1 for the keys of a context that its reader sees."""
    written = None if segments is None else (segments > 0).astype(jnp.int32)
    return written if visible is None else visible if written is None else visible * written


def _sent_home(
    how: _How, counts: Sequence[int], grads: Sequence[tuple[Array, Array]], k: Array, v: Array
) -> list[list[Array]]:
    """Gradients of the blocks of keys and of values, from those of the contexts, rolled back the way they came."""
    plan, hops, home = how.plan, _hops(how), _nothing(how, k, v)
    rows = home[0][0].shape[0]
    each = []
    for count, pair in zip(counts, grads, strict=True):
        whole = [jnp.pad(x, [(rows - x.shape[0], 0)] + [(0, 0)] * 3) for x in pair]
        each += list(zip(*(jnp.split(x, count, axis=2) for x in whole), strict=True))
    far = None
    for c in reversed(range(plan.n_contexts)):
        far = [x.astype(jnp.float32) + (0 if far is None else y) for x, y in zip(each[c], far or (0, 0), strict=True)]
        block, by = hops[c]
        far = [sharding.roll_rows(x, -by, how.axes) for x in far]
        if block is not None:
            for blocks, x in zip(home, far, strict=True):
                blocks[block] += x
            far = None
    return home


# ------------------------------------------------------------------------------------------------------------- ring


class _Run(NamedTuple):
    """Contexts first, first + 1 ... of one block, each the one before rolled by `by` rows; the first, the block rolled
    by `start`.
    """

    first: int
    count: int
    block: int
    start: int
    by: int


def _runs(plan: Plan) -> list[_Run]:
    runs: list[_Run] = []
    for c, (source, offset) in enumerate(zip(plan.sources, plan.offsets, strict=True)):
        last = runs[-1] if runs else None
        if last and source == last.block and last.count == 1:
            runs[-1] = last._replace(count=2, by=offset - last.start)
        elif last and source == last.block and offset == last.start + last.count * last.by:
            runs[-1] = last._replace(count=last.count + 1)
        else:
            runs.append(_Run(c, 1, source, offset, 0))
    return runs


def _setting_out(how: _How, run: _Run, *arrays: Array | None) -> list[Array]:
    """A run's first context of each array that there is."""
    blocks = [_blocks(how, x)[run.block] for x in arrays if x is not None]
    return [sharding.roll_rows(x, run.start, how.axes) for x in blocks]


def _context(arrays: Sequence[Array], visible: Array | None) -> attention.Keys:
    """What rows read of a context that has arrived."""
    k, v, *segments = arrays
    return _read_by_all(k, v, _ids(None if visible is None else visible[:, None], *segments))


def _each_context(
    how: _How, run: _Run, read: Callable[[Any, attention.Keys], Any], carry: Any, visible: Array | None, *arrays: Any
) -> Any:
    """`carry = read(carry, keys)` for each context of a run, which is passed on while it is read. The loop is over
    those between the first, on whose way nothing has been added up, and the last, which goes no further.
    """
    seen = None if visible is None else visible.T[run.first : run.first + run.count]
    of = lambda c: None if seen is None else seen[c]

    def step(state: tuple, seen_R: Array | None) -> tuple[tuple, None]:
        carry, arrays = state
        passed_on = [sharding.roll_rows(x, run.by, how.axes) for x in arrays]
        return (read(carry, _context(arrays, seen_R)), passed_on), None

    state = carry, _setting_out(how, run, *arrays)
    if run.count > 1:
        state, _ = step(state, of(0))
    if run.count > 2:
        state, _ = jax.lax.scan(step, state, None if seen is None else seen[1:-1], run.count - 2)
    carry, arrays = state
    return read(carry, _context(arrays, of(-1)))


def _ring_forward(
    how: _How, q: Array, k: Array, v: Array, segments: Array | None, visible: Array | None
) -> attention.Partial:
    """The partial over all contexts."""

    def read(partial: attention.Partial | None, keys: attention.Keys) -> attention.Partial:
        here = how.kernel.forward(q, None, (keys,), how.scale)
        return here if partial is None else attention.merge(partial, here)

    partial = None
    for run in _runs(how.plan):
        partial = _each_context(how, run, read, partial, visible, k, v, segments)
    return partial


def _ring_backward(
    how: _How,
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    visible: Array | None,
    o: Array,
    lse: Array,
    do: Array,
) -> tuple[Array, list[list[Array]]]:
    """Gradients of the queries that read contexts, and of the blocks of keys and of values. Those of a context travel
    with it, and then home.
    """
    dq = jnp.zeros(q.shape, jnp.float32)
    home = _nothing(how, k, v)
    for run in _runs(how.plan):

        def read(carry: tuple, keys: attention.Keys, run=run) -> tuple:
            dq, grads = carry
            dq_here, [here] = how.kernel.backward(q, None, (keys,), how.scale, o, lse, do)
            here = [x.astype(jnp.float32) for x in here]
            if grads is not None:
                here = [sharding.roll_rows(x, run.by, how.axes) + y for x, y in zip(grads, here, strict=True)]
            return dq + dq_here, here

        dq, grads = _each_context(how, run, read, (dq, None), visible, k, v, segments)
        last = run.start + (run.count - 1) * run.by
        for blocks, grad in zip(home, grads, strict=True):
            blocks[run.block] += sharding.roll_rows(grad, -last, how.axes)
    return dq, home
