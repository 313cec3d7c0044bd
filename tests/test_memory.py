from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

import fot_jax
from fot_jax import memory
from fot_jax.config import DtypePolicy, ModelConfig
from fot_jax.memory.stored import empty, loaded

CONFIG = ModelConfig(vocab_size=11, d_model=8, d_ff=8, n_layers=3, n_heads=4, n_kv_heads=2, window=4, mem_layers=(0, 2))
SCALE = 0.5
# B, T, H, G, K, M, k, score_bytes. From one slot to memories read in blocks of slots and of queries at once, with few
# and many sub-blocks; k from 1 to more than there are slots; one query, as in generation, and several.
TOPK_SHAPES = {
    "one slot": (1, 2, 2, 1, 4, 1, 1, 2**20),
    "k beyond the slots": (2, 3, 4, 2, 4, 9, 12, 2**20),
    "queries in blocks": (2, 5, 2, 2, 4, 70, 5, 3000),
    "sub-blocks": (3, 1, 4, 2, 2, 700, 3, 2**20),
    "both in blocks": (2, 3, 2, 1, 2, 2500, 4, 1),
    "both in blocks, sub-blocks": (2, 5, 1, 1, 2, 3100, 1, 17000),
    "blocks of slots smaller than k": (2, 2, 2, 2, 4, 2100, 1500, 1),
}


def arrays(rng, B, T, H, G, K, M, draw):
    q_BHTK, k_BGMK, v_BGMK = (draw(shape) for shape in ((B, H, T, K), (B, G, M, K), (B, G, M, K)))
    return q_BHTK.astype(np.float32), k_BGMK.astype(np.float32), v_BGMK.astype(np.float32)


def fills(rng, B, M, k):
    """Unequal, with an empty row where there is another."""
    length_B = rng.integers(0, M + 1, B)
    length_B[rng.integers(B)] = rng.choice([0, 1, min(k, M), max(M - 1, 0), M])
    return length_B.astype(np.int32)


def brute_force(q_BHTK, k_BGMK, v_BGMK, length_B, k, scale):
    """Slots, their scores, o, lse in float64: all scores sorted, ties to the lowest slot."""
    q, keys, values = (x.astype(np.float64) for x in (q_BHTK, k_BGMK, v_BGMK))
    B, H, T, K = q.shape
    slots, best = np.full((B, H, T, k), -1), np.full((B, H, T, k), -np.inf)
    o, lse = np.zeros(q.shape), np.full((B, H, T), -np.inf)
    for b, h, t in np.ndindex(B, H, T):
        g, n = h // (H // keys.shape[1]), min(k, length_B[b])
        if not n:
            continue
        s = keys[b, g, : length_B[b]] @ q[b, h, t]
        chosen = np.argsort(-s, kind="stable")[:n]
        slots[b, h, t, :n], best[b, h, t, :n] = chosen, s[chosen]
        p = np.exp(scale * (s[chosen] - s[chosen].max()))
        o[b, h, t] = p @ values[b, g, chosen] / p.sum()
        lse[b, h, t] = np.log(p.sum()) + scale * s[chosen].max()
    return slots, best, o, lse


@functools.partial(jax.jit, static_argnames=("k", "scale", "score_bytes"))
def topk(q, keys, values, length_B, *, k, scale=SCALE, score_bytes=None):
    """The public function with head-major arrays."""
    major = lambda x: jnp.swapaxes(x, 1, 2)
    found = memory.topk_attention(*map(major, (q, keys, values)), length_B, k=k, scale=scale, score_bytes=score_bytes)
    return tuple(map(major, found))


@pytest.mark.parametrize("T", [1, 4])
def test_zeros_of_either_sign_tie(T):
    # Sums of products may end in -0.0, which lax.top_k puts behind 0.0.
    k = np.zeros((1, 4, 1, 8), np.float32)
    k[0, 1, 0, :2] = 1, -1
    _, _, slots = memory.topk_attention(-np.ones((1, T, 1, 8), np.float32), k, k, np.array([4], np.int32), k=3)
    np.testing.assert_array_equal(slots, np.broadcast_to([0, 1, 2], (1, T, 1, 3)))


def test_whole_numbers_are_read_as_floats():
    q, k, v = (np.full((1, n, 1, 2), x, np.int32) for n, x in ((1, 1), (3, 1), (3, 5)))
    o, _, _ = memory.topk_attention(q, k, v, np.array([3], np.int32), k=2)
    np.testing.assert_allclose(o, 5.0)


def cached(x):
    """[B, G, M, K] as caches have it."""
    return jnp.swapaxes(x, 2, 3)


