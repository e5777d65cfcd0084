"""torch.compile: kept between runs, and done without where it does not work."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from redoubt.training import compiling


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may leave its answer, or its folder, to another."""
    monkeypatch.setattr(compiling, "works", compiling.functools.cache(compiling.works.__wrapped__))


def test_without_a_compiler_training_goes_on_with_one_line(monkeypatch, caplog):
    def broken(function, **options):
        def call(*args):
            raise RuntimeError("No working C++ compiler\nfound\n\nand how to set one up")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    doubled, tripled = (compiling.compiled(f, True) for f in (lambda x: 2 * x, lambda x, by: 3 * x + by))
    with caplog.at_level(logging.WARNING, logger="redoubt"):
        assert doubled(torch.ones(1)).item() == 2
        assert tripled(torch.ones(1), 1).item() == 4
        assert doubled(torch.ones(1)).item() == 2
    (record,) = caplog.records
    assert record.getMessage() == (
        "compile: torch.compile does not work here, training goes on without it: No working C++ compiler found"
    )


def test_a_fault_of_the_function_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pytest.raises(ZeroDivisionError):
        compiling.compiled(lambda x: 1 / 0)(torch.ones(1))


@pytest.mark.parametrize(
    ("mode", "means"), [(True, "default"), ("reduce-overhead", "reduce-overhead"), ("max-autotune", "max-autotune")]
)
def test_the_mode_reaches_torch(monkeypatch, mode, means):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    assert compiling.compiled(lambda x: x + 1, mode)(torch.ones(1)).item() == 2
    assert asked[0] == {"mode": means}


def test_where_the_code_is_kept(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compiling.CACHE, raising=False)
    compiling.compiled(lambda x: x)
    assert Path(compiling.os.environ[compiling.CACHE]) == tmp_path / "redoubt" / "compiled"
    monkeypatch.setenv(compiling.CACHE, str(tmp_path / "mine"))
    compiling.compiled(lambda x: x)
    assert Path(compiling.os.environ[compiling.CACHE]) == tmp_path / "mine"


def test_who_compiles_does_not_hang(monkeypatch):
    """The watch of a rank hears when torch.compile is at work."""
    from torch._dynamo.callback import CallbackTrigger, callback_handler

    class Watch:
        compiling = False

    monkeypatch.setattr(compiling, "watch", [Watch()])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiling.compiled(lambda x: x)
    with callback_handler.install_callbacks(CallbackTrigger.DYNAMO, "0/0"):
        assert compiling.watch[0].compiling
    assert not compiling.watch[0].compiling
