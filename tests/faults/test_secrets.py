"""Canaries for secrets: whatever a run, an evaluation, an export, a sweep or a report writes, none of them is in it."""

from __future__ import annotations

import base64
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import Shell
from tests.faults.bad_inputs import SMALL
from tests.faults.test_hostile_configs import refused

from redoubt import config, secrets
from redoubt.runs.files import read_json
from redoubt.runs.store import Run, Store
from redoubt.secrets import from_environment, redacted

ROW = "secret in the environment, in a config, on the command line"
#: Variables of the environment, by what names them secret, and one that only the place of its use does.
VARIABLES = {
    "WANDB_API_KEY": "c0ffee" * 6 + "abcd",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-secret",
    "HF_TOKEN": "canary-hf-token",
    "MY_PASSWORD": "canary-my-password",
    "SERVICE_KEY": "canary-service-key",
    "PLAIN": "canary-plain-folder",
}
#: Words of the command line, and what a user's own files of configs hold.
WORDS = {
    "model.api_key": "canary-api-key",
    "model.password": "canary-word-password",
    "+model.more.token": "canary-nested-token",
    "model.url": "https://somebody:canary-in-url@example.org/x",
}
IN_FILE = "canary-in-a-file"
CANARIES = (*VARIABLES.values(), *(word for word in WORDS.values() if "://" not in word), "canary-in-url", IN_FILE)

