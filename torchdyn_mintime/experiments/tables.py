"""The paper's tables, with ours and the controls beside each of its rows."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.images import MissingData, Source
from torchdyn_mintime.experiments.results import Result, print_table, write
from torchdyn_mintime.experiments.runner import carry_out, time_inference
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS, Settings

__all__ = ["TABLES", "Options", "Row", "Section", "make"]

SWEEP = (1, 2, 3, 4, 6, 8, 12, 16)
"""Steps of the control that a user without this package would try."""

GRID = (0.01, 0.03, 0.1)
"""Learning rates that every method is tried with, but for images, where the paper's is taken."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        method: a name for ``find_method``.
        paper: what the paper reports, as printed.
        settings: what differs from the task's own, as pairs.
        label: as printed; default: the method's.
    """

    method: str
    paper: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Section:
    """The rows of one task. The first is the baseline of the ratios; controls are added to all.

    Attributes:
        learned: the method whose number of steps the control "as many steps" takes.
        others: controls besides.
    """

    task: str
    rows: tuple[Row, ...]
    learned: str = "minimum-time"
    others: tuple[str, ...] = ("default-adaptive",)


@dataclass(frozen=True)
class Options:
    """How much of a table is run.

    Attributes:
        seeds: how many of them, from 0 on.
        rates: learning rates that every method is tried with; empty is the task's own alone.
        iterations: optimizer steps instead of each task's own.
        subset, width: of image tasks.
        tasks: only these; empty is all.
        sweep: steps of the control.
        source: where image data is.
        device: where to train.
    """

    seeds: int = 5
    rates: tuple[float, ...] = GRID
    iterations: int | None = None
    subset: int | None = None
    width: int | None = None
    tasks: tuple[str, ...] = ()
    sweep: tuple[int, ...] = SWEEP
    source: Source = field(default_factory=Source)
    device: str = "cpu"


PEERS = ("lyanet", "steer", "taynode-2", "taynode-3", "rnode", "local-error", "step-doubling", "coordinate-descent")


def _weight(value: float) -> tuple[tuple[str, float], ...]:
    return (("weight", value),)


_LYAPUNOV = (("lr", 0.03),)  # the paper's code, where the table is run at each task's own learning rate
_PEERS = tuple(Row(m) for m in PEERS)
_ANNULI = (
    Row("vanilla", "t_f 1; 123 s; 86.6 ms"),
    Row("minimum-time", ".0819; 27 s (4.6x); 10.52 ms (8.2x)"),
    Row("convergence-rate", ".09; 15.98 + 1.02 s (7.2x); 10.24 ms", _LYAPUNOV),
)
_IMAGE_CONTROLS = ("default-adaptive", "skipped")

TABLES: dict[str, tuple[str, tuple[Section, ...]]] = {
    "1": (
        "Table 1: supervised learning",
        (
            Section(
                "moons",
                (
                    Row("vanilla", "t_f 1; 46.64 s; 71.88 ms"),
                    Row("minimum-time", ".0904; 7.33 s (6.4x); 8.4 ms (8.6x)"),
                    Row("convergence-rate", ".10; 5.42 + .79 s (7.5x); 8.44 ms", _LYAPUNOV),
                    Row("target"),
                    Row("shallowest"),
                    *_PEERS,
                ),
            ),
            Section("annuli", (*_ANNULI, Row("target"), Row("shallowest"), Row("shallowest-adaptive"), *_PEERS)),
        ),
    ),
    "2": (
        "Table 2: image classification",
        (
            Section("digits", (Row("vanilla"), Row("minimum-time"), Row("shallowest")), others=_IMAGE_CONTROLS),
            Section(
                "mnist",
                (
                    Row("vanilla", "99.57 %; 402.6 evaluations"),
                    Row("minimum-time", "99.53 %; .0343; 16.1; 14x, 18x"),
                ),
                others=_IMAGE_CONTROLS,
            ),
            Section(
                "fashion-mnist",
                (
                    Row("vanilla", "93.07 %; 402.6 evaluations"),
                    Row("minimum-time", "92.68 %; .0564; 24.2; 12.6x, 11x"),
                ),
                others=_IMAGE_CONTROLS,
            ),
            Section(
                "fashion-mnist-cpu",
                (Row("vanilla"), Row("minimum-time"), Row("target", "", (("start", 0.1),)), Row("shallowest")),
                others=_IMAGE_CONTROLS,
            ),
            Section(
                "cifar10",
                (
                    Row("vanilla", "82.60 %; 404.9 evaluations"),
                    Row("minimum-time", "76.38 %; .1103; 47.3", _weight(1.0), "minimum-time, weight 1"),
                    Row("minimum-time", "78.41 %; .1975; 81", _weight(0.5), "minimum-time, weight .5"),
                    Row("minimum-time", "81.74 %; .3606; 146.1", _weight(0.1), "minimum-time, weight .1"),
                ),
                others=_IMAGE_CONTROLS,
            ),
        ),
    ),
    "3": (
        "Table 3: the combined method",
        (
            Section(
                "annuli",
                (
                    *_ANNULI,
                    Row("combined", ".0687; 16.03 s (7.7x); 10.01 ms", (*_LYAPUNOV, ("span_lr", 0.001))),
                    Row("growth", "", _LYAPUNOV),
                ),
            ),
        ),
    ),
    "4": (
        "Table 4: against SNOpt",
        (
            Section(
                "annuli",
                (
                    *_ANNULI,
                    Row("vanilla-adjoint", "465 s; .33 s"),
                    Row("snopt", "89 s; 34.2 ms"),
                    Row("vanilla-adjoint-adaptive", "1307 s; .91 s"),
                    Row("snopt-adaptive", "927 s; .54 s"),
                ),
            ),
        ),
    ),
    "5": (
        "Table 5: adaptive solvers",
        (
            Section(
                "annuli-adaptive",
                (
                    Row("vanilla", "t_f 1; 168 s; 117.288 ms"),
                    Row("minimum-time", ".0724; 129 s (1.3x); 86.493 ms (1.36x)"),
                    Row("shallowest"),
                ),
            ),
        ),
    ),
    "6": (
        "Table 6: training time saved on images",
        tuple(
            Section(
                task,
                (Row("vanilla"), Row("minimum-time", paper, settings), Row("snopt", other)),
                others=_IMAGE_CONTROLS,
            )
            for task, paper, other, settings in (
                ("mnist", "94 %; t_f .0349; 99.53 %", "30 %; .38; 98.99 %", ()),
                ("cifar10", "76 %; .3606; 81.74 %", "19 %; .49; 77.82 %", _weight(0.1)),
            )
        ),
    ),
}


@dataclass
class _Line:
    """A row as it came out: the results of all seeds at the learning rate chosen, and each seed's baseline."""

    label: str
    paper: str
    results: list[Result] = field(default_factory=list)
    base: list[Result] = field(default_factory=list)
    note: str = ""


