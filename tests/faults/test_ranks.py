"""A rank that fails, dies, hangs, drifts or is told to stop: all ranks end, in time, and say which one and why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults.ranks import Ranks, ended
from tests.processes import QUIET, ROOT
from tests.test_cli import only_run

SOON = 30.0  # seconds in which all have ended

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks come to that nobody disturbs."""
    ranks = Ranks(tmp_path_factory.mktemp("whole"))
    commands = ranks.begin()
    assert ended(commands) == [0, 0], commands[0].err
    return ranks.result()


def fault(kind: str, rank: int, where: str = "step", number: int = 5, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "where": where, "number": number, **more}


# ---- a rank that is lost --------------------------------------------------------------------------------------------


LOST = [
    (fault("raise", 1), 2, "rank 1 failed: RuntimeError: rank 1 dies"),
    pytest.param(fault("SIGKILL", 1), 2, "rank 1 is gone", marks=slow),
    pytest.param(fault("exit", 1), 2, "rank 1 failed: RuntimeError: sys.exit(0) was called", marks=slow),
    pytest.param(fault("mistake", 0), 2, "rank 0 failed: data.root=nowhere: no such folder", marks=slow),
    pytest.param(fault("SIGKILL", 0), 2, "rank 0 is gone", marks=slow),
    pytest.param(fault("raise", 1, "validation", 1), 2, "rank 1 failed: RuntimeError: rank 1 dies", marks=slow),
    pytest.param(fault("raise", 0, "evaluation", 9), 2, "rank 0 failed: RuntimeError: rank 0 dies", marks=slow),
    pytest.param(fault("SIGKILL", 1, "evaluation", 9), 2, "rank 1 is gone", marks=slow),
    pytest.param(fault("SIGKILL", 2), 3, "rank 2 is gone", marks=slow),
]


@pytest.mark.fault("a rank raises, or is killed", "refused")
@pytest.mark.parametrize(("fault", "world", "says"), LOST)
def test_a_rank_that_is_lost_ends_all(tmp_path: Path, fault: dict[str, Any], world: int, says: str) -> None:
    ranks = Ranks(tmp_path, world=world)
    commands = ranks.begin(fault)
    codes = ended(commands)
    assert ranks.since() < SOON
    lost = fault["rank"]
    assert codes[lost] == {"SIGKILL": -9, "raise": 1, "exit": 1, "mistake": 2}[fault["kind"]]
    for rank, command in enumerate(commands):
        if rank != lost:
            assert command.code == 2, command.err
            assert [line for line in command.err.splitlines() if line.startswith(f"redoubt: {says}")], command.err
            assert "Traceback" not in command.err
    status = only_run(tmp_path).status
    if fault["where"] == "evaluation":
        assert status["state"] == "done"
    elif lost == 0 and fault["kind"] == "SIGKILL":
        assert status["state"] == "interrupted"
    else:
        assert status["state"] == "failed"
        assert (says if lost else fault["kind"] == "raise" or "data.root") in status["reason"]


HANGS = [
    (fault("sleep", 1), "rank 1 hangs in step 6: the others have waited 15 s for it"),
    (fault("SIGSTOP", 0), "rank 0 does not answer: its process is stopped"),
    (fault("sleep", 0, limits=5.0), "rank 0 hangs in step 6: the others have waited 5 s for it"),
    (fault("SIGSTOP", 1, limits=5.0), "rank 1 does not answer: its process is stopped"),
    (fault("SIGSTOP", 1, "evaluation", 9, limits=5.0), "rank 1 does not answer: its process is stopped"),
]


