"""A search's trial while it trains: its values are told to the study, which may end it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from redoubt.runs.store import Run
from redoubt.search import Search
from redoubt.sweeps import Pruned
from redoubt.training.distributed import broadcast, ranks


def pruning(cfg: DictConfig, run: Run | None) -> list[Checkpoint]:
    """The callback of a search's trial, for the processes of a cell that is one."""
    if run is None or cfg.sweep.trial is None:
        return []
    return [Pruning(run, _trial(cfg) if ranks()[0] == 0 else None)]


def _trial(cfg: DictConfig) -> tuple[Search, Any] | None:
    from hydra.core.hydra_config import HydraConfig

    # The storage's URL may hold a password: it comes from Hydra's own config, which no run keeps.
    search = Search(HydraConfig.get().sweeper, cfg.sweep.name, int(cfg.validation.steps))
    if len(search.metrics) > 1:
        return None  # Optuna prunes by one objective only
    study = search.study()
    return search, search.optuna.trial.Trial(study, study.get_trials(deepcopy=False)[cfg.sweep.trial]._trial_id)


class Pruning(Checkpoint):
    """Tells a study the objective after every epoch, and ends the run where the study's pruner says so.

    Derived from Lightning's ``Checkpoint`` so that it runs after the `Recorder`, whose metrics.csv it reads.

    Args:
        run: What is trained.
        trial: The search and the trial; None on the ranks that only obey.
    """

    def __init__(self, run: Run, trial: tuple[Search, Any] | None) -> None:
        self.run, self.trial, self.told = run, trial, 0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every rank comes here, and all of them stop or none."""
        last = trainer.current_epoch + 1 == trainer.max_epochs
        verdict = broadcast(None if last else self._verdict())
        if verdict is not None:
            raise Pruned(verdict)

    def _verdict(self) -> str | None:
        if self.trial is None:
            return None
        search, trial = self.trial
        rows = search.rows(self.run)
        for epoch in range(self.told, len(rows)):  # a run that goes on has earlier ones
            trial.report(rows[epoch][0], epoch + 1)
        self.told = len(rows)
        if not rows or not trial.should_prune():
            return None
        return f"pruned after epoch {len(rows)}: {search.shown(rows[-1])} is behind the other trials"
