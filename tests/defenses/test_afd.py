"""AFD against methods.md 7: NumPy for the losses, plain autograd for the gradients, a hand-written training loop."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from tests import conftest
from tests.defenses.test_gradients import Loader, hand_pgd, images
from torch import nn

from redoubt.build import build_module
from redoubt.config import resolve
from redoubt.data import Batch
from redoubt.defenses.gradients import LossScale
from redoubt.errors import UserError
from redoubt.rng import generator

WIDTHS = "model.widths=[4,4,8,8]"
GREEK = ("defense.alpha=0.3", "defense.beta=0.7", "defense.gamma=5")
SET_LATER = ("defense.", "base.", "inner.", "optimizer.", "trainer.", "awp.", "evaluation.")
BASES = ["at", "trades", "mart"]


@functools.cache
def composed(*overrides):
    return resolve(conftest.composed(*overrides))


def build(*overrides, defense="afd", model="cnn_small", base="at", data="digits"):
    """A fresh module in training mode; small ones are built once and copied."""
    axes = [f"defense={defense}", f"base={base}", f"model={model}", f"data={data}", "trainer=cpu"]
    if model not in ("cnn_small", "resnet_small"):
        return build_module(composed(*axes, *overrides)).train()
    return copy.deepcopy(built(*axes, WIDTHS, *overrides))


@functools.cache
def built(*overrides):
    """Composing is what takes long: overrides that nothing else follows are set on a cell that is composed once."""
    cfg = copy.deepcopy(composed(*(o for o in overrides if not o.startswith(SET_LATER))))
    for override in overrides:
        if override.startswith(SET_LATER):
            key, _, value = override.partition("=")
            OmegaConf.update(cfg, key, yaml.safe_load(value))
    return build_module(cfg).train()


def shaken(net, seed=5, by=0.1):
    """Every weight moved, BatchNorm's statistics too; no feature is all zeros, which has no angle."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            if t.is_floating_point():
                t.add_(by * (torch.rand(t.shape, generator=g, dtype=torch.float64) - 0.5).to(t.dtype))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.bias.add_(2 * by)
    return net


def fine_tuning(*overrides, dtype=torch.float64, **axes):
    """A module in the middle of training: the teacher as it began, every weight of the student elsewhere."""
    module = build(*GREEK, *overrides, **axes).to(dtype)
    teacher = shaken(build(defense="none", **axes).net.to(dtype), 1)
    module.start_from(teacher)
    shaken(module.net)
    shaken(module.head.d1, 6, by=1.0), shaken(module.head.d2, 7, by=1.0)
    if module.ema is not None:
        module.ema.restart()
    return module, Hand(module, teacher)


class Hand(nn.Module):
    """The student of methods 7.1 as a plain net and four tensors, the teacher of 7.2 beside it; heads called fc."""

    def __init__(self, module, teacher):
        super().__init__()
        state = {k: v.clone() for k, v in module.net.state_dict().items()}
        self.d1, self.d2, self.w, self.b = (
            nn.Parameter(state.pop(f"fc.{name}")) for name in ("d1.weight", "d2.weight", "linear.weight", "linear.bias")
        )
        self.phi, self.teacher = copy.deepcopy(teacher), copy.deepcopy(teacher).eval()
        self.phi.load_state_dict(state, strict=False)
        del self.phi.fc
        self.train()

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def sides(self, x):
        f = self.phi.forward_features(x).mean((2, 3))
        f1, f2 = f @ self.d1.T, f.detach() @ self.d2.T
        return f1, f2, f1 @ self.w.T + self.b, f2 @ self.w.T + self.b

    def taught(self, x):
        with torch.no_grad():
            return self.teacher.forward_features(x).mean((2, 3))

    def named(self):
        """Its parameters by the names that the module's net has."""
        own = {"fc.d1.weight": self.d1, "fc.d2.weight": self.d2, "fc.linear.weight": self.w, "fc.linear.bias": self.b}
        return dict(self.phi.named_parameters()) | own

    def state(self):
        """Parameters and buffers, as ``module.net.state_dict()``."""
        return {k: v.detach() for k, v in (*self.named().items(), *self.phi.named_buffers())}


def second_best(z1, y):
    """y' of methods 7.4: the prediction where it is wrong, else the runner-up."""
    order = z1.argsort(dim=1, descending=True)
    return torch.where(order[:, 0] == y, order[:, 1], order[:, 0])


