"""What ``train``, ``eval`` and ``export`` do, as lists of steps."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import redoubt
from redoubt import beforehand, config, deadline, launched
from redoubt.build import build_data, build_module
from redoubt.data import ImageData, Photos
from redoubt.defenses import RobustModule
from redoubt.errors import CheckFailed, UserError
from redoubt.evaluation.audit import radius
from redoubt.evaluation.audits import audited
from redoubt.evaluation.record import Source, evaluate
from redoubt.evaluation.rescore import objections, rescore
from redoubt.evaluation.results import read_results
from redoubt.evaluation.suite import suite
from redoubt.export import export
from redoubt.reporting import wandb_run
from redoubt.reporting.table import audit_table, rescored_table, results_table
from redoubt.runs import running
from redoubt.runs.extending import extended
from redoubt.runs.files import read_json
from redoubt.runs.identity import canonical, deciding, digest, leaves, plain
from redoubt.runs.loading import fill, load, weights_hash
from redoubt.runs.store import Run, Store
from redoubt.secrets import HIDDEN
from redoubt.sweeps import judges
from redoubt.training.distributed import leave, ranks, together
from redoubt.training.stopping import Stopped, no_other_exit, requests, requeue, requeue_signal
from redoubt.training.trainer import accelerator, check_machine, devices, make_trainer

console = Console()


def processes(cfg: DictConfig) -> int:
    """How many processes this machine gives to the job."""
    return 1 if cfg.plan or "audit" in cfg else devices(cfg)


def run(command: str, cfg: DictConfig, overrides: list[str]) -> Any:
    """One job of a resolved config, in this process of it."""
    torch.set_float32_matmul_precision("highest")
    number = requeue_signal()
    try:
        asked_to = requests.heard(signal.SIGTERM, *([number] if number else []))
        with asked_to, _connected(cfg), together(facts(command, cfg)), no_other_exit():
            try:
                return {"train": train, "eval": evaluate_only, "audit": audit}[command](cfg, overrides)
            finally:
                wandb_run.tell()
    except Stopped as stopped:  # what is to be kept is kept
        asked = int(stopped.code or 0) - 128
        if launched.first() and asked > 0 and not deadline.over():  # its end says whoever has set it
            name = signal.Signals(asked).name
            print(f"redoubt: stopped by {name}; the same command goes on from what was saved", file=sys.stderr)
            if asked == number:
                requeue()
        raise


@contextmanager
def _connected(cfg: DictConfig) -> Iterator[None]:
    """Inside, this process is of its group, before anything is decided that all processes must decide alike."""
    if processes(cfg) == 1 and int(cfg.trainer.num_nodes) == 1 and not launched.started_by_launcher():
        yield
        return
    machines = int(cfg.trainer.num_nodes)
    if machines > 1 and not launched.started_by_launcher() and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={machines}: nothing says where the others are, and waiting for them has no end: start "
            f"it by torchrun --nnodes={machines} or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )
    wanted = devices(cfg) * machines
    started = int(os.environ.get("WORLD_SIZE") or launched.slurm_tasks() or wanted)
    if started != wanted:
        raise UserError(
            f"trainer.devices={devices(cfg)} on trainer.num_nodes={machines} are {wanted} processes, but "
            f"{started} were started: set these keys as torchrun's or srun's"
        )
    threads = torch.get_num_threads()
    if accelerator(cfg) == "cpu":  # the processes share this machine's cores
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // devices(cfg)))
    try:
        strategy: Any = make_trainer(cfg, Path(), []).strategy
        strategy.setup_environment()
        yield
    finally:
        leave()
        torch.set_num_threads(threads)


#: What one process may have otherwise than another: where its files are, and what only the first one does.
OWN = ("callbacks", "compile_cache", "data.root", "hydra", "logger", "paths", "trainer.progress")


def facts(command: str, cfg: DictConfig) -> dict[str, str]:
    """What must be the same in every process of a job: a hash of each value of its config, and the code."""
    found = {"command": command, "redoubt": f"{redoubt.__version__} {redoubt.NUMERICS}", "torch": torch.__version__}
    values = leaves(deciding(plain(cfg), excluded=OWN))
    return found | {key: digest({"value": value}) for key, value in values.items()}


def train(cfg: DictConfig, overrides: list[str]) -> list[dict[str, Any]]:
    """Trains the cell, attacks it, records it and prints the table; of a sweep's cell, each of its evaluations.

    Returns:
        results.json of each evaluation.
    """
    if cfg.extend is not None:
        if cfg.trainer.fast_dev_run:
            raise UserError("extend is of a run that is stored: leave trainer.fast_dev_run out, or take plan=true")
        cfg = extended(cfg, overrides)
    if cfg.plan:
        from redoubt.reporting.plan import show_plan

        _normalisation(cfg, build_data(cfg))
        show_plan(cfg, console)
        return []
    if cfg.trainer.fast_dev_run:
        with tempfile.TemporaryDirectory() as folder:
            return [_fast_dev_run(cfg, folder)]
    check_machine(cfg)
    data = _data(cfg)
    judged = _evaluations(cfg, overrides)
    for cell in judged:
        _check_evaluation(cell, data)
    run = running.train(cfg, data)
    if cfg.sweep.trial is not None:  # a search looks at no test image
        return [{"run": run.name}]
    found = []
    for cell in judged:
        results = [running.evaluate_run(cell, data, run)]
        if cell.evaluation.beside:
            twin, other = running.find_or_make(cell, data, defense="none", base=str(cell.evaluation.beside))
            results.append(running.evaluate_run(twin, data, other))
        _show(results, run.folder)
        found.append(results[0])
    return found


def _evaluations(cfg: DictConfig, overrides: list[str]) -> list[DictConfig]:
    """The cell as each evaluation of a sweep would have it; ``cfg`` has the first one's words already."""
    words = [list(evaluation) for evaluation in cfg.sweep.evaluations or [[]]]
    own = [o for o in overrides if not judges(o) and not o.startswith("sweep.evaluations=")]
    others = [[*own, *evaluation] for evaluation in words[1:]]
    cells = [(config.ready(cell), cell) for cell in others]
    return [cfg, *(cell if cell.extend is None else extended(cell, said) for cell, said in cells)]


