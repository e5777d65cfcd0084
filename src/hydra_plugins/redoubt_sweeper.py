"""The sweeper of ``redoubt train -m``: each distinct cell once, with all its evaluations, and only what is missing.

It stands here because Hydra takes sweepers from nowhere else.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from redoubt import config, launched, sweeps
from redoubt.errors import UserError
from redoubt.runs.identity import digest, plain
from redoubt.schema import TRAIN, checked
from redoubt.secrets import redacted
from redoubt.sweeps import Sweep, decides, judges

log = logging.getLogger("redoubt")


class GridSweeper(BasicSweeper):
    """The product of all swept values, of each of ``sweep.cases`` where a sweep file lists some.

    Values of ``attack`` and ``evaluation`` keys are taken together: they make several evaluations of one cell. Cells
    that are done are left out, and those that another process works on are passed over: started twice, on one machine
    or on many that share ``paths.outputs``, two processes share the work.
    """

    kind = "grid"

    def sweep(self, arguments: list[str]) -> Any:
        """Runs what is missing of the sweep."""
        sweep = self.open(arguments)
        cells, evaluations = expand(self.words(arguments), self.section.cases or [""])
        evaluations = self.judged(evaluations)
        self.check([*cells, *([*cells[0], *evaluation] for evaluation in evaluations)])
        if self.tentative:
            assert self.launcher is not None
            return [job.return_value for job in self.launcher.launch([[*c, *evaluations[0]] for c in cells], 0)]
        words = dict(zip(sweep.add(cells, evaluations), cells, strict=True))
        sweeps.current[:] = [(sweep, list(words))]
        done: set[str] = set()  # by this start, or given up
        later: set[str] = set()  # needs a run that another process trains; or its worker died
        while batch := self.next(sweep, words, evaluations, done | later) or self.next(sweep, words, evaluations, done):
            wait = bool(later & set(batch))
            for key in batch:
                shown = " ".join(redacted(own(words[key], cells)))
                log.info("cell %d of %d: %s", list(words).index(key) + 1, len(words), shown)
            begun = self.launch(sweep, {k: [*words[k], f"sweep.wait={wait}"] for k in batch}, evaluations, len(done))
            again = {k for k in begun - later if sweep.record(k)["state"] in ("missing", "interrupted")}
            later |= again
            done |= begun - again
        return None

    def next(
        self, sweep: Sweep, words: Mapping[str, list[str]], evaluations: list[list[str]], apart: set[str]
    ) -> list[str]:
        """The cells to launch now: those that are left and free; for one process only the first of them."""
        left = (k for k in words if k not in apart and not sweep.done(k, evaluations) and sweep.free(k))
        if isinstance(self.launcher, BasicLauncher):  # the next one is chosen when this one is done: others are at work
            return list(itertools.islice(left, 1))
        return list(left)

    @property
    def tentative(self) -> bool:
        """Whether nothing is trained for good, so that nothing is noted."""
        assert self.config is not None
        return bool(self.config.plan or self.config.trainer.fast_dev_run)

    @property
    def section(self) -> Any:
        """``sweep`` of the config."""
        assert self.config is not None
        return OmegaConf.create(checked(plain(self.config.sweep), TRAIN["sweep"], "sweep."))

    def words(self, arguments: Sequence[str]) -> list[str]:
        """The sweep file's words, then the command line's, which win."""
        return [*(f"{key}={value}" for key, value in self.params.items()), *arguments]

    def judged(self, evaluations: list[list[str]]) -> list[list[str]]:
        """The sweep file's evaluations where the words name none."""
        if self.section.evaluations is None or evaluations != [[]]:
            return evaluations
        return [[str(word) for word in evaluation] for evaluation in self.section.evaluations]

    def open(self, arguments: Sequence[str]) -> Sweep:
        """The sweep's folder: ``sweep.name``, which a sweep file gives, or a hash of the command line.

        Raises:
            UserError: The name is no file name, or torchrun or srun started several of this process.
        """
        assert self.config is not None
        if launched.several():
            raise UserError(
                "-m starts its own processes: start it once, without torchrun or srun, and give trainer.devices for "
                "the processes of a cell"
            )
        name = self.section.name
        if name is None:
            name = f"{self.kind}-{digest({'arguments': sorted(filter(decides, arguments))})[:6]}"
        if not re.fullmatch(r"\w[\w.+-]*", str(name)):
            raise UserError(f"sweep.name={name} must be a file name of letters, digits and . _ + -")
        return Sweep(Path(self.config.paths.outputs) / "sweeps" / str(name))

    def launch(
        self, sweep: Sweep, cells: Mapping[str, Sequence[str]], evaluations: Sequence[Sequence[str]], first: int
    ) -> set[str]:
        """Hands cells to the launcher.

        Args:
            sweep: Where they are noted.
            cells: {key: words}.
            evaluations: Of each of them.
            first: Number of the first job.

        Returns:
            Keys of the cells that were begun.
        """
        assert self.launcher is not None
        more = [*evaluations[0], f"sweep.name={sweep.name}", f"sweep.evaluations={_quoted(evaluations)}"]
        before = {key: sweep.record(key) for key in cells}
        try:
            alone = isinstance(self.launcher, BasicLauncher)
            with nullcontext() if alone else launched.workers_end_too(sweep, cells):
                jobs = self.launcher.launch([[*words, *more] for words in cells.values()], initial_job_idx=first)
            for job in jobs:
                _ = job.return_value  # raises what a worker could not report itself
            return set(cells)
        except Exception as error:  # a worker was killed, and the others with it
            begun = {key for key in cells if sweep.record(key) != before[key]}
            if not begun and type(error).__module__.split(".")[0] in ("builtins", "submitit"):  # as without Slurm
                what = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"hydra/launcher: {what}; look through hydra.launcher.*") from error
            if not begun:
                raise
            log.warning("the launcher broke off (%s): what it left is launched again", type(error).__name__)
            return begun

    def check(self, cells: Collection[Sequence[str]]) -> None:
        """Compose as many cells as show each word once, so that a wrong one ends the sweep before it begins.

        Raises:
            UserError: A value is wrong; the line names the first cell that has it.
        """
        seen: set[str] = set()
        for cell in cells:
            if not set(cell) - seen:
                continue
            try:
                config.ready(cell, config.root)
            except UserError as error:
                shown = " ".join(redacted(own(cell, cells))) if len(cells) > 1 else ""
                raise UserError(f"cell {shown}: {error}" if shown else str(error)) from error
            seen |= set(cell)


