"""The learning rate against torch's own schedules and the papers' epochs."""

from __future__ import annotations

import pytest
import torch

from redoubt.errors import UserError
from redoubt.training.schedule import Schedule


def torch_rates(make, epochs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_multistep_is_torch_s():
    """torch counts epochs from 0 and multiplies; a milestone m counted from 1 is torch's m - 1."""
    wanted = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [74, 89], gamma=0.1), 100)
    made = Schedule(max_epochs=100, epochs=100, milestones=[75, 90], factors=[0.1, 0.01])
    assert [made.factor(e) for e in range(100)] == pytest.approx(wanted)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_is_torch_s(final):
    wanted = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30, eta_min=final), 30)
    made = Schedule(max_epochs=30, kind="cosine", final=final)
    assert [made.factor(e) for e in range(30)] == pytest.approx(wanted)


def test_fsr_s_epochs():
    made = Schedule(max_epochs=100, epochs=100, milestones=[75, 90], factors=[0.1, 0.01])
    by_epoch = {e: made.factor(e - 1) for e in (1, 74, 75, 89, 90, 100)}  # counted from 1
    assert by_epoch == {1: 1.0, 74: 1.0, 75: 0.1, 89: 0.1, 90: 0.01, 100: 0.01}


def test_mart_s_three_factors():
    made = Schedule(max_epochs=120, epochs=120, milestones=[75, 90, 100], factors=[0.1, 0.01, 0.001])
    found = [made.factor(e - 1) for e in (74, 75, 90, 99, 100, 120)]
    assert found == [1.0, 0.1, 0.01, 0.01, 0.001, 0.001]


@pytest.mark.parametrize("per_epoch", [1, 3, 7, 391])
def test_every_step_of_an_epoch_has_its_factor(per_epoch):
    """Also where step / per_epoch is a rounded number."""
    made = Schedule(max_epochs=100, epochs=100, milestones=[75, 90], factors=[0.1, 0.01])
    for step in range(100 * per_epoch):
        epoch = step // per_epoch + 1
        assert made.factor(step / per_epoch) == (0.01 if epoch >= 90 else 0.1 if epoch >= 75 else 1.0)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_epoch_interval_is_constant_within_an_epoch(interval):
    made = Schedule(max_epochs=10, kind="cosine", interval=interval)
    found = {made.factor(3 + i / 5) for i in range(5)}
    assert len(found) == (1 if interval == "epoch" else 5)
    assert made.factor(3.0) in found


@pytest.mark.parametrize(("max_epochs", "first", "second"), [(100, 75, 90), (200, 149, 179), (50, 38, 46), (10, 9, 10)])
def test_milestones_are_stretched_with_the_run(max_epochs, first, second):
    """A milestone begins after (m - 1) / epochs of training, in whole epochs."""
    made = Schedule(max_epochs=max_epochs, epochs=100, milestones=[75, 90], factors=[0.1, 0.01])
    found = [made.factor(e - 1) for e in range(1, max_epochs + 1)]
    assert found.index(0.1) + 1 == first
    assert found.index(0.01) + 1 == second


def test_milestones_are_not_stretched_where_no_length_is_given():
    made = Schedule(max_epochs=10, epochs=None, milestones=[5], factors=[0.1])
    assert [made.factor(e) for e in (3, 4)] == [1.0, 0.1]


@pytest.mark.parametrize("kind", ["constant", "multistep", "cosine", "onecycle"])
def test_warmup_rises_linearly_from_0_in_every_step(kind):
    made = Schedule(max_epochs=10, kind=kind, warmup=2.0)
    assert [made.factor(p) for p in (0.0, 0.5, 1.0, 1.75)] == [0.0, 0.25, 0.5, 0.875]
    assert made.factor(5.0) == Schedule(max_epochs=10, kind=kind).factor(5.0)


def test_constant_is_1():
    made = Schedule(max_epochs=10, kind="constant", milestones=[2], factors=[0.1])
    assert {made.factor(p / 7) for p in range(70)} == {1.0}


def test_one_cycle_end_points():
    made = Schedule(max_epochs=20, kind="onecycle", interval="step", initial=0.04, peak=0.3, final=0.01)
    assert made.factor(0.0) == pytest.approx(0.04)
    assert made.factor(3.0) == pytest.approx(0.52)
    assert made.factor(6.0) == pytest.approx(1.0)
    assert made.factor(13.0) == pytest.approx(0.505)
    assert made.factor(20.0) == pytest.approx(0.01)
    values = [made.factor(p / 10) for p in range(200)]
    assert max(values) == pytest.approx(1.0)
    assert values.index(max(values)) == 60


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"kind": "poly"}, "schedule.kind"),
        ({"interval": "batch"}, "schedule.interval"),
        ({"milestones": [5], "factors": []}, "schedule.milestones"),
        ({"milestones": [], "factors": [0.1]}, "schedule.milestones"),
        ({"kind": "cosine", "milestones": [5], "factors": []}, "schedule.milestones"),
        ({"milestones": [9, 5], "factors": [0.1, 0.01]}, "schedule.milestones"),
        ({"peak": 0.0}, "schedule.peak"),
        ({"peak": 1.0}, "schedule.peak"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"warmup": -1.0}, "warmup"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused(options, key):
    with pytest.raises(UserError, match=key):
        Schedule(**{"max_epochs": 10, **options})
