"""The audit raises the alarm for planted fakes and none for an honest net."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from tests.conftest import Shell, composed, refused
from torch import Tensor

from redoubt import config, deadline, jobs
from redoubt.build import build_data
from redoubt.deadline import TimeUp
from redoubt.defenses import RobustModule
from redoubt.errors import CheckFailed, UserError
from redoubt.evaluation import audits
from redoubt.evaluation.audit import Audit, Check, summary
from redoubt.evaluation.kept import crc_of
from redoubt.evaluation.suite import suite
from redoubt.rng import generator
from redoubt.runs import running
from redoubt.runs.identity import plain
from redoubt.runs.loading import load
from redoubt.runs.store import Run

Cell = Callable[..., DictConfig]
CPU = torch.device("cpu")
COUNT = 50  # images that are audited
SMALL = (
    "model=cnn_small", "model.widths=[8,8,16,16]", "data=digits", "data.image_size=8", "data.limit_train=900",
    "data.limit_test=100", "trainer=cpu", "trainer.progress=false", "attack=fsr_suite",
    "attack.attacks.pgd100.steps=30", "attack.attacks.cw.steps=10", "data.probe=20",
)  # fmt: skip
#: The default thresholds, with less effort.
QUICK = (
    f"audit.images={COUNT}", "audit.iterations.least=10", "audit.iterations.factor=2",
    "audit.restarts.steps=20", "audit.restarts.more=2",
    "audit.noise.draws=20", "audit.black_box.queries=150", "audit.adaptive.steps=20", "audit.eps_curve.steps=8",
    "audit.eps_curve.eps=[0,8,16,32,64,128,255]",
    "audit.iterations_curve.steps=[1,3,10,20]", "audit.finite_differences.images=8",
    "audit.finite_differences.directions=4",
)  # fmt: skip
#: Next to no effort, where a check is meant that needs none.
LIGHT = (
    "audit.black_box.queries=1", "audit.adaptive.steps=4", "audit.iterations.factor=1", "audit.noise.draws=1",
    "audit.restarts.steps=5", "audit.eps_curve.steps=4",
)  # fmt: skip


def keys(*overrides: str) -> dict[str, Any]:
    return plain(composed(*QUICK, *overrides, command="audit").audit)


@pytest.fixture(scope="module")
def outputs_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def trained(outputs_of_all: Path) -> tuple[DictConfig, Any, Run]:
    """PGD-AT on real digits, enough of it that about half of the images stand at eps 0.1."""
    overrides = [*SMALL, "data.balanced=true", "trainer.max_epochs=5", "threat.eps=0.1", "inner.steps=1",
                 "optimizer=adamw", "optimizer.lr=0.01", "schedule=onecycle", "data.batch_size=32",
                 "natural.trainer.max_epochs=1", f"paths.outputs={outputs_of_all}"]  # fmt: skip
    cfg = config.resolve(config.compose(overrides))
    data = build_data(cfg)
    return cfg, data, running.train(cfg, data)


@pytest.fixture
def honest(trained: tuple[DictConfig, Any, Run]) -> RobustModule:
    return load(trained[2]).eval()


def audit(
    module: RobustModule, trained: tuple[DictConfig, Any, Run], *overrides: str, source: Any = None
) -> dict[str, Check]:
    cfg, data, _ = trained
    images, labels = data.arrays("test")
    chosen = suite(plain(cfg.attack))
    found = Audit(module, images[:COUNT], labels[:COUNT], chosen, keys=keys(*overrides), seed=0, device=CPU,
                  source=source, progress=False)()  # fmt: skip
    return {check.name: check for check in found}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.passed is False}


def test_an_honest_net_raises_no_alarm(honest: RobustModule, trained: Any) -> None:
    twin = load(trained[2]).eval()
    with torch.no_grad():
        for p in twin.net.parameters():  # another net, so that transfer is one
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = {k: v.clone() for k, v in honest.state_dict().items()}
    checks = audit(honest, trained, source=twin)
    assert failed(checks) == set()
    skipped = {name for name, check in checks.items() if check.passed is None}
    assert skipped == {"adaptive"}, "defense=none names none"
    assert 0.2 < checks["white box"].details["union"] < 0.9, "neither robust nor broken, or the test says nothing"
    assert all(torch.equal(v, before[k]) for k, v in honest.state_dict().items())
    assert all(p.grad is None for p in honest.parameters())


def test_an_audit_that_is_broken_off_after_any_check_goes_on(
    honest: RobustModule, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, data, run = trained
    images, labels = (t[:12] for t in data.arrays("test"))
    kept = tmp_path / "checks.json"
    begun: list[str] = []
    monkeypatch.setattr("redoubt.evaluation.audit.generator", lambda *a, **k: begun.append(a[1]) or generator(*a, **k))

    efforts, twin = keys(*LIGHT), load(run).eval()

    def made(file: Path | None) -> list[dict[str, Any]]:
        found = Audit(honest, images, labels, suite(plain(cfg.attack)), keys=efforts, seed=0, device=CPU, source=twin,
                      progress=False)  # fmt: skip
        checks = summary(found(file))["checks"]
        return [{**check, "seconds": 0, "curves": found.curves} for check in checks]

    whole = made(None)
    begun.clear()
    for done in range(1, len(whole)):
        monkeypatch.setattr(deadline, "over", lambda done=done: len(begun) == done)
        with pytest.raises(TimeUp):
            made(kept)
        assert len(begun) == len(json.loads(kept.read_text())["checks"]) == done
    monkeypatch.undo()
    assert made(kept) == whole
    found = json.loads(kept.read_text())
    other = {**found, "version": "0"}
    other["crc"] = crc_of({k: v for k, v in other.items() if k != "crc"})
    found["checks"][0]["value"] = 7.0
    monkeypatch.setattr(deadline, "over", lambda: True)
    for text in (json.dumps(found), json.dumps(other), "{", "[]", "{}"):
        kept.write_text(text)
        with pytest.raises(TimeUp):  # what was changed, or is another version's, is not believed: it begins anew
            made(kept)


class Scaled(RobustModule):
    def logits(self, x: Tensor) -> Tensor:
        return 1000 * super().logits(x)


class Quantised(RobustModule):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits((x * 8).round() / 8)


class Softmax(RobustModule):
    def logits(self, x: Tensor) -> Tensor:
        return F.softmax(super().logits(x), dim=1)


class Random(RobustModule):
    def logits(self, x: Tensor) -> Tensor:
        z = super().logits(x)
        return z + 3 * torch.randn(z.shape)


class Detached(RobustModule):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x.detach())


class StraightThrough(RobustModule):
    """Gradients that are not the function's: a staircase whose backward is the identity."""

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x + ((x * 8).round() / 8 - x).detach())


