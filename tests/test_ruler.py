"""RULER: prompts against the published definitions, lengths, scores, and the evaluation as a whole."""

from __future__ import annotations

import bisect
import collections
import itertools
import json
import re
import sys

import jax
import numpy as np
import pytest

import fot_jax
from configs.eval import ruler as ruler_config
from fot_jax import sharding
from fot_jax.evals import ruler, ruler_tasks
from fot_jax.evals.journal import Journal
from fot_jax.evals.ruler_tasks import NOISE, TASKS, Draft, Sampler
from fot_jax.evals.subject import Clock, Subject
from fot_jax.tokenizer import train_tokenizer

WORDS = ruler_tasks.word_lists()
PROSE = (
    "Mr. Bennet made no answer. Do you not want to know who has taken it? cried his wife. "
    '"You want to tell me," he said, "and I have no objection." This was invitation enough. '
)
GIVEN = {"words": WORDS, "prose": PROSE}
NEW_TOKENS = dict(niah=128, vt=30, cwe=120, fwe=50)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = " ".join([*WORDS[0][::5], *WORDS[1], PROSE * 20, NOISE * 20])
    templates = [ruler_tasks.NIAH, ruler_tasks.NIAH_ONE, ruler_tasks.VT, ruler_tasks.CWE, ruler_tasks.FWE]
    texts = [text, *templates * 5, ruler_tasks.NEEDLE * 20]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 900)


@pytest.fixture(scope="module")
def sampler(tokenizer):
    return Sampler(tokenizer, GIVEN, seed=0)


def split(sample, before, after):
    """What stands in a prompt between its beginning and its end."""
    assert sample.prompt.startswith(before) and sample.prompt.endswith(after)
    return sample.prompt[len(before) : len(sample.prompt) - len(after)]


# ---- worked examples


def test_needles_come_before_the_lines_of_their_places():
    # As published: places in falling order, the first needle at the last of them.
    assert ruler_tasks.among_lines("abcd", [1, 3], ["X", "Y"]) == ["a", "Y", "b", "c", "X", "d"]
    assert ruler_tasks.among_lines("ab", [0], ["X"]) == ["X", "a", "b"]


def test_needles_come_before_the_sentences_of_their_depths():
    words, starts = "One. Two three. Four. Five".split(), [0, 1, 3, 4]
    put = lambda *depths: ruler_tasks.among_sentences(words, starts, depths, ["X", "Y"][: len(depths)])
    assert put(51) == "One. Two three. X Four. Five"  # int(4 * 0.51) = 2 sentences before
    assert put(0) == " X One. Two three. Four. Five" and put(100) == "One. Two three. Four. Five X "
    assert put(79, 28) == "One. X Two three. Four. Y Five"
    assert put(0, 3) == " X  Y One. Two three. Four. Five"


def test_depths_are_the_published_forty():
    wanted = """0 3 5 8 10 13 15 18 21 23 26 28 31 33 36 38 41 44 46 49 51 54 56 59 62 64 67 69 72 74 77 79 82 85 87 90
        92 95 97 100"""
    assert ruler_tasks.DEPTHS.tolist() == [int(x) for x in wanted.split()]


def test_sentences_of_prose():
    words = PROSE.split()
    starts = np.flatnonzero(ruler_tasks.sentence_starts(words))
    assert [words[i] for i in starts] == ["Mr.", "Do", '"You', "This"]  # not Bennet, nor cried
    assert not ruler_tasks.sentence_starts("He met J. Smith and".split()).any()


def test_the_singular_form_is_the_published_edit_of_the_plural():
    edited = ruler_tasks.NIAH
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        edited = edited.replace(old, new)
    assert edited == ruler_tasks.NIAH_ONE


def test_shares_of_words():
    # 1365 / k**2 / (pi**2 / 6), cut: 829.8, 207.5, 92.2, 51.9, 33.2
    assert ruler_tasks.counts(1365, 81)[:5].tolist() == [829, 207, 92, 51, 33]
    for n in range(ruler_tasks.FWE_LEAST, 400):
        found = ruler_tasks.counts(n, 9)
        assert found[3] > found[4]
    found = ruler_tasks.counts(ruler_tasks.FWE_LEAST - 1, 9)
    assert found[3] == found[4]


