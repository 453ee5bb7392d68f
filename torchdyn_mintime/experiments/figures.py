"""The paper's figures, from models trained here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdyn_mintime import plots
from torchdyn_mintime.experiments.data import Data
from torchdyn_mintime.experiments.images import Source
from torchdyn_mintime.experiments.models import Classifier
from torchdyn_mintime.experiments.results import Result
from torchdyn_mintime.experiments.runner import carry_out, time_inference
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "Options", "make"]


@dataclass(frozen=True)
class Options:
    """How a figure's models are trained.

    Attributes:
        iterations: optimizer steps instead of each task's own.
        seed: of data, initialisation and batches.
        subset, width: of image tasks.
        source: where image data is.
        device: where to train.
    """

    iterations: int | None = None
    seed: int = 0
    subset: int | None = None
    width: int | None = None
    source: Source = field(default_factory=Source)
    device: str = "cpu"


@dataclass(frozen=True)
class _Studio:
    """What a figure needs: trained models by name."""

    options: Options
    store: Store
    console: Console

    def models(self, task: str, methods: Sequence[str]) -> tuple[Data, dict[str, tuple[Classifier, Result]]]:
        """The data and, by method, the trained model with its figures."""
        options = self.options
        own = TASKS[task].settings.but(
            seed=options.seed, iterations=options.iterations, subset=options.subset, width=options.width
        )
        # Lyapunov training is at .03 in the paper's code, on both tasks.
        plans = [Plan(task, m, own.but(lr=0.03) if m in LYAPUNOV else own) for m in methods]
        data = TASKS[task].load(own, options.source)
        carry_out(plans, data, self.store, self.console, options.device)
        results = time_inference(plans, data, self.store)
        return data, {m: (self.store.model(p), r) for m, p, r in zip(methods, plans, results, strict=True)}


LYAPUNOV = ("lyapunov-1", "lyapunov-10", "lyapunov-20", "pretrained", "convergence-rate", "combined")


def make(number: str, options: Options, folder: Path, console: Console) -> Path:
    """Trains what a figure shows, unless it was trained before, and draws it.

    Returns:
        The picture.

    Raises:
        MissingData: the figure's data is not at hand.
    """
    figure = FIGURES[number](_Studio(options, Store(folder / "runs"), console))
    path = plots.save(figure, folder / f"figure-{number}.png")
    console.print(f"Figure {number}: {path}")
    return path


@torch.no_grad()
def _along(model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Times ``[points]``, the states and the loss of each sample ``[points, batch]`` on the way."""
    t_eval, sol = model.eval().trajectory(x)
    losses = torch.stack([cross_entropy(model.head(z), y, reduction="none") for z in sol])
    return t_eval, sol, losses


