"""A training step of two and of three processes is the step of one process on the joint batch, for every defense."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import composed, refused
from tests.processes import on_ranks
from tests.test_matrix import BASES, DEFENSES
from torch import Tensor, nn

from redoubt.build import build_module, locate
from redoubt.config import compose, resolve
from redoubt.data import Batch
from redoubt.data.loader import share
from redoubt.defenses import RobustModule
from redoubt.defenses.gradients import Share
from redoubt.training.trainer import make_trainer

#: Rows of the steps' global batches: of an even one, and of an epoch's last, which ranks share unequally.
ROWS = (12, 7)


def grid() -> Iterator[tuple[str, ...]]:
    """Every defense with every base that it is defined with."""
    for defense in DEFENSES:
        bases = locate(str(compose([f"defense={defense}"]).defense["_target_"]), "defense").bases
        yield from ((f"defense={defense}", f"base={base}") for base in BASES if base in bases)


#: What else changes a step.
OPTIONS = (
    ("defense=afd", "base=at", "defense.update=joint", "optimizer.clip=0.1"),
    ("defense=cure", "base=at", "defense.loss=rgp", "defense.criterion=joint", "defense.freeze=update"),
    ("defense=cure", "base=trades", "defense.loss=rgp_soft", "defense.criterion=soft", "defense.exempt=classifier"),
    ("defense=fsr", "base=trades", "awp.rho=0.01", "trainer.accumulate=2", "optimizer.clip=0.1"),
    ("defense=none", "base=mart", "ema=wa", "label_smoothing=0.1", "optimizer=adamw"),
)


def build(*overrides: str, model: str) -> RobustModule:
    """In float64, where no sign of a gradient is a matter of rounding."""
    small = ["model.widths=[4,4,8,8]", "data=digits", "data.image_size=8", "inner.steps=2", "inner.step=0.5"]
    if "base=standard" in overrides:
        small = small[:-2]
    if "defense=cure" in overrides:
        small += ["defense.rate=1", "defense.decay=0.5"]
    words = [f"model={model}", "schedule=constant", "trainer=cpu", *small, *overrides]
    module = build_module(composed(*words)).double()
    if module.ema is not None:
        module.ema.restart()
    return module.train()


def freeze(module: RobustModule) -> RobustModule:
    """Its BatchNorm, where it has any, in evaluation mode: statistics that stay as they are."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    return module


def images(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (rows,), generator=g)


def steps(module: RobustModule, rank: int, world: int) -> dict[str, Tensor]:
    """A rank's training steps: what it has crafted, and all weights and averages afterwards."""
    found, craft, optimizers = {}, module.craft, module.configure_optimizers()
    module.raw_optimizers = lambda: optimizers  # type: ignore[method-assign]

    def noted(x: Tensor, y: Tensor) -> Tensor:
        adv = craft(x, y)
        mine.append(adv)
        assert len(x) <= stop - start  # no other rank's images
        return adv

    module.craft = noted  # type: ignore[method-assign]
    for step, rows in enumerate(ROWS):
        x, y = images(rows, step)
        start, stop = share(rows, rank, world)
        mine: list[Tensor] = []
        module.training_step(Batch(x[start:stop], y[start:stop], start, rows), step)
        found[f"adv{step}"] = torch.cat(mine)
    average = module.ema.average if module.ema is not None else {}
    return found | {k: v.clone() for k, v in module.state_dict().items()} | {f"ema.{k}": v for k, v in average.items()}


def all_steps(rank: int, world: int, modules: list[RobustModule]) -> list[dict[str, Tensor]]:
    return [steps(module, rank, world) for module in modules]


@functools.cache
def cells() -> tuple[dict[str, RobustModule], dict[str, dict[str, Tensor]]]:
    """Modules by name, with a frozen BatchNorm or without any, and what one process makes of each."""
    modules = {" ".join(words): freeze(build(*words, model="resnet_small")) for words in grid()}
    modules |= {" ".join(words): freeze(build(*words, model="cnn_small")) for words in OPTIONS}
    return modules, {name: steps(copy.deepcopy(module), 0, 1) for name, module in modules.items()}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_of_ranks_are_those_of_one_process_on_the_joint_batch(world: int, tmp_path: Path) -> None:
    """The last batch in unequal shares (3 and 4; 2, 2 and 3); each rank crafts its own images."""
    modules, alone = cells()
    assert len(modules) >= 14 + len(OPTIONS)
    found = on_ranks(world, tmp_path, all_steps, list(modules.values()))
    for number, (name, wanted) in enumerate(alone.items()):
        per_rank = [own[number] for own in found]
        for key, value in wanted.items():
            if key.startswith("adv"):
                torch.testing.assert_close(torch.cat([own[key] for own in per_rank]), value, atol=1e-9, rtol=0)
                continue
            for rank, own in enumerate(per_rank):
                torch.testing.assert_close(own[key], value, atol=1e-6, rtol=0, msg=f"{name} {key} of rank {rank}")
                assert torch.equal(own[key], per_rank[0][key]), (name, key)


def gradient(rank: int, world: int, module: RobustModule) -> list[Tensor]:
    """A rank's gradient of the loss on its share of seven images, and BatchNorm's statistics afterwards."""
    (x, y), (start, stop), params = images(7, 0), share(7, rank, world), module.trained()
    module.share = Share(start, stop - start, 7)
    part = (x[start:stop], x[start:stop], y[start:stop])
    (found,) = module.gradients(lambda *batch: [module.loss(*batch)], [params], *part)
    return [*(torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True))] + [
        b.clone() for b in module.moving_buffers()
    ]


def test_batch_norm_sees_each_ranks_own_images(tmp_path: Path) -> None:
    """``sync_batchnorm=false``: the gradient of each share at its own statistics; the running ones are the mean."""
    module = build("defense=fsr", "base=trades", "base.clean_forwards=2", model="resnet_small")
    params, world = module.trained(), 2
    parts = [gradient(rank, world, copy.deepcopy(module)) for rank in range(world)]
    found = on_ranks(world, tmp_path, gradient, module)
    for number, (a, b) in enumerate(zip(*parts, strict=True)):
        wanted = a + b if number < len(params) else (a + b) / 2
        for own in found:
            torch.testing.assert_close(own[number], wanted, atol=1e-6, rtol=0)
    assert len(parts[0]) > len(params)


def test_sync_batchnorm_wants_gpus(cell: Any, tmp_path: Path) -> None:
    refused(lambda: make_trainer(cell("trainer.sync_batchnorm=true"), tmp_path, []), "trainer.sync_batchnorm", "GPUs")
    assert resolve(compose(["trainer=ddp_cpu"])).trainer.sync_batchnorm is False
