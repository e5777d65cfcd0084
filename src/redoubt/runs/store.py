"""The run store: every run has a folder ``<outputs>/runs/<readable-name>-<hash>/`` that can be moved."""

from __future__ import annotations

import copy
import difflib
import functools
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import yaml

from redoubt.allowed import check_plain
from redoubt.errors import UserError
from redoubt.evaluation import results as judged
from redoubt.runs import files
from redoubt.runs.identity import digest, environment, plain
from redoubt.secrets import redacted

log = logging.getLogger(__name__)

STATES = ("created", "running", "done", "failed", "interrupted")
FIELDS = ("state", "reason", "pid", "host", "started", "ended", "train_seconds", "epoch", "max_epochs")
#: A folder that is being removed; it is no run any more, and what a killed removal left is found by it.
REMOVED = ".removed-"


def readable_name(axes: Mapping[str, Any], seed: int) -> str:
    """``fsr-trades-resnet18-svhn-s0``: the cell of the grid as a name for people and file systems."""
    named = {**axes, "data": axes.get("folder") or axes["data"]}
    parts = [re.sub(r"[^\w.+]+", "_", str(named[axis])) for axis in ("defense", "base", "model", "data")]
    return "-".join([*parts, f"s{seed}"])


@functools.lru_cache(maxsize=64)
def _loaded(text: str) -> Any:
    """A config's text as data; a command asks for the same few often, and YAML is slow to read."""
    return yaml.safe_load(text)


def reason(error: UserError, wanted: str) -> str:
    """What `Store.find` objected to, without its ``run=...:``, for a message that names another key."""
    return str(error).removeprefix(f"run={wanted}: ").removeprefix(f"run={wanted!r}: ")