def test_a_list_of_words():
    words = [f"w{i}" for i in range(12)]
    got = ruler_tasks.listed(words, 3, 1, np.random.default_rng(0))
    before = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n"
    )
    after = (
        "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most "
        "often in the list are:"
    )
    entries = re.findall(r"(\d+)\. (\w+)", got[len(before) : -len(after)])
    assert got == before + " ".join(f"{i}. {word}" for i, word in entries) + after
    assert [int(i) for i, _ in entries] == list(range(1, 33))
    wanted = {word: 3 for word in words[:10]} | {"w10": 1, "w11": 1}
    assert collections.Counter(word for _, word in entries) == wanted


# ---- whole prompts

QUERIES = {
    "niah_single_1": (1, 1, "numbers", r"\d{7}"),
    "niah_single_2": (1, 1, "numbers", r"\d{7}"),
    "niah_single_3": (1, 1, "uuids", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    "niah_multikey_1": (1, 1, "numbers", r"\d{7}"),
    "niah_multikey_2": (1, 1, "numbers", r"\d{7}"),
    "niah_multikey_3": (1, 1, "uuids", r"[0-9a-f-]{36}"),
    "niah_multivalue": (1, 4, "numbers", r"\d{7}"),
    "niah_multiquery": (4, 1, "numbers", r"\d{7}"),
}


@pytest.mark.parametrize("task", QUERIES)
def test_needles_in_a_haystack(sampler, task):
    queries, values, kind, pattern = QUERIES[task]
    prompt, _, answers = sampler.sample(task, 1500, 3)
    needle = re.compile(rf"One of the special magic {kind} for ([^:.?]+) is: ({pattern})\.")
    if queries * values == 1:
        of, asks, begins = kind[:-1], ("What is the", "is"), "A special magic {} is hidden"
    else:
        of, asks, begins = kind, ("What are all the", "are"), "Some special magic {} are hidden"
    end = re.search(rf"\n{asks[0]} special magic {of} for (.+) mentioned in the provided text\? (.+)$", prompt)
    query = end[1]
    assert end[2] == f"The special magic {of} for {query} mentioned in the provided text {asks[1]}"
    before = (
        f"{begins.format(of)} within the following text. Make sure to memorize it. "
        f"I will quiz you about the {of} afterwards.\n"
    )
    assert prompt.startswith(before)
    context = prompt[len(before) : end.start()]
    found = needle.findall(context)
    keys = re.split(", and |, ", query)
    assert len(keys) == len(set(keys)) == queries and (queries == 1 or query.count(", and ") == 1)
    assert answers == [value for key in keys for other, value in found if other == key]
    assert len(answers) == queries * values
    keys_are_uuids = task == "niah_multikey_3"
    assert all(bool(re.fullmatch(r"[0-9a-f-]{36}", key)) == keys_are_uuids for key in keys)

    rest = needle.sub("", context)
    if task in ("niah_multikey_2", "niah_multikey_3"):  # nothing but needles, all of other keys
        assert not rest.replace("\n", "") and len({key for key, _ in found}) == len(found) > 5
        assert context.rsplit("\n", 1)[1] not in [f"One of the special magic {kind} for {query} is: {answers[0]}."]
    elif task == "niah_single_1":
        lines = context.split("\n")
        assert lines.count(NOISE) == len(lines) - 1 and len(found) == 1 and lines[-1] == NOISE
    else:  # prose from its first word on, again and again
        words = rest.split()
        assert words == list(itertools.islice(itertools.cycle(PROSE.split()), len(words)))
        assert len(found) == (1 if "single" in task else 4)
        places = [match.start() for match in needle.finditer(context)]
        for place in places[:-1]:  # the last may stand behind a sentence that is cut
            assert re.search(r"""[.?]"?\s+$|^\s?$""", context[:place])


def test_places_of_needles_are_everywhere(sampler):
    draws = [sampler.sample("niah_single_1", 1200, i).prompt.split("\n")[1:-1] for i in range(60)]
    at = [next(i for i, line in enumerate(lines) if line != NOISE) / (len(lines) - 2) for lines in draws]
    assert min(at) < 0.1 and max(at) > 0.9 and 0.4 < np.mean(at) < 0.6


def test_which_key_is_asked_for_is_drawn(sampler):
    places = set()
    for i in range(12):
        sample = sampler.sample("niah_multikey_1", 1200, i)
        places.add(re.findall(r"is: (\d{7})\.", sample.prompt).index(sample.answers[0]))
    assert len(places) > 2


def test_a_key_has_one_value_however_few_words_there_are(tokenizer):
    few = Sampler(tokenizer, {"words": [["sun", "sea"], ["red", "wet"], []]}, 0)
    for i in range(3):
        prompt, _, (answer,) = few.sample("niah_multikey_2", 1200, i)
        key = re.search(r"number for (\S+) mentioned", prompt)[1]
        assert re.findall(f"numbers for {key} is: (.+)\\.", prompt) == [answer]


def test_prose_that_ends_within_a_sentence(tokenizer, monkeypatch):
    monkeypatch.setattr(ruler_tasks, "DEPTHS", np.array([0]))
    sampler = Sampler(tokenizer, {"words": WORDS, "prose": "He came. She went. And"}, 0)
    context = sampler.sample("niah_single_2", 800, 0).prompt.split("\n")[1]
    assert re.match(r" One of the special magic numbers for .+ is: \d+\. He came\. She went\. And He came\.", context)


def test_variable_tracking(sampler):
    sample = sampler.sample("vt", 2500, 0)
    start = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    end = (
        "\nQuestion: Find all variables that are assigned the value {0} in the text above. Answer: According to the "
        "chain(s) of variable assignment in the text above, 5 variables are assigned the value {0}, they are: "
    )
    shown, asked = (start + part for part in sample.prompt.split(start)[1:])
    example, answers = re.fullmatch(r"(.+they are: ) (.+)\n\n", shown, re.DOTALL).groups()
    assert len(sampler.tokenizer.encode(example)) <= 500
    for prompt, names, letters in ((example, answers.split(" "), 3), (asked, sample.answers, 5)):
        value = re.search(r"the value (\d{5}) in", prompt)[1]
        context = prompt.removeprefix(start).removesuffix(end.format(value))
        assert prompt == start + context + end.format(value)
        lines = context.split("\n")
        statements = [line for line in lines if line != NOISE]
        a, b, c, d, e = names
        assigned = [f"VAR {y} = VAR {x} " for x, y in ((a, b), (b, c), (c, d), (d, e))]
        assert statements == [f"VAR {a} = {value}", *assigned]
        assert lines[-1] == NOISE and all(re.fullmatch(f"[A-Z]{{{letters}}}", name) for name in names)
    assert len(set(sample.answers)) == 5


@pytest.mark.parametrize(("length", "example", "asked"), [(4000, (20, 3, 1), (6, 1)), (6000, (40, 10, 3), (30, 3))])
def test_common_words(sampler, length, example, asked):
    sample = sampler.sample("cwe", length, 1)
    parts = re.fullmatch(
        r"Below is .+\n(.+)\nQuestion: .+ list are: (.+)\nBelow is .+\n(.+)\nQuestion: .+ are:",
        sample.prompt,
    )
    words = lambda text: re.split(r" ?\b\d+\. ", text)[1:]
    shown, answers, listed = (collections.Counter(words(part)) for part in parts.groups())
    size, often, seldom = example
    assert len(shown) == size and list(answers) == [word for word in answers if shown[word] == often]
    assert sorted(shown.values()) == [seldom] * (size - 10) + [often] * 10
    assert words(parts[2]) == list(answers) and parts[2].startswith("1. ")
    assert {word for word, n in listed.items() if n == asked[0]} == set(sample.answers) and len(sample.answers) == 10
    assert {n for word, n in listed.items() if word not in sample.answers} <= {asked[1]}
    assert set(listed) <= {*WORDS[0], *WORDS[1], *WORDS[2]}


def test_common_words_of_a_longer_text_than_there_are_words(tokenizer):
    few = [WORDS[0][:20], WORDS[1][:20], []]
    sample = Sampler(tokenizer, {"words": few}, 0).sample("cwe", 3000, 0)
    listed = re.split(r" ?\b\d+\. ", sample.prompt.split("\n")[4])[1:]
    found = collections.Counter(listed)
    pairs = set(found) - {*few[0], *few[1]}
    assert set(sample.answers) <= {*few[0], *few[1]} and len(found) == 40 + len(pairs) and len(pairs) > 40
    assert pairs <= {f"{a}-{n}" for a in few[1] for n in few[0]} and len(sample.ids) + 120 > 0.95 * 3000


def test_frequent_words(sampler):
    sample = sampler.sample("fwe", 2000, 0)
    text = split(
        sample,
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:",
    )
    found = collections.Counter(text.split(" "))
    assert [word for word, _ in found.most_common(4)] == ["...", *sample.answers]
    assert all(re.fullmatch("[a-z]{6}", word) for word in found if word != "...")
    # A word for each 50 tokens, as far as rounding leaves one.
    words = sampler.draft("fwe", 300, 0).prompt(9999).split("coded words. ")[1].split("\nQuestion")[0]
    assert len(set(words.split(" "))) == 6
    # The counts are those of one number of words.
    n = next(n for n in range(9999) if ruler_tasks.counts(n, 40).sum() == len(text.split(" ")))
    assert sorted(found.values()) == sorted(x for x in ruler_tasks.counts(n, 40).tolist() if x)


# ---- lengths and seeds


@pytest.mark.parametrize("length", [2000, 6000])
@pytest.mark.parametrize("task", TASKS)
def test_lengths(tokenizer, sampler, task, length):
    new_tokens = NEW_TOKENS[task.split("_")[0]]
    assert TASKS[task].new_tokens == new_tokens
    for i in range(3):
        sample = sampler.sample(task, length, i)
        assert sample.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(sample.prompt)]
        assert sample.ids.dtype == np.int32
        assert 0.95 * length < len(sample.ids) + new_tokens <= length
        # One item more is too many.
        draft, budget = sampler.draft(task, length, i), length - new_tokens
        sizes = range(draft.least, draft.most + 1)
        size = sizes[bisect.bisect_right(sizes, len(sample.prompt), key=lambda n: len(draft.prompt(n))) - 1]
        assert draft.prompt(size) == sample.prompt
        assert len(sampler.encode(draft.prompt(size + 1))) > budget or len(sample.ids) > 0.999 * budget


