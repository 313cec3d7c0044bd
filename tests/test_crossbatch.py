from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from fot_jax import attention, crossbatch, model
from fot_jax.config import ModelConfig
from fot_jax.crossbatch import reading

CONFIG = ModelConfig(
    vocab_size=48, d_model=16, d_ff=20, n_layers=2, n_heads=4, n_kv_heads=2, head_size=6, window=8, mem_layers=(1,)
)
T = 6
FORWARD = jax.jit(model.crossbatch_forward, static_argnums=(0, 3))


def context_rows(plan):
    """The rows each row reads, as sets."""
    assert plan.context_rows.shape == plan.visible.shape == (plan.rows, plan.n_contexts)
    out = []
    for rows, visible in zip(plan.context_rows, plan.visible, strict=True):
        np.testing.assert_array_equal(rows >= 0, visible)
        seen = [int(row) for row in rows if row >= 0]
        assert len(set(seen)) == len(seen)
        out.append(set(seen))
    return out


# Plans, against tables written out by hand.


@pytest.mark.parametrize(
    ("arguments", "table"),
    [
        # Row b sees b-1 ... b-C, never below row 0.
        (dict(rows=5, range_=2), [{}, {0}, {0, 1}, {1, 2}, {2, 3}]),
        (dict(rows=3, range_=7), [{}, {0}, {0, 1}]),
        (dict(rows=4, range_=0, packing=2, stepping=True), [{}, {}, {}, {}]),
        # Packing alone changes whose the rows are, not who sees whom.
        (dict(rows=4, range_=1, packing=2), [{}, {0}, {1}, {2}]),
        # Packing 1 ignores stepping.
        (dict(rows=4, range_=2, packing=1, stepping=True), [{}, {0}, {0, 1}, {1, 2}]),
        # Packs of 2, C = 3: step ceil(4 / 1) = 4, so 0 and min(5, 4) - 1 = 3.
        (dict(rows=6, range_=3, packing=2, stepping=True), [{}, {0}, {}, {0, 1, 2}, {}, {2, 3, 4}]),
        # Packs of 4, C = 3: step ceil(4 / 3) = 2, so 0, 2, 3, 3; LongLLaMA 3B.
        (
            dict(rows=8, range_=3, packing=4, stepping=True),
            [{}, {0}, {0, 1}, {0, 1, 2}, {}, {3, 4}, {3, 4, 5}, {4, 5, 6}],
        ),
        # Packs of 3, C = 5: step ceil(6 / 2) = 3, so 0, 3, 5.
        (dict(rows=6, range_=5, packing=3, stepping=True), [{}, {0}, {0, 1}, {}, {1, 2, 3}, {0, 1, 2, 3, 4}]),
        # Packs of 4, C = 1: step ceil(2 / 3) = 1, so 0, 1, 1, 1.
        (dict(rows=4, range_=1, packing=4, stepping=True), [{}, {0}, {1}, {2}]),
    ],
)
def test_published_plans(arguments, table):
    assert context_rows(crossbatch.published_plan(**arguments)) == [set(rows) for rows in table]


