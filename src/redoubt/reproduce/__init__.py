"""``redoubt reproduce``: published rows through the run store, in pieces of any length; then published against ours."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from redoubt import config, deadline
from redoubt.errors import UserError
from redoubt.launched import several
from redoubt.reporting.collect import Record
from redoubt.reporting.reproduced import Made, sheets
from redoubt.reporting.sheet import wide_console
from redoubt.reproduce.request import Request, Task, request
from redoubt.reproduce.steps import Job, Step, Tell, attempt, run_of, steps
from redoubt.runs.files import must_be_writable, write_text
from redoubt.runs.store import Run
from redoubt.sweeps import Sweep

HELP = """usage: redoubt reproduce table=ID [rows=...] [key=value ...]

Trains the rows of a published table, attacks them by the paper's suite and by AutoAttack, audits them, and prints the
published numbers beside ours. What is done is never done again: the same command goes on, also with a moved store.

  table        id of the table, as fsr_s4 (redoubt report plan lists their runs and costs)
  rows         a part of the names of experiments, a regular expression, or a list of these in brackets
  seeds        how many of each row (1)
  max_minutes  end by itself after so many minutes and say what is left; training is cut after any step, an evaluation
               between attacks and chunks (evaluation.chunk=25 for AutoAttack on a slow device), an audit between
               checks; the longest attack on a chunk, or check, must fit into a piece
  audit        false: no audits (true)
  autoattack   false: no AutoAttack (true)
  to           a Markdown file for the result; what else stands in it is kept

Any other word is one of redoubt train (schedule=fast, trainer.precision=bf16-mixed, data.root=..., paths.outputs=...)
or of the audit (audit.images=64). What is then not the published recipe is marked.
Exit code: 0 all is done or the time is up, 2 a mistake in the command, 3 an audit found something, 4 a step failed."""


def main(arguments: Sequence[str], job: Job, tell: Tell) -> int:
    """Runs the command.

    Args:
        arguments: What follows ``redoubt reproduce``.
        job: Does one job of ``redoubt train`` or ``audit``.
        tell: Prints an error and gives it in one line.

    Returns:
        The exit code, see `HELP`.

    Raises:
        UserError: A table, row or key that does not exist, or a config that is none.
    """
    if any(word in ("-h", "--help") for word in arguments):
        print(HELP)
        return 0
    if several():
        raise UserError("reproduce starts its processes itself: call it without torchrun or srun")
    asked = request(arguments)
    tasks = asked.tasks()
    cfg = config.ready([*tasks[0].training, *tasks[0].evaluations[0]])  # a mistake is said at once
    if tasks[0].audit is not None:
        config.ready(tasks[0].audit, "audit")
    if asked.to:
        must_be_writable(asked.to)
    outputs = Path(str(cfg.paths.outputs))
    sweep = Sweep(outputs / "sweeps" / f"reproduce_{asked.table.id}")
    command = f"python src/reproduce.py {shlex.join(arguments)}"
    sweep.add([task.training for task in tasks], [tasks[0].evaluations[0]])
    deadline.start(asked.minutes)
    try:
        left = _work(tasks, sweep, job, tell)
        return _end(asked, tasks, sweep, left, command)
    finally:
        deadline.start(None)


def _work(tasks: Sequence[Task], sweep: Sweep, job: Job, tell: Tell) -> list[Step]:
    """Does what is to be done until the time is up; the steps that are left."""
    due = [step for step in steps(tasks) if not step.done(sweep)]
    due.sort(key=lambda step: sweep.record(step.key)["state"] == "failed")  # what is likely to fail again comes last
    for step in due:
        if deadline.over():
            break
        if step.name and run_of(step.task, sweep) is None:
            continue  # its training has failed, or is another process's
        print(f"reproduce {step.title}", flush=True)
        try:
            attempt(step, sweep, job, tell)
        except SystemExit:
            if not deadline.over():  # a signal
                raise
            break
    return [step for step in due if not step.done(sweep)]


def _end(asked: Request, tasks: Sequence[Task], sweep: Sweep, left: Sequence[Step], command: str) -> int:
    """Prints the tables and what is left; the exit code."""
    made = _made(asked, tasks, sweep)
    written = sheets(asked.table, made, command)
    console = wide_console()
    for sheet in written:
        console.print(sheet.terminal())
    if asked.to and written:
        missing = [f"- Missing: {step.title}.\n" for step in left]
        texts = [f"{'##'[:level]}{sheet.markdown()}\n" for level, sheet in enumerate(written, start=1)]
        _write(Path(asked.to), asked.table.id, "".join([*texts, *missing]))
        print(f"written to {asked.to}")
    failed = [step for step in left if sweep.record(step.key)["state"] == "failed"]
    for step in failed:
        print(f"failed: {step.title}: {sweep.record(step.key)['reason']}")
    for step in left:
        if step not in failed:
            print(f"left: {step.title}")
    done = f"reproduce table={asked.table.id} ({len(asked.rows)} rows x {asked.seeds} seeds)"
    if not left:
        print(f"{done}: all is done")
        objections = [r for s in steps(tasks) if s.name == "-audit" and (r := sweep.record(s.key).get("reason"))]
        print("".join(f"audit: {objection}\n" for objection in objections), end="", flush=True)
        return 3 if objections else 0
    pause = deadline.over()
    why = f"the time is up after {deadline.spent() / 60:.1f} minutes" if pause else "not all is done"
    print(
        f"{done}: {why}, {len(failed)} steps failed, {len(left) - len(failed)} are left; go on with\n{command}",
        flush=True,
    )
    return 0 if pause or not failed else 4


def _write(path: Path, table: str, text: str) -> None:
    """Puts a table into a Markdown file, in the place of what an earlier call has written of it; the rest stays."""
    begins, ends = f"<!-- reproduce table={table} -->\n", f"<!-- end of table={table} -->\n"
    there = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    before, found, after = there.partition(begins)
    if found:
        after = after.partition(ends)[2] if ends in after else after
    else:
        before = before.rstrip("\n") + "\n\n"
    write_text(path, f"{before}{begins}{text}{ends}{after}")


def _made(asked: Request, tasks: Sequence[Task], sweep: Sweep) -> list[Made]:
    """The rows that have a finished run, with the runs of their seeds."""
    made = []
    for name, (row, found) in asked.rows.items():
        names = [run for task in tasks if task.row == name and (run := run_of(task, sweep))]
        if names:
            made.append(Made(row, found, tuple(Record(Run(sweep.outputs / "runs" / run)) for run in names)))
    return made
