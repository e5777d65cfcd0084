from __future__ import annotations

import pytest
import torch

from redoubt.data.subsets import balanced_order, probe_rows, stratified_split, training_rows
from redoubt.errors import UserError
from redoubt.rng import generator

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20 + [4] * 4)[torch.randperm(104, generator=generator(0, "t"))]


def test_every_beginning_of_the_order_is_balanced():
    order = balanced_order(LABELS, generator(0, "x"))
    assert torch.equal(order.sort().values, torch.arange(104))
    assert LABELS[order[:16]].bincount().tolist() == [4, 4, 4, 0, 4]
    assert LABELS[order[:64]].bincount().tolist() == [20, 20, 20, 0, 4]
    assert not torch.equal(order, balanced_order(LABELS, generator(1, "x")))


def test_split_is_stratified_and_seeded():
    stays, off = stratified_split(LABELS, 0.1, generator(0, "x"))
    assert torch.equal(torch.cat([stays, off]).sort().values, torch.arange(104))
    assert LABELS[off].bincount(minlength=5).tolist() == [5, 3, 2, 0, 0]
    assert not torch.equal(off, stratified_split(LABELS, 0.1, generator(1, "x"))[1])


@pytest.mark.parametrize(("fraction", "says"), [(0.001, "not one image"), (0.99, "without a training image")])
def test_split_that_cannot_be(fraction, says):
    with pytest.raises(UserError, match=f"data.val_fraction={fraction}.*{says}"):
        stratified_split(LABELS, fraction, generator(0, "x"))


def test_validation_is_the_same_for_every_limit_and_apart_from_training():
    all_rows, val = training_rows(LABELS, val_fraction=0.1, limit=None, seed=3)
    few, same = training_rows(LABELS, val_fraction=0.1, limit=12, seed=3)
    assert torch.equal(val, same)
    assert len(few) == 12
    assert set(few.tolist()) < set(all_rows.tolist())
    assert not set(val.tolist()) & set(all_rows.tolist())
    assert training_rows(LABELS, val_fraction=0, limit=None, seed=3) == (None, None)


def test_probe_is_of_what_is_trained_on():
    train, _ = training_rows(LABELS, val_fraction=0.1, limit=40, seed=3)
    rows = probe_rows(LABELS, train, 8, 3)
    assert set(rows.tolist()) < set(train.tolist())
    assert LABELS[rows].bincount().tolist() == [2, 2, 2, 0, 2]
    assert len(probe_rows(LABELS, None, 1000, 3)) == 104
