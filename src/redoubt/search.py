"""A search: a study of Optuna's in a database, whose trials are the cells of a sweep; no torch."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from redoubt.errors import UserError, did_you_mean
from redoubt.kinds import Kind, listed, optional, text, whole
from redoubt.runs.files import read_rows
from redoubt.runs.store import Run
from redoubt.sweeps import Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import Trial

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsgaii": "NSGAIISampler"}
PRUNERS = {"median": "MedianPruner", "halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner"}


class Search:
    """One study.

    Args:
        settings: ``hydra.sweeper`` of ``hydra/sweeper=optuna``.
        name: The sweep's.
        steps: ``validation.steps``: robust accuracy is the column ``val/pgd<steps>`` of metrics.csv.

    Raises:
        UserError: Optuna is not installed, or a setting means nothing.
    """

    def __init__(self, settings: Mapping[str, Any], name: str, steps: int) -> None:
        self.optuna = _optuna()
        self.settings, self.name = _checked(settings), str(settings["study"] or name)
        named = {"robust": f"val/pgd{steps}", "natural": "val/clean"}
        self.metrics = [named.get(str(o), str(o)) for o in settings["objective"]]
        known = [*named, *named.values(), "train/loss"]
        for metric in self.metrics:
            if not metric.startswith(("val/", "train/", "train_probe/")) and metric not in ("lr", "images_per_second"):
                raise UserError(f"hydra.sweeper.objective={metric} is not known{did_you_mean(metric, known)}")
        self.directions = list(settings["directions"] or ["maximize"] * len(self.metrics))
        if len(self.directions) != len(self.metrics) or set(self.directions) - {"maximize", "minimize"}:
            raise UserError("hydra.sweeper.directions must be maximize or minimize, one for each objective")
        self._sampler(0), self._pruner()  # what they refuse is said before there is a study

    def study(self, number: int = 0) -> Study:
        """The study as it stands in the database, made where there is none.

        Args:
            number: Of the trial to be asked for next: workers that share a seed must not draw the same values.
        """
        study = self.optuna.create_study(
            study_name=self.name,
            storage=_storage(str(self.settings["storage"])),
            sampler=self._sampler(number),
            pruner=self._pruner(),
            directions=self.directions,
            load_if_exists=True,
        )
        wanted = [f"{direction} {metric}" for direction, metric in zip(self.directions, self.metrics, strict=True)]
        if not study.get_trials(deepcopy=False):
            study.set_user_attr("objective", wanted)
        if study.user_attrs.get("objective", wanted) != wanted:
            was = ", ".join(study.user_attrs["objective"])
            raise UserError(f"study {self.name} was begun to {was}: give this one another sweep.name")
        return study

    def _sampler(self, number: int) -> Any:
        seed, options = self.settings["seed"], dict(self.settings["sampler_options"] or {})
        if seed is not None:
            options.setdefault("seed", int(seed) + number)
        if self.settings["sampler"] == "tpe":
            options.setdefault("constant_liar", True)  # trials that others are at count as bad ones, not as none
        return self._made("sampler", SAMPLERS, self.optuna.samplers, options)

    def _pruner(self) -> Any:
        if self.settings["pruner"] is None or len(self.metrics) > 1:
            return self.optuna.pruners.NopPruner()
        return self._made("pruner", PRUNERS, self.optuna.pruners, dict(self.settings["pruner_options"] or {}))

    def _made(self, key: str, known: Mapping[str, str], module: Any, options: dict[str, Any]) -> Any:
        name = str(self.settings[key])
        if name not in known:
            raise UserError(f"hydra.sweeper.{key}={name} is not known{did_you_mean(name, list(known))}")
        try:
            return getattr(module, known[name])(**options)
        except (TypeError, ValueError) as error:
            raise UserError(f"hydra.sweeper.{key}_options: {error}") from error

    def ask(self, space: Mapping[str, BaseDistribution], wanted: int, sweep: Sweep, worker: str) -> list[Trial]:
        """The next trials, as many of ``wanted`` as the study still lacks; those of a dead worker come first.

        Args:
            space: What is searched.
            wanted: How many to ask for.
            sweep: Its locks tell who is alive.
            worker: The name under which this process holds a lock as long as it works on the study.
        """
        found: list[Trial] = []
        with sweep.hold("study", timeout=-1):
            study = self.study()
            self._requeue(study, sweep, worker)
            while len(found) < wanted:
                trials = study.get_trials(deepcopy=False)
                waiting = sum(t.state.name == "WAITING" for t in trials)
                begun = sum("requeued" not in t.user_attrs for t in trials) - waiting
                if begun >= int(self.settings["trials"]):
                    break
                study.sampler = self._sampler(len(trials) - waiting)
                try:
                    trial = study.ask(dict(space))
                except ValueError as error:
                    raise UserError(
                        f"study {self.name} was begun with another space ({error}): give this one another sweep.name"
                    ) from error
                trial.set_user_attr("worker", worker)
                found.append(trial)
        return found

    def _requeue(self, study: Study, sweep: Sweep, worker: str) -> None:
        """Trials whose worker died are to be done again with their values; a run that it left goes on."""
        for trial in study.get_trials(deepcopy=False):
            owner, cell = trial.user_attrs.get("worker"), trial.user_attrs.get("cell")
            alive = owner is not None and (owner == worker or sweep.locked(owner))
            if trial.state.name != "RUNNING" or alive or (cell is not None and sweep.locked(cell)):
                continue
            self.optuna.trial.Trial(study, trial._trial_id).set_user_attr("requeued", True)
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)

    def tell(self, study: Study, trial: Trial, record: Mapping[str, Any], outputs: Path) -> None:
        """Notes in the study what became of a trial's cell."""
        states = self.optuna.trial.TrialState
        if record["state"] == "done":
            study.tell(trial, self.values(Run(outputs / "runs" / record["run"])))
        elif record["state"] == "pruned":
            study.tell(trial, state=states.PRUNED)
        else:
            trial.set_user_attr("reason", str(record.get("reason") or record["state"]))
            study.tell(trial, state=states.FAIL)

    def values(self, run: Run) -> list[float]:
        """The objectives at the run's best epoch: the first one's, the next breaks ties, as for best.ckpt."""
        rows = self.rows(run)
        signs = [1.0 if direction == "maximize" else -1.0 for direction in self.directions]
        return max(rows, key=lambda row: [sign * value for sign, value in zip(signs, row, strict=True)])

    def rows(self, run: Run) -> list[list[float]]:
        """The objectives after each epoch that has them.

        Raises:
            UserError: metrics.csv has no such column.
        """
        table = read_rows(run.metrics_file)
        names = list(table[0]) if table else []
        for metric in self.metrics:
            if metric not in names:
                raise UserError(f"hydra.sweeper.objective: {run.name} has no {metric}{did_you_mean(metric, names)}")
        return [[float(row[m]) for m in self.metrics] for row in table if all(row[m] for m in self.metrics)]

    def summary(self, study: Study) -> tuple[str, list[Any]]:
        """How many trials ended how, and the best one, or the Pareto front of several objectives."""
        trials = [t for t in study.get_trials(deepcopy=False) if "requeued" not in t.user_attrs]
        names = {"COMPLETE": "done", "FAIL": "failed"}
        counts = Counter(names.get(t.state.name, t.state.name.lower()) for t in trials)
        line = f"{self.name}: {len(trials)} trials, " + ", ".join(f"{n} {state}" for state, n in counts.items())
        return line, sorted(study.best_trials, key=lambda t: t.number)[: None if len(self.metrics) > 1 else 1]

    def shown(self, values: Sequence[float]) -> str:
        """Objectives with their names, accuracies in %."""
        pairs = zip(self.metrics, values, strict=True)
        return ", ".join(f"{m} {100 * v:.2f} %" if m.startswith("val/") else f"{m} {v:.4g}" for m, v in pairs)


