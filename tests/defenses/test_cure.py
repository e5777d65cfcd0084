"""CURE against methods.md 8: NumPy for thresholds and losses, plain autograd for scores and whole steps."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from scipy import stats
from tests import conftest

from redoubt.build import build_module
from redoubt.config import resolve
from redoubt.data import Batch
from redoubt.defenses.cure import EXEMPT, classifier, masked_names, stem, threshold
from redoubt.errors import UserError
from redoubt.nets.preact import PreActResNet18
from redoubt.nets.resnet import ResNet18
from redoubt.nets.vgg import VGG16
from redoubt.nets.wrn import WideResNet
from redoubt.rng import generator

WIDTHS = "model.widths=[4,4,8,8]"
SGD = ("optimizer.lr=0.1", "optimizer.momentum=0.9", "optimizer.weight_decay=5e-3")


def build(*overrides, defense="cure", model="resnet_small", sgd=SGD):
    """A module in training mode, in float64, so that no sign and no rank is a matter of rounding."""
    cfg = conftest.composed(
        "data=digits", "schedule=constant", "trainer=cpu", "threat.eps=8/255", "inner.steps=2",
        f"defense={defense}", f"model={model}", WIDTHS, *sgd, *overrides,
    )  # fmt: skip
    return build_module(cfg).double().train()


def options(**given):
    return [f"defense.{key}={value}" for key, value in given.items()]


def images(b=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, noise = (torch.rand(b, 3, 16, 16, generator=g, dtype=torch.float64) for _ in range(2))
    return x, (x + 0.2 * (noise - 0.5)).clamp(0, 1), torch.randint(10, (b,), generator=g)


def batches(count=2, b=5):
    return [Batch(x, y, 0, len(x)) for x, _, y in (images(b, seed) for seed in range(count))]


def apart(module, seed=5, by=0.2):
    """Moves the revision model away from the student."""
    g = torch.Generator().manual_seed(seed)
    for p in module.revision.parameters():
        p.data.add_(by * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- the naive transcription -----------------------------------------------------------------------------


def hand_ce(z, y, s=0.0):
    log_p = z - z.logsumexp(1, keepdim=True)
    rows = torch.arange(len(y))
    return (-(1 - s) * log_p[rows, y] - s * log_p.mean(1)).mean()


def hand_kl(target, other):
    p, q = target.softmax(1), other.softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


def hand_terms(loss, base, alpha, gamma, clean, adv, y, rev=None, beta=1.0, soft_beta=5.0, s=0.0):
    """The published terms (methods 2 to 4, 8.1, 8.4) of training logits."""
    if loss == "rgp":
        terms = [alpha * hand_ce(clean, y, s), (1 - alpha) * hand_ce(adv, y, s)]
    elif loss == "rgp_soft":
        terms = [hand_ce(clean, y, s), soft_beta * hand_kl(clean, adv)]
    elif loss == "rgp_old":
        terms = [alpha * hand_ce(clean, y, s), (1 - alpha) * hand_kl(clean, adv)]
    elif base == "trades":
        terms = [hand_ce(clean, y, s), beta * hand_kl(clean, adv)]
    elif base == "mart":
        rows = torch.arange(len(y))
        p, q = clean.softmax(1), adv.softmax(1)
        others = torch.stack([row[[j for j in range(10) if j != t]].max() for row, t in zip(q, y, strict=True)])
        boosted = -(1.0001 - others + 1e-12).log().mean()
        kl = (p * (p.log() - (q + 1e-12).log())).sum(1)
        terms = [hand_ce(adv, y, s), boosted, beta * (kl * (1.0000001 - p[rows, y])).mean()]
    else:
        terms = [hand_ce(adv, y, s)]
    if gamma:
        terms.append(gamma * sum(hand_kl(t.detach(), z) for t, z in zip(rev, (clean, adv), strict=True)))
    return terms


def hand_gradient(loss, named):
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in pairs}


def hand_scores(criterion, alpha, clean, adv, y, total, named):
    """What each criterion ranks (methods 8.1 and 8.4): {parameter's name: array}."""
    if criterion == "rgp":
        first, second = hand_gradient(hand_ce(clean, y), named), hand_gradient(hand_ce(adv, y), named)
        scores = {k: alpha * first[k].abs() + (1 - alpha) * second[k].abs() for k in named}
    elif criterion == "joint":
        scores = {k: total[k].abs() for k in named}
    elif criterion == "soft_all":
        scores = {k: total[k] for k in named}
    else:
        first, second = hand_gradient(hand_ce(clean, y), named), hand_gradient(hand_kl(clean, adv), named)
        scores = {k: alpha * first[k] + (1 - alpha) * second[k] for k in named}
    return {k: v.numpy() for k, v in scores.items()}


def hand_masks(scores, percentile):
    return {k: torch.from_numpy(np.asarray(v < np.percentile(v, percentile))) for k, v in scores.items()}


def exempted(criterion, name):
    """Whether a tensor of ResNetSmall is never masked."""
    if criterion == "none":
        return True
    if criterion == "joint":
        return name.startswith("fc.")
    if criterion in ("soft", "soft_all"):
        return "conv1" not in name or name == "conv1.weight"
    return name.startswith(("conv1.", "bn1.", "fc.")) or "downsample" in name


# ---- thresholds ------------------------------------------------------------------------------------------

SCORES = {
    "positive": lambda rng, n: rng.random(n),
    "signed": lambda rng, n: rng.normal(size=n),
    "ties": lambda rng, n: rng.integers(0, 4, n).astype(float),
    "half zero": lambda rng, n: rng.random(n) * rng.integers(0, 2, n),
    "constant": lambda rng, n: np.full(n, 0.3),
}


@pytest.mark.parametrize("percentile", [0, 10, 12.5, 30, 50, 99])
@pytest.mark.parametrize("kind", SCORES)
def test_a_mask_is_what_lies_below_numpy_s_percentile(kind, percentile):
    rng = np.random.default_rng(0)
    for n in [*range(1, 60), 64, 101, 128, 201, 1000, 1001, *rng.integers(1, 3000, 40)]:
        score = SCORES[kind](rng, int(n))
        found = torch.from_numpy(score) < threshold(torch.from_numpy(score), percentile)
        np.testing.assert_array_equal(found.numpy(), score < np.percentile(score, percentile), err_msg=str(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 9, 27, 100, 144, 1000, 4608, 36864])
def test_the_highest_percentile_leaves_about_one_entry(n):
    percentile, rng = 100 * (1 - 1 / n), np.random.default_rng(n)
    score = rng.permutation(n).astype(float)
    found = torch.from_numpy(score) < threshold(torch.from_numpy(score), percentile)
    np.testing.assert_array_equal(found.numpy(), score < np.percentile(score, percentile))
    assert (~found).sum() == 1 or n == 1


def test_nothing_lies_below_percentile_zero_or_in_a_constant_tensor():
    signed = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 3, 3, 3)))
    assert not (signed < threshold(signed, 0)).any()
    for p in (10, 50, 99.9):
        assert not (torch.zeros(70) < threshold(torch.zeros(70), p)).any()


