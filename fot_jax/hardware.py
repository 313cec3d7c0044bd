"""Chips that runs are planned and compiled for: `2*v5e:4x8` is two slices of 4 x 8 chips, `h100:8` a node of eight."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """Data of one chip, by its maker's data sheet.

    Attributes:
        flops: bfloat16 FLOP/s, dense.
        nbytes: of its memory.
        tpu: whether it is a TPU.
        megacore: whether a program runs on the two cores of a chip as one.
    """

    flops: float
    nbytes: int
    tpu: bool
    megacore: bool = False


CHIPS = {
    "v4": Chip(275e12, 32 * 10**9, True, megacore=True),
    "v5e": Chip(197e12, 16 * 10**9, True),
    "v5p": Chip(459e12, 95 * 10**9, True, megacore=True),
    "v6e": Chip(918e12, 32 * 10**9, True),
    "a100": Chip(312e12, 80 * 10**9, False),
    "h100": Chip(989e12, 80 * 10**9, False),
    "h200": Chip(989e12, 141 * 10**9, False),
}


class Hardware(NamedTuple):
    """Chips that work together.

    Attributes:
        name: of the chip, in `CHIPS`.
        shape: chips along each axis of a slice.
        slices: how many slices there are, joined by a slower network than the chips of one.
    """

    name: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return self.slices * math.prod(self.shape)

    @property
    def topology(self) -> str:
        """Of a slice, as `jax.experimental.topologies` calls it."""
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.topology if self.slices == 1 else f"{self.slices}*{self.topology}"


def hardware(text: str) -> Hardware:
    """What a text like `v5e:16x16`, `2*v5e:4x8` or `h100:8` names.

    Raises:
        ValueError: another form, or an unknown chip.
    """
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f"hardware is {text!r}; wanted CHIP:SHAPE like v5e:16x16, 2*v5e:4x8 for two slices, or h100:8, of "
            f"{', '.join(CHIPS)}"
        )
    shape, slices = tuple(map(int, found[3].split("x"))), int(found[1] or 1)
    if min(*shape, slices) < 1:
        raise ValueError(f"hardware is {text!r}; wanted at least 1 everywhere")
    return Hardware(found[2], shape, slices)
