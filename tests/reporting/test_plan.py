"""What a published table still costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.reporting.fakestore import FakeStore

from redoubt.data import datasets
from redoubt.errors import UserError
from redoubt.reporting.costs import IMAGES, plan

AT = "experiment=fsr/s1_cifar100_resnet18_at"


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return FakeStore(tmp_path / "outputs")


@pytest.fixture
def planned(store: FakeStore, capsys: pytest.CaptureFixture[str]):
    def call(**keys: object) -> str:
        plan(**{"outputs": str(store.outputs), **keys})  # type: ignore[arg-type]
        return capsys.readouterr().out

    return call


def line(text: str, name: str) -> list[str]:
    """state, million images, GPU hours of a run."""
    rows = [[cell.strip() for cell in row.strip("│").split("│")] for row in text.splitlines() if "│" in row]
    found = [cells for cells in rows if re.fullmatch(rf"(\w+/)?{re.escape(name)}", cells[0])]
    assert len(found) == 1, text
    return found[0][1:]


def commands(text: str) -> list[str]:
    return [row for row in text.splitlines() if row.startswith("python ")]


def test_hours_are_images_by_epochs_over_measured_throughput(store: FakeStore, planned) -> None:
    store.run(AT, speed=1000.0, state="running")  # an epoch is enough; the median, not the slow first one
    text = planned(table="fsr_s1")
    assert line(text, "s1_cifar100_resnet18_at") == ["missing", "5.00", f"{50_000 * 100 / 1000 / 3600:.2f}"]
    assert line(text, "s1_cifar100_resnet18_trades")[2] == "not measured"
    assert "throughput: 1000 images/s, none-at-resnet18-cifar100-s0" in text
    assert "Some GPU" in text
    assert "6 missing runs: 1.39 GPU hours of training for 1 of them; no run like the others was measured" in text
    assert f"python src/train.py {AT}" in commands(text)
    assert len(commands(text)) == 6


def test_throughput_is_of_the_same_step(store: FakeStore, planned) -> None:
    store.run("data=tiny_imagenet", speed=100.0)  # larger images
    store.run("data=cifar100", speed=9000.0, inner__steps=1)  # a shorter attack
    store.run("data=cifar10", speed=2000.0, trainer__devices=2)  # other images of the same size, on two devices
    store.run("data=cifar10", seed=1, speed=5000.0, trainer__precision="bf16-mixed")  # another precision
    text = planned(table="fsr_s1")
    assert line(text, "s1_cifar100_resnet18_at")[2] == f"{5e6 / 1000 / 3600:.2f}"


def test_a_given_throughput_and_the_total(planned) -> None:
    text = planned(table="fsr_s1", images_per_second=2500)
    images = 50_000 * (4 * 100 + 2 * 120)
    assert f"6 missing runs: {images / 2500 / 3600:.2f} GPU hours of training\n" in text


def test_done_runs_are_found_and_their_evaluations(store: FakeStore, planned) -> None:
    run = store.run(AT)
    store.run(AT, seed=1, trainer__max_epochs=3)  # another recipe: does not count
    text = planned(table="fsr_s1", seeds=2)
    assert "12 runs, 11 missing" in text
    assert line(text, "s1_cifar100_resnet18_at")[0] == "to be evaluated"
    assert line(text, "s1_cifar100_resnet18_at seed=1")[0] == "missing"
    assert f"python src/eval.py run={run.name} attack=fsr_suite" in commands(text)
    assert f"python src/train.py {AT} seed=1" in commands(text)
    store.evaluate(run, natural=59.0, fgsm=28.0, pgd20=24.0, pgd100=23.0, cw=23.0, ensemble=22.0)
    text = planned(table="fsr_s1")
    assert line(text, "s1_cifar100_resnet18_at")[0] == "done"
    assert len(commands(text)) == 5


def test_rows_that_are_one_run_are_planned_once(store: FakeStore, planned) -> None:
    text = planned(table="fsr_slides_comparison")
    assert "2 runs, 2 missing" in text
    run = store.run("defense=fsr")
    store.evaluate(run, natural=81.0, fgsm=1.0, pgd20=1.0, pgd100=1.0, cw=1.0, ensemble=1.0)
    text = planned(table="fsr_slides_comparison")
    assert line(text, "slides_comparison_cifar10_resnet18_at_fsr")[0] == "to be evaluated"
    assert f"python src/eval.py run={run.name} attack=autoattack" in commands(text)


def test_other_weights_are_another_evaluation_of_the_same_run(store: FakeStore, planned) -> None:
    run = store.run("experiment=cure/t1_cifar10_resnet18_cure")
    store.evaluate(run, natural=86.0, pgd20=54.0)
    text = planned(table="cure_revision")
    assert "1 runs, 0 missing" in text
    assert commands(text) == [f"python src/eval.py run={run.name} attack=cure_suite evaluation.weights=revision"]


def test_natural_runs_are_counted_once(store: FakeStore, planned) -> None:
    text = planned(table="cure_7", images_per_second=1000)  # three ablations of CURE, one natural start
    assert "4 runs, 4 missing" in text
    assert line(text, "natural run: resnet18 cifar10, 200 epochs")[:2] == ["missing", "10.00"]
    assert len(commands(text)) == 3, "the natural run is trained by the first that needs it"
    natural = ["schedule.epochs=200", "schedule.milestones=[100,150]", "schedule.factors=[0.1,0.01]"]
    store.run("base=standard", *natural)
    text = planned(table="cure_7", images_per_second=1000)
    assert line(text, "natural run: resnet18 cifar10, 200 epochs")[0] == "done"
    assert f"3 missing runs: {3 * 200 * 50_000 / 1000 / 3600:.2f} GPU hours" in text


def test_a_store_need_not_exist(tmp_path: Path, planned) -> None:
    assert "2 runs, 2 missing" in planned(outputs=str(tmp_path / "none"), table="fsr_s5")


def test_refusals(planned) -> None:
    for keys, says in (
        ({"table": "fsr_s"}, "table=fsr_s: no such table"),
        ({"table": "fat_wrn32"}, "table=fat_wrn32: none of its rows is a cell of ours; take one of fsr_s1"),
        ({"table": "fsr_s1", "images_per_second": "fast"}, "images_per_second='fast' is not a number"),
        ({"table": "fsr_s1", "images_per_second": 0}, "images_per_second=0 must be above 0"),
        ({"table": "fsr_s1", "seeds": 0}, "seeds=0 must be a whole number"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            planned(**keys)


def test_images_are_those_of_the_data_sets() -> None:
    classes = (datasets.CIFAR10, datasets.CIFAR100, datasets.SVHN, datasets.TinyImageNet)
    assert list(IMAGES.values()) == [c.published[0] for c in classes]


def test_no_torch() -> None:
    code = "import sys, redoubt.reporting.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
