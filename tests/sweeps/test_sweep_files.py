"""The files of conf/sweep: each composes, and its cells are those that it documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from hydra_plugins.redoubt_sweeper import expand, parsed
from redoubt import config
from redoubt.search import space

FILES = sorted(path.stem for path in (Path(config.config_dir()) / "sweep").glob("*.yaml"))
CELLS = {"fsr_lambda": 16, "fsr_tau": 5, "afd_sensitivity": 13, "cure_sensitivity": 5, "seeds": 5, "grid": 24}
SEARCHES = ("search_fsr", "search_pareto")


def composed(name: str) -> Any:
    config.register_resolvers()
    with initialize_config_dir(config.config_dir(), version_base="1.3"):
        return compose("train", [f"sweep={name}"], return_hydra_config=True)


def words(cfg: Any) -> list[str]:
    return [f"{key}={value}" for key, value in (cfg.hydra.sweeper.params or {}).items()]


def test_every_file_is_known_here() -> None:
    assert {*CELLS, *SEARCHES} == set(FILES)


@pytest.mark.parametrize("name", CELLS)
def test_a_grids_cells(name: str) -> None:
    cfg = composed(name)
    assert cfg.sweep.name == name
    assert cfg.hydra.sweeper._target_ == "hydra_plugins.redoubt_sweeper.GridSweeper"
    cells, evaluations = expand([*words(cfg), f"sweep={name}"], cfg.sweep.cases or [""])
    assert len(cells) == CELLS[name]
    assert len(evaluations) == (2 if name == "grid" else 1)
    seen: set[str] = set()
    for cell in cells:  # so many that each key, and each option of a group, is composed once
        shown = {word.split("=")[0] if "." in word or word.startswith("seed") else word for word in cell}
        if shown - seen:
            config.resolve(config.compose([*cell, *evaluations[0]]))
            seen |= shown


@pytest.mark.parametrize("name", SEARCHES)
def test_a_searchs_space(name: str) -> None:
    cfg = composed(name)
    assert cfg.hydra.sweeper._target_ == "hydra_plugins.redoubt_sweeper_optuna.OptunaSweeper"
    assert cfg.axes.attack == "none" if "axes" in cfg else cfg.hydra.runtime.choices.attack == "none"
    assert cfg.data.val_fraction > 0
    found = space(parsed(words(cfg)))
    assert len(found) == 3
    assert found["defense.lambda_sep"].log
    lowest = [f"{key}={distribution.low}" for key, distribution in found.items()]
    config.resolve(config.compose([f"sweep={name}", *lowest]))


def test_one_at_a_time() -> None:
    """The published figures and tables: all others stay at their defaults, which stand once in the list."""
    for name, defaults in (
        ("afd_sensitivity", {"alpha": 0.05, "beta": 0.25, "gamma": 25}),
        ("cure_sensitivity", {"alpha": 0.1, "gamma": 1.0, "percentile": 30}),
    ):
        cfg = composed(name)
        cells, _ = expand([], cfg.sweep.cases)
        assert all(len(cell) == 1 for cell in cells)
        at_default = [c for (c,) in cells if c in [f"defense.{k}={v}" for k, v in defaults.items()]]
        assert len(at_default) == 1
        assert {k: cfg.defense[k] for k in defaults} == defaults


def test_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("fsr_tau")
    cells, _ = expand([*words(cfg), "defense.tau=0.2", "seed=0,1"], [""])
    assert cells == [["defense.tau=0.2", "seed=0"], ["defense.tau=0.2", "seed=1"]]
