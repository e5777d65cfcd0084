"""Evaluation suites beside the same attacks of torchattacks called one after the other, and beside pyautoattack."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyautoattack
import torch
import torchattacks
from benchmarks import ours
from benchmarks.measure import SIDES, Call, Row, Section, alternate, compared, seconds_on
from benchmarks.options import Options
from omegaconf import OmegaConf
from torch import Tensor, nn

from redoubt import config
from redoubt.attacks.base import library_seed
from redoubt.build import build_data
from redoubt.defenses import RobustModule
from redoubt.errors import UserError, did_you_mean
from redoubt.evaluation.suite import Suite, suite
from redoubt.evaluation.verdicts import judge
from redoubt.runs import running
from redoubt.runs.identity import plain
from redoubt.runs.loading import load
from redoubt.runs.store import Run
from redoubt.units import as_number

Verdicts = dict[str, Tensor]


class Margin(torchattacks.PGD):
    """The C&W of the papers' codes, PGD on the margin, in torchattacks' loop."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        adv = images.clone().detach()
        onehot = None
        for _ in range(self.steps):
            adv.requires_grad = True
            z = self.get_logits(adv)
            onehot = nn.functional.one_hot(labels, z.shape[1]) if onehot is None else onehot
            real, other = (onehot * z).sum(1), ((1 - onehot) * z - onehot * 10_000).amax(1)
            gradient = torch.autograd.grad(-(real - other + 50).clamp(min=0).sum(), adv)[0]
            adv = adv.detach() + self.alpha * gradient.sign()
            adv = torch.clamp(images + torch.clamp(adv - images, -self.eps, self.eps), 0, 1).detach()
        return adv


#: A net that a few seconds train against attacks on images that are everywhere: scikit-learn's digits.
TRAINED = (
    "model=resnet_small", "base=at", "data=digits", "inner.steps=3", "inner.step=0.5", "schedule=onecycle",
    "trainer.max_epochs=8", "data.probe=1", "channels_last=true", "attack=none", "trainer.progress=false",
)  # fmt: skip


class Pair:
    """One net and its images, attacked by our suite and by the libraries, in float32 as evaluation always is.

    Args:
        o: What is measured.
        run: One of the store, with its test images and under its own threat; None: a fresh net and noise, with the
            net's own predictions for labels, so that every image is attacked.
    """

    def __init__(self, o: Options, run: Run | None) -> None:
        self.o = o
        self.module, self.images, labels, self.eps = self.of_run(run) if run else self.fresh()
        self.x, self.y = (self.images.float() / 255).to(o.device), labels.to(o.device)
        self.theirs = copy.deepcopy(self.module.net).to(memory_format=torch.contiguous_format)
        self.fsr = suite(plain(ours.compose(o, "at", "attack=fsr_suite", f"attack.eps={self.eps}").attack))

    def of_run(self, run: Run) -> tuple[RobustModule, Tensor, Tensor, float]:
        """A trained module in evaluation mode, test images uint8, their labels and eps."""
        cfg = OmegaConf.create(run.config())
        data = build_data(cfg)
        data.setup("test")
        images, labels = (tensor[: self.o.images] for tensor in data.arrays("test"))
        module = load(run, compile=False).to(self.o.device).eval()
        return module, images, labels, as_number(cfg.threat.eps, "threat.eps")

    def fresh(self) -> tuple[RobustModule, Tensor, Tensor, float]:
        """The same of noise; BatchNorm's statistics are those of the images, or all that the net says is one class."""
        module = ours.build(self.o, "at")
        g = torch.Generator().manual_seed(0)
        images = torch.randint(256, (self.o.images, 3, *2 * [module.image_size]), generator=g, dtype=torch.uint8)
        for norm in module.net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.0
        x = (images.float() / 255).to(self.o.device)
        with torch.no_grad():
            module.net.train()(x)
            labels = module.eval().net(x).argmax(1)
        return module, images, labels, as_number(self.o.eps, "eps")

    def ours(self, chosen: Suite, **options: bool) -> Verdicts:
        found = judge(
            self.module, self.images, self.y.cpu(), chosen, chunk=self.o.images, seed=0, device=self.o.device,
            progress=False, **options,
        )  # fmt: skip
        return {name: torch.from_numpy(verdicts) for name, verdicts in found.items()}

    def library(self, names: list[str]) -> Verdicts:
        eps, size = self.eps, self.eps / 10
        attacks = {
            "fgsm": lambda: torchattacks.FGSM(self.theirs, eps=eps),
            "pgd20": lambda: torchattacks.PGD(self.theirs, eps=eps, alpha=size, steps=20, random_start=False),
            "pgd100": lambda: torchattacks.PGD(self.theirs, eps=eps, alpha=size, steps=100, random_start=False),
            "cw": lambda: Margin(self.theirs, eps=eps, alpha=size, steps=30, random_start=False),
        }
        crafted = {name: attacks[name]()(self.x, self.y) for name in names} | {"natural": self.x}
        with torch.no_grad():
            right = {name: (self.theirs(adv).argmax(1) == self.y).cpu() for name, adv in crafted.items()}
        return {**right, "ensemble": torch.stack(list(right.values())).all(0)}

    def autoattack(self) -> Verdicts:
        attack = pyautoattack.AutoAttack(
            self.theirs, eps=self.eps, seed=library_seed(0, 0), version="standard", device=self.o.device
        )
        labels = attack.run_standard_evaluation(self.x, self.y, batch_size=self.o.images)[1]
        return {"autoattack": (labels == self.y).cpu()}

    def sides(self, name: str) -> dict[str, Callable[[], Verdicts]]:
        """Ours and theirs of a suite or of one of its attacks."""
        if name == "autoattack":
            cfg = ours.compose(self.o, "at", "attack=autoattack", f"attack.eps={self.eps}")
            chosen = suite(plain(cfg.attack))
            return {"ours": lambda: self.ours(chosen), "library": self.autoattack}
        attacks = self.fsr.attacks
        if name in ("fsr_suite", "ensemble"):
            skip = name == "ensemble"
            return {
                "ours": lambda: self.ours(self.fsr, skip_broken=skip),
                "library": lambda: self.library(list(attacks)),
            }
        if name not in attacks:
            known = ["fsr_suite", "ensemble", "autoattack", *attacks]
            raise UserError(f"suites={name} is not known{did_you_mean(name, known)}")
        single = Suite(attacks={name: attacks[name]}, norm="linf", eps=self.eps)
        return {"ours": lambda: self.ours(single), "library": lambda: self.library([name])}


