"""What an accuracy over attacks is, how stored ones are read, and which evaluation stands for a run; no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redoubt.errors import UserError
from redoubt.runs.files import read_arrays, read_json

if TYPE_CHECKING:
    import numpy as np

#: The attacks of pyautoattack's versions; "AutoAttack" alone is the name of the four of ``standard``.
VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
#: Attacks that ask for logits only, by their class or, of libraries, by name.
BLACK_BOX = ("NAttack", "Square", "SPSA", "Pixle", "OnePixel", "GN")


# ---- accuracies ---------------------------------------------------------------------------------------------------


def counted(verdicts: Mapping[str, np.ndarray], corruptions: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Verdicts as they are counted: an image that is wrong at x is broken by every attack, for x lies in the ball.

    Args:
        verdicts: ``natural`` and, by attack, which examples stayed right, bool [N]; what else is there stays as it is.
        corruptions: What is no attack: its images are others than x, and each is counted for itself.
    """
    natural = verdicts["natural"]
    return {
        name: verdict & natural if verdict.dtype == bool and name not in corruptions else verdict
        for name, verdict in verdicts.items()
    }


def ensemble(verdicts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Right on the clean image and under every attack: the row-wise AND (FSR's "Ensemble")."""
    import numpy as np

    return np.logical_and.reduce(list(verdicts.values()))


def wilson(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of Wilson (1927) for a share of ``right`` out of ``n``."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracies(verdicts: Mapping[str, Sequence[bool] | np.ndarray]) -> dict[str, dict[str, float | int]]:
    """Accuracy in [0, 1] with its interval, by attack."""
    import numpy as np

    table = {}
    for name, verdict in verdicts.items():
        right, n = int(np.sum(verdict)), len(verdict)
        low, high = wilson(right, n)
        table[name] = {"accuracy": right / n if n else 0.0, "low": low, "high": high, "n": n}
    return table


def nrr(natural: float, robust: float) -> float:
    """CURE's natural-robust ratio: the harmonic mean of the two accuracies."""
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0


# ---- reading ------------------------------------------------------------------------------------------------------


def read_results(folder: Path) -> dict[str, Any] | None:
    """The contents of an evaluation's ``results.json``, or None where there is none.

    Of an evaluation of version 0.1.0, which lacks ``members``, the accuracies are counted again from its verdicts, as
    `counted` says, and its members are found; the file is left as it is.
    """
    found = read_json(folder / "results.json")
    if found is None or "members" in found:
        return found
    metrics, attacks = found.get("metrics"), _attacks(folder)
    found["members"] = {}
    if not isinstance(metrics, dict) or "groups" in found:  # corruptions are no attacks
        return found
    try:
        verdicts = read_arrays(folder / "verdicts.npz")
        classes = int(verdicts["label"].max()) + 1
        again = accuracies({n: v for n, v in counted(verdicts).items() if n in metrics and v.dtype == bool})
        found["metrics"] = {name: {**metric, **again.get(name, {})} for name, metric in metrics.items()}
        natural = again["natural"]["accuracy"]
        values = {name: nrr(natural, again[name]["accuracy"]) for name in found.get("nrr") or {} if name in again}
        found["nrr"] = {**(found.get("nrr") or {}), **values}
        members = {name: _old_members(section, classes) for name, section in attacks.items() if name in metrics}
        found["members"] = {name: ran for name, ran in members.items() if ran}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):  # damaged: what is written stands
        pass
    return found


def _attacks(folder: Path) -> dict[str, Any]:
    """The sections of the suite's attacks, by name."""
    attack = (read_json(folder / "attack.json") or {}).get("attack")
    attacks = attack.get("attacks") if isinstance(attack, dict) else None
    return {n: s for n, s in attacks.items() if isinstance(s, dict)} if isinstance(attacks, dict) else {}


def _old_members(section: Mapping[str, Any], classes: int) -> list[str]:
    """The members that ran in version 0.1.0: on 2 and 3 classes nothing but apgd-ce and square."""
    if not str(section.get("_target_")).endswith(".AutoAttack"):
        return []
    version = section.get("version", "standard")
    listed = VERSIONS.get(version, (version,)) if isinstance(version, str) else version
    return [str(name) for name in listed if classes > 3 or name in ("apgd-ce", "square")]


def named(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results whose metrics say which members ran, where these are not all of AutoAttack; see `names`."""
    new = names(results)
    return {
        **results,
        **{key: {new.get(n, n): v for n, v in results[key].items()} for key in ("metrics", "nrr") if key in results},
    }


def names(results: Mapping[str, Any]) -> dict[str, str]:
    """What metrics are called whose attack ran other members than AutoAttack has: ``autoattack (apgd-ce, square)``."""
    return {
        name: f"{name} ({', '.join(members)})"
        for name, members in (results.get("members") or {}).items()
        if sorted(members) != sorted(VERSIONS["standard"]) and list(members) != [name]
    }


def written(folder: Path, results: Mapping[str, Any]) -> float:
    """When an evaluation ended, in seconds: as it says, or as its file does where it is of version 0.1.0."""
    try:
        return datetime.fromisoformat(str(results["evaluated"])).timestamp()
    except (KeyError, ValueError):
        return (folder / "results.json").stat().st_mtime


# ---- which one stands for a run -----------------------------------------------------------------------------------

#: The number that stands for robustness: the first of these that there is.
ROBUST = ("ensemble", "autoattack", "pgd20")


def ordered(metrics: Iterable[str]) -> list[str]:
    """Metrics as papers order them: natural, FGSM, PGD by its steps, C&W, others, AutoAttack, Ensemble."""
    ends = {"natural": 0, "fgsm": 1, "cw": 3, "autoattack": 5, "ensemble": 6}

    def place(metric: str) -> tuple[int, int, str]:
        if metric.startswith("pgd") and metric[3:].isdigit():
            return 2, int(metric[3:]), metric
        return ends.get(metric.partition(" (")[0], 4), 0, metric

    return sorted(set(metrics), key=place)


def robust(metrics: Iterable[str]) -> str | None:
    """The metric that stands for robustness; None where nothing was attacked."""
    found = [m for m in ordered(metrics) if m != "natural"]
    usual = (m for name in ROBUST for m in found if m.partition(" (")[0] == name)
    return next(usual, found[-1] if found else None)


def is_own(results: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of the checkpoint and the weights that its run is judged by."""
    usual = config.get("evaluation") or {}
    return all(results.get(key) == usual.get(key, results.get(key)) for key in ("checkpoint", "weights"))


def standing(found: Sequence[tuple[Path, Mapping[str, Any]]], config: Mapping[str, Any]) -> int | None:
    """Which evaluation stands for a run, by its place; None of none.

    One that has attacks; of these one of the run's own threat model, and of the checkpoint and weights that the run is
    judged by; then by the strongest suite, see `strength`; on the most images; the newest.

    Args:
        found: Folder and results of each.
        config: The run's; its ``threat`` and ``evaluation`` are read.
    """

    def rank(i: int) -> tuple[Any, ...]:
        folder, results = found[i]
        power = strength(_attacks(folder), results)
        of_run = same_threat(results.get("threat"), config.get("threat")), is_own(results, config)
        return power > (False, 0.0, 0.0), *of_run, power, results.get("n") or 0, written(folder, results), -i

    return max(range(len(found)), key=rank) if len(found) > 1 else 0 if found else None


def same_threat(a: Any, b: Any) -> bool:
    """Whether two threat models are of one norm and one eps."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)) or a.get("norm") != b.get("norm"):
        return False
    left, right = (m.get("eps") for m in (a, b))
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-6)
    return bool(left == right)


def strength(attacks: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Orders suites: AutoAttack's cascade first, then by gradient steps on the net itself, then by what else is asked.

    Corruptions and natural accuracy are no attacks, and have none of it.

    Args:
        attacks: The suite's sections, by name.
        results: Of its evaluation.
    """
    members = results.get("members") or {}
    steps = queries = 0.0
    for name, section in attacks.items():
        kind = str(section.get("_target_")).rpartition(".")[2]
        if kind == "corruptions":
            continue
        options = {**section, **(section.get("options") or {})}
        effort = math.prod(_size(options.get(key)) for key in ("steps", "restarts", "eot", "targets"))
        if kind == "AutoAttack":
            effort = 500.0 * sum(member != "square" for member in members.get(name, ()))
            queries += _size(options.get("queries")) * ("square" in members.get(name, ()))
        if section.get("net") == "source" or kind in BLACK_BOX or section.get("name") in BLACK_BOX:
            queries += effort
        else:
            steps += effort
    cascade = any({"apgd-ce", "fab-t", "square"} <= {*ran} for ran in members.values())
    return cascade, steps, queries


def _size(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and value > 0 else 1.0
