"""FSR against methods.md F.1 to F.7 and 11, by naive NumPy transcriptions."""

from __future__ import annotations

import functools
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from tests import conftest
from torch import nn

from redoubt.build import build_module
from redoubt.defenses.fsr import FSRLayer, bottleneck, gumbel_difference
from redoubt.defenses.gradients import Share
from redoubt.errors import UserError


@functools.cache
def composed(*overrides):
    return conftest.composed(*overrides)


def build(*overrides, defense="fsr", model="resnet_small", data="digits", base="at"):
    axes = [f"defense={defense}", f"base={base}", f"model={model}", f"data={data}"]
    return build_module(composed(*axes, *overrides))


def batch(b=4, size=16, k=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, 3, size, size, generator=g), torch.randint(k, (b,), generator=g)


def layer(channels=6, size=4, k=5, tau=0.1, hidden=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    made = FSRLayer(nn.Identity(), shape=(channels, size, size), num_classes=k, tau=tau, hidden=hidden)
    for m in made.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                t.add_(0.3 * torch.rand_like(t))
        if isinstance(m, nn.Conv2d):
            m.weight.data.mul_(2.0)
    return made.to(dtype).eval()


def maps(b=3, channels=6, size=4, seed=1, dtype=torch.float64):
    return torch.randn(b, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sigma(r):
    return 1 / (1 + np.exp(-np.asarray(r, dtype=np.float64)))


# ---- the naive transcription -----------------------------------------------------------------------------


def conv(x, w):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((x.shape[0], w.shape[0], *x.shape[2:]))
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            out[:, :, i, j] = np.einsum("bcij,ocij->bo", padded[:, :, i : i + 3, j : j + 3], w)
    return out


def naive_bottleneck(x, net, train):
    w = {k: v.detach().double().numpy() for k, v in net.state_dict().items()}
    for c, n in (("0", "1"), ("3", "4")):
        x = conv(x, w[f"{c}.weight"])
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        if not train:
            mean, var = w[f"{n}.running_mean"], w[f"{n}.running_var"]
        x = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
        x = np.maximum(x * w[f"{n}.weight"][:, None, None] + w[f"{n}.bias"][:, None, None], 0)
    return conv(x, w["6.weight"])


def naive_mask(r, u1, u2, tau):
    s = sigma(r)
    a, b = np.log(s + 1e-8), np.log(1 - s + 1e-8)
    g1, g2 = (-np.log(-np.log(u + 1e-8) + 1e-8) for u in (u1, u2))
    one, two = (a + g1) / (tau + 1e-8), (b + g2) / (tau + 1e-8)
    top = np.maximum(one, two)
    return np.exp(one - top) / (np.exp(one - top) + np.exp(two - top))


def naive_layer(f, made, u1, u2, tau, train):
    f = f.detach().numpy()
    m = naive_mask(naive_bottleneck(f, made.separation, train), u1, u2, tau)
    plus, minus = m * f, (1 - m) * f
    recalibrated = minus + (1 - m) * naive_bottleneck(minus, made.recalibration, train)
    w, bias = made.head.weight.detach().numpy(), made.head.bias.detach().numpy()
    q = [v.mean((2, 3)) @ w.T + bias for v in (plus, minus, recalibrated)]
    return plus + recalibrated, q, m


def naive_ce(z, y, s=0.0):
    z = np.asarray(z, dtype=np.float64)
    total = 0.0
    for row, t in zip(z, y, strict=True):
        log_p = row - row.max() - np.log(np.exp(row - row.max()).sum())
        target = np.full(len(row), s / len(row))
        target[t] += 1 - s
        total -= (target * log_p).sum()
    return total / len(z)


# ---- mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_check_values_without_noise(dtype):
    r = torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.5], dtype=dtype)
    wanted = [0.0066929, 0.1192029, 0.5, 0.7310586, 0.9933071]
    np.testing.assert_allclose(layer(dtype=dtype).mask(r).numpy(), wanted, atol=2e-6)


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0, 3.0])
def test_mask_without_noise_is_the_sigmoid_over_tau(tau):
    r = torch.linspace(-2, 2, 41, dtype=torch.float64)
    np.testing.assert_allclose(layer(tau=tau).mask(r).numpy(), sigma(r.numpy() / tau), atol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_mask_with_noise_is_the_two_way_softmax(tau):
    rng = np.random.default_rng(0)
    r, u1, u2 = rng.normal(0, 3, (2, 6, 4, 4)), rng.random((2, 6, 4, 4)), rng.random((2, 6, 4, 4))
    made = layer(tau=tau)
    made.noise = gumbel_difference(torch.from_numpy(np.stack((u1, u2), axis=1)))
    np.testing.assert_allclose(made.mask(torch.from_numpy(r)).numpy(), naive_mask(r, u1, u2, tau), atol=1e-9)


@pytest.mark.parametrize("r", [-2.0, -0.5, 0.0, 0.3, 1.5])
def test_a_random_mask_exceeds_a_half_with_probability_sigma_r(r):
    n = 200_000
    u = torch.rand(n, 2, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    made = layer(dtype=torch.float32)
    made.noise = gumbel_difference(u)
    share = (made.mask(torch.full((n, 1, 1, 1), r)) > 0.5).double().mean().item()
    p = sigma(r)
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_noise_is_logistic():
    u = torch.rand(20_000, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert stats.kstest(gumbel_difference(u).flatten().numpy(), stats.logistic.cdf).pvalue > 1e-3


def test_noise_is_finite_at_the_ends_of_uniform_and_cancels_at_a_half():
    ends = torch.tensor([0.0, 1 - 2**-24, 0.5, 2**-24])
    u = torch.stack(torch.meshgrid(ends, ends, indexing="ij"), dim=-1).view(-1, 2, 1)
    noise = gumbel_difference(u)
    assert noise.isfinite().all()
    assert (noise[u[:, 0] == u[:, 1]] == 0).all()


def test_mask_saturates_in_float32_beyond_17():
    r = torch.tensor([-30.0, -18.0, 18.0, 30.0, 200.0, -200.0], requires_grad=True)
    m = layer(dtype=torch.float32).mask(r)
    torch.testing.assert_close(m, (r > 0).float(), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(m.sum(), r)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mask_is_float32_for_low_precision(dtype):
    made = layer(dtype=torch.float32)
    r = torch.tensor([-9.0, -0.1, 0.3, 6.0, 9.0], dtype=dtype)
    found = made.mask(r)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, made.mask(r.float()), rtol=0, atol=0)


# ---- layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_output_and_sides_are_the_transcription(train, tau):
    made, f = layer(tau=tau).train(train), maps()
    u = torch.rand(3, 2, 6, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made.noise = gumbel_difference(u)
    wanted, q, _ = naive_layer(f, made, u[:, 0].numpy(), u[:, 1].numpy(), tau, train)
    found = made(f)
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-9)
    assert len(made.sides) == 3
    for side, logits in zip(made.sides, q, strict=True):
        np.testing.assert_allclose(side.detach().numpy(), logits, atol=1e-9)


def test_output_without_noise_is_the_transcription_and_has_no_sides():
    made, f = layer(), maps()
    half = np.full(f.shape, 0.5)
    wanted, _, m = naive_layer(f, made, half, half, 0.1, False)
    np.testing.assert_allclose(made(f).detach().numpy(), wanted, atol=1e-9)
    assert made.sides is None
    assert 0.05 < m.mean() < 0.95


def parts(made, f):
    """f+, f- and recalibrated f- themselves."""
    made.auxiliary = lambda feature: feature
    made.noise = torch.zeros_like(f)
    out = made(f)
    return (*made.sides, out)


def test_parts_add_up():
    f = maps()
    plus, minus, recalibrated, out = parts(layer(), f)
    torch.testing.assert_close(plus + minus, f, rtol=0, atol=1e-15)
    torch.testing.assert_close(plus + recalibrated, out, rtol=0, atol=1e-12)


def test_no_recalibration_is_the_identity():
    made, f = layer(), maps()
    made.recalibration[-1].weight.data.zero_()
    assert torch.equal(made(f), f)


def test_sign_of_separation_exchanges_the_parts():
    f, made, turned = maps(), layer(), layer()
    turned.separation[-1].weight.data.neg_()
    one, two = parts(made, f), parts(turned, f)
    torch.testing.assert_close(one[0], two[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(one[1], two[0], rtol=0, atol=1e-6)


def test_nothing_is_detached():
    """The gradient of output and sides, with noise, is that of numerical differences."""
    made, f = layer(tau=0.7).train(), maps(b=2, size=2)
    made.shape = (6, 2, 2)
    noise = 0.5 * maps(b=2, size=2, seed=4)

    def outputs(x):
        made.noise = noise
        return (made(x), *made.sides)

    assert torch.autograd.gradcheck(outputs, (f.requires_grad_(),), atol=1e-6)


@pytest.mark.parametrize(("channels", "count"), [(512, 626_944), (640, 774_400)])
def test_bottleneck_parameters(channels, count):
    net = bottleneck(channels, 64)
    assert sum(p.numel() for p in net.parameters()) == count
    assert [type(m).__name__ for m in net] == [
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Conv2d",
    ]
    assert all(m.bias is None and m.stride == (1, 1) for m in net if isinstance(m, nn.Conv2d))


# ---- losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("smooth", [0.0, 0.3])
@pytest.mark.parametrize("base", ["at", "trades", "mart", "standard"])
def test_losses_are_the_transcription(layers, smooth, base):
    module = build(f"label_smoothing={smooth}", "defense.lambda_sep=0.7", "defense.lambda_rec=1.9", base=base)
    rng = np.random.default_rng(layers)
    k, b = 10, 6
    z, y = rng.normal(0, 3, (b, k)), rng.integers(k, size=b)
    z[:3, :] -= 50 * np.eye(k)[y[:3]]  # three misclassified,
    z[3:, :] += 50 * np.eye(k)[y[3:]]  # three right: y' is the runner-up
    q = [[rng.normal(0, 3, (b, k)) for _ in range(3)] for _ in range(layers)]
    wrong = [max((j for j in range(k) if j != y[i]), key=lambda j, i=i: z[i, j]) for i in range(b)]
    sep = np.mean([naive_ce(plus, y, smooth) + naive_ce(minus, wrong) for plus, minus, _ in q])
    rec = np.mean([naive_ce(tilde, y, smooth) for _, _, tilde in q])
    sides = [tuple(torch.from_numpy(v).float() for v in one) for one in q]
    found = module.auxiliary(torch.from_numpy(z).float(), sides, torch.from_numpy(y))
    assert set(found) == {"sep", "rec"}
    assert found["sep"].item() == pytest.approx(0.7 * sep, rel=2e-6)
    assert found["rec"].item() == pytest.approx(1.9 * rec, rel=2e-6)


@pytest.mark.parametrize("base", ["standard", "at", "trades", "mart"])
def test_terms_are_base_plus_auxiliary_on_the_crafted(base):
    module = build(base=base).train()
    (x, y), adv = batch(), batch(seed=1)[0]
    calls = []
    run = module.run
    module.run = lambda images, noise=None: calls.append((images, noise)) or run(images, noise)
    terms = module.terms(x, adv, y)
    both = base in ("trades", "mart")
    assert [images is adv for images, _ in calls] == ([False, True] if both else [True])
    assert all(noise is not None for _, noise in calls), "noise is on in every training forward"
    assert {"sep", "rec", "ce"} <= set(terms)
    assert ("kl" in terms) == both
    logits, sides = run(adv, module.draw_noise(adv, "adv"))
    again = module.auxiliary(logits, sides, y)
    for name in ("sep", "rec"):
        torch.testing.assert_close(terms[name], again[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("option", "term"), [("lambda_sep", "sep"), ("lambda_rec", "rec")])
def test_lambda_scales_its_own_term(option, term):
    (x, y), adv = batch(), batch(seed=1)[0]
    one, two, none = (build(f"defense.{option}={v}").train().terms(x, adv, y) for v in (1.0, 2.0, 0.0))
    for name in one:
        torch.testing.assert_close(two[name], one[name] * (2 if name == term else 1), rtol=1e-6, atol=0)
    assert none[term] == 0


def test_tau_and_hidden_have_their_effect():
    x, _ = batch()
    module, soft = build(), build("defense.tau=1.0")
    assert soft.layers[0].tau == 1.0
    assert not torch.equal(module.eval().logits(x), soft.eval().logits(x))
    wide = build("defense.hidden=96")
    assert wide.layers[0].separation[0].out_channels == 96
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "override", ["defense.tau=0", "defense.tau=-1", "defense.lambda_sep=-1", "defense.lambda_rec=-0.1"]
)
def test_values_out_of_range_are_refused(override):
    with pytest.raises(UserError, match=r"defense\.(tau|lambda)"):
        build(override)


# ---- counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "data", "count"),
    [
        ("resnet18", "cifar10", 12_432_980),
        ("resnet18", "cifar100", 12_525_320),
        ("resnet18", "tiny_imagenet", 12_627_920),
        ("vgg16", "cifar10", 16_512_596),
        ("wrn34_10", "cifar10", 47_715_684),
    ],
)
def test_parameters_as_published(model, data, count):
    with torch.device("meta"):
        module = build(model=model, data=data)
    assert sum(p.numel() for p in module.parameters()) == count
    channels = 640 if model == "wrn34_10" else 512
    side = {"wrn34_10": 8, "vgg16": 4, "resnet18": 8 if data == "tiny_imagenet" else 4}[model]
    assert module.shapes == [(channels, side, side)]


# ---- randomness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_logits_are_deterministic(train):
    module = build().train(train)
    x, _ = batch()
    assert torch.equal(module.logits(x), module.logits(x))
    assert torch.equal(module(x), module.net(x))


@pytest.mark.parametrize("base", ["at", "trades", "mart"])
def test_crafting_sees_no_noise(base):
    module = build("inner.steps=2", base=base).train()
    x, y = batch()
    seen = []
    module.layers[0].register_forward_pre_hook(lambda m, a: seen.append((m.noise, m.training)))
    adv = module.craft(x, y)
    assert len(seen) == 1 + 2 + (base == "trades"), "the first attack looks at the net once"
    assert all(noise is None and not training for noise, training in seen)
    assert not torch.equal(adv, x)
    module.training_logits(x, "adv")
    assert seen[-1][0] is not None


def test_noise_is_counted_by_seed_step_purpose_and_layer():
    x, _ = batch()
    module = build("defense.at=[layer3,layer3.0]")
    first = module.draw_noise(x, "adv")
    assert [n.shape for n in first] == [(4, 64, 4, 4)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, module.draw_noise(x, "adv"), strict=True))
    assert not torch.equal(*first), "each layer has its own"
    assert not torch.equal(first[0], module.draw_noise(x, "clean")[0])
    module.steps_done = 1
    assert not torch.equal(first[0], module.draw_noise(x, "adv")[0])
    module.steps_done = 0
    assert torch.equal(first[0], module.draw_noise(x, "adv")[0])
    other = build("defense.at=[layer3,layer3.0]", "seed=1")
    assert not torch.equal(first[0], other.draw_noise(x, "adv")[0])


def test_noise_differs_in_every_element():
    noise = build().draw_noise(batch()[0], "adv")[0]
    assert noise.unique().numel() > 0.99 * noise.numel()


@pytest.mark.parametrize("edges", [(0, 4), (0, 1, 4), (0, 2, 3, 4)])
def test_pieces_of_a_batch_draw_the_whole_batch_s_noise(edges):
    module, (x, _) = build(), batch()
    whole = module.draw_noise(x, "adv")[0]
    pieces = []
    for a, b in pairwise(edges):
        with module.within(Share(a, b - a, 4)):
            pieces.append(module.draw_noise(x[a:b], "adv")[0])
    assert torch.equal(torch.cat(pieces), whole)


def test_training_forward_differs_from_the_deterministic_one():
    module, (x, _) = build().eval(), batch()
    noisy, sides = module.training_logits(x, "adv")
    assert not torch.equal(noisy, module.logits(x))
    assert [s.shape for s in sides[0]] == [(4, 10)] * 3


# ---- gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["standard", "at", "trades", "mart"])
@pytest.mark.parametrize("model", ["resnet_small", "cnn_small"])
def test_every_parameter_receives_gradient(base, model):
    module = build(base=base, model=model).train()
    (x, y), adv = batch(8), batch(8, seed=1)[0]
    params = dict(module.named_parameters())
    (found,) = module.gradients(lambda *b: [module.loss(*b)], [list(params.values())], x, adv, y)
    for name, g in zip(params, found, strict=True):
        assert g is not None, name
        assert g.abs().sum() > 0, name


# ---- where it goes ---------------------------------------------------------------------------------------


def test_default_place_is_the_feature_layer():
    module = build()
    assert [m for m in module.modules() if isinstance(m, FSRLayer)] == module.layers
    assert module.net.layer4 is module.layers[0]
    assert module.shapes == [(128, 2, 2)]


@pytest.mark.parametrize("at", ["layer2", "layer3.0", "layer1.0.conv2", "bn1"])
def test_any_submodule_by_dotted_name(at):
    module = build(f"defense.at={at}").train()
    assert module.net.get_submodule(at) is module.layers[0]
    x, y = batch()
    terms = module.terms(x, x, y)
    assert all(t.isfinite() for t in terms.values())


@pytest.mark.parametrize("at", ["[layer3,layer4]", "[layer4,layer3]", "[layer4,layer4.0]", "[layer4.0,layer4]"])
def test_several_submodules_nested_too(at):
    module = build(f"defense.at={at}").train()
    assert len(module.layers) == 2
    x, y = batch()
    _, sides = module.training_logits(x, "adv")
    assert len(sides) == 2
    assert all(t.isfinite() for t in module.terms(x, x, y).values())
    assert [tuple(m.noise.shape[1:]) if m.noise is not None else None for m in module.layers] == [None, None]


def test_a_submodule_that_is_called_twice_is_refused():
    """torchvision's block calls its one ReLU twice: a layer there would separate two different maps."""
    with pytest.raises(UserError, match=r"defense\.at"):
        build("defense.at=layer4.0.relu")


@pytest.mark.parametrize("at", ["layer5", "''", "layer4.1", "[]", "[layer3,layer3]", "[layer3,nowhere]"])
def test_a_name_that_is_none_is_refused(at):
    with pytest.raises(UserError, match=r"defense\.at"):
        build(f"defense.at={at}")


@pytest.mark.parametrize("at", ["fc", "[layer4,fc]"])
def test_a_module_without_a_map_is_refused(at):
    with pytest.raises(UserError, match="no feature map"):
        build(f"defense.at={at}")


def test_dry_run_leaves_no_trace():
    plain, fsr = build(defense="none").net.state_dict(), build().net.state_dict()
    for name, value in plain.items():
        assert torch.equal(value, fsr[name.replace("layer4.", "layer4.inner.")]), name
    assert all(m.training for m in build().modules())
    assert not any(m._forward_hooks for m in build().net.modules())


@pytest.mark.parametrize(
    "options",
    [
        ["model=torchvision", "model.name=mobilenet_v3_small"],
        ["model=timm", "model.name=mobilenetv3_small_050"],
    ],
)
def test_nets_that_no_line_was_written_for(options):
    if options[0] == "model=timm":
        pytest.importorskip("timm")
    module = build_module(
        composed("defense=fsr", "base=trades", "data=cifar10", "data.source=fake", "inner.steps=1", *options)
    ).train()
    assert len(module.layers) == 1
    x, y = batch(4, 32)
    adv = module.craft(x, y)
    terms = module.terms(x, adv, y)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None for p in module.layers[0].parameters())
    module.eval()
    assert torch.equal(module.logits(x), module.logits(x))


def test_a_net_s_own_initialisation_reaches_the_added_modules():
    module = build(model="vgg16", data="cifar10")
    made = module.layers[0]
    assert made.head.bias.abs().max() == 0
    assert made.head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for net in (made.separation, made.recalibration):
        assert net[0].weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


# ---- precision and state ---------------------------------------------------------------------------------


def test_bf16_autocast_keeps_mask_and_logits_in_float32():
    module, (x, y) = build().train(), batch()
    seen, mask = [], module.layers[0].mask

    def spy(r):
        seen.append((r.dtype, mask(r).dtype))
        return mask(r)

    module.layers[0].mask = spy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = module.logits(x)
        terms = module.terms(x, x, y)
    assert seen == [(torch.bfloat16, torch.float32)] * 2
    assert logits.dtype == torch.float32
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())


def test_noise_and_sides_are_cleared():
    module, (x, _) = build().train(), batch()
    module.training_logits(x, "adv")
    assert module.layers[0].noise is None
    assert module.layers[0].sides is None


@pytest.mark.parametrize("where", ["fc", "layer4.recalibration", "layer1"])
def test_noise_and_sides_are_cleared_after_an_exception(where):
    module, (x, _) = build("defense.at=[layer2,layer4]").train(), batch()

    def fail(*_):
        raise RuntimeError("inside")

    handle = module.net.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        module.training_logits(x, "adv")
    assert all(one.noise is None and one.sides is None for one in module.layers)
    handle.remove()
    module.eval()
    assert torch.equal(module.logits(x), module.logits(x))
