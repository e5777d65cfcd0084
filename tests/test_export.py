"""Exported files against the runs they come from: plain PyTorch, redoubt itself and onnxruntime read them."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from safetensors import safe_open
from torch import Tensor

import redoubt
from redoubt import cli, config, jobs
from redoubt.build import build_data
from redoubt.defenses import AFD, CURE, FSR, RobustModule
from redoubt.defenses.fsr import FSRLayer
from redoubt.errors import UserError
from redoubt.export import export
from redoubt.runs import running
from redoubt.runs.checkpoints import write_checkpoint
from redoubt.runs.files import write_json
from redoubt.runs.store import Run

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=10", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "natural.trainer.max_epochs=1", "attack=none",
)  # fmt: skip
#: What is trained, by name.
CELLS = {
    "afd": ["defense=afd", "model=resnet18"],
    "fsr": ["defense=fsr", "channels_last=true"],
    "cure": ["defense=cure", "defense.pretrained=none", "defense.rate=1", "defense.decay=0.5"],
    "normal": ["model.normalize=true", "compile=true", "data.limit_train=20", "data.val_fraction=0.4"],
    "library": ["base=standard", "model=torchvision", "model.name=shufflenet_v2_x0_5", "data.image_size=32"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a cell's finished run, trained when it is first asked for."""
    outputs = tmp_path_factory.mktemp("store")
    found: dict[str, str] = {}

    def run(name: str) -> str:
        if name not in found:
            kept = [o for o in TINY if name not in ("afd", "library") or not o.startswith("model")]
            cfg = config.resolve(config.compose([*kept, *CELLS[name], f"paths.outputs={outputs}"]))
            with torch.compiler.set_stance("force_eager"):
                found[name] = str(running.train(cfg, jobs._data(cfg)).folder)
        return found[name]

    return run


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable]:
    """``redoubt ...`` in this process, in an empty folder: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    quiet = logging.NullHandler()  # a root handler: the program's log lines stay out of what is captured
    logging.getLogger().addHandler(quiet)

    def redoubt(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["redoubt", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (int(end.value.code or 0), *capsys.readouterr())

    yield redoubt
    logging.getLogger().removeHandler(quiet)


def images(count: int, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def same(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], size: int = 8, within: float = 1e-5) -> bool:
    """Whether two functions of images agree, for several numbers of images."""
    with torch.compiler.set_stance("force_eager"):
        pairs = [(a(images(n, size)), b(images(n, size))) for n in (1, 2, 7)]
    return all(bool((x - y).abs().max() <= within * y.abs().max()) for x, y in pairs)


@pytest.fixture
def without_redoubt(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every import of redoubt fail from now on."""

    def hide() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "redoubt"]:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2"])
def test_plain_pytorch_reads_an_afd_run_that_lost_its_natural_run(
    store: Callable[[str], str], shell: Callable, without_redoubt: Callable[[], None], name: str
) -> None:
    """Merged into one classifier, written by the command, read by three lines that know nothing of redoubt."""
    folder = Path(store("afd"))
    for natural in folder.parent.glob("none-standard-resnet18-*"):
        shutil.rmtree(natural)
    code, out, err = shell("export", f"run={folder.name}", f"to=new/{name}", f"paths.outputs={folder.parents[1]}")
    assert (code, err) == (0, "")
    assert out.startswith(f"new/{name}: 44.")
    assert "plain ResNet18, 11,173,962 parameters, largest logit difference" in out
    assert len(out.splitlines()) == 1
    module, student = redoubt.load(folder), redoubt.load(folder, weights="student")
    assert isinstance(module, AFD)
    assert not same(student.logits, module.logits, within=1e-3)  # the average, which the config evaluates, is another
    without_redoubt()
    os.chdir("new")
    if name == "model.pt2":
        net = torch.export.load(name).module()
    else:
        net = torchvision.models.resnet18(num_classes=10)
        net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
        net.load_state_dict(safetensors.torch.load_file(name))
        net.eval()
    assert same(net, module.logits)


