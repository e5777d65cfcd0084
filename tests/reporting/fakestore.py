"""A store whose numbers a test makes up: runs with the configs that their command lines would have, and evaluations."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from redoubt.reporting.match import composed
from redoubt.runs.identity import plain
from redoubt.runs.store import readable_name


class FakeStore:
    """Args: outputs: The folder that holds runs/."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        (outputs / "runs").mkdir(parents=True)

    def run(self, *words: str, seed: int = 0, state: str = "done", speed: float | None = None, **changes: Any) -> Path:
        """A run of a command line; ``changes`` are values by dotted key, with __ for the dots."""
        config = copy.deepcopy(plain(composed(*words)))
        for key, value in {"seed": seed, "data__seed": seed, **changes}.items():
            node = config
            *parents, leaf = key.split("__")
            for part in parents:
                node = node[part]
            node[leaf] = value
        number = len(list((self.outputs / "runs").iterdir()))
        folder = self.outputs / "runs" / f"{readable_name(config['axes'], seed)}-{number:010x}"
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "status.json").write_text(json.dumps({"state": state}))
        (folder / "environment.json").write_text(json.dumps({"devices": ["Some GPU"]}))
        if speed is not None:
            rows = "".join(f"{epoch},{speed * factor}\n" for epoch, factor in ((1, 0.5), (2, 1.0), (3, 1.0)))
            (folder / "metrics.csv").write_text(f"epoch,images_per_second\n{rows}")
        return folder

    def evaluate(
        self, folder: Path, n: int = 10_000, limit: int | None = None, suite: str = "", **percent: Any
    ) -> None:
        """An evaluation by the suite of the run's config, or another; accuracies in per cent by metric."""
        config = yaml.safe_load((folder / "config.yaml").read_text())
        attack = plain(composed(f"attack={suite}"))["attack"] if suite else config["attack"]
        axes = {**config["axes"], "attack": suite or config["axes"]["attack"], "seed": config["seed"]}
        n = limit or 10_000
        results = {
            "run": folder.name,
            "axes": axes,
            "threat": {"norm": attack["norm"], "eps": attack["eps"]},
            "checkpoint": "last",
            "weights": config["evaluation"]["weights"],
            "n": n,
            "metrics": {m: {"accuracy": a / 100, "low": 0.0, "high": 1.0, "n": n} for m, a in percent.items()},
            "nrr": {},
        }
        place = folder / "eval" / f"{axes['attack']}-{len(list(folder.glob('eval/*'))):010x}"
        place.mkdir(parents=True)
        settings = {"attack": attack, "evaluation": config["evaluation"], "limit_test": limit}
        (place / "attack.json").write_text(json.dumps(settings))
        (place / "results.json").write_text(json.dumps(results))
