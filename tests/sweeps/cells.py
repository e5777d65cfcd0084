"""What the tests of sweeps share: a cell that trains in a blink, and processes that die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tests.processes import start

from redoubt.defenses import RobustModule
from redoubt.runs import running

SMALL = [
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
]  # fmt: skip


def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that are trained from now on."""
    found: list[str] = []
    true = running._fit

    def fit(cfg, data, run, *rest):
        found.append(run.name)
        return true(cfg, data, run, *rest)

    monkeypatch.setattr(running, "_fit", fit)
    return found


def killed(step: int, *argv: str) -> None:
    """Run ``redoubt argv`` here, in a process that gets SIGKILL after so many training steps, over all cells."""
    before = f"from tests.sweeps.cells import die_at; die_at({step})"
    assert start(Path.cwd(), *argv, before=before).end().code == -signal.SIGKILL


def die_at(step: int) -> None:
    true, done = RobustModule.after_step, [0]

    def after_step(self: RobustModule) -> None:
        true(self)
        done[0] += 1
        if done[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RobustModule.after_step = after_step  # type: ignore[method-assign]
