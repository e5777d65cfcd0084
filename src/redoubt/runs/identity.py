"""What a run is: the hash of what decides its weights, and a record of what surrounded it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import redoubt

#: Keys that decide nothing about the weights. A key stands for all that is under it.
EXCLUDED = frozenset(
    {
        "attack",
        "axes",
        "callbacks",
        "compile_cache",
        "data.limit_test",
        "data.balanced",  # `decides` has it, where it does
        "data.root",  # the fingerprint of the training tensors stands for both
        "data.source",
        "data.verify",
        "evaluation",
        "hydra",
        "logger",
        "natural",  # of another run, whose identity stands for it
        "paths",
        "plan",
        "runs",
        "sweep",
        "trainer.accelerator",
        "trainer.checkpoint_every",
        "trainer.devices",
        "trainer.fast_dev_run",
        "trainer.num_nodes",
        "trainer.progress",
        "trainer.strategy",
    }
)

#: Where a config names the run that it starts from; that run's identity takes their place once it is known.
PRETRAINED = frozenset({"extend", "pretrained", "defense.pretrained"})

#: What a run's identity leaves out of its config.
WITHOUT = EXCLUDED | PRETRAINED

PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "omegaconf", "numpy")

_INTEGER = re.compile(r"[+-]?\d{1,400}")
_DECIMAL = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(rf"\s*({_DECIMAL})\s*(?:/\s*({_DECIMAL})\s*)?")


def plain(value: Any) -> Any:
    """Dicts, lists and scalars only; interpolations of an OmegaConf container are resolved on the way."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item"):  # NumPy's scalars
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a config")


def canonical(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The config as values that are equal where they mean the same.

    Numbers are floats (integers that a float cannot hold stay), strings that are numbers or fractions are
    evaluated, keys whose value is null are dropped, and so are mappings that end up empty: an option added
    later has null for "as before". Keys are sorted, booleans stay booleans.
    """
    return _canonical(plain(cfg), "", frozenset())


def deciding(cfg: Mapping[str, Any], *, excluded: Iterable[str] = EXCLUDED) -> dict[str, Any]:
    """The part of the canonical config that decides the weights."""
    return _canonical(plain(cfg), "", frozenset(excluded))


def _canonical(value: Any, prefix: str, excluded: frozenset[str]) -> Any:
    if isinstance(value, dict):
        kept = {
            key: _canonical(value[key], f"{prefix}{key}.", excluded)
            for key in sorted(value)
            if value[key] is not None and f"{prefix}{key}" not in excluded
        }
        return {key: item for key, item in kept.items() if item != {}}
    if isinstance(value, list):
        return [_canonical(item, f"{prefix}*.", excluded) for item in value]
    return _number(value)


def _number(value: Any) -> Any:
    if isinstance(value, str):
        if _INTEGER.fullmatch(value.strip()):
            return _number(int(value))
        match = _NUMBER.fullmatch(value)
        if match is None or (match[2] and float(match[2]) == 0):
            return value
        number = float(match[1]) / float(match[2] or 1)
        return number + 0.0 if math.isfinite(number) else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    try:
        number = float(value)
    except OverflowError:
        return value
    return number + 0.0 if number == value or number != number else value  # + 0.0: -0.0 is 0.0


def digest(decisive: Mapping[str, Any]) -> str:
    """Ten hex digits that name what a mapping means."""
    return hashlib.sha256(json.dumps(canonical(decisive), sort_keys=True).encode()).hexdigest()[:10]


def decides(
    cfg: Mapping[str, Any], train_fingerprint: str, pretrained: str | None = None, extends: str | None = None
) -> dict[str, Any]:
    """All that decides a run's weights, as a plain mapping.

    Args:
        cfg: The composed config, resolved or resolvable.
        train_fingerprint: Stands for the training tensors, in place of ``data.root`` and ``data.source``.
        pretrained: Identity of what this run starts from, in place of the config's ``pretrained``; None from scratch.
        extends: Identity of the run that this one goes on from, in place of ``extend``.
    """
    config = deciding(cfg, excluded=WITHOUT)
    return {
        "config": config,
        "data": train_fingerprint,
        "pretrained": pretrained,
        "numerics": redoubt.NUMERICS,
        **({"extends": extends} if extends else {}),
        **_subset(cfg, config.get("data", {})),
    }


def _subset(cfg: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The rule by which training images were chosen; nothing where all of them are trained on."""
    limited = data.get("limit_train") is not None or data.get("limit_val") is not None
    if not limited and not data.get("val_fraction"):
        return {}
    return {"subsets": redoubt.SUBSETS} | ({"balanced": True} if limited and cfg["data"].get("balanced") else {})


def identity(
    cfg: Mapping[str, Any], train_fingerprint: str, pretrained: str | None = None, extends: str | None = None
) -> str:
    """Ten hex digits that name what `decides` a run's weights; its arguments."""
    text = json.dumps(decides(cfg, train_fingerprint, pretrained, extends), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two canonical configs, sorted."""
    left, right = leaves(a), leaves(b)
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))


def leaves(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and values of a canonical config, each value as JSON."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            found |= leaves(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(item, sort_keys=True)  # as text, for 1.0 == True in Python
    return found


def environment(devices: Iterable[str] = ()) -> dict[str, Any]:
    """Versions, git state and devices; no environment variable, no path, no command line."""
    return {
        "redoubt": redoubt.__version__,
        "numerics": redoubt.NUMERICS,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": list(devices),
        "versions": dict(_versions()),
        "git": _git(Path(redoubt.__file__).parent),
    }


@functools.cache
def _versions() -> Mapping[str, str | None]:
    """Of each package; None where it is not installed."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _git(source: Path) -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed; None for an installed package."""
    if "site-packages" in source.parts:  # a repository around it would be somebody else's
        return None
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch", "--no-ahead-behind"]
    try:
        said = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = said.splitlines()
    commit = next(line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid "))
    return {"commit": commit, "dirty": any(not line.startswith("# ") for line in lines)}