@pytest.mark.parametrize(
    ("fake", "caught"),
    [
        pytest.param(Scaled, {"gradients"}, marks=pytest.mark.slow),
        (Quantised, {"gradients", "black box"}),
        (Softmax, {"logits"}),
        (Random, {"randomness"}),
        (Detached, {"gradients", "white box", "finite differences"}),
        (StraightThrough, {"finite differences"}),
        pytest.param("OffsetRandom", {"randomness"}, marks=pytest.mark.slow),
        pytest.param("NanGradient", {"gradients", "finite differences", "loss landscape"}, marks=pytest.mark.slow),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_planted_fakes_are_caught(
    fake: type[RobustModule], caught: set[str], honest: RobustModule, trained: Any
) -> None:
    honest.__class__ = globals()[fake] if isinstance(fake, str) else fake
    checks = audit(honest, trained, *(() if "black box" in caught else LIGHT))
    assert caught <= failed(checks), {name: (c.value, c.limit, c.details) for name, c in checks.items()}
    report = summary(list(checks.values()))
    assert not report["passed"]
    json.dumps(report, allow_nan=False)  # all of it can be written


class OffsetRandom(RobustModule):
    """An offset of all logits hides no noise."""

    def logits(self, x: Tensor) -> Tensor:
        z = super().logits(x)
        return z + 1e4 + 3 * torch.randn(z.shape)


class NanGradient(RobustModule):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * torch.nan

    def logits(self, x: Tensor) -> Tensor:
        return super().logits(NanGradient.Function.apply(x))


class Masked(RobustModule):
    """A gradient that points nowhere near the images, and to the truth further off."""

    def logits(self, x: Tensor) -> Tensor:
        z = super().logits(x)
        g = torch.sin(4000 * x).flatten(1).sum(1, keepdim=True)
        return z + 0.05 * torch.cat([g, -g, *[0 * g] * (z.shape[1] - 2)], 1)


def test_a_rugged_loss_is_caught(honest: RobustModule, trained: Any) -> None:
    honest.__class__ = Masked
    assert "loss landscape" in failed(audit(honest, trained, *LIGHT))


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "randomness": "audit.randomness.largest=-1",
            "logits": "audit.probabilities.share=-1",
            "gradients": "audit.zero_gradients.share=-1",
            "one step": "audit.one_step.share=-1",
            "random noise": "audit.noise.share=-1",
            "finite differences": "audit.finite_differences.share=-1",
            "loss landscape": "audit.landscape.cosine=1.1",
            "large eps": "audit.eps_curve.guessing=1",
            "FSR's criteria": "audit.fsr_criteria.unbounded=-1",
        },
        pytest.param({"finite differences": "audit.finite_differences.tolerance=0"}, marks=pytest.mark.slow),
    ],
)
def test_every_threshold_is_a_key(honest: RobustModule, trained: Any, overrides: dict[str, str]) -> None:
    """Each fails the check that it belongs to; that an honest net fails none is a test above."""
    checks = audit(honest, trained, *LIGHT, *overrides.values())
    assert overrides.keys() <= failed(checks)
    for name in overrides:
        assert checks[name].value is not None
        assert checks[name].limit is not None


