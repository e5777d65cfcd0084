"""Figures for papers on matplotlib's object interface: no display, no global state."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from redoubt.reporting.pictures import Pictures
from redoubt.reporting.series import Panel

#: Okabe and Ito's colours without yellow; then other dashes.
COLOURS = ("#0072b2", "#d55e00", "#00795a", "#b1508a", "#a06c00", "#4b4bb5", "#555c66")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "p")
#: Mean and standard deviation of an accuracy in [0, 1].
Spread = tuple[float, float | None]


def blank(rows: int, columns: int, *, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row; width and height of each in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def lines(panels: Sequence[Panel]) -> Figure:
    """The panels side by side, with the last one's lines as the legend of all."""
    figure, all_axes = blank(1, len(panels))
    for panel, axes in zip(panels, all_axes, strict=True):
        factor = 100 if panel.percent else 1
        for i, (name, points) in enumerate(panel.series.items()):
            x, y = [p[0] for p in points], [factor * p[1] for p in points]
            dots = "o" if len(points) <= 25 else None
            axes.plot(x, y, color=_colour(i), linestyle=_dash(i), marker=dots, markersize=3, linewidth=1.4, label=name)
        if panel.mark is not None:
            axes.axvline(panel.mark, color="#a8321f", linewidth=1, linestyle="--")
        if panel.log:
            _decades(axes, [p[0] for points in panel.series.values() for p in points])
        axes.set(xlabel=panel.x, ylabel=f"{panel.y} in %" if panel.percent else panel.y)
        axes.set_title(panel.title, fontsize=9)
        axes.grid(alpha=0.3)
        if panel is panels[-1]:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    return figure


def scatter(points: Mapping[tuple[str, str, int], tuple[Spread, Spread]], *, x: str, y: str, title: str) -> Figure:
    """Natural and robust accuracy: colours are defenses, markers are bases, bars are standard deviations over seeds.

    Args:
        points: By (defense, base, number).
        x: Name of the natural accuracy; y: of the robust one.
        title: Of the figure.
    """
    figure, [axes] = blank(1, 1, width=4.8, height=3.6)
    defenses, bases = (sorted({key[i] for key in points}) for i in (0, 1))
    labelled: set[tuple[str, str]] = set()
    for (defense, base, _), ((a, da), (b, db)) in points.items():
        axes.errorbar(
            100 * a, 100 * b, xerr=100 * (da or 0) or None, yerr=100 * (db or 0) or None,
            color=_colour(defenses.index(defense)), marker=MARKERS[bases.index(base) % len(MARKERS)], linestyle="none",
            markersize=6, elinewidth=1, label=None if (defense, base) in labelled else f"{defense} + {base}",
        )  # fmt: skip
        labelled.add((defense, base))
    axes.set(xlabel=f"{x} in %", ylabel=f"{y} in %")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def curve(x: Sequence[float], y: Sequence[Spread], *, key: str, metric: str, title: str, log: bool) -> Figure:
    """An accuracy over one hyper-parameter, with standard deviations over seeds."""
    figure, [axes] = blank(1, 1)
    deviations = [100 * (sd or 0) for _, sd in y]
    axes.errorbar(x, [100 * m for m, _ in y], yerr=deviations, color=COLOURS[0], marker="o", markersize=4, capsize=2)
    if log:
        _decades(axes, x)
    axes.set(xlabel=key, ylabel=f"{metric} in %")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def grid(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, x: str, y: str, title: str, limits: Any = None
) -> Figure:
    """A heat map of shares in [0, 1], shown in %; NaN stays white.

    Args:
        values: [R, C]; the first row is at the top.
        rows: Names of the rows, [R].
        columns: Names of the columns, [C].
        x: What the columns are; y: what the rows are.
        title: Of the figure.
        limits: Of the colours, (low, high) in [0, 1]; those of the values by default.
    """
    figure, [axes] = blank(
        1, 1, width=max(4.2, 0.62 * min(len(columns), 12) + 1.5), height=max(2.4, 0.24 * len(rows) + 1)
    )
    low, high = limits or (float(np.nanmin(values)), float(np.nanmax(values)))
    norm = Normalize(100 * low, 100 * high)
    shown = axes.imshow(100 * values, cmap="cividis", norm=norm, aspect="auto", interpolation="nearest")
    figure.colorbar(shown, ax=axes, label="%")
    every = -(-len(columns) // 12)
    axes.set_xticks(range(0, len(columns), every), columns[::every])
    axes.set_yticks(range(len(rows)), rows, fontsize=8 if len(rows) <= 12 else 5)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=9)
    if len(rows) <= 12 and len(columns) <= 12:
        for (j, k), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if norm(100 * value) < 0.5 else "black"
                axes.text(k, j, f"{100 * value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    return figure


def examples(found: Pictures, attack: str, name: str) -> Figure:
    """Rows: clean images, the differences amplified to half of the range, adversarial images; true -> predicted."""
    clean, adversarial = found.clean.astype(float), found.adversarial[attack].astype(float)
    difference = adversarial - clean
    times = max(1, int(127 // max(1.0, np.abs(difference).max())))
    rows = {"clean": clean, f"difference x {times}": 128 + times * difference, name: adversarial}
    figure, all_axes = blank(3, len(clean), width=1.25, height=1.35)
    figure.suptitle(textwrap.fill(found.place, 16 * len(clean)), fontsize=7)
    for i, axes in enumerate(all_axes):
        row, k = divmod(i, len(clean))
        title, images = list(rows.items())[row]
        axes.imshow(images[k].transpose(1, 2, 0).clip(0, 255).astype(np.uint8), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        if k == 0:
            axes.set_ylabel(title, fontsize=7)
        if row != 1:
            said = found.predicted["clean" if row == 0 else attack][k]
            right = said == found.labels[k]
            axes.set_title(f"{found.labels[k]} → {said}", fontsize=6, color="black" if right else "#a8321f")
    return figure


def _decades(axes: Axes, x: Sequence[float]) -> None:
    least = min(v for v in x if v > 0)
    axes.set_xscale("symlog", linthresh=least)
    axes.set_xlim(left=0 if min(x) == 0 else least * 0.9)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _dash(i: int) -> str:
    return DASHES[i // len(COLOURS) % len(DASHES)]
