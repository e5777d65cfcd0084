"""What a value may be: each takes a value and its key and gives the value as the program wants it; no torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from redoubt.errors import UserError, shown
from redoubt.units import as_number, as_whole

#: Raises a UserError that names the key where the value is of another kind.
Kind = Callable[[Any, str], Any]


def number(least: float = float("-inf"), below: float = float("inf")) -> Kind:
    """A number, or a text that holds one or a fraction."""

    def check(value: Any, key: str) -> Any:
        found = as_number(value, key)
        if not least <= found < below:
            limit = f" and below {below:g}" if below < float("inf") else ""
            raise UserError(f"{key}={shown(value)} must be at least {least:g}{limit}")
        return _plain(value, found)

    return check


def positive(value: Any, key: str) -> Any:
    """A number above 0."""
    found = as_number(value, key)
    if found <= 0:
        raise UserError(f"{key}={shown(value)} must be above 0")
    return _plain(value, found)


def whole(least: int | None = None, most: int = 2**63 - 1) -> Kind:
    """A whole number."""
    return lambda value, key: as_whole(value, key, least, most)


def flag(value: Any, key: str) -> Any:
    """true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={shown(value)} must be true or false")
    return value


def text(value: Any, key: str) -> Any:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{key}={shown(value)} must be a text: write it in quotes, as '{key}=\"...\"'")
    return value


def name(value: Any, key: str) -> Any:
    """A text that may look like a number, as the hash of a run."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value, key)


def one_of(*words: Any) -> Kind:
    """One of these words, true, false or null."""

    def check(value: Any, key: str) -> Any:
        if not _among(value, words):
            *most, last = map(_word, words)
            raise UserError(f"{key}={shown(value)} is not known: take {', '.join(most)} or {last}")
        return value

    return check


def optional(kind: Kind, *words: Any) -> Kind:
    """A value of some kind or, in its place, one of these words; null where there are none."""

    def check(value: Any, key: str) -> Any:
        if _among(value, words or (None,)):
            return value
        try:
            return kind(value, key)
        except UserError as error:
            raise UserError(f"{error}; or take {' or '.join(map(_word, words or (None,)))}") from error

    return check


def listed(kind: Kind, least: int = 1) -> Kind:
    """A list of values of some kind."""

    def check(value: Any, key: str) -> Any:
        if not isinstance(value, list):
            raise UserError(f"{key}={shown(value)} must be a list, as {key}=[...]")
        if len(value) < least:
            raise UserError(f"{key} is empty: give at least one value")
        return [kind(item, key) for item in value]

    return check


def _plain(value: Any, number: float) -> Any:
    """An integer stays one, unless it is larger than those of torch."""
    return value if not isinstance(value, str) and abs(number) < 2**63 else number


def _among(value: Any, words: tuple[Any, ...]) -> bool:
    return any(value is word or (isinstance(word, str) and value == word) for word in words)


def _word(word: Any) -> str:
    return word if isinstance(word, str) else shown(word)
