"""What the fork server of `tests.processes` imports before it forks: all that a command imports sooner or later."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import hydra.main  # noqa: F401
import lightning.pytorch  # noqa: F401
import torch
import torchvision  # noqa: F401

import redoubt.cli
import redoubt.jobs
import redoubt.reporting.plan
import redoubt.runs.commands

torch.set_num_threads(1)
redoubt.cli.build_module(redoubt.config.compose(["model=resnet_small"]))  # imports what is imported late
for attack in ("none", "fgsm", "pgd20"):  # what most forks compose
    for trainer in ("cpu", "ddp_cpu"):
        redoubt.config.compose(["model=cnn_small", "data=digits", f"attack={attack}", f"trainer={trainer}"])

gc.freeze()  # what is here stays: no fork's collection looks through it, or copies its pages

# A fork has none of the threads of the process that it was made of, but the locks that they held.
_tasks = Path("/proc/self/task")
assert (len(list(_tasks.iterdir())) if _tasks.is_dir() else threading.active_count()) == 1, "the server has threads"
