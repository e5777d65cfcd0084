"""The papers' tables as data: ``published.json``, every number with its source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from redoubt.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Value:
    """One printed number.

    Args:
        metric: As the paper heads the column.
        number: As printed; accuracies in per cent.
        sd: Standard deviation, where one is printed.
        note: What is known of it: an inconsistency, a protocol, a second-hand source.
    """

    metric: str
    number: float
    sd: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: data set, model and method as printed, and the numbers."""

    dataset: str
    model: str
    method: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Published:
    """A table of a paper.

    Args:
        id: What it is asked for by, as ``fsr_s1``.
        paper, table: As cited.
        source: Where the numbers were read.
        note: Holds for all of its numbers.
        rows: In the order of the paper.
    """

    id: str
    paper: str
    table: str
    source: str
    note: str | None
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """``FSR (Kim et al., CVPR 2023), Table S1``."""
        return f"{self.paper}, {self.table}"

    def facts(self) -> Iterator[dict[str, Any]]:
        """One mapping per number: paper, table, dataset, model, method, metric, value, source and, where any, note."""
        for row in self.rows:
            for value in row.values:
                note = self.note.format(sd=value.sd) if self.note else value.note
                fact = {"paper": self.paper, "table": self.table, "source": self.source}
                fact |= {"dataset": row.dataset, "model": row.model, "method": row.method}
                yield fact | {"metric": value.metric, "value": value.number} | ({"note": note} if note else {})


@cache
def published() -> dict[str, Published]:
    """Every table by its id."""
    text = (resources.files("redoubt.reporting") / "published.json").read_text(encoding="utf-8")
    return {name: _table(name, entry) for name, entry in json.loads(text).items()}


def find(table: str) -> Published:
    """A table by its id.

    Raises:
        UserError: There is none.
    """
    tables = published()
    if str(table) not in tables:
        raise UserError(f"table={table}: no such table{did_you_mean(str(table), tables)}")
    return tables[str(table)]


def _table(name: str, entry: dict[str, Any]) -> Published:
    rows = tuple(
        Row(dataset, model, method, tuple(_value(metric, stored) for metric, stored in numbers.items()))
        for dataset, model, method, numbers in entry["rows"]
    )
    return Published(name, entry["paper"], entry["table"], entry["source"], entry["note"], rows)


def _value(metric: str, stored: Any) -> Value:
    """A number; with a second one its standard deviation; with a text what is to be noted."""
    if not isinstance(stored, list):
        return Value(metric, stored)
    number, more = stored
    return Value(metric, number, note=more) if isinstance(more, str) else Value(metric, number, sd=more)
