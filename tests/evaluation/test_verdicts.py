"""Verdicts: every example once, whatever the chunks and the company."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from redoubt.attacks import WhiteBox
from redoubt.build import build_module
from redoubt.config import compose
from redoubt.evaluation.results import accuracies, ensemble, nrr, wilson
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import Judge, full_precision, judge

CPU = torch.device("cpu")


class Linear(nn.Module):
    """Its attacks have closed forms, and no example feels another."""

    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3 * 4 * 4, 4)
        self.seen: list[torch.Tensor] = []

    def logits(self, x):
        self.seen.append(x.detach().clone())
        return self.fc(x.flatten(1))


def pictures(n, size=4, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    return images, torch.randint(k, (n,), generator=g)


def run(module, images, labels, attacks, chunk=4, seed=0, **options):
    suite = Suite(attacks=attacks)
    return judge(module, images, labels, suite, chunk=chunk, seed=seed, device=CPU, progress=False, **options)


SUITE = {
    "fgsm": WhiteBox(eps="8/255", steps=1, step=1.0),
    "pgd20": WhiteBox(eps="8/255", steps=20, step=0.1),
    "cw": WhiteBox(eps="8/255", steps=30, step=0.1, loss="margin"),
}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 11, 50])
def test_every_example_is_judged_once_in_its_place(n, chunk):
    module, (images, _) = Linear(), pictures(n)
    labels = module.logits(images.float() / 255).argmax(1)
    labels[::3] = (labels[::3] + 1) % 4  # every third is wrong
    module.seen.clear()
    found = run(module, images, labels, {}, chunk=chunk)
    assert list(found) == ["natural"]
    assert found["natural"].dtype == bool
    np.testing.assert_array_equal(found["natural"], np.arange(n) % 3 != 0)
    seen = torch.cat(module.seen[3:])  # after the passes that look for noise
    assert torch.equal(seen, images.float() / 255)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_verdicts_are_those_of_a_naive_loop(chunk):
    """Alone in its batch, every example: FGSM and PGD on a linear net by hand."""
    module, (images, labels) = Linear(), pictures(11, seed=2)
    labels[:8] = module.logits(images[:8].float() / 255).argmax(1)
    attacks = {name: WhiteBox(eps=0.02, steps=s, step=t, loss=k) for name, s, t, k in
               (("fgsm", 1, 1.0, "ce"), ("pgd20", 20, 0.1, "ce"), ("cw", 30, 0.1, "margin"))}  # fmt: skip
    found = run(module, images, labels, attacks, chunk=chunk)
    assert list(found) == ["natural", *attacks]
    for name, size, steps, margin in (
        ("fgsm", 0.02, 1, False),
        ("pgd20", 0.002, 20, False),
        ("cw", 0.002, 30, True),
    ):
        for i in range(11):
            x = images[i : i + 1].float() / 255
            adv, y = x.clone(), int(labels[i])
            for _ in range(steps):
                adv.requires_grad_()
                z = module.fc(adv.flatten(1))[0]
                loss = max(z[j] for j in range(4) if j != y) - z[y] if margin else -z.log_softmax(0)[y]
                (g,) = torch.autograd.grad(loss, adv)
                adv = (x + (adv.detach() + size * g.sign() - x).clamp(-0.02, 0.02)).clamp(0, 1)
            assert found[name][i] == (int(module.fc(adv.flatten(1)).argmax()) == y), (name, i)


def test_verdicts_vary_by_attack():
    """So that the test above can fail."""
    module, (images, _) = Linear(), pictures(60)
    labels = module.logits(images.float() / 255).argmax(1)
    found = run(module, images, labels, {"fgsm": WhiteBox(eps=0.02, steps=1, step=1.0)})
    assert 0 < found["fgsm"].sum() < 60


def test_a_shared_path_costs_no_step_and_changes_no_verdict():
    module, (images, labels) = Linear(), pictures(7)
    attacks = {f"pgd{n}": WhiteBox(eps="8/255", steps=n, step=0.25) for n in (6, 4, 5)}  # the longest first
    together = run(module, images, labels, attacks, chunk=7)
    assert len(module.seen) == 4 + 6 + 1  # passes that look for noise and gradient; steps; the last verdict
    for name, attack in attacks.items():
        np.testing.assert_array_equal(run(Linear(), images, labels, {name: attack}, chunk=7)[name], together[name])


def random_start(steps=2):
    return WhiteBox(eps=0.05, steps=steps, step=0.01, start="uniform")


def images_seen(module, *args, **kwargs):
    module.seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "examine", lambda self, x: None)
        run(module, *args, **kwargs)
    return list(module.seen)


def test_a_random_start_does_not_depend_on_the_attacks_beside_it():
    module, (images, labels) = Linear(), pictures(11)
    alone = run(module, images, labels, {"r": random_start()})
    images_alone = images_seen(module, images, labels, {"r": random_start()})
    beside = run(module, images, labels, {"a": random_start(), "r": random_start(), **SUITE})
    np.testing.assert_array_equal(alone["r"], beside["r"])
    images_beside = images_seen(module, images, labels, {**SUITE, "r": random_start(), "z": random_start(7)})
    for x in images_alone:
        assert any(torch.equal(x, other) for other in images_beside)


def test_a_random_start_is_a_function_of_seed_name_and_chunk():
    module, (images, labels) = Linear(), pictures(8)
    images[4:] = images[:4]
    base = images_seen(module, images, labels, {"r": random_start()})
    assert all(
        torch.equal(a, b) for a, b in zip(base, images_seen(module, images, labels, {"r": random_start()}), strict=True)
    )
    other_seed = images_seen(module, images, labels, {"r": random_start()}, seed=1)
    other_name = images_seen(module, images, labels, {"q": random_start()})
    half = len(base) // 2
    assert torch.equal(base[0], base[half]), "the clean images"
    assert not torch.equal(base[1], other_seed[1])
    assert not torch.equal(base[1], other_name[1])
    assert not torch.equal(base[1], base[half + 1]), "the second chunk has numbers of its own"


@pytest.fixture(scope="module")
def fsr():
    return build_module(compose(["defense=fsr", "base=at", "model=resnet_small", "data=digits"]))


@pytest.mark.parametrize("fails", [False, True])
def test_module_is_left_as_it_was(fsr, fails):
    fsr.train()
    fsr.net.bn1.eval()
    fsr.net.layer1.requires_grad_(False)
    modes = {n: m.training for n, m in fsr.named_modules()}
    learning = {n: p.requires_grad for n, p in fsr.named_parameters()}
    state = {k: v.clone() for k, v in fsr.state_dict().items()}
    images, labels = pictures(5, 16, 10)

    class Broken(WhiteBox):
        def __call__(self, logits, x, y, draws, after=None):
            assert not any(m.training for m in fsr.net.modules())
            logits(x)
            if fails:
                raise RuntimeError("inside")
            return x

    try:
        run(
            fsr,
            images,
            labels,
            {"pgd": WhiteBox(eps=0.1, steps=2, step=0.5), "b": Broken(eps=0.1, steps=3, step=0.5)},
        )
    except RuntimeError:
        assert fails
    assert modes == {n: m.training for n, m in fsr.named_modules()}
    assert learning == {n: p.requires_grad for n, p in fsr.named_parameters()}
    assert all(torch.equal(v, state[k]) for k, v in fsr.state_dict().items())
    assert all(p.grad is None for p in fsr.parameters())
    fsr.requires_grad_(True).train()


def test_fsr_is_judged_in_evaluation_mode_without_noise(fsr):
    images, labels = pictures(9, 16, 10)
    wanted = (fsr.eval().logits(images.float() / 255).argmax(1) == labels).numpy()
    fsr.train()
    for chunk in (2, 9):
        np.testing.assert_array_equal(run(fsr, images, labels, {}, chunk=chunk)["natural"], wanted)


def test_judges_in_float32_inside_an_autocast():
    module, (images, labels) = Linear(), pictures(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kinds = []
        logits = module.logits
        module.logits = lambda x: kinds.append(logits(x).dtype) or logits(x)
        run(module, images, labels, {"fgsm": SUITE["fgsm"]})
    assert set(kinds) == {torch.float32}


@pytest.mark.parametrize("before", [False, True])
def test_tf32_is_off_inside_and_restored(before):
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    kept = [f.allow_tf32 for f in flags]
    try:
        for f in flags:
            f.allow_tf32 = before
        with pytest.raises(RuntimeError), full_precision():  # noqa: PT012
            assert not any(f.allow_tf32 for f in flags)
            raise RuntimeError("inside")
        assert [f.allow_tf32 for f in flags] == [before, before]
    finally:
        for f, value in zip(flags, kept, strict=True):
            f.allow_tf32 = value


def test_ensemble_is_right_everywhere():
    rng = np.random.default_rng(0)
    verdicts = {name: rng.random(200) < 0.8 for name in ("natural", "fgsm", "pgd20", "cw")}
    found = ensemble(verdicts)
    np.testing.assert_array_equal(found, [all(v[i] for v in verdicts.values()) for i in range(200)])
    assert found.mean() <= min(v.mean() for v in verdicts.values())


@pytest.mark.parametrize("n", [1, 2, 10, 359, 10_000])
def test_wilson_is_scipy_s(n):
    for right in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
        low, high = wilson(right, n)
        assert 0 <= low <= right / n + 1e-12
        assert right / n - 1e-12 <= high <= 1


def test_accuracies_and_their_intervals():
    table = accuracies({"natural": np.array([True] * 30 + [False] * 10), "fgsm": [True, False]})
    wanted = stats.binomtest(30, 40).proportion_ci(method="wilson")
    assert table["natural"] == {
        "accuracy": 0.75, "low": pytest.approx(wanted.low), "high": pytest.approx(wanted.high), "n": 40
    }  # fmt: skip
    assert table["fgsm"]["accuracy"] == 0.5
    assert wilson(0, 0) == (0.0, 1.0)


def test_nrr_is_the_harmonic_mean():
    assert nrr(0.8676, 0.5248) == pytest.approx(0.6540, abs=5e-5)  # methods 8.6
    assert nrr(0.0, 0.0) == 0.0


def test_a_rounded_example_is_no_iterate_of_a_longer_attack():
    module, (images, labels) = Linear(), pictures(40)
    labels = module.logits(images.float() / 255).argmax(1)
    attacks = {f"pgd{n}": WhiteBox(eps=0.0145, steps=n, step=0.1) for n in (11, 15)}
    calls = []

    class Noted(WhiteBox):
        def __call__(self, logits, x, y, draws, after=None):
            calls.append(0 if after is None else after.steps)
            return super().__call__(logits, x, y, draws, after)

    noted = {name: Noted(eps=0.0145, steps=a.steps, step=0.1) for name, a in attacks.items()}
    together = run(module, images, labels, noted, save="uint8")
    assert set(calls) == {0}
    for name, attack in attacks.items():
        np.testing.assert_array_equal(run(Linear(), images, labels, {name: attack}, save="uint8")[name], together[name])
    calls.clear()
    run(module, images, labels, noted)
    assert 11 in calls, "else the lines above say nothing"


def test_a_random_net_is_judged_alike_twice():
    class Noisy(Linear):
        def logits(self, x):
            z = super().logits(x)
            return z + 0.3 * torch.randn(z.shape)

    images, labels = pictures(40)
    suite = Suite(attacks={"pgd": WhiteBox(eps=0.02, steps=5, start="uniform", eot=3)}, stochastic=True)
    first, second = (judge(Noisy(), images, labels, suite, chunk=7, seed=0, device=CPU, progress=False) for _ in "ab")
    other = judge(Noisy(), images, labels, suite, chunk=7, seed=1, device=CPU, progress=False)
    for name in ("natural", "pgd"):
        np.testing.assert_array_equal(first[name], second[name])
    assert (first["natural"] != other["natural"]).any()
