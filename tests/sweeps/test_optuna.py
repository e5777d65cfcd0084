"""The search: what is asked for, resumed, shared, pruned, and told at the end."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Shell, refused
from tests.processes import start
from tests.sweeps.cells import SMALL, killed, trainings

from hydra_plugins.redoubt_sweeper import parsed
from redoubt import sweeps
from redoubt.errors import UserError
from redoubt.runs.files import read_rows
from redoubt.runs.store import Run, Store
from redoubt.search import Search, space

optuna = pytest.importorskip("optuna")

SEARCH = [
    "train", "-m", "hydra/sweeper=optuna", *SMALL, "sweep.name=s", "attack=none", "data.val_fraction=0.2",
    "hydra.sweeper.sampler=random",
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "storage": "sqlite:///optuna.db", "study": None, "trials": 4, "jobs": 1, "objective": ["robust"],
    "directions": None, "sampler": "random", "seed": 0, "sampler_options": {}, "pruner": None, "pruner_options": {},
}  # fmt: skip


def trials(name: str = "s", storage: str = "sqlite:///outputs/sweeps/optuna.db") -> list[Any]:
    return optuna.load_study(study_name=name, storage=storage).trials


def test_the_grammar_of_spaces() -> None:
    d = optuna.distributions
    words = {
        "a=1,b": d.CategoricalDistribution(["1", "b"]),
        "a=interval(0.1,2)": d.FloatDistribution(0.1, 2),
        "a=tag(log, interval(0.1,10))": d.FloatDistribution(0.1, 10, log=True),
        "a=int(interval(1,5))": d.IntDistribution(1, 5),
        "a=range(1,10,3)": d.IntDistribution(1, 7, step=3),
    }
    for word, wanted in words.items():
        assert space(parsed([word, "b=5"])) == {"a": wanted}, word
    refused(lambda: space(parsed(["a=tag(log, interval(0.0,1))"])), "a cannot be searched so")


def test_values_are_those_of_the_best_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics_file.write_text("epoch,val/clean,val/pgd10\n1,0.9,0.2\n2,0.5,0.4\n3,0.6,0.4\n4,0.7,\n")
    both = {**SETTINGS, "objective": ["robust", "natural"]}
    assert Search(both, "s", 10).values(run) == [0.4, 0.6]
    assert Search({**SETTINGS, "objective": ["natural"]}, "s", 10).values(run) == [0.9]
    assert Search({**SETTINGS, "objective": ["natural"], "directions": ["minimize"]}, "s", 10).values(run) == [0.5]
    refused(lambda: Search(SETTINGS, "s", 20).values(run), "has no val/pgd20", "val/pgd10")


def test_resumed_with_more_trials(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainings(monkeypatch)
    for total, new in ((1, 1), (3, 2), (3, 0)):
        ended = shell(*SEARCH, "defense=fsr", "defense.tau=tag(log, interval(0.01,1))", f"hydra.sweeper.trials={total}")
        assert ended.code == 0, ended.err
        assert len(trained) == new
        trained.clear()
    found = trials()
    assert len({t.params["defense.tau"] for t in found}) == 3
    assert all(t.state.name == "COMPLETE" for t in found)
    best = max(found, key=lambda t: (t.value, -t.number))
    assert f"trial {best.number}: val/pgd1 {100 * best.value:.2f} %: python src/train.py" in ended.out
    stored = {run.config()["defense"]["tau"] for run in Store("outputs").list()}
    assert stored == {t.params["defense.tau"] for t in found}

    # the printed command is that run: it is answered from the store, and can be attacked
    printed = re.search(r"python src/train.py (.*)", ended.out)
    assert printed is not None
    again = shell("train", *printed[1].replace("'", "").split(), "attack=fgsm")
    assert (again.code, trained) == (0, [])
    assert "FGSM" in again.out


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of its own, as Debian's package has it; the password is in PGPASSWORD."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL's server is not installed: apt install postgresql")
    pytest.importorskip("psycopg")
    with ExitStack() as last, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        folder = Path(last.enter_context(tempfile.TemporaryDirectory(prefix="redoubt-postgres-")))
        (folder / "password").write_text("secret")
        user = "postgres" if os.getuid() == 0 else None  # the server does not run as root
        if user is not None:
            shutil.chown(folder, user)

        def run(program: str, *arguments: str) -> None:
            command = [str(programs[-1].with_name(program)), "-D", str(folder / "data"), *arguments]
            subprocess.run(command, cwd=folder, user=user, check=True, timeout=60, stdout=subprocess.DEVNULL)

        (folder / "password").chmod(0o644)
        run("initdb", "--auth=scram-sha-256", "--username=redoubt", f"--pwfile={folder / 'password'}", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        s.close()
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", options)
        last.callback(run, "pg_ctl", "stop", "-m", "immediate")
        yield f"postgresql+psycopg://redoubt@127.0.0.1:{port}/postgres"


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_a_killed_worker_and_two_that_share(
    shell: Shell, database: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial of the dead is done first, with its values; two processes make no trial twice and none too many."""
    storage = "sqlite:///outputs/sweeps/optuna.db" if database == "sqlite" else request.getfixturevalue("postgres")
    monkeypatch.setenv("PGPASSWORD", "secret")
    words = [
        *SEARCH, "optimizer.lr=interval(0.01,0.1)", "trainer.max_epochs=2", "hydra.sweeper.trials=4",
        f"hydra.sweeper.storage='{storage}'",
    ]  # fmt: skip
    killed(4, *words)
    (left,) = trials(storage=storage)
    assert left.state.name == "RUNNING"

    helper = start(Path.cwd(), *words)
    ended = shell(*words)
    helper.end().good()
    assert ended.code == 0, ended.err
    found = trials(storage=storage)
    counted = [t for t in found if "requeued" not in t.user_attrs]
    assert [t.state.name for t in counted] == ["COMPLETE"] * 4
    assert found[0].state.name == "FAIL"
    assert found[0].params in [t.params for t in counted]
    assert len({t.user_attrs["worker"] for t in counted}) == 2
    assert len({t.user_attrs["cell"] for t in counted}) == len(Store("outputs").list()) == 4


