"""What a run starts from: the natural run, made once, a given run or file, or nothing."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from tests.processes import redoubt, start
from tests.test_cli import SMALL

from redoubt import build
from redoubt.build import build_data, build_module
from redoubt.defenses import AFD, CURE, RobustModule
from redoubt.errors import UserError
from redoubt.runs import running
from redoubt.runs.loading import load
from redoubt.runs.start import starting_point
from redoubt.runs.store import Run, Store
from redoubt.training.recorder import Stopped

Cell = Callable[..., DictConfig]
SHORT = ("trainer.max_epochs=1", "natural.trainer.max_epochs=1", "model.widths=[4,4,8,8]")
Weights = dict[str, torch.Tensor]


def train(cfg: DictConfig) -> Run:
    return running.train(cfg, build_data(cfg))


def begun(cfg: DictConfig) -> RobustModule:
    """The module as its training would begin."""
    data, module = build_data(cfg), build_module(cfg)
    found = starting_point(cfg, data)
    if found is not None:
        running.begin(module, found, cfg, data)
    return module


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which cells were really trained."""
    made: list[str] = []
    true = running._fit

    def fit(cfg: DictConfig, *args: Any) -> RobustModule:
        made.append(f"{cfg.axes.defense}-{cfg.axes.base}")
        return true(cfg, *args)

    monkeypatch.setattr(running, "_fit", fit)
    return made


def natural_of(outputs: Path) -> Run:
    return Store(outputs).find("none-standard")


def test_auto_makes_the_natural_run_once_and_says_so(
    cell: Cell, outputs: Path, fits: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "redoubt")
    train(cell("defense=afd", *SHORT))
    assert fits == ["none-standard", "afd-at"]
    assert f"natural run {natural_of(outputs).name} is trained first" in caplog.text
    train(cell("defense=cure", *SHORT))
    train(cell("defense=afd", "base=mart", "defense.alpha=0.2", *SHORT))
    assert fits == ["none-standard", "afd-at", "cure-trades", "afd-mart"]
    assert f"natural run {natural_of(outputs).name} is in the store" in caplog.text
    assert len(Store(outputs).list()) == 4


def test_both_begin_where_the_natural_run_ended(cell: Cell, outputs: Path) -> None:
    for name in ("afd", "cure", "none"):
        module = begun(cell(f"defense={name}", "defense.pretrained=auto", *SHORT))
        natural = load(natural_of(outputs)).net
        assert same(module.deployed().state_dict(), natural.state_dict()), name
        if isinstance(module, AFD):
            assert same(module.teacher.state_dict(), natural.state_dict())
            assert module.ema is not None
            assert torch.equal(module.ema.average["fc.linear.weight"], natural.fc.weight)
        if isinstance(module, CURE):
            assert same(module.revision.state_dict(), natural.state_dict())
            assert not {p.data_ptr() for p in module.revision.parameters()} & {
                p.data_ptr() for p in module.net.parameters()
            }


@pytest.mark.parametrize("text", ["{name}", "{folder}", "{folder}/checkpoints/last.ckpt"])
def test_a_given_run_is_the_same_as_auto_that_finds_it(cell: Cell, outputs: Path, text: str, fits: list[str]) -> None:
    first = train(cell("defense=afd", *SHORT))
    natural = natural_of(outputs)
    given = text.format(name=natural.name, folder=natural.folder)
    again = train(cell("defense=afd", *SHORT, f"defense.pretrained={given}"))
    assert again.name == first.name
    assert fits == ["none-standard", "afd-at"]


def test_another_start_is_another_run(cell: Cell) -> None:
    options = ([], ["natural.trainer.max_epochs=2"], ["natural.optimizer.lr=0.01"], ["defense.pretrained=none"])
    found = []
    for option in options:
        cfg = cell("defense=afd", *SHORT, *option)
        data = build_data(cfg)
        found.append(running.identify(cfg, data, starting_point(cfg, data)))
    assert len(set(found)) == len(options)


