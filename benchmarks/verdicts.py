"""Checks the verdicts of 200 random searches by scipy's DOP853 at 1e-10: `python -m benchmarks.verdicts 200`."""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import torchdyn_mintime as tm
from benchmarks.contestants import mlp, node_of
from torchdyn_mintime.experiments import datasets
from torchdyn_mintime.experiments.models import FirstDimensions

ITERATIONS = 3000


@dataclass
class Problem:
    """States ``[n, dim]``, targets (states or labels), the loss to reach, and the layers around the ODE of ``dim`` states."""

    x: Tensor
    y: Tensor
    target: float
    before: nn.Module
    dim: int
    head: nn.Module

    def loss(self, out: Tensor) -> Tensor:
        """Returns the mean squared error, or the cross entropy, of what the head returns."""
        return mse_loss(out, self.y.to(out.dtype)) if self.y.is_floating_point() else cross_entropy(out, self.y)


def turned(seed: int, shrunk: float) -> Problem:
    """Returns normal states of the plane, to be turned by 3 rad and shrunk: a rotation, or a spiral."""
    x, angle = torch.randn(64, 2, generator=torch.Generator().manual_seed(seed)), torch.tensor(3.0)
    turn = torch.tensor([[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]])
    return Problem(x, shrunk * x @ turn, 0.02, nn.Identity(), 2, nn.Identity())


def classes(data: datasets.Data, target: float) -> Problem:
    """Returns two classes of the plane or of space; the first two dimensions of the end are the logits."""
    return Problem(data.x[:128], data.y[:128], target, nn.Identity(), data.x.shape[1], FirstDimensions(2))


def digits(seed: int) -> Problem:
    """Returns handwritten digits, between an encoder and a head of one layer each."""
    data = datasets.digits(seed)
    return Problem(data.x[:256], data.y[:256], 0.1, nn.Linear(64, 8), 8, nn.Linear(8, 10))


TASKS = {
    "rotation": lambda seed: turned(seed, 1.0),
    "spiral": lambda seed: turned(seed, 0.3),
    "moons": lambda seed: classes(datasets.moons(seed), 0.1),
    "annuli": lambda seed: classes(datasets.annuli(seed), 0.1),
    "digits": digits,
}


def main(runs: int, first: int = 0) -> None:
    """Runs searches on all tasks, with random widths, rates and tolerances; counts verdicts that DOP853 does not confirm."""
    torch.set_num_threads(1)
    found, wrong, start = dict.fromkeys(TASKS, 0), 0, time.perf_counter()
    for run in range(first, first + runs):
        draw = np.random.default_rng(run)
        task, tol = list(TASKS)[run % len(TASKS)], float(draw.choice([0.1, 0.05, 0.03]))
        torch.manual_seed(run)
        problem = TASKS[task](run)
        span = tm.wrap(node_of(mlp(problem.dim, int(draw.choice([8, 16, 32])), seed=run)))
        model = nn.Sequential(problem.before, span, End(), problem.head)
        verdict = tm.Shallowest(problem.target, solver_tol=tol).fit(
            model,
            lambda out, batch, problem=problem: problem.loss(out),
            [problem.x],
            lr=float(draw.choice([0.03, 0.1])),
            max_iterations=ITERATIONS,
            progress=False,
        )
        if not verdict.feasible:
            continue
        found[task] += 1
        error, losses = checked(model.eval(), problem)
        if error > tol * (1 + 1e-3) or max(losses) > problem.target * (1 + 1e-3):
            wrong += 1
            print(
                f"run {run} ({task}): solver error {error:.4g}, allowed {tol}; losses {losses}, target {problem.target}; the "
                f"search said: {verdict}"
            )
    each = ", ".join(f"{task} {n}" for task, n in found.items())
    print(
        f"{runs} runs: {sum(found.values())} feasible ({each}), {wrong} not confirmed, {time.perf_counter() - start:.0f} s"
    )


class End(nn.Module):
    """Gives the last state of what a span returns."""

    def forward(self, out: tuple[Tensor, Tensor]) -> Tensor:
        """Returns ``[n, dim]``."""
        return out[1][-1]


@torch.no_grad()
def checked(model: nn.Sequential, problem: Problem) -> tuple[float, tuple[float, float]]:
    """Returns the solver error by DOP853, over the displacement, and the losses at its end and at the model's own."""
    before, span, end, head = model
    begin = before(problem.x)
    own = end(span(begin))
    start, field, t_f, t0 = begin.double(), span.vf.double(), span.t_f.item(), span.t0.item()

    def slope(t: float, z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return field(torch.tensor(t), torch.from_numpy(z).view(start.shape)).numpy().ravel()

    solved = solve_ivp(slope, (t0, t_f), start.numpy().ravel(), "DOP853", rtol=1e-10, atol=1e-10)
    exact = torch.from_numpy(solved.y[:, -1]).view(start.shape)
    error = ((own - exact).square().mean().sqrt() / (exact - start).square().mean().sqrt()).item()
    own_loss = problem.loss(head(own)).item()
    return error, (problem.loss(head.double()(exact)).item(), own_loss)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
