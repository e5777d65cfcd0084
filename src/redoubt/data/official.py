"""CIFAR's Python batches and SVHN's .mat files, as their authors publish them."""

from __future__ import annotations

import pickle
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from redoubt.data.archives import Remote, download, matches, unreadable
from redoubt.data.source import Allocate, Source, stat_entry
from redoubt.errors import UserError


class Official(Source):
    """Published files: `pieces` names those of a split; torchvision knows their checksums.

    Args:
        verify: Refuse files with other checksums than the published ones.
        known: Name of the class in `torchvision.datasets` that states names, URLs and checksums.
    """

    kind = "official"
    downloads = True

    def __init__(self, *, verify: bool, known: str = "", **where: Any) -> None:
        super().__init__(**where)
        self.verify, self._known = verify, known

    @property
    def known(self) -> Any:
        import torchvision.datasets  # takes a second, so only where it is needed

        return getattr(torchvision.datasets, self._known)

    @property
    def must_match(self) -> bool:
        return self.verify

    def remote(self, split: str) -> Remote:
        raise NotImplementedError

    def pieces(self, split: str) -> list[tuple[Path, str]]:
        """(file, md5) of the files that a split is read from, where they are there."""
        remote = self.remote(split)
        path = self.root / remote.name
        return [(path, remote.md5)] if path.is_file() else []

    def entries(self, split: str) -> Iterator[tuple[str, int, int]]:
        for path, _ in self.pieces(split):
            yield stat_entry(path)

    def fetch(self, split: str) -> None:
        if not self.pieces(split):
            # both splits: who fetches one will want the other, and who has no network should be told once
            download(list(dict.fromkeys(map(self.remote, ("train", "test")))), self.root)

    def check(self, split: str) -> bool:
        url = self.remote(split).url
        found = [matches(p, md5, verify=self.verify, origin=url) for p, md5 in self.pieces(split)]
        return all(found)  # not lazily: each file that differs gets its warning

    def check_size(self, images: tuple[int, int]) -> None:
        """Raise where ``data.image_size`` is not what the files hold."""
        if images != (self.image_size, self.image_size):
            height, width = images
            raise UserError(
                f"data.image_size={self.image_size}, but the images of {self.name} have {height} x {width}"
                f" pixels; set data.image_size={height}"
            )


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and containers, nothing that could run: an unchecked file may be a stranger's."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


class CIFARBatches(Official):
    """``cifar-10-python.tar.gz`` or its unpacked folder. The archive is read without unpacking it."""

    def remote(self, split: str) -> Remote:
        return Remote(self.known.filename, self.known.tgz_md5, self.known.url)

    def _members(self, split: str) -> list[list[str]]:
        return self.known.train_list if split == "train" else self.known.test_list

    def pieces(self, split: str) -> list[tuple[Path, str]]:
        folder = self.root / self.known.base_folder
        unpacked = [(folder / name, md5) for name, md5 in self._members(split)]
        return unpacked if all(path.is_file() for path, _ in unpacked) else super().pieces(split)

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        paths = [path for path, _ in self.pieces(split)]
        try:
            batches = dict(self._batches(paths, split))
        except Exception as e:  # tarfile, zlib and pickle raise a dozen kinds for a damaged file
            raise unreadable(paths[0], e, self.remote(split).url) from e
        missing = [name for name, _ in self._members(split) if name not in batches]
        if missing:
            raise unreadable(paths[0], KeyError(f"no {missing[0]} in it"), self.remote(split).url)
        ordered = [batches[name] for name, _ in self._members(split)]
        self.check_size((32, 32))
        out, first = allocate(sum(len(data) for data, _ in ordered)), 0
        for data, _ in ordered:
            out[first : first + len(data)] = data.reshape(-1, 3, 32, 32)
            first += len(data)
        return np.concatenate([labels for _, labels in ordered])

    def _batches(self, paths: list[Path], split: str) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        wanted = {name for name, _ in self._members(split)}
        if paths[0].name in wanted:
            for path in paths:
                with open(path, "rb") as unpacked:
                    yield path.name, self._read(unpacked)
            return
        with tarfile.open(paths[0], "r|gz") as tar:  # a stream: one pass, nothing written
            for member in tar:
                folder, name = posixpath.split(posixpath.normpath(member.name))
                if folder == self.known.base_folder and name in wanted and (file := tar.extractfile(member)):
                    yield name, self._read(file)

    def _read(self, file: IO[bytes]) -> tuple[np.ndarray, np.ndarray]:
        # bytes, not latin1: a string as long as the images would be made and encoded again
        raw = _Arrays(file, encoding="bytes").load()
        entry = {k.decode() if isinstance(k, bytes) else k: v for k, v in raw.items()}
        labels = entry["labels"] if "labels" in entry else entry["fine_labels"]
        return entry["data"], np.asarray(labels, dtype=np.int64)


class SVHNMat(Official):
    """``{train,test}_32x32.mat``: X uint8 [32, 32, 3, N], y in 1 .. 10 where 10 is the digit 0."""

    def remote(self, split: str) -> Remote:
        url, name, md5 = self.known.split_list[split]
        return Remote(name, md5, url)

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        from scipy.io import loadmat  # comes with scikit-learn

        path = self.root / self.remote(split).name
        try:
            mat = loadmat(path, variable_names=["X", "y"])
            images, labels = mat["X"], mat["y"].ravel().astype(np.int64)
        except Exception as e:  # scipy raises a dozen kinds for a damaged file
            raise unreadable(path, e, self.remote(split).url) from e
        self.check_size(images.shape[:2])
        out = allocate(len(labels))
        for first in range(0, len(labels), 1024):  # in blocks: a transposed whole would be a copy
            out[first : first + 1024] = images[..., first : first + 1024].transpose(3, 2, 0, 1)
        return labels % 10
