"""Steps, attacks and evaluations on torch's meta device: what a GPU would refuse or wait for, found without one.

Not seen are an optimizer's fused step and autocast, neither of which meta has, and what CUDA's own kernels do.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import composed
from tests.test_matrix import MODELS
from tests.test_steps_of_ranks import OPTIONS, grid
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from redoubt import rng
from redoubt.attacks import PGD, MultiTargeted, WhiteBox
from redoubt.attacks.base import Draws
from redoubt.attacks.corruptions import KINDS, Corruption
from redoubt.attacks.whitebox import LOSSES, Reached
from redoubt.build import build_module
from redoubt.data import Batch
from redoubt.data.augment import BUILT_IN
from redoubt.data.loader import EvalLoader, TrainLoader
from redoubt.defenses import CURE, RobustModule
from redoubt.defenses.gradients import LossScale
from redoubt.defenses.tally import LOOK_EVERY, Tally
from redoubt.evaluation import verdicts
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import Judge, full_precision, own_randomness
from redoubt.nets import attack_mode

META = torch.device("meta")
aten = torch.ops.aten
#: What torch says of operations that a GPU's host has to wait for.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Refused(AssertionError):
    """A GPU would refuse this operation, or the host would wait for it."""


class Device(TorchDispatchMode):
    """Let meta tensors stand for a GPU's, in forwards and in backwards; raise `Refused`, which names the operation.

    Refused are

    - operations of a meta tensor and a CPU tensor that has dimensions, unless they copy the one onto the other: torch
      itself lets some pass, and convolutions and linear layers then return garbage,
    - reads of values by the host, and results whose shape depends on values, for which it has to read them,
    - copies from the host that it waits for, as in ``torch.tensor(..., device=...)``, unless ``uploads``,
    - random numbers by a generator that `rng.generator` made for another device.

    Attributes:
        seen: How often each operation was called on meta tensors.
        written: The ids of those that operations have changed in place.
    """

    def __init__(self, uploads: bool = False) -> None:
        super().__init__()
        self.uploads = uploads
        self.seen: Counter[Any] = Counter()
        self.written: set[int] = set()
        self.seeds: set[int] = set()

    def generator(self, seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return what `rng.generator` does, and note it where it is for the meta device."""
        made = rng.generator(seed, purpose, *counters, device=device)
        if torch.device(device) == META:
            self.seeds.add(made.initial_seed())  # a name's own; the object itself is another one in an operation
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        given = list(tensors(values))
        there = any(t.is_meta for t in given) or kwargs.get("device") == META
        for value in values:
            if isinstance(value, torch.Generator) and there != (value.initial_seed() in self.seeds):
                raise Refused(f"{func}: draws by a generator of another device")
        if not there:
            return func(*args, **kwargs)
        self.seen[func] += 1
        if func._schema.name.endswith("_"):
            self.written.update(map(id, tensors(args[:1])))
        if func in (aten._to_copy.default, aten.copy_.default):
            return self.copy(func, args, kwargs)
        if func is aten.lift_fresh.default and not self.uploads:
            raise Refused("torch.tensor: copies from the host, which waits")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            reads = any(t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1]))
        else:
            reads = not READING.isdisjoint(func.tags)
        if reads:
            raise Refused(f"{func}: the host reads a value")
        if mixed := [tuple(t.shape) for t in given if not t.is_meta and t.dim()]:
            raise Refused(f"{func}: mixes meta tensors with CPU tensors of shapes {mixed}")
        return func(*args, **kwargs)

    def copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Copy between the devices as a GPU does, where the host does not wait for it."""
        inplace = func is aten.copy_.default
        source, to = (args[1], args[0].device) if inplace else (args[0], kwargs.get("device") or args[0].device)
        waits = not (kwargs.get("non_blocking") or (inplace and args[2:] == (True,)))
        if source.is_meta and to != META:
            if waits or not inplace:
                raise Refused(f"{func}: copies to the host, which reads it")
            return args[0]  # as if the copy had not arrived yet
        if not source.is_meta and waits and not self.uploads:
            raise Refused(f"{func}: copies from the host, which waits")
        return func(*args, **kwargs)


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operation's arguments."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


#: Whatever draws random numbers.
DRAWING = [m for m in sys.modules.values() if m is not rng and getattr(m, "generator", None) is rng.generator]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Return a `Device`, to be entered, that knows of the generators that are made."""
    mode = Device()
    for module in DRAWING:
        monkeypatch.setattr(module, "generator", mode.generator)
    return mode


