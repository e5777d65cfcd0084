"""conf/experiment/: the files are those that would be written, and compose to what the papers print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from redoubt import config
from redoubt.reporting.cells import experiments
from redoubt.reporting.experiments import files, write
from redoubt.runs.identity import plain
from redoubt.training.schedule import Schedule

FOLDER = Path(config.config_dir()) / "experiment"
PAPERS = ("fsr", "afd", "cure")


def composed(*words: str) -> DictConfig:
    return config.resolve(config.compose(list(words)))


def test_the_files_are_those_that_would_be_written(tmp_path: Path) -> None:
    write(tmp_path)
    there = {p.relative_to(FOLDER).as_posix() for paper in PAPERS for p in (FOLDER / paper).glob("*.yaml")}
    assert there == {f"{name}.yaml" for name in files()}
    for name in there:
        again = "write them anew: python -m redoubt.reporting.experiments"
        assert (FOLDER / name).read_bytes() == (tmp_path / name).read_bytes(), again


def test_every_file_names_its_source_and_numbers() -> None:
    for name, (table, row, _) in experiments().items():
        text = " ".join((FOLDER / f"{name}.yaml").read_text().replace("\n#", "").split())
        assert table.paper in text
        assert table.source in text
        assert f"{row.values[0].metric} {row.values[0].number}" in text


#: experiment -> what it must compose to
SAMPLE: list[tuple[str, dict[str, Any]]] = [
    (
        "fsr/s1_cifar100_resnet18_trades_fsr",
        {
            "axes.model": "resnet18",
            "axes.defense": "fsr",
            "axes.base": "trades",
            "axes.data": "cifar100",
            "axes.attack": "fsr_suite",
            "threat.eps": 8 / 255,
            "trainer.max_epochs": 100,
            "optimizer.lr": 0.1,
            "base.beta": 6.0,
            "data.num_classes": 100,
        },
    ),
    (
        "fsr/s3_cifar10_wrn34_10_mart_fsr",
        {"axes.model": "wrn34_10", "axes.base": "mart", "base.beta": 6.0, "trainer.max_epochs": 100},
    ),
    ("fsr/s4_cifar10_resnet18_at_fsr_after_block3_block4", {"defense.at": ["layer3", "layer4"]}),
    (
        "afd/t1_cifar10_resnet18_afd",
        {
            "axes.defense": "afd",
            "axes.attack": "afd_suite",
            "trainer.max_epochs": 20,
            "optimizer.lr": 0.025,
            "defense.gamma": 25.0,
            "model.stem_padding": 0,
            "evaluation.weights": "ema",
        },
    ),
    (
        "afd/t2_cifar10_wrn34_10_vanilla_aft",
        {
            "axes.defense": "none",
            "defense.pretrained": "auto",
            "trainer.max_epochs": 20,
            "schedule.factors": [0.8, 0.4, 0.2, 0.1, 0.05],
            "ema.decay": None,
        },
    ),
    (
        "cure/t1_cifar10_wrn34_10_cure",
        {
            "axes.attack": "cure_suite",
            "trainer.max_epochs": 200,
            "optimizer.weight_decay": 5e-3,
            "defense.percentile": 50,
            "defense.alpha": 0.3,
            "defense.gamma": 0.5,
            "base.beta": 1.0,
            "natural.schedule.epochs": 200,
        },
    ),
]


@pytest.mark.parametrize(("name", "wanted"), SAMPLE, ids=[name for name, _ in SAMPLE])
def test_an_experiment_composes_to_the_published_recipe(name: str, wanted: dict[str, Any]) -> None:
    cfg = composed(f"experiment={name}")
    assert {key: plain({"value": OmegaConf.select(cfg, key)})["value"] for key in wanted} == wanted
    assert f"experiment/{name}" in cfg.axes.recipes


def trained_for(name: str) -> dict[str, Any]:
    """What rows of one table must share, and the learning rate of every epoch."""
    cfg = composed(f"experiment={name}")
    keys = ("model", "optimizer", "data.batch_size", "data.augment", "trainer.max_epochs")
    section = {key: value for key, value in plain(cfg.schedule).items() if key != "_target_"}
    schedule = Schedule(**section, max_epochs=cfg.trainer.max_epochs)
    rates = [round(cfg.optimizer.lr * schedule.factor(epoch), 9) for epoch in range(cfg.trainer.max_epochs)]
    return {"rates": rates} | {key: plain({"value": OmegaConf.select(cfg, key)})["value"] for key in keys}


@pytest.mark.parametrize("net", ["t1_cifar10_resnet18", "t1_cifar100_resnet18", "t2_cifar10_wrn34_10"])
def test_baselines_of_afd_share_net_and_length(net: str) -> None:
    """methods 13.2: 120 epochs, FSR's milestones (75 and 90 of 100) stretched; the authors' CIFAR ResNet-18."""
    pgd_at, trades = trained_for(f"afd/{net}_pgd_at"), trained_for(f"afd/{net}_trades")
    assert pgd_at == trades
    assert pgd_at["rates"] == [0.1] * 89 + [0.01] * 18 + [0.001] * 13
    assert pgd_at["optimizer"]["weight_decay"] == 5e-4
    if net.endswith("resnet18"):
        nets = [trained_for(f"afd/{net}_{row}")["model"] for row in ("afd", "vanilla_aft")]
        assert nets == [pgd_at["model"]] * 2
        assert pgd_at["model"]["stem_padding"] == 0
    text = " ".join((FOLDER / f"afd/{net}_trades.yaml").read_text().replace("\n#", "").split())
    assert "are our choice" in text
    assert trained_for("afd/t1_tiny_imagenet_resnet18_trades")["model"]["stem_padding"] is None


def test_rows_of_fsr_s3_share_the_recipe() -> None:
    """methods 13.5: 100 epochs, lr 0.1, weight decay 5e-4; MART's own recipe for ResNet-18 stays."""
    rows = ("at", "trades", "mart", "at_fsr", "trades_fsr", "mart_fsr")
    found = [trained_for(f"fsr/s3_cifar10_wrn34_10_{row}") for row in rows]
    assert found == [found[0]] * 6
    assert found[0]["rates"] == [0.1] * 74 + [0.01] * 15 + [0.001] * 11
    assert found[0]["optimizer"]["weight_decay"] == 5e-4
    assert composed("experiment=fsr/s3_cifar10_wrn34_10_mart").inner.eps == 0.031  # the attack is the base's own
    mart = trained_for("fsr/s1_cifar100_resnet18_mart")
    assert (mart["rates"][0], len(mart["rates"]), mart["optimizer"]["weight_decay"]) == (0.01, 120, 3.5e-3)
    assert "our choice" in (FOLDER / "fsr/s3_cifar10_wrn34_10_mart.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_a_file_composes_to_its_cell(name: str) -> None:
    mine, cell = composed(f"experiment={name}"), composed(*experiments()[name][2].overrides())
    for cfg in (mine, cell):
        cfg.axes.recipes = []
    assert plain(mine) == plain(cell)


def test_the_command_line_wins_over_an_experiment() -> None:
    cfg = composed("experiment=fsr/s1_cifar100_resnet18_trades_fsr", "defense.tau=0.5", "data=svhn", "seed=3")
    assert (cfg.defense.tau, cfg.axes.data, cfg.seed) == (0.5, "svhn", 3)


def test_the_older_names_are_the_published_rows() -> None:
    old, new = composed("experiment=cure_resnet18_cifar10"), composed("experiment=cure/t1_cifar10_resnet18_cure")
    old.axes.recipes = new.axes.recipes = []
    assert plain(old) == plain(new)
