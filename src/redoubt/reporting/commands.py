"""``redoubt report <what> [key=value ...]``: the run store, looked at. Nothing is trained and no run is changed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import yaml

from redoubt.arguments import fitted
from redoubt.errors import UserError, did_you_mean

#: What -> (module, what it shows). The function has the name of the command; its keyword arguments are the keys.
COMMANDS = {
    "status": ("redoubt.reporting.status", "the cells of a sweep: done, failed, running, missing"),
    "html": ("redoubt.reporting.page", "one page of all runs that needs no server and no network"),
    "tables": ("redoubt.reporting.tables", "the papers' tables beside our cells: Markdown, LaTeX, CSV"),
    "plot": ("redoubt.reporting.plots", "a figure as PNG and PDF"),
    "plan": ("redoubt.reporting.costs", "commands, missing runs and GPU hours of a published table"),
    "wandb": ("redoubt.reporting.dashboard", "the W&B workspace and report, or their specification"),
}


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
        argv: What follows ``redoubt report``.

    Returns:
        The exit code.

    Raises:
        UserError: An unknown command or key, or what the command itself refuses.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: redoubt report WHAT [key=value ...]\n")
        print("\n".join(f"  {name:8}{text}" for name, (_, text) in COMMANDS.items()))
        print("\nredoubt report WHAT --help shows its keys.")
        return 0
    what, words = argv[0], list(argv[1:])
    if what not in COMMANDS:
        raise UserError(f"report {what}: no such report{did_you_mean(what, list(COMMANDS))}")
    command: Callable[..., int | None] = getattr(importlib.import_module(COMMANDS[what][0]), what)
    keys = inspect.signature(command).parameters
    if any(word in ("-h", "--help") for word in words):
        print(inspect.getdoc(command))
        for key, parameter in keys.items():
            default = parameter.default if parameter.default is not inspect.Parameter.empty else None
            print(f"  {'paths.outputs' if key == 'outputs' else key}={'' if default is None else default}")
        return 0
    return command(**_given(what, command, words)) or 0


def _given(what: str, command: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    keys, given = get_type_hints(command), {}
    keys.pop("return", None)
    for word in words:
        key, equals, text = word.partition("=")
        key = "outputs" if key == "paths.outputs" else key
        if not equals or key not in keys:
            known = ["paths.outputs" if k == "outputs" else k for k in keys]
            raise UserError(f"report {what}: {word!r} is no key=value of it{did_you_mean(key, known)}")
        if not text:
            raise UserError(f"report {what}: {word} has no value: give one, or leave it out")
        try:
            given[key] = text if keys[key] in (str, str | None) and text != "null" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"report {what}: {word!r} cannot be read: put the value in quotes") from error
    return fitted(command, given, f"report {what}")
