"""Loads anybody's weights into a backbone: all of them, or none."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from redoubt.errors import UserError
from redoubt.nets.base import Backbone, Normalize
from redoubt.nets.reading import Tables, read_tables
from redoubt.runs.files import split_choice

log = logging.getLogger(__name__)

__all__ = ["OtherNet", "load_backbone", "load_weights"]

#: Dictionaries of which the first is meant where a file holds the net in several of them.
_FIRST = ("state_dict", "model_state_dict", "model", "net")
#: What training scripts, wrappers and compilers put before the names of the net itself.
_WRAPPERS = {*_FIRST, "model_state", "module", "network", "backbone", "student", "_orig_mod"}
_AVERAGED = re.compile(r"(?<![a-z])(ema|average|averaged|averaging|avg|swa|polyak|shadow)(?![a-z])")
_TEACHER = re.compile(r"(?<![a-z])(teacher|target|momentum|revision)(?![a-z])")
#: The last part of the name of a normalisation's constant: what both names of a pair share, and which of them it is.
_CONSTANT = re.compile(r"(?!running_)(|_|(?:[A-Za-z0-9]+_)+)(?:(means?|mu)|(stds?|stdev|sigma))(_?)")

#: Copies of a net in one file, and parts of a name, that are looked at: a hostile file could have any number.
_MOST = 64


class OtherNet(UserError):
    """Weights of another net.

    Attributes:
        keys: The net's or the file's parameters that do not fit.
    """

    def __init__(self, message: str, keys: Iterable[str]) -> None:
        super().__init__(message)
        self.keys = set(keys)


@dataclass(frozen=True)
class _Copy:
    """A place in a file under which parameters of the net are.

    Attributes:
        place: Keys of the dictionary.
        prefix: What stands before the net's own names in it.
        weights: The net's own names to tensors; what is none of the net's is among them under its own name.
        known: How many of the net's parameters are there.
        fits: Whether all of them are, in their shapes.
    """

    place: tuple[str, ...]
    prefix: str
    weights: Mapping[str, Tensor]
    known: int
    fits: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.place, *self.prefix.split(".")[:-1])

    @property
    def name(self) -> str:
        """As it is named after ``::``."""
        return ".".join(self.parts)

    @property
    def rank(self) -> tuple[int, int]:
        """Which copy is meant where nothing is chosen, smallest first: raw ones before averaged ones and teachers."""
        words = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", part).lower() for part in self.parts]
        if any(_TEACHER.search(word) for word in words):
            kind = 3
        elif any(_AVERAGED.search(word) for word in words):
            kind = 2
        else:
            kind = int(any(part not in _WRAPPERS and not part.isdecimal() for part in self.parts))
        return kind, _FIRST.index(self.place[0]) if self.place and self.place[0] in _FIRST else len(_FIRST)


def load_backbone(net: nn.Module, path: str | Path, without: str = "") -> None:
    """Loads a file's weights into a net, in place: every parameter and buffer, or, at an error, none.

    The weights are found by their structure: where in the file, below which dictionaries and prefixes, the net's own
    names are complete. Where that is at several places, the log says which was taken and which else there are.

    Tolerated are: other repositories' names (`net.key_aliases`), parameters that no forward uses
    (`net.key_dead`), BatchNorm counters that old files lack, and a normalisation's mean and std. The last become the
    net's first layer, because weights that were trained behind a normalisation are wrong without it. What else lies
    beside the net is left out, with a line in the log.

    Args:
        net: The net to fill, a Backbone or any other.
        path: A file that `read_tables` reads; ``file::name`` takes what is under a name in it.
        without: Dotted name of a submodule that keeps its own weights.

    Raises:
        UserError: The file cannot be read, or is of another net.
    """
    file, wanted = split_choice(path)
    tables = read_tables(file)
    names = net if isinstance(net, Backbone) else Backbone  # a net of the user's own has no other names
    own = {k.removeprefix(names.key_prefix): v for k, v in net.state_dict().items()}
    kept = {k: v for k, v in own.items() if without and f"{names.key_prefix}{k}".startswith(f"{without}.")}
    copies = _copies(tables, own, kept, names)
    copy = _chosen(copies, wanted, file)
    found = dict(copy.weights)
    for other in copies:  # another whole net inside, as the average that a wrapper keeps
        if other.fits and other.place == copy.place and len(other.prefix) > len(copy.prefix):
            inner = other.prefix.removeprefix(copy.prefix)
            found = {k: v for k, v in found.items() if k in own or not k.startswith(inner)}
    normalize, constants = _normalisation(tables, copy, own, file)
    for place, key in constants:
        if place == copy.place:
            found.pop(key.removeprefix(copy.prefix), None)
    for key, value in found.items():
        if not _dense(value):
            raise UserError(
                f"{file}: {copy.prefix}{key} is no dense tensor of real numbers: save model.state_dict() of the plain "
                "net"
            )
    found |= kept
    for key in own.keys() - found.keys():
        if _counter(key):  # absent before torch 0.4.1, unused at a fixed momentum
            found[key] = own[key]
    if normalize is not None and not isinstance(net, Backbone):
        raise UserError(f"{file}: holds a normalisation ({normalize}), which this net has no layer for: add one to it")
    try:
        load_weights(net, {names.key_prefix + k: v for k, v in found.items()}, str(file))
    except OtherNet as error:
        seen = [".".join((*place, key.split(".")[0])) for place, table in tables.items() for key in table]
        if copy.known and not copy.parts:
            raise
        best = f"this is under {copy.name}, where most of its names are" if copy.known else "none of its names is there"
        raise OtherNet(f"{error}; {best}; the file has {_few(seen)}", error.keys) from error
    if normalize is not None:
        weight = next(net.parameters())
        net.normalize = normalize.to(weight.device, weight.dtype)
        log.info("%s holds a normalisation; it is now the net's first layer: %s", file, normalize)
    _tell(file, copy, copies, tables, constants)


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
        raise OtherNet(
            f"{origin}: of another net: {'; '.join([*differences.values()][:3])} ({len(differences)} keys differ, the "
            f"net has {len(own)}): choose the model, its options and the data (number of classes) of those weights",
            differences,
        )
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise UserError(
                f"{origin}: {key} is {value.dtype}, the net wants {own[key].dtype}: save its state_dict anew"
            )
        if not value.to(own[key].dtype).isfinite().all():
            raise UserError(f"{origin}: {key} holds values that are not finite: take weights from before that")
    net.load_state_dict(state)


def _copies(
    tables: Tables, own: Mapping[str, Tensor], kept: Mapping[str, Tensor], names: Backbone | type[Backbone]
) -> list[_Copy]:
    """All places of a file under which parameters of the net are, those with most of them first."""
    hits: Counter[tuple[tuple[str, ...], str]] = Counter()
    for place, table in tables.items():
        hits[place, ""] += 0
        for key in table:
            for prefix, rest in _splits(key):
                if rest in own or _renamed(rest, names.key_aliases) in own:
                    hits[place, prefix] += 1
    needed = {k: v for k, v in own.items() if k not in kept and not _counter(k)}
    copies: list[_Copy] = []
    for (place, prefix), count in hits.most_common(_MOST):
        if copies and count < len(needed) and count < copies[0].known:
            break  # not even the best of those that are incomplete
        under = {k.removeprefix(prefix): v for k, v in tables[place].items() if k.startswith(prefix)}
        found = _rename(under, own, names.key_aliases)
        found = {k: v for k, v in found.items() if k not in kept and (k in own or not re.search(names.key_dead, k))}
        fits = all(k in found and found[k].shape == v.shape for k, v in needed.items())
        copies.append(_Copy(place, prefix, found, count, fits))
    return copies


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Every prefix of a name that ends in a dot, the empty one first, and what follows it."""
    yield "", key
    for match in itertools.islice(re.finditer(r"\.", key), _MOST):
        yield key[: match.end()], key[match.end() :]


