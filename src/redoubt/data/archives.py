"""Official files: where they come from, getting them, and telling whether they are the right ones."""

from __future__ import annotations

import http.client
import logging
import os
import re
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redoubt.errors import UserError

log = logging.getLogger("redoubt")

#: Seconds without a byte after which a download is given up.
TIMEOUT = 10.0
#: How a file ends that is being downloaded.
PART = ".part"
#: Bytes; the largest of the published files has 248 million.
LARGEST = 1 << 30


@dataclass(frozen=True)
class Remote:
    """A published file.

    Attributes:
        name: File name in ``data.root``.
        md5: As published.
        url: Where it is downloaded from.
    """

    name: str
    md5: str
    url: str


def download(remotes: Sequence[Remote], root: Path) -> None:
    """Get files, each under a temporary name that is renamed when it is complete and right.

    Args:
        remotes: The files; those that are there already are left alone.
        root: Where they go.

    Raises:
        UserError: No network, no permission, or another file than the published one.
    """
    missing = [remote for remote in remotes if not (root / remote.name).is_file()]
    for remote in missing:
        log.info("downloading %s to %s", remote.url, root)
        try:
            _download(remote, root)
        except (OSError, http.client.HTTPException, ValueError) as e:  # urllib's errors are OSErrors
            cause = getattr(e, "reason", None) or e
            names = " and ".join(r.name for r in missing)
            urls = " and ".join(r.url for r in missing)
            raise UserError(
                f"data.root={root}: {names} not found and not to be downloaded ({cause}); put {names} into"
                f" {root}, from {urls}"
            ) from e


def clean(root: Path) -> None:
    """Removes what killed downloads left; for whoever holds the lock under which others would be at it."""
    for left in root.glob(f".*{PART}"):
        if re.fullmatch(rf"\..+\.\d+{re.escape(PART)}", left.name):
            with suppress(OSError):
                left.unlink()


def _download(remote: Remote, root: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    root.mkdir(parents=True, exist_ok=True)
    part = root / f".{remote.name}.{os.getpid()}{PART}"
    request = urllib.request.Request(remote.url, headers={"User-Agent": "redoubt"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as file:
            told = response.headers.get("Content-Length")
            content = Limited(response, LARGEST)
            while chunk := content.read(1 << 20):
                file.write(chunk)
            if told is not None and file.tell() != int(told):
                raise OSError(f"the connection ended after {file.tell()} of {told} bytes")
        if not check_integrity(part, remote.md5):
            raise UserError(
                f"{remote.url}: what came is not the published file (md5 is not {remote.md5}): try again, or put"
                f" {remote.name} into {root}"
            )
        os.replace(part, root / remote.name)
    finally:
        part.unlink(missing_ok=True)


class Limited:
    """A stream that ends in an error where it holds more bytes than it should.

    Args:
        file: What is read.
        most: Bytes that it may hold.
    """

    def __init__(self, file: Any, most: int) -> None:
        self.file, self.most, self.left = file, most, most

    def read(self, size: int) -> bytes:
        """The next bytes, as those of a file.

        Raises:
            ValueError: There are more than there should be.
        """
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it holds more than {self.most} bytes")
        return data


def matches(path: Path, md5: str, *, verify: bool, origin: str) -> bool:
    """Whether a file is the published one.

    Args:
        path: The file.
        md5: As published.
        verify: Refuse another file; otherwise it is taken, with a warning.
        origin: URL that the right one comes from.

    Raises:
        UserError: It is another file, and `verify`.
    """
    from torchvision.datasets.utils import check_integrity

    if check_integrity(path, md5):
        return True
    if verify:
        raise UserError(
            f"{path}: not the published file (md5 is not {md5}): truncated, damaged or another version;"
            f" delete it and get it again from {origin}, or set data.verify=false to use it as it is"
        )
    log.warning("%s is not the published file (md5 is not %s); used because data.verify=false", path, md5)
    return False


def unreadable(path: Path, error: BaseException, origin: str) -> UserError:
    """The one line for an archive that cannot be read."""
    cause = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path}: truncated or damaged ({cause}); delete it and get it again from {origin}")