def test_longllama_plans():
    assert crossbatch.longllama_3b_plan(8) == crossbatch.published_plan(8, 3, 4, True)
    # (positives, negatives) of the rows of a pack that is preceded by others enough.
    for make, first, wanted in (
        (crossbatch.longllama_3b_plan, 4, [(0, 0), (1, 1), (2, 1), (3, 0)]),
        (crossbatch.longllama_7b_plan, 8, [(0, 0), (1, 2), (2, 5), (3, 4)]),
    ):
        table = context_rows(make(12))[first : first + 4]
        assert [(len({r for r in rows if r >= first}), len({r for r in rows if r < first})) for rows in table] == wanted
    assert context_rows(crossbatch.longllama_7b_plan(8)) == [
        set(), {0}, {0, 1}, {0, 1, 2}, set(), {2, 3, 4}, {0, 1, 2, 3, 4, 5}, {0, 1, 2, 3, 4, 5, 6},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "table"),
    [
        # Documents 0, 1, 2: rows 0-2 earlier windows, rows 3-5 current ones, which read their own first and wrap.
        (dict(rows=6, contexts=2), [[], [], [], [0, 1], [1, 2], [2, 0]]),
        (dict(rows=6, contexts=3), [[], [], [], [0, 1, 2], [1, 2, 0], [2, 0, 1]]),
        (dict(rows=4, contexts=1), [[], [], [0], [1]]),
        # Two earlier windows of documents 0, 1: rows 0-1 the oldest, 2-3 the nearest, which come first.
        (dict(rows=6, contexts=1, windows=2), [[], [], [], [], [2, 0], [3, 1]]),
        (dict(rows=6, contexts=2, windows=2), [[], [], [], [], [2, 3, 0, 1], [3, 2, 1, 0]]),
    ],
)
def test_block_plans(arguments, table):
    plan = crossbatch.block_plan(**arguments)
    assert [[int(row) for row in rows if row >= 0] for rows in plan.context_rows] == table
    reading = [bool(rows) for rows in table]
    np.testing.assert_array_equal(crossbatch.loss_rows(plan, loss_on_previous=False), reading)
    np.testing.assert_array_equal(crossbatch.loss_rows(plan, loss_on_previous=True), [True] * len(table))


@pytest.mark.parametrize("plan", [crossbatch.block_plan(12, 3), crossbatch.block_plan(18, 2, windows=2)])
def test_dealt_plans_are_the_same_plan_of_rows_in_another_order(plan):
    table = context_rows(plan)
    for shards in (1, 2, 3, 6):
        dealt = plan.dealt(shards)
        assert sorted(dealt.order) == list(range(plan.rows))
        # Every shard has as many rows of each block, one block after another.
        blocks = (dealt.order // plan.block_rows).reshape(shards, plan.blocks, -1)
        np.testing.assert_array_equal(blocks, np.broadcast_to(np.arange(plan.blocks)[:, None], blocks.shape))
        at = {int(row): place for place, row in enumerate(dealt.order)}
        for place, row in enumerate(dealt.order):
            assert context_rows(dealt)[place] == {at[other] for other in table[row]}
        np.testing.assert_array_equal(
            crossbatch.loss_rows(dealt, False), crossbatch.loss_rows(plan, False)[dealt.order]
        )
    with pytest.raises(ValueError, match="over 4 shards; wanted a multiple"):
        plan.dealt(4)
    assert crossbatch.longllama_3b_plan(8).dealt(4) == crossbatch.longllama_3b_plan(8)


def test_loss_counts_every_row_of_a_packed_batch():
    for on_previous in (False, True):
        assert crossbatch.loss_rows(crossbatch.longllama_3b_plan(8), on_previous).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: crossbatch.published_plan(6, 2, 4), "batch is 6 rows; wanted a multiple of packing, 4"),
        (lambda: crossbatch.longllama_3b_plan(6), "batch is 6 rows; wanted a multiple of packing, 4"),
        (lambda: crossbatch.published_plan(0, 2), "batch is 0 rows"),
        (lambda: crossbatch.published_plan(6, -1), "range_ is -1"),
        (lambda: crossbatch.published_plan(6, 1, 0), "packing 0; wanted"),
        (lambda: crossbatch.pack_plan(2, (0, -1)), "no negative number"),
        (lambda: crossbatch.pack_plan(2, ()), "wanted a multiple of packing, 0"),
        (lambda: crossbatch.block_plan(5, 1), "batch is 5 rows; wanted a multiple of 2"),
        (lambda: crossbatch.block_plan(8, 1, 2), "batch is 8 rows; wanted a multiple of 3"),
        (lambda: crossbatch.block_plan(6, 4), r"contexts is 4; wanted 1\.\.3"),
        (lambda: crossbatch.block_plan(6, 0), r"contexts is 0; wanted 1\.\.3"),
        (lambda: crossbatch.block_plan(6, 1, 0), "0 earlier windows"),
    ],
)
def test_plans_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_that_is_not_the_plans():
    x = np.zeros((3, 2, T, 4), np.float32)
    with pytest.raises(ValueError, match="batch has 3 rows; the crossbatch plan is for 4"):
        crossbatch.crossbatch_attention(crossbatch.published_plan(4, 1), x, x, x, None, None, scale=1.0)


