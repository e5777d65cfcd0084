"""The data path: images per second of the loaders alone, and of training that they feed."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from benchmarks import ours
from benchmarks.measure import SIDES, Call, Section, alternate, compared
from benchmarks.options import Options
from benchmarks.peer_defenses import PEERS
from benchmarks.pictures import pil_loader
from lightning.pytorch.callbacks import Callback

from redoubt.build import build_data, build_module
from redoubt.data import TrainLoader
from redoubt.data.augment import crop_flip
from redoubt.errors import UserError
from redoubt.runs.store import Store
from redoubt.training.progress import ProgressBar
from redoubt.training.recorder import Recorder
from redoubt.training.trainer import make_trainer

IMAGES = 2048  # that a loader goes through
FAKE = 512  # that ``data.source=fake`` has


def data(o: Options) -> Section:
    """Each call is one reading: images per second."""
    title = f"Data path, {o.model}, batch {o.batch}: images per second"
    section = Section("data", title, ["what", *SIDES])
    for what, sides in (("loader alone", loaders(o)), ("training (at)", fits(o))):
        readings = alternate(sides, lambda call: call(), pairs=o.pairs, seconds=o.seconds, warm=what == "loader alone")
        section.rows += [{"what": what, **row} for row in compared(readings, next(iter(sides)))]
    section.notes += [
        "Crop and flip; more is better. Authors: a DataLoader over PIL images, its workers started before the clock.",
        "Training: ours is the whole fit of Lightning, the bare loop the authors' step on images that are there.",
    ]
    return section


def pictures(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of noise [N, H, W, 3] and labels [N]."""
    numbers = np.random.default_rng(0)
    return numbers.integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8), np.arange(IMAGES) % 10


def loaders(o: Options) -> dict[str, Call]:
    """An epoch of crop and flip, each batch looked at on the device."""
    images, labels = pictures(int(ours.compose(o, "at").data.image_size))
    held = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(o.device)
    own = TrainLoader(images=held, labels=torch.from_numpy(labels).to(o.device), batch_size=o.batch, augment=crop_flip)

    def by_us() -> float:
        began, seen = time.perf_counter(), 0
        for batch in own:
            seen += len(batch.x)
        return seen / elapsed(o, began)

    def by_them(workers: int) -> float:
        iterator = iter(pil_loader(images, labels, o.batch, workers))
        next(iterator)
        began, seen = time.perf_counter(), 0
        for x, _ in iterator:
            seen += len(x.to(o.device))
        return seen / elapsed(o, began)

    counts = sorted({0, o.workers})
    return {"ours": by_us, **{f"authors, {n} workers": lambda n=n: by_them(n) for n in counts}}


def fits(o: Options) -> dict[str, Call]:
    """Steps of PGD-AT, as a whole program takes them."""
    module = ours.build(o, "at")
    peer, batch = PEERS["at"](module), ours.noise_batch(o, module, o.batch)
    images, labels = pictures(module.image_size)

    def bare() -> float:
        began = time.perf_counter()
        for _ in range(steps(o)):
            peer.step(batch.x, batch.y)
        return steps(o) * o.batch / elapsed(o, began)

    def authors() -> float:
        iterator = iter(pil_loader(images, labels, o.batch, o.workers))
        next(iterator)
        began = time.perf_counter()
        for _, (x, y) in zip(range(steps(o)), iterator, strict=False):
            peer.step(x.to(o.device), y.to(o.device))
        return steps(o) * o.batch / elapsed(o, began)

    own = {f"ours, {p}": lambda p=p: fit(o, p) for p in o.precisions}
    return {**own, f"authors, {o.workers} workers": authors, "bare loop": bare}


def steps(o: Options) -> int:
    """Training steps of one reading."""
    if o.batch > FAKE:
        raise UserError(f"batch={o.batch}: the data part takes at most {FAKE}")
    return min(2, FAKE // o.batch)


class Clock(Callback):
    """Seconds from the first batch's start to the last one's end."""

    def on_train_epoch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began


def fit(o: Options, precision: str) -> float:
    """Images per second of a few steps in Lightning's fit loop, with our data module, recorder and progress."""
    with tempfile.TemporaryDirectory() as folder:
        more = (f"data.batch_size={o.batch}", f"data.limit_train={steps(o) * o.batch}", "data.probe=2")
        cfg = ours.compose(o, "at", *more, "trainer.max_epochs=1", f"paths.outputs={folder}", precision=precision)
        clock, run = Clock(), Store(folder).open(cfg.axes, 0, "be5c", {})
        trainer = make_trainer(cfg, Path(folder), [ProgressBar(), Recorder(run), clock])
        module = build_module(cfg)
        with contextlib.redirect_stderr(io.StringIO()):
            trainer.fit(module, datamodule=build_data(cfg))
    return module.steps_done * o.batch / clock.seconds


def elapsed(o: Options, began: float) -> float:
    """Seconds, with the GPU's work done."""
    if o.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