def angle(a, b):
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def robust(base, z, y, clean, smooth=0.0):
    """The base's loss (methods 2 to 4) with smoothed true labels."""
    k, rows = z.shape[1], torch.arange(len(y))
    target = torch.full_like(z, smooth / k)
    target[rows, y] += 1 - smooth

    def ce(logits):
        return -(target * logits.log_softmax(1)).sum(1).mean()

    if base == "at":
        return ce(z)
    p, q = clean.softmax(1), z.softmax(1)
    if base == "trades":
        return ce(clean) + 6 * (p * (p.log() - q.log())).sum(1).mean()
    others = q.masked_fill(F.one_hot(y, k).bool(), -1).amax(1)
    kl = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return ce(z) - (1.0001 - others + 1e-12).log().mean() + 5 * (kl * (1.0000001 - p[rows, y])).mean()


def hand_losses(hand, x, adv, y, base, smooth=0.0, greek=(0.3, 0.7, 5.0)):
    """L_neg, L_cos, L_rob of one training forward."""
    alpha, beta, gamma = greek
    clean = hand.sides(x)[2] if base in ("trades", "mart") else None
    f1, f2, z1, z2 = hand.sides(adv)
    neg = -alpha * z2.log_softmax(1)[torch.arange(len(y)), second_best(z1, y)].mean()
    cos = beta * angle(f1, f2).mean()
    return neg, cos, robust(base, z1, y, clean, smooth) + gamma * (1 - angle(f1, hand.taught(x)).mean())


def hand_gradients(hand, losses):
    """For each loss its gradient by parameter, zero where it does not reach."""
    named = hand.named()
    found = [torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True) for loss in losses]
    return [
        {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gs, strict=True)}
        for gs in found
    ]


def table(neg, cos, rob, joint):
    """What each optimizer steps along (methods 7.5): one dictionary of gradients by name per optimizer."""
    head = ("fc.linear.weight", "fc.linear.bias")
    rest = [n for n in neg if n != "fc.d2.weight"]
    d2 = {"fc.d2.weight": neg["fc.d2.weight"]}
    if joint:
        return [d2 | {n: rob[n] if n in head else cos[n] + rob[n] for n in rest}]
    second = {n: neg[n] if n in head else cos[n] for n in rest}
    return [d2, second, {n: second[n] + rob[n] for n in rest}]


def kept_optimizers(module):
    """The module's optimizers without a trainer."""
    optimizers = module.configure_optimizers()
    module.raw_optimizers = lambda: optimizers
    return optimizers


def stepped_along(module):
    """For each optimizer the gradients that it steps along, by name, noted as it steps."""
    names = {p: name for name, p in module.net.named_parameters()}
    found = []

    def note(optimizer, args, kwargs):
        group = [p for g in optimizer.param_groups for p in g["params"]]
        found.append((optimizer, {names[p]: p.grad.clone() for p in group if p.grad is not None}))
        outside = [n for p, n in names.items() if p.grad is not None and not any(p is q for q in group)]
        assert not outside

    for optimizer in kept_optimizers(module):
        optimizer.register_step_pre_hook(note)
    return found


