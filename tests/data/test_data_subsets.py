from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from redoubt.data.subsets import (
    balanced_order,
    largest_remainders,
    probe_rows,
    proportional_order,
    proportional_split,
    training_rows,
)
from redoubt.errors import UserError
from redoubt.rng import generator

LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20 + [4] * 4)[torch.randperm(104, generator=generator(0, "t"))]


def test_every_beginning_of_the_order_is_balanced():
    order = balanced_order(LABELS, generator(0, "x"))
    assert torch.equal(order.sort().values, torch.arange(104))
    assert LABELS[order[:16]].bincount().tolist() == [4, 4, 4, 0, 4]
    assert LABELS[order[:64]].bincount().tolist() == [20, 20, 20, 0, 4]
    assert not torch.equal(order, balanced_order(LABELS, generator(1, "x")))


def test_every_beginning_of_the_order_is_in_proportion():
    order = proportional_order(LABELS, generator(0, "x"))
    assert torch.equal(order.sort().values, torch.arange(104))
    assert LABELS[order[:52]].bincount().tolist() == [25, 15, 10, 0, 2]
    assert LABELS[order[:26]].bincount().tolist() in ([13, 7, 5, 0, 1], [12, 8, 5, 0, 1])  # 12.5, 7.5, 5, 1
    shares = LABELS.bincount() / 104
    for n in range(1, 105):
        assert (LABELS[order[:n]].bincount(minlength=5) - n * shares).abs().max() < 1
    assert not torch.equal(order, proportional_order(LABELS, generator(1, "x")))
    few = torch.tensor([0] * 180 + [1] * 20)
    assert few[proportional_order(few, generator(0, "x"))[:40]].bincount().tolist() == [36, 4]


def test_many_small_classes_come_in_one_after_the_other():
    long_tail = torch.cat([torch.zeros(40, dtype=torch.int64), torch.arange(1, 21).repeat(2)])
    orders = [proportional_order(long_tail, generator(seed, "x")) for seed in range(3)]
    for order in orders:
        for n in (8, 10, 20, 60):
            assert abs(int((long_tail[order[:n]] == 0).sum()) - n / 2) <= 1
    equal = torch.arange(100).repeat(3)
    first, second = (set(equal[proportional_order(equal, generator(s, "x"))[:50]].tolist()) for s in (0, 1))
    assert len(first) == len(second) == 50
    assert first != second


def by_hand(counts, n):
    """Hamilton's apportionment in exact fractions."""
    quotas = [Fraction(n * c, sum(counts)) for c in counts]
    seats = [int(q) for q in quotas]
    for k in sorted(range(len(counts)), key=lambda k: seats[k] - quotas[k])[: n - sum(seats)]:
        seats[k] += 1
    return seats


@pytest.mark.parametrize("counts", [[50, 30, 20, 10], [180, 20], [7, 7, 7], [1000, 3, 30, 17, 5]])
def test_shares_by_largest_remainder(counts):
    for n in range(1, sum(counts) // 2):
        found = largest_remainders(torch.tensor(counts), n)
        assert found.sum() == n
        if (torch.tensor(by_hand(counts, n)) < torch.tensor(counts)).all():
            assert found.tolist() == by_hand(counts, n)


def test_split_is_stratified_and_seeded():
    stays, off = proportional_split(LABELS, 0.1, generator(0, "x"))
    assert torch.equal(torch.cat([stays, off]).sort().values, torch.arange(104))
    assert LABELS[off].bincount(minlength=5).tolist() == [5, 3, 2, 0, 0]  # of 10: 4.8, 2.9, 1.9, 0.4
    assert not torch.equal(off, proportional_split(LABELS, 0.1, generator(1, "x"))[1])


@pytest.mark.parametrize(("fraction", "says"), [(0.001, "not one of"), (0.99, "without a training image")])
def test_split_that_cannot_be(fraction, says):
    with pytest.raises(UserError, match=f"data.val_fraction={fraction}.*{says}"):
        proportional_split(LABELS, fraction, generator(0, "x"))


def test_validation_is_of_what_is_used_and_apart_from_training():
    used, _ = training_rows(LABELS, val_fraction=0, limit=40, seed=3)
    train, val = training_rows(LABELS, val_fraction=0.1, limit=40, seed=3)
    assert (len(train), len(val)) == (36, 4)
    assert set(train.tolist()) | set(val.tolist()) == set(used.tolist())
    assert LABELS[val].bincount().tolist() == [2, 1, 1]
    same, fewer = training_rows(LABELS, val_fraction=0.1, limit=40, seed=3, limit_val=2)
    assert torch.equal(same, train)
    assert len(fewer) == 2
    assert set(fewer.tolist()) < set(val.tolist())
    even, _ = training_rows(LABELS, val_fraction=0, limit=16, seed=3, balanced=True)
    assert LABELS[even].bincount().tolist() == [4, 4, 4, 0, 4]
    assert training_rows(LABELS, val_fraction=0, limit=None, seed=3) == (None, None)


def test_probe_is_of_what_is_trained_on():
    train, _ = training_rows(LABELS, val_fraction=0.1, limit=40, seed=3)
    rows = probe_rows(LABELS, train, 8, 3)
    assert set(rows.tolist()) < set(train.tolist())
    assert LABELS[rows].bincount().tolist() == [2, 2, 2, 0, 2]
    assert len(probe_rows(LABELS, None, 1000, 3)) == 104