def make(number: str, options: Options, folder: Path, console: Console) -> list[Result]:
    """Runs a table's rows and their controls, prints it, and writes it as CSV, JSON and Markdown.

    What an earlier call has finished is not trained again.
    """
    title, sections = TABLES[number]
    store = Store(folder / "runs")
    results: list[Result] = []
    texts: list[str] = [f"# {title}"]
    for section in sections:
        if options.tasks and section.task not in options.tasks:
            continue
        try:
            lines = _run(section, options, store, console)
        except (MissingData, UsageError) as error:
            console.print(f"{TASKS[section.task].title}: not run: {error}")
            texts.append(f"## {TASKS[section.task].title}\n\nNot run: {error}.")
            continue
        heads, cells = _cells(lines)
        print_table(_printed(f"{title}: {TASKS[section.task].title}", heads, cells), console, width=170)
        remarks = _remarks(lines)
        for remark in remarks:
            console.print(remark, highlight=False)
        texts.append(_markdown(TASKS[section.task].title, heads, cells, remarks))
        results += [r for line in lines for r in line.results]
    if results:
        files = write(results, folder, f"table-{number}")
        page = folder / f"table-{number}.md"
        page.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        console.print(f"The table as data: {', '.join(map(str, [*files, page]))}")
    return results


# ------------------------------------------------------------------------------------------------------------ running


