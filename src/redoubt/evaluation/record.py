"""Evaluations in the store: each has an identity and a folder, and is never computed twice."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redoubt import config
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.evaluation.audit import Audit, summary
from redoubt.evaluation.kept import Kept
from redoubt.evaluation.suite import Suite, suite
from redoubt.evaluation.verdicts import Judge, accuracies, nrr
from redoubt.reporting.figures import curve
from redoubt.runs.files import read_json, write_bytes, write_json
from redoubt.runs.identity import canonical, plain
from redoubt.training.distributed import ranks


@dataclass(frozen=True)
class Source:
    """The net that transfer attacks are crafted on, and what stands for its weights."""

    module: RobustModule
    identity: str


def evaluate(
    module: RobustModule,
    data: ImageData,
    tree: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    weights_id: str,
    folder: Path | None,
    source: Callable[[], Source] | None = None,
    limit: int | None = None,
    device: torch.device,
) -> dict[str, Any]:
    """Attacks a module as the config says, or answers from what is stored.

    Args:
        module: In evaluation; its weights are those to be judged.
        data: Its test split is used.
        tree: Resolved config: ``attack``, ``evaluation``, ``axes``, ``trainer.progress`` are read.
        facts: What results.json says of the run: run, axes, checkpoint, weights, train_seconds.
        weights_id: Stands for the very weights (their file's hash).
        folder: The ``eval`` folder; None stores nothing.
        source: Finds or makes the net of transfer attacks, if the suite has any.
        limit: First so many test examples only.
        device: Where to compute.

    Returns:
        The contents of results.json.
    """
    attack, options = dict(tree["attack"]), tree["evaluation"]
    chosen = suite(attack)
    on = source() if chosen.on_source and source is not None else None
    identities = [facts["checkpoint"], facts["weights"], weights_id, *([on.identity] if on else [])]
    name = evaluation_name(tree, data, identities)
    save = options.get("save")
    if folder is not None and not save and (folder / name / "verdicts.npz").is_file():
        stored = read_json(folder / name / "results.json")
        if stored is not None:  # an audit may have come since
            return {**stored, **_audit(folder, stored, attack)}
    for name_on in chosen.on_source:
        chosen.sections[name_on]["source"] = on.identity if on else None
    images, labels = (t[:limit] for t in data.arrays("test"))
    for key, own in (("num_classes", module.num_classes), ("image_size", module.image_size)):
        if getattr(data, key) != own:
            raise UserError(f"data.{key}={getattr(data, key)}, but the net was made for {own}: leave it as it was")
    common = {
        "chunk": options["chunk"],
        "seed": options["seed"],
        "weights": weights_id,
        "test": data.fingerprint("test"),
        "balanced": data.limit_test is not None,  # then in another order
    }
    kept = Kept(folder / "kept", common, save) if folder is not None else None
    judge = Judge(
        module,
        chosen,
        chunk=int(options["chunk"]),
        seed=int(options["seed"]),
        device=device,
        source=on.module.to(device) if on else None,
        skip_broken=bool(options.get("skip_broken")),
        kept=kept,
        save=save,
        progress=bool(tree["trainer"]["progress"]),
    )
    verdicts = judge(images, labels)
    results = _results(name, chosen, attack, facts, verdicts, judge, weights_id)
    if folder is not None:
        results |= _audit(folder, results, attack)
    if on is not None:
        results["source"] = on.identity
    if folder is not None and ranks()[0] == 0:
        files = {n: judge.file(n).name for n in ("natural", *chosen.attacks)}
        _write(folder / name, results, verdicts, data, labels.numpy(), tree, files)
    return results


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
    """
    images, labels = (t[: int(keys["images"])] for t in data.arrays("test"))
    seed = int(tree["evaluation"]["seed"])
    decisive = canonical(
        {
            "attack": tree["attack"],
            "audit": keys,
            "seed": seed,
            "weights": weights_id,
            "source": source.identity if source else None,
            "test": data.fingerprint("test"),
            "balanced": data.limit_test is not None,
            "n": len(labels),
        }
    )
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
    where = folder / "audit" / f"{facts['checkpoint'] if facts['checkpoint'] in ('last', 'best') else 'file'}-{digest}"
    report = read_json(where / "audit.json")
    if report is None:
        began = time.monotonic()
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
        found = summary(run())
        threat = {"norm": run.norm, "eps": run.eps}
        marks = {"accuracy_over_eps": run.eps, "accuracy_over_iterations": None}
        for name, columns in run.curves.items():
            title = f"{name.replace('_', ' ')}\n{facts['run']}"
            curve(where, name, columns, title=title, mark=marks[name])
        report = {
            **facts,
            "threat": threat,
            "weights_id": weights_id,
            "n": len(labels),
            **found,
            "keys": keys,
            "attack": tree["attack"],
            "seconds": time.monotonic() - began,
        }
        write_json(where / "audit.json", report)
    for path in (folder / "eval").glob("*/results.json"):
        results = read_json(path)
        settings = read_json(path.parent / "attack.json")
        if results is not None and settings is not None and results.get("weights_id") == weights_id:
            write_json(path, {**results, **_audit(folder / "eval", results, settings["attack"])})
    return report, where


def usual_audit() -> dict[str, Any]:
    """The thresholds and efforts of conf/audit.yaml."""
    keys: dict[str, Any] = plain(config.compose([], "audit").audit)
    return keys


def _audit(folder: Path, results: Mapping[str, Any], attack: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json says of audits: those of these weights by this very suite, as conf/audit.yaml has it.

    An audit with other thresholds or less effort is an experiment: it marks nothing.
    """
    usual = canonical({**usual_audit(), "source": None})
    reports = {path.parent.name: read_json(path) for path in sorted((folder.parent / "audit").glob("*/audit.json"))}
    of_these = {
        name: report
        for name, report in reports.items()
        if report is not None
        and report["weights_id"] == results["weights_id"]
        and canonical(report["attack"]) == canonical(attack)
        and canonical({**report["keys"], "source": None}) == usual
        and report["n"] >= min(usual["images"], results["n"])
    }
    failed = sorted({name for report in of_these.values() for name in report["failed"]})
    return {"audited": bool(of_these) and not failed, "audits": list(of_these), "audit_failed": failed}


def evaluation_name(tree: Mapping[str, Any], data: ImageData, weights: list[str]) -> str:
    """``<attack>-<hash>``: the hash is of everything that decides the verdicts."""
    decisive = canonical(
        {
            "attack": tree["attack"],
            "chunk": tree["evaluation"]["chunk"],
            "seed": tree["evaluation"]["seed"],
            "skip_broken": tree["evaluation"].get("skip_broken") or None,
            "rounded": tree["evaluation"].get("save") == "uint8" or None,
            "weights": weights,
            "test": data.fingerprint("test"),
            "limit": data.limit_test,
        }
    )
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
    return f"{tree['axes']['attack']}-{digest}"


def _results(
    name: str,
    chosen: Suite,
    attack: Mapping[str, Any],
    facts: Mapping[str, Any],
    verdicts: Mapping[str, np.ndarray],
    judge: Judge,
    weights_id: str,
) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = dict(accuracies(verdicts))
    for n, outside in judge.outside.items():
        if outside and n in metrics:
            metrics[n]["outside"] = outside
    natural = float(metrics["natural"]["accuracy"])
    groups = {g: float(np.mean([metrics[n]["accuracy"] for n in names])) for g, names in chosen.groups.items()}
    return {
        "run": facts["run"],
        "evaluation": name,
        "axes": facts["axes"],
        "threat": {"norm": attack["norm"], "eps": attack["eps"]},
        "checkpoint": facts["checkpoint"],
        "weights": facts["weights"],
        "n": len(verdicts["natural"]),
        "metrics": metrics,
        **({"groups": groups} if groups else {}),
        "nrr": {k: nrr(natural, float(metrics[k]["accuracy"])) for k in _robust(metrics, chosen)},
        "train_seconds": facts["train_seconds"],
        "eval_seconds": judge.seconds,
        "audited": False,
        "weights_id": weights_id,
    }


def _robust(metrics: Mapping[str, Any], chosen: Suite) -> list[str]:
    """Which accuracies NRR is of: C&W and AutoAttack, as CURE's tables; where neither is there, the strongest attack.

    A corruption is no attack: it has no NRR.
    """
    found = [name for name in ("cw", "autoattack") if name in metrics]
    attacks = [n for n in metrics if n in chosen.attacks and not chosen.groups]
    attacks = attacks or [n for n in metrics if n == "ensemble"]
    return found or ([min(attacks, key=lambda n: metrics[n]["accuracy"])] if attacks else [])


def _write(
    folder: Path,
    results: dict[str, Any],
    verdicts: Mapping[str, np.ndarray],
    data: ImageData,
    labels: np.ndarray,
    tree: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    rows = data.index("test")
    index = np.arange(len(labels)) if rows is None else rows.numpy()[: len(labels)]
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, index=index, label=labels, **verdicts)
    write_bytes(folder / "verdicts.npz", packed.getvalue())
    write_json(
        folder / "attack.json",
        {"attack": tree["attack"], "evaluation": tree["evaluation"], "limit_test": data.limit_test, "kept": files},
    )
    write_json(folder / "results.json", results)  # last: a folder with results is a complete one
