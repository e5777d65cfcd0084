"""Which rows of a split are used: class-balanced orders and stratified splits, as index tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from redoubt.errors import UserError
from redoubt.rng import generator


def balanced_order(labels: Tensor, numbers: torch.Generator) -> Tensor:
    """All rows, one of each class in turn, each class's members shuffled.

    Any first n of it are class-balanced, and a subset of any first m > n.

    Args:
        labels: int64 ``[N]``.
        numbers: Of the shuffle.

    Returns:
        int64 ``[N]``, a permutation.
    """
    shuffled = torch.randperm(len(labels), generator=numbers)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    turn = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return by_class[turn.argsort(stable=True)]  # stable: within a turn, classes stay in order


def stratified_split(labels: Tensor, fraction: float, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that are split off, in each class the same fraction.

    Args:
        labels: int64 ``[N]``.
        fraction: Of each class, rounded to whole images.
        numbers: Choose them.

    Returns:
        Two ascending int64 tensors, together all rows.

    Raises:
        UserError: A class would keep no image, or not one image would be split off.
    """
    shuffled = torch.randperm(len(labels), generator=numbers)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    off: list[Tensor] = []
    for members in by_class.split(labels.bincount().tolist()):
        take = round(fraction * len(members))
        if len(members) and take >= len(members):
            raise UserError(
                f"data.val_fraction={fraction} leaves class {int(labels[members[0]])} without a training"
                f" image (it has {len(members)}); lower it"
            )
        off.append(members[:take])
    held_out = torch.cat(off).sort().values
    if not len(held_out):
        raise UserError(f"data.val_fraction={fraction} is not one image of any class; raise it or set it to 0")
    stays = torch.ones(len(labels), dtype=torch.bool)
    stays[held_out] = False
    return stays.nonzero().squeeze(1), held_out


def first(labels: Tensor, n: int, seed: int) -> Tensor:
    """The first n rows of the class-balanced order that `data.limit_*` takes from."""
    return balanced_order(labels, generator(seed, "limit"))[:n]


def training_rows(
    labels: Tensor, *, val_fraction: float, limit: int | None, seed: int
) -> tuple[Tensor | None, Tensor | None]:
    """Rows to train on (None is all) and rows to validate on (None is none).

    The validation rows are taken off first; so they are the same for every limit.
    """
    stays: Tensor | None = None
    held_out: Tensor | None = None
    if val_fraction > 0:
        stays, held_out = stratified_split(labels, val_fraction, generator(seed, "split"))
    if limit is not None:
        rows = torch.arange(len(labels)) if stays is None else stays
        stays = rows[first(labels[rows], limit, seed)]
    return stays, held_out


def probe_rows(labels: Tensor, train: Tensor | None, n: int, seed: int) -> Tensor:
    """A fixed, class-balanced subset of the rows that are trained on."""
    rows = torch.arange(len(labels)) if train is None else train
    return rows[balanced_order(labels[rows], generator(seed, "probe"))[:n]]
