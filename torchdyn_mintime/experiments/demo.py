"""The command ``demo``: shows on two small tasks, in two minutes, what the package gives and fewer steps alone do not."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib import rc_context
from torch import Tensor

from torchdyn_mintime import LearnableSpan, plots, spans
from torchdyn_mintime.depth.shallowest import set_steps
from torchdyn_mintime.experiments import figures, measure, models
from torchdyn_mintime.experiments.comparison import SEARCH_TWIN, TWIN, Options, Row, compare
from torchdyn_mintime.experiments.results import Line, cell, factors, markdown, print_table, write
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.numerics import IntegrationError

__all__ = ["DEMO", "ROWS", "demo"]

DEMO: dict[str, dict[str, Any]] = {
    "moons": dict(iterations=100, span_lr=0.02),
    "digits": dict(iterations=100, span_lr=0.02),
}
"""The tasks and their settings. All models have fewer iterations than in the paper, and t_f moves faster: a demo is short."""

VANILLA, MINIMUM_TIME, SEARCH = Row("vanilla"), Row("minimum-time"), Row("shallowest", label="the search")
ROWS = (VANILLA, MINIMUM_TIME, TWIN, SEARCH, SEARCH_TWIN)

REPORT = replace(
    measure.CLASSIFICATION.report,
    columns={
        "evals": cell("nfe"),
        "loss": cell("loss", "{:.3g}"),
        "exact loss": cell("reference_loss", "{:.3g}"),
        "test %": cell("accuracy", "{:.1f}", scale=100),
        "changed %": cell("changed", "{:.1f}", scale=100),
        "training s": cell("training", "{:.2f}"),
        "drive x depth": factors("training"),
        "inference ms": cell("inference", "{:.2f}", scale=1e3),
        "of inference": factors("inference"),
    },
    gains={"training": "training", "inference": "inference"},
    caption="Loss: cross entropy of the test data, by the model's own steps. Exact loss: with its ODE solved at a tolerance of "
    "1e-7. Changed: predictions that differ between the two. Drive x depth: how many times less than torchdyn's NeuralODE at "
    "vanilla's steps; the drive is what a span saves at equal steps, the depth what fewer evaluations save. Times are those of "
    "one thread; all models took turns.",
)

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 25, 50, 100)
"""Numbers of steps of rk4 at which the loss of each trained model is drawn."""

PATH_STEPS = 200
"""Steps of rk4 with which the path of a model's ODE is drawn."""


