"""Figures of evaluations: curves in panels, and maps of two options."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Panel(NamedTuple):
    """Curves over one axis.

    Attributes:
        title, x, y: what is written at the panel and its axes.
        lines: label of each curve -> {what is written at a place of the x axis: height}; one label may be empty.
        errors: label -> {place: half the length of a bar, or how far it goes down and how far up}.
        limits: of the y axis.
        dashed: labels of curves that are drawn as a dashed line without marks, for comparison.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float | tuple[float, float]]] = {}
    limits: tuple[float, float] | None = None
    dashed: Sequence[str] = ()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def lines(path: pathlib.Path, panels: Sequence[Panel]) -> None:
    """Draws panels side by side."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        places = list(dict.fromkeys(place for curve in panel.lines.values() for place in curve))
        for label, curve in panel.lines.items():
            at, bars = [places.index(place) for place in curve], panel.errors.get(label)
            bars = np.transpose([bars[place] for place in curve]) if bars else None
            look = dict(linestyle="--", color="grey") if label in panel.dashed else dict(marker="o")
            axis.errorbar(at, list(curve.values()), bars, capsize=3, label=label or None, **look)
        axis.set_xticks(range(len(places)), places, rotation=30)
        axis.set_title(panel.title)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        axis.set_ylim(panel.limits)
        axis.grid(alpha=0.3)
        if any(panel.lines):
            axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def grid(
    path: pathlib.Path, title: str, x: str, y: str, columns: Sequence[str], rows: Sequence[str], shares: Any
) -> None:
    """Draws a map of shares between 0 and 1, [rows, columns], each written into its field; NaN is left empty."""
    plt = _pyplot()
    shares = np.asarray(shares, float)
    size = max(4.5, 1.6 + 0.9 * len(columns)), max(2.8, 1.6 + 0.45 * len(rows))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for i, j in np.argwhere(~np.isnan(shares)):
        axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center")
    axis.set_xticks(range(len(columns)), columns, rotation=30)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    figure.suptitle("\n".join(textwrap.fill(line, round(11 * size[0])) for line in title.split("\n")))
    figure.colorbar(picture, label="share that is right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
