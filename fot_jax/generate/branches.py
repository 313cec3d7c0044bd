"""Many continuations of what has been read once: questions about one text, answers to one question.

`prefill` reads the text, `branched` gives each of its rows several futures, and `extend`, `decode` and `score` go on
from there. The open window is copied for each branch; memory, which holds the text before it, is read by all of them
where it lies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import losses
from fot_jax import memory as memories
from fot_jax.config import ModelConfig
from fot_jax.generate import Reader, _check_next, _extend_rows, _flush_left

Array = jax.Array


def branched(reader: Reader, ways: int) -> Reader:
    """A reader of `ways` rows for each row of another, which follow one another and share its memory: the other, and
    more branches of it, can be gone on with after these, as what reads a branch leaves that memory as it is.

    Nothing that is read later enters it: branches have room for what is left of the open window, and going on beyond
    it raises.

    Raises:
        ValueError: less than one way; a reader that is branched.
    """
    if ways < 1 or reader.shared:
        raise ValueError(f"{ways} branches of {len(reader.length_B)} rows; wanted at least 1, of rows not branched yet")
    branches = _repeated(dataclasses.replace(reader, mem=None), ways)
    return dataclasses.replace(branches, mem=reader.mem, shared=True)


@functools.partial(jax.jit, static_argnames=("ways",))
def _repeated(reader: Reader, ways: int) -> Reader:
    return memories.constrain(jax.tree.map(lambda x: jnp.repeat(x, ways, axis=0), reader))


@dataclasses.dataclass(frozen=True)
class Scores:
    """How likely tokens were.

    Attributes:
        log_p_BT: float32, log-probability of each token given all before it; 0 at padding.
        likeliest_BT: bool, whether no token was likelier; True at padding.
    """

    log_p_BT: np.ndarray
    likeliest_BT: np.ndarray


def score(
    config: ModelConfig,
    params: Any,
    reader: Reader,
    tokens_BT: Any,
    attention_mask: Any = None,
    spill: str = "block",
    memory: str = "dense",
    k: int | None = None,
    score_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Scores, Reader]:
    """Reads tokens after what has been read, as `extend` does, and says how likely each of them was.

    Args:
        reader: one that has read something; donated.
        tokens_BT, attention_mask, spill, memory, k, score_bytes, progress: as for `extend`.

    Returns:
        Scores of the tokens, where they are; the reader after them.

    Raises:
        ValueError: as `extend`; a row that has read nothing, whose first token nothing predicts.
    """
    reading = memories.Reading(memory, k, score_bytes)
    tokens_BT, mask_BT = _check_next(config, reader, tokens_BT, attention_mask, spill)
    count_B, read_B = mask_BT.sum(1), np.asarray(reader.length_B)
    if (nothing_B := (count_B > 0) & (read_B == 0)).any():
        raise ValueError(f"row {int(np.argmax(nothing_B))} has read nothing; wanted a token before those to be scored")
    given = _flush_left(tokens_BT, mask_BT), np.zeros_like(count_B), count_B
    reader, found = _extend_rows(config, params, reader, *given, spill, reading, progress, look=_likelihoods)
    log_p_BT, likeliest_BT = np.zeros(mask_BT.shape, np.float32), np.ones(mask_BT.shape, bool)
    column_BT = np.argsort(~mask_BT, axis=1, kind="stable")  # of each row's n-th token
    for start_B, now_B, scores in found:
        log_p, likeliest = map(np.asarray, scores)
        for b, (start, now) in enumerate(zip(start_B, now_B, strict=True)):
            columns = column_BT[b, start : start + now]
            log_p_BT[b, columns], likeliest_BT[b, columns] = log_p[b, :now], likeliest[b, :now]
    return Scores(log_p_BT, likeliest_BT), reader


def _likelihoods(config, params, logits_BV: Array, hidden_BTD: Array, tokens_BT: Array) -> tuple[Array, Array]:
    """Log-probability of each token, and whether it was the likeliest."""
    # Token t + 1 is predicted at token t, the first by what was read before.
    first = losses.cross_entropy(logits_BV[:, None], tokens_BT[:, :1])
    rest = losses.token_losses(config, params, hidden_BTD[:, :-1], tokens_BT[:, 1:]) if tokens_BT.shape[1] > 1 else ()
    loss_BT, likeliest_BT = (jnp.concatenate(parts, axis=1) for parts in (zip(first, rest) if rest else zip(first)))
    return -loss_BT, likeliest_BT
