"""The sweeper of ``redoubt train -m``: each distinct cell once, with all its evaluations, and only what is missing.

It stands here because Hydra takes sweepers from nowhere else.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from redoubt import sweeps
from redoubt.errors import UserError
from redoubt.runs.identity import digest
from redoubt.sweeps import Sweep, decides, judges

log = logging.getLogger("redoubt")


class GridSweeper(BasicSweeper):
    """The product of all swept values, of each of ``sweep.cases`` where a sweep file lists some.

    Values of ``attack`` and ``evaluation`` keys are taken together: they make several evaluations of one cell. Cells
    that are done are left out, and those that another process works on are passed over: started twice, on one machine
    or on many that share ``paths.outputs``, two processes share the work.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Runs what is missing of the sweep."""
        assert self.config is not None
        assert self.launcher is not None
        section = self.config.sweep
        cells, evaluations = expand([f"{k}={v}" for k, v in self.params.items()] + arguments, section.cases or [""])
        if section.evaluations is not None and evaluations == [[]]:
            evaluations = [[str(word) for word in evaluation] for evaluation in section.evaluations]
        sweep = Sweep(Path(self.config.paths.outputs) / "sweeps" / self.name(arguments))
        keys = sweep.add(cells, evaluations)
        sweeps.current[:] = [sweep]
        words = dict(zip(keys, cells, strict=True))
        self.check(words.values())
        first = evaluations[0]
        more = [*first, f"sweep.name={sweep.name}", f"sweep.evaluations={_quoted(evaluations)}"]
        common = set.intersection(*map(set, cells)) if len(cells) > 1 else set()
        tried: set[str] = set()
        returns: list[Any] = []
        while batch := [k for k in words if k not in tried and not sweep.done(k, evaluations) and not sweep.locked(k)]:
            if isinstance(self.launcher, BasicLauncher):
                del batch[1:]  # the next one is chosen when this one is done: others may be at work
            for key in batch:
                own = " ".join(w for w in words[key] if w not in common)
                log.info("cell %d of %d: %s", list(words).index(key) + 1, len(words), own)
            launched = self.launcher.launch([[*words[k], *more] for k in batch], initial_job_idx=len(tried))
            returns += [job.return_value for job in launched]  # raises what a worker could not report itself
            tried |= set(batch)
        return returns

    def check(self, cells: Iterable[Sequence[str]]) -> None:
        """Composes as many cells as show each word once, so that a misspelt one ends the sweep before it begins."""
        seen: set[str] = set()
        for cell in cells:
            if set(cell) - seen:
                self.validate_batch_is_legal([cell])
                seen |= set(cell)

    def name(self, arguments: Sequence[str]) -> str:
        """The sweep's folder: ``sweep.name``, or the sweep file's or ``grid`` with a hash of the command line."""
        assert self.config is not None
        if self.config.sweep.name is not None:
            return str(self.config.sweep.name)
        return f"grid-{digest({'arguments': sorted(filter(decides, arguments))})[:6]}"


def expand(arguments: Sequence[str], cases: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """Cells and evaluations, each a list of overrides.

    Args:
        arguments: The command line's words, with their lists of values.
        cases: Further words, separated by blanks; each case makes cells of its own.
    """
    parser = OverridesParser.create()
    cells: list[list[str]] = []
    evaluations: list[list[str]] = []
    for case in cases:
        overrides = {o.get_key_element(): o for o in parser.parse_overrides([*case.split(), *arguments])}
        evaluations += _product({k: o for k, o in overrides.items() if judges(k)})
        cells += _product({k: o for k, o in overrides.items() if not judges(k)})
    return _distinct(cells), _distinct(evaluations)


def _product(overrides: dict[str, Override]) -> list[list[str]]:
    choices = []
    for key, override in overrides.items():
        if not override.is_sweep_override():
            choices.append([f"{key}={override.get_value_element_as_str()}"])
        elif override.is_discrete_sweep():
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            raise UserError(f"{key}: an interval has no list of values: take hydra/sweeper=optuna, or range(0,10)")
    return [list(cell) for cell in itertools.product(*choices)]


def _distinct(lists: list[list[str]]) -> list[list[str]]:
    return list({tuple(sorted(words)): words for words in reversed(lists)}.values())[::-1]


def _quoted(evaluations: Sequence[Sequence[str]]) -> str:
    """As a value of Hydra's grammar."""
    escaped = ([word.replace("\\", "\\\\").replace('"', '\\"') for word in words] for words in evaluations)
    return "[" + ",".join("[" + ",".join(f'"{word}"' for word in words) + "]" for words in escaped) + "]"
