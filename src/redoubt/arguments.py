"""A section's values against a constructor's typed signature, which is the section's schema; no torch here."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from redoubt.errors import UserError, did_you_mean, shown
from redoubt.units import as_number, as_whole

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_REFUSED = object()


def fitted(
    found: Callable[..., Any], section: Mapping[str, Any], key: str, given: Sequence[str] = ()
) -> dict[str, Any]:
    """A section's values as a constructor takes them: a whole float becomes an integer where one is wanted.

    Args:
        found: A class or function with a typed signature; what ``**rest`` passes on to a base class counts too.
        section: The values by name.
        key: The section's key, for messages.
        given: Names of arguments that do not come from the section.

    Raises:
        UserError: A name that it does not take, one that it needs and is not there, or a value of another type.
    """
    known, open_end = _parameters(found)
    names = [name for name in known if name not in given]
    for name in section:
        if name not in known and not open_end:
            called = getattr(found, "__name__", "it")
            raise UserError(f"{key}.{name} is no argument of {called}{did_you_mean(str(name), names)}")
    for name in names:
        if known[name].default is inspect.Parameter.empty and name not in section:
            raise UserError(f"{key}.{name} is missing: give it a value")
    hints = {name: known[name].annotation for name in section if name in known}
    return {name: _fit(value, hints.get(name, Any), f"{key}.{name}") for name, value in section.items()}


def _parameters(found: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The parameters that can be named, with their types; and whether any other name is taken too."""
    known: dict[str, inspect.Parameter] = {}
    for function in (
        [vars(c)["__init__"] for c in found.__mro__ if "__init__" in vars(c)] if inspect.isclass(found) else [found]
    ):
        try:
            own, hints = dict(inspect.signature(function).parameters), typing.get_type_hints(function)
        except (TypeError, ValueError, NameError):  # not written in Python, or types that are not imported
            return known, True
        own.pop("self", None)
        rest = [name for name, p in own.items() if p.kind is p.VAR_KEYWORD]
        for name, parameter in own.items():
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                known.setdefault(name, parameter.replace(annotation=hints.get(name, Any)))
        if not rest:
            return known, False
    return known, True


def _fit(value: Any, hint: Any, key: str) -> Any:
    fitting = _as(value, hint)
    if fitting is _REFUSED:
        raise UserError(f"{key}={shown(value)} must be {_described(hint)}")
    return fitting


def _as(value: Any, hint: Any) -> Any:
    """The value as a type, or `_REFUSED`. A type that a config cannot hold takes anything."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tried = (_as(value, one) for one in inside if one in _NAMES or typing.get_origin(one))
        return next((found for found in tried if found is not _REFUSED), _REFUSED)
    if hint in _NAMES:
        return _scalar(value, hint)
    if origin in (collections.abc.Sequence, list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str):
            return _REFUSED
        one = inside[0] if inside else Any
        found = [_as(item, one) for item in value]
        return _REFUSED if any(item is _REFUSED for item in found) else found
    if origin in (collections.abc.Mapping, dict):
        return value if isinstance(value, Mapping) else _REFUSED
    return value


def _scalar(value: Any, hint: Any) -> Any:
    if hint in (int, float):
        try:
            found = as_whole(value, "", None) if hint is int else as_number(value, "")
        except UserError:
            return _REFUSED
        return found if hint is int or isinstance(value, str) or abs(found) >= 2**63 else value
    return value if isinstance(value, hint) else _REFUSED


def _described(hint: Any) -> str:
    """``a whole number or null``."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(text for one in inside if (text := _described(one))))
    if hint in _NAMES:
        return _NAMES[hint]
    if origin in (collections.abc.Sequence, list, tuple):
        return f"a list, each {_described(inside[0]) or 'anything'}" if inside else "a list"
    if origin in (collections.abc.Mapping, dict):
        return "a mapping, as {a: 1}"
    return ""
