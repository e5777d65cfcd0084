"""Which runs of the store are a published row's, and in what they differ from its recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean, stdev
from typing import Any

from omegaconf import DictConfig

from redoubt import config
from redoubt.reporting.cells import Cell, Measure
from redoubt.reporting.collect import Record
from redoubt.reporting.protocol import Protocol, nearest, protocol_of
from redoubt.runs.identity import EXCLUDED, deciding, differences, plain

#: Runs that differ in these alone are one recipe. The natural run that a cell starts from belongs to its recipe.
BESIDE_THE_RECIPE = (EXCLUDED - {"natural"}) | {"seed", "data.seed"}


@cache
def composed(*words: str) -> DictConfig:
    """The resolved config of a command line; composed once."""
    return config.resolve(config.compose(list(words)))


def recipe(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The canonical part of a config that seeds of one cell share and that decides what their weights are."""
    found = deciding(cfg, excluded=BESIDE_THE_RECIPE)
    if cfg["defense"].get("pretrained") != "auto":
        found.pop("natural", None)
    if cfg["data"].get("source") == "fake":
        found["data"] = {**found["data"], "source": "fake"}  # noise: else only the fingerprint of the data tells
    return found


@dataclass(frozen=True)
class Group:
    """Finished runs of one recipe, that is its seeds."""

    recipe: dict[str, Any]
    runs: tuple[Record, ...]

    @property
    def axes(self) -> tuple[str, str, str, str]:
        """data, model, defense and base by name."""
        axes = self.runs[0].axes
        return axes["data"], axes["model"], axes["defense"], axes["base"]

    @property
    def official(self) -> bool:
        """Whether the images are the published files."""
        return self.runs[0].config["data"].get("source") == "official"


def groups(records: Iterable[Record]) -> list[Group]:
    """The finished runs by recipe; of a seed that is there twice, the first by name."""
    found: dict[str, tuple[dict[str, Any], dict[int, Record]]] = {}
    for record in records:
        if record.status["state"] != "done":
            continue
        own = recipe(record.config)
        place = [record.axes[axis] for axis in ("data", "model", "defense", "base")]
        place.append(record.config["data"].get("source"))  # a folder's images need not be the official ones
        _, seeds = found.setdefault(json.dumps([place, own], sort_keys=True), (own, {}))
        seeds.setdefault(record.axes["seed"], record)
    return [Group(own, tuple(seeds.values())) for own, seeds in found.values()]


@dataclass(frozen=True)
class Ours:
    """One metric of one recipe over its seeds, in per cent."""

    values: tuple[float, ...]
    protocol: Protocol
    runs: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.values)

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None of one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


def spread(values: Sequence[float]) -> str:
    """``50.12 ± 0.21``: the mean and, of several seeds, the sample standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


class Match:
    """The runs that fit one published row.

    Runs of the cell's axes fit, unless they differ in what distinguishes the rows of the table. The faithful win;
    else those that differ in the fewest keys, those on official images, those with the most seeds. Recipes are never
    mixed.

    Args:
        cell: The row's.
        found: All groups of the store.
        distinct: Keys of the config that rows of this table set.
    """

    def __init__(self, cell: Cell, found: Sequence[Group], distinct: Iterable[str] = ()) -> None:
        self.cell = cell
        axes = (cell.data, cell.model, cell.defense, cell.base)
        near = [group for group in found if group.axes == axes]
        self.groups: list[tuple[tuple[str, ...], Group]] = []
        if near:
            wanted = recipe(plain(composed(*cell.overrides())))
            keyed = [(tuple(differences(group.recipe, wanted)), group) for group in near]
            fitting = [(keys, group) for keys, group in keyed if not set(keys) & set(distinct)]
            self.groups = sorted(fitting, key=lambda entry: (len(entry[0]), not entry[1].official, -len(entry[1].runs)))

    def numbers(self, measures: Sequence[Measure]) -> list[Ours | None]:
        """Each measure by the first group that has any of them."""
        for keys, group in self.groups:
            found = [self._number(measure, keys, group) for measure in measures]
            if any(found):
                return found
        return [None] * len(measures)

    def _number(self, measure: Measure, keys: tuple[str, ...], group: Group) -> Ours | None:
        return over_seeds(group, measure, keys, plain(composed(*self.cell.overrides(measure.suite))))


def over_seeds(group: Group, measure: Measure, keys: tuple[str, ...], wanted: Mapping[str, Any]) -> Ours | None:
    """The measure over the seeds that were evaluated alike, as near to the published protocol as any."""
    alike: dict[Protocol, list[tuple[float, str, Protocol]]] = {}
    for record in group.runs:
        found = [nearest(record, part, wanted) for part in measure.parts]
        if not all(found):
            continue
        parts = dict(zip(measure.parts, [f for f in found if f], strict=True))
        differs = tuple(sorted({*keys, *(key for _, more in parts.values() for key in more)}))
        last = parts[measure.parts[-1]][0]  # the attack, where natural accuracy is the other part
        protocol = protocol_of(record, last, differs)
        value = 100 * measure.of({part: float(e.accuracy(part) or 0.0) for part, (e, _) in parts.items()})
        alike.setdefault(replace(protocol, suite=""), []).append((value, record.name, protocol))  # suites attack alike
    if not alike:
        return None
    values, names, protocols = zip(*min(alike.values(), key=lambda e: (len(e[0][2].differs), -len(e))), strict=True)
    return Ours(values, protocols[0], names)
