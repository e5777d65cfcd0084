"""What an accuracy over attacks is, in new evaluations and in old ones, and which evaluation stands for a run."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from tests.attacks.test_libraries import Net, pictures

from redoubt.attacks.base import Attack
from redoubt.evaluation.results import named, read_results, robust, standing, strength
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import Judge
from redoubt.reporting.table import title
from redoubt.runs.files import write_json


class Helper(Attack):
    """Goes where the net says what it should: an attack that repairs."""

    eps = 1.0

    def __init__(self, group=None):
        self.group = group

    def __call__(self, logits, x, y, draws):
        g = torch.Generator().manual_seed(0)
        tries = torch.rand(400, *x.shape[1:], generator=g)
        said = logits(tries).argmax(1)
        return torch.stack([tries[(said == label).nonzero()[0, 0]] for label in y])


@pytest.mark.parametrize("skip_broken", [False, True])
def test_what_is_wrong_at_x_is_broken(skip_broken):
    net = Net(3)
    images, labels = pictures(net, 9)
    suite = Suite(attacks={"a": Helper(), "fog_1": Helper("fog")}, eps=1.0, ensemble=True, groups={"fog": ["fog_1"]})
    judge = Judge(net, suite, chunk=4, seed=0, device=torch.device("cpu"), skip_broken=skip_broken, progress=False)
    found = judge(images, labels)
    natural = [int(z.argmax()) == int(y) for z, y in zip(net.logits(images.float() / 255), labels, strict=True)]
    assert found["natural"].tolist() == natural == [i % 4 != 0 for i in range(9)]
    assert found["ensemble"].tolist() == natural
    if not skip_broken:
        assert found["a"].tolist() == natural
        assert found["fog_1"].all()  # a corrupted image is another image, and no attack


def old(folder, classes=10, version="standard", groups=None):
    """An evaluation of version 0.1.0 in which an attack repairs images, counted as it was then."""
    rng = np.random.default_rng(3)
    verdicts = {name: rng.random(60) < share for name, share in (("natural", 0.6), ("pgd", 0.9), ("autoattack", 0.4))}
    verdicts["ensemble"] = np.logical_and.reduce(list(verdicts.values()))
    folder.mkdir(parents=True)
    np.savez(folder / "verdicts.npz", index=np.arange(60), label=np.arange(60) % classes, **verdicts)
    metrics = {n: {"accuracy": v.mean(), "low": 0.0, "high": 1.0, "n": 60, "outside": 2} for n, v in verdicts.items()}
    results = {"metrics": metrics, "nrr": {"autoattack": 0.5}, **({"groups": groups} if groups else {})}
    write_json(folder / "results.json", results)
    sections = {"pgd": {"_target_": "redoubt.attacks.WhiteBox", "steps": 20}}
    sections["autoattack"] = {"_target_": "redoubt.attacks.AutoAttack", "version": version}
    write_json(folder / "attack.json", {"attack": {"attacks": sections}})
    return verdicts


def test_old_verdicts_are_counted_alike(tmp_path):
    verdicts = old(tmp_path / "e")
    before = (tmp_path / "e/results.json").read_bytes()
    found = read_results(tmp_path / "e")
    for name, verdict in verdicts.items():
        right = sum(1 for stood, at_x in zip(verdict, verdicts["natural"], strict=True) if stood and at_x)
        assert found["metrics"][name]["accuracy"] == right / 60
        assert found["metrics"][name]["low"] < right / 60 < found["metrics"][name]["high"]
        assert found["metrics"][name]["outside"] == 2
    a, b = (found["metrics"][name]["accuracy"] for name in ("natural", "autoattack"))
    assert found["metrics"]["pgd"]["accuracy"] <= a < verdicts["pgd"].mean()
    assert found["nrr"]["autoattack"] == pytest.approx(2 / (1 / a + 1 / b))
    assert (tmp_path / "e/results.json").read_bytes() == before
    old(tmp_path / "corrupted", groups={"fog": 0.3})  # no attacks
    assert read_results(tmp_path / "corrupted")["metrics"]["pgd"]["accuracy"] == verdicts["pgd"].mean()
    (tmp_path / "e/verdicts.npz").write_bytes(b"damaged")
    assert read_results(tmp_path / "e")["metrics"]["pgd"]["accuracy"] == verdicts["pgd"].mean()


@pytest.mark.parametrize(
    ("classes", "version", "called", "shown"),
    [
        (2, "standard", "autoattack (apgd-ce, square)", "AutoAttack (apgd-ce, square)"),
        (3, "standard", "autoattack (apgd-ce, square)", "AutoAttack (apgd-ce, square)"),
        (4, "standard", "autoattack", "AutoAttack"),
        (10, "rand", "autoattack (apgd-ce, apgd-dlr)", "AutoAttack (apgd-ce, apgd-dlr)"),
        (10, ["square"], "autoattack (square)", "AutoAttack (square)"),
        (10, ["square", "fab-t", "apgd-t", "apgd-ce"], "autoattack", "AutoAttack"),
    ],
)
def test_autoattack_stands_alone_only_where_all_four_ran(tmp_path, classes, version, called, shown):
    old(tmp_path / "e", classes, version)
    found = named(read_results(tmp_path / "e"))
    assert list(found["metrics"]) == ["natural", "pgd", called, "ensemble"]
    assert list(found["nrr"]) == [called]
    assert title(called) == shown
    assert robust(["natural", "fgsm", called]) == called


PGD = {"_target_": "redoubt.attacks.WhiteBox", "steps": 20, "restarts": 1}
AA = {"_target_": "redoubt.attacks.AutoAttack", "queries": 5000}
FULL = ["apgd-ce", "apgd-t", "fab-t", "square"]
#: From the weakest to the strongest.
SUITES = [
    ({}, {}),
    ({"c": {"_target_": "redoubt.attacks.corruptions.corruptions", "severities": [5]}}, {}),
    ({"square": AA}, {"square": ["square"]}),
    ({"square": AA, "transfer": {**PGD, "net": "source"}}, {"square": ["square"]}),
    ({"fgsm": {**PGD, "steps": 1}}, {}),
    ({"t": {"_target_": "redoubt.attacks.TorchAttacks", "name": "DIFGSM", "options": {"steps": 10}}}, {}),
    ({"pgd": PGD}, {}),
    ({"fgsm": {**PGD, "steps": 1}, "pgd": PGD, "pgd100": {**PGD, "steps": 100}}, {}),
    ({"pgd": {**PGD, "steps": 9999, "restarts": 5}}, {}),
    ({"a": AA}, {"a": ["apgd-ce", "fab-t", "square"]}),
    ({"a": AA}, {"a": FULL}),
    ({"a": AA, "pgd": PGD}, {"a": FULL}),
]


def test_suites_by_their_strength():
    found = [strength(attacks, {"members": members}) for attacks, members in SUITES]
    assert found == sorted(found)
    assert found[0] == found[1] == (False, 0, 0)
    assert len(set(found)) == len(found) - 1


OWN = {"norm": "linf", "eps": 8 / 255}
CONFIG = {"threat": OWN, "evaluation": {"checkpoint": "last", "weights": "ema"}}


def test_the_evaluation_that_stands_for_a_run(tmp_path):
    """Each step of the rule decides over all that follow it."""

    def entry(name, suite, threat=OWN, weights="ema", n=100, evaluated=None, age=0.0):
        attacks, members = SUITES[suite]
        write_json(tmp_path / name / "attack.json", {"attack": {"attacks": attacks}})
        stamp = {} if evaluated is None else {"evaluated": f"2026-12-{evaluated:02}T00:00:00+00:00"}
        results = {"threat": threat, "checkpoint": "last", "weights": weights, "n": n, "members": members, **stamp}
        write_json(tmp_path / name / "results.json", results)
        os.utime(tmp_path / name / "results.json", (1.79e9 - age, 1.79e9 - age))
        return tmp_path / name, results

    found = [
        entry("z", 6, evaluated=1),  # 1 December 2026 is 1796083200
        entry("older-file", 6, age=5),
        entry("newer-file", 6),
        entry("newest", 6, evaluated=9, age=1e9),  # whatever became of the file
        entry("more-images", 6, n=200, evaluated=2),
        entry("stronger", 10, n=50, evaluated=1),
        entry("other-weights", 11, weights="student", n=900, evaluated=20),
        entry("larger-eps", 11, threat={"norm": "linf", "eps": 16 / 255}, n=900, evaluated=21),
        entry("other-norm", 11, threat={"norm": "l2", "eps": 8 / 255}, n=900, evaluated=22),
        entry("natural-only", 0, n=900, evaluated=23),
    ]
    order = ["stronger", "more-images", "newest", "z", "newer-file", "older-file"]
    rest = list(found)
    for name in order:
        place = standing(rest, CONFIG)
        assert rest.pop(place)[0].name == name
    assert rest[standing(rest, CONFIG)][0].name == "other-weights"
    assert standing([], CONFIG) is None
    assert json.loads((tmp_path / "z/results.json").read_text())["n"] == 100
