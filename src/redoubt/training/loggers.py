"""Loggers beside metrics.csv: each optional, none ever asks or waits."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from redoubt.errors import UserError


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"logger={package} needs an extra: pip install 'redoubt[{package}]'")


def tensorboard_logger(*, folder: Path, name: str, config: dict[str, Any]) -> Any:
    """Event files in the run's folder."""
    _needs("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=str(folder), name="", version="tensorboard")


def wandb_logger(
    *, folder: Path, name: str, config: dict[str, Any], project: str = "redoubt", offline: bool | None = None
) -> Any:
    """A W&B run named like ours; offline unless an API key is set, without code or command line.

    Args:
        folder: The run's folder; offline files go there.
        name: The run's name.
        config: Resolved config, free of secrets.
        project: W&B's project.
        offline: None: offline unless ``WANDB_API_KEY`` is set.
    """
    _needs("wandb")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DISABLE_CODE", "true")
    from lightning.pytorch.loggers import WandbLogger

    if offline is None:
        offline = not os.environ.get("WANDB_API_KEY")
    logger = WandbLogger(
        project=project, name=name, id=name.replace("/", "-"), save_dir=str(folder), offline=offline,
        save_code=False, log_model=False, resume="allow" if not offline else None,
    )  # fmt: skip
    logger.experiment.config.update(config, allow_val_change=True)
    return logger
