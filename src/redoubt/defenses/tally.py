"""Sums kept on the device: an epoch's means, and the watch over losses that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from redoubt.defenses.gradients import sum_over_ranks
from redoubt.errors import UserError
from redoubt.training.distributed import ranks

LOOK_EVERY = 10


class Tally:
    """Weighted means by name, summed on the device and read once."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, mean: Tensor, count: int) -> None:
        """Takes in the mean of ``count`` examples."""
        pair = torch.stack((mean.float() * count, torch.full_like(mean, count, dtype=torch.float32)))
        # float64: the sum over an epoch of 50,000 examples must not round the mean's fourth digit
        old = self.sums.get(name)
        self.sums[name] = pair.double() if old is None else old + pair

    def means(self) -> dict[str, float]:
        """The means over all ranks' examples; the tally is empty afterwards."""
        sums, self.sums = self.over_ranks(), {}
        pairs = torch.stack([*sums.values()]).tolist() if sums else []
        return {name: total / count for name, (total, count) in zip(sums, pairs, strict=True)}

    def over_ranks(self) -> dict[str, Tensor]:
        """The sums so far of all ranks together, for a checkpoint; every rank calls it."""
        if not self.sums:
            return {}
        both = torch.stack(list(self.sums.values()))
        sum_over_ranks([both])
        return dict(zip(self.sums, both, strict=True))

    def go_on_from(self, sums: dict[str, Tensor]) -> None:
        """Takes what `over_ranks` gave, on the first rank; the others begin at nought."""
        self.sums = dict(sums) if ranks()[0] == 0 else {name: torch.zeros_like(pair) for name, pair in sums.items()}


class NotFinite(UserError):
    """A training loss was inf or NaN."""


class Watch:
    """Whether any loss or gradient so far was not finite, decided on the device and read without waiting.

    Once ``bad`` is set it stays set, and every later step is called off with it: the weights stay those before
    the bad batch. The flag's copy to the host, begun ``LOOK_EVERY`` steps ago, is read every ``LOOK_EVERY``
    steps, at the same steps on every rank, so that all stop together.
    """

    def __init__(self) -> None:
        self.start(torch.device("cpu"))

    def start(self, device: torch.device) -> None:
        """Clears the flag, on ``device``."""
        self.bad = torch.zeros((), device=device)
        self.latest = torch.zeros((), device=device)
        self.shown = float("nan")
        self._host = torch.zeros(2, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._waiting = False

    def loss(self, loss: Tensor) -> None:
        """Notes a loss before its gradient is taken."""
        self.latest = loss
        self.bad = torch.maximum(self.bad, (~loss.isfinite()).to(self.bad))

    def gradient(self, overflow: Tensor) -> None:
        """Notes a gradient's norm that is not finite (1) or is (0)."""
        self.bad = torch.maximum(self.bad, overflow.to(self.bad))

    def look(self, step: int, now: bool = False) -> None:
        """Reads the flag where it is due.

        Raises:
            NotFinite: A loss or gradient of one of the last steps was inf or NaN.
        """
        if now:
            self._read(torch.stack((self.bad, self.latest.to(self.bad))).cpu(), step)
        elif step % LOOK_EVERY == 0:
            if self._waiting:
                if self._copied is not None:
                    self._copied.synchronize()  # begun ten steps ago: done long since
                self._read(self._host, step)
            self._host.copy_(torch.stack((self.bad, self.latest.to(self.bad))), non_blocking=True)
            if self.bad.is_cuda:
                self._copied = torch.cuda.Event()
                self._copied.record()
            self._waiting = True

    def _read(self, host: Tensor, step: int) -> None:
        bad, self.shown = host.tolist()
        if bad > 0:
            raise NotFinite(
                f"loss or logits were not finite within the last {2 * LOOK_EVERY} steps before step {step}; nothing "
                "was saved since, the last checkpoint (if one was made) is from before: lower optimizer.lr, set "
                "optimizer.clip, or take trainer.precision=32-true"
            )
