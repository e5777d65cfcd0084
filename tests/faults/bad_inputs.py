"""What users and strangers get wrong, by topic, and what the one line must say of it."""

from __future__ import annotations

import io
import os
import pickle
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tests.data import datafiles

from redoubt import config
from redoubt.build import build_module

SMALL = (
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.source=fake", "data.image_size=8",
    "data.limit_train=30", "data.limit_test=10", "data.batch_size=10", "data.probe=10", "trainer=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1",
    "attack=none",
)  # fmt: skip
#: The finished run that lies in ``outputs``.
RUN = "run=none-at-cnn_small-digits-s0"


class Case(NamedTuple):
    """A bad input.

    Args:
        command: Of the console script.
        words: What follows it, beside `SMALL` where the command composes a cell.
        says: What the line must say.
        prepare: Puts into the folder what the words name.
    """

    command: str
    words: tuple[str, ...]
    says: tuple[str, ...]
    prepare: Callable[[Path], object] | None = None

    @property
    def argv(self) -> tuple[str, ...]:
        """The whole command line."""
        cell = self.command == "train" or any(word.startswith("checkpoint=w") for word in self.words)
        return (self.command, *(SMALL if cell else ()), *self.words)

    def __str__(self) -> str:
        words = " ".join(self.words) or "alone"
        return f"{self.command} {words if len(words) < 70 else words[:60] + '...'}".replace("\0", "\\0")


def case(line: str, *says: str, prepare: Callable[[Path], object] | None = None) -> Case:
    command, *words = shlex.split(line)
    return Case(command, tuple(words), says, prepare)


# ---- words: names, keys, + and ~, what Hydra cannot read -----------------------------------------------------------

WORDS = [
    # misspelt
    case("train defence=fsr", "defence", "did you mean defense"),
    case("train +defence=fsr", "defence", "did you mean defense"),
    case("train defense=fsrr", "defense=fsrr", "fsr", "none"),
    case("train base=trade", "base=trade", "did you mean trades"),
    case("train model=resnet", "model=resnet", "resnet18"),
    case("train data=svvhn", "data=svvhn", "did you mean svhn"),
    case("train attack=pgd2", "attack=pgd2", "pgd20"),
    case("train optimizer=sdg", "optimizer=sdg", "sgd"),
    case("train trainer=cppu", "trainer=cppu", "cpu"),
    case("train experiment=dmo", "experiment=dmo", "demo"),
    case("train experiment=fsr/s1_cifar100_resnet18_trade", "did you mean fsr/s1_cifar100_resnet18_trades"),
    case("train experiment=fsrs1", "experiment=fsrs1", "fsr/..."),
    case("train optimizer.lrr=1", "optimizer.lrr", "did you mean lr"),
    case("train optimiser.lr=1", "optimiser", "optimizer"),
    case("train newkey=1", "newkey", "seed"),
    case("train natural.foo=1", "natural.foo"),
    case("train seed.foo=1", "seed.foo", "seed is a value", "seed=..."),
    case("train defense=", "defense=", "there are", "fsr"),
    case("train defense=null", "defense=null names no option", "fsr"),
    case("train trainer=[cpu,gpu]", "trainer=['cpu', 'gpu'] names no option", "ddp_cpu"),
    # added
    case("train +newkey=1", "newkey is not a key", "seed"),
    case("train ++newkey.inner=1", "newkey is not a key", "seed"),
    case("train lr=0.1", "lr is not a key", "did you mean optimizer.lr?"),
    case("train +lr=0.1", "lr is not a key", "did you mean optimizer.lr?"),
    case("train epochs=3", "epochs is not a key", "did you mean trainer.max_epochs or schedule.epochs?"),
    case("train train.max_epochs=3", "train.max_epochs is not a key", "did you mean trainer.max_epochs"),
    case("train eps=0.1", "eps is not a key", "did you mean threat.eps or inner.eps or attack.eps?"),
    case("eval epsilon=0.1", "epsilon is not a key", "attack.eps"),
    case("train batch_size=3", "did you mean data.batch_size?"),
    case("train optimizer.learning_rate=1", "did you mean optimizer.lr?"),
    case("train trainer.lr=1", "did you mean optimizer.lr?"),
    case("train dataset=svhn", "did you mean data?"),
    case("train momentum=0", "did you mean optimizer.momentum?"),
    case("train +seeds=1", "seeds is not a key", "did you mean seed"),
    case("train +optimizer.momentun=1", "optimizer.momentun", "did you mean momentum"),
    case("train ++optimizer.lrr=0.5", "optimizer.lrr", "did you mean lr"),
    case("train +inner.step_sizes=2", "inner.step_sizes", "did you mean"),
    case("train +model.width=2", "model.width", "did you mean widths"),
    case("train defense=fsr +defense.tua=2", "defense.tua", "did you mean tau"),
    case("train base=trades +base.betta=2", "base.betta", "did you mean beta"),
    case("train +data.limits_train=2", "data.limits_train", "did you mean limit_train"),
    case("train +schedule.milestone=[2]", "schedule.milestone", "did you mean milestones"),
    case("train +trainer.max_epoch=2", "trainer.max_epoch", "did you mean max_epochs"),
    case("train +evaluation.chunks=2", "evaluation.chunks", "did you mean chunk"),
    case("train +validation.step_abs=2", "validation.step_abs", "did you mean step"),
    case("train +natural.trainer.epochs=2", "natural.trainer.epochs", "max_epochs"),
    case("train +threat.epsilon=0.1", "threat.epsilon", "eps"),
    case("train +awp.rhoo=0.1", "awp.rhoo", "did you mean rho"),
    case("train +ema.decoy=0.9", "ema.decoy", "did you mean decay"),
    case("train +paths.output=x", "paths.output", "did you mean outputs"),
    case("train +runs.keeps=all", "runs.keeps", "did you mean keep"),
    case("train +sweep.cells=[a]", "sweep.cells", "cases"),
    case("train +logger.project=x", "logger.project", "logger=<option>"),
    case("train attack=pgd20 +attack.restarts=3", "attack.restarts is not a key", "attacks"),
    case("train attack=pgd20 +attack.attacks.pgd20.restart=3", "attack.attacks.pgd20.restart", "did you mean restarts"),
    case("train +hydra.verbos=true", "hydra.verbos", "did you mean verbose"),
    case("train +run=x", "run is not a key", "runs"),
    case("train +seed=3", "seed is there already", "leave the + out"),
    case("train +defense=fsr", "+defense=fsr", "leave the + out"),
    case("train +experiment=demo", "+experiment=demo", "leave the + out"),
    # taken away
    case("train ~seed", "seed is missing", "leave ~seed out"),
    case("train ~trainer.max_epochs", "trainer.max_epochs is missing", "~trainer.max_epochs"),
    case("train ~optimizer.lr", "optimizer.lr is missing"),
    case("train ~threat.eps", "threat.eps is missing"),
    case("train ~data.num_classes", "data.num_classes", "model.num_classes"),
    case("train ~model._target_", "model._target_ is missing"),
    case("train ~attack.attacks", "attack.attacks is missing"),
    case("train ~validation", "validation is missing"),
    case("train ~defense", "~defense", "defense=<option>"),
    case("train ~data", "~data", "data=<option>"),
    case("train ~nothing", "~nothing", "there is no such key"),
    case("train ~seed=3", "~seed", "another value"),
    # cannot be read
    case("train =1", "=1 cannot be read"),
    case("train seed", "'seed' is no key=value", "seed=..."),
    case("train 'seed=[1'", "seed=[1 cannot be read", "in quotes"),
    case("train 'seed={a'", "seed={a cannot be read"),
    case('train "seed=\'a"', "cannot be read"),
    case("train paths.outputs=läuft", "paths.outputs=läuft cannot be read", 'paths.outputs="läuft"'),
    case("train 'seed=${'", "seed=${ cannot be read"),
    case("train seed=1,2", "seed=1,2 holds several values", "-m", "seed=[1,2]"),
    case("train 'seed=range(3)'", "seed=range(3)", "-m"),
    case("train 'threat.eps=interval(0,1)'", "threat.eps=interval(0,1)", "-m"),
    # interpolations
    case("train 'seed=${seed}'", "seed: it refers to itself"),
    case("train 'seed=${trainer.max_epochs}' 'trainer.max_epochs=${seed}'", "seed: it refers to itself"),
    case("train 'threat.eps=${nothing}'", "threat.eps", "there is no nothing", "${...}"),
    case("train 'seed=${oc.env:NO_SUCH_NAME}'", "seed", "NO_SUCH_NAME"),
    case("train 'seed=${nosuch:1}'", "seed", "there is no resolver nosuch"),
    case("train 'optimizer.lr=${ratio:1,0}'", "optimizer.lr", "division by zero"),
    case("train 'optimizer.lr=???'", "optimizer.lr is missing"),
]

