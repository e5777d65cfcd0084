"""Results on a terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Section
from rich.console import Console
from rich.table import Table


def shown(value: Any) -> str:
    """A cell: three significant digits; a dash where nothing was measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return str(value)


def table(section: Section) -> Table:
    """For a terminal."""
    found = Table(title=section.title, caption="\n".join(section.remarks) or None)
    for name in section.columns:
        text = any(isinstance(row.get(name), str) for row in section.rows)
        found.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in section.rows:
        found.add_row(*(shown(row.get(name)) for name in section.columns))
    return found


def show(section: Section) -> None:
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table(section))


def as_json(path: Path, results: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """Everything, with all digits."""
    parts = {s.name: {"title": s.title, "notes": s.remarks, "rows": s.rows} for s in sections}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**results, "parts": parts}, indent=1) + "\n")


def as_markdown(path: Path, results: Mapping[str, Any], sections: Sequence[Section]) -> None:
    """The tables, below date, machine and command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_lines(results, sections)) + "\n")


def _lines(results: Mapping[str, Any], sections: Sequence[Section]) -> Iterator[str]:
    machine = results["machine"]
    yield f"## {machine.get('gpu', machine['cpu'])}, {results['date']}\n"
    yield f"```bash\n{results['command']}\n```\n"
    yield ", ".join(f"{key} {value}" for key, value in machine.items()) + ".\n"
    rates = ", ".join(f"{name} {shown(value)} GFLOP/s" for name, value in results["matrix_rate"].items())
    squares = ", ".join(f"{name} {shown(value)}" for name, value in results["square_rate"].items())
    yield f"Matrix products of the convolutions' shapes: {rates}; of large squares: {squares}."
    for section in sections:
        yield f"\n### {section.title}\n"
        yield f"| {' | '.join(section.columns)} |"
        yield "|" + "---|" * len(section.columns)
        for row in section.rows:
            yield f"| {' | '.join(shown(row.get(name)) for name in section.columns)} |"
        if section.remarks:
            yield "\n" + " ".join(section.remarks)
