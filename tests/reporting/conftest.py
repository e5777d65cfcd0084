"""One large store for the tests of size and speed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from tests.reporting.stores import CONFIG, add_audit, add_evaluation, add_run, config, curve, nested

from redoubt.reporting.page import html


@pytest.fixture(scope="session")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 100 runs with 200 epochs and 10,000 verdicts of 6 attacks each, and its report.html."""
    outputs = tmp_path_factory.mktemp("hundred")
    rng = np.random.default_rng(0)
    for i in range(100):
        axes = {**CONFIG["axes"], "defense": ("none", "fsr", "afd", "cure")[i % 4]}
        tree = config(
            seed=i // 20, axes=axes, defense={"_target_": axes["defense"]}, optimizer__lr=0.1 * (1 + i // 4 % 5)
        )
        folder = add_run(outputs, tree, f"{i:010x}", curve(200, defense=axes["defense"]))
        add_evaluation(folder, nested(rng, 10_000))
        add_audit(folder, ["restarts"] if i % 3 == 0 else [])
    with contextlib.redirect_stdout(io.StringIO()):
        html(outputs=str(outputs))
    return outputs
