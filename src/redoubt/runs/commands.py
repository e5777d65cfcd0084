"""``redoubt runs ls|show|rm|prune``: look at the run store and tidy it up."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from redoubt.errors import UserError
from redoubt.evaluation.results import named, robust
from redoubt.reporting.table import place
from redoubt.runs import files
from redoubt.runs.store import REMOVED, Run, Store, Weights


def main(argv: list[str]) -> int:
    """Run one command.

    Args:
        argv: What follows ``redoubt runs``. ``paths.outputs=DIR`` is taken for ``--outputs DIR``.

    Returns:
        The exit code, 0.

    Raises:
        UserError: One line that says what was wrong.
    """
    arguments = _parser().parse_args([word.replace("paths.outputs=", "--outputs=", 1) for word in argv])
    outputs = getattr(arguments, "outputs", None)
    if outputs is not None and not Path(outputs or "?").is_dir():
        raise UserError(f"paths.outputs={outputs}: no such folder: name the one that holds runs/")
    arguments.command(Store(Path(outputs or "outputs")), arguments)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS, for a subparser's default would overwrite what was given before the command
    outputs = _Parser(add_help=False)
    outputs.add_argument("--outputs", metavar="DIR", default=argparse.SUPPRESS, help="paths.outputs (default: outputs)")
    yes = _Parser(add_help=False)
    yes.add_argument("--yes", "-y", action="store_true", help="do not ask")
    parser = _Parser(prog="redoubt runs", description="Look at the run store.", parents=[outputs])
    commands = parser.add_subparsers(required=True, metavar="{ls,show,rm,prune}")

    def add(name: str, command: Callable[..., None], text: str, *parents: _Parser) -> _Parser:
        sub = commands.add_parser(name, help=text, description=text, parents=[outputs, *parents])
        sub.set_defaults(command=command)
        return sub

    ls = add("ls", _ls, "list all runs")
    ls.add_argument("--json", action="store_true", help="as JSON")
    show = add("show", _show, "show one run")
    show.add_argument("name", help="a name, a hash, a part that is unambiguous, or a folder")
    rm = add("rm", _rm, "remove runs", yes)
    rm.add_argument("names", nargs="+", metavar="name", help="as for show")
    prune = add("prune", _prune, "remove what is no longer needed", yes)
    prune.add_argument("--failed", action="store_true", help="runs that failed or were interrupted")
    prune.add_argument("--checkpoints", action="store_true", help="all but last.ckpt of finished runs")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def _summary(run: Run) -> dict[str, Any]:
    status, found = run.status, run.standing()
    results = named(found[1]) if found else {}
    metrics = _accuracies(results)
    attack = robust(metrics)
    threat = results.get("threat") or {}
    return {
        "name": run.name,
        "state": status["state"],
        "epoch": status.get("epoch"),
        "max_epochs": status.get("max_epochs"),
        "bytes": run.size(),
        "natural": metrics.get("natural"),
        "robust": metrics[attack] if attack else None,
        "robust_attack": attack,
        "evaluation": found[0].name if found else None,
        "norm": threat.get("norm"),
        "eps": threat.get("eps"),
        **{key: results.get(key) for key in ("checkpoint", "weights", "n")},
        "of": place({"evaluation": found[0].name, **results}) if found else None,
        "reason": status.get("reason"),
    }


def _accuracies(results: dict[str, Any]) -> dict[str, float]:
    metrics = results.get("metrics")
    entries = metrics.items() if isinstance(metrics, dict) else ()
    return {
        name: entry["accuracy"]
        for name, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("accuracy"), int | float)
    }


def _ls(store: Store, arguments: argparse.Namespace) -> None:
    rows = [_summary(run) for run in (*store.list(), *store.weights())]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print(f"no runs in {store.folder}")
        return
    cells = [
        (
            row["name"],
            row["state"],
            _epochs(row),
            _human(row["bytes"]),
            _percent(row["natural"]),
            f"{_percent(row['robust'])} {row['robust_attack'] or ''}".strip(),
            row["of"] or "",
            row["reason"] or "",
        )
        for row in rows
    ]
    _table(("name", "state", "epoch", "size", "natural", "robust", "of", "reason"), cells)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # a file or a pipe has no width that rows would have to be folded to
    console = Console(width=None if sys.stdout.isatty() else 240)
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*[Text(cell) for cell in row])  # Text: a reason may contain [brackets]
    for column in table.columns[:-2]:
        column.no_wrap, column.overflow = True, "fold"
    console.print(table)


def _show(store: Store, arguments: argparse.Namespace) -> None:
    run = _weights(store, arguments.name) or store.find(arguments.name)
    config = run.config()
    axes = config.get("axes")
    print(config["checkpoint"] if isinstance(run, Weights) else run.folder)
    _section("axes", {**(axes if isinstance(axes, dict) else {}), "seed": config.get("seed")})
    _section("status", {"extends": config.get("extend"), **run.status})
    _section("environment", files.read_json(run.environment_file) or {})
    own = run.standing()
    for folder, results in run.evaluations():
        accuracies = {name: _percent(value) for name, value in _accuracies(named(results)).items()}
        facts = {"of": place({"evaluation": folder.name, **results}), "n": results.get("n")}
        stands = "yes" if own is not None and own[0] == folder else None
        _section(f"eval/{folder.name}", {**facts, "stands for the run": stands, **accuracies})
    if isinstance(run, Weights):
        return
    paths = sorted(path for path in run.folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    _section("files", {str(path.relative_to(run.folder)): _human(path.stat().st_size) for path in paths})


def _weights(store: Store, name: str) -> Weights | None:
    """Weights of a file that were evaluated, by a name that `_ls` shows or its beginning; None where it is none.

    Raises:
        UserError: Several are meant.
    """
    known = store.weights()
    found = [w for w in known if name in (w.name, w.config()["checkpoint"])]
    found = found or [w for w in known if name and w.name.startswith(name)]
    if len(found) > 1:
        raise UserError(f"{name}: means {len(found)} files ({', '.join(w.name for w in found)}); give more of the name")
    return found[0] if found else None


def _section(title: str, values: dict[str, Any], indent: str = "  ") -> None:
    print(f"{indent[2:]}{title}")
    for key, value in values.items():
        if isinstance(value, dict):
            _section(key, value, indent + "  ")
        elif value is not None and value != []:
            print(f"{indent}{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


def _rm(store: Store, arguments: argparse.Namespace) -> None:
    runs = list({run.folder.resolve(): run for run in map(store.find, arguments.names)}.values())
    for run in runs:  # before anything is removed
        if run.locked():
            raise UserError(f"run {run.name} is in use; nothing was removed")
        print(f"{run.name}  {run.status['state']}  {_human(files.size(run.folder))}")
    if _confirmed(f"remove {_count(runs, 'run')}?", arguments.yes):
        print(f"freed {_human(sum(store.remove(run) for run in runs))}")


def _prune(store: Store, arguments: argparse.Namespace) -> None:
    if not (arguments.failed or arguments.checkpoints):
        raise UserError("redoubt runs prune: say what should go: --failed, --checkpoints or both")
    failed, extra = [], []
    for run in store.list():
        state = run.status["state"]
        if arguments.failed and state in ("failed", "interrupted"):
            failed.append(run)
            print(f"{run.name}  {state}  {_human(files.size(run.folder))}")
        elif arguments.checkpoints and state == "done" and run.last.is_file():
            for path in sorted(path for path in run.checkpoints.iterdir() if path.is_file()):
                if not f"{path.name}.".startswith("last.ckpt."):  # its checksum stays with it
                    extra.append((run, path))
                    print(f"{run.name}/checkpoints/{path.name}  {_human(path.stat().st_size)}")
    if not failed and not extra:
        print("nothing to remove")
    elif arguments.dry_run:
        total = sum(files.size(run.folder) for run in failed) + sum(path.stat().st_size for _, path in extra)
        print(f"would free {_human(total)}")
    elif _confirmed(f"remove {_count(failed, 'run')} and {_count(extra, 'checkpoint')}?", arguments.yes):
        print(f"freed {_human(_removed(store, failed, extra))}")


def _removed(store: Store, runs: list[Run], checkpoints: list[tuple[Run, Path]]) -> int:
    freed = 0
    for left in store.folder.glob(f"{REMOVED}*"):  # removals that were killed half-way
        freed += files.size(left)
        shutil.rmtree(left, ignore_errors=True)
    for run in runs:
        try:
            if run.status["state"] == "done":  # started again, and ended, while the question stood
                raise UserError(f"run {run.name} is done by now")
            freed += store.remove(run)
        except UserError as error:  # started again since it was listed
            print(f"kept: {error}")
    for run, path in checkpoints:
        try:
            with run.lock(wait=False):
                size = path.stat().st_size
                path.unlink()
                freed += size
        except (UserError, OSError) as error:
            print(f"kept {path}: {error}")
    return freed


def _confirmed(question: str, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody can be asked here: add --yes")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _count(things: Sequence[Any], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def _epochs(row: dict[str, Any]) -> str:
    if row["epoch"] is None:
        return "-"
    return f"{row['epoch']}/{row['max_epochs']}" if row["max_epochs"] is not None else str(row["epoch"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _human(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