def _chosen(copies: list[_Copy], wanted: str, file: Path) -> _Copy:
    """The copy that is loaded: the one that was asked for, or by `_Copy.rank`; where none fits, the nearest to it."""
    if wanted:
        fitting = [c for c in copies if c.name == wanted] or [c for c in copies if _within(wanted, c.name) and c.known]
        fitting = _distinct([c for c in fitting if c.fits]) or fitting[:1]
        if len(fitting) != 1:
            there = _few([c.name for c in copies if c.known and c.parts]) or "no name at all"
            said = "names several sets of weights" if fitting else "is no name of weights in it"
            raise UserError(f"{file}::{wanted}: {wanted} {said}: there are {there}")
        return fitting[0]
    whole = _distinct([c for c in copies if c.fits])
    if not whole:
        return min(copies, key=lambda c: (-c.known, c.rank))
    if len(whole) > 1 and whole[0].rank == whole[1].rank:
        there = _few([f"{file}::{c.name}" for c in whole])
        raise UserError(f"{file}: holds weights of the net {len(whole)} times: give one of {there}")
    if whole[0].rank[0] == 3:
        raise UserError(
            f"{file}: only {whole[0].name!r} holds all weights of the net, by its name another net's teacher or target:"
            f" give {file}::{whole[0].name} if it is meant"
        )
    return whole[0]


def _within(wanted: str, name: str) -> bool:
    """Whether dotted parts stand in a dotted name, one after the other."""
    return f".{wanted}." in f".{name}."


