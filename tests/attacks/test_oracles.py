"""Attacks against oracles: closed forms, exact verdicts by integer programming, other libraries, and properties."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Callable

import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from redoubt.attacks import PGD, AutoAttack, MultiTargeted, NAttack, TorchAttacks, WhiteBox
from redoubt.attacks.base import Attack, Draws
from redoubt.evaluation.kept import Kept
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import distances, judge

CPU = torch.device("cpu")


class Module(nn.Module):
    """What is judged: logits of a net, in the precision of its weights."""

    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)

    def __init__(self, net):
        super().__init__()
        self.net = net

    def logits(self, x):
        return self.net(x)


class Double(Module):
    """Images are float32, as everywhere; no rounding of the net may decide a verdict."""

    def logits(self, x):
        return self.net(x.double())


def numbers(seed=0, name="attack"):
    return Draws(seed, name, 0, CPU)


def verdicts(module, images, labels, attacks, chunk=64, seed=0, **options):
    return judge(module, images, labels, Suite(attacks=attacks), chunk=chunk, seed=seed, device=CPU, progress=False,
                 **options)  # fmt: skip


def broken_by(attack, net, x, y, seed=0):
    """Which examples [B] an attack breaks, classified anew."""
    adv = attack(net, x, y, numbers(seed))
    adv = adv[0] if isinstance(adv, tuple) else adv
    assert distances(adv, x, attack.norm).max() <= attack.eps + 1e-6
    assert adv.min() >= 0
    assert adv.max() <= 1
    with torch.no_grad():
        return net(adv).argmax(1) != y


# ---- linear nets: closed forms ---------------------------------------------------------------------------


def linear_problem(seed, low=0, high=256):
    """A linear net in float64, 200 images of 3 x 4 x 4 and labels of which a tenth are wrong."""
    rng = np.random.default_rng(seed)
    k = 3 + seed % 8
    # Rows of unequal length: then the class that is nearest at x is often not the one that can be reached.
    w, b = rng.normal(size=(k, 48)) * rng.uniform(0.2, 2, size=(k, 1)), rng.normal(size=k)
    images = rng.integers(low, high, (200, 3, 4, 4), dtype=np.uint8)
    x = (torch.from_numpy(images).float() / 255).double().flatten(1).numpy()
    y = np.where(rng.random(200) < 0.9, (x @ w.T + b).argmax(1), rng.integers(k, size=200))
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, k)).double().requires_grad_(False)
    net[1].weight.copy_(torch.from_numpy(w))
    net[1].bias.copy_(torch.from_numpy(b))
    return w, b, torch.from_numpy(images), torch.from_numpy(y), x, net


def worst(w, b, x, y, eps, norm):
    """max over t != y of the largest ``z_t - z_y`` in ball and pixel range [N]; l2 only far from the borders."""
    d, shift = w[None] - w[y][:, None], b[None] - b[y][:, None]  # [N, K, 48], [N, K]
    if norm == "linf":
        low, high = np.maximum(x - eps, 0.0)[:, None], np.minimum(x + eps, 1.0)[:, None]
        top = np.maximum(d * low, d * high).sum(2) + shift
    else:
        assert x.min() >= eps
        assert x.max() <= 1 - eps
        top = (d * x[:, None]).sum(2) + shift + eps * np.linalg.norm(d, axis=2)
    top[np.arange(len(y)), y] = -np.inf
    return top.max(1)


def half_way(w, b, x, y, norm):
    """The eps of a coarse grid at which closest to half of the examples are robust."""
    grid = np.linspace(0.004, 0.3, 75)
    robust = [(worst(w, b, x, y, eps, norm) < 0).mean() for eps in grid]
    assert robust == sorted(robust, reverse=True)
    return float(grid[np.abs(np.array(robust) - 0.5).argmin()])


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_multi_targeted_is_the_closed_form_on_linear_nets(norm):
    """20 nets of 3 to 10 classes, 200 examples each: no verdict deviates, whatever start and number of steps.

    PGD on cross-entropy is the control: it never breaks a robust example, and misses some that can be broken (its
    direction mixes all classes), so that agreement is no matter of course.
    """
    missed = shares = overlooked = last = 0
    for seed in range(20):
        border = (0, 256) if norm == "linf" else (90, 166)
        w, b, images, labels, x, net = linear_problem(seed, *border)
        y = labels.numpy()
        eps = half_way(w, b, x, y, norm)
        exact = worst(w, b, x, y, eps, norm)
        assert np.abs(exact).min() > 1e-6, "no example of these is decided by rounding"
        common = {"eps": eps, "norm": norm}
        found = verdicts(
            Double(net),
            images,
            labels,
            {
                "one": MultiTargeted(**common, steps=1, step=1.0),
                "many": MultiTargeted(**common, steps=8, step=0.25),
                "random": MultiTargeted(**common, steps=4, step=30, start="uniform"),  # so long: in l2 it has to turn
                "best": MultiTargeted(**common, steps=8, step=0.25, keep_best=True),
                "first": MultiTargeted(**common, steps=1, step=1.0, targets=1),
                "but_last": MultiTargeted(**common, steps=1, step=1.0, targets=max(1, len(b) - 2)),
                "ce": WhiteBox(**common, steps=8, step=0.25),
                "margin": WhiteBox(**common, steps=8, step=0.25, loss="margin"),
            },
            chunk=200,
        )
        for name in ("one", "many", "random", "best"):
            np.testing.assert_array_equal(found[name], exact < 0, err_msg=f"{name}, seed {seed}")
        for name in ("first", "but_last", "ce", "margin"):
            assert (found[name] >= (exact < 0)).all(), (name, seed)
            assert (found[name] <= found["natural"]).all(), (name, seed)
        missed += (found["ce"] & (exact >= 0)).sum()
        overlooked += (found["first"] & (exact >= 0)).sum()
        last += (found["but_last"] & (exact >= 0)).sum()
        shares += (exact < 0).mean() / 20
        one = {"one": MultiTargeted(**common, steps=1, step=1.0)}
        float32 = verdicts(Module(net.float()), images, labels, one, chunk=200)
        np.testing.assert_array_equal(float32["one"], exact < 0, err_msg=f"float32, seed {seed}")
    assert 0.4 < shares < 0.65
    assert missed > 20
    assert overlooked > 5, "one target does not do"
    assert last > 0 or norm == "l2", "the last target is needed too"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_a_linear_net_loses_it_loses_at_every_larger_eps(norm):
    """Monotone in eps per example where it is a theorem: the attack is exact, and balls are nested.

    On a net that is not linear PGD may well miss in a larger ball what it found in a smaller one.
    """
    w, b, images, labels, x, net = linear_problem(5, *((0, 256) if norm == "linf" else (90, 166)))
    grid = [0.0, 0.002, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3]
    attacks = {str(eps): MultiTargeted(eps=eps, norm=norm, steps=4, step=0.25) for eps in grid}
    found = verdicts(Double(net), images, labels, attacks)
    np.testing.assert_array_equal(found["0.0"], found["natural"])
    for small, large in itertools.pairwise(grid):
        assert (found[str(large)] <= found[str(small)]).all()
    for eps in grid:
        np.testing.assert_array_equal(found[str(eps)], worst(w, b, x, labels.numpy(), eps, norm) < 0)
    assert found["natural"].sum() > found["0.02"].sum() > found["0.3"].sum()


# ---- ReLU nets: exact verdicts by integer programming ------------------------------------------------------


class Exact:
    """Bounds and exact margins of a net ``W2 relu(W1 x + b1) + b2``."""

    def __init__(self, net):
        (self.w1, self.b1), (self.w2, self.b2) = (
            (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (net[1], net[3])
        )

    def __call__(self, x):
        return self.w2 @ np.maximum(self.w1 @ x + self.b1, 0) + self.b2

    def bounds(self, low, high):
        """Interval bounds of the hidden units before their ReLU."""
        return (
            self.b1 + np.minimum(self.w1 * low, self.w1 * high).sum(1),
            self.b1 + np.maximum(self.w1 * low, self.w1 * high).sum(1),
        )

    def ibp(self, low, high, y):
        """An upper bound of every ``z_t - z_y`` [K]."""
        a, b = (np.maximum(bound, 0) for bound in self.bounds(low, high))
        d = self.w2 - self.w2[y]
        return np.maximum(d * a, d * b).sum(1) + self.b2 - self.b2[y]

    def largest(self, low, high, y, t):
        """The largest ``z_t - z_y`` in the box, by branch and bound: (upper bound, a point where it is nearly that)."""
        n, m = self.w1.shape
        a, b = self.bounds(low, high)
        one, no = np.eye(n), np.zeros((n, n))
        # h >= pre; h <= pre - a (1 - s); h <= b s; h, s >= 0: h is relu(pre), s whether it is on.
        rows = np.block([[self.w1, -one, no], [-self.w1, one, np.diag(-a)], [np.zeros((n, m)), one, -np.diag(b)]])
        found = milp(
            np.r_[np.zeros(m), self.w2[y] - self.w2[t], np.zeros(n)],
            integrality=np.r_[np.zeros(m + n), np.ones(n)],
            bounds=Bounds(np.r_[low, np.zeros(n), a >= 0], np.r_[high, np.maximum(b, 0), b > 0]),
            constraints=LinearConstraint(rows, -np.inf, np.r_[-self.b1, self.b1 - a, np.zeros(n)]),
            options={"mip_rel_gap": 0},
        )
        assert found.status == 0, found.message
        shift = self.b2[t] - self.b2[y]
        return shift - found.mip_dual_bound, np.clip(found.x[:m], low, high)

    def verdict(self, low, high, y):
        """True: robust; False: a point of the box is misclassified; None: within 1e-5 of neither."""
        certain = True
        for t in range(len(self.b2)):
            if t == y:
                continue
            upper, point = self.largest(low, high, y, t)
            z = self(point)
            assert z[t] - z[y] <= upper + 1e-5, "the program's optimum is one of the net"
            if z[t] - z[y] > 1e-5:
                return False
            certain &= upper < -1e-5
        return True if certain else None


def relu_problem(seed, n=250):
    """A net 16-24-3, trained briefly (plainly, or adversarially at radius 0.04), with n images [n, 1, 4, 4]."""
    g = torch.Generator().manual_seed(seed)
    centres = 0.3 + 0.4 * torch.rand(3, 3, 16, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.25, generator=g)

    def draw(n):
        y = torch.randint(3, (n,), generator=g)
        x = centres[y, torch.randint(3, (n,), generator=g)]
        noise = torch.randn(n, 16, generator=g, dtype=torch.float64)
        return ((x + 0.12 * noise).clamp(0, 1) * 255).round().div(255).view(n, 1, 4, 4), y

    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-3)
    inner = PGD(eps=0.04, steps=3, step=0.5, start="none")
    for _ in range((40, 80, 80, 80)[seed]):
        x, y = draw(128)
        if seed >= 2:
            x = inner(lambda adv, y=y: F.cross_entropy(net(adv), y, reduction="none"), x)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    x, y = draw(n)
    return net.requires_grad_(False), x.float(), y


def attacks_on(eps):
    common = {"eps": eps, "steps": 20, "step": 0.2, "start": "uniform", "restarts": 3}
    return {
        "ce": WhiteBox(**common),
        "margin": WhiteBox(**common, loss="margin"),
        "dlr": WhiteBox(**common, loss="dlr", keep_best=True),
        "kl": WhiteBox(**common, loss="kl"),
        "multi-targeted": MultiTargeted(**{**common, "restarts": 5}),
        "nattack": NAttack(eps=eps, queries=400, population=40),
        "autoattack": AutoAttack(eps=eps, version=["apgd-ce", "square"], queries=100),
    }


@pytest.mark.parametrize("samples", [20, pytest.param(250, marks=pytest.mark.slow)])
def test_no_attack_contradicts_the_exact_verdict_on_relu_nets(samples):
    """So many samples of each of 4 nets: IBP-robust => robust (by integer programming) => no attack breaks it.

    So accuracies are in that order. The attacks are near the truth as well: of what is right and can be broken
    multi-targeted PGD breaks at least 95 %, the others 80 %. A sample within 1e-5 of the boundary is undecided, which
    fewer than 1 % are.
    """
    decided: dict[str, list[bool]] = {}
    for seed, eps in enumerate((0.02, 0.03, 0.03, 0.04)):
        net, x, y = relu_problem(seed, samples)  # x in float32, as libraries want it
        double, exact = Double(net), Exact(net)
        rng = np.random.default_rng(seed)
        ibp, robust = [], []
        for image, label in zip(x.double().flatten(1).numpy(), y.tolist(), strict=True):
            low, high = np.clip(image - eps, 0, 1), np.clip(image + eps, 0, 1)
            top = np.delete(exact.ibp(low, high, label), label)
            z = exact(low + (high - low) * rng.random(16))
            assert (np.delete(z, label) - z[label] <= top + 1e-12).all(), "IBP bounds every point of the box"
            ibp.append(bool((top < 0).all()))
            robust.append(exact.verdict(low, high, label))
        known = [r is not None for r in robust]
        decided.setdefault("known", []).extend(known)
        found = {"ibp": ibp, "exact": robust}
        for name, attack in attacks_on(eps).items():
            found[name] = (~broken_by(attack, double.logits, x, y)).tolist()
        found["natural"] = (double.logits(x).argmax(1) == y).tolist()
        # As an evaluation does it, in float32 and 8-bit images of one channel.
        images = (x * 255).round().to(torch.uint8)
        names = ("ce", "multi-targeted")
        judged = verdicts(double, images, y, {n: a for n, a in attacks_on(eps).items() if n in names}, chunk=100)
        found |= {f"judged {n}": v.tolist() for n, v in judged.items()}
        for name, values in found.items():
            decided.setdefault(name, []).extend(v for v, k in zip(values, known, strict=True) if k)
    known = decided.pop("known")
    assert len(known) == 4 * samples
    assert np.mean(known) > 0.99
    table = {name: np.array(values, dtype=bool) for name, values in decided.items()}
    ibp, exact = table.pop("ibp"), table.pop("exact")
    assert not (ibp & ~exact).any()
    for name, right in table.items():
        assert not (exact & ~right).any(), f"{name} breaks what is robust"
        assert ibp.mean() <= exact.mean() <= right.mean() <= table["natural"].mean(), name
    breakable = table["natural"] & ~exact
    shares = {name: (~right)[breakable].mean() for name, right in table.items()}
    assert 0.02 < ibp.mean() < exact.mean() < table["natural"].mean(), "nothing here is trivial"
    assert 0.3 < exact.mean() < 0.8
    assert shares["multi-targeted"] >= 0.95, shares
    assert shares["judged multi-targeted"] >= 0.95, shares
    for name in ("ce", "margin", "dlr", "autoattack", "nattack"):
        assert shares[name] >= 0.8, shares


# ---- other libraries ---------------------------------------------------------------------------------------


class Convs(nn.Module):
    """Convolutions and BatchNorm, whose running statistics are no identity."""

    def __init__(self, seed=0, classes=5, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            )  # fmt: skip
            self.fc = nn.Linear(8 * 9, classes)
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    nn.init.normal_(m.running_mean, std=0.3)
                    nn.init.uniform_(m.running_var, 0.1, 0.5)
        self.to(dtype).eval()

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def pictures(n, net, seed=0):
    """uint8 [n, 3, 6, 6], of which the net gets a tenth or so wrong."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, 6, 6), generator=g, dtype=torch.uint8)
    dtype = next(net.parameters()).dtype
    with torch.no_grad():
        z = net((images.float() / 255).to(dtype))
    other = torch.randint(z.shape[1], (n,), generator=g)
    return images, torch.where(torch.rand(n, generator=g) < 0.9, z.argmax(1), other)


