"""What a process keeps of its configs is never what it hands out, and never older than the files."""

from __future__ import annotations

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf, UnionNode, flag_override

from redoubt import config
from redoubt.composed import copied


def nodes(node: Any) -> list[Any]:
    content = node.__dict__.get("_content")
    inside = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [node, *(found for child in inside for found in nodes(child))]


def test_a_copy_is_that_of_omegaconf_and_shares_nothing() -> None:
    true = config.compose(
        ["experiment=demo", "+more={list: [a, b], text: '${data.num_classes}', none: null, missing: ???}"]
    )
    with flag_override(true, "struct", False):
        true.union = DictConfig({"either": UnionNode(3, ref_type=int | str)})
    OmegaConf.set_readonly(true.model, True)
    expected, ours = copy.deepcopy(true), copied(true)
    for one, two in zip(nodes(expected), nodes(ours), strict=True):
        assert type(one) is type(two)
        assert (one._metadata, one._value()) == (two._metadata, two._value())
        assert one._get_full_key(None) == two._get_full_key(None)
        assert one._get_flag("readonly") == two._get_flag("readonly")
    assert OmegaConf.to_container(ours, resolve=True, throw_on_missing=False) == OmegaConf.to_container(
        expected, resolve=True, throw_on_missing=False
    )
    theirs = {id(part) for node in nodes(true) for part in (node, node._metadata, node._metadata.flags)}
    assert not theirs & {id(part) for node in nodes(ours) for part in (node, node._metadata, node._metadata.flags)}
    ours.optimizer.lr = 7
    assert true.optimizer.lr != 7
