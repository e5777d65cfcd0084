"""``redoubt report plot``: the figures of a paper as PNG and PDF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from redoubt.errors import UserError, did_you_mean
from redoubt.evaluation.results import ordered, robust
from redoubt.reporting import groups
from redoubt.reporting.collect import Record, records
from redoubt.reporting.pictures import pictures
from redoubt.reporting.series import Panel, panels, spans_decades, updates
from redoubt.reporting.table import title
from redoubt.runs.files import atomic
from redoubt.runs.store import Store

if TYPE_CHECKING:  # matplotlib takes half a second; a mistaken key should not wait for it
    from matplotlib.figure import Figure

Named = Iterator[tuple[str, "Figure"]]


@dataclass(frozen=True)
class Column:
    """The accuracies of a figure: one metric under one protocol, and what these are in words."""

    protocol: groups.Protocol
    metric: str
    label: str

    def spread(self, runs: Sequence[Record], metric: str | None = None) -> tuple[float, float | None] | None:
        """Mean and standard deviation over those of the runs that have the metric."""
        name = metric or self.metric
        found = [e.accuracy(name) for e in (groups.chosen(r, self.protocol, name) for r in runs) if e is not None]
        values = [v for v in found if v is not None]
        return groups.mean_sd(values) if values else None


@dataclass(frozen=True)
class Choice:
    """What figures are made of.

    Args:
        records: The runs.
        metric: The robust accuracy; None: the one that stands for robustness under a figure's protocol.
        protocols: Those whose accuracies may be taken.
    """

    records: list[Record]
    metric: str | None
    protocols: set[groups.Protocol]

    def column(self, *points: Sequence[Record]) -> Column | None:
        """Of the points of a figure, each some runs: under the protocol that most runs have. None where none has one.

        The metric is one that every point has, or, where there is none, that most of them have.
        """
        runs = [record for point in points for record in point]
        labels = groups.protocols(runs)
        protocol = next((p for p in labels if p in self.protocols), None)
        if protocol is None:
            return None
        counts = Counter(m for point in points for m in set(_metrics(point, {protocol})))
        metric = self.metric or robust(m for m in counts if m != "natural" and counts[m] == _most(counts))
        return Column(protocol, metric, labels[protocol]) if metric is not None and metric in counts else None


def _most(counts: Counter[str]) -> int:
    """How many points have the attack that most of them have."""
    return max((n for metric, n in counts.items() if metric != "natural"), default=0)


def _metrics(runs: Sequence[Record], under: set[groups.Protocol]) -> list[str]:
    evaluations = (e for r in runs for e in r.evaluations if groups.protocol(e) in under)
    return ordered(m for e in evaluations for m in e.results["metrics"])


def plot(
    *,
    outputs: str = "outputs",
    figure: str | None = None,
    to: str | None = None,
    runs: str | list[str] | None = None,
    metric: str | None = None,
    suite: str | None = None,
) -> None:
    """Writes figures, each as PNG and as PDF with embedded TrueType fonts.

    Args:
        outputs: The folder that holds ``runs/``.
        figure: ``scatter``, ``curves``, ``sweep``, ``eps``, ``iterations``, ``gap`` (AFD), ``updates`` (CURE),
            ``examples``; or ``all`` that there is data for. By default those that compare runs; the last three, of
            which every run has its own, where ``runs`` names some.
        to: The folder to write to (default: ``<outputs>/figures``).
        runs: A run or ``[several]``, by name, hash or an unambiguous part; all by default.
        metric: The accuracy of scatter and sweep, as ``pgd20`` (default: of what all points have, ensemble, autoattack
            or pgd20).
        suite: The attack suite whose accuracies these are (default: the one of most runs).

    Raises:
        UserError: No such figure, run, metric or suite, or nothing to draw.
    """
    if figure not in (None, "all", *FIGURES):
        raise UserError(f"figure={figure}: no such figure{did_you_mean(str(figure), ['all', *FIGURES])}")
    choice = _choice(records(outputs), _names(runs, outputs), metric, suite)
    folder = Path(to or Path(outputs) / "figures")
    written = 0
    whole = figure == "all" or (figure is None and runs is not None)
    for name in FIGURES if whole else COMPARING if figure is None else [str(figure)]:
        for stem, drawn in FIGURES[name](choice):
            _save(drawn, folder / re.sub(r"[^\w.+-]+", "_", stem))
            written += 1
    if not written:
        which, hint = (f"figure={figure}: ", "") if figure else ("", ", or take figure=all")
        raise UserError(f"{which}no run has data for it in {outputs}; evaluate, audit or train some{hint}")
    print(f"{written} {'figure' if written == 1 else 'figures'} as PNG and PDF in {folder}")
    if figure is None and not whole:
        print("of each run by itself (gap, updates, examples): figure=all, or runs=NAME")


def _names(runs: str | list[str] | None, outputs: str) -> set[str] | None:
    if runs is None:
        return None
    return {Store(outputs).find(str(text)).name for text in (runs if isinstance(runs, list) else [runs])}


def _choice(found: list[Record], names: set[str] | None, metric: str | None, suite: str | None) -> Choice:
    chosen = [r for r in found if names is None or r.name in names]
    protocols = groups.protocols(chosen)
    taken = {p for p, label in protocols.items() if suite in (None, p.suite, label)}
    if suite is not None and not taken:
        suites = {name for p, label in protocols.items() for name in (p.suite, label)}
        raise UserError(f"suite={suite}: no run was evaluated by it{did_you_mean(suite, suites)}")
    metrics = _metrics(chosen, taken)
    if metric is not None and metric not in metrics:
        raise UserError(f"metric={metric}: no evaluation has it{did_you_mean(metric, metrics)}")
    return Choice(chosen, metric, taken)


def _save(figure: Figure, stem: Path) -> None:
    import matplotlib

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what it has laid out is laid out for both files
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # journals refuse Type 3 fonts
        for ending in ("png", "pdf"):
            path = stem.with_name(f"{stem.name}.{ending}")
            with atomic(path) as temporary:
                figure.savefig(temporary, dpi=200, metadata={"CreationDate": None} if ending == "pdf" else None)
            print(path)


def _scatter(choice: Choice) -> Named:
    from redoubt.reporting import drawings

    for cell, of_cell in _cells(choice).items():
        column = choice.column(*([record] for record in of_cell))
        points = {}
        for i, runs in enumerate(groups.by_seed(of_cell) if column else ()):
            natural, robust = column.spread(runs, "natural"), column.spread(runs)  # type: ignore[union-attr]
            if natural and robust:
                points[runs[0].axes["defense"], runs[0].axes["base"], i] = (natural, robust)
        if points and column:
            names = {"x": title("natural"), "y": title(column.metric)}
            yield f"scatter-{cell}", drawings.scatter(points, **names, title=f"{cell}\n{column.label}")


def _cells(choice: Choice) -> dict[str, list[Record]]:
    """The runs by model and data set: only within one are accuracies compared."""
    cells: dict[str, list[Record]] = {}
    for record in choice.records:
        cells.setdefault(f"{record.axes['model']}-{record.axes['data']}", []).append(record)
    return cells


def _compared(name: str) -> Callable[[Choice], Named]:
    """A figure for each model and data set, with one line per run; one panel per line that a run has."""

    def figures(choice: Choice) -> Named:
        from redoubt.reporting import drawings

        for cell, runs in _cells(choice).items():
            found = _pivoted({r.name: [p for p in panels(r) if p.figure == name] for r in runs}, groups.labels(runs))
            if found:
                yield f"{name}-{cell}", drawings.lines(found)

    return figures


def _pivoted(of_runs: dict[str, list[Panel]], labels: dict[str, str]) -> list[Panel]:
    found: dict[tuple[str, str], Panel] = {}
    for run, own in of_runs.items():
        for panel in own:
            for line, points in panel.series.items():
                several = len(panel.series) > 1
                key = (panel.title, line)
                text = f"{panel.title}: {line}" if several else panel.title
                there = found.setdefault(key, replace(panel, title=text, series={}))
                found[key] = replace(there, series={**there.series, labels[run]: points}, log=there.log or panel.log)
    return [p for p in found.values() if p.series]


def _gap(choice: Choice) -> Named:
    from redoubt.reporting import drawings

    for record in choice.records:
        own = [p for p in panels(record) if p.figure == "gap"]
        if own:
            yield f"gap-{record.name}", drawings.lines(own)


def _updates(choice: Choice) -> Named:
    from redoubt.reporting import drawings

    for record in choice.records:
        epochs, layers = updates(record)
        if epochs:
            values = np.array([[np.nan if v is None else v for v in row] for row in layers.values()], dtype=float)
            texts = {"x": "epoch", "y": "layer", "title": "Share of entries updated"}
            columns = [str(e) for e in epochs]
            yield f"updates-{record.name}", drawings.grid(values, list(layers), columns, **texts, limits=(0, 1))


def _sweep(choice: Choice) -> Named:
    from redoubt.reporting import drawings

    for number, sweep in enumerate(groups.sweeps(choice.records)):
        column = choice.column(*sweep.points.values())
        if column is None:
            continue
        spreads = {at: column.spread(runs) for at, runs in sorted(sweep.points.items())}
        there = {at: s for at, s in spreads.items() if s is not None}
        heading = f"{sweep.title}\n{column.label}"
        keys = [key.split(" = ")[0] for key in sweep.keys]
        stem = "-".join(["sweep", *keys, *sweep.at, str(number)])
        if len(keys) == 1 and len(there) > 1:
            x = [at[0] for at in there]
            texts = {"key": keys[0], "metric": title(column.metric), "title": heading}
            yield stem, drawings.curve(x, list(there.values()), **texts, log=spans_decades(x))
        elif there and len(keys) == 2:
            rows, columns = (sorted({at[i] for at in there}, reverse=i == 0) for i in (0, 1))
            means = {at: mean for at, (mean, _) in there.items()}
            values = np.array([[means.get((r, c), np.nan) for c in columns] for r in rows])
            names = [[f"{v:g}" for v in axis] for axis in (rows, columns)]
            heading = f"{title(column.metric)}, {heading}"
            yield stem, drawings.grid(values, *names, x=keys[1], y=keys[0], title=heading)


def _examples(choice: Choice) -> Named:
    from redoubt.reporting import drawings

    for record in choice.records:
        found = pictures(record)
        for attack in found.adversarial if found else ():
            yield f"examples-{attack}-{record.name}", drawings.examples(found, attack, title(attack))  # type: ignore[arg-type]


#: What draws each figure.
FIGURES: dict[str, Callable[[Choice], Named]] = {
    "scatter": _scatter,
    "curves": _compared("curves"),
    "sweep": _sweep,
    "eps": _compared("eps"),
    "iterations": _compared("iterations"),
    "gap": _gap,
    "updates": _updates,
    "examples": _examples,
}
#: Those that show several runs together.
COMPARING = ("scatter", "curves", "sweep", "eps", "iterations")
