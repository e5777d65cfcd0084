"""A stranger's run, checkpoint or file of weights: nothing in it is unpickled, called or looked up."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from tests.conftest import Shell
from tests.faults.bad_inputs import SMALL
from tests.faults.test_hostile_configs import SECRET, canary, refused
from tests.reporting.stores import CONFIG, add_evaluation, add_run, config, nested, some_examples
from tests.reporting.test_page import HOSTILE, Outline

import redoubt
from redoubt.errors import UserError
from redoubt.export import export
from redoubt.reporting.page import html
from redoubt.reporting.tables import tables
from redoubt.runs.checkpoints import checksum_file
from redoubt.runs.store import Run, Store

__all__ = ["canary"]  # of every test here: it must not have fired

CONFIG_ROW = "hostile config in a run's folder, in a file of weights"
PICKLE_ROW = "pickle in a checkpoint, weights, verdicts, examples"
NAMES_ROW = "a run's names and values: ways out of its folder, scripts for the page"
FIRE = {"_target_": "hostile_canary.Fire"}
EVAL = ("attack=fgsm", "evaluation.save=float32", "evaluation.chunk=5")


class Pickled:
    """Touches the canary's file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ('touch "$CANARY"',)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def run(shell: Shell, shelf: Path) -> Run:
    """A finished run in ``outputs``, with an evaluation whose examples were saved, and beside it its exported net."""
    if not (shelf / "outputs").exists():
        assert shell("train", *SMALL[:-1], *EVAL, f"paths.outputs={shelf}/outputs").code == 0
        (made,) = Store(shelf / "outputs").list()
        content = torch.load(made.last, weights_only=True)
        del content["run"]  # the config that it was trained with: a stranger would say what suits
        torch.save(content, made.last)
        checksum_file(made.last).unlink()
        export(made.folder, shelf / "net.safetensors")
    shutil.copytree(shelf / "outputs", "outputs")
    shutil.copy(shelf / "net.safetensors", ".")
    (found,) = Store("outputs").list()
    return found


def changed(run: Run, key: str, value: Any) -> None:
    """Puts a value into the run's config.yaml, be the key there or not."""
    tree = run.config()
    *path, last = key.split(".")
    place = tree
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    run.config_file.write_text(yaml.safe_dump(tree))


