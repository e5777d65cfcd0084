"""The run store as reports read it: every run with its config, metrics and evaluations; torch is not needed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from redoubt.errors import UserError
from redoubt.evaluation.results import counted, is_own, named, names, standing
from redoubt.runs.files import read_arrays, read_json, read_rows
from redoubt.runs.store import Run, Store, Weights

log = logging.getLogger("redoubt")

#: What a run is named after, and what evaluates it.
CELL = ("data", "model", "defense", "base", "seed")


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Args:
        folder: Holds ``results.json``, ``attack.json``, ``verdicts.npz``.
        results: See `redoubt.evaluation.results.read_results`; metrics are called as `named` says.
        own: Whether it is of the checkpoint and the weights that its run is judged by.
    """

    folder: Path
    results: Mapping[str, Any]
    own: bool = True

    @property
    def attack(self) -> str:
        """The suite's name."""
        return str(self.results["axes"]["attack"])

    def accuracy(self, metric: str) -> float | None:
        """In [0, 1]; None where this evaluation has no such metric."""
        found = self.results["metrics"].get(metric)
        return None if found is None else float(found["accuracy"])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The contents of ``attack.json``: the suite as it was composed, and how it was evaluated."""
        return read_json(self.folder / "attack.json") or {}

    @property
    def threat(self) -> Mapping[str, Any]:
        """Norm and eps; None where there is none."""
        found: Mapping[str, Any] | None = self.results.get("threat")
        return found or {"norm": None, "eps": None}

    @property
    def subset(self) -> str | None:
        """How its test images were chosen; None: all were taken. Old evaluations, which do not say, are balanced."""
        settings = self.settings
        return None if settings.get("limit_test") is None else settings.get("subset") or "balanced"

    def examples(self) -> dict[str, np.ndarray] | None:
        """The first few test images and what the attacks made of them; None where none were kept.

        ``index``, ``label`` int64 [E], ``clean`` uint8 [E, 3, H, W], ``clean/predicted`` int64 [E]; by attack its
        examples uint8 [E, 3, H, W] and ``<attack>/predicted`` (-1: it was not attacked).
        """
        path = self.folder / "examples.npz"
        if not path.is_file():
            return None
        return self._named(read_arrays(path))

    def verdicts(self) -> dict[str, np.ndarray]:
        """``index``, ``label`` int64 [N] and, by attack, which examples stayed right as `counted`, bool [N]."""
        found: dict[str, np.ndarray] = read_arrays(self.folder / "verdicts.npz")
        return self._named(found if "groups" in self.results or "natural" not in found else counted(found))

    def _named(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        new = names(self.results)
        parts = ((key.partition("/"), array) for key, array in arrays.items())
        return {new.get(name, name) + slash + end: array for (name, slash, end), array in parts}


@dataclass(frozen=True)
class Record:
    """One run of the store, finished or not."""

    run: Run

    @property
    def name(self) -> str:
        """``<defense>-<base>-<model>-<data>-s<seed>-<hash>``."""
        return self.run.name

    @cached_property
    def status(self) -> dict[str, Any]:
        """See `redoubt.runs.store.Run.status`."""
        return self.run.status

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config without secrets."""
        return self.run.config()

    @cached_property
    def axes(self) -> dict[str, Any]:
        """model, defense, base, data by name, and the seed."""
        return {**{k: self.config["axes"][k] for k in CELL if k != "seed"}, "seed": self.config["seed"]}

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``, one per epoch; what an epoch did not measure is absent."""
        rows = read_rows(self.run.metrics_file)
        try:
            return [{k: float(v) for k, v in row.items() if v} for row in rows]
        except (TypeError, ValueError):  # damaged
            return []

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The finished evaluations, the newest first; damaged ones are none."""
        found = [(folder, r) for folder, r in self.run.evaluations() if {"axes", "metrics"} <= r.keys()]
        whole = [(folder, r) for folder, r in found if isinstance(r["metrics"], dict) and "attack" in r["axes"]]
        return [Evaluation(folder, named(r), is_own(r, self.config)) for folder, r in whole]

    @cached_property
    def standing(self) -> Evaluation | None:
        """The evaluation that stands for the run; see `redoubt.evaluation.results.standing`."""
        return standing_of(self, self.evaluations)

    @cached_property
    def audits(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and ``audit.json`` of every audit; the folder has its curves as CSV and PNG."""
        found = [(p.parent, read_json(p)) for p in sorted((self.run.folder / "audit").glob("*/audit.json"))]
        judged = {e.results.get("weights_id") for e in self.evaluations} if isinstance(self.run, Weights) else None
        return [(f, report) for f, report in found if report and (judged is None or report.get("weights_id") in judged)]


def standing_of(record: Record, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Which of some of a run's evaluations stands for it."""
    place = standing([(e.folder, e.results) for e in evaluations], record.config)
    return None if place is None else evaluations[place]


def records(outputs: Path | str) -> list[Record]:
    """Every readable run of a store, by name.

    Raises:
        UserError: There is no store, or it cannot be read.
    """
    store = Store(outputs)
    if not store.folder.is_dir():
        raise UserError(f"paths.outputs={outputs}: no runs are in it: train some, or name the folder that holds runs/")
    return list(_readable(store.list()))


def newest(outputs: Path | str, name: str) -> Record:
    """Of the finished runs with a name, with or without the hash, the one that ended last, evaluated ones first.

    Raises:
        UserError: There is none.
    """
    found = [r for r in records(outputs) if f"{r.name}-".startswith(f"{name}-") and r.status["state"] == "done"]
    if not found:
        raise UserError(f"run {name}: none of this name is finished in {Path(outputs) / 'runs'}; see `redoubt runs ls`")
    return max(found, key=lambda r: (bool(r.evaluations), str(r.status.get("ended")), r.name))


def weight_files(outputs: Path | str) -> list[Record]:
    """Weights of files that were evaluated with a store."""
    return list(_readable(Store(outputs).weights()))


def _readable(runs: Iterable[Run]) -> Iterator[Record]:
    for run in runs:
        record = Record(run)
        try:
            record.axes  # noqa: B018 - a config that is damaged or foreign is no run to report on
        except UserError as error:
            log.warning("left out: %s", error)
            continue
        except (KeyError, TypeError):
            continue
        yield record
