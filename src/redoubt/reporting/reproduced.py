"""A published table beside the very runs that were made for it, with how they were made."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from redoubt.reporting.cells import Cell, Measure, measure
from redoubt.reporting.collect import Record
from redoubt.reporting.match import Group, Ours, composed, groups, over_seeds, recipe
from redoubt.reporting.published import Published, Row, Value
from redoubt.reporting.sheet import Sheet
from redoubt.reporting.tables import Line, laid_out
from redoubt.runs.files import read_json
from redoubt.runs.identity import differences, plain
from redoubt.units import clock

#: Keys by which a run is no reproduction at all: another net, other images, fewer of them.
_PATH = re.compile(r"model=|data=|data\.(limit_train|limit_test|source|image_size)$")
PATH = "a check of the path, not a reproduction"
#: Points by which a run of the published recipe may miss the published number before somebody has to look why.
FAR = 1.0
INVESTIGATE = f"over {FAR:g} point off: to be investigated"
#: By paper, where it and its authors' code say different things or too little, and the keys that decide.
DISAGREEMENTS = {
    "fsr": "the separation loss is a sum over samples in print and a mean in the code, as here (defense.lambda_sep); "
    "recipes with TRADES and MART, on CIFAR-100 and Tiny ImageNet are not published (inner, optimizer, schedule)",
    "afd": "the code's stem has no padding (model.stem_padding); it takes three optimizer steps per batch "
    "(defense.update=joint: one) and decays weights twice, in its PyTorch three times (defense.update=legacy); it "
    "evaluates the average (evaluation.weights=student: not); the length of the natural start "
    "(natural.trainer.max_epochs)",
    "cure": "the authors' code trains by another criterion and loss, with step 0.007, eps 0.031, weight decay 5e-4 and "
    "a decay that warms up (experiment=cure_code_resnet18_cifar10 has all of its keys); its KL weighs 5 and not 1 "
    "(base.beta); frozen weights still feel momentum and decay (defense.freeze=update: not)",
}
_AUTOATTACK = Measure(("autoattack",), suite="autoattack")
_NOT_PRINTED = Value("AutoAttack", math.nan)


@dataclass(frozen=True)
class Made:
    """A published row and the finished runs that are to reproduce it, one per seed."""

    row: Row
    cell: Cell
    runs: tuple[Record, ...]

    @property
    def name(self) -> str:
        """``CIFAR-10 ResNet-18 AT + FSR``."""
        return f"{self.row.dataset} {self.row.model} {self.row.method}"


def sheets(table: Published, made: Sequence[Made], command: str) -> list[Sheet]:
    """Published against ours, and how ours was made; nothing where no row has a run.

    Args:
        table: The published one.
        made: Its rows that have runs.
        command: What made them.
    """
    if not made:
        return []
    lines = []
    starred: dict[tuple[str, ...], list[str]] = {}
    for entry in made:
        found = list(_lines(table, entry))
        keys = {key for line in found if line.ours is not None for key in line.ours.protocol.differs}
        starred.setdefault(tuple(sorted(keys)), []).append(entry.name)
        lines += [_texts(line) for line in found]
    shown = replace(table, rows=tuple(entry.row for entry in made))
    notes = [f"*: {'; '.join(of)}: {label(keys)}: {', '.join(keys)}." for keys, of in starred.items() if keys]
    if any(line[-1] == INVESTIGATE for line in lines):
        notes.append(
            f"{INVESTIGATE}: first what paper and code say otherwise: {DISAGREEMENTS[table.id.split('_')[0]]}."
        )
    first = laid_out(shown, lines, notes)
    if any(line[-1] == PATH for line in lines):
        first = replace(first, title=f"{first.title}: {PATH}")
    columns = ("row", "seed", "epochs", "training", "evaluation", "device", "audit", "run")
    rows = [_origin(entry, record) for entry in made for record in entry.runs]
    notes = [f"Command: {command}", "Training time without that of a natural run; device: where the run began."]
    return [
        first,
        Sheet("How ours was made", columns, rows, frozenset({"seed", "epochs", "training", "evaluation"}), notes),
    ]


def differing(group: Group, cell: Cell) -> tuple[str, ...]:
    """In what runs differ from a row's recipe; another net, data set or the short schedule by its name."""
    run = group.runs[0]
    keys = differences(group.recipe, recipe(plain(composed(*cell.overrides()))))
    named = [(axis, str(run.axes[axis])) for axis, own in (("model", cell.model), ("data", cell.data))
             if run.axes[axis] != own]  # fmt: skip
    if "schedule/fast" in run.config["axes"].get("recipes", []):
        named.append(("schedule", "fast"))
    sections = {section for section, _ in named}
    return (*(f"{s}={option}" for s, option in named), *(k for k in keys if k.split(".")[0] not in sections))


def label(differs: Sequence[str]) -> str:
    """What numbers are that differ from the published recipe in these keys; empty where there is none."""
    if any(map(_PATH.match, differs)):
        return PATH
    if "schedule=fast" in differs:
        return "a first answer by a short schedule, not the published recipe"
    return "not the published recipe" if differs else ""


def _lines(table: Published, made: Made) -> Iterator[Line]:
    """One line per published number; and ours by AutoAttack where the paper has none."""
    group = groups(made.runs)[0]
    keys = differing(group, made.cell)
    measures = [(value, measure(table, value.metric)) for value in made.row.values]
    for value, how in measures:
        if isinstance(how, str):
            yield Line(table, made.row, value, why=how)
        else:
            yield Line(table, made.row, value, _ours(group, how, keys, made.cell))
    if not any(isinstance(how, Measure) and how.parts == _AUTOATTACK.parts for _, how in measures):
        ours = _ours(group, _AUTOATTACK, keys, made.cell)
        if ours is not None:
            yield Line(table, made.row, _NOT_PRINTED, ours)


def _ours(group: Group, how: Measure, keys: tuple[str, ...], cell: Cell) -> Ours | None:
    return over_seeds(group, how, keys, plain(composed(*cell.overrides(how.suite))))


def _texts(line: Line) -> list[str]:
    """The texts of `redoubt.reporting.tables.COLUMNS`."""
    cells = line.cells()
    if line.value is _NOT_PRINTED:
        cells[4], cells[6] = "-", ""
    if line.ours is None:
        return cells
    far = abs(line.difference or 0.0) > FAR  # false for NaN: nothing was printed
    return [*cells[:-1], label(line.ours.protocol.differs) or (INVESTIGATE if far else "")]


def _origin(made: Made, record: Record) -> list[str]:
    devices = (read_json(record.run.environment_file) or {}).get("devices") or ["unknown"]
    status, seconds = record.status, record.status.get("train_seconds")
    audits = [
        f"{'fails ' + ', '.join(report['failed']) if report['failed'] else 'passed'} "
        f"({report['n']} images, {clock(float(report.get('seconds') or 0))})"
        for _, report in record.audits
    ]
    time = "missing" if seconds is None else clock(float(seconds))
    judged = clock(sum(float(e.results.get("eval_seconds") or 0) for e in record.evaluations))
    place = [made.name, str(record.axes["seed"]), str(status.get("max_epochs")), time, judged, ", ".join(devices)]
    return [*place, "; ".join(dict.fromkeys(audits)) or "missing", record.name]
