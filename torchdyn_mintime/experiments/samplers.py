"""The task ``sampler-moons``: samples of a field of flow matching by stock, fitted and trained solvers of few evaluations."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime import LearnableSpan, compress_sampler, fit_solver, plots
from torchdyn_mintime.experiments import UsageError, names
from torchdyn_mintime.experiments.datasets import seeded
from torchdyn_mintime.experiments.results import frame_of, markdown, print_table, write
from torchdyn_mintime.experiments.store import Store, put, reading

__all__ = ["Velocity", "distance", "eight_gaussians", "exact_ends", "matched", "moons", "run"]

EVALUATIONS = (2, 4, 8)
"""Numbers of evaluations of the stock and the fitted solvers."""

ITERATIONS = 3000
"""Iterations of flow matching."""

STATES, FRESH = 4096, 1000
"""Numbers of samples of the base: those for training a copy (a fit takes the first 1,280), and those that are measured."""


def eight_gaussians(n: int) -> Tensor:
    """Returns draws from eight Gaussians on a circle of radius 5, as torchcfm draws them, ``[n, 2]``."""
    angle = torch.randint(8, (n,)) * (math.pi / 4)
    return 5 * torch.stack([angle.cos(), angle.sin()], 1) + math.sqrt(0.1) * torch.randn(n, 2)


def moons(n: int) -> Tensor:
    """Returns draws from two half circles, as torchcfm draws them, ``[n, 2]``."""
    angle, second = math.pi * torch.rand(n), torch.rand(n) < 0.5
    x = torch.where(second, 1 - angle.cos(), angle.cos())
    y = torch.where(second, 0.5 - angle.sin(), angle.sin())
    return 3 * (torch.stack([x, y], 1) + 0.2 * torch.randn(n, 2)) - 1


class Velocity(nn.Module):
    """A velocity field: a network of the state and the time.

    Args:
        dim: dimension of the state.
        width: width of the three hidden layers.
    """

    def __init__(self, dim: int = 2, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(dim + 1, width), nn.SELU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SELU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, t, x, args=None):
        """Returns the velocity, ``[n, *shape]``."""
        column = torch.as_tensor(t).to(x).expand(len(x))[:, None]
        return self.net(torch.cat([x.flatten(1), column], 1)).view_as(x)


def matched(
    start: Callable[[int], Tensor],
    end: Callable[[int], Tensor],
    field: nn.Module,
    iterations: int = ITERATIONS,
    batch: int = 256,
    progress: bool = False,
) -> nn.Module:
    """Trains a field by flow matching, and returns it in eval mode.

    Args:
        start, end: n -> n draws of the distribution at t = 0 and at t = 1; the two are independent.
        field: called with the time and the state.
        iterations: of training.
        batch: draws of each distribution per iteration.
        progress: whether to show a progress bar.
    """
    optimizer = torch.optim.Adam(field.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in track(range(iterations), "flow matching", disable=not progress, transient=True):
        x0, x1, t = start(batch), end(batch), torch.rand(batch)
        share = t.view(-1, *[1] * (x0.dim() - 1))
        loss = (field(t, (1 - share) * x0 + share * x1) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field.eval()


@torch.no_grad()
def exact_ends(field: nn.Module, x0: Tensor) -> Tensor:
    """Returns the states at t = 1 of solves from ``x0``, by dopri5 at a tolerance of 1e-6."""
    node = NeuralODE(field, solver="dopri5", atol=1e-6, rtol=1e-6)
    return LearnableSpan(node, torch.tensor([0.0, 1.0]))(x0)[1][-1]


def distance(x: Tensor, y: Tensor) -> float:
    """Returns the Wasserstein distance W2 of two sets of equally many points."""
    costs = torch.cdist(x.double(), y.double()).square().numpy()
    return math.sqrt(costs[linear_sum_assignment(costs)].mean())


def run(methods: Sequence[str], seeds: Sequence[int], iterations: int | None, output: Path, store: Store) -> Any:
    """Draws samples by each method, prints and writes a table of their errors, and draws those of the last seed.

    Args:
        methods: keys of ``names.SAMPLER_METHODS``; empty: all of them.
        seeds: of the training and of all draws.
        iterations: of flow matching; None: :data:`ITERATIONS`.
        output: the folder for the table and the picture.
        store: where trained fields are kept.

    Returns:
        A row for each method, seed and number of evaluations.

    Raises:
        UsageError: there is no such method, or the file of a field is damaged.
    """
    methods = methods or tuple(names.SAMPLER_METHODS)
    if unknown := [name for name in methods if name not in names.SAMPLER_METHODS]:
        known = ", ".join(names.SAMPLER_METHODS)
        raise UsageError(f"there is no method {unknown[0]!r} for sampler-moons; choose among {known}")
    records: list[dict[str, Any]] = []
    shown: dict[tuple[str, int], Tensor] = {}
    for seed in seeds:
        with seeded(seed):
            # Drawn first, so that they are the same whether the field is trained now or was kept.
            states, fresh, data = eight_gaussians(STATES), eight_gaussians(FRESH), moons(FRESH)
            field = _field(seed, iterations or ITERATIONS, store)
        exact = exact_ends(field, fresh)
        shown = {("exact", 0): exact}
        limit = distance(exact, data)
        for name in methods:
            for evaluations, seconds, sample in _samplers(name, field, states, store):
                with torch.no_grad():
                    end = sample(fresh)
                shown[name, evaluations] = end
                off = ((end - exact).square().mean() / (exact - fresh).square().mean()).sqrt().item()
                figures = {"error": off, "distance": distance(end, data), "exact_distance": limit, "seconds": seconds}
                records.append({"method": name, "seed": seed, "evaluations": evaluations, **figures})
    found = frame_of(records)
    _print(found, output, store)
    path = _draw(shown, output / "run-sampler-moons.png")
    store.console.print(f"Samples of seed {seeds[-1]}: {path}", highlight=False)
    return found


def _field(seed: int, iterations: int, store: Store) -> nn.Module:
    """Returns the field from the store's folder, or trains it and puts it there."""
    path, field = store.folder / f"sampler-moons-seed{seed}-{iterations}.pt", Velocity()
    if path.exists():
        with reading(path):
            field.load_state_dict(torch.load(path))
        return field.eval()
    matched(eight_gaussians, moons, field, iterations, progress=not store.console.quiet)
    put(path, partial(torch.save, field.state_dict()))
    return field


