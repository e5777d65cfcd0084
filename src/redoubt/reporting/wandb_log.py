"""An evaluation in W&B: accuracies in the summary, tables by attack and by class, the images and the checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from redoubt.evaluation.results import named, robust
from redoubt.reporting.collect import Evaluation, Record, standing_of
from redoubt.reporting.table import place
from redoubt.reporting.wandb_run import accuracies, define_curves, open_run, warn
from redoubt.runs.files import read_json, write_json
from redoubt.runs.store import Run
from redoubt.secrets import redacted

TARGET = "redoubt.training.loggers.wandb_logger"
#: Side in pixels to which smaller images are enlarged, for they are shown as they are.
SIDE = 96


def log_evaluation(cfg: DictConfig, run: Run, results: Mapping[str, Any]) -> None:
    """Sends an evaluation to the W&B run of its run, once; only where the config has ``logger=wandb``.

    It continues that run by its id. Offline this is a further folder of the same id, which `wandb sync` appends. What
    was sent is noted in ``<run>/wandb/evaluations.json``; results that an audit has changed since are sent again.

    Args:
        cfg: Resolved config of the evaluation; its ``logger`` is read.
        run: The run that was evaluated.
        results: The contents of results.json.
    """
    if cfg.logger.get("_target_") != TARGET:
        return
    evaluation = Evaluation(run.eval / results["evaluation"], named(results))
    try:
        with _staging(run.folder / "wandb" / "staging"):
            _send(cfg.logger, run, evaluation)
    except Exception as error:  # the results are stored: nothing about W&B may cost them
        warn(error, f"evaluation {results['evaluation']} was not sent, the same command tries again")


def _send(logger: Any, run: Run, evaluation: Evaluation) -> None:
    noted_file = run.folder / "wandb" / "evaluations.json"
    sent = read_json(noted_file) or {}  # evaluation -> digests of what was sent
    where = [logger.get(key) for key in ("project", "entity", "checkpoint")]
    results = {k: v for k, v in evaluation.results.items() if k != "members"}  # which the evaluation's name stands for
    content = json.dumps([*where, results, evaluation.examples() is not None], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:10]
    mine = sent.setdefault(str(evaluation.results["evaluation"]), [])
    if digest in mine:
        return
    record = Record(run)
    shown = keyed(record, evaluation, sent)
    new = not any(run.folder.glob("wandb/*run-*"))  # trained without W&B
    # W&B's steps only grow: epochs first, then one for each evaluation, whichever process or folder it comes from.
    step = len(record.metrics) + 1 + sum(map(len, sent.values()))
    keys = {key: logger[key] for key in ("project", "entity", "offline") if key in logger}
    with open_run(run.folder, record.config, attacks=[e.attack for e in shown.values()], **keys) as opened:
        if new:
            define_curves(opened, record.config)
            for row in record.metrics:
                opened.log(row, step=int(row["epoch"]))
        # `wandb sync` appends a folder's history, but puts its summary in the place of the one before: so all of it.
        everything = [media(e, key) for key, e in shown.items()]
        opened.log({key: value for found in everything for key, value in found.items()}, step=step)
        opened.summary.update(curves(record))
        for key, each in shown.items():
            opened.summary.update(summary(each, key))
        opened.summary.update(standing_summary(record))
        if logger.get("checkpoint"):
            opened.log_artifact(_artifact(run, str(evaluation.results["checkpoint"])))
    mine.append(digest)
    write_json(noted_file, sent)


def keyed(record: Record, evaluation: Evaluation, sent: Collection[str]) -> dict[str, Evaluation]:
    """The evaluations that W&B has, by the name under which it has their numbers.

    The suite is the name of that one of its evaluations which stands for the run; one at another eps, of other weights
    or images is called by its folder, as ``fgsm-19ec9c54c2``, if it is the one that is sent or was sent before.
    """
    known = {e.folder.name: e for e in (evaluation, *record.evaluations)}
    first = {
        a: standing_of(record, [e for e in known.values() if e.attack == a])
        for a in dict.fromkeys(e.attack for e in known.values())
    }
    found = {attack: e for attack, e in first.items() if e is not None}
    rest = {name: e for name, e in known.items() if e is not found[e.attack]}
    return found | {name: e for name, e in rest.items() if name in (evaluation.folder.name, *sent)}


def standing_summary(record: Record) -> dict[str, Any]:
    """``robust`` and ``natural``: the numbers that stand for the run, and what they are of."""
    stands = record.standing
    if stands is None:
        return {}
    metrics = stands.results["metrics"]
    attack = robust(metrics)
    found = {"natural": stands.accuracy("natural"), "robust/of": place(stands.results)}
    return found | ({"robust": stands.accuracy(attack), "robust/attack": attack} if attack else {})


@contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """W&B copies tables to ``WANDB_DATA_DIR`` until they are sent: into the run, not into somebody's home."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]