@pytest.mark.slow
def test_a_server_that_does_not_let_in_is_one_line(
    shell: Shell, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SEARCH, "optimizer.lr=interval(0.01,0.1)"]
    monkeypatch.setenv("PGPASSWORD", "wrong")
    ended = shell(*words, f"hydra.sweeper.storage='{postgres}'")
    assert ended.code == 2
    assert re.fullmatch(r"redoubt: hydra.sweeper.storage: .*password authentication failed.*\n", ended.err), ended.err
    assert "wrong" not in ended.err


@pytest.mark.slow
def test_a_bad_trial_is_ended_early(shell: Shell) -> None:
    """By the median pruner, on a column whose values are known: the learning rate."""
    ended = shell(
        *SEARCH, "optimizer.lr=interval(0.01,0.1)", "schedule=constant", "trainer.max_epochs=3",
        "hydra.sweeper.objective=[lr]", "hydra.sweeper.pruner_options={n_startup_trials:1}", "hydra.sweeper.trials=4",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = trials()
    rates = [t.params["optimizer.lr"] for t in found]
    assert {t.state.name for t in found} == {"COMPLETE", "PRUNED"}
    assert found[0].state.name == "COMPLETE"  # nothing to compare with
    for number, trial in enumerate(found[1:], 1):
        median = sorted(rates[:number])[number // 2] if number % 2 else sum(sorted(rates[:number])[:2]) / 2
        complete = [t for t in found[:number] if t.state.name == "COMPLETE"]
        if len(complete) == number:
            assert (trial.state.name == "PRUNED") == (rates[number] < median)
    sweep = sweeps.find("outputs", "s")
    for trial in found:
        record = sweep.record(trial.user_attrs["cell"])
        (run,) = [r for r in Store("outputs").list() if r.config()["optimizer"]["lr"] == trial.params["optimizer.lr"]]
        pruned = trial.state.name == "PRUNED"
        assert len(read_rows(run.metrics_file)) == (1 if pruned else 3)
        assert run.status["state"] == ("interrupted" if pruned else "done")
        assert record["state"] == ("pruned" if pruned else "done")
        if pruned:
            assert run.status["reason"].startswith("pruned after epoch 1: lr")
            assert trial.intermediate_values == {1: pytest.approx(trial.params["optimizer.lr"])}
    assert re.search(r"s: 4 cells, \d done, \d pruned", ended.out)


@pytest.mark.slow
def test_failed_trials_are_told_and_the_others_go_on(shell: Shell) -> None:
    ended = shell(*SEARCH, "optimizer.lr=-1,0.1", "hydra.sweeper.trials=4")
    assert ended.code == 2
    states = {(t.params["optimizer.lr"], t.state.name) for t in trials()}
    assert states == {("-1", "FAIL"), ("0.1", "COMPLETE")}
    assert "must be at least 0" in next(t for t in trials() if t.state.name == "FAIL").user_attrs["reason"]


@pytest.mark.slow
def test_several_objectives(shell: Shell) -> None:
    ended = shell(*SEARCH, "seed=range(0,9)", "hydra.sweeper.objective=[robust,natural]", "hydra.sweeper.trials=2")
    assert ended.code == 0, ended.err
    study = optuna.load_study(study_name="s", storage="sqlite:///outputs/sweeps/optuna.db")
    assert len(study.trials) == 2
    assert all(len(t.values) == 2 for t in study.trials)
    assert len(re.findall(r"^trial \d: val/pgd1 [\d.]+ %, val/clean", ended.out, re.M)) == len(study.best_trials)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed=0,1", "data.val_fraction=0"], "set data.val_fraction"),
        (["seed=0"], "nothing to search"),
        (["seed=0,1", "hydra.sweeper.sampler=tpo"], "hydra.sweeper.sampler=tpo is not known: did you mean tpe?"),
        (["seed=0,1", "hydra.sweeper.directions=[up]"], "hydra.sweeper.directions must be"),
        (["seed=0,1", "hydra.sweeper.storage=nosql://x"], "hydra.sweeper.storage:"),
        (["seed=0,1", 'sweep.cases=["a=1"]'], "sweep.cases"),
    ],
)
def test_refused(shell: Shell, words: list[str], says: str) -> None:
    ended = shell(*SEARCH, *words)
    assert ended.code == 2, ended.err
    assert says in ended.err
    assert "Traceback" not in ended.err


