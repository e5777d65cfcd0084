"""Every extra can be installed as pip resolves it, which knows no override, with nothing old that has known holes."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]

#: Releases before these have known holes.
AT_LEAST = {"requests": "2.33", "urllib3": "2.7"}


@functools.cache
def requirements(package: str) -> list[Requirement]:
    return [Requirement(text) for text in metadata.requires(package) or []]


@functools.cache
def version(package: str) -> str:
    return metadata.version(package)


def needed(requirement: Requirement, asked: set[tuple[str, frozenset[str]]]) -> Iterator[tuple[str, Requirement]]:
    """(who, what) of a requirement and of all that it needs, as far as it is installed here."""
    key = canonicalize_name(requirement.name), frozenset(requirement.extras)
    if key in asked:
        return
    asked.add(key)
    for further in requirements(requirement.name):
        extras = ("", *requirement.extras)
        if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement.name, further
            yield from needed(further, asked)


@pytest.mark.parametrize("extra", EXTRAS)
def test_nothing_in_an_extra_asks_for_another_release_than_the_locked_one(extra: str) -> None:
    """So pip, which takes every range as it stands, finds the locked releases too."""
    for text in (*PROJECT["project"]["dependencies"], *EXTRAS[extra]):
        ours = Requirement(text)
        for who, what in [("redoubt", ours), *needed(ours, set())]:
            locked = version(what.name)
            assert what.specifier.contains(locked, prereleases=True), f"{who} needs {what}, locked is {locked}"


def test_what_is_locked_has_no_known_holes() -> None:
    for package, least in AT_LEAST.items():
        assert Version(version(package)) >= Version(least)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_as_pip_would_resolve_it(extra: str, tmp_path: Path) -> None:
    uv = shutil.which("uv") or str(ROOT / ".tools/bin/uv")
    own = [*PROJECT["project"]["dependencies"], *EXTRAS[extra]]
    wanted = tmp_path / "requirements.in"
    wanted.write_text("\n".join(own))
    try:
        command = [uv, "pip", "compile", "--no-config", "--no-header", "--no-annotate", "--quiet", str(wanted)]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        pytest.skip("uv is not installed")
    if re.search(r"error sending request|dns error|failed to fetch|timed out", ended.stderr, re.IGNORECASE):
        pytest.skip("no package registry can be reached")
    assert ended.returncode == 0, ended.stderr
    found = dict(line.split(";")[0].strip().split("==") for line in ended.stdout.splitlines() if "==" in line)
    assert "torch" in found
    for package in AT_LEAST.keys() & found.keys():
        assert Version(found[package]) >= Version(AT_LEAST[package]), f"{package} {found[package]}"
