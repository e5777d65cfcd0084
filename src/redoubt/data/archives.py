"""Official files: where they come from, getting them, and telling whether they are the right ones."""

from __future__ import annotations

import http.client
import logging
import os
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redoubt.errors import UserError

log = logging.getLogger("redoubt")

#: Seconds without a byte after which a download is given up.
TIMEOUT = 10.0


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


def _download(remote: Remote, root: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    root.mkdir(parents=True, exist_ok=True)
    part = root / f".{remote.name}.{os.getpid()}.part"
    request = urllib.request.Request(remote.url, headers={"User-Agent": "redoubt"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, open(part, "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
        if not check_integrity(part, remote.md5):
            raise UserError(f"{remote.url}: what came is not the published file (md5 is not {remote.md5})")
        os.replace(part, root / remote.name)
    finally:
        part.unlink(missing_ok=True)


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