@pytest.mark.parametrize("warn_only", [False, True])
def test_threshold_in_deterministic_mode(warn_only):
    score = torch.rand(257, generator=torch.Generator().manual_seed(0))
    wanted = threshold(score, 30)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert threshold(score, 30) == wanted
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_threshold_of_sixteen_million_entries():
    """More than torch.quantile takes in some of the versions that we allow."""
    n = 2**24 + 3
    score = torch.arange(n, dtype=torch.float32).flip(0)
    assert (score < threshold(score, 30.0)).sum() == round(0.3 * n)


def test_threshold_reads_nothing_on_the_host():
    """On the meta device there is nothing that could be read."""
    score = torch.empty(7, 11, device="meta")
    assert (score < threshold(score, 30.0)).device.type == "meta"


def test_threshold_keeps_shape_and_order_of_memory_out():
    score = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    assert threshold(score, 30) == threshold(score.contiguous(memory_format=torch.channels_last), 30)
    assert (score < threshold(score, 30)).shape == score.shape


# ---- scores ----------------------------------------------------------------------------------------------

CRITERIA = [("rgp", 0.1), ("rgp", 0.0), ("rgp", 1.0), ("joint", 0.1), ("soft", 0.1), ("soft", 0.0), ("soft", 1.0)]
CRITERIA += [("soft_all", 0.1)]


def found_scores(module, x, adv, y):
    """What the module ranks in one step, with the gradient of the loss."""
    named = dict(module.net.named_parameters())
    params, masked = module.trained(), [named[k] for k in module.masked]

    def losses(*batch):
        clean, crafted, terms = module.forwards(*batch)
        return [*module.scored(clean, crafted, batch[2]), module.noted(terms, len(batch[0]))]

    wanted = [*([masked] * module.score_gradients), params]
    *extra, total = module.gradients(losses, wanted, x, adv, y)
    return dict(zip(module.masked, module.scores(extra, dict(zip(params, total, strict=True)), masked), strict=True))


@pytest.mark.parametrize(("criterion", "alpha"), CRITERIA)
def test_scores_are_those_of_autograd(criterion, alpha):
    """Labels are smoothed in the loss, and so in the scores of joint and soft_all alone."""
    loss = {"joint": "rgp", "soft": "rgp_soft", "soft_all": "rgp_old"}.get(criterion, "base")
    given = options(criterion=criterion, alpha=alpha, loss=loss, gamma=0.5)
    module, (x, adv, y) = apart(build(*given, "label_smoothing=0.3")), images()
    net, rev = copy.deepcopy(module.net), copy.deepcopy(module.revision)
    found = found_scores(module, x, adv, y)

    clean, crafted = net(x), net(adv)
    with torch.no_grad():
        targets = rev(x), rev(adv)
    total = sum(hand_terms(loss, "trades", alpha, 0.5, clean, crafted, y, targets, s=0.3))
    named = {k: p for k, p in net.named_parameters() if not exempted(criterion, k)}
    wanted = hand_scores(criterion, alpha, clean, crafted, y, hand_gradient(total, named), named)
    assert list(found) == list(wanted)
    for name, score in wanted.items():
        assert np.abs(score).max() > 0
        np.testing.assert_allclose(found[name].numpy(), score, rtol=1e-5, atol=1e-8, err_msg=name)
    assert any((score < 0).any() for score in wanted.values()) == criterion.startswith("soft")


@pytest.mark.parametrize("criterion", ["rgp", "joint", "soft", "soft_all"])
def test_what_no_gradient_reaches_scores_zero(criterion):
    module = build(*options(criterion=criterion, alpha=0.25))
    a, b = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))
    g = torch.arange(6.0).reshape(2, 3) - 3
    scores = module.scores([[g, None]] * module.score_gradients, {a: g, b: None}, [a, b])
    torch.testing.assert_close(scores[0], g if criterion.startswith("soft") else g.abs())
    torch.testing.assert_close(scores[1], torch.zeros(4), check_dtype=False)


def stepped(module, b=6, seed=0):
    """One training step outside a Trainer; returns the optimizer."""
    if not hasattr(module, "own"):
        (module.own,) = module.configure_optimizers()
        module.raw_optimizers = lambda: [module.own]
    x, _, y = images(b, seed)
    module.training_step(Batch(x, y, 0, b), module.steps_done)
    return module.own


@pytest.mark.parametrize(
    ("given", "extra", "accumulate"),
    [
        ({"criterion": "rgp"}, 2, 1),
        ({"criterion": "rgp"}, 2, 2),
        ({"criterion": "rgp", "alpha": 0}, 1, 1),
        ({"criterion": "rgp", "alpha": 1}, 1, 1),
        ({"criterion": "joint"}, 0, 1),
        ({"criterion": "soft"}, 1, 1),
        ({"criterion": "soft", "alpha": 1}, 1, 1),
        ({"criterion": "soft_all", "loss": "rgp_old"}, 0, 1),
        ({"criterion": "none"}, 0, 1),
        ({"criterion": "rgp", "percentile": 0}, 0, 1),
        ({"criterion": "soft", "percentile": 0.0}, 0, 1),
    ],
)
def test_no_more_backward_passes_than_the_criterion_needs(given, extra, accumulate, monkeypatch):
    module, calls, true = build(*options(**given), f"trainer.accumulate={accumulate}"), [], torch.autograd.grad

    def counted(loss, wanted, *args, **kwargs):
        calls.append(isinstance(wanted, torch.Tensor))
        return true(loss, wanted, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: pytest.fail("another backward"))
    stepped(module)
    assert sum(calls) == 2 * accumulate  # the attack's: one per step
    assert len(calls) - sum(calls) == (1 + extra) * accumulate


@pytest.mark.parametrize(("given", "forwards"), [({"alpha": 0, "gamma": 0}, 1), ({"gamma": 0}, 2), ({"alpha": 0}, 2)])
def test_clean_images_are_forwarded_where_something_wants_them(given, forwards):
    module, seen = build("base=at", *options(**given)), []
    module.inner.steps = 0
    module.net.register_forward_hook(lambda *a: seen.append(module.net.training))
    stepped(module)
    assert seen == [True] * forwards


