"""Samples of RULER's eleven synthetic tasks: prompts, what their answers hold, and how long answers may be (Hsieh et
al. 2024, arXiv 2404.06654; NVIDIA/RULER, `scripts/synthetic.yaml` and `scripts/data/synthetic`).

Templates, needles, depths, one-shot examples and shares of words are those of the published generators in their later
form, in which lines of noise are joined by newlines, prose shorter than a haystack is repeated, a blank line ends vt's
example, a space comes before the answers of cwe's, and the prefix of vt's answer says "assigned" ("assgined" at first).
A prompt is template and answer prefix in one, for models that go on with a text. What is different:

- A sample of length L has at most L tokens, with BOS and with all that may be generated. Of all sizes it is the largest
  that fits, or is short of L by less than a thousandth. RULER counts no BOS, nor fwe's answer; it looks for one size
  for all samples of a task, at first in steps of 10 to 500 items and for fwe of L / 32 words.
- Each sample is drawn from its own seed. RULER shuffles needles, and the words of cwe and fwe, in the same way in all
  samples. Names and keys of a sample differ: RULER lets keys be the same.
- A length that is too short is an error; RULER tries for ever.
- Sentences, before which needles stand in prose, are found by a rule for English, not by NLTK's model.
- Beyond the 8,166 words that wonderwords has, which cwe needs at some 200,000 tokens, adjective-noun pairs follow, as
  niah's keys are. RULER then draws all words from a list of its own.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib.resources
import itertools
import re
import uuid
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fot_jax.tokenizer import Tokenizer, encode_prompt

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)  # of needles in prose, percent

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
NIAH_ONE = (  # where one value is asked for
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text is"
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, {count} variables are assigned the value {query}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 "
    "words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text? Answer: According to the coded text above, "
    "the three most frequently appeared words are:"
)

NAMES = 5  # variables of vt's chain: four hops
VT_EXAMPLE = 500  # tokens of vt's example, its answer not counted
COMMON = 10  # words that cwe asks for
CWE_SHORT = 4096  # below this length cwe's words are repeated less often
FWE_LEAST = 53  # words from which the fourth of fwe's is more frequent than the fifth
TRIES = 100  # draws for each of some things that must differ

Stream = Callable[[int], np.random.Generator]  # a sample's generators of random numbers, each from its start


class Draft(NamedTuple):
    """A sample whose size is open.

    Attributes:
        answers: what is looked for in an answer.
        least, most: of its size, in lines or words.
        tokens: about how many a prompt has, by its size, but for a number common to all sizes; grows with it.
        prompt: by its size.
    """

    answers: list[str]
    least: int
    most: int
    tokens: Callable[[int], float]
    prompt: Callable[[int], str]


class Sample(NamedTuple):
    """A prompt, its tokens int32 [n] with BOS where the model expects one, and the answers."""

    prompt: str
    ids: np.ndarray
    answers: list[str]


class Prose(NamedTuple):
    """A text to hide needles in.

    Attributes:
        words: of the text.
        starts: bool [n], whether a word begins a sentence, the first if the last ends one.
        tokens: int [n + 1], of the words before each.
    """

    words: list[str]
    starts: np.ndarray
    tokens: np.ndarray


def fit(draft: Draft, encode: Callable[[str], np.ndarray], budget: int) -> tuple[str, np.ndarray]:
    """The largest prompt of at most `budget` tokens, or one short of that by less than a thousandth; the smallest of
    all where even that has more. And its tokens.

    Whole prompts are tokenised only to check a size: by what their parts are said to have, it is mostly right at once.
    """
    low, high, size, scale = draft.least, draft.most + 1, draft.least, 1.0
    best = before = None
    while True:
        prompt = draft.prompt(size)
        ids = encode(prompt)
        if len(ids) <= budget or size == draft.least:
            best, low = (prompt, ids), size
        else:
            high = size
        if 0 <= 1000 * (budget - len(ids)) < budget:
            return best
        parts = draft.tokens(size)
        if before and parts != before[1]:
            scale = max((len(ids) - before[0]) / (parts - before[1]), 0.1)  # found for each token that is said
        before = len(ids), parts
        enough = parts + (budget - len(ids)) / scale
        size = low + bisect.bisect_right(range(low, high), enough, key=draft.tokens) - 1
        if size <= low:
            return best


def distinct(count: int, draw: Callable[[], str], what: str, taken: Container[str] = ()) -> list[str]:
    """So many draws that differ from one another and from those that are taken.

    Raises:
        ValueError: not met by a hundred times as many draws.
    """
    found: dict[str, None] = {}
    for _ in range(TRIES * count):
        if (drawn := draw()) not in taken:
            found[drawn] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"{TRIES * count} draws gave {len(found)} different {what}; wanted {count}")


class Sampler:
    """Draws samples for one tokenizer.

    Attributes:
        tokenizer, seed: as given.
        nouns, adjectives, words: lists of words; empty where no task needs them.
    """

    def __init__(self, tokenizer: Tokenizer, given: Mapping[str, Any], seed: int):
        """
        Args:
            given: "words": nouns, adjectives and verbs, lists of strings; "prose": a text. Either only where needed.
            seed: of all samples.
        """
        self.seed, self.tokenizer, self._given = seed, tokenizer, given
        self.nouns, self.adjectives, verbs = given.get("words", ([], [], []))
        self.words = sorted({*self.nouns, *self.adjectives, *verbs})
        # A text's tokens are counted after a full stop, as most do not begin a prompt.
        self._stop = len(tokenizer.encode("."))
        self.word_tokens = functools.cache(lambda word: self.tokens(f" {word}"))
        self._numbers = [0]

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a prompt, int32, after BOS where the model expects one."""
        return encode_prompt(self.tokenizer, text)

    def tokens(self, text: str) -> int:
        """How many tokens a part of a prompt has, if none reaches beyond it."""
        return len(self.tokenizer.encode("." + text)) - self._stop

    def number_tokens(self, count: int) -> int:
        """How many tokens the numbers of a list of so many words have."""
        for i in range(len(self._numbers), count + 1):
            self._numbers.append(self._numbers[-1] + self.tokens(f" {i}."))
        return self._numbers[count]

    @functools.cached_property
    def prose(self) -> Prose:
        """The text that needles are hidden in."""
        words = self._given["prose"].split()
        return Prose(words, sentence_starts(words), np.cumsum([0, *map(self.word_tokens, words)]))

    def draft(self, name: str, length: int, index: int) -> Draft:
        """The sample of a task and length with this index, its size open."""
        stream = lambda part: np.random.default_rng([self.seed, zlib.crc32(name.encode()), length, index, part])
        return TASKS[name].draft(self, stream, length)

    def sample(self, name: str, length: int, index: int) -> Sample:
        """The sample of a task and length with this index, the same whatever else is drawn.

        Raises:
            ValueError: a length below that of the smallest sample.
        """
        draft, new_tokens = self.draft(name, length, index), TASKS[name].new_tokens
        prompt, ids = fit(draft, self.encode, length - new_tokens)
        if len(ids) + new_tokens > length:
            raise ValueError(
                f"task {name}: length is {length}; wanted it to have room for the smallest prompt of sample {index}, "
                f"{len(ids)} tokens, and an answer of {new_tokens}"
            )
        return Sample(prompt, ids, draft.answers)

    def least(self, name: str, length: int, index: int) -> int:
        """Tokens of the smallest prompt of a sample, and of its answer."""
        draft = self.draft(name, length, index)
        return len(self.encode(draft.prompt(draft.least))) + TASKS[name].new_tokens

    def enough(self, name: str, length: int, samples: int) -> int:
        """The length, or the next found beyond it, that so many samples of a task fit; each has its own there."""
        while 2 * self.least(name, length, 0) > length:  # none has twice what another has
            least = max(self.least(name, length, index) for index in range(samples))
            if least <= length:
                break
            length = least
        return length


