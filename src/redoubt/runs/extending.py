"""``extend=<run>``: a run that goes on for more epochs from where a finished one ended; the run nearest to a new one.

What becomes of schedule, averages and step counter is in ``docs/extending.md``.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from redoubt import config
from redoubt.beforehand import origin_of
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.errors import UserError, shown
from redoubt.runs.checkpoints import read_checkpoint, write_checkpoint
from redoubt.runs.identity import WITHOUT, deciding, differences, leaves, plain
from redoubt.runs.loading import same_config
from redoubt.runs.store import Run, Store
from redoubt.secrets import HIDDEN, redacted

#: Where weights, optimizer and step counter of a run would not be those of the longer one.
FIXED = ("model", "data", "defense._target_", "optimizer._target_", "trainer.precision")
#: Groups whose option, where it is said, replaces the origin's section.
_SECTIONS = ("threat", "inner", "ema", "optimizer", "schedule", "evaluation")
#: Of this command in any case, be they said or not.
_HERE = (
    "paths", "plan", "runs", "sweep", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.progress", "trainer.fast_dev_run", "trainer.checkpoint_every",
)  # fmt: skip
#: Keys that a near run may differ in, and how many runs are looked at.
_FEW, _LOOKED_AT = 4, 50


def extended(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The resolved config of a run that extends another: the origin's, with what the command line says.

    Args:
        cfg: As composed, with ``extend``.
        overrides: The words of the command line.

    Raises:
        UserError: No such run, an unfinished one, or words that make it another cell.
    """
    origin = origin_of(cfg)
    stored = origin.config()
    axes = {axis: str(stored["axes"][axis]) for axis in config.AXES}
    said = {word.lstrip("+~").split("=", 1)[0] for word in overrides}
    threat = [f"threat.{key}={stored['threat'][key]}" for key in ("norm", "eps")]
    words = [f"{axis}={axes[axis]}" for axis in axes if axis not in said and "experiment" not in said]
    before = config.compose([f"{axis}={axes[axis]}" for axis in axes] + threat)
    known = [] if "threat" in said else [word for word in threat if word.split("=")[0] not in said]
    now = config.compose([*words, *known, *overrides])
    for axis in config.AXES[:-1]:
        if str(now.axes[axis]) != axes[axis]:
            raise UserError(
                f"extend={origin.name}: {axis}={now.axes[axis]}, but that run's is {axes[axis]}: leave {axis} out; "
                "another cell begins from its weights by defense.pretrained"
            )
    old, new = (leaves(plain(config.resolve(c))) for c in (before, now))
    changed = {key for key in new if new[key] != old.get(key) and key.split(".")[0] not in ("axes", "attack", "logger")}
    found, resolved = OmegaConf.create(stored), config.resolve(now)
    sections = {*_HERE, *(key for key in _SECTIONS if key in said)}
    if any(key.split(".")[0] in ("attack", "threat") for key in said):
        sections.add("attack")
    if any(key.split(".")[0] == "logger" for key in said) or HIDDEN in str(stored["logger"]):
        sections.add("logger")
    for key in sorted(sections) + sorted(changed | {key for key in said if "." in key}):
        if (value := OmegaConf.select(resolved, key)) is not None or key in changed or key in sections:
            OmegaConf.update(found, key, value, merge=False, force_add=True)
    found.axes.attack = now.axes.attack
    found.extend = origin.name
    return config.resolve(found)