def test_none_is_from_scratch(cell: Cell, outputs: Path, fits: list[str]) -> None:
    cfg = cell("defense=afd", *SHORT, "defense.pretrained=none")
    module = cast(AFD, begun(cfg))
    assert same(module.deployed().state_dict(), module.teacher.state_dict())
    assert same(module.state_dict(), build_module(cfg).state_dict())
    train(cfg)
    assert fits == ["afd-at"]
    assert len(Store(outputs).list()) == 1


def test_a_finished_run_needs_its_natural_run_no_more(cell: Cell, outputs: Path, fits: list[str]) -> None:
    cfg = cell("defense=cure", *SHORT, "attack=pgd20", "attack.attacks.pgd20.steps=10")
    run = train(cfg)
    shutil.rmtree(natural_of(outputs).folder)
    fits.clear()
    assert train(cfg).name == run.name
    load(run)
    assert running.evaluate_run(cfg, build_data(cfg), run)["n"] == 10
    assert fits == []
    assert len(Store(outputs).list()) == 1


def test_stopped_in_either_training_it_goes_on(
    cell: Cell, outputs: Path, tmp_path: Path, sigterm_after: Callable[[int | None], None], fits: list[str]
) -> None:
    cfg = cell("defense=afd", *SHORT)
    sigterm_after(2)
    with pytest.raises(Stopped):
        train(cfg)
    assert natural_of(outputs).status["state"] == "interrupted"
    assert len(Store(outputs).list()) == 1
    natural = running.find_or_make(cfg, build_data(cfg), defense="none", base="standard")[1]
    sigterm_after(2)
    with pytest.raises(Stopped):
        train(cfg)
    shutil.rmtree(natural.folder)  # what was begun holds all that it needs
    fits.clear()
    done = train(cfg)
    assert fits == ["afd-at"]
    whole = train(cell("defense=afd", *SHORT, f"paths.outputs={tmp_path / 'whole'}"))
    assert same(*(torch.load(run.last, weights_only=True)["state_dict"] for run in (done, whole)))


def written(net: torch.nn.Module, folder: Path, form: str) -> Path:
    """The net's weights in a file, as others save them."""
    state = {k: v.clone() for k, v in net.state_dict().items()}
    file = folder / f"{form}.pt"
    if form == "safetensors":
        save_file(state, file.with_suffix(".safetensors"))
        return file.with_suffix(".safetensors")
    content: Any = {f"{form}.{k}" if form in ("module", "net") else k: v for k, v in state.items()}
    torch.save({"state_dict": content, "epoch": 3} if form == "container" else content, file)
    return file


@pytest.mark.parametrize("form", ["plain", "module", "net", "container", "safetensors"])
def test_files(cell: Cell, tmp_path: Path, form: str) -> None:
    net = build_module(cell("seed=5", *SHORT)).net
    cfg = cell("defense=cure", *SHORT, f"defense.pretrained={written(net, tmp_path, form)}")
    module = cast(CURE, begun(cfg))
    assert same(module.net.state_dict(), net.state_dict())
    assert same(module.revision.state_dict(), net.state_dict())


def test_the_same_weights_in_another_file_are_the_same_start(cell: Cell, tmp_path: Path) -> None:
    net = build_module(cell("seed=5", *SHORT)).net
    found = []
    for form in ("plain", "safetensors"):
        cfg = cell("defense=afd", *SHORT, f"defense.pretrained={written(net, tmp_path, form)}")
        found.append(running.identify(cfg, build_data(cfg), starting_point(cfg, build_data(cfg))))
    assert len(set(found)) == 1


def test_our_checkpoint_outside_of_its_run(cell: Cell, outputs: Path, tmp_path: Path) -> None:
    train(cell("base=standard", "inner=none", *SHORT))
    net = load(natural_of(outputs)).net
    moved = shutil.copy(natural_of(outputs).last, tmp_path / "natural.ckpt")
    assert same(
        begun(cell("defense=afd", *SHORT, f"defense.pretrained={moved}")).deployed().state_dict(), net.state_dict()
    )


