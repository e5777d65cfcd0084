"""Anybody's files: renamed, wrapped, prefixed, broken, and of another net."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn

from redoubt.errors import UserError
from redoubt.nets import Backbone, Normalize, load_backbone, read_state_dict
from redoubt.nets.preact import PreActResNet18
from redoubt.nets.small import CNNSmall, ResNetSmall
from redoubt.nets.wrn import WideResNet

WIDTHS = (4, 8)


def small(seed: int = 0, **arguments) -> ResNetSmall:
    torch.manual_seed(seed)
    return ResNetSmall(**({"num_classes": 10, "widths": WIDTHS} | arguments)).eval()


def wide(seed: int = 0) -> WideResNet:
    torch.manual_seed(seed)
    return WideResNet(num_classes=10, depth=10, width=1).eval()


def kuangliu(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's names to kuangliu's."""
    return {k.replace(".downsample.", ".shortcut.").replace("fc.", "linear."): v for k, v in state.items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_state_dict": s},
        lambda s: {"model": {"state_dict": s}, "lr": 0.1},
        lambda s: {"net": s, "acc": 93.1},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"net._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {f"module.model.{k}": v for k, v in s.items()},
        kuangliu,
        lambda s: {"net": {f"module.{k}": v for k, v in kuangliu(s).items()}},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
        lambda s: {k: v.half().float() if v.is_floating_point() else v for k, v in s.items()},
    ],
)
def test_round_trips(path, wrap):
    source, net = small(1), small(2)
    for p in source.parameters():
        p.data = p.data.half().float()  # so that the last case is exact
    torch.save(wrap(source.state_dict()), path)
    load_backbone(net, path)
    assert equal(net, source)
    assert isinstance(net.normalize, nn.Identity)


def test_wide_resnet_ignores_the_dead_group(path):
    source, net = wide(1), wide(2)
    dead = {k.replace("block1.", "sub_block1."): v for k, v in wide(3).state_dict().items() if "block1." in k}
    torch.save(source.state_dict() | dead, path)
    load_backbone(net, path)
    assert equal(net, source)


def test_preact_keeps_its_own_names(path):
    with torch.device("meta"):
        names = set(PreActResNet18(num_classes=10).state_dict())
    assert {"conv1.weight", "layer2.0.shortcut.0.weight", "bn.weight", "linear.bias"} <= names
    assert not any(k.startswith("layer1.0.shortcut") for k in names)


def test_old_serialisation_and_safetensors(tmp_path):
    source = small(1)
    torch.save(source.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(source.state_dict(), tmp_path / "new.safetensors")
    for name in ("old.pth", "new.safetensors"):
        net = small(2)
        load_backbone(net, tmp_path / name)
        assert equal(net, source)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std")])
@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_normalisation_of_the_file_becomes_the_first_layer(path, names, prefix):
    source, net = small(1, normalize=True, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]), small(2)
    state = {prefix + k: v for k, v in source.state_dict().items()}
    outer = "module." if prefix.startswith("module.") else ""
    state |= {outer + names[0]: source.normalize.mean, outer + names[1]: source.normalize.std.view(3, 1, 1)}
    torch.save(state, path)
    load_backbone(net, path)
    assert isinstance(net.normalize, Normalize)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(net(x), source(x))


def test_normalisation_on_another_scale_is_refused(path):
    mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    torch.save(small(1).state_dict() | {"mean": mean, "std": std}, path)
    refuse(path, small(2), r"\[0,1\]")


def refuse(path, net: Backbone, says: str) -> None:
    """Loading ends in one line that names the file, and leaves the net as it was."""
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=says) as error:
        load_backbone(net, path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert isinstance(net.normalize, nn.Identity)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            lambda: small(num_classes=100).state_dict(),
            re.escape("of another net: fc.weight is [100, 8], the net wants [10, 8]; fc.bias is [100]"),
        ),
        (lambda: small(widths=(4, 8, 16)).state_dict(), "of another net: fc.weight is"),
        (lambda: {k: v for k, v in small().state_dict().items() if k != "bn1.bias"}, "bn1.bias is missing"),
        (lambda: small().state_dict() | {"aux.weight": torch.zeros(2)}, "aux.weight is none of the net's"),
        (lambda: small().state_dict() | {"mean": torch.zeros(3)}, "mean is none of the net's"),
        (lambda: small().state_dict() | {"linear.weight": torch.zeros(10, 8)}, "linear.weight is none"),
        (lambda: CNNSmall(num_classes=10).state_dict(), "of another net"),
    ],
)
def test_another_net(path, state, says):
    torch.save(state(), path)
    refuse(path, small(1), says)


class Foreign:
    """A class that unpickling would have to import."""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"not a checkpoint", "no torch file"),
        (b"PK\x03\x04 cut", "no torch file"),
        (pickle.dumps({"model": Foreign()}), "no torch file"),
    ],
)
def test_foreign_files(path, content, says):
    path.write_bytes(content)
    refuse(path, small(), says)


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_files(tmp_path, keep, suffix):
    path, state = tmp_path / f"weights{suffix}", small().state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    refuse(path, small(), "cut short|no torch file")


def test_missing_files_and_folders(tmp_path):
    refuse(tmp_path / "none.pt", small(), "no such file")
    refuse(tmp_path, small(), "no such file")


def test_a_whole_module_is_not_unpickled(path):
    torch.save(small(), path)
    refuse(path, small(), "save model.state_dict")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3), {"state_dict": {}}])
def test_no_state_dict(path, content):
    torch.save(content, path)
    with pytest.raises(UserError, match="holds no state_dict"):
        read_state_dict(path)
