"""Text of tokens as they come: no half characters, nothing that a stop string may begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

CONTEXT = 8  # tokens decoded together with new ones, for tokenizers whose text depends on what is before
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class TextStream:
    """Text of one row's new tokens, piece by piece.

    Attributes:
        text: what was given out so far.
        stopped: whether a stop string came; nothing of it or after it is given out.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int] | np.ndarray, stop: Sequence[str] = ()):
        """
        Args:
            prompt_ids: what new tokens follow; not given out.
            stop: strings that end the text, none of them empty.
        """
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = self._known(prompt_ids[-CONTEXT:])
        text = tokenizer.decode(self._ids)
        self._done = len(text) - _incomplete(text)  # characters of the tokens' text that are decoded for good
        self._held = ""  # decoded, but may be the beginning of a stop string

    def push(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that is certain once these tokens have come, without what was given out before."""
        if self.stopped:
            return ""
        self._ids += self._known(ids)
        text = self._tokenizer.decode(self._ids)
        end = len(text) - _incomplete(text)
        fresh, self._done = text[self._done : end], max(end, self._done)
        if end == len(text) and len(self._ids) > 4 * CONTEXT:
            self._ids = self._ids[-CONTEXT:]
            self._done = len(self._tokenizer.decode(self._ids))
        return self._give(fresh, last=False)

    def finish(self) -> str:
        """What is left when no more tokens come: half characters as U+FFFD, and the beginning of a stop string."""
        if self.stopped:
            return ""
        fresh, self._done = self._tokenizer.decode(self._ids)[self._done :], 0
        self._ids = []
        return self._give(fresh, last=True)

    def _known(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        # A model's vocabulary may be padded beyond the tokenizer's.
        return [int(i) for i in ids if i < self._tokenizer.vocab_size]

    def _give(self, fresh: str, last: bool) -> str:
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            out = text[: min(found)]
        else:
            keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
            out, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += out
        return out


def _incomplete(text: str) -> int:
    """How many characters at the end may be one whose last bytes, in UTF-8, have not come: at most 3 of 4."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), 3)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
