"""Verdicts on disk, by attack and chunk: what a killed evaluation goes on from, and what others use again."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import redoubt
from redoubt.errors import UserError
from redoubt.runs.files import atomic, cannot_write, read_arrays
from redoubt.runs.identity import digest
from redoubt.training.distributed import ranks

#: How adversarial examples may be saved: as they are, or rounded to 8 bits.
FORMATS = ("float32", "uint8")
#: Of how many test images what became of them is always kept, to be looked at.
SHOWN = 8


@dataclass(frozen=True)
class Outcome:
    """What one attack did to one chunk.

    Args:
        right: Whether each example is still classified correctly, bool [B].
        outside: How many examples it moved out of the ball, which therefore count as not moved.
        seconds: What it took.
    """

    right: np.ndarray
    outside: int = 0
    seconds: float = 0.0


class Kept:
    """One file per attack, one line per chunk; a line that a kill has torn is as if it were not there.

    An attack is found again by everything that decides its verdicts, whatever suite asked for it.

    Args:
        folder: Where the files are.
        common: What decides the verdicts of every attack: weights, test examples, chunk, seed.
        save: None, ``float32`` or ``uint8``: also keep the examples. Rounded ones are scored as they are kept, so
            their verdicts are others.
    """

    def __init__(self, folder: Path, common: Mapping[str, Any], save: str | None = None) -> None:
        if save is not None and save not in FORMATS:
            raise UserError(f"evaluation.save={save!r} is not known: take {', '.join(FORMATS)} or null")
        self.folder, self.save = folder, save
        self.common = {**common, "numerics": redoubt.NUMERICS, "rounded": True if save == "uint8" else None}
        self.seen: dict[str, dict[tuple[int, int], Outcome]] = {}

    def file(self, name: str, decisive: Any) -> Path:
        """The file of an attack, without its ending: ``<name>-<hash>``."""
        return self.folder / f"{name}-{digest({**self.common, 'name': name, 'attack': decisive})}"

    def find(self, file: Path, chunk: int, n: int) -> Outcome | None:
        """The outcome of a chunk of n examples, if it is there (and the examples are, where they are to be saved)."""
        if file.name not in self.seen:
            self.seen[file.name] = _read(file)
        missing = self.save and not file.name.startswith("natural-") and not examples_file(file, chunk, n).is_file()
        return None if missing else self.seen[file.name].get((chunk, n))

    def keep(
        self,
        file: Path,
        chunk: int,
        outcome: Outcome,
        adv: np.ndarray | None = None,
        shown: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Adds a chunk's outcome; the examples first, so that the line says that they are there.

        Args:
            file: What `file` gave.
            chunk: Its number.
            outcome: What is kept.
            adv: The examples, where they are to be saved.
            shown: ``adv`` uint8 and ``predicted`` of the first ``SHOWN`` examples of the test split.
        """
        if adv is not None:
            with atomic(examples_file(file, chunk, len(outcome.right))) as temporary:
                np.save(temporary, adv, allow_pickle=False)
        if shown is not None:
            with atomic(shown_file(file)) as temporary:
                np.savez_compressed(temporary, allow_pickle=False, **shown)
        packed = np.packbits(outcome.right).tobytes().hex()
        line = {"chunk": chunk, "n": len(outcome.right), "right": packed, "outside": outcome.outside}
        line["seconds"] = round(outcome.seconds, 3)
        line["crc"] = crc_of(line)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = _lines(file, ranks()[0])
            with open(path, "a+b") as opened:
                torn = opened.tell() > 0 and not _ends_well(opened)
                opened.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            raise cannot_write(file, error) from error
        self.seen.setdefault(file.name, {})[chunk, len(outcome.right)] = outcome


def examples_file(file: Path, chunk: int, n: int) -> Path:
    """Where the examples [n, 3, H, W] of an attack on a chunk are."""
    return file / f"{chunk:05d}-{n}.npy"


def shown_file(file: Path) -> Path:
    """Where what became of the first few test images is."""
    return file.with_name(f"{file.name}.shown.npz")


def shown_of(file: Path) -> dict[str, np.ndarray]:
    """What is there: the images as ``""``, their predicted classes as ``/predicted``; nothing where it is damaged."""
    try:
        found = read_arrays(shown_file(file))
        images, predicted = found["adv"], found["predicted"]
    except (UserError, KeyError):
        return {}
    ours = images.dtype == np.uint8 and images.ndim == 4 and predicted.shape == images.shape[:1]
    return {"": images, "/predicted": predicted} if ours else {}


def _lines(file: Path, rank: int) -> Path:
    """Each process appends to a file of its own."""
    return file.with_name(f"{file.name}.{rank}.jsonl")


def crc_of(line: Mapping[str, Any]) -> int:
    """Tells what a disk or a hand has changed: it is as if it were not there."""
    return zlib.crc32(json.dumps(line, sort_keys=True).encode())


def _ends_well(opened: Any) -> bool:
    opened.seek(-1, os.SEEK_END)
    return bool(opened.read(1) == b"\n")


def _read(file: Path) -> dict[tuple[int, int], Outcome]:
    found: dict[tuple[int, int], Outcome] = {}
    for path in sorted(file.parent.glob(f"{file.name}.*.jsonl")) if file.parent.is_dir() else ():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
                if line.pop("crc") != crc_of(line):
                    continue
                bits = np.unpackbits(np.frombuffer(bytes.fromhex(line["right"]), np.uint8))
                right = bits[: line["n"]].astype(bool)
                if len(right) == line["n"]:
                    found[int(line["chunk"]), len(right)] = Outcome(right, int(line["outside"]), float(line["seconds"]))
            except (ValueError, KeyError, TypeError, AttributeError):  # torn by a kill
                continue
    return found
