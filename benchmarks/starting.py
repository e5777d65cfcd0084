"""Start-up: from the command to the first batch that would be trained on. Child processes take turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import SIDES, Section, alternate, compared
from benchmarks.options import Options

ROOT = Path(__file__).resolve().parents[1]


def start(o: Options) -> Section:
    """``redoubt train`` beside a plain script of the same ResNet-18, and beside ``import torch`` alone."""
    title = "Start-up: seconds from the command to the first batch, ResNet-18"
    section = Section("start", title, SIDES)
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "ours": ["ours", "model=resnet18", "data=cifar10", "data.source=fake", "attack=none", "trainer=cpu",
                     "trainer.progress=false", f"data.batch_size={o.batch}", f"paths.outputs={folder}"],
            "authors": ["authors", str(o.batch), str(o.workers)],
            "import torch": ["torch"],
        }  # fmt: skip
        sides = {name: lambda words=words: until_first_batch(words, o.threads) for name, words in commands.items()}
        readings = alternate(sides, lambda call: call(), pairs=o.pairs, seconds=o.seconds, warm=False)
    section.rows = compared(readings, "ours")
    return section


def until_first_batch(words: list[str], threads: int) -> float:
    """Seconds until a child prints the time at its first batch."""
    paths = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.first_batch", *words], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1]) - began
