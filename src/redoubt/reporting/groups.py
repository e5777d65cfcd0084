"""Which runs and which numbers belong together: seeds of one cell, sweeps, and one protocol's evaluations."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redoubt.reporting.collect import CELL, Evaluation, Record
from redoubt.reporting.table import subset, suite_title, threat, weights
from redoubt.runs.identity import EXCLUDED, deciding, digest, leaves


@dataclass(frozen=True)
class Protocol:
    """What two accuracies must share to stand in one column.

    Args:
        suite: The attack suite's name.
        norm: Of the threat model.
        eps: Of the threat model; None where the suite has no bound, as corruptions.
        digest: Of every setting of the suite, of the number of test images where it is limited, and of the weights
            where they are not those that their run is judged by.
        special: Such a limit or such weights, for people.
        shown: The suite's name with the members that ran, where these are not all of AutoAttack.
    """

    suite: str
    norm: str | None
    eps: float | None
    digest: str
    special: str = ""
    shown: str = ""

    @property
    def label(self) -> str:
        """``fsr_suite, linf eps 8/255 (0.03137)``."""
        return (self.shown or self.suite) + threat({"norm": self.norm, "eps": self.eps}) + self.special


def protocol(evaluation: Evaluation) -> Protocol:
    """The protocol of an evaluation."""
    limit = evaluation.settings.get("limit_test")
    special = "" if limit is None else f", {limit} images{subset(evaluation.subset)}"
    if not evaluation.own:
        special += f", {weights(evaluation.results)}"
    settings, found, shown = evaluation.settings, evaluation.threat, suite_title(evaluation.results)
    rounded = (settings.get("evaluation") or {}).get("save") == "uint8"
    decisive = {"attack": settings.get("attack"), "rounded": rounded or None, "special": special or None}
    return Protocol(evaluation.attack, found["norm"], found["eps"], digest(decisive)[:6], special, shown)


def protocols(records: Iterable[Record]) -> dict[Protocol, str]:
    """Every protocol and its label with what weights were judged, that of most runs first; labels are unique."""
    counts: Counter[Protocol] = Counter()
    judged: dict[Protocol, set[str]] = {}
    for record in records:
        own = {protocol(e): weights(e.results) for e in record.evaluations}
        counts.update(own.keys())
        for p, text in own.items():
            judged.setdefault(p, set()).add(text)
    order = sorted(counts, key=lambda p: (-counts[p], p.label, p.digest))
    labels = {p: p.label + _weights(p, judged[p]) for p in order}
    same = Counter(labels.values())
    return {p: text if same[text] == 1 else f"{text} #{p.digest}" for p, text in labels.items()}


def _weights(protocol: Protocol, judged: set[str]) -> str:
    """The weights and the checkpoint of a protocol's evaluations, where its label does not have them yet."""
    text = next(iter(judged)) if len(judged) == 1 else "the weights that each run is judged by"
    return "" if protocol.special.endswith(text) else f", {text}"


def chosen(record: Record, wanted: Protocol, metric: str) -> Evaluation | None:
    """A run's evaluation with a metric under a protocol: of several that on most images, the newest of these."""
    fitting = [e for e in record.evaluations if metric in e.results["metrics"] and protocol(e) == wanted]
    return max(fitting, key=lambda e: e.results["n"], default=None)  # max takes the first, and they are newest first


def decisive(record: Record) -> dict[str, str]:
    """What decides a run's weights but its seed, as dotted keys with JSON values."""
    data = record.config.get("data") or {}
    kept = {"data.source"} if data.get("source") != "folder" else {"data.source", "data.root"}
    dropped = (EXCLUDED - kept) | {"seed"}
    if data.get("seed") == record.config.get("seed"):  # it follows the seed unless it is set
        dropped |= {"data.seed"}
    return leaves(deciding(record.config, excluded=dropped))