# ---- the mode itself ---------------------------------------------------------------------------------------------


def masked(t: Tensor, mask: Tensor, value: Tensor | float) -> Tensor:
    t = t.clone()
    t[mask] = value
    return t


def backward(t: Tensor, hook: Callable[[Tensor], object]) -> Tensor:
    t = t.clone().requires_grad_()
    t.register_hook(hook)
    return torch.autograd.grad(t.sum(), t)[0]


#: Functions of a tensor [3], a mask [3] and numbers int64 [3], all on meta.
WRONG: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "add": lambda t, m, i: t + torch.ones(3),
    "foreach": lambda t, m, i: torch._foreach_add_([t], [torch.ones(3)]),
    "conv2d": lambda t, m, i: F.conv2d(torch.ones(1, 3, 4, 4), t.view(1, 3, 1, 1)),
    "linear": lambda t, m, i: F.linear(torch.ones(2, 3), t.view(1, 3)),
    "index on the CPU": lambda t, m, i: t[torch.tensor([0, 1])],
    "mixed in backward": lambda t, m, i: backward(t, lambda g: g + torch.ones(3)),
    "item": lambda t, m, i: t.sum().item(),
    "int": lambda t, m, i: int(i.sum()),
    "bool": lambda t, m, i: bool(t.sum()),
    "if any": lambda t, m, i: 1 if m.any() else 0,
    "item in backward": lambda t, m, i: backward(t, lambda g: g.sum().item()),
    "numpy": lambda t, m, i: t.numpy(),
    "tolist": lambda t, m, i: t.tolist(),
    "tolist of a scalar": lambda t, m, i: t.sum().tolist(),
    "cpu": lambda t, m, i: t.cpu(),
    "copy to the host": lambda t, m, i: torch.ones(3).copy_(t),
    "equal": lambda t, m, i: torch.equal(t, t),
    "allclose": lambda t, m, i: torch.allclose(t, t),
    "in": lambda t, m, i: 1.0 in t,
    "nonzero": lambda t, m, i: m.nonzero(),
    "where": lambda t, m, i: torch.where(m),
    "mask": lambda t, m, i: t[m],
    "to a mask": lambda t, m, i: masked(t, m, torch.ones_like(t)),
    "unique": lambda t, m, i: t.unique(),
    "one_hot": lambda t, m, i: F.one_hot(i),
    "torch.tensor": lambda t, m, i: torch.tensor(1.0, device=META),
    "as_tensor": lambda t, m, i: torch.as_tensor(1.0, device=META),
    "copy from the host": lambda t, m, i: t.clone().copy_(torch.ones(3)),
    "to": lambda t, m, i: torch.ones(3).to(META),
    "drawn by the CPU's": lambda t, m, i: torch.rand(3, generator=rng.generator(0, "x"), device=META),
}
RIGHT: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "number": lambda t, m, i: t + 1.0,
    "scalar of the CPU": lambda t, m, i: t + torch.tensor(1.0),
    "numbers": lambda t, m, i: t[i],
    "to numbers": lambda t, m, i: masked(t, i, torch.ones_like(t)),
    "number to a mask": lambda t, m, i: masked(t, m, 0.0),
    "where": lambda t, m, i: torch.where(m, t, 0.0),
    "to": lambda t, m, i: torch.ones(3).to(META, non_blocking=True),
    "another type": lambda t, m, i: t.double(),
    "iteration": lambda t, m, i: next(iter(t)),
    "backward": lambda t, m, i: backward(t, lambda g: g * 2),
}


def example() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(3, dtype=dtype, device=META) for dtype in (torch.float32, torch.bool, torch.int64))


