"""Training through the store: find the run, continue it, or answer from it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from redoubt import deadline
from redoubt.build import build_module
from redoubt.data import ImageData
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.evaluation.record import Source, evaluate
from redoubt.reporting.wandb_log import log_evaluation
from redoubt.runs.checkpoints import checksum_file, newest, strip
from redoubt.runs.extending import Origin, nearest
from redoubt.runs.files import read_rows, split_choice, write_json
from redoubt.runs.identity import canonical, decides, differences, identity, plain
from redoubt.runs.loading import fill, is_exported, load, weights_hash
from redoubt.runs.start import Start, starting_point, trained_net, twin_config
from redoubt.runs.store import Run, Store, readable_name, reason
from redoubt.secrets import redacted
from redoubt.sweeps import Pruned, Taken
from redoubt.training.distributed import broadcast, meet, ranks, same
from redoubt.training.loggers import opened
from redoubt.training.progress import ProgressBar
from redoubt.training.pruning import pruning
from redoubt.training.recorder import Recorder
from redoubt.training.stopping import Stopped, no_other_exit
from redoubt.training.trainer import accelerator, device_name, make_trainer

log = logging.getLogger("redoubt")


def identify(cfg: DictConfig, data: ImageData, start: Start | None = None, origin: Origin | None = None) -> str:
    """The identity of a resolved config that begins from ``start``, or goes on from ``origin``; the same for all."""
    digest = identity(cfg, *_grounds(data, start, origin))
    same({"training set": data.fingerprint("train"), "start": start.identity if start else "", "run": digest})
    return digest


def _grounds(data: ImageData, start: Start | None, origin: Origin | None) -> tuple[str, str | None, str | None]:
    """What decides a run's weights beside its config."""
    return data.fingerprint("train"), start.identity if start else None, origin.run.hash if origin else None


def train(cfg: DictConfig, data: ImageData, wait: bool | None = None) -> Run:
    """The finished run of a resolved config: answered from the store, continued, or trained.

    Args:
        cfg: Resolved.
        data: Its data.
        wait: Whether to wait where another process trains it; None: as ``sweep.wait`` says.

    Raises:
        UserError: Whatever the user can mend; the run's status then says why.
        Taken: Another process trains it, and this one is not to wait.
    """
    wait = cfg.sweep.wait is not False if wait is None else wait
    origin = Origin.of(cfg)
    start = starting_point(cfg, data) if origin is None else None  # its weights are the origin's
    digest = identify(cfg, data, start, origin)
    store = Store(cfg.paths.outputs)
    rank, _ = ranks()
    run = Run(store.folder / f"{readable_name(cfg.axes, cfg.seed)}-{digest}")
    finished = broadcast(run.finished)
    module = None if finished else build_module(cfg)  # what its constructors refuse leaves no run behind
    fresh = module is not None and not broadcast(run.begun)
    if module is not None and start is not None and fresh:
        begin(module, start, cfg, data)
    content = origin.content(module, data, ranks()[1]) if origin is not None and module is not None and fresh else None
    if rank == 0:
        if origin is not None and fresh:
            note(str(origin))
        elif not run.exists() and cfg.sweep.name is None and (line := nearest(store, run, cfg)):
            note(line)
        store.open(cfg.axes, cfg.seed, digest, plain(cfg), devices=[device_name(cfg)])
    meet()
    with _turn(run, wait) if rank == 0 else nullcontext():
        if broadcast(run.status["state"] == "done" if rank == 0 else None):
            note(f"run {run.name} is finished: answered from {run.folder}")
            return run
        if rank == 0:
            run.update(state="running", max_epochs=int(cfg.trainer.max_epochs))
            if (names := data.classes("train")) is not None:
                write_json(run.classes_file, {"classes": names})
        with failures_noted(run if rank == 0 else None):
            if content is not None and origin is not None and rank == 0 and not run.begun:
                origin.write(run, content, facts_of(cfg, data, start, origin))
            meet()
            _fit(cfg, data, run, module, start, origin)
        if rank == 0:
            run.update(state="done")
            if cfg.runs.keep != "all":
                for file in filter(Path.is_file, (run.best, *([run.last] if cfg.runs.keep == "weights" else []))):
                    strip(file)
                for file in (run.previous, checksum_file(run.previous)):
                    file.unlink(missing_ok=True)
        meet()
    return run


