"""Which rank is taken for lost, and which is only waited for: rounds of the watch over beats as they would come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from redoubt.errors import UserError
from redoubt.training import processes, vigil
from redoubt.training.stopping import Stopped, requests
from redoubt.training.vigil import Beat, Verdict, Vigil

ELSEWHERE = ["", "", ""]  # no process of this machine: only beats tell


class Store(dict[str, str]):
    """A process group's store without a process group."""

    def clone(self) -> Store:
        return self

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.setdefault(key, value).encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self[key].encode() for key in keys]


def watcher(places: list[str] = ELSEWHERE, **more: Any) -> Vigil:
    return Vigil(Store(), 0, places, more.get("elsewhere", False))


def rounds(watch: Vigil, seconds: float, *ranks: tuple[int, int, str], beating: bool = True) -> Verdict | None:
    """What the watch finds within some seconds in which the ranks say (entered, begun, state)."""
    for _ in range(int(seconds / vigil.ROUND)):
        before = watch.beats
        watch.beats = [Beat(old.number + beating, *new) for old, new in zip(before, ranks, strict=True)]
        found = watch._judge(True, before)
        if found is not None:
            return found
    return None


WAITS, IN_STEP = (8, 5, "step"), (7, 5, "step")


def test_a_rank_that_others_wait_for_in_a_step_hangs() -> None:
    watch = watcher()
    assert rounds(watch, vigil.WAITING, WAITS, WAITS, IN_STEP) is None  # the first round only sees it
    found = rounds(watch, 2 * vigil.ROUND, WAITS, WAITS, IN_STEP)
    assert found is not None
    assert (found.kind, found.rank) == ("hangs", 2)
    assert "rank 2 hangs in step 5: the others have waited 15 s for it" in found.text


@pytest.mark.parametrize(
    "ranks",
    [
        (IN_STEP, IN_STEP, IN_STEP),  # a long step of all
        (WAITS, WAITS, WAITS),  # in a collective, all of them
        (WAITS, WAITS, (7, 5, "busy")),  # saves, validates, decodes, compiles
        (WAITS, WAITS, (7, 5, "left")),
    ],
)
def test_what_is_no_hang(ranks: tuple[tuple[int, int, str], ...]) -> None:
    assert rounds(watcher(), 600, *ranks) is None


def test_a_rank_that_gets_on_does_not_hang() -> None:
    watch = watcher()
    for step in range(40):
        ahead, behind = (8 + step, 6 + step, "step"), (7 + step, 5 + step, "step")
        assert rounds(watch, 10, ahead, ahead, behind) is None


def test_long_steps_give_time() -> None:
    watch = watcher()
    watch.longest = 20.0
    assert rounds(watch, 99, WAITS, WAITS, IN_STEP) is None
    assert rounds(watch, 3, WAITS, WAITS, IN_STEP) is not None


def test_while_torch_compiles_a_rank_is_busy() -> None:
    watch = watcher()
    watch.begin(3)
    watch._tell(watch.store)
    assert watch.beats[0].state == "step"
    watch.compiling = True
    watch._tell(watch.store)
    assert watch.beats[0].state == "busy"
    watch.end()
    assert watch.longest > 0


def test_silence() -> None:
    watch = watcher()
    busy = (0, 0, "busy")
    assert rounds(watch, vigil.SILENT - 1, busy, busy, busy, beating=False) is None
    assert rounds(watch, 1, busy, busy, busy) is None
    found = rounds(watch, vigil.SILENT, busy, busy, busy, beating=False)
    assert found is not None
    assert (found.kind, found.rank) == ("silent", 1)


def test_who_keeps_the_store() -> None:
    for elsewhere, says in ((False, "rank 0 is gone"), (True, "torchrun's process is gone")):
        watch = Vigil(Store(), 1, ELSEWHERE, elsewhere)
        watch._cut_off = True
        found = watch._judge(False, watch.beats)
        assert found is not None
        assert says in found.text
    watch = Vigil(Store(), 1, ELSEWHERE, False)
    assert all(watch._judge(False, watch.beats) is None for _ in range(int(vigil.SILENT / vigil.ROUND) - 1))
    found = watch._judge(False, watch.beats)
    assert found is not None
    assert "rank 0 does not answer" in found.text
    watch._cut_off, watch.beats = True, [Beat(1, 0, 0, "left"), *watch.beats[1:]]
    assert watch._judge(False, watch.beats) is None  # it ended well, and the store with it


@pytest.fixture
def other() -> Iterator[subprocess.Popen[str]]:
    code = "from redoubt.training.processes import place; print(place(), flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


def test_a_process_of_this_machine(other: subprocess.Popen[str]) -> None:
    assert other.stdout is not None
    where = other.stdout.readline().strip()
    busy, watch = (0, 0, "busy"), watcher(["", where, ""])
    assert processes.state(where) == "running"
    # it may be inside of a library that lets no thread run
    assert rounds(watch, 2 * vigil.SILENT, *[busy] * 2, (0, 0, "left"), beating=False) is None
    os.kill(other.pid, signal.SIGSTOP)
    until = time.monotonic() + 10
    while processes.state(where) != "stopped" and time.monotonic() < until:
        time.sleep(0.01)
    found = rounds(watch, vigil.ROUND, *[busy] * 2, (0, 0, "left"), beating=False)
    assert found is not None
    assert "rank 1 does not answer" in found.text
    processes.kill(where)
    while processes.state(where) != "gone" and time.monotonic() < until:  # a zombie, nobody has asked for its code
        time.sleep(0.01)
    found = rounds(watcher(["", where, ""]), 10, *[busy] * 3)
    assert found is not None
    assert "rank 1 is gone" in found.text
    assert rounds(watcher(["", where, ""]), 10, busy, (0, 0, "left"), busy) is None
    machine, number, began = where.split()
    assert processes.state(f"another {number} {began}") == "unknown"
    assert processes.state(f"{machine} {os.getpid()} 1") == "gone"  # the number is another process's by now


def test_the_first_verdict_holds() -> None:
    store = Store()
    one, two = Vigil(store, 0, ELSEWHERE, False), Vigil(store, 1, ELSEWHERE, False)
    two.report(UserError("no such folder"))
    one.report(RuntimeError("something else"))
    assert one.verdict == two.verdict
    assert json.loads(store[vigil.VERDICT])[2] == "rank 1 failed: no such folder"
    three = Vigil(store, 2, ELSEWHERE, False)
    three.verdict = one.verdict
    with pytest.raises(vigil.Lost, match="rank 1 failed: no such folder"):
        three.check()
    three.check()  # said once
    four = Vigil(Store(), 0, ELSEWHERE, False)
    four.report(Stopped(143))
    four.ending = False
    with pytest.raises(Stopped) as stopped:
        four.check()
    assert stopped.value.code == 143


def test_requests() -> None:
    """At once; noted while the work looks; the same again is no second one, until it is late."""
    before = signal.getsignal(signal.SIGTERM)
    with requests.heard(signal.SIGTERM):
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert stopped.value.code == 143
        signal.raise_signal(signal.SIGTERM)  # already on its way out
    with requests.deferred():
        assert requests.pending is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert requests.pending == signal.SIGINT
        requests._when -= 10
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert requests.pending is None
    assert signal.getsignal(signal.SIGTERM) is before
