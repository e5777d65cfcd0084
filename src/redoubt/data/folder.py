"""``<root>/{train,test}/<class>/**/*.png``: the layout that copies on Kaggle and GitHub have."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from redoubt.data.classes import in_order, shortened
from redoubt.data.images import SUFFIXES, UNREAD, decode_images, looks_like_image
from redoubt.data.source import Allocate, Source
from redoubt.errors import UserError

log = logging.getLogger("redoubt")

#: Folders inside each other below a class.
DEEPEST = 40
#: Files between two lines of the log.
TOLD = 20_000


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders of a split: their places are the labels. Numbers are sorted as such, else by text."""
    with os.scandir(folder) as found:
        names = [e.name for e in found if e.is_dir() and not e.name.startswith(".")]
    return in_order(names)


class Scan:
    """Looks through a split's folders, and remembers what it did not take.

    Args:
        folder: Of the split.
        title: For the progress line.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.seen = 0
        self.unread: list[str] = []
        self.others: list[str] = []

    def images(self) -> Iterator[list[os.DirEntry[str]]]:
        """The image files of each class, at any depth, in the order of their names.

        Raises:
            UserError: Images lie where they are not read, are of a format that is not, or are no files.
        """
        for entry in self._entries(self.folder):
            if not entry.is_dir():
                self._leave(entry)  # in no class
        for name in class_folders(self.folder):
            yield list(self._below(self.folder / name, ()))
        if self.unread:
            endings = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in self.unread)
            kinds = ", ".join(f"{n} {ending}" for ending, n in endings.most_common(5))
            raise UserError(
                f"{self.folder}: {_count(len(self.unread), 'image')} would be left out ({kinds}; the first is"
                f" {min(self.unread)}): what is read lies in a class's folder and is called"
                f" {', '.join(SUFFIXES)}; convert or remove the others"
            )
        if self.others:
            files = _count(len(self.others), "file")
            log.info("%s: %s left out, hidden or no image, as %s", self.folder, files, min(self.others))

    def _entries(self, folder: str | Path) -> list[os.DirEntry[str]]:
        """What is in a folder and not hidden, by name."""
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda e: e.name)
        self.others += [e.path for e in entries if e.name.startswith(".") and e.name != ".redoubt"]
        return [e for e in entries if not e.name.startswith(".")]

    def _below(self, folder: str | Path, above: tuple[tuple[int, int], ...]) -> Iterator[os.DirEntry[str]]:
        stat = os.stat(folder)
        here = (stat.st_dev, stat.st_ino)
        if here in above or len(above) >= DEEPEST:
            why = "a link to a folder that it lies in" if here in above else f"more than {DEEPEST} folders deep"
            raise UserError(f"{folder}: {why}; remove it")
        for entry in self._entries(folder):
            self.seen += 1
            if self.seen % TOLD == 0:
                log.info("scanning %s: %d files", self.title, self.seen)
            named = entry.name.lower().endswith(SUFFIXES)
            if named and not (entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)):
                raise UserError(f"{entry.path}: no file, but a folder, a device or a link to nothing; remove it")
            if named:
                yield entry
            elif entry.is_dir():
                yield from self._below(entry.path, (*above, here))
            else:
                self._leave(entry)

    def _leave(self, entry: os.DirEntry[str]) -> None:
        """Notes a file that is not read; opens no pipe, which would never end."""
        named = entry.name.lower().endswith((*UNREAD, *SUFFIXES))
        image = named or (entry.is_file() and looks_like_image(entry.path))
        (self.unread if image else self.others).append(entry.path)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def list_classes(folder: Path, num_classes: int, title: str = "images") -> list[tuple[int, os.DirEntry[str]]]:
    """(label, file) of all images at any depth under ``<folder>/<class>/``.

    Raises:
        UserError: The number of classes is not the configured one, a class has no image, or there are images that
            would not be read.
    """
    names = class_folders(folder)
    if len(names) != num_classes:
        raise UserError(
            f"{folder}: {len(names)} class folders, but data.num_classes is {num_classes}; it takes one"
            " sub-folder for each class"
        )
    listed: list[tuple[int, os.DirEntry[str]]] = []
    empty: list[str] = []
    for label, files in enumerate(Scan(folder, title).images()):
        empty += [] if files else [names[label]]
        listed.extend((label, file) for file in files)
    if empty:  # after images that are not read: these may be what the class lacks
        raise UserError(
            f"{folder / empty[0]}: this class has no image ({', '.join(SUFFIXES)}); add its images or check"
            " that data.root was copied completely"
        )
    return listed


class Folder(Source):
    """Class folders under ``train`` and ``test``; ``val`` takes the place of a missing ``test``."""

    kind = "folder"
    version = 2
    #: What else may help where a split is missing.
    otherwise = ", point data.root at them, or set data.source=official"
    #: Whether images of another size are resized.
    resize = False

    def __init__(self, **where: Any) -> None:
        super().__init__(**where)
        self._listed: dict[str, list[tuple[int, os.DirEntry[str]]]] = {}

    def entries(self, split: str) -> Iterator[tuple[str, int, int]]:
        if self._folder(split) is None:
            return
        for _, file in self._list(split):
            stat = file.stat()
            yield os.path.relpath(file.path, self.root), stat.st_size, stat.st_mtime_ns

    def fetch(self, split: str) -> None:
        if self._folder(split) is None:
            where = f"{self.root}/{split}" + (f" nor {self.root}/val" if split == "test" else "")
            raise UserError(
                f"data.root={self.root}: there is no folder {where}; put the images of {self.name} at"
                f" {self.root}/{split}/<class>/*.png (or jpg, webp, bmp, tiff){self.otherwise}"
            )

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        listed = self._list(split)
        names = [file.path for _, file in listed]
        title = f"{self.title} {split}"
        decode_images(allocate(len(listed)), names, lambda path: path, title, resize=self.resize)
        return np.array([label for label, _ in listed], dtype=np.int64)

    @property
    def title(self) -> str:
        """What the images are called where they are decoded."""
        return self.name

    def classes(self, split: str) -> list[str] | None:
        folder = self._folder(split)
        return None if folder is None else class_folders(folder)

    def _folder(self, split: str) -> Path | None:
        for name in ("test", "val") if split == "test" else (split,):
            if (self.root / name).is_dir():
                return self.root / name
        return None

    def _list(self, split: str) -> list[tuple[int, os.DirEntry[str]]]:
        """Each image with its label; looked for once: a large folder takes seconds."""
        if split not in self._listed:
            self._listed[split] = self._scanned(split)
        return self._listed[split]

    def _scanned(self, split: str) -> list[tuple[int, os.DirEntry[str]]]:
        folder, train = self._folder(split), self._folder("train")
        assert folder is not None
        if (folder / "val_annotations.txt").is_file():
            raise UserError(f"{folder}: this is Tiny ImageNet's official layout; set data.source=official")
        listed = list_classes(folder, self.num_classes, f"{self.name} {split}")
        names = class_folders(folder)
        if names != sorted(names):
            log.info("%s: its classes are numbers and in their order (%s)", folder, shortened(names))
        if train is not None and class_folders(folder) != class_folders(train):
            odd = sorted(set(class_folders(folder)) ^ set(class_folders(train)))
            raise UserError(f"{folder}: its classes are not those of {train} ({odd[0]}); name them alike")
        return listed
