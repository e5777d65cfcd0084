"""Labels mean the classes that they are called after: in evaluations, audits, transfer, files of weights."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tests.conftest import composed

from redoubt import config, jobs
from redoubt.build import build_data, build_module
from redoubt.data import classes
from redoubt.errors import UserError
from redoubt.evaluation.record import Source, evaluate
from redoubt.evaluation.rescore import rescore
from redoubt.export import export
from redoubt.runs import running
from redoubt.runs.files import read_arrays
from redoubt.runs.identity import plain
from redoubt.runs.loading import classes_of, load

CPU = torch.device("cpu")
SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data.image_size=8", "data.batch_size=10", "data.probe=10",
    "trainer=cpu", "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1",
    "validation.step=1",
)  # fmt: skip
FOLDER = (
    *SMALL,
    "data=cifar10",
    "data.source=folder",
    "data.num_classes=3",
    "attack=pgd",
    "attack.attacks.pgd.steps=2",
)


def test_published_names():
    assert len(set(classes.CIFAR100)) == 100
    for names in (classes.CIFAR10, classes.CIFAR100, classes.DIGITS):
        assert sorted(names) == names  # the old order: a run that names no classes has these labels too


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (["1", "2", "10"], ["01", "02", "10"], None),
        (["1", "2", "10"], ["1", "10", "2"], [0, 2, 1]),
        (["a", "b"], ["b", "a"], [1, 0]),
        (["a", "b"], ["a", "b"], None),
        (["01", "1", "2"], ["01", "1", "2"], None),  # two names of one number are two classes
        (["1", "01", "2"], ["01", "1", "2"], [1, 0, 2]),
    ],
)
def test_places_of_names(found, wanted, expected):
    assert classes.places(found, wanted, ("x", "y")) == expected


@pytest.mark.parametrize(
    ("found", "wanted", "says"),
    [
        (["cat", "dog"], ["cat", "wolf"], "x and y have other classes: dog against wolf; name"),
        (["0", "1"], ["1", "2"], "0 against 2"),
        (["01", "x"], ["1", "x"], "01 against 1"),
        (["cat", "cow", "dog"], ["cat", "dog"], "cow against"),
        (["01", "1"], ["1", "2"], "have other classes"),
    ],
)
def test_other_names_are_refused(found, wanted, says):
    with pytest.raises(UserError, match=says):
        classes.places(found, wanted, ("x", "y"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three classes called 1, 2 and 10, four test images each."""
    root = tmp_path_factory.mktemp("numbers")
    for kind, name in enumerate(("1", "2", "10")):
        (root / "test" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(10 * kind + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"test/{name}/{i}.png")
    return root


def nets(cfg):
    """A net whose classes are 1, 2, 10, and the same net with the outputs in the order of text: 1, 10, 2."""
    module = build_module(cfg).eval()
    torch.nn.init.normal_(module.net.fc.weight, std=50.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the images' mean logits are no class's favourite
        images = build_data(cfg).arrays("test")[0].float() / 255
        module.net.fc.bias.sub_(module.logits(images).mean(0))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (other.net.fc.weight, other.net.fc.bias):
            tensor.copy_(tensor[[0, 2, 1]])
    module.classes, other.classes = ["1", "2", "10"], ["1", "10", "2"]
    return module, other


def verdicts(module, cfg, data, folder, source=None):
    facts = {"run": "r", "axes": {}, "checkpoint": "last", "weights": "student", "train_seconds": None}
    results = evaluate(
        module, data, plain(cfg), facts=facts, weights_id="w", folder=folder, device=CPU,
        source=None if source is None else lambda: Source(source, "s"),
    )  # fmt: skip
    return results, read_arrays(folder / results["evaluation"] / "verdicts.npz")


def test_labels_are_those_of_the_net(root, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cfg = composed(*FOLDER, f"data.root={root}", "evaluation.save=float32")
    module, other = nets(cfg)
    data = build_data(cfg)
    results, own = verdicts(module, cfg, data, tmp_path / "own")
    named, theirs = verdicts(other, cfg, data, tmp_path / "theirs")
    other.classes = None  # of an old version, which took numbers as text
    _, old = verdicts(other, cfg, data, tmp_path / "old")
    _, again = verdicts(other, cfg, data, tmp_path / "again")
    assert caplog.text.count("r does not name its classes: its labels are taken in the order 1, 10, 2") == 1
    assert own["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert theirs["label"].tolist() == old["label"].tolist() == [0] * 4 + [2] * 4 + [1] * 4
    for found in (theirs, old, again):
        assert (found["natural"] == own["natural"]).all()
        assert (found["pgd"] == own["pgd"]).all()
    assert own["natural"].any()
    assert not own["natural"].all()
    assert results["evaluation"] != named["evaluation"]  # the same images, other labels
    assert not rescore(other, data, tmp_path / "theirs" / named["evaluation"], batch=4, device=CPU)["pgd"]["changed"]
    other.classes = ["1", "2", "11"]
    with pytest.raises(UserError, match=r"r have other classes: 10 against 11"):
        verdicts(other, cfg, data, tmp_path / "none")


def test_transfer_examples_are_of_the_same_classes(root, tmp_path):
    cfg = composed(*FOLDER, f"data.root={root}", "+attack.attacks.pgd.net=source", "attack.eps=0.3")
    module, other = nets(cfg)
    data = build_data(cfg)
    _, same = verdicts(module, cfg, data, tmp_path / "same", source=copy.deepcopy(module))
    _, permuted = verdicts(module, cfg, data, tmp_path / "permuted", source=other)
    assert (same["pgd"] == permuted["pgd"]).all()
    assert (same["pgd"] != same["natural"]).any()
    other.classes = ["1", "2", "3"]
    with pytest.raises(UserError, match="10 against 3"):
        verdicts(module, cfg, data, tmp_path / "refused", source=other)


def test_names_are_in_the_run_and_in_exported_files(tmp_path):
    cfg = config.resolve(
        config.compose([*SMALL, "data=digits", "data.limit_train=20", f"paths.outputs={tmp_path}", "attack=none"])
    )
    run = running.train(cfg, jobs._data(cfg))
    assert json.loads(run.classes_file.read_text()) == {"classes": classes.DIGITS}
    assert load(run).classes == classes_of(run.last) == classes.DIGITS
    export(run.name, tmp_path / "net.safetensors", outputs=tmp_path)
    assert load(tmp_path / "net.safetensors").classes == classes_of(tmp_path / "net.safetensors") == classes.DIGITS
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["redoubt"])["classes"] == classes.DIGITS
    data = build_data(cfg)
    data.names = [f"n{i}" for i in range(10)]
    with pytest.raises(UserError, match="have other classes: n0, n1"):
        running.transfer_source(cfg, data, run.name, "attack.source")
