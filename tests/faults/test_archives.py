"""Archives of a stranger: what is not data is refused in one line or left alone; nothing is written beside the data."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import stat
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from tests.data import datafiles

from redoubt.data import CIFAR10, SVHN, ImageData, TinyImageNet
from redoubt.errors import UserError

MB = 1 << 20
ROW = "hostile archive: traversal, links, devices, bombs, pickles, lies"
#: What the data sets here have, so that bombs can be small.
PUBLISHED = (60, 60)

Entry = tuple[tarfile.TarInfo, bytes]


class Case(NamedTuple):
    """A hostile archive.

    Args:
        name: What is wrong with it.
        write: Puts it where the good one lies.
        says: What the line says; None: it does no harm, and the data is right.
    """

    name: str
    write: Callable[[Path], None]
    says: str | None


# ---- CIFAR-10's tar of pickles -----------------------------------------------------------------------------------

FOLDER, BATCH = "cifar-10-batches-py", "cifar-10-batches-py/data_batch_1"
TAR = "cifar-10-python.tar.gz"


def entry(name: str, raw: bytes = b"", **fields: Any) -> Entry:
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, raw


def packed(entries: list[Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1, format=tarfile.PAX_FORMAT) as tar:
        for info, raw in entries:
            tar.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def entries_of(path: Path) -> list[Entry]:
    with tarfile.open(path) as tar:
        return [(info, content.read()) for info in tar if (content := tar.extractfile(info))]


def more(*added: Entry) -> Callable[[Path], None]:
    """The good archive, with further entries before and after the good ones."""
    return lambda root: write(root / TAR, packed([*added, *entries_of(root / TAR), *added]))


def instead(*added: Entry) -> Callable[[Path], None]:
    """The good archive, with entries in the place of a batch."""
    return lambda root: write(root / TAR, packed([e for e in entries_of(root / TAR) if e[0].name != BATCH] + [*added]))


def batch(value: Any) -> Callable[[Path], None]:
    """Another pickle, or its bytes, in the place of a batch."""
    return instead(entry(BATCH, value if isinstance(value, bytes) else pickle.dumps(value, 2)))


def raw_tar(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda root: write(root / TAR, change((root / TAR).read_bytes()))


def write(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def images(n: int = 10, dtype: Any = np.uint8) -> np.ndarray:
    return np.zeros((n, 3072), dtype)


LABELS = list(range(10))
PAX_SPARSE = {
    "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": BATCH, "GNU.sparse.realsize": str(1 << 40),
}  # fmt: skip
#: A memo of four billion places; a byte array of a terabyte.
MEMO_BOMB, ARRAY_BOMB = b"\x80\x02Nr\xff\xff\xff\xff.", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."

TARS = [
    Case("entry above the folder", more(entry("../escaped", b"x")), None),
    Case("batch above the folder", instead(entry(f"../{BATCH}", b"x")), "no data_batch_1"),
    Case("entry with an absolute name", more(entry("/tmp/redoubt-escaped", b"x")), None),
    Case("batch with an absolute name", instead(entry(f"/{BATCH}", b"x")), "no data_batch_1"),
    Case("folder that is a link out", more(entry(FOLDER, type=tarfile.SYMTYPE, linkname="..")), None),
    Case("batch that is a link out", instead(entry(BATCH, type=tarfile.SYMTYPE, linkname="/etc/passwd")), "is no file"),
    Case(
        "batch that is a hard link out", instead(entry(BATCH, type=tarfile.LNKTYPE, linkname="/etc/passwd")), "no file"
    ),
    Case(
        "links to links",
        instead(
            entry("a", type=tarfile.SYMTYPE, linkname="b"),
            entry("b", type=tarfile.SYMTYPE, linkname="a"),
            entry(BATCH, type=tarfile.LNKTYPE, linkname="a"),
        ),
        "is no file",
    ),
    Case("batch that is a device", instead(entry(BATCH, type=tarfile.CHRTYPE, devmajor=1, devminor=5)), "is no file"),
    Case("batch that is a disk", instead(entry(BATCH, type=tarfile.BLKTYPE, devmajor=8)), "is no file"),
    Case("batch that is a pipe", instead(entry(BATCH, type=tarfile.FIFOTYPE)), "is no file"),
    Case("batch that is a folder", instead(entry(BATCH, type=tarfile.DIRTYPE)), "is no file"),
    Case("program with another's rights", more(entry("tool", b"#!/bin/sh\n", mode=0o6755)), None),
    Case("zero in a name", instead(entry("x", b"", pax_headers={"path": f"{BATCH}\0.txt"})), "data_batch_1"),
    Case("line break in a name", more(entry(f"{BATCH}\n", b"x")), None),
    Case("name without end", more(entry("x" * MB, b"x")), "it holds more than"),
    Case(
        "batch twice", lambda root: more(*[e for e in entries_of(root / TAR) if e[0].name == BATCH])(root), "is twice"
    ),
    Case("names that differ in case", more(entry(BATCH.upper(), b"x")), None),
    Case("bomb by size", batch(bytes(16 * MB)), "more than"),
    Case("bomb by ratio, in an entry that is not read", more(entry("zeros", bytes(16 * MB))), "it holds more than"),
    Case("bomb by count", more(*(entry(f"{i}") for i in range(300))), "more than 100 files"),
    Case("bomb by a sparse file", instead(entry("x", b"1\n0\n512\n".ljust(1024), pax_headers=PAX_SPARSE)), "damaged"),
    Case("archive in the place of a batch", batch(packed([entry("x", b"x")])), "damaged"),
    Case("further data behind the archive", raw_tar(lambda raw: raw + b"behind" * 1000), None),
    Case("archive that is cut short", raw_tar(lambda raw: raw[:-1000]), "damaged"),
    Case("archive that is not packed", raw_tar(gzip.decompress), "damaged"),
    Case("archive packed twice", raw_tar(gzip.compress), "damaged"),
    Case("header with a wrong sum", raw_tar(lambda raw: gzip.compress(b"x" + gzip.decompress(raw)[1:])), "damaged"),
    Case("pickle that runs a program", batch({"data": Calls(os.system, "touch escaped"), "labels": LABELS}), "system"),
    Case("pickle that reads a file", batch({"data": Calls(np.load, "/etc/passwd"), "labels": LABELS}), "load"),
    Case("pickle that makes a huge array", batch({"data": Calls(np.ndarray, (1 << 40,)), "labels": LABELS}), "damaged"),
    Case("pickle with a huge memo", batch(MEMO_BOMB), "out of its range"),
    Case("pickle with a huge byte array", batch(ARRAY_BOMB), "damaged"),
    Case("pickle of objects in an array", batch({"data": images().astype(object), "labels": LABELS}), "no images"),
    Case("pickle of other numbers", batch({"data": images(dtype=np.float64), "labels": LABELS}), "no images"),
    Case("pickle of another shape", batch({"data": images()[:, :100], "labels": LABELS}), "no images"),
    Case("pickle of no dictionary", batch([images(), LABELS]), "not a dictionary"),
    Case("pickle without images", batch({"labels": LABELS}), "damaged"),
    Case("pickle with too few labels", batch({"data": images(), "labels": LABELS[1:]}), "no label for each"),
    Case("pickle with labels of texts", batch({"data": images(), "labels": list("abcdefghij")}), "no label for each"),
    Case("more images than were published", batch({"data": images(40), "labels": 4 * LABELS}), "more than 60 images"),
]

# ---- Tiny ImageNet's zip of images ---------------------------------------------------------------------------------

ZIP, TINY = "tiny-imagenet-200.zip", "tiny-imagenet-200"
IMAGE, TABLE = f"{TINY}/train/n00/images/n00_0.JPEG", f"{TINY}/val/val_annotations.txt"
DIRECTORY_ENTRY = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, *[0] * 14)
ZIP64_END = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 50, 0)


def zipped(change: Callable[[dict[str, bytes]], None]) -> Callable[[Path], None]:
    """The good archive with its files, by name, changed."""

    def rewrite(root: Path) -> None:
        with zipfile.ZipFile(root / ZIP) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        change(files)
        with zipfile.ZipFile(root / ZIP, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, raw in files.items():
                archive.writestr(name, raw)

    return rewrite


def put(name: str, raw: bytes) -> Callable[[Path], None]:
    return zipped(lambda files: files.update({name: raw}))


def added(name: str | zipfile.ZipInfo, raw: bytes = b"x") -> Callable[[Path], None]:
    """The good archive with one entry more."""

    def append(root: Path) -> None:
        with zipfile.ZipFile(root / ZIP, "a") as archive, warnings.catch_warnings(action="ignore"):  # of a name twice
            archive.writestr(name, raw)

    return append


def lying(at: int, size: int, value: int) -> Callable[[Path], None]:
    """The good archive whose directory says something else of one image: the field at a place of its entry."""

    def patch(root: Path) -> None:
        put(IMAGE, bytes(MB // 2))(root)
        raw = bytearray((root / ZIP).read_bytes())
        place = raw.rindex(IMAGE.encode()) - 46 + at
        raw[place : place + size] = value.to_bytes(size, "little")
        (root / ZIP).write_bytes(raw)

    return patch


def replaced(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda root: write(root / ZIP, change((root / ZIP).read_bytes()))


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with these chunks and next to no pixels."""
    header = b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [header, *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(raw)) + kind + raw + struct.pack(">I", zlib.crc32(kind + raw)) for kind, raw in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def long_directory(raw: bytes) -> bytes:
    """A zip whose directory has 750,000 entries."""
    entries = DIRECTORY_ENTRY * 750_000
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entries), len(raw), 0)
    return raw + entries + end


