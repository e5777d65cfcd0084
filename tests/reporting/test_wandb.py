"""Offline W&B runs, read back: every metric, tag, table and image is there, and no secret."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from tests.reporting import stores

from redoubt import cli
from redoubt.errors import UserError
from redoubt.reporting import wandb_log, wandb_run
from redoubt.reporting.collect import Record, records
from redoubt.runs.files import read_rows, write_json
from redoubt.runs.store import Run
from redoubt.training import loggers

wandb = pytest.importorskip("wandb")
from wandb.util import get_core_path  # noqa: E402

CANARIES = {
    "WANDB_API_KEY": "c0ffee0123456789c0ffee0123456789c0ffee01",
    "AWS_SECRET_ACCESS_KEY": "aws-canary-0123456789",
    "PLAIN_CANARY": "plain-canary-0123456789",  # in the environment and nowhere else
}
SEND = ["logger=wandb", "logger.offline=true"]
CELL = [
    "model=cnn_small", "model.widths=[4,4,8,8]", "data=digits", "data.image_size=8", "data.limit_train=40",
    "data.limit_test=30", "data.batch_size=20", "data.probe=10", "trainer=cpu", "trainer.max_epochs=2",
    "trainer.progress=false", "inner.steps=1", "validation.steps=1", "validation.step=1", "attack=fgsm",
    *SEND, f"data.root=/{CANARIES['AWS_SECRET_ACCESS_KEY']}",
]  # fmt: skip


@dataclass
class Segment:
    """One ``.wandb`` file, read by W&B's own tool."""

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    defined: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Segment:
        (file,) = folder.glob("*.wandb")
        # What `wandb leet inspect --json` runs, without the second that its own start takes.
        command = [
            get_core_path(),
            "leet",
            "inspect",
            "--no-observability",
            "--json",
            "--run-file",
            str(file),
            str(folder),
        ]
        found = cls(folder)
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            record = json.loads(line)
            content = record.get(record["type"], {})
            if record["type"] == "run":
                found.run |= content
            elif record["type"] == "metric":
                found.defined[content.get("name") or content["glob_name"]] = content
            elif record["type"] == "summary":
                found.summary |= content.get("update", {})
            elif record["type"] == "history":
                found.history.append(content["item"] | {"_step": content["step"].get("num", 0)})
            elif record["type"] == "artifact":
                found.artifacts.append(content)
            elif record["type"] == "exit":
                found.exit_code = content.get("exit_code", 0)
        return found

    def table(self, key: str) -> dict[str, Any]:
        (row,) = [row for row in self.history if f"{key}.path" in row]
        return json.loads((self.folder / "files" / row[f"{key}.path"]).read_text())


def segments(run: Run) -> list[Segment]:
    return [Segment.read(folder) for folder in sorted((run.folder / "wandb").glob("offline-run-*"))]


def with_examples(folder: Path, attack: str) -> np.ndarray:
    """Keeps two made-up examples beside an evaluation; the second is not perturbed."""
    clean = np.full((2, 3, 8, 8), 100, np.uint8)
    adversarial = clean.copy()
    adversarial[0, :, 0, 0], adversarial[0, :, 7, 7] = 110, 95
    np.savez(
        folder / "examples.npz", index=[3, 5], label=[0, 1], clean=clean,
        **{"clean/predicted": [0, 1], attack: adversarial, f"{attack}/predicted": [2, 1]},
    )  # fmt: skip
    return adversarial