def judged_images(folder, net, images, labels, attack, chunk):
    """Verdicts and examples of an evaluation."""
    kept = Kept(folder, {}, "float32")
    right = verdicts(Module(net), images, labels, {"a": attack}, chunk=chunk, kept=kept, save="float32")["a"]
    return right, np.concatenate([np.load(path) for path in sorted(folder.rglob("*.npy"))])


@pytest.mark.parametrize(
    ("eps", "random_start", "every"),
    [
        (8 / 255, False, 3),
        (0.031, True, 3),
        *(
            pytest.param(eps, start, 1, marks=pytest.mark.slow)
            for eps, start in itertools.product((8 / 255, 0.031, 0.2), (False, True))
        ),
    ],
)
def test_pgd_is_torchattacks_pgd_bit_for_bit(eps, random_start, every):
    """From the same start: theirs, drawn again from the same seed. Every number of steps from 1 to 20, on each net or
    (quick) on one of the three.
    """
    for seed in range(3):
        net = Convs(seed)
        images, y = pictures(32, net, seed)
        x = images.float() / 255
        alpha = (2 / 255, eps / 4, 0.007)[seed]
        torch.manual_seed(7)
        start = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1) if random_start else x
        for steps in range(1 + seed % every, 21, every):
            torch.manual_seed(7)
            wanted = torchattacks.PGD(net, eps=eps, alpha=alpha, steps=steps, random_start=random_start)(x, y)
            pgd = PGD(eps=eps, step_abs=alpha, steps=steps)
            found = pgd(lambda adv, net=net, y=y: F.cross_entropy(net(adv), y, reduction="none"), x, start=start)
            assert torch.equal(found, wanted), (seed, steps)
            if random_start or steps * alpha < eps * (1 - 1e-6):
                continue
            assert torch.equal(WhiteBox(eps=eps, step_abs=alpha, steps=steps)(net, x, y, numbers()), wanted)
        assert not torch.equal(found, x)


