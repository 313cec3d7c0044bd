"""Memory dealt to several devices: the same slots, and the same numbers, as on one."""

from __future__ import annotations

import functools
import sys
import unittest.mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from test_memory import SCALE, brute_force, fills

import fot_jax
from fot_jax import memory, sharding
from fot_jax.config import DtypePolicy, ModelConfig
from fot_jax.generate import decode, prefill
from fot_jax.generate.saved import load_reader, save_reader
from fot_jax.memory import cache

# Axes of the mesh: memory alone, over two, four and eight devices; with heads; with rows; with both.
MESHES = {
    "2": {"data": 1, "context": 2},
    "4": {"data": 1, "context": 4},
    "8": {"data": 1, "context": 8},
    "heads": {"data": 1, "tensor": 2, "context": 4},
    "rows": {"data": 2, "context": 4},
    "rows and heads": {"data": 2, "tensor": 2, "context": 2},
}
# B, T, H, G, K, M, k, score_bytes
SHAPES = {
    "one query": (2, 1, 4, 2, 4, 48, 5, None),
    "k beyond a device's slots": (2, 3, 4, 2, 4, 64, 20, None),
    "k beyond all slots": (2, 2, 4, 4, 2, 16, 40, None),
    "blocks of queries and slots": (2, 5, 2, 2, 4, 4096, 6, 1),
    "sub-blocks": (2, 1, 4, 2, 2, 8192, 3, None),
}


def model_config(G, H, K, layers=1, window=8, dtype="float32"):
    sizes = dict(vocab_size=11, d_model=8, d_ff=8, n_layers=layers, n_heads=H, n_kv_heads=G, head_size=K)
    dtypes = DtypePolicy(memory=dtype)
    return ModelConfig(**sizes, window=window, mem_layers=tuple(range(layers)), dtypes=dtypes)


APPEND = jax.jit(memory.append, donate_argnums=0)


def held(config, keys_BGMK, values_BGMK, length_B, pieces=(7, 5, 300), paged=False, append=APPEND):
    """A memory, on the mesh that is set, appended piece by piece with each row's first tokens."""
    B, _, M, _ = keys_BGMK.shape
    with unittest.mock.patch.object(cache, "FIRST_PAGE_BYTES", 1):
        mem = memory.place((memory.init_pages if paged else memory.init_memory)(config, B, M))
    most = min(page.capacity for page in mem.pages)
    done_B, turn = np.zeros(B, np.int32), 0
    while (done_B < length_B).any():
        T = min(pieces[turn % len(pieces)], most)
        count_B = np.minimum(T, length_B - done_B)
        new = []
        for x in (keys_BGMK, values_BGMK):
            rows = [row[:, start : start + T] for row, start in zip(x, done_B)]
            new.append(np.stack([np.pad(row, ((0, 0), (0, T - row.shape[1]), (0, 0))) for row in rows]))
        mem = append(mem, *([jnp.swapaxes(x, 2, 3)] for x in new), count_B)
        done_B, turn = done_B + count_B, turn + 1
    np.testing.assert_array_equal(mem.length_B, length_B)
    return mem


@functools.partial(jax.jit, static_argnames=("k", "score_bytes"))
def topk(q, mem, *, k, score_bytes=None):
    arrays = q, mem.keys[0], mem.values[0], mem.length_B
    return memory.topk(*arrays, k=k, scale=SCALE, score_bytes=score_bytes, deals=mem.deals)


@functools.partial(jax.jit, static_argnames=("score_bytes",))
def dense(q, mem, *, score_bytes=None):
    arrays = q, mem.keys[0], mem.values[0], mem.length_B
    return memory.dense(*arrays, scale=SCALE, score_bytes=score_bytes, deals=mem.deals)