NET = """
from redoubt.nets.small import CNNSmall

class Net(CNNSmall):
    def __init__(self, *, api_key, password, access, private_key, url, more=None, breaks=False, **rest):
        super().__init__(**rest)
        if breaks:
            raise RuntimeError(f"{url} refused {password} (token={api_key}) for {private_key}")
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A user's own net whose arguments are secrets, in a shell that is full of them; the words to train it."""
    for name, value in {**VARIABLES, "HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(secrets, "_met", set())
    monkeypatch.setattr(secrets, "_asked", set())
    package = tmp_path / "own"
    (package / "conf/model").mkdir(parents=True)
    (package / "secretive_net.py").write_text(NET)
    (package / "conf/redoubt.allow").write_text("secretive_net\n")
    small = yaml.safe_load((Path(config.config_dir()) / "model/cnn_small.yaml").read_text())
    section = {**small, "_target_": "secretive_net.Net", "api_key": None, "password": "${oc.env:MY_PASSWORD}"}
    section |= {"access": "${oc.env:SERVICE_KEY}", "private_key": IN_FILE, "url": None, "breaks": False}
    (package / "conf/model/secretive.yaml").write_text(yaml.safe_dump(section))
    monkeypatch.syspath_prepend(package)
    words = [f"{key}={value!r}" for key, value in WORDS.items()]
    places = ("paths.data=${oc.env:PLAIN}", "data.root=data")
    return "--config-dir", str(package / "conf"), "model=secretive", *SMALL[1:-1], *places, *words


def leaks(folder: Path) -> list[str]:
    """Where canaries are: in the files under a folder, packed or not, in their names, and as base64."""
    coded = [base64.b64encode(b"\0" * i + c.encode())[4:-4] for c in CANARIES for i in range(3)]
    wanted = [*(c.encode() for c in CANARIES), *coded]
    found = []
    for path in (p for p in folder.rglob("*") if folder / "own" not in p.parents):
        parts = {"": path.name.encode()}
        if path.is_file():
            parts["content"] = path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as packed:
                    parts |= {name: packed.read(name) for name in packed.namelist()}
            if path.suffix == ".html":
                details = re.search(r'"details":"([^"]+)"', parts["content"].decode())
                assert details is not None
                parts["details"] = zlib.decompress(base64.b64decode(details[1]))
        found += [f"{path} {part}: {c!r}" for part, content in parts.items() for c in wanted if c in content]
    return found


def only(folder: Path) -> Run:
    (run,) = Store(folder / "outputs").list()
    return run


def test_the_search_finds_what_it_looks_for(tmp_path: Path, theirs: tuple[str, ...]) -> None:
    (tmp_path / "plain").write_text(f"x{VARIABLES['HF_TOKEN']}y")
    (tmp_path / "coded").write_bytes(base64.b64encode(b"12" + IN_FILE.encode() + b"34"))
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("inside", VARIABLES["PLAIN"])
    assert {Path(line.split()[0]).name for line in leaks(tmp_path)} == {"plain", "coded", "packed"}


@pytest.mark.fault(ROW, "survived")
def test_no_file_of_a_run_holds_a_secret(
    tmp_path: Path, theirs: tuple[str, ...], shell: Shell, record_property: Callable[[str, Any], None]
) -> None:
    record_property("injected", len(CANARIES))
    own = theirs[:2]
    assert shell("train", *theirs, "attack=none").code == 0
    run = only(tmp_path)
    assert shell("eval", *own, f"run={run.name}", "attack=fgsm", "evaluation.save=uint8").code == 0
    assert shell("export", *own, f"run={run.name}", "to=net.safetensors").code == 0
    assert shell("report", "html").code == 0
    assert leaks(tmp_path) == []
    stored = run.config()
    assert stored["model"]["url"] == "https://somebody:<redacted>@example.org/x"
    assert stored["paths"]["data"] == stored["model"]["api_key"] == "<redacted>"
    assert stored["data"]["source"] == "fake"


@pytest.mark.slow
@pytest.mark.fault(ROW, "survived")
def test_no_file_of_a_sweep_holds_a_secret(
    tmp_path: Path, theirs: tuple[str, ...], shell: Shell, record_property: Callable[[str, Any], None]
) -> None:
    """W&B, a failing cell whose message tells all, the other formats, an audit's page and every report."""
    pytest.importorskip("wandb")
    record_property("injected", len(CANARIES))
    own, offline = theirs[:2], ("logger=wandb", "logger.offline=true")
    ended = shell("train", *own, "-m", *theirs[2:], *offline, "attack=fgsm", "model.breaks=false,true")
    assert ended.code == 1
    assert "1 failed" in ended.out
    (run,) = (run for run in Store(tmp_path / "outputs").list() if run.finished)
    ended = shell("eval", *own, f"run={run.name}", "attack=pgd20", *offline, "logger.checkpoint=true")
    assert ended.code == 0
    assert list(run.folder.rglob("*.wandb"))
    assert shell("export", *own, f"run={run.name}", "to=net.pt2").code == 0
    for report in (["status"], ["html"], ["tables", "table=ours"], ["wandb"]):
        shell("report", *report)
    assert leaks(tmp_path) == []
    (sweep,) = (tmp_path / "outputs/sweeps").glob("*/sweep.json")
    cells = read_json(sweep)["cells"]
    assert all("model.api_key=<redacted>" in words for words in cells.values())
    records = [read_json(file) for file in sweep.parent.glob("cells/*.json")]
    assert any("refused <redacted> (token=<redacted>" in str(record["reason"]) for record in records)


@pytest.mark.slow
@pytest.mark.fault(ROW, "survived")
def test_no_file_of_a_search_holds_its_databases_password(
    tmp_path: Path, theirs: tuple[str, ...], shell: Shell
) -> None:
    pytest.importorskip("optuna")
    storage = f"sqlite:///file:{tmp_path}/search.db?mode=rwc&uri=true&password={IN_FILE}"
    search = ("hydra/sweeper=optuna", "hydra.sweeper.trials=1", f"hydra.sweeper.storage='{storage}'")
    own = theirs[:2]
    words = (
        *theirs[2:],
        "data.val_fraction=0.4",
        "data.limit_train=60",
        "attack=none",
        "optimizer.lr=interval(0.1,0.2)",
    )
    ended = shell("train", *own, "-m", *search, *words)
    assert ended.code == 0, ended
    assert (tmp_path / "search.db").is_file()
    assert leaks(tmp_path) == []


@pytest.mark.slow
@pytest.mark.fault(ROW, "refused")
@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("model.api_key", ["+model.api_key=canary-api-key"]),
        ("model.url", ["+model.url='https://me:pass@host'"]),
        (
            "hydra.sweeper.storage",
            ["hydra/sweeper=optuna", "hydra.sweeper.storage='postgresql://me:${oc.env:HF_TOKEN}@host/db'"],
        ),
    ],
)
def test_submitit_gets_no_secret(
    says: str, words: list[str], tmp_path: Path, theirs: tuple[str, ...], shell: Shell
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    refused(shell("train", "-m", "hydra/launcher=local", *SMALL, *words), says)
    assert leaks(tmp_path) == []


# ---- what is redacted ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_met", set())
    monkeypatch.setattr(secrets, "_asked", set())
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")


def test_secrets_are_redacted(fresh: None) -> None:
    cfg = {
        "logger": [{"api_key": "abc", "url": "https://u:canary-0123456789@host"}],
        "token": "t",
        "tokens": 5,
        "cls_token": True,
        "name": "kept",
        "list": ["a", {"aws_secret_access_key": "x"}],
    }
    cleaned = redacted(cfg)
    assert cleaned["logger"] == [{"api_key": "<redacted>", "url": "https://u:<redacted>@host"}]
    assert cleaned["token"] == "<redacted>"
    assert cleaned["list"] == ["a", {"aws_secret_access_key": "<redacted>"}]
    assert (cleaned["tokens"], cleaned["cls_token"], cleaned["name"]) == (5, True, "kept")
    assert redacted({"password": 12345678, "said": "not 12345678"}) == {
        "password": "<redacted>",
        "said": "not <redacted>",
    }
    assert redacted(cleaned) == cleaned


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("+data.token=abc", "+data.token=<redacted>"),
        ("data.more={api_key:abc,size:3}", "data.more={api_key:<redacted>,size:3}"),
        ("no route (password='a b')", "no route (password=<redacted>)"),
        ("postgresql+psycopg://me:pw@host:5432/db", "postgresql+psycopg://me:<redacted>@host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("it said canary-0123456789!", "it said <redacted>!"),
        ("defense.tau=0.1", "defense.tau=0.1"),
        ("redoubt.attacks.PGD", "redoubt.attacks.PGD"),
    ],
)
def test_secrets_in_a_text(fresh: None, text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted([text]) == [shown]
    assert redacted({"reason": text}) == {"reason": shown}


def test_what_was_met_is_known_later(fresh: None) -> None:
    said = "the server refused hunter2-hunter2"
    assert redacted(said) == said
    assert redacted({"a": said, "data": {"password": "hunter2-hunter2", "token": "short"}})["a"] != said
    assert redacted(said) == "the server refused <redacted>"
    assert redacted("cut it short") == "cut it short"


def test_what_comes_from_the_environment_stays_out_of_places(fresh: None) -> None:
    """Of paths and loggers, which decide nothing; what decides the weights is kept, or no run could be loaded again."""
    assert from_environment("/scratch/somebody") == "/scratch/somebody"
    tree = {"paths": {"outputs": "/scratch/somebody/outputs"}, "data": {"root": "/scratch/somebody/data"}}
    assert redacted(tree) == {"paths": {"outputs": "<redacted>/outputs"}, "data": tree["data"]}
