"""The one place that changes a net's mode for crafting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def attack_mode(net: nn.Module, train: bool = False) -> Iterator[None]:
    """Sets the mode for crafting and freezes the parameters; restores both exactly.

    Frozen parameters spare the attack's backward the weight gradients. Modes are restored per submodule and
    `requires_grad` per parameter, also after an exception, so a BatchNorm that its owner keeps in eval mode,
    or a frozen layer, comes out as it went in. Only flags are touched: no `train()` override runs, no
    gradient is cleared. Nesting works.

    Args:
        net: Any module.
        train: The mode for crafting: eval (False) or train. In train mode BatchNorm uses batch statistics
            and updates its running ones; those buffers are not restored.
    """
    modes = [(module, module.training) for module in net.modules()]
    learning = [p for p in net.parameters() if p.requires_grad]
    try:
        for module, training in modes:
            if training is not train:
                module.training = train
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)
        for module, training in modes:
            if module.training is not training:
                module.training = training
