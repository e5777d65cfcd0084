"""PGD's ascent: closed forms on linear losses, naive loops, and torchattacks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

from redoubt.attacks import PGD

SHAPE = (5, 3, 4, 4)


def images(seed=0, low=0.0, high=1.0, dtype=torch.float64, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=g, dtype=dtype)


W = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def linear(x):
    return (x * W).flatten(1).sum(1)


def wavy(x):
    """Not concave, a function of each row alone."""
    return (torch.sin(9 * x) * W).flatten(1).sum(1)


def norms(delta):
    return delta.flatten(1).norm(dim=1)


def naive(loss, x, start, *, norm, eps, size, steps, patience=None, done=None, keep_best=False):
    """One example [C, H, W] at a time, in plain Python; all iterates' best where keep_best."""
    adv, spent, best = start.clone(), 0, None

    def better(a, b):
        return a[0] > b[0] or (a[0] == b[0] and a[1] > b[1])

    for k in range(steps + 1):
        point = adv.clone().requires_grad_()
        value = loss(point[None])[0]
        flag = bool(done(adv[None])[0]) if done else False
        if keep_best and (best is None or better((flag, value.item()), best[:2])):
            best = (flag, value.item(), adv.clone())
        if k == steps:
            break
        (g,) = torch.autograd.grad(value, point)
        if flag:
            spent += 1
            if spent > patience:
                continue
        if norm == "linf":
            adv = adv + size * g.sign()
            adv = torch.minimum(torch.maximum(adv, x - eps), x + eps)
        else:
            adv = adv + size * g / max(g.norm().item(), 1e-300)
            delta = adv - x
            adv = x + delta * min(1.0, eps / max(delta.norm().item(), 1e-300))
        adv = adv.clip(0, 1)
    return best[2] if keep_best else adv


# ---- closed forms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["none", "uniform", "normal"])
@pytest.mark.parametrize("eps", ["8/255", 0.3, 1.0])
def test_linf_on_a_linear_loss_is_the_clipped_corner(start, eps):
    x = images()
    found = PGD(eps=eps, start=start, steps=10, step=0.25)(linear, x)
    radius = 8 / 255 if eps == "8/255" else eps
    torch.testing.assert_close(found, (x + radius * W.sign()).clip(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_linf_moves_by_the_step_size(steps):
    x = images(low=0.4, high=0.6)
    found = PGD(eps=0.3, step_abs=0.05, start="uniform", steps=steps)(linear, x, start=x)
    torch.testing.assert_close(found, x + steps * 0.05 * W.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", ["none", "uniform", "normal"])
def test_l2_on_a_linear_loss_is_along_the_gradient(start):
    x = images(low=0.4, high=0.6)
    found = PGD(eps=0.3, norm="l2", start=start, steps=400, step=0.5)(linear, x)
    torch.testing.assert_close(found, x + 0.3 * W / W.norm(), rtol=0, atol=1e-9)


def test_l2_single_step_is_clipped_to_pixels():
    x = images()
    found = PGD(eps=2.0, norm="l2", start="none", steps=1, step=1.0)(linear, x)
    wanted = (x + 2.0 * W / W.norm()).clip(0, 1)
    assert not torch.equal(wanted, x + 2.0 * W / W.norm())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_l2_reaches_the_optimum_of_ball_and_pixels():
    """On a linear loss that is clip(x + t w) with t such that the distance is eps."""
    x, eps = images(seed=3), 1.0
    found = PGD(eps=eps, norm="l2", start="none", steps=600, step=0.01)(linear, x)
    for i in range(len(x)):
        low, high = 0.0, 100.0
        for _ in range(100):
            t = (low + high) / 2
            inside = ((x[i] + t * W).clip(0, 1) - x[i]).norm() < eps
            low, high = (t, high) if inside else (low, t)
        best = (x[i] + low * W).clip(0, 1)
        gain, limit = linear((found[i] - x[i])[None]), linear((best - x[i])[None])
        assert limit + 1e-9 >= gain > 0.99 * limit


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_loss_whose_gradient_is_an_expanded_view(norm):
    """The gradient of a plain sum is one number seen everywhere: it cannot be changed in place."""
    x = images(low=0.4, high=0.6)
    found = PGD(eps=0.1, norm=norm, start="none")(lambda adv: adv.flatten(1).sum(1), x)
    torch.testing.assert_close(found, x + (0.1 if norm == "linf" else 0.1 / 48**0.5), rtol=0, atol=1e-12)


def test_zero_gradient_moves_nothing():
    x = images()
    for norm in ("linf", "l2"):
        found = PGD(eps=0.1, norm=norm, start="none")(lambda adv: (0 * adv).flatten(1).sum(1), x)
        assert torch.equal(found, x)


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e20])
def test_l2_direction_ignores_the_gradient_s_scale(factor):
    """In float32, where squares of 1e-30 are 0."""
    x = images(low=0.4, high=0.6, dtype=torch.float32)
    w = W.float()
    found = PGD(eps=0.3, norm="l2", start="none", steps=4, step=0.5)(
        lambda adv: (adv * (w * factor)).flatten(1).sum(1), x
    )
    torch.testing.assert_close(found, x + 0.3 * w / w.norm(), rtol=0, atol=1e-5)


# ---- naive loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_equals_a_naive_loop(norm, steps):
    x, eps, size = images(seed=4), 0.2, 0.06
    attack = PGD(eps=eps, norm=norm, steps=steps, step_abs=size)
    start = attack.start_point(x, generator=torch.Generator().manual_seed(0))
    found = attack(wavy, x, start=start)
    for i in range(len(x)):
        wanted = naive(wavy, x[i], start[i], norm=norm, eps=eps, size=size, steps=steps)
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-12)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(), nn.Flatten()
        )
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.mark.parametrize("random_start", [False, True])
def test_equals_torchattacks_step_for_step(random_start):
    torch.manual_seed(0)
    net = Tiny().eval()
    x = images(shape=(6, 3, 8, 8), dtype=torch.float32)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    eps, alpha = 8 / 255, 2 / 255
    for steps in range(1, 8):
        torch.manual_seed(7)
        start = x
        if random_start:
            start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        torch.manual_seed(7)
        wanted = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=steps, random_start=random_start)(x, y)
        attack = PGD(eps="8/255", step_abs="2/255", steps=steps)
        found = attack(lambda adv: F.cross_entropy(net(adv), y, reduction="none"), x, start=start)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


