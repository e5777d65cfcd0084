"""Saved examples classified anew: what holds is confirmed, what was tampered with or hangs on the batch is found."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import composed
from torch import nn

from redoubt import config
from redoubt.build import build_data
from redoubt.errors import UserError
from redoubt.evaluation.record import evaluate
from redoubt.evaluation.rescore import objections, rescore
from redoubt.runs.identity import plain
from redoubt.runs.store import Store

CPU = torch.device("cpu")
SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
)  # fmt: skip
SUITE = ("attack=fsr_suite", "attack.attacks.pgd100.steps=12", "attack.attacks.cw.start=uniform",
         "evaluation.chunk=4", "trainer=cpu")  # fmt: skip


def line_of(ended, code, *says):
    assert ended.code == code, ended
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("redoubt: ")
    for part in says:
        assert part in line, line


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Where one run lies, with two evaluations whose examples were saved and one without."""
    return tmp_path_factory.mktemp("original")


@pytest.fixture
def folder(original, tmp_path, shell):
    if not (original / "outputs").exists():
        assert shell.at(original)("train", *SMALL, "attack=none").code == 0
        for kind in ("float32", "uint8"):
            assert shell.at(original)("eval", "run=none-at", *SUITE, f"evaluation.save={kind}").code == 0
    shutil.copytree(original / "outputs", tmp_path / "outputs")
    return tmp_path


def evaluation(folder, kind="float32"):
    (run,) = Store(folder / "outputs").list()
    for where, _ in run.evaluations():
        record = json.loads((where / "attack.json").read_text())
        if record["evaluation"]["save"] == kind:
            return where
    raise AssertionError(kind)


def rewrite(where, name, *rows):
    """Flips verdicts."""
    content = dict(np.load(where / "verdicts.npz"))
    content[name][list(rows)] ^= True
    np.savez_compressed(where / "verdicts.npz", **content)
    return content


@pytest.mark.parametrize(
    ("kind", "options", "threads"),
    [
        pytest.param("float32", [], 1, marks=pytest.mark.slow),
        ("float32", ["evaluation.chunk=3"], 2),
        pytest.param("uint8", ["evaluation.chunk=7"], 1, marks=pytest.mark.slow),
    ],
)
def test_another_chunk_and_thread_count_change_nothing(folder, shell, kind, options, threads):
    where = evaluation(folder, kind)
    before = {p: p.read_bytes() for p in where.rglob("*") if p.is_file()}
    before |= {p: p.read_bytes() for p in (where.parent / "kept").rglob("*") if p.is_file()}
    torch.set_num_threads(threads)
    try:
        done = shell.at(folder)("eval", "run=none-at", f"rescore={where.name}", "trainer=cpu", *options)
    finally:
        torch.set_num_threads(1)
    assert done.code == 0, done.err
    for word in ("PGD-20", where.name):
        assert word in done.out
    report = json.loads((where / "rescored.json").read_text())
    assert report["threads"] == threads
    assert report["batch"] == (int(options[0].split("=")[1]) if options else 250)
    assert list(report["attacks"]) == ["fgsm", "pgd20", "pgd100", "cw"]
    for entry in report["attacks"].values():
        assert (entry["n"], entry["changed"], entry["close"]) == (10, [], [])
        assert entry["eps"] == 0.2
        assert 0 < entry["distance"] <= 0.2 + 1e-6
    assert {p: p.read_bytes() for p in before} == before


def test_the_beginning_of_a_name_and_a_path_will_do(folder, shell):
    where = evaluation(folder)
    for name in (where.name[:-3], str(where.relative_to(folder))):
        assert shell.at(folder)("eval", "run=none-at", f"rescore={name}", "trainer=cpu").code == 0