@pytest.mark.parametrize("name", WRONG)
def test_what_a_gpu_refuses_or_waits_for_is_refused(name: str, device: Device) -> None:
    # numpy() calls no operation; torch itself refuses it on meta.
    with device, pytest.raises(TypeError if name == "numpy" else Refused):
        WRONG[name](*example())


@pytest.mark.parametrize("name", RIGHT)
def test_what_a_gpu_does_without_the_host_passes(name: str, device: Device) -> None:
    with device:
        found = RIGHT[name](*example())
    assert isinstance(found, Tensor)
    assert found.is_meta
    assert device.seen


def test_a_copy_that_the_host_does_not_wait_for_passes(device: Device) -> None:
    host = torch.ones(3)
    with device:
        assert host.copy_(example()[0], non_blocking=True) is host


def test_the_generator_for_meta_is_of_the_cpu(device: Device) -> None:
    ours, cpu = (rng.generator(3, "x", 1, device=where) for where in (META, "cpu"))
    assert ours.device.type == "cpu"
    assert ours.initial_seed() == cpu.initial_seed()
    with device:
        assert torch.rand(3, generator=device.generator(3, "x", device=META), device=META).is_meta
    with device, pytest.raises(Refused, match="generator"):
        torch.rand(3, generator=device.generator(3, "x", device=META))


# ---- training steps ----------------------------------------------------------------------------------------------


def build(*overrides: str, model: str = "resnet_small") -> RobustModule:
    """Return a module on meta that is ready to train, as on any other device."""
    small = ["data=digits", "data.image_size=16", "validation.steps=1", "validation.step=1"]
    if model in ("resnet_small", "cnn_small"):
        small.append("model.widths=[4]" if model == "resnet_small" else "model.widths=[4,4]")
    if "base=standard" not in overrides:
        small += ["inner.steps=1", "inner.step=1"]
    if "defense=cure" in overrides:
        small += ["defense.rate=1", "defense.decay=0.5"]
    module = build_module(composed(f"model={model}", "schedule=constant", "trainer=cpu", *small, *overrides))
    module.train().to(META)
    module.on_fit_start()
    optimizers = [with_foreach(optimizer) for optimizer in module.configure_optimizers()]
    module.raw_optimizers = lambda: optimizers  # type: ignore[method-assign]
    return module


