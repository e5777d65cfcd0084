"""Plain training on clean images."""

from __future__ import annotations

from torch import Tensor

from redoubt.objectives.base import Objective


class Standard(Objective):
    """``CE(x, y)``. Its inner attack has no steps, so ``adv`` is the clean image itself."""

    def outer(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(adv, y)}