@pytest.mark.parametrize(
    ("tokens", "budget", "most"),
    [
        *((lambda n: 2 * n, budget, 2) for budget in (9, 10, 11, 500)),
        # Where parts are said to have half, twice or a twentieth of what they have, more sizes are checked.
        *((lambda n, share=share: share * n + 7, 500, 4) for share in (1, 4, 0.1)),
    ],
)
def test_the_largest_that_fits(tokens, budget, most):
    calls = []

    def encode(text):
        calls.append(text)
        return np.array(text.split())

    draft = Draft([], 3, 1000, tokens, lambda n: "a a " * n + "b")
    prompt, ids = ruler_tasks.fit(draft, encode, budget)
    assert len(ids) == (budget - 1) // 2 * 2 + 1 == len(prompt.split()) and len(calls) <= most
    smallest, ids = ruler_tasks.fit(draft, encode, 6)
    assert len(ids) == 7  # where none fits


def test_of_long_prompts_nearly_the_largest_will_do():
    draft = Draft([], 3, 10**6, lambda n: 1.0005 * n, lambda n: "a " * n)
    calls = []
    _, ids = ruler_tasks.fit(draft, lambda text: calls.append(1) or np.array(text.split()), 100_000)
    assert 99_900 < len(ids) < 100_000 and len(calls) == 2