def _settings(section: Section, row: Row, options: Options, seed: int, rate: float | None) -> Settings:
    own = TASKS[section.task].settings.but(seed=seed, **dict(row.settings))
    return own.but(iterations=options.iterations, subset=options.subset, width=options.width, lr=rate)


def _run(section: Section, options: Options, store: Store, console: Console) -> list[_Line]:
    rows = [*section.rows, *(Row(method) for method in section.others)]
    rows += [Row(f"vanilla:{k}") for k in options.sweep]
    own = TASKS[section.task].settings
    rates: Sequence[float | None] = options.rates if own.optimizer == "adam" and options.rates else [None]
    found: dict[tuple[Row | str, float | None, int], Result] = {}
    for rate in rates:
        for seed in range(options.seeds):
            plans = {row: Plan(section.task, row.method, _settings(section, row, options, seed, rate)) for row in rows}
            data = TASKS[section.task].load(next(iter(plans.values())).settings, options.source)
            finished = carry_out(list(plans.values()), data, store, console, options.device)
            results = dict(zip(plans, finished, strict=True))
            learned = next((row for row in rows if row.method == section.learned), None)
            if learned is not None:
                # The control that only a finished run can name: as many equal steps on the whole interval.
                twin = Row(f"vanilla:{results[learned].steps}")
                settings = _settings(section, twin, options, seed, rate)
                plans[twin] = Plan(section.task, twin.method, settings)
                carry_out([plans[twin]], data, store, console, options.device)
            timed = time_inference(list(plans.values()), data, store)
            found.update({(row, rate, seed): r for row, r in zip(plans, timed, strict=True)})
            if learned is not None:
                found["twin", rate, seed] = found[twin, rate, seed]
    return _lines(section, rows, found, rates, options)


def _lines(
    section: Section, rows: list[Row], found: dict, rates: Sequence[float | None], options: Options
) -> list[_Line]:
    seeds = range(options.seeds)

    def at_best_rate(row: Row | str) -> list[Result]:
        return min(([found[row, rate, seed] for seed in seeds] for rate in rates), key=_quality)

    base = at_best_rate(rows[0])
    lines: list[_Line] = []
    for row in section.rows:
        results = at_best_rate(row)
        lines.append(_Line(row.label or results[0].method, row.paper, results, base, _failures(results)))
    if ("twin", rates[0], 0) in found:
        label = f"control: vanilla, as many steps as {section.learned}"
        lines.append(_Line(label, "", at_best_rate("twin"), base))
    sweep = [at_best_rate(Row(f"vanilla:{k}")) for k in options.sweep]
    good = [results for results in sweep if _as_good(results, base)]
    if good:
        best = min(good, key=lambda results: results[0].nfe)
        lines.append(_Line(f"control: best of a sweep ({best[0].steps} steps)", "", best, base))
    elif sweep:
        note = "no number of steps in the sweep is as good as vanilla"
        lines.append(_Line("control: best of a sweep", "", note=note))
    for method in section.others:
        results = at_best_rate(Row(method))
        lines.append(_Line(f"control: {results[0].method}", "", results, base, _failures(results)))
    return lines


def _quality(results: Sequence[Result]) -> tuple[float, ...]:
    """Smaller is better: failures, then accuracy, then the time to the target, then the loss."""
    reached = [r.to_target if r.to_target is not None else float("inf") for r in results]
    return (
        sum(bool(r.failure) for r in results),
        -round(statistics.median(min(r.accuracy, r.reference_accuracy) for r in results), 3),
        statistics.median(reached),
        statistics.median(r.train_loss for r in results),
    )


def _as_good(results: Sequence[Result], base: Sequence[Result]) -> bool:
    """Within .3 points of the baseline on every seed, as it is solved and solved exactly."""
    return all(
        min(r.accuracy, r.reference_accuracy) >= b.accuracy - 0.003 and not r.failure
        for r, b in zip(results, base, strict=True)
    )


def _failures(results: Sequence[Result]) -> str:
    failed = [r.failure for r in results if r.failure]
    return f"{len(failed)} of {len(results)} failed: {failed[0]}" if failed else ""


# ----------------------------------------------------------------------------------------------------------- printing

