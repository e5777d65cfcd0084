"""Crafting, the full step and its peak memory, ours and the peers'."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

from benchmarks import ours
from benchmarks.libraries import LIBRARIES
from benchmarks.machine import DTYPES, flops, matrix_rate
from benchmarks.measure import Call, Row, Section, alternate, compared, peak_memory_on, ratio, seconds_on
from benchmarks.options import Options
from benchmarks.peer_defenses import PEERS
from benchmarks.peers import PGDAT

from redoubt.build import build_module
from redoubt.data import Batch
from redoubt.defenses import RobustModule

#: The framework's call, and a peer's.
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
        sides = built(o, "at", model, size, CRAFT)
        readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=o.seconds)
        rows = with_limit(o, limits(o, size), compared(readings, first_of(o)), gflop)
        section.rows += [{"model": model, "batch": size, **row} for row in rows]
    return section


def step(o: Options) -> Section:
    """The full step of every cell; all take turns, so that cells can be compared with one another too."""
    title = f"Full training step, {o.model}, batch {o.batch}: seconds"
    section = Section("step", title, ["cell", *SPEED, "of at", "forward", "backward"])
    counts = {cell: counted(o, cell, o.model, o.batch, STEP) for cell in o.cells}
    sides = {(cell, name): call for cell in o.cells for name, call in built(o, cell, o.model, o.batch, STEP).items()}
    readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=o.seconds * len(o.cells))
    rates = limits(o, o.batch)
    for cell, (gflop, passes) in counts.items():
        own = {name: values for (of, name), values in readings.items() if of == cell}
        for row in with_limit(o, rates, compared(own, first_of(o)), gflop):
            base = readings.get(("at", row["side"]))
            row["of at"] = None if base is None else ratio(own[row["side"]], base)
            section.rows.append({"cell": cell, **row, **(passes if row["side"] == first_of(o) else {})})
    section.notes.append("of at: the same side's step over that of cell at in the same round.")
    return section


def memory(o: Options) -> Section:
    """What building a cell and two steps add to the peak of memory, each side alone."""
    title = f"Peak memory of building and two training steps, {o.model}, batch {o.batch}: MiB"
    section = Section("memory", title, ["cell", "side", "median", "min", "max", "n", "ratio"])

    def by_us(cell: str, precision: str) -> None:
        module = ours.build(o, cell)
        batch = ours.noise_batch(o, module, o.batch)
        for _ in range(2):
            ours.step(o, module, batch, precision)

    def by_them(cell: str) -> None:
        module = build_module(ours.compose(o, cell)).to(o.device)
        peer, batch = PEERS[cell](module), ours.noise_batch(o, module, o.batch)
        del module
        for _ in range(2):
            peer.step(batch.x, batch.y)

    by_us("at", o.precisions[0])  # what the libraries keep for good
    for cell in (cell for cell in o.cells if cell in PEERS):
        sides: dict[str, Call] = {f"ours, {p}": functools.partial(by_us, cell, p) for p in o.precisions}
        sides["authors"] = functools.partial(by_them, cell)
        readings = alternate(sides, peak_memory_on(o.device), pairs=o.pairs, seconds=o.seconds, warm=False)
        section.rows += [{"cell": cell, **row} for row in compared(readings, first_of(o))]
    section.notes.append("On a CPU: resident memory of the process above that before building.")
    return section


def peers_of(cell: str, module: RobustModule) -> dict[str, PGDAT]:
    """The authors' way, where there is one, and the libraries' of PGD-AT."""
    found = {"authors": PEERS[cell](module)} if cell in PEERS else {}
    return found | ({name: make(module) for name, make in LIBRARIES.items()} if cell == "at" else {})


def calls(o: Options, module: RobustModule, batch: Batch, cell: str, work: Work) -> dict[str, Call]:
    """What takes turns: ours in each precision, and the peers in float32."""
    by_us, by_them = work
    sides = {f"ours, {p}": functools.partial(by_us, o, module, batch, p) for p in o.precisions}
    return sides | {name: functools.partial(by_them, peer, batch) for name, peer in peers_of(cell, module).items()}


def built(o: Options, cell: str, model: str, size: int, work: Work) -> dict[str, Call]:
    """The calls of a cell with a batch of this size."""
    module = ours.build(o, cell, model=model)
    return calls(o, module, ours.noise_batch(o, module, size), cell, work)


def counted(o: Options, cell: str, model: str, size: int, work: Work) -> tuple[dict[str, float], dict[str, int]]:
    """GFLOP of each side, and our step's passes: of two images, since the operations grow with their number."""
    o = dataclasses.replace(o, compile=False)
    module = ours.build(o, cell, model=model)
    pair = ours.noise_batch(o, module, 2)
    gflop = {name: flops(call) / 1e9 * size / 2 for name, call in calls(o, module, pair, cell, work).items()}
    return gflop, ours.passes(module, pair)


def first_of(o: Options) -> str:
    """The side that the others are compared with."""
    return f"ours, {o.precisions[0]}"


def limits(o: Options, batch: int) -> dict[str, float]:
    """GFLOP/s of matrix products in each precision that a side has."""
    return {p: matrix_rate(o.device, DTYPES[p], batch) / 1e9 for p in dict.fromkeys(("float32", *o.precisions))}


def with_limit(o: Options, rates: Mapping[str, float], rows: list[Row], gflop: Mapping[str, float]) -> list[Row]:
    """Adds each side's operations, and the share of its time that ours would take at the matrix rate."""
    for row in rows:
        rate = rates["bf16" if row["side"].endswith("bf16") else "float32"]
        row["GFLOP"], row["share"] = gflop[row["side"]], gflop[first_of(o)] / rate / row["median"]
    return rows
