"""Evaluations in the store: each has an identity and a folder, and is never computed twice."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import redoubt
from redoubt.data import ImageData
from redoubt.data.classes import places
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.evaluation import audits
from redoubt.evaluation.kept import Kept, shown_of
from redoubt.evaluation.results import accuracies, nrr, read_results
from redoubt.evaluation.suite import Suite, suite
from redoubt.evaluation.verdicts import Judge
from redoubt.runs.files import write_bytes, write_json
from redoubt.runs.identity import canonical, digest
from redoubt.training.distributed import broadcast, ranks, same


@dataclass(frozen=True)
class Source:
    """The net that transfer attacks are crafted on, and what stands for its weights."""

    module: RobustModule
    identity: str

    def sorted_as(self, judged: RobustModule, data: ImageData) -> Source:
        """The net with its logits in the order of another net's classes.

        Raises:
            UserError: Their classes are not the same.
        """
        own, wanted = (net.classes or data.old_order() for net in (self.module, judged))
        if own is None or wanted is None:
            return self
        columns = places(wanted, own, ("the net", "the one that transfer attacks are crafted on"))
        self.module.columns = columns
        return self if columns is None else replace(self, identity=f"{self.identity} {columns}")


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
    chosen = suite(attack).on_classes(module.num_classes)
    on = source() if chosen.on_source and source is not None else None
    order = data.places(module.classes, facts["run"])
    on = on.sorted_as(module, data) if on is not None else None
    identities = [facts["checkpoint"], facts["weights"], weights_id, *([on.identity] if on else [])]
    name = evaluation_name(tree, data, identities, order, chosen.more_members)
    same({"test set": data.fingerprint("test"), "weights": weights_id, "evaluation": name})
    save = options.get("save")
    if folder is not None and not save:
        stored = read_results(folder / name) if (folder / name / "verdicts.npz").is_file() else None
        stored = broadcast(stored)  # what ranks on other machines see may be older
        if stored is not None:  # an audit may have come since
            subset = {"subset": data.subset} if data.subset else {}  # old ones do not say it
            return {**stored, **subset, **audits.marks(folder, stored, attack)}
    if on is not None:
        chosen = chosen.crafted_on(on.identity)
    images, labels = (t[:limit] for t in data.test_for(module.classes))
    for key, own in (("num_classes", module.num_classes), ("image_size", module.image_size)):
        if canonical({"": getattr(data, key)}) != canonical({"": own}):
            raise UserError(f"data.{key}={getattr(data, key)}, but the net was made for {own}: leave it as it was")
    common = {
        "chunk": options["chunk"],
        "seed": options["seed"],
        "weights": weights_id,
        "test": data.fingerprint("test"),
        "balanced": data.recorded_subset,
        "classes": order,
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
    if data.subset:
        results["subset"] = data.subset
    if folder is not None:
        results |= audits.marks(folder, results, attack)
    if on is not None:
        results["source"] = on.identity
    if folder is not None and ranks()[0] == 0:
        _write(folder / name, results, verdicts, data, labels.numpy(), tree, judge.files, module.classes)
    return results


def evaluation_name(
    tree: Mapping[str, Any],
    data: ImageData,
    weights: list[str],
    order: list[int] | None,
    members: Mapping[str, Any] | None = None,
) -> str:
    """``<attack>-<hash>``: the hash is of everything that decides the verdicts."""
    decisive = {
        "attack": tree["attack"],
        "members": members or None,
        "chunk": tree["evaluation"]["chunk"],
        "seed": tree["evaluation"]["seed"],
        "skip_broken": tree["evaluation"].get("skip_broken") or None,
        "rounded": tree["evaluation"].get("save") == "uint8" or None,
        "weights": weights,
        "test": data.fingerprint("test"),
        "limit": data.limit_test,
        # What is taken in proportion is another set than the class-balanced one of old evaluations.
        "numerics": redoubt.SUBSETS if data.subset == "stratified" else None,
        "classes": order,
    }
    return f"{tree['axes']['attack']}-{digest(decisive)}"


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
        "members": {name: ran for name, ran in chosen.members(judge.module.num_classes).items() if name in metrics},
        "evaluated": datetime.now(UTC).isoformat(),
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
    files: Mapping[str, Path],
    classes: list[str] | None,
) -> None:
    rows = data.index("test")
    index = np.arange(len(labels)) if rows is None else rows.numpy()[: len(labels)]
    _write_arrays(folder / "verdicts.npz", {"index": index, "label": labels, **verdicts})
    _write_examples(folder / "examples.npz", index, labels, files, classes)
    kept = {name: file.name for name, file in files.items()}
    write_json(
        folder / "attack.json",
        {
            "attack": tree["attack"],
            "evaluation": tree["evaluation"],
            "limit_test": data.limit_test,
            **({"subset": data.subset} if data.subset else {}),
            "kept": kept,
        },
    )
    write_json(folder / "results.json", results)  # last: a folder with results is a complete one


def _write_examples(
    path: Path, index: np.ndarray, labels: np.ndarray, files: Mapping[str, Path], classes: list[str] | None
) -> None:
    """What the attacks made of the first few test images, to be looked at; older verdicts have none."""
    arrays: dict[str, np.ndarray] = {}
    for name, file in files.items():
        key = "clean" if name == "natural" else name
        arrays |= {key + end: array for end, array in shown_of(file).items()}
    if "clean" in arrays:
        n = len(arrays["clean"])
        named = {"classes": np.array(classes)} if classes else {}
        _write_arrays(path, {"index": index[:n], "label": labels[:n], **arrays, **named})


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_bytes(path, packed.getvalue())