ZIPS = [
    Case("zip entry above the folder", added("../../escaped"), None),
    Case("zip entry with an absolute name", added("/tmp/redoubt-escaped"), None),
    Case("class above the folder", added(f"{TINY}/train/../images/x.JPEG"), "4 training classes"),
    Case("zip entry that is a link out", added(link(f"{TINY}/link"), b"/etc"), None),
    Case("image that is a link out", put(IMAGE, b"/etc/passwd"), "not a readable image"),
    Case("image twice", added(IMAGE), "is twice"),
    Case("names that differ in case, in a zip", added(IMAGE.upper()), None),
    Case("line break in a zip's name", added(f"{TINY}/a\nb"), None),
    Case("name of 60,000 letters", added("x" * 60_000), None),
    Case("zip bomb by size", put(IMAGE, bytes(16 * MB)), "far too many"),
    Case("zip bomb in the table", put(TABLE, bytes(16 * MB)), "far too many"),
    Case(
        "zip bomb by count",
        zipped(lambda f: f.update({f"{TINY}/train/n00/images/{i}.JPEG": f[IMAGE] for i in range(99)})),
        "more than 60 images",
    ),
    Case("zip bomb in the directory", replaced(long_directory), "far too many entries"),
    Case("size in the directory too large", lying(24, 4, 0xFFFFFFF0), "far too many"),
    Case("size in the directory too small", lying(24, 4, 100), "not a readable image"),
    Case("wrong checksum in the directory", lying(16, 4, 1), "not a readable image"),
    Case("encrypted image", lying(8, 2, 1), "not a readable image"),
    Case("unknown way of packing", lying(10, 2, 99), "not a readable image"),
    Case("place outside of the zip", lying(42, 4, 0x7FFFFFFF), "not a readable image"),
    Case("two entries at one place", lying(42, 4, 0), "not a readable image"),
    Case("zip64 that lies", replaced(lambda raw: raw + ZIP64_END + b"PK\6\7" + bytes(16) + raw[-22:]), "damaged"),
    Case("zip that is cut short", replaced(lambda raw: raw[:-500]), "damaged"),
    Case("zip that is a text", replaced(lambda raw: b"hello"), "damaged"),
    Case(
        "zip in the place of an image", zipped(lambda f: f.update({IMAGE: long_directory(b"")[-99:]})), "not a readable"
    ),
    Case("image of four billion pixels", put(IMAGE, png(1 << 16, 1 << 16)), "not a readable image"),
    Case("image of a hundred million pixels", put(IMAGE, png(10_000, 10_000)), "10000 x 10000 pixels"),
    Case(
        "image with a text that unpacks to 16 MB",
        put(IMAGE, png(64, 64, (b"zTXt", b"a\0\0" + zlib.compress(bytes(16 * MB))))),
        "not a readable image",
    ),
    Case("program in the place of an image", put(IMAGE, b"%!PS-Adobe-3.0 EPSF-3.0\n"), "not a readable image"),
    Case("table that names a file elsewhere", put(TABLE, b"../../train/n00/images/n00_0.JPEG\tn00\n"), "has the line"),
    Case("table that is no text", put(TABLE, b"\xff\xfe\x00"), "damaged"),
    Case("no table", zipped(lambda f: f.pop(TABLE) and None), "damaged"),
]

