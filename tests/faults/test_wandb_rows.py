"""A run that is killed and started again has each epoch once, in metrics.csv and in W&B."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_kills import SMALL, armed
from tests.processes import start
from tests.reporting.test_wandb import segments
from tests.test_cli import only_run

from redoubt.runs.files import read_rows
from redoubt.runs.store import Run

pytest.importorskip("wandb")


SENT = [
    *(word for word in SMALL if not word.startswith("attack")), "attack=none", "trainer.max_epochs=4", "logger=wandb",
    "logger.offline=true",
]  # fmt: skip


def rows(run: Run) -> list[dict[str, Any]]:
    return [row for part in segments(run) for row in part.history if "lr" in row]


@pytest.mark.slow
@pytest.mark.fault("SIGKILL or full disk while W&B listens", "survived")
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("place", ["save", "write"])
def test_rows_in_wandb_are_those_of_metrics_csv(tmp_path: Path, whole: dict[str, int], place: str, share: float):
    """A kill loses rows that W&B has not written yet: they follow from metrics.csv."""
    full = place == "write"
    before = armed(tmp_path, {place: int(share * whole[place])}, full)
    assert start(tmp_path, *SENT, before=before).end().code == (2 if full else -9)
    run = only_run(tmp_path)
    assert not full or len(rows(run)) == int(4 * share)
    start(tmp_path, *SENT).end().good()
    told, kept = rows(run), read_rows(run.metrics_file)
    assert [int(row["epoch"]) for row in told] == [int(row["epoch"]) for row in kept] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in told] == pytest.approx([float(row["train/loss"]) for row in kept])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The moments of an uninterrupted command."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, *SENT, before=armed(folder, {})).end().good()
    return dict(json.loads((folder / "counts.json").read_text()))
