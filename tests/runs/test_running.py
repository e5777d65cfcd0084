"""Training through the store: what is kept, what is continued, and the natural twin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tests.conftest import everything

from redoubt import config
from redoubt.build import build_data
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.runs import running
from redoubt.runs.files import read_rows
from redoubt.runs.identity import deciding, differences, plain
from redoubt.runs.store import Run, Store

Cell = Callable[..., DictConfig]


def train(cfg: DictConfig) -> Run:
    return running.train(cfg, build_data(cfg))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """The configs that were really trained."""
    made: list[DictConfig] = []
    true = running._fit

    def fit(cfg: DictConfig, *args: Any) -> RobustModule:
        made.append(cfg)
        return true(cfg, *args)

    monkeypatch.setattr(running, "_fit", fit)
    return made


SAME = ("trainer.max_epochs=2", "inner.steps=1")


def twin_of(cfg: DictConfig) -> tuple[DictConfig, Run]:
    return running.find_or_make(cfg, build_data(cfg), defense="none", base="standard")


def test_the_twin_is_the_directly_composed_natural_cell(cell: Cell, outputs: Path, fits: list[DictConfig]) -> None:
    """Same model, data, limits, split, seed; its own recipe. Whoever trains that cell by hand finds it."""
    cfg = cell("defense=fsr", "base=trades", "seed=4", "optimizer.lr=0.3", "schedule=cosine", "ema=wa",
               "label_smoothing=0.1", "natural.trainer.max_epochs=1", "data.val_fraction=0.2")  # fmt: skip
    twin, run = twin_of(cfg)
    assert run.status["state"] == "done"
    assert (twin.axes.defense, twin.axes.base, twin.axes.model) == ("none", "standard", "resnet_small")
    assert (twin.seed, twin.data.limit_train, twin.data.val_fraction) == (4, 30, 0.2)
    assert twin.optimizer.lr == 0.05  # of recipe/data/digits, not of the cell
    assert (twin.schedule.kind, twin.ema.decay, twin.label_smoothing) == ("multistep", None, 0)
    assert twin.trainer.max_epochs == 1
    assert twin.evaluation.weights == "student"
    by_hand = natural_by_hand(outputs, "seed=4", "data.val_fraction=0.2", "trainer.max_epochs=1")
    assert differences(deciding(plain(by_hand)), deciding(plain(twin))) == []
    assert train(by_hand).folder == run.folder
    assert len(fits) == 1


def natural_by_hand(outputs: Path, *more: str) -> DictConfig:
    """``defense=none base=standard`` on the cell's model and data, all else its own recipe's."""
    return config.resolve(
        config.compose([
            "defense=none", "base=standard", "model=resnet_small", "model.widths=[4,4,8,8]", "data=digits",
            "data.source=fake", "data.image_size=8", "data.limit_train=30", "data.limit_test=10", "data.batch_size=8",
            "data.probe=10", "trainer=cpu", "trainer.progress=false", "validation.steps=1", "validation.step=1",
            "attack=none", f"paths.outputs={outputs}", *more,
        ])
    )  # fmt: skip


@pytest.mark.parametrize(
    ("natural", "own"),
    [
        (["natural.trainer.max_epochs=3"], ["trainer.max_epochs=3"]),
        (["natural.optimizer.lr=0.2", "natural.trainer.max_epochs=2"], ["optimizer.lr=0.2", "trainer.max_epochs=2"]),
        (["natural.schedule.epochs=2"], ["schedule.epochs=2"]),
        (["natural.schedule.kind=cosine"], ["schedule.kind=cosine"]),
        ([], []),
    ],
)
def test_natural_replaces_its_own_recipe(cell: Cell, outputs: Path, natural: list[str], own: list[str]) -> None:
    twin = running.twin_config(cell("defense=fsr", *natural), defense="none", base="standard")
    assert differences(deciding(plain(natural_by_hand(outputs, *own))), deciding(plain(twin))) == []


def test_the_twin_keeps_what_decides_the_comparison(cell: Cell, outputs: Path) -> None:
    """Model, data, threat, precision and formats are the cell's."""
    cfg = cell("defense=fsr", "model.widths=[2,4,8,8]", "threat.eps=0.1", "threat.norm=linf", "data.augment=crop_flip",
               "channels_last=true", "trainer.deterministic=true")  # fmt: skip
    twin = running.twin_config(cfg, defense="none", base="standard")
    for section in ("model", "data", "threat", "attack", "paths"):
        assert twin[section] == cfg[section], section
    assert twin.channels_last is True
    assert twin.trainer.deterministic is True
    assert twin.trainer.precision == cfg.trainer.precision


def test_twins_of_all_cells_of_a_grid_are_trained_once(cell: Cell, fits: list[DictConfig]) -> None:
    runs = {
        twin_of(cell(f"defense={defense}", f"base={base}", "natural.trainer.max_epochs=1"))[1].folder
        for defense in ("none", "fsr")
        for base in ("at", "trades")
    }
    assert len(runs) == 1
    assert len(fits) == 1


def test_natural_that_names_no_key(cell: Cell) -> None:
    with pytest.raises(UserError) as refused:
        running.twin_config(cell("+natural.trainer.max_epoch=1"), defense="none", base="standard")
    assert "natural.trainer.max_epoch" in str(refused.value)