@functools.partial(jax.jit, static_argnames=("scale", "score_bytes"))
def dense(q, keys, values, length_B, *, scale, score_bytes=None):
    return memory.dense(q, cached(keys), cached(values), length_B, scale=scale, score_bytes=score_bytes)


@pytest.mark.parametrize("name", TOPK_SHAPES)
@hypothesis.settings(max_examples=8)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 1, 2, 6]))
def test_topk_of_integers_is_exactly_brute_force_ties_included(name, seed, spread):
    *shape, k, score_bytes = TOPK_SHAPES[name]
    rng = np.random.default_rng(seed)
    q, keys, values = arrays(rng, *shape, lambda size: rng.integers(-spread, spread + 1, size))
    length_B = fills(rng, shape[0], shape[-1], k)
    o, lse, slots = topk(q, keys, values, length_B, k=k, score_bytes=score_bytes)
    want_slots, _, want_o, want_lse = brute_force(q, keys, values, length_B, k, SCALE)
    np.testing.assert_array_equal(slots, want_slots)
    assert slots.dtype == jnp.int32 and o.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(o, want_o, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)


@pytest.mark.parametrize("name", TOPK_SHAPES)
@hypothesis.settings(max_examples=8)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_topk_is_brute_force_up_to_rounding(name, seed):
    *shape, k, score_bytes = TOPK_SHAPES[name]
    rng = np.random.default_rng(seed)
    q, keys, values = arrays(rng, *shape, rng.standard_normal)
    length_B = fills(rng, shape[0], shape[-1], k)
    o, lse, slots = map(np.asarray, topk(q, keys, values, length_B, k=k, score_bytes=score_bytes))
    want_slots, want_scores, want_o, want_lse = brute_force(q, keys, values, length_B, k, SCALE)
    np.testing.assert_array_equal(slots == -1, want_slots == -1)
    for b, h, t in np.ndindex(slots.shape[:3]):
        found = slots[b, h, t][slots[b, h, t] >= 0]
        assert len(set(found)) == len(found) and np.all(found < length_B[b])
        # Another slot than brute force's is right only where float32 cannot tell their scores apart.
        scores = keys[b, h // (shape[2] // shape[3]), found].astype(np.float64) @ q[b, h, t].astype(np.float64)
        np.testing.assert_allclose(scores, want_scores[b, h, t, : len(found)], atol=2e-6)
    assert np.mean(slots == want_slots) > 0.99
    np.testing.assert_allclose(o, want_o, atol=2e-3)  # a swapped slot at the k-th place
    assert np.mean(np.abs(o - want_o) < 2e-5) > 0.97
    np.testing.assert_allclose(lse, want_lse, atol=2e-5)


def test_ties_across_blocks_of_slots_go_to_the_lowest():
    # All scores equal but one, which lies late: a tie must not follow it into its block.
    M, k = 2500, 5
    keys = np.ones((1, 1, M, 2), np.float32)
    keys[0, 0, 2203] = 2
    q = np.ones((1, 1, 2, 2), np.float32)
    for score_bytes in (1, 2**20):
        for length, want in ((2500, [2203, 0, 1, 2, 3]), (2203, [0, 1, 2, 3, 4]), (3, [0, 1, 2, -1, -1])):
            *_, slots = topk(q, keys, keys, np.array([length], np.int32), k=k, score_bytes=score_bytes)
            np.testing.assert_array_equal(slots, np.broadcast_to(want, (1, 1, 2, k)))


@pytest.mark.parametrize(("M", "k", "score_bytes"), [(40, 40, 2**26), (40, 64, 1), (1300, 1300, 1)])
def test_topk_of_everything_is_dense(M, k, score_bytes):
    rng = np.random.default_rng(M + k)
    q, keys, values = arrays(rng, 3, 3, 4, 2, 4, M, rng.standard_normal)
    length_B = np.array([M, 0, M // 3], np.int32)
    readings = memory.Reading("dense", score_bytes=score_bytes), memory.Reading("topk", k, score_bytes)
    read = lambda reading, q, k, v, n: memory.read(reading, q, cached(k), cached(v), n, scale=SCALE)
    both = jax.jit(lambda *arguments: [read(reading, *arguments) for reading in readings])
    dense, best = both(q, keys, values, length_B)
    np.testing.assert_allclose(best.o_BHTK, dense.o_BHTK, atol=2e-5)
    np.testing.assert_allclose(best.lse_BHT, dense.lse_BHT, atol=2e-5)
    seen = np.broadcast_to(np.arange(M) < length_B[:, None, None], (3, 3, M))
    np.testing.assert_allclose(best.o_BHTK, reference.attention(q, keys, values, seen, SCALE)[0], atol=2e-5)


@pytest.mark.parametrize(
    ("T", "M", "score_bytes"), [(1, 37, 2**20), (7, 37, 600), (3, 2500, 1), (1, 2100, 1), (5, 1025, 40000)]
)
@hypothesis.settings(max_examples=8)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1.0, 30.0]))
def test_dense_in_blocks_or_not_is_a_float64_softmax(T, M, score_bytes, seed, size):
    rng = np.random.default_rng(seed)
    q, keys, values = arrays(rng, 3, T, 4, 2, 4, M, rng.standard_normal)
    length_B = fills(rng, 3, M, 1)
    found = dense(size * q, keys, values, length_B, scale=SCALE, score_bytes=score_bytes)
    seen = np.broadcast_to(np.arange(M) < length_B[:, None, None], (3, T, M))
    o, lse = reference.attention(size * q, keys, values, seen, SCALE)
    np.testing.assert_allclose(found.o_BHTK, o, atol=2e-5 * size)
    np.testing.assert_allclose(found.lse_BHT, lse, atol=2e-5 * size)


