"""The LightningDataModule of every data set: splits, limits, loaders, devices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from redoubt.data import classes
from redoubt.data.augment import resolve
from redoubt.data.cache import Decoded, load
from redoubt.data.checks import check_options
from redoubt.data.folder import Folder
from redoubt.data.loader import EvalLoader, TrainLoader, count_batches
from redoubt.data.source import Fake, Source
from redoubt.data.subsets import first, probe_rows, training_rows
from redoubt.errors import UserError

log = logging.getLogger("redoubt")

#: Seed of the order that `limit_test` takes from: not the run's, so that all runs see the same test images.
TEST_SEED = 0


@functools.cache
def said(line: str) -> None:
    """A line of the log that a process says once."""
    log.info(line)


class ImageData(LightningDataModule):
    """Images of one data set, each split one uint8 tensor.

    `limit_train` says what is used, and the validation split is taken off from that. Both are index tensors
    over the one training tensor. Everything is loaded when it is first asked for; with a trainer attached, rank,
    number of processes and device are the trainer's.

    Args:
        root: Folder of the data.
        source: ``official`` files (downloaded where missing), a ``folder`` of images, or ``fake`` images.
        num_classes: Number of classes K; labels are ``0 .. K - 1``.
        image_size: Height and width in pixels, where they differ [height, width].
        mean: Mean of each channel over the training images, in [0, 1]; for the nets' first layer.
        std: Standard deviation likewise.
        batch_size: Images of the *global* batch, divided over the processes.
        augment: See `redoubt.data.augment`; of training only.
        val_fraction: In [0, 1), split off from training, stratified and by seed.
        limit_train: Use the first n of a seeded order in which classes have their shares, for training and
            validation; None is all.
        limit_test: Test on the first n of such an order, the same for every seed; None is all.
        limit_val: Validate on the first n of the validation split; None is all.
        balanced: Whether these limits take as many images of each class instead.
        verify: Refuse official files with other checksums than the published ones.
        seed: Of the split, the limit, the order and the augmentation.
        probe: Size of the training subset that is evaluated where there is no validation split.

    Raises:
        UserError: A value is out of its range.
    """

    #: Of the data set, in the cache and in fingerprints.
    name: str
    #: Images of the published (training, test) split.
    published: tuple[int, int] = (0, 0)
    #: The classes' names in the published files, in the order of the labels.
    names: Sequence[str] | None = None
    #: With few test images a rank may have none.
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        *,
        root: str,
        source: str,
        num_classes: int,
        image_size: int | Sequence[int],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        batch_size: int = 128,
        augment: str | None = None,
        val_fraction: float = 0.0,
        limit_train: int | None = None,
        limit_test: int | None = None,
        limit_val: int | None = None,
        balanced: bool | None = None,
        verify: bool = True,
        seed: int = 0,
        probe: int = 512,
    ) -> None:
        super().__init__()
        check_options(
            source=source,
            val_fraction=val_fraction,
            mean=mean,
            std=std,
            num_classes=num_classes,
            image_size=image_size,
            batch_size=batch_size,
            probe=probe,
            limit_train=limit_train,
            limit_test=limit_test,
            limit_val=limit_val,
        )
        self.root, self.source = Path(root).expanduser(), source
        self.num_classes, self.image_size = num_classes, image_size
        self.mean, self.std = mean, std
        self.batch_size, self.augment = batch_size, resolve(augment)
        self.val_fraction, self.limit_train, self.limit_test = val_fraction, limit_train, limit_test
        self.limit_val, self.balanced = limit_val, bool(balanced)
        self.verify, self.seed, self.probe = verify, seed, probe
        if limit_val is not None and not self.validates:
            raise UserError(f"data.limit_val={limit_val} limits the validation split: set data.val_fraction too")
        self._device: torch.device | None = None
        self._decoded: dict[str, Decoded] = {}
        self._moved: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows: dict[str, Tensor | None] = {}

    # -- where the images come from

    def where(self) -> dict[str, Any]:
        """What every source is told."""
        facts = {"num_classes": self.num_classes, "image_size": self.image_size}
        return {"name": self.name, "root": self.root, **facts}

    def official(self) -> Source:
        """The published files of this data set."""
        raise NotImplementedError

    def _source(self) -> Source:
        if self.source == "fake":
            return Fake(**self.where())
        return Folder(**self.where()) if self.source == "folder" else self.official()

    def absent(self) -> bool:
        """Whether the published files are wanted and would have to be downloaded first."""
        source = self._source()
        return source.downloads and not any(True for _ in source.entries("train"))

    def whole(self, split: str) -> str:
        """The decoded split that a subset's rows are of."""
        return "test" if split == "test" else "train"

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.val_fraction > 0

    def _split(self, split: str) -> Decoded:
        """All of "train" or "test" (or a "val" of its own), before limits."""
        if split not in self._decoded:
            self._decoded[split] = load(self._source(), split)
        return self._decoded[split]

    def prepare_data(self) -> None:
        """Download and decode into the cache. Only the test split where the trainer does nothing but test."""
        trainer = self.trainer
        only_test = trainer is not None and (trainer.testing or trainer.predicting)
        self.prepare(*(("test",) if only_test else ("train", self.whole("val"), "test")))

    def prepare(self, *splits: str) -> None:
        """Downloads and decodes some splits into the cache."""
        for split in splits:
            self._split(split)

    def setup(self, stage: str | None = None) -> None:
        """Load what a stage needs: "fit", "validate" the training split, "test" the test split, None both."""
        if stage in ("fit", "validate", None):
            self._split("train")
        if stage in ("test", "predict", None):
            self._split("test")

    def fingerprint(self, split: str) -> str:
        """Identity of the whole "train" or "test" split, before limits: see `redoubt.data.cache.Decoded`."""
        return self._split(split).fingerprint

    # -- what the labels mean

    def classes(self, split: str) -> list[str] | None:
        """The classes' names in the order of the labels of "train" or "test"; None where they have none."""
        found = self._split(split).classes
        published = self.names if self.source == "official" else None
        return found or (list(published) if published is not None and len(published) == self.num_classes else None)

    def old_order(self) -> list[str] | None:
        """The classes of the test split in the order of text, which nets that name no classes were trained in."""
        names = self.classes("test")
        return None if names is None else sorted(names)

    def places(self, names: Sequence[str] | None, owner: str | None = None) -> list[int] | None:
        """The label of each class of the test split for a net whose classes have these names; None: as they are.

        A net without names is taken to have been trained in the old order, which is said where its owner is named.

        Raises:
            UserError: The names are not the same; the line has them.
        """
        found, old = self.classes("test"), self.old_order()
        if found is None or old is None:
            return None
        if names is None and old and owner is not None:
            said(f"{owner} does not name its classes: its labels are taken in the order {classes.shortened(old)}")
        owners = (f"the test images in {self.root}", owner or "the net")
        return classes.places(found, old if names is None else names, owners)

    def test_for(self, names: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """Images and labels of the test split, as `arrays`, the labels those of a net with these classes."""
        images, labels = self.arrays("test")
        order = self.places(names)
        return images, labels if order is None else torch.tensor(order)[labels]

    # -- which of them

    def index(self, split: str) -> Tensor | None:
        """Rows of the decoded split that a subset is made of, int64 on the CPU; None is all, in order.

        "train", "val" and "train_probe" are rows of the training split. A smaller limit of "test" is the beginning
        of a larger one.
        """
        if split not in self._rows:
            self._rows[split] = self._choose(split)
        return self._rows[split]

    def _choose(self, split: str) -> Tensor | None:
        labels = self._split(self.whole(split)).labels
        if split == "test":
            if self.limit_test is None:
                return None
            return self._noted(labels, first(labels, self.limit_test, TEST_SEED, self.balanced), "test")
        train, val = training_rows(
            labels,
            val_fraction=self.val_fraction,
            limit=self.limit_train,
            seed=self.seed,
            limit_val=self.limit_val,
            balanced=self.balanced,
        )
        if train is not None:
            self._noted(labels, train, "train")
        if split == "train_probe":
            return probe_rows(labels, train, self.probe, self.seed)
        if split == "val" and val is None:
            raise UserError("data.val_fraction=0: there is no validation split; set it, as to 0.02")
        return val if split == "val" else train

    def _noted(self, labels: Tensor, rows: Tensor, key: str) -> Tensor:
        """The rows; says so where a class is not among them."""
        lost = len(labels.unique()) - len(labels[rows].unique())
        if lost:
            said(f"data.limit_{key}: {lost} of {self.num_classes} classes have no image among the {len(rows)}")
        return rows

    @property
    def subset(self) -> str | None:
        """By which rule test images are chosen: "stratified" or "balanced"; None where all of them are taken."""
        return None if self.limit_test is None else "balanced" if self.balanced else "stratified"

    @property
    def recorded_subset(self) -> str | bool:
        """`subset` as verdicts are kept under: whether there is one, as while all were balanced, or "stratified"."""
        return self.subset if self.subset == "stratified" else self.subset is not None

    def arrays(self, split: str) -> tuple[Tensor, Tensor]:
        """Images uint8 ``[N, 3, H, W]`` and labels int64 ``[N]`` of a split or subset, see `index`.

        On the CPU: the decoded tensor itself where nothing is split off or limited, else a copy of the rows.
        """
        whole, rows = self._split(self.whole(split)), self.index(split)
        return (whole.images, whole.labels) if rows is None else (whole.images[rows], whole.labels[rows])

    @property
    def probe_name(self) -> str:
        """What `val_dataloader` gives: "val", or "train_probe" where there is no validation split."""
        return "val" if self.validates else "train_probe"

    @property
    def train_size(self) -> int:
        """Images that are trained on."""
        rows = self.index("train")
        return len(self._split("train").labels) if rows is None else len(rows)

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Batches of an epoch, see `TrainLoader`."""
        return count_batches(self.train_size, self.batch_size, world_size)

    # -- loaders

    def to_device(self, device: torch.device | str) -> ImageData:
        """Where batches are made when no trainer is attached."""
        self._device = torch.device(device)
        return self

    def _place(self) -> tuple[torch.device, int, int]:
        """Device, rank, number of processes."""
        if self.trainer is None:
            return self._device or torch.device("cpu"), 0, 1
        strategy = self.trainer.strategy
        return strategy.root_device, self.trainer.global_rank, self.trainer.world_size

    def _on(self, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """A whole split on a device, once: training and probe share it. On the CPU it is the mapped file."""
        kept = self._moved.get(split)
        if kept is None or kept[0].device != device:
            whole = self._split(split)
            self._moved[split] = kept = (whole.images.to(device), whole.labels.to(device))
        return kept

    def train_dataloader(self) -> TrainLoader:
        device, rank, world_size = self._place()
        images, labels = self._on("train", device)
        return TrainLoader(
            images=images,
            labels=labels,
            index=self.index("train"),
            batch_size=self.batch_size,
            augment=self.augment,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def _eval_loader(self, split: str) -> EvalLoader:
        device, rank, world_size = self._place()
        images, labels = self._on(self.whole(split), device)
        return EvalLoader(
            images=images,
            labels=labels,
            index=self.index(split),
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> EvalLoader:
        """The validation split, else a fixed class-balanced subset of the training images, as they are."""
        return self._eval_loader(self.probe_name)

    def test_dataloader(self) -> EvalLoader:
        return self._eval_loader("test")
