"""How a number of ours was measured, and in what that differs from how a paper measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redoubt.reporting.collect import Evaluation, Record
from redoubt.reporting.table import suite_title, weights
from redoubt.runs.identity import canonical, differences


@dataclass(frozen=True)
class Protocol:
    """How a number of ours came about.

    Args:
        suite: The attack's name.
        norm, eps: Of the threat model; eps None where there is none.
        images: Of the test split.
        judged: Weights and checkpoint, in words.
        epochs: Of training.
        source: Where the images came from, as ``data.source``.
        differs: Keys in which run or evaluation differ from the published recipe; none: faithful.
    """

    suite: str
    norm: str
    eps: float | None
    images: int
    judged: str
    epochs: int
    source: str
    differs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.measured}, {self.judged}"

    @property
    def measured(self) -> str:
        """The same without the weights."""
        eps = "" if self.eps is None else f", {self.norm} {_fraction(self.eps) if self.norm == 'linf' else self.eps}"
        origin = "" if self.source == "official" else f", data.source={self.source}"
        return f"{self.suite}{eps}, {self.images} images, {self.epochs} epochs{origin}"


def _fraction(eps: float) -> str:
    return f"{eps * 255:.4g}/255"


def protocol_of(record: Record, evaluation: Evaluation, differs: tuple[str, ...] = ()) -> Protocol:
    """What is to be said beside a number of this evaluation."""
    threat, results, cfg = evaluation.results["threat"], evaluation.results, record.config
    source = str(cfg["data"].get("source", "official"))
    epochs = int(cfg["trainer"]["max_epochs"])
    of = suite_title(results), threat["norm"], threat["eps"], int(results["n"]), weights(results)
    return Protocol(*of, epochs, source, differs)


def nearest(record: Record, metric: str, wanted: Mapping[str, Any]) -> tuple[Evaluation, list[str]] | None:
    """The evaluation that measures a metric most nearly as the config ``wanted`` would, and the keys that differ.

    Another suite counts only where it attacks in the very same way. Of equals the suite that is wanted wins, then the
    newest.
    """
    suite = wanted["axes"]["attack"]
    found = []
    for evaluation in record.evaluations:
        if evaluation.accuracy(metric) is None:
            continue
        keys = _protocol_differences(evaluation, metric, wanted)
        if not keys or evaluation.attack == suite:
            found.append((len(keys), evaluation.attack != suite, evaluation, keys))
    return min(found, key=lambda entry: entry[:2])[2:] if found else None


def _protocol_differences(evaluation: Evaluation, metric: str, wanted: Mapping[str, Any]) -> list[str]:
    settings, results = evaluation.settings, evaluation.results
    own = {
        "attack": _section(settings.get("attack") or {}, metric),
        "evaluation": {key: results[key] for key in ("checkpoint", "weights")},
        "data": {"limit_test": settings.get("limit_test")},
    }
    if (settings.get("evaluation") or {}).get("save") == "uint8":  # rounded examples are scored
        own["evaluation"]["save"] = "uint8"
    published = {
        "attack": _section(wanted["attack"], metric),
        "evaluation": {key: wanted["evaluation"][key] for key in ("checkpoint", "weights")},
    }
    return differences(canonical(own), canonical(published))


def _section(attack: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """What decides a metric of a suite: its attack; all of them for the ensemble; nothing for clean images."""
    if metric == "natural":
        return {}
    attacks = attack.get("attacks") or {}
    return {"attacks": attacks if metric == "ensemble" else {metric: attacks.get(metric)}}
