"""The contestants: one solve by a plain Python loop, LearnableSpan, bare NeuralODE, torchdiffeq, and torchode if installed."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint
from torchdyn.core import NeuralODE

from benchmarks.timing import Run
from torchdyn_mintime.core import LearnableSpan

__all__ = ["contestants", "mlp", "node_of", "plain_rk4", "rk4_step", "state", "task"]


def mlp(size: int, width: int, seed: int = 0, gain: float = 1.0) -> nn.Sequential:
    """Returns a network Linear, Tanh, Linear. With a larger gain its field needs more adaptive steps."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(size, width), nn.Tanh(), nn.Linear(width, size))
        for p in net.parameters():
            p.mul_(gain)
    return net


def state(batch: int, size: int) -> Tensor:
    """Returns the same normal numbers at every call, ``[batch, size]``."""
    return torch.randn(batch, size, generator=torch.Generator().manual_seed(1))


def node_of(net: nn.Module, **options: Any) -> NeuralODE:
    """Returns a NeuralODE, by default with rk4, without torchdyn's printed note on fields without time."""
    with contextlib.redirect_stdout(io.StringIO()):
        return NeuralODE(net, **{"solver": "rk4", **options})


def rk4_step(net: Callable[[Tensor], Tensor], x: Tensor, dt: float | Tensor) -> Tensor:
    """Returns the state after one step of the classical Runge-Kutta method, for a field without time."""
    k1 = net(x)
    k2 = net(x + dt / 2 * k1)
    k3 = net(x + dt / 2 * k2)
    k4 = net(x + dt * k3)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def plain_rk4(net: Callable[[Tensor], Tensor], x: Tensor, steps: int, step: Callable = rk4_step) -> Tensor:
    """Returns z(1) by a loop written by hand, which keeps and checks nothing."""
    # A compiled step takes its size as a tensor: a number would become a constant of the compiled code.
    dt = 1 / steps if step is rk4_step else torch.tensor(1 / steps)
    for _ in range(steps):
        x = step(net, x, dt)
    return x


def task(solve: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Run:
    """Returns a run of a solve, with the gradients of a loss on its result in ``wanted``. If that is empty: inference."""

    def run() -> Tensor:
        with torch.set_grad_enabled(bool(wanted)):
            end = solve()
            if wanted:
                for tensor in wanted:
                    tensor.grad = None
                end.square().mean().backward()
        return end

    return run


def contestants(
    net: nn.Module,
    x: Tensor,
    steps: int,
    *,
    backward: bool,
    solver: str = "rk4",
    plain: Callable[[Any, Tensor, int], Tensor] = plain_rk4,
    timed: bool = False,
) -> dict[str, Run]:
    """Returns runs that solve z' = net(z) from x over [0, 1], by the name of their contestant; at a tolerance of 1e-3.

    Args:
        net: the field, called with the state.
        x: the initial state.
        steps: number of fixed steps; an adaptive solver ends a step at the end of each of these.
        backward: whether to take the gradients of a loss on the last state too.
        solver: torchdyn's name of the solver.
        plain: the loop by hand, called with the field, x and the number of steps.
        timed: whether the field is called with the time and the state.
    """
    grid = torch.linspace(0, 1, steps + 1, device=x.device)
    node, wrapped = (node_of(net, solver=solver, atol=1e-3, rtol=1e-3) for _ in range(2))
    span = LearnableSpan(wrapped, grid).to(x.device)
    wanted = [p for p in (x, *net.parameters()) if p.requires_grad] if backward else []

    method = {"tsit5": "dopri5"}.get(solver, solver)  # torchdiffeq's tsit5 is not among its documented methods
    rate = net if timed else lambda t, z: net(z)
    runs = {
        "plain loop": task(lambda: plain(net, x, steps), wanted),
        "LearnableSpan": task(lambda: span(x)[1][-1], [*wanted, span.t_f] if backward else []),
        "NeuralODE": task(lambda: node(x, grid)[1][-1], wanted),
        f"torchdiffeq {method}": task(lambda: odeint(rate, x, grid, method=method, rtol=1e-3, atol=1e-3)[-1], wanted),
    }
    if span.adaptive and x.dim() == 2 and importlib.util.find_spec("torchode"):
        runs[f"torchode {solver}"] = task(_in_torchode(rate, x, grid, solver), wanted)
    return runs


def _in_torchode(rate: Callable[[Any, Tensor], Tensor], x: Tensor, grid: Tensor, solver: str) -> Callable[[], Tensor]:
    """Returns torchode's solve at a tolerance of 1e-3. torchode chooses the steps of each row of the batch by itself."""
    import torchode

    term = torchode.ODETerm(rate)
    method = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5}[solver](term=term)
    adjoint = torchode.AutoDiffAdjoint(method, torchode.IntegralController(atol=1e-3, rtol=1e-3, term=term))
    times = grid.expand(len(x), -1)
    return lambda: adjoint.solve(torchode.InitialValueProblem(y0=x, t_eval=times)).ys[:, -1]