def test_unfilled_slots_are_never_read():
    # What lies beyond the fill is whatever was there: it must not matter.
    rng = np.random.default_rng(0)
    q, keys, values = arrays(rng, 2, 3, 2, 1, 4, 1500, rng.standard_normal)
    length_B = np.array([7, 0], np.int32)
    other_k, other_v = keys.copy(), values.copy()
    other_k[0, :, 7:], other_k[1], other_v[0, :, 7:], other_v[1] = 1e4, -1e4, 1e4, 1e4
    for read in (functools.partial(dense, scale=SCALE), functools.partial(topk, k=9)):
        first = read(q, keys, values, length_B, score_bytes=1)
        second = read(q, other_k, other_v, length_B, score_bytes=1)
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_memory_without_a_slot():
    q, empty = np.ones((2, 4, 3, 4), np.float32), np.zeros((2, 2, 0, 4), np.float32)
    length_B = np.zeros(2, np.int32)
    found = dense(q, empty, empty, length_B, scale=SCALE)
    assert not np.any(found.o_BHTK) and np.all(np.isneginf(found.lse_BHT))
    o, lse, slots = topk(q, empty, empty, length_B, k=3)
    assert not np.any(o) and np.all(np.isneginf(lse)) and slots.shape == (2, 4, 3, 3) and np.all(slots == -1)


