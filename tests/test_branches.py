"""Many continuations of one reading: as if each had been read from the start."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fot_jax
from fot_jax import losses, sharding
from fot_jax.generate import decode, extend, prefill
from fot_jax.generate.branches import branched, score
from fot_jax.generate.saved import save_reader
from fot_jax.memory import Reading

CONFIG = fot_jax.ModelConfig(
    vocab_size=62,
    d_model=32,
    d_ff=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    window=16,
    mem_layers=(1,),
    last_context_length=6,
    init_std=0.4,
)
LENGTHS, WAYS = (45, 9, 28), 3
READINGS = [dict(memory="dense"), dict(memory="topk", k=5)]


@pytest.fixture(scope="module")
def params():
    return jax.jit(fot_jax.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def ids(seed, *lengths):
    """Rows of tokens padded at the left, and their mask."""
    tokens = np.random.default_rng(seed).integers(1, CONFIG.vocab_size, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths))[None, :] >= max(lengths) - np.array(lengths)[:, None]
    return np.where(mask, tokens, 0), mask


TEXT_BT, TEXT_MASK = ids(0, *LENGTHS)
NEXT_BT, NEXT_MASK = ids(1, 5, 2, 7, 1, 3, 4, 6, 0, 7)


def alone(row):
    """A branch's tokens from the first, one row."""
    text, follows = row // WAYS, NEXT_BT[row][NEXT_MASK[row]]
    return np.concatenate([TEXT_BT[text][TEXT_MASK[text]], follows])[None], len(follows)


@pytest.mark.parametrize("reading", READINGS, ids=["dense", "topk"])
def test_scores_of_branches_are_those_of_long_forward(params, reading):
    reader = branched(prefill(CONFIG, params, TEXT_BT, attention_mask=TEXT_MASK, **reading), WAYS)
    assert reader.mem.length_B.shape == (3,) and reader.local.length_B.shape == (9,)
    held = reader.mem.keys[0][0].unsafe_buffer_pointer()
    scores, after = score(CONFIG, params, reader, NEXT_BT, NEXT_MASK, **reading)
    for row in range(9):
        tokens, n = alone(row)
        if not n:
            assert (scores.log_p_BT[row] == 0).all() and scores.likeliest_BT[row].all()
            continue
        c = 6 + n
        behind = np.pad(tokens, ((0, 0), (0, 7 - n)))  # to the same shapes: what follows changes nothing before
        logits = fot_jax.long_forward(CONFIG, params, behind, c + 7 - n, **reading)[0, : tokens.size]
        log_p = np.asarray(jax.nn.log_softmax(logits))[-n - 1 : -1]
        np.testing.assert_allclose(
            scores.log_p_BT[row][NEXT_MASK[row]], log_p[np.arange(n), tokens[0, -n:]], atol=1e-5, rtol=1e-5
        )
        np.testing.assert_array_equal(scores.likeliest_BT[row][NEXT_MASK[row]], log_p.argmax(-1) == tokens[0, -n:])
        np.testing.assert_allclose(after.logits_BV[row], logits[-1], atol=2e-5)
    assert after.mem.keys[0][0].unsafe_buffer_pointer() == held  # where it was, and not deleted


@pytest.mark.parametrize("reading", READINGS, ids=["dense", "topk"])
def test_branches_go_on_as_rows_alone(params, reading):
    reader = branched(prefill(CONFIG, params, TEXT_BT, attention_mask=TEXT_MASK, **reading), WAYS)
    reader = extend(CONFIG, params, reader, NEXT_BT, NEXT_MASK, **reading)
    out, _ = decode(CONFIG, params, reader, max_new_tokens=3, reading=Reading(reading["memory"], reading.get("k")))
    for row in (0, 4, 8):
        tokens, n = alone(row)
        c = min(6, tokens.size - n) + n
        wanted = fot_jax.generate(CONFIG, params, tokens, 3, last_context_length=c, **reading)
        np.testing.assert_array_equal(out[row], wanted[0])


def test_a_window_that_spills_while_it_is_scored(params):
    (tokens,) = np.random.default_rng(3).integers(1, CONFIG.vocab_size, (1, 60))
    reader = prefill(CONFIG, params, tokens[None, :20], room=40)
    scores, reader = score(CONFIG, params, reader, tokens[None, 20:])
    wanted, at = [], prefill(CONFIG, params, tokens[None, :20], room=40)
    for token in tokens[20:]:
        wanted.append(float(jax.nn.log_softmax(at.logits_BV[0])[token]))
        at = extend(CONFIG, params, at, [[token]])
    np.testing.assert_allclose(scores.log_p_BT[0], wanted, atol=2e-5)
    np.testing.assert_array_equal(reader.length_B, [60])


