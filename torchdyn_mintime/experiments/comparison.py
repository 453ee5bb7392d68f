"""One task with its rows and controls: learning rates are chosen, every row is trained on every seed, medians are compared."""

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
"""Learning rates are chosen on it, so that no seed of a table has had a say in them.

Its points are drawn afresh; of images it has another split, whose test images may stand in a table's.
"""


LEARNED = "minimum-time"
"""The method whose number of steps the twins take."""

BASELINE = "vanilla"
"""The method beside which the drive is measured, where a table begins with it."""


@dataclass(frozen=True)
class Row:
    """A row of a table. The first is the baseline of the ratios.

    Attributes:
        method: a name for the task's ``method``.
        paper: what the paper reports, as printed.
        settings: what differs from the task's own, as pairs.
        label: as printed; default: the method's.
        control: whether it is a control, and no method of the paper.
        published: whether it is trained at the learning rate of its settings, whatever rates are tried for the others.
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
"""The controls that only a finished run can name: as many equal steps on the whole interval as the learned row ended with.

They are trained after the others: by a span's rk4, and by torchdyn's own, which is another where the field depends on time
(U1). That of the search has one step more where the evaluations are no multiple of four. Their learning rate is chosen for
the number of steps on ``TRIAL_SEED``.
"""

TWINS = {TWIN: ("vanilla", LEARNED), TORCHDYN_TWIN: ("torchdyn", LEARNED), SEARCH_TWIN: ("vanilla", SEARCH)}
"""How each of them is trained, and the method of the row that it is beside."""

BEST_OF_SWEEP = Row("best of a sweep", control=True)
"""The control with the fewest steps, among those of the options, that is as good as the baseline."""


@dataclass(frozen=True)
class Options:
    """How much is run.

    Attributes:
        seeds: of data, initialisation and batches.
        rates: learning rates that every method is tried with, on ``TRIAL_SEED``; empty is the task's own alone.
        sweep: steps of the control.
        defaults: what is given in the place of each task's own, as in the demo.
        settings: what is given in the place of each task's and row's own; None is not given.
    """

    seeds: Sequence[int] = (0,)
    rates: tuple[float, ...] = ()
    sweep: tuple[int, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def compare(
    name: str, table: Sequence[Row], options: Options, store: Store, report: Report | None = None
) -> tuple[list[Line], dict[Row, list[Plan]]]:
    """Trains every row on every seed, and compares them. What an earlier call has finished is not trained again.

    Args:
        name: of the task.
        table: the rows; the first is the baseline of the ratios.
        options: seeds, learning rates, steps of the sweep, settings.
        store: of the runs.
        report: how lines are compared; default: as the task's goal says.

    Returns:
        The lines of its table, and the plans of each row, in the order of the seeds.

    Raises:
        UsageError: a method or a setting that the task does not take.
        MissingData: the task's data is not at hand.
    """
    task, console = TASKS[name], store.console
    sweep = [Row(f"vanilla:{k}") for k in options.sweep] if BEST_OF_SWEEP in table else []
    rows = [*(row for row in table if row not in (*TWINS, BEST_OF_SWEEP)), *sweep]
    lasts = {row.method: row for row in rows}  # ours stands below the paper's
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
        """The learning rate of each row that does best on a seed of its own."""
        tried = {(row, rate): plan(row, rate, TRIAL_SEED) for row in among for rate in rates}
        store.finish(list(tried.values()))
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
    return lines_of(table, found, report or task.goal.report, sweep, drive), plans


def lines_of(
    table: Sequence[Row],
    found: Mapping[Row, Sequence[Mapping[str, Any]]],
    report: Report,
    sweep: Iterable[Row] = (),
    drive: Mapping[str, float] | None = None,
) -> list[Line]:
    """Returns the lines of a table, from the results of each row and of the rows of the sweep, and the drive, if measured."""
    frames = {row: frame_of(results) for row, results in found.items()}
    base, labels = frames[table[0]], {}
    good = [row for row in sweep if report.as_good(frames[row], base)]
    if good:
        best = frames[BEST_OF_SWEEP] = min((frames[row] for row in good), key=lambda frame: frame["nfe"].iloc[0])
        labels[BEST_OF_SWEEP] = f"{BEST_OF_SWEEP.method} ({best['steps'].iloc[0]} steps)"
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
    """Returns what a learning rate is chosen by, smaller is better: failure, accuracy, time to the target, loss."""
    reached = float("inf") if result["to_target"] is None else result["to_target"]
    accuracy = min(result["accuracy"], result["reference_accuracy"])
    return bool(result["failure"]), -round(accuracy, 3), reached, result["train_loss"]
