"""TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

from torch import Tensor

from redoubt.errors import UserError
from redoubt.objectives.base import Objective, kl_per_example
from redoubt.units import as_number


class TRADES(Objective):
    """``CE(x, y) + beta * mean KL(p(x) || p(x_adv))``; the attack raises the same KL.

    Gradient flows through both p(x) and p(x_adv), as in the authors' code.

    Args:
        beta: Weight of the KL term (6 in the paper).
        clean_forwards: 2 forwards the clean batch once more behind the crafted one, as the authors' code does:
            BatchNorm's running statistics move three times in a step, the gradient is the same. None: once.
    """

    needs_clean = True
    inner_needs_clean = True

    def __init__(self, *, beta: float = 6.0, clean_forwards: int | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.beta = as_number(beta, "base.beta")
        if self.beta < 0:
            raise UserError(f"base.beta={beta} must not be negative")
        if clean_forwards not in (None, 2):
            raise UserError(f"base.clean_forwards={clean_forwards}: take 2, as the authors' code, or null for one")
        self.clean_forwards = clean_forwards or 1

    def inner(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> Tensor:
        assert clean is not None
        return kl_per_example(clean, adv)

    def outer(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        assert clean is not None
        return {"ce": self.cross_entropy(clean, y), "kl": self.beta * kl_per_example(clean, adv).mean()}
