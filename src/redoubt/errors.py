"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one line that names the key or the file, says what is wrong and what to do. The command
    line prints it without a traceback and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback, so that a notebook too has one line."""
        return [f"redoubt: {self}"]


class CheckFailed(UserError):
    """A check that was asked for has failed: the command line ends with exit code 3."""


def did_you_mean(word: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """ ": did you mean ...?" with the nearest names, or the list of them where none is near.

    Args:
        word: What was given.
        known: The names that could have stood there.
        elsewhere: What else may have been meant, as by `meant`; only a name that is much alike goes before it.
    """
    names = sorted(map(str, known))
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.75 if elsewhere else 0.5)
    if elsewhere and not near:
        return f": did you mean {' or '.join(elsewhere)}?"
    if near:
        return f": did you mean {' or '.join(near)}? There are {', '.join(names)}"
    return f": there are {', '.join(names)}" if names else ""


#: What keys are called in other programs.
_ALSO = {
    "learning_rate": "lr", "wd": "weight_decay", "decay": "weight_decay", "gpus": "devices", "gpu": "devices",
    "epsilon": "eps", "bs": "batch_size", "batch": "batch_size", "dataset": "data", "arch": "model",
    "architecture": "model", "net": "model", "path": "root", "data_dir": "root", "outdir": "outputs",
    "output_dir": "outputs", "wandb": "logger", "amp": "precision", "fp16": "precision", "optim": "optimizer",
    "scheduler": "schedule", "iterations": "steps", "iters": "steps", "num_steps": "steps", "step_size": "step",
}  # fmt: skip
_COUNTS = {"max", "num", "n", "nb", "total", "number", "of"}


def meant(key: str, tree: Mapping[str, Any]) -> list[str]:
    """Keys of a config that one which does not exist may stand for, by their last parts: ``lr`` for ``optimizer.lr``.

    Args:
        key: Dotted, or a word alone.
        tree: The config, nested.

    Returns:
        Dotted keys, at most four; those beside ``key`` alone where there are some.
    """
    parent, _, word = key.rpartition(".")
    found = {f"{section}.{name}" for section, names in tree.items() if isinstance(names, Mapping) for name in names}
    known = [str(name) for name in tree] + sorted(found, key=lambda name: [*tree].index(name.partition(".")[0]))
    known = [name for name in known if name.split(".")[0] not in ("natural", "axes", "hydra") and "._" not in name]
    names = {name: _core(name.rpartition(".")[2]) for name in known}
    wanted = [name for name, core in names.items() if core in (_core(word), _core(_ALSO.get(word.lower(), word)))]
    if not wanted and (near := difflib.get_close_matches(_core(word), names.values(), n=1, cutoff=0.8)):
        wanted = [name for name, core in names.items() if core == near[0]]
    beside = [name for name in wanted if name.rpartition(".")[0] == parent]
    return (beside or wanted)[:4]


def _core(name: str) -> str:
    """``epochs`` of ``max_epochs`` and ``num_epochs``."""
    parts = name.lower().replace("-", "_").split("_")
    return "_".join([part for part in parts if part not in _COUNTS] or parts)


def shown(value: Any) -> str:
    """A value as yaml and the command line write it, on one line that is not too long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
