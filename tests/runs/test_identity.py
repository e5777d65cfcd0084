"""Identity: what means the same has the same hash, what decides the weights changes it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import redoubt
from redoubt.evaluation.record import evaluation_name
from redoubt.runs import identity as module
from redoubt.runs.identity import (
    EXCLUDED,
    PRETRAINED,
    canonical,
    decides,
    deciding,
    differences,
    digest,
    environment,
    identity,
)

CONFIG: dict[str, Any] = {
    "seed": 0,
    "compile": False,
    "label_smoothing": 0.0,
    "threat": {"norm": "linf", "eps": "8/255"},
    "inner": {"_target_": "redoubt.attacks.PGD", "steps": 10, "step": 0.25, "eps": 0.03, "step_abs": None},
    "base": {"beta": 6},
    "defense": {"_target_": "redoubt.FSR", "at": ["layer3", "layer4"], "tau": 0.1, "pretrained": "auto"},
    "model": {"num_classes": 10},
    "data": {"root": "data", "source": "official", "verify": True, "limit_test": 5, "batch_size": 128},
    "optimizer": {"lr": "1e-2", "clip": None},
    "trainer": {
        "max_epochs": 80,
        "precision": "32-true",
        "deterministic": True,
        "accumulate": 1,
        "devices": 1,
        "accelerator": "cpu",
    },
    "paths": {"outputs": "outputs"},
}  # fmt: skip


def test_golden() -> None:
    """This hash names the folders of everybody's runs. It may change only together with NUMERICS."""
    assert redoubt.NUMERICS == 2
    assert identity(CONFIG, "fingerprint") == "554fe0c308"
    assert identity(CONFIG, "fingerprint", "0123456789") == "913743d770"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("8/255", 0.03137254901960784),
        ("8 / 255", 8 / 255),
        (1, 1.0),
        ("1e-3", 0.001),
        (" 0.1 ", 0.1),
        (".5/255", 0.5 / 255),
        (-0.0, 0),
        ("10", 10),
        ((1, "2"), [1.0, 2]),
    ],
)
def test_means_the_same(a: Any, b: Any) -> None:
    assert canonical({"x": a}) == canonical({"x": b})
    assert json.dumps(canonical({"x": a})) == json.dumps(canonical({"x": b}))
    assert identity({"x": a}, "") == identity({"x": b}, "")


@pytest.mark.parametrize(
    ("a", "b"),
    [(True, 1), (False, 0), (2**53, 2**53 + 1), ("9007199254740993", "9007199254740992"), ([1, 2], [2, 1])],
)
def test_means_something_else(a: Any, b: Any) -> None:
    assert identity({"x": a}, "") != identity({"x": b}, "")


@pytest.mark.parametrize("text", ["linf", "1/0", "nan", "inf", "1e999", "1_000", "2024-01-01", "1/2/3", "", "9" * 5000])
def test_strings_that_are_no_numbers_stay(text: str) -> None:
    assert canonical({"x": text}) == {"x": text}


def test_null_and_empty_are_dropped_and_keys_sorted() -> None:
    cfg = {"b": {"c": None, "d": {"e": None}}, "a": {"z": 1, "y": False, "x": [None, {"w": None}]}}
    assert canonical(cfg) == {"a": {"x": [None, {}], "y": False, "z": 1.0}}
    assert list(canonical(cfg)["a"]) == ["x", "y", "z"]
    assert identity({"a": 1, "b": {"c": 2, "d": 3}}, "") == identity({"b": {"d": 3, "c": 2}, "a": 1}, "")


def test_an_omegaconf_config_is_resolved() -> None:
    cfg = OmegaConf.create({"threat": {"eps": "8/255"}, "inner": {"eps": "${threat.eps}", "at": ["${inner.eps}"]}})
    value = canonical(cfg)
    assert value["inner"] == {"eps": 8 / 255, "at": [8 / 255]}
    assert type(value["inner"]) is dict
    assert type(value["inner"]["at"]) is list
    assert identity(cfg, "") == identity({"threat": {"eps": 8 / 255}, "inner": value["inner"]}, "")


def test_an_object_is_refused() -> None:
    with pytest.raises(TypeError, match="object"):
        canonical({"x": object()})


