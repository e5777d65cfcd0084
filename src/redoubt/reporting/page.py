"""``redoubt report html``: every run of the store on one page that needs no server and no network."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redoubt
from redoubt.errors import UserError
from redoubt.reporting.collect import Record, records, weight_files
from redoubt.reporting.payload import payload
from redoubt.runs.files import write_text
from redoubt.units import as_number

FILES = Path(__file__).parent / "page_files"
#: In this order, as one script.
SCRIPTS = (
    "data.js", "statistics.js", "dom.js", "axes.js", "charts.js", "table.js", "sweeps.js", "run.js", "compare.js",
    "page.js",
)  # fmt: skip


def html(*, outputs: str = "outputs", to: str | None = None, limit_mb: float = 2) -> None:
    """Writes one page of all runs: table, scatter, curves, sweeps, audits, examples, and two runs compared.

    The file holds its data, style and script; it loads nothing and opens from the disk in any browser of 2024 or later.

    Args:
        outputs: The folder that holds ``runs/``.
        to: The file to write (default: ``<outputs>/report.html``).
        limit_mb: Size in megabytes that it stays below, by leaving out the oldest runs' examples and verdicts.

    Raises:
        UserError: There are no runs, or the file cannot be written.
    """
    files = weight_files(outputs)
    found = [*(records(outputs) if not files or (Path(outputs) / "runs").is_dir() else []), *files]
    if not found:
        raise UserError(f"paths.outputs={outputs}: its runs/ is empty: train some, or name another folder")
    limit = as_number(limit_mb, "limit_mb") * 1e6
    path = Path(to or Path(outputs) / "report.html")
    if not path.name:
        raise UserError(f"to={to}: is a folder: give a file, as to=report.html")
    text = page(found, int(limit))
    write_text(path, text)
    size = len(text.encode())
    over = "" if size <= limit else f", over limit_mb={limit_mb} without verdicts and examples"
    runs = len(found) - len(files)
    shown = f"{runs} {'run' if runs == 1 else 'runs'}" + (f", weights of {len(files)} files" if files else "")
    print(f"{path}: {shown}, {size / 1e6:.2f} MB{over}")


def page(found: list[Record], limit: int) -> str:
    """The page.

    Args:
        found: The runs.
        limit: Bytes that it should stay below.
    """
    style = (FILES / "page.css").read_text(encoding="utf-8")
    script = "".join((FILES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    template = (FILES / "page.html").read_text(encoding="utf-8")
    made = {"made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "version": redoubt.__version__}
    data = payload(found, limit - len(style) - len(script) - len(template) - 1000)
    parts = {
        # Nothing is loaded from anywhere, and no script runs but this one.
        "policy": f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}",
        "style": style,
        "script": script,
        "data": as_block({**made, **data}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def as_block(value: Any) -> str:
    """JSON that no content of its strings can end the ``<script>`` of."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