@pytest.mark.parametrize(
    ("cell", "weights", "kind", "size"),
    [
        ("fsr", None, FSR, 8),
        ("cure", "student", RobustModule, 8),
        pytest.param("cure", "revision", RobustModule, 8, marks=pytest.mark.slow),
        ("normal", None, RobustModule, 8),
        pytest.param("library", None, RobustModule, 32, marks=pytest.mark.slow),
    ],
)
def test_redoubt_loads_what_it_exported(
    store: Callable[[str], str], tmp_path: Path, cell: str, weights: str | None, kind: type, size: int
) -> None:
    file = tmp_path / "model.safetensors"
    said = export(store(cell), file, weights=weights)
    assert ("plain" in said) == (kind is RobustModule)
    module, source = redoubt.load(file), redoubt.load(store(cell), weights=weights)
    assert type(module) is kind
    assert not module.training
    assert same(module.logits, source.logits, size)
    with safe_open(file, "pt") as opened:
        metadata, keys = opened.metadata(), set(opened.keys())
    # What is no entry of the state_dict, yet part of the function, is there for whoever loads the weights alone.
    assert ({"normalize.mean", "normalize.std"} <= keys) == (cell == "normal")
    assert metadata["format"] == "pt"
    facts = json.loads(metadata["redoubt"])
    assert facts["run"] == Path(store(cell)).name
    assert (facts["weights"], facts["checkpoint"]) == (weights or "student", "last")
    assert facts["threat"] == {"norm": "linf", "eps": 0.2}
    assert "/" not in metadata["redoubt"]  # no path of this machine
    if cell == "cure":
        other = redoubt.load(store(cell), weights={"student": "revision", "revision": "student"}[str(weights)])
        assert isinstance(other, CURE)
        assert not same(module.logits, other.logits, size, within=1e-3)


def test_a_program_of_fsr_takes_any_batch(store: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    assert "CNNSmall with FSR" in export(store("fsr"), file)
    assert same(torch.export.load(file).module(), redoubt.load(store("fsr")).logits)
    assert str(ROOT).encode() not in file.read_bytes()


@pytest.mark.parametrize("cell", ["fsr", pytest.param("normal", marks=pytest.mark.slow)])
def test_onnxruntime_gives_the_same_logits(store: Callable[[str], str], shell: Callable, cell: str) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    code, out, err = shell("export", f"run={store(cell)}", "to=model.onnx")
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (pixels.name, pixels.shape) == ("pixels", ["batch", 3, 8, 8])
    assert (logits.name, logits.shape) == ("logits", ["batch", 10])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])

    assert same(run, redoubt.load(store(cell)).logits, within=1e-4)
    assert str(ROOT).encode() not in Path("model.onnx").read_bytes()


def test_eval_finds_a_normalisation_in_an_exported_file(store: Callable[[str], str], shell: Callable) -> None:
    """Nobody says model.normalize=true, and the weights are attacked behind their normalisation all the same."""
    export(store("normal"), "model.safetensors")
    code, _, err = shell("eval", *TINY, "checkpoint=model.safetensors")
    assert code == 0, err
    (file,) = Path("outputs/eval").glob("*/verdicts.npz")
    pixels, labels = build_data(config.resolve(config.compose([*TINY]))).arrays("test")
    with torch.no_grad():
        right = redoubt.load("model.safetensors").logits(pixels.float() / 255).argmax(1) == labels
    assert (np.load(file)["natural"] == right.numpy()).all()