def close(found, wanted, **tolerance):
    """Two dictionaries of tensors."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# Gradients go through float32.
LIKE_FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


# ---- the net ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cnn_small", "resnet_small"])
@pytest.mark.parametrize("started", [False, True])
def test_it_begins_as_the_natural_model(model, started):
    module = build(model=model).double()
    plain = build(defense="none", model=model).net.double()
    if started:
        shaken(plain, 3)
        module.start_from(plain)
    x = images(4, dtype=torch.float64)[0]
    module.eval(), plain.eval()
    with torch.no_grad():
        z1, (f1, f2, z2) = module.run(x, True)
        wanted = plain(x)
        torch.testing.assert_close(z1, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(module.logits(x), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(module.teacher.eval()(x), wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(z2, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(angle(f1, f2), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(module.teach(x), f1, rtol=0, atol=1e-12)
    for layer in (module.head.d1, module.head.d2):
        assert torch.equal(layer.weight, torch.eye(8, dtype=torch.float64))
        assert layer.bias is None


def test_the_average_begins_where_the_student_begins():
    module, plain = build(), shaken(build(defense="none").net, 3)
    module.start_from(plain)
    for name, value in module.net.state_dict().items():
        assert torch.equal(module.ema.average[name], value)


def test_weights_of_another_net_are_refused():
    with pytest.raises(UserError, match=r"defense\.pretrained"):
        build().start_from(build(defense="none", model="resnet_small").net)


def test_sides_are_the_hand_written_forward_and_leave_nothing_behind():
    module, hand = fine_tuning(model="resnet_small")
    x = images(4, dtype=torch.float64)[0]
    z1, sides = module.run(x, module.draw_noise(x, "adv"))
    f1, f2, wanted, z2 = hand.sides(x)
    for a, b in zip((z1, *sides), (wanted, f1, f2, z2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert module.head.sides is None
    z1, sides = module.run(x)
    assert len(sides) == 0
    torch.testing.assert_close(module.logits(x), z1)
    assert isinstance(module.logits(x), torch.Tensor)


def test_neg_has_no_gradient_but_in_d2_and_the_classifier():
    module, _ = fine_tuning()
    x, adv, y = images(dtype=torch.float64)
    neg = module.terms(x, adv, y)["neg"]
    named = dict(module.net.named_parameters())
    found = torch.autograd.grad(neg, list(named.values()), allow_unused=True)
    reached = {name for name, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}
    assert reached == {"fc.d2.weight", "fc.linear.weight", "fc.linear.bias"}


def test_the_cosine_has_no_gradient_in_d2_and_the_classifier():
    module, _ = fine_tuning()
    named = dict(module.net.named_parameters())
    found = torch.autograd.grad(
        module.terms(*images(dtype=torch.float64))["cos"], list(named.values()), allow_unused=True
    )
    reached = {name for name, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}
    assert reached == set(named) - {"fc.d2.weight", "fc.linear.weight", "fc.linear.bias"}


@pytest.mark.parametrize("weights", ["student", "ema"])
@pytest.mark.parametrize("model", ["cnn_small", "resnet_small"])
def test_deployed_is_the_plain_net_with_the_merged_classifier(model, weights):
    module, _ = fine_tuning(f"evaluation.weights={weights}", model=model, dtype=torch.float32)
    for tensor in module.ema.average.values():
        tensor.mul_(1.05)
    plain = build(defense="none", model=model).net
    with module.evaluated_weights():
        w, d1 = (layer.weight.detach().double() for layer in (module.head.linear, module.head.d1))
        bias = module.head.linear.bias.detach().clone()
        x = images(5)[0]
        module.eval()
        with torch.no_grad():
            wanted = module.logits(x)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    net = module.deployed()
    assert not net.training
    assert type(net.fc) is nn.Linear
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(net.fc.weight.double(), w @ d1, rtol=1e-6, atol=1e-7)
    assert torch.equal(net.fc.bias, bias)
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    load = copy.deepcopy(plain)
    load.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    ("model", "trained", "merged"), [("resnet18", 11_698_250, 11_173_962), ("wrn34_10", 46_979_674, 46_160_474)]
)
def test_parameter_counts(model, trained, merged):
    with torch.device("meta"):
        module = build(model=model, data="cifar10")
        net = module.deployed()
    assert sum(p.numel() for p in module.net.parameters()) == trained
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == trained
    assert sum(p.numel() for p in net.parameters()) == merged


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("vgg16", (), marks=pytest.mark.slow),
        pytest.param("preact_resnet18", (), marks=pytest.mark.slow),
        ("torchvision", ("model.name=shufflenet_v2_x0_5",)),
        pytest.param("torchvision", ("model.name=mobilenet_v3_small",), marks=pytest.mark.slow),
    ],
)
def test_other_nets(model, more):
    """Heads of several layers, and other names of the last one."""
    module = build(*more, model=model)
    plain = build(*more, defense="none", model=model)
    module.start_from(plain.net)
    x, adv, y = images(2)
    terms = module.terms(x, adv, y)
    assert set(terms) == {"ce", "neg", "cos", "align"}
    assert all(t.shape == () and t.isfinite() for t in terms.values())
    with torch.no_grad():
        shaken(module.head, by=0.02)
    module.eval()
    module.ema.restart()
    net = module.deployed()
    assert list(net.state_dict()) == list(plain.net.state_dict())
    with torch.no_grad():
        wanted = module.logits(x)
        assert wanted.shape == (2, 10)
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5)
        assert (plain.net.eval()(x) - wanted).abs().max() > 1e-4


# ---- losses ----------------------------------------------------------------------------------------------


def naive_log_softmax(row):
    shifted = row - row.max()
    return shifted - np.log(sum(np.exp(v) for v in shifted))


def naive_ce(z, y, s=0.0):
    total = 0.0
    for row, label in zip(z, y, strict=True):
        log_p = naive_log_softmax(row)
        total -= sum(((1 - s) * (i == label) + s / len(row)) * log_p[i] for i in range(len(row)))
    return total / len(z)


def naive_kl(a, b, tiny=0.0):
    p, q = np.exp(naive_log_softmax(a)), np.exp(naive_log_softmax(b))
    return sum(u * (np.log(u) - np.log(v + tiny)) for u, v in zip(p, q, strict=True))


def naive_cosines(a, b):
    return [sum(u * v) / np.sqrt(sum(u * u)) / np.sqrt(sum(v * v)) for u, v in zip(a, b, strict=True)]


def naive_terms(base, smooth, y, f1, f2, z1, z2, clean, taught):
    wrong = []
    for row, label in zip(z1, y, strict=True):
        order = np.argsort(-row)
        wrong.append(order[0] if order[0] != label else order[1])
    assert any(np.argmax(row) == label for row, label in zip(z1, y, strict=True))
    assert any(np.argmax(row) != label for row, label in zip(z1, y, strict=True))
    terms = {
        "neg": 0.3 * naive_ce(z2, wrong),
        "cos": 0.7 * np.mean(naive_cosines(f1, f2)),
        "align": 5.0 * (1 - np.mean(naive_cosines(f1, taught))),
        "ce": naive_ce(clean if base == "trades" else z1, y, smooth),
    }
    if base == "trades":
        terms["kl"] = 6 * np.mean([naive_kl(a, b) for a, b in zip(clean, z1, strict=True)])
    if base == "mart":
        p, q = ([np.exp(naive_log_softmax(row)) for row in z] for z in (clean, z1))
        others = [max(v for i, v in enumerate(row) if i != label) for row, label in zip(q, y, strict=True)]
        terms["margin"] = -np.mean([np.log(1.0001 - v + 1e-12) for v in others])
        weighted = [
            naive_kl(a, b, 1e-12) * (1.0000001 - row[label]) for a, b, row, label in zip(clean, z1, p, y, strict=True)
        ]
        terms["kl"] = 5 * np.mean(weighted)
    return terms


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("smooth", [0.0, 0.3])
def test_terms_are_the_numpy_transcription(base, smooth):
    """Labels are smoothed on the true class of the base's cross-entropy only."""
    module, hand = fine_tuning(f"base.label_smoothing={smooth}", model="resnet_small", base=base)
    x, adv, y = images(12, dtype=torch.float64)
    with torch.no_grad():
        clean = hand.sides(x)[2]
        f1, f2, z1, z2 = hand.sides(adv)
        y[:6] = z1.argmax(1)[:6]
        y[6:9] = z2.argmax(1)[6:9]
    wanted = naive_terms(base, smooth, y.numpy(), *(t.numpy() for t in (f1, f2, z1, z2, clean, hand.taught(x))))
    assert not np.allclose(naive_ce(z2.numpy(), second_best(z1, y).numpy(), 0.3), wanted["neg"] / 0.3)
    assert not torch.equal(second_best(z1, y), second_best(z2, y))
    found = module.terms(x, adv, y)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name
    assert module.tally.means()["accuracy_adv"] == pytest.approx((z1.argmax(1) == y).double().mean().item())


