"""AWP: adversarial weight perturbation (Wu et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from redoubt.defenses.gradients import Gradient
from redoubt.errors import UserError
from redoubt.units import as_number


class AWP:
    """Moves each weight tensor up the loss by ``rho`` times its own norm, ``w + rho |w| g / |g|``.

    Tensors of one dimension (biases, BatchNorm) stay. One step of ascent on fixed examples; the weights come back bit
    for bit.

    Args:
        rho: Length of the step relative to the tensor's norm (5e-3 in the paper).
        warmup: Epochs of training before it begins.

    Raises:
        UserError: A negative value.
    """

    def __init__(self, *, rho: float, warmup: float = 0.0) -> None:
        self.rho, self.warmup = as_number(rho, "awp.rho"), as_number(warmup, "awp.warmup")
        if self.rho < 0 or self.warmup < 0:
            raise UserError(f"awp.rho={rho} and awp.warmup={warmup} must not be negative")

    @contextmanager
    def applied(self, params: Sequence[nn.Parameter], ascent: Gradient) -> Iterator[None]:
        """Inside, the parameters are perturbed along ``ascent``, their loss's gradient."""
        chosen = [(p.data, g) for p, g in zip(params, ascent, strict=True) if g is not None and p.dim() > 1]
        weights, gradients = [w for w, _ in chosen], [g for _, g in chosen]
        kept = [w.clone() for w in weights]
        try:
            if chosen:
                lengths = torch.stack(torch._foreach_norm(weights)) * self.rho
                lengths = lengths / torch.stack(torch._foreach_norm(gradients))
                # A gradient that is zero, or overflowed float16, says nothing of the direction.
                lengths = torch.where(lengths.isfinite() & (lengths > 0), lengths, 0.0)
                for w, g, length in zip(weights, gradients, lengths, strict=True):
                    w.add_(torch.where(length > 0, g, 0.0) * length)
            yield
        finally:
            if chosen:
                torch._foreach_copy_(weights, kept)
