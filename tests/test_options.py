"""Every option has its effect, and is part of the run's identity if and only if it decides the weights."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tests import conftest
from torch import Tensor

from redoubt import config
from redoubt.attacks import PGD
from redoubt.build import build_data, build_module
from redoubt.defenses import RobustModule, gradients
from redoubt.errors import UserError
from redoubt.runs import running
from redoubt.runs.identity import plain
from redoubt.training import trainer as trainer_module

CONF = Path(config.config_dir())
TINY = (
    "model=resnet_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=10", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=2", "trainer.progress=false", "inner.steps=2", "validation.steps=1", "validation.step=1",
    "validation.every=2", "attack=none",
)  # fmt: skip


def composed(*overrides: str) -> DictConfig:
    return conftest.composed(*TINY, *overrides)


def resolved(*overrides: str) -> DictConfig:
    """A small cell: two epochs of a batch of 10 fake images."""
    return config.resolve(composed(*overrides))


class Seen:
    """What a short training leaves behind."""

    def __init__(self, cfg: DictConfig) -> None:
        data = build_data(cfg)
        self.identity = running.identify(cfg, data)
        self.lrs: list[float] = []
        true = RobustModule.after_step

        def after_step(module: RobustModule) -> None:
            self.lrs.append(module.raw_optimizers()[0].param_groups[0]["lr"])
            true(module)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RobustModule, "after_step", after_step)
            patch.setattr(trainer_module, "cpu_has_bf16", lambda: True)
            self.module = running._fit(cfg, data, None)
        self.metrics = {k: float(v) for k, v in self.module.trainer.callback_metrics.items()}
        self.metrics.pop("images_per_second", None)
        self.weights = {k: v.clone() for k, v in self.module.state_dict().items()}
        self.average = None if self.module.ema is None else self.module.ema.average

    def trained_as(self, other: Seen) -> bool:
        if self.weights.keys() != other.weights.keys():
            return False
        pairs = [(self.weights, other.weights)]
        if self.average is not None or other.average is not None:
            if self.average is None or other.average is None:
                return False
            pairs.append((self.average, other.average))
        return all(a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for a, b in pairs for k in a.keys() & b.keys())


@functools.cache
def seen(*overrides: str) -> Seen:
    return Seen(resolved(*overrides))


ADAM, FSR, L2 = ("optimizer=adamw",), ("defense=fsr",), ("threat=l2",)
AFD, CURE = ("defense=afd",), ("defense=cure", "defense.rate=1", "defense.decay=0.5")
TRADES, MART, PLAIN = ("base=trades",), ("base=mart",), ("base=standard",)
STEPPED = ("schedule.kind=multistep", "schedule.epochs=2", "schedule.milestones=[2]", "schedule.factors=[0.5]")
BY_STEP = ("schedule.kind=cosine", "data.limit_train=20")
LONG = ("schedule=onecycle", "schedule.epochs=2")

#: (option, needs): what makes the option matter. Changing it alone gives other weights, and another run.
DECIDING = [
    ("seed=1", ()),
    ("label_smoothing=0.2", ()),
    ("label_smoothing=0.2", TRADES),
    ("label_smoothing=0.2", MART),
    ("label_smoothing=0.2", PLAIN),
    ("threat.eps=0.1", ()),
    ("threat.eps=0.1", TRADES),
    ("threat.norm=l2", ()),
    ("threat.eps=3", L2),
    ("inner.norm=l2", ()),
    ("inner.eps=0.1", ()),
    ("inner.steps=3", ()),
    ("inner.step=0.5", ()),
    ("inner.step_abs=0.08", ()),
    ("inner.start=none", ("inner.steps=4",)),
    ("inner.start=normal", ()),
    ("inner.clip_start=false", ("threat.eps=0.5",)),
    ("inner.keep_best=true", ("inner.step=1.5", "inner.steps=4")),
    ("inner.stages=[[0.5,4,0.5]]", ()),
    ("inner.sigma=0.1", TRADES),
    ("inner=normal", ()),
    ("inner=none", ()),
    ("inner.steps=1", PLAIN),
    ("base=trades", ()),
    ("base=mart", ()),
    ("base=standard", ()),
    ("base.beta=1", TRADES),
    ("base.beta=1", MART),
    ("base.clean_forwards=2", TRADES),
    ("defense=fsr", ()),
    ("defense.at=layer2", FSR),
    ("defense.at=[layer3,layer4]", FSR),
    ("defense.lambda_sep=0.3", FSR),
    ("defense.lambda_rec=0.3", FSR),
    ("defense.tau=0.5", FSR),
    ("defense.hidden=8", FSR),
    ("defense=afd", ()),
    ("defense.alpha=1", AFD),
    ("defense.beta=1", AFD),
    ("defense.gamma=1", AFD),
    ("defense.update=joint", AFD),
    ("defense.update=legacy", AFD),
    ("defense=cure", ()),
    ("defense.criterion=joint", CURE),
    ("defense.criterion=soft", CURE),
    ("defense.criterion=soft_all", CURE),
    ("defense.criterion=none", CURE),
    ("defense.loss=rgp", CURE),
    ("defense.loss=rgp_soft", CURE),
    ("defense.loss=rgp_old", CURE),
    ("defense.beta=1", (*CURE, "defense.loss=rgp_soft")),
    ("defense.freeze=update", CURE),
    ("defense.alpha=0.9", CURE),
    ("defense.percentile=60", CURE),
    ("defense.exempt=[classifier]", CURE),
    ("defense.gamma=0.2", CURE),
    ("defense.rate=0", CURE),
    ("defense.rate_decay=linear", CURE),
    ("defense.decay=0.9", CURE),
    ("defense.decay_warmup=true", (*CURE, "defense.decay=0.9")),
    ("defense.warmup_epochs=1", CURE),
    ("base=at", CURE),
    ("awp.rho=0.01", ()),
    ("awp.rho=0.01", AFD),
    ("awp.rho=0.01", CURE),
    ("awp.warmup=1", ("awp.rho=0.01",)),
    *((option, (defense,)) for defense in ("defense=afd", "defense=cure") for option in (
        "trainer.precision=bf16-mixed", "trainer.accumulate=2", "optimizer.clip=0.1", "optimizer=adamw",
        "schedule.kind=cosine", "label_smoothing=0.2",
    )),
    ("optimizer.lr=0.02", ()),
    ("optimizer.momentum=0.5", ()),
    ("optimizer.weight_decay=0.01", ()),
    ("optimizer.clip=0.1", ()),
    ("optimizer.nesterov=true", ()),
    ("optimizer=adamw", ()),
    ("optimizer.lr=0.01", ADAM),
    ("optimizer.betas=[0.5,0.9]", ADAM),
    ("optimizer.weight_decay=0.5", ADAM),
    ("optimizer.clip=0.01", ADAM),
    ("schedule.kind=cosine", ()),
    ("schedule.epochs=1", STEPPED),
    ("schedule.milestones=[1]", STEPPED),
    ("schedule.factors=[0.1]", STEPPED),
    ("schedule.interval=step", BY_STEP),
    ("schedule.warmup=1", ()),
    ("schedule.initial=0.5", LONG),
    ("schedule.peak=0.6", LONG),
    ("schedule.final=0.5", LONG),
    ("ema=wa", ()),
    ("ema.decay=0.5", ("ema=wa",)),
    ("ema.warmup=true", ("ema=wa",)),
    ("trainer.max_epochs=1", ()),
    ("trainer.accumulate=2", ()),
    ("trainer.precision=bf16-mixed", ()),
    ("data.batch_size=12", ("data.limit_train=24",)),
    ("data.augment=crop_flip", ()),
    ("data.val_fraction=0.2", ()),
    ("data.limit_train=20", ()),
    ("data.balanced=true", ("data.limit_train=15", "data.source=official")),
    ("data.seed=1", ()),
    ("data.image_size=16", ()),
    ("model=cnn_small", ("model.widths=[4,4,8,8]",)),
    ("model.widths=[4,4,4,8]", ()),
    ("model.normalize=true", ()),
    ("data.mean=[0.1,0.1,0.1]", ("model.normalize=true",)),
    ("data.std=[0.5,0.5,0.5]", ("model.normalize=true",)),
]  # fmt: skip


def deciding() -> Iterator[Any]:
    """Of the lines that name one key the first is quick; all that choose an option of a group are."""
    known: set[str] = set()
    for option, needs in DECIDING:
        key = option.split("=")[0]
        again = key in known and ("." in key or key == "label_smoothing")
        known.add(key)
        yield pytest.param(option, needs, id=f"{option}-{'+'.join(needs)}", marks=[pytest.mark.slow] * again)


@pytest.mark.parametrize(("option", "needs"), deciding())
def test_changes_weights_and_identity(option: str, needs: tuple[str, ...]) -> None:
    before, after = seen(*needs), seen(*needs, option)
    assert not after.trained_as(before)
    assert after.identity != before.identity


#: What is watched decides which checkpoint is the best: another run, the same weights at the end.
WATCHING = [
    ("validation.steps=2", ()),
    ("validation.step=0.5", ("validation.steps=4", "validation.step=0.25")),
    ("validation.every=1", ("validation.steps=4", "validation.step=0.25")),
    ("data.probe=20", ("data.limit_train=24", "data.batch_size=8")),
    ("data.limit_val=2", ("data.limit_train=24", "data.val_fraction=0.4")),
]


@pytest.mark.parametrize(("option", "needs"), WATCHING, ids=lambda v: v if isinstance(v, str) else None)
def test_watching_changes_the_metrics_and_not_the_weights(option: str, needs: tuple[str, ...]) -> None:
    before, after = seen(*needs), seen(*needs, option)
    assert after.trained_as(before)
    assert after.identity != before.identity
    if option in ("validation.steps=2", "data.probe=20", "data.limit_val=2"):
        assert after.metrics != before.metrics


def test_validation_takes_its_own_steps() -> None:
    attack = build_module(composed("validation.steps=7", "validation.step=0.5", "threat.eps=0.1")).validation
    assert (attack.steps, attack.start, attack.norm) == (7, "none", "linf")
    assert attack.step_size == pytest.approx(0.05)


def test_validation_every() -> None:
    odd = seen("validation.every=2", "trainer.max_epochs=1")
    assert "train/loss" in odd.metrics
    assert not [k for k in odd.metrics if k.startswith("train_probe/")]
    assert "train_probe/pgd1" in seen().metrics
    assert "train_probe/pgd2" in seen("validation.steps=2").metrics
    assert "val/pgd1" in seen("data.val_fraction=0.2").metrics


#: Options that decide nothing about the weights.
OUTSIDE = [
    "attack=fsr_suite", "attack.eps=0.3", "evaluation.chunk=7", "evaluation.seed=3", "evaluation.checkpoint=best",
    "evaluation.beside=standard", "paths.outputs=elsewhere", "paths.data=elsewhere", "logger=wandb",
    "logger=tensorboard", "trainer.devices=2", "trainer.strategy=ddp", "trainer=ddp_cpu", "trainer.progress=true",
    "trainer.checkpoint_every=5", "trainer.num_nodes=2", "trainer.accelerator=auto", "data.limit_test=20",
    "data.root=elsewhere", "data.verify=false", "runs.keep=all", "plan=true", "natural.trainer.max_epochs=3",
]  # fmt: skip


@pytest.mark.parametrize("option", OUTSIDE)
def test_leaves_the_identity(option: str) -> None:
    cfg = resolved(option)
    default = resolved()
    assert plain(cfg) != plain(default), "the option is read at all"
    assert running.identify(cfg, build_data(cfg)) == running.identify(default, build_data(default))


def test_where_the_images_lie_does_not_matter_but_what_they_show(tmp_path: Path) -> None:
    from tests.data import datafiles

    for place in ("here", "there"):
        datafiles.folder(tmp_path / place, size=8)
    datafiles.folder(tmp_path / "other", n=4, size=8)
    found = {}
    for place in ("here", "there", "other"):
        cfg = resolved("data.source=folder", f"data.root={tmp_path / place}", "data.num_classes=2")
        found[place] = running.identify(cfg, build_data(cfg))
    assert found["here"] == found["there"] != found["other"]


def leaves(tree: Any, prefix: str = "") -> set[str]:
    if not isinstance(tree, dict):
        return {prefix}
    return set().union(*(leaves(v, f"{prefix}.{k}" if prefix else k) for k, v in tree.items())) if tree else set()


#: Keys whose effect other tests show, or that state a fact of the data or the machine.
ELSEWHERE = {
    "compile", "channels_last", "data.num_classes", "model.num_classes", "model.mean", "model.std", "data.source",
    "fold",
    "base.label_smoothing", "trainer.sync_batchnorm", "trainer.deterministic", "trainer.fast_dev_run",
    "evaluation.weights", "logger.project", "logger.offline", "attack.norm", "attack.ensemble", "attack.attacks",
    "natural", "plan", "run", "checkpoint", "to", "defense.pretrained", "defense.replace_head", "extend", "rescore",
    "evaluation.save", "evaluation.skip_broken", "logger.entity", "logger.checkpoint", "sweep.name", "sweep.cases",
    "sweep.evaluations", "sweep.trial", "sweep.wait",
}  # fmt: skip


def written(folder: Path) -> set[str]:
    """Every key that the files of the groups, and train.yaml, write."""
    keys: set[str] = set()
    for group in ("defense", "base", "inner", "optimizer", "schedule", "threat", "ema", "logger", "trainer",
                  "evaluation", "data", "."):  # fmt: skip
        for file in (folder / group).glob("*.yaml"):
            tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            assert isinstance(tree, dict)
            tree = {k: v for k, v in tree.items() if k not in ("defaults", "hydra")}
            whole = group == "." or "@package _global_" in file.read_text()
            keys |= leaves(tree if whole else {group: tree})
    return keys


def test_no_option_is_forgotten() -> None:
    """A key that is new in conf/ of defense, base, threat, inner, optimizer, ... wants a line in one of the lists."""
    tested = {o.lstrip("+").split("=")[0] for o in (*(o for o, _ in DECIDING), *(o for o, _ in WATCHING), *OUTSIDE)}
    new = {k for k in written(CONF) if not k.endswith("_target_")}
    # Of audit.yaml: tests/evaluation/test_audit.py.
    new = {k for k in new if not k.startswith(("natural.", "audit."))} - tested - ELSEWHERE
    assert new == set()


# ---- what exactly an option does ---------------------------------------------------------------------------------


def images(n: int = 64, size: int = 16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, size, size, generator=g), torch.randint(10, (n,), generator=g)


def crafted(*overrides: str) -> tuple[Tensor, Tensor]:
    """Images and what the module of a config makes of them."""
    x, y = images()
    module = build_module(composed(*overrides)).eval()
    return x, module.craft(x, y)


def inside(x: Tensor, eps: float) -> Tensor:
    """Pixels that no bound at 0 or 1 can hold back."""
    return (x > eps) & (x < 1 - eps)


def test_eps_bounds_what_is_crafted() -> None:
    for eps in (0.05, 0.2):
        x, adv = crafted(f"threat.eps={eps}", "inner.steps=8")
        assert (adv - x).abs().max().item() == pytest.approx(eps, abs=1e-6)
        x, adv = crafted(f"inner.eps={eps}", "inner.steps=8", "threat.eps=0.1")
        assert (adv - x).abs().max().item() == pytest.approx(eps, abs=1e-6)


def test_norm_l2_bounds_the_distance() -> None:
    x, adv = crafted("threat=l2", "threat.eps=0.7", "inner.steps=8")
    distance = (adv - x).flatten(1).norm(dim=1)
    assert distance.max().item() <= 0.7 + 1e-5
    assert distance.median().item() == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        (["inner.step=1"], 0.1),
        (["inner.step=0.25", "inner.steps=4"], None),
        (["inner.step_abs=0.1"], 0.1),
        (["inner.step_abs={size:0.04,eps:0.1}", "inner.eps=0.05", "inner.steps=3"], None),
        (["inner.step_abs={size:0.1,eps:0.2}", "inner.eps=0.1", "inner.steps=2"], None),
    ],
)
def test_step_is_of_eps_or_absolute(options: list[str], moved: float | None) -> None:
    module = build_module(composed("inner.start=none", "threat.eps=0.1", "inner.steps=1", *options))
    inner = module.inner
    assert isinstance(inner, PGD)
    expected = {"inner.step=0.25": 0.025, "size:0.04": 0.02, "size:0.1,": 0.05}
    for mark, size in expected.items():
        if mark in options[0]:
            assert inner.step_size == pytest.approx(size)
    if moved is not None:
        x, adv = crafted("inner.start=none", "threat.eps=0.1", "inner.steps=1", *options)
        delta = (adv - x).abs()[inside(x, 0.1)]
        assert delta[delta > 0].min().item() == pytest.approx(moved, abs=1e-6)


@pytest.mark.parametrize(("start", "spread"), [("uniform", 0.1 / math.sqrt(3)), ("normal", 0.02), ("none", 0.0)])
def test_start_and_sigma(start: str, spread: float) -> None:
    module = build_module(composed("threat.eps=0.1", "inner=normal", "inner.eps=0.1", "inner.sigma=0.02",
                                   f"inner.start={start}", "inner.steps=20"))  # fmt: skip
    x, _ = images()
    begun = module.inner.start_point(x, generator=torch.Generator().manual_seed(0))
    assert (begun - x)[inside(x, 0.1)].std().item() == pytest.approx(spread, rel=0.03)


def test_clip_start() -> None:
    x = torch.zeros(8, 3, 16, 16)
    for clip, least in ((True, 0.0), (False, -0.1)):
        module = build_module(composed("threat.eps=0.1", f"inner.clip_start={str(clip).lower()}"))
        begun = module.inner.start_point(x, generator=torch.Generator().manual_seed(0))
        assert begun.min().item() == pytest.approx(least, abs=1e-3)


def first_step(*overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after one step of a net without BatchNorm."""
    options = ("model=cnn_small", "trainer.max_epochs=1", *overrides)
    before = build_module(composed(*options)).state_dict()
    return before, seen(*options).weights