def by_seed(records: Sequence[Record]) -> list[list[Record]]:
    """Runs that differ in nothing but their seed, together, the finished apart from others; ordered by the first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        key = json.dumps([decisive(record), record.status["state"] == "done"], sort_keys=True)
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; of one value there is no deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in one or two numeric keys and the seed only.

    Args:
        keys: The dotted key of each axis; keys that moved together are joined by `` = ``.
        cell: What all its runs share of data, model, defense and base.
        points: The runs at each value, or pair of values.
        fixed: The value here of each key that other sweeps of the same cell have elsewhere; None: it is not set.
    """

    keys: tuple[str, ...]
    cell: dict[str, Any]
    points: dict[tuple[float, ...], list[Record]]
    fixed: dict[str, float | None] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """``fsr + at, resnet18, cifar10; defense.tau=0.1``."""
        cell = "{defense} + {base}, {model}, {data}".format(**self.cell)
        return "; ".join([cell, *self.at])

    @property
    def at(self) -> list[str]:
        """What is fixed, as words of a command."""
        firsts = {key.split(" = ")[0]: value for key, value in self.fixed.items()}
        return [f"{key}={'null' if value is None else f'{value:g}'}" for key, value in firsts.items()]

    def values(self, axis: int) -> list[float]:
        """The values of one axis, ascending."""
        return sorted({at[axis] for at in self.points})


def sweeps(records: Sequence[Record]) -> list[Sweep]:
    """Every curve of two values or more, and every plane with more cells than a cross has.

    What is in a plane is not repeated as curves.
    """
    families: dict[str, list[tuple[dict[str, float], Record]]] = {}
    for record in records:
        values = {key: json.loads(text) for key, text in decisive(record).items()}
        numbers = {k: v for k, v in values.items() if isinstance(v, float | int) and not isinstance(v, bool)}
        others = {k: v for k, v in values.items() if k not in numbers}
        families.setdefault(json.dumps(others, sort_keys=True), []).append((numbers, record))
    return [sweep for family in families.values() for sweep in _of_family(family)]


def _of_family(family: list[tuple[dict[str, float], Record]]) -> list[Sweep]:
    columns: dict[tuple[int, ...], list[str]] = {}  # keys by how they split the family: those alike moved together
    for key in sorted({key for numbers, _ in family for key in numbers}):
        seen: dict[float | None, int] = {}
        split = tuple(seen.setdefault(numbers.get(key), len(seen)) for numbers, _ in family)
        if len(seen) > 1:
            columns.setdefault(split, []).append(key)
    axes = list(columns.values())
    planes = [s for pair in itertools.combinations(axes, 2) for s in _slices(family, axes, pair)]
    within = [{id(r) for runs in plane.points.values() for r in runs} for plane in planes]
    curves = [s for axis in axes for s in _slices(family, axes, (axis,))]
    own = [c for c in curves if not any({id(r) for rs in c.points.values() for r in rs} <= w for w in within)]
    return planes + own


def _slices(
    family: list[tuple[dict[str, float], Record]], axes: list[list[str]], along: tuple[list[str], ...]
) -> list[Sweep]:
    """The family cut so that in each piece only ``along`` varies."""
    pieces: dict[tuple[float | None, ...], dict[tuple[float, ...], list[Record]]] = {}
    for numbers, record in family:
        at = [numbers.get(axis[0]) for axis in along]
        rest = tuple(numbers.get(axis[0]) for axis in axes if axis not in along)
        if None not in at:
            pieces.setdefault(rest, {}).setdefault(tuple(v for v in at if v is not None), []).append(record)
    found = []
    others = [" = ".join(axis) for axis in axes if axis not in along]
    for rest, points in pieces.items():
        first = next(iter(points.values()))[0]
        cell = {axis: first.axes[axis] for axis in CELL if axis != "seed"}
        fixed = dict(zip(others, rest, strict=True))
        sweep = Sweep(tuple(" = ".join(axis) for axis in along), cell, points, fixed)
        sizes = [len(sweep.values(i)) for i in range(len(along))]
        if min(sizes) > 1 and len(points) > (1 if len(sizes) == 1 else sum(sizes) - 1):
            found.append(sweep)
    return found


def labels(records: Sequence[Record]) -> dict[str, str]:
    """A short name for each run, by its name: the axes in which they differ, and its hash where that is not enough."""
    axes = ("defense", "base", "model", "data", "seed")
    varying = [axis for axis in axes if len({r.axes[axis] for r in records}) > 1]
    shown = {r.name: " ".join(_axis(axis, r.axes[axis]) for axis in varying) or r.run.readable for r in records}
    same = Counter(shown.values())
    return {r.name: f"{text} {r.run.hash}" if same[text] > 1 else text for r in records for text in [shown[r.name]]}


def _axis(axis: str, value: Any) -> str:
    return f"s{value}" if axis == "seed" else str(value)