@pytest.mark.parametrize("score_bytes", [1, 2**20])
def test_bfloat16_memory_is_compared_as_stored(score_bytes):
    rng = np.random.default_rng(1)
    q, keys, values = arrays(rng, 2, 3, 4, 2, 4, 1200, rng.standard_normal)
    keys, values = (x.astype(jnp.bfloat16) for x in (keys, values))
    length_B, k = np.array([1100, 2], np.int32), 6
    stored = [x.astype(np.float32) for x in (keys, values)]
    want_slots, _, want_o, want_lse = brute_force(q, *stored, length_B, k, SCALE)
    o, lse, slots = topk(q, keys, values, length_B, k=k, score_bytes=score_bytes)
    np.testing.assert_array_equal(slots, want_slots)
    np.testing.assert_allclose(o, want_o, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
    seen = np.broadcast_to(np.arange(1200) < length_B[:, None, None], (2, 3, 1200))
    want_o, want_lse = reference.attention(q, *stored, seen, SCALE)
    found = dense(q, keys, values, length_B, scale=SCALE, score_bytes=score_bytes)
    np.testing.assert_allclose(found.o_BHTK, want_o, atol=1e-4)
    np.testing.assert_allclose(found.lse_BHT, want_lse, atol=1e-4)


def test_topk_scale_defaults_to_the_root_of_the_head_size():
    rng = np.random.default_rng(2)
    q, keys, values = arrays(rng, 1, 2, 2, 1, 4, 9, rng.standard_normal)
    length_B = np.array([8], np.int32)
    *_, want_o, want_lse = brute_force(q, keys, values, length_B, 3, 0.5)
    o, lse, _ = topk(q, keys, values, length_B, k=3, scale=None)
    np.testing.assert_allclose(o, want_o, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0; wanted a whole number of at least 1"),
        ({"q": (2, 3, 3, 4)}, "H a multiple of G"),
        ({"q": (2, 3, 4, 6)}, "do not fit"),
        ({"q": (1, 3, 4, 4)}, "do not fit"),
        ({"v": (2, 8, 2, 4)}, "do not fit"),
        ({"length": (3,)}, r"length_B has shape \(3,\); wanted \(2,\)"),
    ],
)
def test_topk_attention_of_arrays_that_do_not_fit(changes, message):
    shapes = {"q": (2, 3, 4, 4), "k": (2, 9, 2, 4), "v": (2, 9, 2, 4), "length": (2,)}
    shapes |= {name: shape for name, shape in changes.items() if name != "k"}
    q, keys, values = (np.zeros(shapes[name], np.float32) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        memory.topk_attention(q, keys, values, np.zeros(shapes["length"], np.int32), k=changes.get("k", 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nearest",), "memory reading is 'nearest'; wanted one of dense, topk, approximate"),
        (("dense", 3), "k=3; wanted k for 'topk' and 'approximate', and only there"),
        (("topk",), "k=None; wanted k for 'topk'"),
        (("topk", 0), "k is 0; wanted a whole number of at least 1"),
        (("approximate",), "k=None; wanted k for 'topk' and 'approximate'"),
        (("approximate", 2, None, 1.0), "recall is 1.0; wanted above 0 and below 1"),
    ],
)
def test_readings_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        memory.Reading(*arguments)


# Memory in pages.


def in_pages(x_BGMK, sizes):
    """Pages as `Pages.keys` has them for a layer."""
    return tuple(cached(page) for page in np.split(x_BGMK, np.cumsum(sizes)[:-1], axis=2))


# Pages of less than a block, of a few, and of so many that a single query reads some of them in blocks.
PAGE_SIZES = [(40, 40, 20), (2600, 2600, 300)]


@pytest.mark.parametrize("sizes", PAGE_SIZES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("score_bytes", [1, None])
def test_pages_are_read_as_one_array(sizes, T, score_bytes):
    rng, M = np.random.default_rng(T), sum(sizes)
    q, keys, values = arrays(rng, 3, T, 4, 2, 4, M, lambda shape: rng.integers(-2, 3, shape))
    both = in_pages(keys, sizes), in_pages(values, sizes)
    options = dict(scale=SCALE, score_bytes=score_bytes)
    dense_read = jax.jit(lambda q, k, v, n: memory.dense(q, k, v, n, **options))
    best_read = jax.jit(lambda q, k, v, n: memory.topk(q, k, v, n, k=6, **options))
    for fill in ([0, 0, 0], [7, 0, sizes[0]], [sizes[0] + 1, 3, 0], [M - 1, sizes[0] // 4, M]):
        length_B = np.array(fill, np.int32)
        found = dense_read(q, *both, length_B)
        seen = np.broadcast_to(np.arange(M) < length_B[:, None, None], (3, T, M))
        o, lse = reference.attention(q, keys, values, seen, SCALE)
        np.testing.assert_allclose(found.o_BHTK, o, atol=2e-5)
        np.testing.assert_allclose(found.lse_BHT, np.where(length_B[:, None, None] > 0, lse, -np.inf), atol=2e-5)
        best, slots, _ = best_read(q, *both, length_B)
        want_slots, _, want_o, want_lse = brute_force(q, keys, values, length_B, 6, SCALE)
        np.testing.assert_array_equal(slots, want_slots)
        np.testing.assert_allclose(best.o_BHTK, want_o, atol=1e-4)
        np.testing.assert_allclose(best.lse_BHT, want_lse, atol=1e-4)


def test_pages_never_read_unfilled_slots():
    rng, sizes = np.random.default_rng(0), (2600, 2600, 300)
    q, keys, values = arrays(rng, 2, 1, 2, 1, 4, sum(sizes), rng.standard_normal)
    length_B = np.array([2700, 5], np.int32)
    others = [x.copy() for x in (keys, values)]
    for x in others:
        x[0, :, 2700:], x[1, :, 5:] = 1e4, -1e4
    for k in (None, 9):
        reading = memory.Reading("topk" if k else "dense", k)
        read = jax.jit(lambda k, v, reading=reading: memory.read(reading, q, k, v, length_B, scale=SCALE))
        first = read(in_pages(keys, sizes), in_pages(values, sizes))
        second = read(*(in_pages(x, sizes) for x in others))
        jax.tree.map(np.testing.assert_array_equal, first, second)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=9))
def test_pages_are_filled_one_after_another(counts):
    # Pages of 4, 4, 8 and 4 slots; the last appends of the longest examples do not fit.
    config = CONFIG.replace(head_size=2)
    small = tuple(memory.init_memory(config, 3, size) for size in (4, 4, 8, 4))
    paged, lists = memory.Pages(small), [[], [], []]
    for step, count_B in enumerate(counts):
        tokens_BT = 1 + 12 * step + np.arange(12).reshape(3, 4)
        keys, values = zip(*(token_arrays(tokens_BT, layer) for layer in range(2)), strict=True)
        paged = APPEND(paged, keys, values, np.array(count_B, np.int32))
        for b in range(3):
            lists[b] = (lists[b] + list(tokens_BT[b, : count_B[b]]))[:20]
    together = lambda layers: tuple(np.concatenate(pages, axis=3) for pages in layers)
    check(memory.Cache(together(paged.keys), together(paged.values), paged.length_B), lists)
    assert paged.capacity == 20


@hypothesis.given(rows=st.integers(1, 5), capacity=st.integers(0, 40_000), window=st.sampled_from([1, 7, 512]))
def test_pages_have_room_for_a_window_and_double(rows, capacity, window):
    config = CONFIG.replace(window=window, head_size=128, n_kv_heads=4)
    paged = jax.eval_shape(lambda: memory.init_pages(config, rows, capacity))
    sizes = [page.capacity for page in paged.pages]
    assert sum(sizes) == paged.capacity == -(-capacity // window) * window
    assert all(size % window == 0 and (size or not capacity) for size in sizes)
    assert all(size == sum(sizes[:i]) for i, size in enumerate(sizes[:-1]) if i)
    found = sum(x.size * x.dtype.itemsize for page in paged.pages for x in (*page.keys, *page.values))
    assert found == paged.capacity * rows * memory.token_bytes(config)


# Caches against lists of tokens.

B, CAPACITY = 3, 13


@pytest.mark.parametrize("T", [1, 5])
def test_int8_is_read_as_what_is_stored(T):
    """Real numbers: slots and averages are those of a float64 search of what the buffer holds."""
    rng = np.random.default_rng(T)
    config = CONFIG.replace(head_size=16, mem_layers=(0,), dtypes=DtypePolicy(memory="int8"))
    q, keys, values = arrays(rng, 2, T, 4, 2, 16, 9000, rng.standard_normal)
    keys[0, :, 3], length_B = 0, np.array([9000, 5000], np.int32)  # a vector of zeros, too
    mem = APPEND(memory.init_memory(config, 2, 9000), [cached(keys)], [cached(values)], length_B)
    held = [np.swapaxes(np.asarray(loaded(x[0])), 2, 3) for x in (mem.keys, mem.values)]
    for x, y in zip(held, (keys, values), strict=True):
        assert np.all(np.abs(x - y)[0] <= np.abs(y)[0].max(-1, keepdims=True) / 251.9)
    assert mem.nbytes == 2 * 2 * 2 * 9000 * (16 + 2) == 2 * 9000 * memory.token_bytes(config)
    for score_bytes in (None, 2**16):
        read = functools.partial(memory.topk, k=8, scale=SCALE, score_bytes=score_bytes)
        partial, slots, scores = jax.jit(read)(q, mem.keys[0], mem.values[0], mem.length_B)
        want_slots, want_scores, want_o, _ = brute_force(q, *held, length_B, 8, SCALE)
        assert np.mean(slots == want_slots) > 0.99
        np.testing.assert_allclose(scores, want_scores, atol=1e-5)
        np.testing.assert_allclose(partial.o_BHTK, want_o, atol=2e-3)
        assert np.mean(np.abs(partial.o_BHTK - want_o) < 2e-5) > 0.97
        dense_read = functools.partial(memory.dense, scale=SCALE, score_bytes=score_bytes)
        found = jax.jit(dense_read)(q, mem.keys[0], mem.values[0], mem.length_B)
        seen = np.broadcast_to(np.arange(9000) < length_B[:, None, None], (2, T, 9000))
        np.testing.assert_allclose(found.o_BHTK, reference.attention(q, *held, seen, SCALE)[0], atol=2e-5)


APPEND = jax.jit(memory.append, donate_argnums=0)
EVICT = jax.jit(memory.evict_oldest, donate_argnums=0)
CLEAR = jax.jit(memory.clear)
COMPACT = jax.jit(memory.compact)


def token_arrays(tokens_BT, layer):
    """[B, G, K, T] keys and values that tell token, layer, head and dimension apart."""
    dimension = 0.125 * np.arange(2)[:, None]
    keys = tokens_BT[:, None, None, :] * 100.0 + layer * 10 + np.arange(2)[None, :, None, None] + dimension
    return keys.astype(np.float32), -keys.astype(np.float32)


def check(cache, lists):
    np.testing.assert_array_equal(cache.length_B, [len(tokens) for tokens in lists])
    for layer in range(2):
        for b, tokens in enumerate(lists):
            keys, values = token_arrays(np.array([tokens]).reshape(1, -1), layer)
            np.testing.assert_array_equal(cache.keys[layer][b, ..., : len(tokens)], keys[0])
            np.testing.assert_array_equal(cache.values[layer][b, ..., : len(tokens)], values[0])


operation = st.one_of(
    st.tuples(
        st.just("append"), st.sampled_from([1, 5, CAPACITY]), st.lists(st.integers(0, CAPACITY), min_size=B, max_size=B)
    ),
    st.tuples(st.just("append all"), st.sampled_from([1, 5]), st.none()),
    st.tuples(st.just("evict"), st.none(), st.lists(st.integers(0, CAPACITY + 2), min_size=B, max_size=B)),
    st.tuples(st.just("clear"), st.none(), st.lists(st.booleans(), min_size=B, max_size=B)),
)


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(operation, min_size=1, max_size=12))
def test_a_cache_is_a_list_of_tokens_a_row(operations):
    config = CONFIG.replace(d_model=8, head_size=2)
    cache, lists, fresh = memory.init_cache(config, B, 2, CAPACITY, "float32"), [[], [], []], 1
    for kind, T, per_row in operations:
        if kind.startswith("append"):
            tokens_BT = fresh + np.arange(B * T).reshape(B, T)
            fresh += B * T
            count_B = [T] * B if per_row is None else [min(count, T) for count in per_row]
            keys, values = zip(*(token_arrays(tokens_BT, layer) for layer in range(2)), strict=True)
            cache = APPEND(cache, keys, values, None if per_row is None else np.array(count_B, np.int32))
            for b in range(B):
                lists[b] = (lists[b] + list(tokens_BT[b, : count_B[b]]))[:CAPACITY]
        elif kind == "evict":
            cache = EVICT(cache, np.array(per_row, np.int32))
            lists = [tokens[count:] for tokens, count in zip(lists, per_row, strict=True)]
        else:
            cache = CLEAR(cache, np.array(per_row))
            lists = [[] if empty else tokens for tokens, empty in zip(lists, per_row, strict=True)]
        check(cache, lists)


@hypothesis.given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=2, max_size=2))
def test_compact_moves_valid_tokens_to_the_front_in_order(valid):
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 7)).astype(np.float32)
    valid_BT = np.array(valid)
    first, second = COMPACT((x, x + 1), valid_BT)
    for b in range(2):
        n = valid_BT[b].sum()
        np.testing.assert_array_equal(first[b, ..., :n], x[b][..., valid_BT[b]])
        np.testing.assert_array_equal(second[b, ..., :n], x[b][..., valid_BT[b]] + 1)