@slow
@pytest.mark.fault("a rank hangs, or is stopped", "refused")
@pytest.mark.parametrize(("fault", "says"), HANGS)
def test_a_rank_that_hangs_ends_all(tmp_path: Path, fault: dict[str, Any], says: str) -> None:
    ranks = Ranks(tmp_path)
    commands = ranks.begin(fault)
    codes = ended(commands)
    assert ranks.since() < SOON
    lost = fault["rank"]
    assert codes[1 - lost] == 2
    assert codes[lost] == (-9 if fault["kind"] == "SIGSTOP" else 2)
    assert f"redoubt: {says}" in commands[1 - lost].err
    if fault["kind"] == "sleep":  # where
        assert "faulty/parts.py" in commands[lost].err
    assert "Traceback" not in "".join(command.err for command in commands)


@slow
@pytest.mark.fault("a rank is slow, but does not hang", "survived")
@pytest.mark.parametrize("where", [("validation", 1), ("evaluation", 9), ("end", 0)])
def test_a_rank_that_takes_its_time_is_waited_for(tmp_path: Path, where: tuple[str, int], whole: Any) -> None:
    """For longer than a rank may hang within a step."""
    ranks = Ranks(tmp_path)
    assert ended(ranks.begin(fault("sleep", 1, *where, seconds=9.0, limits=5.0))) == [0, 0]
    assert ranks.result() == whole


# ---- ranks that differ ----------------------------------------------------------------------------------------------


@pytest.mark.fault("ranks are started differently", "refused")
@pytest.mark.parametrize(
    ("more", "world", "says"),
    [
        ({1: ["optimizer.lr=0.3", "seed=4"]}, 2, "rank 1 has another data.seed, optimizer.lr, seed than rank 0"),
        pytest.param({2: ["evaluation.chunk=8"]}, 3, "rank 2 has another evaluation.chunk than rank 0", marks=slow),
        pytest.param(
            {r: ["trainer.devices=3"] for r in range(2)}, 2, "trainer.devices=3 on trainer.num_nodes=1 are 3 processes",
            marks=slow,
        ),
    ],
)  # fmt: skip
def test_ranks_of_other_configs_are_refused(tmp_path: Path, more: Any, world: int, says: str) -> None:
    commands = Ranks(tmp_path, world=world).begin(more=more)
    assert ended(commands, SOON) == [2] * world
    for command in commands:
        assert command.err.splitlines()[0].startswith(f"redoubt: {says}"), command.err
    assert not (tmp_path / "outputs").exists()


@slow
@pytest.mark.fault("ranks are started differently", "refused")
def test_ranks_that_would_evaluate_otherwise_are_refused(tmp_path: Path) -> None:
    """One of them finds another run's weights under the same name, as on a disk that is not shared."""
    a, b = Ranks(tmp_path / "a"), Ranks(tmp_path / "b", argv=("seed=1",))
    for ranks in (a, b):
        assert ended(ranks.begin()) == [0, 0]
    there, other = only_run(a.folder), only_run(b.folder)
    other.folder.rename(other.folder.with_name(there.name))
    words = [f"run={there.name}", "trainer=ddp_cpu", "attack=pgd20"]
    commands = a.begin(evaluate=words, more={1: [f"paths.outputs={tmp_path / 'b/outputs'}"]})
    assert ended(commands, SOON) == [2, 2]
    for command in commands:
        assert "redoubt: rank 1 has another weights, evaluation than rank 0" in command.err, command.err


@slow
@pytest.mark.fault("a rank's weights drift", "refused")
@pytest.mark.parametrize(("rank", "world", "other"), [(1, 2, 0), (0, 3, 1)])
def test_weights_that_differ_end_the_run(tmp_path: Path, rank: int, world: int, other: int) -> None:
    """By 1e-7 in one weight, after a step in the second epoch: what was saved after the first one stays."""
    ranks = Ranks(tmp_path, world=world)
    commands = ranks.begin(fault("drift", rank, "update", 6))
    assert ended(commands) == [2] * world
    for command in commands:
        assert f"redoubt: rank {rank} holds other weights than rank {other} after epoch 2" in command.err, command.err
    run = only_run(tmp_path)
    assert run.status["state"] == "failed"
    assert torch.load(run.last, weights_only=True)["redoubt"]["steps_done"] == 4