# ---- needles in a haystack (niah.py)


def draw(sampler: Sampler, kind: str, rng: np.random.Generator) -> str:
    """A key or value: "numbers" of seven digits, "words" (adjective-noun) or "uuids"."""
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(int=int.from_bytes(rng.bytes(16)), version=4))
    return "-".join(words[rng.integers(len(words))] for words in (sampler.adjectives, sampler.nouns))


def niah(
    sampler: Sampler,
    stream: Stream,
    length: int,
    haystack: str,
    key: str = "words",
    value: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Draft:
    """Needles, `values` for each of `keys`, in a haystack of "noise", other "needle"s or "prose"; `queries` keys are
    asked for. Sizes are lines, or words of prose.
    """
    rng = stream(0)
    names = distinct(keys, lambda: draw(sampler, key, rng), "keys")
    found = {name: [draw(sampler, value, rng) for _ in range(values)] for name in names}
    needles = [NEEDLE.format(kind=value, key=name, value=each) for name in names for each in found[name]]
    asked = [names[i] for i in rng.permutation(keys)[:queries]]
    query = asked[0] if queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    template, kind = (NIAH_ONE, value[:-1]) if queries * values == 1 else (NIAH, value)

    if haystack == "prose":
        prose, total = sampler.prose, len(sampler.prose.words)
        tokens = lambda n: n // total * prose.tokens[-1] + prose.tokens[n % total]

        def context(n: int) -> str:
            times = -(-n // total)
            starts = np.tile(prose.starts, times)[:n]
            starts[0] = True
            depths = stream(1).choice(DEPTHS, len(needles), replace=False)
            return among_sentences((prose.words * times)[:n], np.flatnonzero(starts), depths, needles)

        most = length
    else:
        if haystack == "noise":
            lines, most = itertools.repeat(NOISE), length
            line_tokens = sampler.tokens("\n" + NOISE)
            tokens = lambda n: n * line_tokens
        else:
            lines, counted = _enough(_others(sampler, stream(2), key, value, names), sampler, length)
            tokens, most = counted.__getitem__, len(lines)

        def context(n: int) -> str:
            places = stream(1).choice(n, len(needles), replace=False)
            return "\n".join(among_lines(itertools.islice(lines, n), places, needles))

    answers = [each for name in asked for each in found[name]]
    build = lambda n: template.format(kind=kind, context=context(n), query=query)
    return Draft(answers, 1 if haystack == "prose" else len(needles), most, tokens, build)


def _others(sampler: Sampler, rng: np.random.Generator, key: str, value: str, names: Sequence[str]) -> Iterator[str]:
    """Needles of other keys, without end."""
    while True:
        (other,) = distinct(1, lambda: draw(sampler, key, rng), "keys", taken=names)
        yield NEEDLE.format(kind=value, key=other, value=draw(sampler, value, rng))


def _enough(lines: Iterator[str], sampler: Sampler, length: int) -> tuple[list[str], list[int]]:
    """Lines of a little more than `length` tokens, and the tokens of all before each."""
    found, counted = [], [0]
    while counted[-1] < 1.02 * length:
        found.append(next(lines))
        counted.append(counted[-1] + sampler.tokens("\n" + found[-1]))
    return found, counted


def among_lines(lines: Iterable[str], places: Iterable[int], needles: Sequence[str]) -> list[str]:
    """Lines with needles, the first before the last place's line, and so on."""
    lines = list(lines)
    for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
        lines.insert(place, needle)
    return lines


def sentence_starts(words: Sequence[str]) -> np.ndarray:
    """bool [n], whether a word begins a sentence: the word before it, of the first the last one, ends with a full stop,
    a question or exclamation mark, and is no abbreviation or initial; it begins with a capital, a digit, a quotation
    mark or a bracket.
    """
    ends = re.compile(r"""(?!(?:[A-Z]|Mr|Mrs|Ms|Dr|St|vs|etc|[ei]\.[eg])\.$).*[.!?]["'”’)\]]*""")
    begins = re.compile(r"""["'“‘(\[]|[A-Z0-9]""")
    end, begin = ([bool(found(word)) for word in words] for found in (ends.fullmatch, begins.match))
    return np.roll(end, 1) & np.array(begin, bool)


def among_sentences(words: Sequence[str], starts: np.ndarray, depths: Iterable[int], needles: Sequence[str]) -> str:
    """A text with needles.

    Args:
        words: of the text.
        starts: int [n], places of the words that begin its sentences.
        depths: percent of the sentences before a needle, as many as needles.
    """
    edges = [*starts, len(words)]
    at = [0, *sorted(edges[int(len(starts) * (depth / 100))] for depth in depths), len(words)]
    parts = [" ".join(words[first:end]) for first, end in itertools.pairwise(at)]
    return " ".join(itertools.chain(*zip(parts, needles), parts[-1:]))


# ---- variable tracking (variable_tracking.py)


def vt(sampler: Sampler, stream: Stream, length: int) -> Draft:
    """A chain of assignments among lines of noise, after an example of about `VT_EXAMPLE` tokens. Sizes are lines."""
    example = _chain(sampler, stream, 0, letters=3)
    shown, _ = fit(example, sampler.tokenizer.encode, VT_EXAMPLE)
    shown += " " + " ".join(example.answers) + "\n\n"
    draft = _chain(sampler, stream, 2, letters=5)
    return draft._replace(prompt=lambda n: shown + draft.prompt(n), most=length)


def _chain(sampler: Sampler, stream: Stream, part: int, letters: int) -> Draft:
    rng = stream(part)
    spell = lambda: "".join(map(chr, rng.integers(ord("A"), ord("Z") + 1, letters)))
    names = distinct(NAMES, spell, "names", taken=["VAR"])
    value = str(rng.integers(10_000, 99_999))
    statements = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names))]
    line_tokens = sampler.tokens("\n" + NOISE)

    def prompt(n: int) -> str:
        places = stream(part + 1).choice(n, NAMES, replace=False)
        lines = among_lines([NOISE] * n, places, statements[::-1])
        return VT.format(context="\n".join(lines), query=value, count=NAMES)

    return Draft(names, NAMES, VT_EXAMPLE, lambda n: n * line_tokens, prompt)


