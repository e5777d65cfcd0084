"""Loggers beside metrics.csv: each optional, none ever asks, waits for long or ends a training."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from redoubt.build import make
from redoubt.errors import UserError
from redoubt.reporting.collect import Record
from redoubt.reporting.wandb_run import define_curves, open_run, sent_epochs, warn
from redoubt.runs.identity import plain
from redoubt.runs.store import Run
from redoubt.secrets import redacted
from redoubt.training.distributed import ranks


@contextmanager
def opened(cfg: DictConfig, run: Run | None) -> Iterator[list[Any]]:
    """The Lightning loggers that the config asks for, on rank 0; they are closed however the body ends."""
    if run is None or not cfg.logger.get("_target_") or ranks()[0] != 0:
        yield []
        return
    more = {"folder": run.folder, "name": run.name, "config": redacted(plain(cfg))}
    logger = make(plain(cfg.logger), "logger", **more)
    ended = "failed"
    try:
        yield [logger]
        ended = "success"
    finally:
        logger.finalize(ended)


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"logger={package} needs an extra: pip install 'redoubt[{package}]'")


def tensorboard_logger(*, folder: Path, name: str, config: dict[str, Any]) -> Any:
    """Event files in the run's folder."""
    _needs("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard")


class Curves(WandbLogger):
    """Learning curves over ``epoch``, counted from 1 as in metrics.csv.

    Lightning's own would define every metric over its ``trainer/global_step``, which counts optimizers.

    Args:
        sent: Epochs whose rows are there already; a resumed run that repeats one does not send it again.
        options: Of Lightning's logger.
    """

    def __init__(self, *, sent: Iterable[int] = (), **options: Any) -> None:
        super().__init__(**options)
        self.sent = set(sent)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One row for an epoch: the validation's metrics come first, then the training's. A failure is a warning."""
        try:
            epoch = int(metrics["epoch"]) + 1
            if epoch in self.sent:
                return
            self.experiment.log({**metrics, "epoch": epoch}, step=epoch, commit="lr" in metrics)
        except Exception as error:
            warn(error, "metrics.csv has the row")

    def finalize(self, status: str) -> None:
        """Ends the W&B run, so that the next job of the process begins one of its own; again does nothing."""
        try:
            self.experiment.finish(exit_code=0 if status == "success" else 1)
        except Exception as error:
            warn(error, "`wandb sync` can send what was written")


def wandb_logger(
    *,
    folder: Path,
    name: str,
    config: dict[str, Any],
    project: str = "redoubt",
    entity: str | None = None,
    offline: bool | None = None,
    checkpoint: bool = False,
) -> Any:
    """The W&B run that stands for ours; see `redoubt.reporting.wandb_run.open_run`.

    Args:
        folder: The run's folder; W&B's files go to ``wandb/`` in it.
        name: The run's name.
        config: Resolved config, free of secrets.
        project, entity: Where to on the server.
        offline: None: offline unless somebody is logged in or ``WANDB_MODE`` says otherwise.
        checkpoint: Read by `redoubt.reporting.wandb_log`: the evaluated checkpoint becomes an artifact.
    """
    _needs("wandb")
    sent: set[int] = set()
    try:
        sent = sent_epochs(folder)
    except Exception as error:  # of W&B's own program, or of what it says
        warn(error, "rows that it has may come again")
    run = open_run(folder, config, project=project, entity=entity, offline=offline)
    define_curves(run, config)
    for row in Record(Run(folder)).metrics:
        if int(row["epoch"]) not in sent:
            run.log(row, step=int(row["epoch"]))
            sent.add(int(row["epoch"]))
    return Curves(experiment=run, save_dir=folder, sent=sent)
