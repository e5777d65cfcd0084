"""What Hydra, OmegaConf and yaml object to, in one line: the key or the file, the cause, what to do; no torch here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from redoubt import config
from redoubt.errors import UserError, did_you_mean, meant, shown

_OURS = "leave it out: each command has its own config, and a folder of yours is given by --config-dir"
#: What is said, and what to tell.
_SAID = (
    (r"Could not append to config. An item is already at '([^']+)'", "{0} is there already: leave the + out"),
    (r"Multiple values for ([^.\s]+)", "{0} is chosen already: leave the + out, and choose it once"),
    (r"Could not delete from config. '([^']+)' does not exist", "~{0}: there is no such key: leave it out"),
    (r"Could not delete from config. The value of '([^']+)' is", "~{0}: it has another value: write ~{0} alone"),
    (
        r"Ambiguous value for argument '([^=]+)=([^']*)'",
        "{0}={1} holds several values: add -m to run each, or write a list, as {0}=[{1}]",
    ),
    (r"Sweep parameters '([^']+)' requires --multirun", "{0} stands for several values: add -m to run each"),
    (r"Cannot find primary config '([^']+)'", "--config-name={0}: " + _OURS),
    (r"Primary config (?:module|directory)[ \S]* not found", "--config-path: " + _OURS),
    (
        r"Additional config directory '([^']+)' not found",
        "--config-dir={0}: no such folder: give the one that holds groups of yours, as its experiment/mine.yaml",
    ),
    (r"You must specify '([^']+)'", "{0} is missing: choose an option, as {0}=..."),
    (r"In '([^']+)': Could not (?:find|load) '([^']+)'", "{0} names {1}, which does not exist: correct its defaults"),
    (r"Invalid defaults list in '([^']+)'.*", "{0}: its defaults are not a list of groups: correct them"),
    (r"Environment variable '([^']+)' not found", "the environment has no {0}: set it, or give a value"),
    (r"Unsupported interpolation type (\S+)", "there is no resolver {0}: correct what stands in ${{...}}"),
    (r"Recursive interpolation detected", "it refers to itself: give a value in place of ${{...}}"),
    (r"Interpolation key '([^']+)' not found", "there is no {0}, which it refers to: correct what stands in ${{...}}"),
    (r"(\w+) raised while resolving interpolation: (.+)", "{1}: correct what stands in ${{...}}"),
)


def is_of_config(error: BaseException) -> bool:
    """Whether an error comes from composing a config, by its class or by where it was raised."""
    if isinstance(error, UnicodeDecodeError):
        return _unreadable() is not None
    packages, trace = ("hydra", "omegaconf", "antlr4", "yaml"), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return type(error).__module__.split(".")[0] in packages or raised.split(".")[0] in packages


def explain(error: BaseException, at: str | None = None, root: str | None = None) -> str:
    """One line that names the key (``at``, where it is known) or the file, and what exists or is to be done.

    Args:
        error: Theirs, or a UserError.
        at: The key, where it is known.
        root: The command whose keys a hint lists; this process's where None.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}: line {mark.line + 1}, column {mark.column + 1}: {error.problem}: correct the yaml there"
    if isinstance(error, UnicodeDecodeError | yaml.YAMLError):
        return f"{_unreadable() or 'a config file'}: is no text in UTF-8: save it as such"
    text, key = str(error), getattr(error, "full_key", None)
    cause: BaseException | None = error
    while cause is not None:  # the innermost error names the key
        text, key = str(cause) or text, getattr(cause, "full_key", None) or key
        cause = cause.__cause__
    key = at or key
    group = re.search(r"Could not find '([^']+)/([^'/]*)'", str(error))
    if group:
        return _no_option(group[1], group[2], str(error))
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown:
        return _no_key(unknown[1], text, root)
    for one in (text, str(error)):
        for pattern, line in _SAID:
            if found := re.search(pattern, one):
                said = line.format(*found.groups())
                return f"{key}: {said}" if key and key not in said else said
    first = _first(text)
    where = f"{key}: " if key and key not in first else ""
    return f"{where}{first}: --help lists the groups and keys"