def test_the_logged_loss_is_the_sum():
    module, _ = fine_tuning()
    kept_optimizers(module)
    x, adv, y = images(dtype=torch.float64)
    wanted = {k: v.item() for k, v in module.terms(x, adv, y).items()}
    module.tally.sums.clear()
    module.update(x, adv, y)
    assert module.tally.sums["loss"][1] == len(y)
    found = module.tally.means()
    assert found["loss"] == pytest.approx(sum(wanted.values()), rel=1e-6)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6)


def test_y_prime_is_that_of_z1():
    """A wrong prediction is y' itself; a right one gives way to the runner-up of z1, not of z2."""
    module, _ = fine_tuning()
    z1 = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.5, 9.0]], dtype=torch.float64)
    z2 = torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0], [2.0, 0.0, 1.0]], dtype=torch.float64)
    f = torch.rand(3, 8, dtype=torch.float64)
    module.run = lambda x, noise=None: (z1, (f, f, z2))
    found = module.terms(images(3, dtype=torch.float64)[0], torch.zeros(3, 3, 16, 16), torch.tensor([0, 2, 2]))
    log_p = z2.log_softmax(1)
    assert found["neg"].item() == pytest.approx(-0.3 * (log_p[0, 1] + log_p[1, 0] + log_p[2, 1]).item() / 3)


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("update", ["accumulated", "joint"])
@pytest.mark.parametrize(("model", "accumulate"), [("cnn_small", 1), ("cnn_small", 2), ("resnet_small", 1)])
def test_each_optimizer_steps_along_its_row_of_the_table(base, update, model, accumulate):
    options = [f"defense.update={update}", f"trainer.accumulate={accumulate}"]
    module, hand = fine_tuning(*options, model=model, base=base)
    batch = images(dtype=torch.float64)
    gradients = hand_gradients(hand, hand_losses(hand, *batch, base))
    found = stepped_along(module)
    module.update(*batch)
    wanted = table(*gradients, joint=update == "joint")
    assert [optimizer for optimizer, _ in found] == module.raw_optimizers()
    for (_, along), gradient in zip(found, wanted, strict=True):
        close(along, gradient, **LIKE_FLOAT32)
        assert all(g.abs().max() > 0 for g in along.values())
    neg, cos, rob = gradients
    assert cos["fc.d2.weight"].abs().max() > 0.0  # and yet none of it is in the table
    assert neg["fc.d1.weight"].abs().max() == 0
    assert rob["fc.d2.weight"].abs().max() == 0


