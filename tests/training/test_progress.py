"""What the bar and the lines of a training say: times of any length, and no loss before one is known."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from redoubt.defenses.tally import LOOK_EVERY, Watch
from redoubt.training import progress
from redoubt.units import clock


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"), (59.94, "59.9 s"), (59.97, "1:00 min"), (3599.4, "59:59 min"), (3599.6, "1:00:00"),
        (86399, "23:59:59"), (86400, "24:00:00"), (943 * 3600 + 48 * 60, "943:48:00"), (1e9, "277777:46:40"),
    ],
)  # fmt: skip
def test_a_time_of_any_length(seconds: float, said: str) -> None:
    assert clock(seconds) == said


class Training:
    """A training of steps that take as long as is said, with the losses that a module would have noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, steps: int, epochs: int) -> None:
        self.out, self.now = io.StringIO(), 0.0
        console = Console(file=self.out, force_terminal=terminal, width=200, color_system=None, soft_wrap=True)
        monkeypatch.setattr(progress, "console", console)
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        self.module = SimpleNamespace(steps_done=0, watch=Watch())
        self.trainer: Any = SimpleNamespace(
            num_training_batches=steps, max_epochs=epochs, current_epoch=0, callback_metrics={}
        )
        self.bar = progress.ProgressBar()
        self.bar.on_train_start(self.trainer, self.module)

    def step(self, loss: float, seconds: float) -> str:
        """Takes a step; what was drawn or written."""
        self.now += seconds
        self.module.watch.loss(torch.tensor(loss))
        self.module.steps_done += 1
        self.module.watch.look(self.module.steps_done)
        self.bar.on_train_batch_end(self.trainer, self.module)
        if self.bar.bar is not None:
            self.bar.bar.refresh()
        return self.said()

    def said(self) -> str:
        text = self.out.getvalue()
        self.out.seek(0), self.out.truncate()
        return text


def test_the_time_left_of_a_line_counts_hours_beyond_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, terminal=False, steps=2, epochs=100)
    for _ in range(2):
        training.step(2.5, seconds=3600 * 943 / 198)
    training.bar.on_train_epoch_end(training.trainer, training.module)
    assert training.said().strip() == "epoch 1/100 step 2/200 loss 2.5000 left 943:00:00"


def test_the_bar_has_no_loss_before_the_first_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, terminal=True, steps=50, epochs=1)
    seen = [training.step(0.25, seconds=1) for _ in range(3 * LOOK_EVERY)]
    training.bar.on_train_end(training.trainer, training.module)
    assert "nan" not in "".join(seen)
    first = next(i for i, text in enumerate(seen) if re.search(r"loss 0\.2500", text))
    assert first + 1 == 2 * LOOK_EVERY
    assert all("epoch 1/1" in text and "loss" not in text for text in seen[:first])
