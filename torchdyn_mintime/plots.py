"""Pictures of training and of trained models, each drawn on an axis of matplotlib that the caller gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdyn_mintime.core import LearnableSpan, checks, evaluating, random_kept
from torchdyn_mintime.flows import FlowModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchdyn_mintime.depth.trials import Verdict
    from torchdyn_mintime.diagnostics import Hamiltonian, Profile
    from torchdyn_mintime.losses.certificate import Certificate

__all__ = [
    "COLOURS",
    "INK",
    "STYLE",
    "FlowFrames",
    "bars",
    "column_of_axes",
    "convergence",
    "curves",
    "dimensions",
    "flow_frames",
    "flows",
    "front",
    "grid_of_axes",
    "growth",
    "hamiltonian",
    "points",
    "profile",
    "regions",
    "save",
    "search",
    "trade_off",
    "trajectories",
    "violation",
]

COLOURS = ("#1F83C4", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#9467BD", "#999999", "#B5476D", "#5B9A3C")
"""Okabe and Ito's, told apart by colour-blind readers too: the blue lighter and the black replaced, for dark pages."""

INK = "#7F7F7F"
"""A grey that can be read on white and on black: of letters, axes and bounds."""

STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 9,
}
"""Settings of matplotlib for pictures on light and on dark pages: nothing behind them, and letters that both show.

Call ``plt.rcParams.update(plots.STYLE)`` before the first picture.
"""

STYLES = ("-", "-", "--", "-.", ":")


def _colour(label: float) -> str:
    """Returns the colour of a class, also of one that is given as 1.0."""
    return COLOURS[int(label) % len(COLOURS)]


def grid_of_axes(rows: int, columns: int, width: float = 4.0, height: float = 3.4) -> "tuple[Figure, list[Axes]]":
    """Returns a new figure, without a display, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


COLUMN = 3.4
"""Inches: the width of one column of a paper."""


def column_of_axes(rows: int, columns: int = 1, height: float = 2.4) -> "tuple[Figure, list[Axes]]":
    """Returns a new figure as wide as one column of a paper, and its axes row by row; :func:`save` it with ``small``."""
    return grid_of_axes(rows, columns, COLUMN / columns, height)


def save(figure: "Figure", path: Path | str, small: bool = False) -> Path:
    """Writes the figure, and the folders that it needs; with ``small`` with letters and lines for one column of a paper."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if small:
        for axis in figure.axes:
            axis.title.set_fontsize(8)
            for text in (axis.xaxis.label, axis.yaxis.label):
                text.set_fontsize(7)
            axis.tick_params(which="both", labelsize=6)
            if (legend := axis.get_legend()) is not None:
                for text in legend.get_texts():
                    text.set_fontsize(6)
    figure.savefig(path, dpi=300 if small else 130)
    return path


def curves(
    axis: "Axes",
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str,
    log: bool = False,
    spread: Mapping[str, Sequence[float]] | None = None,
    marks: Mapping[str, tuple[float, float]] | None = None,
    legend: bool = True,
) -> None:
    """Draws named curves, each a pair (x, y).

    Args:
        lines: the curves, by name.
        x, y, title: what stands at the axes and above them.
        log: whether the axis of y is logarithmic.
        spread: half the height of a band around a curve, by its name.
        marks: a point (x, y) to be drawn as a dot, by the name of its curve.
        legend: whether the axes show the names, if there are several.
    """
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        axis.plot(xs, ys, color=colour, label=name, linewidth=1.6, linestyle=STYLES[i % len(STYLES)])
        if spread and name in spread:
            # On a log scale a band that reaches 0 ends at a hundredth of the curve.
            low = [max(value - width, 0.01 * value) for value, width in zip(ys, spread[name], strict=True)]
            high = [value + width for value, width in zip(ys, spread[name], strict=True)]
            axis.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
        if marks and name in marks:
            axis.plot(*marks[name], "o", color=colour, markersize=7)
    axis.set(xlabel=x, ylabel=y, title=title)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if legend and len(lines) > 1:
        axis.legend(fontsize=8)


def bars(axis: "Axes", values: Mapping[str, float], *, x: str, title: str) -> None:
    """Draws one horizontal bar for each name, with its value."""
    names = list(values)[::-1]
    drawn = axis.barh(names, [values[name] for name in names], color=COLOURS[0])
    labels = [f"{values[name]:,.0f}" if abs(values[name]) >= 1000 else f"{values[name]:.3g}" for name in names]
    axis.bar_label(drawn, labels, padding=2, fontsize=7)
    axis.set(xlabel=x, title=title)
    axis.margins(x=0.2)


