"""Evaluations behind one small contract.

An evaluation is a module that `eval.py` finds by name in `EVALUATIONS`, with

    default_options() -> ConfigDict         every option with its default, `subject.reading_options` among them
    check(config, options)                  refuses options that cannot be, before any long work
    inputs(config, model, tokenizer, folder)
                                            what it reads from the disk: lists of arrays, strings and numbers; refuses
                                            what the model cannot be asked about it
    run(subject, options, inputs, journal)  -> Report
    NEEDS_TOKENIZER                         False where texts are tokens: `tokenizer` is None; left out, it is True

where `config` is the model's `ModelConfig` for `check`, and for `inputs` the evaluation's whole `ConfigDict` beside
`model`, which is the former. `run` asks the model through `subject.Subject`, which reads a text once for all questions
about it, and measures in parts of `journal.Journal`, so that an evaluation that is stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from fot_jax import files

_NAMES = ("dictionary", "distraction", "fewshot", "passkey", "perplexity", "retrieval", "ruler")
EVALUATIONS = {name: f"fot_jax.evals.{name}" for name in _NAMES}


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        title: what was measured, in a line or a few.
        columns, rows: the table; numbers are shown with four significant digits or more.
        values: the same and more, for programs; JSON.
        plot: draws the figure to a path.
        pages: other files, by the ending of their names, as in {"html": text}.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    values: dict[str, Any]
    plot: Callable[[pathlib.Path], None]
    pages: dict[str, str] = dataclasses.field(default_factory=dict)

    def table(self) -> str:
        """The table as text, columns flush right."""
        cells = [self.columns, *(tuple(_show(x) for x in row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, lines[0], "-" * len(lines[0]), *lines[1:]])

    def write(self, folder: str | os.PathLike, name: str) -> list[pathlib.Path]:
        """Writes `name`.json, `name`.png and the pages into a folder, each beside its place and then renamed; the paths
        of all.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"json": json.dumps(finite(self.values), indent=1, allow_nan=False) + "\n", **self.pages}
        for ending, text in texts.items():
            files.write(folder / f"{name}.{ending}", text.encode())
        picture = folder / f".{name}.partial.png"
        self.plot(picture)
        picture.replace(folder / f"{name}.png")
        return [folder / f"{name}.{ending}" for ending in (*texts, "png")]


def finite(x: Any) -> Any:
    """`x` with null for what JSON has no number for."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _show(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:,.3f}"
    return f"{x:,}" if isinstance(x, int) else str(x)
