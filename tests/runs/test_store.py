"""The store: folders, status, locks, names."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import redoubt
from redoubt.errors import UserError
from redoubt.runs import Run, Store
from redoubt.runs import store as module
from redoubt.runs.store import readable_name

AXES = {"model": "resnet18", "defense": "fsr", "base": "trades", "data": "svhn", "attack": "fsr_suite"}

#: Child processes find the package also where pytest's `pythonpath` and not an installation provides it.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(redoubt.__file__).parents[1])}

HOLD = (
    "import sys, time\n"
    "from redoubt.runs import Run\n"
    "run = Run(sys.argv[1])\n"
    "with run.lock():\n"
    "    run.update(state='running', epoch=3)\n"
    "    print('held', flush=True)\n"
    "    sys.stdin.readline()\n"
    "    run.update(state='done')\n"
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


@pytest.fixture
def run(store: Store) -> Run:
    return store.open(AXES, 0, "0123456789", {"seed": 0, "threat": {"eps": "8/255"}})


@pytest.fixture
def holder(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_names() -> None:
    assert readable_name(AXES, 0) == "fsr-trades-resnet18-svhn-s0"
    assert readable_name({**AXES, "model": "../timm/x y"}, 3) == "fsr-trades-.._timm_x_y-svhn-s3"


def test_open_writes_what_the_run_is(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.folder == store.folder / "fsr-trades-resnet18-svhn-s0-0123456789"
    assert run.hash == "0123456789"
    assert run.config() == {"seed": 0, "threat": {"eps": "8/255"}}
    assert run.status["state"] == "created"
    assert "torch" in json.loads(run.environment_file.read_text())["versions"]
    written = run.config_file.read_bytes()
    again = store.open(AXES, 0, "0123456789", {"seed": 5})
    assert again.folder == run.folder
    assert run.config_file.read_bytes() == written


def test_open_completes_what_a_killed_process_left(store: Store, run: Run) -> None:
    run.config_file.unlink()
    assert list(store.list()) == []
    assert store.open(AXES, 0, "0123456789", {"seed": 0}).config() == {"seed": 0}


@pytest.mark.parametrize("damaged", [b"", b"\xff\x00", b"- 1", b"a: [", b"&a [*a]"])
def test_open_writes_a_damaged_config_again(store: Store, run: Run, damaged: bytes) -> None:
    run.update(state="interrupted")
    run.config_file.write_bytes(damaged)
    assert store.open(AXES, 0, "0123456789", {"seed": 0}).config() == {"seed": 0}
    assert run.status["state"] == "interrupted"


def test_open_leaves_a_run_alone_that_was_made_meanwhile(
    store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.lock():
        run.update(state="running")
        real, answers = Run.exists, [False]  # the first look was before the other process made it
        monkeypatch.setattr(Run, "exists", lambda self: answers.pop() if answers else real(self))
        assert store.open(AXES, 0, "0123456789", {"seed": 0}).status["state"] == "running"


def test_secrets_do_not_reach_the_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    run = store.open(AXES, 0, "0123456789", {"logger": {"key": "canary-0123456789", "api_key": "canary"}})
    assert all(b"canary" not in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())


def test_status(run: Run) -> None:
    with run.lock():
        run.update(state="running", max_epochs=4)
        run.update(epoch=2)
        status = run.status
        assert (status["state"], status["epoch"], status["max_epochs"]) == ("running", 2, 4)
        assert status["pid"] == os.getpid()
        assert status["started"]
        run.update(state="failed", reason="loss is NaN")
    assert run.status["reason"] == "loss is NaN"
    assert run.status["ended"]
    with run.lock():
        run.update(state="running")
        assert run.status["reason"] is None
        assert run.status["ended"] is None
        run.update(state="done", train_seconds=1.5)
    assert run.status["state"] == "done"
    with pytest.raises(ValueError, match="no such status"):
        run.update(state="finished")
    with pytest.raises(ValueError, match="no such status"):
        run.update(epochs=3)


def test_a_damaged_status_is_not_taken_for_a_failure(run: Run) -> None:
    run.status_file.write_text("{")
    assert run.status["state"] == "created"
    assert "damaged" in run.status["reason"]


def test_a_run_that_died_is_interrupted(run: Run, holder: subprocess.Popen[str]) -> None:
    assert run.status["state"] == "running"
    assert run.locked()
    holder.kill()
    holder.wait()
    status = run.status
    assert status["state"] == "interrupted"
    assert status["epoch"] == 3
    assert str(holder.pid) in status["reason"]


def test_a_run_that_ends_between_two_looks_has_not_died(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status says ``running`` when it is read, and its lock is free when that is asked."""
    run.update(state="running")
    truly = Run.locked

    def ends(self: Run) -> bool:
        monkeypatch.setattr(Run, "locked", truly)
        with self.lock():
            self.update(state="done")
        return False

    monkeypatch.setattr(Run, "locked", ends)
    assert run.status["state"] == "done"


