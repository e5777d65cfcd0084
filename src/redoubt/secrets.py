"""What no file of a run may hold: passwords, keys and tokens, and what a config took from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "<redacted>"

#: Sections that decide nothing: values of ``${oc.env:...}`` in them stay out of what is stored.
PLACES = ("logger", "paths")

#: Ends of names of what is secret; of a variable, or of a key whose value is text.
_NAME = r"(?:pass(?:word|wd|phrase)?|secrets?|credentials?|token|(?:api|access|private|secret|auth)_?key)"
_KEY = re.compile(rf"{_NAME}$|(?:^|_)(?:key|auth|dsn)$|_(?:pat|pwd)$", re.I)
#: ``api_key=...`` and the like in a text: words of a command line, what a library says of its arguments.
_PAIR = re.compile(rf"""(\b[\w.-]*{_NAME}['"]?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;&'"\]}}]+)""", re.I)
_URL = re.compile(r"(\w://[^/\s:@]*:)([^/\s@]+)(?=@)")
#: A shorter text may be any word.
_SHORTEST = 8

_met: set[str] = set()  # under a secret's name: hidden wherever they stand
_asked: set[str] = set()  # for by ${oc.env:...}


def redacted(value: Any) -> Any:
    """Plain data without secrets: under their key, beside their name in a text, in a URL, or held by the environment.

    What was met under a secret's key is hidden in all that is redacted later, as in a message about it.
    """
    hidden = {text for name, text in os.environ.items() if _KEY.search(name) and len(text) >= _SHORTEST}
    _meet(value, "")
    if not isinstance(value, Mapping):
        return _clean(value, "", hidden)
    return {key: _clean(item, str(key), hidden | (_asked if key in PLACES else set())) for key, item in value.items()}


def from_environment(text: Any) -> Any:
    """Notes what a config asked the environment for, and gives it."""
    if isinstance(text, str) and len(text) >= _SHORTEST:
        _asked.add(text)
    return text


def _clean(value: Any, key: str, hidden: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _clean(item, str(name), hidden) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, key, hidden) for item in value]
    if _KEY.search(key) and value not in (None, "") and not isinstance(value, bool):  # yaml makes digits a number
        return HIDDEN
    if not isinstance(value, str):
        return value
    value = _URL.sub(rf"\1{HIDDEN}", _PAIR.sub(rf"\1{HIDDEN}", value))
    return _replaced(value, hidden | _met)


def _meet(value: Any, key: str) -> None:
    """Notes what stands under a secret's key, before anything is shown."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _meet(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            _meet(item, key)
    elif len(str(value)) >= _SHORTEST and value != HIDDEN and _KEY.search(key):
        _met.add(str(value))


def _replaced(text: str, hidden: Iterable[str]) -> str:
    for secret in sorted(hidden, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, HIDDEN)
    return text