@pytest.mark.parametrize("update", ["accumulated", "joint"])
def test_each_optimizer_has_its_own_parameters(update):
    module = build(f"defense.update={update}")
    names = {p: name for name, p in module.named_parameters()}
    found = [{names[p] for g in o.param_groups for p in g["params"]} for o in module.configure_optimizers()]
    everything = {f"net.{name}" for name, _ in module.net.named_parameters()}
    d2 = {"net.fc.d2.weight"}
    assert found == ([everything] if update == "joint" else [d2, everything - d2, everything - d2])


@pytest.mark.parametrize("update", ["accumulated", "joint"])
def test_no_gradient_is_left_behind(update):
    module, _ = fine_tuning(f"defense.update={update}")
    kept_optimizers(module)
    module.update(*images(dtype=torch.float64))
    assert all(p.grad is None for p in module.parameters())


# ---- whole training steps --------------------------------------------------------------------------------


def hand_sgd(params):
    return torch.optim.SGD(params, lr=0.025, momentum=0.9, weight_decay=5e-4, fused=False, foreach=False)


class HandTraining:
    """Steps (a) to (g) of methods 7.5, with three torch.optim.SGD, or one for ``joint``."""

    def __init__(self, hand, inner, base="at", joint=False, clip=None):
        self.hand, self.inner, self.base, self.joint, self.clip = hand, inner, base, joint, clip
        self.named = hand.named()
        rest = [p for n, p in self.named.items() if n != "fc.d2.weight"]
        self.optimizers = (
            [hand_sgd([hand.d2, *rest])] if joint else [hand_sgd([hand.d2]), hand_sgd(rest), hand_sgd(rest)]
        )
        self.average = {k: v.clone() for k, v in hand.state().items() if v.is_floating_point()}

    def craft(self, x, y, step):
        hand, eps, g = self.hand.eval(), 0.2, generator(0, "inner", step)
        if self.base == "at":
            start = x + eps * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)
            assert start.min() < 0 or start.max() > 1
        else:
            start = x + 0.001 * torch.randn(x.shape, generator=g, dtype=x.dtype)
        p = hand.sides(x)[2].softmax(1).detach()

        def loss(a):
            log_q = hand.sides(a)[2].log_softmax(1)
            if self.base == "trades":
                return (p * (p.log() - log_q)).sum()
            return -log_q[torch.arange(len(y)), y].sum()

        adv = hand_pgd(loss, x, start, self.inner)
        assert (adv - x).abs().max() <= eps + 1e-12
        hand.train()
        return adv

    def step(self, x, y, step):
        adv = self.craft(x, y, step)
        gradients = hand_gradients(self.hand, hand_losses(self.hand, x, adv, y, self.base))
        for optimizer, along in zip(self.optimizers, table(*gradients, joint=self.joint), strict=True):
            optimizer.zero_grad()
            for name, g in along.items():
                self.named[name].grad = g.clone()
            if self.clip is not None:
                nn.utils.clip_grad_norm_([self.named[name] for name in along], self.clip)
            optimizer.step()
            optimizer.zero_grad()
        d = min(0.999, (step + 1) / (step + 10))
        live = self.hand.state()
        self.average = {k: d * v + (1 - d) * live[k] for k, v in self.average.items()}
        return adv


def fitted(module, batches, path):
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path,
    )  # fmt: skip
    trainer.fit(module, train_dataloaders=Loader(batches))
    assert module.steps_done == len(batches)


def batches_of(count=2, b=5):
    return [Batch(x, y, 0, len(x)) for x, _, y in (images(b, seed, torch.float64) for seed in range(count))]


class OldSGD:
    """SGD as PyTorch had it before 1.2, parameter by parameter: decay goes into the gradient in place."""

    def __init__(self, params, lr, momentum, decay):
        self.params, self.lr, self.momentum, self.decay = params, lr, momentum, decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self):
        for i, p in enumerate(self.params):
            p.grad += self.decay * p
            self.buffers[i] = self.momentum * self.buffers[i] + p.grad
            p -= self.lr * self.buffers[i]


