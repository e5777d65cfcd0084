from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from tests.data.datafiles import FACTS

from redoubt.data import CIFAR10, Batch, Digits, ImageData
from redoubt.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"
NAMES = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != "folder")


def make(**options: Any) -> CIFAR10:
    options = {"root": "nowhere", "source": "fake", "num_classes": 10, "image_size": 8} | options
    return CIFAR10(**FACTS, **options)


def from_yaml(name: str, **options: Any) -> ImageData:
    cfg = OmegaConf.merge({"paths": {"data": "nowhere"}, "seed": 3}, {"data": OmegaConf.load(CONF / f"{name}.yaml")})
    return instantiate(OmegaConf.merge(cfg, {"data": options}).data)


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_gives_fake_batches_of_its_shape(name):
    data = from_yaml(name, source="fake", batch_size=4)
    assert data.name == name
    assert data.seed == 3
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Batch)
    assert batch.x.shape == (4, 3, data.image_size, data.image_size)
    assert int(data.arrays("train")[1].max()) == int(data.arrays("test")[1].max()) == data.num_classes - 1
    assert len(data.arrays("train")[1]) == 2 * len(data.arrays("test")[1]) == max(512, 4 * data.num_classes)
    assert data.augment.__name__ == ("none" if name in ("svhn", "digits") else "crop_flip")
    assert not Path("nowhere").exists()


def test_fake_classes_can_be_learned():
    data = make(seed=1)
    (x, y), (tx, ty) = data.arrays("train"), data.arrays("test")
    centres = torch.stack([x[y == k].float().mean(0) for k in range(10)]).flatten(1)
    assert (torch.cdist(tx.float().flatten(1), centres).argmin(1) == ty).all()
    assert torch.equal(x, make(seed=2).arrays("train")[0])


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits(size):
    data = from_yaml("digits", image_size=size)
    (x, _), (tx, ty) = data.arrays("train"), data.arrays("test")
    assert x.shape == (1438, 3, size, size)
    assert tx.shape == (359, 3, size, size)
    assert x.max() == 255
    assert (x[:, 0] == x[:, 2]).all()
    assert ty.bincount().min() >= 34
    assert torch.equal(tx, from_yaml("digits", image_size=size, seed=9).arrays("test")[0])
    if size == 16:
        assert data.mean == pytest.approx([float(x.float().mean() / 255)] * 3, abs=1e-3)
        assert data.std == pytest.approx([float(x.float().std() / 255)] * 3, abs=1e-3)


def test_digits_of_another_size():
    with pytest.raises(UserError, match=r"data\.image_size=28.*8, 16 or 32"):
        from_yaml("digits", image_size=28).prepare_data()
    assert isinstance(from_yaml("digits"), Digits)


def test_limits():
    data = make(limit_train=40, limit_test=20, probe=10)
    assert data.arrays("train")[1].bincount().tolist() == [4] * 10
    assert data.arrays("test")[1].bincount().tolist() == [2] * 10
    assert data.train_size == 40
    assert data.train_dataloader().images is data._split("train").images  # rows of the one tensor, no copy
    other = make(limit_train=40, limit_test=30, seed=1)
    assert torch.equal(data.index("test"), other.index("test")[:20])
    assert not torch.equal(data.index("train").sort().values, other.index("train").sort().values)
    assert data.fingerprint("train") == make().fingerprint("train")


def test_probe_or_validation():
    data = make(probe=30)
    assert data.probe_name == "train_probe"
    seen = torch.cat([b.y for b in data.val_dataloader()])
    assert seen.bincount().tolist() == [3] * 10
    data = make(val_fraction=0.1)
    assert data.probe_name == "val"
    held = sum(len(b.y) for b in data.val_dataloader())
    assert held == len(data.arrays("val")[1])
    assert held + data.train_size == 512
    with pytest.raises(UserError, match=r"data\.val_fraction=0"):
        make().arrays("val")


def test_augment_is_for_training_only():
    data = make(augment="crop_flip", probe=512)
    x, y = data.arrays("train")
    probe = torch.cat([b.x for b in data.val_dataloader()])
    assert torch.equal(probe, x[data.index("train_probe")].float() / 255)
    loader = data.train_dataloader()
    rows = loader.order(0)[:128]
    batch = next(iter(loader))
    assert torch.equal(batch.y, y[rows])
    assert not torch.equal(batch.x, x[rows].float() / 255)


def test_batch_size_is_divided_over_the_trainers_processes():
    data = make(batch_size=100)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=1, world_size=3)  # type: ignore[assignment]
    batch = next(iter(data.train_dataloader()))
    assert (len(batch.y), batch.start, batch.total) == (33, 33, 100)
    assert data.steps_per_epoch(3) == len(data.train_dataloader()) == 6
    assert make(batch_size=511).steps_per_epoch() == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", "ofical"),
        ("augment", "crop_flop"),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("limit_train", 1),
        ("limit_test", 0),
        ("probe", 0),
        ("num_classes", 1),
        ("std", [0.0, 1.0, 1.0]),
    ],
)
def test_bad_values_name_their_key(key, value):
    facts = {"root": "x", "source": "fake", "num_classes": 10, "image_size": 8} | FACTS
    with pytest.raises(UserError, match=rf"data\.{key}="):
        CIFAR10(**(facts | {key: value}))


class Recorder(LightningModule):
    """Keeps what it is given; manual steps of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.automatic_optimization = False

    def training_step(self, batch: Batch, _: int) -> None:
        optimizer = self.optimizers()
        self.w.grad = torch.ones(())
        optimizer.step()  # type: ignore[union-attr]
        self.seen.append(int((batch.x * 255).sum()))

    def validation_step(self, batch: Batch, _: int) -> None:
        assert isinstance(batch, Batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves after one batch, as a ModelCheckpoint does (after `fit` there is no loader left to save)."""

    def __init__(self, path: Path, stop: int) -> None:
        self.path, self.stop = path, stop

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if len(module.seen) == self.stop:
            trainer.save_checkpoint(self.path)


def fit(tmp_path: Path, callback: Callback | None = None, checkpoint: Path | None = None) -> list[int]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        callbacks=callback,
        **quiet,
    )
    module = Recorder()
    data = make(batch_size=100, limit_train=250, augment="crop_flip", probe=10)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False if checkpoint else None)
    return module.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", range(1, 9))
def test_lightning_resumes_at_the_next_batch(tmp_path, stop):
    """Three batches an epoch: within, at and after the end of each."""
    whole = fit(tmp_path, SaveAt(tmp_path / "stop.ckpt", stop))
    assert len(set(whole)) == 9
    assert fit(tmp_path, checkpoint=tmp_path / "stop.ckpt") == whole[stop:]
