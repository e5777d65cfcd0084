"""``<root>/{train,test}/<class>/*.png``: the layout that copies on Kaggle and GitHub have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from os.path import isfile
from pathlib import Path

import numpy as np

from redoubt.data.images import decode_images
from redoubt.data.source import Allocate, Source
from redoubt.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders of a split, sorted: their places are the labels."""
    with os.scandir(folder) as found:
        return sorted(e.name for e in found if e.is_dir() and not e.name.startswith("."))


def image_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The image files of one class, in the order of their names; hidden files are no images.

    Raises:
        UserError: Something else has an image's name: reading a pipe would never end.
    """
    with os.scandir(folder) as found:
        files = [e for e in found if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".")]
        odd = next((e.path for e in files if not (e.is_file(follow_symlinks=False) or isfile(e.path))), None)
    if odd:
        raise UserError(f"{odd}: no file, but a folder, a device or a link to nothing; remove it")
    return iter(sorted(files, key=lambda e: e.name))


def list_classes(folder: Path, num_classes: int) -> list[tuple[int, os.DirEntry[str]]]:
    """(label, file) of all images under ``<folder>/<class>/`` or, as in Tiny ImageNet, ``<class>/images/``.

    Raises:
        UserError: The number of classes is not the configured one, or a class has no image.
    """
    names = class_folders(folder)
    if len(names) != num_classes:
        raise UserError(
            f"{folder}: {len(names)} class folders, but data.num_classes is {num_classes}; it takes one"
            " sub-folder for each class"
        )
    listed: list[tuple[int, os.DirEntry[str]]] = []
    for label, name in enumerate(names):
        inner = folder / name / "images"
        files = list(image_files(inner if inner.is_dir() else folder / name))
        if not files:
            raise UserError(
                f"{folder / name}: this class has no image ({', '.join(SUFFIXES)}); add its images or check"
                " that data.root was copied completely"
            )
        listed.extend((label, file) for file in files)
    return listed


class Folder(Source):
    """Class folders under ``train`` and ``test``; ``val`` takes the place of a missing ``test``."""

    kind = "folder"

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
                f" {self.root}/{split}/<class>/*.png (or jpg, webp), point data.root at them, or set"
                " data.source=official"
            )

    def decode(self, split: str, allocate: Allocate) -> np.ndarray:
        listed = self._list(split)
        names = [file.path for _, file in listed]
        decode_images(allocate(len(listed)), names, lambda path: path, f"{self.name} {split}")
        return np.array([label for label, _ in listed], dtype=np.int64)

    def _folder(self, split: str) -> Path | None:
        for name in ("train",) if split == "train" else ("test", "val"):
            if (self.root / name).is_dir():
                return self.root / name
        return None

    def _list(self, split: str) -> list[tuple[int, os.DirEntry[str]]]:
        folder, train = self._folder(split), self._folder("train")
        assert folder is not None
        if (folder / "val_annotations.txt").is_file():
            raise UserError(f"{folder}: this is Tiny ImageNet's official layout; set data.source=official")
        listed = list_classes(folder, self.num_classes)
        if train is not None and class_folders(folder) != class_folders(train):
            odd = sorted(set(class_folders(folder)) ^ set(class_folders(train)))
            raise UserError(f"{folder}: its classes are not those of {train} ({odd[0]}); name them alike")
        return listed
