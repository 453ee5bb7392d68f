"""Flows as a table: minimum-time, the paper's way and ours, with the controls beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from torchdyn_mintime.experiments.errors import UsageError
from torchdyn_mintime.experiments.flow_pictures import draw_flows
from torchdyn_mintime.experiments.flows import (
    FLOW_TASKS,
    FlowResult,
    FlowRun,
    FlowSettings,
    find_flow_method,
    untrained,
)
from torchdyn_mintime.experiments.lines import Kind, Line, failures, save, show
from torchdyn_mintime.experiments.runner import side_by_side
from torchdyn_mintime.experiments.store import JudgedStore, Plan
from torchdyn_mintime.flows import FlowModel

__all__ = ["FIRST_SEED", "METHODS", "SWEEP", "FlowStore", "flow_settings", "make", "run"]

METHODS = ("vanilla", "minimum-time-paper", "minimum-time", "default-adaptive")
"""Trained side by side where none are named."""

SWEEP = (4, 6, 8, 12, 16)
"""Steps of the control that a user without this package would try."""

FIRST_SEED = 3
"""Of the table; seeds 0 to 2 were used to choose its settings."""

CLOSE = 0.02
"""Nats that the best of a sweep may lose, by its steps and solved exactly."""

PAPER = {
    ("flow-moons", "vanilla"): "100 steps; over 18 min",
    ("flow-moons", "minimum-time-paper"): "20 steps; about 6 min (3x)",
}


class FlowStore(JudgedStore):
    """Finished and unfinished flows on disk."""

    result_type = FlowResult

    def model(self, plan: Plan) -> FlowModel:
        """The trained flow of a finished plan."""
        with torch.random.fork_rng(devices=[]):
            model = untrained(find_flow_method(plan.method), plan.settings)
        model.load_state_dict(torch.load(self._path(plan, ".pt"))["model"])
        return model


def flow_settings(task: str, **given: Any) -> FlowSettings:
    """The settings of a flow's task, but for those that are given.

    Raises:
        UsageError: there is no such task.
    """
    if task not in FLOW_TASKS:
        raise UsageError(f"there is no flow {task!r}; choose among {', '.join(FLOW_TASKS)}, flow-tutorial")
    own = {"weight": FLOW_TASKS[task].weight, **{k: v for k, v in given.items() if v is not None}}
    return FlowSettings(**own)


@dataclass(frozen=True)
class _Work:
    """What is trained for the table of one flow.

    Attributes:
        task: one of ``FLOW_TASKS``.
        methods: names for ``find_flow_method``; the first is the baseline.
        settings: of all, but for the seed.
        seeds: of initialisation and batches.
        sweep: steps of another control.
    """

    task: str
    methods: Sequence[str]
    settings: FlowSettings
    seeds: Sequence[int]
    sweep: Sequence[int] = ()


def run(
    task: str,
    methods: Sequence[str],
    settings: FlowSettings,
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    name: str = "",
) -> list[FlowResult]:
    """Trains every method on every seed, prints a table and draws the first seed's flows.

    Where minimum-time is among the methods, vanilla with as many steps stands beside it. What an earlier call has finished
    is not trained again; what it was stopped at goes on.

    Args:
        task: one of ``FLOW_TASKS``.
        methods: names for ``find_flow_method``.
        settings: of all, but for the seed.
        seeds: of initialisation and batches.
        folder: for the table, the runs and the pictures.
        console: where to print.
        name: of the files with the table and the pictures; default: after task and methods.

    Raises:
        UsageError: there is no such method.
    """
    name = name or f"run-{task}-{'-'.join(methods).replace(':', '-')}"
    results, text = _one(_Work(task, methods, settings, seeds), task, folder, console, name)
    save(results, [text], folder, name, console)
    return results


def make(settings: dict[str, FlowSettings], seeds: int, folder: Path, console: Console) -> list[FlowResult]:
    """The table of all flows: ``settings`` by task, on ``seeds`` seeds from ``FIRST_SEED`` on."""
    results, texts = [], ["# Flows"]
    for task, own in settings.items():
        work = _Work(task, METHODS, own, range(FIRST_SEED, FIRST_SEED + seeds), SWEEP)
        found, text = _one(work, "Flows", folder, console, f"table-{task}")
        results += found
        texts.append(text)
    save(results, texts, folder, "table-flows", console)
    return results


def _one(work: _Work, title: str, folder: Path, console: Console, name: str) -> tuple[list[FlowResult], str]:
    """Trains, prints and draws one flow's table; returns its results and its text."""
    store = FlowStore(folder / "runs")
    found, first = _train(work, store, console)
    lines, task = _lines(work, found), FLOW_TASKS[work.task]
    text = show(f"{title}: {task.title}", task.title, lines, KIND, console)
    shown = [m for m in work.methods if not found[m][0].failure]
    models = {find_flow_method(m).label: store.model(first[m]) for m in shown}
    for path in draw_flows(models, task.draw, folder / name) if models else ():
        console.print(f"What it looks like: {path}", highlight=False)
    return [r for line in lines for r in line.results], text


