"""Draws the paper's figures, from models trained here, and pictures of any trained model.

Each number of ``FIGURES`` and ``FLOW_FIGURES`` is a figure of the paper. Figure 2 is a drawing, in the docs. The picture of a
trained classifier shows its training and its loss along the flow, that of a trained flow its samples and density over time.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdyn_mintime import LearnableSpan, plots
from torchdyn_mintime.depth.trials import Trial, Verdict
from torchdyn_mintime.experiments import comparison, measure, models
from torchdyn_mintime.experiments.comparison import Options, Row, compare
from torchdyn_mintime.experiments.results import Line
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS
from torchdyn_mintime.losses import lyapunov, potentials
from torchdyn_mintime.losses.certificate import Certificate

__all__ = [
    "FIGURES",
    "FLOW_FIGURES",
    "Finished",
    "certificate_of",
    "draw_classifier",
    "draw_flows_of",
    "draw_front_of",
    "draw_precision_of",
    "finished",
    "make",
    "verdict_of",
]

FLOW_FIGURES = {"6": "flow-moons", "12": "flow-circles"}
"""The tasks of the figures on flows. ``tables.make_own`` draws these figures, and makes a table beside each."""

MOST = 500
"""The number of test samples that the picture of a classifier uses."""

EULER_STEPS, MIDPOINT_STEPS, RK4_STEPS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)
"""Numbers of steps of the stock solvers that are drawn beside a search: 1 to 64 evaluations."""


# ---------------------------------------------------------------------------------------------------- trained models


@dataclass(frozen=True)
class Finished:
    """A trained classifier to be drawn.

    Attributes:
        model, result: the model and its figures.
        x, y: test samples and labels.
        t_eval, sol, losses: times, states and losses along the paths of the samples: ``[points]``,
            ``[points, batch, ...]`` and ``[points, batch]``.
    """

    model: models.Model
    result: Mapping[str, Any]
    x: Tensor
    y: Tensor
    t_eval: Tensor
    sol: Tensor
    losses: Tensor

    @property
    def profile(self) -> tuple[list[float], list[float]]:
        """The times, and the mean loss at each."""
        return self.t_eval.tolist(), self.losses.mean(1).tolist()


@torch.no_grad()
def finished(plan: Plan, store: Store, most: int | None = None) -> Finished:
    """Returns what can be drawn of a finished plan, for the first ``most`` test samples."""
    data, model = store.data(plan), store.model(plan).eval()
    x, y = data.x_test[:most], data.y_test[:most]
    t_eval, sol = model.trajectory(x)
    losses = torch.stack([cross_entropy(model.head(z), y, reduction="none") for z in sol])
    return Finished(model, store.result(plan), x, y, t_eval, sol, losses)


@torch.no_grad()
def certificate_of(plan: Plan, store: Store) -> Certificate | None:
    """Returns the certificate of a finished plan on its first :data:`MOST` test samples; None if its method has no rate."""
    rate = TASKS[plan.task].method(plan.method).rate
    if rate is None or math.isnan(store.result(plan)["accuracy"]):
        return None
    data, model = store.data(plan), store.model(plan).eval()
    return _regularizer(model, rate).certificate(model.before(data.x_test[:MOST]), data.y_test[:MOST])


def _regularizer(model: models.Model, rate: float) -> lyapunov.LyapunovRegularizer:
    return lyapunov.regularizer_for(model, potentials.CrossEntropy(model.head), rate)


def verdict_of(plan: Plan, store: Store) -> Verdict | None:
    """Returns the verdict of a finished search; None if the plan is no search."""
    record = store.search(plan).get("verdict")
    if record is None:
        return None
    trials = [Trial(**trial) for trial in record["trials"]]
    return Verdict(**{**record, "best": Trial(**record["best"]), "trials": trials})


def draw_classifier(plan: Plan, store: Store, folder: Path) -> None:
    """Draws a finished run: its training, the loss along the flow and, for Lyapunov methods, the rate that held."""
    if math.isnan(store.result(plan)["accuracy"]):
        return
    shown, rate = finished(plan, store, MOST), TASKS[plan.task].method(plan.method).rate
    model, history = shown.model, store.history(plan)
    solved = not isinstance(model.node, models.NoODE)
    shows_points = rate is not None and isinstance(model.node, LearnableSpan) and not model.node.adaptive
    figure, axes = plots.grid_of_axes(1, 1 + solved + 2 * shows_points)
    target = math.nan if plan.settings.target is None else plan.settings.target
    if verdict := verdict_of(plan, store):
        plots.search(axes[0], verdict)
    else:
        plots.growth(axes[0], history.t_f, history.loss, target, title="t_f and loss in training")
    if solved:
        title = "test loss along the flow"
        plots.curves(axes[1], {"": shown.profile}, x="time t", y="loss of z(t)", title=title, log=True)
    if shows_points and rate is not None and (certificate := certificate_of(plan, store)):
        plots.convergence(axes[2], certificate)
        violation = _regularizer(model, rate).violation(shown.t_eval, shown.sol, shown.y)
        plots.violation(axes[3], shown.t_eval, violation)
    path = folder / f"run-{plan.task}-{plan.method}-seed{plan.settings.seed}.png".replace(":", "-")
    store.console.print(f"Picture: {plots.save(figure, path)}", highlight=False)


def draw_flows_of(plans: Sequence[Plan], store: Store, stem: Path) -> None:
    """Draws the flows of one task's finished plans that did not fail. Draws nothing if the task is no flow's."""
    good = [plan for plan in plans if TASKS[plan.task].goal is measure.DENSITY and not store.result(plan)["failure"]]
    if good and (draw := store.data(good[0]).draw):
        flows = {store.result(plan)["method"]: models.flow_of(store.model(plan)) for plan in good}
        data = draw(1500, torch.Generator().manual_seed(0))
        paths = plots.flows(flows, data, stem)
        store.console.print(f"Pictures: {', '.join(map(str, paths))}", highlight=False)


Models = list[list[Mapping[str, Any]]]
"""The results of a row: for each seed those of one model, or of a model at each of some depths."""


def draw_front_of(lines: Sequence[Line], plans: Mapping[Row, Sequence[Plan]], store: Store, path: Path) -> None:
    """Draws accuracy and loss of a table's classifiers against their evaluations.

    Each row of the table has a point for each seed. A search has a line for each seed, through all depths that passed, and so
    has vanilla, through the numbers of steps of the sweep. Models that failed are not drawn. Models without an ODE that are far
    less accurate than all others lie below the picture, and the legend has their accuracy. Without a search nothing is drawn.
    """
    if not any(store.search(own[0]) for own in plans.values()):
        return
    drawn = _models_of(lines, plans, store)
    figure, axes = plots.column_of_axes(2, height=3.2)
    accuracies = {label: _against_evaluations(own, "accuracy", 100.0) for label, own in drawn.items()}
    solved = [value for own in accuracies.values() for line in own for evaluations, value in line if evaluations]
    margin = 0.1 * (max(solved) - min(solved)) + 0.2
    lowest, shown = min(solved) - margin, {}
    for label, own in accuracies.items():
        low = sorted({f"{value:.1f}" for line in own for _, value in line if value < lowest}, key=float)
        shown[f"{label}: {' to '.join(dict.fromkeys((low[0], low[-1])))} %" if low else label] = own
    plots.trade_off(axes[0], shown, y="test accuracy, %", title="accuracy against evaluations", legend=False)
    axes[0].set_ylim(max(lowest, axes[0].get_ylim()[0]), max(solved) + margin)
    losses = {label: _against_evaluations(own, "loss") for label, own in drawn.items()}
    plots.trade_off(axes[1], losses, y="test loss", title="loss against evaluations", log=True, legend=False)
    _legend_above(figure, axes[0])
    store.console.print(f"Picture: {plots.save(figure, path, small=True)}", highlight=False)


def _models_of(lines: Sequence[Line], plans: Mapping[Row, Sequence[Plan]], store: Store) -> dict[str, Models]:
    """Returns what a picture of the front shows, by label."""
    sweep = {int(row.method.partition(":")[2]): row for row in plans if row.method.startswith("vanilla:")}
    found: dict[str, Models] = {}
    for line in lines:
        if not (line.finished.empty or (sweep and line.label.startswith(comparison.BEST_OF_SWEEP.method))):
            found[line.label] = [[result] for result in line.finished.to_dict("records")]
    for row, own in plans.items():
        fronts = [store.search(plan)["front"] for plan in own if store.search(plan)]
        label = row.label or TASKS[own[0].task].method(row.method).label if fronts else ""
        if label in found:
            found[label] = [front for front in fronts if front]
    if sweep:
        by_seed = zip(*([store.result(plan) for plan in plans[sweep[steps]]] for steps in sorted(sweep)), strict=True)
        good = [[result for result in results if not result["failure"]] for results in by_seed]
        found[f"vanilla, {min(sweep)} to {max(sweep)} steps"] = [own for own in good if own]
    return found


def _against_evaluations(models: Models, figure: str, scale: float = 1.0) -> list[list[tuple[float, float]]]:
    return [[(result["nfe"], scale * result[figure]) for result in own] for own in models]


def _legend_above(figure: Any, axis: Any) -> None:
    """Puts the names of an axis above all panels: inside, they would cover points."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", fontsize=6)