def with_foreach(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer with the foreach form of its step: torch refuses the fused one on meta."""
    for group in optimizer.param_groups:
        group |= {"fused": False, "foreach": True}

    def unfused(optimizer: Any, args: object, kwargs: object) -> None:
        assert optimizer.found_inf.is_meta
        del optimizer.found_inf  # that only the fused form reads

    optimizer.register_step_pre_hook(unfused)
    return optimizer


def batch(rows: int = 6, size: int = 16) -> Batch:
    x, y = torch.empty(rows, 3, size, size, device=META), torch.empty(rows, dtype=torch.int64, device=META)
    return Batch(x, y, 0, rows)


def train(module: RobustModule, device: Device) -> None:
    """Take one training step, with what Lightning calls after it, and see that it was taken on meta."""
    moved, average = module.trained(), [] if module.ema is None else list(module.ema.average.values())
    if isinstance(module, CURE) and not module.warming:
        moved += module.revision.parameters()  # with rate=1 it moves in every step
    device.written.clear()
    with device:
        module.training_step(batch(), 0)
        module.on_train_batch_end(None, batch(), 0)
    assert {*map(id, moved), *map(id, average)} <= device.written
    assert device.seen[aten.convolution_backward.default]
    state = [*module.state_dict().values(), *average, *module.tally.sums.values(), module.watch.bad]
    state += [t for o in module.raw_optimizers() for p in o.state for k, t in o.state[p].items() if k != "step"]
    assert all(t.is_meta for t in state)


CELLS = list(grid())
#: One of each defense.
FEW = [next(cells) for _, cells in itertools.groupby(CELLS, lambda words: words[0])]
#: What else changes a step, beside `OPTIONS`.
MORE = (
    ("defense=none", "base=at", "threat.norm=l2", "trainer.accumulate=2", "optimizer.clip=0.1", "channels_last=true"),
    ("defense=cure", "base=mart", "awp.rho=0.01", "ema.decay=0.9", "defense.freeze=update"),
)
SLOW = (
    *[words for words in OPTIONS if "awp.rho=0.01" in words],
    ("defense=cure", "base=at", "defense.freeze=update", "optimizer=adamw"),
    ("defense=afd", "base=trades", "awp.rho=0.01", "ema.warmup=true"),
    ("defense=fsr", "base=at", "defense.at=[bn1,layer1]", "inner.keep_best=true", "model.normalize=true"),
)
STEPS = [*CELLS, *(words for words in OPTIONS if words not in SLOW), *MORE]
STEPS += [pytest.param(words, marks=pytest.mark.slow) for words in SLOW]


@pytest.mark.parametrize("words", STEPS, ids=" ".join)
def test_a_step(words: tuple[str, ...], device: Device) -> None:
    train(build(*words), device)


def test_a_step_with_a_loss_scale(device: Device) -> None:
    """That of ``16-mixed``, without its autocast, which meta lacks."""
    module = build("defense=none", "base=at", "optimizer.clip=0.1", "inner.stages=[[0,1,1]]")
    module.scale = LossScale(META)
    train(module, device)
    assert all(t.is_meta for t in module.scale.state_dict().values())


def test_the_copy_of_the_watch_is_not_waited_for(device: Device) -> None:
    """It begins after the tenth step and is read after the twentieth; the first step is one of CURE's warm-up."""
    more = ("defense.warmup_epochs=1", "defense.criterion=none", "defense.decay_warmup=true")
    module = build("defense=cure", "base=at", *more)
    for done in (0, LOOK_EVERY - 1, 2 * LOOK_EVERY - 1):
        module.steps_done = done
        train(module, device)
    assert module.watch.shown == 0


LIBRARY = {"torchvision": "shufflenet_v2_x0_5", "timm": "resnet10t"}


@pytest.mark.slow
@pytest.mark.parametrize("words", FEW, ids=" ".join)
@pytest.mark.parametrize("model", MODELS)
def test_a_step_of_every_net(model: str, words: tuple[str, ...], device: Device) -> None:
    if model == "timm":
        pytest.importorskip("timm")
    more = [f"model.name={LIBRARY[model]}"] if model in LIBRARY else []
    train(build(*words, *more, model=model), device)


@pytest.mark.parametrize("augment", BUILT_IN)
def test_batches_are_made_where_the_images_are(augment: str, device: Device) -> None:
    data = {"images": torch.empty(5, 3, 16, 16, dtype=torch.uint8, device=META), "batch_size": 4}
    data["labels"] = torch.empty(5, dtype=torch.int64, device=META)
    loader = TrainLoader(**data, augment=BUILT_IN[augment])
    order = loader.order(0)  # copied from the host, once in an epoch
    evaluated = iter(EvalLoader(**data))
    with device:
        batches = [loader.batch(order, 0, 0), *evaluated]
    assert [len(b.x) for b in batches] == [4, 4, 1]
    assert all(b.x.is_meta and b.y.is_meta for b in batches)
    assert device.seen[aten.index.Tensor] == 6


# ---- attacks and evaluations -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10)]
    return nn.Sequential(*layers).eval().requires_grad_(False).to(META)


PGDS: list[dict[str, Any]] = [
    {},
    {"start": "normal", "clip_start": False},
    {"start": "none", "step_abs": 0.1, "keep_best": True},
    {"keep_best": True, "patience": 1},
    {"steps": 0},
]


@pytest.mark.parametrize("options", PGDS, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd(norm: str, options: dict[str, Any], net: nn.Module, device: Device) -> None:
    pgd = PGD(**{"eps": "8/255", "norm": norm, "steps": 2, "step": 0.5, **options})
    x, y = batch()[:2]
    eps = None if options else torch.empty(len(x), device=META)

    def loss(adv: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        z = net(adv)
        losses = F.cross_entropy(z, y, reduction="none")
        return (losses, z.argmax(1) != y) if pgd.patience else losses

    with device:
        start = pgd.start_point(x, eps=eps, generator=device.generator(0, "x", device=META))
        found = pgd(loss, x, start=start, eps=eps, step_size=eps)
    assert found.is_meta
    assert found.shape == x.shape
    assert device.seen[aten.convolution_backward.default] == pgd.steps


def white_box() -> Iterator[WhiteBox]:
    """Attacks of one attempt, too short to look for images that repeat themselves."""
    for loss in LOSSES:
        yield WhiteBox(eps=0.1, loss=loss, steps=2, start="uniform")
    yield WhiteBox(eps=0.1, norm="l2", steps=2, step=0.5, keep_best=True, eot=2)
    yield WhiteBox(eps=0.1, steps=0)
    yield MultiTargeted(eps=0.1, steps=2, step=0.5, targets=1)


def test_attacks_by_gradient(net: nn.Module, device: Device) -> None:
    x, y = batch()[:2]
    attacks = list(white_box())
    with device, own_randomness(0, META):
        for attack in attacks:
            assert attack(net, x, y, Draws(device=META)).is_meta
        more = WhiteBox(eps=0.1, steps=4)(net, x, y, Draws(device=META), after=Reached(2, x, x))
    assert more.is_meta
    assert device.seen[aten.convolution_backward.default] == sum(a.steps * a.eot for a in attacks) + 1


def test_attacks_read_where_they_say_so(net: nn.Module, device: Device) -> None:
    x, y = batch()[:2]
    each = torch.empty(len(x), dtype=torch.int64, device=META)
    with device:
        with pytest.raises(Refused, match="_local_scalar_dense"):  # whether all images still move
            WhiteBox(eps=0.1, steps=8)(net, x, y, Draws(device=META))
        with pytest.raises(Refused, match="index"):  # which images still stand
            WhiteBox(eps=0.1, steps=1, start="uniform", restarts=2)(net, x, y, Draws(device=META))
        with pytest.raises(Refused, match="_local_scalar_dense"):  # the largest number of steps
            PGD(eps=0.1)(lambda adv: net(adv).sum(1), x, start=x, steps=each)


@pytest.mark.slow
def test_corruptions(device: Device) -> None:
    """They copy tables from the host."""
    x, y = batch(size=32)[:2]
    device.uploads = True
    with device:
        for kind in sorted({*KINDS} - {"jpeg_compression"}):  # that encodes on the CPU
            assert Corruption(kind=kind, severity=3)(nn.Identity(), x, y, Draws(device=META)).is_meta


@pytest.mark.parametrize("words", FEW, ids=" ".join)
def test_an_evaluation(words: tuple[str, ...], device: Device) -> None:
    """Its forwards and backwards, up to where verdicts are read, and the validation after an epoch."""
    module = build(*words, "ema.decay=0.9")
    x, y = batch()[:2]
    pgd = PGD(eps=0.1, steps=1, step=1)
    attacks = [WhiteBox(eps=0.1, steps=1, step=1, loss=loss) for loss in ("ce", "margin", "dlr")]
    judge = Judge(module, Suite(), chunk=len(x), seed=0, device=META)
    module._validation = Tally()
    found: list[Tensor] = []
    with device, full_precision(), attack_mode(module):
        for weights in module.weight_sets:
            module.weights = weights
            with module.evaluated_weights(), module.folded(x):
                found.append(judge.logits(x))
            found.append(module.deployed()(x))
        with module.folded(x):
            z, slopes = judge.look(x, y, attacks)
            adv = attacks[0](judge.logits, x, y, Draws(device=META))
        for loss in module.adaptive(x, y).values():
            found.append(pgd(loss, x, start=pgd.start_point(x, generator=device.generator(0, "x", device=META))))
        found += [z, *slopes, adv, verdicts.correct(z, y), verdicts.difference(z, z), verdicts.bytes_of(adv)]
        for norm in ("linf", "l2"):
            found += [verdicts.distances(adv, x, norm), verdicts.rounded(adv, x, norm, 0.1)]
        module.validation_step(batch(), 0)
    assert all(t.is_meta for t in [*found, *module._validation.sums.values(), module.watch.bad])
    assert device.seen[aten.convolution_backward.default]
