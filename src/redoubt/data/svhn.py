"""SVHN's .mat files, as their authors publish them."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from redoubt.data.archives import Remote, unreadable
from redoubt.data.official import PIXELS, Official
from redoubt.data.source import Allocate

_COMPRESSED = 15


class SVHNMat(Official):
    """``{train,test}_32x32.mat``: X uint8 [32, 32, 3, N], y in 1 .. 10 where 10 is the digit 0."""

    def remote(self, split: str) -> Remote:
        url, name, md5 = self.known.split_list[split]
        return Remote(name, md5, url)

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        from scipy.io import loadmat, whosmat  # comes with scikit-learn

        path = self.root / self.remote(split).name
        try:
            if not self.verify:
                check_size(path, 2 * PIXELS * self.most[split])
            found = {name: (shape, kind) for name, shape, kind in whosmat(path)}
            shape, kind = found["X"]
            if len(shape) != 4 or shape[2] != 3 or kind != "uint8" or not 0 < shape[3] <= self.most[split]:
                raise ValueError(f"X is {kind} {list(shape)}, not uint8 [32, 32, 3, N]")
            size, kind = found["y"]
            if size not in ((shape[3], 1), (1, shape[3])) or not kind.removeprefix("u").startswith(("int", "double")):
                raise ValueError(f"y is {kind} {list(size)}, not a label for each of {shape[3]} images")
            mat = loadmat(path, variable_names=["X", "y"])
            images, labels = mat["X"], mat["y"].ravel().astype(np.int64)
            if labels.min() < 1 or labels.max() > 10 or (labels != mat["y"].ravel()).any():
                raise ValueError("y holds other labels than 1 to 10")
        except Exception as e:  # scipy raises a dozen kinds for a damaged file
            raise unreadable(path, e, self.remote(split).url) from e
        self.check_size(images.shape[:2])
        out = allocate(len(labels))
        for first in range(0, len(labels), 1024):  # in blocks: a transposed whole would be a copy
            out[first : first + 1024] = images[..., first : first + 1024].transpose(3, 2, 0, 1)
        return labels % 10


def check_size(path: Path, most: int) -> None:
    """Refuses a .mat file whose elements unpack to more than so many bytes; scipy would make room for all of them.

    Raises:
        ValueError: They do, or it is no such file.
    """
    left = most
    with open(path, "rb") as file:
        order = file.read(128)[126:]
        if order not in (b"IM", b"MI"):
            raise ValueError("it is no MATLAB 5 file")
        while tag := file.read(8):
            kind, size = (int.from_bytes(part, "little" if order == b"IM" else "big") for part in (tag[:4], tag[4:]))
            if kind != _COMPRESSED:
                left -= size
                file.seek(size, os.SEEK_CUR)
            else:
                unpack = zlib.decompressobj()
                while size > 0 and left >= 0 and (packed := file.read(min(size, 1 << 20))):
                    size -= len(packed)
                    while packed and left >= 0:
                        left -= len(unpack.decompress(packed, 1 << 20))
                        packed = unpack.unconsumed_tail
            if left < 0:
                raise ValueError(f"it unpacks to more than {most} bytes")