def test_best_is_another_checkpoint(store: Callable[[str], str], tmp_path: Path) -> None:
    run = Run(shutil.copytree(store("normal"), tmp_path / "run-copy"))
    content = torch.load(run.best, weights_only=True)
    content["state_dict"] = {k: 2 * v for k, v in content["state_dict"].items()}
    write_checkpoint(content, run.best)
    for which in ("last", "best"):
        export(run.folder, tmp_path / f"{which}.safetensors", checkpoint=which)
    last, best = (redoubt.load(tmp_path / f"{which}.safetensors").net.state_dict() for which in ("last", "best"))
    assert all(torch.equal(2 * last[key], best[key]) for key in last)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["to=model.pt2"], ["run is missing", "run=<folder or name>"]),
        (["run={run}"], ["to is missing", "model.onnx"]),
        (["run={run}", "to=model.bin"], [".safetensors, .pt2, .onnx"]),
        (["run={run}", "to=model"], [".safetensors, .pt2, .onnx"]),
        (["run={run}", "to=there.pt2"], ["there.pt2", "exists: remove it or give another name"]),
        (["run={run}", "to=there.pt2/model.pt2"], ["cannot write there.pt2/model.pt2"]),
        (["run=nosuch", "to=model.pt2"], ["run=nosuch"]),
        (["run={run}", "to=model.pt2", "evaluation.checkpoint=best"], ["best.ckpt does not exist"]),
        (["run={run}", "to=model.pt2", "evaluation.checkpoint=first"], ["take last or best"]),
        (["run={run}", "to=model.pt2", "evaluation.weights=ema"], ["evaluation.weights='ema'", "ema.decay"]),
        (["run={run}", "to=model.pt2", "evaluation.weights=revision"], ["evaluation.weights='revision'"]),
        (["run={run}", "to=model.pt2", "attack.eps=0.1"], ["attack.eps is not a key"]),
        (["run={run}", "to=model.pt2", "model=vgg16"], ["model"]),
        (["run={run}", "too=model.pt2"], ["too is not a key"]),
    ],
)
def test_mistakes_are_one_line(
    store: Callable[[str], str], shell: Callable, tmp_path: Path, argv: list[str], says: list[str]
) -> None:
    Path("there.pt2").write_text("mine")
    code, out, err = shell("export", *[a.format(run=store("fsr")) for a in argv])
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("redoubt: ")
    assert all(part in err for part in says), err
    assert [p.name for p in tmp_path.iterdir()] == ["there.pt2"]
    assert Path("there.pt2").read_text() == "mine"


def test_an_unfinished_run_is_refused(store: Callable[[str], str], tmp_path: Path) -> None:
    run = Run(shutil.copytree(store("fsr"), tmp_path / "run-copy"))
    write_json(run.status_file, {**run.status, "state": "interrupted"})
    with pytest.raises(UserError, match="is interrupted: let it finish first"):
        export(run.folder, tmp_path / "model.pt2")
    run.last.unlink()
    write_json(run.status_file, {**run.status, "state": "done"})
    with pytest.raises(UserError, match=r"last\.ckpt does not exist"):
        export(run.folder, tmp_path / "model.pt2")


def test_a_missing_package_is_named(
    store: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs the package onnx: pip install redoubt\[onnx\]"):
        export(store("fsr"), tmp_path / "model.onnx")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2"])
def test_a_file_that_differs_is_not_left(
    store: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    def deployed(self: RobustModule) -> torch.nn.Module:
        net = true(self)
        next(net.parameters()).data.mul_(1.01)
        return net

    true = RobustModule.deployed
    monkeypatch.setattr(RobustModule, "deployed", deployed)
    with pytest.raises(UserError, match="differ from the run's by"):
        export(store("fsr"), tmp_path / f"model{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_net_that_cannot_be_traced_is_one_line(
    store: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = FSRLayer.forward
    monkeypatch.setattr(FSRLayer, "forward", lambda self, x: true(self, x) if float(x.sum()) > -1e9 else x)
    with pytest.raises(UserError, match=r"cannot be written so \(.*take another format"):
        export(store("fsr"), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", ["cut", "foreign", "target"])
def test_load_refuses_other_files(store: Callable[[str], str], tmp_path: Path, spoil: str) -> None:
    file = tmp_path / "model.safetensors"
    export(store("fsr"), file)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:1000])
        says = "none of export's files, or cut short"
    elif spoil == "foreign":
        safetensors.torch.save_file(safetensors.torch.load_file(file), file)
        says = "none of export's files"
    else:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["redoubt"])
        facts["model"]["_target_"] = "os.system"
        safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"redoubt": json.dumps(facts)})
        says = "'os.system' is not allowed"
    with pytest.raises(UserError, match=says):
        redoubt.load(file)


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    for argv, says in ((["--help"], "write a finished run's net"), (["export", "--help"], "\nto: null")):
        command = [sys.executable, "-m", "redoubt.cli", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert says in done.stdout
