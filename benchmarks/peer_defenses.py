"""FSR, AFD and CURE as their authors train them; see ``benchmarks.peers``."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.peers import MART, PGDAT, TRADES, wrong_class
from torch import Tensor, nn

from redoubt.defenses import RobustModule
from redoubt.defenses.afd import AFD as OurAFD
from redoubt.defenses.cure import CURE as OurCURE
from redoubt.defenses.fsr import FSR as OurFSR
from redoubt.defenses.fsr import FSRLayer

SMALL = 1e-8


class SeparateRecalibrate(nn.Module):
    """FSR's module behind the one that it replaces: a two-way Gumbel softmax over all activations of the map.

    Args:
        ours: Whose submodules it takes.
    """

    def __init__(self, ours: FSRLayer) -> None:
        super().__init__()
        self.inner, self.head = ours.inner, ours.head
        self.separation, self.recalibration = ours.separation, ours.recalibration
        self.tau = ours.tau
        self.sides: list[Tensor] = []
        self.draw: Callable[[Tensor], Tensor] = torch.rand_like

    def forward(self, x: Tensor) -> Tensor:
        f = self.inner(x)
        mask = self.mask(self.separation(f))
        positive, negative = mask * f, (1 - mask) * f
        recalibrated = negative + (1 - mask) * self.recalibration(negative)
        if self.training:
            maps = (positive, negative, recalibrated)
            self.sides = [self.head(F.adaptive_avg_pool2d(side, 1).flatten(1)) for side in maps]
        return positive + recalibrated

    def mask(self, r: Tensor) -> Tensor:
        s = torch.sigmoid(r).reshape(len(r), 1, -1)
        logits = torch.cat([(s + SMALL).log(), (1 - s + SMALL).log()], dim=1)
        u = self.draw(logits) if self.training else torch.full_like(logits, 0.5)
        gumbel = -(-(u + SMALL).log() + SMALL).log()
        return F.softmax((logits + gumbel) / (self.tau + SMALL), dim=1)[:, 0].reshape(r.shape)


class FSR(PGDAT):
    """Feature Separation and Recalibration (Kim et al., 2023) on PGD-AT."""

    def __init__(self, module: RobustModule) -> None:
        ours = cast(OurFSR, module)
        net = copy.deepcopy(ours.net)
        for name, layer in list(net.named_modules()):
            if isinstance(layer, FSRLayer):
                net.set_submodule(name, SeparateRecalibrate(layer))
        super().__init__(ours, net)
        self.layers = [layer for layer in net.modules() if isinstance(layer, SeparateRecalibrate)]
        self.lambda_sep, self.lambda_rec = ours.lambda_sep, ours.lambda_rec

    def loss(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        logits = self.net(adv)
        wrong = wrong_class(logits, y)
        sep, rec = logits.new_zeros(()), logits.new_zeros(())
        for layer in self.layers:
            positive, negative, recalibrated = layer.sides
            sep = sep + (F.cross_entropy(positive, y) + F.cross_entropy(negative, wrong)) / len(self.layers)
            rec = rec + F.cross_entropy(recalibrated, y) / len(self.layers)
        return F.cross_entropy(logits, y) + self.lambda_sep * sep + self.lambda_rec * rec


class Disentangled(nn.Module):
    """AFD's net: the feature's two linear maps and one classifier for both.

    Args:
        backbone: With ``forward_features``, ``forward_head`` and ``get_classifier``.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        width = self.classifier.in_features
        like = {"device": self.classifier.weight.device, "dtype": self.classifier.weight.dtype}
        self.d1, self.d2 = (nn.Linear(width, width, bias=False, **like) for _ in range(2))
        for layer in (self.d1, self.d2):
            nn.init.eye_(layer.weight)

    @property
    def classifier(self) -> nn.Linear:
        return self.backbone.get_classifier()

    def feature(self, x: Tensor) -> Tensor:
        return self.backbone.forward_head(self.backbone.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.d1(self.feature(x)))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f1 and f2."""
        f = self.feature(x)
        return self.d1(f), self.d2(f.detach())


class AFD(PGDAT):
    """Adversarial Fine-tuning via Disentanglement (Zhou et al., 2025): three optimizers, gradients that accumulate.

    The authors' order of backward and step cannot run in a PyTorch of today (weights change under a graph): all
    gradients are taken first, then the three steps.
    """

    def __init__(self, module: RobustModule) -> None:
        ours = cast(OurAFD, module)
        self.student = Disentangled(copy.deepcopy(ours.teacher).requires_grad_(True))
        super().__init__(ours, self.student)
        self.teacher = copy.deepcopy(ours.teacher).to(memory_format=torch.contiguous_format).eval()
        self.average, self.updates = copy.deepcopy(self.net), 0
        self.alpha, self.beta, self.gamma = ours.alpha, ours.beta, ours.gamma
        self.theta = [p for name, p in self.net.named_parameters() if name != "d2.weight"]
        self.optimizers = [torch.optim.SGD(ps, **self.sgd) for ps in ([self.student.d2.weight], self.theta, self.theta)]

    def update(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        self.net.train()
        self.net.zero_grad()
        f1, f2 = self.student.both(adv)
        z1, z2 = self.student.classifier(f1), self.student.classifier(f2)
        with torch.no_grad():
            taught = self.teacher.forward_head(self.teacher.forward_features(x), pre_logits=True)
        neg = self.alpha * F.cross_entropy(z2, wrong_class(z1, y))
        cos = self.beta * F.cosine_similarity(f1, f2).mean()
        robust = F.cross_entropy(z1, y) + self.gamma * (1 - F.cosine_similarity(f1, taught).mean())
        neg.backward(retain_graph=True)
        first = self.student.d2.weight.grad.clone()
        cos.backward(retain_graph=True)
        second = [p.grad.clone() for p in self.theta]
        robust.backward()
        third = [p.grad for p in self.theta]
        self.student.d2.weight.grad = first
        self.optimizers[0].step()
        for optimizer, gradients in zip(self.optimizers[1:], (second, third), strict=True):
            for p, g in zip(self.theta, gradients, strict=True):
                p.grad = g
            optimizer.step()
        self.follow()
        return (neg + cos + robust).detach()

    @torch.no_grad()
    def follow(self) -> None:
        """The moving average of parameters and buffers."""
        decay = min(0.999, (self.updates + 1) / (self.updates + 10))
        now = self.net.state_dict()
        for name, average in self.average.state_dict().items():
            average.copy_(decay * average + (1 - decay) * now[name])
        self.updates += 1


class CURE(PGDAT):
    """Conserve, Update, Revise (Gowda et al., 2024): the printed algorithm, or the authors' mode ``rgp``."""

    def __init__(self, module: RobustModule) -> None:
        ours = cast(OurCURE, module)
        super().__init__(ours)
        self.printed = ours.criterion == "rgp"
        self.revision = copy.deepcopy(self.net).requires_grad_(False)
        self.alpha, self.gamma, self.percentile = ours.alpha, ours.gamma, ours.percentile
        self.rate, self.decay, self.steps_done = ours.rate, ours.decay, 0
        self.masked = {name: p for name, p in self.net.named_parameters() if name in set(ours.masked)}
        self.coin: Callable[[], float] = random.random
        self.target = torch.empty(0)

    def craft(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        self.net.eval()
        with torch.no_grad():
            self.target = F.softmax(self.net(x), dim=1)
        return super().craft(x, y, start)

    def raised(self, adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(self.net(adv), dim=1), self.target, reduction="sum")

    def update(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        if self.printed:
            self.revise(self.decay)
        self.net.train()
        self.optimizer.zero_grad()
        clean, crafted = self.net(x), self.net(adv)
        ce, ce_adv = F.cross_entropy(clean, y), F.cross_entropy(crafted, y)
        loss = self.gamma * self.consistency(x, adv, clean, crafted)
        weights = list(self.masked.values())
        if self.printed:
            natural = torch.autograd.grad(ce, weights, retain_graph=True)
            robust = torch.autograd.grad(ce_adv, weights, retain_graph=True)
            pairs = zip(natural, robust, strict=True)
            scores = [self.alpha * n.abs() + (1 - self.alpha) * a.abs() for n, a in pairs]
            kl = F.kl_div(F.log_softmax(crafted, dim=1), F.softmax(clean, dim=1), reduction="batchmean")
            loss = loss + ce + self.beta * kl
            loss.backward()
        else:
            loss = loss + self.alpha * ce + (1 - self.alpha) * ce_adv
            loss.backward()
            scores = [p.grad.abs() for p in weights]
        for p, score in zip(weights, scores, strict=True):
            p.grad[score < np.percentile(score.cpu().numpy(), self.percentile)] = 0.0
        self.optimizer.step()
        self.steps_done += 1
        if not self.printed:
            self.revise(min(1 - 1 / (self.steps_done + 1), self.decay))
        return loss.detach()

    @torch.no_grad()
    def consistency_targets(self, x: Tensor, adv: Tensor) -> list[Tensor]:
        """What the revision model says of both, with batch statistics."""
        self.revision.train()
        return [F.softmax(self.revision(images), dim=1) for images in (x, adv)]

    def consistency(self, x: Tensor, adv: Tensor, clean: Tensor, crafted: Tensor) -> Tensor:
        pairs = zip(self.consistency_targets(x, adv), (clean, crafted), strict=True)
        terms = [F.kl_div(F.log_softmax(z, dim=1), target, reduction="batchmean") for target, z in pairs]
        return terms[0] + terms[1]

    @torch.no_grad()
    def revise(self, decay: float) -> None:
        """With probability ``rate`` the revision model moves towards the student."""
        if self.coin() < self.rate:
            for kept, p in zip(self.revision.parameters(), self.net.parameters(), strict=True):
                kept.mul_(decay).add_(p, alpha=1 - decay)


#: The peer of each cell that has one.
PEERS: dict[str, type[PGDAT]] = {
    "at": PGDAT, "trades": TRADES, "mart": MART, "fsr": FSR, "afd": AFD, "cure": CURE, "cure_code": CURE,
}  # fmt: skip
