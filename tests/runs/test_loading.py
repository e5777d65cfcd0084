"""A trained net comes back from its run, its name or its file, as it was; a bad file is one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor

import redoubt
from redoubt.build import build_data
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.runs import running
from redoubt.runs.checkpoints import checksum_file, write_checkpoint
from redoubt.runs.store import Run

Cell = Callable[..., DictConfig]
Finished = Callable[..., tuple[Run, RobustModule]]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, ...], tuple[Path, RobustModule]]]:
    """Runs that were trained already, by their options."""
    return tmp_path_factory.mktemp("shelf"), {}


@pytest.fixture
def finished(cell: Cell, outputs: Path, monkeypatch: pytest.MonkeyPatch, shelf: Any) -> Finished:
    """Gives a run of a cell of its own, and the module as it stood at training's end."""
    place, trained = shelf

    def train(*overrides: str) -> tuple[Run, RobustModule]:
        if overrides not in trained:
            kept = []
            true = running._fit

            def fit(*args: Any) -> RobustModule:
                kept.append(true(*args))
                return kept[-1]

            with monkeypatch.context() as patch:
                patch.setattr(running, "_fit", fit)
                cfg = cell("trainer.max_epochs=1", *overrides, f"paths.outputs={place}")
                trained[overrides] = running.train(cfg, build_data(cfg)).folder, kept[-1].eval()
        folder, module = trained[overrides]
        copy = outputs / "runs" / folder.name
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        return Run(copy), module

    return train


def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits(module: RobustModule) -> Tensor:
    with torch.no_grad():
        return module.logits(images())


@pytest.mark.parametrize("options", [["defense=fsr", "base=mart"], ["model=cnn_small"], ["channels_last=true"]])
def test_logits_are_those_of_the_end_of_training(finished: Finished, options: list[str]) -> None:
    run, module = finished(*options)
    back = redoubt.load(run.folder)
    assert torch.equal(logits(back), logits(module))
    for key, tensor in module.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


