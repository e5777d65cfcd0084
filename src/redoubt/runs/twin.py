"""The config of another cell beside a cell: the natural model of the same net and data. No torch here."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from redoubt import config
from redoubt.errors import UserError
from redoubt.runs.identity import leaves, plain


def twin_config(cfg: DictConfig, *, defense: str, base: str) -> DictConfig:
    """The resolved config of another cell on the same model, data, limits, split, seed, precision and devices.

    Its epochs, optimizer and schedule come from its own recipe, or from ``natural.*``; never from ``cfg``.
    """
    own = [f"{key}={value}" for key, value in leaves(plain(cfg.natural)).items() if value != "null"]
    choices = [f"{axis}={cfg.axes[axis]}" for axis in ("model", "data", "attack")]
    try:
        twin = config.compose([*choices, f"defense={defense}", f"base={base}", *own])
        twin = _as_the_cell(twin, cfg)
    except UserError as error:
        raise UserError(f"natural.{error}" if own else str(error)) from error
    return twin


def _as_the_cell(twin: DictConfig, cfg: DictConfig) -> DictConfig:
    for key in ("model", "data", "threat", "attack", "validation", "paths", "logger", "runs"):
        OmegaConf.update(twin, key, cfg[key], merge=False)
    for key in ("seed", "compile", "channels_last"):
        twin[key] = cfg[key]
    epochs = twin.trainer.max_epochs
    twin.trainer = {**cfg.trainer, "max_epochs": epochs, "accumulate": 1}
    twin.evaluation = {**cfg.evaluation, "weights": None, "checkpoint": "last", "beside": None}
    return config.resolve(twin)