def test_memory_has_the_memory_layers_in_the_memory_dtype():
    config = CONFIG.replace(dtypes=DtypePolicy(memory="bfloat16"))
    mem = memory.init_memory(config, 2, 24)
    assert mem.capacity == 24 and len(mem.keys) == len(mem.values) == 2
    assert all(x.shape == (2, 2, 2, 24) and x.dtype == jnp.bfloat16 for x in (*mem.keys, *mem.values))
    assert mem.nbytes == 2 * 2 * (2 * 2 * 24 * 2) * 2
    np.testing.assert_array_equal(mem.length_B, [0, 0])
    keys = [np.full((2, 2, 2, 1), 1.01, np.float32)] * 2
    mem = APPEND(mem, keys, keys)  # converted as it enters
    assert mem.keys[0].dtype == jnp.bfloat16 and mem.keys[0][0, 0, 0, 0] == jnp.bfloat16(1.01)
    none = memory.init_memory(CONFIG.replace(mem_layers=()), 2, 24)
    assert none.capacity == 0 and none.nbytes == 0
    assert memory.append(none, (), ()) is none


def test_caches_that_do_not_fit():
    with pytest.raises(ValueError, match="capacity is 2147483648 tokens"):
        memory.init_memory(CONFIG, 1, 2**31)
    with pytest.raises(ValueError, match="capacity is -1"):
        memory.init_memory(CONFIG, 1, -1)
    mem = memory.init_memory(CONFIG, 1, 4)
    x = np.zeros((1, 2, 2, 5), np.float32)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of capacity 4"):
        memory.append(mem, [x, x], [x, x])
    with pytest.raises(ValueError, match="cache has 2 layers; wanted as many keys and values, found 1, 1"):
        memory.append(mem, [x], [x])
    three = [x[..., :3]] * 2
    mem = memory.append(mem, three, three)
    with pytest.raises(ValueError, match="row 0 has 3 tokens and takes 3 more; wanted at most 4 together"):
        memory.append(mem, three, three)
    with pytest.raises(ValueError, match="row 0 has 3 tokens and takes 3 more; wanted at most 4 together"):
        memory.merge(mem, mem)
    np.testing.assert_array_equal(memory.append(mem, three, three, np.array([1])).length_B, [4])
    one = [x[..., :1]] * 2
    with pytest.raises(
        ValueError, match=r"new keys or values are \(1, 1, 2, 1\); wanted \(1, 2, 2\), as the cache has"
    ):
        memory.append(mem, [x[:, :1, :, :1]] * 2, [x[:, :1, :, :1]] * 2)
    with pytest.raises(ValueError, match=r"are \(1, 2, 2, 1\); wanted \(1, 2, 2\), as the cache has, and 3 tokens"):
        memory.append(mem, three, one)
    with pytest.raises(ValueError, match=r"count_B is \(2,\); wanted \(1,\), the rows of the cache"):
        memory.append(mem, one, one, np.array([1, 1]))
    for count in (-1, 2):
        with pytest.raises(ValueError, match=rf"rows take \[{count}\] tokens; wanted 0..1 each"):
            memory.append(mem, one, one, np.array([count]))
        assert jax.jit(memory.append)(mem, one, one, np.array([count])).length_B[0] == 3 + min(max(count, 0), 1)
    with pytest.raises(ValueError, match=r"row_B is \(2,\); wanted \(1,\), the rows of the cache"):
        memory.clear(mem, np.array([True, False]))
    with pytest.raises(ValueError, match="size is 0; wanted at least 1 slot to take"):
        memory.take(mem, 0, 0)
    with pytest.raises(ValueError, match="mask of slots is int32; wanted bool"):
        memory.restrict(mem, np.ones((1, 4), np.int32))
    with pytest.raises(ValueError, match="other memory has 2 layers and 2 rows; wanted 2 and 1"):
        memory.merge(mem, memory.init_memory(CONFIG, 2, 4))
    with pytest.raises(ValueError, match="row 0 has 0 tokens and takes 3 more; wanted at most 0 together"):
        memory.merge(memory.init_memory(CONFIG, 1, 0), mem)