def _figure_1(studio: _Studio) -> "Figure":
    data, models = studio.models("annuli", ["vanilla", "minimum-time"])
    figure, (left, right) = plots.grid_of_axes(1, 2, 5)
    lines = {}
    for name, (model, _) in models.items():
        t_eval, _, losses = _along(model, data.x_test, data.y_test)
        right_ones = (model(data.x_test).argmax(1) == data.y_test).nonzero().flatten()
        shown = right_ones[:: max(1, len(right_ones) // 20)][:20]
        lines[name] = (t_eval.tolist(), losses[:, shown].mean(1).tolist())
    plots.curves(
        left, lines, x="time t", y="loss of z(t)", title="(a) mean of 20 examples classified rightly", log=True
    )
    _, sol, _ = _along(models["vanilla"][0], data.x_test, data.y_test)
    plots.trajectories(right, sol, data.y_test, title="(b) vanilla: trajectories", most=20)
    return figure


def _figure_3(studio: _Studio) -> "Figure":
    data, models = studio.models("moons", ["vanilla", "minimum-time"])
    figure, axes = plots.grid_of_axes(1, 2, 5)
    for axis, (name, (model, result)) in zip(axes, models.items(), strict=True):
        _, sol, _ = _along(model, data.x_test, data.y_test)
        plots.trajectories(axis, sol, data.y_test, title=f"{name}: $t_f$ = {result.t_f:.3f}")
    return figure


def _figure_4(studio: _Studio) -> "Figure":
    names = ["lyapunov-1", "lyapunov-10", "lyapunov-20", "convergence-rate", "minimum-time"]
    data, models = studio.models("annuli", names)
    figure, axes = plots.grid_of_axes(2, len(names), 3.4)
    for i, (letter, (model, result)) in enumerate(zip("abcde", models.values(), strict=True)):
        t_eval, sol, losses = _along(model, data.x_test, data.y_test)
        title = f"({letter}) {result.method}"
        plots.curves(
            axes[i], {"": (t_eval.tolist(), losses.mean(1).tolist())}, x="time t", y="loss of z(t)", title=title
        )
        plots.trajectories(axes[len(names) + i], sol, data.y_test, title=f"$t_f$ = {result.t_f:.3g}")
    return figure


def _figure_5(studio: _Studio) -> "Figure":
    methods = ["vanilla", "minimum-time", "taynode-2", "taynode-3", "rnode", "default-adaptive", "skipped"]
    _, models = studio.models("mnist", methods)
    figure, axes = plots.grid_of_axes(1, 2, 5)
    for axis, what, unit, scale in ((axes[0], "training", "s", 1), (axes[1], "inference", "ms", 1e3)):
        bars = {r.method: scale * (getattr(r, what) or 0.0) for _, r in models.values()}
        plots.bars(axis, bars, x=f"{what} time, {unit}", title=f"MNIST: {what}")
    return figure


def _data_figure(task: str) -> Callable[[_Studio], "Figure"]:
    def draw(studio: _Studio) -> "Figure":
        own = TASKS[task].settings.but(seed=studio.options.seed)
        data = TASKS[task].load(own, studio.options.source)
        figure, (axis,) = plots.grid_of_axes(1, 1, 4.5, 4)
        plots.points(axis, data.x, data.y, title=TASKS[task].title)
        return figure

    return draw


def _figure_8(studio: _Studio) -> "Figure":
    data, models = studio.models("moons", ["pretrained", "convergence-rate"])
    figure, axes = plots.grid_of_axes(1, 2, 5)
    for axis, (model, result) in zip(axes, models.values(), strict=True):
        _, sol, _ = _along(model, data.x_test, data.y_test)
        plots.trajectories(axis, sol, data.y_test, title=f"{result.method}: $t_f$ = {result.t_f:.3f}")
    return figure


def _boundary_figure(method: str) -> Callable[[_Studio], "Figure"]:
    def draw(studio: _Studio) -> "Figure":
        data, models = studio.models("annuli", [method])
        model, result = models[method]
        figure, (left, right) = plots.grid_of_axes(1, 2, 5)
        ticks = torch.linspace(-1.4, 1.4, 80)
        plane = torch.stack([*torch.meshgrid(ticks, ticks, indexing="xy"), torch.zeros(80, 80)], -1).reshape(-1, 3)
        with torch.no_grad():
            share = model.eval()(plane).softmax(1)[:, 1].reshape(80, 80)
        plots.regions(left, ticks, share, data.x_test, data.y_test, title=f"{result.method}: decision")
        _, sol, _ = _along(model, data.x_test, data.y_test)
        plots.trajectories(right, sol, data.y_test, title=f"trajectories, $t_f$ = {result.t_f:.3f}")
        return figure

    return draw


FIGURES: dict[str, Callable] = {
    "1": _figure_1,
    "3": _figure_3,
    "4": _figure_4,
    "5": _figure_5,
    "7": _data_figure("moons"),
    "8": _figure_8,
    "9": _data_figure("annuli"),
    "10": _boundary_figure("pretrained"),
    "11": _boundary_figure("convergence-rate"),
}