# ---- losses ----------------------------------------------------------------------------------------------


def numpy_softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_ce(z, y, s=0.0):
    log_p = np.log(numpy_softmax(z))
    target = np.full(z.shape, s / z.shape[1])
    target[np.arange(len(y)), y] += 1 - s
    return -(target * log_p).sum(1).mean()


def numpy_kl(a, b):
    p, q = numpy_softmax(a), numpy_softmax(b)
    return (p * np.log(p / q)).sum(1)


def numpy_terms(loss, base, alpha, gamma, beta, s, z, w, r, v, y):
    """z, w: the student's logits of clean and adversarial images; r, v: the revision model's."""
    if loss == "rgp":
        terms = {"ce": alpha * numpy_ce(z, y, s), "ce_adv": (1 - alpha) * numpy_ce(w, y, s)}
    elif loss == "rgp_soft":
        terms = {"ce": numpy_ce(z, y, s), "kl": beta * numpy_kl(z, w).mean()}
    elif loss == "rgp_old":
        terms = {"ce": alpha * numpy_ce(z, y, s), "kl": (1 - alpha) * numpy_kl(z, w).mean()}
    elif base == "trades":
        terms = {"ce": numpy_ce(z, y, s), "kl": numpy_kl(z, w).mean()}
    elif base == "mart":
        rows, q = np.arange(len(y)), numpy_softmax(w)
        p, p_true = numpy_softmax(z), numpy_softmax(z)[rows, y]
        kl = (p * np.log(p / (q + 1e-12))).sum(1)
        q[rows, y] = -1
        terms = {
            "ce": numpy_ce(w, y, s),
            "margin": -np.log(1.0001 - q.max(1)).mean(),
            "kl": 5 * (kl * (1.0000001 - p_true)).mean(),
        }
    else:
        terms = {"ce": numpy_ce(w, y, s)}
    return terms | {"revision": gamma * (numpy_kl(r, z).mean() + numpy_kl(v, w).mean())}


@pytest.mark.parametrize(
    ("loss", "base", "label_smoothing"),
    [
        ("base", "at", 0.2), ("base", "trades", 0.2), ("base", "trades", 0), ("base", "mart", 0.2),
        ("rgp", "trades", 0.2), ("rgp", "at", 0), ("rgp_soft", "trades", 0.2), ("rgp_old", "at", 0.2),
    ],
)  # fmt: skip
def test_terms_are_numpy_s(loss, base, label_smoothing):
    given = options(loss=loss, alpha=0.3, gamma=0.7, beta=2.5)
    module = apart(build(f"base={base}", *given, f"label_smoothing={label_smoothing}"))
    x, adv, y = images()
    net, rev = copy.deepcopy(module.net), copy.deepcopy(module.revision)
    found = module.terms(x, adv, y)
    with torch.no_grad():
        logits = [f(images).numpy() for f in (net, rev) for images in (x, adv)]
    wanted = numpy_terms(loss, base, 0.3, 0.7, 2.5, label_smoothing, *logits, y.numpy())
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-9), name
    assert wanted["revision"] > 1e-3
    for own, other in ((module.net, net), (module.revision, rev)):  # each forwarded twice, clean images first
        for name, buffer in own.named_buffers():
            torch.testing.assert_close(buffer, other.get_buffer(name), msg=name)


def test_no_consistency_without_gamma():
    module, (x, adv, y) = apart(build("defense.gamma=0")), images()
    module.revision.forward = lambda *a: pytest.fail("forwarded")
    assert set(module.terms(x, adv, y)) == {"ce", "kl"}


def test_consistency_is_zero_at_the_start():
    """Student and revision model are equal and see the same batch statistics, whatever the running ones are."""
    module, (x, adv, y) = build(), images()
    for buffer in module.net.buffers():
        buffer.fill_(3)
    assert module.terms(x, adv, y)["revision"].item() == 0


def test_targets_carry_no_gradient_and_the_student_s_is_q_minus_p():
    module, (x, adv, y) = apart(build("defense.gamma=1")), images()
    clean, crafted, terms = module.forwards(x, adv, y)
    found = torch.autograd.grad(terms["revision"], [clean, crafted])
    rev = apart(build()).revision
    for g, z, pixels in zip(found, (clean, crafted), (x, adv), strict=True):
        with torch.no_grad():
            p = rev(pixels).softmax(1)
        torch.testing.assert_close(g, (z.softmax(1) - p).detach() / len(y))
    assert not any(p.requires_grad for p in module.revision.parameters())
    assert not module.revised(x).requires_grad
    assert {id(p) for p in module.trained()} == {id(p) for p in module.net.parameters()}


def test_the_revision_model_follows_the_student_s_modes():
    module, (x, *_) = build(), images()
    module.revision.eval()
    module.net.layer2.eval()
    before = {k: b.clone() for k, b in module.revision.named_buffers()}
    module.revised(x)
    for name, buffer in module.revision.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith("layer2"), name


# ---- the revision model's update -------------------------------------------------------------------------


def coins(module, steps):
    """In which steps it moves; the step count itself is left where it was."""
    first, moved = next(module.revision.parameters()), []
    for step in steps:
        module.steps_done = step
        first.data.fill_(7.0)
        module.move_revision()
        moved.append(bool((first != 7.0).any()))
    return moved


def small(*overrides):
    """A module of few weights."""
    return build("model.widths=[2,2]", *overrides)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 1.0])
def test_it_moves_with_probability_r(rate):
    n = 1500
    count = sum(coins(small(*options(rate=rate, decay=0.5)), range(n)))
    assert stats.binomtest(count, n, rate).pvalue > 1e-3


def test_the_coin_belongs_to_seed_and_step():
    given = options(rate=0.5, decay=0.5)
    one, two, other = small(*given), small(*given), small(*given, "seed=1")
    steps = list(range(60))
    torch.manual_seed(1)
    a = coins(one, steps)
    torch.manual_seed(2)
    assert coins(two, steps[::-1])[::-1] == a
    assert coins(other, steps) != a


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999, 1.0])
def test_it_moves_by_the_formula_and_takes_no_buffers(decay):
    module = apart(small(*options(rate=1, decay=decay)))
    for buffer in module.net.buffers():
        buffer.fill_(5)
    rev, net = (copy.deepcopy(m) for m in (module.revision, module.net))
    for _ in range(3):
        module.move_revision()
    pairs = zip(module.revision.parameters(), rev.parameters(), net.parameters(), strict=True)
    for p, r, w in pairs:
        torch.testing.assert_close(p, decay**3 * r + (1 - decay**3) * w)
    for (name, b), c in zip(module.revision.named_buffers(), rev.buffers(), strict=True):
        assert torch.equal(b, c), name
    for p, q in zip(module.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)


