"""``redoubt report wandb``: the W&B workspaces and the report of a store, from code."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redoubt.errors import UserError
from redoubt.reporting.collect import Record, records
from redoubt.reporting.wandb_run import logged_in, sync, warn
from redoubt.runs.files import write_text

if TYPE_CHECKING:  # imports W&B
    from redoubt.reporting.panels import DataSet


def wandb(
    *, outputs: str = "outputs", project: str = "redoubt", entity: str | None = None, to: str | None = None
) -> None:
    """A W&B workspace for each data set of the store and one report of all, compared by defense.

    They are saved where somebody is logged in, anew each time. Else, and where the server refuses, their
    specifications are written. What else is to do is printed.

    Args:
        outputs: The folder that holds runs/.
        project: Of the runs in W&B, as ``logger.project``.
        entity: Of the project; the account's own where None.
        to: Folder of the specifications; ``<outputs>/wandb`` where None.

    Raises:
        UserError: No store, or an extra that is not installed.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("report wandb needs an extra: pip install 'redoubt[wandb]'")
    runs = records(outputs)
    saved = _save(runs, project, entity) if logged_in() else []
    if saved:
        print("\n".join(f"saved: {url}" for url in saved))
    else:
        folder = Path(to or Path(outputs) / "wandb")
        for name, view in _views(runs, project, entity or "").items():
            text = view._to_model().model_dump_json(by_alias=True, exclude_none=True)  # what `save` would send
            file = folder / re.sub(r"[^\w.+-]+", "_", f"{name}.json")
            write_text(file, json.dumps(json.loads(text), indent=2) + "\n")
            print(f"wrote {file}")
        print("\nNothing was saved on a server. Log in and call this again:\n  wandb login")
    print("\n".join(_what_to_do(runs, outputs)))


def _save(runs: Sequence[Record], project: str, entity: str | None) -> list[str]:
    """URLs of what was saved; none where the server refused."""
    try:
        return [view.save().url for view in _views(runs, project, entity or _default_entity()).values()]
    except Exception as error:  # of the server, or of the way to it
        warn(error, "writing the specifications")
        return []


def _default_entity() -> str:
    import wandb

    return str(wandb.Api(timeout=10).default_entity or "")


def _views(runs: Sequence[Record], project: str, entity: str) -> dict[str, Any]:
    """Name -> what wandb-workspaces can save: ``workspace-<data>`` and ``report``."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    from redoubt.reporting.panels import DataSet, sections

    names = sorted({str(run.axes["data"]) for run in runs})
    sets = [DataSet(name, [run for run in runs if run.axes["data"] == name]) for name in names]
    views: dict[str, Any] = {}
    blocks: list[Any] = [wr.TableOfContents()]
    for data in sets:
        panels = sections(data)
        views[f"workspace-{data.name}"] = ws.Workspace(
            entity=entity,
            project=project,
            name=f"Redoubt: {data.name}",
            sections=[ws.Section(name=name, panels=these, is_open=True) for name, these in panels.items()],
            settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
            runset_settings=ws.RunsetSettings(filters=_only(data), pinned_columns=data.columns),
        )
        blocks += [wr.H1(data.name)]
        for name, these in panels.items():
            # Without entity: the report's own project, which need not be looked up.
            runset = wr.Runset(name=data.name, filters=_only(data), pinned_columns=data.columns)
            blocks += [wr.H2(name), wr.PanelGrid(runsets=[runset], panels=list(these))]
    about = f"{len(runs)} runs of {', '.join(names)}; accuracies in [0, 1]. Written by `redoubt report wandb`."
    views["report"] = wr.Report(
        entity=entity, project=project, title="Redoubt", description=about, blocks=blocks, width="fluid"
    )
    return views


def _only(data: DataSet) -> list[Any]:
    """A filter by tag; one by a nested key of the config is not written as the server stores it."""
    from wandb_workspaces import expr

    return [expr.Tags().isin([data.tag])]


def _what_to_do(runs: Sequence[Record], outputs: str) -> list[str]:
    """Commands that bring the store's runs to the server."""
    lines = []
    folders = [f for run in runs for f in sorted((run.run.folder / "wandb").glob("offline-run-*"))]
    unsent = [f for f in folders if not list(f.glob("*.synced"))]
    if unsent:
        lines.append("Offline runs to send (without the two words before it, `wandb sync` sends this machine's name):")
        lines.append(f"  {sync(unsent)}")
    without = [run for run in runs if not list((run.run.folder / "wandb").glob("*run-*"))]
    if without:
        lines.append(f"{len(without)} of {len(runs)} runs are not in W&B; their curves and results get there by")
        lines += [f"  redoubt eval {_again(run, outputs)} logger=wandb" for run in without]
    return lines


def _again(run: Record, outputs: str) -> str:
    """The words of an evaluation that the store has, the newest one; where it has none, of natural accuracy."""
    words = [f"run={run.name}", *([] if outputs == "outputs" else [f"paths.outputs={outputs}"])]
    if not run.evaluations:
        return shlex.join([*words, "attack=none"])
    newest = run.evaluations[0]
    limit = newest.settings.get("limit_test")
    words += [f"attack={newest.attack}", *([] if limit is None else [f"data.limit_test={limit}"])]
    if newest.subset == "balanced":
        words.append("data.balanced=true")
    return shlex.join(words)
