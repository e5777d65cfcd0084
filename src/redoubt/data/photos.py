"""Images of the user's own, in folders: any classes, any sizes, a validation split of their own."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
from torch import Tensor

from redoubt.data.folder import Folder
from redoubt.data.module import ImageData
from redoubt.data.source import Fake, Source
from redoubt.data.subsets import first
from redoubt.errors import UserError

log = logging.getLogger("redoubt")


class PhotoFolder(Folder):
    """Class folders under ``train``, ``test`` and ``val``; images of another size are resized."""

    kind = "photos"
    otherwise = " or point data.root at them"
    resize = True

    @property
    def title(self) -> str:
        return self.root.name


class Photos(ImageData):
    """``data=folder``: the classes and the size are the user's.

    Where there are ``test/`` and ``val/``, the latter is the validation split, and ``val_fraction`` must be 0.
    """

    name = "folder"

    def _source(self) -> Source:
        return Fake(**self.where()) if self.source == "fake" else PhotoFolder(**self.where())

    @property
    def own_val(self) -> bool:
        """Whether there is a folder of validation images."""
        there = self.source != "fake" and all((self.root / split).is_dir() for split in ("val", "test"))
        if there and self.val_fraction:
            raise UserError(
                f"data.val_fraction={self.val_fraction}: {self.root / 'val'} is the validation split: leave 0"
            )
        return there

    def whole(self, split: str) -> str:
        return "val" if split == "val" and self.own_val else super().whole(split)

    def _choose(self, split: str) -> Tensor | None:
        if split != "val" or not self.own_val:
            return super()._choose(split)
        labels = self._split("val").labels
        return None if self.limit_val is None else first(labels, self.limit_val, self.seed, self.balanced, "limit_val")

    @property
    def validates(self) -> bool:
        return super().validates or self.own_val

    def fingerprint(self, split: str) -> str:
        """Of the training split and of the validation split, which chooses a checkpoint."""
        found = super().fingerprint(split)
        if split != "train" or not self.own_val:
            return found
        both = f"{found} {super().fingerprint('val')}"
        return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the training images, in [0, 1], to four digits.

        Raises:
            UserError: There are no training images.
        """
        if self.source != "fake" and not (self.root / "train").is_dir():
            raise UserError(
                f"model.normalize=true wants data.mean and data.std: {self.root} has no train/ to compute them of"
            )
        images = self._split("train").images
        counts = np.zeros((3, 256), dtype=np.int64)
        for start in range(0, len(images), 256):
            for channel in range(3):
                counts[channel] += np.bincount(images[start : start + 256, channel].numpy().ravel(), minlength=256)
        levels = np.arange(256) / 255
        mean = counts @ levels / counts.sum(1)
        std = np.sqrt(np.maximum(counts @ levels**2 / counts.sum(1) - mean**2, 0))
        found = [round(float(m), 4) for m in mean], [max(round(float(s), 4), 1e-4) for s in std]
        log.info("%s: mean %s and std %s of the training images", self.root, *found)
        return found