@contextmanager
def _turn(run: Run, wait: bool) -> Iterator[None]:
    """Be the one who trains a run."""
    with ExitStack() as stack:
        try:
            stack.enter_context(run.lock(wait=wait))
        except UserError as error:
            raise error if wait or not run.exists() else Taken(str(error)) from error
        yield


def begin(module: RobustModule, start: Start, cfg: DictConfig, data: ImageData) -> None:
    """Puts trained weights into a fresh module; the natural run is made first where there is none."""
    if start.twin is not None:
        there = broadcast(start.run is not None and start.run.finished)
        note(f"defense.pretrained=auto: natural run {start.name} is {'in the store' if there else 'trained first'}")
        train(start.twin, data, cfg.sweep.wait is not False)
    else:
        note(f"defense.pretrained: starts from {start.name}")
    module.start_from(trained_net(start, cfg))


def _fit(
    cfg: DictConfig,
    data: ImageData,
    run: Run | None,
    module: RobustModule | None = None,
    start: Start | None = None,
    origin: Origin | None = None,
) -> RobustModule:
    """Trains a module (of the config, where None is given), into a run's folder or (None) nowhere."""
    module = module or build_module(cfg)
    module.classes = data.classes("train")
    best: tuple[str, ...] = ()
    if data.validates:
        clean, robust = "val/clean", f"val/pgd{cfg.validation.steps}"
        best = (clean,) if cfg.axes.base == "standard" else (robust, clean)
    facts = facts_of(cfg, data, start, origin)
    recorder = Recorder(run, every=cfg.trainer.checkpoint_every, best=best, facts=facts)
    with (
        tempfile.TemporaryDirectory() if run is None else nullcontext(run.folder) as folder,
        opened(cfg, run) as loggers,
    ):
        bar = ProgressBar(enabled=bool(cfg.trainer.progress), title=cfg.axes.defense + "+" + cfg.axes.base)
        trainer = make_trainer(cfg, Path(folder), [bar, recorder, *pruning(cfg, run)], loggers)
        resume = None
        if run is not None:
            resume = broadcast(_resumed(run, facts) if ranks()[0] == 0 else None)
        note(
            f"{'resuming' if resume else 'training'} {run.name if run else '(fast_dev_run)'} | recipe "
            f"{', '.join(cfg.axes.recipes) or 'default'} | {device_name(cfg)} | {cfg.trainer.precision}"
        )
        with no_other_exit():
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    if run is not None:
        expected = data.steps_per_epoch(ranks()[1]) * int(cfg.trainer.max_epochs)
        if module.steps_done != expected:
            raise RuntimeError(f"{module.steps_done} steps were trained where {expected} were due")
        epochs = [int(row["epoch"]) for row in read_rows(run.metrics_file)] if ranks()[0] == 0 else None
        if epochs not in (None, [*range(1, int(cfg.trainer.max_epochs) + 1)]):
            raise RuntimeError(f"{run.metrics_file} has rows of the epochs {epochs}: not one for each that was trained")
    return module


def facts_of(cfg: DictConfig, data: ImageData, start: Start | None, origin: Origin | None) -> dict[str, Any]:
    """What each checkpoint says of its run."""
    return {
        "decides": decides(redacted(plain(cfg)), *_grounds(data, start, origin)),
        "machine": f"{device_name(cfg)}, torch {torch.__version__}",
    }


