"""Values of the `data` group that are out of their range."""

from __future__ import annotations

import difflib
from typing import Any

from redoubt.errors import UserError

SOURCES = ("official", "folder", "fake")

#: The least that makes sense: two classes, two images of which a batch statistic can be taken.
LEAST = {
    "num_classes": 2,
    "image_size": 1,
    "batch_size": 2,
    "probe": 1,
    "limit_train": 2,
    "limit_test": 1,
    "limit_val": 1,
}


def check_options(*, source: str, val_fraction: float, mean: Any, std: Any, **numbers: Any) -> None:
    """Raise for the first value that cannot be.

    Args:
        source: One of `SOURCES`.
        val_fraction: In [0, 1).
        mean: Three numbers, or None.
        std: Three positive numbers, or None.
        numbers: Whole numbers with the names in `LEAST`; None where the option is off.

    Raises:
        UserError: Names the key and what it takes.
    """
    if source not in SOURCES:
        close = difflib.get_close_matches(str(source), SOURCES, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"data.source={source} is unknown{hint}; it is one of {', '.join(SOURCES)}")
    if isinstance(val_fraction, str) or not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} is not in [0, 1); 0.02 holds out 2 %")
    for key, value in numbers.items():
        for number in value if key == "image_size" and isinstance(value, list | tuple) else [value]:
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int) or number < LEAST[key]:
                off = ", or null for all" if key.startswith("limit") else ""
                raise UserError(f"data.{key}={number}: it takes a whole number of {LEAST[key]} or more{off}")
    for key, channels in (("mean", mean), ("std", std)):
        if channels is None:
            continue
        if len(channels) != 3 or (key == "std" and min(channels) <= 0):
            raise UserError(f"data.{key}={list(channels)}: it takes three numbers, one per channel, std over 0")
