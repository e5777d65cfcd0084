"""N-ATTACK: a naive transcription, the closed form on linear nets, and what it may ask of a net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from redoubt.attacks.base import Draws
from redoubt.attacks.nattack import NAttack
from redoubt.errors import UserError

CPU = torch.device("cpu")
SHAPE = (12, 3, 4, 4)


def draws(seed=0, chunk=0):
    return Draws(seed, "nattack", chunk, CPU)


def images(seed=0, low=0.0, high=1.0, dtype=torch.float64, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=g, dtype=dtype)


class Linear:
    """Logits [B, 5], computed row by row of each image alone, so that no rounding depends on the batch."""

    def __init__(self, seed=0, dtype=torch.float64, shape=SHAPE):
        g = torch.Generator().manual_seed(1000 + seed)
        self.w = torch.randn(5, *shape[1:], generator=g, dtype=dtype)
        self.calls = []

    def __call__(self, x):
        self.calls.append(x.clone())
        return (x[:, None] * self.w).flatten(2).sum(2)

    def labels(self, x):
        return (x[:, None] * self.w).flatten(2).sum(2).argmax(1)

    def worst(self, x, y, eps, norm):
        """Smallest margin within the ball [B]; in l2 without regard to the pixel range."""
        least = []
        for xi, yi in zip(x, y, strict=True):
            best = float("inf")
            for j in range(5):
                if j != yi:
                    w = self.w[yi] - self.w[j]
                    if norm == "linf":
                        point = torch.where(w > 0, (xi - eps).clip(0, 1), (xi + eps).clip(0, 1))
                        value = (w * point).sum()
                    else:
                        value = (w * xi).sum() - eps * w.norm()
                    best = min(best, value.item())
            least.append(best)
        return torch.tensor(least, dtype=x.dtype)


def moderate(net, x, y, norm):
    """A radius that breaks about half of the images."""
    low, high = 0.0, 2.0
    for _ in range(40):
        eps = (low + high) / 2
        low, high = (low, eps) if (net.worst(x, y, eps, norm) < 0).double().mean() > 0.5 else (eps, high)
    return low


def naive(w, x, y, noise, *, eps, norm, population, sigma, lr, inset, steps):
    """One image [C, H, W] in NumPy; noise [1 + steps * population, C, H, W]. All queried points, never stopping."""

    def point(v):
        a = np.arctanh(2 * np.minimum(np.maximum(x, inset), 1 - inset) - 1)
        delta = 0.5 * np.tanh(a + v) - 0.5 * np.tanh(a)
        if norm == "linf":
            delta = np.minimum(np.maximum(delta, -eps), eps)
        else:
            delta = delta * min(1.0, eps / max(np.sqrt((delta**2).sum()), 1e-300))
        return np.clip(x + delta, 0, 1)

    def reward(p):
        z = (w * p).reshape(len(w), -1).sum(1)
        return -(z[y] - max(z[j] for j in range(len(w)) if j != y))

    mean, queried = 0.001 * noise[0], [x]
    for step in range(steps):
        queried.append(point(mean))
        n = noise[1 + step * population :][:population]
        points = [point(mean + sigma * nk) for nk in n]
        queried += points
        r = np.array([reward(p) for p in points])
        a = (r - r.mean()) / (r.std() + 1e-7)
        mean = mean + lr / (population * sigma) * sum(ak * nk for ak, nk in zip(a, n, strict=True))
    return [*queried, point(mean)]


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.2)])
@pytest.mark.parametrize(("batch", "inset"), [(1000, 0.1), (40, 0.3), (1, 5e-7)])
def test_two_steps_are_those_of_a_naive_loop(norm, eps, batch, inset):
    x, net, population = images()[:4].contiguous(), Linear(), 7
    x[0, 0], x[1, 1] = 0.0, 1.0
    net.w *= 0.01
    y = net.labels(x)
    kw = {"population": population, "sigma": 0.2, "lr": 0.5, "inset": inset}

    def logits(points):
        z = net(points)
        ids = ((points[:, None] - x) ** 2).flatten(2).sum(2).argmin(1)
        # Raised by a constant the true logit gives the same z-scores, and nothing is broken.
        return z + 100.0 * nn.functional.one_hot(y[ids], 5)

    _, broken = NAttack(eps=eps, norm=norm, queries=2 + 2 * (1 + population), batch=batch, **kw)(logits, x, y, draws())
    assert not broken.any()
    assert max(map(len, net.calls)) <= batch
    asked = torch.cat(net.calls)
    ids = ((asked[:, None] - x) ** 2).flatten(2).sum(2).argmin(1)
    g = draws().generator()
    noise = torch.stack([torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in range(1 + 2 * population)])
    for i in range(len(x)):
        wanted = naive(
            net.w.numpy(), x[i].numpy(), int(y[i]), noise[:, i].numpy(), eps=eps, norm=norm, steps=2, **kw
        )  # fmt: skip
        np.testing.assert_allclose(asked[ids == i].numpy(), np.stack(wanted), rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))])
def test_on_a_linear_net_it_breaks_what_can_be_broken(norm, seed):
    net, x = Linear(seed), images(seed, 0.2, 0.8, shape=(40, 3, 4, 4))
    y = net.labels(x)
    eps = moderate(net, x, y, norm)
    worst = net.worst(x, y, eps, norm)
    adv, broken = NAttack(eps=eps, norm=norm, queries=1500, population=40, lr=0.2)(net, x, y, draws(seed))
    assert torch.equal(broken, net.labels(adv) != y)
    assert not broken[worst > 0].any()
    assert 15 <= (worst < 0).sum() <= 25
    assert broken.sum() >= 0.85 * (worst < 0).sum()


@pytest.mark.parametrize("queries", [1, 2, 3, 22, 23, 24, 50, 100])
def test_queries_are_counted_and_end_once_broken(queries):
    x, net = images(seed=4), Linear(4)
    y = net.labels(x)
    y[:2] = (y[:2] + 1) % 5
    counts, over = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(x), dtype=torch.bool)

    def logits(points):
        assert not torch.is_grad_enabled()
        z = net(points)
        ids = ((points[:, None] - x) ** 2).flatten(2).sum(2).argmin(1)
        assert not over[ids].any()
        counts.index_add_(0, ids, torch.ones(len(ids), dtype=torch.long))
        over[ids[z.argmax(1) != y[ids]]] = True
        return z

    attack = NAttack(eps=0.05, queries=queries, population=20, batch=30)
    adv, broken = attack(logits, x, y, draws())
    assert attack.cost == queries / 3
    assert torch.equal(broken, over)
    assert (counts[~over] == queries).all()
    assert (counts[over] <= queries).all()
    assert (counts[:2] == 1).all()
    assert torch.equal(adv[:2], x[:2])
    assert torch.equal(net.labels(adv) != y, broken)
    if queries == 100:
        assert 2 < over.sum() < len(x)
    asked = {p.numpy().tobytes() for p in torch.cat(net.calls)}
    assert all(a.numpy().tobytes() in asked for a in adv)


def test_the_query_of_smallest_margin_is_kept():
    x, net = images(seed=4), Linear(4)
    y = net.labels(x)
    adv, broken = NAttack(eps=0.01, queries=60, population=10)(net, x, y, draws())
    points = torch.cat(net.calls)
    ids = ((points[:, None] - x) ** 2).flatten(2).sum(2).argmin(1)

    def margins(p, label):
        z = (p[:, None] * net.w).flatten(2).sum(2)
        true = z[:, label].clone()
        z[:, label] = -float("inf")
        return true - z.amax(1)

    assert not broken.all()
    for i in range(len(x)):
        if not broken[i]:
            assert torch.equal(margins(adv[i : i + 1], y[i]).min(), margins(points[ids == i], y[i]).min())


def test_quantised_and_detached_logits_are_enough():
    net, x = Linear(1), images(1)
    y = (net(x) * 4).round().argmax(1)
    eps = moderate(net, x, y, "linf")
    attack = NAttack(eps=3 * eps, queries=800, population=40, lr=0.2)
    assert not attack.needs_gradients
    adv, broken = attack(lambda p: (net(p.detach()) * 4).round(), x.requires_grad_(), y, draws())
    assert broken.double().mean() > 0.6
    assert not adv.requires_grad


def test_flat_or_broken_logits_do_no_harm():
    x = images()
    y = torch.zeros(len(x), dtype=torch.long)
    adv, broken = NAttack(eps=0.1, queries=100, population=10)(
        lambda p: torch.tensor([[1.3, 0.1]], dtype=p.dtype).repeat(len(p), 1), x, y, draws()
    )
    assert not broken.any()
    assert torch.equal(adv, x)
    # An image whose logits are not finite counts as misclassified, as in scoring.
    _, broken = NAttack(eps=0.1, queries=100)(lambda p: torch.full((len(p), 2), float("nan")), x, y, draws())
    assert broken.all()


def test_draws_decide_and_the_global_generator_is_left_alone():
    x, net = images(), Linear()
    y = net.labels(x)
    attack = NAttack(eps=0.02, queries=100, population=20)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = attack(net, x, y, draws())[0], attack(net, x, y, draws())[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    for other in (draws(chunk=1), draws(seed=1)):
        assert not torch.equal(first, attack(net, x, y, other)[0])


@pytest.mark.parametrize("batch", [7, 1000])
def test_an_image_does_not_depend_on_which_others_are_broken(batch):
    """Labels that make all others wrong at once leave one image alone in its place of the chunk."""
    x, net = images(seed=4), Linear(4)
    y = net.labels(x)
    attack = NAttack(eps=0.05, queries=120, population=20, batch=batch, lr=0.2)
    together, broken = attack(net, x, y, draws())
    assert 0 < broken.sum() < len(x)
    for i in range(len(x)):
        wrong = (y + 1) % 5
        wrong[i] = y[i]
        alone, flags = attack(net, x, wrong, draws())
        torch.testing.assert_close(alone[i], together[i], rtol=0, atol=1e-12)  # reductions and tanh round by layout
        assert flags[i] == broken[i]
        assert flags.sum() == len(x) - 1 + broken[i].long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("norm", "eps"), [("linf", "8/255"), ("linf", 0.3), ("l2", 0.5), ("linf", 0.0)])
def test_bounds_shape_dtype_and_an_untouched_x(dtype, norm, eps):
    x, net = images(dtype=dtype).round(decimals=1), Linear(dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    y, before = net.labels(x), x.clone()
    attack = NAttack(eps=eps, norm=norm, queries=60, population=20, sigma=0.5)
    adv, _ = attack(net, x, y, draws())
    radius = 8 / 255 if eps == "8/255" else eps
    assert attack.eps == radius
    assert attack.norm == norm
    assert torch.equal(x, before)
    for points in (adv, *net.calls[1:]):
        assert points.dtype == dtype
        assert points.min() >= 0
        assert points.max() <= 1
    assert adv.shape == x.shape
    delta = (adv.double() - x.double()).flatten(1)
    distance = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (distance <= radius + 1e-6).all()
    assert radius == 0 or (distance > 0).any()


def test_pixels_at_the_ends_move_and_an_empty_chunk_is_empty():
    x, net = images().round(), Linear()
    y = net.labels(x)
    adv, _ = NAttack(eps=0.02, queries=200)(net, x, y, draws())
    assert ((adv - x).abs() > 0.005).double().mean() > 0.2
    empty, flags = NAttack(eps=0.02)(net, x[:0], y[:0], draws())
    assert empty.shape == (0, *x.shape[1:])
    assert flags.shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"queries": 0}, "queries"), ({"queries": 2.5}, "queries"), ({"population": 1}, "population"),
        ({"sigma": 0}, "sigma"), ({"sigma": "x"}, "sigma"), ({"lr": -1.0}, "lr"), ({"norm": "l1"}, "norm"),
        ({"eps": -0.1}, "eps"), ({"eps": "a/b"}, "eps"), ({"batch": 0}, "batch"), ({"inset": 0.0}, "inset"),
        ({"inset": 0.6}, "inset"),
    ],
)  # fmt: skip
def test_values_out_of_range(wrong, key):
    with pytest.raises(UserError, match=f"^{key}=") as caught:
        NAttack(**{"eps": 0.1, **wrong})
    assert "\n" not in str(caught.value)
