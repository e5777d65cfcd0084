"""The W&B run that stands for one of ours: opened without a question, without secrets and never for long."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from redoubt.errors import UserError
from redoubt.secrets import redacted

log = logging.getLogger("redoubt")

#: Folders of the offline runs that `tell` has not named yet.
_offline: list[Path] = []

#: Seconds that the network is waited for, at a run's beginning and at its end.
WAIT = 10.0


def tags(config: Mapping[str, Any], attacks: Iterable[str] = ()) -> list[str]:
    """``defense:fsr``, ``base:at``, ... of a run's config, and ``attack:<suite>``; W&B takes 64 characters of each."""
    axes = [f"{axis}:{config['axes'][axis]}" for axis in ("defense", "base", "model", "data")]
    return [tag[:64] for tag in (*axes, f"seed:{config['seed']}", *(f"attack:{a}" for a in sorted(set(attacks))))]


def open_run(
    folder: Path,
    config: Mapping[str, Any],
    *,
    project: str = "redoubt",
    entity: str | None = None,
    offline: bool | None = None,
    attacks: Iterable[str] = (),
) -> Any:
    """Begins the W&B run of a run, or continues it: its id is the run's hash, its group the sweep's name.

    Offline, each call leaves a folder ``<run>/wandb/offline-run-*-<hash>``; `wandb sync` puts those of one id together.

    Args:
        folder: The run's folder.
        config: The run's resolved config.
        project, entity: Where to on the server; the entity is W&B's default where None.
        offline: None: offline unless somebody is logged in or ``WANDB_MODE`` says otherwise.
        attacks: Suites that it was evaluated by, for the tags.

    Raises:
        UserError: ``offline=False`` and nobody is logged in.
    """
    import wandb

    wanted = mode(offline)
    arguments = {
        "project": project,
        "entity": entity,
        "id": folder.name.rpartition("-")[2],
        "name": folder.name,
        "group": (config.get("sweep") or {}).get("name"),
        "job_type": "train",
        "dir": str(folder),
        "resume": "allow",
        "reinit": "create_new",
        "config": redacted(dict(config)),
        "settings": settings(),
    }
    try:
        run = wandb.init(mode=wanted, **arguments)
    except Exception as error:
        if wanted != "online":
            raise
        warn(error, "going on offline")
        wandb.teardown()  # the attempt holds the id
        run = wandb.init(mode="offline", **arguments)
    here = Path(run.dir).parent
    if here.name.startswith("offline-run-"):
        _offline.append(here)
    run.tags = tuple(dict.fromkeys((*(run.tags or ()), *tags(config, attacks))))  # also those that people have added
    return run


def tell() -> None:
    """Says where the offline runs lie that were begun since it was asked last, and what sends them."""
    if _offline:
        folders = ", ".join(dict.fromkeys(str(folder.parent) for folder in _offline))
        print(f"W&B, offline: {folders}; to send it: {sync(_offline)}", flush=True)
        _offline.clear()


def sync(folders: Sequence[Path]) -> str:
    """The command that sends offline runs; without its first words `wandb sync` would send this machine's name."""
    return f"WANDB_HOST=- WANDB_PROGRAM=redoubt wandb sync {' '.join(shlex.quote(str(f)) for f in folders)}"


def accuracies(config: Mapping[str, Any]) -> list[str]:
    """The learning curves that are accuracies, as metrics.csv names them."""
    probe = "val" if config["data"]["val_fraction"] else "train_probe"
    return [f"{probe}/clean", f"{probe}/pgd{config['validation']['steps']}"]


def define_curves(run: Any, config: Mapping[str, Any]) -> None:
    """Everything over ``epoch``; the summary keeps the best and the last accuracy, and the last loss."""
    run.define_metric("epoch", hidden=True)
    run.define_metric("*", step_metric="epoch")
    run.define_metric("train/loss", step_metric="epoch", summary="last")  # "train/*" and "*" would race for it
    for name in accuracies(config):
        run.define_metric(name, step_metric="epoch", summary="max,last")


def sent_epochs(folder: Path) -> set[int]:
    """The epochs whose rows stand in the files that earlier starts of a run have left in its folder.

    W&B writes late: of a process that was killed the last rows are missing. A server drops a row that it has.
    """
    found: set[int] = set()
    for file in sorted(folder.glob("wandb/*run-*/*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        # A file that a kill cut short is read as far as it goes; the exit code then is not 0.
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        for line in done.stdout.splitlines():
            item = json.loads(line).get("history", {}).get("item", {})
            if "lr" in item:  # a whole row of ours, no evaluation
                found.add(int(item["epoch"]))
    return found


def mode(offline: bool | None) -> Any:
    """W&B's ``mode``: what is asked for, else what ``WANDB_MODE`` says, else online where somebody is logged in."""
    if offline is None:
        said = os.environ.get("WANDB_MODE")
        return said if said in ("offline", "disabled", "dryrun") else "online" if logged_in() else "offline"
    if not offline and not logged_in():
        raise UserError("logger.offline=false: nobody is logged in to W&B: run `wandb login`, or leave the key out")
    return "offline" if offline else "online"


def logged_in() -> bool:
    """Whether a key is in the environment, W&B's settings or ``.netrc``; asks neither people nor the server."""
    import wandb

    quiet()
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:  # a key that cannot be one
        warn(error, "going on offline")
        return False


def settings() -> Any:
    """Nothing of the command line, the environment, the machine, git or the code is recorded."""
    import wandb

    quiet()
    return wandb.Settings(
        allow_offline_artifacts=False,  # tables are read from the run's own files, which can be moved
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        finish_timeout=WAIT,
        host="",
        program="redoubt",
        init_timeout=WAIT,
        save_code=False,
        silent=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def quiet() -> None:
    """Before W&B's first action in a process: no lines on the terminal, no crash reports to its makers."""
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def warn(error: BaseException, then: str) -> None:
    """One line about what went wrong with W&B."""
    lines = str(error).splitlines() or [type(error).__name__]
    log.warning("W&B: %s; %s", redacted(lines[0])[:300], then)
