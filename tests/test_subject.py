"""A model that is asked: what it says depends on the question alone; and the journal of what was measured."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import fot_jax
from fot_jax import memory, sharding
from fot_jax.evals import identity
from fot_jax.evals import subject as subjects
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject

CONFIG = fot_jax.ModelConfig(
    vocab_size=64,
    d_model=32,
    d_ff=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    window=16,
    mem_layers=(1,),
    last_context_length=6,
    init_std=0.4,
    eos_id=2,
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(fot_jax.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def ids(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, CONFIG.vocab_size, n).astype(np.int32) for n in lengths]


TEXTS = ids(0, 45, 5, 28)
NEXT = [ids(1, 3, 2, 4), ids(2, 1), ids(3, 5, 2)]


def log_p(params, text, follows, c):
    """Of each token that follows, by the plain forward pass over all of it."""
    tokens, n = np.concatenate([text, follows])[None], len(follows)
    logits = fot_jax.long_forward(CONFIG, params, tokens, c)[0, -n - 1 : -1]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(n), follows]


def open_tokens(text, follows):
    """Tokens in the open window at the end: all, where they and as many as the longest has fit; else the last."""
    return len(text) + len(follows) if len(text) + 5 <= CONFIG.window else CONFIG.last_context_length + len(follows)


@pytest.mark.parametrize("window_bytes", [2**30, 1])
def test_scores_are_those_of_a_forward_pass(params, monkeypatch, window_bytes):
    monkeypatch.setattr(subjects, "WINDOW_BYTES", window_bytes)  # all branches at a time, or one
    asked = Subject(CONFIG, params, None, rows=4)
    found = asked.scores(TEXTS, NEXT)
    assert [len(each) for each in found] == [3, 1, 2]
    for text, follows, each in zip(TEXTS, NEXT, found, strict=True):
        for continuation, likely in zip(follows, each, strict=True):
            wanted = log_p(params, text, continuation, open_tokens(text, continuation))
            np.testing.assert_allclose(likely.log_p, wanted, atol=2e-5)
            np.testing.assert_allclose(likely.sum, wanted.sum(), atol=5e-5)
    assert asked.clock.read == sum(map(len, TEXTS)) + sum(len(x) for each in NEXT for x in each)
    assert 0 < asked.clock.compile_seconds <= asked.clock.model_seconds


def test_what_is_asked_alone_is_answered_the_same(params):
    together = Subject(CONFIG, params, None, rows=4).scores(TEXTS, NEXT, room=5)
    alone = Subject(CONFIG, params, None, rows=1)
    for text, follows, each in zip(TEXTS, NEXT, together, strict=True):
        for continuation, likely in zip(follows, each, strict=True):
            ((one,),) = alone.scores([text], [[continuation]], room=5)
            np.testing.assert_allclose(one.log_p, likely.log_p, atol=1e-5)
            assert one.greedy == likely.greedy


def test_greedy_is_what_would_be_answered(params):
    asked = Subject(CONFIG, params, None, rows=4)
    answers = asked.answers(TEXTS, NEXT, 4, room=9)
    for text, each, found in zip(TEXTS, NEXT, answers, strict=True):
        for question, answer in zip(each, found, strict=True):
            c = len(text) if len(text) + 9 <= 16 else 6
            wanted = fot_jax.generate(
                CONFIG, params, np.concatenate([text, question])[None], 4, last_context_length=c + len(question)
            )[0]
            ends = np.flatnonzero(wanted == 2)
            np.testing.assert_array_equal(answer, wanted[: ends[0]] if len(ends) else wanted)
    follows = [np.concatenate([NEXT[0][0], answers[0][0]]), np.concatenate([NEXT[0][0], [7, 7]])]
    ((right, wrong),) = asked.scores(TEXTS[:1], [follows], room=9)
    assert right.likeliest[len(NEXT[0][0]) :].all() and not wrong.likeliest[len(NEXT[0][0]) :].all()
    ((empty,),) = asked.scores(TEXTS[:1], [[follows[0][:0]]])
    assert empty.greedy and empty.sum == 0


class Letters:
    """A tokenizer: a letter each, from token 3 on."""

    adds_bos, bos_id, vocab_size = True, 1, CONFIG.vocab_size

    def encode(self, text):
        return np.array([ord(c) - 62 for c in text], np.int32)

    def decode(self, tokens):
        return "".join(chr(int(t) + 62) for t in tokens)


def test_an_answer_ends_where_a_text_stops_it(params, monkeypatch):
    monkeypatch.setattr(subjects, "STOP_TOKENS", 2)
    asked = Subject(CONFIG, params, Letters(), rows=2)
    ((whole,),) = asked.answers(TEXTS[:1], [[NEXT[0][0]]], 8, room=12)
    text = Letters().decode(whole)
    ((stopped,),) = asked.answers(TEXTS[:1], [[NEXT[0][0]]], 8, stop=[text[2]], room=12)
    first = text.index(text[2])
    assert Letters().decode(stopped) == text[: first // 2 * 2 + 2]  # up to the end of the tokens asked for at a time
    np.testing.assert_array_equal(asked.encode("AB"), [1, 3, 4])


def test_on_eight_devices_as_on_one(params, devices):
    options = dict(rows=4)
    one = Subject(CONFIG, params, None, memory.Reading("topk", 4), **options)
    wanted = one.scores(TEXTS, NEXT), one.answers(TEXTS, NEXT, 3)
    mesh = sharding.make_mesh(dict(data=2, tensor=2, context=2), devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.param_shardings(mesh, params))
        eight = Subject(CONFIG, put, None, memory.Reading("topk", 4), **options)
        found = eight.scores(TEXTS, NEXT), eight.answers(TEXTS, NEXT, 3)
        assert identity.fingerprint(put) == identity.fingerprint(params)
    for a, b in zip(jax.tree.leaves(wanted[1]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    for each, other in zip(wanted[0], found[0], strict=True):
        for a, b in zip(each, other, strict=True):
            np.testing.assert_allclose(a.log_p, b.log_p, atol=2e-5)


def test_what_cannot_be_asked(params):
    asked = Subject(CONFIG, params, None, rows=2)
    with pytest.raises(ValueError, match="3 texts of 5 tokens or more; wanted 1..2"):
        asked.read(TEXTS, 1)
    with pytest.raises(ValueError, match="1 texts of 0 tokens"):
        asked.read(ids(0, 0), 1)
    with pytest.raises(ValueError, match="question and answer have 16 tokens; wanted fewer than the window's 16"):
        asked.read(TEXTS[:1], 16)
    options = ConfigDict(subjects.reading_options() | dict(capacity=100))
    with pytest.raises(ValueError, match="a prompt has 101 tokens; capacity is 100"):
        subjects.check_length(CONFIG, options, 101, "a prompt")
    plain = CONFIG.replace(mem_layers=())
    with pytest.raises(ValueError, match=r"a prompt has 17 tokens; the model has no memory layers.* window of 16"):
        subjects.check_length(plain, options, 17, "a prompt")
    subjects.check_length(plain, options, 16, "a prompt")
    shorter = ConfigDict(subjects.reading_options() | dict(window=4))
    assert subjects.check_reading(CONFIG, shorter).last_context_length == 4


def test_parts_are_measured_once(tmp_path, capsys):
    measured = []

    def part(n, fails=False):
        def measure():
            if fails:
                raise RuntimeError("killed")
            measured.append(n)
            return {"x": n / 3, "y": (n,)}

        return Part(f"part {n}", 1, measure)

    path, identity = tmp_path / "e.partial.jsonl", {"seed": 0}
    with pytest.raises(RuntimeError):
        Journal(path, identity).results([part(1), part(2), part(3, fails=True), part(4)])
    with open(path, "a") as file:
        file.write('{"key": "part 3", "res')  # killed while it wrote
    found = Journal(path, identity).results([part(n) for n in range(1, 5)], "e")
    assert measured == [1, 2, 3, 4] and "e: 2 of 4 were done before" in capsys.readouterr().err
    assert found == Journal().results([part(n) for n in range(1, 5)])
    assert found[0] == {"x": 1 / 3, "y": [1]}
    assert len(path.read_text().splitlines()) == 5 and [json.loads(line) for line in path.read_text().splitlines()]

    measured.clear()
    other = Journal(path, {"seed": 1})
    with pytest.raises(ValueError, match="another process is at this evaluation"):
        Journal(path, {"seed": 1})
    other.results([part(1)])
    assert measured == [1]
    other.close()
    assert not path.exists()
    with pytest.raises(ValueError, match="two parts are called 'part 1'"):
        Journal().results([part(1), part(1)])


def test_the_identity_tells_models_and_inputs_apart(params):
    swapped = jax.tree.map(lambda x: x, params)
    scale = swapped["norm"]["scale"]
    swapped["norm"]["scale"] = scale.at[0].set(2.0)
    moved = jax.tree.map(lambda x: x, params)
    moved["norm"]["scale"] = scale.at[1].set(2.0)
    found = {identity.fingerprint(each) for each in (params, swapped, moved)}
    assert len(found) == 3 and identity.fingerprint(params) in found
    assert identity.digest([["ab"], 1]) != identity.digest([["a", "b"], 1]) != identity.digest([["ab"], "1"])
    assert identity.digest({"a": np.arange(3)}) != identity.digest({"a": np.arange(3.0)})