def test_a_finished_run_is_not_trained_again(cell: Cell, fits: list[DictConfig]) -> None:
    run = train(cell(*SAME))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.rglob("*") if p.is_file()}
    assert train(cell(*SAME, "attack=pgd20", "data.limit_test=20")).folder == run.folder
    assert len(fits) == 1
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}
    assert {p: v for p, v in after.items() if p.name != ".lock"} == {
        p: v for p, v in before.items() if p.name != ".lock"
    }


def test_what_is_kept(cell: Cell, tmp_path: Path) -> None:
    """What `extend` goes on from; weights alone, or everything, where runs.keep says so; always the same."""
    options = (*SAME, "ema=wa", "data.val_fraction=0.3")
    usual = train(cell(*options, f"paths.outputs={tmp_path / 'usual'}"))
    assert torch.load(usual.last, weights_only=True)["optimizer_states"][0]["state"]
    assert not torch.load(usual.best, weights_only=True).get("optimizer_states")
    assert not usual.previous.exists()
    lean = train(cell(*options, "runs.keep=weights", f"paths.outputs={tmp_path / 'lean'}"))
    full = train(cell(*options, "runs.keep=all", f"paths.outputs={tmp_path / 'full'}"))
    assert lean.name == full.name
    for name in ("last", "best"):
        a, b = (torch.load(getattr(r, name), weights_only=True) for r in (lean, full))
        assert not a.get("optimizer_states")
        assert b["optimizer_states"][0]["state"]
        assert a["redoubt"]["ema"].keys() == b["redoubt"]["ema"].keys()
        for key, tensor in b["state_dict"].items():
            assert torch.equal(a["state_dict"][key], tensor)
        assert getattr(lean, name).stat().st_size < getattr(full, name).stat().st_size


def fail_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> list[bool]:
    """The training step raises in the given epoch while the list holds True."""
    on = [True]
    true = RobustModule.training_step

    def training_step(self: RobustModule, *args: Any) -> None:
        if on[0] and self.trainer.current_epoch == epoch:
            raise RuntimeError("the disk is on fire\nand more")
        true(self, *args)

    monkeypatch.setattr(RobustModule, "training_step", training_step)
    return on


def test_a_failed_run_says_why_and_goes_on(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("trainer.max_epochs=3", "runs.keep=all", "defense=fsr")
    whole = train(cell(*options, f"paths.outputs={tmp_path / 'whole'}"))
    broken = fail_in_epoch(monkeypatch, 1)
    with pytest.raises(RuntimeError, match="on fire"):
        train(cell(*options))
    (run,) = Store(cell().paths.outputs).list()
    assert run.status["state"] == "failed"
    assert run.status["reason"] == "the disk is on fire"
    assert run.status["epoch"] == 1
    assert len(read_rows(run.metrics_file)) == 1
    broken[0] = False
    again = train(cell(*options))
    assert again.folder == run.folder
    assert again.status["state"] == "done"
    assert again.status["reason"] is None
    assert everything(again.last) == everything(whole.last)
    assert len(read_rows(again.metrics_file)) == 3


def test_a_run_that_failed_before_its_first_epoch_starts_again(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fail_in_epoch(monkeypatch, 0)
    with pytest.raises(RuntimeError):
        train(cell(*SAME))
    broken[0] = False
    assert train(cell(*SAME)).status["state"] == "done"


def test_a_longer_run_is_another_run(cell: Cell) -> None:
    short, long = train(cell("trainer.max_epochs=1")), train(cell("trainer.max_epochs=2"))
    assert short.folder != long.folder
    assert [len(read_rows(r.metrics_file)) for r in (short, long)] == [1, 2]


def test_config_on_disk_is_the_run_s_own(cell: Cell) -> None:
    cfg = cell(*SAME, "defense=fsr")
    run = train(cfg)
    assert run.config() == plain(cfg)
    data = build_data(cfg)
    assert running.identify(config.OmegaConf.create(run.config()), data) == run.hash


@pytest.mark.parametrize(
    ("base", "decides"), [("at", "val/pgd1"), pytest.param("standard", "val/clean", marks=pytest.mark.slow)]
)
def test_best_is_the_epoch_with_the_best_validation(cell: Cell, base: str, decides: str) -> None:
    run = train(cell(f"base={base}", "data.val_fraction=0.4", "trainer.max_epochs=4", "threat.eps=0.02",
                     "data.limit_train=100", "optimizer.lr=0.02", "runs.keep=all"))  # fmt: skip
    rows = read_rows(run.metrics_file)
    scores = [(float(r[decides]), float(r["val/clean"])) for r in rows]
    best = torch.load(run.best, weights_only=True)["redoubt"]["steps_done"]
    assert best == int(rows[scores.index(max(scores))]["step"])


def test_checkpoint_every_saves_within_an_epoch(
    cell: Cell, sigterm_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    true = running.Recorder.save

    def save(self: Any, trainer: Any, path: Path) -> None:
        true(self, trainer, path)
        saved.append(torch.load(path, weights_only=True)["redoubt"]["steps_done"])

    monkeypatch.setattr(running.Recorder, "save", save)
    train(cell("trainer.checkpoint_every=3", "trainer.max_epochs=2"))
    assert saved == [3, 4, 6, 8]
