"""Verdicts on disk: what a kill leaves is used, what is of another setting is not, nothing is computed twice."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch
from tests import conftest
from torch import nn

from redoubt import config
from redoubt.attacks import NAttack, WhiteBox
from redoubt.build import build_data
from redoubt.errors import UserError
from redoubt.evaluation import kept as kept_module
from redoubt.evaluation.kept import Kept, Outcome
from redoubt.evaluation.record import evaluate
from redoubt.evaluation.suite import Suite
from redoubt.evaluation.verdicts import Judge, distances, rounded
from redoubt.reporting.collect import Evaluation
from redoubt.runs.identity import plain

CPU = torch.device("cpu")
FACTS = {"run": "r", "axes": {}, "checkpoint": "last", "weights": "student", "train_seconds": 1.0}


class Net(nn.Module):
    """Ten classes of 8x8 images, by a net that attacks can fool."""

    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)
    num_classes, image_size, classes = 10, 8, None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 6, 3, stride=2), nn.Linear(6 * 9, 10)

    def logits(self, x):
        return self.fc(torch.relu(self.conv(x - 0.5)).flatten(1))


# ---- the files --------------------------------------------------------------------------------------------------


def outcome(n, seed=0, outside=0):
    return Outcome(np.random.default_rng(seed).random(n) < 0.5, outside, 0.125)


def same(a, b):
    return a is not None and np.array_equal(a.right, b.right) and (a.outside, a.seconds) == (b.outside, b.seconds)


def test_a_torn_last_line_is_as_if_it_were_not_there(tmp_path):
    """Cut off at every byte: what came before is found, and appending goes on well."""
    first = Kept(tmp_path, {})
    file = first.file("pgd", "d")
    wanted = [outcome(9, 0, 2), outcome(9, 1), outcome(5, 2, 1)]
    for i, one in enumerate(wanted):
        first.keep(file, i, one)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    begin = whole[:-1].rfind(b"\n") + 1
    assert whole.count(b"\n") == 3
    for cut in range(begin, len(whole)):
        path.write_bytes(whole[:cut])
        found = Kept(tmp_path, {})
        assert same(found.find(file, 0, 9), wanted[0]), cut
        assert same(found.find(file, 1, 9), wanted[1]), cut
        torn = found.find(file, 2, 5)
        assert same(torn, wanted[2]) if cut == len(whole) - 1 else torn is None, cut
        found.keep(file, 2, wanted[2])
        found.keep(file, 3, wanted[0])
        after = Kept(tmp_path, {})
        for i, one in enumerate([*wanted, wanted[0]]):
            assert same(after.find(file, i, len(one.right)), one), (cut, i)


@pytest.mark.parametrize(
    "rubbish",
    [b"\xff\xfe\n", b"[]\n", b"5\n", b"null\n", b"\n\n", b'{"chunk": 1}\n', b'{"chunk": 1, "n": 9, "right": "zz"}\n',
     b'{"chunk": 1, "n": 99, "right": "ff80", "outside": 0, "seconds": 0}\n',
     b'{"chunk": 1, "n": 9, "right": 7, "outside": 0, "seconds": 0}\n',
     b'{"chunk": 1, "n": "9", "right": "ff80", "outside": 0, "seconds": 0}\n'],
)  # fmt: skip
def test_lines_that_are_none_are_passed_over(tmp_path, rubbish):
    kept = Kept(tmp_path, {})
    file = kept.file("pgd", "d")
    kept.keep(file, 0, outcome(9))
    (path,) = tmp_path.iterdir()
    path.write_bytes(rubbish + path.read_bytes() + rubbish)
    again = Kept(tmp_path, {})
    assert same(again.find(file, 0, 9), outcome(9))
    assert again.find(file, 1, 9) is None


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64])
def test_bits_come_back_and_another_length_is_another_chunk(tmp_path, n):
    kept = Kept(tmp_path, {})
    file = kept.file("pgd", "d")
    kept.keep(file, 4, outcome(n, n))
    for found in (kept, Kept(tmp_path, {})):
        assert same(found.find(file, 4, n), outcome(n, n))
        assert found.find(file, 4, n + 1) is None
        assert found.find(file, 4, n - 1) is None
        assert found.find(file, 3, n) is None
    kept.keep(file, 4, outcome(n + 1))
    found = Kept(tmp_path, {})
    assert same(found.find(file, 4, n), outcome(n, n))
    assert same(found.find(file, 4, n + 1), outcome(n + 1))


def test_files_of_two_ranks_are_both_read(tmp_path, monkeypatch):
    for rank in range(2):
        monkeypatch.setattr(kept_module, "ranks", lambda rank=rank: (rank, 2))
        kept = Kept(tmp_path, {})
        file = kept.file("pgd", "d")
        for chunk in range(rank, 5, 2):
            kept.keep(file, chunk, outcome(3, chunk))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{file.name}.{r}.jsonl" for r in range(2)]
    monkeypatch.undo()
    kept = Kept(tmp_path, {})
    assert all(same(kept.find(file, chunk, 3), outcome(3, chunk)) for chunk in range(5))


def test_a_file_is_named_by_all_that_decides(tmp_path):
    base = Kept(tmp_path, {"seed": 0, "chunk": 4}).file("pgd", {"eps": 0.1})
    same_file = Kept(tmp_path, {"chunk": 4, "seed": 0}, "float32").file("pgd", {"eps": 0.1})
    assert base == same_file
    others = [
        Kept(tmp_path, {"seed": 1, "chunk": 4}).file("pgd", {"eps": 0.1}),
        Kept(tmp_path, {"seed": 0, "chunk": 5}).file("pgd", {"eps": 0.1}),
        Kept(tmp_path, {"seed": 0, "chunk": 4}).file("pgd", {"eps": 0.2}),
        Kept(tmp_path, {"seed": 0, "chunk": 4}).file("cw", {"eps": 0.1}),
        Kept(tmp_path, {"seed": 0, "chunk": 4}, "uint8").file("pgd", {"eps": 0.1}),
    ]
    assert len({base, *others}) == 6


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file", {})
    with pytest.raises(UserError, match="cannot write"):
        kept.keep(kept.file("pgd", "d"), 0, outcome(3))
    with pytest.raises(UserError, match=r"evaluation\.save='png' is not known: take float32, uint8"):
        Kept(tmp_path, {}, "png")


# ---- evaluations ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a kill: nothing catches it."""


