"""Ranks that watch each other through the process group's store and end together.

Each rank beats and looks twice a second, from threads of its own: no collective, nothing that a step waits for. A rank
is lost for the others where it

- says so itself: it failed, and with which error; or it was told to stop;
- is gone: its process on the same machine is not there any more;
- is silent: no beat for `SILENT` seconds, as of a stopped process or a machine that is off (a process of the same
  machine that runs is given ten times as long: it may be inside of a library that lets no thread run);
- hangs: it is within a training step, and the others have waited for it in a collective of that step for `WAITING`
  seconds and for `STEPS` times the longest step so far. It is their waiting that is timed, not its step: steps that
  get longer get longer for all. Outside of a step nothing is timed, nor while torch.compile is at work: validation,
  evaluation, saving and decoding take as long as they take.

Who finds that first writes it into the store, and the same verdict holds for all. Each main thread then has `GRACE`
seconds to end by itself, because its connection broke or it saw the same mistake; after that it is interrupted. What is
silent or hangs is killed after `KILL` seconds where it can be reached. Whoever is not out after `END` seconds, because
its main thread is inside of a library, is ended from here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from redoubt.errors import UserError
from redoubt.training import processes
from redoubt.training.stopping import Stopped, requests

ROUND = 0.5
SILENT, WAITING, STEPS = 15.0, 15.0, 5
GRACE, KILL, END = 3.0, 5.0, 10.0

VERDICT, ASKED, BEATS = "redoubt/verdict", "redoubt/asked", "redoubt/beat"
GOES_ON = "the same command goes on from what was saved"


class Lost(UserError):
    """Another rank failed, or this one as the others see it."""


class Verdict(NamedTuple):
    """Why all end: ``kind`` is failed, stopped, gone, silent or hangs; ``rank`` is -1 for torchrun's own process."""

    kind: str
    rank: int
    text: str
    code: int = 2


class Beat(NamedTuple):
    """What a rank says of itself twice a second.

    Args:
        number: Of the beat.
        entered: How many collectives of training steps it has begun.
        begun: The training step that it has begun last.
        state: ``step``; ``busy`` with anything else; ``left``.
    """

    number: int
    entered: int
    begun: int
    state: str


