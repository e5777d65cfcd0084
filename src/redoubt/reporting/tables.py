"""``redoubt report tables``: the papers' tables beside our cells, and all cells of the store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from redoubt.errors import UserError, did_you_mean
from redoubt.reporting.cells import Cell, Measure, cell, measure
from redoubt.reporting.collect import records
from redoubt.reporting.match import Group, Match, Ours, groups, spread
from redoubt.reporting.ours import OURS, store_sheets
from redoubt.reporting.published import Published, Row, Value, find, published
from redoubt.reporting.sheet import Sheet, wide_console
from redoubt.runs.files import write_text

FORMATS = ("md", "tex", "csv")

COLUMNS = ("dataset", "model", "method", "metric", "published", "ours", "difference", "seeds", "protocol", "remark")
NUMERIC = frozenset({"published", "ours", "difference", "seeds"})
FACTS = (
    *("table", "dataset", "model", "method", "metric", "published", "published_sd", "ours", "ours_sd", "difference"),
    *("seeds", "suite", "norm", "eps", "images", "weights", "epochs", "state", "remark", "runs", "source", "note"),
)


def tables(
    *, outputs: str = "outputs", to: str | None = None, table: str | None = None, format: str | None = None
) -> None:
    """Writes every published table beside our cells, and ours alone, as Markdown, LaTeX and CSV.

    A number of ours is the mean over seeds, in per cent, with its sample standard deviation. Cells that we could train
    and have not are "missing"; of rows that are no cell of ours the remark says why. An asterisk marks runs that are
    not the published recipe: the remark names the keys that differ.

    Args:
        outputs: Folder of the store.
        to: Folder to write to; ``<outputs>/tables`` where None.
        table: One table only (``fsr_s1``, ``ours``, ...), which is printed too.
        format: One of md, tex, csv; all where None.

    Raises:
        UserError: No store, no such table or format, or the files cannot be written.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"format={format}: no such format{did_you_mean(str(format), FORMATS)}")
    wanted = [OURS, *published()] if table is None else [table]
    if table is not None and table != OURS:
        find(table)
    found = groups(records(outputs))
    folder = Path(to) if to else Path(outputs) / "tables"
    console = wide_console()
    for name in wanted:
        sheets, facts = _sheets(name, found)
        texts = {"md": [s.markdown() for s in sheets], "tex": [s.latex() for s in sheets], "csv": [facts.csv()]}
        for ending in (format,) if format else FORMATS:
            write_text(folder / f"{name}.{ending}", "\n".join(texts[ending]))
        for sheet in sheets if table is not None else ():
            console.print(sheet.terminal())
    console.print(f"{len(wanted)} table{'s' * (len(wanted) > 1)} in {folder}", soft_wrap=True, markup=False)


def _sheets(name: str, found: Sequence[Group]) -> tuple[list[Sheet], Sheet]:
    """A table as people read it, and with every fact in a column of its own."""
    if name == OURS:
        return store_sheets(found)
    lines = list(compare(find(name), found))
    return [shown(find(name), lines)], Sheet(name, FACTS, [line.facts() for line in lines])


