"""The W&B dashboard's specification, from a store made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from redoubt.errors import UserError
from redoubt.reporting import commands, dashboard
from redoubt.runs.files import write_json, write_text

pytest.importorskip("wandb_workspaces")


def score(value: float) -> dict[str, float]:
    return {"accuracy": value, "low": value - 0.1, "high": value + 0.1, "n": 10}


def make(outputs: Path, data: str, seed: int, lambda_sep: float, *, offline: bool) -> Path:
    name = f"fsr-at-resnet18-{data}-s{seed}"
    folder = outputs / "runs" / f"{name}-{seed:010d}"
    axes = {"defense": "fsr", "base": "at", "model": "resnet18", "data": data}
    config = {
        "axes": axes, "seed": seed, "defense": {"lambda_sep": lambda_sep, "tau": 0.1}, "optimizer": {"lr": 0.1 * seed},
        "evaluation": {"chunk": 100 + seed},
    }  # fmt: skip
    write_text(folder / "config.yaml", yaml.safe_dump(config))
    write_json(folder / "status.json", {"state": "done"})
    write_text(folder / "metrics.csv", "epoch,step,val/clean,train/loss,train/updated/conv1,lr\n1,4,0.5,2.0,0.7,0.1\n")
    results = {
        "axes": {**axes, "attack": "fsr_suite", "seed": seed}, "nrr": {"cw": 0.4},
        "metrics": {"natural": score(0.8), "cw": score(0.4), "ensemble": score(0.3)},
    }  # fmt: skip
    write_json(folder / "eval" / "fsr_suite-0123456789" / "results.json", results)
    write_json(folder / "eval" / "fsr_suite-0123456789" / "attack.json", {"limit_test": 10})
    if offline:
        (folder / "wandb" / f"offline-run-20260101_000000-{seed:010d}").mkdir(parents=True)
    return folder


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(dashboard, "logged_in", lambda: False)
    make(tmp_path, "cifar10", 1, 0.5, offline=True)
    make(tmp_path, "cifar10", 2, 1.0, offline=False)
    make(tmp_path, "svhn", 3, 1.0, offline=True)
    return tmp_path


def panels(specification: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """View type -> configs of a workspace's panels."""
    found: dict[str, list[dict[str, Any]]] = {}
    for section in specification["spec"]["section"]["panelBankConfig"]["sections"]:
        for panel in section["panels"]:
            found.setdefault(panel["viewType"], []).append(panel["config"])
    return found


def test_workspace_of_a_data_set(outputs: Path) -> None:
    commands.main(["wandb", f"paths.outputs={outputs}", "project=mine"])
    cifar10 = json.loads((outputs / "wandb" / "workspace-cifar10.json").read_text())
    assert cifar10["project"] == "mine"
    found = panels(cifar10)
    scatter, over = found["Scatter Plot"][0], found["Scatter Plot"][1]
    assert (scatter["xAxis"], scatter["yAxis"]) == ("summary:eval/fsr_suite/natural", "summary:eval/fsr_suite/ensemble")
    lines = {line["metrics"][0]: line for line in found["Run History Line Plot"]}
    assert set(lines) == {"val/clean", "train/loss"}
    assert lines["val/clean"]["xAxis"] == "epoch"
    assert lines["val/clean"]["groupBy"] == "axes.value.defense"
    assert (over["xAxis"], over["yAxis"]) == ("config:defense.value.lambda_sep", "config:defense.value.tau")
    assert over["zAxis"] == "summary:eval/fsr_suite/ensemble"
    (parallel,) = found["Parallel Coordinates Plot"]
    assert [column["accessor"] for column in parallel["columns"]] == [
        "config:axes.value.defense", "config:axes.value.base", "config:axes.value.model",
        "config:defense.value.lambda_sep", "config:defense.value.tau", "config:optimizer.value.lr",
        "summary:eval/fsr_suite/natural", "summary:eval/fsr_suite/ensemble",
    ]  # fmt: skip
    assert found["Parameter Importance"][0]["targetKey"] == "eval/fsr_suite/ensemble"
    assert '"eval/fsr_suite/classes"' in json.dumps(found["Weave"])
    (runs,) = cifar10["spec"]["section"]["runSets"]
    assert runs["filters"]["filters"][0]["value"] == ["data:cifar10"]
    assert runs["runFeed"]["columnPinned"]["summary:eval/fsr_suite/ensemble"]


def test_report_has_a_chapter_for_each_data_set(outputs: Path, tmp_path: Path) -> None:
    dashboard.wandb(outputs=str(outputs), to=str(tmp_path / "there"))
    blocks = json.loads((tmp_path / "there" / "report.json").read_text())["spec"]["blocks"]
    chapters = [b["children"][0]["text"] for b in blocks if b["type"] == "heading" and b["level"] == 1]
    assert chapters == ["cifar10", "svhn"]
    grids = [b["metadata"]["runSets"][0]["filters"]["filters"][0]["value"] for b in blocks if b["type"] == "panel-grid"]
    assert grids == sorted(grids)
    assert {tuple(g) for g in grids} == {("data:cifar10",), ("data:svhn",)}


def test_what_to_do_without_a_login(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sent = next(outputs.glob("runs/*svhn*/wandb/offline-run-*"))
    (sent / "run-0000000003.wandb.synced").touch()
    dashboard.wandb(outputs=str(outputs))
    out = capsys.readouterr().out
    assert "wandb login" in out
    (unsent,) = outputs.glob("runs/*cifar10-s1*/wandb/offline-run-*")
    assert f"wandb sync {unsent}\n" in out
    assert "1 of 3 runs are not in W&B" in out
    command = f"redoubt eval run=fsr-at-resnet18-cifar10-s2-0000000002 paths.outputs={outputs} attack=fsr_suite"
    assert f"{command} data.limit_test=10 data.balanced=true logger=wandb" in out


def test_saved_where_logged_in(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    saved = []

    class Saved:
        url = "https://wandb.example/view"

    def save(view: Any) -> type[Saved]:
        saved.append((view.entity, getattr(view, "name", None) or view.title))
        return Saved

    monkeypatch.setattr(dashboard, "logged_in", lambda: True)
    monkeypatch.setattr(dashboard, "_default_entity", lambda: "us")
    monkeypatch.setattr(ws.Workspace, "save", save)
    monkeypatch.setattr(wr.Report, "save", save)
    dashboard.wandb(outputs=str(outputs))
    assert saved == [("us", "Redoubt: cifar10"), ("us", "Redoubt: svhn"), ("us", "Redoubt")]
    assert "saved: https://wandb.example/view" in capsys.readouterr().out
    assert not (outputs / "wandb").exists()

    monkeypatch.setattr(wr.Report, "save", lambda view: 1 / 0)
    dashboard.wandb(outputs=str(outputs))
    assert (outputs / "wandb" / "report.json").is_file()
    assert "division by zero; writing the specifications" in caplog.text


def test_without_runs_or_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no runs are in it"):
        dashboard.wandb(outputs=str(tmp_path))
    monkeypatch.setattr(dashboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"redoubt\[wandb\]"):
        dashboard.wandb(outputs=str(tmp_path))
