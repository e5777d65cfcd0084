"""FGSM, PGD and margin-PGD of evaluation against naive loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from redoubt.attacks import WhiteBox
from redoubt.attacks.base import Draws
from redoubt.attacks.whitebox import Reached
from redoubt.errors import UserError

EPS = 8 / 255


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8 * 9, 10)

    def forward(self, x):
        return self.fc(torch.tanh(4 * self.conv(x)).flatten(1))


NET = Net().double().eval().requires_grad_(False)


def batch(b=5):
    g = torch.Generator().manual_seed(1)
    return torch.rand(b, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (b,), generator=g)


def margin_loss(z, y, kappa):
    """As the papers' code: the true class is taken out by subtracting 10,000."""
    onehot = F.one_hot(y, z.shape[1]).to(z)
    real, other = (onehot * z).sum(1), ((1 - onehot) * z - onehot * 10_000).amax(1)
    return -(real - other + kappa).clamp(min=0).sum()


def naive(x, y, loss, size, steps, start=None, eps=EPS):
    adv = x if start is None else start
    for _ in range(steps):
        point = adv.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(NET(point), y), point)
        adv = torch.maximum(torch.minimum(adv + size * g.sign(), x + eps), x - eps).clip(0, 1)
    return adv


def numbers(seed=0):
    return Draws(seed, "attack", 0, torch.device("cpu"))


def test_draws_without_arguments_are_of_seed_0_on_the_cpu():
    x, y = batch()
    attack = WhiteBox(eps=EPS, steps=1, start="uniform")
    assert torch.equal(attack(NET, x, y, Draws()), attack(NET, x, y, numbers()))
    assert not torch.equal(attack(NET, x, y, Draws()), attack(NET, x, y, Draws(seed=1)))


SUITE = {
    "fgsm": ({"steps": 1, "step": 1.0}, lambda z, y: F.cross_entropy(z, y, reduction="sum"), EPS, 1),
    "pgd20": ({"steps": 20, "step": 0.1}, lambda z, y: F.cross_entropy(z, y, reduction="sum"), EPS / 10, 20),
    "cw": (
        {"steps": 30, "step": 0.1, "loss": "margin", "kappa": 50.0},
        lambda z, y: margin_loss(z, y, 50.0),
        EPS / 10,
        30,
    ),
    "cw of no confidence": (
        {"steps": 12, "step": 0.1, "loss": "margin", "kappa": 0.0},
        lambda z, y: margin_loss(z, y, 0.0),
        EPS / 10,
        12,
    ),
}


@pytest.mark.parametrize("name", list(SUITE))
def test_equals_a_naive_loop(name):
    options, loss, size, steps = SUITE[name]
    x, y = batch()
    attack = WhiteBox(eps="8/255", **options)
    assert attack.steps == steps
    torch.testing.assert_close(attack(NET, x, y, numbers()), naive(x, y, loss, size, steps), rtol=0, atol=1e-12)


def test_margin_without_confidence_stands_still_once_fooled():
    x, y = batch(40)
    strong, weak = (WhiteBox(eps=0.3, loss="margin", steps=12, step=0.1, kappa=k) for k in (50.0, 0.0))
    a, b = (attack(NET, x, y, numbers()) for attack in (strong, weak))
    fooled = NET(x).argmax(1) != y
    assert fooled.any()
    assert torch.equal(b[fooled], x[fooled])
    assert not torch.equal(a[fooled], x[fooled])


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("split", [1, 7, 20])
def test_going_on_from_a_shorter_attack_is_bit_for_bit_the_longer_one(loss, norm, split):
    x, y = (t.float() if t.is_floating_point() else t for t in batch())
    net = Net().eval()
    short, long = (WhiteBox(eps="8/255", norm=norm, loss=loss, steps=n, step=1.0 if n == 1 else 0.1)
                   for n in (max(split, 10), 25))  # fmt: skip
    assert short.path == long.path
    assert short.path is not None
    point = short(net, x, y, numbers()).requires_grad_()
    (slope,) = torch.autograd.grad(short.raised(net(point), y).sum(), point)
    begun = Reached(short.steps, point.detach(), slope)
    assert torch.equal(long(net, x, y, numbers(), begun), long(net, x, y, numbers()))


@pytest.mark.parametrize(
    "other",
    [
        {"loss": "margin"},
        {"eps": "4/255"},
        {"step": 0.2},
        {"norm": "l2"},
        {"loss": "margin", "kappa": 0.0},
    ],
    ids=str,
)
def test_attacks_of_another_kind_share_no_path(other):
    common = {"eps": "8/255", "steps": 20, "step": 0.1}
    assert WhiteBox(**common).path != WhiteBox(**{**common, **other}).path


@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_a_random_start_has_no_path_and_comes_from_the_generator(start):
    x, y = batch()
    attack = WhiteBox(eps="8/255", steps=3, step=0.1, start=start)
    assert attack.path is None
    first, again = (attack(NET, x, y, numbers(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, attack(NET, x, y, numbers(4)))


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "hinge"},
        {"norm": "l1"},
        {"start": "here"},
        {"steps": -1},
        {"steps": 5, "step": 0.1},
        {"eps": "x"},
    ],
    ids=str,
)
def test_a_bad_value_is_refused(options):
    with pytest.raises(UserError):
        WhiteBox(**{"eps": "8/255", "steps": 20, "step": 0.1, **options})


def test_every_restart_begins_elsewhere():
    x, y = batch()
    seen = []

    def logits(v):
        seen.append(v.detach().clone())
        return F.one_hot(y, 10).double() + 0 * v.sum()  # nobody is ever broken

    WhiteBox(eps=0.1, steps=1, start="uniform", restarts=4)(logits, x, y, numbers())
    starts = [v for v in seen if v.shape == x.shape][::2]  # each is followed by the look at what it has broken
    assert len(starts) == 4
    for i in range(4):
        assert not any(torch.equal(starts[i], starts[j]) for j in range(i))
