"""``data=folder``: images of the user's own."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from redoubt import config, jobs
from redoubt.build import build_data
from redoubt.errors import UserError
from redoubt.runs import running
from redoubt.runs.loading import load
from redoubt.runs.store import readable_name

SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=folder", "data.batch_size=4", "data.probe=4", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=pgd", "attack.attacks.pgd.steps=1",
)  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """Three classes, of images 12 high and 16 wide and of one of another size."""
    root = tmp_path / "my photos"
    for split, n in (("train", 4), ("test", 2)):
        for kind, name in enumerate(("cat", "cow", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.random.default_rng(10 * kind + i).integers(0, 256, (12, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"{split}/{name}/{i}.png")
    Image.fromarray(np.arange(600, dtype=np.uint32).astype(np.uint8).reshape(10, 20, 3)).save(root / "train/cat/9.png")
    return root


def resolved(root, *more):
    return config.resolve(config.compose([*SMALL, f"data.root='{root}'", *more]))


def test_classes_size_and_name_are_the_folders(root):
    cfg = resolved(root, "data.image_size=[12,16]")
    assert cfg.data.num_classes == cfg.model.num_classes == 3
    assert readable_name(cfg.axes, 0) == "none-at-cnn_small-my_photos-s0"
    images, labels = build_data(cfg).arrays("train")
    assert images.shape == (13, 3, 12, 16)
    assert labels.bincount().tolist() == [5, 4, 4]
    for row, path in ((0, "cat/0.png"), (12, "dog/3.png")):
        assert np.array_equal(images[row].permute(1, 2, 0), np.asarray(Image.open(root / "train" / path)))
    with Image.open(root / "train/cat/9.png") as odd:
        larger = odd.resize((24, 12), Image.Resampling.BILINEAR, box=(0, 0, 20, 10))
        expected = np.asarray(larger)[:, 4:20].astype(int)  # four columns are cut off on both sides
    assert np.abs(images[4].permute(1, 2, 0).numpy() - expected).max() <= 1
    assert resolved(root, "data.image_size=[8,8]").data.image_size == 8


def test_a_run_on_images_that_are_not_square(root, tmp_path):
    cfg = resolved(root, "data.image_size=[12,16]", "model.normalize=true", f"paths.outputs={tmp_path}/outputs")
    data = jobs._data(cfg)
    images = data.arrays("train")[0].double() / 255
    assert cfg.model.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=5.1e-5)
    assert cfg.data.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist(), abs=5.1e-5)
    run = running.train(cfg, data)
    results = running.evaluate_run(cfg, data, run)
    assert (results["n"], results["axes"]["data"]) == (6, "my photos")
    module = load(run)
    assert module.classes == ["cat", "cow", "dog"]
    assert module.logits(torch.zeros(1, 3, 12, 16)).shape == (1, 3)


@pytest.mark.parametrize("words", ["defense=fsr", "model=torchvision", "model=resnet_small", "model=vgg16"])
def test_nets_take_images_that_are_not_square(root, words):
    from redoubt.build import build_module

    kept = [word for word in SMALL if not word.startswith("model") or words.startswith("defense")]
    cfg = config.compose([*kept, f"data.root='{root}'", "data.image_size=[32,48]", words])
    assert build_module(cfg).eval().logits(torch.zeros(1, 3, 32, 48)).shape == (1, 3)


def test_a_folder_of_validation_images(root, tmp_path):
    without = build_data(resolved(root))
    assert without.probe_name == "train_probe"
    before = without.fingerprint("train")
    shutil.copytree(root / "test", root / "val")
    data = build_data(resolved(root))
    assert data.validates
    assert data.probe_name == "val"
    assert sum(len(batch.y) for batch in data.val_dataloader()) == 6
    assert data.train_size == 13
    assert data.fingerprint("train") != before
    assert len(build_data(resolved(root, "data.limit_val=3")).arrays("val")[1]) == 3
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.1.*val is the validation split"):
        build_data(resolved(root, "data.val_fraction=0.1")).arrays("val")
    shutil.rmtree(root / "test")
    assert len(build_data(resolved(root)).arrays("test")[1]) == 6
    assert not build_data(resolved(root)).validates


def test_the_test_split_is_enough_to_evaluate(root):
    shutil.rmtree(root / "train")
    cfg = resolved(root)
    assert cfg.data.num_classes == 3
    assert len(jobs._data(cfg, only_test=True).arrays("test")[1]) == 6
    with pytest.raises(UserError, match=r"no folder .*train"):
        jobs._data(cfg)
    with pytest.raises(UserError, match=r"wants data\.mean and data\.std: .* has no train/"):
        jobs._data(resolved(root, "model.normalize=true"), only_test=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.root=nowhere"], "^data.root=nowhere: there is no folder nowhere/train nor"),
        (["data.image_size=[8,8,8]"], r"data\.image_size=.*one number, or \[height, width\]"),
        (["data.image_size=[8,0]"], r"data\.image_size"),
    ],
)
def test_refusals_are_one_line(root, words, says):
    with pytest.raises(UserError, match=says) as error:
        resolved(root, *words)
    assert "\n" not in str(error.value)


def test_hostile_sizes_are_refused_before_they_are_decoded(root):
    from tests.faults.bad_inputs import png

    (root / "train/cat/0.png").write_bytes(png(13_000, 13_000))
    with pytest.raises(UserError, match=r"cat/0\.png: 13000 x 13000 pixels, far too many"):
        build_data(resolved(root)).arrays("train")