# The model under a plan, against the whole model in NumPy float64.


def tokens(rows, seed=0, vocab=CONFIG.vocab_size):
    return np.random.default_rng(seed).integers(0, vocab, (rows, T)).astype(np.int32)


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, crossbatch.published_plan(4, 2)),
        ({"n_layers": 3, "mem_layers": (0, 2), "n_kv_heads": 4}, crossbatch.published_plan(4, 3, 4, True)),
        ({"mem_layers": (0, 1), "n_kv_heads": 1, "tie_embeddings": True}, crossbatch.block_plan(6, 2)),
        ({"mem_positionals": False, "qk_norm": True}, crossbatch.block_plan(6, 2, windows=2)),
        ({"mem_layers": (0,), "rope_base": 100.0}, crossbatch.longllama_7b_plan(8)),
    ],
    ids=["published", "stepping", "blocks", "small model", "7b"],
)
def test_logits_are_those_of_the_float64_model(changes, plan):
    config = CONFIG.replace(**changes)
    params, tokens_BT = reference.random_params(config), tokens(plan.rows)
    found = FORWARD(config, params, tokens_BT, plan)
    wanted = reference.forward(config, params, tokens_BT, context_rows=plan.context_rows)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    # The contexts count: without them rows that read some are elsewhere.
    alone = reference.forward(config, params, tokens_BT)
    reads = np.array([bool(rows) for rows in context_rows(plan)])
    assert np.abs(alone - wanted).max((1, 2))[reads].min() > 0.05
    np.testing.assert_allclose(np.asarray(found)[~reads], alone[~reads], atol=2e-4)


def segments(rows):
    """Two documents in row 0, padding behind in row 1, before in row 2, nothing but padding in row 3."""
    ids = np.ones((rows, T), np.int32)
    ids[0, 3:], ids[1, 4:], ids[2, :2], ids[3] = 2, 0, 0, 0
    return ids


@pytest.mark.parametrize(
    "plan", [crossbatch.published_plan(6, 3), crossbatch.block_plan(6, 2)], ids=["published", "blocks"]
)
def test_segments_and_padding_are_those_of_the_float64_model(plan):
    params, tokens_BT, ids = reference.random_params(CONFIG), tokens(6), segments(6)
    found = np.asarray(FORWARD(CONFIG, params, tokens_BT, plan, ids))
    wanted = reference.forward(CONFIG, params, tokens_BT, segment_BT=ids, context_rows=plan.context_rows)
    np.testing.assert_allclose(found[ids > 0], wanted[ids > 0], atol=2e-4)
    assert np.all(np.isfinite(found))
    # Padding is seen by nobody: other tokens there change nothing elsewhere.
    other = np.where(ids > 0, tokens_BT, (tokens_BT + 7) % CONFIG.vocab_size)
    np.testing.assert_array_equal(np.asarray(FORWARD(CONFIG, params, other, plan, ids))[ids > 0], found[ids > 0])
    # One document a row is as good as no ids.
    found = FORWARD(CONFIG, params, tokens_BT, plan, np.full((6, T), 5, np.int32))
    wanted = reference.forward(CONFIG, params, tokens_BT, context_rows=plan.context_rows)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


# Gradients.


