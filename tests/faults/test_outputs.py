"""Disks that are full, closed or elsewhere, folders that are moved, and two processes on one run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.faults.test_kills import CELLS, SMALL, armed, outcome, run, whole
from tests.processes import Command, start
from tests.test_cli import only_run

from redoubt.runs.checkpoints import read_checkpoint
from redoubt.runs.store import Run

ARGV = [*SMALL, *CELLS["trades"]]


def one_line(ended: Command, *says: str) -> None:
    """It ended with one line of ours after what it told of its work."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    line = ended.err.strip().splitlines()[-1]
    assert line.startswith("redoubt: ")
    for part in says:
        assert part in line, line


def steps(found: Run) -> int:
    return int(read_checkpoint(found.last)["redoubt"]["steps_done"])


@contextmanager
def disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own in a folder."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@pytest.mark.slow
@pytest.mark.fault("disk full while a checkpoint is written", "refused")
@pytest.mark.parametrize("share", [0.9, 0.4])
def test_a_write_that_fails(interrupted: Path, tmp_path: Path, share: float) -> None:
    """The run ends at the first failed save with the checkpoint before it, and goes on when there is room."""
    at = {"write": int(share * whole("trades")[0]["write"])}
    one_line(start(tmp_path, *ARGV, before=armed(tmp_path, at, full=True)).end(), "cannot write", "paths.outputs")
    assert only_run(tmp_path).status["state"] == "failed"
    assert steps(only_run(tmp_path)) > 0
    run(tmp_path, "trades").good()
    assert outcome(tmp_path) == whole("trades")[1]


@pytest.mark.slow
@pytest.mark.fault("limit on the size of files", "refused")
def test_a_limit_on_the_size_of_files(interrupted: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    one_line(start(tmp_path, *ARGV, before=limit).end(), "last.ckpt", "File too large", "paths.outputs")
    assert not only_run(tmp_path).begun
    assert not list(only_run(tmp_path).checkpoints.glob(".tmp-*"))
    run(tmp_path, "trades").good()
    assert outcome(tmp_path) == whole("trades")[1]


@pytest.mark.slow
@pytest.mark.fault("small disk that fills up", "refused")
def test_a_small_disk(interrupted: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    with disk(outputs, "10m"):
        shutil.copytree(interrupted / "outputs", outputs, dirs_exist_ok=True)
        before, size = steps(only_run(tmp_path)), only_run(tmp_path).last.stat().st_size
        with open(outputs / "ballast", "wb") as ballast:
            ballast.write(bytes(shutil.disk_usage(outputs).free - size // 2))
        one_line(start(tmp_path, *ARGV).end(), "cannot write", "last.ckpt", "No space left on device")
        assert steps(only_run(tmp_path)) == before
        (outputs / "ballast").unlink()
        run(tmp_path, "trades").good()
        assert outcome(tmp_path) == whole("trades")[1]


@pytest.mark.slow
@pytest.mark.fault("read-only disk", "refused")
def test_a_read_only_disk(interrupted: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    with disk(outputs, "50m"):
        shutil.copytree(interrupted / "outputs", outputs, dirs_exist_ok=True)
        remount(outputs, "ro")
        one_line(start(tmp_path, *ARGV).end(), "cannot write", "Read-only file system", "paths.outputs")
        remount(outputs, "rw")
        run(tmp_path, "trades").good()
        assert outcome(tmp_path) == whole("trades")[1]


@pytest.mark.fault("outputs without permission", "refused")
@pytest.mark.parametrize("of", ["outputs", pytest.param("checkpoints", marks=pytest.mark.slow)])
def test_no_permission(interrupted: Path, of: str) -> None:
    """As somebody who may read the run and not write it; root may do both, so it becomes nobody."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(interrupted / "outputs", folder / "outputs")
        found = only_run(folder)
        before = found.last.read_bytes()
        everything = [folder, *folder.rglob("*")]
        closed = everything if of == "outputs" else [found.checkpoints, *found.checkpoints.iterdir()]
        for path in everything:
            path.chmod(0o555 if path in closed else 0o777)
        nobody = "import os; os.getuid() or os.setuid(65534)"
        logs = folder.parent / f"{folder.name}-logs"
        logs.mkdir(mode=0o777)
        try:
            ended = start(logs, *ARGV, f"paths.outputs={folder / 'outputs'}", before=nobody).end()
            one_line(ended, "cannot write", "Permission denied", "paths.outputs")
            assert found.last.read_bytes() == before
        finally:
            shutil.rmtree(logs)
            for path in everything:
                path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.fault("outputs moved to another disk", "survived")
def test_outputs_are_moved_to_another_disk(interrupted: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    with disk(elsewhere, "50m"):
        shutil.copytree(interrupted / "outputs", elsewhere / "outputs")
        start(tmp_path, *ARGV, f"paths.outputs={elsewhere / 'outputs'}").end().good()
        assert outcome(elsewhere) == whole("trades")[1]


@pytest.mark.slow
@pytest.mark.fault("two identical runs at once", "survived")
@pytest.mark.parametrize("begun", [False, True])
def test_two_identical_runs_at_once(interrupted: Path, tmp_path: Path, begun: bool) -> None:
    """One trains, the other waits and answers from what is there."""
    if begun:
        shutil.copytree(interrupted / "outputs", tmp_path / "outputs")
    pair = [start(tmp_path, *ARGV, name=name) for name in ("a", "b")]
    ended = [command.end().good() for command in pair]
    assert outcome(tmp_path) == whole("trades")[1]
    told = [command.err for command in ended]
    assert sum("waiting for its end" in text or "answered from" in text for text in told) == 1, told
    assert sum(f"| {'CPU'}" in text for text in told) == 1, told
    assert os.listdir(only_run(tmp_path).checkpoints).count("last.ckpt") == 1
