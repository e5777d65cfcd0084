"""What the tests of ranks share: a user's own defense that fails as the environment says, and ways to start ranks."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import everything
from tests.processes import ROOT, Command, start
from tests.test_cli import only_run

from redoubt.runs.files import read_rows

#: Three epochs of four steps each, the last one of fewer images, shared unequally.
SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=31", "data.limit_test=25", "data.batch_size=8", "data.probe=20", "trainer=ddp_cpu",
    "trainer.max_epochs=3", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=fgsm", "evaluation.chunk=4", "runs.keep=all", "defense=faulty",
)  # fmt: skip

PARTS = '''
import json, os, signal, sys, time
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.training import vigil

wanted = json.loads(os.environ.get("FAULT", "{}"))
rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
forwards = [0]
if "limits" in wanted:
    vigil.SILENT = vigil.WAITING = wanted["limits"]


def fault(module, where, number):
    """What FAULT says, once: at a step, validation batch or forward of the evaluation of one rank."""
    if rank != wanted.get("rank") or where != wanted["where"] or number != wanted["number"]:
        return
    kind, wanted["rank"] = wanted["kind"], None
    pids = [int(open(f"{r}.pid").read()) for r in range(wanted["world"])] if wanted.get("all") else [os.getpid()]
    with open("fault.txt", "w") as file:
        file.write(str(time.time()))
    if kind == "raise":
        raise RuntimeError(f"rank {rank} dies")
    if kind == "exit":
        sys.exit(0)
    if kind == "mistake":
        raise UserError("data.root=nowhere: no such folder")
    if kind == "sleep":
        time.sleep(wanted.get("seconds", 1e6))
    elif kind == "drift":
        next(module.parameters()).data[0, 0, 0, 0] += 1e-7
    else:
        for pid in pids:
            os.kill(pid, getattr(signal, kind))


class Faulty(RobustModule):
    def on_fit_start(self):
        super().on_fit_start()
        with open(f"{rank}.pid", "w") as file:
            file.write(str(os.getpid()))

    def craft(self, x, y):
        fault(self, "step", self.steps_done)
        return super().craft(x, y)

    def after_step(self):
        super().after_step()
        fault(self, "update", self.steps_done)

    def validation_step(self, batch, batch_idx):
        fault(self, "validation", self.trainer.current_epoch)
        super().validation_step(batch, batch_idx)

    def on_train_start(self):
        super().on_train_start()
        with open(f"rank{rank}.txt", "a") as file:
            print(self.raw_optimizers()[0].param_groups[0]["initial_lr"], self.seed, file=file)

    def on_train_end(self):
        fault(self, "end", 0)

    def logits(self, x):
        if self._trainer is None:
            forwards[0] += 1
            fault(self, "evaluation", forwards[0])
        return super().logits(x)
'''


#: torchrun with a function in place of a command: its workers are forks of a server that it starts.
ELASTIC = """
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
os.setsid()
at = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="forkserver")
elastic_launch(LaunchConfig(1, 1, {world}, **at), redoubt.cli.main)()
sys.exit(0)
"""


def own_package(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The defense ``faulty``: arguments and environment by which the command line knows it."""
    package, conf = folder / "theirs/faulty", folder / "conf"
    if not package.exists():
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "parts.py").write_text(PARTS)
        (conf / "defense").mkdir(parents=True)
        (conf / "defense/faulty.yaml").write_text("_target_: faulty.parts.Faulty\n")
        (conf / "redoubt.allow").write_text("faulty\n")
    paths = [str(folder / "theirs"), str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return ["--config-dir", str(conf)], {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@dataclass
class Ranks:
    """A command of several ranks in a folder.

    Args:
        folder: Where they are started.
        argv: Beside ``SMALL``.
        world: How many.
        env: More of the environment.
    """

    folder: Path
    argv: tuple[str, ...] = ()
    world: int = 2
    env: dict[str, str] = field(default_factory=dict)

    def words(self, train: bool = True) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of every rank."""
        own, env = own_package(self.folder)
        words = ["train", *own, *SMALL, f"trainer.devices={self.world}", *self.argv] if train else ["eval", *own]
        return words, {**env, **self.env}

    def begin(
        self,
        fault: dict[str, Any] | None = None,
        *,
        more: dict[int, list[str]] | None = None,
        evaluate: list[str] | None = None,
        slurm: bool = False,
    ) -> list[Command]:
        """As torchrun or srun starts them, but with nobody to look after them.

        Args:
            fault: See ``PARTS``.
            more: Further arguments, by rank.
            evaluate: Arguments of ``eval``, in place of a training.
            slurm: As srun does.
        """
        words, env = self.words(train=evaluate is None)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])} | self.fault(fault)
        if not slurm:
            env |= {"WORLD_SIZE": str(self.world), "NODE_RANK": "0"}
        names = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ("RANK", "LOCAL_RANK")
        return [
            start(
                self.folder, *words, *(evaluate or []), *(more or {}).get(r, []),
                name=f"rank{r}-{time.monotonic_ns()}", **env, **dict.fromkeys(names, str(r)),
            )
            for r in range(self.world)
        ]  # fmt: skip

    def alone(self, fault: dict[str, Any] | None = None) -> Command:
        """As a user starts them: the first starts the others."""
        words, env = self.words()
        return start(self.folder, *words, **env, **self.fault(fault))

    def elastic(self, fault: dict[str, Any] | None = None) -> Command:
        """As torchrun's agent, which looks after them; all in one session of their own."""
        words, env = self.words()
        return start(
            self.folder, *words, before=ELASTIC.replace("{world}", str(self.world)), **env, **self.fault(fault)
        )

    def fault(self, fault: dict[str, Any] | None) -> dict[str, str]:
        """The environment of a fault."""
        return {"FAULT": json.dumps({**fault, "world": self.world})} if fault else {}

    def since(self) -> float:
        """Seconds since the fault."""
        return time.time() - float((self.folder / "fault.txt").read_text())

    def result(self) -> tuple[str, list[dict[str, str]], bytes]:
        """All bits of the weights and of what trains them, the rows of metrics.csv, the verdicts."""
        run = only_run(self.folder)
        rows = [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_rows(run.metrics_file)]
        (verdicts,) = run.eval.glob("*/verdicts.npz")
        return everything(run.last), rows, verdicts.read_bytes()


def ended(commands: list[Command], seconds: float = 60) -> list[int]:
    """Waits for processes; their exit codes."""
    return [command.end(seconds).code for command in commands]
