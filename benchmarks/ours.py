"""The framework's side: cells as a user would train them, one step of theirs, and what it consists of."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from benchmarks.machine import flops
from benchmarks.options import Options
from omegaconf import DictConfig
from torch import Tensor, nn

from redoubt import config
from redoubt.build import build_module
from redoubt.data import Batch
from redoubt.defenses import RobustModule

#: CURE as its authors' code trains it (``experiment=cure_code_resnet18_cifar10``), for any net.
CURE_CODE = (
    "defense=cure", "defense.criterion=joint", "defense.loss=rgp", "defense.decay_warmup=true",
    "inner.eps=0.031", "inner.step=${ratio:0.007,0.031}", "optimizer.weight_decay=5.0e-4",
)  # fmt: skip
#: Those with a peer come first; the others are compared with PGD-AT's step alone.
CELLS: dict[str, tuple[str, ...]] = {
    "at": ("base=at",),
    "trades": ("base=trades",),
    "mart": ("base=mart",),
    "fsr": ("defense=fsr",),
    "afd": ("defense=afd",),
    "cure": ("defense=cure",),
    "cure_code": CURE_CODE,
    "at_awp": ("base=at", "awp.rho=0.005"),
    "afd_joint": ("defense=afd", "defense.update=joint"),
    "cure_soft": ("defense=cure", "defense.criterion=soft", "defense.loss=rgp_soft"),
    "cure_none": ("defense=cure", "defense.criterion=none"),
}


@functools.cache
def compose(o: Options, cell: str, *more: str, model: str | None = None, precision: str = "float32") -> DictConfig:
    """The config of a cell; the learning rate is small, so that training on noise stays finite."""
    words = [
        f"model={model or o.model}", "data=cifar10", "data.source=fake", "attack=none", "schedule=constant",
        "optimizer.lr=0.001", "channels_last=true", f"compile={o.compile or 'false'}",
        f"trainer={o.trainer}", "trainer.progress=false",
        f"trainer.precision={'bf16-mixed' if precision == 'bf16' else '32-true'}",
    ]  # fmt: skip
    return config.resolve(config.compose([*words, *CELLS[cell], *o.overrides, *more]))


def noise_batch(o: Options, module: RobustModule, size: int) -> Batch:
    """Images of noise and random labels, on the device."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(size, 3, module.image_size, module.image_size, generator=g)
    y = torch.randint(module.num_classes, (size,), generator=g)
    return Batch(x.to(o.device), y.to(o.device), 0, size)


def build(o: Options, cell: str, *more: str, model: str | None = None) -> RobustModule:
    """A cell's module with its optimizers, ready for ``training_step`` without a trainer."""
    return ready(build_module(compose(o, cell, *more, model=model)).to(o.device))


def countable(o: Options, cell: str, *more: str, model: str | None = None) -> tuple[RobustModule, Batch]:
    """A cell's module and two images to count operations with: not compiled and not folded, they bear known names."""
    o = dataclasses.replace(o, compile=False)
    module = build(o, cell, *more, model=model)
    module.fold = False
    return module, noise_batch(o, module, 2)


def gflop(call: Callable[[], object], batch: int) -> float:
    """GFLOP of a batch by a call with two images, since the operations grow with their number."""
    return flops(call) / 1e9 * batch / 2


def ready(module: RobustModule) -> RobustModule:
    """Does what Lightning does before the first step."""
    module.train()
    module.on_fit_start()
    made = module.configure_optimizers()
    module.raw_optimizers = lambda: made  # type: ignore[method-assign]
    return module


def autocast(o: Options, precision: str) -> AbstractContextManager[object]:
    """What Lightning's ``trainer.precision`` puts around a step."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(o.device.type, torch.bfloat16, cache_enabled=False)


def step(o: Options, module: RobustModule, batch: Batch, precision: str) -> None:
    """One training step as in a fit: crafting, update, and the look at whether losses stay finite."""
    with autocast(o, precision):
        module.training_step(batch, 0)
    module.watch.look(module.steps_done)


@contextmanager
def short_attack(o: Options, module: RobustModule) -> Iterator[None]:
    """The module's attack takes one step meanwhile: it warms a CPU up; CUDA graphs and compilers want all steps."""
    whole = module.inner
    if o.device.type == "cpu" and not o.compile:
        module.inner = copy.copy(whole)
        module.inner.steps, module.inner.stages = 1, []
    yield
    module.inner = whole


def craft(o: Options, module: RobustModule, batch: Batch, precision: str) -> Tensor:
    """The crafting of a step alone."""
    with autocast(o, precision):
        return module.craft(batch.x.contiguous(memory_format=module.format), batch.y)


def passes(module: RobustModule, batch: Batch) -> dict[str, int]:
    """Forwards and backwards of one step through the last feature map of the net and of those beside it."""
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
    return {"forward": seen["forward"], "backward": seen["backward"]}
