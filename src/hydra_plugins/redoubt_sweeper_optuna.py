"""The sweeper of ``hydra/sweeper=optuna``: the trials of a study in place of a product's cells.

Hydra executes the files here once more, in the order of their names: this one must come after the one it imports.
"""

from __future__ import annotations

import logging
import shlex
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from hydra_plugins.redoubt_sweeper import GridSweeper, parsed, product
from redoubt import sweeps
from redoubt.errors import UserError
from redoubt.search import Search, space
from redoubt.secrets import redacted
from redoubt.sweeps import Sweep, judges, key_of

log = logging.getLogger("redoubt")


class OptunaSweeper(GridSweeper):
    """Trains what a study of Optuna's asks for, until it has as many trials as it shall have.

    Each trial is a cell of the sweep. Started again, it goes on with the study, first with trials whose worker died;
    started several times at once, the processes share it.

    Args:
        params: Words of the sweep file.
        settings: See ``conf/hydra/sweeper/optuna.yaml``.
    """

    kind = "search"

    def __init__(self, *, params: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(max_batch_size=None, params=dict(params or {}))
        self.settings = settings

    def sweep(self, arguments: list[str]) -> Any:
        """Asks for trials, launches their cells, tells how they went."""
        assert self.config is not None
        sweep = self.open(arguments)
        search = Search(self.settings, sweep.name, int(self.config.validation.steps))
        overrides = parsed(self.words(arguments))
        searched = space({key: o for key, o in overrides.items() if not judges(key)})
        if not searched:
            raise UserError("hydra/sweeper=optuna: nothing to search: give a key an interval(a,b), or several values")
        if self.section.cases:
            raise UserError("sweep.cases is a list of cells, not a space: leave it out with hydra/sweeper=optuna")
        if not float(self.config.data.val_fraction) and any(m.startswith("val/") for m in search.metrics):
            raise UserError("a search looks at the validation split: set data.val_fraction, as to 0.1")
        (fixed,) = product(o for key, o in overrides.items() if key not in searched and not judges(key))
        evaluations = self.judged(product(o for key, o in overrides.items() if judges(key)))
        sweeps.current[:] = [(sweep, None)]
        worker = f"worker-{uuid.uuid4().hex[:8]}"
        with sweep.hold(worker):
            while trials := search.ask(searched, int(self.settings["jobs"]), sweep, worker):
                self.run(search, sweep, trials, fixed, evaluations)
        study = search.study()
        line, best = search.summary(study)
        print(line)
        for trial in best:
            command = shlex.join(["python", "src/train.py", *redacted([*fixed, *_words(trial.params)])])
            print(f"trial {trial.number}: {search.shown(trial.values)}: {command}")
        return [list(trial.values) for trial in best]

    def run(
        self, search: Search, sweep: Sweep, trials: Sequence[Any], fixed: list[str], evaluations: list[list[str]]
    ) -> None:
        """Trains some trials and tells the study."""
        cells = {trial.number: [*fixed, *_words(trial.params)] for trial in trials}
        if trials[0].number == 0:
            self.check(cells.values())
        keys = dict(zip(cells, (key_of(words) for words in cells.values()), strict=True))
        sweep.add(list(cells.values()), evaluations)
        for trial in trials:
            trial.set_user_attr("cell", keys[trial.number])
            log.info("trial %d of %s: %s", trial.number, self.settings["trials"], " ".join(_words(trial.params)))
        jobs = {keys[number]: [*words, f"sweep.trial={number}"] for number, words in cells.items()}
        self.launch(sweep, jobs, evaluations, trials[0].number)
        study = search.study()
        for trial in trials:
            while sweep.locked(keys[trial.number]):  # by a worker whose trial has the same values
                time.sleep(1.0)
            search.tell(study, trial, sweep.record(keys[trial.number]), sweep.outputs)


def _words(params: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in params.items()]
