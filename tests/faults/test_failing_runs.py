"""A loss that is not finite, too little memory, defects and Ctrl-C: how a run ends, and what it leaves."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Shell
from tests.faults.bad_inputs import SMALL
from tests.faults.test_bad_input import refused
from torch import Tensor

from redoubt.defenses import RobustModule
from redoubt.defenses.tally import LOOK_EVERY
from redoubt.objectives import PGDAT
from redoubt.runs.files import read_rows
from redoubt.runs.store import Store


class Bomb:
    """Makes the loss (or only its gradient) NaN in one training step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> None:
        self.at: int | None = at
        self.seen: list[int] = []
        bomb = self
        true_terms = RobustModule.terms

        def terms(module: RobustModule, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
            found = true_terms(module, x, adv, y)
            bomb.seen.append(module.steps_done)
            if module.steps_done == bomb.at:
                found["ce"] = Spoilt.apply(found["ce"]) if how == "gradient" else found["ce"] * float(how)
            return found

        monkeypatch.setattr(RobustModule, "terms", terms)


class Spoilt(torch.autograd.Function):
    """A finite value whose gradient is NaN."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


def finite(checkpoint: Path) -> bool:
    tensors: list[Tensor] = []

    def take(value: object) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                take(item)
        elif isinstance(value, list):
            for item in value:
                take(item)

    take(torch.load(checkpoint, weights_only=True))
    return bool(tensors) and all(torch.isfinite(t).all() for t in tensors if t.is_floating_point())


BN = ("model=resnet_small", "model.widths=[4,4,8,8]", "data.image_size=16")
#: 20 steps an epoch, 3 epochs.
LONG = (
    *(o for o in SMALL if o.split("=")[0] not in str(BN)),
    *BN,
    "data.limit_train=200",
    "trainer.max_epochs=3",
    "ema=wa",
    "runs.keep=all",
)


@pytest.mark.parametrize(
    ("at", "how", "saved"),
    [
        (25, "nan", 20),
        pytest.param(3, "gradient", None, marks=pytest.mark.slow),
        pytest.param(25, "inf", 20, marks=pytest.mark.slow),
        pytest.param(39, "nan", 20, marks=pytest.mark.slow),
        pytest.param(3, "nan", None, marks=pytest.mark.slow),
        pytest.param(45, "gradient", 40, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_loss_is_not_finite_ends(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, at: int, how: str, saved: int | None
) -> None:
    """Within 20 steps, failed, with the last good checkpoint; mended, it goes on to the same end."""
    bomb = Bomb(monkeypatch, at, how)
    refused(shell("train", *LONG), "not finite", "optimizer.lr", "optimizer.clip")
    (run,) = Store("outputs").list()
    assert bomb.seen[-1] - at <= 2 * LOOK_EVERY
    assert run.status["state"] == "failed"
    assert "not finite" in run.status["reason"]
    rows = read_rows(run.metrics_file)
    assert [int(r["step"]) for r in rows] == list(range(20, (saved or 0) + 1, 20))
    assert all(np.isfinite(float(v)) for r in rows for v in r.values())
    assert run.last.is_file() == (saved is not None)
    if saved is not None:
        assert finite(run.last)
        assert torch.load(run.last, weights_only=True)["redoubt"]["steps_done"] == saved
    assert not run.evaluations()
    bomb.at, bomb.seen = None, []
    assert shell("train", *LONG).code == 0
    assert bomb.seen[0] == (saved or 0)
    assert run.status["state"] == "done"
    assert finite(run.last)
    assert [int(r["step"]) for r in read_rows(run.metrics_file)] == [20, 40, 60]


@pytest.mark.slow
def test_checkpoints_within_an_epoch_are_good_ones_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """trainer.checkpoint_every looks before it saves."""
    Bomb(monkeypatch, 23, "nan")
    refused(shell("train", *LONG, "trainer.checkpoint_every=2"), "not finite")
    (run,) = Store("outputs").list()
    assert finite(run.last)
    assert torch.load(run.last, weights_only=True)["redoubt"]["steps_done"] == 22


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high(shell: Shell) -> None:
    refused(shell("train", *LONG, "optimizer.lr=1e30"), "not finite", "optimizer.lr")
    (run,) = Store("outputs").list()
    assert run.status["state"] == "failed"
    assert read_rows(run.metrics_file) == []
    done = shell("train", *LONG, "optimizer.lr=0.01")
    assert done.code == 0
    assert [r.status["state"] for r in Store("outputs").list()].count("done") == 1


@pytest.mark.slow
def test_signals_are_left_as_they_were(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next Ctrl-C, in the evaluation or the next job of a multirun, would only set a dead run's flag."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert shell("train", *SMALL).code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    Bomb(monkeypatch, 1, "nan")
    refused(shell("train", *SMALL, "seed=1"), "not finite")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_out_of_memory_names_batch_size_and_accumulate(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def outer(self: PGDAT, *args: object) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd a second line")

    monkeypatch.setattr(PGDAT, "outer", outer)
    refused(shell("train", *SMALL), "out of memory", "data.batch_size", "trainer.accumulate")
    (run,) = Store("outputs").list()
    assert run.status["state"] == "failed"


def test_a_defect_of_the_program_is_not_dressed_up(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def outer(self: PGDAT, *args: object) -> dict[str, Tensor]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PGDAT, "outer", outer)
    ended = shell("train", *SMALL)
    assert ended.code == 1
    assert "Traceback" in ended.err


def test_an_exit_is_no_good_end(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PGDAT, "outer", lambda *args: sys.exit(0))
    ended = shell("train", *SMALL)
    assert ended.code == 1
    assert "sys.exit(0) was called" in ended.err
    (run,) = Store("outputs").list()
    assert run.status["state"] == "failed"


def test_the_keyboard_pressed_twice(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def outer(self: PGDAT, *args: object) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setattr(PGDAT, "outer", outer)
    ended = shell("train", *SMALL)
    assert ended.code == 130
    assert ended.err.strip().splitlines() == ["redoubt: stopped by the keyboard"]
    (run,) = Store("outputs").list()
    assert run.status["state"] == "interrupted"