# ---- per example -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rows_with_their_own_eps_step_and_steps_equal_rows_alone(norm):
    x = images(seed=5)
    eps = torch.tensor([0.0, 0.02, 0.1, 0.3, 0.7], dtype=torch.float64)
    size = torch.tensor([0.1, 0.01, 0.05, 0.02, 0.3], dtype=torch.float64)
    steps = torch.tensor([3, 0, 7, 1, 5])
    attack = PGD(eps=0.1, norm=norm, start="uniform")
    start = x + 0.001
    found = attack(wavy, x, start=start, eps=eps, step_size=size, steps=steps)
    for i in range(len(x)):
        alone = attack(
            wavy, x[i : i + 1], start=start[i : i + 1], eps=eps[i].item(), step_size=size[i].item(),
            steps=int(steps[i]),
        )  # fmt: skip
        torch.testing.assert_close(found[i : i + 1], alone, rtol=0, atol=1e-13)
        if steps[i] > 0:
            wanted = naive(wavy, x[i], start[i], norm=norm, eps=eps[i].item(), size=size[i].item(), steps=int(steps[i]))
            torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("keep_best", [False, True])
def test_permuted_batch_gives_permuted_results(norm, keep_best):
    x = images(seed=6)
    order = torch.tensor([3, 1, 4, 0, 2])
    attack = PGD(eps=0.2, norm=norm, keep_best=keep_best, patience=1)

    def loss(adv):
        value = wavy(adv)
        return value, value > 5.0

    start = attack.start_point(x, generator=torch.Generator().manual_seed(1))
    whole = attack(loss, x, start=start)
    torch.testing.assert_close(attack(loss, x[order], start=start[order]), whole[order], rtol=0, atol=1e-13)


def test_a_row_does_not_feel_a_nan_neighbour():
    x = images(seed=6)

    factor = torch.tensor([1, 1, float("nan"), 1, 1], dtype=torch.float64)
    attack = PGD(eps=0.1, start="none")
    clean, spoilt = attack(wavy, x), attack(lambda adv: factor * wavy(adv), x)
    keep = [0, 1, 3, 4]
    assert torch.equal(clean[keep], spoilt[keep])


def test_a_batch_of_one_scalar_tensor_eps():
    x = images(seed=6)
    attack = PGD(eps=0.5, start="none", step_abs=0.1)
    found = attack(linear, x, eps=torch.tensor(0.05))
    torch.testing.assert_close(found, (x + 0.05 * W.sign()).clip(0, 1), rtol=0, atol=1e-8)


# ---- done, patience, keep-best ---------------------------------------------------------------------------


