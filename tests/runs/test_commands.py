"""``redoubt runs`` on a fabricated store."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from redoubt.errors import UserError
from redoubt.runs import Run, Store
from redoubt.runs.commands import main
from redoubt.runs.files import write_bytes, write_json

AXES = {"model": "resnet18", "defense": "fsr", "base": "trades", "data": "svhn"}


def make(store: Store, seed: int, state: str, **status: object) -> Run:
    run = store.open(AXES, seed, f"{seed:010x}", {"axes": AXES, "seed": seed}, devices=["cpu"])
    with run.lock():
        run.update(state=state, max_epochs=80, **status)
    for name in ("last.ckpt", "last.ckpt.sha256", "best.ckpt", "epoch-3.ckpt"):
        write_bytes(run.checkpoints / name, bytes(1000))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    store = Store(tmp_path)
    done = make(store, 0, "done", epoch=80)
    metrics = {name: {"accuracy": value} for name, value in {"natural": 0.9, "pgd20": 0.5, "ensemble": 0.45}.items()}
    results = {"threat": {"norm": "linf", "eps": 8 / 255}, "n": 100, "metrics": metrics}
    write_json(done.eval / "fsr_suite-aa" / "results.json", results)
    failed = make(store, 1, "failed", epoch=3, reason="loss is not finite [step 7]")
    died = make(store, 2, "running", epoch=5)
    return [done, failed, died]


def call(tmp_path: Path, *argv: str) -> int:
    return main([*argv, "--outputs", str(tmp_path)])


def test_ls(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for part in (runs[0].name, "done", "80/80", "kB", "90.00 %", "45.00 % ensemble"):
        assert part in lines[1]
    assert "loss is not finite [step 7]" in lines[2]
    assert "interrupted" in lines[3]
    assert "died" in lines[3]


def test_ls_as_json(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--outputs", str(tmp_path), "ls", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["done", "failed", "interrupted"]
    assert (rows[0]["natural"], rows[0]["robust"], rows[0]["robust_attack"]) == (0.9, 0.45, "ensemble")
    assert rows[0]["bytes"] > 4000
    assert rows[1]["natural"] is None


def test_the_evaluation_that_stands_for_a_run_is_shown_and_named(
    tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """A later and weaker one, and one at another eps, do not take its place, whatever the times of the files are."""
    config = {"axes": AXES, "seed": 3, "threat": {"norm": "linf", "eps": 8 / 255}}
    config["evaluation"] = {"checkpoint": "last", "weights": "ema"}
    run = Store(tmp_path).open(AXES, 3, f"{3:010x}", config, devices=["cpu"])

    def add(suite: str, day: int, eps: float, robust: float, steps: int) -> None:
        attack = {"attacks": {"a": {"_target_": "redoubt.attacks.WhiteBox", "steps": steps}}}
        write_json(run.eval / f"{suite}-aa" / "attack.json", {"attack": attack})
        metrics = {"natural": {"accuracy": 0.9}, suite: {"accuracy": robust}}
        results = {"threat": {"norm": "linf", "eps": eps}, "checkpoint": "last", "weights": "ema", "n": 100}
        results |= {"axes": {**AXES, "attack": suite}, "members": {}, "evaluated": f"2026-12-{day:02}T00:00:00+00:00"}
        write_json(run.eval / f"{suite}-aa" / "results.json", {**results, "metrics": metrics})

    add("pgd20", 2, 8 / 255, 0.5, 20)
    add("fgsm", 3, 8 / 255, 0.6, 1)
    add("pgd100", 4, 2 / 255, 0.8, 100)
    call(tmp_path, "ls", "--json")
    row = json.loads(capsys.readouterr().out)[-1]
    assert (row["robust"], row["robust_attack"], row["evaluation"]) == (0.5, "pgd20", "pgd20-aa")
    assert (row["norm"], row["eps"], row["checkpoint"], row["weights"], row["n"]) == (
        "linf",
        8 / 255,
        "last",
        "ema",
        100,
    )
    call(tmp_path, "ls")
    shown = " ".join(capsys.readouterr().out.split())
    assert "50.00 % pgd20 pgd20, linf eps 8/255 (0.03137), ema weights of last" in shown
    call(tmp_path, "show", "0000000003")
    assert capsys.readouterr().out.count("stands for the run: yes\n  natural: 90.00 %\n  pgd20: 50.00 %") == 1
    assert Run(run.folder).standing()[0].name == "pgd20-aa"  # type: ignore[index]


def test_an_empty_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", f"paths.outputs={tmp_path}"]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    assert main(["ls", "--json", "--outputs", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_show(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "show", "0000000000") == 0
    out = capsys.readouterr().out
    for part in ("defense: fsr", "seed: 0", "state: done", "torch: ", "devices: cpu", "eval/fsr_suite-aa"):
        assert part in out
    for part in ("ensemble: 45.00 %", "checkpoints/best.ckpt: 1.0 kB"):
        assert part in out


def test_rm(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "rm", runs[1].name, runs[1].hash, "--yes") == 0
    out = capsys.readouterr().out
    assert out.count(runs[1].name) == 1
    assert "freed 4" in out
    assert [run.name for run in Store(tmp_path).list()] == [runs[0].name, runs[2].name]
    assert not list(Store(tmp_path).folder.glob(".removed-*"))


def test_rm_asks(tmp_path: Path, runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="--yes"):
        call(tmp_path, "rm", runs[1].name)
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    call(tmp_path, "rm", runs[1].name)
    assert runs[1].exists()
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    call(tmp_path, "rm", runs[1].name)
    assert not runs[1].exists()


def test_rm_refuses_a_locked_run_and_then_removes_none(tmp_path: Path, runs: list[Run]) -> None:
    with runs[0].lock(), pytest.raises(UserError, match="in use"):
        call(tmp_path, "rm", runs[1].name, runs[0].name, "--yes")
    with pytest.raises(UserError, match="no such run"):
        call(tmp_path, "rm", runs[1].name, "nonesuch", "--yes")
    assert all(run.exists() for run in runs)


def test_prune_failed(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    (Store(tmp_path).folder / ".removed-12").mkdir()
    assert call(tmp_path, "prune", "--failed", "--dry-run") == 0
    out = capsys.readouterr().out
    assert runs[1].name in out
    assert runs[2].name in out
    assert "would free" in out
    assert all(run.exists() for run in runs)
    assert call(tmp_path, "prune", "--failed", "--yes") == 0
    assert "freed " in capsys.readouterr().out
    assert [run.exists() for run in runs] == [True, False, False]
    assert not (Store(tmp_path).folder / ".removed-12").exists()
    call(tmp_path, "prune", "--failed", "--yes")
    assert "nothing to remove" in capsys.readouterr().out


def test_prune_checkpoints(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tmp_path, "prune", "--checkpoints", "--yes") == 0
    assert "freed 2.0 kB" in capsys.readouterr().out
    assert sorted(path.name for path in runs[0].checkpoints.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    assert len(list(runs[1].checkpoints.iterdir())) == 4
    runs[0].last.rename(runs[0].best)
    call(tmp_path, "prune", "--checkpoints", "--yes")
    assert runs[0].best.exists()  # never the only one


def test_prune_keeps_what_is_in_use(tmp_path: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    with runs[0].lock(), runs[1].lock():
        call(tmp_path, "prune", "--failed", "--checkpoints", "--yes")
    assert capsys.readouterr().out.count("kept") == 3
    assert [run.exists() for run in runs] == [True, True, False]
    assert runs[0].best.exists()


@pytest.mark.parametrize("argv", [["lss"], [], ["prune"], ["rm"], ["show"], ["ls", "--jsn"], ["show", "nonesuch"]])
def test_a_mistake_is_one_line(tmp_path: Path, argv: list[str]) -> None:
    with pytest.raises(UserError):
        call(tmp_path, *argv)


def test_weights_of_files_that_were_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of one file that hold the same are one line; what was written before has the default cell's axes."""
    for i, (file, suite, defense) in enumerate(
        (("w/a.pt", "pgd20", "none"), ("w/a.pt", "fgsm", None), ("b.pt", "fgsm", "fsr"))
    ):
        axes = {"model": "resnet18", "data": "svhn", "attack": suite, "defense": defense, "base": "at", "seed": 0}
        metrics = {"natural": {"accuracy": 0.9}, suite: {"accuracy": 0.1 * (i + 1)}}
        results = {"axes": axes, "checkpoint": file, "weights_id": file, "weights": "student", "n": 100,
                   "threat": {"norm": "linf", "eps": 8 / 255}, "metrics": metrics}  # fmt: skip
        write_json(tmp_path / "eval" / f"{suite}-{i}" / "results.json", results)
    assert call(tmp_path, "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("-")[0] for line in lines[1:]] == ["a.pt", "b.pt"]
    assert "weights" in lines[1]
    assert "30.00 % fgsm" in lines[2]
    assert call(tmp_path, "show", "w/a.pt") == 0
    out = capsys.readouterr().out
    assert out.startswith("w/a.pt\n")
    for part in ("model: resnet18", "defense: -", "base: -", "eval/pgd20-0", "fgsm: 20.00 %"):
        assert part in out
    assert call(tmp_path, "show", "b.pt") == 0
    assert "defense: fsr" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such run"):
        call(tmp_path, "show", "c.pt")
