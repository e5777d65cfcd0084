"""Numbers as people write them: 0.03, 3e-2, 8/255."""

from __future__ import annotations

import math
from fractions import Fraction

from redoubt.errors import UserError


def as_number(value: float | str, key: str) -> float:
    """A finite float from a number or a string that holds a number or a fraction.

    Raises:
        UserError: It is neither; the message names ``key``.
    """
    number = None
    if isinstance(value, str):
        top, *bottom = value.split("/")
        try:
            number = float(Fraction(top.strip()) / Fraction(bottom[0].strip())) if bottom else float(value)
        except (ValueError, ZeroDivisionError):
            number = None
        if len(bottom) > 1:
            number = None
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if number is None or not math.isfinite(number):
        raise UserError(f"{key}={value!r} is not a number: write it as 0.03 or as 8/255")
    return number


def as_whole(value: float | str, key: str, least: int = 1) -> int:
    """A whole number of at least ``least``.

    Raises:
        UserError: It is none; the message names ``key``.
    """
    number = as_number(value, key)
    if number != int(number) or number < least:
        raise UserError(f"{key}={value} must be a whole number of at least {least}")
    return int(number)


def clock(seconds: float) -> str:
    """1:02:03, or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02} min"
