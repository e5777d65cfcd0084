"""Decoding many image files in a thread pool, straight into the array where they stay."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps
from rich.console import Console
from rich.progress import Progress

from redoubt.errors import UserError

log = logging.getLogger("redoubt")

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `_decode` has a limit of its own
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata that nothing here reads

#: Images per task of the pool: some tens of milliseconds, so that neither scheduling nor waiting shows.
CHUNK = 128


#: What is read, whatever a file is called: Pillow hands others, as EPS, to programs of the machine.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF")
#: How their names end.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff")
#: How the names of images end that are not read: other formats, raw data of cameras, drawings.
_UNREAD = """
    .gif .apng .heic .heif .hif .avif .jxl .jp2 .j2k .jpx .jpf .ppm .pgm .pbm .pnm .tga .ico .icns .cur
    .psd .pcx .xbm .svg .svgz .eps .exr .hdr .pfm .qoi .dds .dcm .raw .dng .cr2 .cr3 .nef .nrw .arw .sr2
    .orf .rw2 .raf .pef .srw .3fr .iiq .x3f
"""
UNREAD = tuple(_UNREAD.split())
#: First bytes of images, for files whose names do not say what they are: (offset, bytes).
_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"\xff\xd8\xff"),
    (0, b"GIF8"),
    (0, b"II*\x00"),
    (0, b"MM\x00*"),
    (8, b"WEBP"),
    (4, b"ftypheic"),
    (4, b"ftypmif1"),
    (4, b"ftypavif"),
    (4, b"JXL "),
    (4, b"jP  "),
)
#: Pixels of the largest image that is decoded in order to be resized; few cameras have more.
LARGEST = 1 << 27
#: From so many pixels on, images are decoded one at a time: a pool's worth of them would fill the memory.
_BIG, _one_big = 1 << 24, threading.Lock()
#: Modes whose conversion to RGB loses nothing.
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "YCbCr")


def looks_like_image(path: str) -> bool:
    """Whether the first bytes of a file are those of an image, whatever it is called."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return any(head[at : at + len(magic)] == magic for at, magic in _MAGIC)


def decode_images(
    out: np.ndarray, names: Sequence[str], read: Callable[[str], str | IO[bytes]], title: str, *, resize: bool = False
) -> None:
    """Decode image files into an array; docs/images.md has the rules.

    Args:
        out: uint8 ``[n, 3, H, W]``, filled.
        names: One per image, for `read` and for messages.
        read: Gives a path or an open file for a name. Called from several threads.
        title: What is decoded, for the progress bar and the log.
        resize: Resize and crop images of another size, instead of refusing them.

    Raises:
        UserError: An image is broken, has another size than ``out``, or has no pixels of three bytes.
    """
    height, width = out.shape[2:]

    def chunk(first: int) -> tuple[int, Counter[str]]:
        last = min(first + CHUNK, len(names))
        done: Counter[str] = Counter()
        for i in range(first, last):
            pixels, changes = _decode(names[i], read, width, height, resize)
            out[i] = pixels.transpose(2, 0, 1)
            done.update(changes)
        return last - first, done

    log.info("decoding %s: %d images, once", title, len(names))
    changed: Counter[str] = Counter()
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=len(names))
        try:
            for done, changes in pool.map(chunk, range(0, len(names), CHUNK)):
                changed += changes
                progress.advance(task, done)
        finally:
            pool.shutdown(cancel_futures=True)
    if changed:
        log.info("decoding %s: %s", title, ", ".join(f"{n} {what}" for what, n in sorted(changed.items())))


def _decode(
    name: str, read: Callable[[str], str | IO[bytes]], width: int, height: int, resize: bool
) -> tuple[np.ndarray, list[str]]:
    """Pixels uint8 [H, W, 3], and what was done to get them beside decoding."""
    try:
        with Image.open(read(name), formats=FORMATS) as image:
            stored = image.size
            if resize and stored[0] * stored[1] > LARGEST:
                raise UserError(f"{name}: {stored[0]} x {stored[1]} pixels, far too many; replace or remove it")
            if not resize and sorted(stored) != sorted((width, height)):  # before any pixel is decoded
                raise _other_size(name, stored, width, height)
            if (why := _ambiguous(image)) is not None:
                raise UserError(f"{name}: {why}; save it as one opaque image of 8 bits a channel")
            with _one_big if stored[0] * stored[1] >= _BIG else nullcontext():
                # Asked for before Pillow's TIFF reader turns the image by itself and drops the tag.
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
                image.load()
                if (why := _transparent(image)) is not None:
                    raise UserError(f"{name}: {why}; save it as one opaque image of 8 bits a channel")
                changes = ["turned as their EXIF says"] if turned else []
                if image.mode == "CMYK":
                    changes.append("converted from CMYK without their colour profile")
                upright = ImageOps.exif_transpose(image).convert("RGB")
                if upright.size != (width, height):
                    if not resize:
                        raise _other_size(name, upright.size, width, height)
                    upright = _fitted(upright, width, height)
                return np.asarray(upright), changes
    except UserError:
        raise
    except Exception as e:  # Pillow's decoders raise a dozen kinds for a damaged file
        cause = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{name}: not a readable image ({cause}); replace or remove it") from e


def _other_size(name: str, size: tuple[int, int], width: int, height: int) -> UserError:
    wanted = str(width) if width == height else f"[{height}, {width}]"
    return UserError(
        f"{name}: {size[0]} x {size[1]} pixels, but data.image_size is {wanted}; resize the images to"
        f" {width} x {height}, set data.image_size, or take data=folder, which resizes them"
    )


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled until it covers the wanted size, its edges cut off alike on both sides."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def _ambiguous(image: Image.Image) -> str | None:
    """Why an image's three bytes a pixel would be a guess, as far as its header tells."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # whose first picture is the photograph
        return "it holds several images"
    if image.mode.startswith(("I", "F")) or _bits(image) > 8:  # of which Pillow gives the upper eight
        return "it has more than 8 bits a channel"
    if image.format == "TIFF" and set(image.tag_v2.get(339, (1,))) != {1}:  # type: ignore[attr-defined]
        return "its pixels are no unsigned numbers"
    if image.mode not in (*_PLAIN, "CMYK", "RGBA", "LA", "PA", "RGBa", "La"):
        return f"its colours are {image.mode}, which has no one conversion to RGB"
    return None


def _bits(image: Image.Image) -> int:
    """Bits of a channel in the file; Pillow's modes tell them of gray alone."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
    tiles = getattr(image, "tile", ())
    return 16 if image.format == "PNG" and any(";16" in str(tile[3]) for tile in tiles) else 8


def _transparent(image: Image.Image) -> str | None:
    """Says so where an image has pixels that show what lies under it."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = image.convert("LA") if image.mode == "La" else image
        if straight.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            return "it has transparent pixels"
    return None
