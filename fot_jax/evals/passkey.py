"""Passkey retrieval: a number hidden in a long text of no interest, asked for at its end.

The prompt is that of Mohtashami and Jaggi (arXiv 2305.16300; epfml/landmark-attention, `llama/run_test.py`), as the
Focused Transformer's authors use it (arXiv 2307.03170, section 4.2 and figure 1; CStanKonrad/long_llama,
`examples/utils/landmark_prompt.py`): five lines, of which the second and the fourth are garbage, counted in characters.
Theirs is at most 449,999 characters long, some 120,000 tokens; here there is no limit.

An answer is right if the first number in it is the key, as in the former; ten tokens are generated.
"""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fot_jax.config import ModelConfig
from fot_jax.evals import Report, plots
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject, check_length, check_reading, reading_options
from fot_jax.tokenizer import Tokenizer, encode_prompt

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
KEYS = (1, 50_000)
NEW_TOKENS = 10


class Prompt(NamedTuple):
    """A prompt and what it asks for.

    Attributes:
        text: the five lines.
        key: the answer.
        depth: share of the garbage that comes before it.
    """

    text: str
    key: int
    depth: float


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        lengths=(1024, 2048, 4096, 8192),  # of prompts, in tokens
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),  # shares of the garbage before the key; (): drawn, as published
        samples=10,  # prompts of each length and depth
        seed=0,
    )
    return ConfigDict(options)


