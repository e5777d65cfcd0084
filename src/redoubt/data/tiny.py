"""Tiny ImageNet: its zip, or the folder that comes out of it. The validation set is the test split."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from redoubt.data.archives import Remote, unreadable
from redoubt.data.folder import class_folders, list_classes
from redoubt.data.images import decode_images
from redoubt.data.official import Official
from redoubt.data.source import Allocate, stat_entry
from redoubt.errors import UserError

FOLDER = "tiny-imagenet-200"
ZIP = Remote(f"{FOLDER}.zip", "90528d7ca1a48142e341f4ef8d21d0de", f"http://cs231n.stanford.edu/{FOLDER}.zip")


#: Bytes of an image's file; the published ones have a few thousand. Of the annotations' too.
LARGEST = 1 << 20
#: Bytes of the archive's directory; that of the published one's 120,000 entries has some ten million.
DIRECTORY = 1 << 25


class TinyZip(Official):
    """``tiny-imagenet-200.zip``, read without unpacking. Labels: places among the sorted training wnids."""

    version = 2
    _classes: list[str] | None = None  # once it is decoded

    def remote(self, split: str) -> Remote:
        return ZIP

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        path = self.root / ZIP.name
        try:
            check_directory(path)
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if not n.endswith("/")]
                train = sorted(n for n in names if n.startswith(f"{FOLDER}/train/") and "/images/" in n)
                wnids = sorted({n.split("/")[2] for n in train})
                if split == "train":
                    files = [(n, n.split("/")[2]) for n in train]
                else:
                    text = _content(archive, f"{FOLDER}/val/val_annotations.txt").decode()
                    files = [(f"{FOLDER}/val/images/{n}", w) for n, w in read_annotations(text)]
                if len({n for n, _ in files}) < len(files):
                    raise ValueError("an image is twice in it")
                if len(files) > self.most[split]:
                    raise ValueError(f"it holds more than {self.most[split]} images")
                self._classes = wnids
                labels = to_labels(files, wnids, self.num_classes, path)
                self._fill(split, allocate, [n for n, _ in files], lambda n: io.BytesIO(_content(archive, n)))
        except UserError:
            raise
        except Exception as e:  # zipfile, zlib and others raise a dozen kinds for a damaged file
            raise unreadable(path, e, ZIP.url) from e
        return labels

    def classes(self, split: str) -> list[str] | None:
        return self._classes

    def _fill(self, split: str, allocate: Allocate, names: list[str], read: Callable[[str], str | IO[bytes]]) -> None:
        decode_images(allocate(len(names)), names, read, f"{self.name} {split}")


class TinyFolder(TinyZip):
    """The unpacked ``tiny-imagenet-200``, below ``data.root`` or ``data.root`` itself. It has no checksum."""

    kind = "unpacked"
    downloads = False

    @property
    def must_match(self) -> bool:
        return False

    @property
    def folder(self) -> Path:
        return self.root / FOLDER if (self.root / FOLDER).is_dir() else self.root

    def present(self) -> bool:
        """Whether the folder is there."""
        return (self.folder / "train").is_dir() or (self.folder / "val").is_dir()

    def entries(self, split: str) -> Iterator[tuple[str, int, int]]:
        for path, wnid in self._files(split):
            yield stat_entry(Path(path), f"{wnid}/{os.path.basename(path)}")

    def fetch(self, split: str) -> None:
        self._files(split)

    def check(self, split: str) -> bool:
        return False

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        files = self._files(split)
        self._classes = class_folders(self.folder / "train")
        labels = to_labels(files, self._classes, self.num_classes, self.folder)
        self._fill(split, allocate, [path for path, _ in files], lambda path: path)
        return labels

    def _files(self, split: str) -> list[tuple[str, str]]:
        train, val = self.folder / "train", self.folder / "val"
        if not train.is_dir():
            raise UserError(f"{train}: not there, its folders name the classes; get {ZIP.name} from {ZIP.url}")
        if split == "train":
            wnids = class_folders(train)
            return [(file.path, wnids[label]) for label, file in list_classes(train, self.num_classes)]
        table = val / "val_annotations.txt"
        if not table.is_file():
            raise UserError(
                f"{table}: not there; it holds the labels of the validation images; get {ZIP.name} from"
                f" {ZIP.url}, or set data.source=folder if val/ has one folder for each class"
            )
        try:
            labelled = read_annotations(table.read_text())
        except ValueError as e:  # no text, too
            raise unreadable(table, e, ZIP.url) from e
        files = [(str(val / "images" / name), wnid) for name, wnid in labelled]
        missing = next((path for path, _ in files if not os.path.isfile(path)), None)
        if missing:
            raise UserError(f"{missing}: named in {table} but not there; unpack {ZIP.name} again")
        return files


def check_directory(path: Path) -> None:
    """Refuses a zip whose directory alone would fill the memory, before `zipfile` reads it.

    Raises:
        BadZipFile: It is too long, or there is none.
    """
    with open(path, "rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # which knows zip64's ways
    if not end or end[zipfile._ECD_SIZE] > DIRECTORY:  # type: ignore[attr-defined]
        raise zipfile.BadZipFile("no zip file, or one of far too many entries")


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    """A small file of a zip."""
    told = archive.getinfo(name).file_size  # zipfile reads no more than that
    if told > LARGEST:
        raise ValueError(f"{name} has {told} bytes, which is far too many")
    return archive.read(name)


def read_annotations(text: str) -> list[tuple[str, str]]:
    """(file, wnid) of each line of ``val_annotations.txt``; the bounding boxes are not used.

    Raises:
        ValueError: A line is none of these, or names a file in another folder.
    """
    found = [line.split("\t") for line in text.splitlines() if line.strip()]
    for words in found:
        if len(words) < 2 or not words[0] or "/" in words[0]:
            raise ValueError(f"val_annotations.txt has the line {words[0][:60]!r}")
    return [(words[0], words[1]) for words in found]


def to_labels(files: list[tuple[str, str]], wnids: list[str], num_classes: int, where: Path) -> np.ndarray:
    """Places of the files' wnids among the sorted wnids, int64 ``[n]``.

    Raises:
        UserError: Another number of classes than configured, no images, or a wnid without a training folder.
    """
    if len(wnids) != num_classes:
        raise UserError(f"{where}: {len(wnids)} training classes, but data.num_classes is {num_classes}")
    if not files:
        raise UserError(f"{where}: no images of this split in it; get {ZIP.name} again from {ZIP.url}")
    place = {wnid: i for i, wnid in enumerate(wnids)}
    unknown = next((wnid for _, wnid in files if wnid not in place), None)
    if unknown:
        raise UserError(f"{where}: class {unknown} of the validation set has no training images")
    return np.array([place[wnid] for _, wnid in files], dtype=np.int64)