# ---- SVHN's MATLAB file ---------------------------------------------------------------------------------------------

MAT = "train_32x32.mat"
PIXELS, DIGITS = np.zeros((32, 32, 3, 20), np.uint8), np.ones((20, 1), np.uint8)


def mat(packed: bool = True, **variables: Any) -> Callable[[Path], None]:
    return lambda root: savemat(root / MAT, {"X": PIXELS, "y": DIGITS, **variables}, do_compression=packed)


def nested(depth: int) -> Any:
    inner: Any = PIXELS[..., :1]
    for _ in range(depth):
        cell = np.empty((1, 1), object)
        cell[0, 0], inner = inner, cell
    return inner


def mat_bomb(root: Path) -> None:
    """A packed element of 16 MB of zeros, behind a header that is right."""
    mat()(root)
    element = zlib.compress(struct.pack("<II", 14, 16 * MB) + bytes(16 * MB), 1)
    write(root / MAT, (root / MAT).read_bytes() + struct.pack("<II", 15, len(element)) + element)


def mat_claims(root: Path) -> None:
    """A variable that says it has a million images."""
    mat(packed=False)(root)
    raw = (root / MAT).read_bytes()
    write(root / MAT, raw.replace(struct.pack("<4i", 32, 32, 3, 20), struct.pack("<4i", 32, 32, 3, 1 << 30)))