def test_samples_depend_on_seed_task_length_and_index_alone(tokenizer, sampler, monkeypatch):
    for task in TASKS:
        first = sampler.sample(task, 2000, 1)
        other = Sampler(tokenizer, GIVEN, seed=0)
        other.sample("cwe", 3000, 7)
        assert other.sample(task, 2000, 1).prompt == first.prompt
        for changed in (
            sampler.sample(task, 2000, 2),
            sampler.sample(task, 2001, 1),
            Sampler(tokenizer, GIVEN, 1).sample(task, 2000, 1),
        ):
            assert changed.prompt != first.prompt and changed.answers != first.answers
    monkeypatch.setattr(ruler_tasks, "TASKS", dict(reversed(TASKS.items())))  # nor on a task's place among them
    assert sampler.sample(task, 2000, 1).prompt == first.prompt


def test_a_length_that_is_too_short(sampler):
    for task in TASKS:
        with pytest.raises(ValueError, match=f"task {task}: length is 150; wanted it to have room .* of sample 3, "):
            sampler.sample(task, 150, 3)
        enough = sampler.enough(task, 150, 12)
        assert max(len(sampler.sample(task, enough, i).ids) for i in range(12)) <= enough - TASKS[task].new_tokens
        assert sampler.enough(task, enough, 12) == enough


