"""The paper's tables, with ours and the controls beside each of their rows: ``TABLES``, by number.

``make`` makes these, ``make_own`` one of any task and methods, and ``demo`` a short one with figures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from torchdyn_mintime import spans
from torchdyn_mintime.experiments import MissingData, UsageError, figures, measure
from torchdyn_mintime.experiments.comparison import BEST_OF_SWEEP, TORCHDYN_TWIN, TWIN, Options, Row, compare
from torchdyn_mintime.experiments.results import Line, print_table, show, write
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS

__all__ = ["DEMO", "FLOWS_FIRST_SEED", "FLOW_SWEEP", "TABLES", "demo", "make", "make_own"]

FLOW_SWEEP = (4, 6, 8, 12, 16)
"""Steps of the control for flows, as a user without this package would try them."""

FLOWS_FIRST_SEED = 3
"""Of the table of flows; seeds 0 to 2 were used to choose its settings."""

# One rate for all, as in the paper's code, drives t_f into its lower bound at .1: on two moons on most seeds, with an adaptive
# solver on some. With these t_f keeps its own pace; .02 was chosen for the training time on moons' seeds 0 to 4.
_MOONS_TIMES, _ADAPTIVE_TIMES = (("span_lr", 0.02),), (("span_lr", 0.01),)
_LYAPUNOV = (("lr", 0.03),)  # the paper's code, where the table is run at each task's own learning rate
_PEERS = tuple(
    Row(method)
    for method in (
        *("lyanet", "steer", "taynode-2", "taynode-3", "rnode"),
        *("local-error", "step-doubling", "coordinate-descent"),
    )
)
_ANNULI = (
    Row("vanilla", "t_f 1; 123 s; 86.6 ms"),
    Row("minimum-time", ".0819; 27 s (4.6x); 10.52 ms (8.2x)"),
    Row("convergence-rate", ".09; 15.98 + 1.02 s (7.2x); 10.24 ms", _LYAPUNOV),
)
_DEFAULT_ADAPTIVE = Row("default-adaptive", control=True)
_CONTROLS = (TWIN, BEST_OF_SWEEP, _DEFAULT_ADAPTIVE)
_IMAGE_CONTROLS = (*_CONTROLS, TORCHDYN_TWIN, Row("skipped", control=True))
_FLOW_CONTROLS = (Row("torchdyn", control=True), _DEFAULT_ADAPTIVE, TWIN, TORCHDYN_TWIN, BEST_OF_SWEEP)

TABLES: dict[str, tuple[str, Mapping[str, Sequence[Row]]]] = {
    "1": (
        "Table 1: supervised learning",
        {
            "moons": (
                Row("vanilla", "t_f 1; 46.64 s; 71.88 ms"),
                Row("minimum-time", ".0904; 7.33 s (6.4x); 8.4 ms (8.6x)", _MOONS_TIMES),
                Row("convergence-rate", ".10; 5.42 + .79 s (7.5x); 8.44 ms", _LYAPUNOV),
                Row("target"),
                Row("shallowest"),
                *_PEERS,
                *_CONTROLS,
            ),
            "annuli": (*_ANNULI, Row("target"), Row("shallowest"), Row("shallowest-adaptive"), *_PEERS, *_CONTROLS),
        },
    ),
    "2": (
        "Table 2: image classification",
        {
            "digits": (
                Row("vanilla"),
                Row("minimum-time"),
                Row("shallowest"),
                *_CONTROLS,
                Row("skipped", control=True),
            ),
            "mnist": (
                Row("vanilla", "99.57 %; 402.6 evaluations"),
                Row("minimum-time", "99.53 %; .0343; 16.1; 14x, 18x"),
                *_IMAGE_CONTROLS,
            ),
            "fashion-mnist": (
                Row("vanilla", "93.07 %; 402.6 evaluations"),
                Row("minimum-time", "92.68 %; .0564; 24.2; 12.6x, 11x"),
                *_IMAGE_CONTROLS,
            ),
            "fashion-mnist-cpu": (
                Row("vanilla"),
                Row("minimum-time"),
                Row("target", "", (("start", 0.1),)),
                Row("shallowest"),
                *_IMAGE_CONTROLS,
            ),
            "cifar10": (
                Row("vanilla", "82.60 %; 404.9 evaluations"),
                Row("minimum-time", "76.38 %; .1103; 47.3", (("weight", 1.0),), "minimum-time, weight 1"),
                Row("minimum-time", "78.41 %; .1975; 81", (("weight", 0.5),), "minimum-time, weight .5"),
                Row("minimum-time", "81.74 %; .3606; 146.1", (("weight", 0.1),), "minimum-time, weight .1"),
                *_IMAGE_CONTROLS,
            ),
        },
    ),
    "3": (
        "Table 3: the combined method",
        {
            "annuli": (
                *_ANNULI,
                Row("combined", ".0687; 16.03 s (7.7x); 10.01 ms", (*_LYAPUNOV, ("span_lr", 0.001))),
                Row("growth", "", _LYAPUNOV),
                *_CONTROLS,
            ),
        },
    ),
    "4": (
        "Table 4: against SNOpt",
        {
            "annuli": (
                *_ANNULI,
                Row("vanilla-adjoint", "465 s; .33 s"),
                Row("snopt", "89 s; 34.2 ms"),
                Row("vanilla-adjoint-adaptive", "1307 s; .91 s"),
                Row("snopt-adaptive", "927 s; .54 s"),
                *_CONTROLS,
            ),
        },
    ),
    "5": (
        "Table 5: adaptive solvers",
        {
            "annuli-adaptive": (
                Row("vanilla", "t_f 1; 168 s; 117.288 ms"),
                Row("minimum-time", ".0724; 129 s (1.3x); 86.493 ms (1.36x)", _ADAPTIVE_TIMES),
                Row("shallowest"),
                *_CONTROLS,
            ),
        },
    ),
    "6": (
        "Table 6: training time saved on images",
        {
            "mnist": (
                Row("vanilla"),
                Row("minimum-time", "94 %; t_f .0349; 99.53 %"),
                Row("snopt", "30 %; .38; 98.99 %"),
                *_IMAGE_CONTROLS,
            ),
            "cifar10": (
                Row("vanilla"),
                Row("minimum-time", "76 %; .3606; 81.74 %", (("weight", 0.1),)),
                Row("snopt", "19 %; .49; 77.82 %"),
                *_IMAGE_CONTROLS,
            ),
        },
    ),
    "flows": (
        "Flows",
        {
            "flow-moons": (
                Row("vanilla", "100 steps; over 18 min"),
                Row("minimum-time-paper", "20 steps; about 6 min (3x)"),
                Row("minimum-time"),
                *_FLOW_CONTROLS,
            ),
            "flow-circles": (
                Row("vanilla"),
                Row("minimum-time-paper"),
                Row("minimum-time"),
                *_FLOW_CONTROLS,
            ),
        },
    ),
}
"""By number: the title, and for each task its rows."""

# Fewer iterations than the paper's, for all models alike, and a time that moves faster: a demo is short.
DEMO: dict[str, dict[str, Any]] = {
    "moons": dict(iterations=100, lr=0.1, span_lr=0.02, weight=1.0),
    "digits": dict(iterations=100, lr=0.03, span_lr=0.02, weight=0.5, decay=0.99, batch=64),
}


def make(number: str, options: Options, folder: Path, store: Store, only: tuple[str, ...] = ()) -> pd.DataFrame:
    """Runs a table's rows and their controls, prints it, and writes it as CSV, JSON and Markdown.

    What an earlier call has finished is not trained again.

    Args:
        number: a key of ``TABLES``.
        options: seeds, learning rates, steps of the sweep, settings.
        folder: for the table, and pictures of flows.
        store: of the runs.
        only: of the table's tasks; empty is all.

    Raises:
        UsageError: the table has no such task.
    """
    (title, sections), console = TABLES[number], store.console
    if unknown := set(only) - set(sections):
        raise UsageError(f"table {number} has no {min(unknown)!r}; its tasks are {', '.join(sections)}")
    results, texts = [], [f"# {title}"]
    for name in only or sections:
        task, rows = TASKS[name], sections[name]
        try:
            lines, plans = compare(name, rows, options, store)
        except (MissingData, UsageError) as error:
            console.print(f"{task.title}: not run: {error}")
            texts.append(f"## {task.title}\n\nNot run: {error}.")
            continue
        texts.append(show(f"{title}: {task.title}", task.title, lines, task.goal.report, console))
        results += [line.results for line in lines if not line.results.empty]
        figures.draw_flows_of([plans[row][0] for row in rows if row in plans], store, folder / f"table-{name}")
    found = pd.concat(results) if results else pd.DataFrame()
    if results:
        write(found, texts, folder, f"table-{number}", console)
    return found


# ----------------------------------------------------------------------------------------------- a table of one's own


def make_own(
    task: str, methods: Sequence[str], options: Options, folder: Path, store: Store, name: str = ""
) -> pd.DataFrame:
    """Trains some methods on one task, prints a row for each seed, then medians, and draws the models of the first seed.

    What an earlier call has finished is not trained again; what it was stopped at goes on. Where a flow is learned by
    minimum-time, vanilla with as many steps stands beside it, by a span's rk4 and by torchdyn's own.

    Args:
        task: a key of ``TASKS``.
        methods: names for the task's ``method``; ratios are to the first.
        options: seeds and settings.
        folder: for the table and the figures.
        store: of the runs.
        name: of the files; default: after task and methods.

    Raises:
        UsageError: a method or a setting that the task does not take.
        MissingData: the task's data is not at hand.
    """
    title, goal, console = TASKS[task].title, TASKS[task].goal, store.console
    name = name or f"run-{task}-{'-'.join(methods).replace(':', '-')}"
    rows = [
        Row(m, control=i > 0 and m.startswith(("default-adaptive", "vanilla:", "torchdyn")))
        for i, m in enumerate(methods)
    ]
    twin = [TWIN, TORCHDYN_TWIN] if goal is measure.DENSITY and "minimum-time" in methods else []
    lines, plans = compare(task, [*rows, *twin], options, store)
    notes = [[note(plan, store) for plan in own] for own in plans.values()]
    seeds = [line.by_seed(own) for line, own in zip(lines, notes, strict=True)]
    first = [own[0] for own in plans.values()]
    cells = goal.report.frame([line for own in seeds for line in own], detailed=True)
    print_table(cells.drop(columns="paper"), f"{title}, seed by seed", "", console)
    text = show(title, title, lines, goal.report, console)
    if goal is measure.CLASSIFICATION:
        for line, plan in zip(lines, first, strict=True):
            console.print(_beside_published(line, plan), highlight=False)
            figures.draw_classifier(plan, store, folder)
    figures.draw_flows_of(first[: len(rows)], store, folder / name)
    results = pd.concat([line.results for line in lines])
    write(results, [text], folder, name, console)
    return results


def note(plan: Plan, store: Store) -> str:
    """Returns what a reader should know of a run: that it failed, or that t_f ran into its lower bound."""
    at_bound = (span.t_f.item() <= span.bounds[0] * (1 + 1e-5) for span in spans(store.model(plan)))
    return store.result(plan)["failure"] or ("t_f is at its lower bound" if any(at_bound) else "")


def _beside_published(line: Line, plan: Plan) -> str:
    values, perfect = line.results["t_f"].astype(float), (line.results["train_accuracy"] == 1).sum()
    text = (
        f"{line.label}: t_f {values.median():.4f} ({values.min():.4f} to {values.max():.4f}), "
        f"100 % on the training data in {perfect} of {len(values)}"
    )
    if published := TASKS[plan.task].published.get(plan.method):
        near = (abs(values / published - 1) <= 0.25).sum()
        text += f"; published t_f {published:g}: {near} of {len(values)} within 25 %"
    return text


def demo(folder: Path, store: Store, iterations: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Trains three models on each task, prints a table for each and writes them and the pictures into ``folder``.

    Args:
        folder: for pictures, CSV, JSON and Markdown.
        store: of the runs.
        iterations: optimizer steps of every model, instead of the demo's own.
        seed: of data, initialisation and batches.
    """
    texts, results, console = ["# Vanilla and minimum-time"], [], store.console
    for name, own in DEMO.items():
        settings = {**own, "iterations": iterations or own["iterations"]}
        # The control: does the learned end matter, or only that there are fewer steps?
        rows = (Row("vanilla"), Row("minimum-time"), TWIN)
        lines, plans = compare(name, rows, Options((seed,), settings=settings), store)
        task, first = TASKS[name], [own[0] for own in plans.values()]
        vanilla, ours, twin = (line.results.iloc[0] for line in lines)
        texts += [
            show(f"Vanilla and minimum-time: {task.title}", task.title, lines, task.goal.report, console),
            f"Minimum-time went from {vanilla.steps} steps to {ours.steps} in the one training. Who knew that number "
            f"beforehand would train in {twin.training:.1f} s instead of {ours.training:.1f} s.",
        ]
        console.print(
            texts[-1], f"Pictures: {figures.draw_training_of(first, store, folder / f'{name}.png')}", sep="\n"
        )
        results += [line.results for line in lines]
    found = pd.concat(results)
    write(found, texts, folder, "demo", console)
    return found
