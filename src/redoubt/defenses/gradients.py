"""The only place that differentiates for training: micro-batches, loss scale and ranks in one flat sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from redoubt.training.distributed import all_reduce, ranks

Losses = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
Gradient = list[Tensor | None]


@dataclass(frozen=True)
class Share:
    """Which rows of the global batch a tensor holds: rows [first, first + count) of ``total``."""

    first: int
    count: int
    total: int

    def split(self, parts: int) -> Iterator[tuple[slice, Share]]:
        """Cuts the rows into ``parts`` nearly equal runs; yields (local slice, share).

        Fewer where some would hold a single row, which BatchNorm cannot normalise.
        """
        parts = max(1, min(parts, self.count // 2))
        edges = [self.count * i // parts for i in range(parts + 1)]
        for a, b in itertools.pairwise(edges):
            if b > a:
                yield slice(a, b), Share(self.first + a, b - a, self.total)


class LossScale:
    """Dynamic loss scaling for float16, decided on the device (as torch's GradScaler, without its wait)."""

    def __init__(self, device: torch.device, *, start: float = 2.0**16, interval: int = 2000) -> None:
        self.scale = torch.full((), start, device=device)
        self.clean_steps = torch.zeros((), device=device)
        self.interval = interval

    def update(self, overflow: Tensor) -> None:
        """Halves the scale after an overflow, doubles it after ``interval`` steps without one."""
        self.clean_steps = torch.where(overflow > 0, 0.0, self.clean_steps + 1)
        grow = self.clean_steps >= self.interval
        self.scale = torch.where(overflow > 0, self.scale * 0.5, torch.where(grow, self.scale * 2, self.scale))
        self.clean_steps = torch.where(grow, 0.0, self.clean_steps)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.scale = state["scale"].to(self.scale.device)
        self.clean_steps = state["clean_steps"].to(self.clean_steps.device)


def differentiate(
    losses: Sequence[Tensor], params: Sequence[Sequence[nn.Parameter]], weight: float, scale: Tensor | None
) -> list[Gradient]:
    """Gradient of each loss with respect to its own parameters, times ``weight``, unscaled, in float32.

    Args:
        losses: Scalars of one forward graph.
        params: For each loss the parameters that it trains; one that it does not reach gets None.
        weight: This micro-batch's share of the global batch.
        scale: Loss scale, or None.
    """
    found: list[Gradient] = []
    for i, (loss, wanted) in enumerate(zip(losses, params, strict=True)):
        loss = loss * weight if scale is None else loss * (scale * weight)
        keep = i + 1 < len(losses)
        grads = torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True)
        found.append([None if g is None else g.float() for g in grads])
        if scale is not None:
            torch._foreach_div_([g for g in found[-1] if g is not None], scale)
    return found


def add(total: list[Gradient] | None, new: list[Gradient]) -> list[Gradient]:
    """Sums two sets of gradients, in place where both are there; the first is copied.

    A compiled backward's own memory may be written over by the next micro-batch.
    """
    if total is None:
        return [[None if g is None else g.clone() for g in gradient] for gradient in new]
    for old, more in zip(total, new, strict=True):
        both = [(a, b) for a, b in zip(old, more, strict=True) if a is not None and b is not None]
        if both:
            torch._foreach_add_([a for a, _ in both], [b for _, b in both])
        old[:] = [b if a is None else a for a, b in zip(old, more, strict=True)]
    return total


def sum_over_ranks(tensors: Sequence[Tensor]) -> int:
    """Sums tensors of one type over all ranks in place, by one flat all-reduce; returns the number of ranks."""
    world = ranks()[1]
    if world > 1 and tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        all_reduce(flat)
        pieces = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(pieces, tensors, strict=True)])
    return world