@pytest.mark.parametrize("eps", [8 / 255, 0.2, 0.031])
def test_a_judged_pgd_is_torchattacks_pgd_bit_for_bit(tmp_path, eps):
    """The whole way of an evaluation, chunk by chunk: examples and verdicts; theirs under our rules as well."""
    net = Convs(1)
    images, y = pictures(48, net)
    x = images.float() / 255
    theirs = torchattacks.PGD(net, eps=eps, alpha=eps / 4, steps=10, random_start=False)
    wanted = torch.cat([theirs(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)])
    right = (net(wanted).argmax(1) == y).numpy()
    wrapped = TorchAttacks(name="PGD", eps=eps, options={"alpha": eps / 4, "steps": 10, "random_start": False})
    for name, attack in {"own": WhiteBox(eps=eps, step=0.25, steps=10), "theirs": wrapped}.items():
        found, adv = judged_images(tmp_path / name, net, images, y, attack, 16)
        np.testing.assert_array_equal(adv, wanted.detach().numpy(), err_msg=name)
        np.testing.assert_array_equal(found, right, err_msg=name)
    assert right.sum() < (net(x).argmax(1) == y).sum()
    assert right.any() == (eps < 0.1)


@pytest.mark.parametrize("eps", [8 / 255, 0.2, 0.031])
def test_fgsm_is_torchattacks_fgsm(tmp_path, eps):
    """To the last bit but one (theirs does not clamp the difference), with the same verdicts."""
    for seed in range(3):
        net = Convs(seed)
        images, y = pictures(64, net, seed)
        x = images.float() / 255
        wanted = torchattacks.FGSM(net, eps=eps)(x, y)
        right, adv = judged_images(tmp_path / str(seed), net, images, y, WhiteBox(eps=eps, steps=1, step=1.0), 64)
        torch.testing.assert_close(torch.from_numpy(adv), wanted, rtol=0, atol=1.2e-7)
        np.testing.assert_array_equal(right, (net(wanted).argmax(1) == y).numpy())
        one = torchattacks.PGD(net, eps=eps, alpha=eps, steps=1, random_start=False)(x, y)
        np.testing.assert_array_equal(adv, one.numpy())


