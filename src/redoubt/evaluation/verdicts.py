"""Running attacks over test examples: float32, every example once, on any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor

from redoubt.defenses import RobustModule
from redoubt.nets import attack_mode
from redoubt.rng import generator
from redoubt.training.distributed import ranks
from redoubt.training.progress import console

Verdicts = dict[str, np.ndarray]


def judge(
    module: RobustModule,
    images: Tensor,
    labels: Tensor,
    attacks: Mapping[str, Any],
    *,
    chunk: int,
    seed: int,
    device: torch.device,
    progress: bool = True,
) -> Verdicts:
    """Which examples are still classified correctly.

    Chunks are fixed runs of ``chunk`` examples; process r of n takes chunks r, r + n, ... whole, and a chunk's
    random numbers come from (seed, attack, restart, chunk), so verdicts do not depend on the number of processes.

    Args:
        module: Its ``logits`` are attacked; weights as they are.
        images: uint8 [N, 3, H, W]; labels: int64 [N].
        attacks: By name.
        chunk: Examples attacked together.
        seed: Of random starts.
        device: Where to compute; the module is there.
        progress: Show a bar on a terminal.

    Returns:
        ``natural`` and each attack's name -> bool [N], the same on every process.
    """
    rank, world = ranks()
    starts = range(0, len(labels), chunk)
    names = ["natural", *attacks]
    mine: dict[int, np.ndarray] = {}
    bar = Progress(console=console, disable=not (progress and console.is_terminal and rank == 0), transient=True)
    with bar, full_precision(), attack_mode(module):
        for i in bar.track(range(rank, len(starts), world), description="attacking"):
            rows = slice(starts[i], starts[i] + chunk)
            x = (images[rows].to(device).float() / 255).contiguous(memory_format=module.format)
            y = labels[rows].to(device)
            mine[i] = _chunk(module, x, y, attacks, seed, i).cpu().numpy()
    everyone: list[Any] = [mine]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
    chunks = {i: verdict for part in everyone for i, verdict in part.items()}
    table = np.concatenate([chunks[i] for i in range(len(starts))], axis=1)
    return dict(zip(names, table, strict=True))


def _chunk(module: RobustModule, x: Tensor, y: Tensor, attacks: Mapping[str, Any], seed: int, number: int) -> Tensor:
    """Verdicts [1 + attacks, B] of one chunk, natural first."""

    def right(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = module.logits(images)
            return (logits.argmax(1) == y) & logits.isfinite().all(1)  # argmax calls NaN class 0

    found: dict[str, Tensor] = {}
    reached: dict[Any, tuple[int, Tensor]] = {}
    for name in sorted(attacks, key=lambda n: attacks[n].steps):  # the shorter first: a longer one may go on from it
        attack = attacks[name]
        path = attack.path
        adv = attack(
            module.logits,
            x,
            y,
            generator(seed, f"attack/{name}", 0, number, device=x.device),
            reached.get(path),
        )
        if path is not None:
            reached[path] = (attack.steps, adv)
        found[name] = right(adv)
    return torch.stack([right(x), *(found[name] for name in attacks)])


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 without TF32 or autocast inside; everything is as it was afterwards."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def ensemble(verdicts: Verdicts) -> np.ndarray:
    """Right on the clean image and under every attack: the row-wise AND (FSR's "Ensemble")."""
    return np.logical_and.reduce(list(verdicts.values()))


def wilson(right: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % score interval of Wilson (1927) for a share of ``right`` out of ``n``."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracies(verdicts: Mapping[str, Sequence[bool] | np.ndarray]) -> dict[str, dict[str, float | int]]:
    """Accuracy in [0, 1] with its interval, by attack."""
    table = {}
    for name, verdict in verdicts.items():
        right, n = int(np.sum(verdict)), len(verdict)
        low, high = wilson(right, n)
        table[name] = {"accuracy": right / n if n else 0.0, "low": low, "high": high, "n": n}
    return table


def nrr(natural: float, robust: float) -> float:
    """CURE's natural-robust ratio: the harmonic mean of the two accuracies."""
    return 2 * natural * robust / (natural + robust) if natural + robust else 0.0
