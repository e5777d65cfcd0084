"""Audits in the store: done once, and noted in the results of the evaluations that they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import redoubt
from redoubt import config
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.evaluation.audit import Audit, summary
from redoubt.evaluation.suite import suite
from redoubt.reporting.figures import curve
from redoubt.reporting.table import audit_place
from redoubt.runs.files import read_json, write_json
from redoubt.runs.identity import canonical, digest, plain

if TYPE_CHECKING:
    from redoubt.evaluation.record import Source


def audited(
    module: RobustModule,
    data: ImageData,
    tree: Mapping[str, Any],
    keys: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    weights_id: str,
    folder: Path,
    source: Source | None,
    device: torch.device,
) -> tuple[dict[str, Any], Path]:
    """Audits a module as the config says, or answers from what is stored; says so in its evaluations.

    What is done is kept after each check, so that an audit which was broken off goes on.

    Args:
        module: In evaluation; its weights are those to be audited.
        data: The first ``audit.images`` of its test split are used.
        tree: Resolved config: ``attack``, ``evaluation``, ``trainer.progress`` are read.
        keys: The config's ``audit``.
        facts: run, checkpoint and weights, by name.
        weights_id: Stands for the very weights.
        folder: The run's.
        source: The natural twin, if transfer is to be checked.
        device: Where to compute.

    Returns:
        The contents of audit.json, and its folder.

    Raises:
        TimeUp: The time is up; the checks that are done are kept.
    """
    images, labels = (t[: int(keys["images"])] for t in data.test_for(module.classes))
    if source is not None:
        source = source.sorted_as(module, data)
    seed = int(tree["evaluation"]["seed"])
    decisive = {
        "attack": tree["attack"],
        "audit": keys,
        "seed": seed,
        "weights": weights_id,
        "source": source.identity if source else None,
        "test": data.fingerprint("test"),
        "balanced": data.recorded_subset,
        "classes": data.places(module.classes, str(facts["run"])),
        "n": len(labels),
        "numerics": redoubt.NUMERICS,
    }
    which = facts["checkpoint"] if facts["checkpoint"] in ("last", "best") else "file"
    where = folder / "audit" / f"{which}-{digest(decisive)}"
    report = read_json(where / "audit.json")
    if report is None:
        kept = where / "checks.json"
        run = Audit(
            module.to(device),
            images,
            labels,
            suite(tree["attack"]),
            keys=keys,
            seed=seed,
            device=device,
            source=source.module.to(device) if source else None,
            progress=bool(tree["trainer"]["progress"]),
        )
        checks = run(kept)
        threat = {"norm": run.norm, "eps": run.eps}
        lines = {"accuracy_over_eps": run.eps, "accuracy_over_iterations": None}
        of = f"{facts['run']}\n{audit_place({**facts, 'threat': threat, 'n': len(labels)})}"
        for name, columns in run.curves.items():
            title = f"{name.replace('_', ' ')}\n{of}"
            curve(where, name, columns, title=title, mark=lines[name])
        report = {
            **facts,
            "threat": threat,
            "weights_id": weights_id,
            "n": len(labels),
            **summary(checks),
            "keys": keys,
            "attack": tree["attack"],
            "seconds": sum(check.seconds for check in checks),
        }
        write_json(where / "audit.json", report)
        kept.unlink(missing_ok=True)  # two may have made the same audit
    for path in (folder / "eval").glob("*/results.json"):
        results = read_json(path)
        settings = read_json(path.parent / "attack.json")
        if results is not None and settings is not None and results.get("weights_id") == weights_id:
            write_json(path, {**results, **marks(folder / "eval", results, settings["attack"])})
    return report, where


def usual_audit() -> dict[str, Any]:
    """The thresholds and efforts of conf/audit.yaml."""
    keys: dict[str, Any] = plain(config.compose([], "audit").audit)
    return keys


def marks(folder: Path, results: Mapping[str, Any], attack: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json says of audits: those of these weights by this very suite, as conf/audit.yaml has it.

    An audit with other thresholds or less effort is an experiment: it marks nothing.

    Args:
        folder: The run's ``eval`` folder.
        results: The contents of results.json; attack: the resolved suite that it is of.
    """
    reports = {path.parent.name: read_json(path) for path in sorted((folder.parent / "audit").glob("*/audit.json"))}
    if not reports:
        return {"audited": False, "audits": [], "audit_failed": []}
    usual_keys = usual_audit()
    usual = canonical({**usual_keys, "source": None})
    of_these = {
        name: report
        for name, report in reports.items()
        if report is not None
        and report["weights_id"] == results["weights_id"]
        and canonical(report["attack"]) == canonical(attack)
        and canonical({**report["keys"], "source": None}) == usual
        and report["n"] >= min(usual_keys["images"], results["n"])
    }
    failed = sorted({name for report in of_these.values() for name in report["failed"]})
    return {"audited": bool(of_these) and not failed, "audits": list(of_these), "audit_failed": failed}
