"""What a user did wrong, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one line that names the key or the file, says what is wrong and what to do. The command
    line prints it without a traceback and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback, so that a notebook too has one line."""
        return [f"redoubt: {self}"]


class CheckFailed(UserError):
    """A check that was asked for has failed: the command line ends with exit code 3."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ": did you mean ...?" with the nearest names, or the list of them where none is near."""
    names = sorted(map(str, known))
    near = difflib.get_close_matches(word, names, n=2, cutoff=0.5)
    if near:
        return f": did you mean {' or '.join(near)}? There are {', '.join(names)}"
    return f": there are {', '.join(names)}" if names else ""


def shown(value: Any) -> str:
    """A value as yaml and the command line write it, on one line that is not too long."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
