"""How much processor time an unmarked test may take: above ``LIMIT`` it is warned of, at three times that it fails.

Counted are the test's own process, forks of `tests.processes`, and fresh processes but for what Python may take to
import torch in each; from the start of its fixtures to its own end. Machines differ: the limit is scaled by how long a
fixed piece of work takes here.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
import warnings
from collections.abc import Generator

import pytest

#: Seconds on the machine on which `_work` takes ``REFERENCE``.
LIMIT = 5.0
REFERENCE = 0.0125
#: What a fresh process takes there to import torch and lightning.
IMPORTS = 5.5

_started = [0]


def _count(event: str, arguments: tuple[object, ...]) -> None:
    if event == "subprocess.Popen" and "python" in os.path.basename(str(arguments[0])):
        _started[0] += 1


sys.addaudithook(_count)


def _work() -> float:
    began = time.process_time()
    words = [str(i * i) for i in range(20_000)]
    " ".join(sorted(words, key=lambda word: (word[::-1], word))).split()
    return time.process_time() - began


@functools.cache
def scale() -> float:
    """How much slower than the reference this machine is now; at least 1."""
    return max(1.0, min(_work() for _ in range(3)) / REFERENCE)


def spent() -> tuple[float, float, float]:
    """Seconds of processor time so far of this process, of forks and of fresh processes that have ended."""
    own, fresh = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    server = sys.modules.get("tests.processes")
    forks = server.processor_time() if server is not None else 0.0
    return own.ru_utime + own.ru_stime, float(forks), fresh.ru_utime + fresh.ru_stime


def judge(own: float, forks: float, fresh: float, by_forks: int = 0, started: int = 0) -> tuple[bool, str] | None:
    """Whether a test that took so long fails, and why; None where it is within its limit.

    Args:
        own, forks, fresh: See `spent`.
        by_forks, started: How many fresh processes of Python the forks and the test itself have started.
    """
    factor = scale()
    imports = IMPORTS * factor
    seconds = own + max(0.0, forks - by_forks * imports) + max(0.0, fresh - started * imports)
    if seconds <= LIMIT * factor:
        return None
    why = (
        f"{seconds:.1f} s of processor time, {LIMIT * factor:.1f} s are an unmarked test's limit on this machine: "
        "make it smaller, or mark it slow"
    )
    return seconds > 3 * LIMIT * factor, why


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    scale()
    item.stash[_BEGAN] = (spent(), _started[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if item.get_closest_marker("slow") is None:
        began, started = item.stash[_BEGAN]
        by_forks = sum(mark.args[0] for mark in item.iter_markers("imports"))
        seconds = [now - then for now, then in zip(spent(), began, strict=True)]
        found = judge(*seconds, by_forks=by_forks, started=_started[0] - started)
        if found is not None:
            fails, why = found
            if fails:
                pytest.fail(why, pytrace=False)
            warnings.warn(f"{item.nodeid}: {why}", stacklevel=1)
    return result


_BEGAN = pytest.StashKey[tuple[tuple[float, float, float], int]]()
