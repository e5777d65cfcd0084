from __future__ import annotations

import itertools

import pytest
import torch

from redoubt.data.augment import crop_flip
from redoubt.data.loader import EvalLoader, TrainLoader
from redoubt.errors import UserError
from redoubt.rng import generator

N = 53
IMAGES = torch.randint(0, 256, (N, 3, 8, 8), dtype=torch.uint8, generator=generator(0, "test"))
LABELS = torch.arange(N)


def loader(**options):
    return TrainLoader(**{"images": IMAGES, "labels": LABELS, "batch_size": 10, "augment": crop_flip} | options)


def epochs(of, n):
    return [list(of) for _ in range(n)]


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a[2:] == b[2:]


def test_an_epoch_is_every_image_once_in_another_order_each_time():
    first, second = epochs(loader(), 2)
    assert [len(b.y) for b in first] == [10] * 5 + [3] == [b.total for b in first]
    for epoch in (first, second):
        assert torch.equal(torch.cat([b.y for b in epoch]).sort().values, LABELS)
    assert not torch.equal(first[0].y, second[0].y)


def test_pixels_are_unaugmented_bytes_over_255():
    batch = next(iter(loader(augment=lambda x, y, g: (x, y))))
    assert batch.x.dtype == torch.float32
    assert batch.y.dtype == torch.int64
    assert torch.equal(batch.x, IMAGES[batch.y].float() / 255)


def test_the_seed_decides_order_and_augmentation():
    same_order = loader(seed=5, augment=lambda x, y, g: (x, y))
    a, b, c, d = (next(iter(of)) for of in (loader(seed=5), loader(seed=5), loader(seed=6), same_order))
    assert same(a, b)
    assert not torch.equal(a.y, c.y)
    assert torch.equal(a.y, d.y)
    assert not torch.equal(a.x, d.x)


def test_index_limits_the_rows():
    rows = torch.tensor([3, 1, 50, 7, 8])
    (batch,) = loader(index=rows)
    assert set(batch.y.tolist()) == set(rows.tolist())


@pytest.mark.parametrize("rows", [53, 51, 50])  # last batch: small, dropped, full
@pytest.mark.parametrize("place", range(14))
def test_resumes_from_every_place(place, rows):
    """Including position == len, where the next epoch begins: none is lost, none repeated."""
    options = {"index": torch.arange(rows)}
    whole = list(itertools.chain(*epochs(loader(**options), 3)))
    old = loader(**options)
    stream = itertools.chain.from_iterable(iter(old) for _ in range(3))
    for _ in range(place):
        next(stream, None)
    place = min(place, len(whole))
    new = loader(**options)
    early = iter(new)  # Lightning asks for it before it restores the place
    new.load_state_dict(old.state_dict())
    rest = list(early)
    while new.epoch < 2 or new.position < len(new):
        rest += list(new)
    assert len(rest) == len(whole) - place
    assert all(itertools.starmap(same, zip(rest, whole[place:], strict=True)))


def test_a_state_after_the_last_batch_is_the_next_epoch_even_if_nobody_asked_for_the_end():
    of = loader()
    running = iter(of)
    for _ in range(len(of)):
        next(running)  # Lightning counts and never asks for a seventh
    assert of.state_dict() == {"epoch": 0, "position": 6}
    assert next(iter(of)).y.tolist() == epochs(loader(), 2)[1][0].y.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_are_one(world_size):
    whole = epochs(loader(index=torch.arange(48)), 2)
    ranks = [epochs(loader(index=torch.arange(48), rank=r, world_size=world_size), 2) for r in range(world_size)]
    for e, epoch in enumerate(whole):
        for i, batch in enumerate(epoch):
            shares = [rank[e][i] for rank in ranks]
            assert torch.equal(torch.cat([s.x for s in shares]), batch.x)
            assert torch.equal(torch.cat([s.y for s in shares]), batch.y)
            assert [s.start for s in shares] == [0, *itertools.accumulate(len(s.y) for s in shares)][:-1]
            assert {s.total for s in shares} == {len(batch.y)}


@pytest.mark.parametrize(
    ("rows", "batch_size", "world_size", "batches"),
    [(53, 10, 1, 6), (51, 10, 1, 5), (52, 10, 1, 6), (53, 10, 2, 5), (54, 10, 2, 6), (5, 10, 1, 1)],
)
def test_a_last_batch_too_small_for_batch_norm_is_dropped(rows, batch_size, world_size, batches):
    images, labels = torch.zeros(rows, 3, 1, 1, dtype=torch.uint8), torch.zeros(rows, dtype=torch.int64)
    for rank in range(world_size):
        of = TrainLoader(images=images, labels=labels, batch_size=batch_size, rank=rank, world_size=world_size)
        sizes = [len(b.y) for b in of]
        assert len(of) == len(sizes) == batches
        assert min(sizes) >= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 3, "world_size": 2}, "data.batch_size=3 over 2 process"),
        ({"index": torch.tensor([4])}, "data.limit_train"),
    ],
)
def test_no_batch(options, says):
    with pytest.raises(UserError, match=says):
        loader(**options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_sees_every_image_once(world_size):
    ranks = [
        list(EvalLoader(images=IMAGES, labels=LABELS, batch_size=10, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    seen = torch.cat([b.y for rank in ranks for b in rank])
    assert torch.equal(seen.sort().values, LABELS)
    assert all(len(b.y) and b.total in (10, 3) for rank in ranks for b in rank)
    if world_size == 1:
        assert torch.equal(seen, LABELS)
        assert torch.equal(ranks[0][0].x, IMAGES[:10].float() / 255)
