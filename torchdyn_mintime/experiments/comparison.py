"""Compares the rows and controls of one task: chooses learning rates, trains every row on every seed, and makes the lines."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchdyn_mintime.experiments.results import Line, Report, frame_of
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS

__all__ = [
    "BEST_OF_SWEEP",
    "LEARNED",
    "SEARCH_TWIN",
    "TORCHDYN_TWIN",
    "TWIN",
    "Options",
    "Row",
    "compare",
    "lines_of",
    "rank",
]

TRIAL_SEED = 1000
"""The seed on which learning rates are chosen. No table has results of it.

Points are drawn anew for each seed. Images are chosen or split anew, so that this seed may share some with those of a table.
"""


LEARNED = "minimum-time"
"""The method whose number of steps its twins take."""

BASELINE = "vanilla"
"""The drive is measured if a table begins with this method."""


@dataclass(frozen=True)
class Row:
    """A row of a table. The first row is the baseline of the ratios.

    Attributes:
        method: a name that the task's ``method`` takes.
        paper: what the paper reports, as printed.
        settings: the settings that differ from the task's own, as pairs (name, value).
        label: the printed name; default: the method's.
        control: whether the row is a control, and no method of the paper.
        published: whether it is trained at the learning rate of its settings, whatever rates are tried for other rows.
    """

    method: str
    paper: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    control: bool = False
    published: bool = False


SEARCH = "shallowest"
"""The method whose number of evaluations its twin takes."""

TWIN, TORCHDYN_TWIN = (
    Row(f"{name}, as many steps", label=f"{name}, as many steps as {LEARNED}", control=True)
    for name in ("vanilla", "torchdyn")
)
SEARCH_TWIN = Row("vanilla, as few evaluations", label="vanilla, as few evaluations as the search", control=True)
"""The twins: vanilla controls with as many equal steps on the whole interval as another row ended with.

