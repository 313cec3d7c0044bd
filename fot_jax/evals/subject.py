"""The model that an evaluation asks: texts read once, and many questions about each answered or scored.

A text and its question are read as one prompt. Where both, and the answer, fit the window, all of it is in the open
window, and the model is the plain one. Where they do not, the last `last_context_length` tokens of the text open the
window, as many fewer as question and answer need, and the text before them is memory: read once for all questions, and
never copied. Where `room`, the tokens that question and answer may have, is stated, what is found does not depend on
what else is asked, nor on how many rows are read together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fot_jax import memory
from fot_jax.config import ModelConfig
from fot_jax.generate import Reader, decode, extend, memory_tokens, prefill
from fot_jax.generate.branches import branched, score
from fot_jax.generate.sampling import GREEDY, Sampling
from fot_jax.tokenizer import Tokenizer, encode_prompt

Ids = np.ndarray  # int32 [n]

WINDOW_BYTES = 2**31  # of open windows of branches that are gone on with at a time
BRANCH_TOKENS = 2**14  # that branches read at a time: what layers make of them is not small either
STOP_TOKENS = 32  # generated at a time where a text may end an answer


def reading_options() -> dict[str, Any]:
    """How texts are read, with defaults: an evaluation may leave out what it has no use for."""
    return dict(
        reading="dense",  # how memory is read: "dense", "topk" or "approximate"
        k=32,  # slots a query retrieves, but for "dense"
        memory_dtype="",  # what memory is stored in: float32, bfloat16, float16 or int8; "": the checkpoint's
        window=0,  # tokens of a window, at most the checkpoint's; 0: as many
        last_context_length=0,  # tokens of a text left in the open window, where it is longer; 0: the checkpoint's
        capacity=0,  # most tokens of a text, longer ones are refused; 0: any number
        rows=8,  # texts read side by side
    )


@dataclasses.dataclass(eq=False)
class Clock:
    """What was read and generated, and how long the model took for it.

    Attributes:
        read, generated: tokens, padding not counted.
        model_seconds: from asking the model to its answer, compilation included, and what is done for it on the host:
            inputs padded and moved, texts searched for what stops them.
        compile_seconds: of compiling, which is done once for inputs of a shape.
        progress: called with tokens that were read.
    """

    read: int = 0
    generated: int = 0
    model_seconds: float = 0.0
    compile_seconds: float = 0.0
    progress: Callable[[int], None] = lambda tokens: None

    @contextlib.contextmanager
    def model(self) -> Iterator[None]:
        """Counts the time inside as the model's."""
        begin = time.perf_counter()
        with _compiling(self):
            yield
        self.model_seconds += time.perf_counter() - begin

    def count(self, tokens: int) -> None:
        """Counts tokens as read."""
        self.read += tokens
        self.progress(tokens)

    def speed(self, seconds: float) -> dict[str, float]:
        """What was counted in so many seconds; rates and shares are of the time without compilation."""
        work = max(seconds - self.compile_seconds, 1e-9)
        return dict(
            tokens_read=self.read,
            tokens_generated=self.generated,
            seconds=seconds,
            compile_seconds=self.compile_seconds,
            tokens_per_second=(self.read + self.generated) / work,
            outside_model=max(seconds - self.model_seconds, 0.0) / work,
        )

    @staticmethod
    def described(speed: dict[str, float]) -> str:
        """`speed` in words."""
        return (
            f"{speed['tokens_read']:,} tokens read, {speed['tokens_generated']:,} generated in "
            f"{speed['seconds']:,.1f} s, "
            f"{speed['compile_seconds']:,.1f} of them compiling: {speed['tokens_per_second']:,.0f} tokens/s, "
            f"{100 * speed['outside_model']:.1f}% of the time outside the model"
        )


_CLOCKS: list[Clock] = []


@contextlib.contextmanager
def _compiling(clock: Clock) -> Iterator[None]:
    _listen()
    _CLOCKS.append(clock)
    try:
        yield
    finally:
        _CLOCKS.remove(clock)


