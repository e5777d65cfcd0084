"""A grid: which cells a command means, each trained once, only what is missing, failures told and retried."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig
from tests.conftest import Shell
from tests.sweeps.cells import SMALL, killed, trainings

from hydra_plugins.redoubt_sweeper import expand
from redoubt import cli, sweeps
from redoubt.reporting.status import show
from redoubt.runs import running
from redoubt.runs.store import Run, Store

GRID = ["train", "-m", *SMALL, "sweep.name=g"]


def test_cells_of_a_command() -> None:
    words = ["defense=none,fsr", "seed=range(0,2)", "attack=fgsm,pgd20", "attack.eps=0.1"]
    cells, evaluations = expand(words, [""])
    assert cells == [[f"defense={d}", f"seed={s}"] for d in ("none", "fsr") for s in (0, 1)]
    assert evaluations == [["attack=fgsm", "attack.eps=0.1"], ["attack=pgd20", "attack.eps=0.1"]]


def test_cases_beside_each_other_and_the_command_line_over_them() -> None:
    cells, evaluations = expand(["seed=0"], ["a=1,2 b=5", "b=6", "b=6"])
    assert cells == [["a=1", "b=5", "seed=0"], ["a=2", "b=5", "seed=0"], ["b=6", "seed=0"]]
    assert evaluations == [[]]
    assert expand(["a=3"], ["a=1,2"])[0] == [["a=3"]]


def test_the_order_of_words_names_no_other_cell() -> None:
    key = sweeps.key_of(["a=1", "b=2"])
    assert key == sweeps.key_of(["b=2", "attack=fgsm", "a=1", "paths.outputs=elsewhere", "sweep.trial=3"])
    assert key != sweeps.key_of(["a=1", "b=3"])


def test_each_cell_once_and_then_only_what_is_missing(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainings(monkeypatch)
    jobs: list[str] = []
    true = cli._cell

    def counted(command: str, cfg: DictConfig, *rest: Any) -> Any:
        jobs.append(cfg.axes.base)
        return true(command, cfg, *rest)

    monkeypatch.setattr(cli, "_cell", counted)
    conf = Path("conf/schedule/own.yaml")
    conf.parent.mkdir(parents=True)
    conf.write_text("kind: constant\n")
    grid = ["train", "--config-dir", "conf", *GRID[1:], "base=at,trades"]

    first = shell(*grid, "attack=none,fgsm")
    assert (first.code, jobs, len(trained)) == (0, ["at", "trades"], 2), first.err
    assert "g: 2 cells, 2 done" in first.out
    assert "fgsm, linf eps 51/255 (0.2), student weights of last: natural" in first.out
    assert [len(run.evaluations()) for run in Store("outputs").list()] == [2, 2]

    assert shell(*grid, "attack=none,fgsm").code == 0
    assert len(jobs) == 2  # nothing was launched

    assert shell(*grid, "attack=none,fgsm,pgd20").code == 0
    assert (len(jobs), len(trained)) == (4, 2)  # looked at again, for the new attack alone
    assert [len(run.evaluations()) for run in Store("outputs").list()] == [3, 3]

    conf.write_text("kind: cosine\n")
    assert shell(*grid, "attack=none,fgsm,pgd20").code == 0
    assert (len(jobs), len(trained)) == (6, 2)  # a config changed: composed again, answered from the store

    more = shell(*[w.replace("base=at,trades", "base=standard") for w in grid], "attack=none")
    assert "g: 1 cells, 1 done" in more.out  # its own cells,
    assert "g: 3 cells, 3 done" in shell("report", "status").out  # beside which the folder keeps the others


def test_a_cell_that_fails_says_why_and_is_tried_again(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainings(monkeypatch)
    grid = [*GRID, "attack=none", "optimizer.lr=1e30,0.1"]
    for _ in range(2):
        ended = shell(*grid)
        assert ended.code == 2
        assert "1 done, 1 failed" in ended.out
        assert ended.err.count("loss or logits were not finite") == 1
        assert "lower optimizer.lr" in ended.out
    assert len(trained) == 3
    assert shell("report", "status", "sweep=g").code == 0


def test_a_cell_at_which_another_process_works_is_passed_over(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainings(monkeypatch)
    words = [*SMALL, "sweep.name=g"]
    cells, evaluations = expand([*words, "attack=none", "seed=0,1"], [""])
    sweep = sweeps.Sweep(Path("outputs/sweeps/g"))
    keys = sweep.add(cells, evaluations)
    with sweep.cell(keys[0], evaluations):
        ended = shell(*GRID, "attack=none", "seed=0,1")
        assert ended.code == 0
        assert "1 done, 1 running" in ended.out
        assert f"process {os.getpid()} on" in ended.out
        assert [name.split("-")[4] for name in trained] == ["s1"]
        with pytest.raises(sweeps.Taken), sweep.cell(keys[0], evaluations):
            pass


def test_a_cell_that_ends_between_two_looks_has_not_died(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here between the record, which says ``running``, and the question whether anybody holds its lock."""
    sweep = sweeps.Sweep(Path("outputs/sweeps/g").absolute())
    (key,) = sweep.add([["seed=0"]], [["attack=none"]])
    file = sweep.folder / "cells" / f"{key}.json"
    truly = sweeps.Sweep.locked
    with sweep.cell(key, [["attack=none"]]) as noted:
        assert sweep.record(key)["state"] == "running"
        running = file.read_text()
        noted["results"] = []
    ended = file.read_text()
    file.write_text(running)

    def locked(self: sweeps.Sweep, asked: str) -> bool:
        file.write_text(ended)
        return truly(self, asked)

    monkeypatch.setattr(sweeps.Sweep, "locked", locked)
    said = shell("report", "status").out
    assert "1 done" in said
    assert "died" not in said


