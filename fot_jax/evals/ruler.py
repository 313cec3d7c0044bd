"""RULER's synthetic tasks: retrieval, tracing and counting in texts of a given length (arXiv 2404.06654, sections 3 and
4; NVIDIA/RULER).

`ruler_tasks` says what is asked, and where samples differ from the published ones. An answer is what the model goes on
with, greedily, up to an end of text or the task's number of tokens (`tokens_to_generate`); nothing else ends it. Its
score is the share of the expected strings that stand in it, upper or lower case (`string_match_all` of
`scripts/eval/synthetic/constants.py`, after `postprocess_pred` of `scripts/eval/evaluate.py`), and a task's score at a
length the mean of its samples' times 100, with two decimals. RULER calls a length effective where the average over its
13 tasks is 85.6 or more; the two that are not here need SQuAD and HotpotQA.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fot_jax.config import ModelConfig
from fot_jax.evals import Report, plots, texts
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.ruler_tasks import TASKS, Sampler, word_lists
from fot_jax.evals.subject import Subject, check_length, check_reading, described, reading_options
from fot_jax.tokenizer import Tokenizer


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        # Those that need no text of the user's. Others: niah_single_2 and _3, niah_multikey_1, niah_multivalue and
        # niah_multiquery, whose needles are hidden in the texts of data.sources.
        tasks=("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"),
        lengths=(4096, 8192, 16384, 32768),  # of a prompt and its answer, in tokens
        samples=100,  # of each task and length; published: 500
        seed=42,
    )
    return ConfigDict(options)


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an unknown task, an option out of range, lengths beyond what the model can read.
    """
    config = check_reading(config, options)
    for task in options.tasks:
        if task not in TASKS:
            raise ValueError(f"tasks has {task!r}; wanted some of {', '.join(TASKS)}")
        if TASKS[task].new_tokens >= config.window:
            raise ValueError(
                f"task {task} has answers of {TASKS[task].new_tokens} tokens and the window {config.window}; wanted it "
                "to have more"
            )
    for name in ("tasks", "lengths"):
        if not options[name] or len(set(options[name])) < len(options[name]):
            raise ValueError(f"{name} is {options[name]}; wanted at least one, and none twice")
    if min(options.lengths) < 1 or options.samples < 1 or options.seed < 0:
        raise ValueError(
            f"lengths is {options.lengths}, samples {options.samples}, seed {options.seed}; wanted at least 1, 1 and 0"
        )
    check_length(config, options, max(options.lengths), "a prompt with its answer")


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> dict[str, Any]:
    """What samples are made of, as `ruler_tasks.Sampler` takes it, as far as the tasks need it.

    Raises:
        ValueError: no text for a task that hides needles in one; a length that a sample does not fit.
        ImportError: no package wonderwords for a task that needs its words.
    """
    options, given = config.options, {}
    if any(TASKS[task].words for task in options.tasks):
        given["words"] = word_lists()
    if needy := [task for task in options.tasks if TASKS[task].prose]:
        if not config.data.sources:
            raise ValueError(
                f"config key data.sources is empty; wanted a source of prose, in which {', '.join(needy)} hides needles"
            )
        words = " ".join(texts.strings(config.data)).split()
        if not words:
            raise ValueError(f"data.sources is {config.data.sources}, with no word in it; wanted prose")
        given["prose"] = " ".join(words[: max(options.lengths)])  # words of less than a token are not worth more
    sampler = Sampler(tokenizer, given, options.seed)
    for task in options.tasks:
        for length in options.lengths:
            enough = sampler.enough(task, length, options.samples)
            if enough > length:
                raise ValueError(
                    f"task {task}: length is {length}; wanted at least {enough}, which the smallest prompts of all "
                    f"{options.samples} samples fit with {TASKS[task].new_tokens} tokens of an answer"
                )
    return given


def matched(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers that a text has, whatever their case."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def postprocessed(text: str) -> str:
    """An answer as it is scored: without spaces round it, control characters as newlines."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def run(subject: Subject, options: ConfigDict, given: dict[str, Any], journal: Journal) -> Report:
    """The score of every task at every length.

    Args:
        options: as `default_options`.
        given: see `inputs`.

    Raises:
        ValueError: see `check` and `inputs`.
    """
    check(subject.config, options)
    sampler = Sampler(subject.tokenizer, given, options.seed)
    lengths = sorted(options.lengths)

    def measure(task: str, length: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
        samples = [sampler.sample(task, length, i) for i in numbers]
        new_tokens, nothing = TASKS[task].new_tokens, [samples[0].ids[:0]]
        found = subject.answers([each.ids for each in samples], [nothing] * len(samples), new_tokens, room=new_tokens)
        texts = [postprocessed(subject.text(ids)) for (ids,) in found]
        return [
            dict(
                tokens=len(each.ids),
                answers=each.answers,
                prediction=text,
                score=matched(text, each.answers),
            )
            for each, text in zip(samples, texts, strict=True)
        ]

    parts = [
        Part(
            f"{task}, length {length}, from {first}",
            (length - TASKS[task].new_tokens) * len(numbers),
            functools.partial(measure, task, length, numbers),
        )
        for task in options.tasks
        for length in lengths
        for first in range(0, options.samples, options.rows)
        for numbers in [range(first, min(first + options.rows, options.samples))]
    ]
    batches = iter(journal.results(parts, "ruler", subject.clock))
    found = {
        task: {
            length: [each for _ in range(0, options.samples, options.rows) for each in next(batches)]
            for length in lengths
        }
        for task in options.tasks
    }
    return report(options, found, subject.config.window)


def report(options: ConfigDict, found: dict[str, dict[int, list[dict[str, Any]]]], window: int) -> Report:
    """The table, map and numbers of answers by task and length."""
    lengths = [*next(iter(found.values()))]
    of_all = lambda number: {
        task: {length: number(samples) for length, samples in by_length.items()} for task, by_length in found.items()
    }
    mean = lambda key: lambda samples: float(np.mean([each[key] for each in samples]))
    scores = of_all(lambda samples: round(100 * mean("score")(samples), 2))
    average = {length: round(float(np.mean([scores[task][length] for task in scores])), 2) for length in lengths}
    rows = {**scores, "average": average}
    title = (
        f"RULER: scores from 0 to 100, {options.samples} samples of each task and length;\n"
        f"memory read {described(options)}, window {window:,}"
    )

    def plot(path: pathlib.Path) -> None:
        shares = np.array([[row[length] / 100 for length in lengths] for row in rows.values()])
        columns = [f"{length:,}" for length in lengths]
        plots.grid(path, title, "prompt and answer, tokens", "task", columns, list(rows), shares)

    by_name = lambda table: {task: {str(length): x for length, x in row.items()} for task, row in table.items()}
    return Report(
        title=title,
        columns=("task", *(f"{length:,}" for length in lengths)),
        rows=tuple((name, *(row[length] for length in lengths)) for name, row in rows.items()),
        values=dict(
            options=options.to_dict(),
            window=window,
            scores=by_name(scores),
            average={str(length): x for length, x in average.items()},
            empty_answers=by_name(of_all(lambda samples: sum(not each["prediction"] for each in samples))),
            prompt_tokens=by_name(of_all(mean("tokens"))),
            samples=by_name(found),
        ),
        plot=plot,
    )
