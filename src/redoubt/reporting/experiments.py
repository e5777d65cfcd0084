"""``python -m redoubt.reporting.experiments``: writes the published rows to conf/experiment/.

A row is a file. Where it differs from an earlier one of its paper in one value, it includes that one.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from redoubt import config
from redoubt.reporting.cells import Cell, experiments
from redoubt.reporting.published import Published, Row


def files() -> dict[str, str]:
    """Contents of the experiment files, by name (``fsr/s1_cifar100_resnet18_at``)."""
    written: dict[str, str] = {}
    earlier: list[Cell] = []
    for name, (table, row, cell) in sorted(experiments().items(), key=lambda item: len(item[1][2].settings)):
        written[name] = _file(table, row, cell, earlier)
        earlier.append(cell)
    return written


def write(folder: Path) -> None:
    """Writes every file under ``folder`` (conf/experiment)."""
    for name, text in files().items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _file(table: Published, row: Row, cell: Cell, earlier: list[Cell]) -> str:
    numbers = ", ".join(f"{value.metric} {value.number}" for value in row.values)
    what = f"{table.title} ({table.source}): {row.dataset}, {row.model}, {row.method}: {numbers}."
    told = [line for text in (what, cell.note) for line in textwrap.wrap(text, 116)]
    lines = ["# @package _global_", *(f"# {line}" for line in told), "defaults:"]
    base = _nearest(cell, earlier)
    axes, settings = cell.axes, dict(cell.settings)
    if base is not None:
        axes = {group: option for group, option in axes.items() if base.axes[group] != option}
        settings = {key: value for key, value in settings.items() if key not in base.settings}
        lines.append(f"  - /experiment/{base.experiment}")
    lines += [f"  - override /{group}: {option}" for group, option in axes.items()]
    if settings:
        lines += [
            "  - _self_",
            "",
            yaml.safe_dump(_nested(settings), sort_keys=False, default_flow_style=None).rstrip(),
        ]
    return "\n".join(lines) + "\n"


def _nearest(cell: Cell, earlier: list[Cell]) -> Cell | None:
    """The first earlier cell of the same paper that differs least, in one option or value at most."""
    paper = str(cell.experiment).partition("/")[0]
    near = [
        (distance, i)
        for i, other in enumerate(earlier)
        if str(other.experiment).startswith(f"{paper}/") and (distance := _distance(other, cell)) <= 1
    ]
    return earlier[min(near)[1]] if near else None


def _distance(base: Cell, cell: Cell) -> float:
    """How many options and values ``cell`` adds to ``base``; inf where it would have to take one back."""
    if any(cell.settings.get(key) != value for key, value in base.settings.items()):
        return float("inf")
    axes = sum(base.axes[group] != option for group, option in cell.axes.items())
    return axes + len(cell.settings) - len(base.settings)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


if __name__ == "__main__":
    write(Path(config.config_dir()) / "experiment")
