"""What an evaluation leaves behind: the layout that others rely on, computed once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from redoubt.build import build_data
from redoubt.evaluation import record
from redoubt.evaluation.results import wilson
from redoubt.runs import running
from redoubt.runs.loading import load
from redoubt.runs.store import Run

Cell = Callable[..., DictConfig]
SUITE = ["natural", "fgsm", "pgd20", "pgd100", "cw", "ensemble"]
FAST = ("attack=fsr_suite", "attack.attacks.pgd100.steps=22", "trainer.max_epochs=1")


def evaluated(cfg: DictConfig) -> tuple[Run, dict[str, Any]]:
    data = build_data(cfg)
    run = running.train(cfg, data)
    return run, running.evaluate_run(cfg, data, run)


def folder_of(run: Run, results: dict[str, Any]) -> Path:
    return run.eval / results["evaluation"]


def test_layout_of_results_json(cell: Cell) -> None:
    cfg = cell("defense=fsr", "base=trades", "seed=3", *FAST)
    run, results = evaluated(cfg)
    assert json.loads((folder_of(run, results) / "results.json").read_text()) == results
    assert list(results) == [
        "run", "evaluation", "axes", "threat", "checkpoint", "weights", "n", "metrics", "nrr", "train_seconds",
        "eval_seconds", "audited", "weights_id", "members", "evaluated", "subset", "audits", "audit_failed",
    ]  # fmt: skip
    assert results["run"] == run.name
    assert results["evaluation"].startswith("fsr_suite-")
    assert results["axes"] == {
        "model": "resnet_small", "defense": "fsr", "base": "trades", "data": "digits", "attack": "fsr_suite",
        "seed": 3,
    }  # fmt: skip
    assert results["threat"] == {"norm": "linf", "eps": 0.2}
    assert (results["checkpoint"], results["weights"], results["n"]) == ("last", "student", 10)
    assert list(results["metrics"]) == SUITE
    for metric in results["metrics"].values():
        assert list(metric) == ["accuracy", "low", "high", "n"]
        assert 0 <= metric["low"] <= metric["accuracy"] <= metric["high"] <= 1
        assert (metric["low"], metric["high"]) == wilson(round(metric["accuracy"] * 10), 10)
        assert metric["n"] == 10
    assert list(results["nrr"]) == ["cw"]
    assert results["train_seconds"] > 0
    assert results["eval_seconds"] > 0
    assert results["audited"] is False


def test_verdicts_are_of_the_examples_that_they_name(cell: Cell) -> None:
    cfg = cell(*FAST, "data.limit_test=13", "evaluation.chunk=5", "inner.steps=1", "trainer.max_epochs=2")
    run, results = evaluated(cfg)
    found = np.load(folder_of(run, results) / "verdicts.npz")
    assert set(found) == {*SUITE, "index", "label"}
    for name in SUITE:
        assert found[name].dtype == bool
        assert found[name].shape == (13,)
        assert results["metrics"][name]["accuracy"] == pytest.approx(found[name].mean())
    whole = cell("data.limit_test=null")
    images, labels = build_data(whole).arrays("test")
    assert len(set(found["index"])) == 13
    assert (labels.numpy()[found["index"]] == found["label"]).all()
    with torch.no_grad():  # index names the very images whose verdicts these are
        right = load(run).logits(images[found["index"]].float() / 255).argmax(1).numpy() == found["label"]
    assert (right == found["natural"]).all()
    attacks = [found[name] for name in SUITE[:-1]]
    assert (found["ensemble"] == np.logical_and.reduce(attacks)).all()
    assert found["ensemble"].mean() <= min(a.mean() for a in attacks)


BASE = (*FAST, "data.val_fraction=0.3", "attack.attacks.pgd100.steps=21")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def again(trained: Path, outputs: Path, cell: Cell) -> Callable[..., tuple[Run, dict[str, Any]]]:
    """Evaluates one run, trained once for all tests, as the options say."""
    if not (trained / "runs").exists():
        evaluated(cell(*BASE, f"paths.outputs={trained}"))
    shutil.copytree(trained, outputs)
    return lambda *options: evaluated(cell(*BASE, *options))


def test_a_stored_evaluation_is_answered(again: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(record, "Judge", never)
    run, first = again()
    before = {p: p.read_bytes() for p in run.eval.rglob("*") if p.is_file()}
    assert again()[1] == first
    assert {p: p.read_bytes() for p in run.eval.rglob("*") if p.is_file()} == before
    assert len(run.evaluations()) == 1


@pytest.mark.parametrize(
    "option",
    ["attack.eps=0.05", "evaluation.checkpoint=best",
     *(pytest.param(option, marks=pytest.mark.slow) for option in (
        "attack.attacks.pgd20.steps=21", "evaluation.chunk=3", "evaluation.seed=1", "data.limit_test=11",
        "attack.ensemble=false",
     ))],
)  # fmt: skip
def test_another_evaluation_of_the_same_run(again: Any, option: str) -> None:
    run, first = again()
    before = (folder_of(run, first) / "results.json").read_bytes()
    trained = run.last.read_bytes()
    same, second = again(option)
    assert same.folder == run.folder
    assert run.last.read_bytes() == trained
    assert (folder_of(run, first) / "results.json").read_bytes() == before
    assert second["evaluation"] != first["evaluation"]
    if option == "attack.eps=0.05":
        assert second["threat"]["eps"] == 0.05
        assert second["metrics"]["fgsm"]["accuracy"] >= first["metrics"]["fgsm"]["accuracy"]
    if option.endswith("=best"):
        assert second["checkpoint"] == "best"


def test_options_that_change_no_verdict_are_the_same_evaluation(again: Any) -> None:
    run, first = again()
    _, second = again("trainer.progress=true", "data.root=elsewhere", "threat.norm=linf")
    assert second == first
    assert len(run.evaluations()) == 1


def test_an_evaluation_that_was_cut_off_is_done_again(again: Any) -> None:
    run, results = again()
    (folder_of(run, results) / "results.json").unlink()
    _, second = again()
    assert second["metrics"] == results["metrics"]
    assert (folder_of(run, results) / "results.json").is_file()


def test_attack_none_is_clean_accuracy_alone(cell: Cell) -> None:
    run, results = evaluated(cell("attack=none", "trainer.max_epochs=1"))
    assert list(results["metrics"]) == ["natural"]
    assert results["nrr"] == {}
    assert set(np.load(folder_of(run, results) / "verdicts.npz")) == {"natural", "index", "label"}


def test_ema_and_student_are_two_evaluations(cell: Cell) -> None:
    base = ("ema=wa", "attack=none", "trainer.max_epochs=1")
    run, average = evaluated(cell(*base))
    same, student = evaluated(cell(*base, "evaluation.weights=student"))
    assert same.folder == run.folder
    assert (average["weights"], student["weights"]) == ("ema", "student")
    assert average["evaluation"] != student["evaluation"]
