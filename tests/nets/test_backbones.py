"""Sizes, shapes and the common interface of the nets that are written here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from redoubt.errors import UserError
from redoubt.nets import Backbone, Normalize
from redoubt.nets.preact import PreActResNet18
from redoubt.nets.resnet import ResNet18
from redoubt.nets.small import CNNSmall, ResNetSmall
from redoubt.nets.vgg import VGG16
from redoubt.nets.wrn import WideResNet

PLAIN = [ResNet18, VGG16, WideResNet, PreActResNet18, ResNetSmall, CNNSmall]


def build(cls: type[Backbone], **arguments) -> Backbone:
    """A net with fixed weights; a narrow one where only the width makes it slow."""
    if cls is WideResNet:
        arguments = {"depth": 10, "width": 1} | arguments
    torch.manual_seed(0)
    return cls(**({"num_classes": 10} | arguments)).eval()


@pytest.mark.parametrize(
    ("cls", "num_classes", "count"),
    [  # methods.md 0.2
        (ResNet18, 10, 11_173_962),
        (ResNet18, 100, 11_220_132),
        (ResNet18, 200, 11_271_432),
        (VGG16, 10, 15_253_578),
        (WideResNet, 10, 46_160_474),
        (PreActResNet18, 10, 11_172_170),
        (ResNetSmall, 10, 308_826),
        (CNNSmall, 10, 131_466),
    ],
)
def test_number_of_parameters(cls, num_classes, count):
    with torch.device("meta"):
        net = cls(num_classes=num_classes)
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize("cls", PLAIN)
def test_interface(cls, size):
    net, x = build(cls, num_classes=7), torch.rand(2, 3, size, size)
    with torch.no_grad():
        f, logits = net.forward_features(x), net(x)
        pooled = net.forward_head(f, pre_logits=True)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert torch.equal(logits, net.forward_head(f))
    assert torch.equal(logits, net.get_classifier()(pooled))
    assert type(net.get_classifier()) is nn.Linear
    assert pooled.shape == (2, net.get_classifier().in_features)


@pytest.mark.parametrize(
    ("cls", "layer", "channels", "fraction"),
    [  # methods.md F.4
        (ResNet18, "layer4", 512, 8),
        (VGG16, "features.32", 512, 8),
        (WideResNet, "relu", 640, 4),
        (PreActResNet18, "relu", 512, 8),
        (ResNetSmall, "layer4", 128, 8),
        (CNNSmall, "features.7", 128, 4),
    ],
)
@pytest.mark.parametrize("size", [32, 64])
def test_feature_layer(cls, layer, channels, fraction, size):
    shapes = []
    with torch.device("meta"):
        net = cls(num_classes=10)
        assert net.feature_layer == layer
        net.get_submodule(layer).register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
        net(torch.rand(2, 3, size, size))
    assert shapes == [(2, channels, size // fraction, size // fraction)]


@pytest.mark.parametrize("cls", PLAIN)
def test_a_replaced_feature_layer_is_called(cls):
    """FSR replaces a submodule by name; the net must look it up at every call."""

    class Zero(nn.Module):
        def forward(self, x):
            return torch.zeros_like(inner(x))

    net, x = build(cls), torch.rand(2, 3, 32, 32)
    inner = net.get_submodule(net.feature_layer)
    before = net(x)
    parent, _, name = net.feature_layer.rpartition(".")
    setattr(net.get_submodule(parent), name, Zero())
    after = net(x)
    assert not torch.equal(before, after)
    assert torch.equal(after[0], after[1])


@pytest.mark.parametrize("cls", [pytest.param(ResNetSmall, marks=pytest.mark.slow), VGG16])
def test_compiles_to_one_graph(cls):
    """`compile=true`: no graph break, same logits."""
    net, x = build(cls), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("cls", PLAIN)
def test_normalisation_is_the_first_layer(cls):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    raw, net = build(cls), build(cls, normalize=True, mean=mean, std=std)
    assert isinstance(raw.normalize, nn.Identity)
    assert isinstance(net.normalize, Normalize)
    assert net.state_dict().keys() == raw.state_dict().keys()
    x = torch.rand(2, 3, 32, 32)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.equal(net(x), raw(by_hand))
    assert not torch.equal(net(x), raw(x))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"normalize": True}, "model.mean"),
        ({"normalize": True, "mean": [125.3, 123.0, 113.9], "std": [63.0, 62.1, 66.7]}, r"\[0,1\]"),
        ({"normalize": True, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.0, 0.2]}, "std above 0"),
        ({"widths": []}, "model.widths"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(UserError, match=says):
        ResNetSmall(num_classes=10, **arguments)


def test_bad_depth_and_shortcut():
    with pytest.raises(UserError, match="depth=35"):
        WideResNet(num_classes=10, depth=35)
    with pytest.raises(UserError, match="stem_padding=2"):
        ResNet18(num_classes=10, stem_padding=2)
    with pytest.raises(UserError, match="shortcut=x"):
        PreActResNet18(num_classes=10, shortcut="x")


def test_configs_name_every_argument():
    """conf/model/*.yaml: `_target_` first, then exactly arguments that the constructor has."""
    import inspect

    from hydra.utils import get_class
    from omegaconf import OmegaConf

    files = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
    assert len(files) >= 8
    data = {"num_classes": 10, "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}
    for file in files:
        assert file.read_text().startswith("_target_: "), file
        cfg = OmegaConf.to_container(OmegaConf.create({"data": data, "model": OmegaConf.load(file)}), resolve=True)
        arguments = dict(cfg["model"])
        parameters = inspect.signature(get_class(arguments.pop("_target_"))).parameters
        assert set(arguments) == set(parameters), file
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