def prompt(garbage: int, depth: float, key: int) -> str:
    """The prompt with so many characters of garbage, a share `depth` of them before the key."""
    before = round(depth * garbage)
    fill = lambda n: (GARBAGE * (n // len(GARBAGE) + 1))[:n]
    return "\n".join([TASK, fill(before), KEY.format(key=key), fill(garbage - before), QUESTION])


def draw(seed: int, length: int, number: int, garbage: int, depth: float | None) -> Prompt:
    """A prompt: its key, and its depth where None is given, depend on the first three numbers alone."""
    rng = np.random.default_rng([seed, length, number])
    drawn, key = float(rng.random()), int(rng.integers(KEYS[0], KEYS[1], endpoint=True))
    depth = drawn if depth is None else depth
    return Prompt(prompt(garbage, depth, key), key, depth)


def within(
    encode: Callable[[str], np.ndarray], seed: int, length: int, number: int, garbage: int, depth: float | None
) -> tuple[Prompt, np.ndarray]:
    """`draw`, and its tokens: at most `length`, for which some characters of garbage are left out where it has more.

    Where garbage is cut, its tokens may be some more or fewer.
    """
    while True:
        drawn = draw(seed, length, number, garbage, depth)
        ids = encode(drawn.text)
        if len(ids) <= length or not garbage:
            return drawn, ids
        garbage = max(garbage - (len(ids) - length), 0)


def garbage_for(encode: Any, length: int) -> int:
    """Characters of garbage for a prompt of `length` tokens: a prompt of so much, its key in the middle, has as many
    tokens or up to two fewer, where that can be met.

    Args:
        encode: text -> tokens of a prompt, with its BOS.

    Raises:
        ValueError: a length below that of a prompt without garbage.
    """
    count = lambda garbage: len(encode(prompt(garbage, 0.5, KEYS[1])))
    bare = count(0)
    if length < bare:
        raise ValueError(f"lengths has {length}; wanted at least {bare} tokens, which a prompt without garbage has")
    per_token = 100 * len(GARBAGE) / (count(100 * len(GARBAGE)) - bare)
    garbage, best = round((length - bare) * per_token), 0
    for _ in range(20):
        short = length - count(garbage)
        if short >= 0:
            best = max(best, garbage)
        if 0 <= short <= 2:
            return garbage
        garbage = max(garbage + (round((short - 1) * per_token) or 1), 0)
    return best


def answered(text: str) -> int | None:
    """The first number in an answer."""
    found = re.search(r"\d+", text)
    return int(found[0]) if found else None


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range; prompts longer than the model can read.
    """
    check_reading(config, options)
    if not options.lengths or min(options.lengths) < 1:
        raise ValueError(f"lengths is {options.lengths}; wanted numbers of tokens")
    if any(not 0 <= depth <= 1 for depth in options.depths):
        raise ValueError(f"depths is {options.depths}; wanted shares from 0 to 1, or ()")
    if options.samples < 1:
        raise ValueError(f"samples is {options.samples}; wanted at least 1")
    for length in options.lengths:
        check_length(config, options, length + NEW_TOKENS, f"a prompt of {length:,} tokens and its answer")


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> list[tuple[int, int]]:
    """For each length the characters of garbage."""
    encode = functools.partial(encode_prompt, tokenizer)
    return [(length, garbage_for(encode, length)) for length in sorted(set(config.options.lengths))]


def run(subject: Subject, options: ConfigDict, garbage: Sequence[tuple[int, int]], journal: Journal) -> Report:
    """Share of keys that are found, by length and depth.

    Args:
        options: as `default_options`.
        garbage: see `inputs`.

    Raises:
        ValueError: see `check`.
    """
    check(subject.config, options)
    depths = list(options.depths) or [None]

    def measure(length: int, size: int, numbers: Sequence[int]) -> list[dict[str, Any]]:
        drawn = [within(subject.encode, options.seed, length, n, size, depths[n % len(depths)]) for n in numbers]
        prompts, ids = zip(*drawn)
        answers = subject.answers(ids, [[ids[0][:0]]] * len(ids), NEW_TOKENS, room=NEW_TOKENS)
        texts = [subject.text(answer) for (answer,) in answers]
        return [
            dict(
                tokens=len(tokens),
                depth=each.depth,
                key=each.key,
                answer=text,
                right=answered(text) == each.key,
            )
            for each, tokens, text in zip(prompts, ids, texts, strict=True)
        ]

    parts, total = [], options.samples * len(depths)
    for length, size in garbage:
        for first in range(0, total, options.rows):
            numbers = range(first, min(first + options.rows, total))
            measured = functools.partial(measure, length, size, numbers)
            parts.append(Part(f"length {length}, from {first}", length * len(numbers), measured))
    batches = iter(journal.results(parts, "passkey", subject.clock))
    found = {
        length: [each for first in range(0, total, options.rows) for each in next(batches)] for length, _ in garbage
    }
    return report(options, found, subject.config.window)


def report(options: ConfigDict, found: dict[int, list[dict[str, Any]]], window: int) -> Report:
    """The table, map and numbers of prompts by length."""
    share = lambda prompts: float(np.mean([each["right"] for each in prompts]))
    tokens = {length: float(np.mean([each["tokens"] for each in prompts])) for length, prompts in found.items()}
    by_depth = {
        length: [share([each for each in prompts if each["depth"] == depth]) for depth in options.depths]
        for length, prompts in found.items()
    }
    names = [f"{depth:.0%}" for depth in options.depths]
    title = f"passkey: share of keys found,\n{len(next(iter(found.values())))} prompts a length, window {window:,}"

    def plot(path: pathlib.Path) -> None:
        columns = [f"{length:,}" for length in found]
        if names:
            shares = np.array(list(by_depth.values())).T
            plots.grid(path, title, "prompt, tokens", "key after this share of the text", columns, names, shares)
        else:
            curve = {f"{length:,}": share(prompts) for length, prompts in found.items()}
            panel = plots.Panel(title, "prompt, tokens", "share of keys found", {"": curve}, limits=(-0.03, 1.03))
            plots.lines(path, [panel])

    return Report(
        title=title,
        columns=("tokens", "of prompts, mean", "found", *(f"at {name}" for name in names)),
        rows=tuple((length, tokens[length], share(found[length]), *by_depth[length]) for length in found),
        values=dict(
            options=options.to_dict(),
            window=window,
            found={str(length): share(prompts) for length, prompts in found.items()},
            found_at_depths={str(length): shares for length, shares in by_depth.items()},
            prompts={str(length): prompts for length, prompts in found.items()},
        ),
        plot=plot,
    )
