"""Reads anybody's weights without running anything that their file holds."""

from __future__ import annotations

import warnings
import zipfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redoubt.errors import UserError

#: The tensors of a file: those of each of its dictionaries, under the keys that lead to it.
Tables = dict[tuple[str, ...], dict[str, Tensor]]


def read_tables(path: Path) -> Tables:
    """Reads all tensors of a .safetensors file or a torch file (with `weights_only=True`, never otherwise).

    Args:
        path: The file.

    Returns:
        Each dictionary that holds tensors by name, at any depth; what is not a tensor is left out.

    Raises:
        UserError: The file is missing, empty, truncated, no torch file, or holds no such dictionary.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: give the path of a .pt, .pth, .ckpt or .safetensors file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty: copy or download it again")
    tables = _tables(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path))
    if not tables:
        raise UserError(
            f"{path}: holds no state_dict (a mapping of names to tensors, at the top or in a dictionary or list): "
            "save model.state_dict() to it"
        )
    return tables


def _tables(content: Any) -> Tables:
    found: Tables = {}
    left: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()  # a file may refer to one dictionary often, or to itself
    while left:
        place, value = left.popleft()
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(inner, Tensor) and isinstance(key, str):
                found.setdefault(place, {})[key] = inner
            else:
                left.append(((*place, str(key)), inner))
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # its own exception class, OSError, or whatever a foreign header leads to
        raise UserError(f"{path}: no safetensors file, or cut short ({_brief(error)}): copy it again") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch_content(path)
    except NotPlain as error:
        raise UserError(
            f"{path}: {error}, which is not read because it could run code: where it was made, save "
            "model.state_dict() alone"
        ) from error
    except Exception as error:
        raise UserError(f"{path}: no torch file, or cut short ({_brief(error)}): copy it again") from error


class NotPlain(Exception):
    """The file is no torch file, or could run code."""


def torch_content(path: Path, crc: bool = True) -> Any:
    """What a torch file holds, on the CPU: tensors and plain containers, nothing in it is executed.

    Args:
        path: The file.
        crc: Whether to compare its bits with its own sums first; needless where another sum was right.

    Raises:
        NotPlain: It holds more than that.
        Exception: Any of a dozen kinds (UnpicklingError, EOFError, OSError, KeyError), where it is damaged or foreign.
    """
    try:
        if crc:
            _check_crc(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which end in an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise NotPlain("no torch file, or one that holds more than tensors and plain containers") from error
        raise


def _check_crc(path: Path) -> None:
    """Raises where bits are not those that were written, at which `torch.load` does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            if (odd := parts.testzip()) is not None:
                raise zipfile.BadZipFile(f"{odd} is damaged")


def _brief(error: Exception) -> str:
    """An exception's first sentence."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:100]
