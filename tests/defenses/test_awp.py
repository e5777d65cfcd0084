"""Adversarial weight perturbation against NumPy and against hand-written steps at hand-perturbed weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.defenses.test_afd import (
    BASES,
    LIKE_FLOAT32,
    build,
    close,
    fine_tuning,
    hand_gradients,
    hand_losses,
    kept_optimizers,
    robust,
    shaken,
    stepped_along,
    table,
)
from tests.defenses.test_gradients import hand_fsr, hand_pgd, images
from torch import nn

from redoubt.data import Batch
from redoubt.defenses.awp import AWP
from redoubt.defenses.gradients import LossScale
from redoubt.errors import UserError
from redoubt.rng import generator

RHO = "awp.rho=0.05"


def drawn(*shapes, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


SHAPES = ((3, 4), (5,), (2, 3, 3, 3), (1, 1), (6, 2, 2))


# ---- the perturbation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.005, 0.7])
def test_each_tensor_moves_by_rho_times_its_norm(rho):
    params = [nn.Parameter(w) for w in drawn(*SHAPES)]
    before, gradients = [p.detach().clone() for p in params], drawn(*SHAPES, seed=1)
    with AWP(rho=rho).applied(params, gradients):
        for p, w, g in zip(params, before, gradients, strict=True):
            w, g = w.numpy(), g.numpy()
            wanted = w + rho * np.sqrt((w**2).sum()) * g / np.sqrt((g**2).sum()) if w.ndim > 1 else w
            np.testing.assert_allclose(p.detach().numpy(), wanted, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_gradient_s_length_does_not_matter(size):
    (weight,), (g,) = drawn((3, 4), dtype=torch.float32), drawn((3, 4), seed=1, dtype=torch.float32)
    p = nn.Parameter(weight.clone())
    with AWP(rho=0.1).applied([p], [g * size]):
        torch.testing.assert_close(p.detach(), weight + 0.1 * weight.norm() * g / g.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_come_back_bit_for_bit_after_an_exception_too(dtype):
    params = [nn.Parameter(w) for w in drawn(*SHAPES, dtype=dtype)]
    before, gradients = [p.detach().clone() for p in params], drawn(*SHAPES, seed=1, dtype=torch.float32)
    places = [p.data_ptr() for p in params]
    for _ in range(3):
        with AWP(rho=0.3).applied(params, gradients):
            moved = [not torch.equal(p, w) for p, w in zip(params, before, strict=True)]
            assert moved == [w.dim() > 1 for w in before]
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    with pytest.raises(KeyError), AWP(rho=0.3).applied(params, gradients):
        raise KeyError
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert [p.data_ptr() for p in params] == places


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan, None])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_gradient_without_direction_leaves_its_tensor_alone(value, everywhere):
    weights = drawn((3, 4), (2, 2), (3, 3), (4, 1))
    weights[2].zero_()  # of norm zero: it moves by nothing
    params, gradients = [nn.Parameter(w.clone()) for w in weights], drawn((3, 4), (2, 2), (3, 3), (4, 1), seed=1)
    if value is None:
        gradients[1] = None
    elif everywhere or value == 0:
        gradients[1].fill_(value)
    else:
        gradients[1][0, 1] = value
    with AWP(rho=0.1).applied(params, gradients):
        assert [torch.equal(p, w) for p, w in zip(params, weights, strict=True)] == [False, True, True, False]
        assert all(p.isfinite().all() for p in params)
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))


def test_nothing_to_perturb_is_no_error():
    p = nn.Parameter(torch.ones(3))
    with AWP(rho=0.1).applied([p], [torch.ones(3)]):
        assert torch.equal(p, torch.ones(3))


# ---- whole steps -----------------------------------------------------------------------------------------


def perturbed(named, gradient, rho=0.05):
    """Writes ``w + rho |w| g / |g|`` into the parameters of two dimensions and more."""
    with torch.no_grad():
        for name, p in named.items():
            g = gradient[name]
            if p.dim() > 1 and g.norm() > 0:
                p.add_(rho * p.norm() * g / g.norm())


def plain_gradients(net, losses):
    """For each loss its gradients by name, zero where it does not reach."""
    named = dict(net.named_parameters())
    found = [torch.autograd.grad(v, list(named.values()), retain_graph=True, allow_unused=True) for v in losses]
    return [
        {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gs, strict=True)}
        for gs in found
    ]


def at_perturbed(net, losses_of, rho=0.05):
    """Gradients at the perturbed weights by plain autograd, and that net, whose BatchNorm saw that forward alone."""
    first, second = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    (ascent,) = plain_gradients(first, [losses_of(first)])
    perturbed(dict(second.named_parameters()), ascent, rho)
    (gradient,) = plain_gradients(second, [losses_of(second)])
    return gradient, second


def floats(net):
    return {k: v.clone() for k, v in net.named_buffers() if v.is_floating_point()}


def updated(module, *batch):
    """One update: what each optimizer stepped along, and what was counted; the weights stepped from where they were."""
    found, before = stepped_along(module), {k: v.detach().clone() for k, v in module.net.named_parameters()}
    module.tally.sums.clear()
    module.update(*batch)
    counts = {name: pair[1].item() for name, pair in module.tally.sums.items()}
    assert {counts[name] for name in counts if not name.startswith(("grad_norm", "updated/"))} == {len(batch[0])}
    assert counts["grad_norm"] == 1
    if len(found) == 1:  # momentum is still zero: w - lr (g + decay w)
        group = module.raw_optimizers()[0].param_groups[0]
        for name, p in module.net.named_parameters():
            wanted = before[name] - group["lr"] * (found[0][1][name] + group["weight_decay"] * before[name])
            torch.testing.assert_close(p.detach(), wanted, rtol=1e-6, atol=1e-7)
    return [along for _, along in found]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", ["cnn_small", "resnet_small"])
def test_a_step_of_each_base(base, model):
    module = build(RHO, defense="none", base=base, model=model).double()
    x, adv, y = images(dtype=torch.float64)

    def loss(net):
        clean = net(x) if base != "at" else None
        return robust(base, net(adv), y, clean)

    gradient, second = at_perturbed(module.net, loss)
    (found,) = updated(module, x, adv, y)
    close(found, gradient, **LIKE_FLOAT32)
    close(floats(module.net), floats(second), rtol=1e-6, atol=1e-8)


def test_a_step_of_fsr_draws_the_same_masks_in_both_passes():
    module = build(RHO, defense="fsr", model="resnet_small").double()
    module.steps_done = 3
    x, adv, y = images(dtype=torch.float64)
    u = torch.rand(len(x), 2, 8, 2, 2, generator=generator(0, "gumbel/adv", 3, 0))

    def loss(net):
        logits, (plus, minus, tilde) = hand_fsr(net, adv, u)
        wrong = logits.detach().masked_fill(F.one_hot(y, 10).bool(), -torch.inf).argmax(1)
        ce = F.cross_entropy
        return ce(logits, y) + ce(plus, y) + ce(minus, wrong) + ce(tilde, y)

    gradient, second = at_perturbed(module.net, loss)
    (found,) = updated(module, x, adv, y)
    close(found, gradient, rtol=1e-4, atol=1e-6)
    close(floats(module.net), floats(second), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("update", ["accumulated", "joint"])
def test_a_step_of_afd(base, update):
    """Each parameter goes up the sum of what trains it, D2 along neg alone; then the table at those weights."""
    module, hand = fine_tuning(RHO, f"defense.update={update}", model="resnet_small", base=base)
    batch = images(dtype=torch.float64)
    first = copy.deepcopy(hand)
    neg, cos, rob = hand_gradients(first, hand_losses(first, *batch, base))
    cos["fc.d2.weight"] = torch.zeros_like(cos["fc.d2.weight"])
    perturbed(hand.named(), {name: neg[name] + cos[name] + rob[name] for name in neg})
    wanted = table(*hand_gradients(hand, hand_losses(hand, *batch, base)), joint=update == "joint")
    teacher = {k: v.clone() for k, v in module.teacher.state_dict().items()}
    found = updated(module, *batch)
    for along, gradient in zip(found, wanted, strict=True):
        close(along, gradient, rtol=1e-4, atol=1e-6)
    close(floats(module.net), floats(hand.phi), rtol=1e-6, atol=1e-8)
    assert all(torch.equal(v, teacher[k]) for k, v in module.teacher.state_dict().items())


def kl(a, b):
    p = a.softmax(1)
    return (p * (p.log() - b.log_softmax(1))).sum(1).mean()


@pytest.mark.parametrize("criterion", ["rgp", "none"])
@pytest.mark.parametrize("freeze", ["gradient", "update"])
def test_a_step_of_cure_scores_the_weights_as_they_are(criterion, freeze):
    """Masks by the unperturbed weights, the gradient at the perturbed ones, the revision model forwarded once."""
    options = [RHO, f"defense.criterion={criterion}", f"defense.freeze={freeze}", "defense.rate=0", "base.beta=1"]
    options += ["defense.percentile=40", "defense.alpha=0.3", "defense.gamma=0.5"]
    module = build(*options, defense="cure", base="trades", model="resnet_small").double()
    shaken(module.revision)
    x, adv, y = images(dtype=torch.float64)
    revision = copy.deepcopy(module.revision).train()
    with torch.no_grad():
        targets = [revision(v).detach() for v in (x, adv)]

    def forwards(net):
        clean, crafted = net(x), net(adv)
        loss = F.cross_entropy(clean, y) + kl(clean, crafted)
        return clean, crafted, loss + 0.5 * (kl(targets[0], clean) + kl(targets[1], crafted))

    first = copy.deepcopy(module.net).train()
    clean, crafted, _ = forwards(first)
    on_clean, on_adv = plain_gradients(first, [F.cross_entropy(clean, y), F.cross_entropy(crafted, y)])
    before = {k: v.detach().clone() for k, v in module.net.named_parameters()}
    gradient, second = at_perturbed(module.net, lambda net: forwards(net)[2])
    scores_moved = plain_gradients(second, [F.cross_entropy(second(x), y)])[0]
    wanted_buffers = at_perturbed(module.net, lambda net: forwards(net)[2])[1]
    assert bool(module.masked) == (criterion == "rgp")
    different = 0
    masks = {}
    for name in module.masked:
        score = 0.3 * on_clean[name].abs() + 0.7 * on_adv[name].abs()
        masks[name] = score < np.percentile(score.numpy(), 40)
        assert masks[name].any()
        gradient[name] = gradient[name].masked_fill(masks[name], 0)
        moved = scores_moved[name].abs()
        different += int((masks[name] != (moved < np.percentile(moved.numpy(), 40))).sum())
    assert different > 0 or criterion == "none"
    if freeze == "gradient":
        (found,) = updated(module, x, adv, y)
    else:
        records = stepped_along(module)
        module.update(x, adv, y)
        found = records[0][1]
        named = dict(module.net.named_parameters())
        assert all(torch.equal(named[n][m], before[n][m]) for n, m in masks.items())
    close(found, gradient, rtol=1e-4, atol=1e-6)
    close(floats(module.net), floats(wanted_buffers), rtol=1e-6, atol=1e-8)
    close(floats(module.revision), floats(revision), rtol=1e-6, atol=1e-8)


def test_two_training_steps_are_the_hand_written_loop():
    """The attack sees the weights as they are; momentum, decay and rates act on those too."""
    module = build(RHO, "inner.steps=2", "inner.step=0.5", defense="none", model="resnet_small").double()
    net, optimizers = copy.deepcopy(module.net), kept_optimizers(module)
    group = optimizers[0].param_groups[0]
    plain = torch.optim.SGD(
        net.parameters(), lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"], fused=False
    )
    for step in range(2):
        x, _, y = images(5, step, torch.float64)
        module.training_step(Batch(x, y, 0, len(x)), step)
        net.eval()
        start = module.inner.start_point(x, generator=generator(0, "inner", step))
        adv = hand_pgd(lambda a, y=y: F.cross_entropy(net(a), y, reduction="sum"), x, start, module.inner)
        gradient, second = at_perturbed(net, lambda n, adv=adv, y=y: F.cross_entropy(n(adv), y))
        for name, p in net.named_parameters():
            p.grad = gradient[name]
        plain.step()
        for mine, seen in zip(net.buffers(), second.buffers(), strict=True):
            mine.copy_(seen)
    wanted = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    close({k: v for k, v in module.net.state_dict().items() if k in wanted}, wanted, **LIKE_FLOAT32)


@pytest.mark.parametrize("defense", ["none", "cure"])
def test_the_ascent_leaves_batchnorm_s_counter_alone(defense):
    base = "trades" if defense == "cure" else "at"
    module = build(RHO, defense=defense, model="resnet_small", base=base)
    twin = build(defense=defense, model="resnet_small", base=base)
    for one in (module, twin):
        kept_optimizers(one)
        one.update(*images())
    wanted = {k: v.item() for k, v in twin.named_buffers() if k.endswith("num_batches_tracked")}
    assert {k: v.item() for k, v in module.named_buffers() if k in wanted} == wanted


@pytest.mark.parametrize("defense", ["none", "afd"])
@pytest.mark.parametrize("option", ["trainer.accumulate=3", "scale"])
def test_micro_batches_and_loss_scale_leave_the_step(defense, option):
    """The direction is that of the whole batch, found once."""
    found = []
    for changed in (False, True):
        options = [option] if changed and option != "scale" else []
        module = build(RHO, *options, defense=defense).double()
        if changed and option == "scale":
            module.scale = LossScale(torch.device("cpu"), start=2.0**12)
        found.append(updated(module, *images(dtype=torch.float64)))
    for one, other in zip(*found, strict=True):
        close(one, other, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_moves_nothing():
    module = build(RHO, defense="afd", model="resnet_small")
    kept_optimizers(module)
    before = {k: v.detach().clone() for k, v in module.net.named_parameters()}
    module.gamma = torch.nan
    module.update(*images())
    assert module.watch.bad == 1
    assert all(torch.equal(p, before[k]) for k, p in module.net.named_parameters())


@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_either_pass_leaves_weights_and_tally(failing):
    module = build(RHO, defense="none", model="resnet_small")
    kept_optimizers(module)
    before, tally, terms, calls = copy.deepcopy(module.net.state_dict()), module.tally, module.terms, []

    def fails(*batch):
        calls.append(len(batch))
        if len(calls) == failing:
            raise KeyError
        return terms(*batch)

    module.terms = fails
    with pytest.raises(KeyError):
        module.update(*images())
    assert module.tally is tally
    assert not tally.sums
    for name, value in module.net.state_dict().items():
        assert torch.equal(value, before[name]) or not value.is_floating_point(), name


# ---- when it is on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "first"), [("null", 0), ("0", 0), ("1", 4), ("1.5", 6), ("2", 8)])
def test_it_begins_after_its_warmup(warmup, first, monkeypatch):
    module = build(RHO, f"awp.warmup={warmup}", defense="none")
    monkeypatch.setattr(type(module), "steps_per_epoch", property(lambda self: 4))
    seen = []
    for module.steps_done in range(10):
        seen.append(module.perturbs)
    assert seen == [step >= first for step in range(10)]


@pytest.mark.parametrize("defense", ["none", "fsr", "afd", "cure"])
def test_before_its_warmup_nothing_changes_and_after_it_much(defense, monkeypatch):
    base = "trades" if defense == "cure" else "at"
    found = {}
    for name, options in (("off", ["awp.rho=null"]), ("before", [RHO, "awp.warmup=1"]), ("on", [RHO])):
        module = build(*options, defense=defense, model="resnet_small", base=base)
        monkeypatch.setattr(type(module), "steps_per_epoch", property(lambda self: 4))
        module.steps_done = 3
        found[name] = updated(module, *images())
    for off, before, on in zip(*found.values(), strict=True):
        assert all(torch.equal(off[k], before[k]) for k in off)
        assert not any(torch.equal(off[k], on[k]) for k in off if off[k].dim() == 4 and off[k].abs().max() > 0)


@pytest.mark.parametrize("rho", ["null", "0"])
def test_without_rho_it_is_off(rho):
    module = build(f"awp.rho={rho}", defense="none")
    assert module.awp is None
    assert not module.perturbs


@pytest.mark.parametrize("override", ["awp.rho=-0.1", "awp.warmup=-1", "awp.rho=far", "awp.warmup=late"])
def test_bad_values_are_one_line(override):
    with pytest.raises(UserError) as caught:
        build("awp.rho=0.01", override, defense="none")
    assert override.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    values = {"rho": 0.01, "warmup": 0.0}
    key, value = override.removeprefix("awp.").split("=")
    with pytest.raises(UserError, match=f"awp.{key}"):
        AWP(**values | {key: float(value) if value.startswith("-") else value})


def test_it_is_off_unless_asked_for():
    assert build(defense="none").awp is None
    assert build(RHO, defense="none").awp.rho == 0.05


def test_a_warmup_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"awp.warmup needs awp.rho"):
        build("awp.warmup=1", defense="none")
