"""The published numbers: all there, each with its source, and each row a cell of ours or said not to be one."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from redoubt.errors import UserError
from redoubt.reporting.cells import Cell, Measure, cell, measure
from redoubt.reporting.published import Row, Value, find, published

FACTS = [fact for table in published().values() for fact in table.facts()]


def number(table: str, dataset: str, model: str, method: str, metric: str) -> Value:
    rows = [row for row in find(table).rows if (row.dataset, row.model, row.method) == (dataset, model, method)]
    assert len(rows) == 1
    return next(value for value in rows[0].values if value.metric == metric)


def test_nothing_of_the_collected_numbers_is_lost() -> None:
    assert len(FACTS) == 1589
    assert len(published()) == len({(f["paper"], f["table"]) for f in FACTS}) == 48
    lines = sorted(json.dumps(fact, sort_keys=True) for fact in FACTS)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()  # of the collection that the file was folded from
    assert digest == "b9eafdcc0b30ff648c35448de67d0362ac4dd25b10408eee3403dec3ae9526c4"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("fsr_s1", "CIFAR-100", "ResNet-18", "TRADES + FSR", "Ensemble"), 24.40),
        (("fsr_s3", "CIFAR-10", "WideResNet-34-10", "AT", "Natural"), 87.49),
        (("fsr_s6", "CIFAR-10", "ResNet-18", "Binary mask", "AutoAttack"), 44.26),
        (("fsr_slides_comparison", "CIFAR-10", "ResNet-18", "AT+FSR", "AutoAttack"), 46.41),
        (("afd_1", "CIFAR-10", "ResNet-18", "AFD", "PGD-20"), 52.70),
        (("afd_2", "CIFAR-10", "WideResNet-34-10", "AFD", "AutoAttack"), 51.62),
        (("cure_1", "CIFAR-10", "ResNet-18", "CURE", "C&W"), 52.48),
        (("cure_9", "CIFAR-10", "WideResNet-34-10", "CURE", "percentile p"), 50),
        (("fastat", "CIFAR-10", "ResNet-18", "pgd_at_wa", "AutoAttack"), 50.49),
    ],
)
def test_spot_values(where: tuple[str, str, str, str, str], value: float) -> None:
    assert number(*where).number == value


def test_notes_and_standard_deviations_stand_with_their_numbers() -> None:
    assert "recomputed" in str(number("cure_1", "CIFAR-10", "ResNet-18", "CURE", "NRR").note)
    assert number("cure_1", "CIFAR-10", "ResNet-18", "CURE", "Natural").note is None
    assert number("fastat", "CIFAR-10", "ResNet-18", "elle", "Natural").sd == 8.82
    elle = next(f for f in FACTS if f["method"] == "elle" and f["metric"] == "Natural" and f["dataset"] == "CIFAR-10")
    assert elle["note"].startswith("mean of 3 seeds, std 8.82; 100 epochs")


def test_an_unknown_table() -> None:
    with pytest.raises(UserError, match=r"table=fsr_s11: no such table: did you mean fsr_s1"):
        find("fsr_s11")


def axes(found: Cell) -> tuple[str, str, str, str]:
    return found.defense, found.base, found.model, found.data


#: What we train of each table: as many rows, and of which kind.
KINDS = {
    **dict.fromkeys(("fsr_s1", "fsr_s2", "fsr_s3"), ({"none", "fsr"}, {"at", "trades", "mart"}, 6)),
    "fsr_s4": ({"fsr"}, {"at"}, 5),
    "fsr_s5": ({"none", "fsr"}, {"at"}, 2),
    "fsr_s6": ({"fsr"}, {"at"}, 1),
    "fsr_s7": ({"fsr"}, {"at"}, 1),
    "fsr_slides_features": ({"fsr"}, {"at"}, 1),
    "fsr_slides_comparison": ({"none", "fsr"}, {"at"}, 2),
    **dict.fromkeys(("afd_1", "afd_2"), ({"none", "afd"}, {"at", "trades"}, 12)),
    **dict.fromkeys(("cure_1", "cure_2"), ({"none", "cure"}, {"at", "trades", "mart"}, 8)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_row_of_the_three_papers_tables_is_a_cell_or_said_not_to_be_ours(name: str) -> None:
    table = find(name)
    cells = {row.method: cell(table, row) for row in table.rows}
    ours = [found for row in table.rows if isinstance(found := cell(table, row), Cell)]
    defenses, bases, count = KINDS[name]
    assert ({c.defense for c in ours}, {c.base for c in ours}, len(ours)) == (defenses, bases, count)
    assert len({c.experiment for c in ours}) == count
    suite = {"fsr": "fsr_suite", "afd": "afd_suite", "cure": "cure_suite"}[name.split("_")[0]]
    assert {c.suite for c in ours} == {suite}
    for method, found in cells.items():
        if not isinstance(found, Cell):
            assert found == "not among our methods", method


def test_cells_of_single_rows() -> None:
    def one(table: str, dataset: str, model: str, method: str) -> Cell:
        found = cell(find(table), Row(dataset, model, method, (Value("Natural", 0.0),)))
        assert isinstance(found, Cell)
        return found

    fsr = one("fsr_s1", "CIFAR-100", "ResNet-18", "TRADES + FSR")
    assert axes(fsr) == ("fsr", "trades", "resnet18", "cifar100")
    assert fsr.experiment == "fsr/s1_cifar100_resnet18_trades_fsr"
    block = one("fsr_s4", "CIFAR-10", "ResNet-18", "AT + FSR after Block3 + Block4")
    assert "defense.at=[layer3,layer4]" in block.overrides()
    assert "model.stem_padding=0" in one("afd_1", "CIFAR-100", "ResNet-18", "AFD").overrides()
    assert one("afd_1", "Tiny-ImageNet", "ResNet-18", "AFD").settings == {}, "another model file, with padding"
    assert one("afd_2", "CIFAR-10", "WideResNet-34-10", "AFD").settings == {}
    tuning = one("afd_1", "CIFAR-10", "ResNet-18", "vanilla AFT")
    assert (tuning.defense, tuning.settings["defense.pretrained"]) == ("none", "auto")
    sensitivity = one("cure_10", "CIFAR-10", "ResNet-18", "p=30 alpha=0.5 gamma=1.0")
    assert {"defense.percentile=30.0", "defense.alpha=0.5", "defense.gamma=1.0"} <= set(sensitivity.words())
    revised = one("cure_revision", "CIFAR-10", "ResNet-18", "CURE revision model")
    assert revised.settings["evaluation.weights"] == "revision"


def test_what_has_no_cell() -> None:
    def why(table: str, *row: str) -> Any:
        return cell(find(table), Row(*row, (Value("Natural", 0.0),)))

    assert why("cure_6", "CIFAR-10", "ResNet-50", "CURE") == "not among our models"
    assert why("cure_1", "CIFAR-10", "ResNet-18", "LAS-AT") == "not among our methods"
    assert why("fastat", "CIFAR-10", "ResNet-18", "pgd_at") == "another recipe than ours"
    for table in published().values():  # every row has an answer
        assert all(cell(table, row) for row in table.rows)


def test_metrics() -> None:
    assert measure(find("fsr_s4"), "No attack") == Measure(("natural",))
    assert measure(find("fsr_s6"), "AutoAttack") == Measure(("autoattack",), suite="autoattack")
    assert measure(find("cure_3"), "AutoAttack best") == "chosen by test accuracy"
    assert measure(find("fsr_slides_features"), "weighted 5-NN") == "not measured here"
    parts = {"natural": 0.8676, "cw": 0.5248, "pgd20": 0.5492, "autoattack": 0.4969}
    nrr, average = measure(find("cure_1"), "NRR"), measure(find("afd_1"), "Average")
    assert isinstance(nrr, Measure)
    assert isinstance(average, Measure)
    assert nrr.of(parts) == pytest.approx(0.6540, abs=5e-5)  # as recomputed from the printed two
    assert average.of(parts) == pytest.approx((0.8676 + 0.5492 + 0.4969) / 3)
    assert Measure(("a", "b"), "nrr").of({"a": 0.0, "b": 0.0}) == 0.0