def test_by_run_folder_name_or_file(finished: Finished, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = finished()
    expected = logits(redoubt.load(run))
    monkeypatch.chdir(outputs.parent)
    for source in (run.folder, str(run.folder), run.name, run.hash, run.last, str(run.last)):
        module = redoubt.load(source)
        assert torch.equal(logits(module), expected)
        assert not any(m.training for m in module.modules())
        assert isinstance(module, RobustModule)
    monkeypatch.chdir("/")
    assert torch.equal(logits(redoubt.load(run.name, outputs=outputs)), expected)


def test_a_moved_run_loads(finished: Finished, tmp_path: Path) -> None:
    run, _ = finished()
    expected = logits(redoubt.load(run))
    moved = shutil.move(run.folder, tmp_path / "moved")
    assert torch.equal(logits(redoubt.load(moved)), expected)
    assert torch.equal(logits(redoubt.load(Path(moved) / "checkpoints/last.ckpt")), expected)


def test_loading_leaves_torchs_random_numbers(finished: Finished) -> None:
    run, _ = finished()
    before = torch.get_rng_state()
    redoubt.load(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_averaged_weights_and_the_students(finished: Finished) -> None:
    run, module = finished("ema=wa", "ema.decay=0.5")
    student, average = redoubt.load(run, weights="student"), redoubt.load(run, weights="ema")
    assert torch.equal(logits(redoubt.load(run)), logits(average))  # what the run's config evaluates
    assert not torch.equal(logits(student), logits(average))
    assert module.ema is not None
    live = module.state_dict()
    for name, tensor in student.net.state_dict().items():
        assert torch.equal(tensor, live[f"net.{name}"])
    for name, tensor in module.ema.average.items():
        assert torch.equal(average.net.state_dict()[name], tensor)


def test_best_needs_a_validation_split(finished: Finished) -> None:
    run, _ = finished("data.val_fraction=0.3")
    redoubt.load(run, checkpoint="best")
    redoubt.load(run.best)
    other, _ = finished()
    with pytest.raises(UserError, match=r"best\.ckpt does not exist; best needs a validation split"):
        redoubt.load(other, checkpoint="best")
    with pytest.raises(UserError, match="take last or best"):
        redoubt.load(other, checkpoint="first")


def refused(source: Path | Run, *says: str, **more: str) -> None:
    with pytest.raises(UserError) as error:
        redoubt.load(source, **more)
    line = str(error.value)
    assert "\n" not in line
    for part in says:
        assert part in line, line


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_checkpoint(finished: Finished, keep: float) -> None:
    run, _ = finished()
    whole = run.last.read_bytes()
    run.last.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    refused(run, str(run.last), "not a readable checkpoint")


def test_files_that_are_no_checkpoint_of_ours(finished: Finished, tmp_path: Path) -> None:
    run, module = finished()
    text = run.checkpoints / "notes.ckpt"
    text.write_text("nothing")
    refused(text, str(text), "not a readable checkpoint")
    foreign = run.checkpoints / "foreign.ckpt"
    torch.save(module.net.state_dict(), foreign)
    refused(foreign, str(foreign), "not a checkpoint of ours", "eval.py")
    outside = tmp_path / "outside.ckpt"
    shutil.copy(run.last, outside)
    refused(outside, str(outside), "no run's folder", "checkpoint=")
    refused(tmp_path / "nowhere.ckpt", "nowhere.ckpt")


def test_a_checkpoint_that_would_run_something(finished: Finished, tmp_path: Path) -> None:
    run, _ = finished()

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    write_checkpoint({"state_dict": {}, "redoubt": {"x": Trap()}}, run.last)
    refused(run, str(run.last))
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_net(finished: Finished) -> None:
    run, _ = finished()
    for overrides, key in (("model.widths=[16,32,64,64]", "model.widths"), ("defense=fsr", "defense._target_")):
        other, _ = finished(overrides)
        shutil.copy(other.last, run.last)
        refused(run, str(run.last), "SHA-256")
        shutil.copy(checksum_file(other.last), checksum_file(run.last))
        refused(run, str(run.config_file), "differs in", key)
        anonymous(run.last)
        refused(run, str(run.last), "another net", "the first is")


def anonymous(file: Path) -> None:
    """Leaves out what a checkpoint says of its run."""
    content = torch.load(file, weights_only=True)
    del content["run"]
    write_checkpoint(content, file)


def test_a_config_that_was_edited(finished: Finished) -> None:
    """Another normalisation or class of the net would be another function with the same weights."""
    run, _ = finished()
    config = run.config()
    for key, value in (("normalize", True), ("_target_", "redoubt.nets.PreActResNet18")):
        run.config_file.write_text(yaml.safe_dump({**config, "model": {**config["model"], key: value}}))
        refused(run, str(run.config_file), "differs in model." + key, "put the values back")
    elsewhere = {**config, "paths": {"outputs": "elsewhere"}, "seed": float(config["seed"])}
    run.config_file.write_text(yaml.safe_dump(elsewhere))
    redoubt.load(run)


def test_weights_that_are_not_there(finished: Finished) -> None:
    run, _ = finished()
    refused(run, "evaluation.weights='ema'", weights="ema")
    run.last.unlink()
    refused(run, str(run.last), "does not exist")


def test_a_run_of_unknown_name(outputs: Path, finished) -> None:
    run, _ = finished()
    with pytest.raises(UserError, match=f"did you mean {run.name}"):
        redoubt.load(run.name[:-3] + "xyz", outputs=outputs)


def test_a_config_that_names_a_strangers_function(finished: Finished) -> None:
    run, _ = finished()
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("redoubt.nets.small.ResNetSmall", "os.system"))
    anonymous(run.last)
    refused(run, "os.system", "not allowed")