def decays(module, steps):
    """The factor d in each step: the revision model is all 1, the student all 0."""
    factors = []
    for p in module.net.parameters():
        p.data.zero_()
    for step in steps:
        module.steps_done = step
        for p in module.revision.parameters():
            p.data.fill_(1.0)
        module.move_revision()
        (d,) = {round(v, 12) for p in module.revision.parameters() for v in p.flatten().tolist()}
        factors.append(d)
    return factors


@pytest.mark.parametrize("warmup", [0, 7])
def test_decay_warmup_begins_at_a_half(warmup):
    given = options(rate=1, decay_warmup="true", decay=0.999, warmup_epochs=warmup)
    found = decays(small(*given), [warmup + k for k in (0, 1, 2, 3, 9, 997, 998, 999, 5000)])
    assert found == pytest.approx([1 / 2, 2 / 3, 3 / 4, 4 / 5, 10 / 11, 998 / 999, 0.999, 0.999, 0.999], abs=1e-12)
    assert decays(small(*options(rate=1, decay=0.9)), range(3)) == pytest.approx([0.9] * 3)


def counting(module, steps_per_epoch):
    """The same module as in a fit of so many steps per epoch."""
    kind = type(module)
    module.__class__ = type("Fitted", (kind,), {"steps_per_epoch": steps_per_epoch})
    return module


