"""Modules of a class that no config names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig
from tests.conftest import refused

from redoubt.build import build_module
from redoubt.defenses import RobustModule


class Scaled(RobustModule):
    """Logits times ``factor``."""

    bases = ("at", "trades")

    def __init__(self, *, factor: float = 2.0, **rest):
        super().__init__(**rest)
        self.factor = factor

    def run(self, x, noise=None):
        return self.factor * self.net(x), ()


def test_a_given_class_takes_the_place_of_the_configs(cell: Callable[..., DictConfig]) -> None:
    x = torch.rand(2, 3, 16, 16)
    cfg = cell("+defense.factor=3")
    plain, scaled = build_module(cell()).eval(), build_module(cfg, Scaled).eval()
    assert type(scaled) is Scaled
    torch.testing.assert_close(scaled.logits(x), 3 * plain.logits(x))  # the same fresh weights
    assert type(build_module(cell())) is RobustModule


def test_a_given_class_states_its_bases_and_arguments(cell: Callable[..., DictConfig]) -> None:
    refused(lambda: build_module(cell("base=mart"), Scaled), "base=mart", "base=at, trades")
    refused(lambda: build_module(cell("+defense.faktor=3"), Scaled), "defense", "Scaled", "faktor")


@pytest.mark.parametrize("target", ["builtins.object", "conftest.refused"])
def test_names_in_a_config_are_still_checked(cell: Callable[..., DictConfig], target: str) -> None:
    refused(lambda: build_module(cell(f"defense._target_={target}")), "defense", target, "redoubt.allow")
