"""Batches out of one tensor: no worker processes, no copy of the data set, no per-image Python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redoubt.data.augment import Augment, none
from redoubt.errors import UserError
from redoubt.rng import generator


class Batch(NamedTuple):
    """One rank's share of a global batch.

    Attributes:
        x: float32 ``[b, 3, H, W]`` in [0, 1].
        y: int64 ``[b]``.
        start: This rank's first row within the global batch.
        total: Rows of the global batch.
    """

    x: Tensor
    y: Tensor
    start: int
    total: int


def pixels(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def share(total: int, rank: int, world_size: int) -> tuple[int, int]:
    """The rows ``[start, stop)`` of a global batch that a rank takes."""
    return total * rank // world_size, total * (rank + 1) // world_size


def count_batches(rows: int, batch_size: int, world_size: int = 1) -> int:
    """Training batches per epoch, see `TrainLoader`.

    Raises:
        UserError: A rank would get fewer than two rows of every batch.
    """
    if batch_size // world_size < 2:
        raise UserError(
            f"data.batch_size={batch_size} over {world_size} process(es) is fewer than 2 images each, which"
            f" batch normalisation cannot use; set data.batch_size to {2 * world_size} or more"
        )
    full, rest = divmod(rows, batch_size)
    count = full + (rest // world_size >= 2)
    if not count:
        raise UserError(
            f"{rows} training image(s) over {world_size} process(es) make no batch; raise data.limit_train"
            " or lower data.val_fraction"
        )
    return count


class TrainLoader:
    """Shuffled, augmented batches with a place (epoch, position) that can be saved and restored.

    Every epoch has one permutation, a function of (seed, epoch), common to all ranks. Each rank builds the
    whole global batch in uint8 (half a megabyte), augments it with numbers that are a function of (seed,
    global step), and keeps its own contiguous rows; so the batches of any number of ranks are, put together,
    those of one. The last batch of an epoch may be smaller, but is dropped where it leaves a rank fewer than
    two rows, because batch normalisation cannot normalise one.

    An iteration goes on at the loader's place. At ``position == len`` (an epoch that was finished) it begins
    the next epoch. All of this happens at the first ``next()``: Lightning calls ``iter()`` before it restores
    the place. The position counts batches handed out, so a state taken while a batch is trained on names the
    one after it.

    Args:
        images: uint8 ``[N, 3, H, W]`` on the training device.
        labels: int64 ``[N]`` on the same device.
        index: int64 ``[n]``, the rows to train on; None is all.
        batch_size: Rows of the global batch.
        augment: See `redoubt.data.augment`.
        seed: Of order and augmentation.
        rank: This process.
        world_size: Number of processes.

    Raises:
        UserError: Not one batch fits.
    """

    def __init__(
        self,
        *,
        images: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        batch_size: int,
        augment: Augment = none,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels = images, labels
        self.index = None if index is None else index.to(images.device)
        self.rows = len(images) if index is None else len(index)
        self.batch_size, self.augment, self.seed = batch_size, augment, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.position = 0, 0
        self._length = count_batches(self.rows, batch_size, world_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        order = self.order(self.epoch)
        while self.position < len(self):
            batch = self.batch(order, self.epoch, self.position)
            self.position += 1
            yield batch

    def order(self, epoch: int) -> Tensor:
        """The rows of the images in the order of an epoch, int64 ``[rows]`` on the device."""
        permutation = torch.randperm(self.rows, generator=generator(self.seed, "order", epoch))
        permutation = permutation.to(self.images.device)
        return permutation if self.index is None else self.index[permutation]

    def batch(self, order: Tensor, epoch: int, position: int) -> Batch:
        """This rank's share of one batch of an epoch."""
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        step = epoch * len(self) + position
        numbers = generator(self.seed, "augment", step, device=self.images.device)
        images, labels = self.augment(self.images[rows], self.labels[rows], numbers)
        start, stop = share(len(rows), self.rank, self.world_size)
        return Batch(pixels(images[start:stop]), labels[start:stop], start, len(rows))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


class EvalLoader:
    """Every example exactly once, in order, as it is.

    Ranks share each batch as in training. A rank that would get nothing of the last batch ends one batch
    earlier: no image is repeated to fill up, and sums over ranks are exact.
    """

    def __init__(
        self,
        *,
        images: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.labels = images, labels
        rows = torch.arange(len(images)) if index is None else index
        batches = rows.to(images.device).split(batch_size)
        shares = [(b, *share(len(b), rank, world_size)) for b in batches]
        self.shares = [(b[start:stop], start, len(b)) for b, start, stop in shares if stop > start]

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[Batch]:
        for rows, start, total in self.shares:
            yield Batch(pixels(self.images[rows]), self.labels[rows], start, total)
