"""What a process keeps of its configs is what Hydra and OmegaConf would make anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, UnionNode, flag_override

from redoubt import config
from redoubt.composed import Loader, copied


def nodes(node: Any) -> list[Any]:
    content = node.__dict__.get("_content")
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [node, *(found for child in inside for found in nodes(child))]


def assert_same(one: DictConfig, other: DictConfig) -> None:
    for a, b in zip(nodes(one), nodes(other), strict=True):
        assert type(a) is type(b)
        first, second = ({**vars(node._metadata), "resolver_cache": None} for node in (a, b))  # holds ${now:}
        assert (first, a._value()) == (second, b._value())
        assert a._get_full_key(None) == b._get_full_key(None)
        assert a._get_flag("readonly") == b._get_flag("readonly")


def test_a_copy_is_that_of_omegaconf_and_shares_nothing() -> None:
    more = "{list: [a, b], text: '${data.num_classes}', none: null, missing: ???}"
    true = config.compose(["experiment=demo", f"+more={more}"])
    with flag_override(true, "struct", False):
        true.union = DictConfig({"either": UnionNode(3, ref_type=int | str)})
    OmegaConf.set_readonly(true.model, True)
    ours = copied(true)
    assert_same(copy.deepcopy(true), ours)
    theirs = {id(part) for node in nodes(true) for part in (node, node._metadata, node._metadata.flags)}
    assert not theirs & {id(part) for node in nodes(ours) for part in (node, node._metadata, node._metadata.flags)}
    ours.optimizer.lr = 7
    assert true.optimizer.lr != 7


@pytest.mark.parametrize(
    "words", [["experiment=demo"], ["defense=fsr", "base=mart", "seed=3"], ["hydra/sweeper=optuna", "attack=none"]]
)
def test_composed_is_what_hydra_composes(words: list[str]) -> None:
    """The first time, and from memory; before our own look at it, which puts in what it has checked."""
    config.register_resolvers()
    path = create_config_search_path(config.config_dir())
    with initialize_config_dir(config.config_dir(), version_base="1.3"):
        hydras = ConfigLoaderImpl(path)._load_configuration_impl("train", words, RunMode.RUN)
        for _ in range(2):
            assert_same(hydras, Loader(path, [])._load_configuration_impl("train", words, RunMode.RUN))
