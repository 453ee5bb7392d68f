"""Pictures of flows, as figures 6 and 12 of the paper: samples and density over time, one model beside another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchdyn_mintime.flows import FlowModel
from torchdyn_mintime.span import LearnableSpan

__all__ = ["FlowFrames", "draw_flows", "flow_frames"]

EXTENT = 2.0
"""Half the side of every panel, in units of the data."""


@dataclass
class FlowFrames:
    """A flow on its way from the base at t_f to the data at t0.

    Attributes:
        times: of the frames, from t_f down to t0, ``[frames]``.
        samples: the points drawn from the base, ``[frames, n, 2]``.
        density: of them, on a square grid with rows along y, ``[frames, cells, cells]``.
        steps: that the model takes from one end to the other.
    """

    times: list[float]
    samples: Tensor
    density: Tensor
    steps: int


@torch.no_grad()
def flow_frames(
    model: FlowModel, centre: Tensor, frames: int = 6, samples: int = 1500, cells: int = 70, seed: int = 0
) -> FlowFrames:
    """The samples and the density of a trained model, of two dimensions, at equal parts of its interval.

    Args:
        model: the flow, with a fixed-step solver or an adaptive one.
        centre: of the panels, ``[2]``.
        frames, samples, cells: how many times, points, and cells a side.
        seed: of the points.
    """
    model.eval()
    span, like = model.span, next(model.span.vf.parameters())
    t0, t_f = span.t0.item(), span.t_f.item()
    line = torch.linspace(-EXTENT, EXTENT, cells, dtype=like.dtype)
    grid = torch.cartesian_prod(line, line).flip(1) + centre.to(like)  # x runs fastest
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        z = model.base.sample((samples,)).to(like)
    times = [t_f - (t_f - t0) * k / (frames - 1) for k in range(frames)]
    points, densities = [], []
    for k, t in enumerate(times):
        if k == 0:  # nothing to solve: the base itself
            points.append(z)
            densities.append(model.base.log_prob(grid).exp().view(cells, cells))
            continue
        part = _between(model, t)
        points.append(part.decode(z)[0])
        densities.append(part.log_prob(grid).exp().view(cells, cells))
    model.log_prob(z[:2])
    return FlowFrames(times, torch.stack(points).cpu(), torch.stack(densities).cpu(), span.steps)


def _between(model: FlowModel, t: float) -> FlowModel:
    """The same flow from t to t_f only: its density at t0 is that of the points on their way, at the time t."""
    span = model.span
    # The model's own steps, so that what is drawn is what it computes.
    rest = [span.t_f.item()] if span.adaptive else [s for s in span.grid().tolist() if s > t + 0.01 * span.step_size]
    return FlowModel(LearnableSpan(span.node, torch.tensor([t, *rest], dtype=span.t_f.dtype)), model.base).eval()


def draw_flows(
    models: Mapping[str, FlowModel], draw: Callable[..., Tensor], stem: Path, frames: int = 13
) -> list[Path]:
    """A picture ``<stem>.png`` and an animation ``<stem>.gif``: for each model a column pair of samples and density.

    Args:
        models: by their titles; one or more, of two dimensions.
        draw: (n, generator) -> fresh data ``[n, 2]``.
        stem: path without the ending.
        frames: of the animation; the picture shows 5 of them.

    Returns:
        The paths written.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    data = draw(1500, torch.Generator().manual_seed(0))
    centre = data.mean(0)
    shown = {title: flow_frames(model, centre, frames) for title, model in models.items()}
    left, right = (centre[0] - EXTENT).item(), (centre[0] + EXTENT).item()
    low, high = (centre[1] - EXTENT).item(), (centre[1] + EXTENT).item()

    def panel(axes: Any, title: str) -> None:
        axes.set(xlim=(left, right), ylim=(low, high), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=9)

    def picture(axes: Any, values: Tensor, title: str) -> None:
        # The density of thin moons is a hundred times that of the base: each frame has its own scale.
        axes.imshow(values.numpy(), extent=(left, right, low, high), origin="lower", cmap="viridis")
        panel(axes, title)

    columns = [round(k * (frames - 1) / 4) for k in range(5)]
    figure = Figure(figsize=(12, 4.3 * len(shown)), layout="constrained")
    table = figure.subplots(2 * len(shown), 6, squeeze=False)
    for i, (title, film) in enumerate(shown.items()):
        for j, k in enumerate(columns):
            table[2 * i][j].scatter(*film.samples[k].T.numpy(), s=1, alpha=0.5)
            panel(table[2 * i][j], f"t = {film.times[k]:.3f}")
            picture(table[2 * i + 1][j], film.density[k], "density")
        table[2 * i][0].set_ylabel(f"{title}\n{film.steps} steps", fontsize=10)
        table[2 * i][5].scatter(*data.T.numpy(), s=1, alpha=0.5, color="tab:red")
        panel(table[2 * i][5], "data")
        table[2 * i + 1][5].axis("off")
    png = stem.with_suffix(".png")
    figure.savefig(png, dpi=100)

    figure = Figure(figsize=(2.6 * len(shown), 5.6), layout="constrained")
    table = figure.subplots(2, len(shown), squeeze=False)

    def show(k: int) -> list:
        for j, (title, film) in enumerate(shown.items()):
            for row in (0, 1):
                table[row][j].clear()
            table[0][j].scatter(*film.samples[k].T.numpy(), s=1, alpha=0.5)
            panel(table[0][j], f"{title}, {film.steps} steps")
            picture(table[1][j], film.density[k], f"t = {film.times[k]:.3f}")
        return []

    gif = stem.with_suffix(".gif")
    # The last frame stays for a while.
    order = [*range(frames), *[frames - 1] * 5]
    FuncAnimation(figure, show, frames=order, blit=False).save(gif, writer=PillowWriter(fps=5), dpi=80)
    return [png, gif]
