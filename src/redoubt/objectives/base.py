"""What an objective is, and the few functions of logits that several of them share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from redoubt.errors import UserError
from redoubt.units import as_number


class Objective:
    """The inner loss that the attack raises and the outer terms that training lowers.

    Args:
        label_smoothing: s in [0, 1): in every cross-entropy on the true label of the outer terms the label's
            probability is 1 - s + s/K and every other class's s/K. The inner loss is never smoothed.
    """

    #: The outer terms want training-mode logits of the clean images.
    needs_clean: bool = False
    #: The inner loss wants attack-mode logits of the clean images, computed once per batch.
    inner_needs_clean: bool = False
    #: Training forwards of the clean images in a step, where ``needs_clean``: 1, or 2 as in TRADES's own code.
    clean_forwards: int = 1

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = as_number(label_smoothing, "label_smoothing")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"label_smoothing={label_smoothing} must lie in [0, 1)")

    def inner(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> Tensor:
        """Loss per example [B] that the attack raises: cross-entropy unless an objective says otherwise.

        Args:
            adv: Attack-mode logits of the moving examples [B, K].
            y: Labels [B].
            clean: Attack-mode logits of the clean images [B, K] where ``inner_needs_clean``.
        """
        return F.cross_entropy(adv, y, reduction="none")

    def outer(self, adv: Tensor, y: Tensor, clean: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted terms, batch means, whose sum is the training loss.

        Args:
            adv: Training-mode logits of the crafted examples [B, K].
            y: Labels [B].
            clean: Training-mode logits of the clean images [B, K] where ``needs_clean``.
        """
        raise TypeError(f"{type(self).__name__} defines no outer terms: an objective must")

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy on the true label, smoothed as the objective says."""
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)


def kl_per_example(target: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(other)) of each example [B]; gradient flows through both."""
    log_p, log_q = F.log_softmax(target, dim=1), F.log_softmax(other, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def wrong_label(logits: Tensor, y: Tensor) -> Tensor:
    """The highest-scoring class other than y [B]: the prediction where it is wrong, else the runner-up."""
    return logits.detach().scatter(1, y[:, None], float("-inf")).argmax(dim=1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """True logit minus the largest other logit [B]; negative where misclassified."""
    others = logits.scatter(1, y[:, None], float("-inf")).amax(dim=1)
    return logits.gather(1, y[:, None]).squeeze(1) - others
