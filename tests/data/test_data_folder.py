from __future__ import annotations

import io
import logging
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data import datafiles

from redoubt.data import CIFAR10
from redoubt.errors import UserError


def make(root, **options):
    options = {"source": "folder", "num_classes": 2, "image_size": 8} | options
    return CIFAR10(root=str(root), **datafiles.FACTS, **options)


def test_sorted_classes_are_labels_and_lossless_formats_are_exact(tmp_path):
    datafiles.folder(tmp_path, n=3, kinds=("png", "webp"))
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"a Mac's droppings")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    images, labels = make(tmp_path).arrays("train")
    expected = np.concatenate([datafiles.random_images(3, 8, 0), datafiles.random_images(3, 8, 1)])
    assert torch.equal(images, torch.from_numpy(expected))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_jpg_upper_case_and_images_sub_folder(tmp_path):
    datafiles.folder(tmp_path, n=3, kinds=("jpg",))
    inner = tmp_path / "train" / "dog" / "images"
    inner.mkdir()
    for i in range(3):
        (tmp_path / "train" / "dog" / f"{i}.jpg").rename(inner / f"{i}.JPEG")
    assert len(make(tmp_path).arrays("train")[0]) == 6


def test_val_takes_the_place_of_test(tmp_path):
    datafiles.folder(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(make(tmp_path).arrays("test")[1]) == 6


def test_only_a_test_split_is_enough_to_test(tmp_path):
    datafiles.folder(tmp_path)
    shutil.rmtree(tmp_path / "train")
    data = make(tmp_path)
    data.setup("test")
    assert len(next(iter(data.test_dataloader())).y) == 6
    with pytest.raises(UserError, match=r"no folder .*/train"):
        data.setup("fit")


def empty_class(root):
    shutil.rmtree(root / "train" / "dog")
    (root / "train" / "dog").mkdir()


def broken_image(root):
    path = root / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-60])


def no_image(root):
    (root / "train" / "dog" / "1.png").write_text("hello")


def wrong_size(root):
    (root / "train" / "dog" / "1.png").write_bytes(datafiles.png(datafiles.random_images(1, 9, 0)[0]))


def other_names(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")


def nothing(root):
    shutil.rmtree(root)


def no_test(root):
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (empty_class, r"train/dog: this class has no image"),
        (broken_image, r"train/dog/1\.png: not a readable image"),
        (no_image, r"train/dog/1\.png: not a readable image"),
        (wrong_size, r"train/dog/1\.png: 9 x 9 pixels, but data\.image_size is 8"),
        (other_names, r"its classes are not those of"),
        (nothing, r"data\.root=.*/train/<class>/\*\.png"),
        (no_test, r"data\.root=.*/test nor .*/val"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, damage, says):
    root = tmp_path / "data"
    datafiles.folder(root)
    damage(root)
    with pytest.raises(UserError, match=says) as error:
        make(root).prepare_data()
    assert "\n" not in str(error.value)
    assert not list(root.glob(".redoubt/*-train.*")) or damage in (other_names, no_test)


def test_number_of_classes(tmp_path):
    datafiles.folder(tmp_path)
    with pytest.raises(UserError, match=r"2 class folders, but data.num_classes is 10"):
        make(tmp_path, num_classes=10).prepare_data()


# ---- the table of docs/images.md ------------------------------------------------------------------------------------

GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GRAY, GRAY.T, 255 - GRAY], axis=2)


def put(root, name, make):
    """Two classes of three images; one of them is replaced by what `make` writes to the path ``train/dog/<name>``."""
    datafiles.folder(root)
    (root / "train/dog/1.png").unlink()
    path = root / "train/dog" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    return path


