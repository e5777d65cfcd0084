"""The benchmark's peers compute what ours do; its measurements are of the calls they name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks import measure as measuring
from benchmarks import ours
from benchmarks.machine import flops
from benchmarks.measure import alternate, compared, peak_memory_on, seconds_on
from benchmarks.options import Options, read
from benchmarks.peer_defenses import AFD, CURE, FSR, PEERS
from benchmarks.peers import PGDAT
from tests.conftest import refused
from torch import Tensor

from redoubt.data import Batch
from redoubt.defenses import RobustModule
from redoubt.rng import generator

CPU = torch.device("cpu")
TINY = ("model.widths=[4,6,8]", "data.image_size=8", "inner.steps=3", "optimizer.lr=0.05")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own rate is measured in little time, with small products."""
    from benchmarks import bench, machine

    monkeypatch.setattr(machine, "TRIED", 0.02)
    monkeypatch.setattr(machine, "LASTS", 0.1)
    monkeypatch.setattr(bench, "squares", lambda device: [(256, 256, 256)])


def tiny(cell: str, *more: str) -> tuple[RobustModule, Batch]:
    """A small net of a cell in float64, and a batch."""
    o = Options(nets=(("resnet_small", 8),), precisions=("float32",), overrides=(*TINY, *more))
    module = ours.build(o, cell).double()
    batch = ours.noise_batch(o, module, 8)
    if module.ema is not None:
        module.ema.restart()
    return ours.ready(module), batch._replace(x=batch.x.double())


def same_numbers(peer: PGDAT, module: RobustModule, batch: Batch) -> Tensor:
    """Lets the peer draw what ours will draw in its next step; returns the attack's start."""
    done = module.steps_done
    if isinstance(peer, FSR):
        numbers = torch.rand(
            (len(batch.x), 2, *module.shapes[0]), generator=generator(module.seed, "gumbel/adv", done, 0)
        )
        peer.layers[0].draw = lambda logits: numbers.flatten(2).to(logits)
    if isinstance(peer, CURE):
        peer.coin = lambda: torch.rand((), generator=generator(module.seed, "revision", done)).item()
    return module.inner.start_point(batch.x, generator=generator(module.seed, "inner", done))


@pytest.mark.parametrize("cell", PEERS)
def test_peers_take_the_same_steps(cell: str) -> None:
    """From the same weights, images and random numbers: the same examples, losses and weights after each step."""
    module, batch = tiny(cell, *(["defense.rate=0.9"] if cell.startswith("cure") else []))
    peer = PEERS[cell](module)
    # TRADES' authors forward clean images twice: their running statistics part from ours in the first step.
    for _ in range(1 if cell == "trades" else 3):
        start = same_numbers(peer, module, batch)
        before = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        adv = peer.craft(batch.x, batch.y, start)
        torch.testing.assert_close(adv, module.craft(batch.x, batch.y), rtol=0, atol=1e-12)
        loss = peer.update(batch.x, adv, batch.y)
        module.training_step(batch, 0)
        assert module.tally.means()["loss"] == pytest.approx(loss.item(), rel=1e-6)
        after = dict(module.net.named_parameters())
        assert any(not torch.equal(after[name], old) for name, old in before.items())
        assert_same(after, dict(peer.net.named_parameters()), peer)
    if isinstance(peer, AFD):
        assert_same(module.ema.average, peer.average.state_dict(), peer)
    if isinstance(peer, CURE):
        assert_same(dict(module.revision.named_parameters()), dict(peer.revision.named_parameters()), peer)


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], peer: PGDAT) -> None:
    """Tensors of the same names are equal; gradients went through float32 on our side."""
    for name, tensor in mine.items():
        if isinstance(peer, AFD):
            name = name[3:] if name.startswith("fc.d") else f"backbone.{name}".replace("fc.linear.", "fc.")
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_trades_peer_forwards_clean_images_in_every_attack_step() -> None:
    module, batch = tiny("trades")
    module.craft(batch.x, batch.y)  # the net is looked at once, before the first attack
    seen = {"ours": 0, "authors": 0}
    peer = PEERS["trades"](module)
    for name, net in (("ours", module.net), ("authors", peer.net)):
        net.conv1.register_forward_hook(lambda *_, name=name: seen.update({name: seen[name] + 1}))
    peer.step(batch.x, batch.y)
    module.training_step(batch, 0)
    assert seen == {"ours": 1 + 3 + 2, "authors": 2 * 3 + 3}
    assert ours.passes(module, batch) == {"forward": 6, "backward": 3 + 2}


