"""Whole runs give the numbers that are stored beside this file; ``make numbers`` stores them again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Shell
from tests.numbers import compare
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
    """To 1e-6 on the kind of machine that stored them; elsewhere losses to 1e-3 (bfloat16: 5 %), accuracies to one
    example.
    """
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
    assert not list(moved(found, before, relative, elsewhere=not here))


def test_what_moved_is_named() -> None:
    old = {"steps": [{"train/loss": 2.0}, {"train/loss": 1.0, "train/ce": 1.0}], "evaluation": {"pgd": 0.5}}
    new = {"steps": [{"train/loss": 2.0}, {"train/loss": 1.1, "train/kl": 1.0}], "evaluation": {"pgd": 0.51}}
    assert list(moved(old, old, 0.0, False)) == []
    named = ["step 2, train/loss: 1.0 -> 1.1", "step 2, train/ce: 1.0 -> None", "step 2, train/kl: None -> 1.0"]
    assert list(moved(new, old, 1e-3, True)) == named
    assert list(moved(new, old, 1e-3, False)) == [*named, "evaluation, pgd: 0.5 -> 0.51"]
    assert list(moved({**new, "evaluation": {"pgd": 0.52}}, old, 1e-3, True)) == [
        *named,
        "evaluation, pgd: 0.5 -> 0.52",
    ]
    nan = {**old, "steps": [{"train/loss": math.nan}, old["steps"][1]]}
    assert list(moved(nan, old, 0.2, False)) == ["step 1, train/loss: 2.0 -> nan"]
    assert list(moved(nan, nan, 0.0, False)) == []
    assert list(moved({**old, "steps": old["steps"][:1]}, old, 0.0, False)) == ["1 steps where 2 were"]


def test_only_losses_are_compared_elsewhere() -> None:
    old = {"steps": [{"train/loss": 2.0, "train/grad_norm": 1.0, "train_probe/pgd1": 0.1}], "evaluation": {}}
    new = {"steps": [{"train/loss": 2.001, "train/grad_norm": 9.0, "train_probe/pgd1": 0.3}], "evaluation": {}}
    assert list(moved(new, old, 1e-3, True)) == []
    assert len(list(moved(new, old, 1e-6, False))) == 3


@pytest.mark.parametrize(
    ("now", "before", "says"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 0.0]), "w: 1 of 2 differ, nan at most"),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "w: 1 of 1 differ, 0 at most"),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), None),
        (torch.tensor([1.5]), torch.tensor([1.0]), "w: 1 of 1 differ, 0.5 at most"),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), "w: torch.float32 [1] where torch.float64 [1] was"),
    ],
)
def test_tensors_are_compared_bit_by_bit(now: torch.Tensor, before: torch.Tensor, says: str | None) -> None:
    assert compare.tensor_difference({"w": now}, {"w": before}) == says


def test_a_cell_that_fails_is_no_equal_cell() -> None:
    assert compare.difference({"failed": "x"}, {"failed": "x"}) == "now: x; before: x"
