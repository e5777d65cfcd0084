"""What the tests of ranks share: a user's own defense that fails as the environment says, and ways to start ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.test_cli import QUIET, ROOT, Command, start

#: Three epochs of four steps each, the last one of fewer images, shared unequally.
SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=29", "data.limit_test=25", "data.batch_size=8", "data.probe=20", "trainer=ddp_cpu",
    "trainer.max_epochs=3", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=none", "evaluation.chunk=4", "runs.keep=all", "defense=faulty",
)  # fmt: skip

PARTS = '''
import json, os, signal, time
from redoubt.defenses import RobustModule
from redoubt.errors import UserError

wanted = json.loads(os.environ.get("FAULT", "{}"))
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
seen = {"evaluation": 0}


def fault(module, where, number):
    """Does what FAULT says, once, at the given step, validation batch or forward of the evaluation of its rank."""
    if wanted.get("where") != where or number != wanted["number"] or rank != wanted["rank"] or wanted.get("done"):
        return
    wanted["done"] = True
    kind = wanted["kind"]
    with open("fault.txt", "w") as file:
        file.write(f"{time.time()} {os.getpid()}")
    if kind == "raise":
        raise RuntimeError(f"rank {rank} dies")
    if kind == "mistake":
        raise UserError("data.root=nowhere: no such folder")
    if kind == "sleep":
        time.sleep(wanted.get("seconds", 1e6))
    elif kind == "drift":
        next(module.parameters()).data[0, 0, 0, 0] += 1e-7
    else:
        for pid in {"own": [os.getpid()], "all": json.loads(os.environ.get("PIDS", "[]"))}[wanted.get("to", "own")]:
            os.kill(pid, getattr(signal, kind))


class Faulty(RobustModule):
    def craft(self, x, y):
        fault(self, "step", self.steps_done)
        return super().craft(x, y)

    def after_step(self):
        super().after_step()
        fault(self, "update", self.steps_done)
        with open(f"steps{rank}.txt", "a") as file:
            print(self.steps_done, self.raw_optimizers()[0].param_groups[0]["initial_lr"], file=file)
        time.sleep(float(os.environ.get("SLOW", 0)))

    def validation_step(self, batch, batch_idx):
        fault(self, "validation", batch_idx + 100 * self.trainer.current_epoch)
        super().validation_step(batch, batch_idx)

    def logits(self, x):
        if self._trainer is None:
            seen["evaluation"] += 1
            fault(self, "evaluation", seen["evaluation"])
        return super().logits(x)
'''


def own_package(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The defense ``faulty``: arguments and environment by which the command line knows it."""
    package, conf = folder / "theirs/faulty", folder / "conf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(PARTS)
    (conf / "defense").mkdir(parents=True)
    (conf / "defense/faulty.yaml").write_text("_target_: faulty.parts.Faulty\n")
    (conf / "redoubt.allow").write_text("faulty\n")
    paths = [str(folder / "theirs"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return ["--config-dir", str(conf)], {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def launched(
    folder: Path, *argv: str, world: int = 2, more: dict[int, tuple[str, ...]] | None = None, **env: str
) -> list[Command]:
    """The processes of a command as torchrun starts them, but with nobody to look after them; forks: they need no import.

    Args:
        more: Further arguments, by rank.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world), "NODE_RANK": "0", **env}
    return [
        start(
            folder,
            *argv,
            *(more or {}).get(r, ()),
            name=f"rank{r}-{time.monotonic_ns()}",
            **common,
            LOCAL_RANK=str(r),
            RANK=str(r),
        )
        for r in range(world)
    ]