def agree(found, wanted, natural):
    """Per example at least 99 %, where it means something."""
    assert len(found) >= 200
    assert 0.1 < (natural & ~wanted).mean() < 0.9
    assert (found == wanted).mean() >= 0.99


@pytest.mark.parametrize(("eps", "norm"), [(8 / 255, "linf"), (0.06, "linf"), (0.3, "l2")])
def test_pgd_agrees_with_foolbox(eps, norm):
    net = Convs(2)
    images, y = pictures(256, net)
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    theirs = kind(abs_stepsize=eps / 4, steps=20, random_start=False)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    _, adv, _ = theirs(model, images.float() / 255, y, epsilons=eps)
    found = verdicts(Module(net), images, y, {"pgd": WhiteBox(eps=eps, norm=norm, step=0.25, steps=20)})
    agree(found["pgd"], (net(adv).argmax(1) == y).numpy(), found["natural"])


def test_pgd_agrees_with_art(tmp_path, monkeypatch):
    monkeypatch.setenv("ART_DATA_PATH", str(tmp_path))  # else it writes into the home folder
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    net = Convs(2)
    images, y = pictures(256, net)
    x = (images.float() / 255).numpy()
    model = PyTorchClassifier(net, nn.CrossEntropyLoss(), (3, 6, 6), 5, clip_values=(0, 1), device_type="cpu")
    for eps in (8 / 255, 0.06):
        theirs = ProjectedGradientDescent(
            model, eps=eps, eps_step=eps / 4, max_iter=20, num_random_init=0, batch_size=256, verbose=False
        )
        with contextlib.redirect_stderr(io.StringIO()):
            adv = torch.from_numpy(theirs.generate(x, y.numpy()))
        found = verdicts(Module(net.eval()), images, y, {"pgd": WhiteBox(eps=eps, step=0.25, steps=20)})
        agree(found["pgd"], (net.eval()(adv).argmax(1) == y).numpy(), found["natural"])


