"""Whole runs give the numbers that are stored beside this file; ``make numbers`` stores them again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Shell
from tests.numbers.cells import cells, folder_of, machine, moved, numbers, runs_here, stored, words
from tests.test_ddp import launched


def params() -> Iterator[Any]:
    for defense, cell, quick in cells():
        yield pytest.param(defense, cell, id=f"{defense}-{cell}", marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all cells are trained: the natural run that some begin from is trained once."""
    return tmp_path_factory.mktemp("numbers")


def trained(shell: Shell, where: Path, defense: str, cell: str) -> dict[str, Any]:
    argv = ["train", *words(defense, cell)]
    if cell.endswith("two ranks"):
        first, second = launched(where, *argv)
        out = first.end().good().out
        second.end().good()
    else:
        ended = shell.at(where)(*argv)
        assert ended.code == 0, ended.err
        out = ended.out
    return numbers(folder_of(out, where))


@pytest.mark.parametrize(("defense", "cell"), params())
def test_numbers_are_those_stored(shell: Shell, together: Path, defense: str, cell: str) -> None:
    """1e-6 on the kind of machine that stored them, 1e-3 (bfloat16: 5 %) and one example elsewhere."""
    if not runs_here(cell):
        pytest.skip("this processor has no bfloat16")
    found = trained(shell, together, defense, cell)
    assert len(found["steps"]) == 4
    assert all(math.isfinite(value) for row in found["steps"] for value in row.values())
    file = stored(defense)
    before = file["cells"].get(cell)
    if before is None:
        warnings.warn(f"tests/numbers/{defense}.json has no numbers of {cell}: make numbers", stacklevel=1)
        return
    here = before.get("machine", file["machine"]) == machine()
    relative = 1e-6 if here else 0.05 if cell.endswith("bf16") else 1e-3
    assert not list(moved(found, before, relative, one_example=not here))


def test_what_moved_is_named() -> None:
    old = {"steps": [{"train/loss": 2.0}, {"train/loss": 1.0, "train/ce": 1.0}], "evaluation": {"pgd": 0.5}}
    new = {"steps": [{"train/loss": 2.0}, {"train/loss": 1.1, "train/kl": 1.0}], "evaluation": {"pgd": 0.51}}
    assert list(moved(old, old, 1e-6, False)) == []
    assert list(moved(new, old, 1e-3, True)) == [
        "step 2, train/loss: 1.0 -> 1.1",
        "step 2, train/ce: 1.0 -> None",
        "step 2, train/kl: None -> 1.0",
    ]
    assert list(moved(new, old, 0.2, False))[-1] == "step 2, train/kl: None -> 1.0"
    assert list(moved(new, old, 1e-3, False))[-1] == "evaluation, pgd: 0.5 -> 0.51"
    broken = {**old, "steps": [{"train/loss": math.nan}, old["steps"][1]]}
    assert list(moved(broken, old, 0.2, False)) == ["step 1, train/loss: 2.0 -> nan"]