# ---- a rank that is told to stop ------------------------------------------------------------------------------------

SIGNALS = [
    fault("SIGTERM", 1),
    *(
        pytest.param(one, marks=slow)
        for one in (
            fault("SIGINT", 0), fault("SIGTERM", 0, number=7), fault("SIGINT", 1, "validation", 1),
            fault("SIGTERM", 0, "validation", 2), fault("SIGTERM", 1, "evaluation", 2),
            fault("SIGINT", 0, "evaluation", 2), fault("SIGTERM", 0, "end", 0), fault("SIGINT", 0, all=True),
            fault("SIGTERM", 1, "validation", 1, all=True), fault("SIGINT", 1, "evaluation", 2, all=True),
        )
    ),
]  # fmt: skip


@pytest.mark.fault("SIGTERM or SIGINT to one rank, or to all", "survived")
@pytest.mark.parametrize("fault", SIGNALS)
def test_a_signal_stops_all_and_the_same_command_goes_on(tmp_path: Path, fault: dict[str, Any], whole: Any) -> None:
    ranks = Ranks(tmp_path)
    commands = ranks.begin(fault)
    number = getattr(signal, fault["kind"])
    assert ended(commands) == [128 + number] * 2, commands[0].err + commands[1].err
    assert ranks.since() < SOON
    assert f"redoubt: stopped by {fault['kind']}; the same command goes on" in commands[0].err
    run = only_run(tmp_path)
    steps = torch.load(run.last, weights_only=True)["redoubt"]["steps_done"]
    if fault["where"] == "evaluation":
        assert run.status["state"] == "done"
    else:
        assert run.status["state"] == "interrupted"
        assert steps >= {"step": fault["number"], "validation": 4 * (fault["number"] + 1), "end": 12}[fault["where"]]
    assert ended(ranks.begin()) == [0, 0]
    assert ranks.result() == whole


