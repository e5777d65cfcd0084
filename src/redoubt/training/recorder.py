"""What a run writes while it trains: metrics.csv, checkpoints, status."""

from __future__ import annotations

import csv
import io
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from redoubt import deadline
from redoubt.runs.files import write_text
from redoubt.runs.store import Run
from redoubt.training.distributed import Agreement, ranks


class Stopped(SystemExit):
    """The run was asked to stop; it saved its place first. The exit code is the signal's."""


class Recorder(Checkpoint):
    """Writes a row of metrics and a checkpoint after every epoch, and a checkpoint when asked to stop.

    Derived from Lightning's ``Checkpoint`` so that it runs after the module's own epoch end.

    Args:
        run: Where to write; None writes nothing (``fast_dev_run``).
        every: Also save a checkpoint every so many steps.
        best: Names of the metrics that choose ``best.ckpt``, the first decides, the next break ties; empty
            where there is no validation split.
        facts: What each checkpoint says of the run: all that decides its weights, and the machine.
    """

    def __init__(
        self,
        run: Run | None,
        *,
        every: int | None = None,
        best: tuple[str, ...] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.every, self.best, self.facts = run, every, best, facts or {}
        self.rows: list[dict[str, Any]] = []  # of metrics.csv, up to the last epoch that was finished
        self.best_score: list[float] | None = None
        self.stop: int | None = None  # the signal that asks for it
        self.agreement = Agreement()
        self.stopping = False
        self._handlers: dict[int, Any] = {}
        self._epoch_began, self._images = time.monotonic(), 0
        self._trained: float | None = None  # when this epoch's steps ended
        self.seconds = 0.0  # of training, over all starts of the run
        self._since = time.monotonic()

    # ---- signals ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: Lightning has installed a handler of its own by now, which would stop inside a validation.
        self._since = time.monotonic()
        if self.run is not None and threading.current_thread() is threading.main_thread():
            for number in self._handlers:
                signal.signal(number, self._asked)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_signals_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        self._handlers = {}

    def _asked(self, number: int, frame: Any) -> None:
        if self.stop is not None:  # asked twice: now
            raise Stopped(128 + number)
        self.stop = number
        self.agreement.asked = True

    # ---- steps and epochs ---------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began, self._images, self._trained = time.monotonic(), 0, None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += batch.total
        due = self.every and pl_module.steps_done % int(self.every) == 0
        self.agreement.asked |= deadline.over()  # where ranks are several, the first alone knows of it
        self.stopping = self.run is not None and self.agreement.stops(pl_module.steps_done)
        if self.run is None or not (due or self.stopping):
            return
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the epoch's end saves, after its metrics; resuming from here would skip them
        # The module's own hook, which looks at the flag, runs after this one.
        pl_module.watch.look(pl_module.steps_done, now=True)
        self.save(trainer, self.run.last)
        self._stop_if_agreed()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        elapsed = (self._trained or time.monotonic()) - self._epoch_began  # without the validation
        rate = self._images / max(elapsed, 1e-9)
        pl_module.log("images_per_second", rate)
        if self.run is None:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        metrics["images_per_second"] = rate
        self._write_row(trainer, pl_module, metrics)
        score = [metrics[name] for name in self.best if name in metrics]
        if score and (self.best_score is None or score > self.best_score):
            self.best_score = score
            self.save(trainer, self.run.best)
        self.save(trainer, self.run.last)
        if ranks()[0] == 0:
            self.run.update(epoch=trainer.current_epoch + 1, train_seconds=self.total_seconds())
        self._stop_if_agreed()

    def _stop_if_agreed(self) -> None:
        # Asked during the validation: a single process stops here, several agree on a step of the next epoch.
        if self.stopping or (self.stop is not None and ranks()[1] == 1):
            raise Stopped(128 + (self.stop or signal.SIGTERM))

    def total_seconds(self) -> float:
        """Seconds of training so far, over all starts of the run."""
        return self.seconds + time.monotonic() - self._since

    def save(self, trainer: Trainer, path: Path) -> None:
        """Writes a checkpoint, see `redoubt.runs.checkpoints`; every rank calls it."""
        trainer.save_checkpoint(path)

    # ---- metrics.csv --------------------------------------------------------------------------------------------

    def _write_row(self, trainer: Trainer, module: Any, metrics: dict[str, float]) -> None:
        row = {"epoch": trainer.current_epoch + 1, "step": module.steps_done, **metrics}
        self.rows.append({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})
        self._write_rows()

    def _write_rows(self) -> None:
        if ranks()[0] != 0 or self.run is None:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.run.metrics_file, text.getvalue())

    # ---- saved with every checkpoint ------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = dict(self.facts)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score, "seconds": self.total_seconds(), "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.seconds = state_dict["best_score"], state_dict["seconds"]
        # metrics.csv may have a row more, of an epoch whose checkpoint was not written any more, or be lost.
        self.rows = list(state_dict["rows"])
        self._write_rows()