FLAGS = [
    case("train --no-such-flag", "--no-such-flag", "key=value"),
    case("train --config-dir", "--config-dir", "expected one argument"),
    case("train --config-dir nowhere", "--config-dir=", "nowhere", "no such folder"),
    case("train --config-dir file", "--config-dir", "no such folder", prepare=lambda folder: (folder / "file").touch()),
    case("train --config-name mine", "--config-name", "--config-dir"),
    case("train hydra.launcher=3", "hydra.launcher", "hydra/launcher="),
    case("train hydra.job.chdir=true", "hydra.job.chdir", "paths.outputs"),
    case("train --cfg everything", "--cfg", "everything"),
]


# ---- files of configs ----------------------------------------------------------------------------------------------


def experiment(text: str | bytes) -> Callable[[Path], None]:
    """A user's own experiment ``mine``."""

    def write(folder: Path) -> None:
        (folder / "own/experiment").mkdir(parents=True)
        raw = text if isinstance(text, bytes) else f"# @package _global_\n{text}".encode()
        (folder / "own/experiment/mine.yaml").write_bytes(raw)

    return write


def allowing(raw: bytes) -> Callable[[Path], None]:
    """A user's own list of what may be called."""

    def write(folder: Path) -> None:
        (folder / "own").mkdir()
        (folder / "own/redoubt.allow").write_bytes(raw)

    return write


def mine(text: str | bytes, *says: str) -> Case:
    return case("train --config-dir own experiment=mine", *says, prepare=experiment(text))


