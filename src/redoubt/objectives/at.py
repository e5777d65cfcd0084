"""PGD adversarial training (Madry et al., ICLR 2018)."""

from __future__ import annotations

from torch import Tensor

from redoubt.objectives.base import Objective


class PGDAT(Objective):
    """``CE(x_adv, y)``, with x_adv raised on the same cross-entropy."""

    def outer(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        return {"ce": self.cross_entropy(adv, y)}
