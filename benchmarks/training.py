"""Crafting, the full step and its peak memory, ours and the peers'."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import ours
from benchmarks.libraries import LIBRARIES
from benchmarks.machine import DTYPES, flops, product
from benchmarks.measure import Call, Row, Section, alternate, compared, peak_memory_on, seconds_on
from benchmarks.options import Options
from benchmarks.peer_defenses import PEERS
from benchmarks.peers import PGDAT

from redoubt.build import build_module
from redoubt.data import Batch
from redoubt.defenses import RobustModule

#: The framework's call, and a peer's.
Peers = Mapping[str, Callable[[RobustModule], PGDAT]]
Work = tuple[Callable[[Options, RobustModule, Batch, str], object], Callable[[PGDAT, Batch], object]]
CRAFT: Work = (ours.craft, lambda peer, batch: peer.craft(batch.x, batch.y))
STEP: Work = (ours.step, lambda peer, batch: peer.step(batch.x, batch.y))
SPEED = ("side", "median", "min", "max", "n", "ratio", "GFLOP", "share")


def craft(o: Options) -> Section:
    """PGD on cross-entropy with each net."""
    title = "Crafting: the training attack of PGD-AT, seconds per batch"
    section = Section("craft", title, ["model", "batch", *SPEED])
    for model, size in o.nets:
        gflop, _ = counted(o, "at", model, size, CRAFT)
        products = Products(o, size)
        sides = built(o, "at", model, size, CRAFT) | products.calls
        readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=o.seconds)
        rows = with_limit(o, products.rates(readings), readings, gflop)
        section.rows += [{"model": model, "batch": size, **row} for row in rows]
    return section


def step(o: Options) -> Section:
    """The full step of every cell."""
    title = f"Full training step, {o.model}, batch {o.batch}: seconds"
    section = Section("step", title, ["cell", *SPEED, "of at", "forward", "backward"])
    medians: dict[str, float] = {}
    for cell in o.cells:
        gflop, passes = counted(o, cell, o.model, o.batch, STEP)
        products = Products(o, o.batch)
        sides = built(o, cell, o.model, o.batch, STEP) | products.calls
        readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=4 * o.seconds)
        for row in with_limit(o, products.rates(readings), readings, gflop):
            if cell == "at":
                medians[row["side"]] = row["median"]
            of_at = row["median"] / medians[row["side"]] if row["side"] in medians else None
            section.rows.append({"cell": cell, **row, "of at": of_at, **(passes if row["side"] == first_of(o) else {})})
    section.notes.append("of at: median over the same side's of cell at.")
    return section


def libraries(o: Options) -> Section:
    """PGD-AT's full step by the libraries' ways."""
    title = f"Full training step of PGD-AT by libraries, {o.model}, batch {o.batch}: seconds"
    section = Section("libraries", title, list(SPEED))
    gflop, _ = counted(o, "at", o.model, o.batch, STEP, LIBRARIES)
    products = Products(o, o.batch)
    sides = built(o, "at", o.model, o.batch, STEP, LIBRARIES) | products.calls
    readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=o.seconds)
    section.rows = with_limit(o, products.rates(readings), readings, gflop)
    return section


def memory(o: Options) -> Section:
    """What building a cell and one step add to the peak of memory, each side alone."""
    title = f"Peak memory of building and one training step, {o.model}, batch {o.batch}: MiB"
    section = Section("memory", title, ["cell", "side", "median", "min", "max", "n", "ratio"])

    def by_us(cell: str, precision: str) -> None:
        module = ours.build(o, cell)
        batch = ours.noise_batch(o, module, o.batch)
        ours.step(o, module, batch, precision)

    def by_them(cell: str) -> None:
        module = build_module(ours.compose(o, cell)).to(o.device)
        peer, batch = PEERS[cell](module), ours.noise_batch(o, module, o.batch)
        del module
        peer.step(batch.x, batch.y)

    by_us("at", o.precisions[0])  # what the libraries keep for good
    for cell in (cell for cell in o.cells if cell in PEERS):
        sides: dict[str, Call] = {f"ours, {p}": functools.partial(by_us, cell, p) for p in o.precisions}
        sides["authors"] = functools.partial(by_them, cell)
        readings = alternate(sides, peak_memory_on(o.device), pairs=o.pairs, seconds=0, warm=False)
        section.rows += [{"cell": cell, **row} for row in compared(readings, first_of(o))]
    section.notes.append("On a CPU: resident memory of the process above that before building.")
    return section


def calls(o: Options, module: RobustModule, batch: Batch, work: Work, peers: Peers) -> dict[str, Call]:
    """What takes turns: ours in each precision, and the peers in float32."""
    by_us, by_them = work
    sides = {f"ours, {p}": functools.partial(by_us, o, module, batch, p) for p in o.precisions}
    return sides | {name: functools.partial(by_them, make(module), batch) for name, make in peers.items()}


def authors(cell: str) -> Peers:
    """The authors' way, where there is one."""
    return {"authors": PEERS[cell]} if cell in PEERS else {}


def built(
    o: Options,
    cell: str,
    model: str,
    size: int,
    work: Work,
    peers: Peers | None = None,
) -> dict[str, Call]:
    """The calls of a cell with a batch of this size; of the authors where no peers are given."""
    module = ours.build(o, cell, model=model)
    return calls(o, module, ours.noise_batch(o, module, size), work, authors(cell) if peers is None else peers)


def counted(
    o: Options,
    cell: str,
    model: str,
    size: int,
    work: Work,
    peers: Peers | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """GFLOP of each side, and our step's passes: of two images, since the operations grow with their number."""
    o = dataclasses.replace(o, compile=False)
    module = ours.build(o, cell, model=model)
    module.fold = False  # the same operations, by names that are counted
    pair = ours.noise_batch(o, module, 2)
    sides = calls(o, module, pair, work, authors(cell) if peers is None else peers)
    return {name: flops(call) / 1e9 * size / 2 for name, call in sides.items()}, ours.passes(module, pair)


def first_of(o: Options) -> str:
    """The side that the others are compared with."""
    return f"ours, {o.precisions[0]}"


class Products:
    """Matrix products that take turns with the sides: the limit is of the same minutes as what is held against it."""

    def __init__(self, o: Options, batch: int) -> None:
        precisions = dict.fromkeys(("float32", *o.precisions))
        self.made = {p: product(o.device, DTYPES[p], batch) for p in precisions}

    @property
    def calls(self) -> dict[str, Call]:
        return {f"products, {p}": call for p, (call, _) in self.made.items()}

    def rates(self, readings: dict[Any, list[float]]) -> dict[str, list[float]]:
        """GFLOP/s of each round by precision; takes their readings out."""
        return {p: [gflop / s for s in readings.pop(f"products, {p}")] for p, (_, gflop) in self.made.items()}


def with_limit(
    o: Options, rates: Mapping[str, list[float]], readings: Mapping[str, list[float]], gflop: Mapping[str, float]
) -> list[Row]:
    """Rows of sides, with their operations and the share of the time that ours would take at the matrix rate."""
    rows = compared(readings, first_of(o))
    for row in rows:
        rate = rates["bf16" if row["side"].endswith("bf16") else "float32"]
        shares = [gflop[first_of(o)] / r / s for r, s in zip(rate, readings[row["side"]], strict=True)]
        row["GFLOP"], row["share"] = gflop[row["side"]], statistics.median(shares)
    return rows
