"""Sums on the device, and the watch over losses that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redoubt.defenses.tally import NotFinite, Tally, Watch
from redoubt.errors import UserError


def test_means_are_weighted_by_examples():
    tally, rng = Tally(), np.random.default_rng(0)
    values, counts = rng.normal(size=50).astype(np.float32), rng.integers(1, 9, size=50)
    for v, n in zip(values, counts, strict=True):
        tally.add("loss", torch.tensor(v), int(n))
    tally.add("other", torch.tensor(2.5), 3)
    found = tally.means()
    assert found["loss"] == pytest.approx(np.average(values, weights=counts), rel=1e-6)
    assert found["other"] == 2.5
    assert tally.means() == {}


def test_a_long_epoch_does_not_round():
    tally = Tally()
    for _ in range(3000):
        tally.add("loss", torch.tensor(0.1), 100_000)
    assert tally.means()["loss"] == pytest.approx(np.float32(0.1), rel=1e-7)


def test_low_precision_values_are_summed_in_full():
    tally = Tally()
    for _ in range(1000):
        tally.add("loss", torch.tensor(1.0, dtype=torch.bfloat16), 1)
    assert tally.means()["loss"] == 1.0


def test_state_is_restored_in_the_middle_of_an_epoch():
    whole, first = Tally(), Tally()
    for i in range(4):
        whole.add("loss", torch.tensor(float(i)), i + 1)
    for i in range(2):
        first.add("loss", torch.tensor(float(i)), i + 1)
    second, state = Tally(), first.over_ranks()
    second.go_on_from(state)
    first.add("loss", torch.tensor(1e9), 1)  # the saved state is no view of the tally
    for i in range(2, 4):
        second.add("loss", torch.tensor(float(i)), i + 1)
    assert second.means() == whole.means()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first_bad", [0, 1, 5, 9, 10, 11, 37])
def test_raises_within_20_steps(value, first_bad):
    watch, step = Watch(), -1
    watch.start(torch.device("cpu"))
    with pytest.raises(NotFinite, match=r"optimizer\.lr"):  # noqa: PT012
        for step in range(first_bad + 20):
            watch.loss(torch.tensor(value if step == first_bad else 1.0))
            watch.look(step + 1)
    assert first_bad <= step < first_bad + 20


def test_raises_at_once_where_asked():
    watch = Watch()
    watch.loss(torch.tensor(1.0))
    watch.look(3, now=True)
    watch.loss(torch.tensor(float("nan")))
    with pytest.raises(UserError, match="not finite"):
        watch.look(3, now=True)


def test_flag_stays_set_until_started_anew():
    watch = Watch()
    watch.loss(torch.tensor(float("inf")))
    watch.loss(torch.tensor(1.0))
    watch.gradient(torch.tensor(0.0))
    assert watch.bad == 1
    watch.start(torch.device("cpu"))
    assert watch.bad == 0
    watch.gradient(torch.tensor(1.0))
    assert watch.bad == 1


def test_a_sound_run_never_raises_and_shows_its_loss():
    watch = Watch()
    for step in range(1, 101):
        watch.loss(torch.tensor(float(step)))
        watch.look(step)
    assert watch.shown == 90.0  # the copy begun ten steps ago
    watch.look(100, now=True)
    assert watch.shown == 100.0