def test_what_more_effort_gains_is_measured(honest: RobustModule, trained: Any) -> None:
    """A suite of one weak PGD is caught by more iterations and restarts."""
    _, data, _ = trained
    images, labels = data.arrays("test")
    weak = plain(config.compose(["data=digits", "attack=pgd", "attack.steps=2", "attack.step=0.05"]).attack)
    weak["attacks"]["pgd"] |= {"eps": 0.1, "keep_best": False, "steps": 2}
    found = Audit(honest, images, labels, suite({**weak, "eps": 0.1}), keys=keys(), seed=0, device=CPU,
                  progress=False)()  # fmt: skip
    checks = {check.name: check for check in found}
    assert {"iterations", "restarts"} & failed(checks)
    gained = max(float(checks[n].value or 0) for n in ("iterations", "restarts"))
    assert gained > float(checks["restarts"].limit or 0) == pytest.approx(0.03)


@pytest.fixture
def own(trained: Any, tmp_path: Path) -> Any:
    """(cfg, data, run) of a copy, to be evaluated and marked."""
    cfg, data, run = trained
    shutil.copytree(cfg.paths.outputs, tmp_path, dirs_exist_ok=True)
    return OmegaConf.merge(cfg, {"paths": {"outputs": str(tmp_path)}}), data, Run(tmp_path / "runs" / run.name)


@pytest.fixture
def redoubt_audit(own: Any) -> Callable[..., dict[str, Any]]:
    def run(*overrides: str) -> dict[str, Any]:
        cfg, _, audited = own
        said = [f"run={audited.name}", f"paths.outputs={cfg.paths.outputs}", "trainer.progress=false", *QUICK]
        said += overrides
        return jobs.audit(config.resolve(config.compose(said, "audit")), said)

    return run


def test_files_and_the_mark_in_results(own: Any, redoubt_audit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, data, run = own
    before = running.evaluate_run(cfg, data, run)
    assert before["audited"] is False
    redoubt_audit("audit.source=null", "audit.black_box.queries=1", "audit.noise.draws=1")
    assert stored_results(run, before)["audited"] is False, "an experiment marks nothing"
    monkeypatch.setattr(audits, "usual_audit", keys)
    report = redoubt_audit("natural.trainer.max_epochs=1")
    assert report["passed"]
    assert {c["name"]: c["passed"] for c in report["checks"]}["transfer"] is True
    (folder,) = (f for f in (run.folder / "audit").iterdir() if json.loads((f / "audit.json").read_text()) == report)
    assert json.loads((folder / "audit.json").read_text()) == report
    for check in report["checks"]:
        assert set(check) == {"name", "rule", "value", "limit", "passed", "details", "seconds"}
    for name, x in (("accuracy_over_eps", "eps"), ("accuracy_over_iterations", "iterations")):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader((folder / f"{name}.csv").open()))
        assert set(rows[0]) == {x, "accuracy"}
        assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert stored_results(run, before) == {**before, "audited": True, "audits": [folder.name], "audit_failed": []}
    later = config.resolve(OmegaConf.merge(cfg, {"evaluation": {"chunk": 50}}))
    assert running.evaluate_run(later, data, run)["audited"] is True, "an evaluation after the audit knows of it"
    weak = config.resolve(OmegaConf.merge(cfg, {"attack": {"attacks": {"pgd20": {"steps": 21}}}}))
    assert running.evaluate_run(weak, data, run)["audited"] is False, "another suite was not audited"
    monkeypatch.setattr(audits, "Audit", None)
    assert redoubt_audit("natural.trainer.max_epochs=1") == report, "answered from the store"


