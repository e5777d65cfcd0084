"""The learning rate as a pure function of how far training is; nothing to save, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Sequence

from redoubt.errors import UserError

KINDS = ("constant", "multistep", "cosine", "onecycle")


class Schedule:
    """Factor on ``optimizer.lr`` after a given number of epochs.

    Args:
        kind: ``constant``; ``multistep``: the factors below; ``cosine``: from 1 to ``final`` along half a
            cosine; ``onecycle``: linear from ``initial`` to 1 over the first ``peak`` of training, then linear
            to ``final``.
        epochs: Length of the run that ``milestones`` are written for. Where the run is longer or shorter
            (``max_epochs``), they are stretched with it.
        milestones: Epochs, counted from 1, in which a new factor begins to hold (papers' "epoch >= 75").
        factors: The factor from each milestone on; all relative to ``optimizer.lr``.
        interval: ``epoch`` changes the rate between epochs only, ``step`` in every step.
        warmup: Epochs over which the factor rises linearly from 0 (per step), before all else.
        initial, peak, final: Of the one-cycle (and, for ``final``, the cosine) shape.
        max_epochs: Length of this run.
    """

    def __init__(
        self,
        *,
        max_epochs: int,
        kind: str = "multistep",
        epochs: int | None = None,
        milestones: Sequence[float] = (),
        factors: Sequence[float] = (),
        interval: str = "epoch",
        warmup: float = 0.0,
        initial: float = 0.04,
        peak: float = 0.3,
        final: float = 0.0,
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"schedule.kind={kind!r} is not known: take one of {', '.join(KINDS)}")
        if interval not in ("epoch", "step"):
            raise UserError(f"schedule.interval={interval!r} is not known: take epoch or step")
        for name, value in (("milestones", milestones), ("factors", factors)):
            if not isinstance(value, Sequence) or not all(isinstance(v, int | float) for v in value):
                raise UserError(f"schedule.{name}={value!r} must be a list of numbers, as [75,90]")
        if len(milestones) != len(factors):
            raise UserError(
                f"schedule.milestones has {len(milestones)} entries and schedule.factors {len(factors)}: "
                "give one factor per milestone"
            )
        if list(milestones) != sorted(milestones):
            raise UserError("schedule.milestones must be in rising order")
        if not 0.0 < peak < 1.0:
            raise UserError(f"schedule.peak={peak} must lie between 0 and 1")
        if epochs is not None and epochs <= 0:
            raise UserError(f"schedule.epochs={epochs} must be at least 1, or null for trainer.max_epochs")
        for name, least in (("initial", initial), ("final", final), ("factors", min(factors, default=0.0))):
            if least < 0:
                raise UserError(f"schedule.{name}={least} must not be negative: the learning rate would be")
        if max_epochs < 1 or warmup < 0:
            raise UserError("trainer.max_epochs must be at least 1 and schedule.warmup at least 0")
        self.kind, self.interval, self.warmup = kind, interval, float(warmup)
        self.max_epochs = max_epochs
        stretch = max_epochs / (epochs or max_epochs)
        self.steps = [((m - 1) * stretch, f) for m, f in zip(milestones, factors, strict=True)]
        self.initial, self.peak, self.final = float(initial), float(peak), float(final)

    def factor(self, progress: float) -> float:
        """The factor for the step that begins after ``progress`` epochs (0 <= progress < max_epochs)."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.interval == "epoch":
            progress = math.floor(progress + 1e-9)
        share = progress / self.max_epochs
        if self.kind == "cosine":
            return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * share))
        if self.kind == "onecycle":
            if share < self.peak:
                return self.initial + (1.0 - self.initial) * share / self.peak
            return 1.0 + (self.final - 1.0) * (share - self.peak) / (1.0 - self.peak)
        factor = 1.0
        for begin, value in self.steps if self.kind == "multistep" else ():
            if progress >= begin - 1e-9:
                factor = value
        return factor
