"""Completion in bash, and what must answer at once: no torch, little time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """No torch, and ``redoubt`` on the path."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    program = tmp_path / "redoubt"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m redoubt.cli "$@"\n')
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def test_tab(environment: dict[str, str], tmp_path: Path) -> None:
    """What bash offers after a part of a line, with its own rules of where a word begins."""
    shim = f"{sys.executable} {ROOT / 'src' / 'train.py'}"
    lines = {
        f"{shim} defe": {"defense.", "defense="},
        f"{shim} -m defense=f": {"fsr"},
        "redoubt train defense=fsr defense.lambda_": {"defense.lambda_sep=", "defense.lambda_rec="},
        "redoubt train sweep=fsr_": {"fsr_lambda", "fsr_tau"},
        "redoubt ev": {"eval"},
        "python elsewhere.py defe": set(),
    }
    script = """
    eval "$(redoubt train -sc install=bash)"
    complete -p redoubt >/dev/null || exit 1
    COMP_WORDBREAKS=$'"\\'><=;|&(: '
    while IFS= read -r COMP_LINE; do COMP_POINT=${#COMP_LINE}; _redoubt; echo "${COMPREPLY[*]}"; done
    """
    done = subprocess.run(
        ["bash", "-c", script], input="".join(f"{line}\n" for line in lines), env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    offered = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip(lines, offered, strict=True)) == lines


def test_other_shells_and_removal(environment: dict[str, str], tmp_path: Path) -> None:
    def redoubt(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["redoubt", *argv], env=environment, cwd=tmp_path, capture_output=True, text=True)

    fish = redoubt("train", "-sc", "install=fish")
    assert (fish.returncode, fish.stderr.count("\n")) == (2, 1)
    assert "install=bash" in fish.stderr
    assert redoubt("train", "-sc", "uninstall=bash").stdout.startswith("complete -r redoubt")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--help", "defense=fsr"], ["defense: afd, cure, fsr, none", "sweep: ", "lambda_sep: 1.0"]),
        (["--cfg", "job"], ["max_epochs: ${schedule.epochs}"]),
    ],
)
def test_answers_at_once(argv: list[str], says: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    """In a few times what the import of Hydra takes by itself, whatever the machine."""

    def seconds(*command: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, text=True, capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout

    least, _ = seconds("-c", "import hydra")
    spent, out = seconds(str(ROOT / "src" / "train.py"), *argv)
    for part in says:
        assert part in out
    assert spent < 4 * least
