"""What computes, how fast it multiplies matrices, and how many operations a call has."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import Call, seconds_on
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from redoubt.training.trainer import cpu_has_bf16

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
#: (C_out, 9 C_in, H W) of the 3x3 convolutions of ResNet-18's four stages, 32x32 images: as products of matrices.
CONVOLUTIONS = ((64, 576, 1024), (128, 1152, 256), (256, 2304, 64), (512, 4608, 16))
#: Columns of the factors: more make no product faster and want memory.
MOST = 2**17
Shape = tuple[int, int, int]


def convolutions(batch: int) -> list[Shape]:
    """The products [C_out, 9 C_in] x [9 C_in, batch H W] of the convolutions, as (m, k, n)."""
    return [(m, k, min(batch * pixels, MOST)) for m, k, pixels in CONVOLUTIONS]


def squares(device: torch.device) -> list[Shape]:
    """A large square product, which no convolution of the nets is."""
    n = 8192 if device.type == "cuda" else 2048
    return [(n, n, n)]


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and its software; no names of hosts or users."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    found = {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cpu" and not cpu_has_bf16():
        found["bfloat16"] = "none"
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        found["TF32 of convolutions"] = torch.backends.cudnn.allow_tf32
    return found


#: Seconds for which a shape is tried, and those that a reading of the fastest lasts: where others use the machine, too,
#: a short one may fall into a moment of theirs.
TRIED, LASTS = 0.1, 1.0


def product(device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape]) -> tuple[Call, float]:
    """The fastest matrix product among some shapes, as a call that repeats it for ``LASTS`` seconds, and its GFLOP.

    Args:
        device: Where.
        dtype: Of factors and product.
        shapes: Of the factors [m, k] x [k, n].
    """
    clock, found = seconds_on(device), []
    for m, k, n in shapes:
        a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        call = functools.partial(torch.mm, a, b, out=torch.empty(m, n, device=device, dtype=dtype))
        call()
        once, until = float("inf"), time.monotonic() + TRIED
        while time.monotonic() < until:
            once = min(once, clock(call))
        found.append((2 * m * k * n / 1e9 / once, call, once, 2 * m * k * n / 1e9))
    _, call, once, gflop = max(found, key=lambda entry: entry[0])
    repeats = max(1, round(LASTS / once))
    return lambda: [call() for _ in range(repeats)], gflop * repeats


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call's convolutions and matrix products, a multiply-add being two."""
    with _Counter() as counter:
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    """torch's formulas without its tracking of modules, whose hooks forbid gradients with respect to a net's input."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
