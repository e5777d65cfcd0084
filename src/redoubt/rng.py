"""Counted randomness: every random number is a function of what it is for, never of what came before.

A draw is named by (seed, purpose, counters), so a resumed run, another number of processes or another order
of calls gives the same numbers. Nothing here touches torch's global generators.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed from (seed, purpose, counters)."""
    text = "/".join(map(str, (seed, purpose, *counters)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose.

    Args:
        seed: The run's (or the evaluation's) seed.
        purpose: What the numbers are for, as ``"inner"`` or ``"augment"``.
        counters: The step, the chunk, the restart: whatever tells one draw from the next.
        device: Where the numbers are drawn. CPU and CUDA give different numbers for the same name; the meta device,
            which has no generators, takes the CPU's.
    """
    device = torch.device(device)
    g = torch.Generator(device="cpu" if device.type == "meta" else device)
    g.manual_seed(derive(seed, purpose, *counters))
    return g
