"""Libraries called as their documentation shows: torchattacks in a training loop, and ART's trainer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import torch
import torchattacks
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.defences.trainer import AdversarialTrainer
from art.estimators.classification import PyTorchClassifier
from benchmarks.peers import PGDAT
from torch import Tensor, nn

from redoubt.defenses import RobustModule


class Torchattacks(PGDAT):
    """PGD-AT with ``torchattacks.PGD`` as the attack."""

    def __init__(self, module: RobustModule) -> None:
        super().__init__(module)
        self.attack = torchattacks.PGD(self.net, eps=self.eps, alpha=self.size, steps=self.steps, random_start=True)

    def craft(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        return self.attack(x, y)


class ART(PGDAT):
    """ART's ``AdversarialTrainer`` with its PGD; arrays go in and out as its interface has it."""

    def __init__(self, module: RobustModule) -> None:
        super().__init__(module)
        size = module.image_size
        self.classifier = PyTorchClassifier(
            model=self.net,
            loss=nn.CrossEntropyLoss(),
            optimizer=self.optimizer,
            input_shape=(3, size, size),
            nb_classes=module.num_classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if next(self.net.parameters()).is_cuda else "cpu",
        )
        self.attack = ProjectedGradientDescentPyTorch(
            self.classifier, eps=self.eps, eps_step=self.size, max_iter=self.steps, num_random_init=1, verbose=False
        )
        self.trainer = AdversarialTrainer(self.classifier, attacks=self.attack, ratio=1.0)

    def craft(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        self.attack.set_params(batch_size=len(x))
        return torch.from_numpy(self.attack.generate(x.cpu().numpy(), y.cpu().numpy()))

    def step(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        self.attack.set_params(batch_size=len(x))
        labels = nn.functional.one_hot(y, self.classifier.nb_classes).float()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            self.trainer.fit(x.cpu().numpy(), labels.cpu().numpy(), batch_size=len(x), nb_epochs=1)
        return torch.empty(0)


LIBRARIES: dict[str, Callable[[RobustModule], PGDAT]] = {"torchattacks": Torchattacks, "ART": ART}
