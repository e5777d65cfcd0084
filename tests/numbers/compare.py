"""``make numbers`` and ``make compare``: run the cells, store their numbers or hold two commits against each other."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from tests.numbers.cells import STORED, cells, machine, moved, runs_here, stored, words

ROOT = Path(__file__).resolve().parents[2]


def chosen(only: str) -> dict[str, list[str]]:
    """Words of the command line by ``defense cell``, of the cells that this machine can run."""
    found = {f"{d} {c}": words(d, c) for d, c, _ in cells() if runs_here(c)}
    found = {name: argv for name, argv in found.items() if only in name}
    if not found:
        sys.exit(f"CELLS={only}: no cell's name holds this; they are {', '.join(f'{d} {c}' for d, c, _ in cells())}")
    return found


def results(trees: dict[str, Path], wanted: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What `tests.numbers.run` finds in each source tree; the trees are worked on at the same time."""
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        begun = {}
        for name, tree in trees.items():
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree / "src")}
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("run.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(Path(folder) / f"{name}.err").open("w"),
                text=True, env=env, cwd=folder,
            )  # fmt: skip
            assert process.stdin is not None
            json.dump({"cells": wanted, "to": str(Path(folder) / f"{name}.pt")}, process.stdin)
            process.stdin.close()
            begun[name] = process
        try:
            for name, process in begun.items():
                assert process.stdout is not None
                for _ in progress.track(process.stdout, total=len(wanted), description=name):
                    pass
                if process.wait() != 0:
                    sys.exit(f"{name}: the cells could not be run:\n{(Path(folder) / f'{name}.err').read_text()}")
        finally:
            for process in begun.values():
                process.kill()
        return {name: torch.load(Path(folder) / f"{name}.pt", weights_only=True) for name in trees}


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of another commit, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"BASE={commit}: {made.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def difference(now: dict[str, Any], before: dict[str, Any]) -> str | None:
    """The first difference between what two commits make of a cell, in the order in which a run comes to it."""
    if "failed" in now or "failed" in before:
        return f"now: {now.get('failed', 'passes')}; before: {before.get('failed', 'passes')}"
    for (name, new), (other, old) in zip(now["steps"], before["steps"], strict=False):
        if name != other:
            return f"{name} where {other} was"
        if found := tensor_difference(new, old):
            return f"{name}, {found}"
    if len(now["steps"]) != len(before["steps"]):
        return f"{len(now['steps'])} steps where {len(before['steps'])} were"
    if found := next(moved(now["numbers"], before["numbers"], 0.0, False), None):
        return found
    for place in ("checkpoint", "verdicts"):
        if found := tensor_difference(now[place], before[place]):
            return f"{place}, {found}"
    return None if now["run"] == before["run"] else f"run {now['run']} where {before['run']} was"


def tensor_difference(now: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> str | None:
    """The first of some named tensors that differs in a bit, as a line."""
    for name in dict.fromkeys([*before, *now]):
        new, old = now.get(name), before.get(name)
        if new is None or old is None:
            return f"{name} is {'gone' if new is None else 'new'}"
        if new.shape != old.shape or new.dtype != old.dtype:
            return f"{name}: {new.dtype} {list(new.shape)} where {old.dtype} {list(old.shape)} was"
        bits = [t.contiguous().reshape(-1, 1).view(torch.uint8) for t in (new, old)]
        differ = int((bits[0] != bits[1]).any(dim=1).sum())
        if differ:
            gap = (new.double() - old.double()).abs().max()
            return f"{name}: {differ} of {new.numel()} differ, {float(gap):.3g} at most"
    return None


def compare(base: str, only: str) -> int:
    """Run the cells on this tree and on a commit; print the first difference of each cell that differs."""
    wanted = chosen(only)
    with worktree(base) as tree:
        found = results({"here": ROOT, base: tree}, wanted)
    differing = 0
    for name in wanted:
        first = difference(found["here"][name], found[base][name])
        if first is not None:
            differing += 1
            print(f"{name}: {first}")
    print(f"{len(wanted)} cells, {differing} differ from {base}" if differing else f"{len(wanted)} cells equal {base}")
    return int(differing > 0)


def store(only: str) -> int:
    """Run the cells and store their numbers; print which moved, by how much."""
    here, wanted = machine(), chosen(only)
    found = results({"cells": ROOT}, wanted)["cells"]
    failed = {name: result["failed"] for name, result in found.items() if "failed" in result}
    if failed:
        sys.exit("\n".join(f"{name}: {why}" for name, why in failed.items()))
    changed = 0
    for defense in dict.fromkeys(name.partition(" ")[0] for name in wanted):
        before = stored(defense)
        if before["machine"] not in ({}, here):
            print(f"{defense}: stored on {before['machine']}, now on {here}")
        kept: dict[str, Any] = {}
        for _, cell, _ in (c for c in cells() if c[0] == defense):
            name, old = f"{defense} {cell}", before["cells"].get(cell)
            if name not in found:  # not asked for, or not to be had on this machine
                by = old and old.get("machine", before["machine"])
                kept |= {cell: old | ({"machine": by} if by != here else {})} if old else {}
                continue
            kept[cell] = found[name]["numbers"]
            lines = ["new"] if old is None else list(moved(kept[cell], old, 1e-6, False))
            changed += bool(lines)
            for line in lines:
                print(f"{name}: {line}")
        for cell in before["cells"].keys() - kept.keys():
            print(f"{defense} {cell}: gone")
        text = json.dumps({"machine": here, "cells": kept}, indent=1)
        (STORED / f"{defense}.json").write_text(text + "\n")
    print(f"{len(wanted)} cells stored, {changed} of them new or moved")
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.numbers.compare", description=__doc__)
    parser.add_argument("base", nargs="?", help="the commit to compare with; none: store the numbers")
    parser.add_argument("--only", default="", help="cells whose name holds this, as 'fsr trades'")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # the worktree is removed, and nothing is left running
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(compare(given.base, given.only) if given.base else store(given.only))


if __name__ == "__main__":
    main()