def test_inputs_refuse_a_length_that_any_sample_does_not_fit(tokenizer, sampler, tmp_path):
    config = configured(tasks=("vt",))
    config.options.update(samples=12, seed=0)
    first = next(length for length in range(300, 2000) if sampler.least("vt", length, 0) <= length)
    length = next(
        length
        for length in range(first, 2000)
        if sampler.least("vt", length, 0) <= length < max(sampler.least("vt", length, i) for i in range(12))
    )
    config.options.lengths = (4000, length)
    with pytest.raises(ValueError, match=f"task vt: length is {length}; wanted at least") as error:
        ruler.inputs(config, CONFIG, tokenizer, tmp_path)
    config.options.lengths = (int(re.search(r"wanted at least (\d+)", str(error.value))[1]),)
    ruler.inputs(config, CONFIG, tokenizer, tmp_path)
    assert all(sampler.sample("vt", config.options.lengths[0], i) for i in range(12))


def test_draws_that_cannot_differ():
    with pytest.raises(ValueError, match="200 draws gave 1 different keys; wanted 2"):
        ruler_tasks.distinct(2, lambda: "a", "keys")


# ---- scores and the evaluation


def test_scores():
    assert ruler.matched("The words are ABC, def.", ["abc", "DEF", "ghi", "a"]) == 0.75
    assert ruler.matched("", ["abc"]) == 0 and ruler.matched("12345678", ["2345"]) == 1
    assert ruler.postprocessed(" \n a\tb\x00c \n") == "a\nb\nc"


def options(**changes):
    found = ruler.default_options()
    found.update(samples=3, rows=2, lengths=(1500,), **changes)
    return found


class Answering:
    """Stands for a model that answers with a part of what is asked for."""

    def __init__(self, tokenizer, config, answer):
        self.tokenizer, self.config, self.clock, self.asked = tokenizer, config, Clock(), []
        self._answer = answer

    text = Subject.text

    def answers(self, texts, questions, new_tokens, room):
        assert 1 <= len(texts) <= 2 and new_tokens == room and all(len(q) == 0 for (q,) in questions)
        self.asked.append((len(texts), new_tokens))
        return [[self.tokenizer.encode(self._answer(self.tokenizer.decode(text)))] for text in texts]


CONFIG = fot_jax.ModelConfig(
    vocab_size=900, d_model=16, d_ff=24, n_layers=2, n_heads=2, window=256, mem_layers=(1,), last_context_length=100
)


def test_right_answers_have_a_hundred_points(tokenizer, tmp_path):
    asked = options(tasks=("niah_multiquery", "fwe"))
    asked.lengths = (1500, 1000)
    sampler = Sampler(tokenizer, GIVEN, asked.seed)
    answers = {
        sampler.sample(task, length, i).prompt: sampler.sample(task, length, i).answers
        for task in asked.tasks
        for length in asked.lengths
        for i in range(3)
    }
    first, third = sampler.sample("niah_multiquery", 1000, 1), sampler.sample("fwe", 1000, 2)

    def answer(prompt):
        if prompt == first.prompt:
            return f"perhaps {first.answers[2]}"
        return "" if "coded" in prompt and prompt != third.prompt else " and ".join(answers[prompt])

    model = Answering(tokenizer, CONFIG, answer)
    found = ruler.run(model, asked, GIVEN, Journal())
    assert found.columns == ("task", "1,000", "1,500")
    # (1 + 1/4 + 1) / 3, (0 + 0 + 1) / 3
    assert found.rows == (("niah_multiquery", 75.0, 100.0), ("fwe", 33.33, 0.0), ("average", 54.16, 50.0))
    assert model.asked == [(2, 128), (1, 128)] * 2 + [(2, 50), (1, 50)] * 2
    assert found.values["empty_answers"] == {
        "niah_multiquery": {"1000": 0, "1500": 0},
        "fwe": {"1000": 2, "1500": 3},
    }
    found.write(tmp_path, "ruler")
    written = json.loads((tmp_path / "ruler.json").read_text())
    assert written["scores"]["niah_multiquery"] == {"1000": 75.0, "1500": 100.0}
    example = written["samples"]["niah_multiquery"]["1000"][1]
    assert example["answers"] == first.answers and example["score"] == 0.25 and example["tokens"] == len(first.ids)
    assert (tmp_path / "ruler.png").stat().st_size > 1000