@pytest.mark.parametrize("warmup", [0, 4])
def test_linear_rate_decay_ends_at_zero(warmup):
    given = options(rate_decay="linear", rate=1, warmup_epochs=warmup)
    module, factors = counting(small(*given, "trainer.max_epochs=10"), 50), []
    for step in range(50 * warmup, 500):
        module.steps_done = step
        factors.append(module.rate_factor())
    n = 500 - 50 * warmup
    np.testing.assert_allclose(factors, 1 - np.arange(n) / n, atol=1e-12)
    moved = coins(module, range(50 * warmup, 500))
    expected = np.asarray(factors)
    assert abs(sum(moved) - expected.sum()) < 4 * np.sqrt((expected * (1 - expected)).sum())
    assert sum(moved[: n // 2]) > sum(moved[n // 2 :])


def test_halving_rate_decay_begins_after_epoch_100():
    module, factors = counting(small(*options(rate_decay="halving", rate=1), "trainer.max_epochs=200"), 20), []
    for step in [0, 1500, 1999, 2000, 2001, 2002, 2009, 3999]:
        module.steps_done = step
        factors.append(module.rate_factor())
    assert factors[:7] == [1, 1, 1, 0.5, 0.25, 0.125, 2**-10]
    assert factors[7] < 1e-100
    assert all(coins(module, range(1900, 2000)))
    assert not any(coins(module, range(2040, 2140)))


@pytest.mark.parametrize("loss", ["base", "rgp", "rgp_soft"])
def test_it_moves_before_the_losses_or_after_the_step(loss):
    module = apart(build(*options(loss=loss, rate=1, decay=0.25)))
    events = []
    for name in ("craft", "forwards", "step", "move_revision"):
        true = getattr(module, name)
        setattr(module, name, lambda *a, _n=name, _f=true: (events.append(_n), _f(*a))[1])
    rev, before = copy.deepcopy(module.revision), copy.deepcopy(module.net)
    stepped(module)
    last = ["forwards", "step"]
    assert events == ["craft", *(["move_revision", *last] if loss == "base" else [*last, "move_revision"])]
    student = before if loss == "base" else module.net
    for p, r, w in zip(module.revision.parameters(), rev.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, 0.25 * r + 0.75 * w)


def test_student_and_revision_model_begin_from_the_same_trained_net():
    module, trained = build(), build("seed=3").net
    trained.bn1.running_mean.fill_(0.5)
    module.start_from(trained)
    for own in (module.net, module.revision):
        for name, value in own.state_dict().items():
            assert torch.equal(value, trained.state_dict()[name]), name
    pairs = zip(module.net.parameters(), module.revision.parameters(), strict=True)
    assert all(p.data_ptr() != q.data_ptr() for p, q in pairs)


# ---- whole training steps --------------------------------------------------------------------------------


class Loader(list):
    """Batches as they are, with the loader's place that Lightning saves."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def fit(module, loader, tmp_path, epochs=1):
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=loader)
    return module


def hand_attack(net, base, x, y, step):
    """PGD in evaluation mode: KL from a normal start, at 8/255 with steps of 2/255; MART's and PGD-AT's on CE."""
    net.eval()
    eps, size = (0.031, 0.007) if base == "mart" else (8 / 255, 2 / 255)
    g = generator(0, "inner", step)
    if base == "at":
        adv = (x + eps * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)).clamp(0, 1)
    else:
        adv = x + 0.001 * torch.randn(x.shape, generator=g, dtype=x.dtype)
    clean = net(x).detach()
    for _ in range(2):
        point = adv.detach().requires_grad_()
        loss = hand_kl(clean, net(point)) if base == "trades" else hand_ce(net(point), y)
        (gradient,) = torch.autograd.grad(loss, point)
        adv = torch.minimum(torch.maximum(adv + size * gradient.sign(), x - eps), x + eps).clamp(0, 1)
    net.train()
    return adv.detach()


def hand_training(net, rev, loader, epochs=1, warmup=0, base="trades", s=0.0, **given):
    """methods 8.1 to 8.5 as one loop, with SGD of momentum 0.9 written out; returns the masks of every step."""
    o = {
        "criterion": "rgp", "loss": "base", "freeze": "gradient", "alpha": 0.1, "percentile": 30, "gamma": 1.0,
        "rate": 0.2, "decay": 0.999,
    } | given  # fmt: skip
    named = dict(net.named_parameters())
    momentum, masks = {k: torch.zeros_like(p) for k, p in named.items()}, []

    def revise(step):
        coin = torch.rand((), generator=generator(0, "revision", step)).item()
        if coin < o["rate"]:
            for p, q in zip(rev.parameters(), net.parameters(), strict=True):
                p.data = o["decay"] * p.data + (1 - o["decay"]) * q.data

    for step, batch in enumerate([*loader] * epochs):
        x, y, conserved = batch.x, batch.y, {}
        if step < warmup:
            net.train()
            gradient = hand_gradient(hand_ce(net(x), y, s), named)
        else:
            if step == warmup and warmup:
                rev.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})
            adv = hand_attack(net, base, x, y, step)
            if o["loss"] == "base":
                revise(step)
            clean, crafted = net(x), net(adv)
            rev.train()
            with torch.no_grad():
                targets = (rev(x), rev(adv)) if o["gamma"] else None
            beta = 5.0 if base == "mart" else 1.0
            total = sum(hand_terms(o["loss"], base, o["alpha"], o["gamma"], clean, crafted, y, targets, beta=beta, s=s))
            gradient = hand_gradient(total, named)
            chosen = {k: p for k, p in named.items() if not exempted(o["criterion"], k)}
            if chosen:
                scores = hand_scores(o["criterion"], o["alpha"], clean, crafted, y, gradient, chosen)
                conserved = hand_masks(scores, o["percentile"])
        masks.append(conserved)
        for k, p in named.items():
            free = ~conserved[k] if k in conserved else torch.ones_like(p, dtype=torch.bool)
            buf = 0.9 * momentum[k] + gradient[k] * free + 5e-3 * p.data
            moved = p.data - 0.1 * buf
            if o["freeze"] == "update":
                buf, moved = torch.where(free, buf, momentum[k]), torch.where(free, moved, p.data)
            momentum[k], p.data = buf.detach(), moved.detach()
        if step >= warmup and o["loss"] != "base":
            revise(step)
    return masks


COMBINATIONS = [
    {"criterion": "rgp", "loss": "base", "freeze": "gradient"},
    {"criterion": "rgp", "loss": "base", "freeze": "gradient", "rate": 1, "decay": 0.5, "alpha": 0.4, "gamma": 0.5},
    {"criterion": "rgp", "loss": "base", "freeze": "update", "rate": 1, "decay": 0.5, "percentile": 50},
    {"criterion": "rgp", "loss": "base", "freeze": "update", "alpha": 0},
    {"criterion": "rgp", "loss": "base", "freeze": "gradient", "alpha": 1, "percentile": 80},
    {"criterion": "joint", "loss": "rgp", "freeze": "gradient", "rate": 1, "decay": 0.5},
    {"criterion": "joint", "loss": "rgp", "freeze": "update", "alpha": 0.6},
    {"criterion": "joint", "loss": "base", "freeze": "gradient", "rate": 1, "decay": 0.3},
    {"criterion": "soft", "loss": "rgp_soft", "freeze": "gradient", "rate": 1, "decay": 0.5},
    {"criterion": "soft", "loss": "base", "freeze": "update", "alpha": 0.4, "rate": 0.5, "decay": 0.2},
    {"criterion": "joint", "loss": "rgp_old", "freeze": "gradient", "rate": 1, "decay": 0.5, "alpha": 0.3},
    {"criterion": "soft_all", "loss": "rgp_old", "freeze": "gradient", "rate": 1, "decay": 0.5, "gamma": 0.6},
    {"criterion": "none", "loss": "base", "freeze": "gradient", "rate": 0.5, "decay": 0.2},
    {"criterion": "rgp", "loss": "rgp_soft", "freeze": "gradient", "gamma": 0, "rate": 1},
]


def compared(module, tmp_path, loader, epochs=1, **given):
    net, rev = copy.deepcopy(module.net), copy.deepcopy(module.revision)
    fit(module, Loader(loader), tmp_path, epochs)
    assert module.steps_done == len(loader) * epochs
    masks = hand_training(net, rev, loader, epochs, **given)
    for own, wanted in ((module.net, net), (module.revision, rev)):
        for name, value in wanted.state_dict().items():
            torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)
    return masks


@pytest.mark.parametrize("given", COMBINATIONS, ids=lambda given: "-".join(map(str, given.values())))
def test_training_is_the_hand_written_loop(given, tmp_path):
    masks = compared(build(*options(**given)), tmp_path, batches(3), **given)
    assert all(any(m.any() for m in of.values()) for of in masks) == (given["criterion"] != "none")


@pytest.mark.parametrize("base", ["at", "mart"])
def test_training_on_other_bases_is_the_hand_written_loop(base, tmp_path):
    compared(build(f"base={base}", "label_smoothing=0.2"), tmp_path, batches(2), base=base, s=0.2)


def test_micro_batches_make_the_same_step():
    """A net without BatchNorm: scores are of the whole batch's gradients."""
    given, found = options(rate=1, decay=0.5, exempt="[classifier]", freeze="update"), []
    for accumulate in (1, 3):
        module = build(*given, f"trainer.accumulate={accumulate}", model="cnn_small")
        for seed in range(2):
            stepped(module, seed=seed)
        found.append(module.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_scores_belong_to_the_weights_before_awp_s_step():
    """The mask is that of the weights as they are; the gradient that it cuts is taken at the perturbed ones."""
    module = build("awp.rho=0.05", *options(gamma=0), "optimizer.momentum=0", "optimizer.weight_decay=0")
    x, _, y = images()
    net, moved = copy.deepcopy(module.net), copy.deepcopy(module.net)
    adv = hand_attack(copy.deepcopy(net), "trades", x, y, 0)
    stepped(module)

    def gradients_of(model):
        clean, crafted = model(x), model(adv)
        named = dict(model.named_parameters())
        total = hand_gradient(sum(hand_terms("base", "trades", 0.1, 0, clean, crafted, y)), named)
        return hand_scores("rgp", 0.1, clean, crafted, y, total, named), total

    scores, ascent = gradients_of(net)
    for k, p in moved.named_parameters():
        if p.dim() > 1:
            p.data += 0.05 * p.data.norm() * ascent[k] / ascent[k].norm()
    total = gradients_of(moved)[1]
    masks = hand_masks({k: v for k, v in scores.items() if not exempted("rgp", k)}, 30)
    for k, p in net.named_parameters():
        gradient = total[k] * ~masks[k] if k in masks else total[k]
        torch.testing.assert_close(module.net.get_parameter(k), p - 0.1 * gradient, rtol=1e-5, atol=1e-6, msg=k)
    for k, b in moved.named_buffers():  # moved by the second pair of forwards alone
        if b.is_floating_point():
            torch.testing.assert_close(module.net.get_buffer(k), b, rtol=1e-5, atol=1e-6, msg=k)


def test_awp_s_ascent_leaves_the_revision_model_s_statistics():
    found = []
    for rho in (None, 0.05):
        module = apart(build(*options(rate=0), *([] if rho is None else [f"awp.rho={rho}"])))
        stepped(module)
        found.append({k: b for k, b in module.revision.named_buffers() if b.is_floating_point()})
    for name, buffer in found[0].items():
        assert torch.equal(found[1][name], buffer), name


# ---- what is conserved -----------------------------------------------------------------------------------


def masks_of_next_step(module, criterion, percentile=30):
    """The masks of the step that ``stepped(module)`` is about to make, by hand."""
    x, _, y = images()
    net = copy.deepcopy(module.net)
    adv = hand_attack(net, "trades", x, y, module.steps_done)
    named = {k: p for k, p in net.named_parameters() if not exempted(criterion, k)}
    clean, crafted = net(x), net(adv)
    total = hand_gradient(hand_ce(clean, y) + hand_kl(clean, crafted), named)
    return hand_masks(hand_scores(criterion, 0.1, clean, crafted, y, total, named), percentile)


def snapshot(module, optimizer=None):
    """Weights, and what the optimizer keeps for each entry of them."""
    found = {}
    for k, p in module.net.named_parameters():
        state = {} if optimizer is None else optimizer.state[p]
        kept = {name: v.clone() for name, v in state.items() if v.shape == p.shape}
        found[k] = {"weight": p.detach().clone(), **kept}
    return found


@pytest.mark.parametrize("criterion", ["rgp", "joint", "soft"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_freeze_update_keeps_every_bit(optimizer, criterion):
    given = options(freeze="update", criterion=criterion, gamma=0)
    axes = [] if optimizer == "sgd" else ["optimizer=adamw"]
    module = build(*axes, *given, sgd=SGD if optimizer == "sgd" else ())
    before = snapshot(module)
    for _ in range(3):
        masks = masks_of_next_step(module, criterion)
        own = stepped(module)
        after = snapshot(module, own)
        names = {"weight", "momentum_buffer"} if optimizer == "sgd" else {"weight", "exp_avg", "exp_avg_sq"}
        for k, now in after.items():
            assert set(now) == names
            mask = masks.get(k, torch.zeros_like(now["weight"], dtype=torch.bool))
            assert mask.any() == (k in masks)
            for key, value in now.items():
                old = before[k].get(key, torch.zeros_like(value))
                assert torch.equal(value[mask], old[mask]), (k, key)
                assert (value[~mask] != old[~mask]).double().mean() > 0.95, (k, key)
        before = after


def test_freeze_update_leaves_an_optimizer_without_state_alone():
    module = build(*options(freeze="update", gamma=0), "optimizer.momentum=0")
    masks, before = masks_of_next_step(module, "rgp"), snapshot(module)
    stepped(module)
    for k, now in snapshot(module).items():
        still = now["weight"] == before[k]["weight"]
        assert still[masks[k]].all() if k in masks else not still.all()
        assert k not in masks or not still[~masks[k]].any()


def test_freeze_gradient_leaves_momentum_and_decay():
    module = build(*options(gamma=0))
    own, before = None, snapshot(module)
    for step in range(3):
        masks = masks_of_next_step(module, "rgp")
        own = stepped(module)
        after = snapshot(module, own)
        for k, mask in masks.items():
            old = before[k].get("momentum_buffer", torch.zeros_like(mask, dtype=torch.float64))
            wanted = 0.9 * old + 5e-3 * before[k]["weight"]
            torch.testing.assert_close(after[k]["momentum_buffer"][mask], wanted[mask])
            torch.testing.assert_close(after[k]["weight"][mask], (before[k]["weight"] - 0.1 * wanted)[mask])
            if step and mask.dim() > 1:
                assert (after[k]["weight"] != before[k]["weight"])[mask].double().mean() > 0.95
        before = after


@pytest.mark.parametrize("freeze", ["gradient", "update"])
def test_a_step_that_is_called_off_changes_nothing(freeze):
    module = build(*options(freeze=freeze))
    stepped(module)
    before = snapshot(module, module.own)
    module.watch.bad.fill_(1.0)
    stepped(module)
    for k, now in snapshot(module, module.own).items():
        assert all(torch.equal(v, before[k][name]) for name, v in now.items())


def test_what_clips_is_the_norm_of_what_is_left():
    module = build(*options(gamma=0), "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.clip=0.01")
    before = snapshot(module)
    stepped(module)
    moved = [now["weight"] - before[k]["weight"] for k, now in snapshot(module).items()]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-4)


# ---- exempt tensors --------------------------------------------------------------------------------------


def on_meta(kind, **given):
    with torch.device("meta"):
        return kind(num_classes=10, **given)


NETS = {"resnet18": ResNet18, "wrn34_10": WideResNet, "preact_resnet18": PreActResNet18, "vgg16": VGG16}
HEADS = {"resnet18": ("fc.",), "wrn34_10": ("fc.",), "preact_resnet18": ("linear.",), "vgg16": ("classifier.",)}
STEMS = {
    "resnet18": ("conv1.", "bn1."), "wrn34_10": ("conv1.",), "preact_resnet18": ("conv1.",),
    "vgg16": ("features.0.", "features.1."),
}  # fmt: skip
FINAL = {"wrn34_10": ["bn1.weight", "bn1.bias"], "preact_resnet18": ["bn.weight", "bn.bias"]}
AFFINE = ("weight", "bias")


def blocks(model):
    """Names of the blocks' convolutions and normalisations, written out."""
    if model == "vgg16":
        convs = [3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
        return [f"features.{i + j}.{t}" for i in convs for j in (0, 1) for t in AFFINE]
    of = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    if model == "wrn34_10":
        of = [f"block{i}.layer.{j}" for i in range(1, 4) for j in range(5)]
    inside = ["conv1.weight", "conv2.weight", *(f"bn{i}.{t}" for i in (1, 2) for t in AFFINE)]
    return [f"{block}.{tensor}" for block in of for tensor in inside]


@pytest.mark.parametrize("model", NETS)
def test_defaults_mask_what_the_paper_and_the_code_mask(model):
    net = on_meta(NETS[model])
    names = [n for n, _ in net.named_parameters()]
    assert sorted(masked_names(net, EXEMPT["rgp"])) == sorted(blocks(model) + FINAL.get(model, []))
    assert masked_names(net, EXEMPT["joint"]) == [n for n in names if not n.startswith(HEADS[model])]
    assert masked_names(net, ["stem"]) == [n for n in names if not n.startswith(STEMS[model])]
    shortcuts = [n for n in names if "downsample" in n or "hortcut" in n]
    assert masked_names(net, ["shortcut"]) == [n for n in names if n not in shortcuts]
    assert len(shortcuts) == {"resnet18": 9, "wrn34_10": 3, "preact_resnet18": 3, "vgg16": 0}[model]
    assert masked_names(net, []) == names
    if model != "vgg16":
        found = masked_names(net, EXEMPT["soft"], given=False)
        assert found == [n for n in blocks(model) if n.endswith(".conv1.weight")]


def test_the_default_of_the_code_s_soft_mode_fits_no_vgg():
    with pytest.raises(UserError, match=r"defense\.exempt") as error:
        masked_names(on_meta(VGG16), EXEMPT["soft"], given=False)
    one_line(error)


def test_a_default_may_fit_nothing_where_the_user_s_expression_may_not():
    net = torch.nn.ModuleDict({name: torch.nn.Conv2d(1, 1, 1, bias=False) for name in ("conv1", "block_conv1")})
    assert masked_names(net, EXEMPT["soft"], given=False) == ["block_conv1.weight"]
    with pytest.raises(UserError, match="fits no parameter"):
        masked_names(net, EXEMPT["soft"])


@pytest.mark.parametrize("criterion", ["rgp", "joint", "soft", "soft_all", "none"])
def test_the_module_takes_the_criterion_s_default(criterion):
    module = build(f"defense.criterion={criterion}")
    assert module.masked == [n for n, _ in module.net.named_parameters() if not exempted(criterion, n)]


def test_stem_and_classifier_of_nets_without_them():
    bare = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    assert stem(bare) == []
    assert classifier(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))) == []
    assert stem(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), bare)) == ["0"]


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ("[classifier]", r"^fc\."),
        ("classifier", r"^fc\."),
        ("shortcut", r"downsample"),
        ("[stem,shortcut]", r"^(conv1|bn1)\.|downsample"),
        ("layer1", r"layer1"),
        (r'["bn\d",layer4]', r"bn\d|layer4"),
        ("[]", r"(?!)"),
    ],
)
def test_words_and_expressions_of_the_user(given, pattern):
    module = build(f"defense.exempt={given}")
    names = [n for n, _ in module.net.named_parameters()]
    assert module.masked == [n for n in names if not re.search(pattern, n)]
    assert 0 < len(module.masked) <= len(names)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[layer9]", "layer9.*fits no parameter"),
        ("'conv('", "no regular expression"),
        ("'.'", "leaves nothing"),
        ("[stem,shortcut,classifier,layer]", "leaves nothing"),
    ],
)
def test_expressions_that_mask_nothing_are_one_line(given, says):
    with pytest.raises(UserError, match=rf"defense\.exempt.*{says}") as error:
        build(f"defense.exempt={given}")
    one_line(error)


