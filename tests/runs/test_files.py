"""Atomic writes: the old file or the new one, and one line where neither can be."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import redoubt
from redoubt.errors import UserError
from redoubt.runs.files import atomic, clean, read_arrays, read_json, sha256, size, write_bytes, write_json, write_text

#: Child processes find the package also where pytest's `pythonpath` and not an installation provides it.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(redoubt.__file__).parents[1])}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file"
    write_text(path, "ä")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]
    assert sha256(path) == hashlib.sha256(b"new").hexdigest()


def test_json(tmp_path: Path) -> None:
    import numpy as np

    write_json(tmp_path / "a.json", {"x": np.float32(0.5), "n": np.int64(3), "path": Path("a/b")})
    assert read_json(tmp_path / "a.json") == {"x": 0.5, "n": 3, "path": "a/b"}
    assert read_json(tmp_path / "none.json") is None
    for damaged in (b'{"x": ', b"\xff\xfe", b"[1]", b""):
        (tmp_path / "bad.json").write_bytes(damaged)
        assert read_json(tmp_path / "bad.json") is None


def test_the_temporary_path_keeps_the_ending(tmp_path: Path) -> None:
    import numpy as np

    with atomic(tmp_path / "verdicts.npz") as temporary:
        np.savez(temporary, a=np.ones(3))
        assert temporary.parent == tmp_path
    assert names(tmp_path) == ["verdicts.npz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def write() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error("stop")

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(UserError) as caught:
        write_text(path, "new")
    line = str(caught.value)
    assert str(path) in line
    assert os.strerror(code) in line
    assert "paths.outputs" in line
    assert "\n" not in line
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The kernel itself refuses, in a process of its own."""
    script = (
        "import resource, sys\n"
        "from redoubt.errors import UserError\n"
        "from redoubt.runs.files import write_bytes\n"
        "write_bytes(sys.argv[1], b'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_bytes(sys.argv[1], bytes(5000))\n"
        "except UserError as error:\n    print(error)\n"
    )
    path = tmp_path / "file"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=ENVIRONMENT,
    )
    assert str(path) in done.stdout
    assert "File too large" in done.stdout
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_torch_hides_a_full_disk_in_a_runtime_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="disk full"), atomic(tmp_path / "last.ckpt"):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")


def test_an_error_of_another_file_is_not_blamed_on_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "file"):
        (tmp_path / "other").read_text()


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("")
    with pytest.raises(UserError, match=r"paths\.outputs"):
        write_text(tmp_path / "outputs" / "runs" / "file", "x")


def test_clean_and_size(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "kept", b"12345")
    (tmp_path / "a" / ".tmp-1-abc-last.ckpt").write_bytes(b"123")
    assert size(tmp_path) == 8
    clean(tmp_path / "a")
    clean(tmp_path / "missing")
    assert names(tmp_path / "a") == ["kept"]
    assert size(tmp_path) == 5


def test_arrays_of_a_damaged_file_are_one_line(tmp_path: Path) -> None:
    """Whatever byte is wrong: numpy, zipfile and zlib raise errors of many kinds."""
    file, said = tmp_path / "whole.npz", []
    np.savez_compressed(file, pgd=np.arange(4000) % 7 == 0)
    whole = file.read_bytes()
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            read_arrays(file)
        except UserError as error:
            said.append(str(error).split(", or")[0])
    assert set(said) == {f"{file}: holds no plain arrays"}
    assert len(said) > len(whole) / 2
