"""SIGKILL at random moments: the same command again ends as if nothing had happened, bit for bit.

KILLS says how many (``make faults KILLS=200``).
"""

from __future__ import annotations

import functools
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import everything
from tests.faults.killing import PLACES
from tests.processes import ROOT, Command, start
from tests.test_ddp import launched

from redoubt.runs.files import read_rows
from redoubt.runs.store import Run, Store

KILLS = int(os.environ.get("KILLS", 1))

SMALL = [
    "train", "model=resnet_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=16",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=8", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=2", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=pgd20", "attack.attacks.pgd20.start=uniform", "evaluation.chunk=4", "runs.keep=all",
]  # fmt: skip

CELLS = {
    "trades": ["base=trades", "ema=warmup", "schedule=cosine", "trainer.checkpoint_every=3"],
    "fsr": ["defense=fsr", "base=at", "ema=wa", "schedule=constant", "data.augment=crop_flip"],
    "at": ["base=at", "ema=wa", "schedule=multistep", "schedule.milestones=[50]", "schedule.factors=[0.1]"],
    "mart": ["base=mart", "awp.rho=0.01", "awp.warmup=1", "schedule=onecycle", "label_smoothing=0.1"],
    "fsr and trades": [
        "defense=fsr", "base=trades", "schedule=fast", "trainer.accumulate=2", "optimizer.clip=1",
        "data.val_fraction=0.2", "optimizer=adamw",
    ],
    "afd": ["defense=afd", "awp.rho=0.01", "natural.trainer.max_epochs=1", "trainer.checkpoint_every=1"],
    "cure": [
        "defense=cure", "natural.trainer.max_epochs=1", "defense.rate=0.5", "defense.decay_warmup=true", "ema=wa",
        "defense.warmup_epochs=0.5", "trainer.checkpoint_every=2",
    ],
}  # fmt: skip


def armed(folder: Path, at: dict[str, int], full: bool = False) -> str:
    """What a command runs first, to die (or to find the disk full) at a moment; its counts go to ``folder``."""
    return (
        f"import sys; sys.path.append({str(ROOT)!r}); from tests.faults.killing import arm; "
        f"arm({str(folder / 'counts.json')!r}, {at!r}, {full})"
    )


def run(folder: Path, cell: str, at: dict[str, int] | None = None) -> Command:
    return start(folder, *SMALL, *CELLS[cell], before=armed(folder, at or {})).end()


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on kills: weights, averages, optimizers, rows, verdicts, states, files."""
    return {found.readable: _of(found) for found in Store(folder / "outputs").list()}


def _of(found: Run) -> dict[str, Any]:
    files = sorted(p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*") if p.is_file())
    rows = [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_rows(found.metrics_file)]
    return {
        "state": found.status["state"],
        "checkpoints": {p.name: everything(p) for p in (found.last, found.best) if p.is_file()},
        "rows": rows,
        "verdicts": [p.read_bytes() for p in sorted(found.eval.glob("*/verdicts.npz"))],
        "files": [name for name in files if "previous.ckpt" not in name],
    }


@functools.cache
def whole(cell: str) -> tuple[dict[str, int], dict[str, Any]]:
    """The moments of an uninterrupted command, and its outcome."""
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), cell).good()
        return json.loads((Path(folder) / "counts.json").read_text()), outcome(Path(folder))


def drawn(number: int) -> tuple[str, str]:
    """The cell and the place of a kill; all pairs come in turn, two of a cell one after the other."""
    return list(CELLS)[number // 2 % len(CELLS)], PLACES[number % len(PLACES)]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=pytest.mark.fault(f"SIGKILL during {drawn(n)[1]}", "survived"), id=f"{n}-{drawn(n)}")
        for n in range(KILLS)
    ],
)
def test_killed_and_started_again(number: int, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    cell, place = drawn(number)
    counts, expected = whole(cell)
    draw = random.Random(number)
    kills = 0
    for _ in range(draw.choice((1, 1, 2))):  # a second one may come to the end before it is due
        ended = run(tmp_path, cell, {place: draw.randint(1, counts[place])})
        assert ended.code in ((-9,) if not kills else (-9, 0)), ended.out + ended.err
        kills += ended.code == -9
    run(tmp_path, cell).good()
    assert outcome(tmp_path) == expected
    record_property("injected", kills)


@pytest.mark.slow
@pytest.mark.fault("SIGKILL of one of two ranks", "survived")
@pytest.mark.parametrize("number", range(max(1, KILLS // 10)))
def test_a_rank_killed_and_both_started_again(number: int, tmp_path: Path) -> None:
    draw, place = random.Random(number), PLACES[number % 3]  # an evaluation's chunks are few: see above
    argv = [*SMALL, *CELLS[list(CELLS)[number % len(CELLS)]], "trainer=ddp_cpu", "trainer.checkpoint_every=2"]
    alone = tmp_path / "alone"
    for command in launched(alone, *argv, befores=[armed(alone, {}), ""]):
        command.end().good()
    counts = json.loads((alone / "counts.json").read_text())
    victim = 0 if place == "save" else draw.randrange(2)  # the first one writes
    at = {place: draw.randint(1, counts[place] // 2)}
    ended = launched(tmp_path, *argv, befores=[armed(tmp_path, at if rank == victim else {}) for rank in range(2)])
    assert ended[victim].end().code == -9
    assert ended[1 - victim].end(60).code not in (0, -9)
    for told in tmp_path.glob("rank*.*"):
        told.unlink()
    for command in launched(tmp_path, *argv):
        command.end().good()
    assert outcome(tmp_path) == outcome(alone)