@dataclass
class Store:
    outputs: Path
    records: list[Record]
    trained: list[Segment]  # of each run, its training
    judged: list[Segment]  # and its evaluation
    again: list[Segment]  # what the first run's evaluation sent when it had got examples


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two runs of one process, then the first again from the store, with examples and its checkpoint."""
    folder = tmp_path_factory.mktemp("wandb")
    outputs = folder / "outputs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", list(sys.argv))
        for name, value in {"HOME": str(folder / "home"), **CANARIES}.items():
            patch.setenv(name, value)
        assert cli._run("train", ["-m", *CELL, f"paths.outputs={outputs}", "seed=0,1"], False) == 0
        first, second = records(outputs)
        with_examples(first.evaluations[0].folder, "fgsm")
        command = [f"run={first.name}", "attack=fgsm", f"paths.outputs={outputs}", *SEND, "logger.checkpoint=true"]
        assert cli._run("eval", command, False) == 0
        logger = OmegaConf.create(first.config | {"logger": first.config["logger"] | {"checkpoint": True}})
        wandb_log.log_evaluation(logger, first.run, first.evaluations[0].results)  # what was sent is not sent again
        trained, judged, *again = segments(first.run)
        return Store(
            outputs, [first, second], *map(list, zip((trained, judged), segments(second.run), strict=True)), again
        )


def test_two_jobs_of_a_process_are_two_runs(store: Store) -> None:
    assert [s.run["run_id"] for s in store.trained] == [r.run.hash for r in store.records]
    assert [s.run["display_name"] for s in store.trained] == [r.name for r in store.records]
    assert [s.run["run_id"] for s in store.judged] == [r.run.hash for r in store.records]
    assert all(s.exit_code == 0 for s in (*store.trained, *store.judged, *store.again))
    assert all(s.run["resume"] for s in store.judged)  # `wandb sync` appends


def test_tags_job_type_and_config(store: Store) -> None:
    for seed, (trained, judged) in enumerate(zip(store.trained, store.judged, strict=True)):
        assert trained.run["job_type"] == judged.run["job_type"] == "train"
        axes = ["defense:none", "base:at", "model:cnn_small", "data:digits", f"seed:{seed}"]
        assert trained.run["tags"] == axes
        assert judged.run["tags"] == [*axes, "attack:fgsm"]
        config = trained.run["config"]["update"]
        assert config["optimizer"]["lr"] == store.records[seed].config["optimizer"]["lr"]
        assert config["data"]["root"] == "/<redacted>"


def test_learning_curves_are_those_of_metrics_csv(store: Store) -> None:
    for record, trained in zip(store.records, store.trained, strict=True):
        rows = [{k: float(v) for k, v in row.items()} for row in read_rows(record.run.metrics_file)]
        assert [row["_step"] for row in trained.history] == [1, 2]
        for row, logged in zip(rows, trained.history, strict=True):
            for name in row.keys() - {"step"}:
                assert logged[name] == pytest.approx(row[name], rel=1e-5), name


def test_summary_definitions(store: Store) -> None:
    trained, rows = store.trained[0], store.records[0].metrics
    for name in ("train_probe/clean", "train_probe/pgd1"):
        assert trained.defined[name]["summary"] == {"max": True, "last": True}
        best, last = max(row[name] for row in rows), rows[-1][name]
        assert trained.summary[name] == pytest.approx({"max": best, "last": last})
    assert trained.defined["train/loss"]["summary"] == {"last": True}
    assert trained.summary["train/loss"]["last"] == pytest.approx(rows[-1]["train/loss"], rel=1e-5)
    assert trained.defined["*"]["step_metric"] == "epoch"


def test_evaluation_is_in_the_summary_of_the_same_run(store: Store) -> None:
    for record, judged in zip(store.records, store.judged, strict=True):
        (evaluation,) = record.evaluations
        for metric in ("natural", "fgsm"):
            score = evaluation.results["metrics"][metric]
            logged = [judged.summary[f"eval/fgsm/{metric}{end}"] for end in ("", "/low", "/high")]
            assert logged == pytest.approx([score["accuracy"], score["low"], score["high"]])
        assert judged.summary["eval/fgsm/evaluation"] == evaluation.folder.name
        assert judged.summary["eval/fgsm/n"] == 30
        assert [row["_step"] for row in judged.history] == [3]  # after the epochs


def test_a_later_summary_repeats_the_earlier_ones(store: Store) -> None:
    """`wandb sync` replaces the summary by that of the last folder."""
    trained, judged, (again,) = store.trained[0].summary, store.judged[0].summary, store.again
    for name in ("train/loss", "train_probe/clean", "train_probe/pgd1", "lr", "epoch"):
        assert judged[name] == pytest.approx(trained[name], rel=1e-5), name
    assert judged.keys() <= again.summary.keys()


def test_tables_by_attack_and_by_class(store: Store) -> None:
    (evaluation,) = store.records[0].evaluations
    attacks = store.judged[0].table("eval/fgsm/attacks")
    scores = {row[0]: row[1:] for row in attacks["data"]}
    assert attacks["columns"] == ["attack", "accuracy", "low", "high", "n"]
    assert scores["fgsm"][0] == evaluation.accuracy("fgsm")
    classes = store.judged[0].table("eval/fgsm/classes")
    verdicts = evaluation.verdicts()
    assert classes["columns"] == ["class", "n", "natural", "fgsm"]
    assert [row[0] for row in classes["data"]] == [str(c) for c in range(10)]
    for label, row in enumerate(classes["data"]):
        own = verdicts["label"] == label
        assert row[1] == own.sum()
        assert row[3] == pytest.approx(verdicts["fgsm"][own].mean())


def test_images_of_examples_and_the_checkpoint(store: Store) -> None:
    (again,) = store.again
    (row,) = again.history
    assert row["_step"] == 4
    assert row["eval/fgsm/examples/fgsm.captions"] == [
        "#3, class 0: 0, under fgsm 2; perturbation x12.7",
        "#5, class 1: 1, under fgsm 1; perturbation x127",
    ]
    from PIL import Image

    files = row["eval/fgsm/examples/fgsm.filenames"]
    strip = np.asarray(Image.open(again.folder / "files" / files[0]))
    assert strip.shape == (96, 288, 3)
    small = strip[::12, ::12]
    assert small[0, [0, 8, 16]].tolist() == [[100] * 3, [255] * 3, [110] * 3]
    assert small[7, [7, 15, 23]].tolist() == [[100] * 3, [64] * 3, [95] * 3]
    assert small[1, 9].tolist() == [128] * 3
    assert again.table("eval/fgsm/classes")["data"][2][0] == "2"
    (model,) = [a for a in again.artifacts if a["type"] == "model"]
    (file,) = model["manifest"]["contents"]
    assert Path(file["local_path"]) == store.records[0].run.last.resolve()
    assert not any(a["type"] == "model" for a in store.judged[0].artifacts)


def test_no_secret_and_nothing_of_the_machine_is_written(store: Store) -> None:
    files = [path for path in store.outputs.parent.rglob("*") if path.is_file() and "/wandb/" in str(path)]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for canary in (*CANARIES.values(), "logger.offline=true"):
            assert canary.encode() not in content, (path, canary)
    assert not any("host" in segment.run for segment in (*store.trained, *store.judged))
    names = {path.name for path in files}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "diff.patch"}


def test_a_run_trained_without_wandb_gets_its_curves(store: Store, tmp_path: Path) -> None:
    source = store.records[1]
    run = Run(tmp_path / source.name)
    shutil.copytree(source.run.folder, run.folder, ignore=shutil.ignore_patterns("wandb"))
    other = run.eval / "other-0123456789"  # another suite's, which goes with it
    shutil.copytree(source.evaluations[0].folder, other)
    results = source.evaluations[0].results
    write_json(other / "results.json", {**results, "axes": {**results["axes"], "attack": "other"}, "n": 7})
    cfg = OmegaConf.create(source.config)
    wandb_log.log_evaluation(cfg, run, source.evaluations[0].results)
    (segment,) = segments(run)
    assert [row["_step"] for row in segment.history] == [1, 2, 3]
    for row, logged in zip(source.metrics, segment.history, strict=False):
        assert row == pytest.approx({name: logged[name] for name in row})
    assert segment.defined["train_probe/clean"]["summary"] == {"max": True, "last": True}
    assert (segment.summary["eval/fgsm/n"], segment.summary["eval/other/n"]) == (30, 7)
    assert segment.table("eval/other/classes") == segment.table("eval/fgsm/classes")
    assert segment.run["tags"][-2:] == ["attack:fgsm", "attack:other"]


def test_a_failed_training_ends_its_run(
    cell: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cfg = cell("logger=wandb", "logger.offline=true")
    OmegaConf.update(cfg, "sweep", {"name": "lambda"}, force_add=True)
    run = Run(tmp_path / "none-at-resnet_small-digits-s0-0123456789")
    with pytest.raises(RuntimeError, match="broken"), loggers.opened(cfg, run):
        raise RuntimeError("broken")
    (segment,) = segments(run)
    assert segment.exit_code == 1
    assert segment.run["run_group"] == "lambda"
    with loggers.opened(cfg, run) as (logger,):
        assert logger.experiment.id == "0123456789"


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key in the environment, in a home, in W&B's session."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()


def test_mode(nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_run.mode(None) == "offline"
    with pytest.raises(UserError, match=r"logger\.offline=false.*wandb login"):
        wandb_run.mode(False)
    monkeypatch.setenv("WANDB_API_KEY", CANARIES["WANDB_API_KEY"])
    assert wandb_run.mode(None) == "online"
    assert wandb_run.mode(True) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run.mode(None) == "disabled"


def test_a_server_that_refuses_is_a_warning_and_offline(
    nobody: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    init = wandb.init
    monkeypatch.setattr(wandb_run, "mode", lambda offline: "online")

    def refuse(mode: str, **keys: Any) -> Any:
        if mode == "online":
            raise wandb.errors.CommError("no route\nto the server")
        return init(mode=mode, **keys)

    monkeypatch.setattr(wandb, "init", refuse)
    axes = {"defense": "fsr", "base": "at", "model": "m" * 80, "data": "digits"}
    config = {"axes": axes, "seed": 3, "api_key": "k"}
    with wandb_run.open_run(tmp_path / "fsr-at-m-digits-s3-0123456789", config) as run:
        assert run.settings.mode == "offline"
        assert run.settings.program == "redoubt"
        assert run.config["api_key"] == "<redacted>"
        assert max(map(len, run.tags)) == 64
    assert [r.getMessage() for r in caplog.records if r.name == "redoubt"] == ["W&B: no route; going on offline"]


def test_a_failure_costs_no_result(
    store: Store, cell: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **keys: object) -> None:
        raise OSError("disk full")

    record = store.records[1]
    monkeypatch.setattr(wandb_log, "open_run", fail)
    results = {**record.evaluations[0].results, "audited": True}  # changed, so that it is sent again
    wandb_log.log_evaluation(cell(), record.run, results)  # logger=none
    assert not caplog.records
    wandb_log.log_evaluation(cell("logger=wandb"), record.run, results)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("W&B: disk full; evaluation fgsm-")


def test_a_suite_s_name_is_of_the_evaluation_that_stands_for_the_run(outputs: Path) -> None:
    """One at another eps gets a name of its own, even if it is the newest, and keeps it once it was sent."""
    folder = stores.add_run(outputs, stores.config(), "0" * 10)
    rng = np.random.default_rng(0)
    for hash, eps in (("a", 8 / 255), ("b", 16 / 255), ("c", 4 / 255)):
        verdicts, day = stores.nested(rng, 40, ["fgsm"]), f"2026-12-0{ord(hash) - 96}"
        stores.add_evaluation(folder, verdicts, hash=hash, eps=eps, evaluated=day)
    record = Record(Run(folder))
    by = {e.folder.name: e for e in record.evaluations}
    assert list(by) == ["fsr_suite-c", "fsr_suite-b", "fsr_suite-a"]
    found = wandb_log.keyed(record, by["fsr_suite-b"], ())
    assert {key: e.folder.name for key, e in found.items()} == {
        "fsr_suite": "fsr_suite-a",
        "fsr_suite-b": "fsr_suite-b",
    }
    assert set(wandb_log.keyed(record, by["fsr_suite-a"], ["fsr_suite-c"])) == {"fsr_suite", "fsr_suite-c"}
    said = wandb_log.standing_summary(record)
    assert said["robust"] == by["fsr_suite-a"].accuracy("fgsm")
    assert said["robust/of"] == "fsr_suite, linf eps 8/255 (0.03137), student weights of last"
    assert wandb_log.summary(by["fsr_suite-b"], "fsr_suite-b")["eval/fsr_suite-b/eps"] == 16 / 255
