"""A bar on a terminal, a line per epoch elsewhere; neither waits for the device."""

from __future__ import annotations

import re
import time
from typing import Any

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

console = Console(stderr=True, soft_wrap=True)

_ACCURACY = re.compile(r"/(clean|pgd\d+)$")


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
            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[notes]}"), console=console,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total, completed=pl_module.steps_done, notes="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.bar is None or time.monotonic() - self._drawn < 0.2:
            return
        self._drawn = time.monotonic()
        notes = (
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} loss {pl_module.watch.shown:.3f} {self.accuracies}"
        )
        self.bar.update(self.task, completed=pl_module.steps_done, notes=notes)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.accuracies = " ".join(f"{k} {100 * v:.1f}%" for k, v in metrics.items() if _ACCURACY.search(k))
        if not self.enabled or self.bar is not None:
            return
        done = pl_module.steps_done
        rate = (done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((self.total - done) / max(rate, 1e-9)))
        console.print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} step {done}/{self.total} "
            f"loss {pl_module.watch.shown:.4f} {self.accuracies} left {left}",
            highlight=False,
        )

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
