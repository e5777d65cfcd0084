"""Anybody's files: renamed, wrapped, prefixed, broken, and of another net."""

from __future__ import annotations

import pickle
import re

import pytest
import torch
from torch import nn

from redoubt.errors import UserError
from redoubt.nets import Backbone, Normalize, load_backbone
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
        lambda s: {**s, "epoch": 3, "arch": "x"},
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
    refuse(path, small(), "holds no state_dict")


# ---- wrapped by other tools --------------------------------------------------------------------------------------

NORMALIZED = {"normalize": True, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


class Constants(nn.Module):
    """A normalisation as people write it, under names of their own."""

    def __init__(self, names: tuple[str, str], shape: tuple[int, ...] = (3, 1, 1)) -> None:
        super().__init__()
        for name, values in zip(names, ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]), strict=True):
            self.register_buffer(name, torch.tensor(values).view(shape))


class Wrapper(nn.Module):
    """A LightningModule: the net under a name, and a loss with weights of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model = net
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))


def saved(path, wrap, *, normalized: bool = False) -> ResNetSmall:
    """Saves a net as a tool would; the net."""
    source = small(1, **(NORMALIZED if normalized else {}))
    torch.save(wrap(source), path)
    return source


@pytest.mark.parametrize(
    ("normalized", "wrap"),
    [
        (False, lambda n: nn.DataParallel(nn.Sequential(n)).state_dict()),
        (False, lambda n: {"state_dict": Wrapper(nn.Sequential(n)).state_dict(), "optimizer": {"state": {0: {}}}}),
        (False, lambda n: {"a": [{"b": {f"_orig_mod.module.{k}": v for k, v in n.state_dict().items()}}]}),
        (False, lambda n: torch.optim.swa_utils.AveragedModel(n).state_dict()),
        (True, lambda n: nn.Sequential(Constants(("mean", "std")), n).state_dict()),
        (True, lambda n: nn.DataParallel(nn.Sequential(Constants(("mu", "sigma")), n)).state_dict()),
        (True, lambda n: nn.Sequential(Constants(("new_mean", "new_std"), (1, 3, 1, 1)), n).state_dict()),
        (True, lambda n: {"model": nn.Sequential(Constants(("pixel_mean", "pixel_std"), (3,)), n).state_dict()}),
        (True, lambda n: {"net": n.state_dict(), "norm": Constants(("means", "stds")).state_dict()}),
        (True, lambda n: {"state_dict": {f"net._orig_mod.{k}": v for k, v in nn.Sequential(
            nn.Sequential(Constants(("_mean", "_std"))), nn.DataParallel(n)).state_dict().items()}}),
    ],
)  # fmt: skip
def test_the_net_is_found_below_any_wrappers(path, normalized, wrap):
    source, net = saved(path, wrap, normalized=normalized), small(2)
    load_backbone(net, path)
    assert equal(net, source)
    assert isinstance(net.normalize, Normalize if normalized else nn.Identity)
    torch.testing.assert_close(net(x := torch.rand(2, 3, 16, 16)), source(x))


def test_a_net_under_two_names_is_one(path, caplog):
    """As `robustness` saves it: the net, and an attacker that holds it and a normalisation again."""
    caplog.set_level("INFO")

    def wrap(net):
        attacker = nn.ModuleDict({"normalize": Constants(("new_mean", "new_std")), "model": net})
        whole = nn.ModuleDict({"normalizer": Constants(("new_mean", "new_std")), "model": net, "attacker": attacker})
        return {"model": nn.DataParallel(whole).state_dict(), "epoch": 3}

    source, net = saved(path, wrap, normalized=True), small(2)
    load_backbone(net, path)
    assert equal(net, source)
    assert isinstance(net.normalize, Normalize)
    assert "takes" not in caplog.text


def test_what_lies_beside_the_net_is_left_out_with_a_line(path, caplog):
    caplog.set_level("INFO")
    saved(path, lambda n: {"state_dict": Wrapper(n).state_dict(), "n_averaged": torch.tensor(3)})
    load_backbone(small(2), path)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == f"{path}: leaves out what is none of the net's: n_averaged, criterion (2 tensors)"


AVERAGED = ("ema_state_dict", "state_dict_ema", "model_ema", "ema", "averaged_model", "swa_model", "modelEMA")


@pytest.mark.parametrize("name", AVERAGED)
@pytest.mark.parametrize("wrap", ["{}", "module.{}"])
def test_averaged_weights_beside_raw_ones(path, caplog, name, wrap):
    caplog.set_level("INFO")
    raw, average = ({wrap.format(k): v for k, v in small(i).state_dict().items()} for i in (1, 3))
    torch.save({name: average, "state_dict": raw, "epoch": 3}, path)
    net = small(2)
    load_backbone(net, path)
    assert equal(net, small(1))
    place = name + ("" if wrap == "{}" else ".module")
    assert "(raw)" in caplog.text
    assert f"{path}::{place} would take {place} (averaged)" in caplog.text
    for choice in (place, name):
        net = small(2)
        load_backbone(net, f"{path}::{choice}")
        assert equal(net, small(3))


def test_averaged_weights_as_a_submodule(path, caplog):
    """As ema-pytorch and wrappers of timm's ModelEma keep them, the net itself at the top or below a name."""
    caplog.set_level("INFO")
    for raw in ("", "online_model."):
        parts = {raw: small(1), "ema_model.module.": small(3)}
        torch.save({p + k: v for p, net in parts.items() for k, v in net.state_dict().items()}, path)
        for choice, seed in (("", 1), ("::ema_model", 3)):
            net = small(2)
            load_backbone(net, f"{path}{choice}")
            assert equal(net, small(seed))
    assert "ema_model.module (averaged)" in caplog.text


