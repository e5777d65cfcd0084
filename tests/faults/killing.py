"""Counts the moments at which a command can be killed, and kills it at one. Runs in the command itself."""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from redoubt.defenses import RobustModule
from redoubt.evaluation.verdicts import Judge
from redoubt.runs import checkpoints

#: Where a kill may fall.
PLACES = ("step", "save", "validation", "evaluation")

#: And where the disk may be full: as a checkpoint is written.
counts = dict.fromkeys((*PLACES, "write"), 0)


def arm(report: str, at: Mapping[str, int], full: bool = False) -> None:
    """Counts from here on.

    Args:
        report: File for the counts of a command that comes to its end.
        at: Place -> at which of its moments the command dies.
        full: It does not die: the disk is full.
    """

    def moment(place: str) -> bool:
        counts[place] += 1
        return counts[place] == at.get(place)

    def die() -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, place: str) -> None:
        true: Callable[..., Any] = getattr(owner, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            if moment(place):
                die()
            value = true(*args, **options)
            if moment(place):
                die()
            return value

        setattr(owner, name, wrapper)

    def half(self: Any, data: Any) -> int:
        if len(data) > 1024 and (moment("write") or moment("save")):  # not between headers, which are many
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            die()
        return int(write(self, data))

    write = checkpoints._Hashed.write
    checkpoints._Hashed.write = half  # type: ignore[method-assign]
    for name in ("replace", "fsync"):
        around(os, name, "save")
    for name in ("training_step", "craft", "step"):
        around(RobustModule, name, "step")
    for name in ("validation_step", "on_validation_epoch_end"):
        around(RobustModule, name, "validation")
    for name in ("attack", "run", "settle"):
        around(Judge, name, "evaluation")
    atexit.register(lambda: Path(report).write_text(json.dumps(counts)))
