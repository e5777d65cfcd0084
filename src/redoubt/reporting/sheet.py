"""A table of text and the forms it is written in: Markdown, LaTeX (booktabs), CSV, and the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Sheet:
    """A table.

    Args:
        title: Its caption.
        columns: Headings; those of numbers in ``numeric`` are aligned right.
        rows: Cells as text, each row as long as ``columns``.
        numeric: Names of the columns of numbers.
        notes: Lines below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[str] = frozenset()
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """A heading, a pipe table, the notes."""
        rule = ["---:" if column in self.numeric else "---" for column in self.columns]
        lines = [[_markdown(text) for text in line] for line in (self.columns, *self.rows)]
        body = [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
        notes = [f"- {_markdown(note)}" for note in self.notes]
        return "\n".join([f"# {_markdown(self.title)}", "", *body, *([""] if notes else []), *notes]) + "\n"

    def latex(self) -> str:
        r"""A ``table`` with a ``tabular`` of booktabs' rules; needs ``\usepackage{booktabs}`` only."""
        spec = "".join("r" if column in self.numeric else "l" for column in self.columns)
        lines = [" & ".join(map(_latex, line)) + r" \\" for line in (self.columns, *self.rows)]
        head = [r"\begin{table}", r"\centering\small", rf"\caption{{{_latex(self.title)}}}"]
        body = [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        notes = [rf"\par\smallskip {_latex(note)}" for note in self.notes]
        return "\n".join([*head, *body, r"\end{tabular}", *notes, r"\end{table}"]) + "\n"

    def csv(self) -> str:
        """One line of headings, then the rows; neither title nor notes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue()

    def terminal(self) -> Table:
        """For rich's console, without the columns that are empty."""
        caption = "\n".join(map(escape, self.notes)) or None
        table = Table(title=escape(self.title), caption=caption, caption_justify="left")
        kept = [i for i in range(len(self.columns)) if not self.rows or any(row[i] for row in self.rows)]
        for column in (self.columns[i] for i in kept):
            number = column in self.numeric
            table.add_column(escape(column), justify="right" if number else "left", overflow="fold", no_wrap=number)
        for row in self.rows:
            table.add_row(*(escape(row[i]) for i in kept))
        return table


def wide_console() -> Console:
    """The terminal; 160 columns where the output goes into a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _markdown(text: str) -> str:
    return re.sub(r"([\\|*~<`])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
    return re.sub(r"^-(?=\d)", "$-$", escaped)
