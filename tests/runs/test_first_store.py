"""The store that version 0.1.0 left, `tests/data/store`: answered from, listed, continued, attacked, exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Shell
from tests.data.make_store import AUDIT, EVALUATION, EXPORT, SWEEP, TRAIN, UNFINISHED, digest, runs
from tests.numbers.cells import machine, rows
from tests.test_ddp import launched

import redoubt
from redoubt.attacks import WhiteBox

STORE = Path(__file__).resolve().parents[1] / "data/store"
RECORD = json.loads((STORE / "record.json").read_text())
#: Elsewhere the last bits may differ.
HERE = RECORD["machine"] == machine()
NAMES = sorted(RECORD["runs"])


@pytest.fixture
def old(tmp_path: Path, shell: Shell) -> Path:
    """A copy, in which ``shell`` is."""
    folder = tmp_path / "old"
    shutil.copytree(STORE, folder)
    shell.at(folder)
    return folder


def run_named(folder: Path, begin: str) -> Path:
    (found,) = (folder / "outputs/runs").glob(f"{begin}-*")
    return found


def contents(folders: Iterable[Path]) -> dict[Path, bytes]:
    """Every file's bytes; of a sweep's cell its answer: once a file of ``conf/`` has changed it is looked at anew."""
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    found = {file: file.read_bytes() for file in files if not file.name.endswith(".lock")}
    for file in found:
        if file.parent.name == "cells":
            record = json.loads(found[file])
            answer = [record[key] for key in ("overrides", "evaluations", "state", "run")]
            found[file] = json.dumps([answer, [(r["evaluation"], r["metrics"]) for r in record["results"]]]).encode()
    return found


def test_every_command_is_answered(old: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run and evaluation has the name that it had: nothing is trained, attacked or changed."""
    monkeypatch.setattr(WhiteBox, "__call__", lambda *_: pytest.fail("attacks"))
    before = contents([old / "outputs"])
    for words in TRAIN.values():
        ended = shell("train", *words)
        assert (ended.code, "training" in ended.err) == (0, False), ended.err
    for command in (("train", *SWEEP), ("eval", *EVALUATION)):
        ended = shell(*command)
        assert (ended.code, "training" in ended.err) == (0, False), ended.err
    assert contents([old / "outputs"]) == before


def test_every_run_is_listed(old: Path, shell: Shell) -> None:
    listed = shell("runs", "ls")
    assert listed.code == 0
    for name in NAMES:
        (line,) = [line for line in listed.out.splitlines() if name.rpartition("-")[2] in line]
        assert ("done" in line) == (not name.startswith("none-trades"))
        assert shell("runs", "show", name).code == 0
    assert "interrupted" in shell("runs", "show", "none-trades-cnn_small-digits-s0").out
    assert "seeds: 2 cells, 2 done" in shell("report", "status").out


def test_the_unfinished_run_goes_on(old: Path) -> None:
    for command in launched(old, "train", *UNFINISHED):
        assert "resuming" in command.end().good().err or command.out == ""
    run = run_named(old, "none-trades")
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert [row["epoch"] for row in rows(run)] == [1, 2, 3]
    assert rows(run)[0] == rows(run_named(STORE, "none-trades"))[0]
    if HERE:
        assert runs(old) == RECORD["runs"]
    assert sorted(runs(old)) == NAMES


@pytest.mark.parametrize("begin", TRAIN)
def test_a_run_trained_again_is_the_same(begin: str, shell: Shell, tmp_path: Path) -> None:
    words = [word for word in TRAIN[begin] if not word.startswith(("logger", "attack"))]
    ended = shell("train", *words, "attack=none")
    assert ended.code == 0, ended.err
    again, before = run_named(tmp_path, begin), run_named(STORE, begin)
    assert again.name == before.name
    for new, stored in zip(rows(again), rows(before), strict=True):
        assert new == pytest.approx(stored, rel=1e-6 if HERE else 1e-3, abs=1e-6 if HERE else 0.02)
    if HERE:
        assert digest(again) == RECORD["runs"][before.name]