def test_exempt_tensors_get_their_whole_gradient():
    module = build(*options(gamma=0, percentile=99, freeze="update"))
    before = snapshot(module)
    stepped(module)
    for k, now in snapshot(module).items():
        share = (now["weight"] != before[k]["weight"]).double().mean()
        assert share > 0.9 if exempted("rgp", k) else share < 0.4, k


# ---- plain training first --------------------------------------------------------------------------------


def test_warmup_is_plain_training_and_then_the_hand_written_loop(tmp_path):
    given = {"rate": 1, "decay": 0.5, "freeze": "gradient"}
    module = build(*options(**given, warmup_epochs=1), "trainer.max_epochs=2", "label_smoothing=0.1")
    attacks, inner = [], module.inner.start_point
    module.inner.start_point = lambda *a, **k: (attacks.append(module.steps_done), inner(*a, **k))[1]
    masks = compared(apart(module), tmp_path, batches(2), epochs=2, warmup=2, s=0.1, **given)
    assert attacks == [2, 3]
    assert [bool(m) for m in masks] == [False, False, True, True]


@pytest.mark.parametrize("loss", ["base", "rgp"])
def test_the_revision_model_is_a_copy_at_the_switch_and_no_alias(loss, tmp_path):
    given = options(warmup_epochs=1, rate=0, loss=loss)
    module = apart(build(*given, "trainer.max_epochs=2"))
    switch = {}
    update = module.update

    def watched(x, adv, y):
        if module.steps_done in (1, 2):  # so that it may be validated, saved and evaluated at any time
            student = module.net.state_dict()
            assert all(torch.equal(v, student[k]) for k, v in module.revision.state_dict().items())
        if module.steps_done == 2:
            switch.update(copy.deepcopy(module.net.state_dict()))
        update(x, adv, y)

    module.update = watched
    fit(module, Loader(batches(2)), tmp_path, 2)
    parameters = {k for k, _ in module.net.named_parameters()}
    for k, v in module.revision.state_dict().items():
        assert torch.equal(v, switch[k]) == (k in parameters), k  # its own forwards move its buffers since
    own = {t.data_ptr() for t in module.net.state_dict().values()}
    assert not own & {t.data_ptr() for t in module.revision.state_dict().values()}
    student = copy.deepcopy(module.net.state_dict())
    module.rate, module.decay = 1.0, 0.5
    module.move_revision()
    assert all(torch.equal(v, student[k]) for k, v in module.net.state_dict().items())
    assert not torch.equal(module.revision.conv1.weight, switch["conv1.weight"])


