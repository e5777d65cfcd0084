"""What every test shares: one thread, and composing without the command line.

torch is imported where it is needed: the process that only hands the tests out would wait for it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import omegaconf.base
import omegaconf.grammar_parser
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tests.budget import pytest_runtest_call, pytest_runtest_setup  # noqa: F401

from redoubt import cli, config
from redoubt.composed import copied
from redoubt.errors import UserError

if TYPE_CHECKING:
    from redoubt.defenses import RobustModule

# Two processes of tests share two cores: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
# Composing makes many small objects: to search them for cycles ever so often takes a tenth of the time.
gc.set_threshold(20_000)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection looks through it again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries count at the end what is left


# OmegaConf parses an interpolation each time that it is read. The trees are only looked at: one parse serves all tests.
omegaconf.base.parse = functools.cache(omegaconf.grammar_parser.parse)  # type: ignore[attr-defined]

# Each Trainer looks through all installed packages for callbacks: once is enough.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)  # type: ignore[assignment]

CONF = Path(config.config_dir())


@functools.cache
def _grouped(groups: tuple[str, ...], command: str) -> DictConfig:
    return config.compose(groups, command)


@functools.cache
def parsed(override: str) -> tuple[str, Any]:
    """(key, value) as Hydra reads it."""
    found = OverridesParser.create().parse_override(override)
    return found.key_or_group, found.value()


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """As the command line composes, groups first, then values; the groups' files are read once for all tests.

    Hydra itself is asked where a key is not there, or is null.
    """
    groups = tuple(o for o in overrides if "." not in o.split("=")[0] and (CONF / o.split("=")[0]).is_dir())
    cfg: DictConfig = copied(_grouped(groups, command))
    for override in overrides:
        if override not in groups:
            key, value = parsed(override)
            if OmegaConf.select(cfg, key, default="") == "":
                return config.compose(overrides, command)
            OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def forget(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next import read the package anew: another test may have had one of that name."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
def cell(outputs: Path) -> Callable[..., DictConfig]:
    """A resolved, small cell: 30 fake images of 8 pixels in batches of 8, one-step attacks."""

    def compose(*overrides: str) -> DictConfig:
        small = [
            "model=resnet_small", "data=digits", "data.source=fake", "data.image_size=8", "data.limit_train=30",
            "data.limit_test=10", "data.batch_size=8", "data.probe=10", "trainer=cpu", "trainer.max_epochs=2",
            "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1", "attack=none",
            f"paths.outputs={outputs}",
        ]  # fmt: skip
        if not any(o.startswith("model=") and not o.endswith("_small") for o in overrides):
            small.append("model.widths=[4,4,8,8]")
        return config.resolve(composed(*small, *overrides))

    return compose


def everything(checkpoint: Path) -> str:
    """SHA-256 over names and bytes of all weights, buffers, averages and optimizer tensors of a checkpoint."""
    import torch

    content = torch.load(checkpoint, weights_only=True)
    digest = hashlib.sha256()

    def take(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                take(f"{name}/{key}", value[key])
        elif isinstance(value, list):
            for i, item in enumerate(value):
                take(f"{name}/{i}", item)
        else:
            digest.update(f"{name}={value}".encode())

    for part in ("state_dict", "redoubt", "optimizer_states"):
        take(part, content[part])
    return digest.hexdigest()


def refused(call: Callable[[], object], *says: str) -> None:
    """A mistake of the user's: one line that says all that."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value), str(error.value)


@pytest.fixture
def sigterm_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sends this process SIGTERM once the given training step is done; None: never."""
    from redoubt.defenses import RobustModule

    true = RobustModule.after_step
    at: list[int | None] = [None]

    def after_step(self: RobustModule) -> None:
        true(self)
        if self.steps_done == at[0]:
            at[0] = None
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RobustModule, "after_step", after_step)

    def set_step(step: int | None) -> None:
        at[0] = step

    return set_step


@dataclass
class Ended:
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


class Shell:
    """``redoubt ...`` in this process; ``at`` in a given folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def at(self, folder: Path) -> Shell:
        self.monkeypatch.chdir(folder)
        return self

    def __call__(self, *argv: str) -> Ended:
        self.monkeypatch.setattr(sys, "argv", ["redoubt", *argv])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = self.capsys.readouterr()
        return Ended(int(end.value.code or 0), out, err)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Shell]:
    """``redoubt ...`` in this process, in an empty folder."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in (("search_path", []), ("chosen", []), ("root", "train")):  # what an earlier command has left
        monkeypatch.setattr(config, name, value)
    quiet = logging.NullHandler()  # a root handler: the program's log lines stay out of what is captured
    logging.getLogger().addHandler(quiet)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Shell(monkeypatch, capsys).at(tmp_path)
    logging.getLogger().removeHandler(quiet)
    for number, handler in handlers.items():
        signal.signal(number, handler)
