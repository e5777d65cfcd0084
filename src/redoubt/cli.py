"""The command line, ``redoubt train | eval | audit | ...``: composes, checks, hands over."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import stat
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from redoubt import beforehand, config, explain, launched
from redoubt.completion import completion
from redoubt.composed import checked
from redoubt.errors import CheckFailed, UserError, did_you_mean
from redoubt.usage import usage

if TYPE_CHECKING:  # torch takes seconds to import; composing and --help must not wait for it
    from omegaconf import DictConfig

    from redoubt.defenses import RobustModule

_CHOICE = re.compile(r"(defense|base|model|data|attack|optimizer|threat|logger|trainer)=(\w+)")

COMMANDS = {
    "train": "train a cell of the grid, attack the result, record it",
    "eval": "attack a finished run or any weights",
    "audit": "check a finished run for false robustness",
    "export": "write a finished run's net as one file: safetensors, torch.export or ONNX",
    "report": "status | html | tables | plot | plan | wandb: look at the runs of the store",
    "reproduce": "train, attack and audit a published table's rows, in pieces; then published against ours",
    "runs": "ls | show | rm | prune the runs of the store",
}


def build_module(cfg: DictConfig) -> RobustModule:
    """The module of a composed config, with fresh weights; see `redoubt.build.build_module`."""
    from redoubt.build import build_module

    return build_module(cfg)


def main(command: str | None = None) -> None:
    """Entry point of the console script and, with its command given, of the shims in ``src/``."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if command is None:
        command = arguments.pop(0) if arguments else "--help"
    _outlast_readers()
    try:
        code = _run(command, arguments, debug)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        code = _report(error, debug)
    sys.exit(code)


class _Outlet(io.FileIO):
    """A pipe or terminal whose reader may leave, as `head` does: from then on what is written goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.EBADF):  # EIO: a closed terminal's
                raise
            if error.errno != errno.EBADF:  # of a descriptor that was closed, another file may have the number by now
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
            return len(data)


def _outlast_readers() -> None:
    """Lets the work go on, to its end, where nobody reads standard output or the error output any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the beginning
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
            continue
        try:
            number = stream.fileno()
            mode = os.fstat(number).st_mode
        except (OSError, ValueError):  # none of the system's
            continue
        raw = getattr(stream.buffer, "raw", stream.buffer)
        if isinstance(raw, _Outlet) or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)):
            continue
        stream.flush()
        outlet: Any = _Outlet(number, "w", closefd=False)
        outlet.before = stream  # which would close the descriptor once nobody refers to it
        buffer = outlet if stream.write_through else io.BufferedWriter(outlet)
        lines, through = stream.line_buffering, stream.write_through
        made = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=lines, write_through=through)
        setattr(sys, name, made)


def _run(command: str, arguments: list[str], debug: bool) -> int:
    if command == "--child":
        return _child()
    if command == "runs":
        from redoubt.runs.commands import main as runs

        return runs(arguments)
    if command == "report":
        from redoubt.reporting.commands import main as report

        return report(arguments)
    if command == "reproduce":
        from redoubt.reproduce import main as reproduce

        return reproduce(arguments, _job, lambda error: (_report(error, debug), said(error))[1])
    if command in ("train", "eval", "audit", "export"):
        return _hydra(command, arguments, debug)
    if command in ("-h", "--help", "help"):
        print("usage: redoubt COMMAND [key=value ...] [--debug]\n")
        print("\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()))
        print("\nredoubt COMMAND --help shows a command's keys and groups.")
        return 0
    raise UserError(f"{command!r} is no command{did_you_mean(command, list(COMMANDS))}")


def _hydra(command: str, arguments: list[str], debug: bool) -> int:
    """Composes by Hydra's own command line, with its errors shown by us."""
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    parser = get_args_parser()
    parser.error = _misused  # type: ignore[method-assign]
    parsed, unknown = parser.parse_known_args(arguments)
    flags = [a for a in unknown if a.startswith("-")]
    if flags:
        raise UserError(f"{flags[0]} is no option: values are given as key=value, and --help lists the keys")
    words = [*parsed.overrides, *unknown]  # argparse would not take those behind an option
    for word in words:
        arguments.remove(word)
    arguments = [*arguments, *words]

    if {"-sc", "--shell-completion"} & set(arguments) and (text := completion(arguments)) is not None:
        print(text)
        return 0
    for flag in ("config_name", "config_path", "experimental_rerun"):
        if getattr(parsed, flag) is not None:  # another tree than ours; a pickle
            raise UserError(f"--{flag.replace('_', '-')} is not taken: further configs go into a folder: --config-dir")
    config.search_path[:] = [os.path.abspath(parsed.config_dir)] if parsed.config_dir else []
    Plugins.instance()  # before the path grows: Hydra imports all plugins that it finds there
    here = os.getcwd()
    _own_packages(here)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises to us instead of printing its own many lines
    config.register_resolvers()
    config.root = command
    explain.check_words(words)
    if parsed.help:
        print(usage(command, words))
        return 0
    config.chosen[:] = [f"{m[1]}={m[2]}" for m in map(_CHOICE.match, arguments) if m]

    ended: list[int] = []  # exit codes of the jobs that ran in this process
    folders = list(config.search_path)

    @hydra.main(version_base="1.3", config_path=config.config_dir(), config_name=command)
    def task(cfg: DictConfig) -> Any:
        hydra_config = HydraConfig.get()
        config.register_resolvers()  # a sweep's worker has only this function and what it names
        config.search_path[:] = folders
        _own_packages(here)
        config.root = command
        cfg = config.with_axes(cfg, dict(hydra_config.runtime.choices))
        own = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)  # of a job of a sweep
        code, value = _cell(command, cfg, [str(word) for word in own or ()], debug)
        ended.append(code)
        return value

    from redoubt import sweeps

    _log()
    sys.argv = [f"redoubt {command}", *arguments]
    sweeps.current.clear()  # what one that broke off has left in this process
    with checked(folders):
        task()
    if sweeps.current:
        from redoubt.reporting.status import show

        return show(*sweeps.current.pop())
    return max(ended, default=0)


