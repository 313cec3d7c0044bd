"""What a compiled program does: collectives and matrix products, those in a loop as often as it runs.

XLA's own `cost_analysis()` counts the body of a loop once, and kernels as nothing.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+|f8\w+)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(calls|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_APPLIED = re.compile(r"\bto_apply=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.-]+)")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


class Array(NamedTuple):
    """Type and shape of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = 8 if self.dtype.startswith(("pred", "f8")) else int(re.sub(r"\D", "", self.dtype))
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
        name, op: as written.
        results: its arrays.
        operands: names of what it takes.
        text: what follows the operation's name.
    """

    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str


class Collective(NamedTuple):
    """Collectives of a kind: how many a device runs, and the bytes of what they take or give, whichever is more."""

    count: int
    nbytes: int


class Program:
    """A compiled module, from its text (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._roots: dict[str, Instruction] = {}
        self._entry = name = ""
        for line in text.splitlines():
            if line.endswith("{") and (found := re.match(r"(ENTRY )?%?([\w.-]+) \(", line)):
                name = found[2]
                self._computations[name] = {}
                self._entry = name if found[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                one = self._computations[name][found[2]] = _instruction(*found.groups()[1:])
                if found[1]:
                    self._roots[name] = one

    def collectives(self) -> dict[str, Collective]:
        """By kind, of those in `COLLECTIVES` that there are."""
        found: dict[Any, tuple[str, int, int]] = {}
        for number, (one, inside, times, within) in enumerate(self._executed()):
            kind = one.op.removesuffix("-start")
            if kind in COLLECTIVES:
                operands = sum(x.nbytes for name in one.operands if name in inside for x in inside[name].results)
                # A start's results hold its operands too, and numbers that it is known by.
                results = sum(x.nbytes for x in one.results if x.shape or one.op == kind)
                results -= operands if one.op != kind else 0
                # A TPU's program cuts a collective into pieces, fused with what is computed meanwhile: of one channel.
                channel = re.search(r"channel_id=\d+", one.text) if within else None
                pairs = re.search(r"source_target_pairs=\S+", one.text)
                key = (kind, channel[0], pairs and pairs[0]) if channel else number
                before = found.get(key, (kind, 0, 0))
                if kind == "all-reduce" and within and within.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # as a TPU's program has them: a sum of which each chip takes its part
                found[key] = kind, max(times, before[1]), max(operands, results, before[2])
        totals = {kind: [(n, size) for other, n, size in found.values() if other == kind] for kind in COLLECTIVES}
        return {
            kind: Collective(sum(n for n, _ in each), sum(n * size for n, size in each))
            for kind, each in totals.items()
            if each
        }

    def matmul_flops(self) -> float:
        """FLOPs of matrix products on a device: 2 x result x contracted dimensions."""
        total = 0.0
        for one, inside, times, _ in self._executed():
            if one.op == "dot":
                left = inside[one.operands[0]].results[0].shape
                contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", one.text)
                sizes = [left[int(axis)] for axis in contracted[1].split(",") if axis] if contracted else []
                total += times * 2.0 * math.prod(one.results[0].shape) * math.prod(sizes)
        return total

    def _executed(
        self, name: str | None = None, times: int = 1, within: str | None = None
    ) -> Iterator[tuple[Instruction, dict[str, Instruction], int, str | None]]:
        """Every instruction, its computation, how often it runs, and the name of the fusion that it is part of."""
        inside = self._computations[name or self._entry]
        for one in inside.values():
            yield one, inside, times, within
            trips = self._trips(one, inside) if one.op == "while" else 1
            called = [computation for _, computation in _CALLED.findall(one.text)]
            if found := _BRANCHES.search(one.text):
                called += _OPERAND.findall(found[1])
            if one.op == "call":  # what others apply is for single numbers
                called += _APPLIED.findall(one.text)
            for computation in called:
                yield from self._executed(computation, times * trips, computation if one.op == "fusion" else within)

    def _trips(self, loop: Instruction, outside: dict[str, Instruction]) -> int:
        """How often a loop runs: from the number that its counter is compared with, where it starts and what is added
        to it; from 0 by 1 where these are not written, and once where the first is not.
        """
        if found := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(found[1])
        names = dict(_CALLED.findall(loop.text))
        condition, body = (self._computations[names[part]] for part in ("condition", "body"))
        limits = [number for one in condition.values() if (number := _constant(one)) is not None]
        if len(limits) != 1:
            return 1
        start, step = 0, 1
        counters = [condition.get(name) for name in self._roots[names["condition"]].operands]
        index = [int(found[1]) for one in counters if one and (found := re.search(r"\bindex=(\d+)", one.text))]
        before = outside.get(loop.operands[0]) if loop.operands else None
        if len(index) == 1 and before is not None and before.op == "tuple":
            first = outside.get(before.operands[index[0]])
            start = (_constant(first) if first else None) or 0
            after = body.get(self._roots[names["body"]].operands[index[0]])
            if after is not None and after.op == "add":
                steps = [_constant(body[name]) for name in after.operands if name in body]
                step = next((number for number in steps if number), 1)
        return max(0, -((start - limits[0]) // step))


def _constant(one: Instruction) -> int | None:
    """The whole number that an instruction writes."""
    found = re.match(r"(\d+)\)", one.text) if one.op == "constant" else None
    return int(found[1]) if found else None


def _instruction(name: str, results: str, op: str, text: str) -> Instruction:
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in _ARRAY.findall(results)
    )
    return Instruction(name, op, arrays, tuple(_OPERAND.findall(text.split("), ")[0])), text)
