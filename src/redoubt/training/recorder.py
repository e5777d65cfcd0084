"""What a run writes while it trains: metrics.csv, checkpoints, status."""

from __future__ import annotations

import csv
import io
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from redoubt import deadline
from redoubt.runs.files import write_text
from redoubt.runs.store import Run
from redoubt.training.alike import check_weights
from redoubt.training.distributed import gather, ranks, stop_here, watch
from redoubt.training.stopping import Stopped, requests
from redoubt.training.vigil import Verdict


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
        self._deferred = ExitStack()
        self._epoch_began, self._images, self._spent = time.monotonic(), 0, 0.0
        self._trained: float | None = None  # when this epoch's steps ended
        self.seconds = 0.0  # of training, over all starts of the run
        self._since = time.monotonic()

    # ---- signals ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.run is None:
            return
        self._deferred.enter_context(requests.deferred())
        for vigil in watch if ranks()[0] == 0 else ():
            vigil.last_words = self._last_words

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()
        self._epoch_began = self._since - self._spent

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (asked := self._end()) is not None:  # asked after the last look at it: everything is saved
            raise Stopped(128 + asked)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> int | None:
        """The end of the training's time; a request that has not been met."""
        asked = requests.pending
        self._deferred.close()
        for vigil in watch:
            vigil.last_words = None
        return asked

    def _last_words(self, verdict: Verdict) -> None:
        assert self.run is not None
        state = "interrupted" if verdict.kind == "stopped" else "failed"
        self.run.update(state=state, reason=verdict.text)

    # ---- steps and epochs ---------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_began, self._images, self._trained = time.monotonic(), 0, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for vigil in watch:
            vigil.begin(pl_module.steps_done + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for vigil in watch:
            vigil.end()
        self._images += batch.total
        if deadline.over():  # where ranks are several, the first alone knows of it
            requests.hear(signal.SIGTERM)
        if self.run is None or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return  # the epoch's end saves, after its metrics; resuming from here would skip them
        stop = stop_here(pl_module.steps_done, requests.pending)
        if stop is None and not (self.every and pl_module.steps_done % int(self.every) == 0):
            return
        # The module's own hook, which looks at the flag, runs after this one.
        pl_module.watch.look(pl_module.steps_done, now=True)
        self.save(trainer, self.run.last)
        if stop is not None:
            raise Stopped(128 + stop, agreed=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = time.monotonic()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation has left out what came after a request to stop: it is done anew when the run goes on."""
        if self.run is None:
            return
        asked = _anybody(requests.pending)
        if asked is not None:
            _validation_due(trainer)
            self.save(trainer, self.run.last)
            raise Stopped(128 + asked, agreed=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        elapsed = (self._trained or time.monotonic()) - self._epoch_began  # without the validation
        rate = self._images / max(elapsed, 1e-9)
        pl_module.log("images_per_second", rate)
        check_weights(pl_module, trainer.current_epoch + 1)
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
        if (asked := _anybody(requests.pending)) is not None:
            raise Stopped(128 + asked, agreed=True)

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
        spent = [self._images, (self._trained or time.monotonic()) - self._epoch_began]
        return {"best_score": self.best_score, "seconds": self.total_seconds(), "rows": self.rows, "epoch": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score, self.seconds = state_dict["best_score"], state_dict["seconds"]
        # metrics.csv may have a row more, of an epoch whose checkpoint was not written any more, or be lost.
        self.rows = list(state_dict["rows"])
        self._images, self._spent = state_dict["epoch"]
        self._write_rows()


def _anybody(asked: int | None) -> int | None:
    """The signal that any rank was asked by; every rank asks here."""
    told = [int(number) for number in gather(str(asked or 0))]
    return max(told) or None


def _validation_due(trainer: Trainer) -> None:
    """Makes the loops' state that of a validation that has just begun, which Lightning then does anew."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    for counts in (progress.current, progress.total):
        counts.ready = counts.started = 1
        counts.processed = counts.completed = 0
