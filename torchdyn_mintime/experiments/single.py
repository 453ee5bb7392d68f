"""One task with some methods and seeds, as the ``run`` command prints it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from torchdyn_mintime.experiments.data import Data
from torchdyn_mintime.experiments.images import Source
from torchdyn_mintime.experiments.results import Result, print_table, write
from torchdyn_mintime.experiments.run_pictures import certificate_of, draw_run
from torchdyn_mintime.experiments.runner import carry_out, time_inference
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS, Settings

__all__ = ["run"]


COLUMNS = ("seed", "t_f", "steps", "evals", "train s", "infer ms", "CE", "train", "test", "at 1e-7", "target", "note")


def run(
    task: str,
    methods: Sequence[str],
    settings: Settings,
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    device: str = "cpu",
    source: Source | None = None,
) -> list[Result]:
    """Trains every method on every seed, prints a row for each and writes them as CSV and JSON.

    What an earlier call has finished is not trained again; what it was stopped at goes on.
    """
    store = Store(folder / "runs")
    results: list[Result] = []
    plans: list[Plan] = []
    shown: Data | None = None  # of the first seed, whose runs are drawn
    for seed in seeds:
        own = [Plan(task, method, replace(settings, seed=seed)) for method in methods]
        data = TASKS[task].load(own[0].settings, source or Source())
        shown = shown or data
        carry_out(own, data, store, console, device)
        results += time_inference(own, data, store)
        plans += own
    for method in methods:
        own_results = [(r, p) for r, p in zip(results, plans, strict=True) if p.method == method]
        print_table(_table(task, own_results, store), console)
        _compare(task, method, [r for r, _ in own_results], console)
        if not math.isnan(own_results[0][0].accuracy):
            _show(own_results[0][1], store, shown, folder, console)
    files = write(results, folder, f"run-{task}-{'-'.join(methods).replace(':', '-')}")
    console.print(f"The table as data: {', '.join(map(str, files))}")
    return results


def _table(task: str, results: Sequence[tuple[Result, Plan]], store: Store) -> Table:
    table = Table(
        title=f"{TASKS[task].title}: {results[0][0].method}",
        caption="Accuracies in %; at 1e-7: on the test set too, of the same model, its ODE solved at that tolerance. "
        f"target: seconds until the training loss first was {results[0][1].settings.target:g} or less, at 100 %. Times of one "
        "thread on the CPU.",
        box=box.SIMPLE_HEAD,
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "note" else "right")
    for r, plan in results:
        table.add_row(
            str(r.seed),
            f"{r.t_f:.4f}",
            str(r.steps),
            str(r.nfe),
            f"{r.training:.2f}",
            f"{1e3 * (r.inference or 0):.2f}",
            f"{r.train_loss:.4f}",
            *(f"{100 * v:.1f}" for v in (r.train_accuracy, r.accuracy, r.reference_accuracy)),
            "never" if r.to_target is None else f"{r.to_target:.2f}",
            note(r, store, plan),
        )
    return table


def _show(plan: Plan, store: Store, data: Data | None, folder: Path, console: Console) -> None:
    """The picture of a run, and the rate that held where one was asked for."""
    assert data is not None
    model, name = store.model(plan), f"run-{plan.task}-{plan.method}-seed{plan.settings.seed}".replace(":", "-")
    certificate = certificate_of(plan, model, data)
    if certificate is not None:
        console.print(str(certificate), highlight=False)
    path = draw_run(plan, model, store.history(plan), data, certificate, folder / f"{name}.png")
    console.print(f"What it looks like: {path}", highlight=False)


def note(r: Result, store: Store, plan: Plan) -> str:
    """What a reader should know of a run: that it failed, or that t_f ran into its lower bound."""
    if r.failure:
        return r.failure
    spans = getattr(store.model(plan).node, "bounds", None)
    if spans and r.t_f <= spans[0] * (1 + 1e-5):
        return "t_f is at its lower bound"
    return ""


def _compare(task: str, method: str, results: Sequence[Result], console: Console) -> None:
    values = [r.t_f for r in results]
    perfect = sum(r.train_accuracy == 1 for r in results)
    text = (
        f"{results[0].method}: t_f {statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f}), "
        f"100 % on the training data in {perfect} of {len(results)}"
    )
    published = TASKS[task].published.get(method)
    if published:
        near = sum(abs(v / published - 1) <= 0.25 for v in values)
        text += f"; published t_f {published:g}: {near} of {len(results)} within 25 %"
    console.print(text, highlight=False)
