"""Evaluations in the store: each has an identity and a folder, and is never computed twice."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redoubt.build import make
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.evaluation.verdicts import accuracies, ensemble, judge, nrr
from redoubt.runs.files import read_json, write_bytes, write_json
from redoubt.runs.identity import canonical
from redoubt.training.distributed import ranks


def evaluate(
    module: RobustModule,
    data: ImageData,
    tree: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    weights_id: str,
    folder: Path | None,
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
        limit: First so many test examples only.
        device: Where to compute.

    Returns:
        The contents of results.json.
    """
    attack = dict(tree["attack"])
    name = evaluation_name(tree, data, [facts["checkpoint"], facts["weights"], weights_id])
    if folder is not None and (folder / name / "verdicts.npz").is_file():
        stored = read_json(folder / name / "results.json")
        if stored is not None:
            return stored
    attacks = {key: make(section, f"attack.attacks.{key}") for key, section in attack["attacks"].items()}
    images, labels = (t[:limit] for t in data.arrays("test"))
    began = time.monotonic()
    verdicts = judge(
        module,
        images,
        labels,
        attacks,
        chunk=int(tree["evaluation"]["chunk"]),
        seed=int(tree["evaluation"]["seed"]),
        device=device,
        progress=bool(tree["trainer"]["progress"]),
    )
    if attack.get("ensemble"):
        verdicts["ensemble"] = ensemble(verdicts)
    results = _results(name, attack, facts, verdicts, time.monotonic() - began)
    if folder is not None and ranks()[0] == 0:
        _write(folder / name, results, verdicts, data, labels.numpy(), tree)
    return results


def evaluation_name(tree: Mapping[str, Any], data: ImageData, weights: list[str]) -> str:
    """``<attack>-<hash>``: the hash is of everything that decides the verdicts."""
    decisive = canonical(
        {
            "attack": tree["attack"],
            "chunk": tree["evaluation"]["chunk"],
            "seed": tree["evaluation"]["seed"],
            "weights": weights,
            "test": data.fingerprint("test"),
            "limit": data.limit_test,
        }
    )
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
    return f"{tree['axes']['attack']}-{digest}"


def _results(
    name: str, attack: Mapping[str, Any], facts: Mapping[str, Any], verdicts: Mapping[str, np.ndarray], seconds: float
) -> dict[str, Any]:
    metrics = accuracies(verdicts)
    natural = float(metrics["natural"]["accuracy"])
    return {
        "run": facts["run"],
        "evaluation": name,
        "axes": facts["axes"],
        "threat": {"norm": attack["norm"], "eps": attack["eps"]},
        "checkpoint": facts["checkpoint"],
        "weights": facts["weights"],
        "n": len(verdicts["natural"]),
        "metrics": metrics,
        "nrr": {k: nrr(natural, float(metrics[k]["accuracy"])) for k in _robust(metrics)},
        "train_seconds": facts["train_seconds"],
        "eval_seconds": seconds,
        "audited": False,
    }


def _robust(metrics: Mapping[str, Any]) -> list[str]:
    """Which accuracies NRR is of: C&W and AutoAttack, as CURE's tables; where neither is there, the last attack."""
    attacks = [name for name in metrics if name not in ("natural", "ensemble")]
    return [name for name in ("cw", "autoattack") if name in metrics] or attacks[-1:]


def _write(
    folder: Path,
    results: dict[str, Any],
    verdicts: Mapping[str, np.ndarray],
    data: ImageData,
    labels: np.ndarray,
    tree: Mapping[str, Any],
) -> None:
    rows = data.index("test")
    index = np.arange(len(labels)) if rows is None else rows.numpy()[: len(labels)]
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, index=index, label=labels, **verdicts)
    write_bytes(folder / "verdicts.npz", packed.getvalue())
    write_json(folder / "attack.json", {"attack": tree["attack"], "evaluation": tree["evaluation"]})
    write_json(folder / "results.json", results)  # last: a folder with results is a complete one
