"""``plan=true``: what a run would be, how long and how large, from one small step on throwaway weights."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from redoubt.build import build_data, build_module
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.runs.identity import identity
from redoubt.runs.store import readable_name
from redoubt.training.trainer import accelerator, check_precision, device_name, devices

#: Images of the measured step: enough to keep the device busy, few enough to answer in seconds.
IMAGES = {"cpu": 8, "gpu": 64}


def show_plan(cfg: DictConfig, console: Console) -> None:
    """Prints run, recipes, size, estimated time and memory of a resolved config; trains and writes nothing."""
    check_precision(cfg)
    data = build_data(cfg)
    data.prepare_data()
    module = build_module(cfg)
    kind = accelerator(cfg)
    n = min(IMAGES[kind], data.train_size)
    seconds, activations = measure(module, data, n, "cuda" if kind == "gpu" else "cpu", str(cfg.trainer.precision))
    weights = sum(p.numel() for p in module.parameters())
    copies = 3 + (module.ema is not None)  # weights, gradients, momentum, average
    batch = -(-int(cfg.data.batch_size) // (devices(cfg) * int(cfg.trainer.accumulate)))
    memory = 4 * weights * copies + activations * batch / n + data.train_size * 3 * data.image_size**2
    epoch = seconds / n * data.train_size / devices(cfg)
    steps = data.steps_per_epoch(devices(cfg)) * int(cfg.trainer.max_epochs)
    rows = {
        "run": f"{readable_name(cfg.axes, cfg.seed)}-{identity(cfg, data.fingerprint('train'))}",
        "recipes": ", ".join(cfg.axes.recipes) or "default",
        "device": f"{device_name(cfg)}, {cfg.trainer.precision}",
        "parameters": f"{weights:,}",
        "training": f"{data.train_size:,} images, {cfg.trainer.max_epochs} epochs, {steps:,} steps of "
        f"{cfg.data.batch_size}",
        "time, estimated": f"{clock(epoch)} an epoch, {clock(epoch * int(cfg.trainer.max_epochs))} in all",
        "memory, estimated": f"{memory / 2**30:.2f} GiB ({batch} images at a time)",
        "evaluation": f"{cfg.axes.attack}, {len(data.arrays('test')[1]):,} images",
    }
    table = Table(show_header=False, title="plan: nothing is trained")
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


def measure(module: RobustModule, data: ImageData, n: int, device: str, precision: str) -> tuple[float, float]:
    """Seconds of crafting and gradients for ``n`` images, and bytes that their training forward keeps."""
    images, labels = (t[:n].to(device) for t in data.arrays("train_probe"))
    module.to(device)
    module.accumulate = 1
    x = (images.float() / 255).contiguous(memory_format=module.format)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    cast: Any = torch.autocast(device, dtype=dtype) if dtype else nullcontext()
    with cast:
        module.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            module.loss(x, x, labels)
        best = float("inf")
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            adv = module.craft(x, labels)
            module.gradients(lambda *batch: [module.loss(*batch)], [list(module.parameters())], x, adv, labels)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return best, float(sum(size for pointer, size in kept.items() if pointer not in own))


def clock(seconds: float) -> str:
    """1:02:03, or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02} min"