# Hydra's default sweeper is the one named basic. Another one, chosen in train.yaml, would win over a sweep file's.
_DEFAULT = {"_target_": f"{__name__}.GridSweeper", "max_batch_size": None, "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=_DEFAULT, provider="redoubt")


def expand(arguments: Sequence[str], cases: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Cells and evaluations, each a list of overrides.

    Args:
        arguments: The command line's words, with their lists of values.
        cases: Further words, separated by blanks; each case makes cells of its own.
    """
    cells: list[list[str]] = []
    evaluations: list[list[str]] = []
    for case in cases:
        overrides = parsed([*case.split(), *arguments])
        evaluations += product(o for k, o in overrides.items() if judges(k))
        cells += product(o for k, o in overrides.items() if not judges(k))
    return _distinct(cells), _distinct(evaluations)


def parsed(words: Sequence[str]) -> dict[str, Override]:
    """Overrides by key, of which the last counts."""
    return {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(list(words))}


def product(overrides: Iterable[Override]) -> list[list[str]]:
    """Every combination of the swept values, as words."""
    choices = []
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices.append([f"{key}={override.get_value_element_as_str()}"])
        elif override.is_discrete_sweep():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
            if not choices[-1]:
                raise UserError(f"{override.input_line}: it has no value: give at least one")
        else:
            raise UserError(f"{key}: an interval has no list of values: take hydra/sweeper=optuna, or range(0,10)")
    return [list(cell) for cell in itertools.product(*choices)]


def own(cell: Sequence[str], cells: Collection[Sequence[str]]) -> list[str]:
    """The words that set a cell apart from the others."""
    common = set.intersection(*map(set, cells)) if len(cells) > 1 else set()
    return [word for word in cell if word not in common]


def _distinct(lists: list[list[str]]) -> list[list[str]]:
    return list({tuple(sorted(words)): words for words in reversed(lists)}.values())[::-1]


def _quoted(evaluations: Sequence[Sequence[str]]) -> str:
    """As a value of Hydra's grammar."""
    escaped = ([word.replace("\\", "\\\\").replace('"', '\\"') for word in words] for words in evaluations)
    return "[" + ",".join("[" + ",".join(f'"{word}"' for word in words) + "]" for words in escaped) + "]"
