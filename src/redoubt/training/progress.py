"""A bar on a terminal, which never waits for the device; a line per epoch elsewhere."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from redoubt.training.distributed import ranks
from redoubt.units import clock

console = Console(stderr=True, soft_wrap=True)

_ACCURACY = re.compile(r"/(clean|pgd\d+)$")


def _progress(**options: Any) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[notes]}"), console=console, **options,
    )  # fmt: skip


def _loss(module: Any) -> str:
    """The latest loss that was read off the device; nothing before the first."""
    return "" if math.isnan(module.watch.shown) else f"loss {module.watch.shown:.4f}"


class ProgressBar(Callback):
    """Steps of the whole run with the latest loss seen, accuracies of the last epoch and the time left."""

    def __init__(self, *, enabled: bool = True, title: str = "training") -> None:
        self.enabled, self.title = enabled, title
        self.bar: Progress | None = None
        self.accuracies = ""
        self._drawn = 0.0
        self._began, self._first = time.monotonic(), 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if ranks()[0] != 0 or not self.enabled:
            self.enabled = False
            return
        self._began, self._first = time.monotonic(), pl_module.steps_done
        self.total = int(trainer.num_training_batches) * int(trainer.max_epochs or 1)
        if console.is_terminal:
            self.bar = _progress()
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=pl_module.steps_done, notes="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.bar is None or time.monotonic() - self._drawn < 0.2:
            return
        self._drawn = time.monotonic()
        parts = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", _loss(pl_module), self.accuracies]
        self.bar.update(self.task, completed=pl_module.steps_done, notes=" ".join(filter(None, parts)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.accuracies = " ".join(f"{k} {100 * v:.1f}%" for k, v in metrics.items() if _ACCURACY.search(k))
        if not self.enabled or self.bar is not None:
            return
        done = pl_module.steps_done
        pl_module.watch.look(done, now=True)  # the module does so too, next
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} step {done}/{self.total}"
        parts = [epoch, _loss(pl_module), self.accuracies, f"left {clock((self.total - done) / max(rate, 1e-9))}"]
        console.print(" ".join(filter(None, parts)), highlight=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=pl_module.steps_done)
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Counter:
    """Pieces of an evaluation with the accuracies so far: a bar on a terminal, a line each half minute elsewhere.

    Args:
        title: What is being done.
        total: How many pieces there are.
        enabled: Whether to show anything.
    """

    def __init__(self, title: str, total: int, *, enabled: bool = True, every: float = 30.0) -> None:
        self.title, self.total, self.every = title, total, every
        self.done, self.right, self.doing = 0, dict[str, tuple[int, int]](), ""
        self.bar: Progress | None = None
        self.enabled, self._last = enabled, time.monotonic()

    def __enter__(self) -> Counter:
        if self.enabled and console.is_terminal:
            self.bar = _progress(transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, notes="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def note(self, doing: str) -> None:
        """What is being done within the piece."""
        self.doing = doing
        self._show()

    def advance(self, right: Mapping[str, np.ndarray] | None = None) -> None:
        """One piece is done; ``right``: which of its examples are right, by attack."""
        self.done += 1
        for name, flags in (right or {}).items():
            count, n = self.right.get(name, (0, 0))
            self.right[name] = count + int(flags.sum()), n + len(flags)
        self.doing = ""
        self._show()

    def _show(self) -> None:
        if not self.enabled:
            return
        shown = list(self.right.items())[:6]
        notes = " ".join([*(f"{name} {100 * count / n:.1f}%" for name, (count, n) in shown), self.doing])
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, notes=notes)
        elif time.monotonic() - self._last > self.every:
            self._last = time.monotonic()
            console.print(f"{self.title} {self.done}/{self.total} {notes}", highlight=False)
