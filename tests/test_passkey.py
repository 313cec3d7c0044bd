"""Passkey prompts against the published generator, spelled out; and the evaluation of a model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import fot_jax
from fot_jax.evals import passkey
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject
from fot_jax.tokenizer import open_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    text = "\n".join([passkey.TASK, passkey.GARBAGE, passkey.QUESTION, *(passkey.KEY.format(key=k) for k in range(99))])
    train_tokenizer([text] * 4, path, 360)
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def config(tokenizer):
    return fot_jax.ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, d_ff=24, n_layers=2, n_heads=2, window=32, mem_layers=(1,)
    )


def test_the_published_prompt():
    """epfml/landmark-attention, llama/run_test.py, generate_prompt, for n_garbage 200, n_garbage_prefix 97."""
    garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    infinite = " ".join([garbage] * 2000)
    wanted = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n"
        + infinite[:97]
        + "\nThe pass key is 31. Remember it. 31 is the pass "
        "key.\n" + infinite[:103] + "\nWhat is the pass key? The pass key is"
    )
    assert passkey.prompt(200, 97 / 200, 31) == wanted
    assert len(passkey.prompt(3_750_000, 0.5, 1)) == len(passkey.prompt(0, 0.5, 1)) + 3_750_000  # theirs stop before


def test_prompts_are_drawn_by_their_number_alone():
    drawn = [passkey.draw(0, 100, n, 1000, None) for n in range(200)]
    assert drawn == [passkey.draw(0, 100, n, 1000, None) for n in range(200)]
    assert drawn[0] != passkey.draw(1, 100, 0, 1000, None) and len({each.key for each in drawn}) > 190
    depths = np.array([each.depth for each in drawn])
    assert 0.4 < depths.mean() < 0.6 and depths.min() < 0.05 and depths.max() > 0.95
    for each in drawn[:5]:
        before = each.text.split("\n")[1]
        assert abs(len(before) - 1000 * each.depth) <= 0.5
    fixed = passkey.draw(0, 100, 3, 1000, 0.25)
    assert fixed.key == drawn[3].key and len(fixed.text.split("\n")[1]) == 250


@pytest.mark.parametrize("length", [700, 4099, 2**18, 10**6])
def test_lengths_are_met_to_one_percent(tokenizer, length):
    encode = lambda text: np.concatenate([[1], tokenizer.encode(text)])
    size = passkey.garbage_for(encode, length)
    for n, depth in enumerate((0.0, 0.3, 1.0)[: 1 if length > 10**5 else 3]):
        _, ids = passkey.within(encode, 0, length, n, size, depth)
        assert 0.99 * length <= len(ids) <= length


def test_no_prompt_is_longer_than_asked(tokenizer):
    size = passkey.garbage_for(tokenizer.encode, 300)
    drawn = [passkey.draw(0, 300, n, size, None) for n in range(100)]
    found = [passkey.within(tokenizer.encode, 0, 300, n, size, None) for n in range(100)]
    assert any(len(tokenizer.encode(each.text)) > 300 for each in drawn)
    assert all(290 < len(ids) <= 300 for _, ids in found)
    assert all((a.key, a.depth) == (b.key, b.depth) for a, (b, _) in zip(drawn, found, strict=True))


def test_the_first_number_is_the_answer():
    assert passkey.answered(" 4711. Remember it. 12") == 4711 and passkey.answered("47110") == 47110
    assert passkey.answered(" no number") is None


def test_report_and_going_on(config, tokenizer, tmp_path):
    params = jax.jit(fot_jax.init_params, static_argnums=0)(config, jax.random.key(0))
    options = passkey.default_options()
    options.update(lengths=(150, 120), depths=(0.0, 1.0), samples=3, rows=2)
    subject = Subject.of(config, params, tokenizer, options)
    garbage = [(length, passkey.garbage_for(subject.encode, length)) for length in (120, 150)]
    wanted = passkey.run(subject, options, garbage, Journal())
    assert [row[0] for row in wanted.rows] == [120, 150] and len(wanted.values["prompts"]["150"]) == 6
    for length in (120, 150):
        for n, each in enumerate(wanted.values["prompts"][str(length)]):
            size, depth = dict(garbage)[length], (0.0, 1.0)[n % 2]
            prompt, tokens = passkey.within(subject.encode, 0, length, n, size, depth)
            assert (each["key"], each["depth"], each["tokens"]) == (prompt.key, prompt.depth, len(tokens))
            c = min(config.last_context_length, config.window - passkey.NEW_TOKENS)
            answer = fot_jax.generate(config, params, tokens[None], passkey.NEW_TOKENS, last_context_length=c)[0]
            assert each["answer"] == tokenizer.decode(answer) and each["right"] == (
                passkey.answered(each["answer"]) == prompt.key
            )

    class Killed(Subject):
        def answers(self, *args, **kwargs):
            if self.clock.read > 700:
                raise KeyboardInterrupt
            return super().answers(*args, **kwargs)

    path = tmp_path / "passkey.partial.jsonl"
    killed = Killed(config, params, tokenizer, subject.reading, subject.rows)
    with pytest.raises(KeyboardInterrupt):
        passkey.run(killed, options, garbage, Journal(path))
    assert 1 < len(path.read_text().splitlines()) < 7
    found = passkey.run(subject, options, garbage, Journal(path))
    assert found.values == wanted.values and found.rows == wanted.rows
    found.write(tmp_path, "passkey")
    assert json.loads((tmp_path / "passkey.json").read_text())["found"] == wanted.values["found"]
    assert (tmp_path / "passkey.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lengths=()), "lengths is"),
        (dict(depths=(1.5,)), "depths is"),
        (dict(samples=0), "samples is 0"),
        (dict(lengths=(2000,), capacity=2000), "a prompt of 2,000 tokens and its answer has 2,010 tokens; capacity is"),
    ],
)
def test_bad_options(config, changes, message):
    options = passkey.default_options()
    options.update(changes)
    with pytest.raises(ValueError, match=message):
        passkey.check(config, options)
    with pytest.raises(ValueError, match="no memory layers"):
        passkey.check(config.replace(mem_layers=()), passkey.default_options())


def test_a_length_below_the_shortest(tokenizer):
    with pytest.raises(ValueError, match=r"lengths has 20; wanted at least \d+ tokens"):
        passkey.garbage_for(tokenizer.encode, 20)
