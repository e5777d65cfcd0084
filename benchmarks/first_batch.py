"""Child of ``benchmarks.starting``: prints the time when the first batch is there, and ends."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn


def reached(*_: object) -> NoReturn:
    print(time.time(), flush=True)
    os._exit(0)


def ours(words: list[str]) -> None:
    from redoubt import cli
    from redoubt.defenses import RobustModule

    RobustModule.training_step = reached  # type: ignore[method-assign]
    sys.argv = ["redoubt", "train", *words]
    cli.main()


def authors(words: list[str]) -> None:
    """What the papers' scripts do first: net, optimizer, DataLoader over PIL images."""
    import numpy as np
    import torch
    from benchmarks.pictures import pil_loader
    from torchvision.models import resnet18

    batch, workers = map(int, words)
    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    pictures = np.zeros((512, 32, 32, 3), dtype=np.uint8)
    reached(next(iter(pil_loader(pictures, np.zeros(512, dtype=np.int64), batch, workers))))


def main() -> None:
    side, *words = sys.argv[1:]
    if side == "torch":
        import torch  # noqa: F401

        reached()
    {"ours": ours, "authors": authors}[side](words)


if __name__ == "__main__":
    main()
