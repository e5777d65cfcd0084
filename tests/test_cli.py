"""The command line as a user's shell sees it: processes, their output, what they leave on the disk."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.processes import QUIET, ROOT, Command, redoubt, start, warm_up

from redoubt import cli
from redoubt.build import build_module
from redoubt.runs.files import read_rows
from redoubt.runs.store import Run, Store

SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=none",
)  # fmt: skip


def only_run(folder: Path) -> Run:
    (run,) = Store(folder / "outputs").list()
    return run


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """``python src/train.py experiment=demo``, begun while the fork server imports torch."""
    tiny = [
        "trainer.max_epochs=1", "data.limit_train=40", "data.limit_test=20", "inner.steps=1", "attack=pgd20",
        "trainer=cpu", "model.widths=[4,4,8,8]", "validation.steps=1", "validation.step=1",
        "natural.trainer.max_epochs=1",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "src/train.py"), "experiment=demo", *tiny]
    env = {**os.environ, **QUIET}
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        warm_up()
        yield folder, process
        process.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """A folder in which one small cell was trained."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, redoubt(folder, "train", *SMALL, "data.val_fraction=0.2").good()


def columns(out: str) -> list[str]:
    """Titles of the table's columns of results."""
    return re.findall(r"\w+ \+ \w+(?=\s*┃)", out)


@pytest.mark.slow
def test_shim_trains_the_demo_in_a_process_of_its_own(demo: tuple[Path, subprocess.Popen[str]]) -> None:
    """A table with the plain net beside it, and the folder."""
    where, process = demo
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert columns(out) == ["fsr + at", "none + standard"]
    assert "Natural" in out
    assert "PGD-20" in out
    folder = re.findall(r"^run: (.*)$", out, re.M)
    assert len(folder) == 1
    assert (where / folder[0] / "checkpoints/last.ckpt").is_file()
    assert Path(folder[0]).name.startswith("fsr-at-resnet_small-digits-s0-")
    said = [line for line in err.splitlines() if line.startswith("training ")]
    assert len(said) == 2  # the cell and its natural twin: run, recipe, device and precision in one line
    for part in ("fsr-at-resnet_small-digits-s0-", "recipe/data/digits", "CPU", "32-true"):
        assert part in said[0]


def test_the_same_command_again_answers_from_the_store(trained: tuple[Path, Command]) -> None:
    folder, first = trained
    run = only_run(folder)
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*") if p.is_file() and p.name != ".lock"}
    again = redoubt(folder, "train", *SMALL, "data.val_fraction=0.2").good()
    assert again.out == first.out
    assert "finished: answered from" in again.err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert only_run(folder).folder == run.folder


def test_a_run_leaves_what_the_house_says(trained: tuple[Path, Command]) -> None:
    folder, _ = trained
    run = only_run(folder)
    files = {p.relative_to(run.folder).as_posix() for p in run.folder.rglob("*") if p.is_file()}
    (evaluation,) = run.evaluations()
    name = evaluation[0].relative_to(run.folder).as_posix()
    kept = sorted(file for file in files if file.startswith("eval/kept/natural-"))
    assert [file.partition(".")[2] for file in kept] == ["0.jsonl", "shown.npz"]
    assert files - {".lock", *kept} == {
        "config.yaml", "environment.json", "status.json", "metrics.csv", "checkpoints/last.ckpt",
        "checkpoints/last.ckpt.sha256", "checkpoints/best.ckpt", "checkpoints/best.ckpt.sha256",
        f"{name}/results.json", f"{name}/verdicts.npz", f"{name}/attack.json",
        f"{name}/examples.npz",
    }  # fmt: skip
    (row,) = read_rows(run.metrics_file)
    wanted = {"epoch", "step", "lr", "images_per_second", "train/loss", "train/ce", "val/clean", "val/pgd1"}
    assert wanted <= set(row)
    assert float(row["images_per_second"]) > 0
    assert run.status["state"] == "done"
    assert run.status["train_seconds"] > 0
    environment = json.loads(run.environment_file.read_text())
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]