def draw(rng, shape, spread):
    B, T, H, G, K, M = shape
    size = lambda *sizes: rng.integers(-spread, spread + 1, sizes) if spread is not None else rng.standard_normal(sizes)
    return tuple(x.astype(np.float32) for x in (size(B, H, T, K), size(B, G, M, K), size(B, G, M, K)))


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        pytest.param(mesh, name, marks=() if mesh == "8" or name.startswith("k beyond") else pytest.mark.slow)
        for mesh in MESHES
        for name in SHAPES
    ],
)
@hypothesis.settings(max_examples=3)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0, 1, 6]),
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
)
def test_slots_are_those_of_one_device_ties_included(devices, mesh, name, seed, spread, dtype):
    *shape, k, score_bytes = SHAPES[name]
    rng = np.random.default_rng(seed)
    q, keys, values = draw(rng, shape, spread)
    q[..., 0], keys[..., 0], values[..., 0] = 0, 127, 127  # whole numbers then are exact in int8, too
    length_B = fills(rng, shape[0], shape[-1], k)
    config = model_config(shape[3], shape[2], shape[4], dtype=dtype)
    with jax.set_mesh(sharding.make_mesh(MESHES[mesh], devices)):
        mem = held(config, keys, values, length_B)
        assert mem.deal.ways == MESHES[mesh]["context"]
        for x in jax.tree.leaves(mem.keys):
            assert x.sharding.shard_shape(x.shape)[3] == shape[-1] // mem.deal.ways
        partial, slots, scores = topk(q, mem, k=k, score_bytes=score_bytes)
        whole = dense(q, mem, score_bytes=score_bytes)
    want_slots, want_scores, want_o, want_lse = brute_force(q, keys, values, length_B, k, SCALE)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_array_equal(scores, want_scores)
    np.testing.assert_allclose(partial.o_BHTK, want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(partial.lse_BHT, want_lse, atol=1e-5)
    _, _, want_o, want_lse = brute_force(q, keys, values, length_B, shape[-1], SCALE)
    np.testing.assert_allclose(whole.o_BHTK, want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.lse_BHT, want_lse, atol=1e-5)


def test_all_neighbours_may_be_on_one_device(devices):
    with jax.set_mesh(sharding.make_mesh({"data": 1, "context": 8}, devices)):
        config, M, k = model_config(1, 1, 2), 2048, 9
        deal = memory.init_memory(config, 1, M).deal
        number = np.arange(M)
        near = number[np.asarray(deal.device(number)) == 5][40 : 40 + k]
        keys = np.zeros((1, 1, M, 2), np.float32)
        keys[0, 0, near] = 1 + np.arange(k)[:, None]
        mem = held(config, keys, keys, np.array([M], np.int32))
        _, slots, _ = topk(np.ones((1, 1, 1, 2), np.float32), mem, k=k)
    np.testing.assert_array_equal(slots[0, 0, 0], near[::-1])


@pytest.mark.parametrize("T", [1, 3])
def test_real_numbers_give_what_one_device_gives(devices, T):
    shape = 2, T, 4, 2, 16, 2048
    q, keys, values = draw(np.random.default_rng(0), shape, None)
    length_B, config, found = np.array([2048, 700], np.int32), model_config(2, 4, 16), []
    for n in (1, 2, 4, 8):
        with jax.set_mesh(sharding.make_mesh({"data": 1, "context": n}, devices)):
            found.append(jax.device_get(topk(q, held(config, keys, values, length_B), k=32)))
    for other in found[1:]:
        np.testing.assert_array_equal(other[1], found[0][1])
        np.testing.assert_allclose(other[0].o_BHTK, found[0][0].o_BHTK, atol=1e-5)
        np.testing.assert_allclose(other[0].lse_BHT, found[0][0].lse_BHT, atol=1e-5)


def test_whole_rounds_are_evicted(devices):
    config, M = model_config(1, 1, 2), 64
    keys = np.arange(2 * M * 2, dtype=np.float32).reshape(2, 1, M, 2)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "context": 4}, devices)):
        mem = held(config, keys, keys, np.array([60, 20], np.int32))
        round_ = mem.deal.ways * mem.deal.block
        after = jax.jit(memory.evict_oldest)(mem, np.array([1, 100], np.int32))
        np.testing.assert_array_equal(after.length_B, [60 - round_, 0])
        in_order = np.asarray(mem.deal.in_order(after.keys[0]))
        np.testing.assert_array_equal(in_order[0, 0, :, : 60 - round_], keys[0, 0, round_:60].T)
        none = jax.jit(memory.evict_oldest)(mem, np.zeros(2, np.int32))
        np.testing.assert_array_equal(none.keys[0], mem.keys[0])


