"""Augmentations of a whole uint8 batch at once, on its own device.

An augmentation is a function ``(images uint8 [N, C, H, W], labels int64 [N], generator) -> (images, labels)``
that draws all its numbers from the generator. It always sees the *global* batch, on every rank, so that one
which mixes examples (cutmix, mixup) gives the same result for any number of processes. ``data.augment`` takes
one of the names below or the dotted path of a function of your own.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from redoubt.errors import UserError

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

#: Zero pixels around the image before the random crop, as in every one of the papers.
PAD = 4


def shift_flip(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Move each image, fill with zeros, and mirror it where asked: one gather for the whole batch.

    Equal to zero-padding by ``PAD``, cropping at ``(PAD + dy, PAD + dx)`` and then flipping.

    Args:
        images: ``[N, C, H, W]`` of any dtype.
        dy: ``[N]`` int64, rows by which the crop's window moves down.
        dx: ``[N]`` int64, columns by which it moves right.
        flip: ``[N]`` bool, mirror left and right.

    Returns:
        A new tensor of the same shape and dtype.
    """
    n, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) + dy[:, None]  # [N, H]
    cols = torch.arange(width, device=images.device).expand(n, width)
    cols = torch.where(flip[:, None], width - 1 - cols, cols) + dx[:, None]  # [N, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None, :]
    source = source.view(n, 1, -1).expand(n, channels, -1)
    moved = images.reshape(n, channels, -1).gather(2, source).view_as(images)
    return moved * inside[:, None]


def _offsets(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(-PAD, PAD + 1, (2, len(images)), generator=generator, device=images.device)
    return drawn[0], drawn[1]


def _coins(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (len(images),), generator=generator, device=images.device).bool()


def none(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The images as they are."""
    return images, labels


def crop_flip(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Zero-pad by 4, crop at random, mirror every other image."""
    dy, dx = _offsets(images, generator)
    return shift_flip(images, dy, dx, _coins(images, generator)), labels


def crop(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Zero-pad by 4 and crop at random."""
    dy, dx = _offsets(images, generator)
    return shift_flip(images, dy, dx, torch.zeros_like(dy, dtype=torch.bool)), labels


def flip(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror every other image."""
    still = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return shift_flip(images, still, still, _coins(images, generator)), labels


BUILT_IN: dict[str, Augment] = {f.__name__: f for f in (none, crop_flip, crop, flip)}


def resolve(name: str | None) -> Augment:
    """The augmentation that ``data.augment`` names; null is ``none``.

    Raises:
        UserError: No built-in has this name, or no function lies at this dotted path.
    """
    if name is None:
        return none
    if name in BUILT_IN:
        return BUILT_IN[name]
    if "." not in name:
        close = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"data.augment={name} is unknown; {hint}Names: {', '.join(BUILT_IN)}, or the dotted path of a"
            " function (images, labels, generator) -> (images, labels)"
        )
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"data.augment={name}: there is no such function ({e})") from e
    if not callable(found):
        raise UserError(f"data.augment={name} is not a function")
    return found
