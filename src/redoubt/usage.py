"""``redoubt train --help``: groups, options and keys, in a fraction of the time of Hydra's own list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from redoubt import config


def usage(command: str, overrides: Sequence[str]) -> str:
    """The text, with the keys of what ``overrides`` choose."""
    lines = [f"usage: redoubt {command} [group=option ...] [key=value ...] [-m: values a,b make several cells]", ""]
    lines += [f"{name}: {', '.join(options)}" for name, options in sorted(groups().items())]
    cfg = config.compose(overrides, command)
    keys = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "axes"])
    return "\n".join([*lines, "", OmegaConf.to_yaml(keys)])


def groups() -> dict[str, list[str]]:
    """Options of each config group, of the project and of ``--config-dir``; recipes are chosen by the groups."""
    found: dict[str, set[str]] = {}
    for folder in (config.config_dir(), *config.search_path):
        for file in Path(folder).glob("**/*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and not group.startswith("recipe") and file.stem not in ("base", "slurm_base"):
                found.setdefault(group, set()).add(file.stem)
    return {group: sorted(options) for group, options in found.items()}
