from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

import fot_jax
from fot_jax.config import DtypePolicy, ModelConfig
from fot_jax.generate import decode, prefill

CONFIG = ModelConfig(
    vocab_size=61,
    d_model=16,
    d_ff=20,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_size=6,
    window=8,
    mem_layers=(1,),
    last_context_length=5,
    eos_id=None,
    pad_id=0,
)
PARAMS = reference.random_params(CONFIG)


def prompts(lengths, seed=0, vocab=CONFIG.vocab_size):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths]


def padded(rows, left=True, vocab=CONFIG.vocab_size):
    """[B, T] with any tokens where a row has none, and the mask that says so."""
    T = max(map(len, rows))
    tokens_BT = np.random.default_rng(99).integers(0, vocab, (len(rows), T)).astype(np.int32)
    mask_BT = np.zeros((len(rows), T), np.int32)
    for b, row in enumerate(rows):
        columns = slice(T - len(row), None) if left else slice(0, len(row))
        tokens_BT[b, columns], mask_BT[b, columns] = row, 1
    return tokens_BT, mask_BT


def reference_logits(config, params, tokens, prompt, c, spill="block", k=None):
    """At every position, in one pass over all of it, where the reference's windows start as they do in generation."""
    start = reference.window_starts(prompt, len(tokens), config.window, c, spill)
    return reference.forward(config, params, np.asarray(tokens)[None], start_BT=start[None], k=k)[0]


def check_greedy(config, params, rows, found_BN, c, spill="block", k=None):
    """Each new token is the likeliest in a full recomputation, and varied enough for that to say something."""
    found_BN = np.asarray(found_BN)
    assert found_BN.dtype == np.int32
    for row, new in zip(rows, found_BN, strict=True):
        logits = reference_logits(config, params, np.concatenate([row, new])[:-1], len(row), c, spill, k)[
            len(row) - 1 :
        ]
        chosen = np.take_along_axis(logits, new[:, None], axis=-1)[:, 0]
        np.testing.assert_array_less(logits.max(-1) - chosen, 1e-3)
        assert np.mean(logits.argmax(-1) == new) > 0.9
    assert np.mean([len(set(new)) for new in found_BN]) > 4


# Rows of very different lengths, one shorter than the open window: each must go on as if it were alone.
ROWS = prompts([29, 3, 8, 17], seed=2)
N = 26


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (
            {"mem_layers": (0, 1), "mem_positionals": False, "qk_norm": True, "tie_embeddings": True},
            {"memory": "topk", "k": 5, "last_context_length": 1},
        ),
        ({"mem_layers": ()}, {"spill": "sliding", "last_context_length": 8}),
    ],
    ids=["block", "small model", "no memory layer"],
)
def test_greedy_tokens_are_those_of_full_recomputation(changes, options):
    config = CONFIG.replace(**changes)
    params = reference.random_params(config, seed=1)
    tokens_BT, mask_BT = padded(ROWS)
    found = fot_jax.generate(config, params, tokens_BT, N, attention_mask=mask_BT, **options)
    c = options.get("last_context_length", CONFIG.last_context_length)
    check_greedy(config, params, ROWS, found, c, options.get("spill", "block"), options.get("k"))


def test_a_padded_row_is_the_row_alone():
    tokens_BT, mask_BT = padded(ROWS)
    together = fot_jax.generate(CONFIG, PARAMS, tokens_BT, N, attention_mask=mask_BT)
    right, mask = padded(ROWS, left=False)
    np.testing.assert_array_equal(fot_jax.generate(CONFIG, PARAMS, right, N, attention_mask=mask), together)
    for b, row in enumerate(ROWS):
        # As many copies as there were rows, and as much memory: shapes, so programs, are the same.
        alone = fot_jax.generate(CONFIG, PARAMS, np.tile(row, (len(ROWS), 1)), N, memory_capacity=56)
        np.testing.assert_array_equal(alone, np.tile(together[b], (len(ROWS), 1)))


@pytest.mark.parametrize(
    ("changes", "spill", "c", "k"),
    [({}, "block", 5, None), ({}, "sliding", 5, 3), ({"window": 16, "n_kv_heads": 1}, "sliding", 16, None)],
    ids=["block", "sliding topk", "sliding by two"],
)
def test_decoding_goes_on_from_what_was_read_with_the_logits_of_one_pass(changes, spill, c, k):
    config = CONFIG.replace(**changes)
    params = reference.random_params(config)
    tokens_BT, mask_BT = padded(ROWS)
    memory, piece = "topk" if k else "dense", 7
    reader = prefill(config, params, tokens_BT, c, mask_BT, memory=memory, k=k, room=N)
    out = []
    options = dict(max_new_tokens=piece, sample=True, spill=spill, reading=fot_jax.memory.Reading(memory, k))
    for step in range(4):
        lengths = [len(row) + piece * step for row in ROWS]
        if config.mem_layers:
            np.testing.assert_array_equal(reader.local.length_B + reader.mem.length_B, lengths)
        for b, row in enumerate(ROWS):
            tokens = np.concatenate([row, *(new[b] for new in out)])
            wanted = reference_logits(config, params, tokens, len(row), c, spill, k)[-1]
            np.testing.assert_allclose(reader.logits_BV[b], wanted, atol=1e-3)
        if step < 3:
            new, reader = decode(config, params, reader, jnp.float32(2), jax.random.key(step), **options)
            out.append(np.asarray(new))