def stored_results(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.eval / results["evaluation"] / "results.json").read_text())
    return found


def test_a_failed_audit_ends_with_exit_code_3_and_marks_the_results(
    own: Any, redoubt_audit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, data, run = own
    before = running.evaluate_run(cfg, data, run)
    monkeypatch.setattr(audits, "usual_audit", lambda: keys("audit.one_step.share=-1"))
    with pytest.raises(CheckFailed, match="one step"):
        redoubt_audit("audit.source=null", "audit.one_step.share=-1")
    stored = stored_results(run, before)
    assert stored["audited"] is False
    assert stored["audit_failed"] == ["one step"]


def test_sigterm_says_how_it_goes_on(own: Any, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, _, run = own
    words = ["audit", f"run={run.name}", f"paths.outputs={cfg.paths.outputs}", *QUICK, *LIGHT, "audit.images=8",
             "audit.source=null"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "noise", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        ended = shell(*words)
    assert ended.code == 128 + signal.SIGTERM
    assert ended.err.splitlines()[-1] == "redoubt: stopped by SIGTERM; the same command goes on from what was saved"
    (kept,) = run.folder.glob("audit/*/checks.json")
    done = [check["name"] for check in json.loads(kept.read_text())["checks"]]
    assert done == [name for name, *_ in Audit.CHECKS.values()][: len(done)]
    assert len(done) == list(Audit.CHECKS).index("noise")
    assert shell(*words).code in (0, 3)
    assert [file.name for file in kept.parent.glob("*.json")] == ["audit.json"]


@pytest.mark.parametrize("attack", ["none", "corruptions"])
def test_a_suite_without_a_ball_is_refused(own: Any, redoubt_audit: Any, attack: str) -> None:
    before = {path.name for path in own[2].folder.parent.iterdir()}
    refused(lambda: redoubt_audit(f"attack={attack}"), "take a suite with attacks and an eps")
    assert {path.name for path in own[2].folder.parent.iterdir()} == before, "the natural twin is not trained for that"


def test_a_suite_of_one_step_is_not_taken_for_another(trained: Any, honest: RobustModule) -> None:
    _, data, _ = trained
    images, labels = data.arrays("test")
    tree = plain(config.compose(["data=digits", "attack=fgsm"]).attack)
    tree["attacks"]["fgsm"]["eps"] = 0.1
    found = Audit(honest, images[:COUNT], labels[:COUNT], suite({**tree, "eps": 0.1}), keys=keys(), seed=0, device=CPU,
                  progress=False)()  # fmt: skip
    checks = {check.name: check for check in found}
    assert checks["white box"].details["strongest"] == "fgsm"
    assert "restarts" in failed(checks)


def test_bad_input_is_one_line(redoubt_audit: Any) -> None:
    for override, text in (
        ("audit.source=nowhere", "audit.source=nowhere"),
        ("evaluation.checkpoint=best", "best"),
        ("data=cifar10", "data is the run's own"),
    ):
        with pytest.raises(UserError, match=text):
            redoubt_audit(override)
    with pytest.raises(UserError, match=r"audit\.one_stepp"):
        config.compose(["audit.one_stepp.share=1"], "audit")


# ---- adaptive attacks -----------------------------------------------------------------------------------------


def module_of(defense: str, *overrides: str) -> RobustModule:
    cfg = composed(f"defense={defense}", "model=resnet_small", "data=digits", "data.image_size=8", *overrides)
    torch.manual_seed(0)
    module = jobs.build_module(cfg).eval()
    with torch.no_grad():  # away from the identity and from equal twins
        for name, p in module.named_parameters():
            if any(part in name for part in ("d1", "d2", "revision", "separation", "recalibration")):
                p.add_(0.1 * torch.randn(p.shape))
    return module


BATCH = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6)


@pytest.mark.parametrize(
    ("defense", "names"),
    [
        ("none", set()),
        ("fsr", {"mask_tau1", "mask_detached", "head_robust", "head_nonrobust", "head_recalibrated"}),
        ("afd", {"d2", "feature"}),
        ("cure", {"revision"}),
    ],
)
def test_each_defense_names_its_adaptive_attacks(defense: str, names: set[str]) -> None:
    module, (x, y) = module_of(defense), BATCH
    losses = module.adaptive(x, y)
    assert set(losses) == names
    point = (x + 0.05).requires_grad_()
    (plain_gradient,) = torch.autograd.grad(F.cross_entropy(module.logits(point), y, reduction="sum"), point)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    for name, loss in losses.items():
        value = loss(point)
        assert value.shape == (6,)
        (gradient,) = torch.autograd.grad(value.sum(), point)
        assert gradient.abs().sum() > 0, name
        assert not torch.allclose(gradient, plain_gradient), f"{name} is the plain attack"
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    again = torch.autograd.grad(F.cross_entropy(module.logits(point), y, reduction="sum"), point)[0]
    assert torch.equal(again, plain_gradient), "nothing of an adaptive attack stays behind"


def test_fsr_around_the_mask_changes_the_slope_and_not_the_value() -> None:
    module, (x, y) = module_of("fsr"), BATCH
    losses = module.adaptive(x, y)
    wanted = F.cross_entropy(module.logits(x), y, reduction="none")
    for name in ("mask_tau1", "mask_detached"):
        torch.testing.assert_close(losses[name](x), wanted, rtol=1e-6, atol=1e-6)
    (layer,) = module.layers
    r = torch.linspace(-3, 3, 25, dtype=torch.float64, requires_grad=True)
    slopes = {}
    for backward in ("exact", "tau1", "detached"):
        layer.backward = backward
        m = layer.mask(r)
        slopes[backward] = torch.autograd.grad(m.sum(), r)[0] if m.requires_grad else torch.zeros_like(r)
        torch.testing.assert_close(m.detach(), torch.sigmoid(r.detach() / 0.1), rtol=1e-4, atol=1e-6)
    s = torch.sigmoid(r.detach())
    torch.testing.assert_close(slopes["tau1"], s * (1 - s), rtol=1e-6, atol=1e-7)
    assert not slopes["detached"].any()


def test_fsr_heads_are_those_of_its_training_forward() -> None:
    module, (x, y) = module_of("fsr"), BATCH
    (layer,) = module.layers
    caught: list[Tensor] = []
    with torch.no_grad():
        handle = layer.inner.register_forward_hook(lambda module, args, out: caught.append(out))
        module.logits(x)
        handle.remove()
        f = caught[0]
        m = torch.sigmoid(layer.separation(f) / 0.1)
        parts = (m * f, (1 - m) * f, (1 - m) * f + (1 - m) * layer.recalibration((1 - m) * f))
        for name, part in zip(("head_robust", "head_nonrobust", "head_recalibrated"), parts, strict=True):
            wanted = F.cross_entropy(layer.head(part.mean((2, 3))), y, reduction="none")
            torch.testing.assert_close(module.adaptive(x, y)[name](x), wanted, rtol=1e-3, atol=1e-4)


def test_afd_branch_and_feature() -> None:
    module, (x, y) = module_of("afd"), BATCH
    adv = (x + 0.1).clamp(0, 1)
    with torch.no_grad():
        losses = module.adaptive(x, y)
        _, (f1, _, z2) = module.run(adv, True)
        torch.testing.assert_close(losses["d2"](adv), F.cross_entropy(z2, y, reduction="none"))
        clean = module.run(x, True)[1][0]
        torch.testing.assert_close(losses["feature"](adv), (f1 - clean).square().sum(1))


def test_cure_revision() -> None:
    module, (x, y) = module_of("cure"), BATCH
    with torch.no_grad():
        wanted = F.cross_entropy(module.revision(x), y, reduction="none")
        torch.testing.assert_close(module.adaptive(x, y)["revision"](x), wanted)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("audit.images=abc", "audit.images='abc' must be a whole number"),
        ("audit.images=0", "audit.images=0 must be a whole number of at least 1"),
        ("audit.noise.draws=1.5", "audit.noise.draws=1.5 must be a whole number"),
        ("audit.eps_curve.eps=[]", "audit.eps_curve.eps is empty"),
        ("audit.one_step.share=much", "audit.one_step.share='much' is not a number"),
        ("audit.finite_differences=3", "audit.finite_differences=3 is a group of keys"),
        ("audit.finite_differences.h=0", "audit.finite_differences.h=0 must be above 0"),
        ("audit.randomness.passes=1", "audit.randomness.passes=1 must be a whole number of at least 2"),
        ("audit.eps_curve.eps=[1,-2]", "audit.eps_curve.eps=-2 must be at least 0"),
    ],
)
def test_keys_that_are_no_numbers(override: str, says: str) -> None:
    refused(lambda: config.resolve(config.compose([override], "audit")), says)
