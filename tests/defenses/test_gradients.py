"""Gradients, steps that are called off, and whole training steps against hand-written loops."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from tests import conftest
from torch import nn

from redoubt.build import build_module
from redoubt.config import compose
from redoubt.data import Batch
from redoubt.defenses import gradients as grad
from redoubt.defenses.gradients import LossScale, Share
from redoubt.errors import UserError
from redoubt.rng import generator


@functools.cache
def composed(*overrides):
    return conftest.composed("data=digits", "schedule=constant", "trainer=cpu", *overrides)


def build(*overrides, defense="none", model="cnn_small", base="at"):
    axes = [f"defense={defense}", f"base={base}", f"model={model}"]
    return build_module(composed(*axes, *overrides)).train()


def images(b=7, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x, noise = (torch.rand(b, 3, 16, 16, generator=g, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), (x + 0.2 * (noise - 0.5)).clamp(0, 1).to(dtype), torch.randint(10, (b,), generator=g)


def outer(base, net, x, adv, y, sides=None, clean=None, logits=None):
    """The published loss, by hand (methods 1 to 4)."""
    if base in ("trades", "mart") and clean is None:
        clean = net(x)
    logits = net(adv) if logits is None else logits
    if base in ("standard", "at"):
        return F.cross_entropy(logits, y)
    p, q = clean.softmax(1), logits.softmax(1)
    if base == "trades":
        return F.cross_entropy(clean, y) + 6 * (p * (p.log() - q.log())).sum(1).mean()
    rows = torch.arange(len(y))
    others = q.masked_fill(F.one_hot(y, 10).bool(), -1).amax(1)
    weight = 1.0000001 - p[rows, y]
    kl = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return F.cross_entropy(logits, y) - (1.0001 - others + 1e-12).log().mean() + 5 * (kl * weight).mean()


# ---- shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("first", [0, 4])
def test_split_covers_every_row_once(count, parts, first):
    pieces = list(Share(first, count, 100).split(parts))
    rows = [i for part, _ in pieces for i in range(count)[part]]
    assert rows == list(range(count))
    assert len(pieces) == max(1, min(parts, count // 2))  # BatchNorm cannot normalise a single row
    for part, piece in pieces:
        assert piece == Share(first + part.start, part.stop - part.start, 100)
    sizes = [piece.count for _, piece in pieces]
    assert max(sizes) - min(sizes) <= 1


# ---- differentiation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["at", "trades", "mart"])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
@pytest.mark.parametrize("scale", [None, 2.0**14, 0.25])
def test_micro_batches_and_loss_scale_leave_the_gradient(base, accumulate, scale):
    """Seven rows in two, three or seven pieces against one plain backward."""
    module, (x, adv, y) = build(f"trainer.accumulate={accumulate}", base=base), images()
    if scale is not None:
        module.scale = LossScale(torch.device("cpu"), start=scale)
    params = list(module.parameters())
    (found,) = module.gradients(lambda *b: [module.loss(*b)], [params], x, adv, y)
    net = copy.deepcopy(module.net)
    outer(base, net, x, adv, y).backward()
    for g, p in zip(found, net.parameters(), strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in params)


def test_a_share_of_the_global_batch_weighs_by_rows():
    """Two ranks' gradients sum to the whole batch's."""
    module, (x, adv, y) = build(), images()
    params = list(module.parameters())
    (whole,) = module.gradients(lambda *b: [module.loss(*b)], [params], x, adv, y)
    parts = []
    for a, b in ((0, 3), (3, 7)):
        module.share = Share(a, b - a, 7)
        parts += module.gradients(lambda *r: [module.loss(*r)], [params], x[a:b], adv[a:b], y[a:b])
    for w, one, two in zip(whole, *parts, strict=True):
        torch.testing.assert_close(one + two, w, rtol=1e-5, atol=1e-6)


def test_several_losses_each_with_its_own_parameters():
    a, b, c = (nn.Parameter(torch.tensor([v])) for v in (2.0, 3.0, 5.0))
    losses = [(a * b).sum(), (b * b * a).sum()]
    found = grad.differentiate(losses, [[a, c], [b]], 0.5, None)
    assert found[0][0].item() == 1.5
    assert found[0][1] is None
    assert found[1][0].item() == pytest.approx(6.0)


def test_unreached_parameters_stay_none_through_micro_batches():
    module, (x, adv, y) = build("trainer.accumulate=3"), images()
    lost = nn.Parameter(torch.ones(2))
    (found,) = module.gradients(lambda *b: [module.loss(*b)], [[*module.parameters(), lost]], x, adv, y)
    assert found[-1] is None
    assert all(g is not None for g in found[:-1])


def test_a_parameter_that_only_a_later_micro_batch_reaches():
    """As a branch that is taken only where an example asks for it."""
    a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))
    first = grad.differentiate([2 * a], [[a, b]], 0.5, None)
    second = grad.differentiate([3 * a + 4 * b], [[a, b]], 0.5, None)
    ((to_a, to_b),) = grad.add(grad.add(None, first), second)
    assert to_a == 2.5
    assert to_b is not None
    assert to_b == 2.0


def test_loss_scale_halves_and_doubles():
    scale = LossScale(torch.device("cpu"), start=64.0, interval=3)
    seen = []
    for overflow in (1, 0, 0, 1, 0, 0, 0, 0, 0, 0):
        scale.update(torch.tensor(float(overflow)))
        seen.append(scale.scale.item())
    assert seen == [32, 32, 32, 16, 16, 16, 32, 32, 32, 64]
    other = LossScale(torch.device("cpu"))
    other.load_state_dict(scale.state_dict())
    assert other.scale == 64


# ---- one step of the optimizer ---------------------------------------------------------------------------


def plain_sgd(net, lr=0.1, momentum=0.9, weight_decay=5e-4, **more):
    return torch.optim.SGD(
        net.parameters(),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        fused=False,
        foreach=False,
        **more,
    )


SGD = ["optimizer.lr=0.1", "optimizer.momentum=0.9", "optimizer.weight_decay=5e-4"]


def drawn(params, seed, factor=1.0):
    g = torch.Generator().manual_seed(seed)
    return [factor * torch.randn(p.shape, generator=g) for p in params]


@pytest.mark.parametrize("nesterov", [False, True])
def test_step_is_torch_s_sgd(nesterov):
    module = build(*SGD, f"optimizer.nesterov={str(nesterov).lower()}")
    net = copy.deepcopy(module.net)
    (optimizer,), plain = module.configure_optimizers(), plain_sgd(net, nesterov=nesterov)
    params = list(module.parameters())
    for seed in range(4):
        gradient = drawn(params, seed)
        for p, g in zip(net.parameters(), gradient, strict=True):
            p.grad = g.clone()
        plain.step()
        module.step((optimizer, params, gradient))
        for p, q in zip(params, net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                optimizer.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"], rtol=1e-5, atol=1e-6
            )
        assert all(p.grad is None for p in params)


@pytest.mark.parametrize("clip", [0.01, 1.0, 1e6])
def test_clip_is_torch_s_clip_grad_norm(clip):
    module = build(*SGD, f"optimizer.clip={clip}")
    net = copy.deepcopy(module.net)
    (optimizer,), plain = module.configure_optimizers(), plain_sgd(net)
    params, gradient = list(module.parameters()), drawn(list(module.parameters()), 0)
    for p, g in zip(net.parameters(), gradient, strict=True):
        p.grad = g.clone()
    norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
    plain.step()
    module.step((optimizer, params, gradient))
    for p, q in zip(params, net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert module.tally.means()["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("clip", ["null", "1.0"])
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_a_step_that_is_not_finite_is_called_off_and_all_after_it(value, where, clip, optimizer_name):
    module, (x, adv, y) = build(f"optimizer={optimizer_name}", f"optimizer.clip={clip}"), images()
    (optimizer,), params = module.configure_optimizers(), list(module.parameters())

    def step(factor):
        def losses(*b):
            loss = module.loss(*b)
            return [loss * factor if where == "gradient" else loss]

        if where == "loss":
            objective, module.objective = module.objective, copy.copy(module.objective)
            outer_of = objective.outer
            module.objective.outer = lambda *a: {k: v * factor for k, v in outer_of(*a).items()}
        (gradient,) = module.gradients(losses, [params], x, adv, y)
        module.step((optimizer, params, gradient))
        if where == "loss":
            module.objective = objective

    step(1.0)
    assert module.watch.bad == 0
    before = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    for factor in (value, 1.0, 1.0):
        step(factor)
        assert module.watch.bad == 1
        for p, q, s in zip(params, before, state, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(v, s[k]) for k, v in optimizer.state[p].items())
    with pytest.raises(UserError, match="not finite"):
        module.watch.look(3, now=True)


def test_a_scaled_step_that_overflows_halves_the_scale_and_is_forgiven():
    module = build(*SGD)
    module.scale = LossScale(torch.device("cpu"), start=1024.0)
    (optimizer,), params = module.configure_optimizers(), list(module.parameters())
    module.step((optimizer, params, drawn(params, 0)))
    before = [p.detach().clone() for p in params]
    module.step((optimizer, params, drawn(params, 1, float("inf"))))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert module.scale.scale == 512
    assert module.watch.bad == 0
    module.step((optimizer, params, drawn(params, 2)))
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_an_overflow_in_the_first_step_leaves_no_trace_in_the_momentum(monkeypatch):
    """float16 begins with a scale of 65,536: the very first step often overflows. torch's fused SGD makes the
    momentum by empty_like in the first step, and fills it only if that step is not called off."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **kw: empty_like(t, **kw).fill_(1e3))
    module = build(*SGD)
    net = copy.deepcopy(module.net)
    module.scale = LossScale(torch.device("cpu"), start=1024.0)
    (optimizer,), plain, params = module.configure_optimizers(), plain_sgd(net), list(module.parameters())
    module.step((optimizer, params, drawn(params, 0, float("inf"))))
    for seed in (1, 2):
        gradient = drawn(params, seed)
        for p, g in zip(net.parameters(), gradient, strict=True):
            p.grad = g.clone()
        plain.step()
        module.step((optimizer, params, gradient))
    for p, q in zip(params, net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_an_optimizer_without_fused_step_is_refused():
    with pytest.raises(UserError, match="fused"):
        build("+optimizer.fused=false").configure_optimizers()


# ---- whole training steps --------------------------------------------------------------------------------


def hand_pgd(loss_of, x, start, inner):
    adv = start
    for _ in range(inner.steps):
        point = adv.detach().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(point), point)
        adv = (adv + inner.step_size * g.sign()).detach()
        adv = (x + (adv - x).clamp(-inner.eps, inner.eps)).clamp(0, 1)
    return adv


