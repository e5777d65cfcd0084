"""Downloads that are killed, cut short, stalled or of other bytes, and several at once: from a server of this test."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torchvision
from tests.conftest import refused
from tests.data import datafiles
from tests.processes import CONTEXT, ended, fork

from redoubt.data import CIFAR10, archives

ARCHIVE = "cifar-10-python.tar.gz"
PIECES = 16
#: Of each test that is repeated.
ROUNDS = [pytest.param(3, id="3"), pytest.param(50, id="50", marks=pytest.mark.slow)]


class Site(ThreadingHTTPServer):
    """One file at an address of this machine, sent as the test wants.

    Attributes:
        content: The file.
        how: ``whole``, or what goes wrong.
        stop_before: Piece before which it waits to be told to go on.
        reached: Set when it waits.
        go: Set to go on.
        asked: How often the file was asked for.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.how, self.asked = content, "whole", 0
        self.stop_before: int | None = None
        self.reached, self.go = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{ARCHIVE}"

    @property
    def published(self) -> dict[str, str]:
        """What torchvision is to take for the archive's address and checksum."""
        return {"url": self.url, "tgz_md5": hashlib.md5(self.content).hexdigest()}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        site = self.server
        site.asked += 1
        content = {"other bytes": site.content[::-1], "a page of the provider's": b"<html>Log in</html>"}.get(
            site.how, site.content
        )
        if site.how == "an error":
            return self.send_error(503)
        self.send_response(200)
        if site.how != "an endless answer":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        for piece in range(PIECES):
            if piece == PIECES // 2 and site.how == "a connection that ends":
                return None
            if piece == site.stop_before or (piece == PIECES // 2 and site.how == "a connection that stalls"):
                site.stop_before = None
                site.reached.set()
                site.go.wait(30)
            self.wfile.write(content[piece * len(content) // PIECES : (piece + 1) * len(content) // PIECES])
        while site.how == "an endless answer":
            self.wfile.write(bytes(1 << 16))
        return None


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Images by split of the archive that the site has."""
    made = datafiles.cifar(tmp_path / "site")
    return {split: torch.from_numpy(images) for split, (images, _) in made.items()}


@pytest.fixture
def site(tmp_path: Path, expected: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A server whose archive is the published one, as far as this process and those that it starts know."""
    content = (tmp_path / "site" / ARCHIVE).read_bytes()
    with Site(content) as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        for name, value in site.published.items():
            monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
        yield site
        site.go.set()
        site.shutdown()


def data_in(root: Path) -> CIFAR10:
    return CIFAR10(root=str(root), source="official", num_classes=10, image_size=32, **datafiles.FACTS)


def fetch(root: Path, published: dict[str, str] | None = None, barrier: Callable[[], object] = bool) -> None:
    for name, value in (published or {}).items():
        setattr(torchvision.datasets.CIFAR10, name, value)
    barrier()
    data_in(root).prepare_data()


def started(site: Site, root: Path, *barrier: Callable[[], object]) -> BaseProcess:
    return fork(fetch, root, site.published, *barrier)


def code(child: BaseProcess) -> int:
    return ended(child, 30, "a download")


def visible(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if not path.name.startswith(".")] if root.is_dir() else []


def assert_clean(root: Path, expected: dict[str, torch.Tensor]) -> None:
    """The archive alone, whole, and what was decoded of it."""
    assert visible(root) == [ARCHIVE]
    assert sorted(path.name for path in root.iterdir() if "thesis" not in path.name) == [".redoubt", ARCHIVE]
    assert not list(root.glob(".redoubt/*.part"))
    for split, images in expected.items():
        data = data_in(root)
        assert torch.equal(data.arrays(split)[0], images)
        assert data.fingerprint(split) == f"cifar10/{split}@official"


def kill_half_way(site: Site, root: Path, at: int, waiting: bool = False) -> BaseProcess | None:
    """Kills a download before a piece; another one that waits for its turn goes on."""
    site.stop_before = at
    site.reached.clear()
    site.go.clear()
    child = started(site, root)
    assert site.reached.wait(30)
    (root / ".thesis.docx.part").write_text("somebody else's")
    while not list(root.glob(".cifar*.part")):
        time.sleep(0.001)
    other = started(site, root) if waiting else None
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    assert code(child) == -signal.SIGKILL
    site.go.set()
    return other


@pytest.mark.fault("download killed half-way", "survived")
@pytest.mark.parametrize("rounds", ROUNDS)
def test_killed_half_way(
    site: Site,
    tmp_path: Path,
    expected: dict[str, torch.Tensor],
    rounds: int,
    record_property: pytest.RecordProperty,
) -> None:
    """Never a half file under the archive's name; the next start is clean, and so is one that waited."""
    record_property("injected", rounds)
    dice = random.Random(rounds)
    for number in range(rounds):
        root = tmp_path / str(number)
        other = kill_half_way(site, root, dice.randrange(PIECES), waiting=number % 3 == 2)
        if other is None:
            assert visible(root) == []
            fetch(root)
        else:
            assert code(other) == 0
        assert_clean(root, expected)
        assert (root / ".thesis.docx.part").is_file()


@pytest.mark.fault("two downloads at once", "survived")
@pytest.mark.parametrize("rounds", ROUNDS)
def test_two_at_once(
    site: Site,
    tmp_path: Path,
    expected: dict[str, torch.Tensor],
    rounds: int,
    record_property: pytest.RecordProperty,
) -> None:
    """One downloads, the other waits and reads what it left."""
    record_property("injected", rounds)
    for number in range(rounds):
        root, barrier, asked = tmp_path / str(number), CONTEXT.Barrier(2), site.asked
        children = [started(site, root, barrier.wait) for _ in range(2)]
        assert [code(child) for child in children] == [0, 0]
        assert site.asked == asked + 1
        assert_clean(root, expected)


@pytest.mark.fault("download of other bytes, cut short, stalled or endless", "refused")
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("other bytes", "not the published file"),
        ("a page of the provider's", "not the published file"),
        ("a connection that ends", "the connection ended after"),
        ("a connection that stalls", "timed out"),
        ("an endless answer", "it holds more than"),
        ("an error", "Service Unavailable"),
    ],
)
def test_what_goes_wrong_is_said(
    site: Site, tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    """One line with the file, the place and the address; nothing is left; then it works."""
    monkeypatch.setattr(archives, "TIMEOUT", 0.3)
    monkeypatch.setattr(archives, "LARGEST", 1 << 20)
    root, site.how = tmp_path / "root", how
    refused(lambda: fetch(root), says, ARCHIVE, str(root), site.url)
    assert [path.name for path in root.iterdir()] == [".redoubt"]
    site.how = "whole"
    fetch(root)
    assert_clean(root, expected)


@pytest.mark.fault("download of other bytes, cut short, stalled or endless", "refused")
@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_wrong_checksum_again_and_again(
    site: Site, tmp_path: Path, rounds: int, record_property: pytest.RecordProperty
) -> None:
    record_property("injected", rounds)
    site.how = "other bytes"
    for _ in range(rounds):
        refused(lambda: fetch(tmp_path / "root"), "not the published file", ARCHIVE, "try again")
        assert visible(tmp_path / "root") == []
        assert not list((tmp_path / "root").glob(".*.part"))
