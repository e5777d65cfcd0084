"""Checkpoints that were damaged or are another run's: one line, nothing lost, the one before goes on."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from tests.conftest import Shell
from tests.faults.test_kills import CELLS, SMALL, outcome, run, whole
from tests.test_cli import only_run

from redoubt.build import build_data
from redoubt.errors import UserError
from redoubt.evaluation.kept import Kept, Outcome
from redoubt.runs import running
from redoubt.runs.checkpoints import checksum_file, newest, read_checkpoint, write_checkpoint
from redoubt.runs.files import read_rows
from redoubt.runs.store import Run, Store
from redoubt.training.recorder import Stopped

Damage = Callable[[Path], object]


def flipped(at: float) -> Damage:
    """One bit of a file, ``at`` of its length from its beginning."""

    def flip(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(at * len(data))] ^= 1
        file.write_bytes(data)

    return flip


def foreign(file: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, file)


DAMAGES: dict[str, Damage] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut to half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "last byte lost": lambda file: os.truncate(file, file.stat().st_size - 1),
    "a byte more": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    **{f"a bit flipped at {at:.0%}": flipped(at) for at in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)},
    "foreign": foreign,
    "another program's": lambda file: torch.save({"state_dict": {}, "redoubt": {}, "run": {"decides": 3}}, file),
    "text": lambda file: file.write_text("weights"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.fault("damaged last.ckpt, one before it", "survived")
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_is_taken(
    interrupted: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(interrupted / "outputs", tmp_path / "outputs")
    found = only_run(tmp_path)
    DAMAGES[damage](found.last)
    damaged = found.last.read_bytes()
    file, facts = newest(found) or (None, {})
    assert file == found.previous
    assert facts["decides"]
    assert found.last.with_name("damaged.ckpt").read_bytes() == damaged
    (line,) = caplog.messages
    assert "previous.ckpt" in line
    assert str(found.last) in line


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut to half", "a bit flipped at 50%"])
def test_a_run_goes_on_from_the_checkpoint_before(interrupted: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(interrupted / "outputs", tmp_path / "outputs")
    DAMAGES[damage](only_run(tmp_path).last)
    ended = run(tmp_path, "trades").good()
    assert "damaged.ckpt" in ended.err
    only_run(tmp_path).last.with_name("damaged.ckpt").unlink()
    assert outcome(tmp_path) == whole("trades")[1]


@pytest.mark.fault("damaged checkpoint, none before it", "refused")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(interrupted: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(interrupted / "outputs", tmp_path / "outputs")
    found = only_run(tmp_path)
    found.previous.unlink()
    DAMAGES[damage](found.last)
    damaged = found.last.read_bytes()
    for reading in (newest, lambda run: read_checkpoint(run.last)):
        with pytest.raises(UserError, match=re.escape(str(found.last))) as error:
            reading(found)
        assert "\n" not in str(error.value)
    assert found.last.read_bytes() == damaged


def test_sha256sum_reads_what_stands_beside(interrupted: Path) -> None:
    found = only_run(interrupted)
    for file in (found.last, found.previous):
        stated = checksum_file(file).read_text()
        assert stated == f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"


def test_a_disk_that_returns_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back before the old one is given up."""
    file = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {}, "redoubt": {}, "n": 1}, file)
    before = file.read_bytes()
    monkeypatch.setattr("redoubt.runs.checkpoints.sha256", lambda path: "0" * 64)
    with pytest.raises(UserError, match="what was read back is not what was written"):
        write_checkpoint({"state_dict": {}, "redoubt": {}, "n": 2}, file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert read_checkpoint(file)["n"] == 1


@pytest.mark.parametrize("stated", [b"", b"\xff\xfe", b"0" * 64])
def test_a_checksum_that_was_damaged(tmp_path: Path, stated: bytes) -> None:
    """The checkpoint is not taken; the next one is written all the same."""
    file = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {}, "redoubt": {}, "n": 1}, file)
    checksum_file(file).write_bytes(stated)
    with pytest.raises(UserError, match="its SHA-256 is not the one beside it"):
        read_checkpoint(file)
    write_checkpoint({"state_dict": {}, "redoubt": {}, "n": 2}, file)
    assert read_checkpoint(file)["n"] == 2


