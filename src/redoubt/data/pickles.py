"""Reads pickles of arrays and containers without running anything that they hold: a file may be a stranger's."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np


def load_arrays(raw: bytes) -> dict[str, Any]:
    """The dictionary in a pickle, its keys as text.

    Raises:
        Exception: It holds something else than arrays, numbers, texts and containers, or is no pickle; of a dozen
            kinds.
    """
    for opcode, argument, _ in pickletools.genops(raw):
        # one of these with a large number would fill the memory: a table of so many places, an array of so many bytes
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "BYTEARRAY8") and not 0 <= _place(argument) <= len(raw):
            raise pickle.UnpicklingError(f"{opcode.name} is out of its range")
    # bytes, not latin1: a string as long as the images would be made and encoded again
    found = _Arrays(io.BytesIO(raw), encoding="bytes").load()
    if not isinstance(found, dict):
        raise pickle.UnpicklingError(f"it is a {type(found).__name__}, not a dictionary")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def _place(argument: Any) -> int:
    return argument if isinstance(argument, int) else len(argument)


class _Arrays(pickle.Unpickler):
    """Knows the few names that a pickled array needs; what they stand for here can only make arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which is no array")
        return _KNOWN[module, name]


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What numpy pickles an array as: an empty one, whose state follows."""
    if kind is not _ARRAY or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it is no array as numpy writes it")
    return np.empty(0, np.int8)


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it contains a text in {encoding}")
    return text.encode("latin1")


#: Stands for `numpy.ndarray`, which a pickle could call.
_ARRAY = "numpy.ndarray"
_KNOWN: dict[tuple[str, str], str | Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): _ARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encoded,
}
