"""Figures: each is drawn where there is data for it, and says what is missing where there is none."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import refused
from tests.reporting.stores import CONFIG, add_audit, add_evaluation, add_run, config, curve, nested, some_examples

from redoubt.reporting import drawings, plots
from redoubt.reporting.collect import records
from redoubt.reporting.pictures import pictures
from redoubt.reporting.series import panels, updates


@pytest.fixture
def filled(outputs: Path) -> Path:
    """FSR at two values of tau, AFD and CURE, with everything that can be drawn."""
    rng = np.random.default_rng(0)
    trees = [config(), config(defense__tau=0.5)]
    trees += [config(axes={**CONFIG["axes"], "defense": d}, defense={"_target_": d}) for d in ("afd", "cure")]
    for i, tree in enumerate(trees):
        folder = add_run(outputs, tree, f"{i:010x}", curve(5, defense=tree["axes"]["defense"]))
        add_evaluation(folder, nested(rng, 50), examples=some_examples(["pgd20"]) if i == 0 else None)
        add_audit(folder)
    return outputs


def test_every_figure_that_there_is_data_for(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, stem: drawn.update({stem.name: figure}))
    plots.plot(outputs=str(filled))
    together = {
        "scatter-resnet18-cifar10", "curves-resnet18-cifar10", "sweep-defense.tau-0", "eps-resnet18-cifar10",
        "iterations-resnet18-cifar10",
    }  # fmt: skip
    assert set(drawn) == together  # a figure for each run would be hundreds
    plots.plot(outputs=str(filled), figure="all")
    assert set(drawn) - together == {
        "gap-afd-at-resnet18-cifar10-s0-0000000002", "updates-cure-at-resnet18-cifar10-s0-0000000003",
        "examples-pgd20-fsr-at-resnet18-cifar10-s0-0000000000",
    }  # fmt: skip
    named = drawn.copy()
    drawn.clear()
    plots.plot(outputs=str(filled), runs="0000000002")
    assert set(drawn) > {"gap-afd-at-resnet18-cifar10-s0-0000000002"}
    drawn = named
    curves = drawn["curves-resnet18-cifar10"].axes
    assert [axes.get_title().rsplit(": ")[-1] for axes in curves] == ["clean", "pgd10"]
    names = [line.get_label() for line in curves[0].lines]
    assert names == ["afd", "cure", "fsr 0000000000", "fsr 0000000001"]


def test_a_slice_of_three_keys_says_what_is_fixed_and_shows_what_all_its_points_have(
    outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    attack = {"norm": "linf", "eps": 8 / 255, "attacks": {"fgsm": {}, "pgd20": {}}}
    for i, (sep, rec, tau) in enumerate(itertools.product((0.5, 1), (1, 2), (0.1, 0.2))):
        tree = config(defense__lambda_sep=sep, defense__lambda_rec=rec, defense__tau=tau)
        names = ["fgsm", "pgd20", "ensemble"] if i == 0 else ["fgsm", "pgd20"]
        add_evaluation(add_run(outputs, tree, f"{i:010x}"), nested(rng, 50, names), attack=attack)
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, stem: drawn.update({stem.name: figure}))
    plots.plot(outputs=str(outputs), figure="sweep")
    assert len(drawn) == 6
    of = "fsr_suite, linf eps 8/255 (0.03137), student weights of last"
    for tau in (0.1, 0.2):
        begin = f"sweep-defense.lambda_rec-defense.lambda_sep-defense.tau_{tau}-"
        (name,) = [name for name in drawn if name.startswith(begin)]
        axes = drawn[name].axes[0]
        assert axes.get_title() == f"PGD-20, fsr + at, resnet18, cifar10; defense.tau={tau}\n{of}"
        assert np.isfinite(axes.images[0].get_array()).sum() == 4


def test_a_figure_is_png_and_pdf_with_truetype(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = filled / "here"
    plots.plot(outputs=str(filled), figure="gap", to=str(to), runs=["0000000000", "0000000002"])
    png, pdf = (to / f"gap-afd-at-resnet18-cifar10-s0-0000000002.{ending}" for ending in ("png", "pdf"))
    assert sorted(to.iterdir()) == [pdf, png]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"/Type3" not in pdf.read_bytes()
    assert b"/FontFile2" in pdf.read_bytes()
    assert capsys.readouterr().out.splitlines() == [str(png), str(pdf), f"1 figure as PNG and PDF in {to}"]


def test_each_cell_s_scatter_has_its_own_protocol(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = add_run(filled, config(axes={**CONFIG["axes"], "data": "digits"}), "00000000aa")
    found = nested(np.random.default_rng(1), 50, ["pgd20", "autoattack"])
    add_evaluation(folder, found, suite="standard", eps=0.2)
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, stem: drawn.update({stem.name: figure.axes[0]}))
    plots.plot(outputs=str(filled), figure="scatter")
    assert {name: axes.get_ylabel() for name, axes in drawn.items()} == {
        "scatter-resnet18-cifar10": "Ensemble in %",
        "scatter-resnet18-digits": "AutoAttack in %",
    }
    [point] = drawn["scatter-resnet18-digits"].lines
    np.testing.assert_allclose(point.get_xydata(), [[100 * found[m].mean() for m in ("natural", "autoattack")]])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"figure": "scater"}, "figure=scater: no such figure: did you mean scatter"),
        ({"metric": "pgd2"}, "metric=pgd2: no evaluation has it: did you mean pgd20"),
        ({"suite": "standart"}, "suite=standart: no run was evaluated by it"),
        ({"runs": "nobody"}, "run=nobody: no such run"),
        ({"figure": "gap", "runs": "0000000000"}, "figure=gap: no run has data for it"),
    ],
)
def test_mistakes_are_one_line(filled: Path, keys: dict, says: str) -> None:
    refused(lambda: plots.plot(outputs=str(filled), **keys), says)


def test_panels_hold_the_store_s_numbers(filled: Path) -> None:
    fsr, _, afd, cure = sorted(records(filled), key=lambda r: r.run.hash)
    by_figure = {p.figure: p for p in panels(fsr)}
    assert set(by_figure) == {"curves", "loss", "eps", "iterations"}
    assert set(by_figure["curves"].series) == {"clean", "pgd10"}
    assert by_figure["curves"].series["pgd10"][:2] == [(1, pytest.approx(0.3)), (2, pytest.approx(0.45))]
    assert by_figure["eps"].series["accuracy"][2] == (0.0314, 0.5)
    assert (by_figure["eps"].log, by_figure["eps"].mark) == (True, 8 / 255)
    gaps = [p for p in panels(afd) if p.figure == "gap"]
    assert [p.y for p in gaps] == ["linf distance", "1 - cosine"]
    assert gaps[0].series["across"][1] == (2, 1.5)
    epochs, layers = updates(cure)
    assert epochs == [1, 2, 3, 4, 5]
    assert layers["layer2.conv"] == [0.72] * 5
    assert updates(fsr) == ([], {})


def test_lines_and_bars_stand_where_the_numbers_are() -> None:
    figure = drawings.curve([0.1, 1.0], [(0.5, 0.02), (0.4, None)], key="tau", metric="PGD-20", title="", log=False)
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 50], [1.0, 40]])
    values = np.array([[0.1, np.nan], [0.3, 0.4]])
    heat = drawings.grid(values, ["b", "a"], ["x", "y"], x="", y="", title="").axes[0]
    assert [t.get_text() for t in heat.texts] == ["10.00", "30.00", "40.00"]


def test_a_damaged_file_of_examples_is_none(filled: Path) -> None:
    record = records(filled)[2]
    assert record.axes["defense"] == "fsr"
    assert pictures(record).labels == ["plane", "car", "bird"]
    path = record.evaluations[0].folder / "examples.npz"
    path.write_bytes(path.read_bytes()[:50])
    assert pictures(records(filled)[2]) is None