@functools.cache
def _listen() -> None:
    """Has JAX tell the clocks that run how long it compiles."""

    def listener(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            for clock in _CLOCKS:
                clock.compile_seconds += seconds

    jax.monitoring.register_event_duration_secs_listener(listener)


def check_reading(config: ModelConfig, options: ConfigDict) -> ModelConfig:
    """The model as `reading_options` have it read, or an error.

    Raises:
        ValueError: an option out of range.
    """
    options = ConfigDict({**reading_options(), **options})
    if options.rows < 1 or options.capacity < 0:
        raise ValueError(f"rows is {options.rows} and capacity {options.capacity}; wanted at least 1 and 0")
    if not 0 <= options.window <= config.window:
        raise ValueError(f"window is {options.window}; wanted 1..{config.window}, the checkpoint's, or 0 for that")
    window = options.window or config.window
    if not 0 <= options.last_context_length <= window:
        raise ValueError(f"last_context_length is {options.last_context_length}; wanted 1..{window}, or 0")
    memory.Reading(options.reading, options.k if options.reading != "dense" else None)
    return config.replace(
        window=window,
        last_context_length=options.last_context_length or min(config.last_context_length, window),
        dtypes=dataclasses.replace(config.dtypes, memory=options.memory_dtype or config.mem_dtype),
    )


def described(options: Any) -> str:
    """How memory is read, in words: "dense", "top-k, k=16", "approximate top-k, k=16, int8"."""
    ways = {"dense": "dense", "topk": "top-k", "approximate": "approximate top-k"}
    way = ways[options["reading"]] + ("" if options["reading"] == "dense" else f", k={options['k']}")
    return f"{way}, {options['memory_dtype']}" if options.get("memory_dtype") else way


def check_length(config: ModelConfig, options: ConfigDict, tokens: int, what: str) -> None:
    """Refuses a text that the model cannot read.

    Raises:
        ValueError: longer than `capacity`, or than the window of a model without memory.
    """
    window = options.window or config.window
    if options.capacity and tokens > options.capacity:
        raise ValueError(f"{what} has {tokens:,} tokens; capacity is {options.capacity:,}")
    if tokens > window and not config.mem_layers:
        raise ValueError(
            f"{what} has {tokens:,} tokens; the model has no memory layers (mem_layers is empty) and a window of "
            f"{window:,}: wanted no more"
        )


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely a continuation was.

    Attributes:
        log_p: float32 [n], log-probability of each of its tokens, given all before.
        likeliest: bool [n], whether no token was likelier.
    """

    log_p: np.ndarray
    likeliest: np.ndarray

    @property
    def greedy(self) -> bool:
        """Whether each of its tokens was the likeliest."""
        return bool(self.likeliest.all())

    @property
    def sum(self) -> float:
        """Log-probability of the whole."""
        return float(self.log_p.sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be asked.

    Attributes:
        config: as `check_reading` gives it.
        params: on devices.
        tokenizer: None where texts are tokens.
        reading: how memory is read.
        rows: texts read together, at most; fewer are filled up, so that there is one program.
        clock: counts.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer | None
    reading: memory.Reading = memory.DENSE
    rows: int = 8
    clock: Clock = dataclasses.field(default_factory=Clock)

    @staticmethod
    def of(config: ModelConfig, params: Any, tokenizer: Tokenizer | None, options: ConfigDict) -> Subject:
        """The model as options have it read; see `check_reading`."""
        options = ConfigDict({**reading_options(), **options})
        reading = memory.Reading(options.reading, options.k if options.reading != "dense" else None)
        return Subject(check_reading(config, options), params, tokenizer, reading, options.rows)

    def encode(self, text: str) -> Ids:
        """Tokens of a text, after BOS where the model expects one."""
        return encode_prompt(self.tokenizer, text)

    def text(self, ids: Ids) -> str:
        """Text of tokens; those that the tokenizer does not have, of a model padded beyond it, give nothing."""
        return self.tokenizer.decode(ids[ids < self.tokenizer.vocab_size])

    def read(self, texts: Sequence[Ids], room: int | Sequence[int], spilling: int = 0) -> Reader:
        """At most `rows` texts read, each as long as it likes, with room in the open window for `room` tokens more.

        Args:
            room: one number for all texts, or each one's.
            spilling: tokens that may follow, beyond the window too: memory gets room for them.

        Raises:
            ValueError: more texts than rows; an empty one; room that the window does not have; of a model without
                memory layers, texts that do not fit the window with it.
        """
        W, lengths = self.config.window, [len(text) for text in texts]
        if not 1 <= len(texts) <= self.rows or not all(lengths):
            raise ValueError(f"{len(texts)} texts of {min(lengths, default=0)} tokens or more; wanted 1..{self.rows}")
        filled_up = self.rows - len(texts)
        room_B = np.array([*np.broadcast_to(room, len(texts)), *[0] * filled_up])
        if room_B.min() < 0 or room_B.max() >= W:
            raise ValueError(f"question and answer have {room_B.max()} tokens; wanted fewer than the window's {W}")
        lengths = np.array(lengths + [1] * filled_up)
        if not self.config.mem_layers and (lengths + room_B > W).any():
            n = int(np.argmax(lengths + room_B))
            raise ValueError(
                f"a text has {lengths[n]:,} tokens, question and answer {room_B[n]:,}; the model has no memory layers "
                f"(mem_layers is empty) and a window of {W:,}: wanted no more together"
            )
        last_B = np.where(lengths + room_B <= W, W, np.minimum(self.config.last_context_length, W - room_B))
        options = self._reading()
        if self.config.mem_layers:  # memory for what it will hold: branches add nothing to it
            options["memory_capacity"] = memory_tokens(self.config, self.rows, int(lengths.max()) + spilling)
        with self.clock.model():
            tokens, mask = _padded([*texts, *[np.zeros(1, np.int32)] * filled_up])
            reader = prefill(self.config, self.params, tokens, last_B, mask, progress=self.clock.count, **options)
            self.clock.count(-filled_up)  # what fills up was no token of a text
            return jax.block_until_ready(reader)

    def _reading(self) -> dict[str, Any]:
        return dict(memory=self.reading.kind, k=self.reading.k, score_bytes=self.reading.score_bytes)

    def scores(
        self,
        texts: Sequence[Ids],
        continuations: Sequence[Sequence[Ids]],
        room: int | None = None,
        reader: Reader | None = None,
    ) -> list[list[Likelihood]]:
        """How likely each continuation of each text is.

        Args:
            texts: at most `rows`.
            continuations: of each text any number, not all the same.
            room: most tokens of a continuation, here or where numbers are to be the same; that of these by default.
            reader: what `read` gave for the texts, which then are not read again.

        Raises:
            ValueError: see `read`.
        """
        longest = _longest(continuations, 0, room)
        reader = reader or self.read(texts, longest if room is None else room)
        out: list[list[Likelihood]] = [[] for _ in texts]
        for branches, tokens, mask, asked in self._branches(reader, continuations, longest):
            with self.clock.model():
                options = dict(self._reading(), progress=self.clock.count)
                found, _ = score(self.config, self.params, branches, tokens, mask, **options)
            for row, i in asked.items():
                out[i].append(Likelihood(found.log_p_BT[row][mask[row]], found.likeliest_BT[row][mask[row]]))
        return out

    def choices(
        self,
        texts: Sequence[Ids],
        questions: Sequence[Sequence[Ids]],
        tokens: Sequence[int],
        room: int | None = None,
        reader: Reader | None = None,
    ) -> list[list[np.ndarray]]:
        """Log-probabilities, float32 [n], of n tokens, each right after each question about each text.

        Args:
            texts: at most `rows`.
            questions: of each text any number, none of them empty.
            tokens: the same n for all questions.
            room, reader: as for `scores`.

        Raises:
            ValueError: see `read`.
        """
        longest = _longest(questions, 0, room)
        reader = reader or self.read(texts, longest + 1 if room is None else room)
        out: list[list[np.ndarray]] = [[] for _ in texts]
        for branches, ids, mask, asked in self._branches(reader, questions, longest):
            with self.clock.model():
                options = dict(self._reading(), progress=self.clock.count)
                branches = extend(self.config, self.params, branches, ids, mask, **options)
                log_p = np.asarray(_log_p(branches.logits_BV, jnp.asarray(tokens)))
            for row, i in asked.items():
                out[i].append(log_p[row])
        return out

    def answers(
        self,
        texts: Sequence[Ids],
        questions: Sequence[Sequence[Ids]],
        new_tokens: int,
        stop: Sequence[str] = (),
        room: int | None = None,
    ) -> list[list[Ids]]:
        """The likeliest answer to each question about each text, token by token, up to an eos.

        Args:
            texts: at most `rows`.
            questions: of each text any number; they may be empty where the text ends with one.
            new_tokens: most tokens of an answer.
            stop: texts that end an answer, which keeps them.
            room: most tokens of a question and `new_tokens` together, as for `scores`.

        Raises:
            ValueError: see `read`.
        """
        longest = _longest(questions, new_tokens, room)
        reader = self.read(texts, longest + new_tokens if room is None else room)
        out: list[list[Ids]] = [[] for _ in texts]
        for branches, tokens, mask, asked in self._branches(reader, questions, longest):
            with self.clock.model():
                if mask.any():
                    branches = extend(self.config, self.params, branches, tokens, mask, **self._reading())
                answers = self.decode(branches, np.isin(np.arange(len(tokens)), [*asked]), new_tokens, stop)
            self.clock.count(int(mask.sum()))
            self.clock.generated += sum(map(len, answers))
            for row, i in asked.items():
                out[i].append(answers[row])
        return out

    def _branches(
        self, reader: Reader, follows: Sequence[Sequence[Ids]], longest: int
    ) -> Iterator[tuple[Reader, np.ndarray, np.ndarray, dict[int, int]]]:
        """Branches of what was read, as many at a time as `WINDOW_BYTES` and `BRANCH_TOKENS` allow, with the tokens
        that follow in each, and their mask; and which of the rows were asked for, in order, each with its text. Others
        have no tokens.
        """
        most = max(map(len, follows), default=0)
        if most == 1:
            alone = [each[0] if each else NOTHING for each in follows]
            room_B = self.config.window - np.asarray(reader.local.length_B)[: len(alone)]
            if any(len(ids) > room for ids, room in zip(alone, room_B, strict=True)):
                # Of one question each, what is too long for the window spills into memory, which `read` was told of.
                asked = {i: i for i, each in enumerate(follows) if each}
                yield reader, *_padded([*alone, *[NOTHING] * (self.rows - len(alone))]), asked
                return
        # Keys lie there once more rotated, and both once more when they are appended to.
        held = WINDOW_BYTES // max(3 * reader.local.nbytes, 1), BRANCH_TOKENS // (self.rows * max(longest, 1))
        ways = max(1, min(most, *held))
        for first in range(0, most, ways):
            rows = [[*each[first : first + ways]] for each in follows]
            rows += [[] for _ in range(self.rows - len(rows))]
            tokens, mask = _padded([ids for row in rows for ids in [*row, *[NOTHING] * (ways - len(row))]], longest)
            with self.clock.model():
                branches = branched(reader, ways)
            yield branches, tokens, mask, {i * ways + j: i for i, row in enumerate(rows) for j in range(len(row))}

    def decode(
        self,
        reader: Reader,
        asked_B: np.ndarray,
        new_tokens: int,
        stop: Sequence[str],
        sampling: Sampling = GREEDY,
        key_B: jax.Array | None = None,
    ) -> list[Ids]:
        """Answers of the rows that were asked."""
        over = jnp.asarray(~asked_B) | reader.ended_B
        reader = dataclasses.replace(reader, ended_B=jax.device_put(over, reader.ended_B.sharding))
        found, ended = np.zeros((len(asked_B), 0), np.int32), ~asked_B
        size = min(new_tokens, STOP_TOKENS) if stop else new_tokens
        while found.shape[1] < new_tokens and not ended.all():
            now = min(size, new_tokens - found.shape[1])
            options = dict(max_new_tokens=now, reading=self.reading)
            tokens, reader = decode(self.config, self.params, reader, sampling, key_B, **options)
            found = np.concatenate([found, np.asarray(tokens)], axis=1)
            ended = ended | np.asarray(reader.ended_B)
            if stop and found.shape[1] < new_tokens:
                ended |= [any(text in self.text(row) for text in stop) for row in found]
                reader = dataclasses.replace(
                    reader, ended_B=jax.device_put(jnp.asarray(ended), reader.ended_B.sharding)
                )
        return [self._to_eos(row) if asked else NOTHING for row, asked in zip(found, asked_B, strict=True)]

    def _to_eos(self, ids: Ids) -> Ids:
        ends = np.flatnonzero(np.isin(ids, self.config.eos_ids))
        return ids[: ends[0]] if len(ends) else ids


NOTHING = np.zeros(0, np.int32)


def _longest(follows: Sequence[Sequence[Ids]], more: int, room: int | None) -> int:
    """Tokens of the longest question.

    Raises:
        ValueError: more, with those of an answer, than there is room for.
    """
    longest = max((len(ids) for each in follows for ids in each), default=0)
    if room is not None and longest + more > room:
        raise ValueError(f"a question and its answer have {longest + more} tokens; room is {room}")
    return longest


@jax.jit
def _log_p(logits_BV: jax.Array, tokens_N: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits_BV)[:, tokens_N]


def _padded(rows: Sequence[Ids], width: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B, T] flush right, T at least `width`, and which places hold a token."""
    width = max(width, 1, *map(len, rows))
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, ids in enumerate(rows):
        tokens[i, width - len(ids) :], mask[i, width - len(ids) :] = ids, True
    return tokens, mask