CONFIGS = [
    mine("seed: [1\nlabel_smoothing: }\n", "mine.yaml", "line 3", "correct the yaml"),
    mine("seed: 1\n\tfold: true\n", "mine.yaml", "line 3"),
    mine("seed: 1\nseed: 2\n", "mine.yaml", "duplicate key seed"),
    mine("seed: !!python/object/apply:os.system [touch escaped]\n", "mine.yaml", "line 2"),
    mine(b"\xff\xfe\x00", "mine.yaml", "UTF-8"),
    mine(b"seed: 3\n", "experiment", "# @package _global_"),
    mine(b"- a\n- b\n", "experiment", "# @package _global_"),
    mine("trainer: {max_epoch: 3}\n", "trainer.max_epoch", "did you mean max_epochs"),
    mine("optimizr: {lr: 1}\n", "optimizr", "did you mean optimizer"),
    mine("validation: 3\n", "validation"),
    mine("defaults: 3\n", "experiment/mine", "defaults"),
    mine("defaults:\n  - override /defense: fsrr\n", "defense=fsrr", "did you mean fsr"),
    mine("defaults:\n  - /defnse: fsr\n", "defnse=fsr", "defense"),
    mine("defaults:\n  - experiment/mine\n", "experiment/mine"),
    mine("seed: ${nothing}\n", "seed", "there is no nothing"),
    mine(
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh")),
        "mine.yaml",
        "nested too deeply",
    ),
    case("train --config-dir own seed=x", "redoubt.allow cannot be read", "UTF-8", prepare=allowing(b"\xff\xfea\0")),
]


# ---- values --------------------------------------------------------------------------------------------------------