def test_buffers_too_are_copied_at_the_switch():
    module = build(*options(warmup_epochs=1, rate=0, gamma=0))
    stepped(module)
    assert not module.revision.bn1.running_mean.eq(0).all()
    wanted = copy.deepcopy(module.net.state_dict())
    stepped(module)
    for k, v in module.revision.state_dict().items():
        assert torch.equal(v, wanted[k]), k


def test_a_part_of_an_epoch_warms_up(tmp_path):
    module = build(*options(warmup_epochs=0.5), "trainer.max_epochs=2")
    seen = []
    craft = module.craft
    module.craft = lambda x, y: (seen.append(module.warming), craft(x, y))[1]
    fit(module, Loader(batches(2)), tmp_path, 2)
    assert seen == [True, False, False, False]


@pytest.mark.parametrize("epochs", [2, 2.5, 100])
def test_a_warmup_that_leaves_nothing_is_refused(epochs):
    with pytest.raises(UserError, match=r"defense\.warmup_epochs=.*trainer\.max_epochs=2") as error:
        build(f"defense.warmup_epochs={epochs}", "trainer.max_epochs=2")
    one_line(error)


# ---- which weights are evaluated, and what is logged -----------------------------------------------------


def test_the_revision_model_takes_the_net_s_place_inside():
    module = apart(build("evaluation.weights=revision")).eval()
    x, *_ = images()
    student, revision = module.net, module.revision
    with torch.no_grad():
        own, other = module.logits(x), revision(x)
        with module.evaluated_weights():
            torch.testing.assert_close(module.logits(x), other, rtol=0, atol=0)
        assert module.net is student
        assert module.revision is revision
        torch.testing.assert_close(module.logits(x), own, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), module.evaluated_weights():
        _ = 1 / 0
    assert module.net is student
    assert (own != other).all()


