"""What a request takes, step by step: each is noted in a sweep of the store, so that another start finds it done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from redoubt import config
from redoubt.errors import CheckFailed
from redoubt.reproduce.request import Task, Words
from redoubt.runs.identity import digest
from redoubt.runs.store import Run
from redoubt.sweeps import Sweep, Taken, key_of

Job = Callable[[str, DictConfig, list[str]], Any]
#: Prints an error, and gives it in one line.
Tell = Callable[[BaseException], str]


@dataclass(frozen=True)
class Step:
    """A part of a task that is done or not.

    Args:
        task: The run it is of.
        what: For people.
        name: Its place in the sweep, beside the task's; empty of the training.
        words: What it is done by: of an evaluation those that judge, of the audit all.
    """

    task: Task
    what: str
    name: str
    words: Words

    @property
    def key(self) -> str:
        """Names its record: of the training that of the sweep's cell, which rows that judge one run otherwise share."""
        own = f"{self.name}-{digest({'words': self.words})}" if self.name else ""
        return key_of(self.task.training) + own

    @property
    def title(self) -> str:
        """The row, the seed, what is done."""
        return f"{self.task.row} seed={self.task.seed}: {self.what}"

    def done(self, sweep: Sweep) -> bool:
        """Whether an earlier start has done it."""
        return sweep.done(self.key, [self.words])

    def run(self, sweep: Sweep, job: Job) -> dict[str, Any]:
        """Does it; the run and the results."""
        if self.name == "-audit":
            run = str(run_of(self.task, sweep))
            words = [f"run={run}", *self.words, *self.task.place]
            job("audit", config.compose(words, "audit"), words)
            return {"run": run, "results": []}
        words = [*self.task.training, *self.words]
        cfg = config.compose(words)
        cfg.sweep.name = sweep.name
        results = job("train", cfg, words)
        return {"run": results[0]["run"], "results": results}


def steps(tasks: Sequence[Task]) -> Iterator[Step]:
    """In the order in which answers are cheap: for a seed every row trained, then AutoAttack, then the audits."""
    for seed in sorted({task.seed for task in tasks}):
        own = [task for task in tasks if task.seed == seed]
        yield from (Step(t, f"training, {_suite(t)}", "", t.evaluations[0]) for t in own)
        yield from (Step(t, "AutoAttack", "-autoattack", e) for t in own for e in t.evaluations[1:])
        yield from (Step(t, "audit", "-audit", t.audit) for t in own if t.audit is not None)


def _suite(task: Task) -> str:
    return task.evaluations[0][0].removeprefix("attack=")


def run_of(task: Task, sweep: Sweep) -> str | None:
    """Name of the task's finished run; None where it is not trained yet."""
    record = sweep.record(key_of(task.training))
    name = record.get("run")
    return name if name is not None and Run(sweep.outputs / "runs" / name).finished else None


def attempt(step: Step, sweep: Sweep, job: Job, tell: Tell) -> None:
    """Does a step and notes what became of it; its errors are told, and are no reason to leave others undone."""
    before = sweep.record(step.key)
    try:
        with sweep.cell(step.key, [step.words]) as noted:
            try:
                noted |= step.run(sweep, job)
                if before["state"] == "done" and (before["by"], before["run"]) == (noted["by"], noted["run"]):
                    for entry in ("evaluations", "results"):
                        noted[entry] = [*(old for old in before[entry] if old not in noted[entry]), *noted[entry]]
            except CheckFailed as failed:  # what an audit found: it is done
                noted |= {"run": run_of(step.task, sweep), "results": [], "reason": tell(failed)}
            except Exception as error:
                noted |= {"state": "failed", "reason": tell(error)}
    except Taken as taken:
        tell(taken)