def test_one_step_of_sgd_is_what_the_numbers_say() -> None:
    plain_sgd = ("optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=0.1")
    w, after = first_step(*plain_sgd)
    gradient = {k: (w[k] - after[k]) / 0.1 for k in w}
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()

    def same(option: list[str], expected: Callable[[str], Tensor]) -> None:
        _, found = first_step(*[o for o in plain_sgd if o.split("=")[0] not in str(option)], *option)
        for k in w:
            torch.testing.assert_close(found[k], expected(k), atol=2e-6, rtol=1e-4)

    same(["optimizer.lr=0.02"], lambda k: w[k] - 0.02 * gradient[k])
    same(["optimizer.weight_decay=0.3"], lambda k: w[k] - 0.1 * (gradient[k] + 0.3 * w[k]))
    same(["optimizer.nesterov=true", "optimizer.momentum=0.8"], lambda k: w[k] - 0.1 * 1.8 * gradient[k])
    clip = float(norm) / 4
    same([f"optimizer.clip={clip}"], lambda k: w[k] - 0.1 * gradient[k] / 4)
    same([f"optimizer.clip={10 * clip}"], lambda k: w[k] - 0.1 * gradient[k])
    same(["trainer.accumulate=3"], lambda k: w[k] - 0.1 * gradient[k])  # no BatchNorm: the same gradient
    same(["channels_last=true"], lambda k: w[k] - 0.1 * gradient[k])


