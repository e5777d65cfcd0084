"""What a run's figures show, as numbers: learning curves, feature gaps, update shares, the audit's curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redoubt.reporting.collect import Record
from redoubt.reporting.table import audit_place, threat
from redoubt.runs.files import read_rows

Points = list[tuple[float, float]]

#: Splits that accuracies are measured on while training; with ``data.val_fraction=0`` it is the probe.
SPLITS = ("val", "train_probe")
#: The two distances of AFD's Figure 1a, as metrics.csv and as people name them.
GAPS = {"linf": "linf distance", "cos": "1 - cosine"}


@dataclass(frozen=True)
class Panel:
    """One pair of axes with lines.

    Args:
        figure: ``curves``, ``gap``, ``eps`` or ``iterations``.
        title: Of the panel.
        x: Name of the x axis.
        y: Name of the y axis.
        series: Points (x, y) by the name of their line; accuracies in [0, 1].
        percent: y is an accuracy.
        log: x spans decades.
        mark: A value of x to draw a line at, as the threat model's eps.
    """

    figure: str
    title: str
    x: str
    y: str
    series: Mapping[str, Points] = field(default_factory=dict)
    percent: bool = False
    log: bool = False
    mark: float | None = None


def panels(record: Record) -> list[Panel]:
    """Every panel that the run has data for; the audit's are of its newest audit."""
    return [p for p in [*_learning(record), *_gaps(record), *_audit(record)] if any(p.series.values())]


def updates(record: Record) -> tuple[list[int], dict[str, list[float | None]]]:
    """CURE's updated share of each layer's entries.

    Returns:
        The epochs [E], and by layer its shares in [0, 1], [E].
    """
    prefix = "train/updated/"
    rows = [row for row in record.metrics if any(key.startswith(prefix) for key in row)]
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith(prefix)))
    return [int(row["epoch"]) for row in rows], {n.removeprefix(prefix): [row.get(n) for row in rows] for n in names}


def newest_audit(record: Record) -> tuple[Any, dict[str, Any]] | None:
    """Folder and report of the audit that was written last."""
    return max(record.audits, key=lambda a: (a[0] / "audit.json").stat().st_mtime, default=None)


def spans_decades(values: Sequence[float]) -> bool:
    """Whether positive values are better looked at on a logarithmic axis (20 times from least to most)."""
    positive = [v for v in values if v > 0]
    return len(positive) > 1 and min(values) >= 0 and min(positive) * 20 < max(positive)


def _learning(record: Record) -> list[Panel]:
    columns = list(dict.fromkeys(key for row in record.metrics for key in row))
    of_threat = threat(record.config.get("threat") or {"norm": None, "eps": None})
    found = []
    for split in SPLITS:
        names = {c: c.split("/", 1)[1] for c in columns if c.startswith(f"{split}/") and "/gap_" not in c}
        where = "training images (fixed subset)" if split == "train_probe" else "validation split"
        where += f"{of_threat}\nof the weights that the run is judged by"
        series = {name: _points(record, c) for c, name in names.items()}
        found.append(Panel("curves", f"Accuracy, {where}", "epoch", "accuracy", series, percent=True))
    skipped = ("train/updated/", "train/accuracy", "train/grad_norm")
    terms = [c for c in columns if c.startswith("train/") and not c.startswith(skipped)]
    series = {c.removeprefix("train/"): _points(record, c) for c in terms}
    return [*found, Panel("loss", "Training loss and its weighted terms", "epoch", "loss", series)]


def _gaps(record: Record) -> list[Panel]:
    found = []
    for measure, name in GAPS.items():
        nets = ("student", "teacher", "across")
        columns = {n: [f"{split}/gap_{n}_{measure}" for split in SPLITS] for n in nets}
        series = {n: [p for c in cs for p in _points(record, c)] for n, cs in columns.items()}
        series = {n: points for n, points in series.items() if points}
        found.append(Panel("gap", f"Feature gap, clean to adversarial: {name}", "epoch", name, series))
    return found


def _audit(record: Record) -> list[Panel]:
    newest = newest_audit(record)
    if newest is None:
        return []
    folder, report = newest
    marks = {"eps": (report.get("threat") or {}).get("eps"), "iterations": None}
    found = []
    for x, mark in marks.items():
        rows = read_rows(folder / f"accuracy_over_{x}.csv")
        points = [(float(row[x]), float(row["accuracy"])) for row in rows]
        log = spans_decades([p[0] for p in points])
        title = f"Accuracy over {x}{' (dashed: the threat model)' if mark else ''}\n{audit_place(report)}"
        found.append(Panel(x, title, x, "accuracy", {"accuracy": points}, percent=True, log=log, mark=mark))
    return found


def _points(record: Record, column: str) -> Points:
    return [(row["epoch"], row[column]) for row in record.metrics if column in row]
