"""Numbers that were once silently wrong, and names that once got through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from redoubt import jobs
from redoubt.build import build_data, locate
from redoubt.errors import UserError
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import judge
from redoubt.reporting.plan import show_plan
from redoubt.runs import running

Cell = Callable[..., DictConfig]


@pytest.mark.parametrize(
    "target",
    [
        "redoubt.data.cache.os.system",
        "redoubt.training.loggers.importlib.import_module",
        "redoubt.nets.reading.torch.load",
        "os.system",
    ],
)
def test_a_name_behind_an_allowed_module_is_refused(target: str) -> None:
    with pytest.raises(UserError, match="not allowed"):
        locate(target, "base")


@pytest.mark.parametrize(
    ("net", "change"),
    [
        (["model=resnet_small"], "model.normalize=true"),
        (["model=preact_resnet18", "data.limit_test=2"], "model.shortcut=input"),
    ],
)
def test_the_same_weights_in_another_net_are_another_evaluation(
    cell: Cell, tmp_path: Path, net: list[str], change: str
) -> None:
    file = tmp_path / "weights.pt"
    torch.save(jobs.build_module(cell(*net)).net.state_dict(), file)
    names = []
    for extra in ([], [change], []):
        cfg = cell(*net, *extra)
        cfg = DictConfig({**cfg, "run": None, "rescore": None, "checkpoint": str(file)})
        names.append(jobs.evaluate_only(cfg, [])["evaluation"])
    assert names[0] == names[2] != names[1]


def test_logits_that_are_not_finite_are_wrong_not_class_0(cell: Cell) -> None:
    cfg = cell()
    module = jobs.build_module(cfg).eval()
    with torch.no_grad():
        for p in module.net.parameters():
            p.fill_(float("nan"))
    images, labels = build_data(cfg).arrays("test")
    assert (labels == 0).any()
    found = judge(module, images, labels, Suite(), chunk=4, seed=0, device=torch.device("cpu"), progress=False)
    assert not found["natural"].any()


def test_weights_that_explode_in_the_last_step_are_not_saved(cell: Cell) -> None:
    cfg = cell(
        "model=cnn_small", "trainer.max_epochs=1", "data.limit_train=8", "optimizer.lr=1e30", "schedule=constant"
    )
    with pytest.raises(UserError, match="not finite"):
        running.train(cfg, build_data(cfg))
    (run,) = running.Store(cfg.paths.outputs).list()
    assert run.status["state"] == "failed"
    assert not run.last.exists()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluation.checkpoint=best"], "data.val_fraction"),
        (["attack=pgd20", "attack.attacks.pgd20.steps=1"], "attack.attacks.pgd20"),
        (["evaluation.beside=foo"], "foo"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_the_training(cell: Cell, overrides: list[str], says: str) -> None:
    cfg = cell(*overrides)
    with pytest.raises(UserError, match=says):
        jobs.train(cfg, [])
    assert not Path(cfg.paths.outputs).exists()


def test_a_plan_downloads_nothing(cell: Cell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "nothing"
    cfg = cell("data=svhn", "model=cnn_small", "data.source=official", "data.limit_train=null", f"data.root={root}")
    show_plan(cfg, jobs.console)
    assert "73,257 images" in capsys.readouterr().out
    assert not root.exists()


def test_an_evaluation_says_what_it_attacked(cell: Cell) -> None:
    cfg = cell("attack=pgd20", "attack.eps=0.1", "trainer.max_epochs=1", "data.limit_train=8")
    results = jobs.train(cfg, [])
    assert [r["axes"]["attack"] for r in results] == ["pgd20"]
    stored = list(Path(cfg.paths.outputs).glob("runs/*/eval/*/results.json"))
    assert [json.loads(f.read_text())["threat"] for f in stored] == [{"norm": "linf", "eps": 0.1}]