def test_another_space_or_objective_under_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = sweeps.Sweep(tmp_path / "sweeps" / "s")
    asked = Search(SETTINGS, "s", 10).ask(space(parsed(["a=1,2"])), 1, sweep, "me")
    assert len(asked) == 1
    refused(lambda: Search(SETTINGS, "s", 10).ask(space(parsed(["a=1,3"])), 1, sweep, "me"), "another space")
    natural = {**SETTINGS, "objective": ["natural"]}
    refused(lambda: Search(natural, "s", 10).study(), "was begun to maximize val/pgd10", "sweep.name")
    assert issubclass(sweeps.Pruned, UserError)


@pytest.mark.slow
def test_asked_at_once_by_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that ask at the same time get different trials, and not one more than there shall be."""
    monkeypatch.chdir(tmp_path)
    sweep = sweeps.Sweep(tmp_path / "sweeps" / "s")
    found: list[Any] = []
    searched = space(parsed(["a=interval(0.0,1.0)"]))

    def work(name: str) -> None:
        while asked := Search({**SETTINGS, "trials": 6}, "s", 10).ask(searched, 2, sweep, name):
            found.extend(asked)

    with ExitStack() as alive:
        workers = [threading.Thread(target=work, args=(f"worker-{i}",)) for i in range(3)]
        for i, worker in enumerate(workers):
            alive.enter_context(sweep.hold(f"worker-{i}"))
            worker.start()
        for worker in workers:
            worker.join()
    assert sorted(t.number for t in found) == [0, 1, 2, 3, 4, 5]
    assert len({t.params["a"] for t in found}) == 6