def test_channels_last_is_the_format_of_net_and_images() -> None:
    module = build_module(composed("channels_last=true"))
    assert module.format == torch.channels_last
    assert module.net.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_label_smoothing_of_every_cross_entropy_on_the_true_label() -> None:
    s = 0.3
    for base in ("at", "trades", "mart", "standard"):
        logits = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
        y = torch.arange(6)
        clean = logits.flip(0)
        hard = build_module(composed(f"base={base}")).objective.outer(logits, y, clean)
        soft = build_module(composed(f"base={base}", f"label_smoothing={s}")).objective.outer(logits, y, clean)
        seen_by = clean if base == "trades" else logits
        uniform = -seen_by.log_softmax(1).mean()
        torch.testing.assert_close(soft["ce"], (1 - s) * hard["ce"] + s * uniform)
        for name in hard.keys() - {"ce"}:
            torch.testing.assert_close(soft[name], hard[name])


SCHEDULES = [
    (["schedule=constant"], [1, 1, 1, 1]),
    (["schedule.milestones=[2,4]", "schedule.factors=[0.5,0.1]"], [1, 0.5, 0.5, 0.1]),
    (["schedule.milestones=[3,7]", "schedule.factors=[0.5,0.1]", "schedule.epochs=8"], [1, 0.5, 0.5, 0.1]),
    (["schedule=cosine"], [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
    (["schedule=cosine", "schedule.final=1"], [1, 1, 1, 1]),
    (["schedule=onecycle", "schedule.peak=0.5", "schedule.initial=0.2", "schedule.final=0.4"], [0.2, 0.6, 1, 0.7]),
    (["schedule=constant", "schedule.warmup=2"], [0, 0.5, 1, 1]),
]


@pytest.mark.parametrize(("options", "factors"), SCHEDULES, ids=[" ".join(o) for o, _ in SCHEDULES])
def test_learning_rate_of_each_epoch(options: list[str], factors: list[float]) -> None:
    four = ["schedule.epochs=4", "trainer.max_epochs=4"]
    found = seen(*four, "inner.steps=1", "inner.step=1", "optimizer.lr=0.2", *options)
    assert found.lrs == pytest.approx([0.2 * f for f in factors])
    assert found.metrics["lr"] == pytest.approx(0.2 * factors[-1])


def test_interval_step_changes_the_rate_within_an_epoch() -> None:
    by_epoch = seen(*BY_STEP).lrs
    by_step = seen(*BY_STEP, "schedule.interval=step").lrs
    assert len(set(by_epoch)) == 2
    assert len(set(by_step)) == 4


def test_ema_is_the_running_mean_of_the_weights() -> None:
    """One step: d * start + (1 - d) * live; with warm-up d = 1/10 after the first."""
    options = ["trainer.max_epochs=1"]
    start = dict(build_module(composed(*options)).net.named_parameters())
    for more, d in ((["ema=wa"], 0.9995), (["ema=wa", "ema.decay=0.3"], 0.3), (["ema=wa", "ema.warmup=true"], 0.1)):
        found = seen(*options, *more)
        assert found.average is not None
        for name, w in found.module.net.named_parameters():
            torch.testing.assert_close(found.average[name], d * start[name] + (1 - d) * w.detach())


def test_weights_that_are_evaluated_follow_ema() -> None:
    assert resolved().evaluation.weights == "student"
    assert resolved("ema=wa").evaluation.weights == "ema"
    assert resolved("ema=wa", "evaluation.weights=student").evaluation.weights == "student"


def test_precision_is_of_crafting_too() -> None:
    kinds = []
    true = RobustModule.logits

    def logits(module: RobustModule, x: Tensor) -> Tensor:
        kinds.append(module.net.fc(torch.zeros(1, 8)).dtype)
        return true(module, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RobustModule, "logits", logits)
        found = Seen(resolved("trainer.precision=bf16-mixed", "trainer.max_epochs=1"))
    assert set(kinds) == {torch.bfloat16}
    assert {t.dtype for t in found.weights.values()} == {torch.float32, torch.int64}


def test_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match=r"trainer\.precision=bf16-mixed"):
        trainer_module.check_machine(resolved("trainer.precision=bf16-mixed"))


def test_deterministic_reaches_torch() -> None:
    try:
        Seen(resolved("trainer.deterministic=true", "trainer.max_epochs=1"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


ONE_STEP = ("trainer.max_epochs=1",)


def test_gradients_of_another_memory_format_step_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives such; the fused optimizers read memory in its order, whatever the strides."""
    true = gradients.differentiate

    def differentiate(*args: Any) -> list[list[Tensor | None]]:
        return [
            [g.contiguous(memory_format=torch.channels_last) if g is not None and g.dim() == 4 else g for g in one]
            for one in true(*args)
        ]

    expected = seen(*ONE_STEP)
    monkeypatch.setattr(gradients, "differentiate", differentiate)
    found = Seen(resolved(*ONE_STEP))
    for key, tensor in expected.weights.items():
        torch.testing.assert_close(found.weights[key], tensor, atol=1e-6, rtol=0, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "mode"),
    [("none", "true"), ("fsr", "true"), ("afd", "true"), ("cure", "true"), ("none", "reduce-overhead")],
)
def test_compile_trains_the_same(defense: str, mode: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on a CPU wants a C++ compiler")
    options = (*ONE_STEP, f"defense={defense}")
    a, b = seen(*options), Seen(resolved(*options, f"compile={mode}"))
    assert a.weights.keys() == b.weights.keys()
    for key, tensor in a.weights.items():
        torch.testing.assert_close(b.weights[key], tensor, atol=1e-5, rtol=0, msg=key)
    assert b.metrics["train/loss"] == pytest.approx(a.metrics["train/loss"], rel=1e-5)
    assert b.identity != a.identity


# ---- recipes -----------------------------------------------------------------------------------------------------


def values(cfg: DictConfig, *keys: str) -> list[Any]:
    return [OmegaConf.select(cfg, key) for key in keys]


def cell(*overrides: str) -> DictConfig:
    return config.resolve(conftest.composed(*overrides))


def step_size(cfg: DictConfig) -> float:
    return float(cfg.inner.step) * float(cfg.inner.eps)


FACTS = ("optimizer.lr", "optimizer.momentum", "optimizer.weight_decay", "trainer.max_epochs", "data.batch_size")


@pytest.mark.parametrize("model", ["resnet18", "vgg16", "wrn34_10"])
def test_fsr_on_cifar10(model: str) -> None:
    cfg = cell("defense=fsr", f"model={model}")
    assert cfg.axes.base == "at"
    assert values(cfg, *FACTS) == [0.1, 0.9, 5e-4, 100, 128]
    assert cfg.data.augment == "crop_flip"
    assert cfg.schedule.kind == "multistep"
    module = build_module(cell("defense=fsr", "model=cnn_small"))
    for epoch, factor in ((1, 1), (74, 1), (75, 0.1), (89, 0.1), (90, 0.01), (100, 0.01)):
        assert module.schedule.factor(epoch - 1) == pytest.approx(factor)
    assert (cfg.inner.steps, cfg.inner.start, cfg.inner.clip_start) == (10, "uniform", True)
    assert cfg.inner.eps == pytest.approx(8 / 255)
    assert step_size(cfg) == pytest.approx(2 / 255)
    assert values(cfg, "defense.lambda_sep", "defense.lambda_rec", "defense.tau", "defense.at") == [1, 1, 0.1, None]
    assert not cfg.model.normalize


def test_fsr_on_svhn() -> None:
    cfg = cell("defense=fsr", "data=svhn")
    assert values(cfg, *FACTS) == [0.01, 0.9, 5e-4, 100, 128]
    assert step_size(cfg) == pytest.approx(1 / 255)
    assert cfg.inner.eps == pytest.approx(8 / 255)
    assert cfg.data.augment == "none"


def test_trades_on_wrn() -> None:
    cfg = cell("base=trades", "model=wrn34_10")
    assert values(cfg, *FACTS) == [0.1, 0.9, 2e-4, 76, 128]
    assert cfg.base.beta == 6
    assert (cfg.inner.steps, cfg.inner.start, cfg.inner.sigma, cfg.inner.clip_start) == (10, "normal", 0.001, False)
    assert cfg.inner.eps == 0.031
    assert step_size(cfg) == pytest.approx(0.007)
    assert cfg.threat.eps == pytest.approx(8 / 255)  # evaluated at 8/255 all the same
    schedule = build_module(cell("base=trades", "model=wrn34_10", "model.depth=10", "model.width=1")).schedule
    assert [schedule.factor(e - 1) for e in (74, 75, 76)] == pytest.approx([1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("model", "lr", "decay", "epochs", "beta"), [("resnet18", 0.01, 3.5e-3, 120, 5), ("wrn34_10", 0.1, 7e-4, 90, 6)]
)
def test_mart(model: str, lr: float, decay: float, epochs: int, beta: float) -> None:
    cfg = cell("base=mart", f"model={model}")
    assert values(cfg, *FACTS) == [lr, 0.9, decay, epochs, 128]
    assert cfg.base.beta == beta
    assert cfg.inner.eps == 0.031
    assert step_size(cfg) == pytest.approx(0.007)
    factors = build_module(cell("base=mart", "model=cnn_small", *schedule_of(cfg))).schedule
    for epoch, factor in ((74, 1), (75, 0.1), (90, 0.01), (100, 0.001), (120, 0.001)):
        if epoch <= epochs:
            assert factors.factor(epoch - 1) == pytest.approx(factor)


def schedule_of(cfg: DictConfig) -> list[str]:
    keys = ("epochs", "milestones", "factors")
    return [f"schedule.{k}={plain(cfg.schedule)[k]}".replace(" ", "") for k in keys]


def test_another_threat_takes_its_own_eps_and_a_step_in_proportion() -> None:
    cfg = cell("base=trades", "threat.eps=4/255")
    assert cfg.inner.eps == pytest.approx(4 / 255)
    assert step_size(cfg) == pytest.approx(4 / 255 * 0.007 / 0.031)


def test_the_command_line_wins_over_recipes() -> None:
    cfg = cell("defense=fsr", "data=svhn", "optimizer.lr=0.2", "inner.step=0.5", "data.augment=crop_flip")
    assert values(cfg, "optimizer.lr", "inner.step", "data.augment") == [0.2, 0.5, "crop_flip"]
    cfg = cell("base=mart", "model=resnet18", "base.beta=2", "optimizer.weight_decay=1e-3", "trainer.max_epochs=3")
    assert values(cfg, "base.beta", "optimizer.weight_decay", "trainer.max_epochs") == [2, 1e-3, 3]
    cfg = cell("base=trades", "inner=uniform")
    assert values(cfg, "inner.start", "inner.step") == ["uniform", 0.25]
    cfg = cell("data=digits", "threat.eps=0.3", "schedule=fast")
    assert values(cfg, "threat.eps", "trainer.max_epochs", "schedule.kind") == [0.3, 30, "onecycle"]
    cfg = cell("experiment=demo", "base=trades", "model=cnn_small", "data.image_size=16")
    assert [cfg.axes.base, cfg.axes.model, cfg.data.image_size] == ["trades", "cnn_small", 16]


def test_later_recipes_win() -> None:
    """recipe/data, then recipe/base, then the schedule: MART's numbers on SVHN are MART's, the step SVHN's."""
    cfg = cell("base=mart", "model=wrn34_10", "data=svhn")
    assert sorted(cfg.axes.recipes) == ["recipe/base/mart_wrn34_10", "recipe/data/svhn"]
    assert values(cfg, "optimizer.lr", "optimizer.weight_decay", "inner.step") == [0.01, 7e-4, 0.125]
    cfg = cell("base=mart", "model=resnet18", "schedule=fast")
    assert values(cfg, "trainer.max_epochs", "optimizer.weight_decay") == [30, 3.5e-3]


@pytest.mark.parametrize(
    ("base", "model", "data"),
    [("at", "resnet18", "svhn"), ("trades", "wrn34_10", "cifar10"), ("mart", "resnet18", "digits"),
     ("standard", "resnet_small", "digits")],
)  # fmt: skip
def test_a_defense_and_its_partner_differ_in_the_defense_only(base: str, model: str, data: str) -> None:
    """``defense=none`` reads the same data and base files."""
    same = (f"base={base}", f"model={model}", f"data={data}")
    ours, partner = plain(cell("defense=fsr", *same)), plain(cell("defense=none", *same))

    def shared(cfg: dict[str, Any]) -> list[str]:
        return [r for r in cfg["axes"]["recipes"] if r.startswith(("recipe/data/", "recipe/base/"))]

    assert shared(ours) == shared(partner)
    for cfg in (ours, partner):
        del cfg["defense"], cfg["axes"]
    assert ours == partner
