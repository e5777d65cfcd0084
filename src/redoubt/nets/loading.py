"""Loads anybody's weights into a backbone: all of them, or none."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from redoubt.errors import UserError
from redoubt.nets.base import Backbone, Normalize
from redoubt.nets.reading import NORMALISATION, read_state_dict

log = logging.getLogger(__name__)

__all__ = ["load_backbone", "load_weights", "read_state_dict"]


def load_backbone(net: nn.Module, path: str | Path) -> None:
    """Loads a file's weights into a net, in place: every parameter and buffer, or, at an error, none.

    Tolerated are: other repositories' names (`net.key_aliases`), parameters that no forward uses
    (`net.key_dead`), BatchNorm counters that old files lack, and normalisation buffers. The last become the
    net's first layer, because weights that were trained behind a normalisation are wrong without it.

    Args:
        net: The net to fill, a Backbone or any other.
        path: A file that `read_state_dict` reads.

    Raises:
        UserError: The file cannot be read, or is of another net.
    """
    names = net if isinstance(net, Backbone) else Backbone  # a net of the user's own has no other names
    own = {k.removeprefix(names.key_prefix): v for k, v in net.state_dict().items()}
    found = _rename(read_state_dict(path), own, names.key_aliases)
    found = {k: v for k, v in found.items() if k in own or not re.search(names.key_dead, k)}
    normalize, found = _normalisation(found, own, Path(path)) if isinstance(net, Backbone) else (None, found)
    for key in own.keys() - found.keys():
        if key.endswith(".num_batches_tracked"):  # absent before torch 0.4.1, unused at a fixed momentum
            found[key] = own[key]
    load_weights(net, {names.key_prefix + k: v for k, v in found.items()}, str(path))
    if normalize is not None:
        weight = next(net.parameters())
        net.normalize = normalize.to(weight.device, weight.dtype)
        log.info("%s holds a normalisation; it is now the net's first layer: %s", path, normalize)


def load_weights(net: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state_dict whole, or, at an error, not at all.

    Args:
        net: The net to fill.
        state: Its state_dict.
        origin: Where it comes from, for the message.

    Raises:
        UserError: It is another net's; the first keys that differ are named.
    """
    own = net.state_dict()
    differences = _differences(state, own)
    if differences:
        raise UserError(
            f"{origin}: of another net: {'; '.join(differences[:3])} ({len(differences)} keys differ, the net has "
            f"{len(own)}): choose the model, its options and the data (number of classes) of those weights"
        )
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(
                f"{origin}: {key} is {value.dtype}, the net wants {own[key].dtype}: save its state_dict anew"
            )
        if not value.to(own[key].dtype).isfinite().all():
            raise UserError(f"{origin}: {key} holds values that are not finite: take weights from before that")
    net.load_state_dict(state)


def _rename(
    found: dict[str, Tensor], own: dict[str, Tensor], aliases: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    """Other repositories' names to the net's; a name that the net or the file already has stays as it is."""
    renamed = {}
    for key, value in found.items():
        new = key
        for pattern, replacement in aliases:
            new = re.sub(pattern, replacement, new)
        renamed[new if key not in own and new in own and new not in found else key] = value
    return renamed


def _normalisation(
    found: dict[str, Tensor], own: dict[str, Tensor], path: Path
) -> tuple[Normalize | None, dict[str, Tensor]]:
    """Takes a file's mean and std out of its weights; one without the other stays, and counts as foreign."""
    mean, std, rest = None, None, {}
    for key, value in found.items():
        match = None if key in own or value.numel() not in (1, 3) else NORMALISATION.search(key)
        if match is None:
            rest[key] = value
        elif match[1]:
            mean = value
        else:
            std = value
    if mean is None or std is None:
        return None, found
    try:
        return Normalize(mean.flatten().tolist(), std.flatten().tolist()), rest
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _differences(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` from being the net's state, other shapes first: they tell the most."""
    shapes = [
        f"{k} is {list(found[k].shape)}, the net wants {list(own[k].shape)}"
        for k in own
        if k in found and found[k].shape != own[k].shape
    ]
    missing = [f"{k} is missing" for k in own if k not in found]
    return shapes + missing + [f"{k} is none of the net's" for k in found if k not in own]
