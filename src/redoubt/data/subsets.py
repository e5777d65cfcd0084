"""Which rows of a split are used: orders in proportion to the classes or balanced, and splits, as index tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from redoubt.errors import UserError
from redoubt.rng import generator


def _by_class(labels: Tensor, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """All rows, those of each class together and shuffled, and how many each class has."""
    shuffled = torch.randperm(len(labels), generator=numbers)
    return shuffled[labels[shuffled].argsort(stable=True)], labels.bincount()


def _turns(counts: Tensor) -> Tensor:
    """The place of each of the rows of `_by_class` within its class, from 0."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def balanced_order(labels: Tensor, numbers: torch.Generator) -> Tensor:
    """All rows, one of each class in turn, each class's members shuffled.

    Any first n of it are class-balanced, and a subset of any first m > n.

    Args:
        labels: int64 ``[N]``.
        numbers: Of the shuffle.

    Returns:
        int64 ``[N]``, a permutation.
    """
    by_class, counts = _by_class(labels, numbers)
    turn = _turns(counts)
    return by_class[turn.argsort(stable=True)]  # stable: within a turn, classes stay in order


def proportional_order(labels: Tensor, numbers: torch.Generator) -> Tensor:
    """All rows, so that in any first n of them the classes have their shares of the whole, each class shuffled.

    The i-th of a class's m members (from 0) stands at (i + u) / m of the way, with one u in (0, 1) for the class, so
    that its count among the first n is n m / N, rounded up or down. The u of the K classes are 1/2K, 3/2K, ... in a
    random order: many small classes, alike in size, come in one after the other and not all at once. A subset of the
    first m > n holds that of the first n.

    Args:
        labels: int64 ``[N]``.
        numbers: Of the shuffle.

    Returns:
        int64 ``[N]``, a permutation.
    """
    by_class, counts = _by_class(labels, numbers)
    turn = _turns(counts)
    begin = (torch.randperm(len(counts), generator=numbers).double() + 0.5) / len(counts)
    way = (turn + begin.repeat_interleave(counts)) / counts.repeat_interleave(counts)
    return by_class[way.argsort(stable=True)]


def largest_remainders(counts: Tensor, n: int) -> Tensor:
    """Of classes with these counts, how many of each are n in proportion: whole shares, then the largest remainders.

    Of the remainders those of classes that would keep a member come first.
    """
    total = int(counts.sum())
    shares, rest = counts * n // total, counts * n % total
    may = shares + 1 < counts
    chosen = torch.where(may, rest, -1).argsort(descending=True, stable=True)[: n - int(shares.sum())]
    shares[chosen] += 1
    return shares


def proportional_split(labels: Tensor, fraction: float, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that are split off, of which each class has its share by largest remainder.

    Args:
        labels: int64 ``[N]``.
        fraction: Of all rows, rounded to whole images.
        numbers: Choose them.

    Returns:
        Two ascending int64 tensors, together all rows.

    Raises:
        UserError: A class of several images would keep none, or not one image would be split off.
    """
    counts, n = labels.bincount(), round(fraction * len(labels))
    if not n:
        raise UserError(f"data.val_fraction={fraction} is not one of {len(labels)} images; raise it or set it to 0")
    take = largest_remainders(counts, n)
    lost = ((take >= counts) & (counts > 1)).nonzero()
    if len(lost):
        raise UserError(
            f"data.val_fraction={fraction} leaves class {int(lost[0])} without a training image (it has"
            f" {int(counts[lost[0]])}); lower it"
        )
    return _split_off(labels, take.tolist(), numbers)


def split_each(labels: Tensor, fraction: float, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that are split off, in each class the same fraction, rounded; ascending."""
    return _split_off(labels, [round(fraction * count) for count in labels.bincount().tolist()], numbers)


def _split_off(labels: Tensor, take: Sequence[int], numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows that stay and rows that are split off, so many of each class; ascending."""
    by_class, counts = _by_class(labels, numbers)
    off = _turns(counts) < torch.tensor(take).repeat_interleave(counts)
    return by_class[~off].sort().values, by_class[off].sort().values


def first(labels: Tensor, n: int, seed: int, balanced: bool = False, purpose: str = "limit") -> Tensor:
    """The first n rows of the order that `data.limit_*` takes from."""
    order = balanced_order if balanced else proportional_order
    return order(labels, generator(seed, purpose))[:n]


def training_rows(
    labels: Tensor,
    *,
    val_fraction: float,
    limit: int | None,
    seed: int,
    limit_val: int | None = None,
    balanced: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Rows to train on (None is all) and rows to validate on (None is none).

    The limit is of what is used; the validation rows are split off from these.
    """
    rows = None if limit is None else first(labels, limit, seed, balanced)
    if not val_fraction:
        return rows, None
    used = torch.arange(len(labels)) if rows is None else rows
    stays, held_out = proportional_split(labels[used], val_fraction, generator(seed, "split"))
    if limit_val is not None:
        held_out = held_out[first(labels[used[held_out]], limit_val, seed, balanced, "limit_val")]
    return used[stays], used[held_out]


def probe_rows(labels: Tensor, train: Tensor | None, n: int, seed: int) -> Tensor:
    """A fixed, class-balanced subset of the rows that are trained on."""
    rows = torch.arange(len(labels)) if train is None else train
    return rows[balanced_order(labels[rows], generator(seed, "probe"))[:n]]
