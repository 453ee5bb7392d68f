"""Checks the verdicts of 200 random searches by scipy's DOP853 at 1e-10: `python -m benchmarks.verdicts 200`."""

import sys
import time

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import torchdyn_mintime as tm
from benchmarks.contestants import node_of
from torchdyn_mintime.experiments import datasets

TASKS = ("rotation", "spiral", "moons", "annuli")


def problem(task: str, seed: int) -> tuple[Tensor, Tensor, float]:
    """Returns states ``[n, dim]``, targets (states or labels) and the loss to reach."""
    generator = torch.Generator().manual_seed(seed)
    if task in ("moons", "annuli"):
        data = (datasets.moons if task == "moons" else datasets.annuli)(seed)
        return data.x[:128], data.y[:128], 0.1
    x = torch.randn(64, 2, generator=generator)
    angle = torch.tensor(3.0)
    turned = torch.stack(
        [x[:, 0] * angle.cos() - x[:, 1] * angle.sin(), x[:, 0] * angle.sin() + x[:, 1] * angle.cos()], 1
    )
    return x, (turned if task == "rotation" else 0.3 * turned), 0.02


def main(runs: int) -> None:
    """Runs searches on all tasks, with random widths, rates and tolerances; counts verdicts that DOP853 does not confirm."""
    torch.set_num_threads(1)
    feasible, wrong, start = 0, 0, time.perf_counter()
    for run in range(runs):
        draw = np.random.default_rng(run)
        task, tol = TASKS[run % len(TASKS)], float(draw.choice([0.1, 0.05, 0.03]))
        x, y, target = problem(task, run)
        torch.manual_seed(run)
        width, dim = int(draw.choice([8, 16, 32])), x.shape[1]
        span = tm.wrap(node_of(nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))))

        def loss(end: Tensor, y: Tensor = y) -> Tensor:
            return mse_loss(end, y) if y.is_floating_point() else cross_entropy(end[:, :2], y)

        rate = float(draw.choice([0.03, 0.1]))
        verdict = tm.Shallowest(target, solver_tol=tol).fit(
            span, lambda out, batch, loss=loss: loss(out[1][-1]), [x], lr=rate, max_iterations=600, progress=False
        )
        if not verdict.feasible:
            continue
        feasible += 1
        own = span.eval()(x)[1][-1].detach().double()
        field = span.vf.double()
        t_f, start_state = span.t_f.item(), x.double()

        def slope(t: float, z: np.ndarray, field: nn.Module = field, shape: torch.Size = x.shape) -> np.ndarray:
            with torch.no_grad():
                return field(torch.tensor(t), torch.from_numpy(z).view(shape)).numpy().ravel()

        found = solve_ivp(slope, (span.t0.item(), t_f), start_state.numpy().ravel(), "DOP853", rtol=1e-10, atol=1e-10)
        end = torch.from_numpy(found.y[:, -1]).view(x.shape)
        error = ((own - end).square().mean().sqrt() / (end - start_state).square().mean().sqrt()).item()
        exact = loss(end).item() if y.dtype != torch.float32 else mse_loss(end, y.double()).item()
        if error > tol * (1 + 1e-3) or max(exact, loss(own.float()).item()) > target * (1 + 1e-3):
            wrong += 1
            print(
                f"run {run} ({task}): solver error {error:.4g}, allowed {tol}; loss {exact:.4g}, target {target}; the search "
                f"said: {verdict}",
                flush=True,
            )
    print(f"{runs} runs: {feasible} feasible, {wrong} not confirmed, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]))