def test_help_without_torch(tmp_path: Path) -> None:
    """No torch on the path: --help and a wrong command answer all the same, and fast."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    for argv, code, says in (
        (["train", "--help"], 0, "defense: afd, cure, fsr, none"),
        (["foo"], 2, "redoubt: 'foo' is no"),
    ):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "redoubt.cli", *argv], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert says in done.stdout + done.stderr
        assert time.monotonic() - began < 5


EARLY = [
    ("train optimizer.lr=-1", "optimizer.lr=-1"),
    ("train trainer.max_epochs=0", "trainer.max_epochs=0"),
    ("train threat.eps=8", "threat.eps=8 is outside"),
    ("train evaluation.checkpoint=best", "data.val_fraction"),
    ("train defense=afd defense.pretrained=nosuch", "defense.pretrained=nosuch: no such run"),
    ("train defense=afd defense.pretrained=no.pt", "defense.pretrained=no.pt: no such file"),
    ("eval", "eval wants either run="),
    ("eval run=nosuch", "run=nosuch: no such run"),
    ("eval checkpoint=no.pt", "no.pt: no such file"),
    ("audit run=nosuch", "run=nosuch: no such run"),
    ("export", "run is missing"),
    ("export run=nosuch to=net.foo", "to=net.foo: no format"),
]


@pytest.mark.parametrize(
    ("words", "says"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (i % 6 > 0)) for i, case in enumerate(EARLY)],
)
def test_what_config_and_store_can_tell_is_told_without_torch(words: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    command = [sys.executable, "-m", "redoubt.cli", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr


def test_eval_of_a_run_by_name(trained: tuple[Path, Command], tmp_path: Path) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "own")  # other tests count what `trained` holds
    run = only_run(folder)
    before = len(run.evaluations())
    checkpoint = run.last.read_bytes()
    done = redoubt(folder, "eval", f"run={run.name}", "attack=pgd20", "trainer=cpu").good()
    assert "PGD-20" in done.out
    assert f"run: {Path('outputs/runs') / run.name}" in done.out
    assert len(run.evaluations()) == before + 1
    assert run.last.read_bytes() == checkpoint
    best = redoubt(folder, "eval", f"run={run.hash}", "attack=pgd20", "evaluation.checkpoint=best").good()
    assert "PGD-20" in best.out


def test_eval_of_anybodys_weights(tmp_path: Path, cell: Any) -> None:
    net = build_module(cell("model=cnn_small", "model.widths=[4,4,8,8]", "seed=5", "data.image_size=8")).net
    torch.save(net.state_dict(), tmp_path / "theirs.pt")
    done = redoubt(tmp_path, "eval", *SMALL, "checkpoint=theirs.pt", "attack=pgd20").good()
    assert "PGD-20" in done.out
    assert not (tmp_path / "outputs/runs").exists()
    (file,) = (tmp_path / "outputs/eval").glob("*/results.json")
    results = json.loads(file.read_text())
    assert results["run"] == "theirs"
    assert results["n"] == 10
    assert [results["axes"][axis] for axis in ("model", "defense", "base", "seed")] == ["cnn_small", None, None, None]
    heading = [line.split("┃")[2].strip() for line in done.out.splitlines() if line.count("┃") == 3]
    assert heading == ["theirs.pt", "cnn_small"]
    verdicts = np.load(file.with_name("verdicts.npz"))
    # The weights of the file were attacked, not those that a fresh net has: their accuracy is what we compute.
    images, labels = _test_images()
    with torch.no_grad():
        right = (net.eval()(images).argmax(1) == labels).numpy()
    assert (verdicts["natural"] == right).all()


def _test_images() -> tuple[torch.Tensor, torch.Tensor]:
    from redoubt import config
    from redoubt.build import build_data

    images, labels = build_data(config.resolve(config.compose(SMALL))).arrays("test")
    return images.float() / 255, labels


#: Standard output and the error output are a pipe whose reader has left, as after ``2>&1 | head``.
LEFT = "r, w = os.pipe(); os.dup2(w, 1); os.dup2(w, 2); os.close(w); os.close(r)"


def test_a_training_whose_reader_has_left_goes_on(tmp_path: Path) -> None:
    words = [*(word for word in SMALL if not word.startswith(("attack", "trainer.progress"))), "attack=fgsm"]
    assert start(tmp_path, "train", *words, before=LEFT).end().code == 0
    run = only_run(tmp_path)
    assert run.status["state"] == "done"
    assert len(run.evaluations()) == 1


@pytest.mark.parametrize("command", [("runs", "ls"), ("runs", "ls", "--json"), ("eval", "attack=fgsm"), ("--help",)])
def test_commands_whose_reader_has_left_end_well(
    trained: tuple[Path, Command], tmp_path: Path, command: tuple[str, ...]
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "own")  # other tests count what `trained` holds
    words = (*command, f"run={only_run(folder).name}") if command[0] == "eval" else command
    assert start(folder, *words, before=LEFT).end().code == 0


@pytest.mark.parametrize("unbuffered", [False, True])
def test_output_goes_nowhere_once_its_reader_has_left(unbuffered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    raw = io.FileIO(write, "w")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw),
                                                        write_through=unbuffered))  # fmt: skip
    cli._outlast_readers()
    outer = sys.stdout
    print("read", flush=True)
    assert os.read(read, 100) == b"read\n"
    os.close(read)
    print("x" * 100_000, flush=True)
    Console().print("not read")  # rich would exit
    assert os.path.samestat(os.fstat(write), os.stat(os.devnull))
    cli._outlast_readers()
    assert sys.stdout is outer


def test_a_full_disk_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    cli._outlast_readers()
    with pytest.raises(OSError, match="No space left"):
        print("lost", flush=True)


def test_plan_prints_and_leaves_nothing(tmp_path: Path) -> None:
    done = redoubt(tmp_path, "train", *SMALL, "defense=fsr", "plan=true").good()
    for word in ("plan: nothing is trained", "fsr-at-cnn_small-digits-s0-", "recipe/data/digits", "parameters",
                 "time, estimated", "memory, estimated"):  # fmt: skip
        assert word in done.out
    assert not (tmp_path / "outputs").exists()


def test_fast_dev_run_knows_no_store(trained: tuple[Path, Command], tmp_path: Path) -> None:
    done = redoubt(tmp_path, "train", *SMALL, "trainer.fast_dev_run=true", "evaluation.beside=standard").good()
    assert columns(done.out) == ["none + at", "none + standard"]
    assert "nothing was stored" in done.out
    assert not (tmp_path / "outputs").exists()
    folder, _ = trained
    there = redoubt(folder, "train", *SMALL, "data.val_fraction=0.2", "trainer.fast_dev_run=true").good()
    assert "answered from" not in there.err  # it does not read the store either
    assert len(Store(folder / "outputs").list()) == 1


@pytest.mark.slow  # the same in one process: sweeps/test_grid.py
def test_multirun_and_runs_ls(tmp_path: Path) -> None:
    """A grid over attacks trains each cell once, and leaves no file of Hydra's."""
    done = redoubt(tmp_path, "train", "-m", *SMALL, "base=at,trades", "attack=none,pgd20").good()
    assert len(re.findall(r"^run: ", done.out, re.M)) == 4
    assert len(re.findall(r"^training ", done.err, re.M)) == 2
    assert "answered from" not in done.err  # both attacks of a cell are one job
    store = Store(tmp_path / "outputs")
    assert {r.readable for r in store.list()} == {"none-at-cnn_small-digits-s0", "none-trades-cnn_small-digits-s0"}
    assert [len(r.evaluations()) for r in store.list()] == [2, 2]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["outputs"]
    assert not list(tmp_path.rglob(".hydra"))
    assert redoubt(tmp_path, "runs", "ls").good().out.count(" done ") == 2


