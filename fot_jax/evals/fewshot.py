"""Few-shot classification and question answering by demonstrations in context (arXiv 2307.03170, sections 4.4, 4.5).

The setup is that of Hao et al. (2022, structured prompting; microsoft/LMOps, structured_prompting/fairseq-version,
tasks/fewshot_task.py and criterions/fs_eval.py), all demonstrations directly in the context. For each draw the training
set is shuffled, and demonstrations are taken in order until the next does not fit, with room for the longest test
question: tokens read so far + demonstration + longest question with its BOS and longest label (or 50 tokens for an
answer) < the context length. All test questions of a draw have the same demonstrations, which are read once. Prompts:
`Question: {text} Type: {label}` for TREC, `Question: {question} Answer: {answer}`, with the last of the answers, for
WebQuestions. An end-of-sentence token follows each demonstration; BOS stands in front of all. Demonstrations and
questions are tokenised one by one, as there: where the joiner begins with a newline, SentencePiece and byte-pair models
whose words end at one give the same tokens for the whole.

Labels: the one whose tokens have the greatest mean log-probability after the question. Answers: up to 30 tokens, to the
first newline or end of sentence, likeliest token by token, where theirs are found by a beam of 3; right if equal to any
of the answers once both are normalised as SQuAD's are (Rajpurkar et al., 2016).

The paper averages 20 draws and does not state what its confidence intervals are. Here they are Student's:
mean +- t sd / sqrt(draws). It speaks of 50 classes of TREC, where Hao et al. have 6: `labels` offers both.
"""

from __future__ import annotations

import collections
import functools
import math
import pathlib
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fot_jax.config import ModelConfig
from fot_jax.evals import Report, examples, plots
from fot_jax.evals.examples import Examples
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Ids, Subject, check_length, check_reading, described, reading_options
from fot_jax.tokenizer import Tokenizer, encode_prompt

NEW_TOKENS = 30  # most of an answer
ANSWER_ROOM = 50  # tokens that demonstrations leave for it
END = "</s>"  # as a joiner: the token that ends a document
# By format, and whether answers are labels: prompt and joiner.
DEFAULTS = {
    ("trec", True): ("Question: {text} Type: {label}", END),
    ("webqs", False): ("Question: {question} Answer: {answer}", END),
    ("jsonl", True): ("Text: {text}\nLabel: {label}", "\n\n"),
    ("jsonl", False): ("Question: {question}\nAnswer: {answer}", "\n\n"),
}


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        rows=10,  # draws read side by side
        format="trec",  # of the files: "trec", "webqs" or "jsonl"; see `examples`
        train="",  # file that demonstrations are drawn from
        test="",  # file of the questions
        labels="coarse",  # TREC's: "coarse", 6, or "fine", 50
        template="",  # of a demonstration, with {text} and {label}, or {question} and {answer}; "": the format's
        joiner="",  # between demonstrations: text, or "</s>", the token that ends a document; "": the format's
        lengths=(2048, 4096, 6144, 8192),  # context lengths, in tokens, with as many demonstrations as fit; or ()
        demonstrations=(),  # numbers of demonstrations, instead of lengths
        draws=20,  # of demonstrations
        test_examples=0,  # questions drawn from `test`; 0: all
        confidence=0.95,  # of the interval
        seed=0,
    )
    return ConfigDict(options)