def curves(record: Record) -> dict[str, Any]:
    """The summary of the learning curves, as W&B makes it of what `define_curves` says."""
    if not record.metrics:
        return {}
    last = record.metrics[-1]
    found: dict[str, Any] = {**last}
    if "train/loss" in last:
        found["train/loss"] = {"last": last["train/loss"]}
    for name in accuracies(record.config):
        values = [row[name] for row in record.metrics if name in row]
        if values:
            found[name] = {"max": max(values), "last": values[-1]}
    return found


def summary(evaluation: Evaluation, key: str) -> dict[str, Any]:
    """``eval/<key>/<attack>``, its ``/low`` and ``/high`` in [0, 1], and what was evaluated."""
    results, suite = evaluation.results, f"eval/{key}"
    found: dict[str, Any] = {}
    for metric, score in results["metrics"].items():
        found[f"{suite}/{metric}"] = score["accuracy"]
        found |= {f"{suite}/{metric}/{bound}": score[bound] for bound in ("low", "high")}
    found |= {f"{suite}/nrr/{metric}": value for metric, value in results["nrr"].items()}
    for fact in ("evaluation", "checkpoint", "weights", "n", "eval_seconds", "audited"):
        found[f"{suite}/{fact}"] = results[fact]
    found |= {f"{suite}/{part}": value for part, value in evaluation.threat.items()}
    return redacted(found)


def media(evaluation: Evaluation, key: str) -> dict[str, Any]:
    """W&B's tables and images of an evaluation, by their own key."""
    import wandb

    suite = f"eval/{key}"
    examples = evaluation.examples()
    found: dict[str, Any] = {
        f"{suite}/attacks": wandb.Table(**by_attack(evaluation)),
        f"{suite}/classes": wandb.Table(**by_class(evaluation.verdicts())),
    }
    if examples is not None:
        for attack in (n for n in examples if f"{n}/predicted" in examples and n != "clean"):
            strips = [wandb.Image(strip, caption=text) for strip, text in pictures(examples, attack)]
            found[f"{suite}/examples/{attack}"] = strips
    return found


def by_attack(evaluation: Evaluation) -> dict[str, Any]:
    """Columns and rows: each attack's accuracy with its 95 % interval."""
    metrics = evaluation.results["metrics"]
    rows = [[name, *(score[key] for key in ("accuracy", "low", "high", "n"))] for name, score in metrics.items()]
    return {"columns": ["attack", "accuracy", "low", "high", "n"], "data": rows}


def by_class(verdicts: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Columns and rows: each class's accuracy under each attack.

    Args:
        verdicts: ``label`` int64 [N] and, by attack, which examples stayed right, bool [N].
    """
    attacks = [name for name in verdicts if name not in ("index", "label")]
    rows = []
    for label in np.unique(verdicts["label"]):
        of_it = verdicts["label"] == label
        rows.append([str(label), int(of_it.sum()), *(float(verdicts[a][of_it].mean()) for a in attacks)])
    return {"columns": ["class", "n", *attacks], "data": rows}


def pictures(examples: Mapping[str, np.ndarray], attack: str) -> Iterator[tuple[np.ndarray, str]]:
    """Clean image, amplified perturbation (grey is none) and adversarial image side by side, with their labels.

    Yields:
        uint8 [H', 3 W', 3], enlarged where the images are small, and the caption.
    """
    for i, label in enumerate(examples["label"]):
        clean, adversarial = examples["clean"][i], examples[attack][i]
        difference = adversarial.astype(np.float64) - clean
        factor = 127 / max(float(np.abs(difference).max()), 1.0)
        amplified = (128 + factor * difference).astype(np.uint8)
        strip = np.concatenate([clean, amplified, adversarial], axis=2).transpose(1, 2, 0)
        times = -(-SIDE // clean.shape[1]) if clean.shape[1] < SIDE else 1
        before, after = (examples[f"{which}/predicted"][i] for which in ("clean", attack))
        text = f"#{examples['index'][i]}, class {label}: {before}, under {attack} {after}; perturbation x{factor:.3g}"
        yield strip.repeat(times, axis=0).repeat(times, axis=1), text


def _artifact(run: Run, which: str) -> Any:
    """The checkpoint as it lies in the run's folder; the same file again makes no new version."""
    import wandb

    artifact = wandb.Artifact(f"{run.name}-{which}"[:128], type="model")
    file = run.best if which == "best" else run.last
    artifact.add_file(str(file.resolve()), policy="immutable", skip_cache=True)  # no copies
    return artifact
