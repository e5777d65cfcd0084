"""Redoubt: adversarially robust image classifiers as one grid of model x defense x base x data x attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import; `redoubt --help` must not wait for it
    from redoubt.runs.loading import load as load

__version__ = "0.1.0"

#: Part of every run's identity. Raise it when a change of code alters what a finished run would hold.
NUMERICS = 2

#: Part of the identity of what it altered: 1, limits of images were class-balanced and the validation split was taken
#: from all images; 2, limits are in proportion to the classes and the validation split is of what is used.
SUBSETS = 2


def __getattr__(name: str) -> Any:
    if name == "load":
        from redoubt.runs.loading import load

        return load
    raise AttributeError(f"module 'redoubt' has no attribute {name!r}")
