"""Reads anybody's weights without running anything that their file holds."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redoubt.errors import UserError

#: Under which keys training scripts put the weights, in the order of preference.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
#: What DataParallel, a LightningModule, wrappers and torch.compile put before every name.
PREFIXES = ("module.", "net.", "model.", "_orig_mod.")
#: A normalisation that a file carries, under whatever module: mean and std, or AutoAttack's mu and sigma.
NORMALISATION = re.compile(r"(?:^|\.)(?:(mean|mu)|(std|sigma))$")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads the weights from a .safetensors file or a torch file (with `weights_only=True`, never otherwise).

    Unwraps the usual containers, nested ones too, and strips the prefixes that all weights share.

    Args:
        path: The file.

    Returns:
        Parameter name to tensor, on the CPU.

    Raises:
        UserError: The file is missing, empty, truncated, no torch file, or holds no state_dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: give the path of a .pt, .pth, .ckpt or .safetensors file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty: copy or download it again")
    found = _unwrap(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path), path)
    for key, value in found.items():
        if value.is_meta or value.is_complex() or value.is_quantized or value.layout is not torch.strided:
            raise UserError(
                f"{path}: {key} is no dense tensor of real numbers: save model.state_dict() of the plain net"
            )
    return _strip(found)


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


def _unwrap(found: Any, path: Path) -> dict[str, Tensor]:
    """Descends through containers to the mapping of tensors."""
    while isinstance(found, Mapping):
        inside = [found[k] for k in CONTAINERS if isinstance(found.get(k), Mapping)]
        if inside:
            found = inside[0]
        elif found and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
            return dict(found)
        else:
            break
    raise UserError(
        f"{path}: holds no state_dict (a mapping of names to tensors, at the top or under "
        f"{', '.join(CONTAINERS)}): save model.state_dict() to it"
    )


def _strip(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes prefixes off for as long as all weights share one; a normalisation may stand beside them."""
    while True:
        weights = [k for k in found if not NORMALISATION.search(k)]
        shared = [p for p in PREFIXES if weights and all(k.startswith(p) for k in weights)]
        if not shared:
            return found
        found = {k.removeprefix(shared[0]): v for k, v in found.items()}