@pytest.mark.parametrize("weights", ["student", "revision"])
def test_the_deployed_net_is_a_copy_of_the_evaluated_one(weights):
    module = apart(build(f"evaluation.weights={weights}"))
    module.revision.bn1.running_mean.fill_(0.25)
    net = module.deployed()
    source = module.net if weights == "student" else module.revision
    assert type(net) is type(module.net)
    assert not any(m.training for m in net.modules())
    assert list(net.state_dict()) == list(source.state_dict())
    for k, v in net.state_dict().items():
        assert torch.equal(v, source.state_dict()[k]), k
        assert v.data_ptr() != source.state_dict()[k].data_ptr()
    assert all(m.training for m in module.net.modules())


@pytest.mark.parametrize("weights", ["student", "revision"])
def test_a_checkpoint_s_evaluated_state(weights):
    module = apart(build(f"evaluation.weights={weights}"))
    module.revision.bn1.running_mean.fill_(0.25)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    found = module.evaluated_state({"state_dict": state, "redoubt": {"ema": None}})
    assert set(found) == set(state)
    source = module.net if weights == "student" else module.revision
    for k, v in source.state_dict().items():
        assert torch.equal(found[f"net.{k}"], v), k
    module.load_state_dict(found)


@pytest.mark.parametrize("defense", ["none", "fsr", "afd"])
def test_other_defenses_have_no_revision_model(defense):
    with pytest.raises(UserError, match=r"evaluation\.weights='revision'.*student") as error:
        build("base=at", "evaluation.weights=revision", defense=defense)
    assert "revision," not in one_line(error)


@pytest.mark.parametrize(("criterion", "epochs", "warmup"), [("rgp", 3, 0), ("joint", 1, 0), ("rgp", 4, 1)])
def test_shares_are_logged_in_the_first_and_the_last_epoch(criterion, epochs, warmup, tmp_path):
    given = {"criterion": criterion, "rate": 1, "decay": 0.5}
    module = build(*options(**given, warmup_epochs=warmup), f"trainer.max_epochs={epochs}")
    logged = []
    module.log_dict = lambda values, **kwargs: logged.append(values)
    masks = compared(module, tmp_path, batches(2), epochs=epochs, warmup=2 * warmup, **given)
    assert len(logged) == epochs
    for epoch, values in enumerate(logged):
        shares = {k: v for k, v in values.items() if "updated" in k}
        wanted = {}
        if epoch in (warmup, epochs - 1):
            of = masks[2 * epoch : 2 * epoch + 2]
            wanted = {f"train/updated/{k}": 1 - np.mean([m[k].double().mean() for m in of]) for k in of[0]}
        assert shares == pytest.approx(wanted, abs=1e-6)


# ---- recipes and bad values ------------------------------------------------------------------------------


def cell(*overrides):
    return resolve(conftest.composed(*overrides))


@pytest.mark.parametrize(
    ("model", "data", "p", "alpha", "gamma"),
    [
        ("resnet18", "cifar10", 30, 0.1, 1.0),
        ("resnet18", "cifar100", 30, 0.1, 1.0),
        ("resnet18", "svhn", 30, 0.2, 1.0),
        ("wrn34_10", "cifar10", 50, 0.3, 0.5),
        ("wrn34_10", "cifar100", 50, 0.3, 0.5),
        ("preact_resnet18", "cifar10", 20, 0.2, 1.0),
    ],
)
def test_recipes_are_those_of_table_9(model, data, p, alpha, gamma):
    cfg = cell("defense=cure", f"model={model}", f"data={data}")
    assert (cfg.defense.percentile, cfg.defense.alpha, cfg.defense.gamma) == (p, alpha, gamma)
    assert (cfg.axes.base, cfg.base.beta) == ("trades", 1)
    assert (cfg.inner.steps, cfg.inner.start, cfg.inner.sigma) == (10, "normal", 0.001)
    assert cfg.inner.eps == pytest.approx(8 / 255)
    assert cfg.inner.step * cfg.inner.eps == pytest.approx(2 / 255)
    assert cfg.inner.step_abs is None
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.1, 0.9, 5e-3)
    assert cfg.trainer.max_epochs == 200
    assert (cfg.schedule.milestones, cfg.schedule.factors) == ([100, 150], [0.1, 0.01])
    d = cfg.defense
    assert (d.criterion, d.loss, d.freeze, d.exempt) == ("rgp", "base", "gradient", None)
    assert (d.rate, d.decay, d.rate_decay, d.decay_warmup, d.warmup_epochs) == (0.2, 0.999, "none", False, 0)


def test_a_base_on_the_command_line_wins():
    cfg = cell("defense=cure", "base=at")
    assert cfg.axes.base == "at"
    assert "beta" not in cfg.base
    assert cfg.inner.start == "uniform"
    assert cell("defense=cure", "base.beta=3").base.beta == 3
    assert cell("base=trades").base.beta == 6
    assert cell("defense=cure", "base=mart", "model=resnet18").base.beta == 5
    mine = cell("defense=cure", "model=wrn34_10", "defense.alpha=0.9", "defense.percentile=1").defense
    assert (mine.alpha, mine.percentile, mine.gamma) == (0.9, 1, 0.5)


def test_plain_training_has_nothing_to_defend():
    with pytest.raises(UserError, match=r"base=standard.*at, trades, mart") as error:
        build("base=standard", "inner.steps=0")
    one_line(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("criterion", "rgb"), ("criterion", "null"), ("criterion", "[rgp]"), ("loss", "trades"), ("loss", "soft"),
        ("freeze", "weights"), ("freeze", "true"), ("rate_decay", "cosine"), ("alpha", "-0.1"), ("alpha", "1.1"),
        ("alpha", "nan"), ("alpha", "much"), ("alpha", "null"), ("percentile", "-1"), ("percentile", "100"),
        ("percentile", "101"), ("percentile", "true"), ("gamma", "-1"), ("gamma", "inf"), ("gamma", "x"),
        ("beta", "-2"), ("beta", "nan"), ("rate", "1.5"), ("rate", "-0.2"), ("rate", "[0.2]"), ("decay", "1.001"),
        ("decay", "-1"), ("decay", "a"), ("warmup_epochs", "-1"), ("warmup_epochs", "inf"), ("warmup_epochs", "ten"),
    ],
)  # fmt: skip
def test_bad_values_are_one_line_that_names_the_key(key, value):
    with pytest.raises(UserError) as error:
        build(f"defense.{key}={value}")
    assert f"defense.{key}=" in one_line(error)


def test_percentile_zero_conserves_nothing():
    module = build(*options(percentile=0, freeze="update"))
    assert module.criterion == "none"
    assert module.masked == []
    before = snapshot(module)
    stepped(module)
    for k, now in snapshot(module).items():
        assert (now["weight"] != before[k]["weight"]).double().mean() > 0.95, k