VALUES = [
    # eps
    case("train threat.eps=1.01", "threat.eps=1.01", "[0, 1]", "8/255"),
    case("train threat.eps=8", "threat.eps=8", "8/255"),
    case("train threat.eps=-0.1", "threat.eps=-0.1"),
    case("train threat.eps=nan", "threat.eps=nan", "not a number"),
    case("train threat.eps=inf", "threat.eps=inf"),
    case("train threat.eps=much", "threat.eps='much'", "not a number", "8/255"),
    case("train threat.eps=8/0", "threat.eps='8/0'"),
    case("train threat.eps=1/2/3", "threat.eps='1/2/3'"),
    case("train threat.eps=3/1e999999999", "threat.eps='3/1e999999999'"),
    case("train threat.eps=null", "threat.eps=null"),
    case("train threat.eps=[0.1]", "threat.eps=[0.1]"),
    case("train threat.eps={a:1}", "threat.eps={'a': 1}"),
    case("train threat.eps=true", "threat.eps=true"),
    case("train threat=l2 threat.eps=14", "threat.eps=14", "13.86", "l2"),
    case("train threat.norm=l1", "threat.norm='l1'", "linf or l2"),
    case("train threat=3", "threat=3"),
    case("train inner.eps=3", "inner.eps=3"),
    case("train attack.eps=x", "attack.eps='x'"),
    # numbers
    case("train seed=abc", "seed='abc'", "whole number"),
    case("train seed=", "seed=''", "whole number"),
    case("train seed=null", "seed=null", "whole number"),
    case("train seed=true", "seed=true", "whole number"),
    case("train seed=1.5", "seed=1.5", "whole number"),
    case("train seed=1e30", "seed=1e+30", "too large"),
    case("train data.image_size=100000000", "data.image_size=100000000", "at most 2048"),
    case(f"train seed={10**400}", "seed=1000", "whole number"),
    case("train optimizer.lr=-1", "optimizer.lr=-1"),
    case("train optimizer.lr=fast", "optimizer.lr='fast'"),
    case("train optimizer.lr=[0.1]", "optimizer.lr=[0.1]"),
    case("train optimizer.momentum=-0.9", "optimizer.momentum=-0.9", "at least 0"),
    case("train optimizer.nesterov=maybe", "optimizer.nesterov='maybe'", "true or false"),
    case("train optimizer.nesterov=true optimizer.momentum=0", "optimizer", "Nesterov"),
    case("train optimizer.clip=0", "optimizer.clip=0", "null"),
    case("train optimizer=adamw optimizer.betas=[2,3]", "optimizer", "beta"),
    case("train optimizer=adamw optimizer.betas=x", "optimizer.betas='x'", "list"),
    case("train label_smoothing=1", "label_smoothing=1"),
    case("train label_smoothing=some", "label_smoothing='some'"),
    case("train ema.decay=1", "ema.decay=1"),
    case("train ema.warmup=true", "ema.warmup=true", "ema.decay"),
    case("train awp=0.1", "awp=0.1", "awp.rho="),
    case("train awp.rho=-1", "awp.rho=-1"),
    case("train awp.warmup=3", "awp.warmup", "awp.rho"),
    case("train compile=fast", "compile='fast'", "reduce-overhead"),
    case("train compile=0", "compile=0", "true"),
    case("train channels_last=yes_please", "channels_last='yes_please'", "true or false"),
    case("train fold=1", "fold=1", "true or false"),
    case("train plan=[]", "plan=[]", "true or false"),
    case("train validation.every=0", "validation.every=0"),
    case("train validation.step=x", "validation.step='x'"),
    case("train validation=null", "validation=null", "validation.every="),
    case("train natural.optimizer.lr=-1", "natural.optimizer.lr=-1"),
    case("train natural.schedule.milestones=[]", "natural.schedule.milestones"),
    # trainer, paths
    case("train trainer.accelerator=tpu", "trainer.accelerator='tpu'", "cpu or gpu"),
    case("train trainer.precision=64", "trainer.precision=64", "32-true"),
    case("train trainer.precision=16-mixed", "trainer.precision=16-mixed", "GPU"),
    case("train trainer.devices=0", "trainer.devices=0", "auto"),
    case("train trainer.devices=many", "trainer.devices='many'"),
    case("train trainer.devices=100000", "trainer.devices=100000", "cores"),
    case("train trainer.strategy=fsdp", "trainer.strategy='fsdp'", "ddp"),
    case("train trainer.accumulate=0", "trainer.accumulate=0", "at least 1"),
    case("train trainer.max_epochs=0", "trainer.max_epochs=0"),
    case("train trainer.max_epochs=1.5", "trainer.max_epochs=1.5"),
    case("train trainer.checkpoint_every=0", "trainer.checkpoint_every=0", "null"),
    case("train trainer.fast_dev_run=2", "trainer.fast_dev_run=2", "true or false"),
    case("train trainer.progress=x", "trainer.progress='x'"),
    case("train trainer=cpu trainer=3", "trainer=3"),
    case("train paths.outputs=", "paths.outputs=''", "text"),
    case("train paths.outputs=null", "paths.outputs=null", "text"),
    case("train paths.outputs=[a]", "paths.outputs=['a']", "text"),
    case("train logger._target_=[]", "logger._target_", "not allowed"),
    case("train runs.keep=everything", "runs.keep='everything'", "all"),
    # schedule
    case("train schedule.kind=sine", "schedule.kind='sine'", "cosine"),
    case("train schedule.milestones=[5,3]", "schedule.milestones", "rising"),
    case("train schedule.milestones=[a]", "schedule.milestones=['a']", "number"),
    case("train schedule.factors=[0.1]", "schedule.factors", "one factor per milestone"),
    case("train schedule.factors=[-1,-1]", "schedule.factors=-1", "negative"),
    case("train schedule.epochs=0", "schedule.epochs=0"),
    case("train schedule.initial=-1", "schedule.initial=-1", "negative"),
    case("train schedule.peak=2", "schedule.peak=2"),
    # inner attack, defense, base, model
    case("train inner.steps=1.5", "inner.steps=1.5"),
    case("train inner.steps=-1", "inner.steps=-1"),
    case("train inner.start=middle", "inner", "start='middle'", "uniform"),
    case("train inner.start=none inner.step=0.1", "inner", "do not reach eps"),
    case("train inner.keep_best=3", "inner.keep_best=3", "true or false"),
    case("train inner.step_abs=[1]", "inner.step_abs=[1]"),
    case("train inner.stages=3", "inner.stages=3", "list"),
    case("train inner=3", "inner=3 names no option", "uniform"),
    case("train model.num_classes=5", "model.num_classes=5", "data.num_classes=10"),
    case("train model.widths=[]", "model.widths=[]", "[32,64,64,128]"),
    case("train model.widths=abc", "model.widths='abc'", "list"),
    case("train model.widths=[4,a]", "model.widths=[4, 'a']", "whole number"),
    case("train model.widths=[4,-4]", "model.widths=[4, -4]"),
    case("train model.normalize=maybe", "model.normalize='maybe'", "true or false"),
    case("train model.normalize=true model.mean=[7,7,7]", "model.normalize", "mean"),
    case("train model._target_=redoubt.nets.Nope", "model._target_", "redoubt.nets.Nope"),
    case("train defense._target_=os.system", "defense._target_", "'os.system'", "redoubt.allow"),
    case("train defense=fsr defense.at=layer9", "defense.at='layer9'", "take one such as"),
    case("train defense=fsr defense.at=[]", "defense.at=[]"),
    case("train defense=fsr defense.tau=0", "defense.tau=0"),
    case("train defense=fsr defense.tau=true", "defense.tau=true", "number"),
    case("train defense=fsr defense.hidden=0", "defense.hidden=0"),
    case("train defense=fsr defense.lambda_sep=-1", "defense.lambda_sep=-1"),
    case("train defense=cure defense.percentile=130", "defense.percentile=130"),
    case("train defense=cure defense.criterion=x", "defense.criterion='x'", "rgp"),
    case("train defense=afd defense.pretrained=nobody", "defense.pretrained=nobody", "auto"),
    case("train defense=afd base=standard", "base=standard", "base=at"),
    case("train base=trades base.beta=-1", "base.beta=-1"),
    case("train base=mart base.beta=x", "base.beta='x'"),
    # data
    case("train data.batch_size=1", "data.batch_size=1", "at least 2"),
    case("train data.batch_size=many", "data.batch_size='many'"),
    case("train data.val_fraction=1", "data.val_fraction=1"),
    case("train data.val_fraction=x", "data.val_fraction='x'"),
    case("train data.limit_train=0", "data.limit_train=0"),
    case("train data.limit_test=-3", "data.limit_test=-3"),
    case("train data.source=offical", "data.source=offical", "did you mean official"),
    case("train data.augment=cropflip", "data.augment", "crop_flip"),
    case("train data.augment=3", "data.augment=3", "text or null"),
    case("train data.image_size=7 data.source=official", "data.image_size=7", "8, 16 or 32"),
    case("train data.num_classes=1", "data.num_classes=1", "at least 2"),
    case("train data.mean=[0.5]", "data.mean=[0.5]", "three numbers"),
    case("train data.std=[0,0,0]", "data.std", "over 0"),
    case("train data.verify=maybe", "data.verify='maybe'", "true or false"),
    case("train data.root=", "data.root=''", "text"),
    # evaluation
    case("train evaluation.checkpoint=first", "evaluation.checkpoint='first'", "last or best"),
    case("train evaluation.checkpoint=best", "data.val_fraction"),
    case("train evaluation.weights=ema", "evaluation.weights='ema'", "ema.decay"),
    case("train evaluation.weights=3", "evaluation.weights=3", "text"),
    case("train evaluation.beside=nature", "nature", "standard"),
    case("train evaluation.save=png", "evaluation.save='png'", "uint8"),
    case("train evaluation.chunk=0", "evaluation.chunk=0", "at least 1"),
    case("train evaluation.skip_broken=true", "evaluation.skip_broken=true", "attack.ensemble=true"),
    # suites
    case("train attack.attacks=3", "attack.attacks must map names"),
    case("train attack.ensemble=maybe", "attack.ensemble='maybe'", "true or false"),
    case("train attack=pgd20 attack.attacks.pgd20=3", "attack.attacks.pgd20=3", "mapping"),
    case("train attack=pgd20 attack.attacks.pgd20.steps=-1", "attack.attacks.pgd20", "steps=-1"),
    case("train attack=pgd20 attack.attacks.pgd20.steps=abc", "attack.attacks.pgd20.steps='abc'", "whole number"),
    case("train attack=pgd20 attack.attacks.pgd20.step=-1", "attack.attacks.pgd20", "negative"),
    case("train attack=pgd20 attack.eps=null", "attack.attacks.pgd20.eps=null", "number"),
    case("train attack=pgd20 attack.norm=l7", "attack.norm='l7'", "l2"),
    case("train attack=pgd attack.loss=x", "attack.attacks.pgd", "loss='x'", "margin"),
    case("train attack=pgd attack.restarts=0", "restarts=0", "at least 1"),
    case("train attack=pgd attack.restarts=2 attack.start=none", "restarts=2", "start=uniform"),
    case("train attack=pgd attack.kappa=x", "attack.attacks.pgd.kappa='x'"),
    case("train attack=pgd attack.step_abs={size:1}", "step_abs", "eps"),
    case("train attack=pgd20 attack.attacks.pgd20._target_=os.system", "attack.attacks.pgd20._target_", "not allowed"),
    case("train attack=autoattack attack.version=nope", "version='nope'", "standard"),
    case("train attack=autoattack attack.version=[]", "version=[]", "apgd-ce"),
    case("train attack=torchattacks attack.name=Nope", "name='Nope'", "PGD"),
    case("train attack=torchattacks attack.options={foo:1}", "options.foo", "steps"),
    case("train attack=torchattacks attack.options={steps:-1}", "options.steps=-1"),
    case("train attack=foolbox attack.name=Nope", "attack.attacks.foolbox"),
    case("train attack=corruptions attack.kinds=[rain]", "kind='rain'", "fog"),
    case("train attack=corruptions attack.severities=[6]", "severity=6", "1 to 5"),
    case("train attack=corruptions attack.severities=[]", "severities=[]", "at least one"),
    case("train attack=blackbox attack.source=nobody", "attack.source=nobody", "runs ls"),
    case("train attack=nattack attack.queries=-1", "queries=-1"),
    case("train attack=multitargeted attack.targets=0", "targets=0"),
]


