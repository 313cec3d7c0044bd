from __future__ import annotations

import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest

import fot_jax
from fot_jax.config import DtypePolicy, ModelConfig
from fot_jax.generate import decode, extend, memory_tokens, new_reader, prefill
from fot_jax.generate import sampling as samplings
from fot_jax.generate.sampling import Sampling
from fot_jax.generate.saved import SavedMemoryError, load_reader, save_reader
from fot_jax.generate.text import TextStream

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
    options = dict(max_new_tokens=piece, spill=spill, reading=fot_jax.memory.Reading(memory, k))
    for step in range(4):
        lengths = [len(row) + piece * step for row in ROWS]
        if config.mem_layers:
            np.testing.assert_array_equal(reader.local.length_B + reader.mem.length_B, lengths)
        for b, row in enumerate(ROWS):
            tokens = np.concatenate([row, *(new[b] for new in out)])
            wanted = reference_logits(config, params, tokens, len(row), c, spill, k)[-1]
            np.testing.assert_allclose(reader.logits_BV[b], wanted, atol=1e-3)
        if step < 3:
            new, reader = decode(config, params, reader, Sampling(2.0), jax.random.key(step), **options)
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
    absent = next(token for token in range(13) if token not in free)
    for eos_id in (eos, (absent, eos)):
        found = generate_small(SMALL.replace(eos_id=eos_id, pad_id=17))
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


# What a program depends on.


@pytest.mark.parametrize("committed", [False, True])
def test_inputs_of_many_lengths_share_one_program_of_each_kind(committed):
    module = sys.modules["fot_jax.generate"]
    compiled = module._extend.programs, module._decode.programs
    sizes = lambda: [module._prefill_in_place._cache_size(), *(count() for count in compiled)]
    config = SMALL.replace(vocab_size=11 + committed)  # no other test's
    params = reference.random_params(config)
    if committed:  # as `load_pretrained` gives them
        params = jax.device_put(params, jax.devices()[0])

    def run(length, new, **options):
        fot_jax.generate(config, params, np.ones((1, length), np.int32), new, key=jax.random.key(0), **options)

    before = sizes()
    run(9, 3)
    assert [after - n for after, n in zip(sizes(), before, strict=True)] == [1, 1, 1]
    before = sizes()
    for length, new in ((100, 5), (1234, 100), (2, 1)):
        run(length, new)
    extend(config, params, prefill(config, params, np.ones((1, 40), np.int32), room=9), np.ones((1, 9), np.int32))
    assert sizes() == before
    programs = module._prefill_kept._cache_size()
    for length in (40, 38):
        fot_jax.long_forward(config, params, np.ones((1, length), np.int32))
    assert module._prefill_kept._cache_size() == programs + 1
    run(9, 3, temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.1)
    before = sizes()
    run(31, 7, temperature=1, top_k=2, top_p=0.2, repetition_penalty=2)
    assert sizes() == before