# What is chosen, and when it stops: one layer is enough.

SMALL = CONFIG.replace(vocab_size=13, n_layers=1, mem_layers=(0,))
SMALL_PARAMS = reference.random_params(SMALL)
SMALL_PROMPTS = padded(prompts([9, 4], seed=5, vocab=13), vocab=13)


def generate_small(config=SMALL, **options):
    tokens_BT, mask_BT = SMALL_PROMPTS
    return np.asarray(fot_jax.generate(config, SMALL_PARAMS, tokens_BT, 20, attention_mask=mask_BT, **options))


def test_after_the_eos_a_row_is_padding():
    free = generate_small()
    end_of = lambda row, token: list(row).index(token) if token in row else 19
    # The token that ends the two rows furthest apart.
    eos = max(range(13), key=lambda token: abs(end_of(free[0], token) - end_of(free[1], token)))
    ends = [end_of(row, eos) for row in free]
    assert abs(ends[0] - ends[1]) > 2
    found = generate_small(SMALL.replace(eos_id=eos, pad_id=17))
    for row, wanted, end in zip(found, free, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], wanted[: end + 1])
        assert np.all(row[end + 1 :] == 17)


def test_sampling_follows_temperature():
    row = prompts([6], seed=6, vocab=13)[0]
    temperature, key = 2.5, jax.random.key(0)
    drawn = fot_jax.generate(SMALL, SMALL_PARAMS, np.tile(row, (3000, 1)), 1, temperature=temperature, key=key)
    logits = reference_logits(SMALL, SMALL_PARAMS, row, 6, SMALL.last_context_length)[-1]
    share = np.bincount(np.asarray(drawn)[:, 0], minlength=13) / 3000
    distance = lambda t: 0.5 * np.abs(share - reference.softmax(logits / t)).sum()
    assert distance(temperature) < 0.03 < min(distance(1.0), distance(2.0), distance(3.2))


def test_sampling_follows_its_key():
    sample = lambda seed, temperature=2.0: generate_small(temperature=temperature, key=jax.random.key(seed))
    first = sample(0)
    np.testing.assert_array_equal(sample(0), first)
    assert np.mean(sample(1) == first) < 0.7
    assert np.mean(first[:, :-1] == first[:, 1:]) < 0.7  # steps draw anew
    np.testing.assert_array_equal(sample(2, temperature=1e-5), generate_small())
    # There is no eos: what is padding, bos or eos to others is a token like any, and nothing stops.
    hot = sample(3, temperature=1e4)
    assert len(set(hot[0])) > 6 and len(set(hot[0, -8:])) > 2


def test_memory_capacity_stated():
    np.testing.assert_array_equal(generate_small(memory_capacity=40), generate_small())


# Whole inputs.