def level(x):
    """Raised step by step by exactly the step size; done over 0.6."""
    return x.flatten(1).mean(1)


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
def test_moves_patience_steps_after_done_then_stands_still(patience):
    """FAT: from 0.5 by 0.02 a step, an example is done from step d on and ends d + patience steps up."""
    x = torch.full((4, 1, 2, 2), 0.5, dtype=torch.float64)
    limits = torch.tensor([0.5, 0.53, 0.61, 2.0], dtype=torch.float64)
    attack = PGD(eps=0.4, step_abs=0.02, steps=20, start="none", patience=patience)
    found = attack(lambda adv: (level(adv), level(adv) >= limits - 1e-9), x)
    for i, first_done in enumerate([0, 2, 6, 10**6]):
        moved = min(first_done + patience, 20)
        torch.testing.assert_close(found[i], x[i] + 0.02 * moved, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("keep_best", [False, True])
def test_done_equals_a_naive_loop(norm, patience, keep_best):
    x = images(seed=8)
    reached = wavy(PGD(eps=0.3, norm=norm, steps=5, step_abs=0.08, start="uniform")(wavy, x, start=x)).sort().values
    limit = (reached[1] + reached[2]) / 2

    def done(adv):
        return wavy(adv.detach()) >= limit

    attack = PGD(eps=0.3, norm=norm, steps=8, step_abs=0.08, start="none", patience=patience, keep_best=keep_best)
    found = attack(lambda adv: (wavy(adv), done(adv)), x)
    flags = []
    for i in range(len(x)):
        wanted = naive(
            wavy, x[i], x[i], norm=norm, eps=0.3, size=0.08, steps=8, patience=patience, done=done,
            keep_best=keep_best,
        )  # fmt: skip
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-12)
        flags.append(bool(done(wanted[None])))
    assert any(flags)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", range(4))
def test_keep_best_is_never_worse_than_the_last(norm, seed):
    x = images(seed=seed)
    options = {"eps": 0.5, "norm": norm, "steps": 6, "step_abs": 0.3, "start": "none"}
    last, best = PGD(**options)(wavy, x), PGD(**options, keep_best=True)(wavy, x)
    assert (wavy(best) >= wavy(last)).all()
    if norm == "linf":
        assert (wavy(best) > wavy(last)).any(), "overshooting steps must make a difference here"


def test_keep_best_sees_the_last_iterate_and_the_start():
    x = images(low=0.4, high=0.6)
    up = PGD(eps=0.1, steps=4, start="none", keep_best=True)(linear, x)
    torch.testing.assert_close(up, x + 0.1 * W.sign(), rtol=0, atol=1e-12)
    top = PGD(eps=0.1, steps=3, step_abs=0.1, start="none", keep_best=True)(
        lambda a: -((a - x + 1e-3) ** 2).flatten(1).sum(1), x
    )
    torch.testing.assert_close(top, x, rtol=0, atol=1e-12)


def test_keep_best_prefers_done_to_a_higher_loss():
    """The loss rises past the place where the example is done."""
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    attack = PGD(eps=0.4, step_abs=0.1, steps=4, start="none", keep_best=True, patience=100)
    found = attack(lambda adv: (level(adv), (level(adv) > 0.55) & (level(adv) < 0.65)), x)
    torch.testing.assert_close(found, x + 0.1)
    later = attack(lambda adv: (level(adv), (level(adv) > 0.55) & (level(adv) < 0.75)), x)
    torch.testing.assert_close(later, x + 0.2)


# ---- bounds and manners ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["none", "uniform", "normal"])
@pytest.mark.parametrize("clip_start", [True, False])
@pytest.mark.parametrize("eps", ["8/255", 0.5, 3.0])
def test_stays_in_ball_and_pixels(norm, start, clip_start, eps):
    x = images(seed=9, dtype=torch.float32)
    x[0], x[1] = 0.0, 1.0
    attack = PGD(eps=eps, norm=norm, start=start, clip_start=clip_start, sigma=0.3, steps=3, step=0.5)
    found = attack(lambda a: wavy(a.double()), x)
    delta = found - x
    size = delta.abs().flatten(1).amax(1) if norm == "linf" else norms(delta)
    assert (size <= attack.eps + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize("cause", ["pixels", "ball", "smaller eps"])
def test_never_returns_a_start_outside_ball_or_pixels(cause, keep_best):
    """A random start may lie outside; after a step nothing returned may."""
    x = torch.zeros(SHAPE, dtype=torch.float64) if cause == "pixels" else torch.full(SHAPE, 0.5).double()
    sigma, eps = (0.2, 0.1) if cause == "ball" else (0.001, 0.1)
    attack = PGD(eps=eps, start="normal", sigma=sigma, clip_start=False, steps=3, keep_best=keep_best)
    if cause == "smaller eps":
        attack, eps = PGD(eps=0.1, start="uniform", steps=3, keep_best=keep_best), 0.02
    torch.manual_seed(0)

    def loss(adv):  # largest far from x: outside
        return -(adv * 1.5).flatten(1).sum(1) if cause == "pixels" else (adv - x).abs().flatten(1).sum(1)

    found = attack(loss, x, eps=eps)
    assert (found - x).abs().max() <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


def test_no_steps_return_the_start():
    x = images()
    assert torch.equal(PGD(eps=0.1, steps=0, start="none")(linear, x), x)
    start = (x + 0.01).clamp(0, 1)
    assert torch.equal(PGD(eps=0.1, steps=0)(linear, x, start=start), start)
    assert torch.equal(PGD(eps=0.1, steps=3)(linear, x, start=start, steps=0), start)


def test_number_of_gradients_is_number_of_steps():
    calls = []

    def loss(adv):
        calls.append(torch.is_grad_enabled())
        return linear(adv)

    PGD(eps=0.1, steps=4)(loss, images())
    assert calls == [True] * 4
    calls.clear()
    PGD(eps=0.1, steps=4, keep_best=True)(loss, images())
    assert calls == [True] * 4 + [False]


@pytest.mark.parametrize("b", [1, 5])
def test_no_example_s_gradient_shrinks_with_the_batch(b):
    """The losses are summed: what flows back into each is 1."""
    seen = []

    def loss(adv):
        value = wavy(adv)
        value.register_hook(seen.append)
        return value

    PGD(eps=0.1, steps=2)(loss, images()[:b])
    assert all(torch.equal(g, torch.ones(b, dtype=torch.float64)) for g in seen)
    assert len(seen) == 2


def test_works_inside_no_grad():
    x = images()
    attack = PGD(eps=0.1, start="none")
    with torch.no_grad():
        found = attack(wavy, x)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, attack(wavy, x))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["none", "uniform", "given"])