class Vigil:
    """One rank's watch over the others.

    Args:
        store: The process group's store.
        rank: This rank.
        places: Of all ranks: see `redoubt.training.processes`.
        elsewhere: Whether the store is kept by torchrun's process, and not by rank 0.
    """

    def __init__(self, store: Any, rank: int, places: Sequence[str], elsewhere: bool) -> None:
        self.store, self.rank, self.places = store, rank, places
        self.keeper = -1 if elsewhere else 0
        self.entered, self.begun, self.state, self.compiling = 0, 0, "busy", False
        self.longest, self._since = 0.0, 0.0
        self.verdict: Verdict | None = None
        self.last_words: Callable[[Verdict], None] | None = None
        self.ending = False  # the main thread has the reason already
        self.beats = [Beat(0, 0, 0, "busy")] * len(places)
        # The threads' calls must not wait for the main thread's: a connection each.
        self._line = store.clone()
        self._suspect: Verdict | None = None
        self._rounds, self._cut_off, self._over = 0, False, threading.Event()
        self._unheard = dict.fromkeys(range(-1, len(places)), 0.0)
        self._awaited, self._gone = [0.0] * len(places), [0] * len(places)
        self._tell(store)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._watch)]

    def start(self) -> None:
        """Begins; every rank has beaten once."""
        requests.interruption = self.interruption
        for thread in self._threads:
            thread.start()

    # ---- what the main thread tells ------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """A training step begins."""
        self.begun, self._since, self.state = step, time.monotonic(), "step"

    def end(self) -> None:
        """It is done, or broken off."""
        if self.state == "step":
            self.longest = max(self.longest, time.monotonic() - self._since)
        self.state = "busy"

    def report(self, error: BaseException) -> None:
        """Tells the others why this rank ends."""
        self.end_here()
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 0
            own = Verdict("stopped", self.rank, f"rank {self.rank} was told to stop", code)
        elif isinstance(error, KeyboardInterrupt):
            own = Verdict("stopped", self.rank, f"rank {self.rank} was stopped by the keyboard", 130)
        else:
            said = (str(error).splitlines() or [""])[0]
            said = said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
            own = Verdict("failed", self.rank, f"rank {self.rank} failed: {said}")
        self.accuse(own)

    def suspect(self, verdict: Verdict) -> None:
        """What another thread found."""
        self._suspect = self._suspect or verdict

    def accuse(self, verdict: Verdict) -> None:
        """Writes a verdict where there is none yet."""
        if self.verdict is None:
            with suppress(RuntimeError):
                found = self.store.compare_set(VERDICT, "", json.dumps(verdict))
                self.verdict = Verdict(*json.loads(found))

    # ---- what the main thread asks -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises the verdict, where there is one."""
        if self.verdict is not None and not self.ending:
            raise self._error(self.verdict, None)

    def interruption(self, frame: Any) -> BaseException | None:
        """For a signal handler: what to raise, where there is a verdict."""
        if self.verdict is None or self.ending:
            return None
        return self._error(self.verdict, frame)

    def cause(self, error: BaseException, seconds: float = 5.0) -> BaseException:
        """What is behind a broken connection: the verdict, for which it waits a little."""
        until = time.monotonic() + seconds
        while self.verdict is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.verdict is None or self.ending:
            return error
        return self._error(self.verdict, None)

    def end_here(self) -> None:
        """The main thread knows why it ends: it is not interrupted any more."""
        self.ending = True
        requests.leave()

    def _error(self, verdict: Verdict, frame: Any) -> BaseException:
        self.end_here()
        if verdict.kind == "stopped":
            return Stopped(verdict.code, agreed=True)
        return Lost(verdict.text + (f" ({_where(frame)})" if verdict.rank == self.rank and frame else ""))

    def leave(self) -> None:
        """This rank is done. The rank that keeps the store goes last."""
        self.state = "left"
        self._over.set()
        requests.interruption = None
        for thread in self._threads:  # else an older beat might come after the last one
            if thread.is_alive():
                thread.join(2 * ROUND)
        if self.verdict is not None and self.verdict.kind == "silent" and self.verdict.rank >= 0:
            processes.kill(self.places[self.verdict.rank])  # it could not even hear of it
        with suppress(RuntimeError):
            self._tell(self.store)
            until = time.monotonic() + END
            while self.keeper == self.rank and time.monotonic() < until and not self._alone():
                time.sleep(0.02)

    def _alone(self) -> bool:
        others = [r for r in range(len(self.places)) if r != self.rank]
        beats = dict(zip(others, self.store.multi_get([f"{BEATS}/{r}" for r in others]), strict=True))
        return all(b"left" in beats[r] or processes.state(self.places[r]) == "gone" for r in others)

    # ---- the threads ---------------------------------------------------------------------------------------------

    def _tell(self, line: Any) -> None:
        number = self.beats[self.rank].number + 1
        own = Beat(number, self.entered, self.begun, "busy" if self.compiling and self.state == "step" else self.state)
        self.beats[self.rank] = own
        line.set(f"{BEATS}/{self.rank}", json.dumps(own))

    def _talk(self) -> None:
        """All calls to the store: any of them may never come back, where its keeper is stopped."""
        keys = [f"{BEATS}/{r}" for r in range(len(self.places))]
        while not self._over.wait(ROUND):
            try:
                self._tell(self._line)
                self.beats = [Beat(*json.loads(beat)) for beat in self._line.multi_get(keys)]
                if requests.pending is not None:
                    self._line.compare_set(ASKED, "", str(requests.pending))
                elif self._line.check([ASKED]):
                    requests.hear(int(self._line.get(ASKED)))
                if self._suspect is not None:
                    self._line.compare_set(VERDICT, "", json.dumps(self._suspect))
                if self.verdict is None and self._line.check([VERDICT]):
                    self.verdict = Verdict(*json.loads(self._line.get(VERDICT)))
            except RuntimeError:  # its keeper has gone
                self._cut_off = True
                return
            self._rounds += 1

    def _watch(self) -> None:
        seen, before, missed, since = -1, self.beats, 0, 0.0
        poked = killed = False
        while not self._over.wait(ROUND):
            missed = missed + 1 if seen == self._rounds else 0
            earlier, seen, before = before, self._rounds, self.beats
            if self.verdict is None:
                if self._suspect is None:
                    self._suspect = self._judge(missed == 0, earlier)
                elif self._cut_off or missed > 2:  # it cannot be told: each finds the same by itself
                    self.verdict = self._suspect
                continue
            since = since or time.monotonic()
            passed, verdict = time.monotonic() - since, self.verdict
            at_once = verdict.rank == self.rank or (verdict.kind == "stopped" and not requests.deferring)
            if not poked and not self.ending and requests.listening and (at_once or passed >= GRACE):
                poked = True
                # A signal, for it ends a sleep as well; its handler raises the verdict.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not killed and passed >= KILL and verdict.kind in ("silent", "hangs") and verdict.rank != self.rank:
                killed = True
                processes.kill(self.places[max(verdict.rank, 0)])
            if passed >= END:
                self._exit(verdict)

    def _judge(self, heard: bool, before: Sequence[Beat]) -> Verdict | None:
        """What this round shows of the others.

        Args:
            heard: Whether the store has answered since the last round.
            before: The beats as they were then.
        """
        if self._cut_off:
            return self._of_keeper("gone")
        self._unheard[-1] = 0.0 if heard else self._unheard[-1] + ROUND
        if self._unheard[-1] >= SILENT:
            return self._of_keeper("silent")
        if not heard:
            return None
        ahead = max(beat.entered for beat in self.beats)
        for r, (beat, old) in enumerate(zip(self.beats, before, strict=True)):
            if r == self.rank or beat.state == "left":
                continue
            state = processes.state(self.places[r])
            self._gone[r] = self._gone[r] + 1 if state == "gone" else 0
            if self._gone[r] > 2:  # its last beat, that it leaves, is read by now
                return Verdict("gone", r, f"rank {r} is gone: it was killed or it crashed; {GOES_ON}")
            self._unheard[r] = 0.0 if beat.number != old.number else self._unheard[r] + ROUND
            if self._unheard[r] >= SILENT * (10 if state == "running" else 1):
                return self._silent(r)
            waits = beat.state == "step" and beat.entered < ahead and beat[1:] == old[1:]
            self._awaited[r] = self._awaited[r] + ROUND if waits else 0.0
            if self._awaited[r] >= max(WAITING, STEPS * self.longest):
                waited = f"the others have waited {self._awaited[r]:.0f} s for it"
                return Verdict("hangs", r, f"rank {r} hangs in step {beat.begun}: {waited}; {GOES_ON}")
        return None

    def _silent(self, rank: int) -> Verdict:
        text = f"rank {rank} does not answer: its process is stopped, or its machine is off"
        return Verdict("silent", rank, f"{text}; {GOES_ON}")

    def _of_keeper(self, kind: str) -> Verdict | None:
        if self.keeper < 0:
            text = "torchrun's process does not answer" if kind == "silent" else "torchrun's process is gone"
            return Verdict(kind, -1, f"{text}; {GOES_ON}")
        if self.beats[0].state == "left":
            self._over.set()
            return None
        if kind == "silent":
            return self._silent(0)
        off = "" if processes.state(self.places[0]) == "gone" else ", or its machine is off"
        return Verdict("gone", 0, f"rank 0 is gone: it was killed or it crashed{off}; {GOES_ON}")

    def _exit(self, verdict: Verdict) -> None:
        """Ends this process, whose main thread is inside of a library."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        own = f" ({_where(frame)})" if verdict.rank == self.rank and frame is not None else ""
        print(f"redoubt: {verdict.text}{own}", file=sys.stderr, flush=True)
        if self.last_words is not None:
            with suppress(Exception):
                self.last_words(verdict)
        os._exit(verdict.code)


def _where(frame: Any) -> str:
    return f"at {frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
