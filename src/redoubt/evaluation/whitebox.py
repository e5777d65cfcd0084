"""Gradient attacks for evaluation: FGSM, PGD and the PGD that papers call C&W."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from redoubt.attacks import PGD
from redoubt.errors import UserError
from redoubt.objectives.base import margin

Logits = Callable[[Tensor], Tensor]


class WhiteBox:
    """PGD on a loss of the logits, in the nets' evaluation mode.

    Args:
        eps, norm, steps, step, step_abs, start: As of `redoubt.attacks.PGD`.
        loss: ``ce``: cross-entropy; ``margin``: ``-max(z_y - max_{j != y} z_j + kappa, 0)``, which FSR's, CURE's,
            CIFS' and FAT's code call C&W (it is not the L2 attack of Carlini and Wagner).
        kappa: Confidence of the margin loss.
    """

    def __init__(
        self,
        *,
        eps: float | str,
        norm: str = "linf",
        loss: str = "ce",
        steps: int,
        step: float | str = 0.25,
        step_abs: float | Mapping[str, Any] | None = None,
        start: str = "none",
        kappa: float = 50.0,
    ) -> None:
        if loss not in ("ce", "margin"):
            raise UserError(f"loss={loss!r} is not known: take ce or margin")
        self.pgd = PGD(eps=eps, norm=norm, steps=steps, step=step, step_abs=step_abs, start=start)
        self.loss, self.kappa = loss, float(kappa)

    @property
    def steps(self) -> int:
        return self.pgd.steps

    @property
    def path(self) -> tuple[Any, ...] | None:
        """What two attacks share of which the longer one passes through the shorter one's result, or None.

        Such an attack may begin from that result (``after``) instead of repeating its steps.
        """
        if self.pgd.start != "none":
            return None
        return (self.loss, self.kappa, self.pgd.norm, self.pgd.eps, self.pgd.step_size)

    def __call__(
        self,
        logits: Logits,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
        after: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Adversarial examples [B, 3, H, W] for x.

        Args:
            logits: Maps pixels to logits [B, K].
            x, y: Images in [0, 1] and labels [B].
            generator: Of the random start.
            after: (steps done, examples) of an attack on the same ``path``.
        """
        done, start = after or (0, self.pgd.start_point(x, generator=generator))
        return self.pgd(lambda adv: self._raised(logits(adv), y), x, start=start, steps=self.steps - done)

    def _raised(self, z: Tensor, y: Tensor) -> Tensor:
        if self.loss == "ce":
            return F.cross_entropy(z, y, reduction="none")
        return -(margin(z, y) + self.kappa).clamp_min(0.0)
