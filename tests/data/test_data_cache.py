from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from tests.data import datafiles
from tests.processes import CONTEXT, ended, fork

from redoubt.data import CIFAR10, cache
from redoubt.data.folder import Folder


def make(root, **options):
    options = {"source": "folder", "num_classes": 2, "image_size": 8} | options
    return CIFAR10(root=str(root), **datafiles.FACTS, **options)


@pytest.fixture
def decodings(monkeypatch):
    """Splits that were decoded."""
    done = []
    real = Folder.decode

    def spy(self, split, allocate):
        done.append(split)
        return real(self, split, allocate)

    monkeypatch.setattr(Folder, "decode", spy)
    return done


def test_decoded_once_and_mapped(tmp_path, decodings):
    datafiles.folder(tmp_path)
    for _ in range(3):
        data = make(tmp_path)
        data.prepare_data()
        data.prepare_data()
        data.setup()
    assert decodings == ["train", "test"]
    assert sorted(p.name for p in (tmp_path / ".redoubt").iterdir() if p.name != "lock") == [
        f"cifar10-folder-{split}.{kind}" for split in ("test", "train") for kind in ("json", "npy")
    ]
    loaded = data.arrays("train")[0]
    assert loaded.data_ptr() == data.train_dataloader().images.data_ptr()  # no copy on the CPU
    loaded[0] = 0  # private: the file stays
    assert make(tmp_path).arrays("train")[0][0].any()


def added(root):
    (root / "train" / "cat" / "new.png").write_bytes(datafiles.png(datafiles.random_images(1, 8, 9)[0]))


def removed(root):
    (root / "train" / "cat" / "0.png").unlink()


def changed(root):
    path = root / "train" / "cat" / "0.png"
    path.write_bytes(datafiles.png(datafiles.random_images(1, 8, 9)[0]))
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [added, removed, changed])
def test_made_again_when_the_source_changes(tmp_path, change, decodings):
    datafiles.folder(tmp_path)
    before = make(tmp_path)
    old, fingerprint = before.arrays("train")[0], before.fingerprint("train")
    kept = old.clone()
    change(tmp_path)
    after = make(tmp_path)
    assert after.fingerprint("train") != fingerprint
    assert decodings == ["train", "train"]
    assert torch.equal(old, kept)  # who has the old one mapped keeps it


def cut(npy):
    npy.write_bytes(npy.read_bytes()[:-10])


def empty(npy):
    npy.write_bytes(b"")


def gone(npy):
    npy.unlink()


def other_shape(npy):
    np.save(npy, np.zeros((6, 3, 4, 4), np.uint8))


def bad_json(npy):
    npy.with_suffix(".json").write_text('{"signature": "')


def foreign_json(npy):
    npy.with_suffix(".json").write_text("[]")


@pytest.mark.parametrize("damage", [cut, empty, gone, other_shape, bad_json, foreign_json])
def test_damaged_cache_is_made_again(tmp_path, damage, decodings):
    datafiles.folder(tmp_path)
    before = make(tmp_path).arrays("train")[0].clone()
    damage(tmp_path / ".redoubt" / "cifar10-folder-train.npy")
    assert torch.equal(make(tmp_path).arrays("train")[0], before)
    assert decodings == ["train", "train"]


@pytest.mark.parametrize("disk_full", [False, True])
def test_decodes_in_memory_where_nothing_can_be_written(tmp_path, disk_full, monkeypatch, caplog):
    datafiles.folder(tmp_path)
    expected = make(tmp_path)
    images, fingerprint = expected.arrays("train")[0].clone(), expected.fingerprint("train")
    (tmp_path / ".redoubt").rename(tmp_path / "old")
    if disk_full:

        def full(fd, offset, size):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache.os, "posix_fallocate", full)
    else:
        (tmp_path / ".redoubt").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "redoubt"):
        data = make(tmp_path)
        assert torch.equal(data.arrays("train")[0], images)
    assert data.fingerprint("train") == fingerprint
    assert [r for r in caplog.records if "decoding in memory" in r.message]
    assert not list(tmp_path.glob(".redoubt/*.part"))


def _decode(root, barrier, results):
    barrier.wait()
    images, labels = make(root).arrays("train")
    results.put((int(images.numpy().sum()), labels.tolist(), make(root).fingerprint("train")))


def test_processes_at_once(tmp_path):
    datafiles.folder(tmp_path, n=300)
    barrier, results = CONTEXT.Barrier(3), CONTEXT.Queue()
    workers = [fork(_decode, tmp_path, barrier, results) for _ in range(3)]
    got = [results.get(timeout=30) for _ in workers]
    assert [ended(worker, 30, "decoding") for worker in workers] == [0, 0, 0]
    assert got[0] == got[1] == got[2]
    assert len(got[0][1]) == 600
    assert not list(tmp_path.glob(".redoubt/*.part"))