def test_of_our_checkpoints_the_evaluated_weights_wherever_they_lie(cell: Cell, tmp_path: Path) -> None:
    run = train(cell("base=standard", "inner=none", "ema=wa", "ema.decay=0.9", *SHORT))
    moved = shutil.copy(run.last, tmp_path / "moved.ckpt")
    found = [
        begun(cell("defense=none", "base=at", *SHORT, f"defense.pretrained={at}")).net.state_dict()
        for at in (run.name, run.last, moved)
    ]
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert not same(found[0], load(run, weights="student").net.state_dict())


def test_an_adversarially_trained_run_is_a_start_too(cell: Cell) -> None:
    """Of a run the weights that it evaluates: AFD's averaged ones, with D1 merged."""
    first = train(cell("defense=afd", *SHORT))
    module = begun(cell("defense=none", "base=at", *SHORT, f"defense.pretrained={first.name}"))
    assert same(module.net.state_dict(), load(first).deployed().state_dict())


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("nothing", "no such run"),
        ("/no/such/file.pt", "no such file"),
        ("/no/such/folder", "no folder of a run"),
        ("{spoilt}", "conv1.weight holds values that are not finite"),
        ("{empty}", "the file is empty"),
        ("{other}", r"conv1.weight is \[8, 3, 3, 3\], the net wants \[4, 3, 3, 3\]; .*; .* keys differ"),
        ("{unfinished}", "is created: let it finish first"),
    ],
)
def test_what_cannot_be_a_start_is_one_line(cell: Cell, tmp_path: Path, wanted: str, says: str) -> None:
    (tmp_path / "empty.pt").touch()
    places = {
        "empty": tmp_path / "empty.pt",
        "other": written(build_module(cell("model.widths=[8,4,8,8]")).net, tmp_path, "plain"),
    }
    spoilt = build_module(cell(*SHORT)).net
    spoilt.conv1.weight.data[0, 0, 0, 0] = float("nan")
    (tmp_path / "spoilt").mkdir()
    places["spoilt"] = written(spoilt, tmp_path / "spoilt", "plain")
    if "unfinished" in wanted:
        other = cell("seed=9")
        run = Store(other.paths.outputs).open(other.axes, 9, "0123456789", {})
        places["unfinished"] = run.folder
    cfg = cell("defense=afd", *SHORT, f"defense.pretrained={wanted.format(**places)}")
    with pytest.raises(UserError, match=f"defense.pretrained.*{says}") as refused:
        train(cfg)
    assert "\n" not in str(refused.value)
    assert not list(Path(cfg.paths.outputs).glob("runs/afd*"))


def test_a_run_of_another_net(cell: Cell, outputs: Path) -> None:
    train(cell("base=standard", "inner=none", *SHORT))
    wider = cell("defense=cure", *SHORT, "model.widths=[8,8,8,8]", f"defense.pretrained={natural_of(outputs).name}")
    with pytest.raises(UserError, match=r"defense.pretrained: run none-.* conv1.weight is \[4, 3, 3, 3\]"):
        begun(wider)


def test_weights_from_behind_a_normalisation_are_refused(cell: Cell, tmp_path: Path) -> None:
    """Its mean and std are no part of a checkpoint of ours: taken in silence, they would be lost on loading."""
    net = build_module(cell("seed=5", *SHORT)).net
    file = written(net, tmp_path, "plain")
    state = torch.load(file, weights_only=True) | {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}
    torch.save(state, file)
    cfg = cell("defense=afd", *SHORT, f"defense.pretrained={file}")
    with pytest.raises(UserError, match=r"was trained with normalize.mean .*set model.normalize"):
        begun(cfg)
    same_first = ["model.normalize=true", "model.mean=[0.5,0.5,0.5]", "model.std=[0.25,0.25,0.25]"]
    begun(cell("defense=afd", *SHORT, *same_first, f"defense.pretrained={file}"))


