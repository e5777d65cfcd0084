"""Results as people read them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from redoubt.evaluation.results import named, names

TITLES = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "cw": "C&W",
    "cw50": "C&W-50",
    "multitargeted": "MultiTargeted",
    "square": "Square",
    "nattack": "N-ATTACK",
    "transfer_pgd": "PGD, transferred",
    "transfer_mi": "MI-FGSM, transferred",
    "transfer_di": "DI-FGSM, transferred",
    "transfer_ti": "TI-FGSM, transferred",
    "ensemble": "Ensemble",
    "autoattack": "AutoAttack",
}


def title(metric: str) -> str:
    """A metric as papers print it: pgd20 is PGD-20; the members of an incomplete AutoAttack follow it."""
    if metric.endswith(")"):
        metric, _, members = metric.partition(" (")
        return f"{title(metric)} ({members}"
    if metric.startswith("pgd") and metric[3:].isdigit():
        return f"PGD-{metric[3:]}"
    return TITLES.get(metric, metric)


def threat(model: Mapping[str, Any]) -> str:
    """``, linf eps 8/255 (0.03137)``; nothing where there is none."""
    eps = model["eps"]
    if eps is None:
        return ""
    shown = f"{eps * 255:.4g}/255" if model["norm"] == "linf" else f"{eps:.4g}"
    return f", {model['norm']} eps {shown} ({eps:.4g})"


def suite_title(results: Mapping[str, Any]) -> str:
    """The suite's name, with the members that ran where it has AutoAttack and these are not all."""
    axes = results.get("axes") or {"attack": str(results.get("evaluation")).rpartition("-")[0]}
    return str(axes["attack"]) + "".join(new.removeprefix(old) for old, new in names(results).items())


def weights(results: Mapping[str, Any]) -> str:
    """``student weights of last``: what was evaluated, or audited."""
    return f"{results['weights']} weights of {results['checkpoint']}"


def place(results: Mapping[str, Any]) -> str:
    """What an evaluation's numbers are of: ``fsr_suite, linf eps 8/255 (0.03137), student weights of last``."""
    judged = f", {weights(results)}" if "weights" in results else ""
    return f"{suite_title(results)}{threat(results.get('threat') or {'norm': None, 'eps': None})}{judged}"


def audit_place(report: Mapping[str, Any]) -> str:
    """What an audit's numbers are of: ``256 images, linf eps 8/255 (0.03137), student weights of last``."""
    return f"{report['n']} images{threat(report['threat'])}, {weights(report)}"


def subset(rule: str | None) -> str:
    """How the images of a limited test set were chosen; nothing where all are taken."""
    return {"stratified": " in proportion to the classes", "balanced": ", as many of each class"}.get(str(rule), "")


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracies in per cent with their 95 % intervals, one column per evaluation."""
    results = [named(r) for r in results]
    first = results[0]
    caption = "accuracy in %, 95 % Wilson interval"
    if any("outside" in m for r in results for m in r["metrics"].values()):
        caption += "; *: some images left the ball and count as not attacked"
    images = f"{first['n']} test images{subset(first.get('subset'))}"
    heading = f"{first['axes']['data']}, {images}, {suite_title(first)}{threat(first['threat'])}"
    table = Table(title=heading, caption=caption, min_width=len(heading))
    table.add_column("attack")
    for r in results:
        table.add_column(_heading(r), justify="right")
    grouped = len(first["metrics"]) > 20 and "groups" in first
    for metric in first["metrics"]:
        if grouped and metric != "natural":
            continue  # results.json has them all
        cells = []
        for r in results:
            m = r["metrics"].get(metric)
            cells.append(
                "-"
                if m is None
                else f"{100 * m['accuracy']:.2f} [{100 * m['low']:.1f}, {100 * m['high']:.1f}]" + "*" * ("outside" in m)
            )
        table.add_row(title(metric), *cells, style="bold" if metric == "ensemble" else None)
    for group in first.get("groups", {}):
        means = [f"{100 * r['groups'][group]:.2f}" if group in r.get("groups", {}) else "-" for r in results]
        table.add_row(f"mean of {group}", *means)
    for name in dict.fromkeys(name for r in results for name in r["nrr"]):
        values = (f"{100 * r['nrr'][name]:.2f}" if name in r["nrr"] else "-" for r in results)
        table.add_row(f"NRR ({title(name)})", *values)
    if any(r.get("audits") for r in results):
        marks = (("passed" if r["audited"] else "FAILED") if r.get("audits") else "not audited" for r in results)
        table.add_row("Audit", *marks)
    return table


def _heading(results: Mapping[str, Any]) -> str:
    """What was evaluated: a cell of the grid and which of its weights, or a file and the net."""
    axes = results["axes"]
    if axes["base"] is None:
        return f"{Path(results['checkpoint']).name}\n{' + '.join(filter(None, (axes['model'], axes['defense'])))}"
    return f"{axes['defense']} + {axes['base']}\n{axes['model']}\n{weights(results)}"


def rescored_table(scores: Mapping[str, Any], name: str) -> Table:
    """What became of saved verdicts: changed, and changed within rounding."""
    table = Table(title=f"{name}: saved examples classified anew")
    for column in ("attack", "images", "changed", "changed, top logits within 1e-4", "largest distance", "eps"):
        table.add_column(column, justify="left" if column == "attack" else "right")
    for attack, entry in scores.items():
        close = f"{len(entry['close'])} {entry['close'][:5] or ''}".strip()
        eps = "-" if entry["eps"] is None else f"{entry['eps']:.6f}"
        cells = (str(entry["n"]), str(len(entry["changed"])), close, f"{entry['distance']:.6f}", eps)
        table.add_row(title(attack), *cells)
    return table


def audit_table(report: Mapping[str, Any]) -> Table:
    """An audit's checks: what was measured, and the largest value that passes."""
    verdict = "passed" if report["passed"] else f"FAILED: {', '.join(report['failed'])}"
    heading = f"Audit of {report['run']}, {audit_place(report)}: {verdict}"
    table = Table(title=heading, min_width=min(len(heading), 100))
    for column in ("check", "measured", "limit", "", "what must hold"):
        table.add_column(column, justify="right" if column in ("measured", "limit") else "left")
    for check in report["checks"]:
        numbers = ["-" if check[key] is None else f"{check[key]:.4g}" for key in ("value", "limit")]
        passed = {True: "ok", False: "FAILED", None: "skipped"}[check["passed"]]
        why = f" ({check['details']['why']})" if "why" in check["details"] else ""
        table.add_row(
            check["name"], *numbers, passed, check["rule"] + why, style="bold red" if check["passed"] is False else None
        )
    return table