def test_nothing_of_a_shared_memory_is_copied(params):
    """What going on makes does not grow with memory."""
    sizes = []
    for capacity in (2**10, 2**14):
        reader = branched(prefill(CONFIG, params, TEXT_BT[:1], memory_capacity=capacity), 2)
        whole = sum(x.nbytes for x in jax.tree.leaves(reader.mem))
        before = {id(x) for x in jax.live_arrays()}
        out, reader = decode(CONFIG, params, reader, max_new_tokens=2)
        scores, reader = score(CONFIG, params, reader, [[3, 4], [5, 6]])
        new = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
        sizes.append((new, whole))
    assert sizes[1][0] < 1.2 * sizes[0][0] < sizes[1][1] / 10


def test_blocks_of_logits_are_the_whole(params, monkeypatch):
    reader = lambda: prefill(CONFIG, params, TEXT_BT, attention_mask=TEXT_MASK)
    whole, _ = score(CONFIG, params, reader(), NEXT_BT[:3], NEXT_MASK[:3])
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * 3 * 4 * CONFIG.vocab_size)
    jax.clear_caches()
    parts, _ = score(CONFIG, params, reader(), NEXT_BT[:3], NEXT_MASK[:3])
    np.testing.assert_allclose(parts.log_p_BT, whole.log_p_BT, atol=1e-5)


@pytest.mark.parametrize("reading", READINGS, ids=["dense", "topk"])
def test_a_long_open_window_is_read_in_pieces(params, monkeypatch, reading):
    module = sys.modules["fot_jax.generate"]  # which the function of that name hides
    wanted = prefill(CONFIG, params, TEXT_BT, [16, 9, 13], TEXT_MASK, **reading)
    monkeypatch.setattr(module, "OPEN_BYTES", 1)
    monkeypatch.setattr(module, "OPEN_TOKENS", 4)
    found = prefill(CONFIG, params, TEXT_BT, [16, 9, 13], TEXT_MASK, **reading)
    np.testing.assert_allclose(found.logits_BV, wanted.logits_BV, atol=1e-5)
    np.testing.assert_array_equal(found.local.length_B, [16, 9, 13])


def test_on_a_mesh(params, devices):
    wanted, _ = score(CONFIG, params, branched(prefill(CONFIG, params, TEXT_BT[:2]), WAYS), NEXT_BT[:6], NEXT_MASK[:6])
    mesh = sharding.make_mesh({"data": 2, "tensor": 2, "context": 2}, devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.param_shardings(mesh, params))
        reader = branched(prefill(CONFIG, put, TEXT_BT[:2]), WAYS)
        found, _ = score(CONFIG, put, reader, NEXT_BT[:6], NEXT_MASK[:6])
    np.testing.assert_allclose(found.log_p_BT, wanted.log_p_BT, atol=2e-5)


def test_last_context_length_of_each_row(params):
    lengths = [16, 4, 1]
    found = prefill(CONFIG, params, TEXT_BT, lengths, TEXT_MASK)
    for row, c in enumerate(lengths):
        text = TEXT_BT[row : row + 1, -LENGTHS[row] :]
        np.testing.assert_allclose(found.logits_BV[row], prefill(CONFIG, params, text, c).logits_BV[0], atol=1e-5)
    for bad in ([1, 2], 0, [1, 2, 17], 1.5):
        with pytest.raises(ValueError, match="last_context_length"):
            prefill(CONFIG, params, TEXT_BT, bad, TEXT_MASK)


def test_what_cannot_be(params):
    reader = prefill(CONFIG, params, TEXT_BT[:1])
    with pytest.raises(ValueError, match="0 branches of 1 rows"):
        branched(reader, 0)
    two = branched(reader, 2)
    with pytest.raises(ValueError, match="of rows not branched yet"):
        branched(two, 2)
    with pytest.raises(
        ValueError, match="11 tokens follow in a window that has room for 10, and rows that share a mem"
    ):
        extend(CONFIG, params, two, np.ones((2, 11), int))
    with pytest.raises(ValueError, match="the reader shares its memory with others"):
        save_reader("unused", CONFIG, params, two)
    with pytest.raises(ValueError, match="queries have 3 rows and memory 2; wanted a multiple"):
        fot_jax.memory.read(
            fot_jax.memory.DENSE,
            jnp.zeros((3, 1, 1, 4)),
            jnp.zeros((2, 1, 4, 8)),
            jnp.zeros((2, 1, 4, 8)),
            jnp.zeros(2, int),
            scale=1.0,
        )
    with pytest.raises(ValueError, match="row 0 has read nothing"):
        empty = fot_jax.generate.__globals__["new_reader"](CONFIG, 2, 16)
        score(CONFIG, params, empty, [[0, 3], [4, 5]], [[0, 1], [0, 0]])
