"""Decoding many image files in a thread pool, straight into the array where they stay."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from redoubt.errors import UserError

log = logging.getLogger("redoubt")

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # images of another size are refused anyway

#: Images per task of the pool: some tens of milliseconds, so that neither scheduling nor waiting shows.
CHUNK = 128


def decode_images(out: np.ndarray, names: Sequence[str], read: Callable[[str], str | IO[bytes]], title: str) -> None:
    """Decode image files into an array.

    Args:
        out: uint8 ``[n, 3, H, W]``, filled.
        names: One per image, for `read` and for messages.
        read: Gives a path or an open file for a name. Called from several threads.
        title: What is decoded, for the progress bar and the log.

    Raises:
        UserError: An image is broken, has another size than ``out``, or has no pixels of three bytes.
    """
    height, width = out.shape[2:]

    def chunk(first: int) -> int:
        last = min(first + CHUNK, len(names))
        for i in range(first, last):
            out[i] = _decode(names[i], read, width, height).transpose(2, 0, 1)
        return last - first

    log.info("decoding %s: %d images, once", title, len(names))
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=len(names))
        try:
            for done in pool.map(chunk, range(0, len(names), CHUNK)):
                progress.advance(task, done)
        finally:
            pool.shutdown(cancel_futures=True)


#: What is read, whatever a file is called: Pillow hands others, as EPS, to programs of the machine.
FORMATS = ("PNG", "JPEG", "WEBP")


def _decode(name: str, read: Callable[[str], str | IO[bytes]], width: int, height: int) -> np.ndarray:
    try:
        with Image.open(read(name), formats=FORMATS) as image:
            if image.size != (width, height):  # before any pixel is decoded
                raise UserError(
                    f"{name}: {image.size[0]} x {image.size[1]} pixels, but data.image_size is {width}; resize the"
                    f" images to {width} x {height} or set data.image_size"
                )
            if (why := _ambiguous(image)) is not None:
                raise UserError(f"{name}: {why}; save it as one opaque image of 8 bits a channel")
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as e:  # Pillow's decoders raise a dozen kinds for a damaged file
        cause = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{name}: not a readable image ({cause}); replace or remove it") from e


def _ambiguous(image: Image.Image) -> str | None:
    """Why an image's three bytes a pixel would be a guess: Pillow clips 16 bits and drops what lies under alpha."""
    if getattr(image, "is_animated", False):
        return "it holds several images"
    if image.mode.startswith(("I", "F")):
        return "it has more than 8 bits a channel"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
        return None if opaque else "it has transparent pixels"
    return None
