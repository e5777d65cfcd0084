"""A run that is stopped after any step and started again equals the uninterrupted one bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tests.conftest import everything

from redoubt.build import build_data, build_module
from redoubt.runs import running
from redoubt.runs.files import read_rows
from redoubt.training.recorder import Stopped

STEPS = 8  # two epochs of 30 images in batches of 8


def run(cfg: DictConfig) -> Path:
    return running.train(cfg, build_data(cfg)).folder


def without_clock(folder: Path) -> list[dict[str, str]]:
    rows = read_rows(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


CELLS = [
    ["defense=fsr", "base=trades", "ema=wa", "schedule=onecycle"],
    ["defense=none", "base=mart", "ema=wa", "ema.warmup=true", "schedule=cosine", "optimizer.clip=1"],
    ["defense=afd", "defense.pretrained={natural}", "awp.rho=0.01", "awp.warmup=1"],
    [
        "defense=cure", "defense.pretrained={natural}", "defense.rate=0.5", "defense.decay_warmup=true",
        "defense.freeze=update", "ema=wa", "defense.warmup_epochs=0.5",
    ],
    ["defense=cure", "defense.pretrained={natural}", "defense.loss=rgp", "defense.criterion=joint", "base=at"],
    ["defense=afd", "defense.update=joint", "base=trades"],
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        *((overrides, (3, 4)) for overrides in CELLS[2:4]),  # in an epoch's last steps, and at its end
        *(pytest.param(overrides, range(1, STEPS), marks=pytest.mark.slow) for overrides in CELLS),
    ],
)
def test_stopped_after_a_step(
    cell: Callable[..., DictConfig],
    sigterm_after: Callable[[int | None], None],
    overrides: list[str],
    steps: Sequence[int],
    tmp_path: Path,
) -> None:
    natural = tmp_path / "natural.pt"  # which the module of the resumed run could not draw from its own seed
    torch.save(build_module(cell("model.widths=[4,4,8,8]", "seed=5")).net.state_dict(), natural)

    def at(name: str) -> DictConfig:
        chosen = [o.format(natural=natural) for o in overrides]
        return cell("model.widths=[4,4,8,8]", *chosen, "runs.keep=all", f"paths.outputs={tmp_path / name}")

    whole = run(at("whole"))
    expected = everything(whole / "checkpoints/last.ckpt")
    for step in steps:
        sigterm_after(step)
        with pytest.raises(Stopped) as stopped:
            run(at(f"stopped{step}"))
        assert stopped.value.code == 128 + 15
        again = run(at(f"stopped{step}"))
        assert everything(again / "checkpoints/last.ckpt") == expected, f"stopped after step {step}"
        assert without_clock(again) == without_clock(whole)


def test_stopped_often(cell: Callable[..., DictConfig], sigterm_after: Callable[[int | None], None], tmp_path: Path):
    extra = ["defense=fsr", "base=at", "data.augment=crop_flip", "runs.keep=all"]
    whole = run(cell(*extra, f"paths.outputs={tmp_path / 'whole'}"))
    for step in (1, 3, 4, 5, 8):
        sigterm_after(step)
        with pytest.raises(Stopped):
            run(cell(*extra))
    folder = run(cell(*extra))
    assert everything(folder / "checkpoints/last.ckpt") == everything(whole / "checkpoints/last.ckpt")
    assert [row["step"] for row in read_rows(folder / "metrics.csv")] == ["4", "8"]


def test_a_finished_run_answers_from_the_store(cell: Callable[..., DictConfig], caplog: pytest.LogCaptureFixture):
    folder = run(cell())
    before = (folder / "checkpoints/last.ckpt").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert run(cell()) == folder
    assert re.search("finished: answered from", caplog.text)
    assert (folder / "checkpoints/last.ckpt").stat().st_mtime_ns == before


def test_another_seed_is_another_run(cell: Callable[..., DictConfig]):
    assert run(cell("seed=1")) != run(cell())
