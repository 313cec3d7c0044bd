"""Many requests to a model, each a text and what follows it: put together so that texts are read once, rows are filled
and programs shared, and answered as if each were alone.

With W tokens in a window and c = `last_context_length`, a text of n tokens and the m that follow it are read like this:

- n + m <= W: all of it is the open window, and the model is the plain one.
- m < W: the last o = min(c, W - m) tokens of the text open the window and those before are memory, as in
  `fot_jax.long_forward(..., text + what follows, last_context_length=o + m)`. What follows one text and leaves it the
  same o shares its reading.
- Otherwise the last min(c, n) tokens of the text open the window, and the rest is read after them as text that was
  generated is: a full window spills, all of it, into memory.

Answers are generated after an open window of all of the text, where it and the most tokens of an answer fit; of its
last min(c, n) tokens, where they do not. A full window spills, as in `fot_jax.generate`.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import memory
from fot_jax.evals.subject import NOTHING, Ids, Likelihood, Subject
from fot_jax.generate import OPEN_TOKENS
from fot_jax.generate.sampling import GREEDY, Sampling

LEAST_WAYS = 4  # what follows one text that is asked together, however short the text

Pair = tuple[Ids, Ids]  # a text and what follows it
Batch = list[list[int]]  # requests asked together: of each row the numbers of those that share its text


def batches(subject: Subject, pairs: Sequence[Pair], sharing: bool = True) -> list[Batch]:
    """All requests, in batches of at most `rows` texts.

    Args:
        pairs: neither part of any is empty.
        sharing: whether requests of one text share its reading; else each has a row.
    """
    W, c = subject.config.window, subject.config.last_context_length
    rows, alone = [], []
    shared: dict[tuple[bytes, int], list[int]] = collections.defaultdict(list)
    for number, (text, follows) in enumerate(pairs):
        n, m = len(text), len(follows)
        if sharing and m < W:
            shared[text.tobytes(), n if n + m <= W else min(c, W - m)].append(number)
        else:
            alone.append([number])
    for numbers in shared.values():
        # As many to a row as cost what its text does: in a batch all rows have as many branches as the one with most.
        longest = max(len(pairs[number][1]) for number in numbers)
        size = max(LEAST_WAYS, len(pairs[numbers[0]][0]) // max(longest, OPEN_TOKENS))
        rows += _chunks(numbers, size)
    cost = lambda row: len(pairs[row[0]][0]) + max(len(pairs[number][1]) for number in row)
    order = lambda row: (_ways(row), -cost(row))
    return [batch for rows in (rows, alone) for batch in _chunks(sorted(rows, key=order), subject.rows)]


def count(pairs: Sequence[Pair], batch: Batch) -> int:
    """Tokens that are read for a batch."""
    return sum(len(pairs[row[0]][0]) + sum(len(pairs[number][1]) for number in row) for row in batch)


def score(subject: Subject, pairs: Sequence[Pair], batch: Batch) -> Iterator[tuple[int, Likelihood]]:
    """How likely what follows is, with the number of each request."""
    texts, follows = [pairs[row[0]][0] for row in batch], [[pairs[number][1] for number in row] for row in batch]
    longest = [max(map(len, each)) for each in follows]
    ways = max(map(_ways, batch))
    room = [_room(subject, len(text), m) for text, m in zip(texts, longest, strict=True)]
    # Rows that are not branched may spill: memory has room for that.
    reader = subject.read(texts, room, spilling=max(longest) if ways == 1 else 0)
    found = subject.scores(texts, [follows[0] + [NOTHING] * (ways - len(follows[0])), *follows[1:]], reader=reader)
    for row, each in zip(batch, found, strict=True):
        yield from zip(row, each[: len(row)], strict=True)


@dataclasses.dataclass(frozen=True)
class How:
    """How an answer is made.

    Attributes:
        new_tokens: most tokens of it.
        stop: texts that end it.
        sampling: how a token is chosen.
        ends: tokens that end it, beside the model's eos.
    """

    new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    ends: tuple[int, ...] = ()


def answer(subject: Subject, texts: Sequence[Ids], how: How, seeds: Sequence[Sequence[int]] = ()) -> list[Ids]:
    """What goes on from each text, up to an eos; it may go on behind what stops it.

    Args:
        texts: at most `rows`.
        seeds: for each text numbers that, with its tokens, decide what is drawn; none where nothing is.
    """
    if not how.new_tokens:
        return [NOTHING] * len(texts)
    room = [_room(subject, len(text), how.new_tokens, answers=True) for text in texts]
    reader = subject.read(texts, room, how.new_tokens)
    key_B = None
    if how.sampling.temperature > 0:
        keys = [_key(text, numbers) for text, numbers in zip(texts, seeds, strict=True)]
        key_B = jnp.stack([*keys, *keys[:1] * (subject.rows - len(keys))])
    config = subject.config.replace(eos_id=tuple(dict.fromkeys((*subject.config.eos_ids, *how.ends))))
    ending, asked_B = dataclasses.replace(subject, config=config), np.arange(subject.rows) < len(texts)
    with subject.clock.model():
        found = ending.decode(reader, asked_B, how.new_tokens, how.stop, how.sampling, key_B)
    subject.clock.generated += sum(map(len, found))
    return found[: len(texts)]


def _room(subject: Subject, n: int, m: int, answers: bool = False) -> int:
    """What `Subject.read` is to leave in the window for m tokens, or fewer of an answer, that follow n."""
    W, c = subject.config.window, subject.config.last_context_length
    if n + m <= W or (m < W and not answers):
        return m
    return W - c if n > c else 0


def _key(text: Ids, numbers: Sequence[int]) -> jax.Array:
    key = jax.random.key(numbers[0])
    for number in (zlib.crc32(text.tobytes()), *numbers[1:]):
        key = jax.random.fold_in(key, number)
    return key


def _ways(row: list[int]) -> int:
    """Branches for a row; in powers of two, so that they share programs."""
    return memory.power_of_two(len(row))


def _chunks(things: Sequence, size: int) -> list:
    return [things[start : start + size] for start in range(0, len(things), size)]
