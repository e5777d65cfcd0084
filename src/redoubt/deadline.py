"""When this process ends by itself and leaves the rest to another start; no torch.

Training, which saves its place, and evaluation, which keeps what each attack did to each chunk, ask here as they go.
"""

from __future__ import annotations

import math
import time

#: Seconds, in a variable so that a test can set the time.
clock = time.monotonic

_began, _end = 0.0, math.inf


class TimeUp(SystemExit):
    """The time is up; what is done is kept."""


def start(minutes: float | None) -> None:
    """From now on so many minutes are left; None: no end."""
    global _began, _end
    _began = clock()
    _end = math.inf if minutes is None else _began + 60 * minutes


def left() -> float:
    """Seconds until the end."""
    return _end - clock()


def spent() -> float:
    """Seconds since `start`."""
    return clock() - _began


def over() -> bool:
    """Whether the time is up; without asking the clock where there is no end."""
    return _end < math.inf and left() <= 0


def reason(stopped: SystemExit) -> str:
    """Why the work was stopped: its time was up, or by which signal (the exit code is 128 and its number)."""
    return "the time was up" if over() else f"stopped by signal {int(stopped.code or 128) - 128}"


def check() -> None:
    """Ends the work where the time is up.

    Raises:
        TimeUp: It is.
    """
    if over():
        raise TimeUp(0)
