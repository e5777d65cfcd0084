"""Completion of commands, groups, options and keys in bash: ``eval "$(redoubt train -sc install=bash)"``.

Hydra answers what is possible; its own script knows neither sub-commands nor a Python by its path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from redoubt import config
from redoubt.errors import UserError

COMPOSING = ("train", "eval", "audit", "export")

SCRIPT = r"""
_redoubt() {
    local line="${COMP_LINE:0:$COMP_POINT}" words choices prefix word
    local python='(^|/)python[0-9.]* ([^ ]*/)?(train|eval|audit|export)\.py '
    local ours='(^|/)redoubt (train|eval|audit|export) '
    read -r -a words <<< "$line"
    word="${line##* }"
    COMPREPLY=()
    if [[ $line =~ $python || $line =~ $ours ]]; then
        choices=$(COMP_LINE="$line" "${words[0]}" "${words[1]}" -sc query=bash 2>/dev/null)
    elif [[ $line =~ (^|/)(redoubt\ report|report\.py)\ [a-z]*$ ]]; then
        choices="status html tables plot plan wandb"
    elif [[ $line =~ (^|/)(redoubt\ runs|runs\.py)\ [a-z]*$ ]]; then
        choices="ls show rm prune"
    elif [[ $line =~ (^|/)redoubt\ [a-z]*$ ]]; then
        choices="train eval audit export report reproduce runs"
    else
        return
    fi
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then  # bash completes what follows the = only
        prefix="${word%"${word##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    fi
}
complete -o nospace -o default -o bashdefault -F _redoubt redoubt python python3
""".strip()


def completion(arguments: list[str]) -> str | None:
    """What to print for ``-sc ...``; None where Hydra is to answer.

    Raises:
        UserError: It is asked for another shell.
    """
    asked = next((a for a in arguments if a.startswith(("install=", "uninstall=", "query="))), "install=")
    what, _, shell = asked.partition("=")
    if shell != "bash":
        raise UserError(f"-sc {asked}: there is completion for bash: -sc install=bash, -sc uninstall=bash")
    if what == "install":
        return SCRIPT
    if what == "uninstall":
        return "complete -r redoubt python python3; unset -f _redoubt"
    if (found := _nested(os.environ.get("COMP_LINE", "").rpartition(" ")[2])) is not None:
        return found
    start = rf"\s*\S+\s+(\S*\.py|{'|'.join(COMPOSING)})(?=\s|$)"  # Hydra expects a program of one word
    os.environ["COMP_LINE"] = re.sub(start, "redoubt", os.environ.get("COMP_LINE", ""), count=1)
    return None


def _nested(word: str) -> str | None:
    """``experiment=fsr/s1_...``: options of a group with folders, which Hydra does not list; None for other groups."""
    group, equals, begun = word.partition("=")
    folder = Path(config.config_dir()) / group
    if not equals or "/" in group or not any(folder.glob("*/*.yaml")):
        return None
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return " ".join(f"{group}={name}" for name in sorted(names) if name.startswith(begun))
