"""What every attack of an evaluation is: a function of logits, images, labels and its own random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from redoubt.rng import derive, generator

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one attack on one chunk of test images: a function of (seed, attack, chunk) alone.

    Args:
        seed: ``evaluation.seed``.
        attack: The attack's name in its suite.
        chunk: Number of the chunk.
        device: Where numbers are drawn: that of the images.
    """

    seed: int = 0
    attack: str = "attack"
    chunk: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def generator(self, restart: int = 0) -> torch.Generator:
        """A fresh generator of one restart."""
        return generator(self.seed, f"attack/{self.attack}", restart, self.chunk, device=self.device)

    @property
    def library_seed(self) -> int:
        """What libraries that seed themselves are given; see `library_seed`."""
        return library_seed(self.seed, self.chunk)


def library_seed(seed: int, chunk: int) -> int:
    """The seed (31 bits) of a library's attack on a chunk: of ``evaluation.seed`` and the chunk's number only."""
    return derive(seed, "library", chunk) % 2**31


class Attack:
    """Finds adversarial examples within a ball, for a whole chunk of images at once.

    ``attack(logits, x, y, draws)`` gives examples [B, 3, H, W], or a pair of them and flags [B] of those that the
    attack itself saw misclassified. Scoring is not the attack's business: whoever calls it measures the distance to x
    and classifies anew.
    """

    #: Threat model; eps None: the attack knows no bound (a corruption, a search for the smallest perturbation).
    norm: str = "linf"
    eps: float | None = None
    #: Forward-backward passes per image, roughly: of a suite the cheap attacks go first.
    cost: float = 1.0
    #: Whether it differentiates the logits.
    needs_gradients: bool = True
    #: Whether examples may be crafted on the net with BatchNorm folded into its convolutions, which rounds otherwise.
    folds: bool = False
    #: Of an adapter: the library and its version, for another version may find other examples.
    library: str | None = None
    #: What decides the examples, of an attack that is one of several that a function made.
    settings: Any = None
    #: Of attacks whose mean accuracy is a result too.
    group: str | None = None

    @property
    def path(self) -> Any:
        """What two attacks share of which the longer one passes through the shorter one's result; None: nothing."""
        return None

    def members(self, classes: int) -> tuple[str, ...]:
        """By name, the attacks that it runs one after the other on a net of so many classes; none where it is one."""
        return ()

    def __call__(self, logits: Logits, x: Tensor, y: Tensor, draws: Draws) -> Tensor | tuple[Tensor, Tensor]:
        """Adversarial examples for x.

        Args:
            logits: Maps pixels [B, 3, H, W] to logits [B, K].
            x: Images [B, 3, H, W] in [0, 1].
            y: Their labels [B].
            draws: Random numbers.
        """
        raise NotImplementedError