@pytest.mark.parametrize(
    ("changes", "T", "c", "k"),
    [
        ({}, 27, 5, None),
        ({}, 27, 1, 4),
        ({"mem_layers": (0, 1), "mem_positionals": False, "qk_norm": True}, 24, 8, None),
        ({"n_kv_heads": 1}, 4, 7, None),
    ],
    ids=["dense", "topk", "small model", "shorter than the window"],
)
def test_long_forward_is_one_pass_with_windows_by_column(changes, T, c, k):
    config = CONFIG.replace(**changes)
    params = reference.random_params(config)
    tokens_BT = np.random.default_rng(3).integers(0, config.vocab_size, (3, T)).astype(np.int32)
    mask_BT = np.ones((3, T), np.int32)
    mask_BT[1, : T // 2 + 1] = 0  # a column of padding and more: positions are columns
    mask_BT[2, 2:3] = 0
    found = fot_jax.long_forward(
        config, params, tokens_BT, last_context_length=c, attention_mask=mask_BT, memory="topk" if k else "dense", k=k
    )
    assert found.shape == (3, T, config.vocab_size) and found.dtype == jnp.float32
    start_BT = np.tile(reference.window_starts(T, T, config.window, c), (3, 1))
    wanted = reference.forward(config, params, tokens_BT, start_BT=start_BT, valid_BT=mask_BT, k=k)
    np.testing.assert_allclose(np.asarray(found)[mask_BT > 0], wanted[mask_BT > 0], atol=5e-4)


def test_bfloat16_memory_is_near_float32_memory():
    low = CONFIG.replace(dtypes=DtypePolicy(memory="bfloat16"))
    tokens_BT = np.stack(prompts([27, 27, 27], seed=7))
    wanted = np.asarray(fot_jax.long_forward(CONFIG, PARAMS, tokens_BT))
    found = np.asarray(fot_jax.long_forward(low, PARAMS, tokens_BT))
    np.testing.assert_array_equal(found[:, :8], wanted[:, :8])  # nothing remembered yet
    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


def test_what_a_position_depends_on_by_gradient():
    # Every position has a token of its own, so that the embedding's gradient is the gradient by position.
    T = 18
    config = SMALL.replace(vocab_size=T)
    params = reference.random_params(config)
    tokens_BT, mask_BT = np.arange(T, dtype=np.int32)[None], np.ones((1, T), np.int32)
    mask_BT[0, [1, 16]] = 0
    direction = np.random.default_rng(0).standard_normal(T).astype(np.float32)

    @jax.jacrev
    def dependence(embedding):
        moved = {**params, "embed": {"embedding": embedding}}
        return fot_jax.long_forward(config, moved, tokens_BT, attention_mask=mask_BT)[0] @ direction

    depends = np.abs(dependence(jnp.asarray(params["embed"]["embedding"]))).max(-1)
    valid = mask_BT[0] > 0
    wanted = np.tri(T, dtype=bool) & valid[None, :]
    np.testing.assert_array_equal((depends > 1e-9)[valid], wanted[valid])
    assert not np.any(depends[valid][~wanted[valid]])


def test_later_tokens_change_no_earlier_logits_in_topk_memory():
    # Retrieval is not continuous, so tokens are changed: one in a window, one in the last.
    tokens_BT = np.tile(prompts([27], seed=8)[0], (3, 1))
    changed = ((1, 8), (2, 26))
    for b, t in changed:
        tokens_BT[b, t] = (tokens_BT[b, t] + 1) % CONFIG.vocab_size
    logits = np.asarray(fot_jax.long_forward(CONFIG, PARAMS, tokens_BT, 1, memory="topk", k=4))
    for b, t in changed:
        np.testing.assert_array_equal(logits[b, :t], logits[0, :t])
        assert np.abs(logits[b, t] - logits[0, t]).max() > 1e-3
    assert np.abs(logits[1, 16:] - logits[0, 16:]).max() > 1e-3  # and is remembered


# Input that does not fit; each is refused before anything is computed, so parameters are not looked at.

ROW = np.ones((2, 4), np.int32)


@pytest.mark.parametrize("call", ["generate", "long_forward"])
@pytest.mark.parametrize(
    ("tokens_BT", "options", "message"),
    [
        (np.ones(4, np.int32), {}, r"tokens have shape \(4,\)"),
        (np.ones((2, 4)), {}, "dtype float64; wanted integers"),
        (np.ones((2, 0), np.int32), {}, "none of them empty"),
        (np.array([[3, 61]]), {}, "token 61 is outside the model's vocabulary of 61"),
        (np.array([[3, -1]]), {}, "token -1 is outside the model's vocabulary of 61"),
        (ROW, {"last_context_length": 0}, r"last_context_length is 0; wanted 1\.\.8"),
        (ROW, {"last_context_length": 9}, r"last_context_length is 9; wanted 1\.\.8"),
        (
            ROW,
            {"attention_mask": np.ones((2, 3))},
            r"attention_mask has shape \(2, 3\); wanted that of the tokens, \(2, 4\)",
        ),
        (ROW, {"memory": "topk"}, "wanted k for 'topk'"),
        (ROW, {"memory": "dense", "k": 4}, "wanted k for 'topk', and only there"),
        (ROW, {"memory": "sparse"}, "memory reading is 'sparse'"),
        (ROW, {"memory": "topk", "k": 0}, "k is 0"),
    ],
)
def test_input_that_does_not_fit(call, tokens_BT, options, message):
    call = fot_jax.long_forward if call == "long_forward" else lambda *a, **o: fot_jax.generate(*a, 3, **o)
    with pytest.raises(ValueError, match=message):
        call(CONFIG, None, tokens_BT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spill": "all"}, "spill is 'all'; wanted one of block, sliding"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; wanted at least 1"),
        ({"temperature": -1.0, "key": 0}, "temperature is -1.0"),
        ({"temperature": 1.0}, "a key where it is above 0"),
        ({"attention_mask": np.array([[1, 1, 0, 1], [0, 0, 0, 0]])}, "row 1 of the prompt has no token"),
        ({"memory_capacity": 0}, "memory_capacity is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; wanted at least 1"),
        ({"last_context_length": 2.5}, "last_context_length is 2.5; wanted 1..8"),
        ({"memory": "topk", "k": 2.5}, "k is 2.5; wanted at least 1"),
        ({"memory_capacity": 6}, "prompt of 4 tokens and 3 new ones need a memory of 7 slots; memory_capacity is 6"),
    ],
)
def test_generation_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        fot_jax.generate(CONFIG, None, ROW, **{"max_new_tokens": 3, **options})


def test_decoding_into_a_memory_without_room_is_refused():
    params = reference.random_params(CONFIG)
    reader = prefill(CONFIG, params, np.ones((1, 6), np.int32), last_context_length=2)
    with pytest.raises(ValueError, match="need a memory of .* slots; it has"):
        decode(CONFIG, params, reader, 1.0, jax.random.key(0), max_new_tokens=100)