class Run:
    """A run's folder: where its files are and what became of it.

    Attributes:
        folder: The run's folder; all that follows is in it.
        name: ``<readable-name>-<hash>``.
        readable: The name without the hash.
        hash: The identity, the last part of the name.
        config_file: ``config.yaml``, the resolved config without secrets.
        environment_file: ``environment.json``: versions, git state, devices.
        status_file: ``status.json``; read by ``status``, written by ``update``.
        metrics_file: ``metrics.csv``.
        checkpoints: Folder of ``last``, while it trains of the one before, and, with a validation split, of ``best``.
        classes_file: ``classes.json``, the names of the classes in the order of the labels, where there are some.
        eval: Folder of the evaluations, one folder in it for each.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.name = self.folder.name
        self.readable, _, self.hash = self.name.rpartition("-")
        self.config_file = self.folder / "config.yaml"
        self.environment_file = self.folder / "environment.json"
        self.status_file = self.folder / "status.json"
        self.metrics_file = self.folder / "metrics.csv"
        self.checkpoints = self.folder / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.previous = self.checkpoints / "previous.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self.eval = self.folder / "eval"
        self.classes_file = self.folder / "classes.json"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def exists(self) -> bool:
        """Whether the folder holds a run (any folder may hold a config.yaml; the store made both)."""
        try:
            return self.config_file.is_file() and self.status_file.is_file()
        except OSError:  # a name too long, a folder that may not be entered
            return False

    @property
    def finished(self) -> bool:
        """Whether the run is there and its training is done."""
        return self.exists() and self.status["state"] == "done"

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.last.is_file() or self.previous.is_file()

    def must_be_finished(self) -> None:
        """Refuses a run whose weights may still change."""
        if self.status["state"] != "done":
            raise UserError(f"run {self.name} is {self.status['state']}: let it finish first")

    def config(self) -> dict[str, Any]:
        """The config as plain containers; nothing in it is interpolated or instantiated.

        Raises:
            UserError: It is none, or holds what would be interpolated.
        """
        value = self._stored()
        if value is None:
            raise UserError(f"{self.config_file}: holds no readable config; the run's own command writes it again")
        check_plain(value, f"{self.config_file}: ")
        return value

    def _stored(self) -> dict[str, Any] | None:
        try:
            value = copy.deepcopy(_loaded(self.config_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return None
        return value if isinstance(value, dict) else None

    def classes(self) -> list[str] | None:
        """The names of the classes in the order of the labels; None where the run has none, as old ones."""
        found = files.read_json(self.classes_file)
        names = found.get("classes") if found else None
        return [str(name) for name in names] if isinstance(names, list) else None

    @property
    def whole(self) -> bool:
        """Whether the folder holds a run whose config can be read."""
        return self.exists() and self._stored() is not None

    def evaluations(self) -> list[tuple[Path, dict[str, Any]]]:
        """Folder and results (see `read_results`) of every finished evaluation, the newest first."""
        folders = [path.parent for path in self.eval.glob("*/results.json")]
        found = [(folder, results) for folder in folders if (results := judged.read_results(folder)) is not None]
        return sorted(found, key=lambda f: (judged.written(*f), f[0]), reverse=True)

    def standing(self) -> tuple[Path, dict[str, Any]] | None:
        """The evaluation that stands for the run, by the rule of `redoubt.evaluation.results.standing`."""
        found = self.evaluations()
        place = judged.standing(found, self._own_protocol() if len(found) > 1 else {})
        return None if place is None else found[place]

    def size(self) -> int:
        """Bytes on the disk."""
        return files.size(self.folder)

    def _own_protocol(self) -> dict[str, Any]:
        """``threat`` and ``evaluation`` of the config; reading it whole takes long where all runs are listed."""
        with suppress(OSError, ValueError, yaml.YAMLError):
            text = self.config_file.read_text(encoding="utf-8")
            found = _loaded("".join(re.findall(r"^(?:threat|evaluation):\n(?: .*\n)+", text, re.MULTILINE)))
            if found and {"threat", "evaluation"} <= found.keys():
                return dict(found)
        return self._stored() or {}

    @property
    def status(self) -> dict[str, Any]:
        """The status; a run that says ``running`` while nobody holds its lock has died: ``interrupted``."""
        return files.or_died(lambda: self._said, self.locked)

    @property
    def _said(self) -> dict[str, Any]:
        stored = files.read_json(self.status_file)
        if stored is None or stored.get("state") not in STATES:
            return {"state": "created", "reason": "status.json is missing or damaged"}
        return stored

    def update(self, **fields: Any) -> None:
        """Change fields of the status, for whoever holds the lock.

        ``state="running"`` also notes process, host and time and clears what an earlier start left;
        another state notes the time it ended.

        Raises:
            UserError: The file could not be written.
        """
        unknown = set(fields) - set(FIELDS)
        if unknown or fields.get("state", "created") not in STATES:
            raise ValueError(f"no such status: {fields}")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        noted: dict[str, Any] = {}
        if fields.get("state") == "running":
            noted = {"pid": os.getpid(), "host": socket.gethostname(), "started": now}
            noted |= {"ended": None, "reason": None}
        elif fields.get("state") in ("done", "failed", "interrupted"):
            noted = {"ended": now}
        stored = files.read_json(self.status_file) or {}
        files.write_json(self.status_file, {**dict.fromkeys(FIELDS), **stored, **noted, **fields})

    def locked(self) -> bool:
        """Whether a process holds the lock (also where it cannot be asked, on a read-only disk)."""
        path = self.folder / ".lock"
        if not path.exists():
            return False
        try:
            with filelock.FileLock(path, timeout=0):
                return False
        except (filelock.Timeout, OSError):
            return True

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[None]:
        """Be the one process that writes to this run.

        Args:
            wait: Wait for another process, with one line in the log; else refuse.

        Raises:
            UserError: Another process holds it and ``wait`` is false, the folder is not writable, or the run
                was removed meanwhile.
        """
        lock = filelock.FileLock(self.folder / ".lock")
        try:
            try:
                lock.acquire(timeout=0.3)  # `locked` of another process holds it for a moment
            except filelock.Timeout:
                if not wait:
                    raise UserError(f"run {self.name} is in use by {self._holder()}; let it end") from None
                log.warning("run %s is in use by %s: waiting for its end", self.name, self._holder())
                lock.acquire(poll_interval=0.2)
        except OSError as error:
            raise files.cannot_write(self.folder, error) from error
        try:
            if not self.exists():
                raise UserError(f"run {self.name} was removed meanwhile; start it again")
            files.clean(self.folder)
            files.clean(self.checkpoints)
            yield
        finally:
            lock.release()

    def _holder(self) -> str:
        status = files.read_json(self.status_file) or {}
        pid = status.get("pid")
        return f"process {pid} on {status.get('host')}" if pid else "another process"


class Weights(Run):
    """Weights of a file that was evaluated: they are of no run, and their evaluations are in ``<outputs>/eval``.

    Args:
        outputs: The store's folder.
        name: ``<file's name>-<hash>``.
        found: Their evaluations, as `Run.evaluations` gives them.
    """

    def __init__(self, outputs: Path, name: str, found: list[tuple[Path, dict[str, Any]]]) -> None:
        super().__init__(outputs)
        self.name, self.found = name, found
        self.readable, _, self.hash = name.rpartition("-")

    @property
    def status(self) -> dict[str, Any]:
        return {"state": "weights"}

    def config(self) -> dict[str, Any]:
        """Their file, and the axes that they have."""
        _, results = self.found[0]
        axes = {axis: results["axes"].get(axis) or "-" for axis in ("model", "defense", "base", "data")}
        return {"axes": axes, "seed": "-", "checkpoint": results["checkpoint"], "weights": self.hash}

    def evaluations(self) -> list[tuple[Path, dict[str, Any]]]:
        return self.found

    def size(self) -> int:
        return sum(files.size(folder) for folder, _ in self.found)


class Store:
    """All runs under one ``outputs`` folder.

    Args:
        outputs: The folder, ``paths.outputs``. It is made when the first run is.
    """

    def __init__(self, outputs: Path | str) -> None:
        self.outputs = Path(outputs)
        self.folder = self.outputs / "runs"

    def open(
        self,
        axes: Mapping[str, Any],
        seed: int,
        hash: str,
        config: Mapping[str, Any],
        devices: Iterable[str] = (),
    ) -> Run:
        """The run of this identity: the one that is there, or a new folder for it. A damaged config is written again.

        Args:
            axes: ``defense``, ``base``, ``model`` and ``data`` by name.
            seed: The run's seed.
            hash: What :func:`redoubt.runs.identity.identity` gave.
            config: The composed config; it is written resolved and without secrets.
            devices: Names of the devices, for the record.

        Raises:
            UserError: The folder cannot be written.
        """
        run = Run(self.folder / f"{readable_name(axes, seed)}-{hash}")
        if run.whole:
            return run
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock")
            lock.acquire()
        except OSError as error:
            raise files.cannot_write(run.folder, error) from error
        try:
            if not run.whole:  # else another process was first, and may be training by now
                text = yaml.safe_dump(redacted(plain(config)), sort_keys=False, allow_unicode=True, width=110)
                if not run.exists():
                    files.write_json(run.environment_file, environment(devices))
                    run.update(state="created")
                files.write_text(run.config_file, text)  # last: a folder with a config is a complete one
        finally:
            lock.release()
        return run

    def list(self) -> Sequence[Run]:
        """All runs, by name."""
        try:
            folders = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        except OSError as error:
            raise UserError(f"cannot read {self.folder}: {error.strerror}; check paths.outputs") from error
        return [Run(path) for path in folders if not path.name.startswith(".") and Run(path).exists()]

    def weights(self) -> Sequence[Weights]:
        """Weights of files that were evaluated, by name; those of one file that hold the same are one."""
        found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
        for folder, results in Run(self.outputs).evaluations():
            axes, file = results.get("axes"), str(results.get("checkpoint"))
            if isinstance(axes, Mapping):
                defense = None if axes.get("defense") == "none" else axes.get("defense")
                results["axes"] = {**axes, "base": None, "seed": None, "defense": defense}  # earlier versions had some
                found.setdefault(f"{Path(file).name}-{digest({'weights': results.get('weights_id')})}", []).append(
                    (folder, results)
                )
        return [Weights(self.outputs, name, found[name]) for name in sorted(found)]

    def find(self, text: str | Path) -> Run:
        """A run by the path of its folder, its name, its hash, or an unambiguous beginning or end of these.

        Raises:
            UserError: No run or several are meant; the line lists the candidates.
        """
        text = str(text).strip()
        path = Path(os.path.expanduser(text))
        if text and Run(path).exists():
            return Run(path.resolve())
        name = text.rstrip(os.sep)
        if not name or os.sep in name:  # of "/" nothing would be left, with which every name begins
            why = "no folder of a run (it would hold config.yaml and status.json)"
            raise UserError(f"run={text!r}: {why}; `redoubt runs ls` lists what is there")
        text = name
        runs = self.list()
        for matches in (  # in this order, so that `...-s1` means seed 1 although `...-s10` begins with it
            [run for run in runs if text in (run.name, run.hash, run.readable)],
            [run for run in runs if run.name.startswith(text) or run.hash.startswith(text)],
            [run for run in runs if run.name.endswith(text) or run.readable.endswith(text)],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                names = ", ".join(run.name for run in matches[:8]) + (", ..." if len(matches) > 8 else "")
                raise UserError(f"run={text}: means {len(matches)} runs ({names}); give more of the name")
        close = difflib.get_close_matches(text, [run.name for run in runs], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "`redoubt runs ls` lists what is there"
        raise UserError(f"run={text}: no such run in {self.folder}; {hint}")

    def remove(self, run: Run) -> int:
        """Remove a run that nobody is using, and say how many bytes that freed.

        Raises:
            UserError: It is in use, not in this store, or not removable.
        """
        if run.folder.resolve().parent != self.folder.resolve():
            raise UserError(f"{run.folder} is not in {self.folder}; name its store with --outputs")
        with run.lock(wait=False):
            freed = files.size(run.folder)
            gone = self.folder / f"{REMOVED}{uuid.uuid4().hex[:8]}"
            try:  # renamed first: a removal that is killed half-way leaves no half of a run
                run.folder.rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                raise UserError(f"{run.folder}: cannot be removed ({error.strerror})") from error
        return freed
