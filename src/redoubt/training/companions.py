"""The further processes of a job on this machine: how they are started, and that none outlives the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from omegaconf import OmegaConf

from redoubt.errors import UserError
from redoubt.launched import started_by_launcher
from redoubt.training.distributed import watch
from redoubt.training.stopping import Stopped
from redoubt.training.vigil import END, GOES_ON, Verdict

#: Exit codes of a process that was asked to stop and saved its place.
ASKED_TO_STOP = tuple(128 + number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))

Children = list[subprocess.Popen[bytes]]


@contextmanager
def companions(job: dict[str, Any], world: int) -> Iterator[None]:
    """Starts this machine's other processes.

    Lightning's launcher would re-run the command line, in a multirun the whole sweep; each child here is given
    the very config of this process. Does nothing where a launcher (torchrun, Slurm) started us.

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
    # Through a pipe: the config has secrets, and a file would outlive a kill.
    given = OmegaConf.to_yaml(OmegaConf.create({**job, "parent": os.getpid()})).encode()
    children: Children = []
    mine = {**common, "LOCAL_RANK": "0", "RANK": "0"}
    done = threading.Event()
    before = {name: os.environ.get(name) for name in mine}
    try:
        for rank in range(1, world):
            child = subprocess.Popen(
                [sys.executable, "-m", "redoubt.cli", "--child"],
                env={**os.environ, **common, "LOCAL_RANK": str(rank), "RANK": str(rank)},
                stdin=subprocess.PIPE,
            )
            children.append(child)
            _hand(child, given)
        threading.Thread(target=_see, args=(children, done), daemon=True).start()
        os.environ.update(mine)
        try:
            yield
        finally:
            done.set()
        _wait(children, 60.0)
        for rank, child in enumerate(children, 1):
            if child.returncode != 0:
                raise UserError(f"rank {rank} {_fate(child.returncode)}: see its message above")
    except BaseException as error:
        # They know already. What they are about to say of it is waited for, what they are saving as well.
        _wait(children, 30.0 if isinstance(error, Stopped) else END)
        raise
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _hand(child: subprocess.Popen[bytes], given: bytes) -> None:
    assert child.stdin is not None
    with suppress(BrokenPipeError), child.stdin:  # one that died already is seen by `_see`
        child.stdin.write(given)


def _wait(children: Children, seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.02)


def _fate(code: int | None) -> str:
    if code is None:
        return "did not end"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _see(children: Children, done: threading.Event) -> None:
    """Tells the watch of a child that died without a word; before there is one, this process ends with the child.

    For it then waits in a library for the child to join, and would for half an hour.
    """
    while not done.wait(0.1):
        for rank, child in enumerate(children, 1):
            code = child.poll()
            asked = 128 - code if code in (-signal.SIGTERM, -signal.SIGINT) else code
            if code in (None, 0) or (watch and asked in ASKED_TO_STOP):
                continue
            said = f"rank {rank} {_fate(code)}"
            if watch:
                watch[0].suspect(Verdict("gone", rank, f"{said}; {GOES_ON}"))
                return
            if done.wait(1.0):
                return
            if not watch:
                print(f"redoubt: {said} before it had joined: see its message above", file=sys.stderr, flush=True)
                for other in children:
                    other.kill()
                os._exit(asked if asked in ASKED_TO_STOP else 2)