@pytest.mark.parametrize(("base", "model"), [("at", "resnet_small"), ("trades", "cnn_small")])
def test_legacy_is_the_authors_loop_with_the_sgd_of_their_torch(base, model, tmp_path):
    """methods 7.5 and 13.1: gradients are zeroed once a batch and accumulate, each optimizer's decay among them."""
    options = ["inner.steps=1", "inner.step=0.5", "optimizer.weight_decay=0.2"]
    (module, hand), (other, _) = (
        fine_tuning(*options, f"defense.update={u}", model=model, base=base) for u in ("legacy", "accumulated")
    )
    loop, named = HandTraining(hand, module.inner, base), hand.named()
    rest = [p for p in named.values() if p is not hand.d2]
    first, second, third = (OldSGD(ps, 0.025, 0.9, 0.2) for ps in ([hand.d2], rest, rest))
    batches = batches_of(3)
    for step, batch in enumerate(batches):
        adv = loop.craft(batch.x, batch.y, step)
        gradients = hand_gradients(hand, hand_losses(hand, batch.x, adv, batch.y, base))
        for p in named.values():
            p.grad = torch.zeros_like(p)
        for along, optimizer in zip(gradients, (first, second, third), strict=True):
            for name, p in named.items():
                p.grad += along[name]
            optimizer.step()
    for made, path in ((module, tmp_path / "legacy"), (other, tmp_path / "accumulated")):
        fitted(made, batches, path)
    wanted = hand.state()
    close(module.net.state_dict(), wanted, **LIKE_FLOAT32)
    d2 = "fc.d2.weight"  # decays once either way, on features that decay more
    for name, value in other.net.state_dict().items():
        if name != d2 and value.is_floating_point() and name in named:
            assert (value - wanted[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    ("update", "base", "model", "clip"),
    [
        ("accumulated", "at", "resnet_small", None),
        ("accumulated", "at", "cnn_small", None),
        ("accumulated", "at", "cnn_small", 0.5),
        ("accumulated", "trades", "resnet_small", None),
        ("accumulated", "mart", "resnet_small", None),
        ("joint", "at", "resnet_small", None),
        ("joint", "at", "cnn_small", 0.5),
        ("joint", "trades", "cnn_small", None),
    ],
)
def test_training_is_the_hand_written_loop(update, base, model, clip, tmp_path):
    """Two steps by Lightning's Trainer: attack, gradients, momentum, weight decay, clipping and averages."""
    options = ["inner.steps=2", "inner.step=0.5", f"defense.update={update}"]
    options += [f"optimizer.clip={clip}"] if clip else []
    module, hand = fine_tuning(*options, model=model, base=base)
    loop = HandTraining(hand, module.inner, base, update == "joint", clip)
    assert module.inner.step_size == pytest.approx(0.5 * module.inner.eps)
    batches = batches_of()
    fitted(module, batches, tmp_path)
    for step, batch in enumerate(batches):
        loop.step(batch.x, batch.y, step)
    close(module.net.state_dict(), hand.state(), **LIKE_FLOAT32)
    close(module.ema.average, loop.average, **LIKE_FLOAT32)
    momenta = [{id(p): o.state[p]["momentum_buffer"] for p in o.state} for o in module.raw_optimizers()]
    named = dict(module.net.named_parameters())
    for found, optimizer in zip(momenta, loop.optimizers, strict=True):
        for name, p in loop.named.items():
            if p in optimizer.state:
                wanted = optimizer.state[p]["momentum_buffer"]
                torch.testing.assert_close(found.pop(id(named[name])), wanted, **LIKE_FLOAT32)
        assert not found


def test_the_average_follows_0_1_and_2_elevenths():
    """d = 0.1, 2/11, 3/12, 4/13, ... (methods 7.6), over parameters and BatchNorm's buffers."""
    module = build(model="resnet_small").double()
    module.ema.restart()
    for tensor in module.ema.average.values():
        tensor.zero_()
    share = 0.0  # of the live weights, which stay, in the average
    for d in (0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14):
        module.after_step()
        share = d * share + 1 - d
        live = {k: v for k, v in module.net.state_dict().items() if v.is_floating_point()}
        close(module.ema.average, {k: share * v for k, v in live.items()}, rtol=1e-6, atol=1e-9)


# ---- teacher and BatchNorm -------------------------------------------------------------------------------


def test_the_teacher_is_frozen_and_sees_clean_images_in_eval_mode(tmp_path):
    module, hand = fine_tuning("inner.steps=1", "inner.step=1", model="resnet_small")
    before = {k: v.clone() for k, v in module.teacher.state_dict().items()}
    close(before, hand.teacher.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in module.teacher.parameters())
    seen, batches = [], batches_of(3)

    def note(stem, args):
        modes = {m.training for m in module.teacher.modules()}
        seen.append((modes, args[0].clone(), torch.is_grad_enabled()))

    module.teacher.conv1.register_forward_pre_hook(note)
    fitted(module, batches, tmp_path)
    assert len(seen) == 3
    for (modes, x, gradient), batch in zip(seen, batches, strict=True):
        assert modes == {False}
        assert torch.equal(x, batch.x)
        assert not gradient
    assert all(torch.equal(v, before[k]) for k, v in module.teacher.state_dict().items())


def test_batchnorm_moves_by_the_adversarial_batch_only():
    module, hand = fine_tuning(model="resnet_small")
    kept_optimizers(module)
    x, adv, y = images(dtype=torch.float64)
    before = {k: v.clone() for k, v in module.net.named_buffers()}
    module.update(x, adv, y)
    with torch.no_grad():
        hand.sides(adv)
    close(dict(module.net.named_buffers()), dict(hand.phi.named_buffers()), rtol=1e-12, atol=1e-12)
    assert not torch.equal(module.net.bn1.running_mean, before["bn1.running_mean"])


def test_the_attack_moves_nothing_and_sees_z1():
    module, hand = fine_tuning("inner.steps=2", "inner.step=0.5", model="resnet_small")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x, _, y = images(5, dtype=torch.float64)
    found = module.craft(x, y)
    torch.testing.assert_close(found, HandTraining(hand, module.inner).craft(x, y, 0), rtol=0, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.net.training


# ---- steps that are called off ---------------------------------------------------------------------------


def frozen(module):
    momenta = [v for o in module.raw_optimizers() for p in o.state for v in o.state[p].values()]
    return [t.detach().clone() for t in (*module.net.parameters(), *momenta)]


@pytest.mark.parametrize("update", ["accumulated", "joint"])
@pytest.mark.parametrize("where", ["alpha", "beta", "gamma", "ce", "one gradient"])
def test_a_step_that_is_not_finite_moves_nothing(update, where):
    module, _ = fine_tuning(f"defense.update={update}")
    optimizers = kept_optimizers(module)
    module.update(*images(dtype=torch.float64))
    assert module.watch.bad == 0
    before = frozen(module)
    assert len(before) >= 2 * len(list(module.net.parameters()))
    if where == "ce":
        module.objective.outer = lambda z, y, clean: {"ce": z.sum() * torch.nan}
        module.update(*images(dtype=torch.float64))
    elif where == "one gradient":  # of the last optimizer alone
        moves = []
        for i, optimizer in enumerate(optimizers):
            params = [p for g in optimizer.param_groups for p in g["params"]]
            value = torch.inf if i == len(optimizers) - 1 else 1.0
            moves.append((optimizer, params, [torch.full_like(p, value) for p in params]))
        module.step(*moves)
    else:
        setattr(module, where, torch.inf)
        module.update(*images(dtype=torch.float64))
    assert module.watch.bad == 1
    assert all(torch.equal(a, b) for a, b in zip(frozen(module), before, strict=True))


@pytest.mark.parametrize("update", ["accumulated", "joint"])
def test_the_loss_scale_is_updated_once_per_step(update):
    module, _ = fine_tuning(f"defense.update={update}", dtype=torch.float32)
    twin = copy.deepcopy(module)
    module.scale = LossScale(torch.device("cpu"), start=1024.0, interval=3)
    optimizers = kept_optimizers(module)
    batch = images()
    plain, scaled = stepped_along(twin), stepped_along(module)
    optimizers = module.raw_optimizers()
    module.update(*batch)
    twin.update(*batch)
    for (_, a), (_, b) in zip(scaled, plain, strict=True):
        close(a, b, rtol=1e-4, atol=1e-6)
    assert module.scale.clean_steps == 1
    assert module.scale.scale == 1024
    before = frozen(module)
    params = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    for i in range(len(optimizers)):
        module.step(
            *(
                (o, ps, [torch.full_like(p, torch.inf if i == j else 1.0) for p in ps])
                for j, (o, ps) in enumerate(zip(optimizers, params, strict=True))
            )
        )
        assert module.scale.scale == 1024 / 2 ** (i + 1)
        assert module.scale.clean_steps == 0
    assert all(torch.equal(a, b) for a, b in zip(frozen(module), before, strict=True))
    assert module.watch.bad == 0
    factor = module.scale.scale.item()
    for _ in range(3):
        module.update(*batch)
    assert module.scale.scale == 2 * factor
    assert not any(torch.equal(a, b) for a, b in zip(frozen(module), before, strict=True))


# ---- what is watched, what is refused --------------------------------------------------------------------


def test_watched_gaps_are_numpy_s():
    module, hand = fine_tuning(model="resnet_small")
    module.eval(), hand.eval()
    x, adv, y = images(6, dtype=torch.float64)
    with torch.no_grad():
        student = [hand.sides(v)[0].numpy() for v in (x, adv)]
        teacher = [hand.taught(v).numpy() for v in (x, adv)]
    wanted = {}
    for name, a, b in (("student", *student), ("teacher", *teacher), ("across", teacher[0], student[1])):
        wanted[f"gap_{name}_linf"] = np.mean([max(abs(u - v)) for u, v in zip(a, b, strict=True)])
        wanted[f"gap_{name}_cos"] = 1 - np.mean(naive_cosines(a, b))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = module.train().eval().watched(x, adv, y)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("defense.alpha=-1", "defense.alpha"),
        ("defense.beta=-0.1", "defense.beta"),
        ("defense.gamma=-1", "defense.gamma"),
        ("defense.gamma=much", "defense.gamma"),
        ("defense.update=foo", "defense.update"),
        ("defense.update=null", "defense.update"),
        ("base=standard", "base=at, trades, mart"),
        ("evaluation.weights=teacher", "evaluation.weights"),
    ],
)
def test_what_is_refused_in_one_line(override, says):
    axes = ["defense=afd", "base=at", "model=cnn_small", "data=digits", "trainer=cpu", WIDTHS]
    with pytest.raises(UserError) as caught:
        built(*axes, override)
    text = str(caught.value)
    assert says in text
    assert "\n" not in text