# ---- common words (common_words_extraction.py)


def numbered(words: Sequence[str]) -> str:
    """1. word 2. word ..."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def listed(words: Sequence[str], common: int, others: int, rng: np.random.Generator) -> str:
    """The question about a list in which the first ten words come `common` times and the others `others` times."""
    words = [*words[:COMMON] * common, *words[COMMON:] * others]
    return CWE.format(context=numbered([words[i] for i in rng.permutation(len(words))]))


def cwe(sampler: Sampler, stream: Stream, length: int) -> Draft:
    """The ten most common of a list of words, after an example. Sizes are words that differ."""
    example, common, others = ((20, 3, 1), 6, 1) if length < CWE_SHORT else ((40, 10, 3), 30, 3)
    rng = stream(0)
    size, *times = example
    shown = [sampler.words[i] for i in rng.permutation(len(sampler.words))[:size]]
    before = f"{listed(shown, *times, rng)} {numbered(shown[:COMMON])}\n"

    words = [sampler.words[i] for i in rng.permutation(len(sampler.words))]
    counted, entries = [0] * COMMON, common * COMMON
    tokens = common * sum(map(sampler.word_tokens, words[:COMMON]))
    counted.append(tokens + sampler.number_tokens(entries))
    pairs, taken = stream(2), set(words)
    for i in itertools.count(COMMON):
        if counted[-1] > 1.02 * length:
            break
        if i == len(words):
            words += distinct(1, lambda: draw(sampler, "words", pairs), "words", taken)
            taken.add(words[-1])
        # A word of the list is counted once for all samples, a pair for this one.
        found = sampler.word_tokens(words[i]) if i < len(sampler.words) else sampler.tokens(f" {words[i]}")
        entries, tokens = entries + others, tokens + others * found
        counted.append(tokens + sampler.number_tokens(entries))
    prompt = lambda n: before + listed(words[:n], common, others, stream(1))
    return Draft(words[:COMMON], COMMON, len(counted) - 1, counted.__getitem__, prompt)


# ---- frequent words (freq_words_extraction.py)


def counts(words: int, kinds: int) -> np.ndarray:
    """int [kinds], how often each kind comes among so many words, by a zeta distribution with exponent 2."""
    return (words * np.arange(1, kinds + 1) ** -2.0 / (np.pi**2 / 6)).astype(int)


def fwe(sampler: Sampler, stream: Stream, length: int) -> Draft:
    """The three most frequent of `length // 50` words of six letters, four at least, the dots left out. Sizes are words
    of the text, a few of which rounding takes away.
    """
    kinds = max(length // 50, 4)
    rng = stream(0)
    spell = lambda: bytes(rng.integers(ord("a"), ord("z") + 1, 6, np.uint8)).decode()
    words = np.array(["...", *distinct(kinds - 1, spell, "words")])
    each = np.array([sampler.tokens(f" {word}") for word in words])

    def prompt(n: int) -> str:
        text = stream(1).permutation(np.repeat(words, counts(n, kinds)))
        return FWE.format(context=" ".join(text))

    return Draft(words[1:4].tolist(), FWE_LEAST, 2 * length, lambda n: int(counts(n, kinds) @ each), prompt)


# ---- all of them


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        new_tokens: of an answer, at most.
        draft: (sampler, the sample's random numbers, length) -> a sample whose size is open.
        words, prose: whether it needs lists of words, a text.
    """

    new_tokens: int
    draft: Callable[[Sampler, Stream, int], Draft]
    words: bool = False
    prose: bool = False


def _niah(haystack: str, key: str = "words", value: str = "numbers", **numbers: int) -> Task:
    draft = functools.partial(niah, haystack=haystack, key=key, value=value, **numbers)
    return Task(128, draft, "words" in (key, value), haystack == "prose")


TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("prose"),
    "niah_single_3": _niah("prose", value="uuids"),
    "niah_multikey_1": _niah("prose", keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": _niah("prose", values=4),
    "niah_multiquery": _niah("prose", keys=4, queries=4),
    "vt": Task(30, vt),
    "cwe": Task(120, cwe, words=True),
    "fwe": Task(50, fwe),
}


def word_lists() -> list[list[str]]:
    """Nouns, adjectives and verbs of the package wonderwords.

    Raises:
        ImportError: it is not installed.
    """
    try:
        folder = importlib.resources.files("wonderwords") / "assets"
    except ImportError as error:
        raise ImportError(
            "RULER's words come from the package wonderwords, which is not installed; pip install 'fot_jax[ruler]'"
        ) from error
    texts = [(folder / f"{kind}list.txt").read_text(encoding="utf-8") for kind in ("noun", "adjective", "verb")]
    return [sorted({line.rstrip() for line in text.splitlines()}) for text in texts]
