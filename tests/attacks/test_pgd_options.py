"""Where PGD starts, how long its steps are, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy import stats

from redoubt.attacks import PGD
from redoubt.errors import UserError

GREY = torch.full((400, 3, 4, 4), 0.5, dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- starts ----------------------------------------------------------------------------------------------


def test_linf_start_is_uniform_in_the_box():
    delta = (PGD(eps=0.1).start_point(GREY, generator=generator()) - GREY) / 0.1
    values = delta.flatten().numpy()
    assert abs(values).max() <= 1
    assert values.min() < -0.999
    assert values.max() > 0.999
    assert stats.kstest(values, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_l2_start_is_uniform_in_the_ball():
    """The radius to the power of the dimension is uniform, and no direction is preferred."""
    delta = (PGD(eps=0.4, norm="l2").start_point(GREY, generator=generator()) - GREY).flatten(1) / 0.4
    radius = delta.norm(dim=1)
    assert radius.max() <= 1 + 1e-9
    assert stats.kstest((radius**48).numpy(), stats.uniform().cdf).pvalue > 1e-3
    along = (delta / radius[:, None]).mean(0)
    assert along.norm() < 0.1


def test_normal_start_has_sigma():
    noise = PGD(eps=0.031, start="normal", sigma=0.001).start_point(GREY, generator=generator()) - GREY
    values = (noise / 0.001).flatten().numpy()
    assert values.std() == pytest.approx(1.0, abs=0.02)
    assert stats.kstest(values, stats.norm.cdf).pvalue > 1e-3


def test_normal_start_is_no_function_of_eps_or_norm():
    points = [
        PGD(eps=eps, norm=norm, start="normal").start_point(GREY, generator=generator())
        for eps, norm in ((0.1, "linf"), (0.3, "l2"))
    ]
    assert torch.equal(*points)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_start_is_clipped_to_pixels_or_not(norm, start):
    x = torch.zeros(8, 3, 4, 4)
    clipped = PGD(eps=0.1, norm=norm, start=start).start_point(x, generator=generator())
    free = PGD(eps=0.1, norm=norm, start=start, clip_start=False).start_point(x, generator=generator())
    assert clipped.min() == 0
    assert free.min() < 0
    assert torch.equal(free.clamp(0, 1), clipped)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("clip_start", [True, False])
def test_uniform_start_is_in_the_ball(norm, clip_start):
    x = torch.rand(50, 3, 4, 4, generator=generator(5))
    delta = PGD(eps=0.7, norm=norm, clip_start=clip_start).start_point(x) - x
    size = delta.abs().flatten(1).amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)
    assert (size <= 0.7 + 1e-6).all()


def test_fixed_start_is_the_image():
    assert torch.equal(PGD(eps=0.1, start="none").start_point(GREY), GREY)


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_start_has_dtype_and_device_of_x(start):
    for dtype in (torch.float32, torch.float64):
        assert PGD(eps=0.1, start=start).start_point(GREY.to(dtype)).dtype == dtype


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "normal"])
@pytest.mark.parametrize("edges", [(0, 7), (0, 3, 7), (0, 1, 2, 5, 7)])
def test_pieces_of_a_batch_draw_the_whole_batch_s_numbers(norm, start, edges):
    x = GREY[:7]
    attack = PGD(eps=0.1, norm=norm, start=start)
    whole = attack.start_point(x, generator=generator(3))
    pieces = [attack.start_point(x[a:b], generator=generator(3), rows=(a, 7)) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(whole[0], whole[1])


def test_the_start_that_is_not_given_is_start_point():
    x = GREY[:3]
    attack = PGD(eps=0.1, steps=2)
    torch.manual_seed(4)
    start = attack.start_point(x)
    torch.manual_seed(4)
    found = attack(lambda a: (a**3).flatten(1).sum(1), x)
    assert torch.equal(found, attack(lambda a: (a**3).flatten(1).sum(1), x, start=start))


# ---- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"eps": "8/255", "step": 0.25}, 2 / 255),
        ({"eps": "8/255", "step": "1/8"}, 1 / 255),
        ({"eps": 0.5, "step": 0.1}, 0.05),
        ({"eps": "8/255", "step_abs": "2/255"}, 2 / 255),
        ({"eps": 0.5, "step_abs": 0.007}, 0.007),
        ({"eps": 0.031, "step_abs": {"size": 0.007, "eps": 0.031}}, 0.007),
        ({"eps": 0.062, "step_abs": {"size": 0.007, "eps": 0.031}}, 0.014),
        ({"eps": "16/255", "step_abs": {"size": "2/255", "eps": "8/255"}}, 4 / 255),
        ({"eps": 0.5, "step": 9, "step_abs": 0.007}, 0.007),
    ],
)
def test_step_size(options, size):
    attack = PGD(**options)
    assert attack.step_size == pytest.approx(size, rel=1e-12)
    x = GREY[:1]
    moved = attack(lambda a: (2 * a).flatten(1).sum(1), x, start=x, steps=1)
    torch.testing.assert_close(moved, x + size, rtol=0, atol=1e-12)


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "l1"},
        {"norm": "Linf"},
        {"start": "gauss"},
        {"start": None},
        {"steps": -1},
        {"patience": -1},
        {"eps": -0.1},
        {"eps": -0.1, "step_abs": 0.01},
        {"eps": "eight"},
        {"eps": "1/0"},
        {"eps": float("nan")},
        {"eps": float("inf")},
        {"eps": None},
        {"step": -0.25},
        {"step": "a quarter"},
        {"step_abs": -0.01},
        {"step_abs": {"size": 0.007}},
        {"step_abs": {"size": 0.007, "eps": 0.031, "more": 1}},
        {"step_abs": {"size": "x", "eps": 0.031}},
        {"step_abs": {"size": 0.007, "eps": 0}},
        {"sigma": "x"},
        {"start": "normal", "sigma": -0.001},
    ],
    ids=str,
)
def test_a_bad_value_is_refused(options):
    with pytest.raises(UserError):
        PGD(**{"eps": 0.1, **options})


@pytest.mark.parametrize(
    ("options", "fine"),
    [
        ({"steps": 10, "step": 0.1}, True),
        ({"steps": 20, "step": 0.05}, True),
        ({"steps": 3, "step": "1/3"}, True),
        ({"steps": 9, "step": 0.1}, False),
        ({"steps": 1, "step": 0.25}, False),
        ({"steps": 10, "step_abs": 0.0099}, False),
        ({"steps": 10, "step_abs": 0.01}, True),
        ({"steps": 0}, True),
        ({"steps": 1, "step": 0.25, "start": "uniform"}, True),
        ({"steps": 1, "step": 0.25, "start": "normal"}, True),
    ],
    ids=str,
)
def test_a_fixed_start_that_cannot_reach_the_edge_is_refused(options, fine):
    options = {"eps": 0.1, "start": "none", **options}
    if fine:
        PGD(**options)
        return
    with pytest.raises(UserError, match="do not reach eps"):
        PGD(**options)


# ---- a training attack that grows -----------------------------------------------------------------------


def test_stages():
    attack = PGD(eps=0.1, steps=10, step=0.25, stages=[[0.2, 3, 0.5], ["1/2", 5, "0.4"]])
    assert attack.stage(0.0) == attack.stage(0.19) == (10, pytest.approx(0.025))
    assert attack.stage(0.2) == attack.stage(0.49) == (3, pytest.approx(0.05))
    assert attack.stage(0.5) == attack.stage(0.99) == (5, pytest.approx(0.04))
    assert PGD(eps=0.1, steps=10).stage(0.7) == (10, pytest.approx(0.025))


@pytest.mark.parametrize(
    "stages", [[[0.5, 3]], [[1.0, 3, 0.5]], [[0.5, 3, 0.5], [0.2, 3, 0.5]], [[0, 2.5, 0.5]], [[0, 3, -1]], ["0.5"], [3]]
)
def test_bad_stages(stages):
    with pytest.raises(UserError, match="stages"):
        PGD(eps=0.1, steps=10, stages=stages)
