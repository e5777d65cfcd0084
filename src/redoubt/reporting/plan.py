"""``plan=true``: what a run would be, how long and how large, from one small step on throwaway weights."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from redoubt.build import build_data, build_module
from redoubt.data import ImageData
from redoubt.data.loader import count_batches
from redoubt.defenses import RobustModule
from redoubt.reporting.throughput import trained_on
from redoubt.runs.extending import Origin
from redoubt.runs.identity import identity
from redoubt.runs.start import starting_point
from redoubt.runs.store import readable_name
from redoubt.training.trainer import accelerator, check_machine, device_name, devices
from redoubt.units import clock, height_width

#: Images of the measured step: enough to keep the device busy, few enough to answer in seconds.
IMAGES = {"cpu": 8, "gpu": 64}


def show_plan(cfg: DictConfig, console: Console) -> None:
    """Prints run, recipes, size, estimated time and memory of a resolved config; trains and writes nothing."""
    check_machine(cfg)
    data = build_data(cfg)
    absent = data.absent()
    if absent:  # nothing is downloaded for a plan: the published sizes, and noise to measure on
        train, test = _published(cfg, data)
        fingerprint = f"{data.name}/train@official"
        stand_in = cfg.copy()
        stand_in.data = {**cfg.data, "source": "fake", "limit_train": None, "limit_test": None}
        data = build_data(stand_in)
    else:
        data.prepare_data()
        train, test, fingerprint = data.train_size, len(data.arrays("test")[1]), data.fingerprint("train")
    origin = Origin.of(cfg)
    start = starting_point(cfg, data, fingerprint) if origin is None else None
    module = build_module(cfg)
    kind, world, batch = accelerator(cfg), devices(cfg), int(cfg.data.batch_size)
    n = min(IMAGES[kind], data.train_size)
    seconds, activations = measure(module, data, n, "cuda" if kind == "gpu" else "cpu", str(cfg.trainer.precision))
    weights = sum(p.numel() for p in module.trained())
    frozen = sum(p.numel() for p in module.parameters()) - weights
    copies = 3 + (module.ema is not None)  # weights, gradients, momentum, average
    at_once = -(-batch // (world * int(cfg.trainer.accumulate)))
    images = train * 3 * math.prod(height_width(data.image_size))
    memory = 4 * (weights * copies + frozen) + activations * at_once / n + images
    epochs = int(cfg.trainer.max_epochs) - (origin.epochs if origin else 0)
    beside = (start.identity if start else None, origin.run.hash if origin else None)
    epoch = seconds / n * train / world
    steps = count_batches(train, batch, world) * epochs
    rows = {
        "run": f"{readable_name(cfg.axes, cfg.seed)}-{identity(cfg, fingerprint, *beside)}",
        "recipes": ", ".join(cfg.axes.recipes) or "default",
        "device": f"{device_name(cfg)}, {cfg.trainer.precision}",
        "parameters": f"{weights:,}",
        "training": f"{train:,} images, {epochs} epochs, {steps:,} steps of {batch}",
        "time, estimated": f"{clock(epoch)} an epoch, {clock(epoch * epochs)} in all",
        "memory, estimated": f"{memory / 2**30:.2f} GiB ({at_once} images at a time)",
        "evaluation": f"{cfg.axes.attack}, {test:,} images",
    }
    if origin is not None:
        rows["goes on from"] = f"{origin.run.name}, {origin.epochs} epochs"
    if start is not None:
        there = start.run is None or start.run.finished
        first = ", which will be trained first (plan it too: defense=none base=standard)"
        rows["starts from"] = start.name + ("" if there else first)
    if absent:
        rows["data"] = f"not in {cfg.data.root} yet: will be downloaded"
    table = Table(show_header=False, title="plan: nothing is trained")
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)


def _published(cfg: DictConfig, data: ImageData) -> tuple[int, int]:
    """Training and test images of the published files, less validation and limits."""
    train, test = data.published
    return trained_on(cfg, train), min(test, cfg.data.limit_test or test)


def measure(module: RobustModule, data: ImageData, n: int, device: str, precision: str) -> tuple[float, float]:
    """Seconds of crafting and updating for ``n`` images, and bytes that their training forward keeps."""
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
    module.steps_done = 10**9  # past every warm-up
    optimizers = module.configure_optimizers()
    module.raw_optimizers = lambda: optimizers  # type: ignore[method-assign]
    cast: Any = torch.autocast(device, dtype=dtype) if dtype else nullcontext()
    with cast:
        module.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            module.loss(x, x, labels)
        best = float("inf")
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            adv = module.craft(x, labels)
            module.update(x, adv, labels)
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
    return best, float(sum(size for pointer, size in kept.items() if pointer not in own))
