"""The papers' tables beside a store of known numbers."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import stdev

import pytest
from tests.reporting.fakestore import FakeStore

from redoubt.errors import UserError
from redoubt.reporting.published import published
from redoubt.reporting.sheet import Sheet
from redoubt.reporting.tables import tables

TRADES_FSR = "experiment=fsr/s1_cifar100_resnet18_trades_fsr"
SUITE = {"fgsm": 31.0, "pgd20": 28.0, "pgd100": 27.0, "cw": 25.0, "ensemble": 24.0}


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return FakeStore(tmp_path / "outputs")


def rows(store: FakeStore, table: str, **where: str) -> list[dict[str, str]]:
    """The facts that were written of a table's rows."""
    tables(outputs=str(store.outputs), table=table)
    with (store.outputs / "tables" / f"{table}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in where.items())]


def one(store: FakeStore, table: str, method: str, metric: str, **where: str) -> dict[str, str]:
    found = rows(store, table, method=method, metric=metric, **where)
    assert len(found) == 1
    return found[0]


def test_mean_standard_deviation_and_difference_over_seeds(store: FakeStore) -> None:
    for seed, ensemble in enumerate((24.0, 25.0, 26.6)):
        store.evaluate(store.run(TRADES_FSR, seed=seed), natural=57.0, **{**SUITE, "ensemble": ensemble})
    row = one(store, "fsr_s1", "TRADES + FSR", "Ensemble")
    assert float(row["ours"]) == pytest.approx(25.2)
    assert float(row["ours_sd"]) == pytest.approx(stdev((24.0, 25.0, 26.6)), abs=1e-4)
    assert float(row["difference"]) == pytest.approx(25.2 - 24.40)
    assert (row["seeds"], row["suite"], row["images"], row["epochs"]) == ("3", "fsr_suite", "10000", "100")
    assert (row["state"], row["remark"]) == ("ours", "")
    text = (store.outputs / "tables/fsr_s1.md").read_text()
    assert "| TRADES + FSR | Ensemble | 24.40 | 25.20 ± 1.31 | +0.80 | 3 | fsr_suite, linf 8/255, 10000" in text


def test_what_is_missing_stays_missing(store: FakeStore) -> None:
    run = store.run(TRADES_FSR)
    store.evaluate(run, natural=57.0, fgsm=31.0)  # a suite of which two numbers are there
    found = rows(store, "fsr_s1")
    assert len(found) == 36
    assert {row["state"] for row in found} == {"ours", "missing"}
    there = [(row["method"], row["metric"]) for row in found if row["state"] == "ours"]
    assert there == [("TRADES + FSR", "Natural"), ("TRADES + FSR", "FGSM")]
    assert all(row["ours"] == row["difference"] == row["seeds"] == "" for row in found if row["state"] == "missing")
    assert "| MART | FGSM | 31.32 | missing |  |" in (store.outputs / "tables/fsr_s1.md").read_text()


def test_what_our_methods_cannot_train_is_not_called_missing(store: FakeStore) -> None:
    found = rows(store, "fsr_slides_comparison")
    assert {row["method"]: row["state"] for row in found} == {
        "AT": "missing",
        "FD": "no cell",
        "CAS": "no cell",
        "CIFS": "no cell",
        "AT+FSR": "missing",
    }
    assert (
        one(store, "cure_3", "CURE", "AutoAttack best", model="PreActResNet-18")["remark"] == "chosen by test accuracy"
    )


def test_an_unfaithful_run_is_shown_with_the_keys_that_differ(store: FakeStore) -> None:
    run = store.run(TRADES_FSR, trainer__max_epochs=5, data__limit_train=1000)
    store.evaluate(run, limit=500, natural=40.0, **SUITE)
    row = one(store, "fsr_s1", "TRADES + FSR", "PGD-20")
    assert row["state"] == "other recipe"
    assert row["remark"].split() == ["data.limit_test", "data.limit_train", "trainer.max_epochs"]
    assert (row["images"], row["epochs"]) == ("500", "5")
    text = (store.outputs / "tables/fsr_s1.md").read_text()
    assert r"28.00\*" in text
    assert "not the published recipe: data.limit_test, data.limit_train, trainer.max_epochs" in text


def test_faithful_runs_win_and_recipes_are_never_mixed(store: FakeStore) -> None:
    for seed in range(3):
        store.evaluate(store.run(TRADES_FSR, seed=seed, trainer__max_epochs=5), natural=10.0, **SUITE)
    assert one(store, "fsr_s1", "TRADES + FSR", "Natural")["ours"] == "10.0"
    faithful = store.run(TRADES_FSR)
    store.evaluate(faithful, natural=56.0, **SUITE)
    row = one(store, "fsr_s1", "TRADES + FSR", "Natural")
    assert (row["ours"], row["seeds"], row["remark"], row["runs"]) == ("56.0", "1", "", faithful.name)


def test_seeds_that_were_evaluated_otherwise_are_not_averaged(store: FakeStore) -> None:
    store.evaluate(store.run(TRADES_FSR), natural=56.0, **SUITE)
    store.evaluate(store.run(TRADES_FSR, seed=1), limit=500, natural=77.0, **SUITE)
    row = one(store, "fsr_s1", "TRADES + FSR", "Natural")
    assert (row["ours"], row["seeds"]) == ("56.0", "1")


def test_seeds_whose_clean_accuracy_comes_from_other_suites_are_averaged(store: FakeStore) -> None:
    store.evaluate(store.run(TRADES_FSR), natural=56.0, **SUITE)
    store.evaluate(store.run(TRADES_FSR, seed=1), suite="standard", natural=58.0)
    row = one(store, "fsr_s1", "TRADES + FSR", "Natural")
    assert (row["ours"], row["seeds"], row["suite"]) == ("57.0", "2", "fsr_suite")


def test_images_of_a_folder_are_told_and_kept_apart(store: FakeStore) -> None:
    for seed, natural in ((1, 66.0), (2, 68.0)):
        store.evaluate(store.run(TRADES_FSR, seed=seed, data__source="folder"), natural=natural, **SUITE)
    row = one(store, "fsr_s1", "TRADES + FSR", "Natural")
    assert (row["ours"], row["seeds"]) == ("67.0", "2")
    assert "100 epochs, data.source=folder" in (store.outputs / "tables/fsr_s1.md").read_text()
    store.evaluate(store.run(TRADES_FSR), natural=56.0, **SUITE)
    row = one(store, "fsr_s1", "TRADES + FSR", "Natural")
    assert (row["ours"], row["seeds"]) == ("56.0", "1"), "official images win, and are not averaged with others"


def test_noise_and_unfinished_runs_are_no_result(store: FakeStore) -> None:
    store.evaluate(store.run(TRADES_FSR, state="failed"), natural=57.0, **SUITE)
    assert one(store, "fsr_s1", "TRADES + FSR", "Natural")["state"] == "missing"
    store.evaluate(store.run(TRADES_FSR, data__source="fake"), natural=57.0, **SUITE)
    assert one(store, "fsr_s1", "TRADES + FSR", "Natural")["remark"] == "data.source"


def test_a_run_of_another_position_is_not_shown_in_a_table_of_positions(store: FakeStore) -> None:
    store.evaluate(store.run("defense=fsr"), natural=81.0, **SUITE)
    assert one(store, "fsr_s4", "AT + FSR after Block4", "No attack")["state"] == "ours"
    assert one(store, "fsr_s4", "AT + FSR after Block1", "No attack")["state"] == "missing"
    assert one(store, "fsr_s5", "L_sep Mispredicted (Ours)", "No attack")["ours"] == "81.0"


def test_autoattack_of_any_suite_counts_but_another_pgd_does_not(store: FakeStore) -> None:
    run = store.run("defense=fsr")
    store.evaluate(run, suite="standard", natural=81.0, autoattack=46.0, pgd50=50.0)
    row = one(store, "fsr_slides_comparison", "AT+FSR", "AutoAttack")
    assert (row["ours"], row["state"], row["suite"]) == ("46.0", "ours", "standard")
    natural_start = store.run("experiment=cure/t1_cifar10_resnet18_cure")
    store.evaluate(natural_start, suite="fsr_suite", natural=86.0, **SUITE)
    cure = {"model": "ResNet-18"}
    assert one(store, "cure_1", "CURE", "Natural", **cure)["ours"] == "86.0"
    assert one(store, "cure_1", "CURE", "PGD-20", **cure)["state"] == "missing", "FSR's PGD-20 is another attack"
    store.evaluate(natural_start, natural=86.0, pgd20=54.0, cw=52.0, autoattack=49.0)
    nrr = one(store, "cure_1", "CURE", "NRR", **cure)
    assert float(nrr["ours"]) == pytest.approx(2 * 86 * 52 / (86 + 52), abs=1e-4)
    assert "recomputed" in nrr["note"]


def test_another_natural_start_is_another_recipe(store: FakeStore) -> None:
    run = store.run("experiment=cure/t1_cifar10_resnet18_cure", natural__schedule__epochs=1)
    store.evaluate(run, natural=86.0)
    assert one(store, "cure_1", "CURE", "Natural", model="ResNet-18")["remark"] == "natural.schedule.epochs"


def test_all_tables_in_all_formats_or_one(store: FakeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables(outputs=str(store.outputs))
    names = {f"{name}.{ending}" for name in (*published(), "ours") for ending in ("md", "tex", "csv")}
    assert {path.name for path in (store.outputs / "tables").iterdir()} == names
    assert capsys.readouterr().out.startswith(f"{len(published()) + 1} tables in ")
    tables(outputs=str(store.outputs), to=str(tmp_path / "to"), table="afd_1", format="tex")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["afd_1.tex"]
    assert "PGD-AT" in capsys.readouterr().out


def test_our_own_cells_by_suite(store: FakeStore, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, natural in ((0, 80.0), (1, 82.0)):
        run = store.run("defense=fsr", seed=seed)
        store.evaluate(run, natural=natural, **SUITE)
        store.evaluate(run, suite="standard", natural=natural, autoattack=46.0)
    store.evaluate(store.run("defense=fsr", defense__tau=0.5), natural=70.0, **SUITE)
    store.run("base=trades")
    tables(outputs=str(store.outputs), table="ours")
    text = (store.outputs / "tables/ours.md").read_text()
    # What is the same in all rows stands in the title.
    assert re.search(
        r"# Our cells, fsr_suite: accuracy in %; cifar10; resnet18; fsr; at; fsr_suite, .*; student, last", text
    )
    assert re.search(r"\n\| defense\.tau=0\.1 \| 2 \| 81\.00 ± 1\.41 \| 31\.00 ± 0\.00", text)
    assert re.search(r"\n\| defense\.tau=0\.5 \| 1 \| 70\.00 \| 31\.00", text)
    assert re.search(r"# Our cells, standard: .*\n\n\| data .* \| Natural \| AutoAttack \|\n", text)
    assert re.search(r"# Our cells, not evaluated(.*\n)+\| cifar10 \| resnet18 \| none \| trades \|", text)
    assert "81.00 ± 1.41" in capsys.readouterr().out
    with (store.outputs / "tables/ours.csv").open(newline="") as file:
        facts = [row for row in csv.DictReader(file) if (row["metric"], row["seeds"]) == ("natural", "2")]
    assert {(row["mean"], row["sd"]) for row in facts} == {("81.0000", "1.4142")}


def test_refusals(store: FakeStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format=html: no such format"):
        tables(outputs=str(store.outputs), format="html")
    with pytest.raises(UserError, match="table=fsr_s9: no such table: did you mean fsr_s"):
        tables(outputs=str(store.outputs), table="fsr_s9")
    with pytest.raises(UserError, match="no runs are in it"):
        tables(outputs=str(tmp_path / "nowhere"))


NASTY = Sheet(
    "50 % & more", ["a_b", "n"], [[r"x|y*z~ \ {q} #1 $2 ^ <>", "-1.5"], ["p, q", "1.0 ± 0.1"]], frozenset("n"), ["f~-"]
)


def test_markdown_escapes() -> None:
    lines = NASTY.markdown().splitlines()
    assert lines[:4] == ["# 50 % & more", "", "| a_b | n |", "| --- | ---: |"]
    assert lines[4] == r"| x\|y\*z\~ \\ {q} #1 $2 ^ \<> | -1.5 |"
    assert lines[-1] == r"- f\~-"


def test_csv_quotes() -> None:
    assert list(csv.reader(NASTY.csv().splitlines()))[2] == ["p, q", "1.0 ± 0.1"]


def latex_is_sound(text: str) -> None:
    """Environments and braces close, rows have as many cells as the tabular, nothing special is left bare."""
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == text.count(r"\toprule") == 1
    assert text.count(r"\begin{tabular}") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns
    body = bare[bare.index(r"\toprule") : bare.index(r"\bottomrule")]
    cells = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert cells
    assert {line.count("&") + 1 for line in cells} == {len(columns[1])}
    assert not re.search(r"[%#~^_|<>]", bare)
    assert bare.replace("$-$", "").replace(r"$\pm$", "").count("$") == 0
    assert text.isascii()


def test_latex_is_escaped_and_closed(store: FakeStore) -> None:
    latex_is_sound(NASTY.latex())
    assert r"x\textbar{}y*z\textasciitilde{} \textbackslash{} \{q\} \#1 \$2 \textasciicircum{}" in NASTY.latex()
    assert r"& $-$1.5 \\" in NASTY.latex()
    assert r"1.0 $\pm$ 0.1" in NASTY.latex()
    tables(outputs=str(store.outputs), format="tex")
    for file in (store.outputs / "tables").glob("*.tex"):
        latex_is_sound(file.read_text())
