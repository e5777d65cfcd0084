"""One decoded file per split, beside the data: written once, mapped into memory ever after.

``<root>/.redoubt/<data set>-<kind>-<split>.npy`` holds the images, the ``.json`` beside it the labels, the
fingerprint and the signature of the source that it was made from. Both are written under a temporary name and
renamed, the images first: a crash in between leaves images without a valid description, which are made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from redoubt.data.archives import clean
from redoubt.data.source import Source
from redoubt.errors import UserError

log = logging.getLogger("redoubt")

IN_MEMORY = "%s cannot be written (%s): decoding in memory, again at each start"


@dataclass(frozen=True)
class Decoded:
    """A split in memory.

    Attributes:
        images: uint8 ``[N, 3, H, W]``; a private map of the cache's file, or an ordinary tensor.
        labels: int64 ``[N]``.
        fingerprint: ``<name>/<split>@official`` for the published files, else ``sha256:...`` of both tensors.
        classes: The classes' names in the order of the labels, where the source has some.
    """

    images: Tensor
    labels: Tensor
    fingerprint: str
    classes: list[str] | None = None


@dataclass(frozen=True)
class Description:
    """What the sidecar says."""

    signature: str
    fingerprint: str
    official: bool
    shape: list[int]
    labels: list[int]
    classes: list[str] | None = None


def load(source: Source, split: str) -> Decoded:
    """A split, from the cache if it is up to date, else fetched, decoded and cached.

    Several processes may ask at once: one works, the others wait and then read its result. Where the folder
    cannot be written, each decodes into its own memory.

    Raises:
        UserError: The data is not there, or broken, or not what the configuration says.
    """
    if not source.cached:
        return _decode(source, split)
    stem = source.root / ".redoubt" / f"{source.name}-{source.kind}-{split}"
    if (ready := _open(source, split, stem)) is not None:
        return ready
    try:
        if source.downloads:
            source.root.mkdir(parents=True, exist_ok=True)
        else:
            source.fetch(split)  # raises where nothing is there, before a lock is put anywhere
        stem.parent.mkdir(exist_ok=True)
        lock = FileLock(stem.parent / "lock")
        lock.acquire()
    except OSError as e:
        source.fetch(split)
        log.warning(IN_MEMORY, stem.parent, e.strerror)
        return _decode(source, split)
    try:
        if (ready := _open(source, split, stem)) is not None:
            return ready
        clean(source.root)
        source.fetch(split)
        return _build(source, split, stem)
    finally:
        lock.release()


def _open(source: Source, split: str, stem: Path) -> Decoded | None:
    """The cached split, if it is whole and made from the files as they are now."""
    try:
        about = Description(**json.loads(stem.with_suffix(".json").read_text()))
        # a private map: torch wants writable memory
        images = np.load(stem.with_suffix(".npy"), mmap_mode="c", allow_pickle=False)
        labels = torch.tensor(about.labels, dtype=torch.int64)
    except (OSError, ValueError, TypeError, EOFError, RecursionError, RuntimeError):
        return None
    shape = [len(labels), 3, *source.shape]
    if list(images.shape) != shape or images.dtype != np.uint8 or not len(labels):
        return None
    if labels.min() < 0 or labels.max() >= source.num_classes:
        return None
    if source.signature(split) != about.signature or (source.must_match and not about.official):
        return None
    return Decoded(torch.from_numpy(images), labels, about.fingerprint, about.classes)


def _decode(source: Source, split: str) -> Decoded:
    official = source.check(split)
    made: list[np.ndarray] = []

    def allocate(n: int) -> np.ndarray:
        made.append(np.empty((n, 3, *source.shape), np.uint8))
        return made[0]

    labels = _checked(source, split, source.decode(split, allocate))
    fingerprint = _fingerprint(source, split, official, made[0], labels)
    return Decoded(torch.from_numpy(made[0]), torch.from_numpy(labels), fingerprint, source.classes(split))


def _build(source: Source, split: str, stem: Path) -> Decoded:
    """Decode into the cache's file. The lock is held."""
    signature = source.signature(split)
    assert signature is not None
    official = source.check(split)
    images_part, json_part = stem.with_suffix(".npy.part"), stem.with_suffix(".json.part")
    made: list[np.ndarray] = []

    def allocate(n: int) -> np.ndarray:
        made.append(_on_disk(images_part, (n, 3, *source.shape)))
        return made[0]

    try:
        labels = _checked(source, split, source.decode(split, allocate))
        fingerprint = _fingerprint(source, split, official, made[0], labels)
        classes = source.classes(split)
        about = Description(signature, fingerprint, official, list(made[0].shape), labels.tolist(), classes)
        if not isinstance(made[0], np.memmap):
            return Decoded(torch.from_numpy(made[0]), torch.from_numpy(labels), fingerprint, classes)
        made[0].flush()
        made.clear()  # unmapped: the file is mapped anew below
        json_part.write_text(json.dumps(asdict(about)))
        os.replace(images_part, stem.with_suffix(".npy"))
        os.replace(json_part, stem.with_suffix(".json"))
    finally:
        images_part.unlink(missing_ok=True)
        json_part.unlink(missing_ok=True)
    images = np.load(stem.with_suffix(".npy"), mmap_mode="c", allow_pickle=False)
    return Decoded(torch.from_numpy(images), torch.from_numpy(labels), fingerprint, classes)


def _on_disk(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A writable map of a new file; an ordinary array where the disk has no room."""
    try:
        images: Any = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a full disk must fail here: in a map it would kill the process
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return images
    except OSError as e:
        log.warning(IN_MEMORY, path, e.strerror)
        return np.empty(shape, np.uint8)


def _checked(source: Source, split: str, labels: np.ndarray) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= source.num_classes:
        raise UserError(
            f"data.num_classes={source.num_classes}, but {source.name} {split} in {source.root} has labels"
            f" {labels.min()} to {labels.max()}; correct data.num_classes"
        )
    return labels


def _fingerprint(source: Source, split: str, official: bool, images: np.ndarray, labels: np.ndarray) -> str:
    if official:
        return f"{source.name}/{split}@official"
    digest = hashlib.sha256(f"{images.shape}".encode())
    for first in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[first : first + 4096]).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return f"sha256:{digest.hexdigest()}"