def draw_precision_of(plans: Mapping[Row, Sequence[Plan]], store: Store, path: Path) -> None:
    """Draws solver error against evaluations: searches at several tolerances, and stock solvers on the vanilla model."""
    values: dict[str, list[list[tuple[float, float]]]] = {}
    for row, own in plans.items():
        results = [result for plan in own if not (result := store.result(plan))["failure"]]
        if row.method != comparison.BASELINE:
            values[row.label or row.method] = [[(r["nfe"], r["error"])] for r in results]
            continue
        model, x = store.model(own[0]), store.data(own[0]).x_test[: measure.CHUNK]
        for solver, steps in (("euler", EULER_STEPS), ("midpoint", MIDPOINT_STEPS), ("rk4", RK4_STEPS)):
            values[f"vanilla model, {solver}"] = [list(measure.solver_errors(model, x, solver, steps).items())]
    figure, (axis,) = plots.column_of_axes(1, height=3.8)
    title = "work and precision"
    plots.trade_off(axis, values, y="solver error / displacement", title=title, log=True, legend=False)
    _legend_above(figure, axis)
    store.console.print(f"Picture: {plots.save(figure, path, small=True)}", highlight=False)


# ------------------------------------------------------------------------------------------------ the paper's figures


def make(number: str, options: Options, folder: Path, store: Store) -> None:
    """Draws a figure of :data:`FIGURES`. Trains its models unless they were trained before.

    Raises:
        MissingData: the figure's data is not there.
    """
    path = plots.save(FIGURES[number](options, store), folder / f"figure-{number}.png", small=True)
    store.console.print(f"Figure {number}: {path}")