# ---- properties --------------------------------------------------------------------------------------------

NET = Convs(3, dtype=torch.float64).requires_grad_(False)


@st.composite
def cases(draw, **fixed):
    """Options of an attack, and (images, labels, seed)."""
    start = fixed.get("start") or draw(st.sampled_from(["none", "uniform", "normal"]))
    options = {
        "norm": draw(st.sampled_from(["linf", "l2"])),
        "loss": draw(st.sampled_from(["ce", "margin", "dlr", "kl", "targeted"])),
        "start": start,
        "restarts": 1 if start == "none" else draw(st.integers(1, 3)),
        "keep_best": draw(st.booleans()),
        "sigma": draw(st.sampled_from([0.001, 0.1])),
        "clip_start": draw(st.booleans()),
        "kappa": draw(st.sampled_from([0.0, 50.0])),
        **fixed,
    }
    if options["loss"] == "kl" and start == "none":
        options["loss"] = "ce"
    if options["loss"] == "targeted":
        options["kappa"] = None
    # Mostly radii at which some are broken and some are not, but any is possible.
    usual = {"linf": [0.03, 0.05, 0.07, 0.09, 0.12], "l2": [0.3, 0.5, 0.7, 0.9, 1.2]}[options["norm"]]
    n, seed = draw(st.sampled_from([64, 40, 7, 1, 96, 80])), draw(st.integers(0, 2**31 - 1))
    options["eps"] = usual[seed % 5]
    if draw(st.integers(0, 4)) == 4:
        options["eps"] = draw(st.floats(0, 1 if options["norm"] == "linf" else 5))
    options["step"] = draw(st.sampled_from([0.1, 0.25, 1.0, 2.5]))
    enough = int(np.ceil(1 / options["step"])) if start == "none" else 1
    options["steps"] = enough + draw(st.integers(0, 4))
    if start != "none" and draw(st.integers(0, 9)) == 0:
        options["steps"] = 0
    images, labels = pictures(n, NET, seed)
    return options, images, labels, seed


