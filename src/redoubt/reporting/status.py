"""The cells of a sweep: which are done, running, failed or missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from redoubt.evaluation.results import named, robust, standing
from redoubt.reporting.collect import Record
from redoubt.reporting.match import groups
from redoubt.reporting.ours import store_sheets
from redoubt.reporting.sheet import wide_console
from redoubt.reporting.table import place, title
from redoubt.runs.store import Run
from redoubt.sweeps import STATES, Sweep, find, states, sweeps

_STYLES = {
    "done": None, "running": "cyan", "failed": "bold red", "interrupted": "yellow", "pruned": "dim", "missing": "dim",
}  # fmt: skip


def status(*, outputs: str = "outputs", sweep: str | None = None) -> int:
    """The cells of a sweep, the newest one unless ``sweep=`` names another; exit code 0 whatever they are."""
    found = find(outputs, sweep)
    show(found)
    others = [s.name for s in sweeps(outputs) if s.name != found.name]
    if others and sweep is None:
        print(f"other sweeps (sweep=NAME): {', '.join(others)}")
    return 0


def show(sweep: Sweep, keys: Sequence[str] | None = None) -> int:
    """Prints the table of all cells, or of those of ``keys``.

    The exit code is the worst of the failed ones', 1 where some are left that nobody works on.

    Where there are several seeds, their means and deviations follow.
    """
    cells = states(sweep, keys)
    console = wide_console()
    console.print(table(sweep, cells))
    runs = {str(record["run"]): None for _, record in cells if record["state"] == "done"}
    found = groups(Record(Run(sweep.outputs / "runs" / name)) for name in runs)
    if any(len(group.runs) > 1 for group in found):
        for sheet in store_sheets(found)[0]:
            console.print(sheet.terminal())
    codes = [int(r.get("code") or 2) for _, r in cells if r["state"] == "failed"]
    return max([*codes, *(1 for _, r in cells if r["state"] in ("interrupted", "missing"))], default=0)


def table(sweep: Sweep, cells: Sequence[tuple[list[str], dict[str, Any]]]) -> Table:
    """One row per cell: what makes it, its state, and its accuracies or why it has none."""
    counts = Counter(record["state"] for _, record in cells)
    shown = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    made = Table(title=f"{escape(sweep.name)}: {len(cells)} cells, {shown}", min_width=40)
    common = set.intersection(*(set(words) for words, _ in cells)) if len(cells) > 1 else set()
    made.add_column("cell")
    made.add_column("state")
    made.add_column("accuracy in %, or what happened")
    for words, record in cells:
        own = " ".join(w for w in words if w not in common) or " ".join(words)
        made.add_row(escape(own), record["state"], escape(_outcome(sweep, record)), style=_STYLES[record["state"]])
    if common:
        made.caption = escape(f"all: {' '.join(sorted(common))}")
    return made


def _outcome(sweep: Sweep, record: Mapping[str, Any]) -> str:
    if record["state"] == "done":
        run = Run(sweep.outputs / "runs" / str(record.get("run")))
        stored = {folder.name: (folder, results) for folder, results in run.evaluations()}  # as they are read now
        named_so = [(own, str(r.get("evaluation")), r) for own, r in _named(record) if "metrics" in r]
        found = [(own, stored.get(name, (run.eval / name, r))) for own, name, r in named_so]
        if len(found) > 1 and run.exists():
            found.insert(0, found.pop(standing([entry for _, entry in found], run.config()) or 0))
        return "\n".join(f"{own} {_accuracies(results)}".strip() for own, (_, results) in found)
    if record["state"] == "running":
        return f"process {record['pid']} on {record['host']}, since {record['started']}"
    return str(record.get("reason") or "")


def _named(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The evaluations of a cell, each with its words that others of it do not have; the suite's name is said anyway."""
    results, said = record["results"], [name.split() for name in record.get("evaluations", [])]
    if len(said) != len(results):
        return [("", one) for one in results]
    common = set.intersection(*map(set, said)) if len(said) > 1 else {word for words in said for word in words}
    suites = len({one["axes"]["attack"] for one in results if "axes" in one}) > 1
    dropped = [{*common, *(word for word in words if suites and word.startswith("attack="))} for words in said]
    owns = [" ".join(w for w in words if w not in drop) for words, drop in zip(said, dropped, strict=True)]
    return list(zip(owns, results, strict=True))


def _accuracies(results: Mapping[str, Any]) -> str:
    """What was evaluated, with natural accuracy and the one that stands for robustness."""
    metrics = {name: m["accuracy"] for name, m in named(results)["metrics"].items()}
    attack = robust(metrics)
    attacked = f", {title(attack)} {100 * metrics[attack]:.2f}" if attack else ""
    return f"{place(results)}: natural {100 * metrics['natural']:.2f}{attacked}"