def _resumed(run: Run, facts: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, or None.

    Raises:
        UserError: It is damaged, or of a run that other values decided.
    """
    found = newest(run)
    if found is None:
        return None
    file, stored = found
    differ = differences(stored.get("decides", {}), facts["decides"]) if stored else []
    if differ:
        keys = ", ".join(key.removeprefix("config.") for key in differ)
        raise UserError(f"{file} is of a run that differs in {keys}: put this run's own checkpoint back, or remove it")
    if stored and stored.get("machine") != facts["machine"]:
        note(
            f"going on with {facts['machine']} where {stored.get('machine')} was before: "
            "the last bits may differ from those of a run that stayed"
        )
    return str(file)


def evaluate_run(cfg: DictConfig, data: ImageData, run: Run) -> dict[str, Any]:
    """Results of attacking a finished run as ``cfg`` says, from the store where they are."""
    which = str(cfg.evaluation.checkpoint)
    device = compute_device(cfg)
    weights = str(cfg.evaluation.weights)
    module = load(run, checkpoint=which, weights=weights).to(device)
    stored = run.config()
    facts = {
        "run": run.name,
        "axes": {
            **{k: stored["axes"][k] for k in ("model", "defense", "base", "data")},
            **({"data": stored["axes"]["folder"]} if "folder" in stored["axes"] else {}),
            "attack": cfg.axes.attack,
            "seed": stored["seed"],
        },
        "checkpoint": which,
        "weights": weights,
        "train_seconds": run.status.get("train_seconds"),
    }
    results = evaluate(
        module,
        data,
        plain(cfg),
        facts=facts,
        weights_id=weights_hash(module),
        folder=run.eval,
        source=lambda: transfer_source(cfg, data),
        device=device,
    )
    if ranks()[0] == 0:
        log_evaluation(cfg, run, results)
    return results


def transfer_source(cfg: DictConfig, data: ImageData, wanted: str | None = None, key: str = "attack.source") -> Source:
    """The net that transfer attacks are crafted on.

    Args:
        cfg: Resolved config of the cell that is attacked.
        data: Its data.
        wanted: ``auto``: the natural net of the same cell, trained if need be; a run; or a file of weights. What
            ``attack.source`` says where None.
        key: Where it was said, for messages.

    Raises:
        UserError: No such run or file, an unfinished run, or a net of other images or classes.
    """
    wanted = wanted or str(cfg.attack.get("source") or "auto")
    file, choice = split_choice(wanted)
    try:
        if wanted == "auto":
            note(f"{key}=auto: the natural net of this cell, from the store or trained now (natural.* is its recipe)")
            _, run = find_or_make(cfg, data, defense="none", base="standard")
            module = load(run)
        elif file.is_file() and not choice and (Run(file.resolve().parent.parent).exists() or is_exported(file)):
            module = load(file)
        elif file.is_file():
            module = build_module(twin_config(cfg, defense="none", base="standard"))
            fill(module, wanted)
        else:
            run = Store(cfg.paths.outputs).find(wanted)
            run.must_be_finished()
            module = load(run)
    except UserError as error:
        raise UserError(f"{key}={wanted}: {reason(error, wanted)}") from error
    for name, own in (("num_classes", data.num_classes), ("image_size", data.image_size)):
        if canonical({"": getattr(module, name)}) != canonical({"": own}):
            raise UserError(f"{key}={wanted}: its {name} is {getattr(module, name)}, the data's {own}")
    data.places(module.classes, f"{key}={wanted}")
    return Source(module.eval(), weights_hash(module))


def find_or_make(cfg: DictConfig, data: ImageData, *, defense: str, base: str) -> tuple[DictConfig, Run]:
    """Another cell on the same model, data, limits, split, seed, precision and devices, trained if need be.

    Its epochs, optimizer and schedule come from its own recipe, or from ``natural.*``; never from ``cfg``.

    Args:
        cfg: Resolved config of the cell that asks.
        data: Its data.
        defense, base: Of the cell that is wanted.

    Returns:
        The composed, resolved config and the finished run.
    """
    twin = twin_config(cfg, defense=defense, base=base)
    return twin, train(twin, data)


def compute_device(cfg: DictConfig) -> torch.device:
    """Where this process computes outside of a fit."""
    if accelerator(cfg) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def failures_noted(run: Run | None) -> Iterator[None]:
    """Writes into the run's status how it ended, if it does not end well."""
    try:
        yield
    except Stopped as stopped:
        if run is not None:
            run.update(state="interrupted", reason=deadline.reason(stopped))
        raise
    except KeyboardInterrupt:
        if run is not None:
            run.update(state="interrupted", reason="stopped by the keyboard")
        raise
    except Pruned as pruned:
        if run is not None:
            run.update(state="interrupted", reason=str(pruned))
        raise
    except BaseException as error:
        if run is not None:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            try:
                run.update(state="failed", reason=reason[:500])
            except UserError:
                log.warning("run %s: its failure could not be noted", run.name)
        raise


def note(line: str) -> None:
    """One log line, from rank 0."""
    if ranks()[0] == 0:
        log.info(line)
