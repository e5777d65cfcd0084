"""Figures as PNG, each with its numbers as CSV beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from redoubt.reporting.series import spans_decades
from redoubt.runs.files import atomic, write_text


def curve(
    folder: Path, name: str, columns: Mapping[str, Sequence[float]], *, title: str, mark: float | None = None
) -> None:
    """``<name>.csv`` and ``<name>.png`` of one curve.

    Args:
        folder: Where to.
        name: Of the two files.
        columns: Two columns, x and accuracy (in [0, 1]), by name.
        title: Of the figure.
        mark: A value of x to draw a line at, as the eps of the threat model.
    """
    (x_name, x), (y_name, y) = columns.items()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(x, y, strict=True))
    write_text(folder / f"{name}.csv", text.getvalue())

    from redoubt.reporting.drawings import blank  # matplotlib, which takes half a second

    figure, [axes] = blank(1, 1, width=5, height=3.4)
    axes.plot(x, [100 * v for v in y], marker="o", markersize=4, linewidth=1.6, color="#1f5fa8")
    if mark:
        axes.axvline(mark, color="#b0413e", linewidth=1, linestyle="--", label=f"threat model ({mark:.4g})")
        axes.legend(frameon=False)
    if spans_decades(x):
        smallest = min(v for v in x if v > 0)
        axes.set_xscale("symlog", linthresh=smallest)
        axes.set_xlim(left=0 if min(x) == 0 else smallest)
    axes.set(xlabel=x_name, ylabel=f"{y_name} in %", title=title, ylim=(-2, 102))
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    with atomic(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=150)