def test_legacy_wants_sgd():
    with pytest.raises(UserError, match=r"defense\.update=legacy.*optimizer=sgd"):
        build("optimizer=adamw", "defense.update=legacy")


# ---- the recipes -----------------------------------------------------------------------------------------


@functools.cache
def resolved(*overrides):
    return resolve(conftest.composed("defense=afd", *overrides))


def greek_of(cfg):
    return [cfg.defense[name] for name in ("alpha", "beta", "gamma")]


def test_recipe_is_the_authors():
    cfg = resolved()
    assert cfg.axes.base == "at"
    assert cfg.trainer.max_epochs == 20
    assert cfg.data.batch_size == 128
    assert (cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.9, 5e-4)
    assert (cfg.ema.decay, cfg.ema.warmup, cfg.evaluation.weights) == (0.999, True, "ema")
    assert greek_of(cfg) == [0.05, 0.25, 25]
    assert cfg.defense["update"] == "accumulated"
    inner = cfg.inner
    assert inner.eps == pytest.approx(8 / 255)
    assert inner.step * inner.eps == pytest.approx(0.007)
    assert (inner.steps, inner.start, inner.clip_start, inner.norm) == (10, "uniform", False, "linf")


@pytest.mark.parametrize("data", ["cifar10", "svhn", "digits"])
def test_learning_rate_of_each_epoch(data):
    module = build(data=data)
    lr = {o.param_groups[0]["lr"] for o in module.configure_optimizers()}
    assert lr == {0.025}
    wanted = [0.025] * 10 + [0.02] * 2 + [0.01] * 2 + [0.005] * 2 + [0.0025] * 2 + [0.00125] * 2
    for at in (0.0, 0.5, 390 / 391):
        found = [0.025 * module.schedule.factor(epoch + at) for epoch in range(20)]
        assert found == pytest.approx(wanted)