@hypothesis.given(rows=st.integers(1, 9), needed=st.integers(1, 10**7), window=st.integers(1, 4096))
def test_memory_comes_in_powers_of_two_of_windows(rows, needed, window):
    config = fot_jax.named("longllama_3b").replace(window=window)
    tokens = memory_tokens(config, rows, needed)
    assert tokens >= needed and tokens % window == 0 and (tokens // window).bit_count() == 1
    # As little as that, unless it is small or needed.
    bytes_ = tokens * rows * fot_jax.memory.token_bytes(config)
    assert tokens < 2 * needed + window or bytes_ <= 2**30
    assert tokens >= 8 * window or bytes_ > 2**29


# Reading on.


@pytest.mark.parametrize("spill", ["block", "sliding"])
def test_reading_on_is_as_if_the_tokens_had_been_generated(spill):
    options = dict(spill=spill, memory="topk", k=3)
    more = prompts([21, 0, 5, 12], seed=12)
    tokens_BT, mask_BT = padded(ROWS)
    start = lambda: prefill(CONFIG, PARAMS, tokens_BT, None, mask_BT, "topk", 3, memory_capacity=64)
    at_once = extend(CONFIG, PARAMS, start(), *padded(more), **options)
    one_by_one = start()
    for t in range(21):
        now = [row[t : t + 1] for row in more]
        one_by_one = extend(CONFIG, PARAMS, one_by_one, *padded(now), **options)
    for name in ("length_B", "seen_BV", "ended_B"):
        np.testing.assert_array_equal(getattr(at_once, name), getattr(one_by_one, name))
    for b, (row, new) in enumerate(zip(ROWS, more, strict=True)):
        tokens = np.concatenate([row, new])
        assert at_once.length_B[b] == at_once.mem.length_B[b] + at_once.local.length_B[b] == len(tokens)
        assert at_once.local.length_B[b] == one_by_one.local.length_B[b]
        assert set(np.flatnonzero(at_once.seen_BV[b])) == set(tokens)
        wanted = reference_logits(CONFIG, PARAMS, tokens, len(row), CONFIG.last_context_length, spill, 3)[-1]
        np.testing.assert_allclose(at_once.logits_BV[b], wanted, atol=1e-3)
        np.testing.assert_allclose(one_by_one.logits_BV[b], wanted, atol=1e-3)


def test_reading_on_without_room_or_with_other_rows_is_refused():
    reader = new_reader(CONFIG, 2, 16)
    with pytest.raises(ValueError, match="17 new tokens need a memory of 17 slots; it has 16"):
        extend(CONFIG, None, reader, np.ones((2, 17), np.int32))
    with pytest.raises(ValueError, match="tokens have 1 rows; wanted the reader's 2"):
        extend(CONFIG, None, reader, np.ones((1, 3), np.int32))


def test_decoding_in_parts_draws_what_decoding_at_once_does():
    config = SMALL.replace(eos_id=4)
    sampling, key = Sampling(1.5, top_k=9, top_p=0.95, repetition_penalty=1.2), jax.random.key(5)
    tokens_BT, mask_BT = SMALL_PROMPTS
    start = lambda: prefill(config, SMALL_PARAMS, tokens_BT, None, mask_BT, room=20)
    at_once, last = decode(config, SMALL_PARAMS, start(), sampling, key, max_new_tokens=20)
    reader, parts = start(), []
    for n in (1, 12, 7):
        new, reader = decode(config, SMALL_PARAMS, reader, sampling, key, max_new_tokens=n)
        parts.append(new)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), at_once)
    np.testing.assert_array_equal(reader.length_B, last.length_B)
    np.testing.assert_array_equal(reader.logits_BV, last.logits_BV)
    # Padding after the eos is not read.
    new_B = [list(row).index(4) + 1 if 4 in row else 20 for row in np.asarray(at_once)]
    np.testing.assert_array_equal(last.length_B, mask_BT.sum(1) + new_B)


def test_a_row_draws_by_its_own_key():
    tokens_BT, mask_BT = SMALL_PROMPTS
    key_B = jax.random.split(jax.random.key(1), 2)
    options = dict(temperature=2.0, top_p=0.9)
    both = generate_small(key=key_B, **options)
    swapped = fot_jax.generate(
        SMALL, SMALL_PARAMS, tokens_BT[::-1], 20, attention_mask=mask_BT[::-1], key=key_B[::-1], **options
    )
    np.testing.assert_array_equal(swapped, both[::-1])
    first = generate_small(key=jax.random.key(3), **options)
    others = np.roll(tokens_BT, 1, axis=1)
    others[0] = tokens_BT[0]
    again = fot_jax.generate(SMALL, SMALL_PARAMS, others, 20, attention_mask=mask_BT, key=jax.random.key(3), **options)
    np.testing.assert_array_equal(again[0], first[0])
    with pytest.raises(ValueError, match=r"key has shape \(3,\); wanted one key, or one for each of 2 rows"):
        generate_small(key=jax.random.split(jax.random.key(0), 3), **options)


# How a token is chosen.


def reference_filter(scores, seen, sampling):
    """float64 probabilities of the next token, from the definitions."""
    scores = np.asarray(scores, np.float64)
    penalised = np.where(scores < 0, scores * sampling.repetition_penalty, scores / sampling.repetition_penalty)
    p = reference.softmax(np.where(seen, penalised, scores) / sampling.temperature)
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    p[order[(before >= sampling.top_p) & (np.arange(len(p)) > 0)]] = 0
    return p / p.sum()


def found_probabilities(scores_BV, seen_BV, sampling):
    scores_BV = samplings.penalise(jnp.asarray(scores_BV), jnp.asarray(seen_BV), sampling.values.repetition_penalty)
    return np.asarray(jax.nn.softmax(samplings.filtered(scores_BV, sampling.values, sampling.steps), axis=-1))


SAMPLINGS = [
    Sampling(0.7),
    Sampling(1.3, top_k=5),
    Sampling(0.9, top_p=0.8),
    Sampling(2.0, top_k=30, top_p=0.5, repetition_penalty=1.4),
    Sampling(1.0, top_k=1, repetition_penalty=0.5),
    Sampling(1.0, top_k=10**6, top_p=1e-6),
]


