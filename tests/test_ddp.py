"""Two processes on the CPU are one run: the same weights, the same verdicts, one end."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.processes import Command, redoubt, start
from tests.test_cli import SMALL, only_run, own_package, python_path

from redoubt.runs.files import read_rows
from redoubt.runs.store import Run, Store

TWO = [
    *SMALL, "data.limit_train=29", "data.batch_size=8", "data.limit_test=25", "inner.steps=2", "trainer=ddp_cpu",
]  # fmt: skip
ATTACK = ["evaluation.chunk=4", "attack=pgd20", "attack.attacks.pgd20.start=uniform"]


def of_own(folder: Path) -> tuple[list[str], dict[str, str]]:
    """What makes a user's own parts available: arguments and environment."""
    conf = own_package(folder)
    return ["--config-dir", str(conf)], python_path(folder)


def launched(folder: Path, *argv: str, befores: Sequence[str] = ("", ""), **env: str) -> list[Command]:
    """The two processes of a command, started as torchrun does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0", **env}
    return [
        start(folder, *argv, name=f"rank{r}", before=before, **common, LOCAL_RANK=str(r), RANK=str(r))
        for r, before in enumerate(befores)
    ]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return torch.load(run.last, weights_only=True)["state_dict"]


def verdicts(run: Run) -> bytes:
    (found,) = run.eval.glob("*/verdicts.npz")
    return found.read_bytes()


@pytest.mark.parametrize("by", ["torchrun", pytest.param("itself", marks=pytest.mark.slow)])
def test_two_processes_equal_one(tmp_path: Path, by: str) -> None:
    """Without BatchNorm: weights to 1e-6, the same verdicts, the same row of metrics.

    A command that starts its second process itself waits for that one's imports.
    """
    own, env = of_own(tmp_path)
    folder = tmp_path / "two"
    command = ("train", *own, "defense=told", *TWO, *ATTACK)
    begun = [start(folder, *command, **env)] if by == "itself" else launched(folder, *command, **env)
    one = redoubt(tmp_path, *command, "trainer=cpu", **env).good()
    two, *_ = [process.end().good() for process in begun]
    told = [(folder / f"rank{r}.txt").read_text() for r in range(2)]
    assert told[0] == told[1]
    a, b = only_run(folder), only_run(tmp_path)
    assert a.name == b.name
    for key, tensor in weights(b).items():
        torch.testing.assert_close(weights(a)[key], tensor, atol=1e-6, rtol=0, msg=key)
    (ra,), (rb,) = read_rows(a.metrics_file), read_rows(b.metrics_file)
    assert ra.keys() == rb.keys()
    for key in ra.keys() - {"images_per_second"}:
        assert float(ra[key]) == pytest.approx(float(rb[key]), rel=1e-4, abs=1e-6), key
    # one table, from rank 0
    assert two.out.count("│ PGD-20") == one.out.count("│ PGD-20") == 1
    # one checkpoint, attacked by two processes in training's wake and now by one
    stored = verdicts(a)
    shutil.rmtree(a.eval)
    redoubt(folder, "eval", *own, f"run={a.name}", *ATTACK, "trainer=cpu", **env).good()
    assert verdicts(a) == stored
    assert len(np.load(next(a.eval.glob("*/verdicts.npz")))["pgd20"]) == 25


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["defense=afd", "optimizer.clip=1"], marks=pytest.mark.slow),
        pytest.param(
            ["defense=cure", "defense.rate=1", "defense.decay=0.5", "defense.freeze=update", "inner=uniform"],
            marks=pytest.mark.slow,
        ),
        pytest.param(["defense=afd", "base=mart", "defense.update=joint", "awp.rho=0.01"], marks=pytest.mark.slow),
        pytest.param(
            ["defense=cure", "base=at", "defense.loss=rgp", "defense.criterion=joint", "trainer.accumulate=2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_equal_one_for_every_defense(tmp_path: Path, options: list[str]) -> None:
    """Without BatchNorm: natural start, student, averages, teacher or revision model, to 1e-6.

    At a low rate: the sign of a pixel's gradient that is nearly zero is a matter of the order of sums, which every step
    at a high rate would magnify; a wrong share of a rank would still move the weights by a hundred times the bound.
    """
    argv = ["train", *TWO, *options, "natural.trainer.max_epochs=1", "optimizer.lr=0.001"]
    begun = start(tmp_path / "two", *argv)
    redoubt(tmp_path, *argv, "trainer=cpu").good()
    begun.end().good()
    both, alone = (Store(folder / "outputs").list() for folder in (tmp_path / "two", tmp_path))
    assert [run.name for run in both] == [run.name for run in alone]
    assert len(both) == 2
    for a, b in zip(both, alone, strict=True):
        content = [torch.load(run.last, weights_only=True) for run in (a, b)]
        pairs = [(c["state_dict"], c["redoubt"]["ema"] or {}) for c in content]
        for ours, theirs in zip(*pairs, strict=True):
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=0, msg=key)


@pytest.mark.slow
def test_a_child_that_dies_ends_the_parent(tmp_path: Path) -> None:
    own, env = of_own(tmp_path)
    done = redoubt(tmp_path, "train", *own, "base=dies", *TWO, seconds=60, **env)
    assert done.code not in (0, -9)
    assert done.errfile.stat().st_mtime - float((tmp_path / "died.txt").read_text()) < 15
    assert "rank 1 dies" in done.err  # the cause, not only that the connection to rank 1 broke
    assert "redoubt: rank 1 failed: RuntimeError: rank 1 dies" in done.err.splitlines()
    assert only_run(tmp_path).status["state"] == "failed"


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["base=trades", "trainer.accumulate=2", "ema=wa", "optimizer.clip=1"], marks=pytest.mark.slow),
    ],
    ids=["plain", "all"],
)
def test_ranks_of_a_launcher_hold_the_same_weights(tmp_path: Path, extra: list[str]) -> None:
    """Started as torchrun does; a net with BatchNorm and FSR's random masks."""
    own, env = of_own(tmp_path)
    net = ["model=resnet_small", "model.widths=[4,4,8,8]", *TWO[2:], "data.image_size=16"]
    for command in launched(tmp_path, "train", *own, "defense=told_fsr", *net, *extra, **env):
        command.end().good()
    told = [(tmp_path / f"rank{r}.txt").read_text() for r in range(2)]
    assert told[0] == told[1]
    assert only_run(tmp_path).status["state"] == "done"
    assert (tmp_path / "rank1.out").read_text() == ""


def test_a_loss_that_is_nan_on_one_rank_ends_both(tmp_path: Path) -> None:
    own, env = of_own(tmp_path)
    pair = launched(tmp_path, "train", *own, "base=spoilt", *TWO, **env)
    for command in pair:
        assert command.end(60).code == 2, command.out + command.err
        assert "not finite" in command.err
        assert "Traceback" not in command.err
    status = only_run(tmp_path).status
    assert status["state"] == "failed"
    assert "not finite" in status["reason"]
