"""The balls in which attacks move: steepest ascent, projection, and a uniform point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Ball(Protocol):
    """A norm's ball around each example, intersected with the pixel range [0, 1]."""

    def diameter(self, shape: Sequence[int]) -> float:
        """The largest distance of two images of this shape."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of unit norm that raises the loss most; 0 where the gradient is 0."""

    def projection(self, x: Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        """A function that maps points into the ball around x and into [0, 1]. May reuse their memory."""

    def uniform(self, shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
        """Points drawn uniformly from the unit ball, with dtype and device of ``like``."""


class Linf:
    """Every pixel by at most eps."""

    def diameter(self, shape: Sequence[int]) -> float:
        return 1.0

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def projection(self, x: Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        # The difference is clamped, not the point: so do the papers' codes and torchattacks, and the bits are theirs.
        # A number is filled in on the device: torch.tensor would copy it from the host, and wait for a GPU.
        high = eps.to(x) if isinstance(eps, Tensor) else x.new_full((), eps)
        low = -high
        return lambda adv: adv.sub_(x).clamp_(low, high).add_(x).clamp_(0.0, 1.0)

    def uniform(self, shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
        u = torch.rand(*shape, generator=generator, device=like.device, dtype=like.dtype)
        return u.mul_(2.0).sub_(1.0)


class L2:
    """Every image by at most eps in Euclidean distance."""

    def diameter(self, shape: Sequence[int]) -> float:
        return float(torch.Size(shape).numel()) ** 0.5

    def direction(self, gradient: Tensor) -> Tensor:
        # Divided by the largest entry first: the squares of a vanishing gradient would underflow.
        tiny = torch.finfo(gradient.dtype).tiny
        dims = tuple(range(1, gradient.dim()))
        gradient = gradient / gradient.abs().amax(dim=dims, keepdim=True).clamp_min(tiny)
        return gradient / _norm(gradient).clamp_min(tiny)

    def projection(self, x: Tensor, eps: float | Tensor) -> Callable[[Tensor], Tensor]:
        def project(adv: Tensor) -> Tensor:
            delta = adv - x
            shrink = (eps / _norm(delta).clamp_min(torch.finfo(x.dtype).tiny)).clamp(max=1.0)
            # Clipping to [0, 1] afterwards moves every pixel towards x, so it cannot leave the ball.
            return (x + delta * shrink).clamp_(0.0, 1.0)

        return project

    def uniform(self, shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
        normal = torch.randn(*shape, generator=generator, device=like.device, dtype=like.dtype)
        radius = torch.rand(shape[0], generator=generator, device=like.device, dtype=like.dtype)
        radius = radius.pow(1.0 / normal[0].numel()).view(-1, *[1] * (len(shape) - 1))
        return normal / _norm(normal) * radius


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


BALLS: dict[str, Ball] = {"linf": Linf(), "l2": L2()}