def test_a_flipped_verdict_is_reported(folder, shell):
    where = evaluation(folder)
    content = rewrite(where, "pgd20", 3, 7)
    done = shell.at(folder)("eval", "run=none-at", f"rescore={where.name}", "trainer=cpu")
    flipped = [int(content["index"][i]) for i in (3, 7)]
    line_of(done, 3, str(where.name), f"pgd20: 2 verdicts changed, of test images {flipped}")
    assert "fgsm:" not in done.err
    assert json.loads((where / "rescored.json").read_text())["attacks"]["pgd20"]["changed"] == flipped


@pytest.mark.parametrize("kind", ["float32", pytest.param("uint8", marks=pytest.mark.slow)])
def test_an_image_outside_of_the_ball_is_reported(folder, shell, kind):
    where = evaluation(folder, kind)
    record = json.loads((where / "attack.json").read_text())
    file = where.parent / "kept" / record["kept"]["fgsm"] / "00001-4.npy"
    adv = np.load(file)
    one = 255 if kind == "uint8" else 1.0
    adv[2, 1, 3, 3] = one if adv[2, 1, 3, 3] < one / 2 else 0
    np.save(file, adv)
    done = shell.at(folder)("eval", "run=none-at", f"rescore={where.name}", "trainer=cpu")
    assert done.code == 3
    line = done.err.strip().splitlines()
    assert len(line) == 1
    assert "fgsm: an image is 0." in line[0]
    assert "away, eps is 0.2" in line[0]


def test_pixels_that_are_none_are_one_line(folder, shell):
    where = evaluation(folder)
    record = json.loads((where / "attack.json").read_text())
    file = where.parent / "kept" / record["kept"]["cw"] / "00000-4.npy"
    for value in (float("nan"), 1.5):
        adv = np.load(file)
        adv[0, 0, 0, 0] = value
        np.save(file, adv)
        line_of(shell.at(folder)("eval", "run=none-at", f"rescore={where.name}", "trainer=cpu"), 2, "pixels outside")


