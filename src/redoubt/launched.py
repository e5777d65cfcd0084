"""Whether torchrun or Slurm started this process as one of several; no torch."""

from __future__ import annotations

import os


def slurm_tasks() -> int:
    """Tasks of the Slurm step that this process is in; 0 outside of Slurm."""
    if "SLURM_PROCID" not in os.environ:
        return 0
    return int(os.environ.get("SLURM_NTASKS", 0))


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
