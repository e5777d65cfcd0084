"""Where a data set's images come from."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from redoubt.rng import generator
from redoubt.units import height_width

#: Gives the uint8 array ``[n, 3, H, W]`` that a source fills; on disk or in memory, the source does not know.
Allocate = Callable[[int], np.ndarray]


class Source(ABC):
    """A data set in one place and layout: finds its files, checks them, decodes them.

    Args:
        name: Of the data set, as ``"cifar10"``.
        root: Folder that holds the files.
        num_classes: Labels are ``0 .. num_classes - 1``.
        image_size: Height and width in pixels, where they differ [height, width].
    """

    kind: str
    #: Whether decoding is worth a file of its own.
    cached = True
    #: Of what `decode` makes of the same files; raised where pixels or labels change, so that caches are made anew.
    version = 1
    #: Whether `fetch` can get what is missing.
    downloads = False

    def __init__(self, *, name: str, root: Path, num_classes: int, image_size: int | Sequence[int]) -> None:
        self.name, self.root = name, root
        self.num_classes, self.image_size = num_classes, image_size
        self.shape = height_width(image_size)

    @abstractmethod
    def entries(self, split: str) -> Iterable[tuple[str, int, int]]:
        """(name, bytes, mtime in ns) of each file of a split that is there; none: nothing is."""

    @abstractmethod
    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        """Fill the allocated images and return the labels, int64 ``[n]``.

        Raises:
            UserError: A file is broken, or not what the configuration says.
        """

    def classes(self, split: str) -> list[str] | None:
        """The classes' names, in the order of the labels; None where they have none."""
        return None

    @abstractmethod
    def fetch(self, split: str) -> None:
        """Make sure that the files are there.

        Raises:
            UserError: They are not, and cannot be got.
        """

    def check(self, split: str) -> bool:
        """Whether the files are the official ones, bit for bit.

        Raises:
            UserError: They should be and are not.
        """
        return False

    @property
    def must_match(self) -> bool:
        """Whether files that are not the official ones are to be refused."""
        return False

    def signature(self, split: str) -> str | None:
        """A digest that changes when the files or what is wanted of them change; None: no files."""
        entries = list(self.entries(split))
        if not entries:
            return None
        text = "\n".join("\t".join(map(str, entry)) for entry in entries)
        return hashlib.sha256(f"{self.version} {self.num_classes} {self.image_size}\n{text}".encode()).hexdigest()


def stat_entry(path: Path, name: str | None = None) -> tuple[str, int, int]:
    """(name, bytes, mtime in ns) of one file."""
    stat = os.stat(path)
    return name or path.name, stat.st_size, stat.st_mtime_ns


class Generated(Source):
    """A source that has no files and makes its images in a moment."""

    cached = False

    def entries(self, split: str) -> Iterable[tuple[str, int, int]]:
        return []

    def fetch(self, split: str) -> None:
        return None


class Fake(Generated):
    """Random images of a data set's shape and classes: one blocky pattern per class, and noise.

    A few hundred of them, the same on every machine and for every seed; for tests and dry runs.
    """

    kind = "fake"

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        n = max(4 * self.num_classes, 512) // (1 if split == "train" else 2)
        blocks = torch.randint(0, 128, (self.num_classes, 3, 4, 4), generator=generator(0, "fake-classes"))
        down, right = (torch.arange(size) * 4 // size for size in self.shape)
        patterns = blocks.to(torch.uint8)[:, :, down][..., right]
        numbers = generator(0, f"fake-{split}")
        noise = torch.randint(0, 128, (n, 3, *self.shape), generator=numbers, dtype=torch.uint8)
        labels = torch.arange(n) % self.num_classes
        allocate(n)[:] = (patterns[labels] + noise).numpy()
        return labels.numpy()