def test_answers_are_what_a_model_generates(tokenizer, tmp_path, devices):
    sizes = dict(n_layers=1, mem_layers=(0,), window=64, last_context_length=10, init_std=0.6)
    config = CONFIG.replace(vocab_size=1200, **sizes)  # 300 more than the tokenizer's
    params = jax.jit(fot_jax.init_params, static_argnums=0)(config, jax.random.key(0))
    asked = options(tasks=("fwe",))
    asked.update(lengths=(700,), samples=2, rows=1)
    evaluate = lambda asked, journal: ruler.run(Subject.of(config, params, tokenizer, asked), asked, {}, journal)
    found = evaluate(asked, Journal(tmp_path / "journal", {}))
    beyond = 0
    for i, each in enumerate(found.values["samples"]["fwe"]["700"]):
        sample = Sampler(tokenizer, {}, asked.seed).sample("fwe", 700, i)
        tokens = np.asarray(fot_jax.generate(config, params, sample.ids[None], max_new_tokens=50))[0]
        assert each["answers"] == sample.answers
        assert each["prediction"] == ruler.postprocessed(tokenizer.decode(tokens[tokens < 900])) != ""
        beyond += (tokens >= 900).sum()
    assert beyond > 0
    # One part of two was written: the other is measured again, to the same report.
    lines = (tmp_path / "journal").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "journal").write_text("".join(lines[:2]))
    assert evaluate(asked, Journal(tmp_path / "journal", {})).values == found.values
    asked.rows = 2
    mesh = sharding.make_mesh({"data": 2, "tensor": 2, "context": 2}, devices)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
        assert evaluate(asked, Journal()).values["samples"] == found.values["samples"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=("vt", "qa_1")), "tasks has 'qa_1'; wanted some of niah_single_1, .*, fwe"),
        (dict(tasks=()), r"tasks is \(\); wanted at least one"),
        (dict(tasks=("vt", "vt")), "wanted at least one, and none twice"),
        (dict(lengths=(0,)), r"lengths is \(0,\), samples 3, seed 42"),
        (dict(samples=0), "samples 0"),
        (dict(seed=-1), "seed -1"),
        (dict(rows=0), "rows is 0"),
        (dict(window=128), "task niah_single_1 has answers of 128 tokens and the window 128; wanted it to have more"),
        (dict(capacity=1000), "a prompt with its answer has 1,500 tokens; capacity is 1,000"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        asked = options()
        asked.update(changes)
        ruler.check(CONFIG, asked)


def test_without_memory_the_window_is_the_limit():
    plain = CONFIG.replace(mem_layers=(), window=1500)
    ruler.check(plain, options())
    with pytest.raises(ValueError, match="has 1,500 tokens; the model has no memory layers"):
        ruler.check(plain.replace(window=1499), options())


def configured(**changes):
    config = ruler_config.get_config()
    config.options.update(options(**changes))
    return config


def test_inputs(tokenizer, tmp_path, monkeypatch):
    config = configured(tasks=("vt", "fwe"))
    assert ruler.inputs(config, CONFIG, tokenizer, tmp_path) == {}
    config.options.tasks = ("niah_single_2", "cwe")
    with pytest.raises(ValueError, match="data.sources is empty; wanted a source of prose, in which niah_single_2"):
        ruler.inputs(config, CONFIG, tokenizer, tmp_path)
    (tmp_path / "prose.txt").write_text(PROSE.replace(" ", "\n  ") * 80)
    config.data.sources = (str(tmp_path / "prose.txt"),)
    found = ruler.inputs(config, CONFIG, tokenizer, tmp_path)
    assert found["words"] == WORDS and found["prose"].split() == (PROSE * 80).split()[:1500]
    (tmp_path / "prose.txt").write_text("\n")
    with pytest.raises(ValueError, match="with no word in it; wanted prose"):
        ruler.inputs(config, CONFIG, tokenizer, tmp_path)
    config.options.update(tasks=("vt",), lengths=(400, 5000))
    with pytest.raises(ValueError, match="task vt: length is 400; wanted at least"):
        ruler.inputs(config, CONFIG, tokenizer, tmp_path)
    config.options.update(tasks=("cwe",), lengths=(9000,))
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(ImportError, match=r"pip install 'fot_jax\[ruler\]'"):
        ruler.inputs(config, CONFIG, tokenizer, tmp_path)


def test_default_tasks_need_no_texts():
    config = ruler_config.get_config()
    assert not config.data.sources and not any(TASKS[task].prose for task in config.options.tasks)
    assert {task for task in TASKS if not TASKS[task].prose} == set(config.options.tasks)


def test_words():
    nouns, adjectives, verbs = WORDS
    assert "wet" in adjectives and "abide" in verbs and "ATM" in nouns  # the list has a space after the first
    assert len({*nouns, *adjectives, *verbs}) > 8000
