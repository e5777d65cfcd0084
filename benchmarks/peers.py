"""The base objectives as their authors train them: float32, NCHW, eager, plain PyTorch.

Written from the formulas in the papers and the order of operations of their code. Where that is not known, the cheaper
way is taken. A peer begins with the weights and hyper-parameters of one of our modules and, given the same random
numbers, computes the same losses (``tests/test_benchmarks.py``).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redoubt.defenses import RobustModule


class PGDAT:
    """PGD-AT (Madry et al., 2018): ``CE(x_adv, y)``.

    Args:
        module: Ours, of which weights and hyper-parameters are copied.
        net: In place of a copy of ``module.net``.
    """

    def __init__(self, module: RobustModule, net: nn.Module | None = None) -> None:
        net = copy.deepcopy(module.net) if net is None else net
        self.net = net.to(memory_format=torch.contiguous_format)
        inner, group = module.inner, module.optimizer_of(module.trained()).param_groups[0]
        self.eps, self.size, self.steps = inner.eps, inner.step_size, inner.steps
        self.uniform, self.clipped, self.sigma = inner.start == "uniform", inner.clip_start, inner.sigma
        self.sgd = {key: group[key] for key in ("lr", "momentum", "weight_decay")}
        self.beta = getattr(module.objective, "beta", None)
        self.optimizer = torch.optim.SGD(self.net.parameters(), **self.sgd)

    def step(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        """One training step; returns the loss.

        Args:
            x: Images [B, 3, H, W] in [0, 1].
            y: Labels [B].
            start: Where the attack begins; drawn where None.
        """
        return self.update(x, self.craft(x, y, start), y)

    def craft(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        """Training examples [B, 3, H, W], with the net in evaluation mode."""
        self.net.eval()
        adv = self.start(x) if start is None else start
        for _ in range(self.steps):
            adv = adv.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.raised(adv, x, y), [adv])
            adv = adv.detach() + self.size * gradient.sign()
            adv = torch.min(torch.max(adv, x - self.eps), x + self.eps).clamp(0.0, 1.0)
        return adv.detach()

    def start(self, x: Tensor) -> Tensor:
        """The random start."""
        if self.uniform:
            start = x + torch.empty_like(x).uniform_(-self.eps, self.eps)
        else:
            start = x + self.sigma * torch.randn_like(x)
        return start.clamp(0.0, 1.0) if self.clipped else start

    def raised(self, adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The loss that the attack raises."""
        return F.cross_entropy(self.net(adv), y)

    def loss(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """The training loss, with the net in training mode."""
        return F.cross_entropy(self.net(adv), y)

    def update(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        self.net.train()
        self.optimizer.zero_grad()
        loss = self.loss(x, adv, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class TRADES(PGDAT):
    """TRADES (Zhang et al., 2019): ``CE(x, y) + beta KL(p(x) || p(x_adv))``.

    The clean images go through the net in every step of the attack, and twice in the loss.
    """

    def raised(self, adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        target = F.softmax(self.net(x), dim=1)
        return F.kl_div(F.log_softmax(self.net(adv), dim=1), target, reduction="sum")

    def loss(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        natural = F.cross_entropy(self.net(x), y)
        target = F.softmax(self.net(x), dim=1)
        robust = F.kl_div(F.log_softmax(self.net(adv), dim=1), target, reduction="batchmean")
        return natural + self.beta * robust


class MART(PGDAT):
    """MART (Wang et al., 2020): boosted cross-entropy, and KL weighted by ``1 - p_y(x)``."""

    def loss(self, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        clean, crafted = self.net(x), self.net(adv)
        p_adv, p_clean = F.softmax(crafted, dim=1), F.softmax(clean, dim=1)
        first_two = torch.argsort(p_adv, dim=1)[:, -2:]
        wrong = torch.where(first_two[:, -1] == y, first_two[:, -2], first_two[:, -1])
        boosted = F.cross_entropy(crafted, y) + F.nll_loss((1.0001 - p_adv + 1e-12).log(), wrong)
        kl = F.kl_div((p_adv + 1e-12).log(), p_clean, reduction="none").sum(dim=1)
        p_true = p_clean.gather(1, y.unsqueeze(1)).squeeze(1)
        return boosted + self.beta * (kl * (1.0000001 - p_true)).mean()


def wrong_class(logits: Tensor, y: Tensor) -> Tensor:
    """The predicted class where it is wrong, else the second one [B], by sorting."""
    order = torch.argsort(logits.detach(), dim=1, descending=True)
    return torch.where(order[:, 0] == y, order[:, 1], order[:, 0])
