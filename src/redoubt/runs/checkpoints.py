"""Checkpoint files: a crash at any moment leaves a whole one, and one that was damaged is noticed.

``<name>.ckpt.sha256`` beside each holds its SHA-256, as ``sha256sum -c`` reads it. While a run trains, the checkpoint
before ``last.ckpt`` stays as ``previous.ckpt``.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from redoubt.errors import UserError
from redoubt.nets.reading import torch_content
from redoubt.runs.files import atomic, sha256, write_text
from redoubt.runs.store import Run

log = logging.getLogger("redoubt")


class CheckpointFiles(TorchCheckpointIO):
    """How Lightning's Trainer writes and reads checkpoints of ours."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        write_checkpoint(checkpoint, path, previous=path.with_name("previous.ckpt") if path.stem == "last" else None)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class _Hashed:
    """A file being written, and the digest of what it was told to hold."""

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self.file.write(data))

    def flush(self) -> None:
        self.file.flush()


def checksum_file(path: Path) -> Path:
    """Where a checkpoint's SHA-256 is."""
    return path.with_name(f"{path.name}.sha256")


def write_checkpoint(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Writes under a temporary name, syncs, reads back, and only then takes the place of the one before.

    Args:
        content: Tensors and plain containers.
        path: The checkpoint.
        previous: Where the one that it replaces goes; None: nowhere.

    Raises:
        UserError: It could not be written (no permission, disk full), or what was read back is not what was written.
            The one before is intact.
    """
    with atomic(path) as temporary:
        with open(temporary, "xb") as file:
            hashed: Any = _Hashed(file)
            torch.save(content, hashed)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # what is read back comes from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        written = hashed.digest.hexdigest()
        if sha256(temporary) != written:
            raise OSError(errno.EIO, "what was read back is not what was written")
        # Between any two of these steps a whole checkpoint stands under `path` or `previous` with its own checksum.
        before = _stated(path) or []
        write_text(checksum_file(path), _lines([written, *before], path))
        if previous is not None and path.is_file():
            write_text(checksum_file(previous), _lines(before or [sha256(path)], previous))
            os.replace(path, previous)
    write_text(checksum_file(path), _lines([written], path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's contents; tensors and plain containers only, nothing in it is executed.

    Raises:
        UserError: Missing, truncated, changed since it was written, or none of ours.
    """
    try:
        stated = _stated(file)
        if stated is not None and sha256(file) not in stated:
            raise ValueError("its SHA-256 is not the one beside it")
        content = torch_content(file, crc=stated is None)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{file} is not a readable checkpoint ({reason}): remove it or restore it") from error
    found = content if isinstance(content, dict) else {}
    run = found.get("run", {})
    decides = run.get("decides", {}) if isinstance(run, dict) else None
    if not all(isinstance(part, dict) for part in (found.get("state_dict"), found.get("redoubt"), decides)):
        raise UserError(f"{file} is not a checkpoint of ours: give foreign weights as checkpoint=<file> to eval.py")
    return content


def newest(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint to go on from, and what it says of its run; for whoever holds the run's lock.

    A damaged ``last.ckpt`` with a whole one before it is set aside, with one line in the log.

    Returns:
        None where there is no checkpoint yet.

    Raises:
        UserError: There are checkpoints, none of them whole.
    """
    if not run.begun:
        return None
    file = run.last
    try:
        content = read_checkpoint(file)
    except UserError as error:
        if not run.previous.is_file():
            raise
        file = run.previous
        try:
            content = read_checkpoint(file)
        except UserError as other:
            raise UserError(f"{error}; {other}") from other
        if run.last.is_file():  # else a process died between two renames: nothing is wrong
            aside = run.last.with_name("damaged.ckpt")
            os.replace(run.last, aside)
            log.warning("%s; set aside as %s, going on from %s", str(error).split(":")[0], aside.name, file.name)
    return file, content.get("run", {})


def strip(path: Path) -> None:
    """Leaves of a checkpoint what evaluation needs: live and averaged weights."""
    content = read_checkpoint(path)
    for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        content.pop(key, None)
    write_checkpoint(content, path)


def _lines(digests: Sequence[str], path: Path) -> str:
    return "".join(f"{digest}  {path.name}\n" for digest in digests)


def _stated(path: Path) -> list[str] | None:
    """The SHA-256 that stands beside a checkpoint, two where a process died while it was replaced; None: no file."""
    try:
        stated = checksum_file(path).read_text(errors="replace")  # it may be damaged too
        return [line.split()[0] for line in stated.splitlines() if line.strip()]
    except FileNotFoundError:
        return None