@pytest.fixture
def calls(monkeypatch):
    """(chunk, attack, images) of every call of a WhiteBox attack; ``die_at`` raises at that one, before it."""
    true = WhiteBox.__call__

    class Calls(list):
        die_at = None

    seen = Calls()

    def call(self, logits, x, y, draws, after=None):
        if len(seen) == seen.die_at:
            raise Killed
        seen.append((draws.chunk, draws.attack, len(x)))
        return true(self, logits, x, y, draws, after)

    monkeypatch.setattr(WhiteBox, "__call__", call)
    return seen


@functools.cache
def composed(*options):
    """A resolved config: ten fake images of 8 pixels in chunks of 4."""
    small = ["model=cnn_small", "data=digits", "data.source=fake", "data.image_size=8", "data.limit_test=10",
             "evaluation.chunk=4", "trainer=cpu", "trainer.progress=false"]  # fmt: skip
    suite = () if any(o.startswith("attack=") for o in options) else SUITE
    return config.resolve(conftest.composed(*small, *suite, *options))


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Results and verdicts of an evaluation of the net, in ``tmp_path/eval`` or another folder."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # hundreds of lines

    def run(*options, weights="w", folder=None):
        folder, cfg = folder or tmp_path / "eval", composed(*options)
        results = evaluate(
            Net(), build_data(cfg), plain(cfg), facts=FACTS, weights_id=weights, folder=folder, device=CPU
        )
        return results, dict(np.load(folder / results["evaluation"] / "verdicts.npz"))

    return run


#: Four attacks, on one path and off it, one of them from a random start.
SUITE = ("attack=fsr_suite", "attack.eps=0.01", "attack.attacks.pgd100.steps=22", "attack.attacks.cw.start=uniform",
         "attack.attacks.cw.steps=6")  # fmt: skip
ATTACKS = 4 * 3


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def without_time(results):
    return {k: v for k, v in results.items() if k not in ("eval_seconds", "evaluated")}


