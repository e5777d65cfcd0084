"""Cells in other processes: joblib's workers, submitit's jobs, Slurm's script, several ranks of one cell."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from tests.conftest import Shell
from tests.faults.ranks import own_package
from tests.sweeps.cells import SMALL, trainings

from redoubt import launched, sweeps
from redoubt.launched import started_by_launcher
from redoubt.runs.store import Store
from redoubt.training.trainer import make_trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further processes find the package as this one does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def pids(name: str) -> set[int]:
    sweep = sweeps.find("outputs", name)
    return {sweep.record(key)["pid"] for key in sweep.plan["cells"]}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_workers(workers: int, shell: Shell, sources: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure's reason and exit code, the folders of --config-dir. (A single worker of joblib's is no process.)"""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    conf = Path("conf/schedule/own.yaml")
    conf.parent.mkdir(parents=True)
    conf.write_text("# @package schedule\nkind: constant\n")
    grid = [
        "train", "--config-dir", "conf", "-m", *SMALL, "schedule=own", "hydra/launcher=workers", "sweep.name=w",
        f"hydra.launcher.n_jobs={workers}", "attack=none", "optimizer.lr=0.1,0.2,1e30",
    ]  # fmt: skip
    ended = shell(*grid)
    assert ended.code == 2, ended.err
    assert "w: 3 cells, 2 done, 1 failed" in ended.out
    assert "lower optimizer.lr" in ended.out
    assert (os.getpid() in pids("w"), len(pids("w"))) == (workers == 1, workers)
    assert {run.config()["schedule"]["kind"] for run in Store("outputs").list()} == {"constant"}
    # what the workers did counts here: only the failed cell is left
    trained = trainings(monkeypatch)
    again = shell(*[w for w in grid if not w.startswith("hydra")])
    assert (again.code, len(trained)) == (2, 1), again.err
    assert "cell 3 of 3" not in ended.out


