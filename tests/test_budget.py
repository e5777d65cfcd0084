"""The limit on an unmarked test's processor time holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests import budget
from tests.processes import ROOT

TESTS = """
import time
import pytest
from tests import budget

def burn(share):
    end = time.process_time() + share * budget.LIMIT * budget.scale()
    while time.process_time() < end:
        pass

@pytest.fixture
def costly():
    burn(2)

def test_short(): burn(0.1)
def test_long(): burn(2)
def test_much_too_long(): burn(4)
def test_its_fixtures_count(costly): burn(2)
@pytest.mark.slow
def test_slow(): burn(4)
"""


def test_a_test_over_its_limit(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from tests import budget\nfrom tests.budget import pytest_runtest_call, pytest_runtest_setup\n"
        "budget.LIMIT = 0.05\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: x\n  imports: x\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert "2 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    for name in ("test_much_too_long", "test_its_fixtures_count"):
        assert f"FAILED test_some.py::{name} - " in done.stdout
    assert re.search(r"test_some.py::test_long: [\d.]+ s of processor time, [\d.]+ s are an unmarked", done.stdout)
    assert "test_short: " not in done.stdout


def test_what_processes_import_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "scale", lambda: 2.0)
    assert budget.judge(9.9, 0, 0) is None
    assert budget.judge(10.1, 0, 0, started=3) is not None  # three of them make the test itself no cheaper
    assert budget.judge(0, 0, 20.9, started=1) is None
    assert budget.judge(0, 20.9, 0, by_forks=1) is None
    fails, why = budget.judge(10, 0, 31.1, started=1) or (False, "")
    assert fails
    assert "30.1 s of processor time, 10.0 s" in why


def test_fresh_processes_are_counted() -> None:
    before = budget._started[0], budget.spent()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True, timeout=60)
    subprocess.run(["true"], check=True, timeout=60)
    assert budget._started[0] == before[0] + 1
    assert budget.spent()[2] > before[1][2] + 0.02