def test_kept_verdicts_are_used(old: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    (evaluation,) = run_named(old, "none-mart").glob("eval/fsr_suite-*")
    before = contents([evaluation])
    shutil.rmtree(evaluation)
    monkeypatch.setattr(WhiteBox, "__call__", lambda *_: pytest.fail("attacks"))
    ended = shell("eval", *EVALUATION)
    assert ended.code == 0, ended.err
    again = contents([evaluation])
    assert again.keys() == before.keys()
    for name in ("verdicts.npz", "attack.json"):
        assert again[evaluation / name] == before[evaluation / name]
    metrics = [json.loads(found[evaluation / "results.json"])["metrics"] for found in (again, before)]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("begin", TRAIN)
def test_a_run_is_attacked(begin: str, old: Path, shell: Shell) -> None:
    """By what it was attacked by, with nothing kept: the same verdicts."""
    run = run_named(old, begin)
    shutil.rmtree(run / "eval")
    before = contents([run])
    ended = shell("eval", f"run={run.name}", TRAIN[begin][-1])
    assert ended.code == 0, ended.err
    (results,) = run.glob("eval/*/results.json")
    stored = run_named(STORE, begin) / "eval" / results.parent.name
    now, recorded = (
        json.loads((folder / "results.json").read_text())["metrics"] for folder in (results.parent, stored)
    )
    assert now.keys() == recorded.keys()
    for name, metric in now.items():
        assert metric == pytest.approx(recorded[name], abs=0 if HERE else 0.02)
    if HERE:
        assert (results.parent / "verdicts.npz").read_bytes() == (stored / "verdicts.npz").read_bytes()
    after = contents([run])
    changed = {file.relative_to(run).parts[0] for file in before if after[file] != before[file]}
    assert changed <= {"wandb"}  # the new evaluation is added to its own run of W&B


def test_everything_is_reported(old: Path, shell: Shell) -> None:
    for command in ("html", "tables", "status"):
        ended = shell("report", command)
        assert ended.code == 0, ended.err
    (page,) = old.rglob("*.html")
    text = page.read_text()
    assert all(name in text for name in NAMES)
    assert "FSR's criteria" in text or "FSR&#x27;s criteria" in text  # the audit's failed check


@pytest.mark.slow
def test_everything_is_plotted(old: Path, shell: Shell) -> None:
    assert shell("report", "plot", "figure=all").code == 0
    drawn = [file.name for file in old.rglob("*.png") if "audit" not in file.parts]
    assert all(any(name in file for file in drawn) for name in NAMES if name.startswith(tuple(TRAIN))), drawn


def test_exported(old: Path, shell: Shell) -> None:
    before = load_file(STORE / "fsr.safetensors")
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    module = redoubt.load(run_named(old, "fsr-trades"))
    torch.testing.assert_close(redoubt.load(old / "fsr.safetensors").logits(x), module.logits(x))
    ended = shell("export", EXPORT[0], "to=again.safetensors")
    assert ended.code == 0, ended.err
    again = load_file(old / "again.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_audited_again(old: Path, shell: Shell) -> None:
    (stored,) = run_named(STORE, "none-mart").glob("audit/*/audit.json")
    shutil.rmtree(run_named(old, "none-mart") / "audit")
    shell("audit", *AUDIT)
    (again,) = run_named(old, "none-mart").glob("audit/*/audit.json")
    assert again.parent.name == stored.parent.name
    found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in (again, stored)]
    for key in ("run", "checkpoint", "weights", "threat", "n", "skipped"):
        assert found[0][key] == found[1][key]
    assert [check["name"] for check in found[0]["checks"]] == [check["name"] for check in found[1]["checks"]]
    if HERE:
        assert [c["value"] for c in found[0]["checks"]] == [c["value"] for c in found[1]["checks"]]
