"""Sweeps in the store: which cells a command means, what became of each, which are left; no torch.

``<outputs>/sweeps/<name>/`` holds ``sweep.json``, the cells by key, and of each cell ``cells/<key>.json``, how it went.
Whoever works on a cell holds its lock, so several processes, on several machines, can take turns through one sweep.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock

import redoubt
from redoubt import config, deadline
from redoubt.errors import UserError
from redoubt.runs.files import cannot_write, or_died, read_json, write_json
from redoubt.runs.identity import digest
from redoubt.runs.store import Run

#: The sweep that this process works on and the keys of its own cells, for whoever reports on it at the end.
current: list[tuple[Sweep, list[str] | None]] = []

STATES = ("done", "running", "failed", "interrupted", "pruned", "missing")


class Taken(UserError):
    """Another process is working on the cell."""


class Pruned(UserError):
    """A search gave up on the cell: other trials are better."""


class Sweep:
    """One sweep's folder.

    Args:
        folder: ``<outputs>/sweeps/<name>``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.outputs = folder.parent.parent

    @cached_property
    def by(self) -> str:
        """`written`, read once: for every cell of a large grid the files of all configs would be read again."""
        return written()

    @property
    def plan(self) -> dict[str, Any]:
        """``cells``: {key: overrides}; ``evaluations``: override lists."""
        return read_json(self.folder / "sweep.json") or {"cells": {}, "evaluations": []}

    def add(self, cells: Sequence[Sequence[str]], evaluations: Sequence[Sequence[str]] = ()) -> list[str]:
        """Notes the cells that a command means, beside those of earlier commands; their keys."""
        with self.hold("sweep", timeout=-1):
            plan = self.plan
            named = {key_of(cell): list(cell) for cell in cells}
            known = [list(e) for e in plan["evaluations"]]
            plan["evaluations"] = known + [list(e) for e in evaluations if list(e) not in known]
            plan["cells"] |= named
            write_json(self.folder / "sweep.json", plan)
        return list(named)

    def record(self, key: str) -> dict[str, Any]:
        """What is known of a cell: ``state``, ``reason``, ``run``, ``code``, ``results``, ``started``, ``ended``."""
        file = self.folder / "cells" / f"{key}.json"
        return or_died(lambda: read_json(file) or {"state": "missing"}, lambda: self.locked(key))

    def done(self, key: str, evaluations: Sequence[Sequence[str]]) -> bool:
        """Whether a cell is finished, by this code and these configs, with all these evaluations."""
        record = self.record(key)
        if record["state"] != "done" or record["by"] != self.by:
            return False
        if not all(_name(e) in record["evaluations"] for e in evaluations):
            return False
        run = Run(self.outputs / "runs" / record["run"])
        judged = [r["evaluation"] for r in record["results"] if "evaluation" in r]
        return run.finished and all((run.eval / name / "results.json").is_file() for name in judged)

    def locked(self, key: str) -> bool:
        """Whether somebody holds a lock for longer than it takes to ask."""
        try:
            with self.hold(key, timeout=0.5):
                return False
        except UserError:  # taken, or on a read-only disk, where it cannot be asked
            return True

    def free(self, key: str) -> bool:
        """Whether nobody works on a cell, by its record; the lock is tried only where that says so."""
        return bool(self.record(key)["state"] != "running")

    @contextmanager
    def cell(self, key: str, evaluations: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
        """Be the one who works on a cell; what the body notes, by key, is stored with it.

        Raises:
            Taken: Another process does.
        """
        with self.hold(key, timeout=0.3):  # `locked` of another process holds it for a moment
            file = self.folder / "cells" / f"{key}.json"
            began = time.monotonic()
            noted: dict[str, Any] = {"overrides": self.plan["cells"].get(key), "pid": os.getpid(), "by": self.by}
            noted |= {"host": socket.gethostname(), "started": _now(), "evaluations": [_name(e) for e in evaluations]}
            write_json(file, {**noted, "state": "running"})
            noted["state"] = "interrupted"
            try:
                yield noted
                if noted["state"] == "interrupted":
                    noted["state"] = "done"
            except KeyboardInterrupt:
                noted["reason"] = "stopped by the keyboard"
                raise
            except SystemExit as stopped:
                noted["reason"] = deadline.reason(stopped)
                raise
            except BaseException as error:
                noted["reason"] = (str(error).splitlines() or [type(error).__name__])[0]
                raise
            finally:
                write_json(file, {**noted, "ended": _now(), "seconds": time.monotonic() - began})

    @contextmanager
    def hold(self, key: str, timeout: float = 0.0) -> Iterator[None]:
        """Be the only one at something of this sweep: a cell, or what several workers must not do at once.

        Args:
            key: The cell's, or any name.
            timeout: Seconds to wait for another process; -1: as long as it takes.

        Raises:
            Taken: Another process is at it.
        """
        path = self.folder / "cells" / f"{key}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(path, timeout=timeout):
                yield
        except filelock.Timeout:
            raise Taken(f"sweep {self.name}: another process is at cell {key}") from None
        except OSError as error:
            raise cannot_write(path, error) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _name(evaluation: Sequence[str]) -> str:
    return " ".join(evaluation)


def judges(word: str) -> bool:
    """Whether an override decides how a net is judged, not how it is trained: a cell has several evaluations."""
    return word.lstrip("+~").split("=", 1)[0].split(".")[0] in ("attack", "evaluation")


def decides(word: str) -> bool:
    """Whether an override says which sweep this is, rather than where and how it runs."""
    key = word.lstrip("+~").split("=", 1)[0]
    return not key.startswith(("paths.", "logger", "sweep.", "trainer.progress", "trainer.devices"))


def key_of(overrides: Sequence[str]) -> str:
    """Names a cell by the words that compose it, in any order."""
    return digest({"cell": sorted(word for word in overrides if decides(word) and not judges(word))})


def written() -> str:
    """Stands for the configs and the numerics that a cell is composed by: a file of either changed, and it is looked at
    anew (and answered from the store where the run is the same)."""
    found = hashlib.sha256(str(redoubt.NUMERICS).encode())
    for folder in (config.config_dir(), *config.search_path):
        for path in sorted(Path(folder).rglob("*.yaml")):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:10]


def sweeps(outputs: Path | str) -> list[Sweep]:
    """All sweeps of a store, the newest last."""
    found = list((Path(outputs) / "sweeps").glob("*/sweep.json"))
    return [Sweep(p.parent) for p in sorted(found, key=lambda p: p.stat().st_mtime)]


def find(outputs: Path | str, name: str | None = None) -> Sweep:
    """A sweep by (the beginning of) its name; the newest where None is given.

    Raises:
        UserError: There is none, or several begin so.
    """
    known = sweeps(outputs)
    fitting = known[-1:] if name is None else [s for s in known if s.name == name]
    fitting = fitting or [s for s in known if name is not None and s.name.startswith(name)]
    if len(fitting) != 1:
        there = f"there are {', '.join(s.name for s in known)}" if known else "train -m begins one"
        said = "no sweep" if name is None else f"sweep={name} {'means several' if fitting else 'is none'}"
        raise UserError(f"{said} in {Path(outputs) / 'sweeps'} (paths.outputs): {there}")
    return fitting[0]


def states(sweep: Sweep, keys: Sequence[str] | None = None) -> list[tuple[list[str], dict[str, Any]]]:
    """(overrides, record) of every cell, or of those of ``keys``, in the order of the command."""
    plan: Mapping[str, list[str]] = sweep.plan["cells"]
    return [(plan[key], sweep.record(key)) for key in (plan if keys is None else keys)]