def test_a_saved_memory_is_read_on_another_number_of_devices(devices, tmp_path):
    config = model_config(2, 4, 4, layers=2).replace(eos_id=None, last_context_length=3)
    params = reference.random_params(config)
    tokens_BT = np.random.default_rng(0).integers(0, 11, (2, 150)).astype(np.int32)
    options = dict(memory="topk", k=5)
    reading = memory.Reading("topk", 5)

    def on(n):
        return jax.set_mesh(sharding.make_mesh({"data": 1, "context": n}, devices))

    def answer(path):
        reader = load_reader(path, config, params, room=40)
        return reader.mem.deals[0].ways, np.asarray(
            decode(config, params, reader, max_new_tokens=40, reading=reading)[0]
        )

    wanted = np.asarray(fot_jax.generate(config, params, tokens_BT, 40, **options))
    with on(8):
        reader = prefill(config, params, tokens_BT, **options)
        save_reader(tmp_path / "eight", config, params, reader)
        np.testing.assert_array_equal(fot_jax.generate(config, params, tokens_BT, 40, **options), wanted)
    save_reader(tmp_path / "one", config, params, prefill(config, params, tokens_BT, **options))
    for name in ("eight", "one"):
        for n in (2, 8):
            with on(n):
                ways, found = answer(tmp_path / name)
            assert ways == n
            np.testing.assert_array_equal(found, wanted)
        assert answer(tmp_path / name)[0] == 1
        np.testing.assert_array_equal(answer(tmp_path / name)[1], wanted)


def test_one_program_of_each_kind_is_for_all_lengths(devices):
    module = sys.modules["fot_jax.generate"]
    compiled = module._extend.programs, module._decode.programs
    sizes = lambda: [module._prefill_in_place._cache_size(), *(count() for count in compiled)]
    config = model_config(2, 4, 4, layers=2).replace(eos_id=None, last_context_length=3, vocab_size=13)
    mesh = sharding.make_mesh({"data": 1, "tensor": 2, "context": 4}, devices)
    with jax.set_mesh(mesh):
        params = jax.device_put(reference.random_params(config), sharding.replicated(mesh))
        before = sizes()
        for length, new in ((9, 3), (100, 30), (31, 5)):
            fot_jax.generate(config, params, np.ones((2, length), np.int32), new)
        assert [after - n for after, n in zip(sizes(), before, strict=True)] == [1, 1, 1]


def test_orders_are_each_others_inverse():
    for ways, block, rounds in ((1, 1, 6), (2, 3, 2), (8, 4, 1), (3, 1, 5)):
        deal, x = memory.Deal(ways, block), np.arange(ways * block * rounds)
        lies = deal.as_dealt(x)
        np.testing.assert_array_equal(deal.in_order(lies), x)
        parts = lies.reshape(ways, -1)
        for device, part in enumerate(parts):
            np.testing.assert_array_equal(deal.slot(device, np.arange(part.size)), part)
            np.testing.assert_array_equal(deal.column(part), np.arange(part.size))
            np.testing.assert_array_equal(deal.device(part), device)
            before = [int(deal.before(jnp.int32(n), device)) for n in range(x.size + 1)]
            np.testing.assert_array_equal(before, np.searchsorted(part, np.arange(x.size + 1)))


def test_what_does_not_fit_is_refused(devices):
    config = model_config(1, 1, 2)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "context": 8}, devices)):
        with pytest.raises(ValueError, match="memory has 12 slots for 8 devices; wanted a multiple"):
            memory.init_memory(config, 1, 12)
        mem = memory.init_memory(config, 1, 16)
    with jax.set_mesh(sharding.make_mesh({"data": 1, "context": 4}, devices)):
        with pytest.raises(ValueError, match="memory was dealt to 8 devices; the mesh has 4 for it: wanted the same"):
            memory.dense(jnp.zeros((1, 1, 1, 2)), mem.keys[0], mem.values[0], mem.length_B, scale=1.0, deals=mem.deals)
