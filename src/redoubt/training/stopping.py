"""Signals that ask a process to stop: it ends at once or, while it trains, once its place is saved."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redoubt.deadline import TimeUp
from redoubt.launched import slurm_job, slurm_tasks

#: What asks a process to stop. A job of Slurm's hears of its time limit by another one: see `requeue_signal`.
STOPPING = (signal.SIGTERM, signal.SIGINT)
#: Seconds in which a signal that comes again is the same one: torchrun hands on what the terminal sent already.
SAME_SIGNAL = 2.0


class Stopped(SystemExit):
    """The process was asked to stop; it saved its place first. The exit code is 128 and the signal's number.

    Args:
        code: The exit code.
        agreed: Whether every rank stops at this very place, so that none has to be told.
    """

    def __init__(self, code: int, *, agreed: bool = False) -> None:
        super().__init__(code)
        self.agreed = agreed


class Requests:
    """What this process was asked by signals (or by another rank), and whether it may end anywhere.

    Attributes:
        asked: The signal, until it is `heard` anew; None where there was none.
        deferring: Whether the work looks at ``asked`` by itself, at places where it can be taken up again.
        interruption: Another reason to end, that a signal handler is to raise: see `redoubt.training.vigil`.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.deferring = False
        self.interruption: Callable[[Any], BaseException | None] | None = None
        self._when, self._ending = 0.0, False
        self._before: dict[int, Any] = {}

    @property
    def listening(self) -> bool:
        """Whether SIGTERM comes here."""
        return signal.SIGTERM in self._before

    @property
    def pending(self) -> int | None:
        """``asked``, while the work looks at it."""
        return self.asked if self.deferring else None

    @contextmanager
    def heard(self, *numbers: int) -> Iterator[None]:
        """Inside, these signals end this process by `Stopped`."""
        if not self._before:
            self.asked, self._ending = None, False
        new = [n for n in numbers if n not in self._before]
        if threading.current_thread() is not threading.main_thread():
            new = []  # signals come to the main thread only
        self._before |= {number: signal.signal(number, self._handle) for number in new}
        try:
            yield
        finally:
            for number in new:
                signal.signal(number, self._before.pop(number))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, the first signal is only noted in ``asked``; one that comes later ends the process all the same."""
        with self.heard(*STOPPING):
            self.deferring = True
            try:
                yield
            finally:
                self.deferring = False

    def leave(self) -> None:
        """The process is on its way out: whatever comes now must not break off what it still writes."""
        self._ending = True

    def hear(self, number: int) -> None:
        """Notes a request that came another way than by a signal."""
        if self.deferring and self.asked is None:
            self.asked, self._when = number, time.monotonic()

    def _handle(self, number: int, frame: Any) -> None:
        if self.interruption is not None and (error := self.interruption(frame)) is not None:
            raise error
        if self._ending:
            return
        if self.deferring and (self.asked is None or time.monotonic() - self._when < SAME_SIGNAL):
            self.hear(number)
            return
        self.leave()
        raise Stopped(128 + number)


#: There is one process.
requests = Requests()


@contextmanager
def no_other_exit() -> Iterator[None]:
    """Inside, the process ends early only where it was asked to.

    Raises:
        KeyboardInterrupt: Lightning has made an exit of it.
        RuntimeError: Code that a run calls has called ``sys.exit()``, which would pass for a good end.
    """
    try:
        yield
    except (Stopped, TimeUp):
        raise
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise RuntimeError(f"sys.exit({ended.code!r}) was called by code that this run calls") from ended


def requeue_signal() -> int | None:
    """The signal on which Lightning's plugin for Slurm would queue the job again; None where it would not.

    Nor where somebody listens for it already, as submitit, which queues its jobs again itself.
    """
    if not slurm_tasks():
        return None
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    plugin = SLURMEnvironment() if SLURMEnvironment.detect() else None
    if plugin is None or not plugin.auto_requeue or plugin.requeue_signal is None:
        return None
    taken = signal.getsignal(plugin.requeue_signal) is not signal.SIG_DFL
    return None if taken else int(plugin.requeue_signal)


def requeue() -> None:
    """Queues this Slurm job again, as Lightning's plugin does, whose handler would save in the middle of a step."""
    try:
        subprocess.run(["scontrol", "requeue", slurm_job()], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"redoubt: the job is not queued again ({error}): submit the same command", file=sys.stderr, flush=True)