# ---- data ----------------------------------------------------------------------------------------------------------


def folder_with(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Two classes of images in ``d``, of which one image, ``d/train/cat/1.png``, is changed."""

    def write(folder: Path) -> None:
        datafiles.folder(folder / "d")
        change(folder / "d/train/cat/1.png")

    return write


def images(change: Callable[[Path], object], *says: str, words: str = "") -> Case:
    line = f"train data.source=folder data.root=d data.num_classes=2 {words}"
    return case(line, *says, prepare=folder_with(change))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that claims a size, with these chunks and next to no pixels."""
    header = b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [header, *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    framed = (struct.pack(">I", len(r)) + kind + r + struct.pack(">I", zlib.crc32(kind + r)) for kind, r in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def pixels(*shape: int, dtype: Any = np.uint8) -> Image.Image:
    return Image.fromarray(np.arange(np.prod(shape)).reshape(shape).astype(dtype))


def another(kind: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else under the image's name."""

    def put(image: Path) -> None:
        image.unlink()
        kind(image)

    return put


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def without(*names: str) -> Callable[[Path], None]:
    return lambda image: [shutil.rmtree(image.parents[2] / name) for name in names] and None


def svhn(change: Callable[[Path], object] = bool) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        datafiles.svhn(folder / "d")
        change(folder / "d/train_32x32.mat")

    return write


def cifar(folder: Path) -> None:
    datafiles.cifar(folder / "d")
    cut(folder / "d/cifar-10-python.tar.gz", 1000)


def tiny(folder: Path) -> None:
    datafiles.tiny(folder / "d", zipped=False)
    (folder / "d/tiny-imagenet-200/val/val_annotations.txt").write_text("../../x.JPEG\tn00\n")


OFFICIAL = "data.source=official data.root=d"
IMAGE = "d/train/cat/1.png"

DATA = [
    images(lambda image: image.write_text("hello"), IMAGE, "not a readable image", "replace or remove"),
    images(lambda image: image.write_bytes(b""), IMAGE, "not a readable image"),
    images(lambda image: cut(image, 60), IMAGE, "not a readable image"),
    images(lambda image: pixels(8, 8, 4).save(image), IMAGE, "transparent pixels"),
    images(lambda image: pixels(8, 8, dtype=np.uint16).save(image), IMAGE, "8 bits"),
    images(lambda image: pixels(8, 8, 3).save(image, save_all=True, append_images=[pixels(8, 8, 3)]), IMAGE, "several"),
    images(lambda image: pixels(8, 8, 3).save(image, "gif"), IMAGE, "not a readable image"),
    images(lambda image: image.write_text("%!PS-Adobe-3.0 EPSF-3.0\n"), IMAGE, "not a readable image"),
    images(lambda image: image.write_bytes(png(60_000, 60_000)), IMAGE, "not a readable image"),
    images(lambda image: image.write_bytes(png(9_900, 9_900)), IMAGE, "9900 x 9900 pixels", "data.image_size"),
    images(lambda image: pixels(9, 8, 3).save(image), IMAGE, "8 x 9 pixels", "resize"),
    images(another(os.mkfifo), IMAGE, "no file"),
    images(another(Path.mkdir), IMAGE, "no file"),
    images(another(lambda image: image.symlink_to("nowhere")), IMAGE, "no file"),
    images(another(lambda image: image.symlink_to(image.name)), IMAGE, "no file"),
    images(another(lambda image: image.symlink_to("/dev/zero")), IMAGE, "no file"),
    images(lambda image: (image.parents[1] / "mouse").mkdir(), "d/train/mouse", "no image", words="data.num_classes=3"),
    images(lambda image: (image.parents[1] / "mouse").mkdir(), "3 class folders", "data.num_classes is 2"),
    images(without("train"), "data.root", "d/train", "data.source=official"),
    images(without("test"), "data.root", "d/test", "d/val"),
    images(without("test/dog"), "d/test", "1 class folders"),
    images(without("train", "test"), "data.root=d", "there is no folder d/train"),
    case("train data.source=folder data.root=file", "data.root=file", prepare=lambda f: (f / "file").write_text("x")),
    case(
        f"train data=svhn {OFFICIAL}", "data.root=d", "train_32x32.mat", "http://ufldl.stanford.edu/housenumbers/train"
    ),
    case(f"train data=svhn {OFFICIAL} data.image_size=32", "d/train_32x32.mat", "data.verify=false", prepare=svhn()),
    case(
        f"train data=svhn {OFFICIAL} data.image_size=32 data.verify=false",
        *("d/train_32x32.mat", "truncated or damaged", "get it again"),
        prepare=svhn(lambda path: cut(path, 20_000)),
    ),
    case(f"train data=svhn {OFFICIAL} data.image_size=8 data.verify=false", "data.image_size=32", prepare=svhn()),
    case(f"train data=cifar10 {OFFICIAL} data.verify=false", "cifar-10-python.tar.gz", "damaged", prepare=cifar),
    case(f"train data=cifar10 {OFFICIAL}/none", "data.root=d/none", "cifar-10-python.tar.gz", "https://"),
    case(
        f"train data=tiny_imagenet {OFFICIAL} data.num_classes=3 data.image_size=64",
        *("val_annotations.txt", "has the line"),
        prepare=tiny,
    ),
]


# ---- files of weights, runs, the other commands --------------------------------------------------------------------


class Program:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch escaped",)


def weights(make: Callable[[dict[str, torch.Tensor]], object], name: str = "x.pt") -> Callable[[Path], None]:
    """A file in ``w`` of something that is made of the weights of the net of `SMALL`."""

    def write(folder: Path) -> None:
        (folder / "w").mkdir()
        found = make(build_module(config.compose(SMALL)).net.state_dict())
        if isinstance(found, bytes):
            (folder / "w" / name).write_bytes(found)
        else:
            torch.save(found, folder / "w" / name)

    return write


def file_of(make: Callable[[dict[str, torch.Tensor]], object], *says: str, words: str = "", name: str = "x.pt") -> Case:
    return case(f"eval checkpoint=w/{name} {words}", f"w/{name}", *says, prepare=weights(make, name))


def first(change: Callable[[torch.Tensor], object]) -> Callable[[dict[str, torch.Tensor]], dict[str, object]]:
    """The weights with their first tensor changed."""
    return lambda state: {**state, (key := next(iter(state))): change(state[key].clone())}


def damaged(state: dict[str, torch.Tensor], keep: float = 1.0, flip: int | None = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    raw = bytearray(buffer.getvalue())
    if flip is not None:
        raw[flip] ^= 4
    return bytes(raw[: int(keep * len(raw))])


HUGE_HEADER = struct.pack("<Q", 1 << 40) + b"{}"

WEIGHTS = [
    file_of(lambda state: b"", "empty"),
    file_of(lambda state: b"hello\nworld", "no torch file"),
    file_of(lambda state: damaged(state, keep=0.5), "cut short", "copy it again"),
    file_of(lambda state: damaged(state, flip=3000), "cut short", "copy it again"),
    file_of(lambda state: pickle.dumps(Program()), "it could run code"),
    file_of(lambda state: {"state_dict": Program()}, "it could run code", "state_dict() alone"),
    file_of(lambda state: torch.nn.Linear(2, 2), "it could run code"),
    file_of(lambda state: [1, 2], "holds no state_dict"),
    file_of(lambda state: torch.zeros(3), "holds no state_dict"),
    file_of(lambda state: {}, "holds no state_dict"),
    file_of(lambda state: {"x": "text"}, "holds no state_dict"),
    file_of(lambda state: dict(enumerate(state.values())), "holds no state_dict"),
    file_of(lambda state: dict(list(state.items())[1:]), "of another net", "is missing"),
    file_of(lambda state: state, "of another net", "is [10, 8]", words="data.num_classes=5"),
    file_of(first(lambda t: t.fill_(float("nan"))), "not finite"),
    file_of(first(lambda t: t.double() * 1e300), "not finite"),
    file_of(first(torch.Tensor.to_sparse), "no dense tensor"),
    file_of(first(lambda t: t.to(torch.complex64)), "no dense tensor"),
    file_of(first(lambda t: t.to("meta")), "no dense tensor"),
    file_of(first(torch.Tensor.bool), "torch.bool", "torch.float32"),
    file_of(lambda state: b"hello", "no safetensors file", name="x.safetensors"),
    file_of(lambda state: HUGE_HEADER, "no safetensors file", name="x.safetensors"),
    case("eval checkpoint=w/nowhere.pt", "w/nowhere.pt", "no such file"),
    case("eval checkpoint=w", "w", "no such file", prepare=lambda folder: (folder / "w").mkdir()),
    case("train defense=afd defense.pretrained=w/x.pt", "defense.pretrained=w/x.pt", prepare=weights(lambda s: b"x")),
    case("train attack=blackbox attack.source=w/x.pt", "attack.source=w/x.pt", prepare=weights(lambda s: b"x")),
]

STORED = [
    case("eval", "run=", "checkpoint="),
    case("eval run=a checkpoint=b", "either run="),
    case("eval run=nobody", "run=nobody", "runs ls"),
    case("eval run=", "run=''", "text"),
    case("eval run=[]", "run=[]", "text"),
    case("eval run=/", "run='/'", "runs ls"),
    case("eval run=../x", "run='../x'", "runs ls"),
    case(f"eval run={'a' * 300}", "run=aaa", "runs ls"),
    case(f"eval {RUN} model=vgg16", "model", "run's own"),
    case(f"eval {RUN} seed=1", "seed", "run's own"),
    case(f"eval {RUN} data=svhn", "data", "run's own"),
    case(f"eval {RUN} data.image_size=16", "data.image_size=16", "8"),
    case(f"eval {RUN} data.source=folder", "data.root", "test"),
    case(f"eval {RUN} attack.eps=7", "attack.eps=7"),
    case(f"eval {RUN} evaluation.checkpoint=best", "best.ckpt", "take last"),
    case(f"eval {RUN} evaluation.weights=ema", "evaluation.weights='ema'"),
    case(f"eval {RUN} rescore=nope", "rescore=nope", "it has"),
    case(f"eval {RUN} plan=true", "plan=true", "train"),
    case(f"eval {RUN} trainer.fast_dev_run=true", "trainer.fast_dev_run=true", "data.limit_test=100"),
    case("export", "run is missing", "run=<folder or name>"),
    case(f"export {RUN}", "to is missing", "model.safetensors"),
    case(f"export {RUN} to=x.doc", "to=x.doc", ".safetensors"),
    case(f"export {RUN} to=outputs", "to=outputs", ".safetensors"),
    case(f"export {RUN} to=/proc/x.safetensors", "/proc/x.safetensors", "cannot write", "another place"),
    case(f"export {RUN} to=x.pt2 evaluation.weights=revision", "evaluation.weights='revision'", "student"),
    case(f"export {RUN} to=x.pt2 evaluation.checkpoint=first", "evaluation.checkpoint='first'", "last or best"),
    case("export run=nobody to=x.pt2", "run=nobody", "runs ls"),
    case("audit", "run=", "checkpoint="),
    case("audit run=nobody", "run=nobody", "runs ls"),
    case(f"audit {RUN} audit.images=0", "audit.images=0", "at least 1"),
    case(f"audit {RUN} audit.noise=3", "audit.noise=3", "audit.noise.draws="),
    case(f"audit {RUN} audit.noise.share=abc", "audit.noise.share='abc'"),
    case(f"audit {RUN} audit.noise.share=nan", "audit.noise.share=nan"),
    case(f"audit {RUN} audit.eps_curve.eps=[]", "audit.eps_curve.eps is empty"),
    case(f"audit {RUN} audit.eps_curve.eps=[-1]", "audit.eps_curve.eps=-1"),
    case(f"audit {RUN} audit.randomness.passes=1", "audit.randomness.passes=1", "at least 2"),
    case(f"audit {RUN} attack=fgsm audit.source=nobody", "audit.source=nobody", "runs ls"),
]


def twin(folder: Path) -> None:
    """A second run, with a name like the first one's."""
    (run,) = (folder / "outputs/runs").glob("none-*")
    shutil.copytree(run, run.with_name(f"{run.name[:-1]}x"))


COMMANDS = [
    case("foo", "'foo' is no command", "train"),
    case("trian", "did you mean train"),
    case("runs", "runs", "ls"),
    case("runs foo", "foo", "ls"),
    case("runs ls --outputs nowhere", "nowhere", "no such folder"),
    case("runs ls paths.output=x", "paths.output=x", "--help"),
    case("runs show nobody", "run=nobody", "runs ls"),
    case("runs show ''", "run=''", "runs ls"),
    case("runs show ../..", "run='../..'", "runs ls"),
    case("runs show none", "run=none: means 2 runs", "more of the name", prepare=twin),
    case("runs rm", "name", "--help"),
    case("runs rm nobody --yes", "run=nobody", "runs ls"),
    case("runs rm / --yes", "run='/'", "runs ls"),
    case("runs rm none-at-cnn_small-digits-s0", "Nobody can be asked here", "--yes"),
    case("runs prune --al", "--al", "--help"),
    case("report tabels", "report tabels", "did you mean tables"),
    case("report tables foo=1", "foo=1", "format"),
    case("report tables table=nope", "table=nope", "fsr_s1"),
    case("report tables table=", "table=", "no value"),
    case("report tables format=docx", "format=docx", "csv"),
    case("report tables paths.outputs=nowhere", "paths.outputs=nowhere", "runs/"),
    case("report tables to=file", "file/", "cannot write", prepare=lambda folder: (folder / "file").touch()),
    case("report html to=outputs", "cannot write outputs"),
    case("report html limit_mb=large", "limit_mb='large'", "number"),
    case("report plot figure=nope", "figure=nope"),
    case("report plan table=fsr_s4 seeds=0", "seeds=0", "at least 1"),
    case("report plan table=fsr_s4 seeds=1000000000", "seeds=1000000000", "at most"),
    case("report status sweep=nope", "sweep=nope", "train -m"),
    case("reproduce", "table is missing", "fsr_s1"),
    case("reproduce table=nope", "table=nope", "fsr_s1"),
    case("reproduce table=fsr_s4 rows=nope", "rows=nope", "fsr/s4"),
    case("reproduce table=fsr_s4 rows=[]", "rows=", "fsr/s4"),
    case("reproduce table=fsr_s4 'rows=('", "rows=(", "regular expression"),
    case("reproduce table=fsr_s4 seeds=0", "seeds='0'", "at least 1"),
    case("reproduce table=fsr_s4 seeds=1e12", "seeds='1e12'", "at most"),
    case("reproduce table=fsr_s4 max_minutes=soon", "max_minutes='soon'"),
    case("reproduce table=fsr_s4 audit=maybe", "audit=maybe", "true or false"),
    case("reproduce table=fsr_s4 'audit=['", "audit=[", "true or false"),
    case("reproduce table=fsr_s4 attack=pgd20", "attack: the table says"),
    case("reproduce table=fsr_s4 trainer.fast_dev_run=true", "trainer.fast_dev_run", "trainer.max_epochs=1"),
    case("reproduce table=fsr_s4 foo", "'foo' is no key=value"),
    case("reproduce table=fsr_s4 optimizer.lrr=1", "optimizer.lrr", "did you mean lr"),
    case("reproduce table=fsr_s4 audit.imagse=1", "audit.imagse", "did you mean images"),
    case("reproduce table=fsr_s4 to=/proc/x.md", "/proc/x.md", "cannot write"),
]

SEARCH = "train -m hydra/sweeper=optuna data.val_fraction=0.2 "

SWEEPS = [
    case("train -m sweep=grd", "sweep=grd", "did you mean grid"),
    case("train -m sweep.name=a/b seed=1,2", "sweep.name=a/b", "file name"),
    case("train -m sweep.cases=[]", "sweep.cases is empty"),
    case("train -m sweep.cases=3", "sweep.cases=3", "list"),
    case("train -m sweep.evaluations=[3]", "sweep.evaluations", "list"),
    case("train -m seed=1,x", "seed='x'", "whole number"),
    case("train -m optimizer.lrr=1,2", "optimizer.lrr", "did you mean lr"),
    case("train -m defense=fsrr,none", "defense=fsrr", "did you mean fsr"),
    case("train -m attack=pgd20,pgd21", "attack=pgd21", "pgd20"),
    case("train -m 'seed=range(0)'", "seed=range(0)", "at least one"),
    case("train -m 'seed=interval(0,3)'", "seed: an interval", "hydra/sweeper=optuna"),
    case("train -m hydra/launcher=jobli seed=1,2", "hydra/launcher=jobli", "joblib"),
    case(f"{SEARCH} seed=1", "nothing to search", "interval(a,b)"),
    case(f"{SEARCH} 'optimizer.lr=tag(log,interval(0,1))'", "optimizer.lr", "cannot be searched"),
    case(f"{SEARCH} 'optimizer.lr=interval(1,0.1)'", "optimizer.lr", "cannot be searched"),
    case(f"{SEARCH} 'optimizer.lr=interval(0.1,1)' hydra.sweeper.sampler=foo", "hydra.sweeper.sampler=foo", "tpe"),
    case(f"{SEARCH} 'optimizer.lr=interval(0.1,1)' hydra.sweeper.objective=[robst]", "objective=robst", "robust"),
    case(f"{SEARCH} 'optimizer.lr=interval(0.1,1)' hydra.sweeper.trials=many", "hydra.sweeper.trials='many'"),
    case(f"{SEARCH} 'optimizer.lr=interval(0.1,1)' hydra.sweeper.storage=nosql:x", "hydra.sweeper.storage"),
    case(f"{SEARCH} data.val_fraction=0 'optimizer.lr=interval(0.1,1)'", "data.val_fraction", "0.1"),
]
