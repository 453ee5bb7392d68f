"""Results as DataFrames with a row for each trained model: their medians, ranges and ratios, printed and written to files."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

try:
    import pandas as pd
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the experiments need pandas: pip install 'torchdyn-mintime[experiments]'") from error

__all__ = ["Line", "Report", "cell", "factors", "frame_of", "markdown", "print_table", "show", "write"]

WIDTH = 260
"""Width of printed tables, in characters. A narrow window then wraps lines, but no figure is cut."""


def frame_of(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Returns records as rows of a DataFrame. None, NaN and whole numbers stay what they are."""
    return pd.DataFrame(list(records), dtype=object)


@dataclass
class Line:
    """A row of a table: the results of all seeds, and those of the baseline.

    Attributes:
        label: the printed name.
        results: a row for each seed; empty if there is only a note.
        base: the baseline's results on the same seeds; None if there is no baseline.
        paper: what the paper reports, as printed.
        note: a remark beside the figures; failures are added to an empty one.
        control: whether this is a control, and no method of the paper.
        drive: by figure, how many times more of it torchdyn's own NeuralODE takes than one in a span, at equal steps.
    """

    label: str
    results: pd.DataFrame = field(default_factory=pd.DataFrame)
    base: pd.DataFrame | None = None
    paper: str = ""
    note: str = ""
    control: bool = False
    drive: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        failed = [] if self.results.empty else [why for why in self.results["failure"] if why]
        if failed and not self.note:
            self.note = f"{len(failed)} of {len(self.results)} failed: {failed[0]}"

    @property
    def finished(self) -> pd.DataFrame:
        """The results that did not fail. Failed ones count in no figure; the note names them."""
        return self.results if self.results.empty else self.results[self.results["failure"] == ""]

    def text(
        self,
        figure: str,
        form: str = "{:g}",
        scale: float = 1.0,
        ratio: bool = False,
        first: str = "",
        of_failed: bool = False,
    ) -> str:
        """Returns the median, the ratio to the baseline, and the range if the printed values differ.

        Results without this figure are left out. The text then says how many are left.

        Args:
            figure: a column of the results.
            form: format of a number.
            scale: factor on every value.
            ratio: whether to add how many times less it is than the baseline, by depth alone (:meth:`depth`).
            first: another column, of the first of two stages, whose median is added.
            of_failed: whether models that failed have this figure too.
        """
        if self.results.empty:
            return ""
        rows = self.results if of_failed else self.finished
        values = scale * rows[figure].dropna().astype(float)
        if values.empty:
            return "failed" if rows.empty else "never"
        low, text, high = (form.format(v) for v in (values.min(), values.median(), values.max()))
        span = f"\n[{low}, {high}]" if low != high else ""
        if first and rows[first].notna().any():
            text += f" (first {form.format(rows[first].dropna().median())})"
        if ratio and (times := self.depth(figure)) is not None:
            text += f" {times:.1f}x"
        if len(values) < len(self.results):
            text += f" ({len(values)} of {len(self.results)})"
        return text + span

    def by_seed(self, notes: Sequence[str]) -> "list[Line]":
        """Returns a line for each seed, with its note."""
        rows = [self.results.iloc[[i]] for i in range(len(self.results))]
        return [Line(f"{self.label}, seed {r['seed'].iloc[0]}", r, note=n) for r, n in zip(rows, notes, strict=True)]

    def gain(self, figure: str) -> float | None:
        """Returns how many times less of a figure it has than the baseline: the median over seeds on which neither failed.

        None if one of these seeds lacks the figure.
        """
        if self.base is None or self.base is self.results or self.results.empty:
            return None
        both = self.results.merge(self.base, on="seed", suffixes=("", "_base"))
        both = both[(both["failure"] == "") & (both["failure_base"] == "")]
        own, base = (both[name].astype(float) for name in (figure, f"{figure}_base"))
        ratios = base / own
        usable = len(both) and (ratios > 0).all() and (own > 0).all()
        return float(ratios.median()) if usable else None

    @property
    def bare(self) -> bool:
        """Whether the models are torchdyn's own NeuralODE, without a span, so that they gain nothing by the drive."""
        return not self.results.empty and not self.results["wrapped"].astype(bool).any()

    def depth(self, figure: str) -> float | None:
        """Returns the factor in :meth:`gain` that comes from fewer evaluations, without that of the drive."""
        times = self.gain(figure)
        return times * self.drive.get(figure, 1.0) if times is not None and self.bare else times

    def factors(self, figure: str) -> str:
        """Returns the text "drive x depth". The product says how many times less it takes than torchdyn's own NeuralODE."""
        if self.finished.empty or figure not in self.drive:
            return ""
        depth = 1.0 if self.base is self.results else self.depth(figure)
        drive = 1.0 if self.bare else self.drive[figure]
        return "" if depth is None else f"{drive:.2f} x {depth:.3g}"


Cell = Callable[[Line], str]


def cell(figure: str, form: str = "{:g}", **options: Any) -> Cell:
    """Returns a function that shows one figure of a line. For the options see :meth:`Line.text`."""
    return partial(Line.text, figure=figure, form=form, **options)


