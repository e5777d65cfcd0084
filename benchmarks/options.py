"""The keys of ``bench.py``."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from redoubt.errors import UserError, did_you_mean
from redoubt.runs.files import must_be_writable
from redoubt.training.compiling import MODES
from redoubt.training.trainer import cpu_has_bf16

PARTS = ("craft", "step", "libraries", "data", "suite", "start", "memory", "scaling", "profile")
BOTH = ("float32", "bf16")
#: The framework's keys without a dot that may be given, and those by which it would do other work than its peers.
FRAMEWORK = ("channels_last", "fold")
OURS_ALONE = ("inner.stages", "inner.keep_best", "threat.norm", "awp.", "ema.", "optimizer.nesterov", "optimizer.clip",
              "trainer.accumulate", "trainer.precision")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        parts: Of ``PARTS``.
        nets: (model, batch); every part but craft takes the first.
        cells: Of ``redoubt``'s grid, see ``benchmarks.ours.CELLS``.
        pairs, seconds: Rounds of a comparison, and the time after which no other round begins.
        end: When ``step``, then measured last, has to be done, by ``time.monotonic``; None: as ``seconds`` say.
        precisions: Of ``BOTH``, in which the framework's step is measured.
        threads: Of torch.
        device: cpu or cuda.
        compile: How the framework's nets are compiled: its ``compile=``; None: not at all.
        workers: Of the authors' DataLoader.
        suites: Of ``redoubt``'s evaluation, or single attacks of fsr_suite.
        images, eps: Images that a suite attacks, and by how much.
        run: Folder of a run whose net and test images a suite takes, in place of a fresh net and noise.
        to, markdown: Files to write.
        overrides: Keys of the framework's config, for all cells.
    """

    parts: tuple[str, ...] = PARTS
    nets: tuple[tuple[str, int], ...] = (("resnet18", 32),)
    cells: tuple[str, ...] = ("at", "trades", "mart", "fsr", "afd", "cure")
    pairs: int = 5
    seconds: float = 60.0
    end: float | None = None
    precisions: tuple[str, ...] = BOTH
    threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    compile: str | None = None
    workers: int = 2
    suites: tuple[str, ...] = ("fsr_suite",)
    images: int = 32
    eps: str = "0.15/255"
    run: str | None = None
    to: str | None = None
    markdown: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.nets[0][0]

    @property
    def batch(self) -> int:
        return self.nets[0][1]

    @property
    def trainer(self) -> str:
        """The framework's group for the device."""
        return "gpu" if self.device.type == "cuda" else "cpu"


def read(words: Sequence[str], cells: Sequence[str]) -> Options:
    """Options of ``key=value`` words; one with a dot, as ``inner.steps=5``, or of `FRAMEWORK` is the framework's.

    Args:
        words: Of the command line.
        cells: The names that ``cells=`` may have.

    Raises:
        UserError: An unknown key or a value out of range.
    """
    known = ("parts", "model", "batch", "cells", "pairs", "seconds", "minutes", "precision", "threads", "device",
             "compile", "workers", "suites", "images", "eps", "run", "to", "markdown")  # fmt: skip
    said: dict[str, str] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word!r}: write key=value")
        if "." in key or key in FRAMEWORK:
            if key.startswith(OURS_ALONE):
                raise UserError(f"{key}: the peers know no such thing and would do other work; leave it out")
            overrides.append(word)
        elif key not in known:
            raise UserError(f"{key} is not a key of bench.py{did_you_mean(key, known)}")
        else:
            said[key] = value
    found: dict[str, Any] = {"overrides": tuple(overrides), "nets": _nets(said)}
    for key, most in (("parts", PARTS), ("cells", cells), ("suites", None)):
        if key in said:
            found[key] = tuple(said[key].split(","))
            for name in found[key] if most else ():
                if name not in most:
                    raise UserError(f"{key}={name} is not known{did_you_mean(name, most)}")
    for key in ("pairs", "threads", "workers", "images"):
        if key in said:
            found[key] = _whole(key, said[key], 0 if key == "workers" else 1)
    if "seconds" in said:
        found["seconds"] = float(_whole("seconds", said["seconds"], 0))
    if "minutes" in said:
        found["end"] = time.monotonic() + 60 * _whole("minutes", said["minutes"], 1)
    if "compile" in said:
        how = _choice("compile", said["compile"], ("true", "false", *MODES[1:]))
        found["compile"] = None if how == "false" else how
    found |= {key: said[key] for key in ("eps", "run", "to", "markdown") if key in said}
    for key in ("to", "markdown"):
        if key in said:
            must_be_writable(said[key])
    device = torch.device(_choice("device", said.get("device", "cpu"), ("cpu", "cuda")))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: no GPU is visible to torch here; take device=cpu")
    found |= {"device": device, "precisions": _precisions(said.get("precision", "both"), device)}
    return Options(**found)


def _nets(said: dict[str, str]) -> tuple[tuple[str, int], ...]:
    models, batches = said.get("model", "resnet18").split(","), said.get("batch", "32").split(",")
    if len(batches) not in (1, len(models)):
        raise UserError(f"batch={said['batch']}: give one batch size, or one for each of {len(models)} models")
    sizes = [_whole("batch", b, 2) for b in batches]
    return tuple(zip(models, sizes * len(models) if len(sizes) == 1 else sizes, strict=True))


def _precisions(word: str, device: torch.device) -> tuple[str, ...]:
    chosen = BOTH if _choice("precision", word, (*BOTH, "both")) == "both" else (word,)
    if device.type == "cpu" and not cpu_has_bf16() and "bf16" in chosen:
        if word == "bf16":
            raise UserError("precision=bf16: this processor has no bfloat16 arithmetic; take precision=float32")
        return ("float32",)
    return chosen


def _choice(key: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise UserError(f"{key}={value} is not known: take {', '.join(known)}")
    return value


def _whole(key: str, value: str, least: int) -> int:
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{key}={value} must be a whole number of at least {least}")
    return int(value)
