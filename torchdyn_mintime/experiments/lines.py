"""The lines of a table: medians over seeds beside a baseline, printed and as Markdown."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchdyn_mintime.experiments.results import print_table, write

__all__ = ["Kind", "Line", "failures", "gain", "save", "show"]

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

    @property
    def finished(self) -> list[Any]:
        """The results that did not fail; those that did count in no figure, and stand in the note."""
        return [r for r in self.results if not r.failure]

    def figure(self, value: Value, form: str, *, scale: float = 1.0, ratio: bool = False, note: str = "") -> str:
        """The median, how many times less than the baseline that is, and the range where values differ as printed.

        Args:
            value: of one result. Results that failed or have none are left out, and those that are left counted.
            form: of a number.
            scale: factor on every value.
            ratio: whether the baseline is compared with.
            note: set behind the median.
        """
        values = [scale * v for r in self.finished if (v := value(r)) is not None]
        if not values:
            return "never" if self.finished else "failed"
        times = gain(self, value) if ratio and self.results is not self.base else None
        text = form.format(statistics.median(values)) + note + ("" if times is None else f" {times:.1f}x")
        if len(values) < len(self.results):
            text += f" ({len(values)} of {len(self.results)})"
        low, high = form.format(min(values)), form.format(max(values))
        return text + (f"\n[{low}, {high}]" if low != high else "")


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
    rows = [heads, ["---"] * len(heads), *cells]
    text = "\n".join("| " + " | ".join(row).replace("\n", " ") + " |" for row in rows)
    return f"## {heading}\n\n{text}\n\n" + "\n".join(f"- {remark}" for remark in remarks)


def _cells(line: Line, kind: Kind) -> list[str]:
    own = [cell(line) if line.results else "" for cell in kind.columns.values()]
    return [f"control: {line.label}" if line.control else line.label, line.paper, *own, line.note]


def gain(line: Line, value: Value) -> float | None:
    """How many times less than the baseline a line has of something: the median over seeds that did not fail.

    None where one of these has no such figure.
    """
    both = [(b, r) for r, b in zip(line.results, line.base, strict=True) if not (r.failure or b.failure)]
    ratios = [value(b) / value(r) for b, r in both if value(b) and value(r)]  # type: ignore[operator]
    return statistics.median(ratios) if ratios and len(ratios) == len(both) else None


def failures(results: Sequence[Any]) -> str:
    """How many of the results failed, and why the first did."""
    failed = [r.failure for r in results if r.failure]
    return f"{len(failed)} of {len(results)} failed: {failed[0]}" if failed else ""


def _remarks(lines: Sequence[Line], kind: Kind) -> list[str]:
    """For each learned row: its gains, and between which the controls' lie."""
    controls = [line for line in lines if line.control and line.results]
    return [_remark(line, controls, kind) for line in lines[1:] if line.results and not line.control]


def _remark(line: Line, controls: Sequence[Line], kind: Kind) -> str:
    if not line.finished:
        return f"{line.label} failed on every seed."
    parts = []
    for what, value in kind.gains.items():
        own = gain(line, value)
        if own is None:
            continue
        others = [other for c in controls if (other := gain(c, value)) is not None]
        low, high = (f"{f(others):.1f}x" for f in (min, max)) if others else ("", "")
        beside = f"{low} to {high}" if low != high else low
        parts.append(f"{what} {own:.1f}x" + (f" (controls {beside})" if others else ""))
    return f"{line.label}: {'; '.join([*parts, kind.honest(line)])}."


def save(results: Sequence[Any], texts: Sequence[str], folder: Path, name: str, console: Console) -> None:
    """Writes a table as CSV, JSON and Markdown, and says where."""
    files = write(results, folder, name)
    page = folder / f"{name}.md"
    page.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    console.print(f"The table as data: {', '.join(map(str, [*files, page]))}")