EVALUATIONS = (0, *(2**k for k in range(10)))
"""Ticks of an axis of evaluations."""


def trade_off(
    axis: "Axes",
    lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    *,
    y: str,
    title: str,
    log: bool = False,
    legend: bool = True,
) -> None:
    """Draws values against evaluations: of each name some lines of points (evaluations, value); one point is a marker alone."""
    for i, (name, own) in enumerate(lines.items()):
        marker, colour = "osDv^<>Pxp*h"[i % 12], COLOURS[i % len(COLOURS)]
        for k, line in enumerate(own):
            xs, ys = zip(*sorted(line), strict=True)
            style = "-" if len(line) > 1 else ""
            label = None if k else name
            axis.plot(xs, ys, label=label, color=colour, marker=marker, markersize=4, linewidth=1, linestyle=style)
    # Evaluations begin at 0, where an ODE is skipped, and end at some hundred.
    axis.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    low, high = axis.get_xlim()
    axis.set_xticks([tick for tick in EVALUATIONS if low <= tick <= high])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set(xlabel="evaluations of the field", ylabel=y, title=title)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if legend:
        axis.legend(fontsize=7)


def points(axis: "Axes", x: Tensor, labels: Tensor, *, title: str) -> None:
    """Draws points of the plane ``[n, 2]``, coloured by class."""
    for c in labels.unique().tolist():
        axis.scatter(
            x[labels == c, 0].tolist(),
            x[labels == c, 1].tolist(),
            s=6,
            color=_colour(c),
            label=f"class {c:g}",
        )
    axis.set(title=title, xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axis.legend(fontsize=8)


def dimensions(axis: "Axes", t_eval: Tensor, sol: Tensor, labels: Tensor, dimension: int, *, most: int = 80) -> None:
    """Draws one dimension of the state against time, a line for each sample.

    Args:
        t_eval, sol: ``[points]`` and ``[points, batch, n]``.
        labels: classes ``[batch]``.
        dimension: counted from 0.
        most: about how many samples.
    """
    every = max(1, sol.shape[1] // most)
    states, times = sol.detach()[:, ::every, dimension].cpu(), t_eval.detach().tolist()
    for path, c in zip(states.T.tolist(), labels[::every].tolist(), strict=True):
        axis.plot(times, path, color=_colour(c), linewidth=0.6, alpha=0.6)
    axis.set(xlabel="time t", ylabel=f"$z_{dimension + 1}(t)$")
    axis.grid(alpha=0.3)


def trajectories(
    axis: "Axes", sol: Tensor, labels: Tensor, *, title: str, most: int = 80, ends: Tensor | None = None
) -> None:
    """Draws paths of the state in the plane; a ring where each starts, a dot where it ends.

    Args:
        sol: ``[points, batch, n]``, n being 2 or more. The first two dimensions are drawn; above three, the two directions in
            which the last states vary most.
        labels: classes ``[batch]``.
        most: about how many paths.
        ends: the dots, ``[batch, n]``, where the paths are those of the ODE and the model's own steps end elsewhere.

    Raises:
        ValueError: the states have fewer than two dimensions.
    """
    if sol.dim() < 3 or sol[0, 0].numel() < 2:
        raise ValueError(
            f"paths in the plane need states of two dimensions or more, sol [points, batch, n]; got {tuple(sol.shape)}: "
            "plots.dimensions draws one dimension against time"
        )
    sol = sol.detach().flatten(2).float()  # there is no SVD of half precision
    ends = sol[-1] if ends is None else ends.detach().flatten(1).float()
    names = "$z_1$", "$z_2$"
    if sol.shape[2] > 3:
        middle = ends.mean(0)
        directions = torch.linalg.svd(ends - middle, full_matrices=False).Vh[:2]
        sol, ends = (sol - middle) @ directions.T, (ends - middle) @ directions.T
        names = "first principal direction", "second principal direction"
    every = max(1, sol.shape[1] // most)  # evenly spread: data is often sorted by class
    sol, ends, labels = sol[:, ::every, :2].cpu(), ends[::every, :2].cpu(), labels[::every].cpu()
    colours = [_colour(c) for c in labels.tolist()]
    for i, colour in enumerate(colours):
        axis.plot(*sol[:, i].T.tolist(), color=colour, linewidth=0.6, alpha=0.6)
    axis.scatter(
        sol[0, :, 0].tolist(), sol[0, :, 1].tolist(), s=9, facecolors="none", edgecolors=colours, linewidths=0.7
    )
    axis.scatter(ends[:, 0].tolist(), ends[:, 1].tolist(), s=9, c=colours)
    axis.set(title=title, xlabel=names[0], ylabel=names[1])
    axis.set_aspect("equal", adjustable="datalim")


def regions(axis: "Axes", ticks: Tensor, share: Tensor, x: Tensor, labels: Tensor, *, title: str) -> None:
    """Draws the plane coloured by the class that a model gives it, with the data on top.

    Args:
        ticks: coordinates ``[n]`` of a square grid, the same in both directions.
        share: of class 1 at each point ``[n, n]``, rows being ``y``; between 0 and 1.
        x, labels: the data, ``[k, 2]`` and ``[k]``.
    """
    from matplotlib.colors import LinearSegmentedColormap

    classes = LinearSegmentedColormap.from_list("classes", [COLOURS[0], "white", COLOURS[1]])
    # One image: contours have seams between their levels.
    first, last = ticks[0].item(), ticks[-1].item()
    where = (first, last, first, last)
    picture = share.cpu().numpy()
    axis.imshow(
        picture, extent=where, origin="lower", cmap=classes, alpha=0.5, vmin=0, vmax=1, interpolation="bilinear"
    )
    points(axis, x, labels, title=title)


def convergence(axis: "Axes", certificate: "Certificate", *, title: str = "V along the flow", most: int = 60) -> None:
    """Draws V of single samples along the flow, over V at its start, with the bound exp(-rate (t - t0)) of eq. (18)."""
    t, values = certificate.t.cpu(), certificate.values.detach().cpu()
    ratios = values / values[0].clamp_min(torch.finfo(values.dtype).tiny)
    for ratio, held in zip(ratios.T[:most].numpy(), certificate.held[:most].tolist(), strict=True):
        axis.plot(t.numpy(), ratio, color=COLOURS[0] if held else COLOURS[1], linewidth=0.7, alpha=0.6)
    bound = (-certificate.rate * (t - t[0])).exp().numpy()
    axis.plot(t.numpy(), bound, color=INK, linestyle="--", label=f"exp(-{certificate.rate:g} (t - t0))")
    axis.set(xlabel="time t", ylabel="V(z(t)) / V(z(t0))", title=title, yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def violation(axis: "Axes", t_eval: Tensor, values: Tensor, *, title: str = "violation of the rate") -> None:
    """Draws the map of relu(V-dot + rate V), ``[points, batch]``: time across, samples sorted by their sum."""
    values = values.detach().cpu()
    shown = values[:, values.sum(0).argsort(descending=True)].T.numpy()
    image = axis.pcolormesh(t_eval.detach().cpu().numpy(), range(len(shown)), shown, shading="nearest", cmap="magma")
    axis.set(xlabel="time t", ylabel="sample", title=title)
    axis.figure.colorbar(image, ax=axis)


def growth(
    axis: "Axes", t_f: Sequence[float], metric: Sequence[float], threshold: float, *, title: str = "growth"
) -> None:
    """Draws t_f (left) and the metric with its threshold (right, logarithmic) over the iterations."""
    axis.plot(t_f, color=COLOURS[0])
    axis.set(xlabel="iteration", title=title)
    axis.set_ylabel("t_f", color=COLOURS[0])
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.semilogy(metric, color=COLOURS[1])
    right.axhline(threshold, color=COLOURS[1], linestyle="--", linewidth=0.8)
    right.set_ylabel("metric", color=COLOURS[1])


def front(
    axis: "Axes", verdict: "Verdict", *, label: str = "", title: str = "evaluations against solver error"
) -> None:
    """Draws the solver error of every depth that a search has passed against its evaluations, both on a log scale.

    It is the work-precision curve of a network that was trained for each of its points. The dashed line is the tolerance.
    """
    passed = verdict.front
    axis.plot(
        [t.evaluations for t in passed], [t.solver_error for t in passed], "o-", color=COLOURS[0], label=label or None
    )
    for trial in passed:
        axis.annotate(
            trial.label, (trial.evaluations, trial.solver_error), (3, 4), textcoords="offset points", fontsize=7
        )
    axis.axhline(verdict.solver_tol, color=COLOURS[7], linestyle="--", linewidth=1)
    axis.set(xlabel="evaluations of the field", ylabel="error / displacement", title=title, xscale="log", yscale="log")
    _whole_ticks(axis, [t.evaluations for t in passed])


def search(axis: "Axes", verdict: "Verdict", *, title: str = "the search going down") -> None:
    """Draws the evaluations of every depth that was tried against iterations: those that failed are dotted."""
    start = 0
    for trial in verdict.trials:
        end = start + trial.iterations
        colour, style = (COLOURS[0], "-") if trial.passed else (COLOURS[1], ":")
        axis.plot([start, end], [trial.evaluations] * 2, style, color=colour, linewidth=2)
        axis.plot(end, trial.evaluations, "o" if trial.passed else "x", color=colour)
        start = end
    axis.set(xlabel="iterations", ylabel="evaluations of the field", title=title, yscale="log")
    _whole_ticks(axis, [t.evaluations for t in verdict.trials], vertical=True)


def _whole_ticks(axis: "Axes", values: Sequence[int], vertical: bool = False) -> None:
    ticks = sorted(set(values))
    which = axis.yaxis if vertical else axis.xaxis
    which.set_ticks(ticks, labels=[str(value) for value in ticks])
    which.set_ticks([], minor=True)


def profile(axis: "Axes", found: "Profile", *, title: str = "loss along the trajectory") -> None:
    """Loss against time (figure 1a)."""
    curves(axis, {"loss": (found.times.tolist(), found.loss.tolist())}, x="time t", y="loss", title=title, log=True)


def hamiltonian(axis: "Axes", found: "Hamiltonian", *, title: str = "Hamiltonian along the path") -> None:
    """Draws eq. (21) along the path, with 0, where an optimal free t_f puts it."""
    curves(axis, {"H": (found.times.tolist(), found.values.tolist())}, x="time t", y="H", title=title)
    axis.axhline(0.0, color=INK, linestyle="--", linewidth=0.8)


@dataclass(frozen=True)
class FlowFrames:
    """A flow on its way from the base to the data.

    Attributes:
        times: of the frames, ``[frames]``: from t_f down to t0, or from t0 to t_f where the base is at the start.
        samples: the points drawn from the base, ``[frames, n, 2]``.
        density: at the points of a square grid with rows along y, ``[frames, cells, cells]``.
        steps: that the model takes from one end to the other.
    """

    times: list[float]
    samples: Tensor
    density: Tensor
    steps: int


@torch.no_grad()
def flow_frames(
    model: FlowModel,
    centre: Tensor,
    frames: int = 6,
    samples: int = 1500,
    cells: int = 70,
    extent: float = 2.0,
    seed: int = 0,
    context: Tensor | None = None,
) -> FlowFrames:
    """Returns the samples and the density of a flow, of two dimensions, at equal parts of its interval, in eval mode.

    Args:
        model: the flow. A solver that takes the whole interval in one step takes one step to each frame.
        centre: of the grid, ``[2]``.
        frames: how many times, 2 or more.
        samples, cells: how many points, and cells a side.
        extent: half the side of the grid, in units of the data.
        seed: of the points.
        context: of a conditional flow, the same for all points: ``[1, ...]``.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> from torchdyn_mintime.flows import Gaussian, HyperCNF
        >>> model = FlowModel(NeuralODE(HyperCNF(dim=2), solver="rk4"), Gaussian(2))
        Your vector field ...
        >>> film = flow_frames(model, torch.zeros(2), frames=3, samples=10, cells=20)
        >>> film.times, film.samples.shape, film.density.shape
        ([1.0, 0.5, 0.0], torch.Size([3, 10, 2]), torch.Size([3, 20, 20]))
    """
    span, base = model.span, model.base
    like, frames = next(span.vf.parameters(), span.t_f), checks.count(frames, "frames", 2)
    first, last = span.t_f.item(), span.t0.item()
    if model.base_at == "start":
        first, last = last, first
    line = torch.linspace(-extent, extent, cells, dtype=like.dtype)
    grid = torch.cartesian_prod(line, line).flip(1) + centre.to(like)  # x runs fastest
    with random_kept(like):
        torch.manual_seed(seed)
        z = base.sample((samples,)).to(like)
    times = [first + (last - first) * k / (frames - 1) for k in range(frames)]
    with evaluating(model):
        parts = [_between(model, t) for t in times[1:]]
        # At the first time there is nothing to solve: the base itself.
        points = torch.stack([z, *(part.decode(z, context)[0] for part in parts)])
        density = torch.stack([base.log_prob(grid), *(part.log_prob(grid, context) for part in parts)]).exp()
        model.log_prob(z[:2], context)
    return FlowFrames(times, points.cpu(), density.view(-1, cells, cells).cpu(), span.steps)


def _between(model: FlowModel, t: float) -> FlowModel:
    """Returns the same flow between the base and the time t only: its data are the points on their way, at that time."""
    span = model.span
    # The model's own steps, so that what is drawn is what it computes.
    own = span.grid().tolist()
    near = 0.01 * (own[-1] - own[0]) / (len(own) - 1)
    if model.base_at == "start":
        points = [own[0], *(s for s in own[1:] if s < t - near), t]
    else:
        points = [t, *(s for s in own[:-1] if s > t + near), own[-1]]
    part = LearnableSpan(span.node, torch.tensor(points, dtype=span.t_f.dtype))
    return FlowModel(part, model.base, log_density=model.log_density, base_at=model.base_at).eval()


def flows(
    models: Mapping[str, FlowModel],
    data: Tensor,
    stem: Path | str,
    frames: int = 13,
    extent: float = 2.0,
    context: Tensor | None = None,
) -> list[Path]:
    """Writes a picture ``<stem>.png`` and an animation ``<stem>.gif``: for each flow samples and density, as figures 6 and 12.

    Args:
        models: by their titles; one or more, of two dimensions.
        data: to compare the samples with, ``[n, 2]``; its mean is the centre of the panels.
        stem: path without the ending.
        frames: of the animation, 2 or more; the picture shows 5 of them.
        extent: half the side of the panels, in units of the data.
        context: of conditional flows, the same for all points: ``[1, ...]``.

    Returns:
        The paths written.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    centre, stem = data.mean(0), Path(stem)
    shown = {
        title: flow_frames(model, centre, frames, extent=extent, context=context) for title, model in models.items()
    }
    sides = torch.stack([centre - extent, centre + extent], 1).tolist()

    def frame(axis: "Axes", title: str) -> None:
        axis.set(xlim=sides[0], ylim=sides[1], xticks=[], yticks=[], aspect="equal")
        axis.set_title(title, fontsize=9)

    def column(above: "Axes", below: "Axes", film: FlowFrames, k: int, titles: tuple[str, str]) -> None:
        above.scatter(film.samples[k, :, 0].tolist(), film.samples[k, :, 1].tolist(), s=1, alpha=0.5)
        # The density of thin moons is a hundred times that of the base: each frame has its own scale.
        below.imshow(film.density[k].numpy(), extent=(*sides[0], *sides[1]), origin="lower", cmap="viridis")
        for axis, title in zip((above, below), titles, strict=True):
            frame(axis, title)

    figure, axes = grid_of_axes(2 * len(shown), 6, 2.0, 2.15)
    for i, (title, film) in enumerate(shown.items()):
        above, below = axes[12 * i : 12 * i + 6], axes[12 * i + 6 : 12 * i + 12]
        for j in range(5):
            k = round(j * (frames - 1) / 4)
            column(above[j], below[j], film, k, (f"t = {film.times[k]:.3f}", "density"))
        above[0].set_ylabel(f"{title}\n{film.steps} steps", fontsize=10)
        above[5].scatter(data[:, 0].tolist(), data[:, 1].tolist(), s=1, alpha=0.5, color="tab:red")
        frame(above[5], "data")
        below[5].axis("off")
    png, gif = save(figure, stem.with_suffix(".png")), stem.with_suffix(".gif")
    figure, axes = grid_of_axes(2, len(shown), 2.6, 2.8)

    def animate(k: int) -> list:
        for axis in axes:
            axis.clear()
        for j, (title, film) in enumerate(shown.items()):
            titles = f"{title}, {film.steps} steps", f"t = {film.times[k]:.3f}"
            column(axes[j], axes[len(shown) + j], film, k, titles)
        return []

    order = [*range(frames), *[frames - 1] * 5]  # the last frame stays for a while
    FuncAnimation(figure, animate, frames=order, blit=False).save(gif, writer=PillowWriter(fps=5), dpi=80)
    return [png, gif]