def _train(work: _Work, store: FlowStore, console: Console) -> tuple[dict[str, list[FlowResult]], dict[str, Plan]]:
    """The results by method, the twin's under "twin", and the plans of the first seed."""
    trained = list(dict.fromkeys([*work.methods, *(f"vanilla:{k}" for k in work.sweep)]))
    found: dict[str, list[FlowResult]] = {method: [] for method in [*trained, "twin"]}
    first: dict[str, Plan] = {}

    def begin(plan: Plan) -> FlowRun:
        return FlowRun(FLOW_TASKS[plan.task], find_flow_method(plan.method), plan.settings)

    for seed in work.seeds:
        own = replace(work.settings, seed=seed)
        plans = {method: Plan(work.task, method, own) for method in trained}
        for method, result in zip(plans, side_by_side(list(plans.values()), begin, store, console), strict=True):
            found[method].append(result)
        if "minimum-time" in work.methods:
            # The control that only a finished run can name; trained after the others.
            plan = Plan(work.task, f"vanilla:{found['minimum-time'][-1].steps or 1}", own)
            found["twin"] += side_by_side([plan], begin, store, console)
        first = first or plans
    return found, first


def _lines(work: _Work, found: dict[str, list[FlowResult]]) -> list[Line]:
    base = found[work.methods[0]]

    def line(method: str, control: bool, label: str = "") -> Line:
        own = found[method]
        return Line(label or own[0].method, PAPER.get((work.task, method), ""), own, base, failures(own), control)

    lines = [line(m, i > 0 and m.startswith(("default-adaptive", "vanilla:"))) for i, m in enumerate(work.methods)]
    if found["twin"]:
        lines.append(line("twin", True, "vanilla, as many steps as minimum-time"))
    good = [k for k in work.sweep if _as_good(found[f"vanilla:{k}"], base)]
    if good:
        lines.append(line(f"vanilla:{min(good)}", True, f"best of a sweep ({min(good)} steps)"))
    elif work.sweep:
        lines.append(Line("best of a sweep", "", note=f"none within {CLOSE} nats of vanilla", control=True))
    return lines


def _as_good(results: Sequence[FlowResult], base: Sequence[FlowResult]) -> bool:
    return not any(r.failure for r in (*results, *base)) and all(
        nll <= b.nll + CLOSE for r, b in zip(results, base, strict=True) for nll in (r.nll, r.reference)
    )


KIND = Kind(
    columns={
        "t_f": lambda line: line.figure(lambda r: r.t_f, "{:.3g}"),
        "steps": lambda line: line.figure(lambda r: r.steps, "{:g}", ratio=True),
        "evals": lambda line: line.figure(lambda r: r.nfe, "{:g}", ratio=True),
        "training s": lambda line: line.figure(lambda r: r.training, "{:.1f}", ratio=True),
        "sampling ms": lambda line: line.figure(lambda r: r.sampling, "{:.0f}", scale=1e3, ratio=True),
        "nll": lambda line: line.figure(lambda r: r.nll, "{:.3f}"),
        "nll at 1e-7": lambda line: line.figure(lambda r: r.reference, "{:.3f}"),
    },
    gains={
        "steps": lambda r: r.steps,
        "evaluations": lambda r: r.nfe,
        "training": lambda r: r.training,
        "sampling": lambda r: r.sampling,
    },
    honest=lambda line: f"nll at 1e-7 at most {max(r.reference for r in line.finished):.3f}",
    caption="Medians over seeds (and ranges); ratios to the first row, by seed. nll: negative log-likelihood of fresh samples, "
    "nats, by the steps of the training; at 1e-7: of the same model, its ODE solved at that tolerance. Times of one thread.",
)
