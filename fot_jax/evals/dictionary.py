"""Dictionary lookup: values of keys that were defined up to millions of tokens before (arXiv 2307.03170, section 5.2
and appendix F).

A document defines keys, in records `<k> k1 k2 k3 k4 <v> v1 v2 v3 v4`, and then asks for some of them, in records
`<q> k1 k2 k3 k4 <v> v1 v2 v3 v4`, of which v1..v4 are predicted. Dictionaries grow, the questions stay: 25 of them, as
many as 256 tokens hold, one after another in one window, those before with their right answers. Dictionary tokens are
read once, into memory; the open window begins with the first `<q>`. With `together=False` each question is asked by
itself, right after the dictionary: for windows that do not hold all 25, and where no other answer is to be seen.

What the paper leaves open is decided as follows.

- The vocabulary of 64 tokens is all there is: three are `<k>`, `<v>` and `<q>`, one is a filler, 60 are symbols.
- A key is defined once in a document: of 1.6 million keys drawn independently, 12% would have another value too. It is
  asked for once at most, so that no question shows the answer to another.
- A dictionary of n tokens is cut into blocks of 256, each 25 records and six fillers: no record is cut in two, as none
  is in training, whose documents are one window of definitions and one of questions. Fillers after the last record are
  not read.
- Accuracy of values counts those of which all four tokens are the likeliest, each given those before it, which is when
  greedy decoding writes them; accuracy of tokens counts each of the four.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fot_jax import sharding
from fot_jax.config import ModelConfig
from fot_jax.evals import Report, plots
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject, check_length, check_reading, described, reading_options

NEEDS_TOKENIZER = False

WORD = 4  # symbols of a key, and of a value
RECORD = 2 + 2 * WORD  # tokens of a definition or question: a marker, a key, <v>, a value
KEY, VALUE = slice(1, 1 + WORD), slice(2 + WORD, RECORD)  # where they are in a record


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ids of the task's tokens. All below `size` that have no name are symbols, which keys and values are made of.

    Attributes:
        size: how many ids there are, those with a name included.
        filler: what is where no record fits.
        key, value, question: <k>, <v> and <q>.

    Raises:
        ValueError: named ids that are not different ones below `size`; more symbols than keys can be counted with.
    """

    size: int = 64
    filler: int = 0
    key: int = 1
    value: int = 2
    question: int = 3

    def __post_init__(self):
        if len(set(self._named)) < len(self._named) or not all(0 <= i < self.size for i in self._named):
            raise ValueError(
                f"filler, key, value and question are {self._named}; wanted different ids in 0..{self.size - 1} (size)"
            )
        if self.keys >= 2**63:
            raise ValueError(f"vocabulary.size is {self.size}; wanted symbols whose {WORD}-th power is below 2**63")

    @property
    def _named(self) -> tuple[int, ...]:
        return self.filler, self.key, self.value, self.question

    @property
    def symbols(self) -> np.ndarray:
        """int32, ids that keys and values are made of."""
        return np.setdiff1d(np.arange(self.size, dtype=np.int32), self._named)

    @property
    def keys(self) -> int:
        """How many different keys there are."""
        return (self.size - len(self._named)) ** WORD