class Prompts(NamedTuple):
    """What is read and asked.

    Attributes:
        texts: context length or number of demonstrations -> of each draw the demonstrations.
        counts: the same -> of each draw how many.
        questions: what follows the demonstrations, to the label or answer.
        endings: of each question the tokens of each label; none where answers are generated.
        labels: words of the labels.
        wanted: of each question the right answers, or the label.
        lines: where the questions are in their file.
        room: tokens of the longest question with its answer.
    """

    texts: dict[int, list[Ids]]
    counts: dict[int, list[int]]
    questions: list[Ids]
    endings: list[list[Ids]]
    labels: list[str]
    wanted: list[tuple[str, ...]]
    lines: list[int]
    room: int


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range; contexts longer than the model can read.
    """
    check_reading(config, options)
    for name, kinds in (("format", examples.FORMATS), ("labels", ("coarse", "fine"))):
        if options[name] not in kinds:
            raise ValueError(f"{name} is {options[name]!r}; wanted one of {', '.join(kinds)}")
    if options.labels != "coarse" and options.format != "trec":
        raise ValueError(f"labels is {options.labels!r} for format {options.format!r}; wanted it for 'trec' alone")
    for name in ("train", "test"):
        if not options[name]:
            raise ValueError(f"{name} is ''; wanted a file of format {options.format!r}")
    if bool(options.lengths) == bool(options.demonstrations):
        raise ValueError(
            f"lengths is {tuple(options.lengths)} and demonstrations {tuple(options.demonstrations)}; wanted numbers "
            f"in one of them and () for the other"
        )
    for name in ("lengths", "demonstrations"):
        if options[name] and min(options[name]) < 1:
            raise ValueError(f"{name} is {tuple(options[name])}; wanted numbers of at least 1")
    if options.draws < 1 or options.test_examples < 0:
        raise ValueError(
            f"draws is {options.draws} and test_examples {options.test_examples}; wanted at least 1, and 0 for all"
        )
    if options.joiner not in ("", END) and not options.joiner[0].isspace():
        raise ValueError(
            f"joiner is {options.joiner!r}; wanted {END!r}, or a text that begins with a newline or a blank, as others "
            f"may be tokenised with the text before"
        )
    if not 0 < options.confidence < 1:
        raise ValueError(f"confidence is {options.confidence}; wanted a share between 0 and 1, as 0.95")
    for length in options.lengths:
        check_length(config, options, length, f"a context of {length:,} tokens")


# ---- prompts


def split_template(template: str, labelled: bool) -> tuple[str, str, str]:
    """What comes before the text, between it and the label, and of that what a question ends with: all but the spaces
    before the label, which belong to it.

    Raises:
        ValueError: a template without one field each, in that order, the second at its end.
    """
    fields = ("{text}", "{label}") if labelled else ("{question}", "{answer}")
    before, _, rest = template.partition(fields[0])
    between, _, after = rest.partition(fields[1])
    if after or any(template.count(field) != 1 for field in fields) or not between.strip(" "):
        raise ValueError(f"template is {template!r}; wanted text, {fields[0]}, text, and {fields[1]} at its end")
    return before, between, between.rstrip(" ")


def follower(tokenizer: Tokenizer, joiner: str) -> Callable[[str], Ids]:
    """Gives the tokens of a text that follows a demonstration, with those of the joiner before it; of the text alone
    where the token that ends a document joins.
    """
    if joiner == END:
        return tokenizer.encode
    before = len(tokenizer.encode("a"))
    return lambda text: tokenizer.encode(f"a{joiner}{text}")[before:]


def common(ids: Ids, *others: Ids) -> int:
    """How many first tokens all have in common."""
    for n, tokens in enumerate(zip(ids, *others)):
        if len(set(tokens)) > 1:
            return n
    return min(map(len, (ids, *others)))


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> Prompts:
    """Reads the files and makes the prompts.

    Raises:
        FileNotFoundError, ValueError: see `examples.read`, `split_template`, `prompts` and `check_prompts`; files of
            two kinds.
    """
    options = config.options
    train, test = (examples.read(path, options.format, options.labels) for path in (options.train, options.test))
    if train.labelled != test.labelled:
        found = ["labels" if each.labelled else "answers" for each in (train, test)]
        raise ValueError(f"{train.path} has {found[0]} and {test.path} {found[1]}; wanted the same of both")
    found = prompts(options, tokenizer, train, test)
    check_prompts(model, options, found)
    return found


def check_prompts(config: ModelConfig, options: ConfigDict, given: Prompts) -> None:
    """Refuses demonstrations and questions that the model cannot read.

    Raises:
        ValueError: longer together than `check_length` allows; a question that leaves nothing of the window.
    """
    window = options.window or config.window
    if given.room >= window:
        raise ValueError(
            f"{options.test}: the longest question has {given.room} tokens with its answer; wanted fewer than the "
            f"window's {window}"
        )
    for size in options.demonstrations:
        longest = max(map(len, given.texts[size])) + given.room
        check_length(config, options, longest, f"a prompt of {size:,} demonstrations")


def prompts(options: ConfigDict, tokenizer: Tokenizer, train: Examples, test: Examples) -> Prompts:
    """Demonstrations of all draws, and questions.

    Raises:
        ValueError: a label of `test` that is none of `train`; more demonstrations than there are; a context length that
            not even one fits; a tokenizer without the token that ends a document, where that joins.
    """
    labelled = train.labelled
    template, joiner = DEFAULTS[options.format, labelled]
    template, joiner = options.template or template, options.joiner or joiner
    before, between, asks = split_template(template, labelled)
    if joiner == END and tokenizer.eos_id is None:
        raise ValueError(f"joiner is {END!r} and the tokenizer has no token that ends a document; wanted a text")
    follows = follower(tokenizer, joiner)
    labels = sorted({each.answers[0] for each in train.examples}) if labelled else []

    chosen = np.arange(len(test.examples))
    if options.test_examples:
        if options.test_examples > len(chosen):
            raise ValueError(f"test_examples is {options.test_examples}; {test.path} has {len(chosen)}")
        chosen = np.sort(np.random.default_rng([options.seed, 0]).permutation(chosen)[: options.test_examples])
    questions, endings, asked = [], [], [test.examples[i] for i in chosen]
    for each in asked:
        if labelled and each.answers[0] not in labels:
            raise ValueError(
                f"{test.path}, line {each.line}: the label is {each.answers[0]!r}; wanted one that {train.path} has: "
                f"{', '.join(labels)}"
            )
        question = follows(before + each.text + asks)
        wholes = [follows(before + each.text + between + label) for label in labels]
        shared = common(question, *wholes)  # all of the question, unless its end and a label are one token
        questions.append(question[:shared])
        endings.append([whole[shared:] for whole in wholes])
    room = max(
        len(question) + max(map(len, rest), default=NEW_TOKENS)
        for question, rest in zip(questions, endings, strict=True)
    )

    shown = [before + each.text + between + each.answers[-1] for each in train.examples]
    end = np.array([tokenizer.eos_id] if joiner == END else [], np.int32)
    start = encode_prompt(tokenizer, "")
    first = functools.cache(lambda i: np.append(tokenizer.encode(shown[i]), end))
    later = functools.cache(lambda i: np.append(follows(shown[i]), end))
    if max(options.demonstrations, default=0) > len(shown):
        raise ValueError(f"demonstrations has {max(options.demonstrations)}; {train.path} has {len(shown)}")
    reserved = len(start) + room + (0 if labelled else ANSWER_ROOM - NEW_TOKENS)
    texts: dict[int, list[Ids]] = {size: [] for size in sorted({*options.lengths, *options.demonstrations})}
    counts: dict[int, list[int]] = {size: [] for size in texts}
    for draw in range(options.draws):
        order = np.random.default_rng([options.seed, 1, draw]).permutation(len(shown)).tolist()
        for size in texts:
            taken, used = [start], len(start)
            for i in order if options.lengths else order[:size]:
                ids = later(i) if len(taken) > 1 else first(i)
                used += len(ids)
                if options.lengths and used + reserved >= size:
                    break
                taken.append(ids)
            if len(taken) == 1:
                raise ValueError(
                    f"lengths has {size}: the first demonstration of draw {draw} and the longest question need "
                    f"{used + reserved} tokens; wanted more than those"
                )
            texts[size].append(np.concatenate(taken))
            counts[size].append(len(taken) - 1)
    wanted, lines = [each.answers for each in asked], [each.line for each in asked]
    return Prompts(texts, counts, questions, endings, labels, wanted, lines, room)


# ---- answers


def normalised(text: str) -> str:
    """An answer as SQuAD's are compared: lower case, without punctuation, articles and extra blanks."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def is_right(answer: str, wanted: Sequence[str]) -> bool:
    """Whether an answer equals any of those that are right."""
    return normalised(answer) in map(normalised, wanted)