def _check_evaluation(cfg: DictConfig, data: ImageData) -> None:
    """What would make the evaluation impossible is said before the training, not after it."""
    chosen = suite(plain(cfg.attack))
    chosen.members(data.num_classes)  # refuses what none of is defined
    if chosen.on_source and cfg.attack.get("source") not in (None, "auto"):
        running.transfer_source(cfg, data)
    if not data.validates:
        beforehand.best_wants_a_split(cfg)
    if cfg.evaluation.beside:
        running.twin_config(cfg, defense="none", base=str(cfg.evaluation.beside))


def _fast_dev_run(cfg: DictConfig, folder: str) -> dict[str, Any]:
    """One training, one validation and one evaluation batch of each net that the cell needs, kept nowhere."""
    data = _data(cfg)
    start = running.starting_point(cfg, data)  # a given run lies in the store
    cfg.paths.outputs = folder
    module = build_module(cfg)
    if start is not None and start.twin is not None:
        module.start_from(running._fit(start.twin, data, None).deployed())
    elif start is not None:
        running.begin(module, start, cfg, data)
    cells = [(cfg, module)]
    if cfg.evaluation.beside:
        twin = running.twin_config(cfg, defense="none", base=str(cfg.evaluation.beside))
        cells.append((twin, build_module(twin)))
    results = []
    for cell, fresh in cells:
        module = running._fit(cell, data, None, fresh)
        source = functools.partial(_source_of_one_batch, cell, data)
        results.append(_judge(module, cell, data, "fast_dev_run", "none", None, int(data.batch_size), source))
    _show(results, None)
    return results[0]


def _source_of_one_batch(cfg: DictConfig, data: ImageData) -> Source:
    twin = running.twin_config(cfg, defense="none", base="standard")
    return Source(running._fit(twin, data, None).eval(), "fast_dev_run")


