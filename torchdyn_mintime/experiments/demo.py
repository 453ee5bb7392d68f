"""The demo: vanilla against minimum-time on two moons and on handwritten digits, in a few minutes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from torchdyn_mintime import plots
from torchdyn_mintime.experiments import measure
from torchdyn_mintime.experiments.images import Source
from torchdyn_mintime.experiments.methods import METHODS, vanilla_with
from torchdyn_mintime.experiments.progress import bars
from torchdyn_mintime.experiments.results import Result, measured, write
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.experiments.training import Run, race

__all__ = ["demo"]

# Fewer iterations than the paper's, for all models alike, and a time that moves faster: a demo is short.
SETTINGS = {
    "moons": dict(iterations=100, lr=0.1, span_lr=0.02, weight=1.0),
    "digits": dict(iterations=100, lr=0.03, span_lr=0.02, weight=0.5, decay=0.99, batch=64),
}


@dataclass(frozen=True)
class _Row:
    name: str
    value: str  # attribute of Result
    scale: float = 1.0
    digits: int = 0


ROWS = (
    _Row("t_f", "t_f", digits=3),
    _Row("steps", "steps"),
    _Row("evaluations", "nfe"),
    _Row("training time, s", "training", digits=2),
    _Row("inference time, ms", "inference", 1e3, 2),
    _Row("accuracy, %", "accuracy", 100, 2),
    _Row("accuracy at 1e-7, %", "reference_accuracy", 100, 2),
)

CAPTION = (
    "ratio: vanilla / minimum-time. As many steps: vanilla on [0, 1] with as many steps as minimum-time ended with. "
    "Accuracy: on the test set; at 1e-7: of the same model, its ODE solved at that tolerance. Times: of one thread on the CPU."
)


def demo(folder: Path, console: Console, iterations: int | None = None, seed: int = 0) -> list[Result]:
    """Trains three models on each task, prints one table and writes it and the pictures into ``folder``.

    Args:
        folder: for pictures, CSV and JSON.
        console: where to print.
        iterations: optimizer steps of every model, instead of the demo's own.
        seed: of data, initialisation and batches.
    """
    results: list[Result] = []
    pictures: list[Path] = []
    for name in SETTINGS:
        runs = _train(name, console, iterations, seed)
        results += _measure(name, runs)
        pictures.append(_draw(name, runs, folder))
    _print(results, console)
    files = write(results, folder, "demo")
    console.print(f"Pictures: {', '.join(map(str, pictures))}\nThe table as data: {', '.join(map(str, files))}")
    return results


def _train(name: str, console: Console, iterations: int | None, seed: int) -> list[Run]:
    task = TASKS[name]
    settings = task.settings.but(seed=seed, **SETTINGS[name]).but(iterations=iterations)
    data = task.load(settings, Source())
    runs = [Run(task, METHODS[method], settings, data) for method in ("vanilla", "minimum-time")]
    _race(runs, name, console)
    # The control: does the learned end matter, or only that there are fewer steps?
    control = Run(task, vanilla_with(measure.forward(runs[1].model, data.x_test).steps), settings, data)
    _race([control], name, console)
    return [*runs, control]


def _race(runs: Sequence[Run], title: str, console: Console) -> None:
    with bars(runs, title, console) as advanced:
        race(runs, advanced)


def _measure(name: str, runs: Sequence[Run]) -> list[Result]:
    results = [measured(name, run) for run in runs]
    seconds = measure.inference_times([run.model for run in runs], runs[0].data.x_test)
    return [replace(result, inference=t) for result, t in zip(results, seconds, strict=True)]


def _print(results: Sequence[Result], console: Console) -> None:
    table = Table(title="Vanilla and minimum-time", caption=CAPTION)
    table.add_column("")
    for column in ("vanilla", "minimum-time", "ratio", "as many steps"):
        table.add_column(column, justify="right")
    for name in SETTINGS:
        vanilla, ours, control = (r for r in results if r.task == name)
        table.add_row(f"[bold]{TASKS[name].title}[/]")
        for row in ROWS:
            a, b, c = (row.scale * getattr(r, row.value) for r in (vanilla, ours, control))
            ratio = f"{a / b:.3f}" if row.scale == 100 else f"{a / b:.1f}x"
            table.add_row(row.name, *(f"{v:.{row.digits}f}" for v in (a, b)), ratio, f"{c:.{row.digits}f}")
        table.add_section()
    console.print(table)
    for name in SETTINGS:
        vanilla, ours, control = (r for r in results if r.task == name)
        console.print(
            f"{TASKS[name].title}: minimum-time went from {vanilla.steps} steps to {ours.steps} in the one training. "
            f"Who knew that number beforehand would train in {control.training:.1f} s instead of {ours.training:.1f} s."
        )


def _draw(name: str, runs: Sequence[Run], folder: Path) -> Path:
    figure, axes = plots.grid_of_axes(2, 3)
    x, y = runs[0].data.x_test, runs[0].data.y_test
    along = {}
    for axis, run in zip(axes, runs, strict=False):
        with torch.no_grad():
            t_eval, sol = run.model.eval().trajectory(x)
            losses = [cross_entropy(run.model.head(z), y).item() for z in sol]
        plots.trajectories(axis, sol, y, title=f"{run.method.label}: trajectories")
        along[run.method.label] = (t_eval.tolist(), losses)
    histories = {run.method.label: run.history for run in runs}
    plots.curves(axes[3], along, x="time t", y="test loss of z(t)", title="loss along the trajectory", log=True)
    plots.curves(
        axes[4],
        {label: (h.seconds, h.loss) for label, h in histories.items()},
        x="training time, s",
        y="training loss",
        title="loss against training time",
        log=True,
    )
    plots.curves(
        axes[5],
        {label: (range(1, len(h.t_f) + 1), h.t_f) for label, h in histories.items()},
        x="iteration",
        y="$t_f$",
        title="terminal time over training",
    )
    return plots.save(figure, folder / f"{name}.png")
