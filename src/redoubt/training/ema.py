"""Exponential moving average of a net's parameters and floating buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from redoubt.errors import UserError


class EMA:
    """``average <- d * average + (1 - d) * live`` after every step; the live net is never touched.

    Integer buffers (BatchNorm's batch counter) are not averaged: the average takes the live ones.

    Args:
        net: The live net; the average begins as its copy.
        decay: d in [0, 1).
        warmup: Take d = min(decay, (s + 1) / (s + 10)) after step s = 0, 1, ... (AFD's code).
    """

    def __init__(self, net: nn.Module, *, decay: float, warmup: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise UserError(f"ema.decay={decay} must lie in [0, 1); null switches averaging off")
        self.decay, self.warmup = float(decay), warmup
        self._net = net
        self.restart()

    def restart(self) -> None:
        """The average begins anew as a copy of the live net."""
        self.average = {name: t.detach().clone() for name, t in _floats(self._net).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the live weights after step ``step`` (counted from 0)."""
        d = min(self.decay, (step + 1) / (step + 10)) if self.warmup else self.decay
        torch._foreach_lerp_(list(self.average.values()), list(_floats(self._net).values()), 1.0 - d)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The net computes with the averaged weights inside; the live ones are back, bit for bit, after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores ``average`` as saved in a checkpoint."""
        for name, tensor in self.average.items():
            tensor.copy_(state[name])

    def to(self, device: torch.device) -> None:
        """Moves the average to where the net lives."""
        self.average = {name: t.to(device) for name, t in self.average.items()}

    def _swap(self) -> None:
        for name, live in _floats(self._net).items():
            live.data, self.average[name] = self.average[name], live.data


def _floats(net: nn.Module) -> dict[str, Tensor]:
    # Read anew each time: moving a net to another device replaces its buffers.
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return {name: t for name, t in tensors if t.is_floating_point()}
