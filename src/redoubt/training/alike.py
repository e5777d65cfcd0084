"""Whether all ranks still hold the same weights, bit for bit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from redoubt.errors import UserError
from redoubt.training.distributed import gather, ranks


def check_weights(module: Any, epoch: int) -> None:
    """Refuses to go on where a rank's weights, averages or optimizer differ from the others'.

    Each rank digests its own, and only the digests are compared: once an epoch, never in a step.

    Args:
        module: A `redoubt.defenses.RobustModule` that trains.
        epoch: That was just finished, for the message.

    Raises:
        UserError: On every rank; the line names those that differ from most.
    """
    if ranks()[1] == 1:
        return
    told = gather(digest(module))
    most = Counter(told).most_common(1)[0][0]  # of two ranks that differ, the first's
    differing = [rank for rank, found in enumerate(told) if found != most]
    if differing:
        who = f"rank {differing[0]} holds" if len(differing) == 1 else f"ranks {', '.join(map(str, differing))} hold"
        raise UserError(
            f"{who} other weights than rank {told.index(most)} after epoch {epoch}, which was not saved: they do not "
            "compute alike: take the same device, driver and libraries for all, and start again"
        )


def digest(module: Any) -> str:
    """SHA-256 of the bits of all that training moves, but for counters of batches: they count micro-batches, too."""
    found = hashlib.sha256()
    for tensor in _moved(module):
        if tensor.is_floating_point():
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _moved(module: Any) -> Iterator[Tensor]:
    yield from module.state_dict().values()
    if module.ema is not None:
        yield from module.ema.average.values()
    for optimizer in module.raw_optimizers():
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
