"""Gradient attacks for evaluation: FGSM, PGD on several losses, the PGD that papers call C&W, multi-targeted PGD."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redoubt.attacks.base import Attack, Draws, Logits
from redoubt.attacks.pgd import PGD
from redoubt.errors import UserError
from redoubt.objectives.base import kl_per_example, margin
from redoubt.units import as_number, as_whole

LOSSES = ("ce", "margin", "dlr", "kl")


@dataclass(frozen=True)
class Reached:
    """Where attacks of one path have come: ``steps`` steps to ``adv`` [B, 3, H, W], and the loss's gradient there."""

    steps: int
    adv: Tensor
    gradient: Tensor


class WhiteBox(Attack):
    """PGD on a loss of the logits.

    Args:
        eps, norm, steps, step, step_abs, start, sigma, clip_start: As of `redoubt.attacks.PGD`.
        loss: What is raised. ``ce``: cross-entropy; ``margin``: ``-max(z_y - max_{j != y} z_j + kappa, 0)``, which
            FSR's, CURE's, CIFS' and FAT's code call C&W (it is not the L2 attack of Carlini and Wagner); ``dlr``: the
            difference of logits ratio (Croce and Hein, 2020), ``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3))``;
            ``kl``: TRADES' ``KL(p(x) || p(x'))``, which knows no label.
        kappa: Confidence of the margin loss.
        restarts: Random starts; each after the first attacks only what still stands.
        eot: Forwards whose losses are averaged for a gradient (expectation over transformation), for a net whose
            forward is random.
        keep_best: An example stands still at its first misclassified iterate; one that has none ends at its highest
            loss. Without it the last iterate counts, as in the papers' protocols.

    Raises:
        UserError: A value out of range, or options that contradict each other.
    """

    folds = True

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "linf",
        loss: str = "ce",
        steps: int,
        step: float | str = 0.25,
        step_abs: float | str | Mapping[str, Any] | None = None,
        start: str = "none",
        sigma: float = 0.001,
        clip_start: bool = True,
        kappa: float = 50.0,
        restarts: int = 1,
        eot: int = 1,
        keep_best: bool = False,
    ) -> None:
        if loss not in LOSSES:
            raise UserError(f"loss={loss!r} is not known: take {', '.join(LOSSES)}")
        self.restarts, self.eot = as_whole(restarts, "restarts"), as_whole(eot, "eot")
        if not isinstance(keep_best, bool):
            raise UserError(f"keep_best={keep_best!r} must be true or false")
        if start == "none" and self.restarts > 1:
            raise UserError(f"restarts={restarts} from a fixed start are all the same: take start=uniform")
        if start == "none" and loss == "kl":
            raise UserError("loss=kl has no gradient at the image itself: take start=uniform or start=normal")
        steps = as_whole(steps, "steps", 0)
        self.pgd = PGD(
            eps=eps, norm=norm, steps=steps, step=step, step_abs=step_abs, start=start, sigma=sigma,
            clip_start=clip_start, keep_best=keep_best,
        )  # fmt: skip
        self.norm, self.eps = norm, self.pgd.eps
        self.loss, self.kappa = loss, as_number(kappa, "kappa")
        self.keep_best = keep_best
        self.cost = float(self.steps * self.restarts * self.eot)

    @property
    def steps(self) -> int:
        return self.pgd.steps

    @property
    def path(self) -> tuple[Any, ...] | None:
        """See `Attack`: a longer attack may begin from a shorter one's result (``after``) instead of repeating it."""
        if self.pgd.start != "none" or self.eot > 1 or self.keep_best or not self.steps:
            return None
        return (self.loss, self.kappa, self.pgd.norm, self.pgd.eps, self.pgd.step_size)

    def __call__(
        self, logits: Logits, x: Tensor, y: Tensor, draws: Draws, after: Reached | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Attack`.

        Args:
            after: Where another attack of the same ``path`` has come from the same images.
        """
        if after is not None:
            return self.pgd.settling(
                lambda rows: lambda adv: self.raised(logits(adv), y[rows]),
                x,
                start=after.adv,
                steps=self.steps - after.steps,
                first=after.gradient,
            )
        with torch.no_grad():
            clean = logits(x) if self.needs_clean else None
        best, standing = x, torch.arange(len(x), device=x.device)
        for attempt, (restart, raised) in enumerate(self.attempts(y, clean)):
            if attempt:  # what the last attempt has broken is left alone
                with torch.no_grad():
                    right = logits(best[standing]).argmax(1) == y[standing]
                standing = standing[right]
                if not len(standing):
                    break
            start = self.pgd.start_point(x, generator=draws.generator(restart))
            whole = len(standing) == len(x)
            rows = slice(None) if whole else standing
            adv = self._ascend(logits, x[rows], y[rows], start[rows], rows, raised)
            best = adv if whole else best.index_copy(0, standing, adv)
        return best

    @property
    def needs_clean(self) -> bool:
        """Whether the logits of x are needed."""
        return self.loss == "kl"

    def attempts(self, y: Tensor, clean: Tensor | None) -> Iterator[tuple[int, Callable[..., Tensor]]]:
        """The attempts in turn: (number of the start, loss of (logits, labels, rows))."""
        for restart in range(self.restarts):
            yield restart, lambda z, y, rows: self.raised(z, y, None if clean is None else clean[rows])

    def _ascend(
        self, logits: Logits, x: Tensor, y: Tensor, start: Tensor, rows: Any, raised: Callable[..., Tensor]
    ) -> Tensor:
        def loss_of_x(adv: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            passes = [logits(adv) for _ in range(self.eot)]
            losses = [raised(z, y, rows) for z in passes]
            loss = torch.stack(losses).mean(0) if self.eot > 1 else losses[0]
            if not self.keep_best:
                return loss
            return loss, torch.stack([z.detach() for z in passes]).mean(0).argmax(1) != y

        if self.keep_best or self.eot > 1:
            return self.pgd(loss_of_x, x, start=start)
        numbers = torch.arange(len(y), device=y.device) if isinstance(rows, slice) else rows
        return self.pgd.settling(lambda some: lambda adv: raised(logits(adv), y[some], numbers[some]), x, start=start)

    def raised(self, z: Tensor, y: Tensor, clean: Tensor | None = None) -> Tensor:
        """The loss [B] of logits [B, K] and labels [B] that the attack raises."""
        if self.loss == "ce":
            return F.cross_entropy(z, y, reduction="none")
        if self.loss == "margin":
            return -(margin(z, y) + self.kappa).clamp_min(0.0)
        if self.loss == "dlr":
            if z.shape[1] < 3:
                raise UserError(f"loss=dlr needs at least 3 classes, there are {z.shape[1]}: take ce or margin")
            top = z.topk(3, dim=1).values
            return -margin(z, y) / (top[:, 0] - top[:, 2] + 1e-12)
        assert clean is not None
        return kl_per_example(clean, z)


class MultiTargeted(WhiteBox):
    """PGD towards one wrong class after the other (Gowal et al., 2019): each attempt raises ``z_t - z_y``.

    On a linear net this is exact: an example that no target breaks is robust.

    Args:
        targets: How many wrong classes, those with the highest logits at x first; None: all of them.
        options: As of `WhiteBox`, without loss and kappa.
    """

    needs_clean = True

    def __init__(self, *, targets: int | None = None, **options: Any) -> None:
        for name in ("loss", "kappa"):
            if name in options:
                raise UserError(f"{name} is not an option of the multi-targeted attack: it raises z_t - z_y")
        super().__init__(loss="margin", **options)
        self.targets = None if targets is None else as_whole(targets, "targets")
        self.cost *= self.targets or 9
        if self.eot > 1:
            raise UserError("eot is not an option of the multi-targeted attack")

    @property
    def path(self) -> None:
        """No attack goes on from another's."""
        return None

    def attempts(self, y: Tensor, clean: Tensor | None) -> Iterator[tuple[int, Callable[..., Tensor]]]:
        assert clean is not None
        order = clean.scatter(1, y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        for target in order[:, : min(self.targets or clean.shape[1], clean.shape[1] - 1)].T:
            for restart in range(self.restarts):
                yield restart, functools.partial(_towards, target)


def _towards(target: Tensor, z: Tensor, y: Tensor, rows: Any) -> Tensor:
    """``z_t - z_y`` [B] of the rows' targets."""
    return (z.gather(1, target[rows, None]) - z.gather(1, y[:, None])).squeeze(1)