def test_killed_after_each_attack_it_ends_as_if_undisturbed(evaluated, calls, tmp_path):
    results, verdicts = evaluated(folder=tmp_path / "whole")
    assert len(calls) == ATTACKS
    assert verdicts["natural"].sum() > 0
    everything = sorted(calls)
    assert len({c[:2] for c in calls}) == ATTACKS
    for n in range(ATTACKS):
        calls.clear()
        calls.die_at = n
        folder = tmp_path / f"killed{n}"
        with pytest.raises(Killed):
            evaluated(folder=folder)
        assert len(calls) == n
        assert not list(folder.glob("*/results.json"))
        calls.die_at = None
        found, rows = evaluated(folder=folder)
        assert sorted(calls) == everything, n  # each once, before the kill or after it
        assert equal(rows, verdicts)
        assert without_time(found) == without_time(results)
    # A kill after each of them, over and over.
    calls.clear()
    folder = tmp_path / "often"
    for n in range(ATTACKS):
        calls.die_at = n + 1
        if n < ATTACKS - 1:
            with pytest.raises(Killed):
                evaluated(folder=folder)
    assert equal(evaluated(folder=folder)[1], verdicts)
    assert sorted(calls) == everything


def test_a_line_torn_by_a_kill_is_computed_again(evaluated, calls, tmp_path):
    results, verdicts = evaluated()
    folder = tmp_path / "eval" / results["evaluation"]
    for name in ("pgd20", "natural", "cw"):
        shutil.rmtree(folder)
        (path,) = (folder.parent / "kept").glob(f"{name}-*.jsonl")
        path.write_bytes(path.read_bytes()[:-7])
        calls.clear()
        assert equal(evaluated()[1], verdicts)
        assert calls == ([(2, name, 2)] if name != "natural" else [])


@pytest.mark.parametrize(
    "options",
    [["attack.eps=0.02"], ["evaluation.seed=1"], ["evaluation.chunk=3"], ["evaluation.save=uint8"],
     ["evaluation.skip_broken=true"], ["threat=l2", "attack.eps=0.01"], ["+attack.bounded=false"]],
    ids=str,
)  # fmt: skip
def test_another_setting_finds_nothing_of_the_first(evaluated, calls, options, tmp_path):
    evaluated()
    calls.clear()
    evaluated(*options, folder=tmp_path / "alone")
    alone = list(calls)
    calls.clear()
    evaluated(*options)
    assert calls == alone
    assert calls


def test_other_weights_find_nothing_and_the_same_ones_everything(evaluated, calls):
    evaluated()
    calls.clear()
    evaluated(weights="v")
    assert len(calls) == ATTACKS
    calls.clear()
    evaluated()
    evaluated("attack.ensemble=false")  # another evaluation, of the same verdicts
    assert calls == []


def test_one_attack_s_verdicts_serve_another_suite(evaluated, calls):
    _, whole = evaluated()
    calls.clear()
    results, alone = evaluated("attack=pgd20", "attack.eps=0.01")
    assert calls == []
    assert results["evaluation"].startswith("pgd20-")
    assert list(results["metrics"]) == ["natural", "pgd20"]
    np.testing.assert_array_equal(alone["pgd20"], whole["pgd20"])
    evaluated("attack.attacks.fgsm.steps=2")  # of a suite of four one is another
    assert sorted(calls) == [(0, "fgsm", 4), (1, "fgsm", 4), (2, "fgsm", 2)]


def test_a_larger_limit_computes_the_new_chunks_only(evaluated, calls, tmp_path):
    evaluated("attack=pgd20", "attack.eps=0.01")
    calls.clear()
    _, found = evaluated("attack=pgd20", "attack.eps=0.01", "data.limit_test=15")
    assert calls == [(2, "pgd20", 4), (3, "pgd20", 3)]
    _, fresh = evaluated("attack=pgd20", "attack.eps=0.01", "data.limit_test=15", folder=tmp_path / "fresh")
    assert equal(found, fresh)
    calls.clear()
    _, smaller = evaluated("attack=pgd20", "attack.eps=0.01", "data.limit_test=8")
    assert calls == []
    np.testing.assert_array_equal(smaller["pgd20"], fresh["pgd20"][:8])


# ---- skip_broken ------------------------------------------------------------------------------------------------

FIXED = ("attack=fsr_suite", "attack.eps=0.01", "attack.attacks.pgd100.steps=22", "data.limit_test=60")
SKIP = "evaluation.skip_broken=true"


