"""TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

from torch import Tensor

from redoubt.errors import UserError
from redoubt.objectives.base import Objective, kl_per_example
from redoubt.units import as_number


class TRADES(Objective):
    """``CE(x, y) + beta * mean KL(p(x) || p(x_adv))``; the attack raises the same KL.

    Gradient flows through both p(x) and p(x_adv), as in the authors' code. They forward the clean batch twice in
    the outer loss, so that BatchNorm sees it twice; here once.

    Args:
        beta: Weight of the KL term (6 in the paper).
    """

    needs_clean = True
    inner_needs_clean = True

    def __init__(self, *, beta: float = 6.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.beta = as_number(beta, "base.beta")
        if self.beta < 0:
            raise UserError(f"base.beta={beta} must not be negative")

    def inner(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> Tensor:
        assert clean is not None
        return kl_per_example(clean, adv)

    def outer(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        assert clean is not None
        return {"ce": self.cross_entropy(clean, y), "kl": self.beta * kl_per_example(clean, adv).mean()}
