"""The table of faults: what was injected, how often, and how it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

SURVIVED, REFUSED = "survived", "refused"

#: Of the 48 moments of the steps of the cell ``trades`` one that is in its second epoch.
LATE = 42


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(name, ends): a row of the table; it ends `survived` or `refused`")


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, record_property: pytest.RecordProperty) -> None:
    """Sends the test's row to the process that prints; `injected` (record_property) counts where it is not one."""
    for mark in request.node.iter_markers("fault"):
        record_property("fault", list(mark.args))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows: dict[str, dict[str, int]] = {}
    for passed, reports in (
        (True, terminalreporter.getreports("passed")),
        (False, terminalreporter.getreports("failed")),
    ):
        for report in reports:
            noted = dict(getattr(report, "user_properties", ()))
            if "fault" not in noted or (passed and report.when != "call"):
                continue
            name, ends = noted["fault"]
            count = int(noted.get("injected", 1))
            row = rows.setdefault(name, {"injected": 0, SURVIVED: 0, REFUSED: 0})
            row["injected"] += count
            row[ends] += count * passed
    if not rows:
        return
    width = max(map(len, rows))
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'fault':{width}}  injected  survived  clearly refused")
    for name, row in sorted(rows.items()):
        terminalreporter.write_line(f"{name:{width}}  {row['injected']:8}  {row[SURVIVED]:8}  {row[REFUSED]:15}")
    total = {key: sum(row[key] for row in rows.values()) for key in ("injected", SURVIVED, REFUSED)}
    terminalreporter.write_line(f"{'all':{width}}  {total['injected']:8}  {total[SURVIVED]:8}  {total[REFUSED]:15}")


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the cell ``trades`` that was killed in its second epoch; ``outputs`` is to be copied."""
    from tests.faults.test_kills import run

    folder = tmp_path_factory.mktemp("interrupted")
    assert run(folder, "trades", {"step": LATE}).code == -9
    return folder