@pytest.mark.parametrize("sampling", [*SAMPLINGS, Sampling(1.2e-38)], ids=str)
def test_filters_are_their_definitions(sampling):
    rng = np.random.default_rng(0)
    scores_BV, seen_BV = rng.normal(0, 2, (5, 50)).astype(np.float32), rng.random((5, 50)) < 0.3
    found = found_probabilities(scores_BV, seen_BV, sampling)
    wanted = [reference_filter(*row, sampling) for row in zip(scores_BV, seen_BV, strict=True)]
    np.testing.assert_array_equal(found > 0, np.array(wanted) > 0)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_filters_are_those_of_transformers(sampling):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(1)
    scores_BV, prompt_BT = rng.normal(0, 2, (5, 50)).astype(np.float32), rng.integers(0, 50, (5, 12))
    chain = [process.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    chain += [process.TemperatureLogitsWarper(float(sampling.temperature))]
    chain += [process.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [process.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    wanted = torch.tensor(scores_BV)
    for processor in chain:
        wanted = processor(torch.tensor(prompt_BT), wanted)
    seen_BV = np.zeros(scores_BV.shape, bool)
    np.put_along_axis(seen_BV, prompt_BT, True, axis=1)
    found = found_probabilities(scores_BV, seen_BV, sampling)
    np.testing.assert_allclose(found, torch.softmax(wanted, -1).numpy(), atol=1e-6)


def test_the_repetition_penalty_counts_the_prompt_and_not_its_padding():
    # So strong that no token comes twice before all have come.
    tokens_BT, mask_BT = padded([np.array([1, 2, 3, 4, 5]), np.array([6, 7])], vocab=13)
    options = dict(attention_mask=mask_BT, repetition_penalty=1e6)
    found = np.asarray(fot_jax.generate(SMALL, SMALL_PARAMS, tokens_BT, 20, **options))
    # Scores above zero become nearly 0, those below far less; what was seen wins only over lower scores.
    logits = reference_logits(SMALL, SMALL_PARAMS, np.array([6, 7]), 2, SMALL.last_context_length)[-1]
    penalised = np.where(np.isin(np.arange(13), [6, 7]), np.where(logits < 0, logits * 1e6, logits / 1e6), logits)
    assert found[1, 0] == penalised.argmax()
    assert len(set(found[1, :4]) | {6, 7}) >= 5


# Saved and read again.


@pytest.mark.parametrize("memory_dtype", ["float32", "bfloat16"])
def test_a_saved_reader_goes_on_where_it_was(tmp_path, memory_dtype):
    config = SMALL.replace(dtypes=DtypePolicy(memory=memory_dtype))
    tokens_BT, mask_BT = SMALL_PROMPTS
    start = lambda: prefill(config, SMALL_PARAMS, tokens_BT, None, mask_BT, room=20)
    reader = start()
    save_reader(tmp_path / "read", config, SMALL_PARAMS, reader)
    assert [path.name for path in tmp_path.iterdir()] == ["read"]
    assert (tmp_path / "read").stat().st_size < 10_000  # what is filled, not what there is room for
    loaded = load_reader(tmp_path / "read", config, SMALL_PARAMS, room=20)
    assert jax.tree.structure(loaded) == jax.tree.structure(reader)
    jax.tree.map(np.testing.assert_array_equal, loaded, reader)
    assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(reader), strict=True))
    sampling = Sampling(1.2, repetition_penalty=1.3)
    options = dict(max_new_tokens=20)
    wanted, _ = decode(config, SMALL_PARAMS, reader, sampling, jax.random.key(0), **options)
    found, _ = decode(config, SMALL_PARAMS, loaded, sampling, jax.random.key(0), **options)
    np.testing.assert_array_equal(found, wanted)


def test_one_saved_row_becomes_many(tmp_path):
    reader = prefill(SMALL, SMALL_PARAMS, np.arange(12)[None], room=20)
    save_reader(tmp_path / "read", SMALL, SMALL_PARAMS, reader)
    loaded = load_reader(tmp_path / "read", SMALL, SMALL_PARAMS, rows=3, memory_capacity=24)
    np.testing.assert_array_equal(loaded.length_B, [12] * 3)
    np.testing.assert_array_equal(loaded.logits_BV, np.tile(reader.logits_BV, (3, 1)))
    assert loaded.mem.capacity == 24


def test_files_that_are_no_saved_memory_of_this_model(tmp_path):
    path = tmp_path / "read"
    reader = prefill(SMALL, SMALL_PARAMS, *SMALL_PROMPTS[:1], attention_mask=SMALL_PROMPTS[1], room=20)
    save_reader(path, SMALL, SMALL_PARAMS, reader)
    whole = path.read_bytes()

    def refused(message, config=SMALL, params=SMALL_PARAMS, error=SavedMemoryError, **options):
        with pytest.raises(error, match=message):
            load_reader(path, config, params, **options)

    refused("another model: its rope_base is 10000.0, the model's 5.0", SMALL.replace(rope_base=5.0))
    low = SMALL.replace(dtypes=DtypePolicy(memory="bfloat16"))
    refused("its dtypes is .*'memory': 'float32'.*the model's .*'bfloat16'", low)
    refused("its parameters is", params=jax.tree.map(lambda x: 2 * x, SMALL_PARAMS))
    refused("it has 2 rows; wanted 3, or 1 to be copied", rows=3, error=ValueError)
    refused(
        "9 tokens and 50 new ones need a memory of 59 slots; memory_capacity is 24",
        room=50,
        memory_capacity=24,
        error=ValueError,
    )
    path.write_bytes(whole[:-100])
    refused("truncated, damaged or no safetensors file")
    path.write_bytes(whole[:20])
    refused("truncated, damaged or no safetensors file")
    path.write_bytes(whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:])
    refused("its checksum is not that of its contents")
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in np.random.default_rng(0).integers(8, head, 60):  # the head too: names, offsets, the model, the sum
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        refused(f"saved memory {path}: ", error=(SavedMemoryError, OSError))
    path.unlink()
    refused("no such file", error=FileNotFoundError)


