"""Crafting, the full step and its peak memory, ours and the peers'."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import ours
from benchmarks.libraries import LIBRARIES
from benchmarks.machine import DTYPES, convolutions, product
from benchmarks.measure import SIDES, Call, Row, Section, alternate, compared, peak_memory_on, ratio, seconds_on
from benchmarks.options import Options
from benchmarks.peer_defenses import PEERS
from benchmarks.peers import PGDAT

from redoubt.build import build_module
from redoubt.data import Batch
from redoubt.defenses import RobustModule

Peers = Mapping[str, Callable[[RobustModule], PGDAT]]
#: The framework's call, and a peer's.
Work = tuple[Callable[[Options, RobustModule, Batch, str], object], Callable[[PGDAT, Batch], object]]
CRAFT: Work = (ours.craft, lambda peer, batch: peer.craft(batch.x, batch.y))
STEP: Work = (ours.step, lambda peer, batch: peer.step(batch.x, batch.y))
#: Of the step whose memory is read: each frees what the one before it held. Ten added up to 40 MiB and take long.
ATTACK_STEPS = 2
ARITHMETIC = ("GFLOP", "rate", "share")
SPEED = (*SIDES, "speed-up", *ARITHMETIC)


def craft(o: Options) -> Section:
    """PGD on cross-entropy with each net."""
    title = "Crafting: the training attack of PGD-AT, seconds per batch"
    section = Section("craft", title, ["model", "batch", *SPEED])
    for model, size in o.nets:
        rows, _ = measured(o, "at", model, size, CRAFT, authors("at"), o.seconds)
        section.rows += [{"model": model, "batch": size, **row} for row in rows]
    return section


def step(o: Options) -> Section:
    """The full step of every cell."""
    title = f"Full training step, {o.model}, batch {o.batch}: seconds"
    section = Section("step", title, ["cell", *SPEED, "of at", "forward", "backward"])
    medians: dict[str, float] = {}
    for done, cell in enumerate(o.cells):
        seconds = 4 * o.seconds if o.end is None else (o.end - time.monotonic()) / (len(o.cells) - done)
        rows, passes = measured(o, cell, o.model, o.batch, STEP, authors(cell), seconds)
        for row in rows:
            if cell == "at":
                medians[row["side"]] = row["median"]
            of_at = row["median"] / medians[row["side"]] if row["side"] in medians else None
            section.rows.append({"cell": cell, **row, "of at": of_at, **(passes if row["side"] == first_of(o) else {})})
    section.notes.append("of at: median over the same side's of cell at.")
    return section


def libraries(o: Options) -> Section:
    """PGD-AT's full step by the libraries' ways."""
    title = f"Full training step of PGD-AT by libraries, {o.model}, batch {o.batch}: seconds"
    rows, _ = measured(o, "at", o.model, o.batch, STEP, LIBRARIES, o.seconds)
    return Section("libraries", title, [*SIDES, *ARITHMETIC], rows)


def memory(o: Options) -> Section:
    """What building a cell and one step add to the peak of memory, each side alone."""
    title = f"Peak memory of building and one training step, {o.model}, batch {o.batch}: MiB"
    section = Section("memory", title, ["cell", *SIDES])
    o = dataclasses.replace(o, overrides=(f"inner.steps={ATTACK_STEPS}", *o.overrides))

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
    section.notes.append(
        "On a CPU: resident memory of the process above that before building. "
        f"{ATTACK_STEPS} steps of the attack, unless inner.steps is given."
    )
    return section


def measured(
    o: Options, cell: str, model: str, size: int, work: Work, peers: Peers, seconds: float
) -> tuple[list[Row], dict[str, int]]:
    """Ours and the peers by turns, with a batch of this size.

    Returns:
        Rows of the sides, with their operations and the share of the time that ours would take at the rate of matrix
        products, which take their turns too: the limit is of the same minutes. And the passes of our step.
    """
    counted, pair = ours.countable(o, cell, model=model)
    gflop = {name: ours.gflop(call, size) for name, call in calls(o, counted, pair, work, peers).items()}
    module = ours.build(o, cell, model=model)
    limits = {p: product(o.device, DTYPES[p], convolutions(size)) for p in dict.fromkeys(("float32", *o.precisions))}
    batch = ours.noise_batch(o, module, size)
    with ours.short_attack(o, module):
        for call in calls(o, module, batch, work, peers).values():
            for _ in range(3 if o.compile else 1):  # CUDA graphs run once as they are, then record, then replay
                call()
    sides: dict[Any, Call] = {**calls(o, module, batch, work, peers)}
    sides |= {("products", p): call for p, (call, _) in limits.items()}
    readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=seconds, warm=False)
    rates = {p: [done / s for s in readings.pop(("products", p))] for p, (_, done) in limits.items()}
    rows = compared(readings, first_of(o))
    for row in rows:
        rate = rates["bf16" if row["side"].endswith("bf16") else "float32"]
        shares = [gflop[first_of(o)] / r / s for r, s in zip(rate, readings[row["side"]], strict=True)]
        row["GFLOP"], row["rate"] = gflop[row["side"]], statistics.median(rate)
        row["share"] = statistics.median(shares)
        row["readings"], row["rates"] = readings[row["side"]], rate
        if "authors" in readings:
            row["speed-up"] = ratio(readings["authors"], readings[row["side"]])
    return rows, ours.passes(counted, pair)


def calls(o: Options, module: RobustModule, batch: Batch, work: Work, peers: Peers) -> dict[str, Call]:
    """What takes turns: ours in each precision, and the peers in float32."""
    by_us, by_them = work
    sides = {f"ours, {p}": functools.partial(by_us, o, module, batch, p) for p in o.precisions}
    return sides | {name: functools.partial(by_them, make(module), batch) for name, make in peers.items()}


def authors(cell: str) -> Peers:
    """The authors' way, where there is one."""
    return {"authors": PEERS[cell]} if cell in PEERS else {}


def first_of(o: Options) -> str:
    """The side that the others are compared with."""
    return f"ours, {o.precisions[0]}"
