"""What may be scored: every example once, in its ball, on a net that answers alike; and on other nets' gradients."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import refused
from tests.processes import on_ranks
from torch import nn

from redoubt import config
from redoubt.attacks import NAttack, WhiteBox
from redoubt.attacks.base import Attack, Draws
from redoubt.build import build_data, build_module
from redoubt.defenses.fsr import FSRLayer
from redoubt.evaluation.kept import Kept
from redoubt.evaluation.suite import Suite, suite
from redoubt.evaluation.verdicts import Judge
from redoubt.runs import running
from redoubt.runs.identity import plain

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EPS = 0.1


class Linear(nn.Module):
    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(48, 4)

    def logits(self, x):
        return self.fc(x.flatten(1))


def pictures(n, size=4):
    g = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), generator=g, dtype=torch.uint8), torch.randint(4, (n,), generator=g)


class Says(Attack):
    """Whatever the test wants."""

    needs_gradients = False
    norm = "linf"

    def __init__(self, function, eps=EPS, norm="linf"):
        self.function, self.eps, self.norm = function, eps, norm

    def __call__(self, logits, x, y, draws):
        return self.function(x)


def judged(attacks, module=None, n=5, chunk=3, images=None, labels=None, options=None, **rest):
    given = pictures(n)
    chosen = Suite(attacks=attacks, eps=EPS, **rest)
    judge = Judge(module or Linear(), chosen, chunk=chunk, seed=0, device=CPU, progress=False, **(options or {}))
    return judge(given[0] if images is None else images, given[1] if labels is None else labels)


# ---- the ball ---------------------------------------------------------------------------------------------------


def moved(by, norm, dtype=torch.float32):
    """One pixel of the last image moves: the same distance in both norms."""

    def move(x):
        adv = x.to(dtype).clone()
        adv[-1, 1, 2, 3] += by
        return adv

    return Says(move, norm=norm)


#: So that float32 holds the distance to 1e-8.
BLACK_IMAGES = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_millionth_is_the_slack(norm):
    for by in (0.0, EPS, EPS + 5e-7):
        judged({"fine": moved(by, norm)}, images=BLACK_IMAGES)
    for dtype in (torch.float32, torch.float64):
        for by in (EPS + 2e-6, EPS + 1.2e-6, 0.5):
            attacks = {"fine": moved(EPS, norm), "far": moved(by, norm, dtype)}
            says = ("attack far:", "1 of 3 images", "eps 0.1", norm)
            refused(lambda a=attacks: judged(a, images=BLACK_IMAGES), *says)


def test_examples_in_float64_are_scored():
    assert len(judged({"fine": moved(EPS / 2, "linf", torch.float64)}, images=BLACK_IMAGES)["fine"]) == 5


def at(value):
    def change(x):
        adv = x.double()
        adv[0, 0, 0, 0] = value
        return adv.float() if torch.tensor(value).float().item() == value else adv

    return change


@pytest.mark.parametrize(
    "function",
    [at(-1e-9), at(1 + 1e-9), at(float("nan")), at(float("inf")), at(-0.5), at(2.0), lambda x: x[:2],
     lambda x: x[:, :, :3], lambda x: x[:, :1], lambda x: x.flatten(1)],
)  # fmt: skip
@pytest.mark.parametrize("eps", [1.0, None])
def test_what_is_no_image_is_refused_by_name(function, eps):
    net = Linear().double()
    net.logits = lambda x: net.fc(x.double().flatten(1))
    refused(lambda: judged({"odd": Says(function, eps)}, net), "attack odd:", "pixels outside [0, 1]")


def test_leaving_the_ball_is_refused_under_rounding_too():
    far = Says(lambda x: (x + 0.3).clamp(0, 1))
    refused(lambda: judged({"far": far}, options={"save": "uint8"}), "attack far:", "farther than eps")


def test_another_shape_is_refused_under_rounding_too():
    refused(lambda: judged({"odd": Says(lambda x: x[:, :, :3])}, options={"save": "uint8"}), "attack odd:")


def test_logits_that_are_not_finite_are_wrong():
    class Broken(Linear):
        def logits(self, x):
            z = super().logits(x)
            return torch.where(x[:, :1, 0, 0] > 0.9, z * float("nan"), z)

    net, (images, _) = Broken(), pictures(9)
    images[:, 0, 0, 0] = 100
    labels = torch.zeros(9, dtype=torch.long)  # argmax calls NaN class 0
    net.fc.bias.data[0] += 100
    images[:4, 0, 0, 0] = 250
    found = judged({"same": Says(lambda x: x.clone())}, net, images=images, labels=labels)
    assert found["natural"].tolist() == found["same"].tolist() == [False] * 4 + [True] * 5


# ---- the net ----------------------------------------------------------------------------------------------------

PGD = WhiteBox(eps=EPS, steps=2, step=0.5)


class Dropout(Linear):
    def logits(self, x):
        return self.fc(F.dropout(x.flatten(1), 0.5))  # training by default, whatever the mode


class FaintNoise(Linear):
    def logits(self, x):
        z = super().logits(x)
        return z + 1e-3 * torch.randn_like(z)


@pytest.mark.parametrize("kind", [Dropout, FaintNoise])
@pytest.mark.parametrize("attack", [PGD, NAttack(eps=EPS, queries=4, population=2)])
def test_a_random_forward_is_refused_unless_the_suite_is_for_such_nets(kind, attack):
    refused(lambda: judged({"a": attack}, kind()), "forward is random", "attack=eot")
    found = judged({"a": attack}, kind(), stochastic=True)
    assert len(found["a"]) == 5


def test_noise_of_fsr_in_every_forward_is_refused():
    module = build_module(config.compose(["defense=fsr", "base=at", "model=resnet_small", "data=digits"]))
    images, labels = pictures(4, 16)
    judged({"a": PGD}, module, images=images, labels=labels)
    layer = next(m for m in module.modules() if isinstance(m, FSRLayer))
    forward = layer.forward

    def noisy(x):
        layer.noise = torch.randn(len(x), *layer.shape)
        try:
            return forward(x)
        finally:
            layer.noise = None

    layer.forward = noisy
    refused(lambda: judged({"a": PGD}, module, images=images, labels=labels), "forward is random")
    judged({"a": PGD}, module, images=images, labels=labels, stochastic=True)


def test_dropout_in_training_mode_is_switched_off():
    class Modal(Linear):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def logits(self, x):
            return self.fc(self.drop(x.flatten(1)))

    net = Modal().train()
    np.testing.assert_array_equal(judged({"a": PGD}, net)["a"], judged({"a": PGD}, Linear())["a"])
    assert net.drop.training


class Detached(Linear):
    def logits(self, x):
        return super().logits(x).detach()


class NoGrad(Linear):
    @torch.no_grad()
    def logits(self, x):
        return super().logits(x)


@pytest.mark.parametrize("kind", [Detached, NoGrad])
def test_a_net_without_gradients(kind):
    pyautoattack = pytest.importorskip("pyautoattack")
    assert pyautoattack
    from redoubt.attacks import AutoAttack

    square = AutoAttack(eps=EPS, version=["square"], queries=5)
    blind = {"square": square, "nattack": NAttack(eps=EPS, queries=30, population=5)}
    found, wanted = judged(blind, kind()), judged(blind, Linear())
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    for wanting in (PGD, AutoAttack(eps=EPS, version=["apgd-ce"], queries=5)):
        refused(lambda w=wanting: judged({**blind, "wants": w}, kind()), "attack wants needs gradients",
                "attack=square", "attack=nattack")  # fmt: skip


class WithBN(nn.Module):
    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.fc = nn.Linear(16, 4)

    def logits(self, x):
        return self.fc(self.drop(self.bn(self.conv(x))).flatten(1))


@pytest.mark.parametrize("fails", [False, True])
def test_both_nets_are_left_as_they_were(fails):
    net, source = WithBN(), WithBN(1)
    for module in (net, source):
        module.train()
        module.bn.eval()
        module.conv.requires_grad_(False)
    before = [facts(m) for m in (net, source)]
    inside = []

    def look(x):
        inside.extend(m.training for module in (net, source) for m in module.modules())
        inside.extend(p.requires_grad for module in (net, source) for p in module.parameters())
        inside.append(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
        inside.append(torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"))
        for module in (net, source):
            inside.append(module.logits(x).dtype != torch.float32)
        if fails:
            raise RuntimeError("inside")
        return x

    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    attacks = {"pgd": PGD, "transfer": WhiteBox(eps=EPS, steps=2, step=0.5), "look": Says(look)}
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            options = {"on_source": frozenset({"transfer"}), "options": {"source": source}}
            if fails:
                with pytest.raises(RuntimeError, match="inside"):
                    judged(attacks, net, **options)
            else:
                judged(attacks, net, **options)
            assert torch.is_autocast_enabled("cpu")
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept
    assert inside
    assert not any(inside)
    for module, (modes, learning, state) in zip((net, source), before, strict=True):
        now = facts(module)
        assert now[:2] == (modes, learning)
        assert all(torch.equal(now[2][k], v) for k, v in state.items())
        assert all(p.grad is None for p in module.parameters())


def facts(module):
    return (
        {n: m.training for n, m in module.named_modules()},
        {n: p.requires_grad for n, p in module.named_parameters()},
        {k: v.clone() for k, v in module.state_dict().items()},
    )


# ---- any number of processes ---------------------------------------------------------------------------------------

SIZES, CHUNKS = (1, 2, 3, 7, 11), (1, 2, 4)


def everything(rank, world, folder):
    """Verdicts by (images, chunk); each call of an attack leaves a line in ``folder``."""
    os.fsync = lambda fd: None  # of hundreds of lines; in a process of its own
    verdicts = {}
    for n in SIZES:
        for chunk in CHUNKS:
            seen = []

            class Told(WhiteBox):
                def __call__(self, logits, x, y, draws, after=None, seen=seen):
                    seen.append([draws.chunk, draws.attack, len(x)])
                    return super().__call__(logits, x, y, draws, after)

            attacks = {"fixed": Told(eps=EPS, steps=2, step=0.5), "longer": Told(eps=EPS, steps=5, step=0.5),
                       "start": Told(eps=EPS, steps=1, step=0.2, start="uniform")}  # fmt: skip
            chosen = Suite(attacks=attacks, eps=EPS, ensemble=True, sections={n: n for n in attacks})
            images, labels = pictures(n)
            labels = torch.where(torch.arange(n) % 4 == 0, labels, Linear().logits(images.float() / 255).argmax(1))
            kept = Kept(folder / f"{n}-{chunk}", {"n": n})
            judge = Judge(Linear(), chosen, chunk=chunk, seed=3, device=CPU, kept=kept, progress=False)
            found = judge(images, labels)
            verdicts[f"{n}-{chunk}"] = {k: v.tolist() for k, v in found.items()}
            file = folder / f"calls-{n}-{chunk}-{rank}.json"
            file.write_text(json.dumps(seen))
    return verdicts


def test_every_example_once_on_one_two_and_three_processes(tmp_path):
    found = {}
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        found[world] = on_ranks(world, folder, everything, folder)
    (alone,) = found[1]
    assert any(False in v["start"] and True in v["start"] for v in alone.values())
    for world in (1, 2, 3):
        folder = tmp_path / str(world)
        for rank in range(world):
            assert found[world][rank] == alone, (world, rank)
        for n in SIZES:
            for chunk in CHUNKS:
                files = [folder / f"calls-{n}-{chunk}-{rank}.json" for rank in range(world)]
                calls = [[tuple(c) for c in json.loads(f.read_text())] for f in files]
                chunks = -(-n // chunk)
                wanted = [(i, name, min(chunk, n - i * chunk)) for i in range(chunks)
                          for name in ("fixed", "longer", "start")]  # fmt: skip
                assert sorted(c for own in calls for c in own) == sorted(wanted), (world, n, chunk)
                for rank, own in enumerate(calls):
                    assert {c[0] for c in own} == set(range(rank, chunks, world))
                for path in (folder / f"{n}-{chunk}").glob("*.jsonl"):
                    rank = int(path.name.split(".")[-2])
                    numbers = [json.loads(line)["chunk"] for line in path.read_text().splitlines()]
                    assert numbers == list(range(rank, chunks, world))


# ---- transfer ---------------------------------------------------------------------------------------------------


def test_a_transfer_attack_is_crafted_on_the_source_and_scored_on_the_judged_net():
    net, source = Linear(), Linear(7)
    images, _ = pictures(40)
    x = images.float() / 255
    labels = net.logits(x).argmax(1)
    attack = WhiteBox(eps=EPS, steps=4, step=0.3)
    attacks = {"own": attack, "transfer": attack, "longer": WhiteBox(eps=EPS, steps=6, step=0.3)}
    on_source = frozenset({"transfer"})
    found = judged(attacks, net, images=images, labels=labels, chunk=7, on_source=on_source, options={"source": source})
    draws = Draws(0, "transfer", 0, CPU)
    for name, crafted in (("own", net), ("transfer", source)):
        adv = attack(crafted.logits, x, labels, draws)
        np.testing.assert_array_equal(found[name], (net.logits(adv).argmax(1) == labels).numpy())
    np.testing.assert_array_equal(
        found["longer"], judged({"longer": attacks["longer"]}, net, images=images, labels=labels)["longer"]
    )
    assert found["own"].sum() < found["transfer"].sum()  # of another net's gradients less
    refused(lambda: judged(attacks, net, on_source=on_source), "attack.source is missing", "transfer")
    blind = {"transfer": attack}  # a judged net without gradients may be attacked from another
    judged(blind, Detached(), on_source=on_source, options={"source": source})


BLACK = ("attack=blackbox", "attack.queries=12", "attack.options={steps: 2}", "trainer.max_epochs=1")


@pytest.fixture
def black(cell):
    def compose(*options):
        return cell("model=cnn_small", "model.widths=[4,4,8,8]", "data.image_size=8", "data.limit_test=6", *options)

    return compose


def test_sources_by_run_file_and_auto(black, tmp_path):
    pytest.importorskip("torchattacks")
    cfg = black(*BLACK)
    data = build_data(cfg)
    run = running.train(cfg, data)
    seen = {"auto": running.evaluate_run(cfg, data, run)}
    natural = next(p for p in run.folder.parent.iterdir() if p.name.startswith("none-standard-"))
    state = torch.load(natural / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    file = tmp_path / "theirs.pt"
    torch.save({k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}, file)
    for source in (natural.name, str(natural), str(natural / "checkpoints/last.ckpt"), str(file)):
        seen[source] = running.evaluate_run(black(*BLACK, f"attack.source={source}"), data, run)
    # One net by five names: one identity, the same verdicts.
    assert len({r["source"] for r in seen.values()}) == 1
    assert all(r["metrics"] == seen["auto"]["metrics"] for r in seen.values())
    assert list(seen["auto"]["metrics"])[1:5] == ["transfer_pgd", "transfer_mi", "transfer_di", "transfer_ti"]
    own = running.evaluate_run(black(*BLACK, f"attack.source={run.name}"), data, run)
    assert own["source"] != seen["auto"]["source"]
    # Wrong ones are one line, which names the source.
    odd = tmp_path / "odd.pt"
    torch.save({"fc.weight": torch.zeros(3, 3)}, odd)
    other = black("base=standard", "trainer.max_epochs=1", "model.widths=[4,4,8]", "seed=4")
    size = running.train(black("base=standard", "data.image_size=16", "trainer.max_epochs=1"), None or build_data(
        black("base=standard", "data.image_size=16")))  # fmt: skip
    failed = running.train(other, build_data(other))
    failed.update(state="interrupted")
    for source, says in (
        ("nobody", "no such run"),
        (str(tmp_path / "nothing.pt"), "no folder of a run"),
        (str(odd), "odd.pt"),
        (size.name, "image_size is 16, the data's 8"),
        (failed.name, "is interrupted"),
    ):
        wrong = black(*BLACK, f"attack.source={source}")
        refused(lambda w=wrong: running.transfer_source(w, data), f"attack.source={source}", says)


def test_a_source_of_other_classes_is_one_line(black):
    ours = black("base=standard", "trainer.max_epochs=1", "data.num_classes=7")
    run = running.train(ours, build_data(ours))
    wrong = black(*BLACK, f"attack.source={run.name}")
    refused(lambda: running.transfer_source(wrong, build_data(wrong)), "num_classes is 7, the data's 10")


def test_blackbox_in_a_suite_knows_its_source():
    made = suite(plain(config.resolve(config.compose(["attack=blackbox"])).attack))
    assert {n for n in made.attacks if n.startswith("transfer")} == set(made.on_source)
