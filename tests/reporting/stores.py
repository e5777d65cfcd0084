"""A store of synthetic runs, with everything that a report reads."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "threat": {"norm": "linf", "eps": 8 / 255},
    "inner": {"_target_": "redoubt.attacks.PGD", "norm": "linf", "eps": 8 / 255, "steps": 10, "step": 0.25},
    "base": {"_target_": "redoubt.objectives.PGDAT", "label_smoothing": 0.0},
    "defense": {"_target_": "redoubt.defenses.FSR", "lambda_sep": 1.0, "lambda_rec": 1.0, "tau": 0.1},
    "model": {"_target_": "redoubt.nets.ResNet18", "num_classes": 10, "mean": [0.49, 0.48, 0.45]},
    "data": {"_target_": "redoubt.data.CIFAR10", "root": "data", "source": "official", "batch_size": 128, "seed": 0},
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005},
    "trainer": {"max_epochs": 100, "precision": "32-true", "devices": 1},
    "paths": {"outputs": "outputs"},
    "axes": {"model": "resnet18", "defense": "fsr", "base": "at", "data": "cifar10", "attack": "fsr_suite"},
    "seed": 0,
}
ATTACKS = ("fgsm", "pgd20", "pgd100", "cw", "autoattack", "ensemble")


def config(**changes: Any) -> dict[str, Any]:
    """A run's config with dotted keys changed (``__`` for the dot); the split follows the seed."""
    tree = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        *path, last = key.split("__")
        place = tree
        for part in path:
            place = place[part]
        place[last] = value
    tree["data"]["seed"] = changes.get("data__seed", tree["seed"])
    return tree


def add_run(
    outputs: Path, tree: Mapping[str, Any], hash: str, rows: Sequence[Mapping[str, Any]] = (), **status: Any
) -> Path:
    """A run's folder with config, status and metrics."""
    axes = tree["axes"]
    name = f"{axes['defense']}-{axes['base']}-{axes['model']}-{axes['data']}-s{tree['seed']}-{hash}"
    folder = outputs / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(tree))
    usual = {"state": "done", "reason": None, "epoch": 100, "max_epochs": 100, "train_seconds": 3725.0}
    (folder / "status.json").write_text(json.dumps({**usual, "started": "2026-01-01T00:00:00+00:00", **status}))
    if rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        lines = [",".join(str(row.get(c, "")) for c in columns) for row in rows]
        (folder / "metrics.csv").write_text("\n".join([",".join(columns), *lines]) + "\n")
    return folder


def nested(rng: np.random.Generator, n: int, attacks: Sequence[str] = ATTACKS) -> dict[str, np.ndarray]:
    """Verdicts as real ones are: each attack breaks what the weaker one broke, and a little more."""
    margin = rng.normal(size=n)
    found = {"natural": margin > -1.2}
    for i, name in enumerate(attacks):
        found[name] = found["natural"] & (margin + 0.05 * rng.normal(size=n) > 0.1 * i - 0.2)
    if "ensemble" in found:
        found["ensemble"] = np.logical_and.reduce(list(found.values()))
    return found


def add_evaluation(
    folder: Path,
    verdicts: Mapping[str, np.ndarray],
    *,
    suite: str = "fsr_suite",
    eps: float | None = 8 / 255,
    hash: str = "0000000000",
    index: np.ndarray | None = None,
    examples: Mapping[str, np.ndarray] | None = None,
    attack: Mapping[str, Any] | None = None,
    **results: Any,
) -> Path:
    """An evaluation of a run with these verdicts."""
    tree = json.loads((folder / "config.yaml").read_text())
    n = len(verdicts["natural"])
    means = {name: float(v.mean()) for name, v in verdicts.items()}
    metrics = {m: {"accuracy": a, "low": max(0, a - 0.01), "high": min(1, a + 0.01), "n": n} for m, a in means.items()}
    path = folder / "eval" / f"{suite}-{hash}"
    path.mkdir(parents=True)
    index = np.arange(n) if index is None else index
    packed = io.BytesIO()
    np.savez(packed, index=index, label=index % 10, **verdicts)
    (path / "verdicts.npz").write_bytes(packed.getvalue())
    if examples is not None:
        np.savez_compressed(path / "examples.npz", **examples)
    settings = {
        "attack": attack or {"norm": "linf", "eps": eps, "attacks": {m: {} for m in verdicts if m != "natural"}}
    }
    (path / "attack.json").write_text(json.dumps(settings))
    found = {
        "run": folder.name, "evaluation": path.name, "axes": {**tree["axes"], "attack": suite, "seed": tree["seed"]},
        "threat": {"norm": "linf", "eps": eps}, "checkpoint": "last", "weights": "student", "n": n, "metrics": metrics,
        "nrr": {"autoattack": 0.6} if "autoattack" in metrics else {}, "train_seconds": 3725.0, "eval_seconds": 61.0,
        "audited": False, "audits": [], "audit_failed": [],
    }  # fmt: skip
    (path / "results.json").write_text(json.dumps({**found, **results}))
    return path


def add_audit(folder: Path, failed: Sequence[str] = ()) -> Path:
    """An audit with two checks and both curves."""
    path = folder / "audit" / "last-1111111111"
    path.mkdir(parents=True)
    checks = [
        {"name": name, "rule": f"what {name} asks", "value": 0.02, "limit": 0.01, "passed": name not in failed}
        for name in ("iterations", "restarts")
    ]
    report = {
        "checkpoint": "last",
        "weights": "student",
        "n": 256,
        "threat": {"norm": "linf", "eps": 8 / 255},
        "failed": list(failed),
        "checks": checks,
    }
    (path / "audit.json").write_text(json.dumps(report))
    (path / "accuracy_over_eps.csv").write_text("eps,accuracy\n0.0,0.9\n0.004,0.8\n0.0314,0.5\n1.0,0.0\n")
    (path / "accuracy_over_iterations.csv").write_text("iterations,accuracy\n1,0.8\n10,0.6\n100,0.5\n")
    return path


def some_examples(attacks: Sequence[str] = ("pgd20", "autoattack"), size: int = 8, n: int = 3) -> dict[str, np.ndarray]:
    """Images whose examples differ by up to 8 of 255, above and below."""
    rng = np.random.default_rng(5)
    clean = rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    found: dict[str, Any] = {
        "index": np.arange(n), "label": np.arange(n), "clean": clean, "clean/predicted": np.arange(n),
        "classes": np.array(["plane", "car", "bird"]),
    }  # fmt: skip
    for i, name in enumerate(attacks):
        moved = clean.astype(int) + rng.integers(-8, 9, clean.shape)
        found |= {name: moved.clip(0, 255).astype(np.uint8), f"{name}/predicted": np.full(n, i)}
    return found


def curve(epochs: int = 20, *, defense: str = "fsr") -> list[dict[str, float]]:
    """Rows of metrics.csv, with what AFD and CURE measure besides."""
    rows = []
    for e in range(1, epochs + 1):
        row = {"epoch": e, "train_probe/clean": 1 - 0.5 / e, "train_probe/pgd10": 0.6 - 0.3 / e, "train/loss": 2 / e}
        if defense == "afd":
            nets = ("student", "teacher", "across")
            row |= {f"train_probe/gap_{n}_{m}": (i + 1) / e for i, n in enumerate(nets) for m in ("linf", "cos")}
        if defense == "cure":
            row |= {f"train/updated/layer{i}.conv": 0.7 + 0.01 * i for i in range(1, 5)}
        rows.append(row)
    return rows