@pytest.mark.parametrize(
    ("names", "choice", "says"),
    [
        (("netA", "netB"), "", "2 times: give one of .*::netA, .*::netB"),
        (("teacher",), "", "only 'teacher' holds all weights .*::teacher if it is meant"),
        (("state_dict", "ema"), "::swa", "swa is no name of weights in it: there are state_dict, ema"),
    ],
)
def test_weights_that_have_to_be_chosen(path, names, choice, says):
    torch.save({name: small(i).state_dict() for i, name in enumerate(names)}, path)
    net = small(5)
    with pytest.raises(UserError, match=says):
        load_backbone(net, f"{path}{choice}")
    assert equal(net, small(5))
    load_backbone(net, f"{path}::{names[-1]}")
    assert equal(net, small(len(names) - 1))


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda s: {f"module.0.{k}": v for k, v in s.items() if k != "fc.bias"},
         "fc.bias is missing .*this is under module.0, .* the file has module$"),
        (lambda s: {f"encoder.{k.replace('layer', 'stage')}": v for k, v in s.items()}, "under encoder, .*has encoder"),
        (lambda s: {"g": {f"x.{i}": v for i, v in enumerate(s.values())}}, "none of its names is there; .* has g.x$"),
        (lambda s: {"0.mean": torch.zeros(3), **{f"1.{k}": v for k, v in s.items()}}, "0.mean is half of a normalis"),
        (lambda s: {"0.mean": torch.zeros(3), "0.std": torch.ones(3), "a.mean": torch.ones(3), "a.std": torch.ones(3),
                    **{f"1.{k}": v for k, v in s.items()}}, "holds several normalisations, 0.mean, 0.std, a.mean"),
    ],
)  # fmt: skip
def test_what_is_not_found_names_the_prefixes(path, wrap, says):
    torch.save(wrap(small(1).state_dict()), path)
    refuse(path, small(2), says)


def test_a_file_that_refers_to_itself_is_read_once(path):
    content = {"state_dict": small(1).state_dict()}
    content["model"] = content
    torch.save(content, path)
    net = small(2)
    load_backbone(net, path)
    assert equal(net, small(1))
