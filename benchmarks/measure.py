"""Timing in turns, what is made of the readings, and the tables that the parts give."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from redoubt.errors import UserError

Call = Callable[[], Any]
Measure = Callable[[Call], float]
Row = dict[str, Any]
#: What `compared` fills.
SIDES = ("side", "median", "min", "max", "n", "ratio")


@dataclass
class Section:
    """One table: rows that map the columns' names to text, numbers or None."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def remarks(self) -> list[str]:
        """The notes, and how far the numbers can be trusted."""
        if any(row.get("n") == 1 for row in self.rows):
            return [*self.notes, "n = 1: one reading, in a time in which others may have used the machine."]
        return self.notes


def seconds_on(device: torch.device) -> Measure:
    """Seconds of a call: by CUDA events on a GPU (the host does not wait before the end), else by the clock."""

    def on_gpu(call: Call) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1000

    def on_cpu(call: Call) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return on_gpu if device.type == "cuda" else on_cpu


def peak_memory_on(device: torch.device) -> Measure:
    """MiB by which a call raises the peak of what is held: of the GPU's allocator, else resident in the process."""

    def on_gpu(call: Call) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20

    def on_cpu(call: Call) -> float:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed goes back, or this one would find it there
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1024

    if device.type == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        raise UserError("parts=memory: the peak of a process is read from Linux's /proc; leave this part out here")
    return on_gpu if device.type == "cuda" else on_cpu


def _status(key: str) -> int:
    """A field of this process's status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def alternate(
    sides: Mapping[Any, Call], measure: Measure, *, pairs: int, seconds: float, warm: bool = True
) -> dict[Any, list[float]]:
    """Readings of calls that take turns, A B A B.

    Args:
        sides: The calls, in the order of their turns.
        measure: What is read of a call.
        pairs: Rounds.
        seconds: No round begins that would end later than this after the first one began, were it as long as those
            before it; one is always made.
        warm: A first round warms up and is not counted.

    Returns:
        For each side one reading per round.
    """
    for call in sides.values() if warm else ():
        call()
    readings: dict[Any, list[float]] = {name: [] for name in sides}
    began = time.monotonic()
    for done in range(pairs):
        if done and (time.monotonic() - began) * (done + 1) / done > seconds:
            break
        for name, call in sides.items():
            readings[name].append(measure(call))
    return readings


def ratio(readings: Sequence[float], of: Sequence[float]) -> float:
    """Median over the rounds of one side's reading divided by another's of the same round."""
    return statistics.median(a / b for a, b in zip(readings, of, strict=True))


def summary(readings: Sequence[float]) -> Row:
    """Median, range and number of rounds."""
    return {"median": statistics.median(readings), "min": min(readings), "max": max(readings), "n": len(readings)}


def compared(readings: Mapping[str, Sequence[float]], of: str) -> list[Row]:
    """A row per side; ``ratio`` is its reading over that of the side ``of`` in the same round."""
    return [
        {"side": name, **summary(values), "ratio": ratio(values, readings[of])} for name, values in readings.items()
    ]
