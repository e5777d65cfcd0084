"""Processes that train together: how they are started, and a strategy that does not wrap the module."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf

from redoubt.errors import UserError
from redoubt.launched import started_by_launcher

#: Exit codes of a process that was asked to stop and saved its place.
ASKED_TO_STOP = (128 + signal.SIGTERM, 128 + signal.SIGINT)


class PlainDDP(DDPStrategy):
    """Lightning's launcher and process group, with the module left as it is.

    The module averages its own gradients (`redoubt.defenses.gradients`); under a wrapping
    DistributedDataParallel, gradients taken by ``torch.autograd.grad`` are never averaged.
    """

    def configure_ddp(self) -> None:
        """Weights of rank 0 to all; they are equal already where every rank drew them from the same seed."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.data, src=0)

    def _register_ddp_hooks(self) -> None:  # there is no wrapper to register them on
        return None


def ranks() -> tuple[int, int]:
    """(rank, world size) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Agreement:
    """Ranks that stop after the same step, agreed through the process group's store: no collective, no wait.

    Ranks move in step, for each gradient is summed over all of them; so none is more than one step ahead, and a
    step two ahead of whoever asks first is still to come for everybody.
    """

    def __init__(self) -> None:
        self.asked = False
        self.announced = False

    def stops(self, step: int) -> bool:
        """Whether to stop now, after ``step``."""
        if ranks()[1] == 1:
            return self.asked
        store = dist.distributed_c10d._get_default_store()
        if self.asked and not self.announced:
            store.compare_set("redoubt/stop", "", str(step + 2))
            self.announced = True
        if not store.check(["redoubt/stop"]):
            return False
        return step >= int(store.get("redoubt/stop"))


@contextmanager
def companions(job: dict[str, Any], world: int) -> Iterator[None]:
    """Starts this machine's other processes and sees that none outlives this one.

    Lightning's launcher would re-run the command line, in a multirun the whole sweep; each child here is given
    the very config of this process, as a file. Does nothing where a launcher (torchrun, Slurm) started us.

    Args:
        job: Resolved; what `redoubt.cli` needs to do the same: command, config, overrides, config_dirs.
        world: Processes in all.

    Raises:
        UserError: A child ended with an error.
    """
    if world < 2 or started_by_launcher():
        yield
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "NODE_RANK": "0",
    }
    with tempfile.TemporaryDirectory(prefix="redoubt-") as folder:
        file = Path(folder) / "job.yaml"
        OmegaConf.save(OmegaConf.create(job), file)
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "redoubt.cli", "--child", str(file)],
                env={**os.environ, **common, "LOCAL_RANK": str(rank), "RANK": str(rank)},
            )
            for rank in range(1, world)
        ]
        mine = {**common, "LOCAL_RANK": "0", "RANK": "0"}
        threading.Thread(target=_end_with, args=(children,), daemon=True).start()
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        try:
            yield
            _failed(children, wait=60.0)
        except Exception:
            _failed(children, wait=5.0)  # the cause, rather than the broken connection that we saw of it
            raise
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _failed(children: list[subprocess.Popen[bytes]], wait: float) -> None:
    """Raises for the first child that failed, of those that end within ``wait`` seconds."""
    until = time.monotonic() + wait
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    for rank, child in enumerate(children, 1):
        if child.poll() not in (None, 0, *ASKED_TO_STOP):
            raise UserError(f"rank {rank} ended with exit code {child.returncode}: see its message above")


def _end_with(children: list[subprocess.Popen[bytes]]) -> None:
    """Ends this process some seconds after a child failed: else it would wait for it in a collective for minutes."""
    while any(child.poll() is None for child in children):
        time.sleep(0.2)
        try:
            _failed(children, wait=0.0)
        except UserError as error:
            time.sleep(5.0)  # where the connection broke, this process is reporting by itself
            print(f"redoubt: {error}", file=sys.stderr, flush=True)
            for other in children:
                other.kill()
            os._exit(2)


def leave() -> None:
    """Ends the process group: without it two processes on a CPU were seen to abort at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
