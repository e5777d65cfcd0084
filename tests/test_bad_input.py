"""What a user gets wrong ends in one line that says what, where and how to mend it; nothing is overwritten."""

from __future__ import annotations

import copy
import functools
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tests.conftest import Ended, Shell
from tests.data import datafiles
from torch import Tensor

from redoubt import cli, config
from redoubt.build import build_module
from redoubt.defenses import RobustModule
from redoubt.defenses.tally import LOOK_EVERY
from redoubt.objectives import PGDAT
from redoubt.runs.files import read_rows
from redoubt.runs.store import Run, Store
from redoubt.training import trainer as trainer_module

SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=none",
)  # fmt: skip


def refused(ended: Ended, *says: str) -> None:
    """One line, on stderr, of ours, that says all that."""
    assert ended.code == 2, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("redoubt: ")
    assert "Traceback" not in ended.err + ended.out
    for part in says:
        assert part in lines[0], lines[0]


#: (what is wrong, what the line must say)
NAMES: list[tuple[list[str], list[str]]] = [
    (["defence=fsr"], ["defence", "did you mean defense"]),
    (["+defence=fsr"], ["defence", "did you mean defense"]),
    (["defense=fsrr"], ["defense=fsrr", "fsr", "none"]),
    (["base=trade"], ["base=trade", "did you mean trades"]),
    (["model=resnet"], ["model=resnet", "resnet18"]),
    (["data=svvhn"], ["data=svvhn", "did you mean svhn"]),
    (["attack=pgd2"], ["attack=pgd2", "pgd20"]),
    (["schedule=nope"], ["schedule=nope", "cosine"]),
    (["optimizer=sdg"], ["optimizer=sdg", "sgd"]),
    (["trainer=cppu"], ["trainer=cppu", "cpu"]),
    (["experiment=dmo"], ["experiment=dmo", "demo"]),
    (
        ["experiment=fsr/s1_cifar100_resnet18_trade"],
        ["did you mean fsr/s1_cifar100_resnet18_trades"],
    ),
    (["experiment=fsrs1"], ["experiment=fsrs1", "fsr/..."]),
    (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean lr"]),
    (["optimiser.lr=1"], ["optimiser", "optimizer"]),
    (["newkey=1"], ["newkey", "seed"]),
    (["+newkey=1"], ["newkey", "seed"]),
    (["+optimizer.momentun=1"], ["optimizer", "momentun"]),
    (["+inner.foo=2"], ["inner", "foo"]),
    (["+model.foo=2"], ["model", "foo"]),
    (["natural.foo=1"], ["natural.foo"]),
    (["data.source=offical"], ["data.source=offical", "did you mean official"]),
    (["data.augment=cropflip"], ["data.augment", "crop_flip"]),
]


@pytest.mark.parametrize(("wrong", "says"), NAMES, ids=[" ".join(w) for w, _ in NAMES])
def test_a_misspelt_name(shell: Shell, wrong: list[str], says: list[str]) -> None:
    refused(shell("train", *SMALL, *wrong), *says)


VALUES: list[tuple[list[str], list[str]]] = [
    # eps
    (["threat.eps=1.01"], ["threat.eps=1.01", "[0, 1]", "8/255"]),
    (["threat.eps=8"], ["threat.eps=8", "8/255"]),
    (["threat.eps=-0.1"], ["threat.eps=-0.1"]),
    (["threat.eps=nan"], ["threat.eps=nan", "not a number"]),
    (["threat.eps=inf"], ["threat.eps=inf"]),
    (["threat.eps=much"], ["threat.eps='much'", "not a number", "8/255"]),
    (["threat.eps=8/0"], ["threat.eps='8/0'"]),
    (["threat.eps=null"], ["threat.eps"]),
    (["threat=l2", "threat.eps=14"], ["threat.eps=14", "13.86", "l2"]),
    (["inner.eps=3"], ["inner.eps=3"]),
    (["attack.eps=x"], ["attack.eps='x'"]),
    (["threat.norm=l1"], ["threat.norm='l1'", "linf or l2"]),
    # numbers
    (["optimizer.lr=-1"], ["optimizer.lr=-1"]),
    (["optimizer.lr=fast"], ["optimizer.lr='fast'"]),
    (["optimizer.clip=0"], ["optimizer.clip=0", "null"]),
    (["trainer.accumulate=0"], ["trainer.accumulate=0", "at least 1"]),
    (["data.batch_size=1"], ["data.batch_size=1", "at least 2"]),
    (["data.batch_size=many"], ["data.batch_size='many'"]),
    (["trainer.max_epochs=0"], ["trainer.max_epochs=0"]),
    (["trainer.max_epochs=1.5"], ["trainer.max_epochs=1.5"]),
    (["inner.steps=1.5"], ["inner.steps=1.5"]),
    (["inner.steps=-1"], ["inner.steps=-1"]),
    (["seed=abc"], ["seed"]),
    (["label_smoothing=1"], ["label_smoothing=1"]),
    (["label_smoothing=some"], ["label_smoothing='some'"]),
    (["ema.decay=1"], ["ema.decay=1"]),
    (["data.val_fraction=1"], ["data.val_fraction=1"]),
    (["data.limit_train=0"], ["data.limit_train=0"]),
    (["model.num_classes=5"], ["model.num_classes=5", "data.num_classes=10"]),
    # machine
    (["trainer.accelerator=tpu"], ["trainer.accelerator='tpu'", "cpu or gpu"]),
    (["trainer.precision=64"], ["trainer.precision='64'", "32-true"]),
    (["trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "GPU"]),
    (["trainer.devices=0"], ["trainer.devices=0"]),
    # schedule, attack, defense, evaluation
    (["schedule.kind=sine"], ["schedule.kind='sine'", "cosine"]),
    (["schedule.milestones=[5,3]"], ["schedule.milestones", "rising"]),
    (["schedule.factors=[0.1]"], ["schedule.factors", "one factor per milestone"]),
    (["inner.start=middle"], ["inner", "start='middle'", "uniform"]),
    (["inner.start=none", "inner.step=0.1"], ["inner", "do not reach eps"]),
    (["defense=fsr", "defense.at=layer9"], ["defense.at='layer9'", "take one such as"]),
    (["defense=fsr", "defense.at=[]"], ["defense.at=[]"]),
    (["defense=fsr", "defense.tau=0"], ["defense.tau=0"]),
    (["defense._target_=os.system"], ["defense", "'os.system'", "redoubt.allow"]),
    (["evaluation.checkpoint=first"], ["evaluation.checkpoint='first'", "last or best"]),
    (["evaluation.checkpoint=best"], ["data.val_fraction"]),
    (["evaluation.weights=ema"], ["evaluation.weights='ema'", "ema.decay"]),
    (["evaluation.beside=nature"], ["nature", "standard"]),
    (["runs.keep=everything"], ["runs.keep", "all"]),
]  # fmt: skip


@functools.cache
def grouped(groups: tuple[str, ...]) -> DictConfig:
    return config.compose([*SMALL, *groups])


@pytest.fixture
def job(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """As ``shell`` of ``train``, from the composed config on: Hydra reads its files once for all values."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> Ended:
        groups = tuple(o for o in overrides if o.split("=")[0] in cfg_groups)
        cfg = copy.deepcopy(grouped(groups))
        for override in overrides:
            if override not in groups:
                parsed = OverridesParser.create().parse_override(override)
                OmegaConf.update(cfg, parsed.key_or_group, parsed.value(), merge=False)
        capsys.readouterr()
        code = 0
        try:
            cli._job("train", cfg, list(overrides))
        except Exception as error:
            code = cli._report(error, debug=False)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run


cfg_groups = ("threat", "defense", "base", "model")


@pytest.mark.parametrize(("wrong", "says"), VALUES, ids=[" ".join(w) for w, _ in VALUES])
def test_a_value_that_cannot_be(job: Shell, wrong: list[str], says: list[str]) -> None:
    refused(job(*wrong), *says)


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "says"), VALUES, ids=[" ".join(w) for w, _ in VALUES])
def test_a_value_that_cannot_be_on_the_command_line(shell: Shell, wrong: list[str], says: list[str]) -> None:
    refused(shell("train", *SMALL, *wrong), *says)


def test_no_gpu(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(shell("train", *SMALL, "trainer=gpu"), "trainer.accelerator=gpu", "trainer=cpu")


def test_bfloat16_that_the_processor_lacks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "cpu_has_bf16", lambda: False)
    refused(shell("train", *SMALL, "trainer.precision=bf16-mixed"), "trainer.precision=bf16-mixed", "32-true")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["foo"], ["'foo' is no command", "train"]),
        (["trian"], ["did you mean train"]),
        (["runs", "foo"], ["foo", "ls"]),
        (["runs", "show", "nobody"], ["run=nobody", "runs ls"]),
        (["eval", "run=nobody"], ["run=nobody", "runs ls"]),
        (["eval", *SMALL], ["run=", "checkpoint="]),
        (["eval", *SMALL, "checkpoint=nowhere.pt"], ["nowhere.pt", "no such file"]),
        (["eval", "run=a", "checkpoint=b"], ["either run="]),
        (["train", "--no-such-flag"], ["--no-such-flag"]),
    ],
)
def test_commands(shell: Shell, argv: list[str], says: list[str]) -> None:
    refused(shell(*argv), *says)


def test_hydra_and_the_next_command_are_unharmed(shell: Shell) -> None:
    """Errors leave no state behind: the command after them works."""
    refused(shell("train", *SMALL, "defense=fsrr"))
    refused(shell("train", *SMALL, "threat.eps=9"))
    done = shell("train", *SMALL, "defense=fsr")
    assert done.code == 0
    assert "fsr + at" in done.out


# ---- data ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


REAL = tuple(o for o in SMALL if not o.startswith("data"))


@pytest.mark.usefixtures("no_network")
def test_svhn_without_its_files(shell: Shell, tmp_path: Path) -> None:
    root = tmp_path / "nothing"
    refused(
        shell("train", *REAL, "data=svhn", f"data.root={root}"), f"data.root={root}", "train_32x32.mat",
        "test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
    )  # fmt: skip
    assert not (tmp_path / "outputs").exists()


def svhn_cut_short(root: Path) -> list[str]:
    datafiles.svhn(root)
    file = root / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:-500])
    return ["data=svhn", "data.verify=false"]


def svhn_of_other_bytes(root: Path) -> list[str]:
    datafiles.svhn(root)
    return ["data=svhn"]


def cifar_cut_short(root: Path) -> list[str]:
    datafiles.cifar(root)
    file = root / "cifar-10-python.tar.gz"
    file.write_bytes(file.read_bytes()[:-1000])
    return ["data=cifar10", "data.verify=false"]


def empty_class(root: Path) -> list[str]:
    datafiles.folder(root)
    (root / "train/mouse").mkdir()
    return ["data=digits", "data.source=folder", "data.num_classes=3"]


def broken_image(root: Path) -> list[str]:
    datafiles.folder(root)
    file = root / "train/cat/0.png"
    file.write_bytes(file.read_bytes()[:40])
    return ["data=digits", "data.source=folder", "data.num_classes=2"]


def no_folder(root: Path) -> list[str]:
    return ["data=cifar10", "data.source=folder"]


def other_classes(root: Path) -> list[str]:
    datafiles.folder(root)
    return ["data=digits", "data.source=folder"]


def other_size(root: Path) -> list[str]:
    datafiles.folder(root, size=16)
    return ["data=digits", "data.source=folder", "data.num_classes=2", "data.image_size=8"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (svhn_cut_short, ["train_32x32.mat"]),
        (svhn_of_other_bytes, ["train_32x32.mat", "data.verify=false"]),
        (cifar_cut_short, ["cifar-10-python.tar.gz"]),
        (empty_class, ["train/mouse"]),
        (broken_image, ["train/cat/0.png"]),
        (no_folder, ["data.root", "train"]),
        (other_classes, ["data.num_classes"]),
        (other_size, ["data.image_size"]),
    ],
)
def test_damaged_data(shell: Shell, tmp_path: Path, damage: Callable[[Path], list[str]], says: list[str]) -> None:
    options = damage(tmp_path / "images")
    size = [] if any("image_size" in o for o in options) or options[0] != "data=digits" else ["data.image_size=8"]
    refused(shell("train", *REAL, f"data.root={tmp_path / 'images'}", *options, *size), *says)
    assert not (tmp_path / "outputs").exists()


# ---- files -----------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf") / "outputs"


@pytest.fixture
def finished(shell: Shell, shelf: Path) -> Run:
    """A finished run in ``outputs``, trained once for all tests."""
    if not shelf.exists():
        assert shell("train", *SMALL, f"paths.outputs={shelf}").code == 0
    shutil.copytree(shelf, "outputs")
    (run,) = Store("outputs").list()
    return run


def test_a_checkpoint_of_another_net(shell: Shell, finished: Run, tmp_path: Path) -> None:
    other = build_module(config.compose([*SMALL, "model=resnet_small"])).net
    torch.save(other.state_dict(), tmp_path / "other.pt")
    before = content(finished.folder)
    refused(shell("eval", *SMALL, "checkpoint=other.pt"), "other.pt", "of another net", "model")
    assert content(finished.folder) == before
    assert not (tmp_path / "outputs/eval").exists()


@pytest.mark.parametrize("state", ["failed", "done"])
def test_a_damaged_checkpoint_of_ours(shell: Shell, finished: Run, state: str) -> None:
    """Neither resumed from nor overwritten, and no evaluation is made of it."""
    finished.last.write_bytes(finished.last.read_bytes()[:2000])
    with finished.lock():
        finished.update(state=state)
    before = {p: b for p, b in content(finished.folder).items() if p.name != "status.json"}
    refused(shell("train", *SMALL, "attack=pgd20"), str(finished.last), "not a readable checkpoint")
    assert {p: b for p, b in content(finished.folder).items() if p.name != "status.json"} == before
    refused(shell("eval", f"run={finished.name}", "attack=pgd20"), str(finished.last))


def test_eval_cannot_change_what_a_run_is(shell: Shell, finished: Run) -> None:
    before = content(finished.folder)
    for change in ("model=vgg16", "seed=1", "inner.steps=3", "data=svhn", "defense=fsr"):
        refused(shell("eval", f"run={finished.name}", change), change.split("=")[0], "run's own")
    assert content(finished.folder) == before


def test_bad_eval_of_a_run_leaves_it_alone(shell: Shell, finished: Run) -> None:
    before = content(finished.folder)
    for wrong in ("attack.eps=7", "attack=pgd2", "evaluation.checkpoint=best", "evaluation.weights=ema"):
        refused(shell("eval", f"run={finished.name}", wrong))
    assert content(finished.folder) == before


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_outputs_that_cannot_be_written(shell: Shell, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("precious")
    refused(shell("train", *SMALL, f"paths.outputs={where}"), "cannot write", "file", "paths.outputs=")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_that_cannot_be_written(shell: Shell, finished: Run) -> None:
    """A checkpoints folder that is a file (root ignores permissions)."""
    before = (finished.config_file.read_bytes(), finished.metrics_file.read_bytes())
    with finished.lock():
        finished.update(state="failed")
    for file in finished.checkpoints.iterdir():
        file.unlink()
    finished.checkpoints.rmdir()
    finished.checkpoints.write_text("in the way")
    refused(shell("train", *SMALL), str(finished.checkpoints))
    assert finished.checkpoints.read_text() == "in the way"
    assert finished.config_file.read_bytes() == before[0]


# ---- a loss that is not finite -----------------------------------------------------------------------------------


class Bomb:
    """Makes the loss (or only its gradient) NaN in one training step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> None:
        self.at: int | None = at
        self.seen: list[int] = []
        bomb = self
        true_terms = RobustModule.terms

        def terms(module: RobustModule, x: Tensor, adv: Tensor, y: Tensor) -> dict[str, Tensor]:
            found = true_terms(module, x, adv, y)
            bomb.seen.append(module.steps_done)
            if module.steps_done == bomb.at:
                found["ce"] = Spoilt.apply(found["ce"]) if how == "gradient" else found["ce"] * float(how)
            return found

        monkeypatch.setattr(RobustModule, "terms", terms)


class Spoilt(torch.autograd.Function):
    """A finite value whose gradient is NaN."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


def finite(checkpoint: Path) -> bool:
    tensors: list[Tensor] = []

    def take(value: object) -> None:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                take(item)
        elif isinstance(value, list):
            for item in value:
                take(item)

    take(torch.load(checkpoint, weights_only=True))
    return bool(tensors) and all(torch.isfinite(t).all() for t in tensors if t.is_floating_point())


BN = ("model=resnet_small", "model.widths=[4,4,8,8]", "data.image_size=16")
#: 20 steps an epoch, 3 epochs.
LONG = (
    *(o for o in SMALL if o.split("=")[0] not in str(BN)),
    *BN,
    "data.limit_train=200",
    "trainer.max_epochs=3",
    "ema=wa",
    "runs.keep=all",
)


@pytest.mark.parametrize(
    ("at", "how", "saved"),
    [
        (25, "nan", 20),
        pytest.param(3, "gradient", None, marks=pytest.mark.slow),
        pytest.param(25, "inf", 20, marks=pytest.mark.slow),
        pytest.param(39, "nan", 20, marks=pytest.mark.slow),
        pytest.param(3, "nan", None, marks=pytest.mark.slow),
        pytest.param(45, "gradient", 40, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_loss_is_not_finite_ends(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, at: int, how: str, saved: int | None
) -> None:
    """Within 20 steps, failed, with the last good checkpoint; mended, it goes on to the same end."""
    bomb = Bomb(monkeypatch, at, how)
    refused(shell("train", *LONG), "not finite", "optimizer.lr", "optimizer.clip")
    (run,) = Store("outputs").list()
    assert bomb.seen[-1] - at <= 2 * LOOK_EVERY
    assert run.status["state"] == "failed"
    assert "not finite" in run.status["reason"]
    rows = read_rows(run.metrics_file)
    assert [int(r["step"]) for r in rows] == list(range(20, (saved or 0) + 1, 20))
    assert all(np.isfinite(float(v)) for r in rows for v in r.values())
    assert run.last.is_file() == (saved is not None)
    if saved is not None:
        assert finite(run.last)
        assert torch.load(run.last, weights_only=True)["redoubt"]["steps_done"] == saved
    assert not run.evaluations()
    bomb.at, bomb.seen = None, []
    assert shell("train", *LONG).code == 0
    assert bomb.seen[0] == (saved or 0)
    assert run.status["state"] == "done"
    assert finite(run.last)
    assert [int(r["step"]) for r in read_rows(run.metrics_file)] == [20, 40, 60]


def test_checkpoints_within_an_epoch_are_good_ones_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """trainer.checkpoint_every looks before it saves."""
    Bomb(monkeypatch, 23, "nan")
    refused(shell("train", *LONG, "trainer.checkpoint_every=2"), "not finite")
    (run,) = Store("outputs").list()
    assert finite(run.last)
    assert torch.load(run.last, weights_only=True)["redoubt"]["steps_done"] == 22


def test_a_learning_rate_that_is_far_too_high(shell: Shell) -> None:
    refused(shell("train", *LONG, "optimizer.lr=1e30"), "not finite", "optimizer.lr")
    (run,) = Store("outputs").list()
    assert run.status["state"] == "failed"
    assert read_rows(run.metrics_file) == []
    done = shell("train", *LONG, "optimizer.lr=0.01")
    assert done.code == 0
    assert [r.status["state"] for r in Store("outputs").list()].count("done") == 1


def test_signals_are_left_as_they_were(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next Ctrl-C, in the evaluation or the next job of a multirun, would only set a dead run's flag."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert shell("train", *SMALL).code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    Bomb(monkeypatch, 1, "nan")
    refused(shell("train", *SMALL, "seed=1"), "not finite")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_out_of_memory_names_batch_size_and_accumulate(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def outer(self: PGDAT, *args: object) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd a second line")

    monkeypatch.setattr(PGDAT, "outer", outer)
    refused(shell("train", *SMALL), "out of memory", "data.batch_size", "trainer.accumulate")
    (run,) = Store("outputs").list()
    assert run.status["state"] == "failed"


def test_a_defect_of_the_program_is_not_dressed_up(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def outer(self: PGDAT, *args: object) -> dict[str, Tensor]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PGDAT, "outer", outer)
    ended = shell("train", *SMALL)
    assert ended.code == 1
    assert "Traceback" in ended.err


def test_debug_adds_the_traceback(shell: Shell) -> None:
    ended = shell("train", *SMALL, "threat.eps=9", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.strip().splitlines()[-1].startswith("redoubt: threat.eps=9")


def test_the_keyboard_pressed_twice(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def outer(self: PGDAT, *args: object) -> dict[str, Tensor]:
        raise KeyboardInterrupt

    monkeypatch.setattr(PGDAT, "outer", outer)
    ended = shell("train", *SMALL)
    assert ended.code == 130
    assert ended.err.strip().splitlines() == ["redoubt: stopped by the keyboard"]
    (run,) = Store("outputs").list()
    assert run.status["state"] == "interrupted"
