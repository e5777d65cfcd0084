"""What ``redoubt reproduce`` is asked for: which rows of which table, how far, with which words of ``train``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from redoubt.errors import UserError, did_you_mean
from redoubt.reporting.cells import WITH_EXPERIMENTS, Cell, known, none_of_ours
from redoubt.reporting.match import composed
from redoubt.reporting.published import Published, Row, find
from redoubt.sweeps import judges
from redoubt.units import as_number, seeds_of

KEYS = ("table", "rows", "seeds", "max_minutes", "audit", "autoattack", "to")
#: What the table says; of another choice it would be no reproduction.
FIXED = ("experiment", "defense", "base", "seed", "attack", "sweep", "run", "checkpoint", "rescore")
#: What an evaluation of a finished run may be told.
_OF_EVALUATION = ("paths.", "trainer", "data.root", "data.source", "data.verify", "data.limit_test", "logger")

Words = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One row with one seed: a run, its evaluations, its audit.

    Args:
        row: Name of the experiment, or what stands for it.
        seed: Of the run.
        training: Words of ``redoubt train`` that make the run.
        evaluations: Words that say by which attacks it is judged; the cheap first answer first.
        audit: Words of ``redoubt audit`` beside the run; None: there is none.
        place: Further words of it, that say where the images are and what computes.
    """

    row: str
    seed: int
    training: Words
    evaluations: tuple[Words, ...]
    audit: Words | None
    place: Words


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        table: The published one.
        rows: Of it, by name, each with its cell.
        seeds: How many: 0, 1, ...
        minutes: After so many the command ends by itself; None: when all is done.
        audit, autoattack: Whether they are wanted.
        to: Markdown file for the result, or None.
        words: What is said beside: words of ``redoubt train`` and ``audit.*``.
    """

    table: Published
    rows: Mapping[str, tuple[Row, Cell]]
    seeds: int
    minutes: float | None
    audit: bool
    autoattack: bool
    to: str | None
    words: Words

    def tasks(self) -> list[Task]:
        """One seed of every row, then the next seed."""
        return [self._task(name, found, seed) for seed in range(self.seeds) for name, (_, found) in self.rows.items()]

    def _task(self, name: str, found: Cell, seed: int) -> Task:
        said = [word for word in self.words if not word.startswith("audit.")]
        own, given = _of_cell(found, said), [word for word in said if not judges(word)]
        judged = [word for word in (*own, *said) if judges(word) and not word.startswith("attack=")]
        training = (*(word for word in own if not judges(word)), f"seed={seed}", *given)
        evaluations = tuple((*suite, *judged) for suite in self._suites(found.suite))
        audits = (*evaluations[-1], *(word for word in self.words if word.startswith("audit.")))
        place = tuple(word for word in given if word.startswith(_OF_EVALUATION))
        return Task(name, seed, training, evaluations, audits if self.audit else None, place)

    def _suites(self, suite: str) -> list[Words]:
        """The paper's suite without AutoAttack, then AutoAttack: by the whole suite where it has it."""
        if "autoattack" not in composed(f"attack={suite}").attack.attacks:
            return [(f"attack={suite}",), *([("attack=autoattack",)] if self.autoattack else [])]
        return [
            (f"attack={suite}", "~attack.attacks.autoattack"),
            *([(f"attack={suite}",)] if self.autoattack else []),
        ]


def _of_cell(found: Cell, said: Sequence[str]) -> list[str]:
    """The words of a row, as far as the command line does not replace them."""
    keys = {_key(word) for word in said}
    words = [word for word in found.words() if _key(word) not in keys]
    if "schedule=fast" in said:
        words += [word for word in _shortened(found) if _key(word) not in keys]
    if "model" not in keys:
        return words
    if found.experiment is None:  # what it sets is of the published net
        return [word for word in words if not word.startswith("model.")]
    return [*words, *(f"~{key}" for key in found.settings if key.startswith("model."))]


def _shortened(found: Cell) -> list[str]:
    """What makes the short schedule one of a row: no longer than the published, and plain epochs in proportion."""
    published, short = composed(*found.words()), composed("schedule=fast")
    whole = int(published.trainer.max_epochs)
    epochs = min(whole, int(short.trainer.max_epochs))
    plain = int(published.defense.get("warmup_epochs") or 0)
    return [f"trainer.max_epochs={epochs}", *([f"defense.warmup_epochs={plain * epochs // whole}"] if plain else [])]


def request(arguments: Sequence[str]) -> Request:
    """What a command line asks for.

    Raises:
        UserError: No such table, row or key, or a value that is none.
    """
    own: dict[str, str] = {}
    words = []
    for word in arguments:
        key, equals, text = word.partition("=")
        if key in KEYS and equals:
            own[key] = text
        else:
            _check(word)
            words.append(word)
    if not own.get("table"):
        raise UserError(f"table is missing: reproduce wants table=, one of {', '.join(WITH_EXPERIMENTS)}")
    table = find(own["table"])
    minutes = own.get("max_minutes")
    return Request(
        table=table,
        rows=_rows(table, own.get("rows")),
        seeds=seeds_of(own.get("seeds", "1")),
        minutes=None if minutes in (None, "null") else _minutes(str(minutes)),
        audit=_flag(own, "audit"),
        autoattack=_flag(own, "autoattack"),
        to=own.get("to") or None,
        words=tuple(words),
    )


def _check(word: str) -> None:
    key = _key(word)
    if "=" not in word and not word.startswith("~"):
        raise UserError(
            f"reproduce: {word!r} is no key=value{did_you_mean(key, KEYS)}; further keys are those of train"
        )
    if key == "trainer.fast_dev_run":
        raise UserError("trainer.fast_dev_run stores nothing: for a short run take trainer.max_epochs=1")
    if key == "plan":
        raise UserError("plan is not of reproduce: redoubt report plan table=... lists runs, commands and hours")
    if key in FIXED or key.startswith(("sweep.", "hydra")):
        raise UserError(f"{key}: the table says what it is, leave it out; {', '.join(KEYS)} are the command's own keys")


def _key(word: str) -> str:
    return word.lstrip("+~").split("=", 1)[0]


def _minutes(text: str) -> float:
    minutes = as_number(text, "max_minutes")
    if minutes <= 0:
        raise UserError(f"max_minutes={text} must be above 0")
    return minutes


def _flag(own: Mapping[str, str], key: str) -> bool:
    try:
        value = yaml.safe_load(own.get(key, "true"))
    except yaml.YAMLError:
        value = None
    if not isinstance(value, bool):
        raise UserError(f"{key}={own[key]} must be true or false")
    return value


def _rows(table: Published, wanted: str | None) -> dict[str, tuple[Row, Cell]]:
    """The rows that a pattern, or one of a list in brackets, is found in; all that are cells of ours where None."""
    rows = {name: (row, found) for name, row, found in known(table)}
    if not rows:
        raise none_of_ours(table.id)
    if wanted is None:
        return rows
    listed = wanted[1:-1].split(",") if wanted.startswith("[") and wanted.endswith("]") else [wanted]
    chosen = {name for pattern in listed for name in _fitting(pattern.strip(), table, rows)}
    return {name: found for name, found in rows.items() if name in chosen}


def _fitting(pattern: str, table: Published, names: Iterable[str]) -> list[str]:
    try:
        found = [name for name in names if pattern and re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"rows={pattern} is no regular expression: {error}; write \\ before [, ( and *") from error
    if not found:
        raise UserError(f"rows={pattern}: no row of {table.id} is named so{did_you_mean(pattern, names)}")
    return found