def demo(folder: Path, store: Store, iterations: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Trains five models on each task of :data:`DEMO`, prints a table for each, and writes tables and pictures.

    The models are vanilla, minimum-time, the search, and vanilla with as few steps as each of the last two.

    Args:
        folder: where pictures, CSV, JSON and Markdown go.
        store: where the runs are kept.
        iterations: optimizer steps of every model, instead of the demo's own.
        seed: of data, initialisation and batches.

    Returns:
        The figures of all models, a row for each.
    """
    texts, results, console = ["# Fewer evaluations, and still an ODE"], [], store.console
    for name, own in DEMO.items():
        options = Options((seed,), defaults=own, settings={"iterations": iterations})
        lines, plans = compare(name, ROWS, options, store)
        title, of = TASKS[name].title, dict(zip(ROWS, lines, strict=True))
        for row in (TWIN, SEARCH_TWIN):
            of[row].label = f"vanilla, {of[row].results['nfe'].iloc[0]} evaluations"
        cells, words = REPORT.frame(lines).drop(columns=["paper", "note"]), _in_words(of)
        print_table(cells, f"Demo: {title}", REPORT.caption, console)
        console.print(words, highlight=False)
        texts.append(f"## {title}\n\n{markdown(cells)}\n\n{words}")
        drawn = {row: own[0] for row, own in plans.items()}
        with rc_context(plots.STYLE):
            picture = _draw(drawn, store, folder / f"{name}.png")
        console.print(f"Picture: {picture}", highlight=False)
        results += [line.results for line in lines]
    found = pd.concat(results)
    write(found, texts, folder, "demo", console)
    return found


def _in_words(lines: Mapping[Row, Line]) -> str:
    """Returns what the rows show, in sentences."""
    ours, twin, search, few = (lines[row].results.iloc[0] for row in (MINIMUM_TIME, TWIN, SEARCH, SEARCH_TWIN))
    said = [
        f"Minimum-time ended with {ours.nfe} evaluations after {ours.training:.1f} s of training, at a test loss of "
        f"{ours.loss:.3g}. Vanilla, told to take as many, needed {twin.training:.1f} s, for {twin.loss:.3g}."
    ]
    if search.failure:
        return f"{said[0]} The search found nothing in {search.iterations} iterations: {search.failure}."
    for who, model in (
        (f"The search ended with {search.nfe} after {search.iterations} iterations", search),
        (f"Vanilla, told to take {few.nfe}", few),
    ):
        said.append(
            f"{who}: test loss {model.loss:.3g}, and {model.reference_loss:.3g} with the ODE solved exactly, which changes "
            f"{100 * model.changed:.1f} % of the predictions."
        )
    return " ".join(said)


# ----------------------------------------------------------------------------------------------------------- the picture


def _draw(plans: Mapping[Row, Plan], store: Store, path: Path) -> Path:
    """Draws the models of one task: paths of their ODEs, losses against evaluations and training time, and the search."""
    figure, axes = plots.grid_of_axes(2, 4)
    names = {
        VANILLA: "vanilla",
        MINIMUM_TIME: "minimum-time",
        TWIN: "vanilla",
        SEARCH: "the search",
        SEARCH_TWIN: "vanilla",
    }
    labels = {row: f"{names[row]}, {store.result(plan)['nfe']}" for row, plan in plans.items()}
    shown = {labels[row]: figures.finished(plan, store, figures.MOST) for row, plan in plans.items()}
    upper = [labels[row] for row in (VANILLA, MINIMUM_TIME, SEARCH_TWIN, SEARCH)]
    panels = [shown[label] for label in upper]
    for axis, label, one in zip(axes, upper, panels, strict=False):
        title = f"{label} evaluation{'' if one.result['nfe'] == 1 else 's'} a solve"
        plots.trajectories(axis, _exact_path(one), one.y, ends=one.sol[-1], title=title)
    if panels[0].sol.shape[2] <= 3:  # of more dimensions each panel has directions of its own
        _same_limits(axes[:4], [state for one in panels for state in (one.sol[0], one.sol[-1])])
    own = {label: (one.result["nfe"], one.losses[-1].mean().item()) for label, one in shown.items()}
    curves = {}
    for label, one in shown.items():
        found = dict([own[label], *_losses_by_steps(one)])
        curves[label] = sorted(found), [found[nfe] for nfe in sorted(found)]
    title = "test loss at other numbers of steps; dots: its own"
    plots.curves(
        axes[4], curves, x="evaluations of the field", y="test loss", title=title, log=True, marks=own, legend=False
    )
    axes[4].set_xscale("log")
    changed = {name: 100 * one.result["changed"] for name, one in shown.items()}
    plots.bars(axes[5], changed, x="%", title="predictions that change if solved exactly")
    if verdict := figures.verdict_of(plans[SEARCH], store):
        plots.search(axes[6], verdict)
    histories = {labels[row]: store.history(plan) for row, plan in plans.items()}
    seconds = {name: (history.seconds, history.loss) for name, history in histories.items()}
    plots.curves(axes[7], seconds, x="training time, s", y="training loss", title="training", log=True, legend=False)
    axes[7].set_xscale("log")
    # One legend for both panels of curves, below them: inside, some curve or line of the grid would run through it.
    handles, names_shown = axes[7].get_legend_handles_labels()
    figure.legend(handles, names_shown, loc="outside lower center", ncols=len(names_shown))
    return plots.save(figure, path)


def _steppable(shown: figures.Finished) -> tuple[models.Model, LearnableSpan]:
    """Returns a copy of the model, whose steps can be set, and its span."""
    model = deepcopy(shown.model)
    (span,) = spans(model)
    return model, span


@torch.no_grad()
def _exact_path(shown: figures.Finished) -> Tensor:
    """Returns the path of the ODE itself from the same states, ``[points, batch, ...]``, by :data:`PATH_STEPS` steps."""
    model, span = _steppable(shown)
    set_steps(span, PATH_STEPS, "rk4")
    return model.trajectory(shown.x)[1]


@torch.no_grad()
def _losses_by_steps(shown: figures.Finished) -> Iterator[tuple[int, float]]:
    """Yields pairs (evaluations, loss) of the same trained model, solved with each number of steps in :data:`STEPS`."""
    model, span = _steppable(shown)
    for steps in STEPS:
        set_steps(span, steps, "rk4")
        try:
            output = measure.forward(model, shown.x).output
        except IntegrationError:
            continue
        yield 4 * steps, measure.scores(output, shown.y)[0]


def _same_limits(axes: Sequence[Any], states: Sequence[Tensor]) -> None:
    """Gives all axes the same limits, which hold the given states with a margin."""
    every = torch.cat([state[:, :2] for state in states])
    low, high = every.amin(0), every.amax(0)
    (x, y), half = ((low + high) / 2).tolist(), 0.55 * (high - low).max().item()
    for axis in axes:
        axis.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
        axis.set_aspect("equal", adjustable="box")