def _samplers(
    method: str, field: nn.Module, states: Tensor, store: Store
) -> list[tuple[int, float, Callable[[Tensor], Tensor]]]:
    """Returns the samplers of a method, each as (evaluations, seconds to make it, sampler)."""

    def ends(span: nn.Module, x: Tensor) -> Tensor:
        return span(x)[1][-1]

    progress = not store.console.quiet
    made: list[tuple[int, float, Callable[[Tensor], Tensor]]] = []
    if method == "compress":
        began = time.perf_counter()
        span, verdict = compress_sampler(NeuralODE(field), states, tol=0.1, progress=progress)
        if not verdict.feasible:
            return []
        return [(verdict.best.evaluations, time.perf_counter() - began, partial(ends, span))]
    for n in EVALUATIONS:
        began = time.perf_counter()
        if method == "fit-solver":
            node = fit_solver(NeuralODE(field), states[:1280], evaluations=n, progress=progress).node
            made.append((n, time.perf_counter() - began, partial(ends, node)))
        else:
            steps = n // (2 if method == "midpoint" else 1)
            span = LearnableSpan(NeuralODE(field, solver=method), torch.linspace(0, 1, steps + 1))
            made.append((n, 0.0, partial(ends, span)))
    return made


def _print(found: Any, output: Path, store: Store) -> None:
    rows = []
    for (name, evaluations), group in found.groupby(["method", "evaluations"], sort=False):
        middle = {k: group[k].astype(float).median() for k in ("error", "distance", "exact_distance", "seconds")}
        rows.append(
            {
                "": names.SAMPLER_METHODS[name],
                "evaluations": str(evaluations),
                "error": f"{middle['error']:.3f}",
                "W2 to the data": f"{middle['distance']:.3f}",
                "seconds": f"{middle['seconds']:.0f}",
            }
        )
    cells = frame_of(rows)
    exact = found["exact_distance"].astype(float).median() if len(found) else math.nan
    caption = (
        f"Error: of the end, over the displacement, on {FRESH} new samples. W2 of the exact solution: {exact:.3f}. Seconds: to "
        "make the sampler. Medians over seeds."
    )
    print_table(cells, names.SAMPLER_TASKS["sampler-moons"], caption, store.console)
    write(found, [markdown(cells), caption], output, "run-sampler-moons", store.console)


def _draw(shown: dict[tuple[str, int], Tensor], path: Path) -> Path:
    """Draws the samples of each method in a row of panels."""
    rows = [list(row) for _, row in groupby(shown, key=lambda key: key[0])]
    columns = max(map(len, rows))
    figure, axes = plots.grid_of_axes(len(rows), columns, 2.4, 2.0)
    for axis in axes:
        axis.set_axis_off()
    for i, row in enumerate(rows):
        for axis, key in zip(axes[i * columns :], row, strict=False):
            axis.set_axis_on()
            axis.scatter(shown[key][:, 0].tolist(), shown[key][:, 1].tolist(), s=2)
            title = key[0] if key[0] == "exact" else f"{key[0]}, {key[1]} evaluations"
            axis.set(title=title, xlim=(-7, 9), ylim=(-6, 6), aspect="equal")
            axis.title.set_fontsize(8)
    return plots.save(figure, path)