@pytest.mark.parametrize("name", ["none", "afd", "cure"])
def test_a_net_of_other_classes_is_a_start_but_for_its_head(cell: Cell, tmp_path: Path, name: str) -> None:
    net = build_module(cell("seed=5", *SHORT)).net
    net.fc = torch.nn.Linear(8, 3)
    words = (f"defense={name}", "base=at", *SHORT, f"defense.pretrained={written(net, tmp_path, 'module')}")
    with pytest.raises(UserError, match=r"fc.weight is \[3, 8\].*all but the head's by defense.replace_head=true"):
        begun(cell(*words))
    module = begun(cell(*words, "defense.replace_head=true"))
    fresh = build_module(cell(*SHORT)).net.state_dict()
    head = {k: v for k, v in fresh.items() if k.startswith("fc.")}
    assert same(module.deployed().state_dict(), net.state_dict() | head)
    if isinstance(module, AFD):
        assert same(module.teacher.state_dict(), net.state_dict() | head)


def test_a_run_is_a_start_without_its_head(cell: Cell, outputs: Path) -> None:
    train(cell("base=standard", "inner=none", *SHORT))
    words = ("defense=none", *SHORT, f"defense.pretrained={natural_of(outputs).name}")
    kept = begun(cell(*words)).net.state_dict()
    cfg = cell(*words, "defense.replace_head=true")
    module, fresh = begun(cfg), build_module(cfg)
    assert same(module.net.state_dict(), kept | {k: fresh.net.state_dict()[k] for k in ("fc.weight", "fc.bias")})
    found = {running.identify(c, build_data(c), starting_point(c, build_data(c))) for c in (cell(*words), cfg)}
    assert len(found) == 2


def test_only_the_head_is_what_the_key_replaces(cell: Cell, tmp_path: Path) -> None:
    file = written(build_module(cell("model.widths=[8,4,8,8]")).net, tmp_path, "plain")
    with pytest.raises(UserError, match=r"conv1.weight is \[8, 3, 3, 3\]"):
        begun(cell("defense=none", *SHORT, f"defense.pretrained={file}", "defense.replace_head=true"))
    with pytest.raises(UserError, match=r"defense.replace_head=true .* defense.pretrained"):
        begun(cell("defense=none", *SHORT, "defense.replace_head=true"))


def test_a_name_in_a_file_is_a_start(cell: Cell, tmp_path: Path) -> None:
    nets = {name: build_module(cell(f"seed={i}", *SHORT)).net.state_dict() for i, name in enumerate(("model", "ema"))}
    torch.save(nets, tmp_path / "both.pt")
    for choice, name in (("", "model"), ("::ema", "ema")):
        module = begun(cell("defense=none", *SHORT, f"defense.pretrained={tmp_path / 'both.pt'}{choice}"))
        assert same(module.net.state_dict(), nets[name])


@pytest.mark.slow
def test_two_processes_that_need_it_train_it_once(tmp_path: Path) -> None:
    natural = ["natural.trainer.max_epochs=40"]
    commands = [start(tmp_path, "train", *SMALL, *natural, f"defense={name}", "base=at") for name in ("afd", "cure")]
    said = [command.end().good().err for command in commands]
    assert sum(text.count("training none-standard") for text in said) == 1
    assert sorted(run.name[:4] for run in Store(tmp_path / "outputs").list()) == ["afd-", "cure", "none"]


def test_fast_dev_run_and_plan_store_nothing(tmp_path: Path) -> None:
    done = redoubt(tmp_path, "train", *SMALL, "defense=afd", "trainer.fast_dev_run=true").good()
    assert "training (fast_dev_run)" in done.err
    assert done.err.count("training (fast_dev_run)") == 2  # the natural start too
    plan = redoubt(tmp_path, "train", *SMALL, "defense=afd", "plan=true").good()
    assert "will be trained first" in plan.out
    assert not (tmp_path / "outputs").exists()


def test_building_never_trains_or_reads(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "train", lambda *_: pytest.fail("trains"))
    module = build.build_module(cell("defense=afd", "defense.pretrained=/no/such/file"))
    assert isinstance(module, AFD)
