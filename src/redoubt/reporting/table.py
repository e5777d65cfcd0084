"""Results as people read them on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

TITLES = {
    "natural": "Natural",
    "fgsm": "FGSM",
    "cw": "C&W",
    "ensemble": "Ensemble",
    "autoattack": "AutoAttack",
}


def title(metric: str) -> str:
    """A metric as papers print it: pgd20 is PGD-20."""
    if metric.startswith("pgd") and metric[3:].isdigit():
        return f"PGD-{metric[3:]}"
    return TITLES.get(metric, metric)


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracies in per cent with their 95 % intervals, one column per evaluation."""
    first = results[0]
    eps = first["threat"]["eps"]
    shown = f"{eps * 255:.4g}/255" if first["threat"]["norm"] == "linf" else f"{eps:.4g}"
    table = Table(
        title=f"{first['axes']['data']}, {first['n']} test images, {first['threat']['norm']} eps {shown} ({eps:.4g})",
        caption="accuracy in %, 95 % Wilson interval",
    )
    table.add_column("attack")
    for r in results:
        axes = r["axes"]
        table.add_column(f"{axes['defense']} + {axes['base']}\n{axes['model']}, {r['weights']}", justify="right")
    for metric in first["metrics"]:
        cells = []
        for r in results:
            m = r["metrics"].get(metric)
            cells.append(
                "-" if m is None else f"{100 * m['accuracy']:.2f} [{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
            )
        table.add_row(title(metric), *cells, style="bold" if metric == "ensemble" else None)
    for name in dict.fromkeys(name for r in results for name in r["nrr"]):
        values = (f"{100 * r['nrr'][name]:.2f}" if name in r["nrr"] else "-" for r in results)
        table.add_row(f"NRR ({title(name)})", *values)
    return table