def test_forecasts_are_what_is_allocated():
    """Sizes of the 3B shape: 37.5 KiB a token; what fits, and one window more does not."""
    config = fot_jax.named("longllama_3b")
    params = 2 * 3_426_473_600
    for options in ({}, {"rows": 3}, {"ways": 8}, {"tensor": 4, "ways": 2}):
        found = memory.forecast(config, 16 * 2**30, params_bytes=params, **options)
        assert found.token_bytes == 37.5 * 1024 and found.tokens % config.window == 0
        rows, ways, tensor = (options.get(name, 1) for name in ("rows", "ways", "tensor"))
        mem = jax.eval_shape(lambda rows=rows, n=found.tokens: memory.init_memory(config, rows, n))
        local = jax.eval_shape(lambda rows=rows: memory.init_cache(config, rows, 26, 2048, "bfloat16"))
        nbytes = lambda cache: sum(x.size * x.dtype.itemsize for x in (*cache.keys, *cache.values))
        fixed = (params + nbytes(local)) // tensor + 256 * 2**20 + 64 * 2**20
        assert found.fixed_bytes == fixed
        held = fixed + nbytes(mem) / (ways * tensor)
        assert held <= 16 * 2**30 < held + 2048 * found.device_token_bytes
    assert memory.forecast(config, 2**30, params_bytes=params).tokens == 0
    assert (
        memory.forecast(config.replace(dtypes=DtypePolicy(memory="int8")), 2**34, params_bytes=0).token_bytes == 19584
    )
    on_host = memory.forecast(config, 16 * 2**30, params_bytes=params, values_on_host=True)
    assert on_host.device_token_bytes == 37.5 * 512 and on_host.token_bytes == 37.5 * 1024
    odd = memory.forecast(config.replace(window=100), 2**35, params_bytes=params, ways=16).tokens
    assert odd > 0 and odd % 400 == 0  # a capacity that 16 devices divide
    with pytest.raises(ValueError, match="tensor is 3; wanted a divisor of n_kv_heads, 32"):
        memory.forecast(config, 2**34, params_bytes=0, tensor=3)
    with pytest.raises(ValueError, match="ways is 0; wanted at least 1"):
        memory.forecast(config, 2**34, params_bytes=0, ways=0)