def _misused(message: str) -> NoReturn:
    raise UserError(f"{message}: values are given as key=value, and --help lists the keys")


def _cell(command: str, cfg: DictConfig, overrides: list[str], debug: bool) -> tuple[int, Any]:
    """One job, with its errors reported here, once: Hydra would add lines, and end a multirun's other jobs.

    Returns:
        The exit code, and what the job gave.
    """
    from redoubt import sweeps

    _outlast_readers()  # in a sweep's worker too
    noted: dict[str, Any] = {}
    with ExitStack() as stack:
        try:
            noting = cfg.get("sweep") and cfg.sweep.evaluations is not None and launched.first()
            if noting and not (cfg.plan or cfg.trainer.fast_dev_run):
                sweep = sweeps.Sweep(Path(cfg.paths.outputs) / "sweeps" / cfg.sweep.name)
                noted = stack.enter_context(sweep.cell(sweeps.key_of(overrides), cfg.sweep.evaluations))
            value = _job(command, cfg, overrides)
            if noted:
                noted |= {"run": value[0]["run"], "results": value}
            return 0, value
        except sweeps.Taken as taken:  # the cell, or a run that it needs
            print(f"redoubt: {taken}", file=sys.stderr)
            noted |= {"state": "missing", "reason": str(taken)}
            return 0, None
        except sweeps.Pruned as pruned:
            print(f"redoubt: {pruned}", file=sys.stderr)
            noted |= {"state": "pruned", "reason": str(pruned)}
            return 0, None
        except Exception as error:
            code = _report(error, debug)
            noted |= {"state": "failed", "reason": said(error), "code": code}
            return code, None


def _job(command: str, cfg: DictConfig, overrides: list[str]) -> Any:
    """One job in as many processes as it asks for."""
    _log()
    config.complete(cfg, command)
    if command != "export":
        cfg = config.resolve(cfg)
    beforehand.look(command, cfg, overrides)
    from redoubt import jobs
    from redoubt.training.companions import companions

    if command == "export":
        return jobs.export_run(cfg)
    job = {"command": command, "config": cfg, "overrides": overrides, "config_dirs": config.search_path}
    with companions(job, jobs.processes(cfg)):
        return jobs.run(command, cfg, overrides)


def _own_packages(here: str) -> None:
    """With --config-dir, packages of the folder that the command is started in can be imported, as by ``python -m``."""
    if config.search_path and here not in sys.path:
        sys.path.append(here)


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("fsspec", "urllib3", "matplotlib", "torch", "filelock", "git", "hydra", "hydra_plugins"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _child() -> int:
    """A further process of a job, started by `companions` with the job's own config."""
    from omegaconf import OmegaConf

    job = OmegaConf.load(sys.stdin)
    launched.end_with_parent(int(job.parent))
    config.search_path[:] = list(job.config_dirs)
    _own_packages(os.getcwd())
    config.register_resolvers()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    from redoubt import jobs, sweeps

    with suppress(sweeps.Pruned):  # rank 0 notes it
        jobs.run(str(job.command), job.config, list(job.overrides))
    return 0


def one_line(error: BaseException) -> str | None:
    """What to tell a user of an error that is not ours; None where it is a defect of the program."""
    text = str(error)
    if "Unknown plugin class" in text:  # of a launcher: Hydra's own sweepers and ours are always there
        extra = "slurm" if "submitit" in text else "sweeps"
        return f"this hydra/launcher is not installed: pip install 'redoubt[{extra}]'"
    if explain.is_of_config(error):
        return explain.explain(error)
    memory = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
    if isinstance(error, MemoryError) or any(m in text for m in memory):
        return (
            "out of memory: lower data.batch_size, or raise trainer.accumulate, which cuts the same batch into "
            "micro-batches"
        )
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; see paths.outputs, paths.data and data.root"
    return None


def said(error: BaseException) -> str:
    """An error in one line, for a table."""
    text = str(error) if isinstance(error, UserError) else one_line(error) or f"{type(error).__name__}: {error}"
    return (text.splitlines() or [type(error).__name__])[0]


def _report(error: BaseException, debug: bool) -> int:
    """Prints an error, in one line where a user can mend it, and gives the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("redoubt: stopped by the keyboard", file=sys.stderr)
        return 130
    line = str(error) if isinstance(error, UserError) else one_line(error)
    if line is None or debug:
        traceback.print_exception(error)
    if line is not None:
        print(f"redoubt: {line}", file=sys.stderr)
    return 1 if line is None else 3 if isinstance(error, CheckFailed) else 2


if __name__ == "__main__":
    main()