#: Of ``hydra.sweeper``, with what they take.
_SETTINGS: Mapping[str, Kind] = {
    "storage": text,
    "study": optional(text),
    "trials": whole(1),
    "jobs": whole(1),
    "objective": listed(text),
    "directions": optional(listed(text)),
    "sampler": text,
    "seed": optional(whole(0)),
    "pruner": optional(text),
}


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = {
        key: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for key, value in settings.items()
    }
    return plain | {key: kind(plain[key], f"hydra.sweeper.{key}") for key, kind in _SETTINGS.items()}


def space(overrides: Mapping[str, Override]) -> dict[str, BaseDistribution]:
    """What the swept words search: lists of values, ``range(1,10)``, ``interval(0,1)``, ``tag(log, interval(1,9))``."""
    found = {}
    for key, override in overrides.items():
        if override.is_sweep_override():
            found[key] = _distribution(key, override)
    return found


def _distribution(key: str, override: Override) -> BaseDistribution:
    distributions = _optuna().distributions
    value: Any = override.value()
    log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            kind = distributions.IntDistribution if whole else distributions.FloatDistribution
            return kind(value.start, value.end, log=log)
        if isinstance(value, RangeSweep) and isinstance(value.range(), range):
            numbers = sorted(value.range())
            step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
            return distributions.IntDistribution(numbers[0], numbers[-1], step=step, log=log)
        return distributions.CategoricalDistribution([str(v) for v in override.sweep_string_iterator()])
    except (ValueError, IndexError) as error:
        raise UserError(f"{override.input_line}: {key} cannot be searched so ({error})") from error


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'redoubt[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def _storage(url: str) -> Any:
    """The database behind a URL.

    Raises:
        UserError: It cannot be reached, or its driver is not installed.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    lite = url.startswith("sqlite:///")
    if lite:
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:  # several workers write to one file
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}} if lite else None)
    except (SQLAlchemyError, ImportError, OSError) as error:
        said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise UserError(f"hydra.sweeper.storage: {said}; give sqlite:///<file> or postgresql+psycopg://...") from error