def test_killed_in_the_middle(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [*GRID, "attack=none", "seed=0,1,2"]
    killed(4, *grid)  # three steps make a cell
    died = shell("report", "status").out
    assert "1 done, 1 interrupted, 1 missing" in died
    assert "died" in died
    trained = trainings(monkeypatch)
    ended = shell(*grid)
    assert (ended.code, len(trained)) == (0, 2)
    assert "3 cells, 3 done" in ended.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=0,1", "defense.tua=1"], "redoubt: defense.tua is not a key"),
        (["seed=0", "optimizer.lr=-1"], "redoubt: optimizer.lr=-1 must be at least"),
        (["optimizer.lr=0.1,-1", "seed=0,1"], "redoubt: cell optimizer.lr=-1 seed=0: optimizer.lr=-1 must be at least"),
        (
            ["seed=0,1", "attack=none,fgsm", "attack.eps=-1"],
            "redoubt: cell seed=0 attack=none attack.eps=-1: attack.eps=-1",
        ),
        (["seed=0,1", "sweep.name=../x"], "sweep.name=../x must be a file name"),
        (["seed=interval(0,1)"], "seed: an interval has no list of values"),
    ],
)
def test_refused_before_a_cell_begins(shell: Shell, words: list[str], says: str) -> None:
    ended = shell("train", "-m", *SMALL, *words)
    assert ended.code == 2
    assert says in ended.err
    assert not Path("outputs/runs").exists()


def test_several_processes_of_a_multirun(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}):
        with monkeypatch.context() as context:
            for name, value in place.items():
                context.setenv(name, value)
            ended = shell(*GRID, "seed=0,1")
        assert ended.code == 2
        assert "-m starts its own processes" in ended.err


def test_what_is_misspelt_or_tentative_leaves_no_sweep(shell: Shell) -> None:
    assert "fsrr" in shell(*GRID, "defense=none,fsrr").err
    assert "fgsmm" in shell(*GRID, "seed=0,1", "attack=fgsm,fgsmm").err  # before a cell is begun
    assert shell(*GRID, "seed=0,1", "attack=none", "trainer.fast_dev_run=true").code == 0
    assert not list(Path("outputs").glob("sweeps/*/sweep.json"))


def test_cells_that_nobody_works_on_are_an_exit_code(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweeps.Sweep(Path("outputs/sweeps/g"))
    (one, two) = sweep.add([["a=[x,y]"], ["a=[/z]"]])  # what rich would take for markup
    with sweep.cell(one, []), sweep.cell(two, []):
        assert show(sweep) == 0  # both are running
    for key in (one, two):
        with pytest.raises(SystemExit), sweep.cell(key, []):
            raise SystemExit(143)
    assert show(sweep) == 1
    out = capsys.readouterr().out
    assert "a=[x,y]" in out
    assert "a=[/z]" in out
    assert out.count("stopped by signal 15") == 2


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_left_for_the_end(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another sweep, or a natural run that is made: the next cell first, then it is waited for."""
    grid = [w for w in GRID if w != "sweep.name=g"]
    assert shell(*grid, "seed=0", "attack=none", "sweep.name=other").code == 0
    (first,) = Store("outputs").list()
    first.last.unlink()
    first.update(state="interrupted")  # as if it were still to be trained
    order: list[int] = []
    true = running._turn

    @contextmanager
    def turn(run: Run, wait: bool) -> Iterator[None]:
        if run.name == first.name and not wait:
            order.append(-1)
            raise sweeps.Taken(f"run {run.name} is in use by process 1")
        order.append(int(run.readable[-1]))
        with true(run, wait):
            yield

    monkeypatch.setattr(running, "_turn", turn)
    done = shell(*grid, "seed=0,1", "attack=none", "sweep.name=g")
    assert (done.code, order) == (0, [-1, 1, 0]), done
    assert "is in use by process 1" in done.err
