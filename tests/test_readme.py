"""Every command of the README is parsed; it composes, and runs with short overrides unless it is marked long or GPU."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Shell, forget
from tests.data import datafiles

from redoubt import config
from redoubt.runs.files import read_rows
from redoubt.runs.store import Store
from redoubt.search import space
from redoubt.sweeps import Sweep

ROOT = Path(__file__).resolve().parents[1]
#: Put before a command's own words: what it names itself wins.
TINY = ("model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.image_size=8")
#: Put after them.
QUICK = (
    "data.source=fake", "data.batch_size=8", "data.limit_test=4", "data.probe=4", "trainer=cpu",
    "trainer.progress=false", "inner.steps=1",
)  # fmt: skip
AUDIT = (
    "audit.images=4", "audit.iterations.least=1", "audit.restarts.steps=2", "audit.noise.draws=1",
    "audit.eps_curve.steps=1", "audit.iterations_curve.steps=[1,2]", "audit.black_box.queries=2",
    "audit.adaptive.steps=1", "audit.finite_differences.directions=1", "natural.trainer.max_epochs=1",
)  # fmt: skip
#: A folder of the user's whose classes are counted.
PHOTOS = "data.root=/path/to/photos"
#: Of the user's, where the README says `run=...`.
OWN = re.compile(r"^(run|to|rescore|paths\.outputs|data\.root|defense\.pretrained|checkpoint|sweep|a|b|runs)=")


@dataclass(frozen=True)
class Line:
    """One command: its words, and the comment behind it."""

    words: tuple[str, ...]
    note: str

    @property
    def composed_only(self) -> bool:
        return "long" in self.note or "GPU" in self.note


def lines() -> list[Line]:
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # OMP_NUM_THREADS=1 python ...
                words.pop(0)
            if words:
                found.append(Line(tuple(words), line.partition("  #")[2]))
    return found


def of(command: str) -> list[Line]:
    """The commands of a shim, without ``python src/<command>.py`` (or what stands before it)."""
    shim = f"src/{command}.py"
    return [Line(line.words[line.words.index(shim) + 1 :], line.note) for line in lines() if shim in line.words]


def ids(line: Line) -> str:
    return " ".join(line.words)[:80]


def test_there_are_commands() -> None:
    assert len(lines()) > 40
    assert {"train", "eval", "audit", "export", "report", "reproduce", "runs"} == {
        Path(w).stem for line in lines() for w in line.words if re.fullmatch(r"src/\w+\.py", w)
    }


def test_targets_files_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for line in lines():
        if line.words[0] == "make":
            assert line.words[1] in targets, line
        for word in line.words:
            if re.fullmatch(r"[\w/]+\.py", word):
                assert (ROOT / word).is_file(), line
            for names in re.findall(r"redoubt\[([\w,]+)\]", word):
                assert set(names.split(",")) <= extras, line
    for names in re.findall(r"redoubt\[([\w,]+)\]", (ROOT / "README.md").read_text()):
        assert set(names.split(",")) <= extras


@pytest.fixture
def photos(tmp_path: Path) -> str:
    """A folder of images, where the README has `PHOTOS`."""
    datafiles.folder(tmp_path / "photos")
    return str(tmp_path / "photos")


@pytest.mark.parametrize("command", ["train", "eval", "audit", "export"])
def test_they_compose(command: str, photos: str) -> None:
    from hydra_plugins.redoubt_sweeper import expand, parsed

    assert of(command)
    for line in of(command):
        words = [w for w in line.words if w not in ("-m", "--multirun") and not w.startswith(("hydra/", "hydra."))]
        if "--config-dir" in words:  # the user's own: test_cli.py
            continue
        words = [f"data.root={photos}" if w == PHOTOS else w for w in words]
        for word in words:
            assert "=" in word, (line, word)
        searched = [w for w in words if "interval(" in w]
        assert set(space(parsed(searched))) == {w.partition("=")[0] for w in searched}
        words = [w for w in words if w not in searched]
        cells, evaluations = expand(words, [""])
        for chosen, judged in {0: (cells[0], evaluations[0]), len(cells) - 1: (cells[-1], evaluations[-1])}.values():
            cfg = config.compose([*chosen, *judged], command)
            if command != "export":
                config.resolve(cfg)


@pytest.fixture
def store(shell: Shell, shelf: Path, tmp_path: Path) -> str:
    """A finished run in ``outputs``, trained once for all tests; its name."""
    if not shelf.exists():
        done = shell("train", *TINY, "defense=fsr", *QUICK, "trainer.max_epochs=1", "data.limit_train=16",
                     "attack=fsr_suite", "evaluation.save=float32")  # fmt: skip
        assert done.code == 0, done
        shutil.copytree(tmp_path / "outputs", shelf)
    else:
        shutil.copytree(shelf, tmp_path / "outputs")
    (run,) = Store("outputs").list()
    return run.name


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf") / "outputs"


def own_words(line: Line) -> list[str]:
    return [w for w in line.words if not OWN.match(w)]


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in of("train") if not x.composed_only], ids=ids)
def test_training_runs(shell: Shell, line: Line, photos: str) -> None:
    mine = ("--config-dir", "my/", "defense=mine", "trainer", "data.limit", "data.source", "hydra", "-sc", "install=")
    words = [w for w in own_words(line) if not w.startswith(mine)]
    words += [f"data.root={photos}"] * (PHOTOS in line.words)
    flags = [w for w in words if w == "-m"]
    named = {w.split("=")[0] for w in words}
    tiny = [w for w in TINY if w.split("=")[0].split(".")[0] not in named and "experiment" not in named]
    done = shell("train", *flags, *tiny, *(w for w in words if w != "-m"), *QUICK, "trainer.fast_dev_run=true")
    assert done.code == 0, done


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in of("eval") if "run=" in " ".join(x.words)], ids=ids)
def test_evaluating_runs(shell: Shell, store: str, line: Line) -> None:
    rescored = ["rescore=fsr_suite"] if "rescore" in " ".join(line.words) else []
    words = [w for w in own_words(line) if not w.startswith("evaluation.chunk")]
    done = shell("eval", f"run={store}", *rescored, *words, "trainer=cpu", "natural.trainer.max_epochs=1")
    assert done.code == 0, done


@pytest.mark.slow
@pytest.mark.parametrize("line", of("audit"), ids=ids)
def test_auditing_runs(shell: Shell, store: str, line: Line) -> None:
    words = [w for w in own_words(line) if not w.startswith("natural.")]
    done = shell("audit", f"run={store}", *words, *AUDIT, "trainer=cpu")
    assert done.code in (0, 3), done  # so little training fails a check or another


@pytest.mark.slow  # tests/test_export.py
@pytest.mark.parametrize("line", of("export"), ids=ids)
def test_exporting_runs(shell: Shell, store: str, line: Line) -> None:
    assert shell("export", f"run={store}", "to=model.pt2").code == 0


def reports() -> list[Any]:
    """All figures: reporting/test_plots.py."""
    return [pytest.param(line, marks=[pytest.mark.slow] * ("plot" in line.words)) for line in of("report")]


@pytest.mark.parametrize("line", reports(), ids=ids)
def test_reporting_runs(shell: Shell, store: str, line: Line) -> None:
    Sweep(Path("outputs/sweeps/one")).add([["seed=0"]])
    assert shell("report", *own_words(line)).code == 0


def test_runs_are_listed(shell: Shell, store: str) -> None:
    for line in of("runs"):
        words = [store if w == "NAME" else w for w in line.words]
        assert shell("runs", *words).code == 0


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_a_package_of_ones_own_as_shown(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's defense, net and data set, in a package ``my`` beside the shell's folder."""
    files = {text.split("\n", 1)[0].removeprefix("# "): text for text in [*blocks("python"), *blocks("yaml")]}
    facts = (ROOT / "conf/data/cifar10.yaml").read_text().splitlines()
    small = {"num_classes": "num_classes: 3", "image_size": "image_size: 8", "root": "root: ."}
    data = [small.get(line.split(":")[0], line) for line in facts if line[0] not in "#_"]
    written = {
        "my/__init__.py": "",
        "my/parts.py": files["my/parts.py"],
        "my/mine.py": files["defenses/mine.py"],
        "my/conf/defense/mine.yaml": files["conf/defense/mine.yaml"].replace("redoubt.defenses.mine", "my.mine"),
        "my/conf/model/linear.yaml": files["my/conf/model/linear.yaml"],
        "my/conf/data/mine.yaml": "\n".join(["_target_: my.parts.Mine", *data]),
        "my/conf/redoubt.allow": "my\n",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    numbers = np.random.default_rng(0)
    for split in ("train", "test"):
        images = numbers.integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"mine_{split}.npz", image=images, label=np.arange(12) % 3)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget("my", monkeypatch)
    own = ("--config-dir", "my/conf", "defense=mine", "model=linear", "data=mine", "data.batch_size=6")
    quick = [w for w in QUICK if w != "data.source=fake"]
    done = shell("train", *own, *quick, "trainer.max_epochs=1", "attack=fgsm")
    assert done.code == 0, done
    (run,) = Store("outputs").list()
    assert run.readable == "mine-at-linear-mine-s0"
    (row,) = read_rows(run.metrics_file)
    assert float(row["train/pairing"]) > 0
    assert shell("audit", "--config-dir", "my/conf", f"run={run.name}", *AUDIT, "trainer=cpu").code in (0, 3)
