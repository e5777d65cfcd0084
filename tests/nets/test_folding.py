"""BatchNorm folded into convolutions: the same function, where it is one, and the net as it was afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from redoubt.build import build_module
from redoubt.errors import UserError
from redoubt.nets import Folding, attack_mode
from redoubt.nets import folding as folding_module
from redoubt.nets.preact import PreActResNet18
from redoubt.nets.resnet import ResNet18
from redoubt.nets.small import CNNSmall, ResNetSmall
from redoubt.nets.vgg import VGG16
from redoubt.nets.wrn import WideResNet


def lively(net: nn.Module) -> nn.Module:
    """In float64, with BatchNorms that are not the identity."""
    g = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, low in (("weight", -1.0), ("bias", -1.0), ("running_mean", -1.0), ("running_var", 0.5)):
                tensor = getattr(module, name)
                tensor.data = low + 2 * torch.rand(tensor.shape, generator=g)
    return net.double().eval()


def with_gradient(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_(True)
    out = net(x)
    return out.detach(), torch.autograd.grad(out.sin().sum(), x)[0]


def pairs_of(net: nn.Module, x: torch.Tensor) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    with torch.no_grad():
        return Folding(net, lambda: net(x)).norms


@pytest.mark.parametrize(
    ("cls", "arguments", "pairs", "norms"),
    [
        (ResNet18, {}, 20, 20),
        (VGG16, {}, 13, 13),  # convolutions with a bias
        (PreActResNet18, {}, 8, 17),  # each block's second; the others follow a sum
        (WideResNet, {"depth": 10, "width": 1}, 3, 7),
        (ResNetSmall, {}, None, None),
        (CNNSmall, {}, None, None),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_same_function_and_gradient(cls, arguments, pairs, norms, channels_last):
    torch.manual_seed(0)
    net = lively(cls(num_classes=10, **arguments))
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    own = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        folding = Folding(net, lambda: net(x[:1]))
    assert len(own) == (len(own) if norms is None else norms)
    assert len(folding.norms) == (len(own) if pairs is None else pairs)
    with attack_mode(net):
        plain = with_gradient(net, x)
        with folding.applied():
            once = with_gradient(net, x)
    for a, b in zip(plain, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_weights_are_those_of_the_moment_and_the_net_comes_out_as_it_was():
    torch.manual_seed(0)
    net, x = lively(ResNetSmall(num_classes=10)), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    folding = Folding(net, lambda: net(x))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with folding.applied():
        first = net(x)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    with folding.applied():
        torch.testing.assert_close(net(x), net.eval()(x))
        with folding.applied():  # nested: once is enough
            second = net(x)
    assert not torch.allclose(first, second)
    with pytest.raises(RuntimeError, match="on purpose"), folding.applied():
        raise RuntimeError("on purpose")
    assert not any("forward" in vars(module) for module in net.modules())
    torch.testing.assert_close(net(x), second)
    assert before.keys() == net.state_dict().keys()


def test_in_autocast_the_weights_are_cast_once():
    net, x = ResNetSmall(num_classes=10).eval(), torch.rand(2, 3, 16, 16)
    folding = Folding(net, lambda: net(x))
    with torch.autocast("cpu", torch.bfloat16), folding.applied():
        assert {conv.forward.weight.dtype for conv in folding.convolutions} == {torch.bfloat16}
        half = net(x).float()
    torch.testing.assert_close(half, net(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0), (3, 0), (5, 1)])
def test_packed_weights_compute_the_same(dtype, kernel, padding):
    """From the second pass on; oneDNN does the same sums either way."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 48, kernel, padding=padding), nn.BatchNorm2d(48), nn.ReLU())
    net = lively(net).to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(6, 32, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    folding = Folding(net, lambda: net(x))
    with attack_mode(net), folding.applied():
        layer = net[0].forward
        first = with_gradient(net, x)
        assert layer.packed is None
        second = with_gradient(net, x)
        fewer = with_gradient(net, x[:2])
        assert (layer.packed is not None) == folding_module.PACKS
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for a, b, c in zip(first, second, fewer, strict=True):
        assert b.shape == a.shape
        torch.testing.assert_close(b, a, **close)
        torch.testing.assert_close(c, a[:2], **close)


def test_many_pixels_other_formats_and_strides_are_not_packed():
    def packed(conv, x):
        net = nn.Sequential(conv.eval())
        with attack_mode(net), Folding(net, lambda: net(x)).applied():
            for _ in range(3):
                net(x)
            return net[0].forward.packed is not None

    few = torch.rand(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
    assert packed(nn.Conv2d(8, 8, 3, padding=1), few) == folding_module.PACKS
    assert not packed(nn.Conv2d(8, 8, 3, padding=1), few.contiguous())
    assert not packed(nn.Conv2d(8, 8, 3, padding=1), few.repeat(16, 1, 1, 1))
    assert not packed(nn.Conv2d(8, 8, 3, padding=1, stride=2), few)
    assert not packed(nn.Conv2d(8, 8, 3, padding=1, groups=2), few)
    assert not packed(nn.Conv2d(8, 8, 3, padding="same"), few)
    assert not packed(nn.Conv2d(8, 8, 3, padding=1).double(), few.double())


class Odd(nn.Module):
    """Convolutions and BatchNorms that may not become one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        conv = nn.Conv2d(3, 3, 3, padding=1)
        if kind == "own class":
            conv = type("Own", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x) * 2})(3, 3, 3)
        elif kind == "reflected":
            conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.conv, self.other, self.bn = conv, nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        if kind == "no statistics":
            self.bn = nn.BatchNorm2d(3, track_running_stats=False)
        if kind == "two norms":
            self.second = nn.BatchNorm2d(3)

    def forward(self, x):
        h = self.conv(x)
        match self.kind:
            case "skipped":
                return self.bn(h) + h
            case "called twice":
                return self.bn(self.conv(h))
            case "shared norm":
                return self.bn(h) * self.bn(self.other(x))
            case "two norms":
                return self.bn(h) * self.second(h)
            case "returned":
                return self.bn(h), h
            case "between":
                return self.bn(h.relu())
        return self.bn(h)


@pytest.mark.parametrize(
    "kind",
    ["skipped", "called twice", "shared norm", "two norms", "returned", "between", "own class", "reflected",
     "no statistics"],
)  # fmt: skip
def test_what_is_no_single_convolution_is_left_alone(kind):
    torch.manual_seed(0)
    assert pairs_of(Odd(kind).eval(), torch.rand(2, 3, 8, 8)) == {}
    assert len(pairs_of(Odd("plain").eval(), torch.rand(2, 3, 8, 8))) == 1


def test_training_mode_and_hooks_are_respected():
    net, x = Odd("plain").eval(), torch.rand(2, 3, 8, 8)
    folding = Folding(net, lambda: net(x))
    net.bn.train()
    with folding.applied():
        assert "forward" not in vars(net.bn)
    net.bn.eval()
    for watched in (net.conv.register_forward_hook, net.bn.register_full_backward_hook):
        handle = watched(lambda *args: None)
        with folding.applied():
            assert "forward" not in vars(net.bn)
        handle.remove()
    with folding.applied():
        assert "forward" in vars(net.bn)


@pytest.mark.parametrize("defense", ["none", "fsr", "afd", "cure"])
def test_training_examples_are_the_same(defense, cell):
    cfg = cell(f"defense={defense}", "inner.steps=3")
    x, y = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    crafted = []
    for fold in (True, False):
        cfg.fold = fold
        module = build_module(cfg)
        lively(module.net)
        module.double().train()
        crafted.append(module.craft(x, y))
        assert (module.folding is not None and bool(module.folding.norms)) == fold
    assert (crafted[0] == crafted[1]).double().mean() > 0.999  # a gradient of zero may round either way


def test_a_copy_folds_its_own_net(cell):
    module = build_module(cell("base=at"))
    module.craft(torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    twin = copy.deepcopy(module)
    own = set(map(id, twin.modules()))
    assert all(id(conv) in own and id(bn) in own for conv, bn in twin.folding.norms.items())


def test_a_part_without_autocast_computes_as_it_asks():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.body(x.float())

    net, x = Part().eval(), torch.rand(2, 3, 8, 8)
    folding = Folding(net, lambda: net(x))
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(x)
        with folding.applied():
            torch.testing.assert_close(net(x), plain)


def test_a_net_that_was_rebuilt_is_watched_again(cell):
    module = build_module(cell("base=at"))
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    module.craft(x, y)
    watched = module.folding
    module.craft(x, y)
    assert module.folding is watched
    name = next(n for n, m in module.net.named_modules() if isinstance(m, nn.BatchNorm2d))
    module.net.set_submodule(name, nn.Identity())
    module.craft(x, y)
    assert module.folding is not watched


def test_fold_is_true_or_false(cell):
    with pytest.raises(UserError, match="fold='maybe' must be true or false"):
        build_module(cell("fold=maybe"))