@dataclass(frozen=True)
class Origin:
    """A finished run that another one extends.

    Args:
        run: The run.
        epochs: How many it was trained.
        differs: Keys of the config that the longer run has otherwise.
    """

    run: Run
    epochs: int
    differs: Mapping[str, tuple[str, str]]

    @staticmethod
    def of(cfg: DictConfig) -> Origin | None:
        """What a config that `extended` gave goes on from; None where it begins by itself.

        Raises:
            UserError: Their weights, optimizers or steps would not be of one kind, or no epoch is left.
        """
        if cfg.get("extend") is None:
            return None
        run = origin_of(cfg)
        differs = _differing(cfg, run)
        wrong = [key for key in differs if any(f"{key}.".startswith(f"{fixed}.") for fixed in FIXED)]
        if wrong:
            raise UserError(
                f"extend={run.name}: {_said(wrong, differs)}: leave it as it was; another net, other images or another "
                "optimizer begin from a run's weights by defense.pretrained"
            )
        epochs = int(run.config()["trainer"]["max_epochs"])
        if int(cfg.trainer.max_epochs) <= epochs:
            raise UserError(
                f"extend={run.name}: it has {epochs} epochs already: give trainer.max_epochs, the epochs of both "
                f"together, as {2 * epochs}"
            )
        return Origin(run, epochs, differs)

    def __str__(self) -> str:
        keys = _said(self.differs, self.differs)
        return f"extend: goes on from {self.run.name} after its {self.epochs} epochs; differs in {keys}"

    def content(self, module: RobustModule, data: ImageData, world: int) -> dict[str, Any]:
        """What the longer run goes on from: the origin's last checkpoint, with the settings of its own optimizers.

        Args:
            module: As the longer run begins.
            data: Its data.
            world: Number of processes.

        Raises:
            UserError: The optimizer's state was not kept, or it was trained on other images or steps.
        """
        content = read_checkpoint(self.run.last)
        same_config(self.run, content, self.run.last)
        if not content.get("optimizer_states") or "loops" not in content:
            raise UserError(
                f"extend={self.run.name}: its optimizer's state was not kept (runs.keep=weights): begin from its "
                f"weights, by defense.pretrained={self.run.name}"
            )
        if content["run"]["decides"]["data"] != data.fingerprint("train"):
            raise UserError(f"extend={self.run.name}: was trained on other images: put these where it had them")
        steps, done = data.steps_per_epoch(world) * self.epochs, content["redoubt"]["steps_done"]
        if done != steps:
            raise UserError(
                f"extend={self.run.name}: its {self.epochs} epochs had {done} steps, these would have {steps}: take as "
                "many devices as it had"
            )
        fresh = [optimizer.state_dict()["param_groups"] for optimizer in module.configure_optimizers()]
        states = content["optimizer_states"]
        sizes = [[[len(group["params"]) for group in groups] for groups in found] for found in (
            fresh, [state["param_groups"] for state in states])]  # fmt: skip
        if sizes[0] != sizes[1]:
            raise UserError(
                f"extend={self.run.name}: its optimizers have other parameters: leave the keys of defense and "
                "optimizer as they were"
            )
        content["optimizer_states"] = [
            {"state": state["state"], "param_groups": groups} for state, groups in zip(states, fresh, strict=True)
        ]
        ours = content["redoubt"]
        if module.ema is not None and ours["ema"] is None:  # it begins as a copy of the weights
            state = content["state_dict"]
            ours["ema"] = {k: state.get(f"net.{k}", tensor) for k, tensor in module.ema.average.items()}
        return content

    def write(self, run: Run, content: dict[str, Any], facts: Mapping[str, Any]) -> None:
        """Gives the longer run the checkpoints that it goes on from; for whoever holds its lock.

        Args:
            run: The longer run.
            content: What `content` gave.
            facts: What each checkpoint says of the longer run.
        """
        content["run"] = dict(facts)
        alike = not any(key.startswith(("validation.", "evaluation.")) for key in self.differs)
        if alike and self.run.best.is_file():
            best = read_checkpoint(self.run.best)
            write_checkpoint({**best, "run": dict(facts)}, run.best)
        for state in content["callbacks"].values():
            if "best_score" in state and not (alike and self.run.best.is_file()):
                state["best_score"] = None  # measured otherwise, or its checkpoint is gone
        write_checkpoint(content, run.last)
        run.update(epoch=self.epochs)


def nearest(store: Store, run: Run, cfg: DictConfig) -> str | None:
    """What a run that is about to be made has beside it: the run that differs in the fewest keys, if these are few."""
    folders = sorted(Path(p) for p in glob.glob(f"{glob.escape(str(store.folder / run.readable))}-*"))
    found = []
    for other in map(Run, folders[-_LOOKED_AT:]):
        if other.readable == run.readable and other.name != run.name and other.whole:
            try:
                differs = _differing(cfg, other)
            except UserError:  # of a stranger's
                continue
            if len(differs) <= _FEW:
                found.append((len(differs), other.name, other, differs))
    if not found:
        return None
    _, _, other, differs = min(found, key=lambda entry: entry[:2])
    if not differs:
        return f"{run.name} starts anew: {other.name} has the same config, but other images, start or version"
    line = f"{run.name} starts anew: {other.name} is the nearest, and differs in {_said(differs, differs)}"
    theirs = (other.config().get("trainer") or {}).get("max_epochs") or 0
    fixed = any(f"{key}.".startswith(f"{f}.") for key in differs for f in FIXED)
    if other.finished and int(cfg.trainer.max_epochs) > int(theirs) and not fixed:
        line += f"; extend={other.name} would go on from it"
    return line


def _differing(cfg: DictConfig, run: Run) -> dict[str, tuple[str, str]]:
    """Keys that decide weights and that a config has otherwise than a run, with both values, the run's first."""
    theirs, own = deciding(run.config(), excluded=WITHOUT), deciding(redacted(plain(cfg)), excluded=WITHOUT)
    before, after = leaves(theirs), leaves(own)
    return {key: (before.get(key, "null"), after.get(key, "null")) for key in differences(theirs, own)}


def _said(keys: Sequence[str] | Mapping[str, Any], values: Mapping[str, tuple[str, str]]) -> str:
    """``optimizer.lr (0.1 there, 0.01 here)``."""

    def short(text: str) -> str:
        return shown(text)[1:-1] if len(text) > 40 else text.removesuffix(".0")

    few = [f"{key} ({short(values[key][0])} there, {short(values[key][1])} here)" for key in keys][:6]
    return ", ".join(few) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
