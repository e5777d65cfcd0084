"""The published formats, as small archives that only lack the published checksums."""

from __future__ import annotations

import logging
import pickle
import shutil
import tarfile
import urllib.error
from pathlib import Path

import pytest
import torch
from tests.data import datafiles

from redoubt.data import CIFAR10, CIFAR100, SVHN, TinyImageNet, archives
from redoubt.errors import UserError


def make(cls, root, **options):
    facts = {CIFAR10: (10, 32), CIFAR100: (100, 32), SVHN: (10, 32), TinyImageNet: (3, 64)}[cls]
    options = {
        "source": "official",
        "verify": False,
        "num_classes": facts[0],
        "image_size": facts[1],
    } | options
    return cls(root=str(root), **datafiles.FACTS, **options)


WRITERS = {
    "cifar10": (CIFAR10, datafiles.cifar),
    "cifar100": (CIFAR100, lambda root: datafiles.cifar(root, n=120, hundred=True)),
    "svhn": (SVHN, datafiles.svhn),
    "tiny-zip": (TinyImageNet, lambda root: datafiles.tiny(root, zipped=True)),
    "tiny-folder": (TinyImageNet, lambda root: datafiles.tiny(root, zipped=False)),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(archives.urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", WRITERS)
def test_reads_the_published_format(tmp_path, name):
    cls, write = WRITERS[name]
    expected = write(tmp_path)
    for _ in range(2):  # decoded, then from the cache
        data = make(cls, tmp_path)
        data.prepare_data()
        for split, (images, labels) in expected.items():
            x, y = data.arrays(split)
            assert x.dtype == torch.uint8
            assert y.dtype == torch.int64
            assert torch.equal(x, torch.from_numpy(images))
            assert y.tolist() == labels.tolist()
            assert data.fingerprint(split).startswith("sha256:")


def test_unpacked_cifar_and_a_root_that_is_tiny_imagenet_itself(tmp_path):
    images, _ = datafiles.cifar(tmp_path / "c")["test"]
    archive = tmp_path / "c" / "cifar-10-python.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "c")
    archive.unlink()
    assert torch.equal(make(CIFAR10, tmp_path / "c").arrays("test")[0], torch.from_numpy(images))
    images, _ = datafiles.tiny(tmp_path / "t", zipped=False)["test"]
    data = make(TinyImageNet, tmp_path / "t" / "tiny-imagenet-200", verify=True)
    assert torch.equal(data.arrays("test")[0], torch.from_numpy(images))


def test_official_files_have_a_fixed_fingerprint(tmp_path, monkeypatch):
    datafiles.svhn(tmp_path)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda path, md5=None: True)
    data = make(SVHN, tmp_path, verify=True)
    assert data.fingerprint("train") == "svhn/train@official"
    assert data.fingerprint("test") == "svhn/test@official"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-zip"])
def test_other_checksums_are_refused_or_warned_of(tmp_path, name, caplog):
    cls, write = WRITERS[name]
    write(tmp_path)
    with pytest.raises(UserError, match=r"not the published file.*data\.verify=false"):
        make(cls, tmp_path, verify=True).prepare_data()
    with caplog.at_level(logging.WARNING, "redoubt"):
        make(cls, tmp_path).arrays("test")
    assert len([r for r in caplog.records if "not the published file" in r.message]) == 1
    with pytest.raises(UserError, match="not the published file"):  # also when it is in the cache
        make(cls, tmp_path, verify=True).arrays("test")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "tiny-zip"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.97])
def test_truncated_archive(tmp_path, name, keep):
    cls, write = WRITERS[name]
    write(tmp_path)
    for path in [p for p in tmp_path.iterdir() if p.is_file()]:
        raw = path.read_bytes()
        path.write_bytes(raw[: int(keep * len(raw))])
    with pytest.raises(UserError, match=r"truncated or damaged .*get it again from http") as error:
        make(cls, tmp_path).prepare_data()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob(".redoubt/*.part*"))


@pytest.mark.parametrize(
    ("cls", "file", "url"),
    [
        (CIFAR10, "cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        (CIFAR100, "cifar-100-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
        (
            SVHN,
            "train_32x32.mat and test_32x32.mat",
            "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        ),
        (TinyImageNet, "tiny-imagenet-200.zip", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
    ],
)
def test_missing_without_network(tmp_path, cls, file, url):
    root = tmp_path / "not" / "there"
    with pytest.raises(UserError) as error:
        make(cls, root).prepare_data()
    said = str(error.value)
    assert "data.root" in said
    assert all(part in said for part in (file, f"into {root}", url))
    assert "\n" not in said


def test_download_is_renamed_when_complete_and_refused_when_wrong(tmp_path, monkeypatch):
    raw = b"images" * 1000

    class Response:
        def __init__(self, request, timeout):
            assert timeout <= 15
            self.chunks, self.headers = [raw[:3000], raw[3000:]], {}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, _):
            assert not (tmp_path / "d" / "f.bin").exists()
            return self.chunks.pop(0) if self.chunks else b""

    monkeypatch.setattr(archives.urllib.request, "urlopen", Response)
    import hashlib

    right = hashlib.md5(raw).hexdigest()
    with pytest.raises(UserError, match="not the published file"):
        archives.download([archives.Remote("f.bin", "0" * 32, "http://x/f.bin")], tmp_path / "d")
    assert not list((tmp_path / "d").iterdir())
    archives.download([archives.Remote("f.bin", right, "http://x/f.bin")], tmp_path / "d")
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["f.bin"]
    assert (tmp_path / "d" / "f.bin").read_bytes() == raw


class _Evil:
    def __reduce__(self):
        return shutil.rmtree, ("/nowhere",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps({"data": _Evil()}))
    with pytest.raises(UserError, match=r"shutil\.rmtree"):
        make(CIFAR10, tmp_path).arrays("test")


def test_facts_that_do_not_fit(tmp_path):
    datafiles.svhn(tmp_path / "s")
    with pytest.raises(UserError, match=r"data.image_size=64"):
        make(SVHN, tmp_path / "s", image_size=64).prepare_data()
    with pytest.raises(UserError, match=r"data.num_classes=5"):
        make(SVHN, tmp_path / "s", num_classes=5).prepare_data()
    datafiles.tiny(tmp_path / "t", zipped=True)
    with pytest.raises(UserError, match=r"data.num_classes is 200"):
        make(TinyImageNet, tmp_path / "t", num_classes=200).prepare_data()


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("val/val_annotations.txt", r"val_annotations\.txt: not there.*data\.source=folder"),
        ("val/images/val_3.JPEG", r"val_3\.JPEG: named in"),
        ("train/n01", "data.num_classes is 3"),
        ("train/n01/images", "n01: this class has no image"),
        ("train", "train: not there"),
    ],
)
def test_incomplete_tiny_imagenet_folder(tmp_path, missing, says):
    datafiles.tiny(tmp_path, zipped=False)
    path: Path = tmp_path / "tiny-imagenet-200" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=says):
        make(TinyImageNet, tmp_path).prepare_data()
