"""What a training step of each defense costs beside PGD-AT's, and of which passes it consists.

    python benchmarks/steps.py [model=resnet18] [batch=32] [rounds=5] [precision=32-true]

The cells take turns in one process on the same images; a step is crafting (10 steps) and update, without data path and
logging. A forward or backward is counted where it goes through a net's last feature map, in units of the whole batch.
Prints medians and the median of the rounds' ratios to PGD-AT.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from redoubt import config
from redoubt.build import build_module
from redoubt.data import Batch
from redoubt.defenses import RobustModule

CELLS = {
    "at": ["base=at"],
    "trades": ["base=trades"],
    "at, awp": ["base=at", "awp.rho=0.005"],
    "fsr": ["defense=fsr"],
    "afd": ["defense=afd"],
    "afd, joint": ["defense=afd", "defense.update=joint"],
    "cure": ["defense=cure"],
    "cure, joint": ["defense=cure", "defense.criterion=joint", "defense.loss=rgp"],
    "cure, soft": ["defense=cure", "defense.criterion=soft", "defense.loss=rgp_soft"],
    "cure, none": ["defense=cure", "defense.criterion=none"],
}  # fmt: skip


def build(said: dict[str, str], *overrides: str) -> RobustModule:
    cfg = config.compose([f"model={said['model']}", "data=cifar10", "channels_last=true", *overrides])
    module = build_module(cfg).train()
    made = module.configure_optimizers()
    module.raw_optimizers = lambda: made  # type: ignore[method-assign]
    return module


def step(module: RobustModule, batch: Batch, precision: str) -> float:
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "bf16-mixed" else nullcontext():
        module.training_step(batch, 0)
    return time.perf_counter() - began


def count(module: RobustModule, batch: Batch) -> dict[str, int]:
    """Passes through the feature maps of the net and of those beside it."""
    seen: Counter[str] = Counter()

    def forward(owner: nn.Module, args: object, output: Tensor) -> None:
        seen["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda g: seen.update(["backward"]))

    nets = [module.net, *(getattr(module, name) for name in ("teacher", "revision") if hasattr(module, name))]
    handles = [net.get_submodule(str(net.feature_layer)).register_forward_hook(forward) for net in nets]
    module.training_step(batch, 0)
    for handle in handles:
        handle.remove()
    return dict(seen)


def main() -> None:
    said = {"model": "resnet18", "batch": "32", "rounds": "5", "precision": "32-true"}
    said |= dict(a.split("=", 1) for a in sys.argv[1:])
    n = int(said["batch"])
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(n, 3, 32, 32, generator=g), torch.randint(10, (n,), generator=g), 0, n)
    modules = {name: build(said, *overrides) for name, overrides in CELLS.items()}
    passes = {name: count(module, batch) for name, module in modules.items()}  # and warms up
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(int(said["rounds"])):
        for name, module in modules.items():
            seconds[name].append(step(module, batch, said["precision"]))
    print(f"{'cell':12} {'forward':>8} {'backward':>8} {'s/step':>8} {'ratio':>6}")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["at"], strict=True))
        row = f"{passes[name]['forward']:8} {passes[name]['backward']:8} {statistics.median(times):8.3f} {ratio:6.2f}"
        print(f"{name:12} {row}")
    print(json.dumps(said | {"threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