def one_token(given: Prompts) -> list[int]:
    """Which labels are one token, the same after all questions."""
    each = [{tuple(endings[i].tolist()) for endings in given.endings} for i in range(len(given.labels))]
    return [i for i, ways in enumerate(each) if len(ways) == 1 and len(*ways) == 1]


def label_scores(subject: Subject, given: Prompts, texts: Sequence[Ids]) -> np.ndarray:
    """Mean log-probability of each label's tokens after each question about each text, float64 [texts, questions,
    labels].
    """
    reader = subject.read(texts, given.room)
    means = np.zeros((len(texts), len(given.questions), len(given.labels)))
    single = one_token(given)
    rest = [i for i in range(len(given.labels)) if i not in single]
    if single:  # a question is read once for all of them
        tokens = [int(given.endings[0][i][0]) for i in single]
        means[..., single] = subject.choices(texts, [given.questions] * len(texts), tokens, reader=reader)
    if rest:
        ends = [[endings[i] for i in rest] for endings in given.endings]
        whole = [np.append(question, end) for question, each in zip(given.questions, ends) for end in each]
        found = subject.scores(texts, [whole] * len(texts), reader=reader)
        counts = [len(end) for each in ends for end in each]
        mean = [[each.log_p[-n:].mean(dtype=np.float64) for each, n in zip(row, counts)] for row in found]
        means[..., rest] = np.reshape(mean, (len(texts), -1, len(rest)))
    return means