def test_topk_of_arguments_that_are_none():
    x, n = jnp.zeros((1, 1, 2, 4)), jnp.array([4], jnp.int32)
    for call in (functools.partial(memory.topk, x, x, x, n, scale=1.0), functools.partial(memory.search, x, x, n)):
        with pytest.raises(ValueError, match="k is 0; wanted a whole number of at least 1"):
            call(k=0)
        with pytest.raises(ValueError, match="recall is 0; wanted above 0 and below 1"):
            call(k=1, recall=0)


@pytest.mark.parametrize("T", [1, 3])
def test_an_approximate_search_offers_what_approx_max_k_finds(monkeypatch, T):
    """On a CPU that is all of the best, so that here every second slot is hidden from it."""
    B, H, G, K, M, k = 2, 2, 1, 4, 600, 5
    q, keys, values = arrays(np.random.default_rng(0), B, T, H, G, K, M, np.random.default_rng(1).standard_normal)
    length_B = np.array([M, 300], np.int32)
    seen = []

    def approx_max_k(s, k, recall_target):
        seen.append(recall_target)
        return jax.lax.top_k(jnp.where(jnp.arange(s.shape[-1]) % 2 == 0, s, -jnp.inf), k)

    def read(recall):
        reading = memory.Reading("approximate", k, recall=recall) if recall else memory.Reading("topk", k)
        of = lambda *x: memory.read(reading, *x, length_B, scale=SCALE)
        return jax.jit(of)(q, cached(keys), cached(values))

    np.testing.assert_allclose(read(0.9).o_BHTK, read(None).o_BHTK, atol=1e-6)
    monkeypatch.setattr(jax.lax, "approx_max_k", approx_max_k)
    partial = read(0.8)
    assert set(seen) == {0.8}
    even = keys[:, :, ::2], values[:, :, ::2], (length_B + 1) // 2
    _, _, want_o, want_lse = brute_force(q, *even, k, SCALE)
    np.testing.assert_allclose(partial.o_BHTK, want_o, atol=1e-5)
    np.testing.assert_allclose(partial.lse_BHT, want_lse, atol=1e-5)


