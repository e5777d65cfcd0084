from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
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