@pytest.fixture
def labelled(monkeypatch):
    """The fake images with the labels that the net gives them, so that most are standing before the attacks."""
    from redoubt.data import ImageData

    true = ImageData.arrays

    def arrays(self, split):
        images, labels = true(self, split)
        right = Net().logits(images.float() / 255).argmax(1)
        return images, torch.where(torch.arange(len(labels)) % 5 == 0, labels, right)

    monkeypatch.setattr(ImageData, "arrays", arrays)


def test_skipping_what_is_broken_leaves_the_ensemble_as_it_is(evaluated, calls, labelled):
    full, whole = evaluated(*FIXED, "evaluation.chunk=20")
    assert dict.fromkeys(("fgsm", "pgd20", "pgd100", "cw"), 60) == images_of(calls)
    calls.clear()
    results, found = evaluated(*FIXED, "evaluation.chunk=20", SKIP)
    assert set(found) == {"natural", "ensemble", "index", "label"}
    assert list(results["metrics"]) == ["natural", "ensemble"]
    assert list(results["nrr"]) == ["ensemble"]
    assert results["evaluation"] != full["evaluation"]
    for name in found:
        np.testing.assert_array_equal(found[name], whole[name])
    assert results["metrics"]["ensemble"] == full["metrics"]["ensemble"]
    # Each attack sees what all before it left: the cheapest first.
    standing = whole["natural"].copy()
    seen = {}
    for name in ("fgsm", "pgd20", "pgd100", "cw"):  # by their steps: 1, 20, 22 and 30
        seen[name] = standing.sum()
        standing &= whole[name]
    assert images_of(calls) == seen
    assert 60 > seen["fgsm"] > seen["pgd20"] > standing.sum() > 0
    calls.clear()
    evaluated("attack=pgd20", "attack.eps=0.01", "data.limit_test=60", "evaluation.chunk=20", "attack.ensemble=true")
    assert calls == []  # the full evaluation's, not those with holes


def images_of(calls):
    found = Counter()
    for _, name, images in calls:
        found[name] += images
    return dict(found)


def test_skipping_goes_on_after_a_kill(evaluated, calls, labelled, tmp_path):
    options = (*FIXED, "data.limit_test=30", "evaluation.chunk=10", SKIP)
    _, wanted = evaluated(*options, folder=tmp_path / "whole")
    everything = sorted(calls)
    for n in range(len(everything)):
        calls.clear()
        calls.die_at = n
        with pytest.raises(Killed):
            evaluated(*options, folder=tmp_path / f"killed{n}")
        calls.die_at = None
        assert equal(evaluated(*options, folder=tmp_path / f"killed{n}")[1], wanted)
        assert sorted(calls) == everything


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["attack=fsr_suite", "evaluation.save=uint8"], "evaluation.save"),
        (["attack=fsr_suite", "evaluation.save=float32"], "evaluation.save"),
        (["attack=pgd20"], "attack.ensemble=true"),
        (["attack=fsr_suite", "attack.ensemble=false"], "attack.ensemble=true"),
    ],
)
def test_skip_broken_is_refused_where_it_says_nothing(options, says):
    with pytest.raises(UserError, match=r"evaluation\.skip_broken=true") as error:
        composed(*options, SKIP)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# ---- saved examples ---------------------------------------------------------------------------------------------


def examples(folder, results, name):
    record = json.loads((folder / results["evaluation"] / "attack.json").read_text())
    files = sorted((folder / "kept" / record["kept"][name]).iterdir())
    return files, np.concatenate([np.load(file) for file in files])


