"""Evaluations behind one small contract.

An evaluation is a module with `default_options() -> ConfigDict`, `check(config, options)`, which refuses options before
any long work, and `run(config, params, options, documents, progress) -> Report`. `eval.py` finds it by name in
`EVALUATIONS`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

EVALUATIONS = {"perplexity": "fot_jax.evals.perplexity"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        title: one line.
        columns, rows: the table; numbers are shown with four significant digits or more.
        values: the same and more, for programs; JSON.
        plot: draws the figure to a path.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    values: dict[str, Any]
    plot: Callable[[pathlib.Path], None]

    def table(self) -> str:
        """The table as text, columns flush right."""
        cells = [self.columns, *(tuple(_show(x) for x in row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:]])

    def write(self, folder: str | os.PathLike, name: str) -> None:
        """Writes `name`.json and `name`.png into a folder, each beside its place and then renamed."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.json.partial"
        partial.write_text(json.dumps(_finite(self.values), indent=1, allow_nan=False) + "\n")
        partial.replace(folder / f"{name}.json")
        picture = folder / f".{name}.partial.png"
        self.plot(picture)
        picture.replace(folder / f"{name}.png")


def _finite(x: Any) -> Any:
    """`x` with null for what JSON has no number for."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _show(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:,.3f}"
    return f"{x:,}" if isinstance(x, int) else str(x)