@pytest.mark.slow  # the same in one process: sweeps/test_grid.py
def test_a_multirun_goes_on_after_a_cell_that_fails(tmp_path: Path) -> None:
    done = redoubt(tmp_path, "train", "-m", *SMALL, "optimizer.lr=1e30,0.1")
    assert done.code == 2
    assert "Traceback" not in done.err
    (said,) = [line for line in done.err.splitlines() if line.startswith("redoubt: ")]
    assert "loss or logits were not finite" in said
    assert sorted(run.status["state"] for run in Store(tmp_path / "outputs").list()) == ["done", "failed"]


def own_package(folder: Path) -> Path:
    """A user's own net, objective, defense and data set, their yaml files and the list of what may be called."""
    package, conf = folder / "theirs/ours_too", folder / "conf"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(
        """
import hashlib, os, time
import numpy as np
import torch
from torch import nn
from redoubt.data import ImageData
from redoubt.data.source import Generated
from redoubt.defenses import FSR, RobustModule
from redoubt.objectives import Objective


class Linear(nn.Module):
    feature_layer = "unused"

    def __init__(self, *, num_classes, image_size):
        super().__init__()
        self.fc = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, x):
        return self.fc(x.flatten(1))


class Twice(Objective):
    def outer(self, adv, y, clean=None):
        return {"twice": 2 * self.cross_entropy(adv, y)}


class Dies(Objective):
    def outer(self, adv, y, clean=None):
        if os.environ.get("RANK") == "1":
            with open("died.txt", "w") as file:
                file.write(str(time.time()))
            raise RuntimeError("rank 1 dies")
        return {"ce": self.cross_entropy(adv, y)}


class Spoilt(Objective):
    def outer(self, adv, y, clean=None):
        factor = float("nan") if os.environ.get("RANK") == "1" else 1.0
        return {"ce": factor * self.cross_entropy(adv, y)}


class Decay(RobustModule):
    def __init__(self, *, strength, **rest):
        super().__init__(**rest)
        self.strength = strength

    def auxiliary(self, logits, sides, y):
        return {"penalty": self.strength * logits.square().mean()}


class Told(RobustModule):
    def on_fit_end(self):
        digest = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in self.parameters()))
        with open(f"rank{os.environ.get('RANK', 0)}.txt", "w") as file:
            file.write(digest.hexdigest())


class ToldFSR(Told, FSR):
    pass


class Bars(ImageData):
    name = "bars"

    def official(self):
        return BarsSource(**self.where())


class BarsSource(Generated):
    kind = "official"

    def decode(self, split, allocate):
        labels = np.arange(40 if split == "train" else 20) % self.num_classes
        images = allocate(len(labels))
        images[:] = 40
        for i, label in enumerate(labels):
            images[i, :, :, label] = 200
        return labels
"""
    )
    files = {
        "model/linear": "Linear\nnum_classes: ${data.num_classes}\nimage_size: ${data.image_size}",
        "base/twice": "Twice\nlabel_smoothing: ${label_smoothing}",
        "base/dies": "Dies\nlabel_smoothing: ${label_smoothing}",
        "base/spoilt": "Spoilt\nlabel_smoothing: ${label_smoothing}",
        "defense/decay": "Decay\nstrength: 0.5",
        "defense/told": "Told",
        "data/bars": "Bars\n"
        + "\n".join(
            line for line in (ROOT / "conf/data/digits.yaml").read_text().splitlines() if line[0] not in "#_"
        ).replace("num_classes: 10", "num_classes: 4"),
        "defense/told_fsr": "ToldFSR",
    }
    for name, text in files.items():
        text = f"_target_: ours_too.parts.{text}\n"
        if name.startswith("base/"):  # a base's file is of the whole config, as it picks the inner attack
            text = "# @package _global_\nbase:\n  " + text.replace("\n", "\n  ").rstrip() + "\n"
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        (conf / f"{name}.yaml").write_text(text)
    (conf / "redoubt.allow").write_text("# ours\nours_too\n")
    return conf


