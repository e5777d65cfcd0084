"""The whole runs whose numbers are stored and compared: every defense x base, and what else changes a step.

They go through the command line and are read from the files of the run, so that they outlive any change of the code.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tests.test_matrix import BASES, DEFENSES, allowed, default_base

STORED = Path(__file__).parent

#: Four epochs of one step each, so that each row of metrics.csv is a step; and an attack of two steps. At a higher rate
#: or eps, rounding, which the signs of small gradients magnify, would reach the third digit on another kind of machine.
SMALL = (
    "model=resnet_small", "model.widths=[4,4,8,8]", "data=digits", "data.image_size=8", "data.limit_train=128",
    "data.balanced=true", "data.limit_test=100", "data.batch_size=128", "data.probe=50", "data.augment=crop_flip",
    "trainer=cpu",
    "trainer.max_epochs=4", "trainer.progress=false", "inner.steps=2", "validation.steps=1", "validation.step=1",
    "natural.trainer.max_epochs=1", "attack=pgd", "attack.steps=2", "model.normalize=true", "optimizer.lr=0.002",
    "threat.eps=0.03",
)  # fmt: skip

#: What a defense needs to be small, or to do within four steps all that it does.
OWN = {"fsr": ("defense.hidden=4",), "afd": ("optimizer.lr=0.0001",), "cure": ("defense.rate=0.5", "defense.decay=0.5")}

#: TRADES begins where its inner loss has no gradient but what rounding leaves, and takes its sign: begin further away.
BASE = {"trades": ("inner.sigma=0.05",)}

OPTIONS = {
    "awp": ("awp.rho=0.01",),
    "ema": ("ema=wa", "ema.decay=0.5"),
    "label smoothing": ("label_smoothing=0.1",),
    "accumulate": ("trainer.accumulate=2",),
    "bf16": ("trainer.precision=bf16-mixed",),
    # In a store of its own: a natural run that two ranks have trained is not that of one process.
    "two ranks": ("trainer=ddp_cpu", "trainer.devices=2", "paths.outputs=outputs/two-ranks"),
}


def cells() -> Iterator[tuple[str, str, bool]]:
    """Yield (defense, cell, whether it is quick): every base of each defense, and each option on its default base."""
    for number, defense in enumerate(DEFENSES):
        for base in BASES:
            if base in allowed(defense):
                yield defense, base, True
        for place, option in enumerate(OPTIONS):
            yield defense, f"{default_base(defense)}, {option}", place % len(DEFENSES) == number


def words(defense: str, cell: str) -> list[str]:
    """The words of the command line."""
    base, _, option = cell.partition(", ")
    more = (*OWN.get(defense, ()), *BASE.get(base, ()), *OPTIONS.get(option, ()))
    return [*SMALL, f"defense={defense}", f"base={base}", *more]


def runs_here(cell: str) -> bool:
    """Whether this processor has what a cell needs; redoubt refuses bfloat16 where it would be emulated."""
    return not cell.endswith("bf16") or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def machine() -> dict[str, str]:
    """The kind of machine: where it is another one, the last bits may differ."""
    info = Path("/proc/cpuinfo")
    known = (
        dict(re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", info.read_text(), re.M)) if info.exists() else {}
    )
    named = " ".join(known[key] for key in ("vendor_id", "cpu family", "model") if key in known)
    return {
        "processor": named or platform.processor() or platform.machine(),
        "instructions": " ".join(
            [
                torch.backends.cpu.get_cpu_capability(),
                *(os.environ[n] for n in ("ONEDNN_MAX_CPU_ISA",) if n in os.environ),
            ]
        ),
        "torch": torch.__version__.split("+")[0],
    }


def folder_of(out: str, where: Path) -> Path:
    """The run's folder, as the command told it."""
    return where / re.findall(r"^run: (.*)$", out, re.M)[-1]


def rows(run: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.csv, but for what depends on the clock."""
    with (run / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def numbers(run: Path) -> dict[str, Any]:
    """The rows of a run's metrics.csv and the accuracies of its one evaluation."""
    (results,) = (json.loads(file.read_text()) for file in run.glob("eval/*/results.json"))
    return {"steps": rows(run), "evaluation": {name: found["accuracy"] for name, found in results["metrics"].items()}}


def tensors(tree: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested containers, copied, by their path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree.detach().cpu().clone()}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found: dict[str, torch.Tensor] = {}
    for key, value in pairs:
        found |= tensors(value, f"{name}.{key}" if name else str(key))
    return found


def saved(run: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers and averages of a run's last checkpoint."""
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return tensors({key: last[key] for key in ("state_dict", "redoubt")})


def stored(defense: str) -> dict[str, Any]:
    """What was stored: {"machine": ..., "cells": {cell: numbers}}; a cell of another machine says so itself."""
    file = STORED / f"{defense}.json"
    return json.loads(file.read_text()) if file.exists() else {"machine": {}, "cells": {}}


def moved(found: dict[str, Any], before: dict[str, Any], relative: float, elsewhere: bool) -> Iterator[str]:
    """Yield each number that differs by more than ``relative``, by step and name, as a line.

    Args:
        found, before: See `numbers`.
        relative: Of the number, or, where it is less than 1, absolute.
        elsewhere: Whether another kind of machine gave the one: then only losses and the evaluation are looked at, and
            an accuracy may differ by one of the hundred test images. Norms and shares of updated weights may not be
            compared there: the sign of a gradient that is nearly zero is a matter of rounding.
    """
    if len(found["steps"]) != len(before["steps"]):
        yield f"{len(found['steps'])} steps where {len(before['steps'])} were"
    pairs = [(f"step {i}", *both) for i, both in enumerate(zip(found["steps"], before["steps"], strict=False), 1)]
    for place, new, old in [*pairs, ("evaluation", found["evaluation"], before["evaluation"])]:
        for name in dict.fromkeys([*old, *new]):
            if elsewhere and place != "evaluation" and not is_loss(name):
                continue
            a, b = new.get(name), old.get(name)
            near = 0.0101 if elsewhere and place == "evaluation" else relative * max(1.0, abs(b or 0.0))
            if a is None or b is None or not (abs(a - b) <= near or (math.isnan(a) and math.isnan(b))):
                yield f"{place}, {name}: {b} -> {a}"


def is_loss(name: str) -> bool:
    """Whether a column of metrics.csv is a loss or one of its terms."""
    return re.fullmatch(r"train/\w+", name) is not None and name not in ("train/grad_norm", "train/accuracy_adv")