def mat_of(raw: bytes) -> Callable[[Path], None]:
    return lambda root: write(root / MAT, raw)


MATS = [
    Case("cells in the place of images", mat(X=nested(1)), "not uint8"),
    Case("nested cells", mat(X=nested(200)), "damaged"),
    Case("struct in the place of images", mat(X={"a": PIXELS}), "damaged"),
    Case("images of other numbers", mat(X=PIXELS.astype(np.int8)), "not uint8"),
    Case("images of another shape", mat(X=PIXELS[..., 0]), "not uint8"),
    Case("more images than were published, in a .mat", mat(X=np.zeros((32, 32, 3, 61), np.uint8)), "not uint8"),
    Case("objects in the place of labels", mat(y=np.array([{}] * 20, object)), "y is cell"),
    Case("texts in the place of labels", mat(y=np.array(list("a" * 20))), "y is char"),
    Case("too few labels", mat(y=DIGITS[1:]), "not a label for each"),
    Case("labels that are no digits", mat(y=DIGITS * 13), "other labels"),
    Case("labels that are no whole numbers", mat(y=DIGITS * 1.5), "other labels"),
    Case("no labels", lambda root: savemat(root / MAT, {"X": PIXELS}), "damaged"),
    Case("images that are claimed and not there", mat_claims, "damaged"),
    Case("packed element of 16 MB", mat_bomb, "unpacks to more than"),
    Case("MATLAB file of version 4", lambda root: savemat(root / MAT, {"X": np.eye(3)}, format="4"), "damaged"),
    Case("MATLAB file of version 7.3", mat_of(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM\x89HDF\r\n"), "damaged"),
    Case("MATLAB file that is a text", mat_of(b"hello"), "damaged"),
    Case("MATLAB file that is empty", mat_of(b""), "damaged"),
]

DATA: dict[str, tuple[type[ImageData], Callable[..., Any], int, int, list[Case]]] = {
    "tar": (CIFAR10, datafiles.cifar, 10, 32, TARS),
    "zip": (TinyImageNet, lambda root: datafiles.tiny(root, zipped=True), 3, 64, ZIPS),
    "mat": (SVHN, datafiles.svhn, 10, 32, MATS),
}
ALL = [
    pytest.param(kind, case, id=case.name, marks=pytest.mark.fault(ROW, "refused" if case.says else "survived"))
    for kind, row in DATA.items()
    for case in row[-1]
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the data is; the folder that a command is started in is another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for kind in (CIFAR10, TinyImageNet, SVHN):
        monkeypatch.setattr(kind, "published", PUBLISHED)
    return tmp_path / "data"


def data_in(kind: str, root: Path, verify: bool = False) -> ImageData:
    cls, _, classes, size, _ = DATA[kind]
    facts = {"num_classes": classes, "image_size": size, "verify": verify}
    return cls(root=str(root), source="official", **datafiles.FACTS, **facts)


def around(root: Path) -> dict[str, bytes]:
    """Everything beside the data's cache, and what absolute names would have made."""
    files = [path for path in root.parent.rglob("*") if ".redoubt" not in path.parts]
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in [*files, *Path("/tmp").glob("redoubt-escaped*")]}


@pytest.mark.parametrize(("kind", "case"), ALL)
def test_a_hostile_archive(root: Path, kind: str, case: Case) -> None:
    """Its checksum gives it away. Where that is not looked at: refused in one line that names it, or its data is read
    as if the rest were not there."""
    expected, _ = DATA[kind][1](root)["train"]
    case.write(root)
    before = around(root)
    with pytest.raises(UserError, match=r"not the published file.*data\.verify=false"):
        data_in(kind, root, verify=True).prepare_data()
    Image.init()  # all formats, which Pillow imports where a file is none of the usual ones: not the archive's memory
    tracemalloc.start()
    try:
        if case.says is None:
            assert torch.equal(data_in(kind, root).arrays("train")[0], torch.from_numpy(expected))
        else:
            with pytest.raises(UserError) as refusal:
                data_in(kind, root).prepare_data()
            line = str(refusal.value)
            assert case.says in line, line
            assert "\n" not in line
            assert str(root) in line or IMAGE in line, line
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert around(root) == before
    assert peak < 8 * MB, f"{peak / MB:.1f} MB"