@pytest.mark.parametrize("kind", ["float32", "uint8"])
@pytest.mark.parametrize(
    ("threat", "eps"), [("linf", "8/255"), ("linf", "0.03"), ("linf", "0.002"), ("l2", "0.3"), ("l2", "20/255")]
)
def test_saved_examples_are_what_was_scored(evaluated, calls, labelled, tmp_path, kind, threat, eps):
    options = (*SUITE, f"threat={threat}", f"attack.eps={eps}", "data.limit_test=15", "evaluation.chunk=6")
    results, verdicts = evaluated(*options, f"evaluation.save={kind}")
    images = build_data(composed("attack=none", "data.limit_test=15")).arrays("test")[0]
    x = images.float() / 255
    radius = results["threat"]["eps"]
    moved = 0.0
    for name in ("fgsm", "pgd20", "pgd100", "cw"):
        files, adv = examples(tmp_path / "eval", results, name)
        assert [f.name for f in files] == ["00000-6.npy", "00001-6.npy", "00002-3.npy"]
        assert adv.dtype == np.dtype(kind)
        assert adv.shape == (15, 3, 8, 8)
        point = torch.from_numpy(adv).float() / (255 if kind == "uint8" else 1)
        right = (Net().logits(point).argmax(1).numpy() == verdicts["label"]).astype(bool)
        np.testing.assert_array_equal(right, verdicts[name])
        far = distances(point, x, threat)
        assert far.max() <= radius + 1e-6
        moved = max(moved, float(far.max()))
    assert moved > (0.5 * radius if radius > 1 / 255 or kind == "float32" else -1)
    if radius < 1 / 255 and kind == "uint8":  # nothing on the grid is as near
        assert moved == 0
        np.testing.assert_array_equal(verdicts["fgsm"], verdicts["natural"])
    shown = Evaluation(tmp_path / "eval" / results["evaluation"], results).examples()
    assert shown is not None
    np.testing.assert_array_equal(shown["label"], verdicts["label"][:6])  # of the first chunk, 8 at most
    np.testing.assert_array_equal(shown["index"], verdicts["index"][:6])
    np.testing.assert_array_equal(shown["clean"], images[:6].numpy())
    for name in ("fgsm", "pgd20", "pgd100", "cw"):
        adv = torch.from_numpy(examples(tmp_path / "eval", results, name)[1][:6])
        point = adv.float() / (255 if kind == "uint8" else 1)
        np.testing.assert_array_equal(shown[name], (point * 255).round().to(torch.uint8).numpy())
        np.testing.assert_array_equal(shown[f"{name}/predicted"], Net().logits(point).argmax(1).numpy())
    # Nothing is done again, and what is gone is.
    (tmp_path / "eval" / results["evaluation"] / "results.json").unlink()
    calls.clear()
    assert equal(evaluated(*options, f"evaluation.save={kind}")[1], verdicts)
    assert calls == []
    examples(tmp_path / "eval", results, "pgd20")[0][1].unlink()
    evaluated(*options, f"evaluation.save={kind}")
    assert calls == [(1, "pgd20", 6)]


def test_pictures_that_are_none_are_left_out(evaluated, tmp_path):
    evaluated()
    kept = tmp_path / "eval" / "kept"
    for number, file in enumerate(sorted(kept.glob("*.shown.npz"))):
        if number % 2:
            np.savez(file, x=np.zeros(3))
        else:
            file.write_bytes(b"PK")
    results, _ = evaluated("evaluation.skip_broken=true")
    assert Evaluation(tmp_path / "eval" / results["evaluation"], results).examples() is None


def test_float32_examples_belong_to_the_evaluation_without_and_are_made_later(evaluated, calls):
    first, verdicts = evaluated()
    calls.clear()
    second, again = evaluated("evaluation.save=float32")
    assert len(calls) == ATTACKS
    assert second["evaluation"] == first["evaluation"]
    assert equal(verdicts, again)
    calls.clear()
    assert evaluated("evaluation.save=uint8")[0]["evaluation"] != first["evaluation"]
    assert len(calls) == ATTACKS


def test_a_rounded_example_is_scored_by_its_own_logits_whatever_the_attack_saw(tmp_path):
    net, g = Net(), torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 8, 8), generator=g, dtype=torch.uint8)
    labels = net.logits(images.float() / 255).argmax(1)
    suite = Suite(attacks={"nattack": NAttack(eps=1.5 / 255, queries=300)}, eps=1.5 / 255)
    kept = Kept(tmp_path, {}, "uint8")
    judge = Judge(net, suite, chunk=20, seed=0, device=CPU, kept=kept, save="uint8", progress=False)
    found = judge(images, labels)["nattack"]
    adv = torch.from_numpy(np.concatenate([np.load(file) for file in sorted(tmp_path.rglob("*.npy"))]))
    np.testing.assert_array_equal(found, (net.logits(adv.float() / 255).argmax(1) == labels).numpy())