def classified(subject: Subject, given: Prompts, texts: Sequence[Ids]) -> list[list[str]]:
    """The label of each question after each text: the likeliest by `label_scores`."""
    return [[given.labels[i] for i in row] for row in label_scores(subject, given, texts).argmax(-1)]


def answered(subject: Subject, given: Prompts, texts: Sequence[Ids]) -> list[list[str]]:
    """The answer to each question after each text, to the end of its first line."""
    found = subject.answers(texts, [given.questions] * len(texts), NEW_TOKENS, stop=("\n",), room=given.room)

    def text(ids: Ids) -> str:
        ends = np.flatnonzero(ids == subject.tokenizer.eos_id)  # the model's eos may be another
        return subject.text(ids[: ends[0]] if len(ends) else ids).partition("\n")[0].strip()

    return [[text(ids) for ids in each] for each in found]


def run(subject: Subject, options: ConfigDict, given: Prompts, journal: Journal) -> Report:
    """Accuracy by context length or number of demonstrations.

    Args:
        options: as `default_options`.
        given: see `inputs`.

    Raises:
        ValueError: see `check` and `check_prompts`.
    """
    check(subject.config, options)
    read = sum(map(len, given.questions))  # a question once for all labels of one token, and for each of the others
    if given.labels:
        single = one_token(given)
        ends = [len(end) for each in given.endings for i, end in enumerate(each) if i not in single]
        read = read * (bool(single) + len(given.labels) - len(single)) + sum(ends)
    check_prompts(subject.config, options, given)
    parts = []
    for size, texts in given.texts.items():
        for first in range(0, options.draws, options.rows):
            batch = texts[first : first + options.rows]
            tokens = sum(map(len, batch)) + len(batch) * read
            measure = functools.partial(classified if given.labels else answered, subject, given, batch)
            parts.append(Part(f"{_unit(options)} {size}, draws from {first}", tokens, measure))
    batches = iter(journal.results(parts, "fewshot", subject.clock))
    found = {
        size: [draw for _ in range(0, options.draws, options.rows) for draw in next(batches)] for size in given.texts
    }
    return report(options, given, found, subject.config.window)


# ---- report


def _unit(options: ConfigDict) -> str:
    return "context length" if options.lengths else "demonstrations"


