"""Where a process lives, and what becomes of it, as the other processes of its machine can see."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def place() -> str:
    """Names this process for `state` and `kill`: machine, number, start; empty where there is no ``/proc``."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        return f"{machine} {os.getpid()} {_stat(os.getpid())[19]}"
    except (OSError, IndexError):
        return ""


def state(where: str) -> str:
    """``running``, ``stopped`` or ``gone``; ``unknown`` of a process on another machine."""
    machine, number, began = _parts(where)
    if not machine or machine != _parts(place())[0]:
        return "unknown"
    try:
        stat = _stat(number)
    except OSError:
        return "gone"
    if stat[19] != began or stat[0] in "ZX":  # another process by now, or one that only waits to be asked for its code
        return "gone"
    return "stopped" if stat[0] in "Tt" else "running"


def kill(where: str) -> None:
    """SIGKILL to a process of this machine that is still there; it reaches a stopped one as well."""
    if state(where) in ("running", "stopped"):
        with suppress(OSError):
            os.kill(_parts(where)[1], signal.SIGKILL)


def _parts(where: str) -> tuple[str, int, str]:
    machine, number, began = where.split() if where else ("", "0", "")
    return machine, int(number), began


def _stat(number: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` after the name: state first, the start time is the 20th."""
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
