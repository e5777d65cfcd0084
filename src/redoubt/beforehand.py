"""What config and store alone can tell is said before torch is imported, which takes seconds; no torch here."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from redoubt.errors import UserError, shown
from redoubt.runs.files import split_choice
from redoubt.runs.store import Run, Store, reason

#: Endings of the files that `redoubt.export` writes.
EXPORTED = (".safetensors", ".pt2", ".onnx")
#: Endings of files of weights, by which a name that is none of a run's is told from a file's.
WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")
#: Keys that an evaluation takes from its run.
_THE_RUNS_OWN = ("model", "defense", "base", "seed", "inner", "optimizer", "schedule")


def look(command: str, cfg: DictConfig, overrides: list[str]) -> None:
    """Looks at a resolved config, or at an export's as it is.

    Raises:
        UserError: The command cannot be carried out.
    """
    if command == "train":
        _train(cfg)
    elif command == "export":
        _export(cfg)
    else:
        _judge(command, cfg, overrides)


def _train(cfg: DictConfig) -> None:
    if cfg.extend is not None:
        origin_of(cfg)
    if cfg.plan:
        return
    if not cfg.trainer.fast_dev_run and not Path(str(cfg.data.root), "val").is_dir():  # else a matter of the data
        best_wants_a_split(cfg)
    wanted = str(cfg.defense.get("pretrained"))
    if wanted.lower() in ("none", "auto") or split_choice(wanted)[0].is_file():
        return
    try:
        pretrained(wanted, Store(cfg.paths.outputs))
    except UserError as error:
        raise UserError(f"defense.pretrained={wanted}: {error}") from error


def origin_of(cfg: DictConfig) -> Run:
    """The run that ``extend`` names.

    Raises:
        UserError: There is none, or it is not finished.
    """
    try:
        run = Store(cfg.paths.outputs).find(str(cfg.extend))
        run.must_be_finished()
    except UserError as error:
        raise UserError(f"extend={cfg.extend}: {reason(error, str(cfg.extend))}") from error
    return run


def pretrained(wanted: str, store: Store) -> Run:
    """The finished run that ``defense.pretrained`` names where that is no file."""
    if split_choice(wanted)[0].suffix in WEIGHTS:
        raise UserError("no such file: give auto, none, a run or a file of weights")
    try:
        run = store.find(wanted)
    except UserError as error:
        raise UserError(f"{reason(error, wanted)}; or give auto, none or a file of weights") from error
    run.must_be_finished()
    return run


def best_wants_a_split(cfg: DictConfig) -> None:
    """Refuses ``evaluation.checkpoint=best`` where nothing would tell which one is the best."""
    if cfg.evaluation.checkpoint == "best" and not cfg.data.val_fraction:
        raise UserError("evaluation.checkpoint=best needs a validation split: set data.val_fraction, as to 0.02")


def _judge(command: str, cfg: DictConfig, overrides: list[str]) -> None:
    if (cfg.run is None) == (cfg.checkpoint is None):
        raise UserError(f"{command} wants either run=<folder or name> or checkpoint=<file> with model=... data=...")
    if command == "eval":
        if cfg.rescore is not None and cfg.run is None:
            raise UserError("rescore is of a run's evaluation: give run=<folder or name> rescore=<evaluation>")
        for key in ("trainer.fast_dev_run", "plan", "extend"):
            if value := OmegaConf.select(cfg, key):
                hint = "leave it out; for a quick look take data.limit_test=100"
                raise UserError(f"{key}={shown(value)} is for train: {hint}")
    if cfg.run is None:
        if not split_choice(str(cfg.checkpoint))[0].exists():
            raise UserError(f"{cfg.checkpoint}: no such file: give the path of a .pt, .pth, .ckpt or .safetensors file")
        return
    run = Store(cfg.paths.outputs).find(str(cfg.run))
    if command == "audit":
        run.must_be_finished()
    the_runs_own(overrides)


def the_runs_own(overrides: list[str]) -> None:
    """Refuses words that would make another run of the one that is judged."""
    for key in {o.lstrip("+~").split("=", 1)[0] for o in overrides}:
        if key.split(".")[0] in _THE_RUNS_OWN or key == "data":
            raise UserError(f"{key} is the run's own and cannot be changed for an evaluation: leave it out")


def _export(cfg: DictConfig) -> None:
    for key, like in (("run", "<folder or name>"), ("to", "model.safetensors, model.pt2 or model.onnx")):
        if cfg[key] is None:
            raise UserError(f"{key} is missing: export wants {key}={like}")
    the_target(str(cfg.to))
    Store(str(cfg.paths.outputs)).find(str(cfg.run)).must_be_finished()


def the_target(to: str) -> None:
    """Refuses a file that no export writes, or that is there."""
    file = Path(to).expanduser()
    if file.suffix not in EXPORTED:
        raise UserError(f"to={to}: no format has this suffix: take one of {', '.join(EXPORTED)}")
    if file.exists():
        raise UserError(f"to={to} exists: remove it or give another name")
