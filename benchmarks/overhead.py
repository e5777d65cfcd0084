"""What the framework costs over a bare loop of the same tensors: PGD-10 training steps, A B A B in one process.

    python benchmarks/overhead.py [model=resnet18] [batch=128] [pairs=3] [steps=2] [defense=none]

A is Lightning's fit loop with our module, data module, recorder and progress; B is the same net, attack and optimizer
as a plain loop: craft in evaluation mode, one training forward, backward, SGD. Prints both medians and their ratio.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from redoubt import config
from redoubt.build import build_data, build_module
from redoubt.runs.store import Store
from redoubt.training.progress import ProgressBar
from redoubt.training.recorder import Recorder
from redoubt.training.trainer import make_trainer


class Clock(Callback):
    """Seconds between the first batch's start and each batch's end, of one fit."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began


def ours(cfg, folder: str) -> float:
    data, module = build_data(cfg), build_module(cfg)
    run = Store(folder).open(cfg.axes, 0, f"{time.time_ns():x}", {})
    clock = Clock()
    trainer = make_trainer(cfg, Path(folder), [ProgressBar(), Recorder(run), clock])
    trainer.fit(module, datamodule=data)
    return clock.seconds / module.steps_done


def bare(cfg, steps: int) -> float:
    net = build_module(cfg).net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    data = build_data(cfg)
    batches = [(b.x, b.y) for b in data.train_dataloader()]
    eps, size = 8 / 255, 2 / 255
    began = time.perf_counter()
    for x, y in batches[:steps]:
        net.eval()
        for p in net.parameters():
            p.requires_grad_(False)
        adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        for _ in range(10):
            adv.requires_grad_(True)
            (g,) = torch.autograd.grad(F.cross_entropy(net(adv), y, reduction="sum"), adv)
            adv = (adv.detach() + size * g.sign()).clamp(low, high)
        for p in net.parameters():
            p.requires_grad_(True)
        net.train()
        optimizer.zero_grad()
        F.cross_entropy(net(adv), y).backward()
        optimizer.step()
    return (time.perf_counter() - began) / steps


def main() -> None:
    said = dict(a.split("=", 1) for a in sys.argv[1:])
    batch, pairs, steps = int(said.get("batch", 128)), int(said.get("pairs", 3)), int(said.get("steps", 2))
    with tempfile.TemporaryDirectory() as folder:
        cfg = config.resolve(
            config.compose(
                [
                    f"model={said.get('model', 'resnet18')}", f"defense={said.get('defense', 'none')}", "base=at",
                    "data=cifar10", "data.source=fake", "data.augment=none", f"data.batch_size={batch}",
                    f"data.limit_train={batch * steps}", "data.probe=2", "trainer.max_epochs=1", "attack=none",
                    f"paths.outputs={folder}",
                ]
            )
        )  # fmt: skip
        bare(cfg, 1)
        a, b = [], []
        for _ in range(pairs):
            a.append(ours(cfg, folder))
            b.append(bare(cfg, steps))
    ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
    print(
        json.dumps(
            {
                "model": said.get("model", "resnet18"),
                "batch": batch,
                "threads": torch.get_num_threads(),
                "ours_s_per_step": round(statistics.median(a), 4),
                "bare_s_per_step": round(statistics.median(b), 4),
                "ratio": round(ratio, 4),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
