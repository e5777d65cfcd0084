"""Every cell of the grid composes; every kind of cell trains a step. New files in conf/ are found by themselves."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tests.conftest import composed

from redoubt import config
from redoubt.build import build_data, build_module, locate
from redoubt.defenses import FSR
from redoubt.errors import UserError
from redoubt.runs import running

CONF = Path(config.config_dir())


def options(group: str) -> list[str]:
    found = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    assert found
    return found


#: data=folder is whatever it is given.
GRID = {g: [o for o in options(g) if o != "folder"] for g in ("defense", "base", "model", "data")}
DEFENSES, BASES, MODELS, DATA = GRID.values()

#: The named terms of each base, and what a defense adds; a defense that is not here is only asked for finite ones.
TERMS = {"standard": {"ce"}, "at": {"ce"}, "trades": {"ce", "kl"}, "mart": {"ce", "margin", "kl"}}
ADDED = {"none": set(), "fsr": {"sep", "rec"}, "afd": {"neg", "cos", "align"}, "cure": {"revision"}}

ONE_STEP = (
    "data.source=fake", "data.limit_train=10", "data.limit_test=10", "data.batch_size=2", "data.probe=10",
    "inner.steps=1", "validation.steps=1", "validation.step=1", "attack=none", "trainer=cpu",
    "trainer.progress=false", "trainer.max_epochs=1", "trainer.fast_dev_run=true",
)  # fmt: skip

TINY = ("model.widths=[4,4,8,8]", "data.image_size=8")

Cell = tuple[str, str, str, str]


def pairs(cell: Cell) -> set[tuple[int, str, int, str]]:
    return {(i, cell[i], j, cell[j]) for i, j in itertools.combinations(range(4), 2)}


def covering(cells: Iterable[Cell]) -> list[Cell]:
    """Few of the cells in which every pair of choices occurs (greedily)."""
    left = {cell: pairs(cell) for cell in cells}
    missing, chosen = set().union(*left.values()), []
    while missing:
        best = max(left, key=lambda cell: len(left[cell] & missing))
        missing -= left.pop(best)
        chosen.append(best)
    return chosen


CELLS: list[Cell] = list(itertools.product(DEFENSES, BASES, MODELS, DATA))
PAIRS = covering(CELLS)


def words(cell: Cell) -> list[str]:
    return [f"{k}={v}" for k, v in zip(GRID, cell, strict=True)]


def check_composes(cells: Iterable[Cell]) -> None:
    for cell in cells:
        cfg = config.compose(words(cell))
        assert [cfg.axes[axis] for axis in GRID] == list(cell)
        resolved = config.resolve(cfg)
        assert not list(unresolved(OmegaConf.to_container(resolved)))
        assert resolved.model.num_classes == resolved.data.num_classes
        assert resolved.defense._target_ == target(cell[0])
        assert resolved.base._target_ == load("base", cell[1]).base._target_
        assert resolved.model._target_ == load("model", cell[2])._target_
        assert resolved.data._target_ == load("data", cell[3])._target_


@functools.cache
def load(group: str, option: str) -> DictConfig:
    found = OmegaConf.load(CONF / group / f"{option}.yaml")
    assert isinstance(found, DictConfig)
    return found


@functools.cache
def target(defense: str) -> str:
    """A defense's file holds its section, or, to choose a base with it, the section under its name."""
    found = load("defense", defense)
    return str(found.get("defense", found)._target_)


def unresolved(tree: object) -> Iterator[str]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from unresolved(item)
    elif isinstance(tree, str) and ("${" in tree or tree == "???"):
        yield tree


def test_every_pair_of_choices_is_among_the_cells() -> None:
    wanted = len(set().union(*map(pairs, CELLS)))
    assert len(set().union(*map(pairs, PAIRS))) == wanted
    assert len(PAIRS) < len(CELLS) / 4


def test_every_pair_composes_resolves_and_is_checked() -> None:
    check_composes(PAIRS)


@pytest.mark.slow
def test_every_cell_composes_resolves_and_is_checked() -> None:
    check_composes(CELLS)


def experiments() -> list[Any]:
    """Those at the top of the folder; the papers' rows, in folders, are many and alike: slow."""
    root = CONF / "experiment"
    names = [file.relative_to(root).with_suffix("").as_posix() for file in sorted(root.rglob("*.yaml"))]
    assert "fsr/s1_cifar100_resnet18_trades_fsr" in names
    return [pytest.param(name, marks=[pytest.mark.slow] if "/" in name else []) for name in names]


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_composes_and_is_checked(name: str) -> None:
    cfg = config.resolve(config.compose([f"experiment={name}"]))
    assert f"experiment/{name}" in cfg.axes.recipes


@pytest.mark.parametrize(
    ("group", "option"),
    [(g, o) for g in ("threat", "optimizer", "schedule", "ema", "inner", "attack") for o in options(g)],
)
def test_every_option_of_the_other_groups_composes_and_builds(group: str, option: str) -> None:
    small = ["model=cnn_small", "model.widths=[2,2,2,2]", "data=digits"]
    module = build_module(composed(*small, f"{group}={option}"))
    assert module.make_optimizer(module.parameters()).param_groups[0]["lr"] > 0


