"""The nets against plain transcriptions of the papers' at 32 pixels, with their fixed average pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from redoubt.nets import Backbone
from redoubt.nets.preact import PreActResNet18
from redoubt.nets.resnet import ResNet18
from redoubt.nets.vgg import VGG16
from redoubt.nets.wrn import WideResNet


def build(cls: type[Backbone], **arguments) -> Backbone:
    torch.manual_seed(0)
    return cls(**arguments).eval()


def bn(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], w[f"{name}.weight"], w[f"{name}.bias"])


def moved(net: nn.Module) -> dict[str, torch.Tensor]:
    """The net's weights after BatchNorm's were moved away from 0 and 1, where errors would hide."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                t.add_(0.2 * torch.rand_like(t))
    return net.state_dict()


@pytest.mark.parametrize("padding", [None, 1, 0])
def test_resnet18_is_the_papers_net(padding):
    """Against a transcription of methods.md 0.1 at 32 pixels, average pooling 4 as in the papers; AFD's stem (7.9)."""
    net, x = build(ResNet18, num_classes=10, stem_padding=padding), torch.rand(2, 3, 32, 32)
    w = moved(net)
    h = F.relu(bn(w, "bn1", F.conv2d(x, w["conv1.weight"], padding=0 if padding == 0 else 1)))
    assert h.shape[2] == (30 if padding == 0 else 32)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = F.relu(bn(w, f"{name}.bn1", F.conv2d(h, w[f"{name}.conv1.weight"], stride=stride, padding=1)))
            out = bn(w, f"{name}.bn2", F.conv2d(out, w[f"{name}.conv2.weight"], padding=1))
            if f"{name}.downsample.0.weight" in w:
                h = bn(w, f"{name}.downsample.1", F.conv2d(h, w[f"{name}.downsample.0.weight"], stride=stride))
            h = F.relu(out + h)
    expected = F.linear(F.avg_pool2d(h, 4).flatten(1), w["fc.weight"], w["fc.bias"])
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("shortcut", ["active", "input"])
def test_preact_is_the_papers_net(shortcut):
    net, x = build(PreActResNet18, num_classes=10, shortcut=shortcut), torch.rand(2, 3, 32, 32)
    w = moved(net)
    h = F.conv2d(x, w["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            a = F.relu(bn(w, f"{name}.bn1", h))
            out = F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(F.relu(bn(w, f"{name}.bn2", out)), w[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in w:
                h = F.conv2d(a if shortcut == "active" else h, w[f"{name}.shortcut.0.weight"], stride=stride)
            h = out + h
    h = F.avg_pool2d(F.relu(bn(w, "bn", h)), 4).flatten(1)
    torch.testing.assert_close(net(x), F.linear(h, w["linear.weight"], w["linear.bias"]))


def test_wide_resnet_is_the_papers_net():
    net, x = build(WideResNet, num_classes=10, depth=16, width=2), torch.rand(2, 3, 32, 32)
    w = moved(net)
    h = F.conv2d(x, w["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for block in (0, 1):
            name, stride = f"block{group}.layer.{block}", 2 if group > 1 and block == 0 else 1
            a = F.relu(bn(w, f"{name}.bn1", h))
            out = F.conv2d(a, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(F.relu(bn(w, f"{name}.bn2", out)), w[f"{name}.conv2.weight"], padding=1)
            if f"{name}.convShortcut.weight" in w:
                h = F.conv2d(a, w[f"{name}.convShortcut.weight"], stride=stride)
            h = out + h
    h = F.avg_pool2d(F.relu(bn(w, "bn1", h)), 8).flatten(1)
    torch.testing.assert_close(net(x), F.linear(h, w["fc.weight"], w["fc.bias"]))


def test_vgg_is_the_papers_net():
    net, x = build(VGG16, num_classes=10), torch.rand(2, 3, 32, 32)
    w = moved(net)
    h, i = x, 0
    for widths in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
        for _ in widths:
            h = F.conv2d(h, w[f"features.{i}.weight"], w[f"features.{i}.bias"], padding=1)
            h = F.relu(bn(w, f"features.{i + 1}", h))
            i += 3
        h = F.max_pool2d(h, 2, 2)
        i += 1
    h = h.flatten(1)
    for layer in ("classifier.0", "classifier.2"):
        h = F.relu(F.linear(h, w[f"{layer}.weight"], w[f"{layer}.bias"]))
    expected = F.linear(h, w["classifier.4.weight"], w["classifier.4.bias"])
    torch.testing.assert_close(net(x), expected)