@dataclass(frozen=True)
class Line:
    """One published number beside ours.

    Args:
        table, row, value: The number's place, and the number.
        ours: None where it is missing or has no cell.
        why: Why it has no cell; None where it has one.
    """

    table: Published
    row: Row
    value: Value
    ours: Ours | None = None
    why: str | None = None

    @property
    def state(self) -> str:
        """``ours``, ``other recipe`` (runs that are not the published one), ``missing`` or ``no cell``."""
        if self.ours is None:
            return "missing" if self.why is None else "no cell"
        return "other recipe" if self.ours.protocol.differs else "ours"

    @property
    def difference(self) -> float | None:
        """Ours less the published number, in points."""
        return None if self.ours is None else self.ours.mean - self.value.number

    def cells(self) -> list[str]:
        """The texts of `COLUMNS`."""
        value, ours, row = self.value, self.ours, self.row
        place = [row.dataset, row.model, row.method, value.metric, printed(value)]
        if ours is None:
            return [*place, self.state if self.why is None else "-", "", "", "", self.why or ""]
        keys = ", ".join(ours.protocol.differs)
        number = spread(ours.values) + ("*" if keys else "")
        remark = f"not the published recipe: {keys}" if keys else ""
        return [*place, number, f"{self.difference:+.2f}", str(len(ours.values)), str(ours.protocol), remark]

    def facts(self) -> list[str]:
        """The texts of `FACTS`; numbers in full, what is not there empty."""
        value, ours, row = self.value, self.ours, self.row
        place = [self.table.id, row.dataset, row.model, row.method, value.metric, value.number, value.sd]
        if ours is None:
            mine: list[object] = [None] * 10 + [self.state, self.why, None]
        else:
            p = ours.protocol
            numbers = [None if x is None else round(x, 4) for x in (ours.mean, ours.sd, self.difference)]
            mine = [*numbers, len(ours.values), p.suite, p.norm, p.eps, p.images, p.judged, p.epochs]
            mine += [self.state, " ".join(p.differs), " ".join(ours.runs)]
        note = self.table.note.format(sd=value.sd) if self.table.note else value.note
        return ["" if fact is None else str(fact) for fact in (*place, *mine, self.table.source, note)]


def printed(value: Value) -> str:
    """``50.10`` or ``50.10 ± 0.21``: two decimals, or as many as were printed."""
    decimals = max(2, len(str(value.number).partition(".")[2]))
    return f"{value.number:.{decimals}f}" + ("" if value.sd is None else f" ± {value.sd:.2f}")


def compare(table: Published, found: Sequence[Group]) -> Iterator[Line]:
    """Every number of a table beside ours."""
    cells = [cell(table, row) for row in table.rows]
    distinct = distinguishing(c for c in cells if isinstance(c, Cell))
    for row, known in zip(table.rows, cells, strict=True):
        if isinstance(known, str):
            yield from (Line(table, row, value, why=known) for value in row.values)
            continue
        measures = [measure(table, value.metric) for value in row.values]
        ours = iter(Match(known, found, distinct).numbers([m for m in measures if isinstance(m, Measure)]))
        for value, how in zip(row.values, measures, strict=True):
            yield Line(table, row, value, why=how) if isinstance(how, str) else Line(table, row, value, next(ours))


def distinguishing(cells: Iterable[Cell]) -> frozenset[str]:
    """Keys of defense and base by which the rows of a table differ from each other."""
    return frozenset(key for c in cells for key in c.settings if key.startswith(("defense.", "base.")))


def shown(table: Published, lines: Sequence[Line]) -> Sheet:
    """As people read it: columns that say the same in every row go into the title, notes below."""
    starred = "*: not the published recipe; the remark names the keys that differ."
    notes = [starred] if any(line.state == "other recipe" for line in lines) else []
    return laid_out(table, [line.cells() for line in lines], notes)


def laid_out(table: Published, rows: Sequence[list[str]], more: Sequence[str]) -> Sheet:
    """Rows of `COLUMNS` as a sheet, with ``more`` notes than the table's own."""
    same = [i for i in (0, 1) if len({row[i] for row in rows}) == 1]
    kept = [i for i in range(len(COLUMNS)) if i not in same]
    title = ", ".join([table.title, *(rows[0][i] for i in same)])
    notes = [f"Published: {table.source}.", *_notes(table), *more]
    return Sheet(title, [COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows], NUMERIC, notes)


def _notes(table: Published) -> list[str]:
    """What holds for the whole table, or of which numbers each note speaks."""
    if table.note:
        return [table.note.replace("std {sd:.2f}; ", "").format()]
    of: dict[str, list[str]] = {}
    for row in table.rows:
        for value in row.values:
            if value.note:
                of.setdefault(value.note, []).append(f"{row.dataset} {row.model} {row.method} {value.metric}")
    return [
        f"{'; '.join(where) if len(where) <= 4 else f'{len(where)} numbers'}: {note}." for note, where in of.items()
    ]