@pytest.mark.slow
def test_submitit_local(shell: Shell, sources: None) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    ended = shell(
        "train", "-m", *SMALL, "hydra/launcher=local", "sweep.name=l", "attack=none", "seed=0,1",
        "hydra.launcher.timeout_min=5",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "l: 2 cells, 2 done" in ended.out
    assert len(pids("l") - {os.getpid()}) == 2


FAKE = {
    "sacct": """#!/bin/sh
echo 'JobID|State|NodeList'
if [ -e "$SCRIPT.ended" ]; then echo '77|COMPLETED|localhost'; else echo '77|RUNNING|localhost'; fi
""",
    # runs the script in a job's environment
    "sbatch": """#!/bin/sh
for last; do :; done
cp "$last" "$SCRIPT"
export SLURM_JOB_ID=77 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0
export SLURM_NODEID=0 SLURM_NNODES=1 SLURM_JOB_NUM_NODES=1 SLURM_NTASKS_PER_NODE=1 SLURM_JOB_NAME=redoubt
export SLURM_JOB_NODELIST=localhost SLURM_CPUS_PER_TASK=4
{ sh "$last"; touch "$SCRIPT.ended"; } >"$SCRIPT.log" 2>&1 &
echo "Submitted batch job 77"
""",
    "srun": """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
    case "$1" in --output|--error) shift ;; esac
    shift
done
exec "$@"
""",
}


@pytest.mark.slow
def test_slurm(shell: Shell, sources: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that sbatch is given, and a cell in a job's environment."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SCRIPT", str(tmp_path / "script.sh"))
    ended = shell(
        "train", "-m", *SMALL, "hydra/launcher=slurm", "sweep.name=q", "attack=none", "seed=1",
        "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=2", "hydra.launcher.timeout_min=90",
        "hydra.launcher.setup=[module load cuda]",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "q: 1 cells, 1 done" in ended.out
    script = (tmp_path / "script.sh").read_text()
    for line in ("partition=gpu", "gpus-per-node=2", "time=90", "ntasks-per-node=1", "nodes=1", "cpus-per-task=4"):
        assert re.search(rf"^#SBATCH --{line}$", script, re.M), script
    assert "module load cuda" in script
    assert re.search(rf"^srun .*{re.escape(sys.executable)}.* submitit\.core\._submit", script, re.M)
    assert pids("q") != {os.getpid()}


def test_without_slurm(shell: Shell) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    ended = shell("train", "-m", *SMALL, "hydra/launcher=slurm", "attack=none", "seed=0,1")
    assert ended.code == 2
    assert "redoubt: hydra/launcher: Could not detect" in ended.err


@pytest.mark.parametrize(("part", "extra"), [("local", "slurm"), ("workers", "sweeps")])
def test_a_launcher_that_is_not_installed(shell: Shell, part: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = {"workers": "joblib", "local": "submitit"}[part]
    target = f"hydra.launcher._target_=hydra_plugins.hydra_{plugin}_launcher.gone.Launcher"
    ended = shell("train", "-m", *SMALL, f"hydra/launcher={part}", target, "seed=0,1")
    assert ended.code == 2
    assert f"pip install 'redoubt[{extra}]'" in ended.err
    assert "Traceback" not in ended.err


def test_a_slurm_job_of_one_task_is_a_machine(cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
    assert not started_by_launcher()
    assert not launched.several()
    trainer = make_trainer(cell("trainer.devices=2"), tmp_path, [])
    assert isinstance(trainer.strategy.cluster_environment, LightningEnvironment)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert started_by_launcher()
    assert launched.several()
    assert not launched.first()


TWO = [w for w in SMALL if w != "trainer=cpu"] + ["trainer=ddp_cpu", "attack=none", "data.val_fraction=0.34"]
#: Of what processes of ours set for themselves, and must not leave behind for the next cell.
OURS = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"}


@pytest.fixture
def told(sources: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A defense that writes down what each rank has trained with: see `trained`; its arguments."""
    own, env = own_package(tmp_path)
    monkeypatch.setenv("PYTHONPATH", env["PYTHONPATH"])
    monkeypatch.syspath_prepend(str(tmp_path / "theirs"))
    monkeypatch.delitem(sys.modules, "faulty.parts", raising=False)
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    return [*own, "-m", *TWO, "defense=faulty"]


def trained(rank: int) -> list[tuple[float, int]]:
    """(learning rate, seed) of the cells that a rank has trained, in turn."""
    lines = Path(f"rank{rank}.txt").read_text().splitlines()
    return [(float(lr), int(seed)) for lr, seed in map(str.split, lines)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local"])
def test_two_ranks_in_a_multirun(launcher: str, shell: Shell, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a Slurm job of one task, and by submitit: both processes of a cell train the same one."""
    if launcher == "local":
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
        told = [*told, "hydra/launcher=local", "hydra.launcher.timeout_min=5"]
    else:
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_NTASKS", "1")
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")
        monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = set(os.environ)
    ended = shell("train", *told, "sweep.name=d", "optimizer.lr=0.02,0.03", "seed=7")
    assert ended.code == 0, ended.err
    assert "d: 2 cells, 2 done" in ended.out
    assert sorted(trained(0)) == [(0.02, 7), (0.03, 7)]
    assert sorted(trained(1)) == sorted(trained(0))
    assert {r.config()["optimizer"]["lr"] for r in Store("outputs").list()} == {0.02, 0.03}
    assert not (set(os.environ) - before) & OURS
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_rank_that_fails_in_a_multirun(shell: Shell, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails its cell, and the next one is begun."""
    monkeypatch.setenv("FAULT", '{"kind": "SIGKILL", "rank": 1, "where": "step", "number": 1, "world": 2}')
    ended = shell("train", *told, "sweep.name=d", "seed=0,1")
    assert ended.code == 2, ended.err
    assert "d: 2 cells, 2 failed" in ended.out
    assert ended.err.count("redoubt: rank 1 was killed by SIGKILL") == 2
    assert [run.status["state"] for run in Store("outputs").list()] == ["failed", "failed"]


@pytest.mark.slow
def test_two_ranks_under_a_search(shell: Shell, told: list[str]) -> None:
    """Both ranks take the trial's values, and both stop where one is pruned."""
    optuna = pytest.importorskip("optuna")
    ended = shell(
        "train", *told, "hydra/sweeper=optuna", "sweep.name=d", "optimizer.lr=interval(0.01,0.1)",
        "schedule=constant", "trainer.max_epochs=2", "hydra.sweeper.objective=[lr]", "hydra.sweeper.sampler=random",
        "hydra.sweeper.pruner_options={n_startup_trials:1}", "hydra.sweeper.trials=2", "hydra.sweeper.seed=4",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    trials = optuna.load_study(study_name="d", storage="sqlite:///outputs/sweeps/optuna.db").trials
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED"]
    assert len(Store("outputs").list()) == 2
    for rank in (0, 1):
        assert [lr for lr, _ in trained(rank)] == [t.params["optimizer.lr"] for t in trials]
    assert not dist.is_initialized()
