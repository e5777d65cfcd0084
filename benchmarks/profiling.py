"""Where the time of one step goes, and whether it makes the host wait for the device."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import ours
from benchmarks.measure import Row, Section
from benchmarks.options import Options
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from redoubt.defenses import RobustModule

#: Kinds of work by the names of the operations that do it, the first that fits.
KINDS = {
    "convolution": ("conv", "mkldnn", "mm", "linear", "gemm"),
    "batch norm": ("batch_norm", "batchnorm", "bn_"),
    "optimizer": ("optimizer", "_fused_", "foreach", "multi_tensor"),
    "order statistics": ("topk", "sort", "amax"),
    "random numbers": ("rand", "uniform", "normal_"),
    "copies and layout": (
        "copy",
        "clone",
        "contiguous",
        "_to_copy",
        "fill",
        "zero",
        "cat",
        "empty",
        "memcpy",
        "memset",
        "tonhwc",
        "tonchw",
    ),
}
#: What makes the host wait for a GPU; on a CPU, where nothing waits, what reads a tensor's value.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten::_local_scalar_dense",)
PHASES = ("craft", "update", "after_step")


def profiled(o: Options) -> Section:
    """The operations' own time of one step, in per cent, and the phases in which it is spent."""
    title = f"One training step by kind of operation, {o.model}, batch {o.batch}, {o.precisions[-1]}: per cent"
    kinds = (*KINDS, "elementwise and other")
    section = Section("profile", title, ["cell", *PHASES, *kinds, "host reads", "longest"])
    section.rows = [one(o, cell) for cell in o.cells]
    section.notes += [
        "Phases are shares of the step's time; kinds shares of the operations' own time; longest: the one operation "
        "that takes most. Profiling itself slows small operations down.",
        "host reads: on a GPU, how often the host waits for it; on a CPU, how often a tensor's value is read.",
    ]
    return section


def one(o: Options, cell: str) -> Row:
    """The row of a cell."""
    module = ours.build(o, cell)
    batch = ours.noise_batch(o, module, o.batch)
    for name in PHASES:
        named(module, name)
    with ours.short_attack(o, module):
        ours.step(o, module, batch, o.precisions[-1])
    gpu = o.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with silent(), profile(activities=activities) as seen, record_function("whole"), ours.autocast(o, o.precisions[-1]):
        module.training_step(batch, 0)
    events = seen.key_averages()
    return {"cell": cell, **phases(events, gpu), **kinds(events, gpu), "host reads": reads(seen.events(), gpu)}


@contextmanager
def silent() -> Iterator[None]:
    """Inside, the error stream is closed: the profiler writes there when it starts and stops."""
    before = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def named(module: RobustModule, name: str) -> None:
    """Lets a method of the step appear under its name."""
    method: Callable[..., Any] = getattr(module, name)

    def recorded(*args: Any) -> Any:
        with record_function(f"step/{name}"):
            return method(*args)

    setattr(module, name, recorded)


def phases(events: Any, gpu: bool) -> dict[str, float]:
    total = {e.key: e.device_time_total if gpu else e.cpu_time_total for e in events}
    return {name: 100 * total.get(f"step/{name}", 0.0) / total["whole"] for name in PHASES}


def kinds(events: Any, gpu: bool) -> dict[str, Any]:
    own: Counter[str] = Counter()
    for e in events:
        # On a GPU the time is the kernels': operations that launch them bear it a second time.
        if e.key.startswith(("step/", "whole", "ProfilerStep")) or (gpu and e.device_type != DeviceType.CUDA):
            continue
        own[e.key] += e.self_device_time_total if gpu else e.self_cpu_time_total
    whole = sum(own.values())
    found: Counter[str] = Counter()
    for name, spent in own.items():
        lower = name.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(p in lower for p in parts)), "elementwise and other")
        found[kind] += spent
    shares = {kind: 100 * found[kind] / whole for kind in (*KINDS, "elementwise and other")}
    return {**shares, "longest": own.most_common(1)[0][0].removeprefix("aten::")}


def reads(events: Any, gpu: bool) -> int:
    """How often the host waits within the step; the profiler itself waits for the GPU after it."""
    step = next(e.time_range for e in events if e.name == "whole" and e.device_type == DeviceType.CPU)
    wanted = WAITS if gpu else READS
    return sum(e.name in wanted and step.start <= e.time_range.start <= step.end for e in events)
