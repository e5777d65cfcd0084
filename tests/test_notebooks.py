"""The notebooks run on a small store such as the demo leaves, and are committed without what running adds."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tests.conftest import forget

from redoubt import config, jobs
from redoubt.build import build_module
from redoubt.reporting.collect import Record, records

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("first_tour", "compare_runs", "new_defense")


def read(name: str) -> Any:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def text_of(notebook: Any) -> str:
    """What the executed cells have printed."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def pictures(notebook: Any) -> int:
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


@pytest.fixture(autouse=True)
def own_kernel(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels know nothing of the user's IPython and leave nothing in the user's home."""
    home = str(tmp_path_factory.mktemp("home"))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, home)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")


def run(notebook: Any, folder: Path) -> Any:
    """Executes a notebook in a folder, each cell in at most a minute.

    Raises:
        CellExecutionError: A cell has failed.
    """
    folder.mkdir(exist_ok=True)
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small demo was run."""
    folder = tmp_path_factory.mktemp("demo")
    words = [
        "experiment=demo", "trainer=cpu", "trainer.progress=false", "trainer.max_epochs=2", "inner.steps=2",
        "natural.trainer.max_epochs=2", "data.limit_train=256", "data.probe=32", "data.limit_test=40",
        f"paths.outputs={folder / 'outputs'}",
    ]  # fmt: skip
    jobs.train(config.resolve(config.compose(words)), words)
    return folder


@pytest.fixture(scope="module")
def twice(demo: Path) -> Path:
    """The same with earlier runs of the demo's names beside it, finished and not, which nobody has evaluated."""
    for record in of_demo(demo):
        for digest, state in (("0000000000", "done"), ("ffffffffff", "failed")):
            other = record.run.folder.with_name(f"{record.run.readable}-{digest}")
            shutil.copytree(record.run.folder, other, ignore=shutil.ignore_patterns("eval", "checkpoints"))
            status = json.loads((other / "status.json").read_text())
            ended = "2020-01-01T00:00:00+00:00" if state == "done" else "2999-01-01T00:00:00+00:00"
            (other / "status.json").write_text(json.dumps({**status, "state": state, "ended": ended}))
    return demo


def of_demo(folder: Path) -> tuple[Record, Record]:
    robust, plain = (r for r in records(folder / "outputs") if r.evaluations)  # fsr-... is before none-...
    return robust, plain


def test_all_are_tested() -> None:
    assert {path.stem for path in (ROOT / "notebooks").iterdir() if path.is_file()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_committed_without_outputs_counts_and_paths(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    machine = re.findall(r"(?:/(?:home|root|tmp|Users|work|mnt|opt)\b|[A-Z]:\\)[^\s\"]*", text)
    assert not machine
    assert os.path.expanduser("~") not in text


@pytest.mark.slow
def test_first_tour(twice: Path) -> None:
    done = run(read("first_tour"), twice)
    assert pictures(done) == 2
    said = text_of(done)
    for record in of_demo(twice):
        assert f"{record.name} done" in said
        for name, metric in record.evaluations[0].results["metrics"].items():
            assert re.search(rf"fsr_suite +{name} +{100 * metric['accuracy']:.2f} ", said)
    right, still = map(float, re.findall(r"([\d.]+) % (?:of|are)", said))
    robust, _ = of_demo(twice)
    assert right == pytest.approx(100 * robust.evaluations[0].accuracy("natural"), abs=0.01)  # all 40 test images
    assert still < right
    eps, largest = map(float, re.findall(r"eps is ([\d.]+), the largest change of a pixel ([\d.]+)", said)[0])
    assert eps == 0.2
    assert 0.1 < largest <= eps


@pytest.mark.slow
def test_compare_runs_from_its_own_folder(twice: Path) -> None:
    done = run(read("compare_runs"), twice / "notebooks")
    assert pictures(done) == 1
    said = text_of(done)
    a, b = of_demo(twice)
    assert f"A: {a.name}\nB: {b.name}" in said
    verdicts = [record.evaluations[0].verdicts() for record in (a, b)]
    for name in ("natural", "pgd20", "ensemble"):
        right = [v[name] for v in verdicts]
        alone = [int(np.sum(right[0] & ~right[1])), int(np.sum(right[1] & ~right[0]))]
        found = re.search(rf"{name} +of 40 images right in A alone +(\d+), in B alone +(\d+), p = (\S+)", said)
        assert found
        assert [int(found[1]), int(found[2])] == alone
        assert 0 <= float(found[3]) <= 1
    changed = {line.split()[0] for line in said.splitlines() if re.match(r"[a-z]\w*\.\w+", line)}
    assert {"defense._target_", "defense.tau", "base._target_", "inner.steps"} <= changed
    assert not any(key.startswith(("data.", "model.", "paths.", "trainer.max_epochs")) for key in changed)


@pytest.mark.parametrize("name", ["first_tour", pytest.param("compare_runs", marks=pytest.mark.slow)])
def test_without_the_demo_one_line_says_what_to_do(name: str, tmp_path: Path) -> None:
    notebook = read(name)
    with pytest.raises(CellExecutionError):
        run(notebook, tmp_path)
    (error,) = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    (line,) = error.traceback
    assert "make demo" in line
    assert "\n" not in line


@pytest.mark.slow
def test_new_defense(tmp_path: Path) -> None:
    done = run(read("new_defense"), tmp_path)
    assert pictures(done) == 1
    rows = re.findall(r"weight (\S+)  (\w+) +([\d.]+) \[", text_of(done))
    assert [row[:2] for row in rows] == [
        (weight, name) for weight in ("0.0", "1.0") for name in ("natural", "pgd20", "margin20", "ensemble")
    ]
    accuracy = {row[:2]: float(row[2]) for row in rows}
    assert accuracy["1.0", "natural"] > 80  # it has learnt
    assert accuracy["1.0", "pgd20"] > 20  # a plainly trained net keeps less than 5
    assert [v for k, v in accuracy.items() if k[0] == "0.0"] != [v for k, v in accuracy.items() if k[0] == "1.0"]
    assert not list(tmp_path.iterdir())  # nothing is stored


def test_the_new_defense_is_a_member_of_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The class in thirty lines, with the yaml and the list of packages as the notebook shows them."""
    cells = read("new_defense").cells
    (source,) = [cell.source for cell in cells if cell.cell_type == "code" and "(RobustModule)" in cell.source]
    assert len(source.splitlines()) <= 30
    shown = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (yaml,), (allow,) = (re.findall(rf"```{kind}\n(.*?)```", shown, re.S) for kind in ("yaml", "text"))
    package = tmp_path / allow.strip()
    (package / "conf" / "defense").mkdir(parents=True)
    (package / "defenses.py").write_text(source)
    (package / "conf" / "defense" / "alignment.yaml").write_text(yaml)
    (package / "conf" / "redoubt.allow").write_text(allow)
    forget("my", monkeypatch)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(config, "search_path", [str(package / "conf")])
    words = [
        "defense=alignment", "base=trades", "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits",
        "data.image_size=8", "data.batch_size=8", "inner.steps=1", "validation.steps=1", "validation.step=1",
        "attack=pgd20", "trainer=cpu", "trainer.progress=false", "trainer.fast_dev_run=true",
    ]  # fmt: skip
    cfg = config.resolve(config.compose(words))
    module = build_module(cfg)
    assert type(module).__module__ == "my.defenses"
    assert module.weight == 1.0
    (results,) = jobs.train(cfg, words)
    assert set(results["metrics"]) == {"natural", "pgd20"}
    assert "alignment + trades" in capsys.readouterr().out