def t_quantile(freedom: int, confidence: float) -> float:
    """t such that a Student's variable of so many degrees of freedom is within +-t with probability `confidence`
    (Abramowitz and Stegun, 26.7.3 and 26.7.4, solved by bisection).
    """

    def within(angle: float) -> float:  # of atan(t / sqrt(freedom))
        cos, term, total = math.cos(angle), 1.0, 0.0
        odd = freedom % 2
        for n in range(odd + 2, freedom + 2, 2):  # the sum's terms: cos^(n - 2), each a factor times the one before
            total += term * (cos if odd else 1.0)
            term *= cos**2 * (n - 1) / n
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def plus_minus(values: Sequence[float], confidence: float) -> float:
    """Half the confidence interval of a mean; NaN for one value."""
    n = len(values)
    return t_quantile(n - 1, confidence) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan


def same_answer(wanted: Sequence[Sequence[str]], labelled: bool) -> float:
    """Share of questions that the best of all single answers is right for: chance, where labels are alike often."""
    counted = collections.Counter(
        answer for answers in wanted for answer in {each if labelled else normalised(each) for each in answers}
    )
    return max(counted.values()) / len(wanted)


def report(options: ConfigDict, given: Prompts, found: dict[int, list[list[str]]], window: int) -> Report:
    """The table, curve and numbers of answers by size, draw and question."""
    labelled, unit = bool(given.labels), _unit(options)
    right = {
        size: np.array(
            [
                [each == wanted[0] if labelled else is_right(each, wanted) for each, wanted in zip(draw, given.wanted)]
                for draw in draws
            ]
        )
        for size, draws in found.items()
    }
    chance = same_answer(given.wanted, labelled)
    sizes, rows = {}, []
    for size, right_SN in right.items():
        accuracy = right_SN.mean(axis=1).tolist()
        sizes[str(size)] = here = dict(
            accuracy=float(np.mean(accuracy)),
            plus_minus=plus_minus(accuracy, options.confidence),
            accuracy_of_draws=accuracy,
            demonstrations=given.counts[size],
            tokens=[len(text) for text in given.texts[size]],
            draws_right_of_questions=right_SN.sum(axis=0).tolist(),
            answers_of_first_draw=found[size][0],
        )
        means = [float(np.mean(here[name])) for name in ("demonstrations", "tokens")][0 if options.lengths else 1 :]
        interval = 100 * here["plus_minus"] if options.draws > 1 else "-"
        rows.append((size, *means, 100 * here["accuracy"], interval, 100 * chance))
    kind = f"{len(given.labels)} labels" if labelled else "answers, exact match"
    name = f"{options.format} ({options.labels})" if options.format == "trec" else options.format
    title = f"few-shot {name}, {kind}: {len(given.wanted):,} questions, {options.draws} draws"

    def plot(path: pathlib.Path) -> None:
        places = {size: f"{int(size):,}" for size in sizes}
        lines = {
            "accuracy": {places[size]: 100 * here["accuracy"] for size, here in sizes.items()},
            "always the same answer": {place: 100 * chance for place in places.values()},
        }
        bars = {places[size]: 100 * here["plus_minus"] for size, here in sizes.items()}
        errors = {"accuracy": bars} if options.draws > 1 else {}
        x = "context length, tokens" if options.lengths else "demonstrations"
        y = f"accuracy, %, with {100 * options.confidence:g}% interval" if errors else "accuracy, %"
        panel = plots.Panel(title.replace(": ", ":\n"), x, y, lines, errors, dashed=("always the same answer",))
        plots.lines(path, [panel])

    means = ("demonstrations", "tokens")[0 if options.lengths else 1 :]
    return Report(
        title=(
            f"{title};\n{described(options)}, window {window:,}; means, +- {100 * options.confidence:g}% interval over "
            f"draws; beside, always the same answer"
        ),
        columns=(unit, *means, "accuracy %", "+-", "same answer %"),
        rows=tuple(rows),
        values=dict(
            options=options.to_dict(),
            window=window,
            labels=given.labels,
            questions=len(given.wanted),
            lines_of_questions=given.lines,
            same_answer=chance,
            accuracy=sizes,
        ),
        plot=plot,
    )