@pytest.mark.parametrize("steps", [0, 3])
def test_inputs_are_not_modified(norm, start, steps):
    x = images()
    x[0], x[1] = 0.0, 1.0
    given = x + 0.3 if start == "given" else None
    before = x.clone(), None if given is None else given.clone()
    eps, size, count = torch.full((5,), 0.2), torch.full((5,), 0.1), torch.full((5,), steps)
    attack = PGD(eps=0.2, norm=norm, start="uniform" if start == "given" else start, keep_best=True)
    attack(lambda a: (wavy(a), wavy(a) > 1), x, start=given, eps=eps, step_size=size, steps=count)
    assert torch.equal(x, before[0])
    assert given is None or torch.equal(given, before[1])
    assert torch.equal(eps, torch.full((5,), 0.2))
    assert torch.equal(size, torch.full((5,), 0.1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_is_returned_is_detached(norm):
    x = images().requires_grad_()
    found = PGD(eps=0.1, norm=norm, start="none")(wavy, x)
    assert not found.requires_grad
    assert x.grad is None


def test_parameters_get_no_gradient():
    net = Tiny().double()
    y = torch.zeros(5, dtype=torch.long)
    PGD(eps=0.1)(lambda a: F.cross_entropy(net(F.pad(a, (2, 2, 2, 2))), y, reduction="none"), images())
    assert all(p.grad is None for p in net.parameters())


def test_wants_no_global_random_numbers_with_a_generator():
    state = torch.get_rng_state()
    PGD(eps=0.1).start_point(images(), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())
    assert math.isclose(PGD(eps="8/255").eps, 8 / 255)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 50])
def test_settling_is_the_same_with_less_work(norm, steps):
    """Of a bowl whose bottom lies inside some balls the iterates go to and fro, elsewhere they reach a corner."""
    g = torch.Generator().manual_seed(0)
    x, curved = torch.rand(6, 1, 4, 4, generator=g), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    goal = x + 0.05 * torch.randn(x.shape, generator=g)
    slope = torch.randn(x.shape, generator=g)
    passes = {"plain": 0, "settling": 0}

    def loss_of(rows, side="settling"):
        def loss(adv):
            passes[side] += len(adv)
            bowl = ((adv - goal[rows]) ** 2).flatten(1).sum(1)
            return -curved[rows] * bowl + (1 - curved[rows]) * (adv * slope[rows]).flatten(1).sum(1)

        return loss

    attack = PGD(eps=0.1, norm=norm, steps=steps, step=0.3, start="uniform", sigma=0.01)
    start = attack.start_point(x, generator=g)
    plain = attack(loss_of(torch.arange(6), "plain"), x, start=start)
    settled = attack.settling(loss_of, x, start=start)
    assert torch.equal(plain, settled)
    assert passes["plain"] == 6 * steps
    assert passes["settling"] <= passes["plain"] * (0.9 if steps == 50 else 1)
    if steps:
        probe = start.clone().requires_grad_(True)
        (first,) = torch.autograd.grad(loss_of(torch.arange(6), "plain")(probe).sum(), probe)
        assert torch.equal(plain, attack.settling(loss_of, x, start=start, first=first))
