"""Top-k of memories of any shape, format, layout and number of devices: what a full sort in float64 finds."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from test_memory import SCALE, brute_force
from test_memory_sharded import held, model_config

from fot_jax import memory, sharding
from fot_jax.memory.stored import empty, loaded, stored


@dataclasses.dataclass(frozen=True)
class Case:
    """A memory, what is asked of it, and where it lies."""

    rows: int
    queries: int
    kv_heads: int
    repeats: int
    size: int
    slots: int  # for each of 8 devices
    k: int
    fills: tuple[float, ...]
    spread: int | None  # of whole numbers; None: real ones
    dtype: str
    paged: bool
    score_bytes: int | None
    mesh: tuple[int, int]  # devices over heads and over slots
    seed: int


@st.composite
def cases(draw, most_slots=40):
    rows, kv_heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    slots = draw(st.integers(1, most_slots))
    return Case(
        rows=rows,
        queries=draw(st.sampled_from([1, 1, 2, 5])),
        kv_heads=kv_heads,
        repeats=draw(st.sampled_from([1, 2, 3])),
        size=draw(st.sampled_from([2, 4, 10])),
        slots=slots,
        k=draw(st.one_of(st.integers(1, 12), st.just(8 * slots + 3))),
        fills=tuple(draw(st.lists(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]), min_size=rows, max_size=rows))),
        spread=draw(st.sampled_from([None, None, 0, 1, 9])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "int8"])),
        paged=draw(st.booleans()),
        score_bytes=draw(st.sampled_from([None, 1, 5000])),
        mesh=draw(st.sampled_from([(1, 8), (1, 2), (2, 4), (2, 1)])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@functools.partial(jax.jit, static_argnames=("k", "score_bytes"))
def read(q, mem, *, k, score_bytes):
    arrays = q, mem.keys[0], mem.values[0], mem.length_B
    return memory.topk(*arrays, k=k, scale=SCALE, score_bytes=score_bytes, deals=mem.deals, seen=mem.each_seen)


def check(devices, case):
    rng = np.random.default_rng(case.seed)
    B, G, K, M = case.rows, case.kv_heads, case.size, 8 * case.slots
    shapes = (B, G * case.repeats, case.queries, K), (B, G, M, K), (B, G, M, K)
    if case.spread is None:
        q, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    else:
        q, keys, values = (rng.integers(-case.spread, case.spread + 1, shape).astype(np.float32) for shape in shapes)
    length_B = np.array([round(fill * M) for fill in case.fills], np.int32)
    config = model_config(G, G * case.repeats, K, window=case.slots, dtype=case.dtype)

    found = []
    for heads, ways in ((1, 1), case.mesh):
        with jax.set_mesh(sharding.make_mesh({"data": 1, "tensor": heads if G % heads == 0 else 1, "context": ways})):
            mem = held(config, keys, values, length_B, pieces=(7, 1, 100), paged=case.paged)
            found.append(jax.device_get(read(q, mem, k=case.k, score_bytes=case.score_bytes)))
    (partial, slots, s), (one, slots_of_one, _) = found[1], found[0]

    lies = lambda x: np.swapaxes(np.float32(loaded(stored(np.swapaxes(x, 2, 3), empty((1,) * 4, case.dtype)))), 2, 3)
    keys, values = lies(keys), lies(values)
    want_slots, want_s, want_o, want_lse = brute_force(q, keys, values, length_B, case.k, SCALE)
    exact = case.spread is not None and case.dtype != "int8"  # int8 has scales that float32 rounds the products of
    if exact:
        np.testing.assert_array_equal(slots, want_slots)
        np.testing.assert_array_equal(s, want_s)
        np.testing.assert_array_equal(slots_of_one, want_slots)
    there = want_slots >= 0
    np.testing.assert_array_equal(slots >= 0, there)
    np.testing.assert_allclose(s[there], want_s[there], rtol=1e-5, atol=1e-5)
    # The slots that are named have these scores, each is named once, and averages are of them.
    s_BHTM = np.einsum("bhtk,bhmk->bhtm", np.float64(q), np.repeat(np.float64(keys), case.repeats, axis=1))
    of_named = np.take_along_axis(s_BHTM, np.maximum(slots, 0), axis=3)
    np.testing.assert_allclose(of_named[there], want_s[there], rtol=1e-5, atol=1e-5)
    for row, filled in zip(slots.reshape(-1, slots.shape[3]), there.reshape(-1, slots.shape[3]), strict=True):
        assert len(set(row[filled])) == filled.sum()
    np.testing.assert_allclose(partial.lse_BHT, want_lse, atol=1e-5)
    if exact or (slots == want_slots).all():
        np.testing.assert_allclose(partial.o_BHTK, want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(slots, slots_of_one)
    np.testing.assert_allclose(partial.o_BHTK, one.o_BHTK, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=5)
@hypothesis.given(cases())
def test_a_full_sort_finds_the_same(devices, case):
    check(devices, case)


@pytest.mark.slow
@hypothesis.settings(max_examples=100)
@hypothesis.given(cases(most_slots=700))
def test_a_full_sort_finds_the_same_many_times(devices, case):
    check(devices, case)


def test_slots_may_be_split_over_several_axes(devices, monkeypatch):
    monkeypatch.setitem(sharding.AXES, "memory", ("fsdp", "context"))
    monkeypatch.setitem(sharding.AXES, "batch", "data")
    rng = np.random.default_rng(0)
    q, keys, values = (rng.integers(-2, 3, size).astype(np.float32) for size in ((2, 4, 3, 4), *[(2, 2, 64, 4)] * 2))
    length_B = np.array([51, 20], np.int32)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 2, "context": 4}, devices)):
        mem = held(model_config(2, 4, 4), keys, values, length_B, pieces=(9, 31), append=jax.jit(memory.append))
        assert mem.deal.ways == 8 and mem.keys[0].sharding.shard_shape((2, 2, 4, 64)) == (2, 2, 4, 8)
        arrays = q, mem.keys[0], mem.values[0], mem.length_B
        of = dict(scale=SCALE, deals=mem.deals)
        partial, slots, s = jax.jit(lambda *x: memory.topk(*x, k=6, **of))(*arrays)
        whole = jax.jit(lambda *x: memory.dense(*x, **of))(*arrays)
    want_slots, want_s, want_o, _ = brute_force(q, keys, values, length_B, 6, SCALE)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_array_equal(s, want_s)
    np.testing.assert_allclose(partial.o_BHTK, want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.o_BHTK, brute_force(q, keys, values, length_B, 64, SCALE)[2], rtol=1e-5, atol=1e-5)