@pytest.mark.parametrize("T", [1, 2])
def test_blocks_that_are_no_multiple_of_their_pieces(T):
    """Large blocks, filled in part: a budget of 8500 slots, and pages of 70,000 and of an eighth of it."""
    B, H, G, K, k = 2, 1, 1, 2, 8
    rng = np.random.default_rng(T)
    for M, fill, score_bytes in ((30_000, (12_000, 29_999), 34_000 * T * B), (70_000, (20_000, 1_300), None)):
        q, keys, values = arrays(rng, B, T, H, G, K, M, rng.standard_normal)
        length_B = np.array(fill, np.int32)
        want_slots, _, want_o, _ = brute_force(q, keys, values, length_B, k, SCALE)
        o, _, slots = topk(q, keys, values, length_B, k=k, score_bytes=score_bytes)
        np.testing.assert_array_equal(slots, want_slots)
        np.testing.assert_allclose(o, want_o, atol=1e-5)
        partial = dense(q, keys, values, length_B, scale=SCALE, score_bytes=score_bytes)
        s = np.where(np.arange(M) < length_B[:, None, None, None], SCALE * q @ keys.swapaxes(2, 3), -np.inf)
        np.testing.assert_allclose(partial.lse_BHT, np.log(np.exp(np.float64(s)).sum(-1)), atol=1e-5)


@pytest.mark.parametrize("T", [1, 3])
def test_bfloat16_memory_has_forward_derivatives(T):
    M, length_B = 9000, jnp.array([2000], jnp.int32)  # in pieces
    q, keys, values = (jnp.asarray(x) for x in arrays(np.random.default_rng(0), 1, T, 1, 1, 2, M, np.ones))
    values = cached(values).astype(jnp.bfloat16)
    of = lambda v: memory.dense(q, cached(keys).astype(jnp.bfloat16), v, length_B, scale=SCALE, score_bytes=4000).o_BHTK
    _, slope = jax.jvp(of, (values,), (jnp.ones_like(values),))
    np.testing.assert_allclose(slope, np.ones(slope.shape), rtol=1e-5)  # an average moves as what it is of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("T", [1, 32])
def test_no_format_is_converted_as_a_whole(dtype, T):
    B, H, K, M, budget = 1, 2, 64, 2**16, 2**21
    keys = jax.eval_shape(lambda: empty((B, H, K, M), dtype))
    q, length_B = jax.ShapeDtypeStruct((B, H, T, K), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)
    search = jax.jit(functools.partial(memory.search, k=5, score_bytes=budget))
    program = search.lower(q, keys, length_B).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**23  # all of it in float32 would be 32 MiB
