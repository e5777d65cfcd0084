"""Whether torchrun or Slurm started this process as one of several, and that none outlives the others; no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redoubt.sweeps import Sweep

# A broken connection is reported by us, in a line. Torch's own warnings have a C++ stack each; it reads this when it is
# imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

#: Seconds that workers have to save their place.
GRACE = 60.0


def slurm_tasks() -> int:
    """Tasks of the Slurm step that this process is in; 0 outside of Slurm."""
    if "SLURM_PROCID" not in os.environ:
        return 0
    return int(os.environ.get("SLURM_NTASKS", 0))


def slurm_job() -> str:
    """The Slurm job that this process is in, as ``scontrol`` names it."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def started_by_launcher() -> bool:
    """Whether torchrun, Slurm or ourselves set the process's place already.

    A Slurm job of one task is no such place: it starts its further processes itself, as on any machine.
    """
    return "LOCAL_RANK" in os.environ or slurm_tasks() > 1


def several() -> bool:
    """Whether this process is one of several that were started alike."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or slurm_tasks() > 1


def first() -> bool:
    """Whether this process is the first of those."""
    rank = os.environ.get("RANK") or (os.environ["SLURM_PROCID"] if slurm_tasks() > 1 else 0)
    return int(rank) == 0


def end_with_parent(parent: int) -> None:
    """Ends this process soon after the one that started it: a kill of that one reaches none of its children.

    Where it is joined to the others by then, it ends by itself, and says why.

    Args:
        parent: The process that started this one, as that one says: it may be gone by now.
    """

    def see() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(10.0)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=see, daemon=True).start()


@contextmanager
def workers_end_too(sweep: Sweep, cells: Iterable[str]) -> Iterator[None]:
    """SIGTERM to this process reaches joblib's workers, which are no part of it: they save their place first."""

    def end(number: int, frame: Any) -> None:
        loky = sys.modules.get("joblib.externals.loky.reusable_executor")
        workers = list(getattr(getattr(loky, "_executor", None), "_processes", None) or ())
        _send(workers, signal.SIGTERM)
        until = time.monotonic() + GRACE
        while workers and time.monotonic() < until and any(not sweep.free(key) for key in cells):
            time.sleep(0.2)
        _send(workers, signal.SIGKILL)  # they would ask for the next cell
        os._exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _send(workers: Iterable[int], number: int) -> None:
    for worker in workers:
        with suppress(ProcessLookupError):
            os.kill(worker, number)