def hand_fsr(net, x, u):
    """ResNetSmall with the layer written out (methods F.2, F.3); u: uniform numbers [B, 2, ...] or None."""
    made = net.layer4
    f = F.relu(net.bn1(net.conv1(x)))
    f = made.inner(net.layer3(net.layer2(net.layer1(f))))
    s = made.separation(f).sigmoid()
    if u is None:
        u = torch.full((len(x), 2, *f.shape[1:]), 0.5)
    g = -torch.log(-torch.log(u + 1e-8) + 1e-8)
    both = torch.stack(((s + 1e-8).log() + g[:, 0], (1 - s + 1e-8).log() + g[:, 1]))
    m = (both / (0.1 + 1e-8)).softmax(0)[0]
    plus, minus = m * f, (1 - m) * f
    tilde = minus + (1 - m) * made.recalibration(minus)
    return net.fc((plus + tilde).mean((2, 3))), [made.head(v.mean((2, 3))) for v in (plus, minus, tilde)]


def hand_step(module, net, optimizer, base, batch, step, seed=0):
    x, y = batch.x, batch.y
    fsr = hasattr(module, "layers")

    def numbers(purpose):
        if not fsr:
            return None
        return torch.rand(len(x), 2, 128, 2, 2, generator=generator(seed, f"gumbel/{purpose}", step, 0))

    def forward(images, purpose=None):
        if not fsr:
            return net(images), None
        return hand_fsr(net, images, None if purpose is None else numbers(purpose))

    net.eval()
    adv = x
    if base != "standard":
        start = module.inner.start_point(x, generator=generator(seed, "inner", step))
        if base == "trades":
            p = forward(x)[0].softmax(1).detach()
            adv = hand_pgd(lambda a: (p * (p.log() - forward(a)[0].log_softmax(1))).sum(), x, start, module.inner)
        else:
            adv = hand_pgd(lambda a: F.cross_entropy(forward(a)[0], y, reduction="sum"), x, start, module.inner)
    net.train()
    clean = forward(x, "clean")[0] if base in ("trades", "mart") else None
    logits, sides = forward(adv, "adv")
    if base == "trades" and module.objective.clean_forwards == 2:  # as its authors have it: the KL is to the second
        p = forward(x, "clean")[0].softmax(1)
        loss = F.cross_entropy(clean, y) + 6 * (p * (p.log() - logits.log_softmax(1))).sum(1).mean()
    else:
        loss = outer(base, net, x, adv, y, clean=clean, logits=logits)
    if fsr:
        wrong = logits.masked_fill(F.one_hot(y, 10).bool(), -torch.inf).argmax(1)
        plus, minus, tilde = sides
        loss = loss + F.cross_entropy(plus, y) + F.cross_entropy(minus, wrong) + F.cross_entropy(tilde, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Loader(list):
    """Batches as they are, with the loader's place that Lightning saves."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("base", ["standard", "at", "trades", "trades twice", "mart"])
@pytest.mark.parametrize(
    ("defense", "model"), [("none", "cnn_small"), ("none", "resnet_small"), ("fsr", "resnet_small")]
)
def test_training_is_the_hand_written_loop(base, defense, model, tmp_path):
    """Two steps by Lightning's Trainer; in float64, so that no sign of a gradient is a matter of rounding."""
    options = [] if base == "standard" else ["inner.steps=2", "inner.step=0.5"]
    base, twice = base.split()[0], base.endswith("twice")
    options += ["base.clean_forwards=2"] * twice
    module = build(*SGD, *options, defense=defense, model=model, base=base).double()
    net = copy.deepcopy(module.net)
    plain = plain_sgd(net)
    batches = [Batch(x, y, 0, len(x)) for x, _, y in (images(5, seed, torch.float64) for seed in (0, 1))]
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=Loader(batches))
    assert module.steps_done == 2
    for step, batch in enumerate(batches):
        hand_step(module, net, plain, base, batch, step)
    wanted = net.state_dict()
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("defense", ["none", "fsr", "afd", "cure"])
def test_two_clean_forwards_move_the_running_statistics_of_trades_own_code(defense, accumulate):
    """methods 3 and 13.4: clean, crafted, clean; the stem's statistics in closed form, the weights as with one."""
    more = ["inner.steps=0", f"trainer.accumulate={accumulate}", "model.widths=[4,4,8,8]"]
    more += ["defense.rate=0"] * (defense == "cure")
    found = {}
    for forwards in ("null", "2"):
        options = [*more, f"base.clean_forwards={forwards}"]
        module = build(*options, defense=defense, base="trades", model="resnet_small").double()
        conv, bn, optimizers = (
            copy.deepcopy(module.net.conv1),
            copy.deepcopy(module.net.bn1),
            module.configure_optimizers(),
        )
        module.raw_optimizers = lambda made=optimizers: made
        batch = images(8, dtype=torch.float64)
        module.share = Share(0, 8, 8)
        module.update(*batch)
        x, adv, _ = (part.chunk(accumulate) for part in batch)
        with torch.no_grad():
            for a, b in zip(x, adv, strict=True):
                for seen in (a, b, a) if forwards == "2" else (a, b):
                    out = conv(seen).transpose(0, 1).flatten(1)
                    bn.running_mean = 0.9 * bn.running_mean + 0.1 * out.mean(1)
                    bn.running_var = 0.9 * bn.running_var + 0.1 * out.var(1)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(module.net.get_buffer(f"bn1.{name}"), bn.get_buffer(name), msg=name)
        found[forwards] = module
    for a, b in zip(found["null"].parameters(), found["2"].parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_and_clip_reach_the_step(tmp_path):
    """Momentum 0 and decay 0: the first step moves the weights by lr x factor x the clip's norm."""
    module = build_module(
        compose(
            [
                "data=digits", "model=cnn_small", "base=standard", "trainer=cpu", "optimizer.lr=0.5",
                "optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.clip=0.001",
                "schedule.milestones=[1]", "schedule.factors=[0.1]",
            ]
        )
    )  # fmt: skip
    before = copy.deepcopy(module.net)
    (optimizer,) = module.configure_optimizers()
    module.raw_optimizers = lambda: [optimizer]
    x, _, y = images()
    module.training_step(Batch(x, y, 0, len(x)), 0)
    moved = [p - q for p, q in zip(module.net.parameters(), before.parameters(), strict=True)]
    norm = torch.cat([m.flatten() for m in moved]).norm().item()
    assert norm == pytest.approx(0.5 * 0.1 * 0.001, rel=1e-2)


def test_crafting_in_micro_batches_is_crafting_the_whole():
    """A net without BatchNorm: the same start for every row, and the same weights after the step."""
    found = []
    for accumulate in (1, 3):
        module = build(f"trainer.accumulate={accumulate}", "inner.steps=2", base="trades").double()
        (optimizer,) = module.configure_optimizers()
        module.raw_optimizers = lambda made=optimizer: [made]
        x, _, y = images(dtype=torch.float64)
        module.training_step(Batch(x, y, 0, len(x)), 0)
        found.append(module.net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
