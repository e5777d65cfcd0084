"""Files that are either the old ones or the new ones, never half of each."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redoubt.errors import UserError
from redoubt.secrets import redacted

#: How a file that is being written begins. What a killed process left is found, and removed, by it.
TEMPORARY = ".tmp-"


def cannot_write(path: Path | str, error: BaseException) -> UserError:
    """The line for a file or folder that could not be written, with the remedy."""
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(
        f"cannot write {path}: {reason}; make room or give permission there, "
        "or choose another place (paths.outputs=<folder>, or to=<file> of an export)"
    )


def split_choice(text: str | Path) -> tuple[Path, str]:
    """``weights.pt::state_dict_ema`` as the file and the name in it, which is "" where none is given."""
    path = Path(text).expanduser()
    if path.is_file() or "::" not in str(text):
        return path, ""
    file, _, name = str(text).rpartition("::")
    return Path(file).expanduser(), name


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside ``path``, which becomes ``path`` if the body succeeds.

    The body creates the file. It is then synced and renamed, so a crash at any moment leaves the old file
    or the new one. The temporary name keeps the ending (``numpy.savez`` appends one that it misses).

    Args:
        path: The file to write; missing folders above it are made.

    Raises:
        UserError: The file could not be written (no permission, disk full, read-only). The old one is intact.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            yield temporary
        except (OSError, RuntimeError) as error:
            reason = _write_error(error, temporary)
            if reason is None:
                raise
            raise cannot_write(path, reason) from error
        try:
            _sync(temporary)
            os.replace(temporary, path)
        except OSError as error:
            raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):  # some file systems cannot sync a folder; the file itself is synced
        _sync(path.parent)


def must_be_writable(path: Path | str) -> None:
    """Refuses a file that could not be written, before the hours of work whose result it is for.

    Raises:
        UserError: Its folder cannot be written, or it is a folder itself.
    """
    path = Path(path)
    if path.is_dir():
        raise cannot_write(path, IsADirectoryError(errno.EISDIR, "Is a directory"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def _write_error(error: OSError | RuntimeError, temporary: Path) -> BaseException | None:
    """What went wrong in writing, or None where the body failed over something else."""
    if isinstance(error, OSError):
        return error if error.filename is None or Path(str(error.filename)) == temporary else None
    if "inline_container" in str(error):  # how torch.save reports a full disk
        cause = error.__context__
        return cause if isinstance(cause, OSError) else OSError("disk full, or a limit on the size of files")
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` atomically; see :func:`atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 atomically; see :func:`atomic`."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON atomically, without secrets; NumPy's and torch's scalars become numbers."""
    write_text(path, json.dumps(redacted(value), indent=2, default=_scalar) + "\n")


def _scalar(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a JSON file")


def read_json(path: Path | str) -> dict[str, Any] | None:
    """The mapping in a JSON file, or None where there is no such file or it is damaged."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def or_died(read: Callable[[], dict[str, Any]], locked: Callable[[], bool]) -> dict[str, Any]:
    """What a status says; one that says ``running`` while nobody holds the lock has died: ``interrupted``.

    It is read again after the lock was found free: whoever held it may have ended, and said how, in the meantime.

    Args:
        read: Reads the status.
        locked: Whether a process holds the lock.
    """
    said = read()
    while said["state"] == "running" and not locked():
        before, said = said, read()
        if said == before:
            reason = f"process {said.get('pid')} on {said.get('host')} died"
            return {**said, "state": "interrupted", "reason": reason}
    return said


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv as text; none where it does not exist yet."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_arrays(file: Path) -> Any:
    """The array of a .npy file, or those of a .npz file by name; no objects, which would be unpickled.

    Raises:
        UserError: The file holds something else, or is damaged.
    """
    import numpy as np  # takes a moment, which --help does without

    try:
        found = np.load(file, allow_pickle=False)
        if file.suffix != ".npz":
            return found
        with found:
            return {name: found[name] for name in found.files}
    except Exception as error:  # a damaged file raises any of a dozen kinds, of numpy, zipfile and zlib
        raise UserError(f"{file}: holds no plain arrays, or is cut short: evaluate again") from error


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clean(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; only for whoever holds the lock of its run."""
    for left in folder.glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            left.unlink()


def size(folder: Path) -> int:
    """Bytes of the files under ``folder``; links and files that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total
