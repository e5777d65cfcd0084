"""Train and attack cells in one process, by the command line of the source tree that is first on the path.

Run by ``make numbers`` and ``make compare`` as ``python run.py``; stdin is {"cells": {name: words}, "to": file}. A cell
that two sides have in common gives the same files, so that only their contents need to be compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redoubt import cli
from redoubt.defenses import RobustModule

sys.path.append(str(Path(__file__).parents[2]))  # behind the tree whose numbers are taken
from tests.numbers.cells import folder_of, numbers, saved, tensors


def run(argv: list[str], folder: Path) -> dict[str, Any]:
    """One command: the state after each training step, the numbers, the last checkpoint, the verdicts."""
    steps: list[tuple[str, dict[str, torch.Tensor]]] = []
    true = RobustModule.on_train_batch_end

    def noted(self: RobustModule, *rest: Any) -> None:
        true(self, *rest)
        steps.append((f"{type(self).__name__}, step {self.steps_done}", tensors(self.state_dict())))

    RobustModule.on_train_batch_end = noted  # type: ignore[method-assign]
    out, err, code = io.StringIO(), io.StringIO(), None
    sys.argv = ["redoubt", "train", *argv]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        RobustModule.on_train_batch_end = true  # type: ignore[method-assign]
    if code:
        return {"failed": (err.getvalue().strip().splitlines() or [f"exit code {code}"])[-1]}
    where = folder_of(out.getvalue(), folder)
    verdicts = [np.load(file) for file in where.glob("eval/*/verdicts.npz")]
    return {
        "run": where.name,
        "steps": steps,
        "numbers": numbers(where),
        "checkpoint": saved(where),
        "verdicts": {name: torch.from_numpy(file[name]) for file in verdicts for name in file if file[name].ndim},
    }


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, argv in job["cells"].items():
            try:
                found[name] = run(argv, Path(folder))
            except Exception as error:
                traceback.print_exc()
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(name, flush=True)
    torch.save(found, job["to"])


if __name__ == "__main__":
    assert os.environ.get("OMP_NUM_THREADS") == "1", "the last bits depend on the number of threads"
    main()
