"""Saved adversarial examples classified anew: a verdict must not hang on the batch or the threads it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.evaluation.kept import examples_file
from redoubt.evaluation.suite import suite
from redoubt.evaluation.verdicts import SLACK, correct, distances, full_precision, logits_of
from redoubt.nets import attack_mode
from redoubt.runs.files import read_arrays, read_json, write_json
from redoubt.training.progress import Counter

#: Verdicts whose two largest logits are closer than this may differ from one order of additions to another.
CLOSE = 1e-4


def rescore(
    module: RobustModule, data: ImageData, folder: Path, *, batch: int, device: torch.device, progress: bool = True
) -> dict[str, Any]:
    """Classifies an evaluation's saved examples and measures their distance to the images, in float64.

    Args:
        module: With the weights that were evaluated.
        data: Whose test examples they were, with the same limit.
        folder: Of the evaluation: ``attack.json``, ``verdicts.npz``.
        batch: Examples classified together.
        device: Where to compute.
        progress: Show how far it is.

    Returns:
        By attack: ``n``, ``changed`` (indices of verdicts that differ though their two top logits differ by more than
        ``CLOSE``), ``close`` (indices of those that differ and are closer), ``distance`` (the largest) and ``eps``;
        written to ``rescored.json`` too.

    Raises:
        UserError: The evaluation kept no examples, or they are not of these test images.
    """
    record = read_json(folder / "attack.json") or {}
    if not record.get("evaluation", {}).get("save"):
        raise UserError(f"{folder} kept no adversarial examples: evaluate with evaluation.save=float32 or uint8 first")
    verdicts = read_arrays(folder / "verdicts.npz")
    images, labels = data.test_for(module.classes)
    n, chunk = len(verdicts["label"]), int(record["evaluation"]["chunk"])
    if len(labels) < n or not np.array_equal(labels[:n].numpy(), verdicts["label"]):
        raise UserError(f"{folder} is of other test images than these: give the same data, data.limit_test={n}")
    raw = "members" not in (read_json(folder / "results.json") or {})  # of version 0.1.0: not as they are counted
    chosen = suite(record["attack"])
    found: dict[str, Any] = {}
    with Counter("rescoring", len(chosen.attacks), enabled=progress) as counter, full_precision(), attack_mode(module):
        for name, attack in chosen.attacks.items():
            kept = folder.parent / "kept" / Path(record["kept"][name]).name
            files = [examples_file(kept, i, min(chunk, n - start)) for i, start in enumerate(range(0, n, chunk))]
            missing = [file for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{missing[0]} is missing: evaluate again with evaluation.save")
            examples = np.concatenate([read_arrays(file) for file in files])
            right, gaps, distance = [], [], 0.0
            for start in range(0, n, batch):
                adv = torch.from_numpy(examples[start : start + batch]).to(device)
                adv = adv.float() / 255 if adv.dtype == torch.uint8 else adv
                x = images[start : start + len(adv)].to(device).float() / 255
                if not bool(((adv >= 0) & (adv <= 1)).all()):
                    raise UserError(f"{kept}: pixels outside [0, 1]")
                distance = max(distance, float(distances(adv, x, attack.norm).max()))
                with torch.no_grad():
                    z = logits_of(module, adv).double()
                top = z.topk(2, dim=1).values
                gaps.append((top[:, 0] - top[:, 1]).cpu().numpy())
                right.append(correct(z.cpu(), labels[start : start + len(adv)]).numpy())
            again = np.concatenate(right)
            differ = (again if raw or attack.group else again & verdicts["natural"]) != verdicts[name]
            near = np.concatenate(gaps) <= CLOSE
            index = verdicts["index"]
            found[name] = {
                "n": n,
                "changed": index[differ & ~near].tolist(),
                "close": index[differ & near].tolist(),
                "distance": distance,
                "eps": attack.eps,
            }
            counter.advance()
    write_json(folder / "rescored.json", {"batch": batch, "threads": torch.get_num_threads(), "attacks": found})
    return found


def objections(found: Mapping[str, Any]) -> list[str]:
    """What is wrong with rescored examples, one line each."""
    lines = []
    for name, entry in found.items():
        if entry["changed"]:
            lines.append(f"{name}: {len(entry['changed'])} verdicts changed, of test images {entry['changed'][:10]}")
        if entry["eps"] is not None and entry["distance"] > entry["eps"] + SLACK:
            lines.append(f"{name}: an image is {entry['distance']:.6g} away, eps is {entry['eps']:.6g}")
    return lines