def definitions(rng: np.random.Generator, count: int, vocabulary: Vocabulary = Vocabulary()) -> np.ndarray:
    """Records [count, RECORD] int32 that define different keys, each drawn evenly, and so are their values.

    Raises:
        ValueError: more than there are keys.
    """
    if count > vocabulary.keys:
        raise ValueError(
            f"{count:,} definitions with {len(vocabulary.symbols)} symbols, which make {vocabulary.keys:,} keys; "
            f"wanted no more"
        )
    symbols = vocabulary.symbols
    key_N = rng.choice(vocabulary.keys, count, replace=False)
    digits = len(symbols) ** np.arange(WORD)
    out = np.empty((count, RECORD), np.int32)
    out[:, 0], out[:, KEY.stop] = vocabulary.key, vocabulary.value
    out[:, KEY] = symbols[key_N[:, None] // digits % len(symbols)]
    out[:, VALUE] = symbols[rng.integers(len(symbols), size=(count, WORD))]
    return out


def questions(
    rng: np.random.Generator, defined: np.ndarray, count: int, vocabulary: Vocabulary = Vocabulary()
) -> np.ndarray:
    """Records [count, RECORD] int32 that ask for keys, each once at most, and answer.

    Args:
        defined: see `definitions`.

    Raises:
        ValueError: more than were defined.
    """
    if count > len(defined):
        raise ValueError(f"{count:,} questions about {len(defined):,} definitions; wanted no more")
    out = defined[rng.choice(len(defined), count, replace=False)]
    out[:, 0] = vocabulary.question
    return out


def records_in(tokens: int, block: int) -> int:
    """How many records there are in so many tokens, of which `block` at a time hold whole ones; 0: all of them."""
    whole, rest = divmod(tokens, block or tokens)
    return whole * ((block or tokens) // RECORD) + rest // RECORD


def laid_out(records: np.ndarray, tokens: int, block: int, filler: int) -> np.ndarray:
    """`tokens` tokens, int32, of `records_in(tokens, block)` records: in each block as many as fit, then fillers."""
    block = block or tokens
    whole, each = tokens // block, block // RECORD
    out = np.full(tokens, filler, np.int32)
    blocks = out[: whole * block].reshape(whole, block)
    blocks[:, : each * RECORD] = records[: whole * each].reshape(whole, each * RECORD)
    rest = records[whole * each :].reshape(-1)
    out[whole * block :][: rest.size] = rest
    return out


def read_tokens(tokens: int, block: int) -> int:
    """How many of them there are up to the end of the last record."""
    whole, rest = divmod(tokens, block or tokens)
    if rest >= RECORD:
        return tokens - rest % RECORD
    return tokens - rest - (block or tokens) % RECORD


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        reading="topk",
        k=32,  # as in the paper
        last_context_length=1,  # <q>, so that all of the dictionary is memory, where it does not fit the window
        rows=10,
        dictionary_tokens=(256, 1024, 4096, 16384, 65536),  # the paper goes on to 2**24 in steps of 4
        questions=25,  # asked about a dictionary
        together=True,  # questions follow one another in one window, as in the paper; False: each asked by itself
        block=256,  # tokens that hold whole records, the window of training; 0: records follow one another
        seeds=tuple(range(10)),  # dictionaries are drawn anew for each
        documents=1,  # dictionaries of a size and seed
        vocabulary=dataclasses.asdict(Vocabulary()),
    )
    return ConfigDict(options)


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range, more definitions than keys, questions than definitions, or tokens than the
            model can read.
    """
    config, vocabulary = check_reading(config, options), Vocabulary(**options.vocabulary)
    if vocabulary.size > config.vocab_size:
        raise ValueError(
            f"vocabulary.size is {vocabulary.size}; wanted at most the model's vocabulary, {config.vocab_size}"
        )
    if options.block and options.block < RECORD or options.block < 0:
        raise ValueError(f"block is {options.block}; wanted at least {RECORD}, the tokens of a record, or 0")
    if options.block and config.window % options.block:
        raise ValueError(
            f"block is {options.block} and window {config.window}, which would cut records in two; wanted a block that "
            f"divides the window, or 0 for records that follow one another"
        )
    if min(options.questions, options.documents) < 1:
        raise ValueError(
            f"questions is {options.questions} and documents {options.documents}; wanted at least 1 of each"
        )
    if not options.seeds or len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise ValueError(f"seeds is {options.seeds}; wanted different numbers of 0 or more")
    if _room(options) >= config.window:
        raise ValueError(
            f"{options.questions if options.together else 1} questions have {_room(options) + 1} tokens; wanted no "
            f"more than the window's {config.window}{': fewer, or together=False' if options.together else ''}"
        )
    if not options.dictionary_tokens:
        raise ValueError("dictionary_tokens is (); wanted numbers of tokens")
    for tokens in options.dictionary_tokens:
        defined = records_in(tokens, options.block) if tokens > 0 else 0
        if defined < options.questions:
            raise ValueError(
                f"a dictionary of {tokens:,} tokens has {defined:,} definitions; wanted at least {options.questions}, "
                f"as many as questions"
            )
        if defined > vocabulary.keys:
            raise ValueError(
                f"a dictionary of {tokens:,} tokens has {defined:,} definitions; wanted at most {vocabulary.keys:,}, "
                f"the keys of {len(vocabulary.symbols)} symbols (vocabulary.size)"
            )
        what = f"a dictionary of {tokens:,} tokens, with its questions,"
        check_length(config, options, read_tokens(tokens, options.block) + 1 + _room(options), what)


def _room(options: ConfigDict) -> int:
    """Tokens that follow the first <q> in a window."""
    return RECORD * (options.questions if options.together else 1) - 1


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: None, folder: pathlib.Path) -> tuple[()]:
    """Nothing: dictionaries are drawn."""
    return ()


def document(seed: int, tokens: int, number: int, options: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """Dictionary `number` of a seed and size: its tokens, int32, up to the end of its last record; its questions,
    int32 [questions, RECORD].
    """
    rng, vocabulary = np.random.default_rng([seed, tokens, number]), Vocabulary(**options.vocabulary)
    defined = definitions(rng, records_in(tokens, options.block), vocabulary)
    asked = questions(rng, defined, options.questions, vocabulary)
    text = laid_out(defined, tokens, options.block, vocabulary.filler)
    return text[: read_tokens(tokens, options.block)], asked


def right_tokens(
    subject: Subject, documents: Sequence[tuple[np.ndarray, np.ndarray]], together: bool
) -> list[list[int]]:
    """For each document and question, how many of the value's tokens are the likeliest.

    Args:
        documents: see `document`; as many as `subject.rows`, at most, each with as many questions.
        together: whether questions follow one another in one window.
    """
    texts = [np.append(text, asked[0, :1]) for text, asked in documents]  # up to the first <q>
    follows = [[asked.reshape(-1)] if together else list(asked) for _, asked in documents]
    found = subject.scores(texts, [[tokens[1:] for tokens in each] for each in follows])
    likeliest = [np.stack([one.likeliest for one in each]) for each in found]
    # The first <q> was given; a column for it makes records whole again.
    whole = [np.pad(x, ((0, 0), (1, 0))).reshape(-1, RECORD) for x in likeliest]
    return [x[:, VALUE].sum(axis=1).tolist() for x in whole]


def run(subject: Subject, options: ConfigDict, nothing: Any, journal: Journal) -> Report:
    """Accuracy by the size of the dictionary.

    Args:
        options: as `default_options`.
        nothing: see `inputs`.

    Raises:
        ValueError: see `check`.
    """
    check(subject.config, options)
    lengths = sorted(set(options.dictionary_tokens))
    drawn = [(seed, number) for seed in options.seeds for number in range(options.documents)]
    ways = sharding.ways("batch")
    subject = dataclasses.replace(subject, rows=min(subject.rows, -(-len(drawn) // ways) * ways))

    def measure(tokens: int, some: Sequence[tuple[int, int]]) -> list[list[int]]:
        return right_tokens(subject, [document(seed, tokens, n, options) for seed, n in some], options.together)

    starts = range(0, len(drawn), subject.rows)
    # The first <q> is read once for all questions about a dictionary.
    asked = 1 + _room(options) * (1 if options.together else options.questions)
    parts = []
    for tokens in lengths:
        for first in starts:
            some = drawn[first : first + subject.rows]
            measured = functools.partial(measure, tokens, some)
            each = read_tokens(tokens, options.block) + asked
            parts.append(Part(f"{tokens} tokens, from {first}", each * len(some), measured))
    batches = iter(journal.results(parts, "dictionary", subject.clock))
    found = {}
    for tokens in lengths:
        each = [counts for _ in starts for counts in next(batches)]
        found[tokens] = {
            seed: each[i : i + options.documents]
            for i, seed in zip(range(0, len(each), options.documents), options.seeds)
        }
    return report(options, found, subject.config.window)


def report(options: ConfigDict, found: dict[int, dict[int, list[list[int]]]], window: int) -> Report:
    """The table, figure and numbers.

    Args:
        found: dictionary tokens -> seed -> for each document and question, how many tokens of the value are right.
    """
    values = {
        tokens: {seed: float(np.mean(np.array(counts) == WORD)) for seed, counts in seeds.items()}
        for tokens, seeds in found.items()
    }
    accuracy = {tokens: float(np.mean(list(seeds.values()))) for tokens, seeds in values.items()}
    of_tokens = {tokens: float(np.mean(list(seeds.values()))) / WORD for tokens, seeds in found.items()}
    least, most = ({n: f(seeds.values()) for n, seeds in values.items()} for f in (min, max))
    defined = {tokens: records_in(tokens, options.block) for tokens in found}
    asked = "in one window" if options.together else "each by itself"
    title = (
        f"dictionary lookup: {options.questions} questions {asked}, {len(options.seeds)} seeds, "
        f"{described(options)}, window {window:,}"
    )

    def plot(path: pathlib.Path) -> None:
        named = lambda curve: {short(tokens): y for tokens, y in curve.items()}
        bars = {n: (accuracy[n] - least[n], most[n] - accuracy[n]) for n in found}
        lines = {"values, min and max over seeds": named(accuracy), "tokens of values": named(of_tokens)}
        errors = {"values, min and max over seeds": named(bars)}
        panel = plots.Panel("dictionary lookup", "dictionary, tokens", "accuracy", lines, errors, (-0.03, 1.03))
        plots.lines(path, [panel])

    return Report(
        title=title,
        columns=("dictionary tokens", "definitions", "values", "tokens", "values, min", "values, max"),
        rows=tuple((n, defined[n], accuracy[n], of_tokens[n], least[n], most[n]) for n in found),
        values=dict(
            options=options.to_dict(),
            window=window,
            definitions=_keyed(defined),
            value_accuracy=_keyed(accuracy),
            token_accuracy=_keyed(of_tokens),
            value_accuracy_min=_keyed(least),
            value_accuracy_max=_keyed(most),
            value_accuracy_of_seeds={str(n): _keyed(seeds) for n, seeds in values.items()},
            right_tokens={str(n): _keyed(seeds) for n, seeds in found.items()},
        ),
        plot=plot,
    )


def _keyed(numbers: dict[int, Any]) -> dict[str, Any]:
    """With keys that JSON has."""
    return {str(key): value for key, value in numbers.items()}


def short(tokens: int) -> str:
    """A number of tokens as the paper writes it: 256, 4K, 16M."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return f"{tokens:,}"
