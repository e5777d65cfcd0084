"""Small data sets in the real file formats."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FACTS: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which CIFAR's authors used: no distinction of text and bytes."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, value: bytes | str) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = save_string
    dispatch[str] = save_string


def python2_pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


def random_images(n: int, size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


def cifar(root: Path, n: int = 10, *, hundred: bool = False) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``cifar-10-python.tar.gz`` with five training batches of n images, or CIFAR-100's with one."""
    folder = "cifar-100-python" if hundred else "cifar-10-batches-py"
    key, classes = ("fine_labels", 100) if hundred else ("labels", 10)
    train = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    made: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(
        root / f"{folder.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz", "w:gz"
    ) as tar:
        # the test batch first and training backwards: the order in the archive must not matter
        for seed, name in enumerate(["test" if hundred else "test_batch", *reversed(train)]):
            images, labels = random_images(n, 32, seed), np.arange(n) % classes
            made[name] = images, labels
            raw = python2_pickle({"data": images.reshape(n, -1), key: labels.tolist(), "batch_label": name})
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    test = made["test" if hundred else "test_batch"]
    return {
        "test": test,
        "train": (np.concatenate([made[t][0] for t in train]), np.concatenate([made[t][1] for t in train])),
    }


def svhn(root: Path, n: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, split in enumerate(("train", "test")):
        images, y = random_images(n, 32, seed), np.arange(n) % 10 + 1
        mat = {"X": np.asfortranarray(images.transpose(2, 3, 1, 0)), "y": y.astype(np.uint8)[:, None]}
        savemat(root / f"{split}_32x32.mat", mat, do_compression=True)
        made[split] = images, y % 10
    return made


def png(image: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def tiny(root: Path, *, zipped: bool, classes: int = 3, n: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tiny ImageNet's layout. PNGs named JPEG, so that pixels compare; one is gray."""
    wnids = [f"n0{c}" for c in range(classes)]
    train, test = random_images(classes * n, 64, 0), random_images(classes * n, 64, 1)
    test[0] = test[0, :1]
    files = {"wnids.txt": "\n".join(reversed(wnids)).encode()}
    files |= {f"train/{w}/images/{w}_{i}.JPEG": png(train[c * n + i]) for c, w in enumerate(wnids) for i in range(n)}
    labels = np.arange(classes * n)[::-1] % classes
    lines = [f"val_{i}.JPEG\t{wnids[label]}\t0\t0\t62\t62\n" for i, label in enumerate(labels)]
    files |= {f"val/images/val_{i}.JPEG": png(image) for i, image in enumerate(test)}
    gray = io.BytesIO()
    Image.fromarray(test[0, 0], "L").save(gray, "png")
    files |= {"val/images/val_0.JPEG": gray.getvalue(), "val/val_annotations.txt": "".join(lines).encode()}
    root.mkdir(parents=True, exist_ok=True)
    if zipped:
        with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w") as archive:
            for name, raw in files.items():
                archive.writestr(f"tiny-imagenet-200/{name}", raw)
    else:
        for name, raw in files.items():
            path = root / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
    return {"train": (train, np.arange(classes * n) // n), "test": (test, labels)}


def folder(root: Path, n: int = 3, size: int = 8, kinds: tuple[str, ...] = ("png",)) -> None:
    """Two classes, n images each, in train and test."""
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(random_images(n, size, label)):
                kind = kinds[i % len(kinds)]
                (root / split / name / f"{i}.{kind}").write_bytes(png(image, "jpeg" if kind == "jpg" else kind))
