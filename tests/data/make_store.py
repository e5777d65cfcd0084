"""Make `tests/data/store`, the files that version 0.1.0 left: ``python -m tests.data.make_store TARGET``.

What stands there was made once and stays as it is: whatever reads and continues it has to go on doing so. A later
version adds a store of its own beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from tests.numbers.cells import machine, saved
from tests.processes import redoubt
from tests.test_ddp import launched

#: Neutral, since W&B writes it into its files.
PLACE = Path("/tmp/redoubt")

#: Neither limits nor a validation split: which images these take is no promise.
SMALL = (
    "model=cnn_small", "model.widths=[2,2,4,4]", "data=digits", "data.image_size=8", "data.batch_size=256",
    "data.probe=100", "trainer=cpu", "trainer.progress=false", "trainer.max_epochs=2", "inner.steps=2",
    "validation.steps=1", "validation.step=1", "natural.trainer.max_epochs=1", "optimizer.lr=0.5",
)  # fmt: skip

#: The trainings, by the beginning of the run's name; each is attacked at once.
TRAIN = {
    "none-mart": (*SMALL, "base=mart", "ema=wa", "data.augment=crop_flip", "logger=tensorboard", "attack=pgd20"),
    "fsr-trades": (*SMALL, "defense=fsr", "defense.hidden=2", "base=trades", "logger=wandb", "logger.offline=true",
                   "attack=pgd20"),
    "afd-at": (*SMALL, "defense=afd", "attack=fgsm"),
    "cure-trades": (*SMALL, "defense=cure", "defense.rate=1", "defense.decay=0.5", "attack=fgsm"),
}  # fmt: skip
SWEEP = ("-m", *SMALL, "label_smoothing=0.1", "seed=1,2", "attack=fgsm", "sweep.name=seeds")
EVALUATION = ("run=none-mart-cnn_small-digits-s0", "attack=fsr_suite")
AUDIT = ("run=none-mart-cnn_small-digits-s0",)
EXPORT = ("run=fsr-trades-cnn_small-digits-s0", "to=fsr.safetensors")
#: Two ranks, killed after eight of fifteen steps; the last checkpoint is of the sixth.
UNFINISHED = (
    *SMALL, "trainer.max_epochs=3", "base=trades", "ema=wa", "data.augment=crop_flip",
    "trainer=ddp_cpu", "trainer.devices=2", "trainer.checkpoint_every=3", "attack=none",
)  # fmt: skip
KILLED_AFTER = 8


def digest(run: Path) -> str:
    """SHA-256 over weights, buffers and averages of the last checkpoint."""
    found = hashlib.sha256()
    for name, tensor in sorted(saved(run).items()):
        found.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def runs(folder: Path) -> dict[str, str]:
    """Digest of each run of a store, by its name."""
    found = sorted((folder / "outputs/runs").glob("*/checkpoints/last.ckpt"))
    return {file.parents[1].name: digest(file.parents[1]) for file in found}


def make(folder: Path) -> None:
    os.environ |= {"WANDB_X_DISABLE_META": "true", "WANDB_X_DISABLE_MACHINE_INFO": "true"}
    for words in TRAIN.values():
        redoubt(folder, "train", *words, name="told").good()
    redoubt(folder, "train", *SWEEP, name="told").good()
    redoubt(folder, "eval", *EVALUATION, name="told").good()
    redoubt(folder, "audit", *AUDIT, name="told")
    redoubt(folder, "export", *EXPORT, name="told").good()
    die = f"from tests.sweeps.cells import die_at; die_at({KILLED_AFTER})"
    first, second = launched(folder, "train", *UNFINISHED, befores=[die, ""])
    assert first.end().code == -signal.SIGKILL
    second.end()
    kept = Path(shutil.copytree(folder / "outputs", folder.with_name("kept"), symlinks=True))
    for command in launched(folder, "train", *UNFINISHED):
        command.end().good()
    record = {"machine": machine(), "runs": runs(folder)}
    shutil.rmtree(folder / "outputs")
    kept.rename(folder / "outputs")
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def tidy(folder: Path) -> None:
    """Remove what tells of the machine alone, and colours of pictures that nobody looks at."""
    for wandb in folder.rglob("wandb"):
        for link in filter(Path.is_symlink, wandb.iterdir()):
            link.unlink()
        for logs in [wandb / "staging", *wandb.glob("*/logs")]:
            shutil.rmtree(logs, ignore_errors=True)
    for told in [*folder.glob("*.out"), *folder.glob("*.err")]:
        told.unlink()
    for picture in folder.rglob("audit/**/*.png"):
        Image.open(picture).convert("RGB").quantize(8).save(picture, optimize=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < 300_000, size


def main() -> None:
    shutil.rmtree(PLACE, ignore_errors=True)
    make(PLACE / "store")
    tidy(PLACE / "store")
    shutil.copytree(PLACE / "store", sys.argv[1])


if __name__ == "__main__":
    main()
