"""Any net of timm or torchvision behind the same interface."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from torch import nn

from redoubt.errors import UserError
from redoubt.nets import Backbone, load_backbone
from redoubt.nets.library import last_map
from redoubt.nets.timm_net import Timm
from redoubt.nets.torchvision_net import TorchVision


def check(net: Backbone, reference: nn.Module, size: int) -> None:
    """Same logits as the library's own net, in train mode too, and the common interface."""
    x = torch.rand(4, 3, size, size)
    net.eval()
    with torch.no_grad():
        f = net.forward_features(x)
        pooled = net.forward_head(f, pre_logits=True)
        torch.testing.assert_close(net(x), reference.eval()(x))
        torch.testing.assert_close(net.forward_head(f), net(x))
        torch.testing.assert_close(net.get_classifier()(pooled), net(x))
    for m in [*net.modules(), *reference.modules()]:
        m.training = not isinstance(m, nn.Dropout)
    with torch.no_grad():  # batch statistics give random weights a signal that shows a missing ReLU
        torch.testing.assert_close(net(x), reference(x), rtol=1e-4, atol=1e-4)
    assert isinstance(net.get_classifier(), nn.Linear)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mobilenet_v3_small", "features"),
        ("shufflenet_v2_x0_5", "conv5"),
        ("regnet_x_400mf", "trunk_output"),
        ("densenet121", "features"),
    ],
)
def test_torchvision(name, layer, tmp_path):
    size = 32
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name, num_classes=7)
    torch.save(reference.state_dict(), tmp_path / "plain.pt")
    net = TorchVision(name=name, num_classes=7, image_size=size)
    load_backbone(net, tmp_path / "plain.pt")
    check(net, reference, size)
    assert net.feature_layer == f"model.{layer}"
    torch.save({"net": net.state_dict()}, tmp_path / "ours.pt")
    load_backbone(TorchVision(name=name, num_classes=7, image_size=size), tmp_path / "ours.pt")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("mobilenetv3_small_050", "blocks"),
        ("resnet10t", "layer4"),
        ("convnext_atto", "norm_pre"),
        ("vit_tiny_patch16_224", "patch_embed.proj"),
    ],
)
def test_timm(name, layer, tmp_path):
    timm = pytest.importorskip("timm")
    size = 32
    torch.manual_seed(0)
    more = {"img_size": size} if name.startswith("vit") else {}
    reference = timm.create_model(name, num_classes=7, **more)
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "x.pt")
    net = Timm(name=name, num_classes=7, image_size=size)
    load_backbone(net, tmp_path / "x.pt")
    check(net, reference, size)
    assert net.feature_layer == f"model.{layer}"


def test_another_number_of_classes(tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=5).state_dict(), tmp_path / "x.pt")
    net = TorchVision(name="mobilenet_v3_small", num_classes=7, image_size=32)
    with pytest.raises(UserError, match=r"classifier.3.weight is \[5, 1024\], the net wants \[7, 1024\]"):
        load_backbone(net, tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            lambda: TorchVision(name="mobilenet_v3", num_classes=9, image_size=32),
            "did you mean .*mobilenet_v3_",
        ),
        (lambda: TorchVision(name="fcn_resnet50", num_classes=9, image_size=32), "no such classifier"),
        (lambda: TorchVision(name="alexnet", num_classes=9, image_size=32), "cannot take 32x32"),
        (lambda: TorchVision(name="squeezenet1_1", num_classes=9, image_size=32), "no linear classifier"),
        (lambda: TorchVision(name="vit_b_32", num_classes=9, image_size=224), "do not follow"),
        (lambda: Timm(name="resnt18", num_classes=9, image_size=32), "did you mean .*resnet18"),
        (lambda: Timm(name="levit_128s", num_classes=9, image_size=64), "no single linear classifier"),
    ],
)
def test_bad_names(build, says):
    pytest.importorskip("timm")
    with torch.device("meta"), pytest.raises(UserError, match=says) as error:
        build()
    assert str(error.value).startswith("model.name=")


@pytest.mark.slow  # a net of our own: test_backbones.py
def test_compiles_to_one_graph():
    net, x = (
        TorchVision(name="shufflenet_v2_x0_5", num_classes=7, image_size=32).eval(),
        torch.rand(2, 3, 32, 32),
    )
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_timm_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install redoubt\[timm\]"):
        Timm(name="resnet18", num_classes=9, image_size=32)


def test_the_trial_leaves_no_trace():
    torch.manual_seed(0)
    expected = torchvision.models.mobilenet_v3_small(num_classes=7)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    net = TorchVision(name="mobilenet_v3_small", num_classes=7, image_size=32)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in net.model.state_dict().items())
    assert all(m.training and not m._forward_hooks for m in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_last_map():
    conv, pool = nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(nn.Sequential(conv, nn.ReLU()), pool, nn.Flatten())
    x = torch.rand(1, 3, 8, 8)
    assert last_map(net, lambda: net[0](x)) == "0"
    assert last_map(net, lambda: net(x)) == "0.0"  # no map comes out: the last convolution
    assert last_map(net, lambda: net[2](x)) == ""
