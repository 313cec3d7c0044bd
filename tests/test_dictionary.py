"""Dictionary lookup: what is asked, and that the tokens that count are those of the values."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fot_jax
from fot_jax import sharding
from fot_jax.evals import dictionary
from fot_jax.evals.dictionary import Vocabulary
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject

SMALL = dict(size=6, filler=0, key=1, value=2, question=3)  # symbols 4 and 5: values are often right by chance
CONFIG = fot_jax.ModelConfig(
    vocab_size=7, d_model=8, d_ff=16, n_layers=2, n_heads=2, window=32, mem_layers=(1,), init_std=0.4
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(fot_jax.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def options(**changes):
    found = dictionary.default_options()
    found.update(vocabulary=SMALL, block=32, dictionary_tokens=(64, 128), questions=3, seeds=(0, 1, 2), k=4, rows=2)
    found.update(changes)
    return found


def run(params, journal=None, **changes):
    given = options(**changes)
    return dictionary.run(Subject.of(CONFIG, params, None, given), given, (), journal or Journal())


def test_definitions_and_questions():
    vocabulary = Vocabulary(size=9, filler=8, key=3, value=0, question=5)
    assert vocabulary.symbols.tolist() == [1, 2, 4, 6, 7] and vocabulary.keys == 625
    defined = dictionary.definitions(np.random.default_rng(0), 625, vocabulary)  # all keys there are
    assert defined.shape == (625, 10) and defined.dtype == np.int32
    assert (defined[:, 0] == 3).all() and (defined[:, 5] == 0).all()
    assert len({tuple(key) for key in defined[:, 1:5].tolist()}) == 625
    assert set(defined[:, 1:5].flat) == set(defined[:, 6:].flat) == {1, 2, 4, 6, 7}
    asked = dictionary.questions(np.random.default_rng(1), defined, 100, vocabulary)
    assert asked.dtype == np.int32 and (asked[:, 0] == 5).all()
    values = {tuple(record[1:5]): tuple(record[5:]) for record in defined.tolist()}
    assert all(values[tuple(record[1:5])] == tuple(record[5:]) for record in asked.tolist())
    assert len({tuple(record[1:5]) for record in asked.tolist()}) == 100
    with pytest.raises(ValueError, match="626 definitions with 5 symbols, which make 625 keys"):
        dictionary.definitions(np.random.default_rng(0), 626, vocabulary)
    with pytest.raises(ValueError, match="9 questions about 8 definitions"):
        dictionary.questions(np.random.default_rng(0), defined[:8], 9)


def test_the_vocabulary_of_the_paper():
    """64 tokens in all, three markers and a filler among them; more keys than 2**24 tokens define."""
    vocabulary = Vocabulary()
    assert vocabulary.symbols.tolist() == list(range(4, 64)) and vocabulary.keys == 60**4
    assert dictionary.records_in(2**24, 256) == 65536 * 25 < vocabulary.keys
    assert len(np.unique(dictionary.definitions(np.random.default_rng(0), 400_000)[:, 1:5], axis=0)) == 400_000


def test_blocks_by_hand():
    a, b, c = (np.arange(10 * i, 10 * i + 10, dtype=np.int32) for i in (1, 2, 3))
    lay = lambda tokens, block, *records: dictionary.laid_out(np.array(records), tokens, block, 0).tolist()
    assert lay(36, 16, a, b) == [*a, *[0] * 6, *b, *[0] * 6, *[0] * 4]  # the last four hold no record
    assert lay(27, 16, a, b) == [*a, *[0] * 6, *b, 0]  # the last eleven hold one
    assert lay(48, 24, a, b, c, a) == [*a, *b, *[0] * 4, *c, *a, *[0] * 4]
    assert lay(36, 0, a, b, c) == [*a, *b, *c, *[0] * 6]
    for (tokens, block), count, end in (((36, 16), 2, 26), ((27, 16), 2, 26), ((48, 24), 4, 44), ((36, 0), 3, 30)):
        assert dictionary.records_in(tokens, block) == count and dictionary.read_tokens(tokens, block) == end


def test_documents_are_drawn_each_by_itself():
    draw = lambda *which, **changes: dictionary.document(*which, options(**changes))
    text, asked = draw(1, 128, 0)
    same, _ = draw(1, 128, 0, dictionary_tokens=(128,), seeds=(1,), rows=1)
    np.testing.assert_array_equal(text, same)
    assert len(text) == 126 and asked.shape == (3, 10)  # four blocks of three records and two fillers
    for other in ((0, 128, 0), (1, 64, 0), (1, 128, 1)):
        assert draw(*other)[0][:64].tolist() != text[:64].tolist()


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_right_tokens_of_a_model_that_sees_the_last_token_only(together):
    """4 follows <v> and 5, 5 follows 4: what is right can be counted by hand."""
    params = jax.tree.map(jnp.zeros_like, fot_jax.init_params(CONFIG, jax.random.key(0)))
    params["embed"]["embedding"], params["norm"]["scale"] = jnp.eye(7, 8), jnp.ones(8)
    follows = {0: 0, 1: 0, 2: 4, 3: 0, 4: 5, 5: 4, 6: 0}
    params["head"]["kernel"] = jnp.zeros((8, 7)).at[jnp.array([*follows]), jnp.array([*follows.values()])].set(1.0)
    subject = Subject.of(CONFIG, params, None, options())
    text = np.arange(100, dtype=np.int32) % 6
    asked = np.array([[3, 4, 4, 4, 4, 2, 4, 5, 4, 5], [3, 4, 5, 4, 5, 2, 5, 5, 4, 4], [3, 5, 4, 5, 4, 2, 4, 4, 5, 5]])
    found = dictionary.right_tokens(subject, [(text, asked), (text[:40], asked[::-1])], together)
    assert found == [[4, 1, 2], [2, 1, 4]]  # 5 after <v> is wrong, 5 after 5, 4 after 5, 4 after 4; and so on


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_right_tokens_are_those_of_long_forward(params, together):
    given = options(together=together)
    text, asked = dictionary.document(3, 128, 0, given)
    (found,) = dictionary.right_tokens(Subject.of(CONFIG, params, None, given), [(text, asked)], together)
    wanted = []
    for some in [asked] if together else asked[:, None]:
        tokens = np.concatenate([text, some.reshape(-1)])  # all of the dictionary is memory
        logits = fot_jax.long_forward(CONFIG, params, tokens[None], some.size, memory="topk", k=4)
        likeliest = np.asarray(logits[0, len(text) - 1 : -1].argmax(-1)).reshape(some.shape)
        wanted += (likeliest == some)[:, 6:].sum(1).tolist()
    assert found == wanted and 0 < sum(wanted) < 12


def test_rows_change_nothing(params):
    found = [run(params, rows=rows, documents=2, seeds=(0, 4)).values["right_tokens"] for rows in (2, 10)]
    assert found[0] == found[1] and set(found[0]) == {"64", "128"} and set(found[0]["64"]) == {"0", "4"}
    alone = dictionary.right_tokens(
        Subject.of(CONFIG, params, None, options()), [dictionary.document(4, 64, 1, options())], True
    )
    assert found[0]["64"]["4"][1] == alone[0]


class Parts(Journal):
    """A journal that remembers how many tokens it was told of."""

    def results(self, parts, *others):
        self.tokens = sum(part.tokens for part in parts)
        return super().results(parts, *others)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_progress_ends_at_all_tokens(params, together):
    given, journal = options(together=together, rows=2), Parts()
    subject = Subject.of(CONFIG, params, None, given)
    dictionary.run(subject, given, (), journal)
    assert subject.clock.read == journal.tokens > 3 * (62 + 126)


def test_stopped_and_gone_on_with(params, tmp_path, monkeypatch):
    whole, right_tokens, calls = run(params).values, dictionary.right_tokens, []

    def stops(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right_tokens(*arguments)

    monkeypatch.setattr(dictionary, "right_tokens", stops)
    path = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(params, Journal(path, {}))
    assert run(params, Journal(path, {})).values == whole
    assert len(calls) == 3 + 2  # two of four parts were there


def test_the_same_report_on_eight_devices(params, devices):
    given = dict(rows=8, seeds=tuple(range(8)), dictionary_tokens=(64,))
    whole = run(params, **given).values
    mesh = sharding.make_mesh({"data": 8}, devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.param_shardings(mesh, params))
        assert run(put, **given).values == whole


def test_report_by_hand(tmp_path):
    right = {256: {0: [[4, 3]], 1: [[4, 4]], 7: [[0, 4]]}, 2**20: {0: [[0, 0]], 1: [[1, 0]], 7: [[4, 3]]}}
    report = dictionary.report(options(seeds=(0, 1, 7), questions=2, block=256), right, 256)
    assert report.columns == ("dictionary tokens", "definitions", "values", "tokens", "values, min", "values, max")
    np.testing.assert_allclose(report.rows[0], [256, 25, 4 / 6, 19 / 24, 0.5, 1])
    np.testing.assert_allclose(report.rows[1], [2**20, 102400, 1 / 6, 8 / 24, 0, 0.5])
    report.write(tmp_path, "dictionary")
    values = json.loads((tmp_path / "dictionary.json").read_text())
    assert values["value_accuracy_of_seeds"]["256"] == {"0": 0.5, "1": 1.0, "7": 0.5}
    assert values["right_tokens"]["1048576"]["7"] == [[4, 3]]
    assert (tmp_path / "dictionary.png").stat().st_size > 1000
    assert [dictionary.short(n) for n in (256, 4096, 2**24, 1000, 1536)] == ["256", "4K", "16M", "1,000", "1,536"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocabulary=dict(SMALL, size=8)), "vocabulary.size is 8; wanted at most the model's vocabulary, 7"),
        (dict(vocabulary=dict(SMALL, key=0)), r"are \(0, 0, 2, 3\); wanted different ids in 0..5"),
        (dict(dictionary_tokens=(192,)), "192 tokens has 18 definitions; wanted at most 16, the keys of 2 symbols"),
        (dict(dictionary_tokens=(29,)), "29 tokens has 2 definitions; wanted at least 3, as many as questions"),
        (dict(dictionary_tokens=(0,)), "0 tokens has 0 definitions"),
        (dict(dictionary_tokens=()), r"dictionary_tokens is \(\)"),
        (dict(block=9), "block is 9; wanted at least 10"),
        (dict(block=24), "block is 24 and window 32, which would cut records in two; wanted a block that divides"),
        (dict(block=64), "block is 64 and window 32"),
        (dict(window=31), "block is 32 and window 31"),
        (dict(questions=4), "4 questions have 40 tokens; wanted no more than the window's 32: fewer, or together=Fal"),
        (dict(questions=0), "questions is 0 and documents 1"),
        (dict(seeds=(1, 1)), r"seeds is \(1, 1\); wanted different numbers"),
        (dict(capacity=130), "128 tokens, with its questions, has 156 tokens; capacity is 130"),
        (dict(window=64), "window is 64; wanted 1..32"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        dictionary.check(CONFIG, options(**changes))


def test_a_model_without_memory_reads_its_window():
    plain = CONFIG.replace(mem_layers=())
    dictionary.check(plain, options(block=0, dictionary_tokens=(12,), questions=1))  # ten tokens of them are read
    with pytest.raises(ValueError, match="a dictionary of 64 tokens, with its questions, has 92 tokens; the model has"):
        dictionary.check(plain, options())


def test_the_command_needs_no_tokenizer(params, tmp_path):
    fot_jax.save_pretrained(tmp_path / "model", CONFIG, params)
    command = [f"--config.options.vocabulary.{name}={value}" for name, value in SMALL.items()]
    command += ["--config.options.dictionary_tokens=(64,)", "--config.options.questions=2", "--config.options.block=0"]
    command += ["--config.options.seeds=(5,)", f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"]
    root = pathlib.Path(dictionary.__file__).parents[2]
    subprocess.run(
        [sys.executable, "eval.py", "--config=configs/eval/dictionary.py", *command], cwd=root, check=True, timeout=300
    )
    values = json.loads((tmp_path / "out" / "dictionary.json").read_text())
    assert values["definitions"] == {"64": 6} and np.shape(values["right_tokens"]["64"]["5"]) == (1, 2)