def naive_rounded(adv, x, norm, eps):
    """Pixel by pixel."""
    out = np.empty(adv.shape)
    for b in range(len(adv)):
        nearest, inwards = {}, {}
        for at in np.ndindex(adv.shape[1:]):
            a, c = float(adv[b][at]) * 255, round(float(x[b][at]) * 255)
            level = round(a)
            if eps is not None and norm == "linf":
                levels = int(eps * 255 + 1e-6)
                level = min(max(level, c - levels), c + levels)
            nearest[at] = level
            inwards[at] = c + int(a - c)  # towards the image
        clean = {at: round(float(x[b][at]) * 255) for at in nearest}
        length = sum((nearest[at] - clean[at]) ** 2 for at in nearest) ** 0.5
        chosen = inwards if eps is not None and norm == "l2" and length > eps * 255 else nearest
        for at, level in chosen.items():
            out[b][at] = level
    return out


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [8 / 255, 1 / 255, 0.03, 0.1, 0.5 / 255, 0.0, None])
def test_rounding_is_a_naive_loop_s_and_stays_within(norm, eps):
    g = torch.Generator().manual_seed(3)
    x = torch.randint(256, (12, 3, 4, 4), generator=g).float() / 255
    x[0], x[1] = 0.0, 1.0
    radius = 0.05 if eps is None else eps
    noise = torch.rand(x.shape, generator=g) * 2 - 1
    if norm == "linf":
        delta = radius * torch.where(noise.abs() > 0.5, noise.sign(), noise)
    else:
        delta = radius * noise / noise.flatten(1).norm(dim=1)[:, None, None, None]
        delta[::3] *= torch.rand(4, 1, 1, 1, generator=g)
    adv = (x + delta).clamp(0, 1)
    found = rounded(adv, x, norm, eps)
    assert found.dtype == adv.dtype
    levels = found.double() * 255
    np.testing.assert_allclose(levels, naive_rounded(adv, x, norm, eps), rtol=0, atol=1e-4)
    assert (levels - levels.round()).abs().max() < 1e-4
    assert found.min() >= 0
    assert found.max() <= 1
    if eps is not None:
        assert (distances(found, x, norm) <= eps + 1e-6).all()
    stored = (found * 255).round().to(torch.uint8)
    assert torch.equal(stored.float() / 255, found)  # what is read back is what was scored


# ---- a real kill ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_minus_nine_five_times_in_a_row(tmp_path):
    from tests.processes import redoubt, start
    from tests.test_cli import SMALL, only_run

    small = [*SMALL, "data.limit_test=48"]
    redoubt(tmp_path / "a", "train", *small).good()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run = only_run(tmp_path / "a")
    argv = ["eval", f"run={run.name}", "attack=fsr_suite", "attack.attacks.cw.start=uniform", "evaluation.chunk=1",
            "data.limit_test=48", "trainer=cpu"]  # fmt: skip
    began = time.monotonic()
    redoubt(tmp_path / "a", *argv).good()
    took = time.monotonic() - began
    rng = random.Random(0)
    there = []
    for _ in range(5):
        command = start(tmp_path / "b", *argv)
        time.sleep(rng.uniform(0.3, 0.5) * took)
        os.kill(command.pid, 9)
        assert command.end().code == -9
        kept = only_run(tmp_path / "b").eval / "kept"
        there.append(sum(p.read_bytes().count(b"\n") for p in kept.glob("*.jsonl")) if kept.is_dir() else 0)
        if list(only_run(tmp_path / "b").eval.glob("*/results.json")):
            break
    assert there == sorted(there)
    assert there[-1] > 0
    redoubt(tmp_path / "b", *argv).good()
    (a,), (b,) = (list(only_run(tmp_path / f).eval.glob("fsr_suite-*/verdicts.npz")) for f in "ab")
    assert equal(dict(np.load(a)), dict(np.load(b)))
    paths = [p for p in (only_run(tmp_path / "b").eval / "kept").glob("*.jsonl") if not p.name.startswith("natural-")]
    assert len(paths) == 4
    for path in paths:  # each chunk once; a torn line is none
        numbers = [json.loads(line)["chunk"] for line in path.read_text().splitlines() if line.endswith("}")]
        assert sorted(numbers) == list(range(48)), path.name