def test_sides_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}

    def measure(call) -> float:
        call()
        return float(len(order))

    readings = alternate(sides, measure, pairs=2, seconds=60)
    assert "".join(order) == "ababab"
    assert readings == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    rows = compared(readings, "a")
    assert [row["ratio"] for row in rows] == [1.0, pytest.approx((4 / 3 + 6 / 5) / 2)]
    assert {"median": 5.0, "min": 4.0, "max": 6.0, "n": 2}.items() <= rows[1].items()
    assert len(alternate(sides, measure, pairs=9, seconds=0)["a"]) == 1


def test_no_round_begins_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def call() -> None:
        now[0] += 2

    def rounds(seconds: float) -> int:
        readings = alternate({"a": call, "b": call}, lambda c: c() or 1.0, pairs=9, seconds=seconds, warm=False)
        return len(readings["a"])

    assert [rounds(s) for s in (-1, 7.9, 8, 11.9, 12, 1000)] == [1, 1, 2, 2, 3, 9]


def test_the_step_is_measured_last_for_as_long_as_there_is_time(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench, options, training

    asked: list[float] = []
    now = [0.0]

    def measured(o, cell, model, size, work, peers, seconds):
        asked.append(seconds)
        now[0] += 100
        return [{"side": "ours, float32", "median": 1.0}], {}

    for module in (options, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(training, "measured", measured)
    words = ["parts=step,craft", "cells=at,fsr", "precision=float32", "threads=1", "seconds=5", "batch=4"]
    assert [s.name for s in bench.main([*words, "minutes=10"])] == ["craft", "step"]
    assert asked == [5, (600 - 100) / 2, 600 - 200]
    asked.clear()
    assert [s.name for s in bench.main(words)] == ["step", "craft"]
    assert asked == [20, 20, 5]


def test_what_is_measured_is_the_call() -> None:
    assert 0.02 < seconds_on(CPU)(lambda: time.sleep(0.02)) < 1
    assert 60 < peak_memory_on(CPU)(lambda: torch.ones(2**24).sum()) < 100  # 64 MiB
    assert peak_memory_on(CPU)(lambda: None) < 5
    conv = torch.nn.Conv2d(2, 3, 3, bias=False)
    x = torch.rand(5, 2, 6, 6, requires_grad=True)
    once = 2 * 5 * 3 * 4 * 4 * 2 * 9
    assert flops(lambda: conv(x)) == once
    assert flops(lambda: torch.autograd.grad(conv(x).sum(), x)) == 2 * once


def test_keys(tmp_path: Path) -> None:
    o = read(["model=resnet18,wrn34_10", "batch=32,4", "parts=craft", "threads=1", "inner.steps=2"], ours.CELLS)
    assert o.nets == (("resnet18", 32), ("wrn34_10", 4))
    assert (o.parts, o.threads, o.overrides) == (("craft",), 1, ("inner.steps=2",))
    refused(lambda: read(["pair=3"], ours.CELLS), "pair is not a key", "did you mean pairs")
    refused(lambda: read(["parts=crafts"], ours.CELLS), "parts=crafts", "craft")
    refused(lambda: read(["model=a,b,c", "batch=1,2"], ours.CELLS), "batch=1,2", "each of 3")
    refused(lambda: read(["pairs=0"], ours.CELLS), "pairs=0", "at least 1")
    refused(lambda: read(["precision=fp8"], ours.CELLS), "precision=fp8", "bf16")
    refused(lambda: read(["steps"], ours.CELLS), "key=value")
    refused(lambda: read(["inner.stages=[[0,1,1.0]]"], ours.CELLS), "inner.stages", "peers")
    refused(lambda: read([f"to={tmp_path}"], ours.CELLS), str(tmp_path), "directory")
    assert read(["compile=reduce-overhead", "fold=false"], ours.CELLS).overrides == ("fold=false",)
    assert (read(["compile=false"], ours.CELLS).compile, read(["compile=true"], ours.CELLS).compile) == (None, "true")


@pytest.mark.slow
def test_the_parts(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part that starts no process, on a tiny net."""
    from benchmarks import bench, libraries, loading, suites

    monkeypatch.setattr(loading, "IMAGES", 64)
    less = ("model.widths=[4,6,8]", "trainer.max_epochs=1", "data.limit_train=512", "data.image_size=16")
    monkeypatch.setattr(suites, "TRAINED", (*suites.TRAINED, *less))
    threads = torch.get_num_threads()
    words = ["model=resnet_small", "batch=4", "pairs=1", "threads=1", "precision=float32", "cells=at,cure", "workers=0",
             "images=4", "suites=fgsm,ensemble",
             "parts=craft,step,libraries,memory,data,suite,profile", *TINY]  # fmt: skip
    bench.main([*words, f"to={tmp_path / 'r.json'}", f"markdown={tmp_path / 'r.md'}"])
    assert torch.get_num_threads() == threads
    results = json.loads((tmp_path / "r.json").read_text())
    rows = {name: part["rows"] for name, part in results["parts"].items()}
    sides = ["ours, float32", "authors"]
    assert [row["side"] for row in rows["craft"]] == sides
    assert [(row["cell"], row["side"]) for row in rows["step"]] == [(c, side) for c in ("at", "cure") for side in sides]
    assert [row["side"] for row in rows["libraries"]] == [sides[0], "torchattacks", "ART"]
    at, authors = rows["step"][:2]
    assert at["GFLOP"] == authors["GFLOP"] > 0
    rate = at["GFLOP"] / at["median"] / at["share"]
    assert 0.2 < rate / results["matrix_rate"]["float32"] < 5  # measured twice, on a machine that may be busy
    assert (at["forward"], at["backward"]) == (4, 4)
    assert authors["speed-up"] == 1
    assert at["speed-up"] == pytest.approx(authors["readings"][0] / at["readings"][0])
    assert at["share"] == pytest.approx(at["GFLOP"] / at["rates"][0] / at["readings"][0])
    assert [row["agree"] for row in rows["suite"]] == 2 * ["8 of 8", "12 of 12", "8 of 8", "24 of 24"]
    nets = ("resnet_small, fresh, 0.15/255", "resnet_small on digits, 51/255")
    assert [row["net"] for row in rows["suite"]] == [net for net in nets for _ in range(4)]
    for row in rows["profile"]:
        assert row["craft"] + row["update"] + row["after_step"] == pytest.approx(100, abs=25)
        assert row["convolution"] > 5
    assert rows["profile"][0]["host reads"] == 0
    assert all(row["median"] > 0 for row in rows["data"])
    text = (tmp_path / "r.md").read_text()
    assert "python benchmarks/bench.py model=resnet_small batch=4" in text
    assert text.count("\n### ") == len(rows)

    module, batch = tiny("at", "inner.start=none", "inner.step=0.4")
    attack = libraries.torchattacks.PGD(
        module.net.eval(), eps=module.inner.eps, alpha=module.inner.step_size, steps=3, random_start=False
    )
    torch.testing.assert_close(attack(batch.x, batch.y), module.craft(batch.x, batch.y), rtol=0, atol=1e-12)
    art = libraries.ART(module.float())
    adv = art.craft(batch.x.float(), batch.y)
    far = (adv - batch.x.float()).abs().amax().item()
    assert far == pytest.approx(module.inner.eps, abs=1e-5)
