"""MART (Wang et al., ICLR 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from redoubt.errors import UserError
from redoubt.objectives.base import Objective, wrong_label
from redoubt.units import as_number


class MART(Objective):
    """Boosted cross-entropy plus a KL term weighted by how unsure the clean prediction is.

    ``CE(x_adv, y) - log(1.0001 - p_w(x_adv) + 1e-12) + beta * mean KL(p(x) || p(x_adv)) (1.0000001 - p_y(x))``,
    where w is the most probable wrong class of x_adv. The attack raises ``CE(x_adv, y)``; the weight is not
    detached. The constants are those of the authors' code.

    Args:
        beta: Weight of the KL term (5 for ResNet-18, 6 for WRN-34-10 in the authors' code).
    """

    needs_clean = True

    def __init__(self, *, beta: float = 5.0, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.beta = as_number(beta, "base.beta")
        if self.beta < 0:
            raise UserError(f"base.beta={beta} must not be negative")

    def outer(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        assert clean is not None
        p_adv, p_clean = F.softmax(adv, dim=1), F.softmax(clean, dim=1)
        p_wrong = p_adv.gather(1, wrong_label(adv, y)[:, None]).squeeze(1)
        p_true = p_clean.gather(1, y[:, None]).squeeze(1)
        log_q = (p_adv + 1e-12).log()
        kl = F.kl_div(log_q, F.log_softmax(clean, dim=1), reduction="none", log_target=True).sum(dim=1)
        return {
            "ce": self.cross_entropy(adv, y),
            "margin": -(1.0001 - p_wrong + 1e-12).log().mean(),
            "kl": self.beta * (kl * (1.0000001 - p_true)).mean(),
        }