def _distinct(copies: list[_Copy]) -> list[_Copy]:
    """By rank, without those that are equal to one before: wrappers often hold one net under two names."""
    found: list[_Copy] = []
    for copy in sorted(copies, key=lambda c: c.rank):
        if not any(_equal(copy.weights, other.weights) for other in found):
            found.append(copy)
    return found


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(v is b[k] or (_dense(v) and _dense(b[k]) and torch.equal(v, b[k])) for k, v in a.items() if k in b)


def _normalisation(
    tables: Tables, copy: _Copy, own: Mapping[str, Tensor], file: Path
) -> tuple[Normalize | None, list[tuple[tuple[str, ...], str]]]:
    """The mean and std that lie nearest to a copy, and where in the file these are."""
    pairs: dict[tuple[tuple[str, ...], tuple[str, ...], str], dict[str, tuple[str, Tensor]]] = {}
    for place, table in tables.items():
        for key, value in table.items():
            parent, _, leaf = key.rpartition(".")
            match = _CONSTANT.fullmatch(leaf)
            mine = place == copy.place and key.startswith(copy.prefix) and key.removeprefix(copy.prefix) in own
            if match and not mine and value.numel() in (1, 3) and _dense(value):
                parts = (*place, *(parent.split(".") if parent else ()))
                kind = "mean" if match[2] else "std"
                pairs.setdefault((place, parts, match[1] + match[4]), {})[kind] = key, value
    whole = {where: pair for where, pair in pairs.items() if len(pair) == 2}
    for (place, _, _), pair in pairs.items():
        (key, value), *_ = pair.values()
        beside = place == copy.place and not key.startswith(copy.prefix)
        if len(pair) == 1 and value.numel() == 3 and beside and not whole:
            raise UserError(f"{file}: {key} is half of a normalisation, of which mean and std are needed: save both")
    nearest = max((_common(parts, copy.parts) for _, parts, _ in whole), default=0)
    whole = {where: pair for where, pair in whole.items() if _common(where[1], copy.parts) == nearest}
    constants = [(place, key) for (place, _, _), pair in whole.items() for key, _ in pair.values()]
    values = [[pair[kind][1].flatten().tolist() for kind in ("mean", "std")] for pair in whole.values()]
    if not values:
        return None, []
    if any(value != values[0] for value in values):
        raise UserError(f"{file}: holds several normalisations, {_few([key for _, key in constants])}: save the net's")
    try:
        return Normalize(*values[0]), constants
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """How many parts two places share from the top."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


def _tell(
    file: Path, copy: _Copy, copies: list[_Copy], tables: Tables, constants: list[tuple[tuple[str, ...], str]]
) -> None:
    """One line about what else a file holds: other weights of the same net, and what was left out."""
    others = [c for c in _distinct([copy, *(c for c in copies if c.fits and c is not copy)]) if c is not copy]
    others = [c for c in others if not _equal(c.weights, copy.weights)]
    whole = [c for c in copies if c.fits]
    left: Counter[str] = Counter()
    for place, table in tables.items():
        for key in table:
            known = any(place == c.place and key.startswith(c.prefix) for c in whole) or (place, key) in constants
            if not known:
                left[place[0] if place and place[0] not in _FIRST else key.rpartition(".")[0] or key] += 1
    said = []
    if others:
        kind = " (averaged)" if copy.rank[0] == 2 else " (raw)" if any(c.rank[0] == 2 for c in others) else ""
        said.append(f"takes {copy.name or 'those at the top'}{kind}")
        for c in others[:3]:
            averaged = " (averaged)" if c.rank[0] == 2 else ""
            said.append(f"{file}::{c.name} would take {c.name}{averaged}" if c.parts else "others lie at the top")
    if left:
        said.append(f"leaves out what is none of the net's: {_few([*left])} ({left.total()} tensors)")
    if said:
        log.info("%s: %s", file, "; ".join(said))


def _few(names: Iterable[str]) -> str:
    found = list(dict.fromkeys(names))
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _dense(value: Tensor) -> bool:
    return not (value.is_meta or value.is_complex() or value.is_quantized) and value.layout is torch.strided


def _counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _renamed(key: str, aliases: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in aliases:
        key = re.sub(pattern, replacement, key)
    return key


def _rename(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], aliases: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    """Other repositories' names to the net's; a name that the net or the file already has stays as it is."""
    renamed = {}
    for key, value in found.items():
        new = _renamed(key, aliases)
        renamed[new if key not in own and new in own and new not in found else key] = value
    return renamed


def _differences(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """What keeps `found` from being the net's state, by key, other shapes first: they tell the most."""
    shapes = {
        k: f"{k} is {list(found[k].shape)}, the net wants {list(own[k].shape)}"
        for k in own
        if k in found and found[k].shape != own[k].shape
    }
    missing = {k: f"{k} is missing" for k in own if k not in found}
    return shapes | missing | {k: f"{k} is none of the net's" for k in found if k not in own}