def python_path(folder: Path) -> dict[str, str]:
    """The environment in which the parts of `own_package` can be imported."""
    there = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(folder / "theirs"), *([there] if there else [])])}


def test_parts_of_a_users_own(tmp_path: Path) -> None:
    conf = own_package(tmp_path)
    small = [word for word in SMALL[2:] if not word.startswith(("data=", "data.source=", "data.limit_"))]
    own = ["--config-dir", str(conf), "model=linear", "base=twice", "defense=decay", "data=bars", *small]
    done = redoubt(tmp_path, "train", *own, **python_path(tmp_path)).good()
    assert columns(done.out) == ["decay + twice"]
    run = only_run(tmp_path)
    assert run.readable == "decay-twice-linear-bars-s0"
    (row,) = read_rows(run.metrics_file)
    assert float(row["train/loss"]) == pytest.approx(float(row["train/twice"]) + float(row["train/penalty"]))
    (conf / "redoubt.allow").unlink()
    refused = redoubt(tmp_path, "train", *own, "seed=1", **python_path(tmp_path))
    assert refused.code == 2
    assert "redoubt.allow" in refused.err
    assert "Traceback" not in refused.err
    assert [r.status["state"] for r in Store(tmp_path / "outputs").list()] == ["done"]  # refused before it left a run


@pytest.mark.slow
def test_tensorboard_beside_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    redoubt(tmp_path, "train", *SMALL, "logger=tensorboard").good()
    run = only_run(tmp_path)
    assert list(run.folder.rglob("events.out.tfevents*"))
    assert read_rows(run.metrics_file)


def test_wandb_offline_asks_nothing_and_keeps_no_secret(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    canary = "c0ffee" * 6 + "abcd"
    done = redoubt(
        tmp_path, "train", *SMALL, "logger=wandb", "logger.offline=true", seconds=60, WANDB_API_KEY=canary
    ).good()
    run = only_run(tmp_path)
    parts = sorted(file.parent.relative_to(tmp_path) for file in run.folder.rglob("*.wandb"))
    assert len(parts) == 2  # of the training, and of the evaluation
    where, command = done.out.splitlines()[-1].split("; to send it: ")
    assert where.endswith(f"W&B, offline: {run.folder.relative_to(tmp_path) / 'wandb'}")
    assert sorted(command.partition("wandb sync ")[2].split()) == [str(part) for part in parts]
    assert canary not in done.out + done.err
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert canary.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_wandb_without_a_key_is_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    redoubt(tmp_path, "train", *SMALL, "logger=wandb", seconds=60, HOME=str(tmp_path / "home")).good()
    assert list(only_run(tmp_path).folder.rglob("offline-run-*"))