def everywhere(folder: Path) -> dict[Path, bytes]:
    """What is in the files under a folder."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != ".lock"}


# ---- a run's config -----------------------------------------------------------------------------------------------

#: Key and value that are put there.
CONFIGS: dict[str, tuple[str, Any]] = {
    "target": ("model._target_", FIRE["_target_"]),
    "builtin": ("defense._target_", "builtins.eval"),
    "chain": ("base._target_", "redoubt.objectives.base.torch.load"),
    "other kind": ("optimizer._target_", "torch.optim.lr_scheduler.LambdaLR"),
    "unused": ("defense.more", FIRE),
    "list": ("model.more", [[{"a": [FIRE]}]]),
    "attack": ("attack.attacks.evil", FIRE),
    "logger": ("logger._target_", FIRE["_target_"]),
    "hydra": ("hydra.callbacks.evil", FIRE),
    "partial": ("inner._partial_", True),
    "environment": ("optimizer.lr", "${oc.env:HOSTILE_SECRET}"),
    "created": ("natural.more", "${oc.create:{_target_: hostile_canary.Fire}}"),
    "reference": ("seed", "${optimizer.lr}"),
    "escaped": ("data.root", "\\${oc.env:HOSTILE_SECRET}"),
}


@pytest.mark.fault(CONFIG_ROW, "refused")
@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_a_runs_config_runs(run: Run, name: str) -> None:
    key, value = CONFIGS[name]
    changed(run, key, value)
    with pytest.raises(UserError) as error:
        redoubt.load(run.folder)
    assert key.split(".")[-1] in str(error.value)
    assert SECRET not in str(error.value)


TEXTS = {
    "tag": "seed: !!python/object/apply:hostile_canary.fire []",
    "class": "seed: !!python/name:hostile_canary.Fire",
    "itself": "a: &a {b: *a}",
    "laughs": "a: &a [1, 1]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]\n" for i in range(9)),
    "deep": f"a: {'[' * 1500}{']' * 1500}",
}


@pytest.mark.fault(CONFIG_ROW, "refused")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("laughs", "deep") else []) for n in TEXTS]
)
def test_nothing_of_a_runs_yaml_runs(run: Run, name: str) -> None:
    run.config_file.write_text(TEXTS[name])
    with pytest.raises(UserError, match=r"no readable config|refers to itself"):
        redoubt.load(run.folder)


COMMANDS = {
    "eval": ("eval", "run=none-at", "attack=pgd20"),
    "audit": ("audit", "run=none-at"),
    "export": ("export", "run=none-at", "to=other.safetensors"),
    "rescore": ("eval", "run=none-at", "rescore=fgsm"),
    "source": ("eval", "run=none-at", "attack=blackbox", "attack.source=none-at"),
}


@pytest.mark.fault(CONFIG_ROW, "refused")
@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("eval", "data.augment", "hostile_canary.fire"),
        pytest.param("eval", "model._target_", FIRE["_target_"], marks=pytest.mark.slow),
        pytest.param("eval", "defense.more", FIRE, marks=pytest.mark.slow),
        pytest.param("eval", "data.root", "${oc.env:HOSTILE_SECRET}", marks=pytest.mark.slow),
        pytest.param("eval", "axes.data", "digits hydra.callbacks.evil=1", marks=pytest.mark.slow),
        pytest.param("eval", "axes.data", "../../../evil", marks=pytest.mark.slow),
        pytest.param("audit", "attack.attacks.evil", FIRE, marks=pytest.mark.slow),
        pytest.param("audit", "axes.attack", "fgsm,pgd", marks=pytest.mark.slow),
        pytest.param("export", "defense._target_", FIRE["_target_"], marks=pytest.mark.slow),
        pytest.param("rescore", "defense._target_", FIRE["_target_"], marks=pytest.mark.slow),
        pytest.param("source", "defense._target_", FIRE["_target_"], marks=pytest.mark.slow),
    ],
)
def test_no_command_runs_anything_of_a_runs_config(run: Run, shell: Shell, command: str, key: str, value: Any) -> None:
    changed(run, key, value)
    before = everywhere(run.folder)
    refused(shell(*COMMANDS[command]), key)
    assert everywhere(run.folder) == before


# ---- a file of weights that says what it is -----------------------------------------------------------------------

FACTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model._target_": lambda facts: facts["model"].update(FIRE),
    "model.more._target_": lambda facts: facts["model"].update(more=FIRE),
    "defense._target_": lambda facts: facts.update(defense=FIRE),
    "model.widths.0": lambda facts: facts["model"].update(widths=["${oc.env:HOSTILE_SECRET}"]),
    "threat.eps": lambda facts: facts["threat"].update(eps="${oc.create:{_target_: hostile_canary.Fire}}"),
    "model._args_": lambda facts: facts["model"].update(_args_=[1]),
    "model.mean": lambda facts: facts["model"].update(mean=json.loads("[" * 60 + "]" * 60)),
    "none of export's": lambda facts: facts["data"].update(num_classes={"_target_": "os.system"}),
}


@pytest.mark.fault(CONFIG_ROW, "refused")
@pytest.mark.parametrize(
    "says", [pytest.param(key, marks=[pytest.mark.slow] if i % 4 else []) for i, key in enumerate(FACTS)]
)
def test_nothing_of_the_metadata_runs(run: Run, tmp_path: Path, says: str) -> None:
    file = tmp_path / "net.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["redoubt"])
    FACTS[says](facts)
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, {"redoubt": json.dumps(facts)})
    with pytest.raises(UserError) as error:
        redoubt.load(file)
    assert says in str(error.value)
    assert SECRET not in str(error.value)


# ---- pickles ------------------------------------------------------------------------------------------------------


def pickled_state(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "redoubt": Pickled()}, path)


def pickled_arrays(path: Path) -> None:
    np.savez(path, label=np.array([Pickled()] * 10, dtype=object), fgsm=np.zeros(10, bool), index=np.arange(10))


def pickled_examples(path: Path) -> None:
    for file in path.glob("fgsm-*/*.npy"):
        np.save(file, np.array([Pickled()], dtype=object), allow_pickle=True)


#: (What is spoilt in the run's folder, how, what then is asked for, what the line names.)
PICKLES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...], str]] = {
    "load": ("checkpoints/last.ckpt", pickled_state, COMMANDS["export"], "last.ckpt"),
    "pretrained run": ("checkpoints/last.ckpt", pickled_state,
                       ("train", *SMALL, "defense=cure", "base=at", "defense.pretrained=none-at"), "last.ckpt"),
    "weights": ("../../../evil.pt", pickled_state, ("eval", *SMALL, "checkpoint=evil.pt"), "evil.pt"),
    "pretrained file": ("../../../evil.pt", pickled_state,
                        ("train", *SMALL, "defense=cure", "base=at", "defense.pretrained=evil.pt"), "evil.pt"),
    "source": ("../../../evil.pt", pickled_state,
               ("eval", "run=none-at", "attack=blackbox", "attack.source=evil.pt"), "evil.pt"),
    "another suffix": ("../../../evil.safetensors", pickled_state,
                       ("eval", *SMALL, "checkpoint=evil.safetensors"), "evil.safetensors"),
    "verdicts": ("eval/*/verdicts.npz", pickled_arrays, COMMANDS["rescore"], "verdicts.npz"),
    "examples": ("eval/kept", pickled_examples, COMMANDS["rescore"], ".npy"),
}  # fmt: skip


@pytest.mark.fault(PICKLE_ROW, "refused")
@pytest.mark.parametrize(
    "name", [n if n in ("weights", "verdicts") else pytest.param(n, marks=pytest.mark.slow) for n in PICKLES]
)
def test_nothing_is_unpickled(run: Run, shell: Shell, name: str) -> None:
    where, spoil, command, says = PICKLES[name]
    (path,) = [*run.folder.glob(where)] or [run.folder / where]
    spoil(path)
    refused(shell(*command), says)


@pytest.mark.slow
@pytest.mark.fault(PICKLE_ROW, "refused")
def test_no_pickle_is_resumed_from(run: Run, shell: Shell) -> None:
    pickled_state(run.last)
    with run.lock():
        run.update(state="failed")
    refused(shell("train", *SMALL), "last.ckpt")


@pytest.mark.fault(PICKLE_ROW, "survived")
def test_reports_show_what_else_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verdicts and examples that hold objects are as if they were not there."""
    outputs = tmp_path / "outputs"
    folder = add_run(outputs, config(), "0000000000")
    where = add_evaluation(folder, nested(np.random.default_rng(0), 10), examples=some_examples())
    pickled_arrays(where / "verdicts.npz")
    pickled_arrays(where / "examples.npz")
    html(outputs=str(outputs))
    tables(outputs=str(outputs), table="ours")
    assert "fsr" in capsys.readouterr().out


