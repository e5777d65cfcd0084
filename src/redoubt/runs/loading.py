"""A trained net back from its run or its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from redoubt.build import build_module
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.runs.store import Run, Store


def load(
    source: str | Path | Run,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    outputs: str | Path = "outputs",
) -> RobustModule:
    """The module of a run, in evaluation mode on the CPU.

    Args:
        source: A run, its folder or name, or one of its checkpoint files.
        checkpoint: ``last`` or ``best``, where ``source`` is a run.
        weights: ``student`` or ``ema``; what the run's config evaluates where None.
        outputs: The store in which names are looked up.

    Raises:
        UserError: No such run or file, or a file of another net.
    """
    if isinstance(source, (str, Path)) and Path(source).is_file():
        file = Path(source)
        run = Run(file.resolve().parent.parent)
        if not run.exists():
            raise UserError(
                f"{file} lies in no run's folder: give eval.py checkpoint={file} with model=... and data=... instead"
            )
    else:
        run = source if isinstance(source, Run) else Store(outputs).find(source)
        file = checkpoint_file(run, checkpoint)
    cfg = OmegaConf.create(run.config())
    if weights is not None:
        cfg.evaluation.weights = weights
    module = build_module(cfg)
    restore(module, file)
    return module


def checkpoint_file(run: Run, which: str) -> Path:
    """The file of ``last`` or ``best``."""
    if which not in ("last", "best"):
        raise UserError(f"evaluation.checkpoint={which!r} is not known: take last or best")
    file = run.last if which == "last" else run.best
    if not file.is_file():
        hint = "; best needs a validation split (data.val_fraction)" if which == "best" else "; train it first"
        raise UserError(f"{file} does not exist{hint}")
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's contents; tensors and plain containers only, nothing in it is executed.

    Raises:
        UserError: Missing, truncated or none of ours.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises any of a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file} is not a readable checkpoint ({reason}): remove it or restore it") from error
    if not isinstance(content, dict) or not {"state_dict", "redoubt"} <= set(content):
        raise UserError(f"{file} is not a checkpoint of ours: give foreign weights as checkpoint=<file> to eval.py")
    return content


def restore(module: RobustModule, file: Path) -> None:
    """Puts a checkpoint's evaluated weights into the module and sets it to evaluation."""
    content = read_checkpoint(file)
    try:
        state = module.evaluated_state(content)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    own = module.state_dict()
    wrong = [k for k in (*own, *state) if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong:
        raise UserError(
            f"{file} is a checkpoint of another net: {len(set(wrong))} entries differ, the first is {wrong[0]}"
        )
    module.load_state_dict(state)
    if module.ema is not None and content["redoubt"]["ema"] is not None:
        module.ema.load(content["redoubt"]["ema"])
    module.eval()
