"""The lines of a table: medians over seeds beside a baseline, printed and as Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchdyn_mintime.experiments.results import print_table

__all__ = ["Kind", "Line", "failures", "gain", "show", "spread"]

Value = Callable[[Any], float | None]
"""A figure of one result; None where there is none."""


@dataclass
class Line:
    """A row as it came out: the results of all seeds, and each seed's baseline."""

    label: str
    paper: str
    results: list[Any] = field(default_factory=list)
    base: list[Any] = field(default_factory=list)
    note: str = ""
    control: bool = False

    def spread(self, value: Callable[[Any], float], form: str) -> str:
        """The median, and the range where the values differ as printed."""
        return spread([value(r) for r in self.results], form)

    def ratio(self, value: Value) -> str:
        """How many times less than the baseline, as printed after a figure."""
        times = None if self.results is self.base else gain(self, value)
        return "" if times is None else f" {times:.1f}x"


@dataclass(frozen=True)
class Kind:
    """How the lines of a table are shown.

    Attributes:
        columns: what a cell holds, by the column's head.
        gains: of what a learned row has less than the baseline, for the sentences below the table.
        honest: what else such a sentence says of a row.
        caption: below the table.
    """

    columns: Mapping[str, Callable[[Line], str]]
    gains: Mapping[str, Value]
    honest: Callable[[Line], str]
    caption: str


def show(title: str, heading: str, lines: Sequence[Line], kind: Kind, console: Console) -> str:
    """Prints a table with its sentences, and returns both as Markdown under ``heading``."""
    heads = ["", "paper", *kind.columns, "note"]
    cells = [_cells(line, kind) for line in lines]
    table = Table(title=title, box=box.SIMPLE_HEAD, caption=kind.caption)
    for head in heads:
        table.add_column(head)
    for row in cells:
        table.add_row(*map(Text, row))  # as it is: brackets are no markup here
    print_table(table, console, width=170)
    remarks = _remarks(lines, kind)
    for remark in remarks:
        console.print(remark, highlight=False)
    text = "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *cells])
    return f"## {heading}\n\n{text}\n\n" + "\n".join(f"- {remark}" for remark in remarks)


def _cells(line: Line, kind: Kind) -> list[str]:
    own = [cell(line) if line.results else "" for cell in kind.columns.values()]
    return [f"control: {line.label}" if line.control else line.label, line.paper, *own, line.note]


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where the values differ as printed."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.median(values)) + (f" [{low}, {high}]" if low != high else "")


def gain(line: Line, value: Value) -> float | None:
    """How many times less than the baseline a line has of something: the median over seeds; None if one has none."""
    pairs = [(value(b), value(r)) for r, b in zip(line.results, line.base, strict=True)]
    ratios = [b / r for b, r in pairs if b and r]
    return statistics.median(ratios) if ratios and len(ratios) == len(pairs) else None


def failures(results: Sequence[Any]) -> str:
    """How many of the results failed, and why the first did."""
    failed = [r.failure for r in results if r.failure]
    return f"{len(failed)} of {len(results)} failed: {failed[0]}" if failed else ""


def _remarks(lines: Sequence[Line], kind: Kind) -> list[str]:
    """For each learned row: what of its gain the controls have too."""
    controls = [line for line in lines if line.control and line.results]
    return [_remark(line, controls, kind) for line in lines[1:] if line.results and not line.control]


def _remark(line: Line, controls: Sequence[Line], kind: Kind) -> str:
    parts = []
    for what, value in kind.gains.items():
        own = gain(line, value)
        if own is None:
            continue
        others = [f"{c.label} {other:.1f}x" for c in controls if (other := gain(c, value)) is not None]
        parts.append(f"{what} {own:.1f}x" + (f" ({', '.join(others)})" if others else ""))
    return f"{line.label}, and the controls in brackets: {'; '.join([*parts, kind.honest(line)])}."