def evaluate_only(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Attacks a finished run, or a file of weights in the net that ``model`` and ``defense`` name."""
    beforehand.look("eval", cfg, overrides)
    if cfg.run is not None:
        run = Store(cfg.paths.outputs).find(str(cfg.run))
        if cfg.rescore is not None:
            return _rescore(run, cfg, overrides)
        cfg = of_run(run.config(), cfg, overrides)
        results = running.evaluate_run(cfg, _data(cfg, only_test=True), run)
        _show([results], run.folder)
        return results
    data = _data(cfg, only_test=True)
    module = build_module(cfg)
    file = fill(module, str(cfg.checkpoint))
    folder = Path(cfg.paths.outputs) / "eval"
    results = _judge(module, cfg, data, file.stem, str(cfg.checkpoint), folder)
    _show([results], folder / results["evaluation"])
    return results


def audit(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Checks a finished run, or a file of weights, for false robustness; writes audit.json and the curves.

    Raises:
        CheckFailed: A check failed.
    """
    beforehand.look("audit", cfg, overrides)
    if cfg.run is not None:
        run = Store(cfg.paths.outputs).find(str(cfg.run))
        stored = run.config()
        keys = cfg.audit
        cfg = of_run(stored, cfg, overrides, own_suite=True)
        name, which, folder = run.name, str(cfg.evaluation.checkpoint), run.folder
        module = load(run, checkpoint=which, weights=str(cfg.evaluation.weights), compile=False)
        weights_id = weights_hash(module)
    else:
        keys = cfg.audit
        cfg.compile = False
        _normalisation(cfg, build_data(cfg))
        module, which = build_module(cfg), str(cfg.checkpoint)
        name, folder, weights_id = fill(module, which).stem, Path(cfg.paths.outputs), _weights_id(module, cfg)
    radius(suite(plain(cfg.attack)))  # before the natural twin is trained
    data = _data(cfg, only_test=True)
    facts = {"run": name, "checkpoint": which, "weights": str(cfg.evaluation.weights)}
    source = None
    if keys.source is not None:
        source = running.transfer_source(cfg, data, str(keys.source), "audit.source")
    report, where = audited(
        module.eval(), data, plain(cfg), plain(keys), facts=facts, weights_id=weights_id, folder=folder, source=source,
        device=running.compute_device(cfg),
    )  # fmt: skip
    console.print(audit_table(report))
    print(f"audit: {where}", flush=True)
    if not report["passed"]:
        raise CheckFailed(f"{name} fails {len(report['failed'])} checks: {', '.join(report['failed'])}; see {where}")
    return report


def _rescore(run: Run, cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Classifies the saved examples of one of a run's evaluations anew."""
    names = [folder.name for folder, _ in run.evaluations()]
    wanted = Path(str(cfg.rescore)).name
    found = [name for name in names if name == wanted] or [name for name in names if name.startswith(wanted)]
    if len(found) != 1:
        raise UserError(f"rescore={cfg.rescore}: names {len(found)} evaluations of this run; it has {', '.join(names)}")
    folder = run.eval / found[0]
    results = read_results(folder) or {}
    said = [o for o in overrides if not o.startswith("attack")]
    if not any(o.startswith("data.limit_test=") for o in said):
        settings = read_json(folder / "attack.json") or {}
        cfg.data.limit_test = settings.get("limit_test")
        cfg.data.balanced = settings.get("subset", "balanced") == "balanced" or None
        said += ["data.limit_test=", "data.balanced="]  # of which the keys are read
    cfg = of_run(run.config(), cfg, said)
    device = running.compute_device(cfg)
    module = load(run, checkpoint=results["checkpoint"], weights=results["weights"]).to(device)
    data = _data(cfg, only_test=True)
    scores = rescore(
        module, data, folder, batch=int(cfg.evaluation.chunk), device=device, progress=bool(cfg.trainer.progress)
    )
    console.print(rescored_table(scores, found[0]))
    wrong = objections(scores)
    if wrong:
        raise CheckFailed(f"{folder}: {'; '.join(wrong)}")
    return scores


def _judge(
    module: RobustModule,
    cfg: DictConfig,
    data: ImageData,
    name: str,
    checkpoint: str,
    folder: Path | None,
    limit: int | None = None,
    source: Callable[[], Source] | None = None,
) -> dict[str, Any]:
    """Attacks weights that belong to no stored run."""
    axes = {**{k: cfg.axes[k] for k in config.AXES}, "seed": cfg.seed}
    if folder is not None:  # of a file nobody knows how it was trained; a defense is here for its net
        axes |= {"base": None, "seed": None, "defense": None if axes["defense"] == "none" else axes["defense"]}
    facts = {"run": name, "axes": axes, "checkpoint": checkpoint, "weights": "student", "train_seconds": None}
    device = running.compute_device(cfg)
    source = source or functools.partial(running.transfer_source, cfg, data)
    weights_id = _weights_id(module, cfg)
    module = module.to(device).eval()
    results = evaluate(
        module,
        data,
        plain(cfg),
        facts=facts,
        weights_id=weights_id,
        folder=folder,
        source=source,
        limit=limit,
        device=device,
    )
    return results | {"axes": axes}  # of an earlier version are those of a cell


def _weights_id(module: RobustModule, cfg: DictConfig) -> str:
    """Stands for weights of no run: the same are another function in a net with another normalisation, tau, ..."""
    net = canonical({"model": cfg.model, "defense": cfg.defense})
    return f"{weights_hash(module)} {json.dumps(net, sort_keys=True)}"


def of_run(stored: dict[str, Any], cfg: DictConfig, overrides: list[str], own_suite: bool = False) -> DictConfig:
    """The run's own config with the attack, evaluation and devices asked for now.

    What the command line says of data and threat is taken too: where the images lie, how many, at which eps.

    Args:
        stored: The run's config.
        cfg, overrides: What was composed now, and the words of the command line.
        own_suite: Where the command line names no attack, take the run's.
    """
    axes = stored.get("axes")
    for axis in config.AXES:  # they become words of a command
        option = axes.get(axis, "") if isinstance(axes, dict) else ""
        if not _OPTION.fullmatch(str(option)):
            raise UserError(f"axes.{axis}={option!r} in the run's config.yaml is no option's name: restore that file")
    merged = OmegaConf.create(stored)
    said = {o.lstrip("+~").split("=", 1)[0] for o in overrides}
    for key in ("trainer", "evaluation", "paths"):
        OmegaConf.update(merged, key, {**merged[key], **cfg[key]}, merge=False)
    if any(key.split(".")[0] == "logger" for key in said) or HIDDEN in str(stored["logger"]):
        OmegaConf.update(merged, "logger", cfg.logger, merge=False)
    merged.trainer.precision = stored["trainer"]["precision"]
    for key in sorted(said):
        if key.startswith(("data.", "threat.")):
            OmegaConf.update(merged, key, OmegaConf.select(cfg, key))
    if not any(key.startswith(("evaluation.weights",)) for key in said):
        merged.evaluation.weights = stored["evaluation"]["weights"]
    # The attack is composed anew under the run's threat model, which its eps interpolates.
    kept = [o for o in overrides if o.lstrip("+~").startswith(("attack=", "attack.", "threat"))]
    if own_suite and not kept:
        merged.attack = stored["attack"]
        return config.resolve(merged)
    if own_suite and "attack" not in said:
        kept.insert(0, f"attack={stored['axes']['attack']}")
    if not any(k == "threat" or k.startswith("threat.") for k in said):
        kept += [f"threat.{key}={stored['threat'][key]}" for key in ("norm", "eps")]
    attack = config.compose([*kept, f"data={stored['axes']['data']}"])
    OmegaConf.resolve(attack.attack)
    merged.attack = attack.attack
    merged.axes.attack = attack.axes.attack
    return config.resolve(merged)


_OPTION = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")


def export_run(cfg: DictConfig) -> None:
    """Writes a finished run's net as a file and says what it holds."""
    chosen = cfg.evaluation
    options = {"checkpoint": str(chosen.checkpoint), "weights": chosen.weights, "outputs": str(cfg.paths.outputs)}
    print(export(str(cfg.run), str(cfg.to), **options), flush=True)


def _data(cfg: DictConfig, only_test: bool = False) -> ImageData:
    data = build_data(cfg)
    _normalisation(cfg, data)
    data.prepare(*(("test",) if only_test else ("train", data.whole("val"), "test")))
    return data


def _normalisation(cfg: DictConfig, data: ImageData) -> None:
    """Fills in the mean and std of a folder's training images, where the net is to normalise by them."""
    if not cfg.model.get("normalize") or cfg.data.mean is not None or not isinstance(data, Photos):
        return
    mean, std = data.statistics()
    for section in ("data", "model"):
        if OmegaConf.select(cfg, f"{section}.mean") is None:
            OmegaConf.update(cfg, section, {"mean": mean, "std": std})


def _show(results: list[dict[str, Any]], folder: Path | None) -> None:
    if ranks()[0] != 0:
        return
    console.print(results_table(results))
    print(
        f"run: {folder}" if folder is not None else "fast_dev_run: nothing was stored",
        file=sys.stdout,
        flush=True,
    )