def put(cfg: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    cfg = copy.deepcopy(cfg)
    *parents, last = dotted.split(".")
    node = cfg
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return cfg


@pytest.mark.parametrize("key", sorted(EXCLUDED))
@pytest.mark.parametrize("value", ["other", {"deep": {"er": 1}}, None])
def test_excluded_keys_leave_the_identity(key: str, value: Any) -> None:
    assert identity(put(CONFIG, key, value), "f") == identity(CONFIG, "f")


def leaves(node: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


@pytest.mark.parametrize(
    "key", [key for key in leaves(CONFIG) if not {key, key.split(".")[0]} & (EXCLUDED | PRETRAINED)]
)
def test_any_other_leaf_changes_the_identity(key: str) -> None:
    changed = put(CONFIG, key, "changed")
    assert identity(changed, "f") != identity(CONFIG, "f")
    assert differences(deciding(changed), deciding(CONFIG)) == [key]


def test_what_must_stay_in() -> None:
    inside = {
        "trainer.precision",
        "trainer.accumulate",
        "trainer.max_epochs",
        "trainer.deterministic",
        "seed",
    }
    assert not inside & EXCLUDED


def test_fingerprint_pretrained_and_numerics_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(CONFIG, "f")
    assert identity(CONFIG, "g") != before
    first, second = identity(CONFIG, "f", "aaaaaaaaaa"), identity(CONFIG, "f", "bbbbbbbbbb")
    assert len({before, first, second}) == 3
    # how the config spelt the run it starts from does not matter once that run is known
    assert identity(put(CONFIG, "defense.pretrained", "outputs/runs/x"), "f", "aaaaaaaaaa") == first
    monkeypatch.setattr(redoubt, "NUMERICS", redoubt.NUMERICS + 1)
    assert identity(CONFIG, "f") != before


def test_differences_names_leaves_on_either_side() -> None:
    a = canonical({"x": {"y": 1, "z": [1, 2]}, "only_a": 1, "same": "s", "flag": True})
    b = canonical({"x": {"y": 2, "z": [1, 3]}, "only_b": {"deep": 1}, "same": "s", "flag": 1})
    assert differences(a, b) == ["flag", "only_a", "only_b.deep", "x.y", "x.z"]
    assert differences(a, a) == []


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    record = environment(["cpu"])
    assert record["devices"] == ["cpu"]
    assert record["redoubt"] == redoubt.__version__
    assert set(record["versions"]) == {
        "torch",
        "torchvision",
        "lightning",
        "hydra-core",
        "omegaconf",
        "numpy",
    }
    assert "canary" not in json.dumps(record)
    head = module.subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert record["git"] is None or record["git"]["commit"] == head.stdout.strip()

    def no_git(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", no_git)
    assert environment()["git"] is None


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"limit_test": 5, "balanced": True}, {}),
        ({"val_fraction": 0.0, "limit_train": None, "balanced": True}, {}),
        ({"val_fraction": 0.1, "balanced": True}, {"subsets": 2}),
        ({"limit_train": 30}, {"subsets": 2}),
        ({"limit_train": 30, "balanced": True}, {"subsets": 2, "balanced": True}),
    ],
)
def test_the_rule_of_a_subset_decides_where_there_is_one(keys, expected):
    found = decides({"data": keys}, "f")
    assert {key: value for key, value in found.items() if key in ("subsets", "balanced")} == expected


def test_evaluations_of_all_images_and_of_balanced_ones_keep_their_names():
    tree = {"attack": {"eps": 0.1}, "evaluation": {"chunk": 5, "seed": 0}, "axes": {"attack": "pgd"}}
    old = {"attack": {"eps": 0.1}, "chunk": 5, "seed": 0, "weights": ["last"], "test": "f"}

    def name(limit, subset):
        data = SimpleNamespace(limit_test=limit, subset=subset, fingerprint=lambda split: "f")
        return evaluation_name(tree, data, ["last"], None)

    assert name(None, None) == f"pgd-{digest(old)}"
    assert name(40, "balanced") == f"pgd-{digest({**old, 'limit': 40})}"
    assert name(40, "stratified") == f"pgd-{digest({**old, 'limit': 40, 'numerics': 2})}"
