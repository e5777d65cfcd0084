"""Processes that tests start: forks of a server that has imported torch and has no thread but its own.

A fork needs no seconds to import torch. The process that runs the tests must not be forked itself: it has threads
(pytest-xdist's, torch's, wandb's), and a fork would wait for ever for a lock that one of them held.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def warm_up() -> None:
    """Start the server, which imports torch while the caller goes on."""
    with chdir(ROOT), mock.patch.dict(os.environ, QUIET):  # more threads would be there before the first fork
        multiprocessing.forkserver.ensure_running()


def fork(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start ``function(*arguments)`` in a fork of the server; both must be importable or picklable."""
    warm_up()
    process = CONTEXT.Process(target=function, args=arguments, daemon=True)  # nobody waits for one that is left behind
    process.start()
    return process


def ended(process: BaseProcess, seconds: float, name: str) -> int:
    """Wait for a process and return its exit code; kill it and fail where it takes longer than ``seconds``."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join(10)
        raise AssertionError(f"{name} did not end within {seconds:.0f} s")
    return process.exitcode


def processor_time() -> float:
    """Seconds of processor time of the server's forks that have ended, without what the server imported."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    stat = Path(f"/proc/{server}/stat")
    if server is None or not stat.is_file():
        return 0.0
    children = stat.read_text().rpartition(")")[2].split()[13:15]
    return sum(map(int, children)) / os.sysconf("SC_CLK_TCK")


def on_ranks(world: int, folder: Path, call: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return ``call(rank, world, *arguments)`` of each of ``world`` processes that are one process group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
    given = pickle.dumps(arguments)  # multiprocessing itself would share each tensor's memory by a file of its own
    ranks = [fork(_rank, rank, world, address, file, call, given) for rank, file in enumerate(files)]
    codes = [ended(process, 120, f"rank {rank} of {call.__name__}") for rank, process in enumerate(ranks)]
    assert codes == [0] * world
    return [torch.load(file, weights_only=True) for file in files]


def _rank(rank: int, world: int, address: str, file: Path, call: Callable[..., Any], given: bytes) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    torch.save(call(rank, world, *pickle.loads(given)), file)
    dist.barrier()
    dist.destroy_process_group()


@dataclass
class Command:
    """A command that was started in a folder; ``code``, ``out`` and ``err`` are there once it has ended."""

    name: str
    process: BaseProcess
    outfile: Path
    errfile: Path
    code: int = field(init=False)
    out: str = field(init=False)
    err: str = field(init=False)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def end(self, seconds: float = 120) -> Command:
        self.began = time.monotonic()
        try:
            self.code = ended(self.process, seconds, self.name)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.outfile.read_text()}{self.errfile.read_text()}") from None
        self.out, self.err = self.outfile.read_text(), self.errfile.read_text()
        return self

    def good(self) -> Command:
        assert self.code == 0, self.out + self.err
        assert "Traceback" not in self.err
        return self


def start(cwd: Path, *argv: str, name: str = "", before: str = "", **env: str) -> Command:
    """Begin ``redoubt argv`` in a process of its own, after the Python statements ``before``."""
    cwd.mkdir(parents=True, exist_ok=True)
    name = name or f"{time.monotonic_ns()}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "PYTEST"))}
    out, err = cwd / f"{name}.out", cwd / f"{name}.err"
    out.touch()
    err.touch()
    process = fork(_command, argv, cwd, {**kept, **QUIET, **env}, out, err, before)
    return Command(" ".join(("redoubt", *argv)), process, out, err)


def redoubt(cwd: Path, *argv: str, seconds: float = 120, **env: str) -> Command:
    """Run ``redoubt argv`` in a process of its own and wait for it."""
    return start(cwd, *argv, **env).end(seconds)


def _command(argv: tuple[str, ...], cwd: Path, env: dict[str, str], out: Path, err: Path, before: str) -> None:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may start some, too
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for number, name in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)  # noqa: SIM115
    sys.argv = ["redoubt", *argv]
    code = 1
    try:
        import redoubt.cli

        exec(before, {"redoubt": redoubt, "os": os, "sys": sys})
        redoubt.cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # tearing down a fork of an interpreter that has imported torch takes more than a second