def _trained(task: str, methods: Sequence[str], options: Options, store: Store) -> dict[str, Finished]:
    """Returns the trained models, by method."""
    # The paper's code trains Lyapunov methods on annuli at the rate .03; on two moons at .1, as the other methods.
    lyapunov_rate = (("lr", 0.03),) if task == "annuli" else ()
    rows = [Row(m, settings=lyapunov_rate if TASKS[task].method(m).rate else ()) for m in methods]
    _, plans = compare(task, rows, options, store)
    return {row.method: finished(own[0], store) for row, own in plans.items()}


def _figure_1(options: Options, store: Store) -> Any:
    trained = _trained("annuli", ["vanilla", "minimum-time"], options, store)
    figure, (above, below) = plots.column_of_axes(2)
    shown = list(trained.values())
    with torch.no_grad():
        right = torch.stack([each.model(each.x).argmax(1) == each.y for each in shown]).all(0).nonzero().flatten()
    chosen = right[:: max(1, len(right) // 20)][:20]  # the same for all models
    lines, spread = {}, {}
    for each in shown:
        losses, label = each.losses[:, chosen], each.result["method"]
        lines[label] = (each.t_eval.tolist(), losses.mean(1).tolist())
        spread[label] = losses.std(1).tolist()
    title = f"(a) mean and deviation, {len(chosen)} test examples"
    plots.curves(above, lines, x="time t", y="cross entropy of z(t)", title=title, log=True, spread=spread)
    vanilla = trained["vanilla"]
    title = "(b) vanilla: their trajectories"
    plots.trajectories(below, vanilla.sol[:, chosen], vanilla.y[chosen], title=title, most=20)
    return figure


def _trajectories(task: str, methods: Sequence[str], options: Options, store: Store) -> Any:
    """Draws each model's paths in the plane, and below them each dimension against time."""
    trained = _trained(task, methods, options, store)
    figure, axes = plots.column_of_axes(3, len(methods), 1.7)
    for i, shown in enumerate(trained.values()):
        title = f"{shown.result['method']}\n$t_f$ = {shown.result['t_f']:.3f}"
        plots.trajectories(axes[i], shown.sol, shown.y, title=title, most=50)
        for k in range(2):
            plots.dimensions(axes[(k + 1) * len(methods) + i], shown.t_eval, shown.sol, shown.y, k, most=50)
    return figure


def _figure_4(options: Options, store: Store) -> Any:
    names = ["lyapunov-1", "lyapunov-10", "lyapunov-20", "convergence-rate", "minimum-time"]
    trained = _trained("annuli", names, options, store)
    figure, axes = plots.column_of_axes(len(names), 2, 1.6)
    losses = [value for shown in trained.values() for value in shown.profile[1]]
    end = max(float(shown.t_eval[-1]) for shown in trained.values())
    for i, (letter, shown) in enumerate(zip("abcde", trained.values(), strict=True)):
        left, right = axes[2 * i : 2 * i + 2]
        title = f"({letter}) {shown.result['method']}"
        plots.curves(left, {"test loss": shown.profile}, x="time t", y="cross entropy", title=title, log=True)
        left.set(xlim=(0, end), ylim=(0.8 * min(losses), 1.25 * max(losses)))  # one scale for all panels
        left.legend(loc="lower left", handlelength=1.0)
        plots.trajectories(right, shown.sol, shown.y, title=f"$t_f$ = {shown.result['t_f']:.3g}", most=50)
    return figure


def _figure_5(options: Options, store: Store) -> Any:
    methods = (
        *("vanilla", "minimum-time", "shallowest", "steer", "snopt", "taynode-2", "rnode"),
        *("default-adaptive", "residual", "skipped"),
    )
    trained = _trained("mnist-cpu", methods, options, store)
    figure, axes = plots.column_of_axes(3, height=2.6)
    whole = [shown for shown in trained.values() if not shown.result["failure"]]  # a model that failed has no bar
    for axis, what, head, scale in (
        (axes[0], "training", "training time, s", 1.0),
        (axes[1], "inference", "inference time, ms", 1e3),
        (axes[2], "accuracy", "test accuracy, %", 100.0),
    ):
        bars = {shown.result["method"]: scale * shown.result[what] for shown in whole}
        plots.bars(axis, bars, x=head, title=f"{TASKS['mnist-cpu'].title.split(',')[0]}: {what}")
    return figure


def _points(name: str, options: Options, store: Store) -> Any:
    task = TASKS[name]
    data = task.load(task.settings.but(seed=options.seeds[0]), store.source)
    figure, (axis,) = plots.column_of_axes(1, height=3.0)
    plots.points(axis, data.x, data.y, title=task.title)
    return figure


def _boundary(method: str, options: Options, store: Store) -> Any:
    shown = _trained("annuli", [method], options, store)[method]
    figure, (above, below) = plots.column_of_axes(2, height=3.2)
    ticks = torch.linspace(-1.4, 1.4, 80)
    plane = torch.stack([*torch.meshgrid(ticks, ticks, indexing="xy"), torch.zeros(80, 80)], -1).reshape(-1, 3)
    with torch.no_grad():
        share = shown.model(plane).softmax(1)[:, 1].reshape(80, 80)
    plots.regions(above, ticks, share, shown.x, shown.y, title=f"{shown.result['method']}: decision")
    plots.trajectories(below, shown.sol, shown.y, title=f"trajectories, $t_f$ = {shown.result['t_f']:.3f}")
    return figure


FIGURES: dict[str, Callable[[Options, Store], Any]] = {
    "1": _figure_1,
    "3": partial(_trajectories, "moons", ["vanilla", "minimum-time"]),
    "4": _figure_4,
    "5": _figure_5,
    "7": partial(_points, "moons"),
    "8": partial(_trajectories, "moons", ["pretrained-longer", "convergence-rate-longer"]),
    "9": partial(_points, "annuli"),
    "10": partial(_boundary, "pretrained"),
    "11": partial(_boundary, "convergence-rate"),
}
