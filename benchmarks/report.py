"""Shows the results as a table, and writes them as CSV, JSON and a picture."""

import json
import platform
from pathlib import Path

import pandas
import torch
from rich.table import Table

from torchdyn_mintime import plots

__all__ = ["COLUMNS", "as_table", "write"]

COLUMNS = {
    "part": ("part", ""),
    "case": ("case", ""),
    "contestant": ("by", ""),
    "ratio": ("ratio", ".2f"),
    "milliseconds": ("ms", ".3g"),
    "evaluations": ("evaluations", ".0f"),
    "mebibytes": ("MiB kept", ".1f"),
}
"""The columns of the results, each with its title in the table and the format of its numbers."""


def as_table(results: pandas.DataFrame, threads: int) -> Table:
    """Returns a table with a section for each case."""
    table = Table(
        title=f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}: ratios, medians over rounds"
    )
    for title, form in COLUMNS.values():
        table.add_column(title, justify="right" if form else "left", no_wrap=title != "case")
    for head, group in results.groupby(["part", "case"], sort=False):
        for _, row in group.iterrows():
            cells = ["" if pandas.isna(row[name]) else format(row[name], form) for name, (_, form) in COLUMNS.items()]
            table.add_row(*head, *cells[2:])
            head = ("", "")
        table.add_section()
    return table


def write(results: pandas.DataFrame, folder: Path, threads: int) -> list[Path]:
    """Writes the results as CSV and JSON, and a PNG of time against steps if that was measured. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{threads}-thread{'s' * (threads > 1)}"
    written = [folder / f"bench-{name}.csv", folder / f"bench-{name}.json"]
    results.to_csv(written[0], index=False)
    about = {"torch": torch.__version__, "python": platform.python_version(), "threads": threads}
    rows = json.loads(results.to_json(orient="records", double_precision=15))
    written[1].write_text(json.dumps({"about": {**about, "machine": platform.machine()}, "results": rows}, indent=1))
    linearity = results[results["part"] == "linearity"]
    if len(linearity):
        written.append(folder / f"linearity-{name}.png")
        _draw(linearity.astype({"case": int}), written[-1])
    return written


def _draw(results: pandas.DataFrame, path: Path) -> None:
    """Draws milliseconds a solve, and microseconds a step, against the number of steps."""
    figure, (left, right) = plots.grid_of_axes(1, 2, 5.0, 4.0)
    for name, own in results.groupby("contestant", sort=False):
        left.loglog(own["case"], own["milliseconds"], "o-", label=name)
        right.semilogx(own["case"], 1e3 * own["milliseconds"] / own["case"], "o-", label=name)
    left.set(xlabel="steps", ylabel="ms a solve", title="forward, rk4, 2-64-2, batch 64")
    right.set(xlabel="steps", ylabel="microseconds a step", title="flat is linear", ylim=(0, None))
    left.legend()
    plots.save(figure, path)