def factors(figure: str) -> Cell:
    """Returns a function that shows the gain of a line in a figure, as drive and depth (:meth:`Line.factors`)."""
    return partial(Line.factors, figure=figure)


@dataclass(frozen=True)
class Report:
    """How the results of a task are shown, and what counts as good.

    Attributes:
        columns: functions that fill a cell, by the head of the column.
        details: more columns, for tables in which each seed has a row.
        gains: figures that the sentences below a table compare with the baseline, by their names there.
        exactly: makes the part of such a sentence on a row's loss, and on its models solved exactly.
        caption: the text below the table.
        own, reference: the figure that is compared with the baseline's ``own``, by the model's own steps and solved exactly.
        slack: how much worse than the baseline both may be to count as good.
        higher: whether more of the figure is better.
    """

    columns: Mapping[str, Cell]
    gains: Mapping[str, str]
    exactly: Callable[[Line], str]
    caption: str
    own: str
    reference: str
    slack: float
    higher: bool = False
    details: Mapping[str, Cell] = field(default_factory=dict)

    def as_good(self, results: pd.DataFrame, base: pd.DataFrame) -> bool:
        """Returns whether the models are as good as the baseline on every seed, by their own steps and solved exactly."""
        sign = -1.0 if self.higher else 1.0
        failed = (results["failure"] != "").any() or (base["failure"] != "").any()
        bound = sign * base[self.own].astype(float).to_numpy() + self.slack
        both = sign * results[[self.own, self.reference]].astype(float).to_numpy()
        return bool(not failed and (both <= bound[:, None]).all())

    def frame(self, lines: Sequence[Line], detailed: bool = False) -> pd.DataFrame:
        """Returns the cells of a table; ``detailed``: with the columns of ``details``."""
        columns = {**self.columns, **(self.details if detailed else {})}
        return pd.DataFrame(
            {
                "": f"control: {line.label}" if line.control else line.label,
                "paper": line.paper,
                **{head: show_in(line) for head, show_in in columns.items()},
                "note": line.note,
            }
            for line in lines
        )

    def remarks(self, lines: Sequence[Line]) -> list[str]:
        """Returns a sentence for each row that is no control: its gains with the range of the controls' gains, and its loss."""
        controls = [line for line in lines if line.control and not line.results.empty]
        return [self._remark(line, controls) for line in lines[1:] if not (line.results.empty or line.control)]

    def _remark(self, line: Line, controls: Sequence[Line]) -> str:
        if line.finished.empty:
            return f"{line.label} failed on every seed."
        parts = []
        if failed := len(line.results) - len(line.finished):
            parts.append(f"failed on {failed} of {len(line.results)} seeds")
        for what, figure in self.gains.items():
            never = int(line.finished[figure].isna().sum())
            if never:
                parts.append(f"{what}: never on {never} of {len(line.finished)} seeds")
            own = line.depth(figure)
            if own is None:
                continue
            others = [other for control in controls if (other := control.depth(figure)) is not None]
            low, high = (f"{bound(others):.1f}x" for bound in (min, max)) if others else ("", "")
            beside = f"{low} to {high}" if low != high else low
            worse = ", worse than the baseline" if own < 0.95 else ""
            parts.append(f"{what} {own:.1f}x{worse}" + (f" (controls {beside})" if others else ""))
        return f"{line.label}: {'; '.join([*parts, self.exactly(line)])}."


def print_table(cells: pd.DataFrame, title: str, caption: str, console: Console) -> None:
    """Prints the cells as a table."""
    heads = (Column(str(head), no_wrap=head in ("", "note")) for head in cells)
    table = Table(*heads, title=title, caption=caption, box=box.SIMPLE_HEAD)
    for row in cells.itertuples(index=False):
        table.add_row(*map(Text, row))  # plain text: brackets are no markup here
    Console(width=max(console.width, WIDTH), file=console.file, quiet=console.quiet).print(table)


def markdown(cells: pd.DataFrame) -> str:
    """Returns the cells as a table of Markdown."""
    rows = [[*map(str, cells)], ["---"] * cells.shape[1], *cells.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row).replace("\n", " ") + " |" for row in rows)


def show(title: str, heading: str, lines: Sequence[Line], report: Report, console: Console) -> str:
    """Prints a table and the sentences below it, and returns both as Markdown under ``heading``."""
    cells, remarks = report.frame(lines), report.remarks(lines)
    print_table(cells, title, report.caption, console)
    for remark in remarks:
        console.print(remark, highlight=False)
    return f"## {heading}\n\n{markdown(cells)}\n\n" + "\n".join(f"- {remark}" for remark in remarks)


def write(results: pd.DataFrame, texts: Sequence[str], folder: Path, name: str, console: Console) -> None:
    """Writes results as CSV and JSON and their tables as Markdown, and prints the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, record, page = (folder / f"{name}.{ending}" for ending in ("csv", "json", "md"))
    results.to_csv(table, index=False)
    record.write_text(json.dumps(results.to_dict("records"), indent=1) + "\n", encoding="utf-8")
    page.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    console.print(f"The table as data: {table}, {record}, {page}", highlight=False)
