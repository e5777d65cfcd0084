"""How fast a cell trains, as the runs of the store measured it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from redoubt.reporting.collect import Record
from redoubt.runs.files import read_json
from redoubt.units import height_width

#: Keys that change the speed of a step; runs that share them with what is planned come first.
SPEED = (("trainer", "precision"), ("trainer", "accumulate"), ("compile",), ("channels_last",))


def trained_on(cfg: Any, there: int) -> int:
    """Training images of so many that there are, less limit and validation split."""
    used = min(there, cfg.data.limit_train or there)
    return used - round(used * float(cfg.data.val_fraction))


@dataclass(frozen=True)
class Throughput:
    """Training images per second of one device.

    Args:
        images_per_second: The median over a run's epochs, divided by its devices.
        source: Where it comes from, for people.
    """

    images_per_second: float
    source: str


def measured(cfg: Mapping[str, Any], records: Iterable[Record]) -> Throughput | None:
    """Of the runs of the same model, defense and base, image size and steps of the training attack.

    Those with the same precision and compilation win, then the fastest. None where there is no such run.
    """
    found = []
    for record in records:
        speeds = [row["images_per_second"] for row in record.metrics if row.get("images_per_second", 0) > 0]
        if not speeds or _kind(record.config) != _kind(cfg):
            continue
        alike = sum(_at(record.config, *key) == _at(cfg, *key) for key in SPEED)
        found.append((alike, median(speeds) / _devices(record.config), record))
    if not found:
        return None
    alike, speed, record = max(found, key=lambda entry: entry[:2])
    other = [".".join(key) for key in SPEED if _at(record.config, *key) != _at(cfg, *key)]
    names = (read_json(record.run.environment_file) or {}).get("devices") or ["unknown device"]
    notes = "".join(f", other {key}" for key in other)
    return Throughput(speed, f"{speed:.4g} images/s, {record.name} ({names[0]}{notes})")


def _kind(cfg: Mapping[str, Any]) -> tuple[Any, ...]:
    axes = tuple(cfg["axes"][axis] for axis in ("model", "defense", "base"))
    return *axes, height_width(cfg["data"]["image_size"]), int(cfg["inner"]["steps"])


def _devices(cfg: Mapping[str, Any]) -> int:
    devices, nodes = _at(cfg, "trainer", "devices"), _at(cfg, "trainer", "num_nodes")
    count = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return max(1, count) * int(nodes or 1)


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