def test_what_is_not_there_is_one_line(folder, shell):
    where = evaluation(folder)
    record = json.loads((where / "attack.json").read_text())

    def again(name=where.name, *more):
        return shell.at(folder)("eval", "run=none-at", f"rescore={name}", "trainer=cpu", *more)

    none = next((folder / "outputs/runs").glob("*/eval/none-*"))
    line_of(again(none.name), 2, none.name, "kept no adversarial examples", "evaluation.save=float32 or uint8")
    line_of(again("pgd20"), 2, "rescore=pgd20: names 0 evaluations", where.name, none.name)
    line_of(again("fsr_suite"), 2, "rescore=fsr_suite: names 2 evaluations")
    line_of(again(where.name, "data.limit_test=5"), 2, "other test images", "data.limit_test=10")
    (where.parent / "kept" / record["kept"]["cw"] / "00002-2.npy").unlink()
    line_of(again(), 2, "00002-2.npy is missing", "evaluation.save")
    shutil.rmtree(where.parent / "kept")
    line_of(again(), 2, ".npy is missing")
    whole = bytearray((where / "verdicts.npz").read_bytes())
    whole[len(whole) // 3] ^= 64
    (where / "verdicts.npz").write_bytes(whole)
    line_of(again(), 2, "verdicts.npz")
    (where / "verdicts.npz").unlink()
    line_of(again(), 2, "verdicts.npz")
    (where / "attack.json").unlink()
    line_of(again(), 2, "kept no adversarial examples")
    line_of(shell.at(folder)("eval", "run=nobody", "rescore=x", "trainer=cpu"), 2, "run=nobody")


def test_rescore_of_a_file_of_weights_is_refused(folder, shell):
    file = next((folder / "outputs/runs").glob("*/checkpoints/last.ckpt"))
    weights = {k.removeprefix("net."): v for k, v in torch.load(file, weights_only=True)["state_dict"].items()}
    torch.save({k: v for k, v in weights.items() if "." in k}, folder / "theirs.pt")
    done = shell.at(folder)("eval", *SMALL, "checkpoint=theirs.pt", "rescore=anything", "attack=none")
    line_of(done, 2, "rescore")


# ---- with a net whose logits are known ------------------------------------------------------------------------------


class Linear(nn.Module):
    format = torch.contiguous_format
    folded = staticmethod(contextlib.nullcontext)
    num_classes, image_size, classes = 10, 8, None

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.scale, self.batches = nn.Linear(192, 10), scale, []

    def logits(self, x):
        self.batches.append((len(x), self.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return self.scale * self.fc(x.flatten(1))


@pytest.fixture
def saved(tmp_path):
    """An evaluation of a Linear net: (folder, data)."""

    def run(scale=1.0, *options):
        cfg = config.resolve(composed(*SMALL, "attack=fgsm", "evaluation.save=float32", *options))
        data = build_data(cfg)
        facts = {"run": "r", "axes": {}, "checkpoint": "last", "weights": "student", "train_seconds": 1.0}
        where = {"weights_id": "w", "folder": tmp_path, "device": CPU}
        results = evaluate(Linear(scale), data, plain(cfg), facts=facts, **where)
        return tmp_path / results["evaluation"], data

    return run


def test_only_a_verdict_between_near_logits_may_flip(saved):
    """Gaps of 1e-6 and less, then of 1e-2: a flip is counted as close, or reported."""
    for scale, field in ((1e-6, "close"), (1.0, "changed")):
        where, data = saved(scale, f"seed={int(scale)}")
        content = rewrite(where, "fgsm", 2)
        found = rescore(Linear(scale), data, where, batch=3, device=CPU, progress=False)
        other = {"close": "changed", "changed": "close"}[field]
        assert found["fgsm"][field] == [int(content["index"][2])]
        assert found["fgsm"][other] == []
        assert len(objections(found)) == (1 if field == "changed" else 0)
        shutil.rmtree(where)
        shutil.rmtree(where.parent / "kept")


def test_gaps_on_both_sides_of_a_ten_thousandth(saved):
    where, data = saved(1.0)
    images = np.concatenate([np.load(f) for f in sorted((where.parent / "kept").rglob("*.npy"))])
    with torch.no_grad():
        top = Linear().logits(torch.from_numpy(images)).double().topk(2, dim=1).values
    gaps = (top[:, 0] - top[:, 1]).numpy()
    content = rewrite(where, "fgsm", *range(10))
    factor = 1e-4 / float(np.median(gaps))  # half of them are nearer
    near = gaps * factor < 1e-4
    assert 0 < near.sum() < 10
    found = rescore(Linear(factor), data, where, batch=10, device=CPU, progress=False)["fgsm"]
    assert found["close"] == content["index"][near].tolist()
    assert found["changed"] == content["index"][~near].tolist()


def test_it_classifies_in_evaluation_mode_in_batches_and_restores(saved):
    where, data = saved()
    net = Linear().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rescore(net, data, where, batch=4, device=CPU, progress=False)
    assert net.batches == [(4, False, False, False), (4, False, False, False), (2, False, False, False)]
    assert net.training
    assert net.fc.weight.requires_grad


def test_other_labels_are_refused(saved):
    where, data = saved()
    content = dict(np.load(where / "verdicts.npz"))
    content["label"] = (content["label"] + 1) % 10
    np.savez_compressed(where / "verdicts.npz", **content)
    with pytest.raises(UserError, match="other test images"):
        rescore(Linear(), data, where, batch=4, device=CPU, progress=False)


def test_objections_are_of_bounded_attacks_only():
    near = {"n": 4, "changed": [], "close": [1], "distance": 0.1 + 9e-7, "eps": 0.1}
    assert objections({"a": near}) == []
    assert objections({"a": {**near, "distance": 0.1 + 2e-6}}) == ["a: an image is 0.100002 away, eps is 0.1"]
    assert objections({"a": {**near, "distance": 5.0, "eps": None}}) == []
    many = objections({"a": {**near, "changed": list(range(30))}, "b": near})
    assert many == [f"a: 30 verdicts changed, of test images {list(range(10))}"]


def test_nothing_is_stored_outside(folder):
    assert {p.name for p in Path(folder).iterdir()} == {"outputs"}
