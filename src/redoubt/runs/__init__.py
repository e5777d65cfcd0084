"""The run store: identity, files, status and locks of runs, and the commands over them."""

from redoubt.runs.store import Run, Store

__all__ = ["Run", "Store"]