def made(options, **changes):
    options = {**options, **changes}
    if options["loss"] != "targeted":
        return WhiteBox(**options)
    return MultiTargeted(**{k: v for k, v in options.items() if k not in ("loss", "kappa")})


def hold(examples: int, rows: int, **fixed):
    """Runs a property on that many cases, which together have at least so many rows; the quick form on a sixth."""

    def wrap(check: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("part", [6, pytest.param(1, marks=pytest.mark.slow)])
        def test(part: int) -> None:
            count = 0

            @settings(
                max_examples=examples // part, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate],  # to shrink a failure takes minutes
            )  # fmt: skip
            @given(cases(**fixed))
            def run(case):
                nonlocal count
                check(*case)
                count += len(case[2])

            run()
            assert count >= rows // part, count

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return wrap


def doubles(images):
    return (images.float() / 255).double()


def examples_of(attack, x, y, seed, net=NET):
    """Examples of an attack, and which of them the net gets wrong."""
    adv = attack(net, x, y, numbers(seed))
    with torch.no_grad():
        return adv, net(adv).argmax(1) != y


@hold(60, 1_700)
def test_examples_lie_in_the_ball_and_the_pixel_range(options, images, y, seed):
    """In float64 and float32. At eps 0 they are the images, bit for bit; the global random numbers are not drawn."""
    for net, x, slack in ((NET, doubles(images), 1e-12), (lambda x: NET(x.double()), images.float() / 255, 1e-6)):
        attack, kept, state = made(options), x.clone(), torch.get_rng_state()
        adv, _ = examples_of(attack, x, y, seed, net)
        assert adv.dtype == x.dtype
        assert adv.shape == x.shape
        assert not adv.requires_grad
        assert distances(adv, x, attack.norm).max() <= attack.eps + slack
        assert adv.min() >= 0
        assert adv.max() <= 1
        assert torch.equal(x, kept)
        assert not x.requires_grad
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(examples_of(attack, x, y, seed, net)[0], adv)
        assert torch.equal(examples_of(made(options, eps=0.0), x, y, seed, net)[0], x)


@hold(60, 1_700, keep_best=True)
def test_more_steps_never_mend_an_example_when_the_best_iterate_is_kept(options, images, y, seed):
    """Nor lower the loss of one that stands: same starts, same step size. (The last iterate may well do both.)"""
    x = doubles(images)
    clean = NET(x)
    broken = loss = None
    for more in (0, 1, 2, 6):
        size = options["step"] * options["eps"]
        attack = made(options, steps=options["steps"] + more, step_abs=size)
        adv, now = examples_of(attack, x, y, seed)
        if options["start"] == "none" or (options["start"] == "uniform" and options["clip_start"]):
            # From elsewhere the paths differ: where the best is kept, the start is projected first.
            last = made(options, steps=options["steps"] + more, step_abs=size, keep_best=False)
            assert not (examples_of(last, x, y, seed)[1] & ~now).any(), "the last iterate is one of those that are kept"
        if broken is not None:
            assert not (broken & ~now).any(), more
        if options["loss"] != "targeted":
            value = attack.raised(NET(adv), y, clean)
            if loss is not None:
                assert (value >= loss - 1e-9)[~now].all(), more
            loss = value
        broken = now


@hold(60, 1_700, start="uniform")
def test_more_restarts_never_mend_an_example(options, images, y, seed):
    x = doubles(images)
    before = x, torch.zeros(len(x), dtype=torch.bool)
    for restarts in (1, 2, 4):
        after = examples_of(made(options, restarts=restarts), x, y, seed)
        if options["loss"] != "targeted":  # there a restart is one of each target
            assert torch.equal(after[0][before[1]], before[0][before[1]]), "what is broken is left alone"
        assert not (before[1] & ~after[1]).any(), restarts
        before = after


@hold(60, 1_700)
def test_a_permuted_batch_gives_permuted_examples(options, images, y, seed):
    """From permuted starts: random numbers belong to places in the chunk, so they are permuted here."""
    x, attack = doubles(images), made(options)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    wanted = examples_of(attack, x, y, seed)[0][order]
    begin, back = attack.pgd.start_point, order.argsort()
    attack.pgd.start_point = lambda x, generator: begin(x[back], generator=generator)[order]
    found = examples_of(attack, x[order], y[order], seed)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    half = len(x) // 2  # and no example feels how many others there are
    if half:
        attack.pgd.start_point = lambda _, generator: begin(x, generator=generator)[:half]
        found = examples_of(attack, x[:half], y[:half], seed)[0]
        torch.testing.assert_close(found, wanted[back][:half], rtol=0, atol=1e-12)


@hold(60, 1_700, start="none", loss="ce", keep_best=True)
def test_a_larger_ball_never_mends_an_example_when_begun_from_the_smaller_ones_result(options, images, y, seed):
    """Monotone in eps per example where it is a theorem on any net: the smaller ball's result is the first iterate.

    Attacks of different eps from one start make no such promise; see the linear nets above for exact ones.
    """
    x = doubles(images)
    adv, broken = x, NET(x).argmax(1) != y

    def loss(adv):
        z = NET(adv)
        return F.cross_entropy(z, y, reduction="none"), z.argmax(1) != y

    for share in (0.0, 0.1, 0.3, 1.0):
        eps = options["eps"] * share
        pgd = PGD(eps=eps, norm=options["norm"], steps=options["steps"], step=options["step"], keep_best=True)
        adv = pgd(loss, x, start=adv)
        assert distances(adv, x, options["norm"]).max() <= eps + 1e-12
        if not share:
            assert torch.equal(adv, x)
        now = NET(adv).argmax(1) != y
        assert not (broken & ~now).any(), share
        broken = now


class Careless(Attack):
    """Another attack, between draws from everybody's random numbers, and perhaps an error."""

    def __init__(self, attack, fails):
        self.attack, self.fails = attack, fails
        self.norm, self.eps = attack.norm, attack.eps

    def __call__(self, logits, x, y, draws):
        torch.rand(3), np.random.rand(3), random.random()
        found = self.attack(logits, x, y, draws)
        if self.fails:
            raise RuntimeError("inside")
        return found


def left_behind(module):
    """Everything that an attack might leave: modes, parameters, buffers, gradients, random numbers, switches."""
    return {
        "modes": {n: m.training for n, m in module.named_modules()},
        "learning": {n: p.requires_grad for n, p in module.named_parameters()},
        "state": {n: t.detach().numpy().tobytes() for n, t in module.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.numpy().tobytes() for n, p in module.named_parameters()},
        "graph": {n: p.is_leaf for n, p in module.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in module.named_modules()},
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": [str(part) for part in np.random.get_state(legacy=True)] + [np.random.get_state()[1].tobytes()],
        "python": random.getstate(),
        "switches": (torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32, torch.get_default_dtype()),
    }


@hold(60, 1_700)
def test_nothing_is_left_behind(options, images, y, seed):
    """Of a net partly in training mode, partly frozen, with gradients of its own; also when the attack fails.

    It is judged in evaluation mode nonetheless, as the attack alone would be on such a net.
    """
    module = Double(Convs(seed % 5, dtype=torch.float64))
    g = random.Random(seed)
    for m in module.modules():
        m.training = g.random() < 0.5
    module.net.body[1].train()
    for p in module.parameters():
        p.requires_grad_(g.random() < 0.5)
        p.grad = torch.full_like(p, 0.5) if g.random() < 0.5 else None
    attack = made(options)
    before = left_behind(module)
    found = verdicts(module, images, y, {"a": attack}, chunk=100, seed=seed)["a"]
    assert left_behind(module) == before
    for fails in (False, True):
        try:
            again = verdicts(module, images, y, {"b": Careless(attack, fails)}, chunk=100, seed=seed)
            assert not fails
            assert len(again["b"]) == len(y)
        except RuntimeError as error:
            assert fails and "inside" in str(error)  # noqa: PT017, PT018
        assert left_behind(module) == before
    net = Convs(seed % 5, dtype=torch.float64)
    with torch.no_grad():
        x = images.float() / 255
        adv = attack(lambda x: net(x.double()), x, y, numbers(seed, "a"))
        broken = (net(adv.double()).argmax(1) != y) | (net(x.double()).argmax(1) != y)
    np.testing.assert_array_equal(found, ~broken.numpy())
