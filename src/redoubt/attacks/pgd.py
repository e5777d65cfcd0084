"""Projected gradient ascent within a ball around each example (Madry et al., 2018)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from redoubt.attacks.geometry import BALLS, Ball
from redoubt.errors import UserError
from redoubt.units import as_number, as_whole

LossOfX = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
PerExample = float | Tensor

#: How often `PGD.settling` looks for examples that repeat themselves: it finds periods of 1, 2 and 4 steps, which
#: nearly all have that repeat themselves at all.
PERIOD = 4


class PGD:
    """Raises a loss of x by signed (linf) or normalised (l2) gradient steps, projected after each step.

    ``x_{k+1} = clip(project(x_k + step_size * direction(gradient)))``; the ball is ``||x' - x|| <= eps`` and
    pixels stay in [0, 1].

    Args:
        eps: Radius in pixel units, a number or a fraction such as ``"8/255"``.
        norm: ``"linf"`` or ``"l2"``.
        steps: Number of gradient steps; 0 returns the start.
        step: Step size as a share of eps.
        step_abs: Step size in pixel units instead of ``step``: a number, or ``{"size": s, "eps": e}`` for a
            printed pair, which is scaled to ``s * eps / e`` when eps is another.
        start: ``"uniform"`` in the ball, ``"normal"`` (x + sigma * N(0, 1)) or ``"none"`` (x itself).
        sigma: Standard deviation of the normal start, in pixel units.
        clip_start: Whether a random start is clipped to [0, 1] before the first gradient is taken.
        keep_best: Return each example's best iterate (done before not done, then the higher loss) rather than
            the last one; costs one more forward pass.
        patience: How many more steps an example that is done moves before it stands still (FAT's tau).
        stages: Of a training attack that grows: entries [share, steps, step] in rising order, each with the share of
            training from which on it takes so many steps of that share of eps; before the first one and elsewhere
            ``steps`` and ``step`` hold.

    Raises:
        UserError: A value out of range, or a fixed start from which ``steps * step`` cannot reach the ball's edge.
    """

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "linf",
        steps: int = 10,
        step: float | str = 0.25,
        step_abs: float | str | Mapping[str, Any] | None = None,
        start: str = "uniform",
        sigma: float = 0.001,
        clip_start: bool = True,
        keep_best: bool = False,
        patience: int = 0,
        stages: Sequence[Sequence[float | str]] | None = None,
    ) -> None:
        if norm not in BALLS:
            raise UserError(f"norm={norm!r} is not known: take one of {', '.join(BALLS)}")
        if start not in ("uniform", "normal", "none"):
            raise UserError(f"start={start!r} is not known: take uniform, normal or none")
        self.eps, self.sigma = as_number(eps, "eps"), as_number(sigma, "sigma")
        for name, value in (("steps", steps), ("patience", patience), ("eps", self.eps), ("sigma", self.sigma)):
            if value < 0:
                raise UserError(f"{name}={value} must not be negative")
        self.ball: Ball = BALLS[norm]
        self.norm = norm
        self.step_size = _step_size(self.eps, step, step_abs)
        self.steps = int(steps)
        self.start = start
        self.clip_start = clip_start
        self.keep_best = keep_best
        self.patience = int(patience)
        self.stages = [_stage(entry, self.eps) for entry in stages or ()]
        if [share for share, _, _ in self.stages] != sorted(share for share, _, _ in self.stages):
            raise UserError(f"stages={stages} must be in the order of their shares of training")
        if start == "none" and steps and self.steps * self.step_size < self.eps * (1 - 1e-6):
            raise UserError(
                f"steps={steps} of size {self.step_size:.4g} from a fixed start do not reach eps={self.eps:.4g}: "
                "raise steps or step, or take a random start"
            )

    def stage(self, share: float) -> tuple[int, float]:
        """Number and size (pixel units) of the steps that the attack takes at a share of training in [0, 1)."""
        own = [(steps, size) for begins, steps, size in self.stages if begins <= share + 1e-9]
        return own[-1] if own else (self.steps, self.step_size)

    def start_point(
        self,
        x: Tensor,
        *,
        eps: PerExample | None = None,
        generator: torch.Generator | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Tensor:
        """Where the ascent begins.

        Args:
            x: Examples [B, C, H, W].
            eps: Radius of the uniform start, one number or one per example; the attack's own where None.
            generator: Source of the random numbers; torch's global one where None.
            rows: (first, total): the numbers are drawn for ``total`` examples and x holds those from ``first``
                on, so that every rank and micro-batch of one global batch draws the same numbers.
        """
        if self.start == "none":
            return x
        first, total = rows or (0, len(x))
        shape, b = (total, *x.shape[1:]), slice(first, first + len(x))
        if self.start == "normal":
            noise = self.sigma * torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)[b]
        else:
            noise = self.ball.uniform(shape, generator, x)[b] * _per_example(self.eps if eps is None else eps, x)
        start = x + noise
        return start.clamp_(0.0, 1.0) if self.clip_start else start

    def __call__(
        self,
        loss_of_x: LossOfX,
        x: Tensor,
        *,
        start: Tensor | None = None,
        eps: PerExample | None = None,
        step_size: PerExample | None = None,
        steps: int | Tensor | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """Adversarial examples for x.

        Args:
            loss_of_x: Maps examples [B, C, H, W] to losses [B], or to (losses [B], done [B]). Each example's
                loss must depend on that example alone.
            x: Clean examples [B, C, H, W] in [0, 1].
            start: Where to begin; ``start_point(x)`` where None.
            eps, step_size: In pixel units, one number or one per example [B].
            steps: One number, or one per example [B] (read once from the device).
            first: Gradient of the loss at the start, where it is known: spares one pass. Not with ``keep_best`` or a
                loss that says done.

        Returns:
            Detached examples [B, C, H, W] in the ball and in [0, 1].
        """
        x = x.detach()
        eps = _per_example(self.eps if eps is None else eps, x)
        step_size = _per_example(self.step_size if step_size is None else step_size, x)
        steps = self.steps if steps is None else steps
        project = self.ball.projection(x, eps)
        adv = (self.start_point(x, eps=eps) if start is None else start).detach()
        if self.keep_best or (isinstance(steps, int) and steps == 0):
            adv = project(adv.clone())  # the start may be what is returned
        spent: Tensor | None = None  # steps begun while done
        best = _Best() if self.keep_best else None
        for k in range(int(steps.max()) if isinstance(steps, Tensor) else steps):
            if k == 0 and first is not None:
                gradient, done = first, None
            else:
                loss, done, gradient = _ascend(loss_of_x, adv)
            if best is not None:
                best.see(adv, loss, done)
            moved = project(adv + step_size * self.ball.direction(gradient))
            moving: Tensor | None = k < steps if isinstance(steps, Tensor) else None
            if done is not None:
                spent = done.long() if spent is None else spent + done
                moving = spent <= self.patience if moving is None else moving & (spent <= self.patience)
            if moving is not None and k == 0:
                adv = project(adv.clone())  # for those that never move
            adv = moved if moving is None else torch.where(_broadcast(moving, x), moved, adv)
        if best is None:
            return adv
        with torch.no_grad():
            best.see(adv, *_loss_and_done(loss_of_x, adv))
        assert best.adv is not None
        return best.adv

    def settling(
        self,
        loss_of: Callable[[Tensor], LossOfX],
        x: Tensor,
        *,
        start: Tensor | None = None,
        steps: int | None = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """The same examples with less work, of a deterministic loss: those that repeat themselves are left alone.

        Signed steps of one size soon move an example to and fro between a few points. Once an iterate equals the one
        four steps earlier it will equal the last one, if only their numbers differ by a multiple of four.

        Args:
            loss_of: Maps the numbers of some examples [b] to their loss (of examples [b, C, H, W] to [b]).
            x, start, steps, first: As above.

        Returns:
            Detached examples [B, C, H, W].
        """
        x = x.detach()
        steps = self.steps if steps is None else steps
        adv = (self.start_point(x) if start is None else start).detach()
        if not steps:
            return self.ball.projection(x, self.eps)(adv.clone())
        last, left = torch.empty_like(adv), torch.arange(len(x), device=x.device)
        loss, project, earlier = loss_of(left), self.ball.projection(x, self.eps), None
        for k in range(steps):
            if (steps - k) % PERIOD == 0:
                moving = None if earlier is None else (adv != earlier).flatten(1).any(1)
                if moving is not None and not moving.all():
                    last[left] = adv
                    left, adv = left[moving], adv[moving]
                    if not len(left):
                        return last
                    loss, project = loss_of(left), self.ball.projection(x[left], self.eps)
                earlier = adv
            gradient = first if k == 0 and first is not None else _ascend(loss, adv)[2]
            adv = project(adv + self.step_size * self.ball.direction(gradient))
        last[left] = adv
        return last


class _Best:
    """The best iterate seen of each example: done before not done, then the higher loss."""

    adv: Tensor | None = None

    def see(self, adv: Tensor, loss: Tensor, done: Tensor | None) -> None:
        loss = loss.detach()
        if self.adv is None:
            self.adv, self.loss, self.done = adv, loss, done
            return
        better = loss > self.loss
        if done is not None:
            assert self.done is not None
            better = (done & ~self.done) | ((done == self.done) & better)
            self.done = done | self.done
        self.adv = torch.where(_broadcast(better, adv), adv, self.adv)
        self.loss = torch.where(better, loss, self.loss)


def _loss_and_done(loss_of_x: LossOfX, adv: Tensor) -> tuple[Tensor, Tensor | None]:
    out = loss_of_x(adv)
    return out if isinstance(out, tuple) else (out, None)


def _ascend(loss_of_x: LossOfX, adv: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    adv = adv.detach().requires_grad_(True)
    with torch.enable_grad():  # also inside a no_grad of the caller
        loss, done = _loss_and_done(loss_of_x, adv)
        # The sum, not the mean: then no example's gradient depends on how many others are in the batch.
        (gradient,) = torch.autograd.grad(loss.sum(), adv)
    return loss, done, gradient


def _step_size(eps: float, step: float | str, step_abs: float | str | Mapping[str, Any] | None) -> float:
    if step_abs is None:
        size = as_number(step, "step") * eps
    elif isinstance(step_abs, Mapping):
        if set(step_abs) != {"size", "eps"}:
            raise UserError("step_abs takes a number, or the two keys size and eps of a printed pair")
        printed = as_number(step_abs["eps"], "step_abs.eps")
        if printed <= 0:
            raise UserError(f"step_abs.eps={printed} must be positive")
        size = as_number(step_abs["size"], "step_abs.size") * (eps / printed)
    else:
        size = as_number(step_abs, "step_abs")
    if size < 0:
        raise UserError(f"the step size is {size}: it must not be negative")
    return size


def _stage(entry: Any, eps: float) -> tuple[float, int, float]:
    if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 3:
        raise UserError(f"stages: {entry!r} must be [share of training, steps, step as a share of eps]")
    share, step = as_number(entry[0], "stages"), as_number(entry[2], "stages")
    if not 0.0 <= share < 1.0 or step < 0:
        raise UserError(f"stages: {list(entry)} must begin in [0, 1) and step by no less than 0")
    return share, as_whole(entry[1], "stages"), step * eps


def _per_example(value: PerExample, x: Tensor) -> PerExample:
    return _broadcast(value.to(x), x) if isinstance(value, Tensor) and value.dim() == 1 else value


def _broadcast(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.dim() - 1))
