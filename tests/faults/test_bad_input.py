"""What a user gets wrong ends in one line that says what, where and how to mend it; nothing is overwritten."""

from __future__ import annotations

import functools
import pickle
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tests.conftest import Ended, Shell, parsed
from tests.faults import bad_inputs
from tests.faults.bad_inputs import SMALL, Case

from redoubt import cli, config
from redoubt.runs.store import Run, Store
from redoubt.training import trainer as trainer_module

ROW = "bad input: words, values, data, weights, runs, sweeps, reports"
#: What is composed once for all values.
GROUPS = ("threat", "defense", "base", "model", "data", "attack", "inner", "ema", "optimizer")
#: Topics, how they are given (`Values`, `Words`, or as typed, which costs ten times as much), and n: one case in n is
#: not slow.
TOPICS = (
    (bad_inputs.VALUES, "values", 5),
    (bad_inputs.DATA, "values", 2),
    (bad_inputs.WEIGHTS, "values", 5),
    (bad_inputs.STORED, "values", 3),
    (bad_inputs.WORDS, "words", 8),
    (bad_inputs.CONFIGS, "words", 5),
    (bad_inputs.FLAGS, "shell", 2),
    (bad_inputs.COMMANDS, "shell", 4),
    (bad_inputs.SWEEPS, "shell", 9),
)
PARAMETERS = [
    pytest.param(way, case, id=f"{case}", marks=[pytest.mark.slow] * (number % every > 0))
    for topic, way, every in TOPICS
    for number, case in enumerate(topic)
] + [
    pytest.param("shell", case, id=f"{case} typed", marks=pytest.mark.slow)
    for topic, way, _ in TOPICS
    for case in topic
    if way != "shell"
]


def refused(ended: Ended, *says: str) -> None:
    """One line, on stderr, of ours, that says all that."""
    assert ended.code == 2, ended
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("redoubt: ")
    assert "Traceback" not in ended.err + ended.out
    for part in says:
        assert part in lines[0], lines[0]


def content(folder: Path) -> dict[Path, bytes]:
    """The bytes of all files, but for locks."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.endswith("lock")}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf") / "outputs"


@pytest.fixture
def finished(shell: Shell, shelf: Path) -> Run:
    """A finished run in ``outputs``, trained once for all tests."""
    if not shelf.exists():
        assert shell("train", *SMALL, f"paths.outputs={shelf}").code == 0
    shutil.copytree(shelf, "outputs")
    (run,) = Store("outputs").list()
    return run


@functools.cache
def composed(command: str, groups: tuple[str, ...]) -> bytes:
    return pickle.dumps(config.compose(groups, command))


class Values:
    """As `Shell`, from the composed config on: Hydra reads its files once for all values."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, command: str, *words: str) -> Ended:
        self.capsys.readouterr()
        code = 0
        try:
            cli._job(command, self.composed(command, words), list(words))
        except Exception as error:
            code = cli._report(error, debug=False)
        out, err = self.capsys.readouterr()
        return Ended(code, out, err)

    def composed(self, command: str, words: tuple[str, ...]) -> DictConfig:
        once = tuple(word for word in words if word in SMALL or word.split("=")[0] in GROUPS)
        cfg: DictConfig = pickle.loads(composed(command, once))
        for word in words:
            if word not in once:
                OmegaConf.update(cfg, *parsed(word), merge=False)
        return cfg


class Words(Values):
    """As `Shell`, but that Hydra composes once, not twice, and sets up no job."""

    def composed(self, command: str, words: tuple[str, ...]) -> DictConfig:
        if "--config-dir" in words:
            own = words.index("--config-dir")
            config.search_path.append(str(Path(words[own + 1]).resolve()))
            words = (*words[:own], *words[own + 2 :])
        return config.compose(words, command)


@pytest.fixture
def ways(shell: Shell, capsys: pytest.CaptureFixture[str]) -> dict[str, Shell | Values]:
    return {"shell": shell, "values": Values(capsys), "words": Words(capsys)}


@pytest.fixture
def alone(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused asks no network and starts no process."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.fault(ROW, "refused")
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("way", "case"), PARAMETERS)
def test_bad_input(ways: dict[str, Shell | Values], tmp_path: Path, way: str, case: Case) -> None:
    """One line that names key or file, cause and remedy; no traceback, exit code 2; every file as it was."""
    if case.prepare is not None:
        case.prepare(tmp_path)
    before = content(tmp_path)
    refused(ways[way](*case.argv), *case.says)
    after = content(tmp_path)
    assert {path: after.get(path) for path in before} == before
    new = after.keys() - before.keys()
    assert all(".redoubt" in path.parts for path in new), new  # the cache of a split that is good


@pytest.mark.fault(ROW, "refused")
def test_machines_that_nobody_started(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused(shell("train", *SMALL, "trainer.num_nodes=2"), "trainer.num_nodes=2", "torchrun --nnodes=2")
    assert not Path("outputs").exists()


@pytest.mark.fault(ROW, "refused")
def test_no_gpu(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(shell("train", *SMALL, "trainer=gpu"), "trainer.accelerator=gpu", "trainer=cpu")


@pytest.mark.fault(ROW, "refused")
def test_bfloat16_that_the_processor_lacks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "cpu_has_bf16", lambda: False)
    refused(shell("train", *SMALL, "trainer.precision=bf16-mixed"), "trainer.precision=bf16-mixed", "32-true")


def test_debug_adds_the_traceback(shell: Shell) -> None:
    ended = shell("train", *SMALL, "threat.eps=9", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert ended.err.strip().splitlines()[-1].startswith("redoubt: threat.eps=9")


def test_hydra_and_the_next_command_are_unharmed(shell: Shell) -> None:
    """Errors leave no state behind: the command after them works."""
    refused(shell("train", *SMALL, "defense=fsrr"))
    refused(shell("train", *SMALL, "threat.eps=9"))
    done = shell("train", *SMALL, "defense=fsr")
    assert done.code == 0
    assert "fsr + at" in done.out


# ---- files -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("state", ["failed", "done"])
def test_a_damaged_checkpoint_of_ours(shell: Shell, finished: Run, state: str) -> None:
    """Neither resumed from nor overwritten, and no evaluation is made of it."""
    finished.last.write_bytes(finished.last.read_bytes()[:2000])
    with finished.lock():
        finished.update(state=state)
    before = {p: b for p, b in content(finished.folder).items() if p.name != "status.json"}
    refused(shell("train", *SMALL, "attack=pgd20"), str(finished.last), "not a readable checkpoint")
    assert {p: b for p, b in content(finished.folder).items() if p.name != "status.json"} == before
    refused(shell("eval", f"run={finished.name}", "attack=pgd20"), str(finished.last))


@pytest.mark.parametrize("where", ["file/below", pytest.param("file", marks=pytest.mark.slow)])
def test_outputs_that_cannot_be_written(shell: Shell, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("precious")
    refused(shell("train", *SMALL, f"paths.outputs={where}"), "cannot write", "file", "paths.outputs=")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_that_cannot_be_written(shell: Shell, finished: Run) -> None:
    """A checkpoints folder that is a file (root ignores permissions)."""
    before = (finished.config_file.read_bytes(), finished.metrics_file.read_bytes())
    with finished.lock():
        finished.update(state="failed")
    for file in finished.checkpoints.iterdir():
        file.unlink()
    finished.checkpoints.rmdir()
    finished.checkpoints.write_text("in the way")
    refused(shell("train", *SMALL), str(finished.checkpoints))
    assert finished.checkpoints.read_text() == "in the way"
    assert finished.config_file.read_bytes() == before[0]
