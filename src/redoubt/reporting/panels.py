"""What the W&B dashboard shows of one data set, decided by what its runs in the store have."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import wandb_workspaces.reports.v2 as wr

from redoubt.reporting.collect import Record
from redoubt.reporting.table import title
from redoubt.runs.identity import deciding, leaves

#: Hyper-parameters of the defenses that a sweep looks at first, and the most that one panel takes.
FIRST = ("defense.lambda_sep", "defense.lambda_rec", "defense.tau")
MOST = 8


@dataclass(frozen=True)
class DataSet:
    """The runs of one data set.

    Args:
        name: Of the data set.
        runs: All its runs.
    """

    name: str
    runs: Sequence[Record]

    @property
    def tag(self) -> str:
        """What its runs are found by in W&B."""
        return f"data:{self.name}"

    @cached_property
    def suites(self) -> dict[str, str]:
        """Suite -> the metric that stands for robustness, the suite of most runs first.

        That is the Ensemble, else AutoAttack, else what NRR is of; a suite of corruptions has none.
        """
        counts: dict[str, int] = {}
        metrics: dict[str, str] = {}
        for evaluation in (e for run in self.runs for e in run.evaluations):
            measured, nrr = evaluation.results["metrics"], list(evaluation.results["nrr"])
            robust = [m for m in ("ensemble", "autoattack") if m in measured] + nrr
            if robust:
                counts[evaluation.attack] = counts.get(evaluation.attack, 0) + 1
                metrics.setdefault(evaluation.attack, robust[0])
        return {suite: metrics[suite] for suite in sorted(counts, key=lambda s: -counts[s])}

    @cached_property
    def curves(self) -> list[str]:
        """Columns of metrics.csv: accuracies and gaps of the probe or the validation split, terms of the loss."""
        names = dict.fromkeys(name for run in self.runs for row in run.metrics for name in row)
        return [n for n in names if "/" in n and not n.startswith("train/updated/")]

    @cached_property
    def swept(self) -> list[str]:
        """Numbers of the config that decide weights and differ among the runs; the defenses' own first."""
        values: dict[str, set[float]] = {}
        for run in self.runs:
            for key, text in leaves(deciding(run.config)).items():
                if isinstance(value := json.loads(text), float):
                    values.setdefault(key, set()).add(value)
        varied = [key for key, found in values.items() if len(found) > 1 and key not in (*FIRST, "seed")]
        own = [key for key in FIRST if key in values]
        return [*own, *sorted(varied, key=lambda k: (not k.startswith("defense."), k))][:MOST]

    @property
    def columns(self) -> list[str]:
        """Of the table of runs, as W&B names them."""
        axes = [f"config:axes.value.{axis}" for axis in ("defense", "base", "model")]
        scores = [f"summary:{key}" for suite, robust in self.suites.items() for key in scores_of(suite, robust)]
        return ["run:displayName", *axes, "config:seed.value", *scores]


def scores_of(suite: str, robust: str) -> tuple[str, str]:
    """Summary keys of natural and robust accuracy."""
    return f"eval/{suite}/natural", f"eval/{suite}/{robust}"


# ---- panels by section ------------------------------------------------------------------------------------------


def sections(data: DataSet) -> dict[str, list[Any]]:
    """Title -> panels; a section without panels is left out."""
    found = {
        "Natural against robust accuracy": scatter(data),
        "Learning curves by defense": curves(data),
        "Sweeps": sweeps(data),
        "Attacks, classes and images": tables(data),
        "Runs compared": [wr.RunComparer()],
    }
    return {name: panels for name, panels in found.items() if panels}


def scatter(data: DataSet) -> list[Any]:
    """Robust over natural accuracy, a panel for each suite."""
    found = []
    for suite, robust in data.suites.items():
        x, y = map(wr.SummaryMetric, scores_of(suite, robust))
        found.append(wr.ScatterPlot(title=f"{suite}: natural, {title(robust)}", x=x, y=y))
    return found


def curves(data: DataSet) -> list[Any]:
    """Every curve over the epochs, mean and range of the runs of a defense."""
    options: dict[str, Any] = {"x": "epoch", "groupby": wr.Config("axes.defense"), "groupby_aggfunc": "mean"}
    return [wr.LinePlot(title=name, y=[name], groupby_rangefunc="minmax", **options) for name in data.curves]


def sweeps(data: DataSet) -> list[Any]:
    """Parallel coordinates, importance of parameters, and maps of two parameters coloured by robust accuracy.

    wandb-workspaces has no heat map; a scatter of two parameters with a colour scale shows the same grid.
    """
    if not data.suites or not data.swept:
        return []
    suite, robust = next(iter(data.suites.items()))
    natural, goal = scores_of(suite, robust)
    axes = [wr.Config(f"axes.{axis}") for axis in ("defense", "base", "model")]
    along: list[Any] = [*axes, *map(wr.Config, data.swept), wr.SummaryMetric(natural), wr.SummaryMetric(goal)]
    colours = [wr.GradientPoint(color=c, offset=o) for c, o in (("#440154", 0), ("#21918c", 50), ("#fde725", 100))]
    maps = [
        wr.ScatterPlot(
            title=f"{title(robust)} over {x} and {y}",
            x=wr.Config(x),
            y=wr.Config(y),
            z=wr.SummaryMetric(goal),
            gradient=colours,
        )
        for x, y in itertools.combinations(data.swept[:3], 2)
    ]
    return [
        wr.ParallelCoordinatesPlot(
            title=f"{suite}: {title(robust)}",
            columns=[wr.ParallelCoordinatesPlotColumn(metric=metric) for metric in along],
            gradient=colours,
        ),
        wr.ParameterImportancePlot(with_respect_to=goal),
        *maps,
    ]


def tables(data: DataSet) -> list[Any]:
    """The tables and images of every suite."""
    found: list[Any] = []
    for suite in data.suites:
        found += [wr.WeavePanelSummaryTable(table_name=f"eval/{suite}/{kind}") for kind in ("attacks", "classes")]
        with_images = [e for run in data.runs for e in run.evaluations if e.attack == suite]
        names = dict.fromkeys(n for e in with_images for n in (e.examples() or {}) if n.endswith("/predicted"))
        keys = [f"eval/{suite}/examples/{n.removesuffix('/predicted')}" for n in names if n != "clean/predicted"]
        if keys:
            found.append(wr.MediaBrowser(title=f"{suite}: clean, perturbation, adversarial", media_keys=keys))
    return found