def suites(o: Options) -> Section:
    """Seconds per suite, and how many verdicts agree."""
    title = f"Evaluation suites, {o.images} images: seconds"
    section = Section("suite", title, ["net", "suite", *SIDES, "right", "agree"])
    with tempfile.TemporaryDirectory() as folder:
        nets = {Path(o.run).name: Run(Path(o.run))} if o.run else {f"{o.model}, fresh": None, **trained(o, folder)}
        for net, run in nets.items():
            pair = Pair(o, run)
            for call in pair.sides("fgsm").values():  # a whole suite is too long to be warmed up by itself
                call()
            net = f"{net}, {255 * pair.eps:.3g}/255"
            for name in o.suites:
                section.rows += [{"net": net, "suite": name, **row} for row in one(o, pair.sides(name))]
    section.notes += [
        "right: share of the images that withstand all attacks; agree: verdicts equal to the library's.",
        "ensemble: fsr_suite with evaluation.skip_broken=true, beside all of the library's.",
        "The library: torchattacks, its PGD loop with the margin's loss for C&W; pyautoattack.",
    ]
    return section


def trained(o: Options, folder: str) -> dict[str, Run]:
    """A small net, trained there."""
    cfg = config.resolve(config.compose([*TRAINED, f"trainer={o.trainer}", f"paths.outputs={folder}"]))
    return {"resnet_small on digits": running.train(cfg, build_data(cfg))}


def one(o: Options, sides: Mapping[str, Callable[[], Verdicts]]) -> list[Row]:
    """The rows of one suite."""
    found: dict[str, Verdicts] = {}

    def kept(side: str, call: Callable[[], Verdicts]) -> Call:
        return lambda: found.update({side: call()})

    calls = {side: kept(side, call) for side, call in sides.items()}
    readings = alternate(calls, seconds_on(o.device), pairs=o.pairs, seconds=4 * o.seconds, warm=False)
    rows = compared(readings, "ours")
    for row in rows:
        mine, theirs = found[row["side"]], found["library"]
        shared = [key for key in theirs if key in mine]
        agree = sum(int((mine[key] == theirs[key]).sum()) for key in shared)
        row["agree"] = f"{agree} of {sum(len(theirs[key]) for key in shared)}"
        row["right"] = torch.stack([mine[key] for key in shared]).all(0).float().mean().item()
    return rows