@pytest.mark.parametrize(
    ("changes", "plan", "with_segments", "remat"),
    [
        ({"mem_layers": (0, 1)}, crossbatch.published_plan(4, 3, 2, True), False, "none"),
        (
            {"mem_positionals": False, "qk_norm": True, "tie_embeddings": True},
            crossbatch.block_plan(4, 2),
            True,
            "full",
        ),
        ({"n_kv_heads": 4}, crossbatch.published_plan(4, 2), True, "dots"),
    ],
    ids=["published", "small model", "segments"],
)
def test_gradients_are_finite_differences_of_the_float64_model(changes, plan, with_segments, remat):
    config = CONFIG.replace(**changes)
    params, tokens_BT = reference.random_params(config), tokens(4)
    ids = segments(4) if with_segments else None
    weight = np.random.default_rng(1).standard_normal((4, T, config.vocab_size))
    weight = weight if ids is None else weight * (ids > 0)[..., None]

    def loss(params):
        hidden = model.forward(config, params, tokens_BT, plan=plan, segment_ids_BT=ids, remat=remat)
        logits = model.logits(config, params, hidden)
        return jnp.sum(jax.nn.log_softmax(logits) * weight.astype(np.float32))

    def wanted_loss(params):
        logits = reference.forward(config, params, tokens_BT, segment_BT=ids, context_rows=plan.context_rows)
        return np.sum((logits - np.log(np.exp(logits).sum(-1, keepdims=True))) * weight)

    grads = jax.jit(jax.grad(loss))(params)
    leaves, treedef = jax.tree.flatten_with_path(params)
    assert jax.tree.structure(grads) == treedef
    step = 1e-5
    for i, ((path, leaf), grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        direction = np.random.default_rng(i).standard_normal(leaf.shape)

        def moved(by, i=i, leaf=leaf, direction=direction):
            changed = [leaf + by * direction if j == i else x for j, (_, x) in enumerate(leaves)]
            return wanted_loss(jax.tree.unflatten(treedef, changed))

        wanted = (moved(step) - moved(-step)) / (2 * step)
        size = np.linalg.norm(grad)
        assert size > 0.1, jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.sum(np.asarray(grad, np.float64) * direction),
            wanted,
            atol=2e-4 * size,
            err_msg=jax.tree_util.keystr(path),
        )


@pytest.mark.parametrize(
    "plan", [crossbatch.published_plan(4, 3, 2, True), crossbatch.block_plan(4, 2)], ids=["published", "blocks"]
)
def test_grouped_queries_equal_heads_repeated_in_values_and_gradients(plan):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((4, heads, T, 6)).astype(np.float32) for heads in (6, 2, 2))
    direction = rng.standard_normal(q.shape).astype(np.float32)
    angles = attention.rotary_angles(T, 6, 10000.0)

    def grouped(q, k, v):
        o = crossbatch.crossbatch_attention(plan, q, k, v, angles, jnp.asarray(segments(4)), scale=0.4)
        return jnp.sum(o * direction), o

    def repeated(q, k, v):
        return grouped(q, jnp.repeat(k, 3, axis=1), jnp.repeat(v, 3, axis=1))

    both = jax.jit(lambda *a: [jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*a) for f in (grouped, repeated)])
    first, second = both(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), first, second)