def step(cell: Cell, *more: str) -> dict[str, float]:
    """What one real training step through Lightning logs."""
    cfg = config.resolve(composed(*words(cell), *ONE_STEP, *more))
    before = build_module(cfg).state_dict()
    module = running._fit(cfg, build_data(cfg), None)
    assert module.steps_done == 1
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.isfinite(t).all() for t in after.values())
    trained = [k for k, p in module.named_parameters() if p.requires_grad]
    moved = [k for k in trained if not torch.equal(before[k], after[k].cpu())]
    assert len(moved) > 0.9 * len(trained), "most parameters are trained"
    return {k: float(v) for k, v in module.trainer.callback_metrics.items()}


def allowed(defense: str) -> tuple[str, ...]:
    return tuple(getattr(locate(target(defense), "defense"), "bases", tuple(BASES)))


@pytest.mark.parametrize(("defense", "base"), itertools.product(DEFENSES, BASES))
def test_a_step_of_every_defense_on_every_base(defense: str, base: str) -> None:
    cell = (defense, base, "resnet_small", "cifar10")
    if base not in allowed(defense):
        with pytest.raises(UserError, match=f"base={base} is not defined for this defense"):
            build_module(composed(*words(cell)))
        return
    logged = step(cell, *TINY)
    terms = {k.removeprefix("train/") for k in logged if k.startswith("train/")}
    terms -= {"loss", "grad_norm", "accuracy_adv"}
    terms = {t for t in terms if "/" not in t}  # shares of updated weights
    if base in TERMS and defense in ADDED:
        assert terms == TERMS[base] | ADDED[defense]
    assert terms
    assert logged["train/loss"] == pytest.approx(sum(logged[f"train/{t}"] for t in terms), rel=1e-5)
    assert {"train_probe/clean", "train_probe/pgd1", "lr"} <= set(logged)


def test_a_base_that_a_defense_does_not_list_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSR, "bases", ("at", "mart"))
    build_module(composed(*words(("fsr", "at", "cnn_small", "digits"))))
    with pytest.raises(UserError) as refused:
        build_module(composed(*words(("fsr", "trades", "cnn_small", "digits"))))
    assert str(refused.value) == "base=trades is not defined for this defense: take one of base=at, mart"


#: Behind `make test-all`: seconds a step.
HEAVY = ("wrn34_10", "vgg16", "resnet18", "preact_resnet18")
#: A deep net's loss blows up on batches of two at the papers' rates; at its own size it has no feature map left.
SLOWLY = ("optimizer.lr=0.001",)
AT_32 = ("data.image_size=32", *SLOWLY)


def nets() -> Iterator[object]:
    """The fast ones: all defenses and, under FSR, all data on one light net, and FSR in three other nets."""
    for model, data, defense in itertools.product(MODELS, DATA, DEFENSES):
        light = model == "cnn_small" and (data == "cifar10" or defense == "fsr")
        first = model in ("resnet18", "vgg16", "resnet_small") and (data, defense) == ("cifar10", "fsr")
        yield pytest.param(model, data, defense, marks=() if light or first else pytest.mark.slow)


@functools.cache
def default_base(defense: str) -> str:
    return str(config.compose([f"defense={defense}"]).axes.base)


@pytest.mark.parametrize(("model", "data", "defense"), nets())
def test_a_step_of_every_net_on_all_data(model: str, data: str, defense: str) -> None:
    size = (*TINY, *SLOWLY) if model == "cnn_small" else AT_32
    step((defense, default_base(defense), model, data), *size)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "defense"), itertools.product(MODELS, DEFENSES))
def test_a_step_of_every_net_at_64_pixels(model: str, defense: str) -> None:
    step((defense, default_base(defense), model, "tiny_imagenet"), *SLOWLY)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("model", [m for m in MODELS if m != "resnet_small"])
def test_a_step_of_every_net_on_every_base(model: str, defense: str, base: str) -> None:
    if base in allowed(defense):
        step((defense, base, model, "cifar10"), *SLOWLY)


@pytest.mark.parametrize(
    ("model", "name", "defense"),
    [
        pytest.param(*net, defense, marks=() if net[0] == "torchvision" and defense == "fsr" else pytest.mark.slow)
        for net in (("torchvision", "shufflenet_v2_x0_5"), ("timm", "resnet10t"))
        for defense in DEFENSES
    ],
)
def test_any_library_net_takes_any_defense(model: str, name: str, defense: str) -> None:
    if model == "timm":
        pytest.importorskip("timm")
    step((defense, default_base(defense), model, "cifar10"), f"model.name={name}", *SLOWLY)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "schedule/own.yaml"
    own.parent.mkdir()
    own.write_text("kind: constant\n")
    monkeypatch.setattr(config, "search_path", [str(tmp_path)])
    read: list[str] = []
    true = OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: read.append(file.name) or true(file))
    first = config.compose(["schedule=own"])
    assert str(own) in read
    read.clear()
    first.data.batch_size = 7  # is nobody else's
    again = config.compose(["schedule=own"])
    assert (str(own) in read, again.schedule.kind) == (False, "constant")
    assert again.data.batch_size != 7
    own.write_text("kind: cosine\n")
    assert config.compose(["schedule=own"]).schedule.kind == "cosine"
    assert str(own) in read
    recipe = tmp_path / "recipe/data/cifar10.yaml"  # is looked for, and was not there
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\noptimizer:\n  lr: 0.7\n")
    assert config.compose(["schedule=own"]).optimizer.lr == 0.7
    assert config.compose(["schedule=own", "optimizer.lr=0.2"]).optimizer.lr == 0.2
    recipe.unlink()
    assert config.compose(["schedule=own"]).optimizer.lr == first.optimizer.lr
