"""Numbers as people write them: 0.03, 3e-2, 8/255."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from redoubt.errors import UserError, shown


def as_number(value: float | str, key: str) -> float:
    """A finite float from a number or a string that holds a number or a fraction.

    Raises:
        UserError: It is neither; the message names ``key``.
    """
    number = math.nan
    try:
        if isinstance(value, str):
            top, *bottom = (part.strip() for part in value.split("/"))
            number = float(top)
            if bottom:  # exact; with an exponent of many digits a Fraction would fill the memory
                small = len(bottom) == 1 and not re.search(r"e[+-]?\d{4}", value, re.I)
                number = float(Fraction(top) / Fraction(bottom[0])) if small else math.nan
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{key}={shown(value)} is not a number: write it as 0.03 or as 8/255")
    return number


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Of images whose ``data.image_size`` is one number or [height, width]."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def as_whole(value: float | str, key: str, least: int | None = 1, most: int = 2**63 - 1) -> int:
    """A whole number of at least ``least`` and at most ``most``.

    Raises:
        UserError: It is none; the message names ``key``.
    """
    try:
        number = as_number(value, key)
    except UserError:
        number = math.nan
    if number != number // 1 or (least is not None and number < least):
        limit = "" if least is None else f" of at least {least}"
        raise UserError(f"{key}={shown(value)} must be a whole number{limit}")
    if not -(2**63) <= number <= most:
        raise UserError(f"{key}={shown(value)} is too large: take at most {most}")
    return value if isinstance(value, int) else int(number)


def seeds_of(value: float | str) -> int:
    """How many seeds are asked for; each is a run of hours, and a thousand of them a slip of the keyboard."""
    seeds = as_whole(value, "seeds")
    if seeds > 1000:
        raise UserError(f"seeds={shown(value)} are too many: take at most 1000")
    return seeds


def clock(seconds: float) -> str:
    """1:02:03, or 4.2 s; hours are never folded into days."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02} min"