def test_the_source_unpickles_nothing() -> None:
    """Each loader says that it takes no pickles; the one that reads CIFAR's has a list of its own."""
    safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
    unsafe = {"yaml.load", "yaml.unsafe_load", "eval", "exec", "instantiate"}
    pickles = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    found = set()
    for file in Path(redoubt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name, words = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
                assert name not in unsafe, f"{file}:{node.lineno}"
                assert safe.get(name) in (None, *words), f"{file}:{node.lineno}"
                found |= {name} & safe.keys()
            elif isinstance(node, ast.Import | ast.ImportFrom) and file.name != "pickles.py":
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & pickles, f"{file}:{node.lineno}"
    assert found == safe.keys()


# ---- names that lead elsewhere ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault(NAMES_ROW, "survived")
def test_nothing_is_written_outside(run: Run, shell: Shell, tmp_path: Path) -> None:
    """Whatever a stranger's run and its results call themselves."""
    pytest.importorskip("wandb_workspaces")
    outside = tmp_path / "outside"
    outside.mkdir()
    (where,) = {path.parent for path in run.eval.glob("*/results.json")}
    results, settings = (json.loads((where / name).read_text()) for name in ("results.json", "attack.json"))
    away = "../../../../../outside/evil"
    results |= {"evaluation": away, "run": away, "axes": {**results["axes"], "attack": away, "data": away}}
    settings["kept"] = {name: f"../../../../../outside/{kept}" for name, kept in settings["kept"].items()}
    (where / "results.json").write_text(json.dumps(results))
    (where / "attack.json").write_text(json.dumps(settings))
    assert shell(*COMMANDS["rescore"]).code == 0
    assert shell("eval", "run=none-at", *EVAL).code == 0
    changed(run, "axes.data", "x/../../../outside/evil")  # of outputs/figures, outputs/wandb
    for what in (["plot"], ["tables", "table=ours"], ["html"], ["wandb"], ["status"]):
        assert "Traceback" not in shell("report", *what).err
    assert list(outside.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} <= {"outputs", "outside", "theirs", "net.safetensors", "data"}
    assert {p.name for p in (tmp_path / "outputs").iterdir()} <= {"runs", "figures", "tables", "wandb", "report.html"}


# ---- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.fault(NAMES_ROW, "survived")
def test_no_script_gets_into_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of runs, axes, suites, attacks and keys, values, reasons: text, whatever they hold."""
    outputs = tmp_path / "outputs"
    image = "<img src=x onerror=alert(1)>"
    tree = config(axes={**CONFIG["axes"], "defense": image.replace("/", ""), "data": image}, model__norm=HOSTILE)
    tree["defense"][HOSTILE] = HOSTILE
    tree["sweep"] = {"name": HOSTILE}
    folder = add_run(outputs, tree, "0000000000", rows=[{"epoch": 1, image: 1}], reason=HOSTILE, state="failed")
    verdicts = nested(np.random.default_rng(0), 10, ("fgsm", image))
    add_evaluation(folder, verdicts, suite="evil", axes={**tree["axes"], "attack": HOSTILE, "seed": 0}, weights=HOSTILE)
    html(outputs=str(outputs))
    text = (outputs / "report.html").read_text()
    outline = Outline()
    outline.feed(text)
    assert outline.scripts == 2
    assert text.lower().count("<script") == 2
    assert "<img" not in text
    assert "\\u003cimg src=x onerror=alert(1)\\u003e" in text