HEADS = ("", "paper", "t_f", "evals", "training s", "inference ms", "to target s", "test %", "at 1e-7 %", "lr", "note")


def _cells(lines: Sequence[_Line]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return HEADS, [_row_cells(line) for line in lines]


def _row_cells(line: _Line) -> tuple[str, ...]:
    if not line.results:
        return (line.label, line.paper, *[""] * (len(HEADS) - 3), line.note)
    results, base = line.results, line.base
    training = _spread([r.training for r in results], "{:.2f}")
    if results[0].pretraining is not None:
        first = statistics.median(r.pretraining or 0.0 for r in results)
        training += f" (first {first:.2f})"
    return (
        line.label,
        line.paper,
        _spread([r.t_f for r in results], "{:.4g}"),
        _spread([r.nfe for r in results], "{:g}"),
        training + _ratio(results, base, lambda r: r.training),
        _spread([1e3 * (r.inference or 0.0) for r in results], "{:.2f}") + _ratio(results, base, lambda r: r.inference),
        _to_target(results) + _ratio(results, base, lambda r: r.to_target),
        _spread([100 * r.accuracy for r in results], "{:.1f}"),
        _spread([100 * r.reference_accuracy for r in results], "{:.1f}"),
        f"{results[0].lr:g}",
        line.note,
    )


def _spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where the values differ as printed."""
    low, high = form.format(min(values)), form.format(max(values))
    return form.format(statistics.median(values)) + (f" [{low}, {high}]" if low != high else "")


def _to_target(results: Sequence[Result]) -> str:
    reached = [r.to_target for r in results if r.to_target is not None]
    if not reached:
        return "never"
    return _spread(reached, "{:.2f}") + (f" ({len(reached)} of {len(results)})" if len(reached) < len(results) else "")


def _median_ratio(
    results: Sequence[Result], base: Sequence[Result], value: Callable[[Result], float | None]
) -> float | None:
    pairs = [(value(b), value(r)) for r, b in zip(results, base, strict=True)]
    ratios = [b / r for b, r in pairs if b and r]
    return statistics.median(ratios) if len(ratios) == len(results) else None


def _ratio(results: Sequence[Result], base: Sequence[Result], value: Callable[[Result], float | None]) -> str:
    ratio = _median_ratio(results, base, value)
    return "" if ratio is None or results is base else f" {ratio:.1f}x"


def _remarks(lines: Sequence[_Line]) -> list[str]:
    """For each learned row: what of its gain the controls have too."""
    controls = [line for line in lines if line.label.startswith("control") and line.results]
    return [_remark(line, controls) for line in lines[1:] if line.results and line not in controls]


def _remark(line: _Line, controls: Sequence[_Line]) -> str:
    parts = []
    for what, value in GAINS.items():
        gain = _median_ratio(line.results, line.base, value)
        if gain is not None:
            others = [
                f"{c.label.removeprefix('control: ')} {other:.1f}x"
                for c in controls
                if (other := _median_ratio(c.results, c.base, value)) is not None
            ]
            parts.append(f"{what} {gain:.1f}x ({', '.join(others)})" if others else f"{what} {gain:.1f}x")
    worst = 100 * min(r.reference_accuracy for r in line.results)
    return f"{line.label}, and the controls in brackets: {'; '.join([*parts, f'at 1e-7 at least {worst:.1f} %'])}."


GAINS: dict[str, Callable[[Result], float | None]] = {
    "training": lambda r: r.training,
    "time to target": lambda r: r.to_target,
    "inference": lambda r: r.inference,
}


def _printed(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        caption="Medians over seeds (and ranges); ratios to the first row, by seed. Target: training loss .01 or less "
        "at 100 %. At 1e-7: test accuracy of the same model, its ODE solved at that tolerance. Times of one thread, in turn.",
    )
    for head in heads:
        table.add_column(head)
    for row in cells:
        table.add_row(*map(Text, row))  # as it is: brackets are no markup here
    return table


def _markdown(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    rows = [heads, ["---"] * len(heads), *cells]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"## {title}\n\n{table}\n\n" + "\n".join(f"- {remark}" for remark in remarks)
