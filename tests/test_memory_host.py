"""Values in the host's memory: what is read, written and taken is what it is with values on the device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from safetensors.numpy import load_file
from test_memory_sharded import draw, model_config, topk

from fot_jax import memory, sharding
from fot_jax.generate import decode, prefill
from fot_jax.generate.saved import load_reader, save_reader
from fot_jax.memory import host

APPEND = jax.jit(memory.append, donate_argnums=0)
DTYPES = ("float32", "bfloat16", "int8")


def kinds(mem):
    """Memory kinds of keys, and of values; of int8, of the numbers."""
    of = lambda buffers: {getattr(x, "numbers", x).sharding.memory_kind for page in buffers for x in page}
    return tuple(of([getattr(page, name) for page in mem.pages]) for name in ("keys", "values"))


def filled(init, keys_BGMK, values_BGMK, counts, on_host):
    """A memory to which rows' tokens were appended in pieces: each row's first, then those that follow."""
    mem = memory.place(init(values_on_host=on_host))
    start = 0
    for count_B in counts:
        size = max(count_B)
        news = [[jnp.swapaxes(x[:, :, start : start + size], 2, 3)] for x in (keys_BGMK, values_BGMK)]
        mem, start = APPEND(mem, *news, jnp.asarray(count_B)), start + size
    return mem


def same_numbers(mem, other):
    """Whether all that is filled is the same."""
    np.testing.assert_array_equal(mem.length_B, other.length_B)
    take = jax.jit(memory.take, static_argnums=2)
    for b in range(mem.length_B.shape[0]):
        size = max(int(mem.length_B[b]), 1)
        for x, y in zip(jax.tree.leaves(take(mem, 0, size)), jax.tree.leaves(take(other, 0, size)), strict=True):
            np.testing.assert_array_equal(x[b], y[b])


def on(devices, ways):
    return jax.set_mesh(sharding.make_mesh({"data": 1, "context": ways}, devices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ways", [1, 8])
def test_topk_gives_what_it_gives_with_values_on_the_device(devices, dtype, ways):
    q, keys, values = draw(np.random.default_rng(0), (2, 3, 4, 2, 16, 2048), None)
    init = functools.partial(memory.init_memory, model_config(2, 4, 16, dtype=dtype), 2, 2048)
    counts = (600, 300), (600, 0), (600, 599)
    with on(devices, ways):
        there, here = (filled(init, keys, values, counts, on_host) for on_host in (True, False))
        assert kinds(there) == ({"device"}, {host.KIND})
        assert kinds(here) == ({"device"}, {"device"})
        same_numbers(there, here)
        searched = memory.search(q, there.keys[0], there.length_B, k=5, deals=there.deals)[0]
        np.testing.assert_array_equal(searched, topk(q, here, k=5)[1])
        for T, k in ((1, 5), (3, 300)):  # values are fetched, and pass through the device
            found, wanted = (topk(q[:, :, :T], mem, k=k) for mem in (there, here))
            assert found[0].o_BHTK.sharding.memory_kind == "device"
            np.testing.assert_allclose(found[0].o_BHTK, wanted[0].o_BHTK, atol=1e-5)
            np.testing.assert_array_equal(found[0].lse_BHT, wanted[0].lse_BHT)
            for x, y in zip(found[1:], wanted[1:], strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [50, 2048])
def test_all_ways_to_add_up_values_agree(monkeypatch, dtype, M):
    rng = np.random.default_rng(1)
    B, G, Q, N, K = 2, 2, 3, 4, 6
    x = jnp.asarray(rng.standard_normal((B, G, K, M)), jnp.float32)
    mem = memory.append(memory.init_memory(model_config(G, G, K, dtype=dtype), B, M, values_on_host=True), [x], [x])
    column, weight = rng.integers(-1, M, (B, G, Q, N)), rng.standard_normal((B, G, Q, N)).astype(np.float32)
    args = mem.values[0], jnp.asarray(column, jnp.int32), jnp.asarray(weight), jnp.full((B,), M)
    v = np.asarray(memory.stored.loaded(memory.take(mem, 0, M)[1][0]), np.float32)
    picked = np.take_along_axis(v[:, :, None], np.maximum(column, 0)[:, :, :, None], axis=4)
    wanted = np.sum(np.where(column >= 0, weight, 0.0)[:, :, :, None] * picked, axis=4)
    for platform, most in (("cpu", 2**20), ("tpu", 2**20), ("cpu", 1)):  # gathered; by tiles; in blocks of `LANES`
        monkeypatch.setattr(sharding, "platform", lambda platform=platform: platform)
        monkeypatch.setattr(host, "BLOCK_BYTES", most)
        found = jax.jit(functools.partial(host.weighted_sum, dtype=jnp.float32, budget=1))(*args)
        np.testing.assert_allclose(found[..., :K], wanted, atol=1e-5)


@pytest.mark.parametrize(("ways", "M"), [(1, 96), (8, 2048)])
def test_a_memory_is_edited_as_with_values_on_the_device(devices, monkeypatch, ways, M):
    monkeypatch.setattr(host, "BLOCK_BYTES", 1)
    _, keys, values = draw(np.random.default_rng(2), (2, 1, 2, 2, 4, M), None)
    init = functools.partial(memory.init_memory, model_config(2, 2, 4, dtype="int8"), 2, M)
    counts = (M // 2, M // 3), (M // 4, 7)
    with on(devices, ways):
        there, here = (filled(init, keys, values, counts, on_host) for on_host in (True, False))
        evict, merge = (jax.jit(f, donate_argnums=0) for f in (memory.evict_oldest, memory.merge))
        evicted = [evict(jax.tree.map(jnp.copy, mem), jnp.asarray([M // 3 + 1, M])) for mem in (there, here)]
        same_numbers(*evicted)
        merged = [merge(mem, other) for mem, other in zip(evicted, (here, there), strict=True)]
        same_numbers(*merged)
        assert kinds(merged[0])[1] == {host.KIND}


@pytest.mark.parametrize("ways", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_a_model_reads_generates_and_saves_with_values_on_the_host(devices, tmp_path, monkeypatch, ways):
    monkeypatch.setattr(memory.cache, "FIRST_PAGE_BYTES", 1)
    config = model_config(2, 4, 4, layers=2).replace(eos_id=None, last_context_length=3, vocab_size=13)
    config = config.replace(window=64)
    params, reading = reference.random_params(config), memory.Reading("topk", 5)
    tokens_BT = np.random.default_rng(3).integers(0, 11, (2, 70)).astype(np.int32)
    found = []
    with on(devices, ways):
        for on_host in (True, False):
            options = dict(memory="topk", k=5, memory_capacity=512, values_on_host=on_host)
            reader = prefill(config, params, tokens_BT, **options)
            assert len(reader.mem.pages) == 4
            tokens, reader = decode(config, params, reader, max_new_tokens=150, reading=reading)
            assert kinds(reader.mem)[1] == {host.KIND if on_host else "device"}
            assert reader.mem.values_on_host == on_host
            found.append(np.asarray(tokens))
            save_reader(tmp_path / str(on_host), config, params, reader)
            loaded = load_reader(tmp_path / str(on_host), config, params, room=5, values_on_host=not on_host)
            assert loaded.mem.values_on_host != on_host
            found.append(np.asarray(decode(config, params, loaded, max_new_tokens=5, reading=reading)[0]))
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])
    there, here = (load_file(tmp_path / str(on_host)) for on_host in (True, False))
    assert there.keys() == here.keys()
    for name, x in there.items():
        np.testing.assert_allclose(x, here[name], atol=1e-5)


def test_what_cannot_be_is_refused(devices, monkeypatch):
    config = model_config(1, 1, 2)
    mem = memory.init_memory(config, 1, 192, values_on_host=True)
    q = jnp.zeros((1, 1, 1, 2))
    arrays = mem.keys[0], mem.values[0], mem.length_B
    with pytest.raises(ValueError, match="values are on the host, of which dense reading would need all; wanted"):
        memory.dense(q, *arrays, scale=1.0)
    none = memory.init_memory(config, 1, 0, values_on_host=True)
    partial, slots, _ = memory.topk(q, none.keys[0], none.values[0], none.length_B, k=2, scale=1.0)
    assert not partial.o_BHTK.any() and (np.asarray(slots) == -1).all()
    monkeypatch.setattr(host, "KIND", "other")
    with pytest.raises(ValueError, match="need memory of kind 'other'; cpu devices have .*'pinned_host'"):
        memory.init_memory(config, 1, 192, values_on_host=True)
    monkeypatch.undo()
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    with pytest.raises(ValueError, match="memory has 192 slots on a device; with values on a TPU's host wanted a mult"):
        memory.init_memory(config, 1, 192, values_on_host=True)
    with pytest.raises(ValueError, match="memory is int8; with values on a TPU's host wanted one of float32, bfloat16"):
        memory.init_memory(model_config(1, 1, 2, dtype="int8"), 1, 256, values_on_host=True)
