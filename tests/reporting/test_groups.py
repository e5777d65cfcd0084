"""Seeds, sweeps and protocols: what belongs together, and what does not."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tests.reporting.stores import CONFIG, add_evaluation, add_run, config, nested

from redoubt.errors import UserError
from redoubt.evaluation.results import ordered, robust
from redoubt.reporting import groups
from redoubt.reporting.collect import Record, newest, records
from redoubt.reporting.status import _outcome
from redoubt.sweeps import Sweep


def store(outputs: Path, *trees: dict) -> list[Record]:
    for i, tree in enumerate(trees):
        add_run(outputs, tree, f"{i:010x}")
    return records(outputs)


def test_seeds_of_one_cell_are_together_and_other_cells_apart(outputs: Path) -> None:
    trees = [config(seed=s, defense__tau=t) for t in (0.1, 0.5) for s in (0, 1, 2)]
    found = groups.by_seed(store(outputs, *trees))
    assert [sorted(r.axes["seed"] for r in runs) for runs in found] == [[0, 1, 2], [0, 1, 2]]
    assert [{r.config["defense"]["tau"] for r in runs} for runs in found] == [{0.1}, {0.5}]


def test_another_split_or_source_is_another_cell_but_not_another_place(outputs: Path) -> None:
    trees = [
        config(seed=0),
        config(seed=1, data__seed=0),  # the split of seed 0
        config(seed=2, data__source="fake"),
        config(seed=3, paths__outputs="elsewhere", data__root="elsewhere", trainer__devices=4),
    ]
    found = groups.by_seed(store(outputs, *trees))
    assert sorted(sorted(r.axes["seed"] for r in runs) for runs in found) == [[0, 3], [1], [2]]


def test_a_curve_has_the_values_of_one_key_with_all_their_seeds(outputs: Path) -> None:
    trees = [config(seed=s, defense__tau=t) for t in ("1/10", 0.5, 1) for s in (0, 1)]
    [sweep] = groups.sweeps(store(outputs, *trees, config(defense__tau=0.5, inner__start="normal")))
    assert sweep.keys == ("defense.tau",)
    assert sweep.values(0) == [0.1, 0.5, 1]
    assert [len(sweep.points[t,]) for t in sweep.values(0)] == [2, 2, 2]
    assert sweep.cell == {"data": "cifar10", "model": "resnet18", "defense": "fsr", "base": "at"}


def test_a_plane_is_no_bundle_of_curves(outputs: Path) -> None:
    pairs = list(itertools.product((0, 1, 2), (0, 5)))
    [sweep] = groups.sweeps(store(outputs, *[config(defense__lambda_sep=a, defense__lambda_rec=b) for a, b in pairs]))
    assert sweep.keys == ("defense.lambda_rec", "defense.lambda_sep")
    assert set(sweep.points) == {(b, a) for a, b in pairs}


def test_a_cross_is_two_curves(outputs: Path) -> None:
    pairs = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    found = groups.sweeps(store(outputs, *[config(defense__lambda_sep=a, defense__lambda_rec=b) for a, b in pairs]))
    assert {s.keys for s in found} == {("defense.lambda_sep",), ("defense.lambda_rec",)}
    assert all(s.values(0) == [0, 1, 2] for s in found)


def test_keys_that_move_together_are_one_axis(outputs: Path) -> None:
    [sweep] = groups.sweeps(store(outputs, *[config(threat__eps=e, inner__eps=e) for e in ("4/255", "8/255")]))
    assert sweep.keys == ("inner.eps = threat.eps",)
    assert sweep.values(0) == [4 / 255, 8 / 255]


def test_of_three_keys_each_slice_says_what_is_fixed(outputs: Path) -> None:
    trees = [
        config(defense__lambda_sep=a, defense__lambda_rec=b, defense__tau=t)
        for a, b, t in itertools.product((0.5, 1), (1, 2), (0.1, 0.2))
    ]
    found = groups.sweeps(store(outputs, *trees))
    assert len(found) == len({s.title for s in found}) == 6
    keys = ("defense.lambda_rec", "defense.lambda_sep", "defense.tau")
    for sweep in found:
        assert {*sweep.keys, *sweep.fixed} == {*keys}
        for runs in sweep.points.values():
            for run in runs:
                for key, value in sweep.fixed.items():
                    assert run.config["defense"][key.removeprefix("defense.")] == value
    assert sum(sweep.title.endswith("; defense.tau=0.1") for sweep in found) == 1


def test_runs_that_differ_in_three_keys_or_in_words_are_no_sweep(outputs: Path) -> None:
    trees = [
        config(),
        config(optimizer__lr=0.2, optimizer__momentum=0.8, defense__tau=0.2),
        config(optimizer__lr=0.3, optimizer__momentum=0.8, defense__tau=0.3, trainer__precision="bf16-mixed"),
    ]
    assert [s.keys for s in groups.sweeps(store(outputs, trees[0], trees[2]))] == []
    assert groups.sweeps(store(outputs / "more", config(seed=0), config(seed=1))) == []


def test_a_protocol_is_the_suite_with_all_its_settings(outputs: Path) -> None:
    rng = np.random.default_rng(0)
    for i, steps in enumerate((20, 20, 40)):
        folder = add_run(outputs, config(seed=i), f"{i:010x}")
        attack = {"norm": "linf", "eps": 8 / 255, "attacks": {"pgd20": {"steps": steps}}}
        add_evaluation(folder, nested(rng, 40, ["pgd20"]), attack=attack)
        add_evaluation(folder, nested(rng, 30, ["pgd20"]), attack=attack, hash="1111111111")
    found = records(outputs)
    labels = groups.protocols(found)
    assert len(labels) == len(set(labels.values())) == 2
    first = next(iter(labels))  # that of two runs
    said = "fsr_suite, linf eps 8/255 (0.03137), student weights of last #"
    assert all(text.startswith(said) for text in labels.values())
    chosen = [groups.chosen(r, first, "pgd20") for r in found]
    assert [e and e.results["n"] for e in chosen] == [40, 40, None]
    assert groups.chosen(found[0], first, "cw") is None


def test_other_weights_and_fewer_images_are_other_protocols(outputs: Path) -> None:
    rng = np.random.default_rng(0)
    tree = {**config(), "evaluation": {"checkpoint": "last", "weights": "student"}}
    folder = add_run(outputs, tree, "0" * 10)
    add_evaluation(folder, nested(rng, 40, ["pgd20"]))
    for hash, change in (("1" * 10, {"weights": "revision"}), ("2" * 10, {})):
        where = add_evaluation(folder, nested(rng, 10, ["pgd20"]), hash=hash)
        results = json.loads((where / "results.json").read_text())
        (where / "results.json").write_text(json.dumps({**results, **change}))
        if not change:
            settings = json.loads((where / "attack.json").read_text())
            (where / "attack.json").write_text(json.dumps({**settings, "limit_test": 10}))
    (folder / "eval/damaged-3").mkdir()
    (folder / "eval/damaged-3/results.json").write_text("{}")
    [record] = records(outputs)
    labels = {e.folder.name[-1]: groups.protocol(e).special for e in record.evaluations}
    assert labels == {"0": "", "1": ", revision weights of last", "2": ", 10 images, as many of each class"}
    assert len(groups.protocols([record])) == 3


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.7], [0.1, 0.2, 0.6]])
def test_mean_and_sample_standard_deviation(values: list[float]) -> None:
    mean, sd = groups.mean_sd(values)
    assert math.isclose(mean, np.mean(values))
    assert sd is None if len(values) == 1 else math.isclose(sd, np.std(values, ddof=1))


def test_metrics_stand_as_in_the_papers() -> None:
    names = ["ensemble", "pgd100", "square", "cw", "natural", "pgd20", "autoattack", "fgsm"]
    wanted = ["natural", "fgsm", "pgd20", "pgd100", "cw", "square", "autoattack", "ensemble"]
    assert ordered(names) == wanted
    assert robust(names) == "ensemble"
    assert robust(["natural", "fgsm", "cw"]) == "cw"
    assert robust(["natural"]) is None


def test_labels_name_what_differs(outputs: Path) -> None:
    axes = {**CONFIG["axes"], "defense": "none"}
    found = store(outputs, config(), config(defense__tau=0.5), config(axes=axes))
    assert list(groups.labels(found).values()) == ["fsr 0000000000", "fsr 0000000001", "none"]


def test_the_newest_of_one_name(outputs: Path) -> None:
    """What a notebook takes where a cell was trained twice: the last that is evaluated, never an unfinished one."""
    ends = (("a", "done", 2), ("b", "done", 1), ("c", "failed", 9), ("d", "done", 8))
    for letter, state, day in ends:
        folder = add_run(outputs, config(), letter * 10, state=state, ended=f"2026-01-0{day}")
        if letter in "ab":
            add_evaluation(folder, nested(np.random.default_rng(0), 10))
    readable = folder.name[:-11]
    add_run(outputs, config(seed=10), "eeeeeeeeee", ended="2026-02-01")
    assert newest(outputs, readable).name.endswith("aaaaaaaaaa")
    assert newest(outputs, f"{readable}-bbbbbbbbbb").name.endswith("bbbbbbbbbb")
    with pytest.raises(UserError, match="none of this name is finished"):
        newest(outputs, f"{readable}-cccccccccc")


def test_each_evaluation_of_a_cell_names_what_differs() -> None:
    def outcome(*evaluations: str) -> list[str]:
        metrics = {"natural": {"accuracy": 0.9}, "pgd20": {"accuracy": 0.5}}
        suites = [e.partition("attack=")[2].split(" ")[0] or "pgd" for e in evaluations]
        results = [{"metrics": metrics, "axes": {"attack": suite}} for suite in suites]
        record = {"state": "done", "evaluations": list(evaluations), "results": results}
        return _outcome(Sweep(Path("s")), record).splitlines()

    numbers = "natural 90.00, PGD-20 50.00"
    assert outcome("attack=pgd attack.eps=2/255", "attack=pgd attack.eps=4/255") == [
        f"attack.eps=2/255 pgd: {numbers}",
        f"attack.eps=4/255 pgd: {numbers}",
    ]
    assert outcome("attack.eps=0.1 evaluation.seed=0", "attack.eps=0.1 evaluation.seed=1") == [
        f"evaluation.seed=0 pgd: {numbers}",
        f"evaluation.seed=1 pgd: {numbers}",
    ]
    assert outcome("attack=pgd20", "attack=fgsm") == [f"pgd20: {numbers}", f"fgsm: {numbers}"]
    assert outcome("attack=pgd20 attack.eps=0.1") == [f"pgd20: {numbers}"]
