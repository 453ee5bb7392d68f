"""Pictures of training and of trained models, each drawn on an axis of matplotlib that the caller gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from torchdyn_mintime.diagnostics import Hamiltonian, Profile
    from torchdyn_mintime.lyapunov import Certificate

__all__ = [
    "COLOURS",
    "bars",
    "convergence",
    "curves",
    "grid_of_axes",
    "growth",
    "hamiltonian",
    "points",
    "profile",
    "regions",
    "save",
    "trajectories",
    "violation",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255", "#117733")
"""Okabe and Ito's, told apart by colour-blind readers too; two more for ten classes."""

STYLES = ("-", "-", "--", "-.", ":")


def grid_of_axes(rows: int, columns: int, width: float = 4.0, height: float = 3.4) -> "tuple[Figure, list[Axes]]":
    """A figure of its own, without a display, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure: "Figure", path: Path) -> Path:
    """Writes the figure, and the folders that it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def curves(
    axis: "Axes",
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    title: str,
    log: bool = False,
) -> None:
    """Named curves, each a pair (x, y)."""
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        axis.plot(xs, ys, color=COLOURS[i % len(COLOURS)], label=name, linewidth=1.6, linestyle=STYLES[i % len(STYLES)])
    axis.set(xlabel=x, ylabel=y, title=title)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if len(lines) > 1:
        axis.legend(fontsize=8)


def bars(axis: "Axes", values: Mapping[str, float], *, x: str, title: str) -> None:
    """One horizontal bar for each name, with its value."""
    names = list(values)[::-1]
    drawn = axis.barh(names, [values[name] for name in names], color=COLOURS[0])
    axis.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axis.set(xlabel=x, title=title)
    axis.margins(x=0.15)


def points(axis: "Axes", x: Tensor, labels: Tensor, *, title: str) -> None:
    """Points of the plane ``[n, 2]``, coloured by class."""
    for c in labels.unique().tolist():
        axis.scatter(
            x[labels == c, 0].tolist(),
            x[labels == c, 1].tolist(),
            s=6,
            color=COLOURS[c % len(COLOURS)],
            label=f"class {c}",
        )
    axis.set(title=title, xlabel="$x_1$", ylabel="$x_2$")
    axis.legend(fontsize=8)


def trajectories(axis: "Axes", sol: Tensor, labels: Tensor, *, title: str, most: int = 80) -> None:
    """Paths of the state in the plane; a ring where each starts, a dot where it ends.

    Args:
        sol: ``[points, batch, n]``. The first two dimensions are drawn; above three, the two directions in which the
            last states vary most.
        labels: classes ``[batch]``.
        most: about how many paths.
    """
    sol = sol.detach().flatten(2)
    names = "$z_1$", "$z_2$"
    if sol.shape[2] > 3:
        last = sol[-1] - sol[-1].mean(0)
        directions = torch.linalg.svd(last, full_matrices=False).Vh[:2]
        sol, names = (sol - sol[-1].mean(0)) @ directions.T, ("first principal direction", "second")
    every = max(1, sol.shape[1] // most)  # evenly spread: data is often sorted by class
    sol, labels = sol[:, ::every, :2].cpu(), labels[::every].cpu()
    for i, c in enumerate(labels.tolist()):
        colour = COLOURS[c % len(COLOURS)]
        axis.plot(*sol[:, i].T.tolist(), color=colour, linewidth=0.6, alpha=0.6)
    colours = [COLOURS[c % len(COLOURS)] for c in labels.tolist()]
    axis.scatter(
        sol[0, :, 0].tolist(), sol[0, :, 1].tolist(), s=9, facecolors="none", edgecolors=colours, linewidths=0.7
    )
    axis.scatter(sol[-1, :, 0].tolist(), sol[-1, :, 1].tolist(), s=9, c=colours)
    axis.set(title=title, xlabel=names[0], ylabel=names[1])


def regions(axis: "Axes", ticks: Tensor, share: Tensor, x: Tensor, labels: Tensor, *, title: str) -> None:
    """The plane coloured by the class that a model gives it, with the data on top.

    Args:
        ticks: coordinates ``[n]`` of a square grid, the same in both directions.
        share: of class 1 at each point ``[n, n]``, rows being ``y``; between 0 and 1.
        x, labels: the data, ``[k, 2]`` and ``[k]``.
    """
    from matplotlib.colors import LinearSegmentedColormap

    classes = LinearSegmentedColormap.from_list("classes", [COLOURS[0], "white", COLOURS[1]])
    axis.contourf(ticks.tolist(), ticks.tolist(), share.tolist(), levels=20, cmap=classes, alpha=0.5, vmin=0, vmax=1)
    points(axis, x, labels, title=title)
    axis.set_aspect("equal")


def convergence(axis: "Axes", certificate: "Certificate", *, title: str = "V along the flow", most: int = 60) -> None:
    """V of single samples along the flow, over V at its start, with the bound exp(-rate (t - t0)) of eq. (18)."""
    t, values = certificate.t.cpu(), certificate.values.detach().cpu()
    ratio = (values / values[0].clamp_min(torch.finfo(values.dtype).tiny)).numpy()
    bound = (-certificate.rate * (t - t[0])).exp().numpy()
    for i in range(min(most, ratio.shape[1])):
        axis.plot(
            t.numpy(), ratio[:, i], color=COLOURS[0] if certificate.held[i] else COLOURS[1], linewidth=0.7, alpha=0.6
        )
    axis.plot(t.numpy(), bound, color="black", linestyle="--", label=f"exp(-{certificate.rate:g} (t - t0))")
    axis.set(xlabel="time t", ylabel="V(z(t)) / V(z(t0))", title=title, yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def violation(axis: "Axes", t_eval: Tensor, values: Tensor, *, title: str = "violation of the rate") -> None:
    """The map of relu(V-dot + rate V), ``[points, batch]``: time across, samples sorted by their sum."""
    values = values.detach().cpu()
    order = values.sum(0).argsort(descending=True)
    times, shown = t_eval.detach().cpu().numpy(), values[:, order].T.numpy()
    image = axis.pcolormesh(times, range(len(order)), shown, shading="nearest", cmap="magma")
    axis.set(xlabel="time t", ylabel="sample", title=title)
    axis.figure.colorbar(image, ax=axis)


def growth(
    axis: "Axes", t_f: Sequence[float], metric: Sequence[float], threshold: float, *, title: str = "growth"
) -> None:
    """t_f (left) and the metric with its threshold (right, logarithmic) over the iterations."""
    axis.plot(t_f, color=COLOURS[0])
    axis.set(xlabel="iteration", title=title)
    axis.set_ylabel("t_f", color=COLOURS[0])
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(metric, color=COLOURS[1])
    right.axhline(threshold, color=COLOURS[1], linestyle="--", linewidth=0.8)
    right.set_yscale("log")
    right.set_ylabel("metric", color=COLOURS[1])


def profile(axis: "Axes", found: "Profile", *, title: str = "loss along the trajectory") -> None:
    """Loss against time (figure 1a)."""
    curves(axis, {"loss": (found.times.tolist(), found.loss.tolist())}, x="time t", y="loss", title=title, log=True)


def hamiltonian(axis: "Axes", found: "Hamiltonian", *, title: str = "Hamiltonian along the path") -> None:
    """Eq. (21) along the path, with 0, where an optimal free t_f puts it."""
    curves(axis, {"H": (found.times.tolist(), found.values.tolist())}, x="time t", y="H", title=title)
    axis.axhline(0.0, color="black", linestyle="--", linewidth=0.8)