# Text as it comes.


class Utf8:
    """Every byte a token; a stand-in for tokenizers with byte fallback."""

    vocab_size = 256

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    text=st.text(alphabet="ab€é🙂\n", max_size=60),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=2),
    prompt=st.text(alphabet="aé🙂", max_size=5),
)
def test_text_comes_in_whole_characters_and_never_past_a_stop_string(text, cuts, stop, prompt):
    stream = TextStream(Utf8(), list(prompt.encode()), stop)
    ids, out, at, turn = list(text.encode()), [], 0, 0
    wanted = min((text[: text.find(s)] for s in stop if s in text), key=len, default=text)
    while at < len(ids):
        size = cuts[turn % len(cuts)]
        out.append(stream.push(ids[at : at + size] + [300]))  # a token beyond the tokenizer's has no text
        at, turn = at + size, turn + 1
        assert wanted.startswith("".join(out))  # no half characters, nothing of a stop string
    out.append(stream.finish())
    assert "".join(out) == wanted == stream.text
    assert stream.stopped == (wanted != text)


def test_text_does_not_wait_for_more_than_it_needs():
    stream = TextStream(Utf8(), [], ["stop"])
    assert stream.push(b"abst") == "ab"
    assert stream.push(b"and") == "stand"
    assert stream.push("🙂".encode()[:3]) == ""
    assert stream.push("🙂".encode()[3:]) == "🙂"
    assert stream.push(b"\xff\xff\xff\xff") == "\ufffd"  # no character has four unfinished bytes
    assert stream.push(b"s") == "\ufffd" * 3 and stream.finish() == "s"


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
        (ROW, {"memory": "dense", "k": 4}, "wanted k for 'topk' and 'approximate', and only there"),
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
        ({"top_k": -1}, "top_k is -1; wanted a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0; wanted a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"attention_mask": np.array([[1, 1, 0, 1], [0, 0, 0, 0]])}, "row 1 of the prompt has no token"),
        ({"memory_capacity": 0}, "memory_capacity is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5; wanted at least 1"),
        ({"last_context_length": 2.5}, "last_context_length is 2.5; wanted 1..8"),
        ({"memory": "topk", "k": 2.5}, "k is 2.5; wanted a whole number of at least 1"),
        ({"memory_capacity": 6}, "prompt of 4 tokens and 3 new ones need a memory of 7 slots; memory_capacity is 6"),
    ],
)
def test_generation_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        fot_jax.generate(CONFIG, None, ROW, **{"max_new_tokens": 3, **options})


def test_decoding_into_a_memory_without_room_is_refused():
    params = reference.random_params(CONFIG)
    reader = prefill(CONFIG, params, np.ones((1, 6), np.int32), last_context_length=2, memory_capacity=16)
    with pytest.raises(ValueError, match="need a memory of .* slots; it has"):
        decode(CONFIG, params, reader, max_new_tokens=100)