They are trained after that row, whose result says how many steps they take. ``TWIN`` is solved by a span's rk4, and
``TORCHDYN_TWIN`` by torchdyn's own, which gives other values for a field that depends on time (U1). ``SEARCH_TWIN`` takes the
search's evaluations over four as steps of rk4, rounded up. The learning rate of each is chosen on ``TRIAL_SEED``, at the
number of steps of that seed.
"""

TWINS = {TWIN: ("vanilla", LEARNED), TORCHDYN_TWIN: ("torchdyn", LEARNED), SEARCH_TWIN: ("vanilla", SEARCH)}
"""For each twin: the method that trains it, and the method of the row whose steps it takes."""

BEST_OF_SWEEP = Row("best of a sweep", control=True)
"""The control with the fewest steps, among those of the options' sweep, that is as good as the baseline."""


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        seeds: seeds of data, initialisation and batches.
        rates: learning rates that every method is tried with, on ``TRIAL_SEED``; empty: the task's own rate alone.
        sweep: numbers of steps of the control :data:`BEST_OF_SWEEP`.
        defaults: settings that replace the task's own; a row's settings replace these.
        settings: settings that replace the task's and the row's own; a value of None replaces nothing.
    """

    seeds: Sequence[int] = (0,)
    rates: tuple[float, ...] = ()
    sweep: tuple[int, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def compare(
    name: str, table: Sequence[Row], options: Options, store: Store, report: Report | None = None
) -> tuple[list[Line], dict[Row, list[Plan]]]:
    """Trains every row on every seed, and compares them. Does not train again what an earlier call has finished.

    Args:
        name: the name of the task.
        table: the rows; the first is the baseline of the ratios.
        options: seeds, learning rates, steps of the sweep, settings.
        store: where the runs are kept.
        report: how lines are compared; default: that of the task.

    Returns:
        The lines of the table, and the plans of each row, in the order of the seeds.

    Raises:
        UsageError: the task does not take a method or a setting.
        MissingData: the task's data is not there.
    """
    task, console = TASKS[name], store.console
    sweep = [Row(f"vanilla:{k}") for k in options.sweep] if BEST_OF_SWEEP in table else []
    rows = [*(row for row in table if row not in (*TWINS, BEST_OF_SWEEP)), *sweep]
    lasts = {row.method: row for row in rows}  # of two rows with one method the second, which is ours
    twins = {row: lasts[beside] for row, (_, beside) in TWINS.items() if row in table and beside in lasts}
    rates = options.rates
    if rates and task.settings.optimizer == "sgd":
        console.print(f"{task.title}: trained by the paper's SGD schedule, not at the rates of a grid")
        rates = ()
    chosen: dict[Row, float | None] = dict.fromkeys([*rows, *twins], rates[0] if rates else None)

    def plan(row: Row, rate: float | None, seed: int) -> Plan:
        asked = {**dict(row.settings), **{k: v for k, v in options.settings.items() if v is not None}}
        own = task.settings.but(**options.defaults).but(seed=seed, **asked)
        own = own if row.published else own.but(lr=rate)
        if "iterations" not in asked:
            own = own.but(iterations=own.iterations * task.method(row.method).longer)
        return Plan(name, row.method, own)

    def twin(row: Row, seed: int) -> Row:
        learned = twins[row]
        result = store.result(plan(learned, chosen[learned], seed))
        steps = math.ceil(result["nfe"] / 4) if learned.method == SEARCH else result["steps"]
        return Row(f"{TWINS[row][0]}:{steps or 1}")  # a model that cannot be solved has no steps

    def choose(among: Sequence[Row]) -> list[float]:
        """Returns the best learning rate of each row, on the seed of the trials."""
        tried = {(row, rate): plan(row, rate, TRIAL_SEED) for row in among for rate in rates}
        # No time of theirs is printed, so that they need not take turns: one after the other, a stop keeps those that ended.
        for made in tried.values():
            store.finish([made])
        return [min(rates, key=lambda rate: rank(store.result(tried[row, rate]))) for row in among]

    if len(rates) > 1:
        console.print(f"{task.title}: learning rates are chosen on seed {TRIAL_SEED}", highlight=False)
        free = [row for row in rows if not row.published]
        chosen.update(zip(free, choose(free), strict=True))
        chosen.update(zip(twins, choose([twin(row, TRIAL_SEED) for row in twins]), strict=True))
    plans: dict[Row, list[Plan]] = {row: [] for row in (*rows, *twins)}
    for seed in options.seeds:
        own = {row: plan(row, chosen[row], seed) for row in rows}
        store.finish(list(own.values()))
        for row in twins:
            own[row] = plan(twin(row, seed), chosen[row], seed)
            store.finish([own[row]])
        store.time_inference(dict.fromkeys(own.values()))  # the twin may be one of the sweep
        for row, made in own.items():
            plans[row].append(made)
    found = {row: [store.result(made) for made in own] for row, own in plans.items()}
    drive = store.drive(plans[table[0]][0]) if table[0].method == BASELINE else {}
    return lines_of(table, found, report or task.report, sweep, drive), plans


def lines_of(
    table: Sequence[Row],
    found: Mapping[Row, Sequence[Mapping[str, Any]]],
    report: Report,
    sweep: Iterable[Row] = (),
    drive: Mapping[str, float] | None = None,
) -> list[Line]:
    """Returns the lines of a table.

    Args:
        table: the rows.
        found: the results of each row, those of the sweep included, one for each seed.
        report: how lines are compared.
        sweep: the rows of the sweep.
        drive: how many times longer torchdyn's own NeuralODE takes than a span, by figure; None where it was not measured.
    """
    frames = {row: frame_of(results) for row, results in found.items()}
    base, labels = frames[table[0]], {}
    good = [row for row in sweep if report.as_good(frames[row], base)]
    if good:
        best = frames[BEST_OF_SWEEP] = min((frames[row] for row in good), key=lambda frame: frame["nfe"].iloc[0])
        steps = best["steps"].iloc[0]
        labels[BEST_OF_SWEEP] = f"{BEST_OF_SWEEP.method} ({steps} step{'s' * (steps > 1)})"
    lines = []
    for row in table:
        if row in frames:
            label = labels.get(row) or row.label or frames[row]["method"].iloc[0]
            lines.append(Line(label, frames[row], base, row.paper, control=row.control, drive=drive or {}))
        else:
            note = "no number of steps in the sweep is as good as vanilla"
            lines.append(Line(row.method, note=note, control=True))
    return lines


def rank(result: Mapping[str, Any]) -> tuple[float, ...]:
    """Returns the key by which a learning rate is chosen: failure, accuracy, time to the target, loss. Smaller is better."""
    reached = float("inf") if result["to_target"] is None else result["to_target"]
    accuracy = min(result["accuracy"], result["reference_accuracy"])
    return bool(result["failure"]), -round(accuracy, 3), reached, result["train_loss"]