@slow
@pytest.mark.fault("Slurm announces a job's time limit", "survived")
@pytest.mark.parametrize("where", [("step", 5), ("evaluation", 2)])
def test_slurm_s_signal_queues_the_job_again(tmp_path: Path, where: tuple[str, int], whole: Any) -> None:
    """``scontrol requeue`` comes once, after the checkpoint; the job that it starts ends as an undisturbed one."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >>asked.txt\nls outputs/runs/*/checkpoints >>asked.txt\n')
    (tools / "scontrol").chmod(0o755)
    job = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NAME": "redoubt",
    }  # fmt: skip
    ranks = Ranks(tmp_path, env=job)
    commands = ranks.begin(fault("SIGUSR1", 1, *where, all=True), slurm=True)
    assert ended(commands) == [128 + signal.SIGUSR1] * 2, commands[0].err
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert asked[0] == "requeue 77"
    assert "last.ckpt" in asked
    assert sum("requeue" in line for line in asked) == 1
    assert ended(ranks.begin(slurm=True)) == [0, 0]
    assert ranks.result() == whole


# ---- as a user starts them ----------------------------------------------------------------------------------------


@slow
@pytest.mark.fault("a rank raises, or is killed", "refused")
@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (fault("SIGKILL", 1), 2, "rank 1 was killed by SIGKILL"),
        (fault("sleep", 1, limits=5.0), 2, "rank 1 hangs in step 6"),
        (fault("SIGKILL", 0), -9, "rank 0 is gone"),
        (fault("raise", 1, "evaluation", 9), 2, "rank 1 failed: RuntimeError: rank 1 dies"),
    ],
)
def test_a_lost_rank_of_ddp_cpu(tmp_path: Path, fault: dict[str, Any], code: int, says: str) -> None:
    ranks = Ranks(tmp_path)
    command = ranks.alone(fault).end()
    assert command.code == code, command.err
    deadline = time.monotonic() + SOON
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks.since() < SOON
    assert not alive(tmp_path)
    assert any(line.startswith(f"redoubt: {says}") for line in command.errfile.read_text().splitlines())


def alive(folder: Path) -> list[int]:
    """The ranks that have not ended; a killed parent's child is nobody's to wait for."""
    found = []
    for file in folder.glob("*.pid"):
        try:
            if "/cli" in Path(f"/proc/{file.read_text()}/cmdline").read_text().replace("\0", " ").replace(".", "/"):
                found.append(int(file.read_text()))
        except OSError:
            continue
    return found


@slow
@pytest.mark.fault("SIGTERM or SIGINT to one rank, or to all", "survived")
@pytest.mark.parametrize("fault", [fault("SIGTERM", 1), fault("SIGINT", 0, "validation", 1, all=True)])
def test_a_signal_to_ddp_cpu(tmp_path: Path, fault: dict[str, Any], whole: Any) -> None:
    ranks = Ranks(tmp_path)
    command = ranks.alone(fault).end()
    assert command.code == 128 + getattr(signal, fault["kind"]), command.err
    assert ranks.since() < SOON
    assert ended(ranks.begin()) == [0, 0]
    assert ranks.result() == whole


@slow
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun(tmp_path: Path, world: int, whole: Any) -> None:
    """The same bits, rows and verdicts as ranks have that nobody looks after."""
    ranks, other = Ranks(tmp_path / "torchrun", world=world), Ranks(tmp_path / "forks", world=world)
    words, env = ranks.words()
    tool = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [str(tool), "--standalone", f"--nproc-per-node={world}", str(ROOT / "src/train.py"), *words[1:]],
        cwd=ranks.folder, env={**os.environ, **QUIET, **env}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("│ FGSM") == 1
    assert {(ranks.folder / f"rank{r}.txt").read_text() for r in range(world)} == {"0.05 0\n"}
    if world == 3:
        assert ended(other.begin()) == [0] * world
    assert ranks.result() == (whole if world == 2 else other.result())


@slow
@pytest.mark.fault("a rank raises, or is killed", "refused")
@pytest.mark.parametrize(
    ("fault", "says"),
    [(fault("SIGKILL", 1), "rank 1 is gone"), (fault("sleep", 1, limits=5.0), "rank 1 hangs in step 6")],
)
def test_a_lost_rank_of_torchrun(tmp_path: Path, fault: dict[str, Any], says: str) -> None:
    ranks = Ranks(tmp_path)
    command = ranks.elastic(fault).end()
    assert ranks.since() < SOON
    assert command.code != 0
    assert any(line.startswith(f"redoubt: {says}") for line in command.err.splitlines()), command.err


@slow
@pytest.mark.fault("SIGTERM or SIGINT to one rank, or to all", "survived")
@pytest.mark.parametrize("keyboard", [False, True])
def test_a_signal_to_torchrun(tmp_path: Path, keyboard: bool, whole: Any) -> None:
    """SIGTERM to torchrun alone, which hands it on; SIGINT to all as from a terminal, which it hands on once more."""
    ranks = Ranks(tmp_path)
    command = ranks.elastic(fault("sleep", 0, "validation", 1, seconds=4.0))
    until = time.monotonic() + 60
    while not (tmp_path / "fault.txt").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    if keyboard:
        os.killpg(command.pid, signal.SIGINT)
    else:
        os.kill(command.pid, signal.SIGTERM)
    command.end(SOON)
    assert command.code not in (0, -9)
    assert f"redoubt: stopped by {'SIGINT' if keyboard else 'SIGTERM'}" in command.err, command.err
    run = only_run(tmp_path)
    assert run.status["state"] == "interrupted"
    assert torch.load(run.last, weights_only=True)["redoubt"]["steps_done"] == 8
    assert ended(ranks.begin()) == [0, 0]
    assert ranks.result() == whole
