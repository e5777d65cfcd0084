"""Cost against work: batch, attack steps, width, image size; and two processes beside one."""

from __future__ import annotations

import dataclasses
import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from benchmarks import ours
from benchmarks.measure import Call, Row, Section, alternate, ratio, seconds_on, summary
from benchmarks.options import Options

#: A step, and its GFLOP.
Point = tuple[Call, float]
COLUMNS = ("axis", "value", "median", "min", "max", "n", "GFLOP", "s per TFLOP", "of base")


def scaling(o: Options) -> Section:
    """PGD-AT's step: seconds per operation stay what they are at the base if the cost is linear in the work."""
    title = f"Scaling of the full step (at, {o.precisions[0]}): seconds"
    section = Section("scaling", title, COLUMNS)
    for axis, points in axes(o).items():
        section.rows += along(o, axis, points)
    section.notes += [
        "of base: seconds per operation over those of the axis' first row, in the same round; 1 is linear.",
        f"batch, inner steps and image size: {o.model}; width: WRN-10 (redoubt's wrn34_10 with depth 10).",
    ]
    if o.device.type == "cpu":
        section.rows += processes(o)
        section.notes.append(
            "processes: gloo; of base is the efficiency: time of one process over that of two, each with the same "
            f"threads and a batch of {half_of(o)}. One process with all threads and the batch of both: batch, above."
        )
    return section


def axes(o: Options) -> dict[str, dict[int, Point]]:
    """For each axis a point per value, the base first."""
    size = int(ours.compose(o, "at").data.image_size)
    half, quarter = half_of(o), max(2, o.batch // 4)
    batches = dict.fromkeys((half, max(2, o.batch // 8), quarter, o.batch))
    wide = dataclasses.replace(o, overrides=tuple(w for w in o.overrides if not w.startswith("model.")))
    return {
        "batch": {n: point(o, n) for n in batches},
        "inner steps": {n: point(o, half, f"inner.steps={n}") for n in (10, 1, 5, 20)},
        "width": {n: point(wide, half, "model.depth=10", f"model.width={n}", model="wrn34_10") for n in (4, 1, 2, 8)},
        "image size": {n: point(o, quarter, f"data.image_size={n}") for n in (size, size // 2, 2 * size)},
    }


def half_of(o: Options) -> int:
    """The batch of the base, so that what is twice the work of it does not take long."""
    return max(2, o.batch // 2)


def point(o: Options, batch: int, *more: str, model: str | None = None) -> Point:
    """One step with a batch of this size, warmed up, and its GFLOP, counted with two images."""
    counted, pair = ours.countable(o, "at", *more, model=model)
    gflop = ours.gflop(lambda: ours.step(o, counted, pair, o.precisions[0]), batch)
    module = ours.build(o, "at", *more, model=model)
    images = ours.noise_batch(o, module, batch)
    with ours.short_attack(o, module):
        ours.step(o, module, images, o.precisions[0])
    return lambda: ours.step(o, module, images, o.precisions[0]), gflop


def along(o: Options, axis: str, points: dict[int, Point]) -> list[Row]:
    """Rows of one axis, in the order of the values behind the base."""
    calls = {value: call for value, (call, _) in points.items()}
    readings = alternate(calls, seconds_on(o.device), pairs=o.pairs, seconds=o.seconds / 2, warm=False)
    per_work = {value: [s / points[value][1] for s in seconds] for value, seconds in readings.items()}
    base = next(iter(points))
    return [
        {
            "axis": axis, "value": value, **summary(readings[value]), "GFLOP": points[value][1],
            "s per TFLOP": statistics.median(per_work[value]) * 1e3, "of base": ratio(per_work[value], per_work[base]),
        }
        for value in points
    ]  # fmt: skip


def processes(o: Options) -> list[Row]:
    """One process, and two of them."""
    each, half = max(1, o.threads // 2), half_of(o)
    sides = {
        "1": lambda: together(o, world=1, threads=each, batch=half),
        "2": lambda: together(o, world=2, threads=each, batch=2 * half),
    }
    readings = alternate(sides, lambda call: call(), pairs=o.pairs, seconds=o.seconds, warm=False)
    rows = [{"axis": "processes", "value": name, **summary(readings[name])} for name in sides]
    rows[1]["of base"] = ratio(readings["1"], readings["2"])
    return rows


def together(o: Options, *, world: int, threads: int, batch: int, steps: int = 2) -> float:
    """Seconds per step of processes that share a global batch; each warms up before."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    found: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, args=(o, world, threads, batch, steps, address, found), nprocs=world)
    return max(found.get() for _ in range(world))


def _rank(rank: int, o: Options, world: int, threads: int, batch: int, steps: int, address: str, found: Any) -> None:
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    module = ours.build(o, "at")
    whole = ours.noise_batch(o, module, batch)
    first, last = batch * rank // world, batch * (rank + 1) // world
    mine = whole._replace(x=whole.x[first:last], y=whole.y[first:last], start=first)
    with ours.short_attack(o, module):
        ours.step(o, module, mine, o.precisions[0])
    if world > 1:
        dist.barrier()
    began = time.perf_counter()
    for _ in range(steps):
        ours.step(o, module, mine, o.precisions[0])
    found.put((time.perf_counter() - began) / steps)
    if world > 1:
        dist.destroy_process_group()