@pytest.mark.parametrize(
    ("length", "plan", "mem_positionals", "with_segments"),
    [
        (40, crossbatch.published_plan(4, 3, 2, True), True, True),
        (41, crossbatch.block_plan(6, 3), False, True),
        (50, crossbatch.published_plan(4, 3, 2, True), True, False),
    ],
)
def test_long_windows_in_values_and_gradients(monkeypatch, length, plan, mem_positionals, with_segments):
    # Long enough for windows to be read in halves and contexts in groups: 2 and 1, or one by one.
    monkeypatch.setattr(reading, "_SOURCE_KEYS", 80)
    B, H, K, scale = plan.rows, 2, 4, 0.5
    rng = np.random.default_rng(0)
    q, k, v = arrays = [rng.standard_normal((B, heads, length, K)).astype(np.float32) for heads in (H, 1, 1)]
    ids = np.repeat(rng.integers(1, 4, (B, 4)).cumsum(1), -(-length // 4), axis=1)[:, :length].astype(np.int32)
    ids[1, length - 7 :], ids[2, :5] = 0, 0
    ids = ids if with_segments else np.ones_like(ids)
    weight = rng.standard_normal(q.shape) * (ids > 0)[:, None, :, None]
    angles = attention.rotary_angles(length, K, 100.0) if mem_positionals else None

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def found(q, k, v):
        given = jnp.asarray(ids) if with_segments else None
        o = crossbatch.crossbatch_attention(plan, q, k, v, angles, given, scale=scale)
        return jnp.sum(o * weight.astype(np.float32)), o

    def wanted(q, k, v):
        theta = 100.0 ** (-2 * np.arange(K // 2) / K) * mem_positionals
        q, k, v = (np.repeat(np.swapaxes(x, 1, 2).astype(np.float64), H // x.shape[1], axis=2) for x in (q, k, v))
        start, valid = np.zeros((B, length), int), np.ones((B, length), bool)
        o = reference.attend_rows(q, k, v, theta, scale, start, valid, ids, context_rows=plan.context_rows)
        return np.swapaxes(o, 1, 2)

    (_, o), grads = found(q, k, v)
    real = np.broadcast_to((ids > 0)[:, None, :, None], q.shape)
    np.testing.assert_allclose(np.asarray(o)[real], wanted(q, k, v)[real], atol=2e-5)
    for i, grad in enumerate(grads):
        direction = np.random.default_rng(i).standard_normal(grad.shape)
        moved = lambda by, i=i, d=direction: wanted(*(x + by * d if j == i else x for j, x in enumerate(arrays)))
        slope = np.sum((moved(1e-5) - moved(-1e-5)) * weight) / 2e-5
        np.testing.assert_allclose(np.sum(grad * direction), slope, atol=1e-4 * np.linalg.norm(grad))


def reachable(plan, memory_layers):
    """bool [B, B]: rows whose tokens a row can depend on, through so many memory layers."""
    reads = np.eye(plan.rows, dtype=bool)
    for row, rows in enumerate(context_rows(plan)):
        reads[row, list(rows)] = True
    out = np.eye(plan.rows, dtype=int)
    for _ in range(memory_layers):
        out = reads.astype(int) @ out
    return out > 0


@pytest.mark.parametrize(
    ("mem_layers", "plan"),
    [
        ((1,), crossbatch.published_plan(4, 2)),
        ((0, 1), crossbatch.published_plan(4, 1)),
        ((0, 1), crossbatch.block_plan(6, 1, windows=2)),
    ],
    ids=["published", "two memory layers", "three windows"],
)
def test_what_a_position_depends_on_by_gradient(mem_layers, plan):
    # Every position has a token of its own, so that the embedding's gradient is the gradient by position.
    B, length = plan.rows, 4
    config = CONFIG.replace(vocab_size=B * length, mem_layers=mem_layers)
    params = reference.random_params(config)
    tokens_BT = np.arange(B * length, dtype=np.int32).reshape(B, length)
    direction = np.random.default_rng(0).standard_normal(config.d_model).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def dependence(embedding):
        hidden = model.forward(config, {**params, "embed": {"embedding": embedding}}, tokens_BT, plan=plan)
        return hidden @ direction

    depends = np.abs(dependence(params["embed"]["embedding"])).max(-1).reshape(B, length, B, length)
    rows = reachable(plan, len(mem_layers))
    for b, other in np.ndindex(B, B):
        # Its own row up to itself; of rows it reads everything, as they are windows before it; of others nothing.
        wanted = np.tri(length, dtype=bool) if b == other else np.full((length, length), rows[b, other])
        np.testing.assert_array_equal(depends[b, :, other] > 1e-9, wanted, err_msg=f"row {b} of row {other}")
        assert not np.any(depends[b, :, other][~wanted])


def test_no_plan_is_every_row_alone():
    params, tokens_BT = reference.random_params(CONFIG), tokens(4)
    found = jax.jit(functools.partial(model.forward, CONFIG))(params, tokens_BT)
    np.testing.assert_allclose(found, reference.forward(CONFIG, params, tokens_BT, with_head=False), atol=1e-4)
