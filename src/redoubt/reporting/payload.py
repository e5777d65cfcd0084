"""The data of the report page: one JSON value that its script reads."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from redoubt.errors import UserError
from redoubt.evaluation.results import ROBUST, ordered
from redoubt.reporting import groups
from redoubt.reporting.collect import Evaluation, Record
from redoubt.reporting.pictures import pictures
from redoubt.reporting.series import Panel, Points, panels, updates
from redoubt.reporting.table import audit_place, title
from redoubt.runs.identity import EXCLUDED, canonical, leaves

#: Points that are kept of a curve, and epochs of a heat map.
CURVE, MAP = 50, 25


def payload(records: Sequence[Record], limit: int) -> dict[str, Any]:
    """Everything that the page shows.

    Verdicts, and then examples, of the newest runs first are added while the JSON stays below ``limit`` bytes;
    ``left_out`` counts the runs that have some which found no room.
    """
    protocols = groups.protocols(records)
    number = {id(r): i for i, r in enumerate(records)}
    group = {number[id(r)]: g for g, runs in enumerate(groups.by_seed(records)) for r in runs}
    order = list(protocols)
    runs = [{**_run(r, order), "group": group[i]} for i, r in enumerate(records)]
    metrics = {m for run in runs for e in run["evaluations"] for m in e["metrics"]}
    value: dict[str, Any] = {
        "protocols": list(protocols.values()),
        "metrics": {m: title(m) for m in ordered(metrics)},
        "robust": ROBUST,
        "excluded": sorted(EXCLUDED),
        "runs": runs,
        "sweeps": [_sweep(s, number) for s in groups.sweeps(records)],
        "details": packed(json.dumps(_finite([_details(r) for r in records])).encode()),
        "clean": {},
        "left_out": {"verdicts": 0, "examples": 0},
    }
    value = _finite(value)
    _fill(value, records, limit - len(json.dumps(value)))
    return value


def packed(data: bytes) -> str:
    """zlib, then base64: what the browser's DecompressionStream("deflate") reads."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _fill(value: dict[str, Any], records: Sequence[Record], room: int) -> None:
    """Adds verdicts and examples to a payload, the newest runs' first, while there is room."""
    newest = sorted(range(len(records)), key=lambda i: str(records[i].status.get("started") or ""), reverse=True)
    full = False  # then what is older stays out too, be it ever so small
    for i in newest:
        found = [_verdicts(e) for e in records[i].evaluations]
        cost = len(json.dumps(found))
        full = full or cost > room
        if not full:
            room -= cost
            for entry, verdicts in zip(value["runs"][i]["evaluations"], found, strict=True):
                entry["verdicts"] = verdicts
        elif any(found):
            value["left_out"]["verdicts"] += 1
    for i in newest:
        shown = _pictures(records[i])
        if shown is None:
            continue
        examples, clean = shown
        new = {} if examples["clean"] in value["clean"] else {examples["clean"]: clean}
        cost = len(json.dumps([examples, new]))
        full = full or cost > room
        if not full:
            room -= cost
            value["clean"].update(new)
            value["runs"][i]["examples"] = examples
        else:
            value["left_out"]["examples"] += 1


def _run(record: Record, protocols: list[groups.Protocol]) -> dict[str, Any]:
    status = record.status
    sweep = record.config.get("sweep")
    return {
        "name": record.name,
        "axes": record.axes,
        "sweep": sweep.get("name") if isinstance(sweep, Mapping) else None,
        "state": status["state"],
        "reason": status.get("reason"),
        "epoch": status.get("epoch"),
        "epochs": status.get("max_epochs"),
        "started": status.get("started"),
        "train_seconds": status.get("train_seconds"),
        "evaluations": [_evaluation(e, protocols) for e in record.evaluations],
        "standing": None if record.standing is None else record.evaluations.index(record.standing),
    }


def _evaluation(evaluation: Evaluation, protocols: list[groups.Protocol]) -> dict[str, Any]:
    results = evaluation.results
    metrics = {
        name: [m["accuracy"], m["low"], m["high"], m.get("outside", 0)]
        for name, m in results["metrics"].items()
        if "groups" not in results or name == "natural"  # of 85 corruptions the means of their groups
    }
    means = {f"mean of {g}": [a, None, None, 0] for g, a in results.get("groups", {}).items()}
    mark = ("passed" if results["audited"] else "failed") if results.get("audits") else "not audited"
    return {
        "id": evaluation.folder.name,
        "protocol": protocols.index(groups.protocol(evaluation)),
        "n": results["n"],
        "checkpoint": results["checkpoint"],
        "weights": results["weights"],
        "metrics": metrics | means,
        "nrr": results["nrr"],
        "seconds": results["eval_seconds"],
        "audit": mark,
        "audit_failed": results.get("audit_failed") or [],
    }


def _verdicts(evaluation: Evaluation) -> dict[str, Any] | None:
    """Verdicts as bits: a row per attack, each but the first as its difference from the one before."""
    if "groups" in evaluation.results:
        return None
    try:
        found = evaluation.verdicts()
        index, label = found.pop("index"), found.pop("label")
    except (UserError, KeyError):  # a damaged file is no file
        return None
    names = [m for m in evaluation.results["metrics"] if m in found]
    bits = np.packbits(np.stack([found[m] for m in names]).astype(bool), axis=1)
    bits[1:] ^= bits[:-1].copy()
    of = f"{evaluation.results['axes']['data']}".encode() + index.tobytes() + label.tobytes()
    return {"of": hashlib.sha256(of).hexdigest()[:10], "names": names, "bits": packed(bits.tobytes())}


def _pictures(record: Record) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """A run's examples as differences (modulo 256) from clean images, and these, for many runs share them."""
    found = pictures(record)
    if found is None:
        return None
    clean = {"shape": found.clean.shape, "pixels": packed(found.clean.tobytes())}
    examples = {
        "place": found.place,
        "clean": hashlib.sha256(found.clean.tobytes()).hexdigest()[:10],
        "labels": found.labels,
        "predicted": found.predicted,
        "added": {name: packed((adv - found.clean).tobytes()) for name, adv in found.adversarial.items()},
    }
    return examples, clean


def _details(record: Record) -> dict[str, Any]:
    epochs, shares = updates(record)
    kept = thinned(range(len(epochs)), MAP)
    checks = ("name", "rule", "value", "limit", "passed")
    return {
        "config": leaves(canonical(record.config)),
        "panels": [_panel(p) for p in panels(record)],
        "updates": {
            "epochs": [epochs[i] for i in kept],
            "layers": {name: [_short(row[i]) for i in kept] for name, row in shares.items()},
        },
        "audits": [
            {
                "id": folder.name,
                "place": audit_place(report),
                "failed": report["failed"],
                "checks": [{key: check[key] for key in checks} for check in report["checks"]],
            }
            for folder, report in record.audits
        ],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    def short(points: Points) -> list[list[float | None]]:
        return [[_short(x), _short(y)] for x, y in thinned([p for p in points if math.isfinite(p[1])], CURVE)]

    return {**vars(panel), "series": {name: short(points) for name, points in panel.series.items()}}


def _sweep(sweep: groups.Sweep, number: Mapping[int, int]) -> dict[str, Any]:
    points = [{"at": at, "runs": [number[id(r)] for r in runs]} for at, runs in sorted(sweep.points.items())]
    return {"keys": sweep.keys, "title": sweep.title, "points": points}


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for, and floats of 7 digits."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
