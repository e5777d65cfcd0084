"""Published files; CIFAR's Python batches, as their authors publish them."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from redoubt.data.archives import Limited, Remote, download, matches, unreadable
from redoubt.data.pickles import load_arrays
from redoubt.data.source import Allocate, Source, stat_entry
from redoubt.errors import UserError

#: Bytes of an image.
PIXELS = 3 * 32 * 32
#: Of an archive of batches; the published ones have nine.
MEMBERS = 100


class Official(Source):
    """Published files: `pieces` names those of a split; torchvision knows their checksums.

    Args:
        most: How many images a split has, by "train" and "test"; an archive of more is none of these.
        verify: Refuse files with other checksums than the published ones.
        known: Name of the class in `torchvision.datasets` that states names, URLs and checksums.
    """

    kind = "official"
    downloads = True

    def __init__(self, *, verify: bool, most: tuple[int, int], known: str = "", **where: Any) -> None:
        super().__init__(**where)
        self.verify, self._known = verify, known
        self.most = dict(zip(("train", "test"), most, strict=True))

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
        if images != self.shape:
            height, width = images
            raise UserError(
                f"data.image_size={self.image_size}, but the images of {self.name} have {height} x {width}"
                f" pixels; set data.image_size={height}"
            )


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
        batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        try:
            for name, raw in self._batches(paths, split):
                if name in batches:
                    raise ValueError(f"{name} is twice in it")
                batches[name] = _read(raw)
            missing = [name for name, _ in self._members(split) if name not in batches]
            if missing:
                raise KeyError(f"no {missing[0]} in it")
            if sum(len(data) for data, _ in batches.values()) > self.most[split]:
                raise ValueError(f"it holds more than {self.most[split]} images")
        except Exception as e:  # tarfile, zlib and pickle raise a dozen kinds for a damaged file
            raise unreadable(paths[0], e, self.remote(split).url) from e
        ordered = [batches[name] for name, _ in self._members(split)]
        self.check_size((32, 32))
        out, first = allocate(sum(len(data) for data, _ in ordered)), 0
        for data, _ in ordered:
            out[first : first + len(data)] = data.reshape(-1, 3, 32, 32)
            first += len(data)
        return np.concatenate([labels for _, labels in ordered])

    def _batches(self, paths: list[Path], split: str) -> Iterator[tuple[str, bytes]]:
        wanted = {name for name, _ in self._members(split)}
        if paths[0].name in wanted:
            for path in paths:
                with open(path, "rb") as unpacked:
                    yield path.name, self._whole(unpacked, split)
            return
        held = 2 * PIXELS * sum(self.most.values())  # and the names and labels of the images
        with gzip.open(paths[0]) as unpacked:
            stream: Any = Limited(unpacked, held)
            with tarfile.open(fileobj=stream, mode="r|") as tar:  # one pass, nothing written
                yield from self._members_of(tar, wanted, split)

    def _members_of(self, tar: tarfile.TarFile, wanted: set[str], split: str) -> Iterator[tuple[str, bytes]]:
        for count, member in enumerate(tar):
            if count >= MEMBERS:
                raise ValueError(f"it holds more than {MEMBERS} files")
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder == self.known.base_folder and name in wanted:
                if not member.isreg():
                    raise ValueError(f"{name} is no file in it")
                content = tar.extractfile(member)
                assert content is not None
                yield name, self._whole(content, split)

    def _whole(self, file: IO[bytes], split: str) -> bytes:
        most = 2 * PIXELS * self.most[split]
        raw = file.read(most + 1)
        if len(raw) > most:
            raise ValueError(f"a batch has more than {most} bytes")
        return raw


def _read(raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 3072] and labels int64 [n] of a batch."""
    entry = load_arrays(raw)
    data, listed = entry["data"], entry["labels"] if "labels" in entry else entry["fine_labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise ValueError(f"its data are no images: uint8 [n, {PIXELS}]")
    if not isinstance(listed, list) or {type(label) for label in listed} != {int} or len(listed) != len(data):
        raise ValueError(f"it has no label for each of its {len(data)} images")
    return data, np.array(listed, dtype=np.int64)
