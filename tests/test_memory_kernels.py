"""The kernels of a TPU, acted out on a CPU: the same slots as a full sort, and the same sums, as in float64."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from test_memory import SCALE, brute_force, cached, fills
from test_memory_sharded import model_config

from fot_jax import memory, sharding
from fot_jax.memory import kernels, reading
from fot_jax.memory.stored import empty, loaded, stored, whole_tiles

BEST = jax.jit(kernels.best, static_argnums=4)


def selected(q_BGQK, keys_BGKM, counts_BM, k):
    """Scores and columns in float64, ties to the lowest; -inf and -1 beyond those that count."""
    s = np.einsum("bgqk,bgkm->bgqm", np.float64(q_BGQK), np.float64(keys_BGKM))
    s = np.where(counts_BM[:, None, None], s, -np.inf)
    column = np.argsort(-s, axis=-1, kind="stable")[..., :k]
    s = np.take_along_axis(s, column, axis=-1)
    return s, np.where(s > -np.inf, column, -1)


# B, G, Q, K, M, k: odd sizes, columns that fill no tile, several blocks of queries, k of all there are.
SHAPES = [(2, 2, 3, 16, 1000, 5), (1, 1, 300, 8, 2048, 40), (2, 1, 1, 4, 1500, 1), (1, 2, 2, 8, 140, 140)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@hypothesis.settings(max_examples=4)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0, 1, 30]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]),
    masked=st.booleans(),
)
def test_the_best_are_those_of_a_full_sort_ties_included(shape, seed, spread, dtype, masked):
    B, G, Q, K, M, k = shape
    rng = np.random.default_rng(seed)
    q, keys = (rng.integers(-spread, spread + 1, size).astype(np.float32) for size in ((B, G, Q, K), (B, G, K, M)))
    keys[:, :, 0], q[..., 0] = 127, 0  # whole numbers then are exact in int8, too
    filled_B = fills(rng, B, M, k)
    seen = rng.random((B, 1, 1, M)) < 0.6 if masked else None
    counts = np.arange(M) < filled_B[:, None]
    s, column = BEST(q, stored(keys, empty(keys.shape, dtype)), filled_B, seen, k)
    want_s, want_column = selected(q, keys, counts & seen[:, 0, 0] if masked else counts, k)
    np.testing.assert_array_equal(s, want_s)
    np.testing.assert_array_equal(np.where(np.isfinite(s), column, -1), want_column)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_real_numbers_up_to_rounding(dtype):
    rng = np.random.default_rng(0)
    q, keys = (rng.standard_normal(size).astype(np.float32) for size in ((1, 2, 3, 64), (1, 2, 64, 3000)))
    keys = stored(keys, empty(keys.shape, dtype))
    s, column = BEST(q, keys, np.array([2900], np.int32), None, 32)
    exact = np.float32(loaded(keys))
    want, _ = selected(q, exact, np.arange(3000)[None] < 2900, 32)
    np.testing.assert_allclose(s, want, rtol=1e-5)
    of_columns = np.take_along_axis(np.einsum("bgqk,bgkm->bgqm", np.float64(q), np.float64(exact)), column, axis=-1)
    np.testing.assert_allclose(of_columns, want, rtol=1e-5)  # the slots that were named have these scores


def test_all_of_the_best_in_one_bin():
    # More passes then, as many as it takes: a bin gives no more than KEPT at a time.
    k = 3 * kernels.KEPT + 1
    n = kernels.bins(k)
    M, q = 20 * n, np.ones((1, 1, 1, 1), np.float32)
    keys = np.arange(M, dtype=np.float32)[None, None, None] % 7
    keys[0, 0, 0, 5::n] += 100
    _, column = BEST(q, keys, np.array([M], np.int32), None, k)
    np.testing.assert_array_equal(column, selected(q, keys, np.ones((1, M), bool), k)[1])
    assert set(np.asarray(column).ravel() % n) == {5}


@pytest.mark.parametrize(("dtype", "scalars"), [("float32", 2**15), ("bfloat16", 100), ("float16", 1), ("int8", 100)])
def test_weighted_sums_are_of_the_values_named(monkeypatch, dtype, scalars):
    monkeypatch.setattr(kernels, "SCALARS", scalars)
    rng = np.random.default_rng(1)
    B, G, Q, N, K, M = 2, 2, 3, 21, 8, 384
    values = stored(rng.standard_normal((B, G, K, M)).astype(np.float32), empty((B, G, K, M), dtype))
    column, weight = rng.integers(-1, M, (B, G, Q, N)).astype(np.int32), rng.random((B, G, Q, N), np.float32)
    each = np.take_along_axis(np.float64(loaded(values))[:, :, None], np.maximum(column, 0)[..., None, :], axis=-1)
    want = np.sum(np.where(column >= 0, weight, 0)[..., None, :] * each, axis=-1)
    np.testing.assert_allclose(jax.jit(kernels.weighted_sum)(values, column, weight), want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_turned_is_the_other_way_round(dtype):
    x_KM = np.random.default_rng(0).integers(-127, 128, (8, 2048)).astype(dtype)
    np.testing.assert_array_equal(kernels.turned(x_KM), x_KM.T)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("ways", [1, 8])
def test_topk_by_kernels_is_topk(devices, monkeypatch, T, ways):
    B, H, G, K, M, k = 2, 4, 2, 16, 8192, 5
    rng = np.random.default_rng(T)
    q, keys, values = (
        rng.integers(-3, 4, size).astype(np.float32) for size in ((B, H, T, K), (B, G, M, K), (B, G, M, K))
    )
    length_B = np.array([M, 1700], np.int32)
    deal = memory.Deal(ways, 128 if ways > 1 else 1)
    used = []
    for name in ("best", "weighted_sum"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, kernel=kernel: used.append(name) or kernel(*args))
    monkeypatch.setattr(kernels, "wanted", lambda k, columns: True)
    monkeypatch.setattr(kernels, "fetches", lambda queries, columns: columns % kernels.LANES == 0)

    def read(q, keys, values, length_B):
        return memory.topk(
            q, deal.as_dealt(keys), deal.as_dealt(values), length_B, k=k, scale=SCALE, score_bytes=2**16, deals=(deal,)
        )

    with jax.set_mesh(sharding.make_mesh({"data": 1, "context": ways}, devices)):
        partial, slots, s = jax.jit(read)(q, cached(keys), cached(values), length_B)
    assert set(used) == {"best", "weighted_sum"}
    want_slots, want_s, want_o, want_lse = brute_force(q, keys, values, length_B, k, SCALE)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_array_equal(s, want_s)
    np.testing.assert_allclose(partial.o_BHTK, want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(partial.lse_BHT, want_lse, atol=1e-5)


@pytest.mark.slow
def test_nothing_as_long_as_memory_is_sorted_or_held_on_a_tpu():
    pytest.importorskip("libtpu", reason="compiles for a TPU: make nightly EXTRAS=dev,tpu")
    script = pathlib.Path(__file__).parents[1] / "bench/compiled_topk.py"
    # A process of its own: once loaded, libtpu is there for good.
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    programs = json.loads(ran.stdout.splitlines()[-1])["programs"]
    plain = [one for one in programs if one["way"] == "plain"]
    assert plain and all(one["sorted_most"] == 2**20 for one in plain)  # or the figure would say nothing of ours
    assert {one["kernels"] > 0 for one in programs if one["way"] == "topk"} == {True}


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_vectors_are_filled_up_to_whole_tiles(monkeypatch, tmp_path, dtype):
    """Heads of 10 dimensions as a TPU's memory has them, 16 or 32, here read by a CPU."""
    B, H, G, T, K, M, k = 2, 4, 2, 3, 10, 64, 5
    config = model_config(G, H, K, dtype=dtype)
    rng = np.random.default_rng(0)
    q, keys, values = (rng.integers(-3, 4, size).astype(np.float32) for size in ((B, H, T, K), *[(B, G, M, K)] * 2))
    keys[..., 0], values[..., 0], q[..., 0] = 127, 127, 0
    length_B = np.array([60, 33], np.int32)
    with monkeypatch.context() as patched:
        patched.setattr(sharding, "platform", lambda: "tpu")
        mem = memory.init_memory(config, B, M)
    assert mem.keys[0].shape == mem.values[0].shape == (B, G, 16 if dtype == "float32" else 32, M)
    monkeypatch.setattr(reading, "_filled_up", lambda K, page: whole_tiles(K, dtype))
    mem = memory.append(mem, [cached(keys)], [cached(values)], length_B)
    memory.save(tmp_path / "mem", mem)
    mem = jax.jit(memory.merge)(memory.clear(mem, np.array([True, True])), mem)
    here = memory.load(tmp_path / "mem", memory.init_memory(config, B, M))
    np.testing.assert_array_equal(loaded(here.keys[0])[..., :33], cached(keys)[..., :33])
    arrays = q, mem.keys[0], mem.values[0], mem.length_B
    partial, slots, s = memory.topk(*arrays, k=k, scale=SCALE)
    whole = memory.dense(*arrays, scale=SCALE)
    want_slots, want_s, want_o, _ = brute_force(q, keys, values, length_B, k, SCALE)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_array_equal(s, want_s)
    np.testing.assert_allclose(partial.o_BHTK, want_o, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.o_BHTK, brute_force(q, keys, values, length_B, M, SCALE)[2], rtol=1e-5, atol=1e-5)
