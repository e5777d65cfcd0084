"""A run that extends another, and the line about the nearest run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tests.conftest import everything

from redoubt.build import build_data
from redoubt.errors import UserError
from redoubt.runs import running
from redoubt.runs.extending import extended
from redoubt.runs.files import read_rows
from redoubt.runs.loading import load, weights_hash
from redoubt.runs.store import Run, Store
from redoubt.training.recorder import Stopped

Cell = Callable[..., DictConfig]
CONSTANT = ("schedule=constant", "inner=none", "base=standard")


def train(cfg: DictConfig) -> Run:
    return running.train(cfg, build_data(cfg))


@pytest.fixture
def longer(cell: Cell, outputs: Path) -> Callable[..., Run]:
    """Trains what ``extend`` and some words give, as the command would."""

    def go(origin: Run, *words: str) -> Run:
        said = [f"extend={origin.name}", "trainer=cpu", "trainer.progress=false", f"paths.outputs={outputs}", *words]
        return train(extended(cell(f"extend={origin.name}"), said))

    return go


def without_clock(run: Run) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_rows(run.metrics_file)]


@pytest.mark.parametrize(
    "options",
    [
        [*CONSTANT, "ema=wa", "ema.decay=0.9", "data.val_fraction=0.3"],
        pytest.param(["schedule=constant", "defense=afd", "defense.pretrained=none"], marks=pytest.mark.slow),
        pytest.param(["schedule=constant", "defense=cure", "defense.pretrained=none"], marks=pytest.mark.slow),
        pytest.param(["schedule=constant", "defense=fsr", "optimizer=adamw", "ema=warmup"], marks=pytest.mark.slow),
    ],
)
def test_it_is_the_longer_run_bit_for_bit(
    cell: Cell,
    tmp_path: Path,
    longer: Callable[..., Run],
    options: list[str],
    sigterm_after: Callable[[int | None], None],
) -> None:
    """Where the schedule does not depend on the length, also when it is stopped within the epochs that are added."""
    whole = train(cell(*options, "trainer.max_epochs=2", f"paths.outputs={tmp_path / 'whole'}"))
    origin = train(cell(*options, "trainer.max_epochs=1"))
    before = everything(origin.last)
    sigterm_after(6)
    with pytest.raises(Stopped):
        longer(origin, "trainer.max_epochs=2")
    run = longer(origin, "trainer.max_epochs=2")
    assert everything(run.last) == everything(whole.last)
    assert without_clock(run) == without_clock(whole)
    assert run.best.is_file() == whole.best.is_file()
    if whole.best.is_file():
        assert weights_hash(load(run, checkpoint="best")) == weights_hash(load(whole, checkpoint="best"))
    assert len({run.name, whole.name, origin.name}) == 3
    assert run.config()["extend"] == origin.name
    assert torch.load(run.last, weights_only=True)["run"]["decides"]["extends"] == origin.hash
    assert everything(origin.last) == before
    assert longer(origin, "trainer.max_epochs=2").name == run.name


def test_what_is_said_holds_and_all_else_is_the_origins(
    cell: Cell, longer: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "redoubt")
    origin = train(cell(*CONSTANT, "trainer.max_epochs=1", "optimizer.lr=0.03", "optimizer.momentum=0.5"))
    run = longer(origin, "trainer.max_epochs=2", "optimizer.lr=0.01", "ema=wa")
    assert f"goes on from {origin.name} after its 1 epochs" in caplog.text
    assert "optimizer.lr (0.03 there, 0.01 here), trainer.max_epochs (1 there, 2 here)" in caplog.text
    stored = run.config()
    assert (stored["optimizer"]["lr"], stored["optimizer"]["momentum"]) == (0.01, 0.5)
    content = torch.load(run.last, weights_only=True)
    (group,) = content["optimizer_states"][0]["param_groups"]
    assert (group["initial_lr"], group["momentum"]) == (0.01, 0.5)
    assert float(read_rows(run.metrics_file)[1]["lr"]) == pytest.approx(0.01)
    begin = torch.load(origin.last, weights_only=True)["state_dict"]["net.conv1.weight"]
    live, average = content["state_dict"]["net.conv1.weight"], content["redoubt"]["ema"]["conv1.weight"]
    assert (average - begin).abs().max() < 0.01 * (live - begin).abs().max()  # it began as the origin's weights
    again = longer(run, "trainer.max_epochs=3")
    assert again.config()["extend"] == run.name
    assert [row["epoch"] for row in read_rows(again.metrics_file)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], r"it has 1 epochs already: give trainer.max_epochs.* as 2"),
        (["trainer.max_epochs=1"], "it has 1 epochs already"),
        (["trainer.max_epochs=2", "base=trades"], "base=trades, but that run's is standard: leave base out"),
        (["trainer.max_epochs=2", "model.widths=[8,4,8,8]"], r"model.widths \(.*: leave it as it was"),
        (["trainer.max_epochs=2", "data.batch_size=4"], r"data.batch_size \(8 there, 4 here\)"),
        (["trainer.max_epochs=2", "optimizer=adamw"], "optimizer._target_"),
    ],
)
def test_what_is_no_longer_run(cell: Cell, longer: Callable[..., Run], words: list[str], says: str) -> None:
    cfg = cell(*CONSTANT, "trainer.max_epochs=1")
    run = Store(cfg.paths.outputs).open(cfg.axes, 0, "0123456789", running.plain(cfg))
    with run.lock():
        run.update(state="done")
    with pytest.raises(UserError, match=f"^extend={run.name}: .*{says}"):
        longer(run, *words)
    assert len(Store(cfg.paths.outputs).list()) == 1


def test_an_origin_without_its_optimizer(cell: Cell, longer: Callable[..., Run]) -> None:
    origin = train(cell(*CONSTANT, "trainer.max_epochs=1", "runs.keep=weights"))
    with pytest.raises(UserError, match=rf"runs.keep=weights.*defense.pretrained={origin.name}"):
        longer(origin, "trainer.max_epochs=2")
    with origin.lock():
        origin.update(state="interrupted")
    with pytest.raises(UserError, match=f"^extend={origin.name}: run .* is interrupted: let it finish first"):
        longer(origin, "trainer.max_epochs=2")


def test_a_new_run_names_the_nearest(cell: Cell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "redoubt")
    first = train(cell(*CONSTANT, "trainer.max_epochs=1"))
    assert "starts anew" not in caplog.text
    second = train(cell(*CONSTANT, "trainer.max_epochs=2"))
    (line,) = [r.getMessage() for r in caplog.records if "starts anew" in r.getMessage()]
    assert line == (
        f"{second.name} starts anew: {first.name} is the nearest, and differs in trainer.max_epochs (1 there, 2 here); "
        f"extend={first.name} would go on from it"
    )
    caplog.clear()
    train(cell(*CONSTANT, "trainer.max_epochs=2", "optimizer.lr=0.03"))
    assert f"{second.name} is the nearest, and differs in optimizer.lr (" in caplog.text
    assert "would go on" not in caplog.text
    caplog.clear()
    train(cell(*CONSTANT, "trainer.max_epochs=2"))  # answered from the store
    train(cell(*CONSTANT, "trainer.max_epochs=1", "seed=1"))  # a seed is no change of mind
    assert "starts anew" not in caplog.text
