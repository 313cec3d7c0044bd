from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

from fot_jax import attention

SCALE = 0.4
# Jitted, like everything in these tests: dispatching one operation after another compiles each of them.
ATTEND = jax.jit(attention.attend, static_argnames="scale")
MERGE = jax.jit(attention.merge)


@functools.partial(jax.jit, static_argnames="base")
def turned(x, positions, base):
    angles = attention.rotary_angles(4096, x.shape[-1], base).at(positions)
    return attention.rotate(x, angles), angles


def same_value_and_gradients(first, second, *arguments):
    both = jax.jit(lambda *a: [jax.value_and_grad(f, tuple(range(len(a))))(*a) for f in (first, second)])
    a, b = both(*arguments)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-5), a, b)


def qkv(rng, B=2, H=4, G=2, T=5, S=7, K=6, dtype=np.float32):
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((B, H, T, K), (B, G, S, K), (B, G, S, K)))
    return q, k, v


@pytest.mark.parametrize("base", [10000.0, 1e6])
def test_rotary_is_multiplication_by_a_unit_complex_number(base):
    K, positions = 8, np.array([0, 1, 7, 500, 2047])
    x = np.random.default_rng(0).standard_normal((2, 3, 5, K)).astype(np.float32)
    got, _ = turned(x, positions, base)
    turn = np.exp(1j * positions[:, None] * base ** (-2 * np.arange(K // 2) / K))
    want = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * turn
    np.testing.assert_allclose(got, np.concatenate([want.real, want.imag], -1), atol=1e-5)
    np.testing.assert_array_equal(got[:, :, 0], x[:, :, 0])  # position 0: memory's keys are themselves


def test_rotary_angles_are_float32_whatever_is_rotated():
    x, positions = np.ones((1, 1, 5, 8), np.float32), np.arange(496, 501)
    got, angles = turned(x.astype(jnp.bfloat16), positions, 10000.0)
    assert angles.cos.dtype == angles.sin.dtype == jnp.float32 and got.dtype == jnp.bfloat16
    np.testing.assert_allclose(angles.sin[:, 0], np.sin(positions), atol=1e-7)
    want, _ = turned(x, positions, 10000.0)
    np.testing.assert_allclose(got.astype(np.float32), want, atol=0.01)


def test_rows_at_positions_of_their_own():
    x = np.random.default_rng(1).standard_normal((2, 3, 4, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3], [9, 10, 11, 12]])
    got, _ = turned(x, positions, 100.0)
    for b in range(2):
        alone, _ = turned(x, positions[b], 100.0)
        np.testing.assert_allclose(got[b], alone[b], atol=1e-6)


def test_causal_mask():
    np.testing.assert_array_equal(attention.causal_mask(3), [[[True, False, False], [True, True, False], [True] * 3]])


@pytest.mark.parametrize(("G", "T"), [(1, 5), (2, 1), (2, 5), (4, 5), (4, 1)])
def test_attend_equals_a_float64_softmax(G, T):
    rng = np.random.default_rng(G)
    q, k, v = qkv(rng, G=G, T=T)
    seen = rng.random((2, T, 7)) < 0.5
    seen[1, T // 2] = False  # a query that sees nothing
    got = ATTEND(q, k, v, seen, scale=SCALE)
    o, lse = reference.attention(q, k, v, seen, SCALE)
    np.testing.assert_allclose(got.o_BHTK, o, atol=2e-6)
    np.testing.assert_allclose(got.lse_BHT, lse, atol=2e-6)
    assert np.all(np.isneginf(got.lse_BHT[1, :, T // 2])) and not np.any(got.o_BHTK[1, :, T // 2])


def test_blocks_of_queries_give_what_all_give(queries=(1, 3, 7, 8)):
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.normal(size=(2, heads, 7, 5)), jnp.float32) for heads in (4, 2, 2))
    visible = attention.causal_mask(7) & jnp.asarray(rng.random((2, 1, 7)) < 0.8)
    wanted = attention.attend(q, k, v, visible, scale=0.3)
    for n in queries:
        found = attention.attend_by_blocks(q, k, v, visible, scale=0.3, score_bytes=n * 4 * 2 * 4 * 7)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, wanted)


def test_one_mask_serves_all_rows_and_none_hides_nothing():
    q, k, v = qkv(np.random.default_rng(2))
    seen = np.ones((1, 5, 7), bool)
    np.testing.assert_allclose(
        ATTEND(q, k, v, scale=SCALE).o_BHTK, ATTEND(q, k, v, seen, scale=SCALE).o_BHTK, atol=1e-6
    )


def test_grouped_heads_equal_heads_repeated_in_values_and_gradients():
    q, k, v = qkv(np.random.default_rng(3), H=6, G=2)
    seen = jnp.asarray(np.random.default_rng(4).random((2, 5, 7)) < 0.7)
    weight = np.random.default_rng(5).standard_normal(q.shape).astype(np.float32)
    loss = lambda q, k, v: jnp.sum(weight * attention.attend(q, k, v, seen, scale=SCALE).o_BHTK)
    repeated = lambda q, k, v: loss(q, jnp.repeat(k, 3, axis=1), jnp.repeat(v, 3, axis=1))
    same_value_and_gradients(loss, repeated, q, k, v)


def test_gradients_are_finite_where_a_query_sees_nothing():
    q, k, v = qkv(np.random.default_rng(6))
    seen = np.ones((2, 5, 7), bool)
    seen[0, 2] = False

    def loss(q, k, v):
        both = attention.merge(
            attention.attend(q, k, v, jnp.asarray(seen), scale=SCALE),
            attention.attend(q, k, v, jnp.zeros((1, 5, 7), bool), scale=SCALE),
        )
        return jnp.sum(both.o_BHTK)

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert not np.any(grads[0][0, :, 2])


def test_large_scores_do_not_overflow():
    q, k, v = qkv(np.random.default_rng(7))
    got = ATTEND(300 * q, k, v, scale=10.0)
    o, lse = reference.attention(300 * q, k, v, np.ones((2, 5, 7), bool), 10.0)
    np.testing.assert_allclose(got.o_BHTK, o, atol=2e-2)
    np.testing.assert_allclose(got.lse_BHT, lse, rtol=1e-5)


def test_heads_that_do_not_fit():
    q, k, v = qkv(np.random.default_rng(8), H=3, G=2)
    with pytest.raises(ValueError, match="3 query heads over 2 key/value heads; wanted a multiple"):
        attention.attend(q, k, v, scale=1.0)


def test_bfloat16_is_summed_in_float32():
    q, k, v = qkv(np.random.default_rng(9), S=300)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    got = ATTEND(*low, scale=SCALE)
    assert got.o_BHTK.dtype == got.lse_BHT.dtype == jnp.float32
    o, lse = reference.attention(*(x.astype(np.float32) for x in low), np.ones((2, 5, 300), bool), SCALE)
    np.testing.assert_allclose(got.o_BHTK, o, atol=4e-3)
    np.testing.assert_allclose(got.lse_BHT, lse, atol=1e-3)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.2, 0.9]),
    dealt=st.lists(st.integers(0, 2), min_size=9, max_size=9),
)
def test_merged_partials_are_the_softmax_over_the_union(seed, density, dealt):
    # Keys dealt to three sources; a source may get none, and a query may see none of a source, or none at all.
    rng = np.random.default_rng(seed)
    q, k, v = qkv(rng, S=9)
    q = q * rng.choice([1.0, 30.0]).astype(np.float32)
    seen = rng.random((2, 5, 9)) < density
    parts = [ATTEND(q, k, v, seen & (np.array(dealt) == source), scale=SCALE) for source in range(3)]
    got = MERGE(*parts)
    o, lse = reference.attention(q, k, v, seen, SCALE)
    np.testing.assert_allclose(got.o_BHTK, o, atol=1e-4)
    np.testing.assert_allclose(got.lse_BHT, lse, atol=1e-4, rtol=1e-5)


def test_gradient_through_a_merge_equals_that_of_one_softmax():
    q, k, v = qkv(np.random.default_rng(10), S=8)
    weight = np.random.default_rng(11).standard_normal(q.shape).astype(np.float32)
    whole = lambda q, k, v: jnp.sum(weight * attention.attend(q, k, v, scale=SCALE).o_BHTK)

    def parts(q, k, v):
        first, second = (attention.attend(q, k[:, :, s], v[:, :, s], scale=SCALE) for s in (slice(0, 3), slice(3, 8)))
        return jnp.sum(weight * attention.merge(first, second).o_BHTK)

    same_value_and_gradients(parts, whole, q, k, v)
