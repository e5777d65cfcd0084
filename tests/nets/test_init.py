"""How weights start (methods.md 0.1): a normal's standard deviation, or the bound of a uniform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from redoubt.nets.preact import PreActResNet18
from redoubt.nets.resnet import ResNet18
from redoubt.nets.small import ResNetSmall
from redoubt.nets.vgg import VGG16
from redoubt.nets.wrn import WideResNet


def is_normal(weight: torch.Tensor, std: float) -> bool:
    """Mean, standard deviation and kurtosis (3 for a normal, 1.8 for a uniform) of a large tensor."""
    z = weight.detach().flatten() / std
    return abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05 and abs((z**4).mean() - 3) < 0.4


@pytest.mark.parametrize("cls", [ResNet18, PreActResNet18, ResNetSmall])
def test_default_initialisation(cls):
    """PyTorch's default: uniform on +-1/sqrt(fan_in), for convolutions, the linear layer and its bias."""
    torch.manual_seed(0)
    net = cls(num_classes=100)
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(m.weight[0].numel())
            assert m.weight.abs().max() <= bound * (1 + 1e-6)
            assert m.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
            assert (m.bias == 0).all()
    assert 0 < net.get_classifier().bias.abs().max() <= 1 / math.sqrt(net.get_classifier().in_features)


def added() -> nn.Module:
    """What a defense might add."""
    return nn.Sequential(nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128), nn.Conv2d(128, 64, 1), nn.Linear(200, 100))


def test_vgg_initialisation():
    torch.manual_seed(0)
    net, more = VGG16(num_classes=10), added()
    nn.init.constant_(more[1].weight, 3)
    net.initialise(more)
    for m in [*net.modules(), *more.modules()]:
        if isinstance(m, nn.Conv2d):
            if m.weight.numel() > 5000:
                assert is_normal(m.weight, math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels)))
            assert m.bias is None or (m.bias == 0).all()
        elif isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all()
            assert (m.bias == 0).all()
        elif isinstance(m, nn.Linear):
            assert is_normal(m.weight, 0.01)
            assert (m.bias == 0).all()


def test_wide_resnet_initialisation():
    torch.manual_seed(0)
    net, more = WideResNet(num_classes=10, depth=10, width=4), added()
    before = more[0].bias.clone()
    net.initialise(more)
    for m in [*net.modules(), *more.modules()]:
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000:
            assert is_normal(m.weight, math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels)))
        elif isinstance(m, nn.Linear):
            assert (m.bias == 0).all()
            assert m.weight.abs().max() <= 1 / math.sqrt(m.in_features)  # the default stands
    assert torch.equal(more[0].bias, before)  # the rule names no convolution's bias


def test_nets_without_a_rule_leave_added_modules_alone():
    more = added()
    before = [p.clone() for p in more.parameters()]
    ResNetSmall(num_classes=10).initialise(more)
    assert all(torch.equal(a, b) for a, b in zip(before, more.parameters(), strict=True))
