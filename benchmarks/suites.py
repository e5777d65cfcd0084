"""Evaluation suites beside the same attacks of torchattacks called one after the other, and beside pyautoattack."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyautoattack
import torch
import torchattacks
from benchmarks import ours
from benchmarks.measure import Call, Row, Section, alternate, compared, seconds_on
from benchmarks.options import Options
from torch import Tensor, nn

from redoubt.attacks.base import library_seed
from redoubt.build import build_module
from redoubt.defenses import RobustModule
from redoubt.errors import UserError, did_you_mean
from redoubt.evaluation.suite import Suite, suite
from redoubt.evaluation.verdicts import judge
from redoubt.runs.identity import plain

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


class Pair:
    """One net and its images, attacked by our suite and by the libraries.

    Labels are the net's own predictions, so that every image is attacked. Float32, as evaluation always is.
    """

    def __init__(self, o: Options) -> None:
        cfg = ours.compose(o, "at", "attack=fsr_suite", f"attack.eps={o.eps}")
        self.o, self.eps = o, float(cfg.attack.eps)
        self.module: RobustModule = build_module(cfg).to(o.device)
        net, size = self.module.net, self.module.image_size
        g = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (o.images, 3, size, size), generator=g, dtype=torch.uint8)
        self.x = (self.images.float() / 255).to(o.device)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0  # statistics of these images, or a fresh net's logits would hardly depend on them
        with torch.no_grad():
            net.train()(self.x)
            self.y = self.module.eval().net(self.x).argmax(1)
        self.theirs = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
        self.fsr = suite(plain(cfg.attack))

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
            return {name: (self.theirs(adv).argmax(1) == self.y).cpu() for name, adv in crafted.items()}

    def our_ensemble(self) -> Verdicts:
        return {"ensemble": self.ours(self.fsr, skip_broken=True)["ensemble"]}

    def their_ensemble(self) -> Verdicts:
        return {"ensemble": torch.stack(list(self.library(list(self.fsr.attacks)).values())).all(0)}

    def autoattack(self) -> Verdicts:
        attack = pyautoattack.AutoAttack(
            self.theirs, eps=self.eps, seed=library_seed(0, 0), version="standard", device=self.o.device
        )
        labels = attack.run_standard_evaluation(self.x, self.y, batch_size=self.o.images)[1]
        return {"autoattack": (labels == self.y).cpu()}

    def sides(self, name: str) -> tuple[Callable[[], Verdicts], Callable[[], Verdicts]]:
        """(ours, theirs) of a suite or of one of its attacks."""
        if name == "autoattack":
            cfg = ours.compose(self.o, "at", "attack=autoattack", f"attack.eps={self.o.eps}")
            chosen = suite(plain(cfg.attack))
            return lambda: self.ours(chosen), self.autoattack
        attacks = self.fsr.attacks
        if name == "ensemble":
            return self.our_ensemble, self.their_ensemble
        if name == "fsr_suite":
            return lambda: self.ours(self.fsr), lambda: self.library(list(attacks))
        if name not in attacks:
            raise UserError(
                f"suites={name} is not known{did_you_mean(name, ['fsr_suite', 'ensemble', 'autoattack', *attacks])}"
            )
        single = Suite(attacks={name: attacks[name]}, norm="linf", eps=self.eps)
        return lambda: self.ours(single), lambda: self.library([name])


def suites(o: Options) -> Section:
    """Seconds per suite, and how many verdicts agree."""
    title = f"Evaluation suites, {o.model}, {o.images} images at {o.eps}: seconds"
    section = Section("suite", title, ["suite", "side", "median", "min", "max", "n", "ratio", "right", "agree"])
    pair = Pair(o)
    for call in pair.sides("fgsm"):  # a whole suite is too long to be warmed up by itself
        call()
    for name in o.suites:
        section.rows += [{"suite": name, **row} for row in one(o, *pair.sides(name))]
    section.notes.append("right: share of the images that withstand all attacks; agree: equal verdicts.")
    section.notes.append("ensemble: fsr_suite where only that is asked for (evaluation.skip_broken=true).")
    section.notes.append("The library: torchattacks, its PGD loop with the margin's loss for C&W; pyautoattack.")
    return section


def one(o: Options, by_us: Callable[[], Verdicts], by_them: Callable[[], Verdicts]) -> list[Row]:
    """The rows of one suite."""
    found: dict[str, Verdicts] = {}

    def kept(side: str, call: Callable[[], Verdicts]) -> Call:
        return lambda: found.update({side: call()})

    sides = {"ours": kept("ours", by_us), "library": kept("library", by_them)}
    readings = alternate(sides, seconds_on(o.device), pairs=o.pairs, seconds=o.seconds, warm=False)
    mine, other = found["ours"], found["library"]
    agree = sum(int((mine[key] == other[key]).sum()) for key in other)
    total = sum(len(verdicts) for verdicts in other.values())
    right = torch.stack([mine[key] for key in other]).all(0).float().mean().item()
    return [{**row, "right": right, "agree": f"{agree} of {total}"} for row in compared(readings, "ours")]
