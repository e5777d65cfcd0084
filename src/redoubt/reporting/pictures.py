"""Adversarial examples small enough for a page: clean images once, and what each attack added to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from redoubt.errors import UserError
from redoubt.reporting.collect import Evaluation, Record, standing_of
from redoubt.reporting.table import place

#: Images and attacks that are shown of a run.
IMAGES, ATTACKS = 4, 2


@dataclass(frozen=True)
class Pictures:
    """The first test images and what attacks made of them.

    Args:
        place: The evaluation's suite, threat model, weights and checkpoint.
        labels: True classes by name, [E].
        clean: uint8 [E, 3, H, W].
        predicted: By attack, and for the clean images by ``clean``, what the net says, class names [E].
        adversarial: By attack, uint8 [E, 3, H, W].
    """

    place: str
    labels: list[str]
    clean: np.ndarray
    predicted: dict[str, list[str]]
    adversarial: dict[str, np.ndarray]


def pictures(record: Record) -> Pictures | None:
    """The strongest attacks of the evaluation that stands for the run, of those that kept some; None where none did."""
    left = list(record.evaluations)
    while (evaluation := standing_of(record, left)) is not None:
        examples = _examples(evaluation)
        if examples is not None:
            return examples
        left.remove(evaluation)
    return None


def _examples(evaluation: Evaluation) -> Pictures | None:
    try:
        found = evaluation.examples()
    except UserError:  # a damaged file is no file
        found = None
    if found is None or "clean" not in found:
        return None
    known = [m for m in evaluation.results["metrics"] if m in found and found[m].shape == found["clean"].shape]
    attacks = sorted(known, key=lambda m: evaluation.accuracy(m) or 0.0)[:ATTACKS]
    if not attacks:
        return None
    classes = [str(name) for name in found.get("classes", ())]

    def named(indices: np.ndarray) -> list[str]:
        return [classes[i] if 0 <= i < len(classes) else str(i) for i in indices[:IMAGES].tolist()]

    return Pictures(
        place=place(evaluation.results),
        labels=named(found["label"]),
        clean=found["clean"][:IMAGES],
        predicted={name: named(found[f"{name}/predicted"]) for name in ("clean", *attacks)},
        adversarial={name: found[name][:IMAGES] for name in attacks},
    )