def cmyk(path):
    Image.fromarray(np.stack([GRAY, GRAY.T, GRAY // 2, GRAY.T // 4], axis=2), "CMYK").save(path)


def inks():
    """Light that four inks leave, in whole numbers of 255, as Pillow rounds a product of two bytes."""
    k = 255 - GRAY.T.astype(int) // 4

    def left(ink):
        product = ink.astype(int) * k + 128
        return k - ((product >> 8) + product >> 8)

    return np.stack([left(GRAY), left(GRAY.T), left(GRAY // 2)], axis=2)


def mpo(path):
    path.write_bytes(b"")
    Image.fromarray(RGB).save(path, "MPO", save_all=True, append_images=[Image.fromarray(RGB[::-1])], quality=95)


def jpeg(image):
    Image.fromarray(image).save(buffer := io.BytesIO(), "jpeg", quality=95)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("1.bmp", lambda path: Image.fromarray(RGB).save(path), RGB),
        ("1.TIFF", lambda path: Image.fromarray(RGB).save(path, compression="tiff_lzw"), RGB),
        ("1.dib", lambda path: Image.fromarray(RGB).save(path), RGB),
        ("a/b/images/1.png", lambda path: Image.fromarray(RGB).save(path), RGB),
        ("1.jpg", lambda path: Image.fromarray(RGB).save(path, "png"), RGB),
        ("1.tif", lambda path: Image.fromarray(GRAY).save(path), np.stack([GRAY] * 3, axis=2)),
        ("1.png", lambda path: Image.fromarray(GRAY > 99).save(path), np.stack([(GRAY > 99) * 255] * 3, axis=2)),
        ("1.webp", lambda path: Image.fromarray(RGB).convert("RGBA").save(path, lossless=True), RGB),
        ("1.tif", cmyk, inks()),
        ("1.jpg", mpo, jpeg(RGB)),
    ],
)
def test_what_is_read_and_converted(tmp_path, name, make, expected):
    put(tmp_path, name, make)
    images, _ = make_sorted(tmp_path)
    assert (images[np.abs(images - expected.transpose(2, 0, 1)).sum((1, 2, 3)) == 0]).shape[0] == 1


def make_sorted(root):
    images, labels = make(root).arrays("train")
    assert labels.tolist() == [0] * 3 + [1] * 3
    return images.numpy().astype(int), labels


TURNS = {  # what a viewer does to the stored pixels, as the EXIF standard has it (row 0, column 0 are at ...)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_as_their_exif_says(tmp_path, caplog, orientation):
    caplog.set_level(logging.INFO)
    exif = Image.Exif()
    exif[274] = orientation
    datafiles.folder(tmp_path)
    stored = {"png": RGB, "webp": RGB, "tif": RGB, "jpg": jpeg(RGB)}
    for i, ending in enumerate(stored):
        options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(ending, {})
        Image.fromarray(RGB).save(tmp_path / f"train/dog/{4 + i}.{ending}", exif=exif, **options)
    images, _ = make(tmp_path).arrays("train")
    for image, pixels in zip(images[-4:], stored.values(), strict=True):
        assert np.array_equal(image.numpy().transpose(1, 2, 0), TURNS[orientation](pixels))
    assert ("4 turned as their EXIF says" in caplog.text) == (orientation != 1)


def deep_png(colour, channels):
    """A PNG of 16 bits a channel, as no writer of Pillow makes it in colour."""
    rows = b"".join(b"\0" + bytes(16 * channels) for _ in range(8))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    framed = (struct.pack(">I", len(r)) + kind + r + struct.pack(">I", zlib.crc32(kind + r)) for kind, r in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def deep_tiff(path):
    """A TIFF of 16 bits in each of three channels, without compression."""
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 300)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, 384)]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    raw = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(200, b"\0") + struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(raw.ljust(300, b"\0") + bytes(384))


def two_pages(path):
    Image.fromarray(GRAY).save(path, save_all=True, append_images=[Image.fromarray(GRAY)])


def truncated(kind):
    def write(path):
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path, kind)
        path.write_bytes(path.read_bytes()[:-90])

    return write


@pytest.mark.parametrize(
    ("name", "make_file", "says"),
    [
        ("1.png", lambda p: p.write_bytes(deep_png(2, 3)), "more than 8 bits"),
        ("1.png", lambda p: p.write_bytes(deep_png(0, 1)), "more than 8 bits"),
        ("1.png", lambda p: p.write_bytes(deep_png(4, 2)), "more than 8 bits"),
        ("1.png", lambda p: p.write_bytes(deep_png(6, 4)), "more than 8 bits"),
        ("1.tif", deep_tiff, "more than 8 bits"),
        ("1.tif", lambda p: Image.fromarray(GRAY.astype(np.float32)).save(p), "more than 8 bits"),
        ("1.tif", lambda p: Image.new("LAB", (8, 8)).save(p), "LAB"),
        (
            "1.tif",
            lambda p: Image.fromarray(GRAY).save(p, save_all=True, append_images=[Image.fromarray(GRAY)]),
            "several",
        ),
        ("1.tif", lambda p: Image.fromarray(np.stack([GRAY] * 4, 2)).save(p), "transparent"),
        ("1.png", lambda p: Image.fromarray(GRAY).quantize(8).save(p, transparency=0), "transparent"),
        ("1.bmp", truncated("bmp"), "not a readable image"),
        ("1.tiff", truncated("tiff"), "not a readable image"),
        ("1.webp", truncated("webp"), "not a readable image"),
        ("1.jpg", truncated("jpeg"), "not a readable image"),
        ("1.gif", lambda p: Image.fromarray(GRAY).save(p), r"1 image would be left out \(1 .gif; .*1\.gif"),
        ("b/1.HEIC", lambda p: p.write_bytes(b"x"), r"1 image would be left out \(1 .heic"),
        ("1", lambda p: Image.fromarray(GRAY).save(p, "png"), r"1 image would be left out \(1 no suffix"),
        ("1.png.part", lambda p: Image.fromarray(GRAY).save(p, "jpeg"), r"1 image would be left out \(1 .part"),
        ("../1.png", lambda p: Image.fromarray(GRAY).save(p), r"1 image would be left out \(1 .png; .*train"),
        ("loop", lambda p: p.symlink_to("."), "a link to a folder that it lies in"),
    ],
)
def test_what_is_refused(tmp_path, name, make_file, says):
    put(tmp_path, name, make_file)
    with pytest.raises(UserError, match=says) as error:
        make(tmp_path).arrays("train")
    assert "\n" not in str(error.value)


def test_all_that_would_be_left_out_is_counted_and_the_rest_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    datafiles.folder(tmp_path)
    for name in ("notes.txt", ".hidden"):
        (tmp_path / "train/cat" / name).write_text("x")
    make(tmp_path).arrays("train")
    assert "2 files left out, hidden or no image, as" in caplog.text
    for i in range(3):
        Image.fromarray(GRAY).save(tmp_path / f"train/cat/more{i}.gif")
    (tmp_path / "train/dog/x.psd").write_text("x")
    with pytest.raises(UserError, match=r"4 images would be left out \(3 \.gif, 1 \.psd; the first is .*more0\.gif"):
        make(tmp_path).arrays("train")


def test_names_that_are_numbers_are_in_their_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for split in ("train", "test"):
        for label in (10, 9, 1):
            (tmp_path / split / str(label)).mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), label, np.uint8)).save(tmp_path / f"{split}/{label}/0.png")
    images, labels = make(tmp_path, num_classes=3).arrays("train")
    assert images[:, 0, 0, 0].tolist() == [1, 9, 10]
    assert labels.tolist() == [0, 1, 2]
    assert "its classes are numbers and in their order (1, 9, 10)" in caplog.text


def test_caches_of_other_rules_are_made_anew(tmp_path, monkeypatch):
    from redoubt.data.folder import Folder

    datafiles.folder(tmp_path)
    make(tmp_path).arrays("train")
    before = (tmp_path / ".redoubt/cifar10-folder-train.json").read_text()
    monkeypatch.setattr(Folder, "version", Folder.version + 1)
    make(tmp_path).arrays("train")
    assert (tmp_path / ".redoubt/cifar10-folder-train.json").read_text() != before
