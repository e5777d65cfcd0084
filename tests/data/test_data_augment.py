from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from redoubt.data import augment
from redoubt.errors import UserError
from redoubt.rng import generator


def naive(images: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Pad, slice and mirror one image at a time."""
    height, width = images.shape[2:]
    out = []
    for image, y, x, mirrored in zip(images, dy + 4, dx + 4, flip, strict=True):
        cut = F.pad(image, (4, 4, 4, 4))[:, y : y + height, x : x + width]
        out.append(cut.flip(2) if mirrored else cut)
    return torch.stack(out)


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randint(1, 256, (200, 3, 9, 12), dtype=torch.uint8, generator=generator(0, "test"))


@pytest.mark.parametrize("name", ["crop_flip", "crop", "flip"])
def test_equals_one_image_at_a_time(batch, name, monkeypatch):
    drawn = {}
    real = augment.shift_flip

    def spy(images, dy, dx, flip):
        drawn.update(dy=dy, dx=dx, flip=flip)
        return real(images, dy, dx, flip)

    monkeypatch.setattr(augment, "shift_flip", spy)
    labels = torch.arange(200)
    images, same = augment.resolve(name)(batch, labels, generator(3, "augment", 1))
    assert images.dtype == torch.uint8
    assert torch.equal(same, labels)
    assert torch.equal(images, naive(batch, **drawn))
    moved = {int(v) for v in torch.cat([drawn["dy"], drawn["dx"]])}
    assert moved == (set(range(-4, 5)) if "crop" in name else {0})
    assert 60 < int(drawn["flip"].sum()) < 140 if "flip" in name else not drawn["flip"].any()


def test_is_a_function_of_the_generator(batch):
    labels = torch.zeros(200, dtype=torch.int64)
    a, b, c = (augment.crop_flip(batch, labels, generator(0, "augment", s))[0] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("name", ["none", None])
def test_none(batch, name):
    assert augment.resolve(name)(batch, torch.zeros(200), generator(0, "x"))[0] is batch


def test_own_function_by_dotted_path(batch):
    module = types.ModuleType("redoubt_test_cutout")
    module.black = lambda images, labels, generator: (images * 0, labels + 1)
    sys.modules[module.__name__] = module
    images, labels = augment.resolve("redoubt_test_cutout.black")(batch, torch.zeros(200), generator(0, "x"))
    assert not images.any()
    assert labels.all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("crop_flipp", "did you mean crop_flip.*none, crop_flip, crop, flip"),
        ("nowhere.mine", "no such function"),
        ("os.path.nothing", "no such function"),
        ("math.pi", "not a function"),
    ],
)
def test_unknown(name, says):
    with pytest.raises(UserError, match=says):
        augment.resolve(name)
