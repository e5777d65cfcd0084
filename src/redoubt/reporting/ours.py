"""The store's own table: every finished cell, by suite, over its seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from redoubt.reporting.collect import Evaluation, Record
from redoubt.reporting.match import Group, spread
from redoubt.reporting.protocol import protocol_of
from redoubt.reporting.sheet import Sheet
from redoubt.reporting.table import title
from redoubt.runs.identity import canonical, differences

OURS = "ours"
CELL = ("data", "model", "defense", "base", "recipe", "protocol", "weights", "seeds")
NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True)
class Line:
    """One recipe under one protocol.

    Args:
        suite: The attack's name, or `NOT_EVALUATED`.
        place: The texts of `CELL`.
        values: By metric, in per cent, one number for each seed.
    """

    suite: str
    place: tuple[str, ...]
    values: Mapping[str, Sequence[float]]


def store_sheets(groups: Sequence[Group]) -> tuple[list[Sheet], Sheet]:
    """For people a table for each suite, mean ± sample standard deviation; as facts one row for each number."""
    lines = sorted((line for group in groups for line in _lines(group, groups)), key=lambda line: line.place)
    suites = sorted({line.suite for line in lines}) or [NOT_EVALUATED]
    facts = [
        [*line.place, metric, f"{mean(values):.4f}", f"{stdev(values):.4f}" if len(values) > 1 else ""]
        for line in lines
        for metric, values in line.values.items()
    ]
    wide = [_of_suite(suite, [line for line in lines if line.suite == suite]) for suite in suites]
    return wide, Sheet(OURS, (*CELL, "metric", "mean", "sd"), facts)


def _of_suite(suite: str, lines: Sequence[Line]) -> Sheet:
    metrics = list(dict.fromkeys(metric for line in lines for metric in line.values))
    rows = [[*line.place, *(spread(line.values[m]) if m in line.values else "" for m in metrics)] for line in lines]
    columns = [*CELL, *map(title, metrics)]
    # What is the same in every row stands in the title.
    same = [i for i in range(len(CELL) - 1) if len({row[i] for row in rows}) == 1] if len(rows) > 1 else []
    kept = [i for i in range(len(columns)) if i not in same]
    heading = "; ".join([f"Our cells, {suite}: accuracy in %", *(rows[0][i] for i in same if rows[0][i])])
    shown = [[row[i] for i in kept] for row in rows]
    return Sheet(heading, [columns[i] for i in kept], shown, frozenset(columns[len(CELL) - 1 :]))


def _lines(group: Group, groups: Sequence[Group]) -> Iterator[Line]:
    place = (*group.axes, _own(group, groups))
    found: dict[str, list[tuple[Record, Evaluation]]] = {}
    for record in group.runs:
        newest: dict[str, Evaluation] = {}
        for evaluation in record.evaluations:  # the newest first
            newest.setdefault(_protocol(evaluation), evaluation)
        for key, evaluation in newest.items():
            found.setdefault(key, []).append((record, evaluation))
    if not found:
        yield Line(NOT_EVALUATED, (*place, "", "", str(len(group.runs))), {})
    for entries in found.values():
        record, first = entries[0]
        weights = f"{first.results['weights']}, {first.results['checkpoint']}"
        numbers = [_accuracies(evaluation) for _, evaluation in entries]
        values = {metric: [n[metric] for n in numbers if metric in n] for metric in numbers[0]}
        yield Line(first.attack, (*place, protocol_of(record, first).measured, weights, str(len(entries))), values)


def _own(group: Group, groups: Sequence[Group]) -> str:
    """What sets a recipe apart from the others of its cell, as ``defense.tau=0.5``."""
    others = [other for other in groups if other.axes == group.axes and other is not group]
    keys = sorted({key for other in others for key in differences(group.recipe, other.recipe)})
    return " ".join(f"{key}={_at(group.recipe, key)}" for key in keys)


def _at(tree: Any, key: str) -> str:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return "null" if tree is None else f"{tree:g}" if isinstance(tree, float) else str(tree)


def _protocol(evaluation: Evaluation) -> str:
    """Equal for evaluations whose numbers may be averaged over seeds."""
    results, settings = evaluation.results, evaluation.settings
    parts = {"suite": evaluation.attack, "attack": settings.get("attack"), "limit": settings.get("limit_test")}
    if evaluation.subset is not None:
        parts["subset"] = evaluation.subset
    same = {key: results[key] for key in ("n", "weights", "checkpoint")}
    return json.dumps(canonical({**parts, **same}), sort_keys=True)


def _accuracies(evaluation: Evaluation) -> dict[str, float]:
    """In per cent; of corruptions the means of the groups alone."""
    metrics, groups = evaluation.results["metrics"], evaluation.results.get("groups", {})
    if groups:
        return {"natural": 100 * metrics["natural"]["accuracy"]} | {f"mean of {g}": 100 * a for g, a in groups.items()}
    return {metric: 100 * entry["accuracy"] for metric, entry in metrics.items()}
