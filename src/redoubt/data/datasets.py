"""The data sets: each is `ImageData` and where its published files are. Their facts stand in conf/data/."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from redoubt.data import classes
from redoubt.data.module import ImageData
from redoubt.data.official import CIFARBatches, Official
from redoubt.data.source import Allocate, Generated, Source
from redoubt.data.subsets import split_each
from redoubt.data.svhn import SVHNMat
from redoubt.data.tiny import ZIP, TinyFolder, TinyZip
from redoubt.errors import UserError
from redoubt.rng import generator


class CIFAR10(ImageData):
    """CIFAR-10: 50,000 training and 10,000 test images of 10 classes, 32 x 32."""

    name = "cifar10"
    names = classes.CIFAR10
    published = (50_000, 10_000)

    def official(self) -> Official:
        return CIFARBatches(known="CIFAR10", verify=self.verify, most=self.published, **self.where())


class CIFAR100(ImageData):
    """CIFAR-100: 50,000 training and 10,000 test images of 100 (fine) classes, 32 x 32."""

    name = "cifar100"
    names = classes.CIFAR100
    published = (50_000, 10_000)

    def official(self) -> Official:
        return CIFARBatches(known="CIFAR100", verify=self.verify, most=self.published, **self.where())


class SVHN(ImageData):
    """Street View House Numbers, cropped digits: 73,257 training and 26,032 test images, 32 x 32."""

    name = "svhn"
    names = classes.DIGITS
    published = (73_257, 26_032)

    def official(self) -> Official:
        return SVHNMat(known="SVHN", verify=self.verify, most=self.published, **self.where())


class TinyImageNet(ImageData):
    """Tiny ImageNet: 100,000 training images of 200 classes, 64 x 64; tested on its 10,000 of validation."""

    name = "tiny_imagenet"
    published = (100_000, 10_000)

    def official(self) -> Official:
        folder = TinyFolder(verify=self.verify, most=self.published, **self.where())
        if folder.present() and not (self.root / ZIP.name).is_file():
            return folder
        return TinyZip(verify=self.verify, most=self.published, **self.where())


class Digits(ImageData):
    """scikit-learn's 1,797 handwritten digits as three equal channels; nothing to download."""

    name = "digits"
    names = classes.DIGITS

    def official(self) -> Source:
        return DigitsSource(**self.where())


class DigitsSource(Generated):
    """The digits, bilinearly enlarged from 8 x 8; one in five of each class is a test image.

    The split is fixed, so that runs with different seeds are tested on the same images.

    Raises:
        UserError: ``image_size`` is not 8, 16 or 32.
    """

    kind = "official"

    def __init__(self, **where: Any) -> None:
        super().__init__(**where)
        if self.image_size not in (8, 16, 32):
            raise UserError(f"data.image_size={self.image_size}: the digits are made in 8, 16 or 32 pixels")

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        from sklearn.datasets import load_digits

        digits = load_digits()
        train, test = split_each(torch.from_numpy(digits.target), 0.2, generator(0, "digits"))
        rows = (train if split == "train" else test).numpy()
        out = allocate(len(rows))
        for i, row in enumerate(rows):
            gray = Image.fromarray(np.rint(digits.images[row] * (255 / 16)).astype(np.uint8))
            out[i] = np.asarray(gray.resize(self.shape, Image.Resampling.BILINEAR))
        return digits.target[rows].astype(np.int64)