def test_a_run_that_ends_and_is_taken_up_between_two_looks_is_running(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.update(state="running", epoch=1)
    asked: list[bool] = []

    def taken_up(self: Run) -> bool:
        if not asked:
            self.update(state="running", epoch=2)
        asked.append(len(asked) > 0)
        return asked[-1]

    monkeypatch.setattr(Run, "locked", taken_up)
    assert (run.status["state"], run.status["epoch"]) == ("running", 2)


def test_two_processes(run: Run, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"), run.lock(wait=False):
        pass
    assert holder.stdin is not None
    threading.Timer(0.5, holder.stdin.close).start()
    with caplog.at_level(logging.INFO), run.lock():
        assert run.status["state"] == "done"
    assert [record.message for record in caplog.records if "waiting" in record.message] == [
        f"run {run.name} is in use by process {holder.pid} on {run.status['host']}: waiting for its end"
    ]
    with run.lock(wait=False):
        pass


def test_the_lock_is_free_after_an_exception_and_cleans_up(run: Run) -> None:
    run.checkpoints.mkdir()
    left = run.checkpoints / ".tmp-1-abc-last.ckpt"
    left.write_text("half")

    def work() -> None:
        with run.lock():
            assert not left.exists()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert not run.locked()


def test_a_run_removed_while_waiting(run: Run) -> None:
    shutil.rmtree(run.folder)
    with pytest.raises(UserError, match="removed meanwhile"), run.lock():
        pass


def test_many_processes_open_the_same_run(store: Store) -> None:
    script = (
        "import sys\nfrom redoubt.runs import Store\n"
        f"run = Store(sys.argv[1]).open({AXES!r}, 0, 'abcdefabcd', {{'seed': 0}})\n"
        "with run.lock():\n    run.update(epoch=(run.status['epoch'] or 0) + 1)\n"
    )
    command = [sys.executable, "-c", script, str(store.outputs)]
    processes = [subprocess.Popen(command, env=ENVIRONMENT) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    (run,) = store.list()
    assert run.status["epoch"] == 4
    assert run.config() == {"seed": 0}


def test_find(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = store.open(AXES, 1, "aaaa000001", {"seed": 1})
    ten = store.open(AXES, 10, "aaaa000010", {"seed": 10})
    other = store.open({**AXES, "defense": "none"}, 1, "bbbb000001", {"seed": 1})
    for text, expected in {
        one.name: one,
        "fsr-trades-resnet18-svhn-s1": one,
        "fsr-trades-resnet18-svhn-s10": ten,
        "aaaa000001": one,
        "bbb": other,
        "none": other,
        "s10-aaaa000010": ten,
        "0010": ten,
        "svhn-s10": ten,
        str(ten.folder): ten,
        f"{ten.folder}/": ten,
    }.items():
        assert store.find(text).name == expected.name, text
    monkeypatch.chdir(store.folder)
    assert store.find(f"./{one.name}/").name == one.name
    monkeypatch.chdir(one.folder)
    assert store.find(".").name == one.name


def test_find_says_what_is_wrong(store: Store, tmp_path: Path) -> None:
    for seed, hash in ((1, "aaaa000001"), (2, "aaaa000002")):
        store.open(AXES, seed, hash, {})
    with pytest.raises(UserError, match=r"means 2 runs \(fsr-.*-s1-aaaa000001, fsr-.*-s2-aaaa000002\)"):
        store.find("fsr")
    with pytest.raises(UserError, match=r"did you mean fsr-trades-resnet18-svhn-s1"):
        store.find("fsr-tradse-resnet18-svhn-s1-aaaa000001")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text("seed: 0")
    for text in (
        "zzz",
        "",
        ".",
        "/",
        str(tmp_path / "conf"),
        "no/such",
        "x" * 5000,
        "a\0b",
        "~nobody/x",
        "*",
    ):
        with pytest.raises(UserError):
            store.find(text)
    with pytest.raises(UserError, match="no such run"):
        Store(tmp_path / "empty").find("fsr")


def test_a_moved_store_still_works(store: Store, run: Run, tmp_path: Path) -> None:
    moved = Store(tmp_path / "elsewhere" / "deep")
    moved.outputs.parent.mkdir()
    store.outputs.rename(moved.outputs)
    found = moved.find("fsr")
    with found.lock():
        found.update(state="done")
    assert found.status["state"] == "done"
    assert all(str(store.outputs).encode() not in p.read_bytes() for p in found.folder.rglob("*") if p.is_file())
    link = Store(tmp_path / "link")
    link.outputs.symlink_to(moved.outputs)
    assert link.remove(link.find("fsr")) > 0
    assert list(moved.list()) == []


def test_evaluations_newest_first(run: Run) -> None:
    for age, name in enumerate(("new", "old")):
        folder = run.eval / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"evaluation": name}))
        os.utime(folder / "results.json", (time.time() - age * 60,) * 2)
    (run.eval / "unfinished").mkdir()
    assert [results["evaluation"] for _, results in run.evaluations()] == ["new", "old"]


@pytest.mark.parametrize("place", ["outputs", "outputs/runs"])
def test_an_unwritable_folder_is_one_line(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*outputs.*paths\.outputs=<folder>"):
        Store(tmp_path / "outputs").open(AXES, 0, "0123456789", {})
    assert path.read_text() == "a file"


def test_a_read_only_folder_is_one_line(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.filelock.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*paths\.outputs"):
        store.open(AXES, 1, "1123456789", {})
    with pytest.raises(UserError, match=r"Permission denied.*paths\.outputs"), run.lock():
        pass


def test_remove_stays_in_its_store(store: Store, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not in"):
        Store(tmp_path / "other").remove(run)
    assert run.exists()


def test_the_store_imports_neither_torch_nor_lightning() -> None:
    script = (
        "import sys, redoubt.runs.commands\n"
        "assert not {'torch', 'lightning', 'hydra', 'omegaconf'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=ENVIRONMENT)