def _no_option(group: str, choice: str, text: str) -> str:
    options = re.search(r"Available options in '[^']*':\s*(.*?)\s*Config search path", text, re.S)
    names = options.group(1).split() if options else []
    wanted = f"{group}/{choice}".removeprefix("experiment/")
    if group.split("/")[0] == "experiment":
        return f"experiment={wanted} does not exist{did_you_mean(wanted, _experiments(wanted, names))}"
    return f"{group}={choice} does not exist{did_you_mean(choice or group, names or sorted(_groups()))}"


def _no_key(key: str, text: str, root: str | None) -> str:
    where = re.search(r"Key '([^']+)' is not in struct", text)
    if where:
        return f"{key} is not a key of this config{_siblings(key, root)}"
    return f"{key}: {_first(text)}: --help lists the groups and keys"


def _experiments(wanted: str, top: Sequence[str]) -> list[str]:
    """The experiments of the folder (a paper's) that was asked for; else those at the top, and the folders."""
    root, folder = Path(config.config_dir()) / "experiment", wanted.rpartition("/")[0]
    inside = [f"{folder}/{file.stem}" for file in (root / folder).glob("*.yaml")] if folder else []
    return inside or [*top, *(f"{path.name}/..." for path in root.iterdir() if path.is_dir())]


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else "the configuration could not be composed"


def _siblings(key: str, root: str | None) -> str:
    """Near names beside a key that does not exist."""
    try:
        cfg = config.compose(config.chosen, root or config.root)
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if parent and not isinstance(node, DictConfig) and OmegaConf.select(cfg, parent) is not None:
            return f": {parent} is a value, give it as {parent}=..."
        if not isinstance(node, DictConfig):
            node, leaf = cfg, key.split(".")[0]
        names = [str(k) for k in node if k not in ("_target_", "axes")]
        if leaf in names:
            return ": it is one of another option"
        others = meant(key, OmegaConf.to_container(cfg, resolve=False))  # type: ignore[arg-type]
        lost = node is cfg and parent  # beside it there is nothing
        return did_you_mean(leaf, [] if lost and others else names, others)
    except Exception:  # a hint must never hide the error that it explains
        return ""


def _unreadable() -> str | None:
    """The file of the user's configs that is no text."""
    for file in (path for folder in config.search_path for path in sorted(Path(folder).rglob("*.yaml"))):
        try:
            file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            return str(file)
    return None


# ---- words of the command line, before Hydra sees them -----------------------------------------------------------


def check_words(words: Sequence[str]) -> None:
    """Looks at what Hydra answers with a traceback, or with a line that does not name the word.

    Raises:
        UserError: A word that cannot be read, or that gives a group something else than the name of an option.
    """
    for override in _parsed(words):
        group = override.key_or_group
        if override.is_add() and group.startswith("hydra."):
            known = [field.name for field in dataclasses.fields(HydraConf)]
            if group.split(".")[1] not in known:
                raise UserError(f"{group} is not a key of Hydra's{did_you_mean(group.split('.')[1], known)}")
        folders = [Path(folder) / group for folder in (config.config_dir(), *config.search_path)]
        if group not in _groups() or not any(folder.is_dir() for folder in folders):
            continue
        if override.is_delete():
            if group not in _OPTIONAL:
                raise UserError(f"~{group}: every run needs its {group}: leave it out, or choose {group}=<option>")
            continue
        if override.is_add():
            raise UserError(f"{override.input_line}: the group is there already: leave the + out")
        value = None if override.is_sweep_override() else override.value()
        bad = not isinstance(value, str | dict) and not (value is None and group in _OPTIONAL)
        if bad and not override.is_sweep_override():
            names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
            raise UserError(f"{group}={shown(value)} names no option{did_you_mean(str(value), names)}")


#: Groups from which nothing need be chosen.
_OPTIONAL = ("experiment", "sweep")


def _groups() -> list[str]:
    return [path.name for path in Path(config.config_dir()).iterdir() if path.is_dir() and path.name != "hydra"]


def _parsed(words: Sequence[str]) -> Iterator[Override]:
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
        except HydraException as error:
            raise UserError(_misread(word)) from error
        if not override.key_or_group or (word.lstrip("+~").startswith("=")):
            raise UserError(_misread(word))
        yield override


def _misread(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals and not key.startswith("~"):
        return f"{shown(word)} is no key=value: write {key or 'key'}=..."
    quoted: Any = value.replace('"', '\\"')
    return (
        f"{word} cannot be read: a value with special characters stands in quotes, as '{key}=\"{quoted}\"', a list in "
        "brackets, as [1,2]"
    )
