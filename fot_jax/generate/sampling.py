"""How the next token is chosen from its scores: the filters of Hugging Face transformers, in their order."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Values(NamedTuple):
    """The numbers of a Sampling as a program takes them: another number is not another program."""

    temperature: Array
    top_k: Array
    top_p: Array
    repetition_penalty: Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: repetition penalty, temperature, top-k and top-p, in this order.

    Attributes:
        temperature: 0 takes the likeliest token (after the penalty); else one is drawn from softmax(scores /
            temperature).
        top_k: how many of the likeliest tokens can be drawn; 0: all.
        top_p: the likeliest tokens can be drawn until their probabilities add up to it (arXiv 1904.09751); 1: all.
        repetition_penalty: what positive scores of tokens seen, in the prompt too, are divided by and negative ones
            multiplied with (arXiv 1909.05858); 1: nothing.

    Raises:
        ValueError: a number out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, inside, wanted in (
            ("temperature", lambda x: x >= 0, "a number of at least 0"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0, at most 1"),
            ("repetition_penalty", lambda x: x > 0, "a number above 0"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
            # As a program has it: what is above 0 here may be 0 in float32.
            rounds_to_0 = number and value != 0 and abs(value) < np.finfo(np.float32).tiny
            if not number or not math.isfinite(np.float32(value)) or not inside(value) or rounds_to_0:
                raise ValueError(f"{name} is {value}; wanted {wanted}")
        if not isinstance(self.top_k, (int, np.integer)) or not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k is {self.top_k}; wanted a whole number of at least 0 (0: no limit)")

    @property
    def steps(self) -> tuple[str, ...]:
        """What is done to scores; with each combination a program of its own."""
        draws = self.temperature > 0
        used = {
            "penalise": self.repetition_penalty != 1,
            "draw": draws,
            "top_k": draws and self.top_k > 0,
            "top_p": draws and self.top_p < 1,
        }
        return tuple(name for name, is_used in used.items() if is_used)

    @property
    def values(self) -> Values:
        """The numbers, float32 and int32."""
        numbers = (np.float32(getattr(self, name)) for name in ("temperature", "top_p", "repetition_penalty"))
        temperature, top_p, penalty = numbers
        return Values(temperature, np.int32(self.top_k), top_p, penalty)


GREEDY = Sampling()


def penalise(scores_BV: Array, seen_BV: Array, penalty: Array) -> Array:
    """Scores with those of tokens seen made less by a factor: positive ones divided by it, negative ones multiplied."""
    return jnp.where(seen_BV, jnp.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty), scores_BV)


def filtered(scores_BV: Array, values: Values, steps: tuple[str, ...]) -> Array:
    """Scores over temperature, 0 for the greatest, -inf where top-k or top-p leave a token out. Tokens that tie with
    the last one kept are kept.
    """
    # Below the greatest score, or a temperature near 0 would make it infinite.
    scores_BV = (scores_BV - jnp.max(scores_BV, axis=-1, keepdims=True)) / values.temperature
    if "top_k" not in steps and "top_p" not in steps:
        return scores_BV
    sorted_BV = -jnp.sort(-scores_BV, axis=-1)
    kept_B = jnp.full(scores_BV.shape[:1], scores_BV.shape[1])
    if "top_k" in steps:
        kept_B = jnp.minimum(kept_B, values.top_k)
        last_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
        sorted_BV = jnp.where(sorted_BV >= last_B1, sorted_BV, -jnp.inf)
        kept_B = jnp.sum(sorted_BV > -jnp.inf, axis=-1)
    if "top_p" in steps:
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        likelier_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        kept_B = jnp.clip(jnp.sum(likelier_BV < values.top_p, axis=-1), 1, kept_B)
    last_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
    return jnp.where(scores_BV >= last_B1, scores_BV, -jnp.inf)


def choose(scores_BV: Array, seen_BV: Array, key_B: Array, values: Values, steps: tuple[str, ...]) -> Array:
    """The next token of each row, int32 [B].

    Args:
        scores_BV: float32 logits.
        seen_BV: bool, tokens that the repetition penalty is for.
        key_B: random keys; a row's draw depends on its own only.
        values, steps: of a Sampling.
    """
    if "penalise" in steps:
        scores_BV = penalise(scores_BV, seen_BV, values.repetition_penalty)
    if "draw" not in steps:
        return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(key_B, filtered(scores_BV, values, steps)).astype(jnp.int32)


def row_keys(key: Array | None, rows: int) -> Array:
    """A random key for each row: row b's is fold_in(key, b), so that it does not depend on how many rows there are.

    Raises:
        ValueError: as many keys as there are not rows.
    """
    if key is None:
        return jax.random.split(jax.random.key(0), rows)
    key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key has shape {key.shape}; wanted one key, or one for each of {rows} rows")
    return key
