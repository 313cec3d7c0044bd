"""Memory as an object, on one device and dealt to several: what is in it and what is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import numpy_reference as reference
import pytest
from test_memory import SCALE, brute_force
from test_memory_sharded import draw, held, model_config

from fot_jax import memory, sharding
from fot_jax.generate import prefill
from fot_jax.generate.inspection import recall, retrieved
from fot_jax.generate.saved import load_reader, save_reader
from fot_jax.memory.stored import loaded

SHAPE = 2, 3, 4, 2, 4, 64  # B, T, H, G, K, M


def mesh(devices, ways):
    return (
        jax.set_mesh(sharding.make_mesh({"data": 1, "context": ways}, devices))
        if ways > 1
        else contextlib.nullcontext()
    )


def integers(seed, shape=SHAPE):
    q, keys, values = draw(np.random.default_rng(seed), shape, 6)
    q[..., 0], keys[..., 0], values[..., 0] = 0, 127, 127  # exact in int8, too
    return q, keys, values


def contents(mem):
    """Keys of a memory of one layer, [B, G, M, K] in the order of slots."""
    return np.swapaxes(np.asarray(loaded(jax.tree.map(mem.deal.in_order, mem.keys[0]))), 2, 3)


@functools.partial(jax.jit, static_argnames="k")
def read(q, mem, k=None):
    arrays, options = (q, mem.keys[0], mem.values[0], mem.length_B), dict(deals=mem.deals, seen=mem.each_seen)
    if k is None:
        return memory.dense(*arrays, scale=SCALE, **options)
    return memory.topk(*arrays, k=k, scale=SCALE, **options), memory.search(*arrays[:2], arrays[3], k=k, **options)


@pytest.mark.parametrize("ways", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("T", [1, 3])
def test_only_what_is_allowed_is_read(devices, ways, dtype, T):
    q, keys, values = integers(0)
    q, length_B = q[:, :, :T], np.array([64, 37], np.int32)
    seen_BM = np.random.default_rng(1).random((2, 64)) < 0.3
    allowed = [np.flatnonzero(row[:n]) for row, n in zip(seen_BM, length_B, strict=True)]
    with mesh(devices, ways):
        mem = held(model_config(2, 4, 4, dtype=dtype), keys, values, length_B)
        mem = jax.jit(memory.restrict)(mem, seen_BM)
        (partial, slots, scores), (found, _) = read(q, mem, 5)
        whole = read(q, mem)
        again = read(q, memory.restrict(mem, None), 5)[0][1]
        with pytest.raises(ValueError, match=r"mask of slots is \(2, 63\); wanted \(2, 64\)"):
            memory.restrict(mem, seen_BM[:, 1:])
    np.testing.assert_array_equal(found, slots)
    np.testing.assert_array_equal(again, brute_force(q, keys, values, length_B, 5, SCALE)[0])
    for b, slot in enumerate(allowed):
        rows = [x[b : b + 1, :, slot] for x in (keys, values)]
        for k, one in ((5, partial), (len(slot), whole)):
            want = brute_force(q[b : b + 1], *rows, np.array([len(slot)]), k, SCALE)
            np.testing.assert_allclose(one.o_BHTK[b], want[2][0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(one.lse_BHT[b], want[3][0], atol=1e-5)
            if k == 5:
                np.testing.assert_array_equal(slots[b], slot[want[0][0]])


@pytest.mark.parametrize("ways", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_merged_memories_follow_one_another(devices, ways, dtype):
    (_, first, _), (_, second, _) = integers(2), draw(np.random.default_rng(3), (*SHAPE[:5], 48), 6)
    config = model_config(2, 4, 4, dtype=dtype)
    lengths = np.array([10, 33], np.int32), np.array([48, 7], np.int32)
    with mesh(devices, ways):
        mem, other = held(config, first, first, lengths[0]), held(config, second, second, lengths[1])
        stored = contents(other)  # rounded in int8
        merged = jax.jit(memory.merge)(mem, other)
        np.testing.assert_array_equal(merged.length_B, lengths[0] + lengths[1])
        found = contents(merged)
        taken = jax.jit(memory.take, static_argnums=2)(merged, 5, 20)
        wrong = memory.init_memory(model_config(1, 4, 4, dtype=dtype), 2, 16)
        with pytest.raises(ValueError, match=r"are \(2, 1, 4, 16\); wanted \(2, 2, 4\), as the cache has"):
            memory.merge(mem, wrong)
    np.testing.assert_array_equal(np.swapaxes(loaded(taken[0][0]), 2, 3), found[:, :, 5:25])
    for b, (n, m) in enumerate(zip(*lengths, strict=True)):
        np.testing.assert_array_equal(found[b, :, :n], first[b, :, :n])
        np.testing.assert_array_equal(found[b, :, n : n + m], stored[b, :, :m])


@pytest.mark.parametrize("ways", [1, 4])
def test_what_is_evicted_takes_its_mask_along(devices, ways):
    q, keys, values = integers(4)
    seen_BM = np.random.default_rng(5).random((2, 64)) < 0.5
    with mesh(devices, ways):
        mem = memory.restrict(held(model_config(2, 4, 4), keys, values, np.array([60, 64], np.int32)), seen_BM)
        after = jax.jit(memory.evict_oldest)(mem, np.array([3, 0], np.int32))
        gone_B = np.asarray(mem.length_B - after.length_B)
        assert gone_B[0] >= 3 and gone_B[1] == 0 and (ways > 1 or gone_B[0] == 3)
        slots = np.asarray(read(q, after, 4)[0][1])
    for b, n in enumerate(gone_B):
        assert all(seen_BM[b, n + slot] for slot in slots[b].ravel() if slot >= 0)
        want = np.flatnonzero(seen_BM[b, n : 60 if b == 0 else 64])
        found = brute_force(q[b : b + 1], *(x[b : b + 1, :, n + want] for x in (keys, values)), [len(want)], 4, SCALE)
        np.testing.assert_array_equal(slots[b], want[found[0][0]])


@pytest.mark.parametrize("ways", [1, 4])
def test_pages_are_edited_as_one_memory(devices, ways):
    config = model_config(2, 4, 4, window=16)
    _, keys, values = integers(6)
    length_B, seen_BM = np.array([60, 21], np.int32), np.random.default_rng(7).random((2, 64)) < 0.5
    order = lambda mem: np.concatenate([contents(page) for page in mem.pages], axis=2)
    with mesh(devices, ways):
        pages = memory.Pages(tuple(memory.place(memory.init_memory(config, 2, n)) for n in (16, 16, 32)))
        merged = jax.jit(memory.merge)(pages, held(config, keys, values, length_B))
        np.testing.assert_array_equal(merged.length_B, length_B)
        found = order(merged)
        after = jax.jit(memory.evict_oldest)(memory.restrict(merged, seen_BM), np.array([5, -2], np.int32))
        np.testing.assert_array_equal(after.length_B, [55, 21])
        evicted, seen = order(after), np.asarray(memory.seen_slots(after))
        np.testing.assert_array_equal(jax.jit(memory.clear)(merged, np.array([True, False])).length_B, [0, 21])
        with pytest.raises(ValueError, match="the other memory is restricted to some slots"):
            memory.merge(merged, after)
        outside, _ = jax.jit(memory.take, static_argnums=2)(merged, np.array([-2, 62], np.int32), 4)
    for b, n in enumerate(length_B):
        np.testing.assert_array_equal(found[b, :, :n], keys[b, :, :n])
    np.testing.assert_array_equal(evicted[0, :, :55], keys[0, :, 5:60])
    np.testing.assert_array_equal(evicted[1, :, :21], keys[1, :, :21])
    np.testing.assert_array_equal(seen[0], np.append(seen_BM[0, 5:], [True] * 5))
    np.testing.assert_array_equal(seen[1], seen_BM[1])
    outside = np.swapaxes(outside[0], 2, 3)
    assert not outside[0, :, :2].any() and not outside[1, :, 2:].any()
    np.testing.assert_array_equal(outside[0, :, 2:], keys[0, :, :2])


def test_a_memory_of_other_devices_is_not_written(devices):
    with mesh(devices, 8):
        mem = memory.init_memory(model_config(1, 1, 2), 1, 64)
    x = [np.ones((1, 1, 2, 4), np.float32)]
    with mesh(devices, 4), pytest.raises(ValueError, match="memory was dealt to 8 devices; the mesh has 4 for it"):
        memory.append(mem, x, x)
    with pytest.raises(ValueError, match="memory was dealt to 8 devices; the mesh has 1 for it"):
        memory.append(mem, x, x)


def test_a_mask_is_saved(tmp_path):
    config = model_config(2, 4, 4).replace(last_context_length=3)
    params, tokens_BT = reference.random_params(config), np.ones((2, 30), np.int32)
    reader = prefill(config, params, tokens_BT)
    seen_BM = np.random.default_rng(0).random((2, reader.mem.capacity)) < 0.5
    reader = dataclasses.replace(reader, mem=memory.restrict(reader.mem, seen_BM))
    save_reader(tmp_path / "read", config, params, reader)
    found = np.asarray(memory.seen_slots(load_reader(tmp_path / "read", config, params, memory_capacity=64).mem))
    n = min(64, seen_BM.shape[1])
    np.testing.assert_array_equal(found[:, :n], seen_BM[:, :n])
    assert found[:, n:].all()


@pytest.mark.parametrize("ways", [1, 4])
def test_what_is_retrieved_is_what_attention_weighs_most(devices, ways):
    """A memory layer's k best slots, and the tokens there: with k retrieved, reading the same k is the same model."""
    config = model_config(2, 4, 4, layers=2).replace(eos_id=None, last_context_length=3)
    params = reference.random_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, 11, (2, 60)).astype(np.int32)
    with mesh(devices, ways):
        reader = prefill(config, params, tokens_BT)
        found = retrieved(config, params, reader, tokens_BT[:, :2], k=4, read_BT=tokens_BT)
        with pytest.raises(ValueError, match="tokens have 1 rows; wanted the reader's 2"):
            retrieved(config, params, reader, tokens_BT[:1, :2], k=4)
        with pytest.raises(ValueError, match=r"tokens read are \(2, 9\); wanted 2 rows of 57 at least"):
            retrieved(config, params, reader, tokens_BT[:, :2], k=4, read_BT=tokens_BT[:, :9])
        with pytest.raises(ValueError, match="6 tokens follow 3 of the open window; wanted at most 8 together"):
            retrieved(config, params, reader, tokens_BT[:, :6], k=4)
        held_keys = [
            np.concatenate([page.deal.in_order(np.asarray(page.keys[m])) for page in reader.mem.pages], axis=3)
            for m in range(2)
        ]
    assert [one.layer for one in found] == [0, 1]
    for one in found:
        assert one.slots_BHTN.shape == one.scores_BHTN.shape == (2, 4, 2, 4) and np.all(one.slots_BHTN < 57)
        np.testing.assert_array_equal(one.tokens_BHTN, np.stack([row[s] for row, s in zip(tokens_BT, one.slots_BHTN)]))
        assert np.all(np.diff(one.scores_BHTN, axis=-1) <= 0)
    # The first layer's queries are those of its embedding alone: computed here in float64.
    block = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["segment_0"]["memory"])
    x = np.asarray(params["embed"]["embedding"], np.float64)[tokens_BT[:, :2]]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * block["attention_norm"]["scale"]
    q = np.einsum("btd,dhk->bhtk", x, block["attention"]["q"])
    angle = np.arange(3, 5)[:, None] * config.rope_base ** (-np.arange(0, 4, 2) / 4)
    a, b = q[..., :2], q[..., 2:]
    q = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)
    s = np.einsum("bhtk,bhks->bhts", q, np.repeat(held_keys[0][..., :57].astype(np.float64), 2, axis=1))
    np.testing.assert_allclose(found[0].scores_BHTN, -np.sort(-s, axis=-1)[..., :4], rtol=1e-4, atol=1e-5)


def test_recall_is_measured_on_the_same_queries(monkeypatch):
    config = model_config(2, 4, 4, layers=2).replace(eos_id=None, last_context_length=3, vocab_size=13)
    params = reference.random_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, 13, (2, 60)).astype(np.int32)
    reader, reading = prefill(config, params, tokens_BT), memory.Reading("approximate", 4)
    assert recall(config, params, reader, tokens_BT[:, :2], reading) == {0: 1.0, 1: 1.0}  # as a CPU makes it
    with pytest.raises(ValueError, match="memory reading is 'topk'; wanted 'approximate'"):
        recall(config, params, reader, tokens_BT[:, :2], memory.Reading("topk", 4))

    def without_the_best(s, k, recall_target):
        values, index = jax.lax.top_k(s, k + 1)
        return values[..., 1:], index[..., 1:]

    monkeypatch.setattr(jax.lax, "approx_max_k", without_the_best)
    found = recall(config, params, reader, tokens_BT[:, :2], memory.Reading("approximate", 2))  # a program of its own
    assert found == {0: 0.5, 1: 0.5}