def test_a_flipped_bit_where_the_checksum_was_lost(tmp_path: Path) -> None:
    """As in a folder that was copied in part: the file has sums of its own, at which torch does not look."""
    file = tmp_path / "last.ckpt"
    write_checkpoint({"state_dict": {"w": torch.arange(1000.0)}, "redoubt": {}}, file)
    checksum_file(file).unlink()
    data = bytearray(file.read_bytes())
    data[data.index(torch.arange(500.0, 510.0).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(file)


def test_both_are_damaged(interrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(interrupted / "outputs", tmp_path / "outputs")
    found = only_run(tmp_path)
    for file in (found.last, found.previous):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{re.escape(str(found.last))}.*{re.escape(str(found.previous))}"):
        newest(found)


@pytest.mark.parametrize("moment", range(20))
def test_every_moment_of_a_save_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """The process stops at each file operation in turn."""
    found = Run(tmp_path / "run-0")
    write = lambda n: write_checkpoint({"state_dict": {}, "redoubt": {}, "run": {"n": n}}, found.last, found.previous)  # noqa: E731
    write(1)
    write(2)
    left = [moment]

    def stopping(true: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return true(*args)

        return call

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, stopping(getattr(os, name)))
    with suppress(KeyboardInterrupt):
        write(3)
    monkeypatch.undo()
    assert (newest(found) or (None, {"n": 0}))[1]["n"] in (2, 3)


# ---- another config, another machine -----------------------------------------------------------------------------


def refuse(*args: object) -> None:
    raise UserError("not today")


@pytest.mark.fault("checkpoint of another config", "refused")
@pytest.mark.parametrize(
    ("change", "key"),
    [
        pytest.param("optimizer.lr=0.07", "optimizer.lr", marks=pytest.mark.slow),
        ("seed=1", "data.seed, seed"),
        pytest.param("inner.steps=2", "inner.steps", marks=pytest.mark.slow),
        pytest.param("data.limit_train=29", "data.limit_train", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_another_config(shell: Shell, interrupted: Path, tmp_path: Path, change: str, key: str) -> None:
    argv = [*SMALL, *CELLS["trades"], change, "paths.outputs=other"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_fit", refuse)
        assert shell(*argv).code == 2
    (other,) = Store("other").list()
    other.checkpoints.mkdir()
    for file in (only_run(interrupted).last, checksum_file(only_run(interrupted).last)):
        shutil.copy(file, other.checkpoints)
    before = other.last.read_bytes()
    ended = shell(*argv)
    assert ended.code == 2
    (line,) = ended.err.strip().splitlines()
    assert f"differs in {key}:" in line
    assert str(other.last) in line
    assert other.last.read_bytes() == before


def test_another_machine_is_allowed_and_said(
    cell: Callable[..., DictConfig],
    sigterm_after: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sigterm_after(3)
    with pytest.raises(Stopped):
        running.train(cell(), build_data(cell()))
    monkeypatch.setattr(running, "device_name", lambda cfg: "4 x Abacus")
    with caplog.at_level("INFO"):
        found = running.train(cell(), build_data(cell()))
    assert "4 x Abacus" in caplog.text
    assert "bits may differ" in caplog.text
    assert [row["step"] for row in read_rows(found.metrics_file)] == ["4", "8"]


@pytest.mark.slow
def test_metrics_that_were_lost_come_back(
    cell: Callable[..., DictConfig], sigterm_after: Callable[[int | None], None]
) -> None:
    sigterm_after(6)
    with pytest.raises(Stopped):
        running.train(cell(), build_data(cell()))
    (found,) = Store(cell().paths.outputs).list()
    found.metrics_file.unlink()
    running.train(cell(), build_data(cell()))
    assert [row["epoch"] for row in read_rows(found.metrics_file)] == ["1", "2"]


@pytest.mark.fault("bit flipped in kept verdicts", "survived")
def test_kept_verdicts_with_a_flipped_bit(tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    """They are no verdicts any more, and are made again; all others stay."""
    kept = Kept(tmp_path, {})
    file = kept.file("pgd20", "decisive")
    wanted = [Outcome(np.arange(9) % (i + 2) == 0) for i in range(3)]
    for i, verdicts in enumerate(wanted):
        kept.keep(file, i, verdicts)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    begin, end = (whole.index(b"\n") + 1, whole.rindex(b"\n", 0, -1))
    for bit in range(8 * begin, 8 * end):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = [Kept(tmp_path, {}).find(file, i, 9) for i in range(3)]
        assert found[1] is None, (bit, found[1])
        for i in (0, 2):
            assert found[i] is not None
            assert (found[i].right == wanted[i].right).all()
    record_property("injected", 8 * (end - begin))
