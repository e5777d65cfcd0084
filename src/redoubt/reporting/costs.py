"""``redoubt report plan``: what of a published table is still to be trained, its commands and its GPU hours."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from omegaconf import DictConfig

from redoubt.errors import UserError
from redoubt.reporting.cells import WITH_EXPERIMENTS, Cell, Measure, known, measure, none_of_ours
from redoubt.reporting.collect import Record, records
from redoubt.reporting.match import composed, recipe
from redoubt.reporting.protocol import nearest
from redoubt.reporting.published import Published, find
from redoubt.reporting.sheet import Sheet, wide_console
from redoubt.reporting.throughput import Throughput, measured, trained_on
from redoubt.runs.identity import plain
from redoubt.runs.store import Store
from redoubt.runs.twin import twin_config
from redoubt.units import as_number, seeds_of

#: Training images of the published splits.
IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "svhn": 73_257, "tiny_imagenet": 100_000}


@dataclass
class Job:
    """One run that a table needs.

    Args:
        name: For people: the experiment, or the row.
        cell: What is trained.
        seed: Of the run.
        natural: It is the natural run that the cell starts from, and is trained by the first that needs it.
        wanted: What the table wants of it: metrics of ours, and the words of a command line that measures them.
        run: Where it is in the store, finished.
    """

    name: str
    cell: Cell
    seed: int
    natural: bool = False
    wanted: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)
    run: Record | None = None

    @property
    def cfg(self) -> DictConfig:
        """Its config, with whatever seed."""
        words = self.cell.overrides()
        return _natural(*words) if self.natural else composed(*words)

    @property
    def images(self) -> int:
        """Training images that it sees, over all epochs."""
        return trained_on(self.cfg, IMAGES[self.cfg.axes.data]) * int(self.cfg.trainer.max_epochs)

    @property
    def key(self) -> str:
        """Equal for jobs that are one run."""
        return _key(self.cfg, self.seed)

    def commands(self) -> list[str]:
        """What is still to be typed: training, or the evaluations that a finished run lacks."""
        if self.run is None:
            words = [*self.cell.words(), *([f"seed={self.seed}"] if self.seed else [])]
            return [] if self.natural else [f"python src/train.py {shlex.join(words)}"]
        lacking = [words for parts, words in self.wanted if not all(_is_there(self.run, part, words) for part in parts)]
        options = [[w for w in words if w.startswith(("attack=", "evaluation."))] for words in dict.fromkeys(lacking)]
        return [f"python src/eval.py run={self.run.name} {shlex.join(words)}" for words in options]


def _is_there(run: Record, metric: str, words: tuple[str, ...]) -> bool:
    found = nearest(run, metric, plain(composed(*words)))
    return found is not None and not found[1]


@cache
def _natural(*words: str) -> DictConfig:
    return twin_config(composed(*words), defense="none", base="standard")


def _key(cfg: Mapping[str, Any], seed: int) -> str:
    axes = [str(cfg["axes"][axis]) for axis in ("data", "model", "defense", "base")]
    return json.dumps([axes, recipe(plain(cfg)), seed], sort_keys=True)


def plan(
    *, outputs: str = "outputs", table: str | None = None, images_per_second: float | None = None, seeds: int = 1
) -> None:
    """Prints the runs that a published table needs: done or missing, their GPU hours, the commands.

    GPU hours are training images x epochs / images per second of one device; evaluation is not counted. The natural
    runs that AFD and CURE start from are counted once, and trained by the first command that needs them.

    Args:
        outputs: Folder of the store; it need not exist.
        table: Id of the table, as fsr_s1; all that have experiments where None.
        images_per_second: Of adversarial training on your device; what the store measured where None.
        seeds: How many seeds of each cell: 0, 1, ...

    Raises:
        UserError: No such table, none of its rows is a cell of ours, or a number that is none.
    """
    if images_per_second is not None and as_number(images_per_second, "images_per_second") <= 0:
        raise UserError(f"images_per_second={images_per_second} must be above 0")
    given = None if images_per_second is None else Throughput(as_number(images_per_second, ""), "as given")
    there = records(outputs) if Store(outputs).folder.is_dir() else []
    jobs: dict[str, Job] = {}
    for name in WITH_EXPERIMENTS if table is None else [table]:
        _add_jobs(jobs, find(name), seeds_of(seeds))
    if not jobs:
        raise none_of_ours(str(table))
    _find_runs(jobs, there)
    _add_natural_runs(jobs, there)
    _show(list(jobs.values()), there, given)


def _add_jobs(jobs: dict[str, Job], table: Published, seeds: int) -> None:
    """The runs of a table; rows that are one run are one job."""
    for name, row, found in known(table):
        measures = [measure(table, value.metric) for value in row.values]
        wanted = [(m.parts, found.overrides(m.suite)) for m in measures if isinstance(m, Measure)]
        for seed in range(seeds):
            job = Job(name + (f" seed={seed}" if seed else ""), found, seed)
            jobs.setdefault(job.key, job).wanted.extend(wanted)


def _find_runs(jobs: Mapping[str, Job], there: Sequence[Record]) -> None:
    for record in there:
        if record.status["state"] == "done" and (job := jobs.get(_key(record.config, record.axes["seed"]))):
            job.run = job.run or record


def _add_natural_runs(jobs: dict[str, Job], there: Sequence[Record]) -> None:
    """Those that missing runs start from, each once."""
    natural: dict[str, Job] = {}
    for job in jobs.values():
        if job.run is None and job.cfg.defense.get("pretrained") == "auto":
            cfg = _natural(*job.cell.overrides())
            name = f"natural run: {cfg.axes.model} {cfg.axes.data}, {cfg.trainer.max_epochs} epochs"
            start = Job(name + (f" seed={job.seed}" if job.seed else ""), job.cell, job.seed, natural=True)
            natural.setdefault(start.key, start)
    _find_runs(natural, there)
    jobs |= natural


def _show(jobs: Sequence[Job], there: Sequence[Record], given: Throughput | None) -> None:
    missing = [job for job in jobs if job.run is None]
    speeds = [_speed(job, there, given) for job in jobs]
    commands = [job.commands() for job in jobs]
    rows = [_row(*entry) for entry in zip(jobs, speeds, commands, strict=True)]
    notes = dict.fromkeys(f"throughput: {speed.source}" for speed in speeds if speed)
    columns = ("run", "state", "million images", "GPU hours")
    console = wide_console()
    title = f"{len(jobs)} runs, {len(missing)} missing"
    console.print(Sheet(title, columns, rows, frozenset(columns[2:]), list(notes)).terminal())
    for command in (command for several in commands for command in several):
        console.print(command, soft_wrap=True, markup=False, highlight=False)
    hours = [_hours(job, speed) for job, speed in zip(jobs, speeds, strict=True) if job.run is None]
    known = [h for h in hours if h is not None]
    line = f"{len(missing)} missing runs: {sum(known):.2f} GPU hours of training"
    if len(known) < len(missing):
        line += (
            f" for {len(known)} of them; no run like the others was measured: train one for an epoch, "
            "give images_per_second=, or see what its command says with plan=true"
        )
    console.print(line, soft_wrap=True, highlight=False)


def _row(job: Job, speed: Throughput | None, commands: Sequence[str]) -> list[str]:
    state = "missing" if job.run is None else "to be evaluated" if commands else "done"
    hours = _hours(job, speed)
    return [job.name, state, f"{job.images / 1e6:.2f}", "not measured" if hours is None else f"{hours:.2f}"]


def _hours(job: Job, speed: Throughput | None) -> float | None:
    return job.images / speed.images_per_second / 3600 if speed else None


def _speed(job: Job, there: Sequence[Record], given: Throughput | None) -> Throughput | None:
    """What was given, for adversarial training; else what was measured. A natural run is faster: measured first."""
    if job.natural:
        limit = given and Throughput(given.images_per_second, "as given; of natural runs, which are faster, a bound")
        return measured(plain(job.cfg), there) or limit
    return given or measured(plain(job.cfg), there)