def test_all_three_rates_follow_the_schedule():
    module, _ = fine_tuning("inner.steps=0")
    optimizers = kept_optimizers(module)
    x, _, y = images(dtype=torch.float64)
    for epoch, lr in ((0, 0.025), (9, 0.025), (10, 0.02), (13, 0.01), (19, 0.00125)):
        module.steps_done = epoch  # outside a fit an epoch is one step
        module.training_step(Batch(x, y, 0, len(x)), 0)
        assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([lr] * 3)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ((), [0.05, 0.25, 25]),
        (("data=cifar100",), [0.1, 1.0, 50]),
        (("data=tiny_imagenet",), [0.05, 0.25, 25]),
        (("model=wrn34_10",), [0.05, 0.25, 25]),
        (("model=wrn34_10", "data=cifar100"), [0.1, 1.0, 50]),
        (("data=cifar100", "defense.beta=2"), [0.1, 2, 50]),
        (("base=trades", "data=cifar100"), [0.1, 1.0, 50]),
    ],
)
def test_values_by_data_and_model(overrides, values):
    cfg = resolved(*overrides)
    assert greek_of(cfg) == values
    assert cfg.trainer.max_epochs == 20
    assert cfg.optimizer.lr == 0.025


def test_the_command_line_wins():
    cfg = resolved("inner.step=0.5", "ema=none", "optimizer.lr=0.01", "trainer.max_epochs=3", "inner.clip_start=true")
    assert cfg.inner.step == 0.5
    assert cfg.inner.clip_start is True
    assert (cfg.ema.decay, cfg.evaluation.weights) == (None, "student")
    assert (cfg.optimizer.lr, cfg.trainer.max_epochs) == (0.01, 3)
    module = build("ema=none", "inner.step=0.5")
    assert module.ema is None
    assert module.inner.step_size == pytest.approx(0.1)
    assert resolved("evaluation.weights=student").evaluation.weights == "student"
