r"""Gradients by the continuous adjoint: Proposition 3.1 of the paper, with the running cost.

For the loss l = Phi(z(t_1), ..., z(t_n)) + int_{t0}^{t_f} L(t, z, theta) dt, with p = dl/dz along the solution,

    p' = -p df/dz - dL/dz,          p jumps by dPhi/dz(t_i) at every returned point,                         eq. (11)
    mu' = -p df/dtheta - dL/dtheta, mu(t_f) = 0,      dl/dtheta = mu(t0),                                    eq. (10)
    dl/dt_f = p(t_f) f(t_f, z(t_f)) + L(t_f),                                                                eq. (12)
    dl/dt0 = -(p(t0) f(t0, z(t0)) + L(t0)),                                                                  eq. (36)

where p(t0) is taken before the point at t0 adds to it, since z(t0) = x does not move with t0. The printed (36) has the
opposite sign. The formulas hold in either direction of time, with "first" and "last" for t0 and t_f.

L, the running cost, weighs 1 unless the loss uses the integral that the solve returns: then it weighs what the loss gives it.

The states that the solve returned are kept, with the first state and derivative; between two of them, z is solved backwards
with p and mu. ``interpolated=True`` keeps the whole path and reads z off it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.numerics.integrate import Grid, Path, Solution, integrate
from torchdyn_mintime.numerics.problem import (
    Problem,
    VectorField,
    Watched,
    autocast,
    autocast_state,
    check_outside,
    check_same,
    cut_at,
    requiring_grad,
    strangers,
)
from torchdyn_mintime.numerics.steppers import Stepper

__all__ = ["AdjointProblem", "solve_adjoint", "with_running_cost"]


@dataclass
class AdjointProblem(Problem):
    """What a solve with adjoint gradients needs to know, beside what every :class:`Problem` holds.

    Attributes:
        backward_stepper, backward_atol, backward_rtol: of the backward solve; The absolute tolerance
            is relative to the largest incoming gradient, since the adjoint equation is linear in p.
        running_cost: L(t, z) -> [batch]; the gradient of its integral, summed over the batch, is added where the loss
            does not use the integral itself.
        interpolated: keep the path and interpolate it, instead of solving z backwards.
    """

    _: KW_ONLY
    backward_stepper: Stepper
    backward_atol: float
    backward_rtol: float
    running_cost: Callable[[Any, Tensor], Tensor] | None = None
    interpolated: bool = False


def solve_adjoint(problem: AdjointProblem, x: Tensor, grid: Grid) -> tuple[Solution, Tensor | None]:
    """Solves along a grid; ``solution.states`` carries adjoint gradients to x, the times and the parameters.

    Returns:
        The solution, and the running cost's integral for each entry of the batch (None without one).

    Raises:
        IntegrationError: as :func:`integrate`, also from the backward pass.
        OutsideTensors: the field uses tensors that require a gradient and that the problem does not name.
        ValueError: from the backward pass, where the field is not the one of the forward solve any more.
    """
    info: dict[str, Any] = {"search": torch.is_grad_enabled() and problem.searched}
    differentiated = (*problem.parameters.values(), *problem.outside)
    states, cost = _Adjoint.apply(problem, info, grid, x, grid.start, grid.end, *differentiated)
    return Solution(states, info["steps"]), cost


def with_running_cost(
    f: VectorField, running_cost: VectorField | None, x: Tensor, t: float
) -> tuple[VectorField, Tensor]:
    """Returns the field of the flat state [z, c] with c' = L(t, z), and its initial state; c is empty where L is none.

    Args:
        f: the field of z.
        running_cost: L(t, z) -> [batch].
        x: the initial z, of any shape.
        t: the initial time.
    """

    def costs(t: Any, z: Tensor) -> Tensor:
        return z.new_zeros(0) if running_cost is None else running_cost(t, z).reshape(-1)

    def flat(t: Any, y: Tensor) -> Tensor:
        z = y[: x.numel()].view(x.shape)
        return torch.cat([f(t, z).reshape(-1), costs(t, z)])

    return flat, torch.cat([x.reshape(-1), torch.zeros_like(costs(x.new_tensor(t), x))])


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: AdjointProblem, info, grid: Grid, x, start, end, *differentiated):
        asked = grid.keep is None or grid.keep[-1]
        plain = Grid(grid.nodes, keep=None if grid.keep is None else [*grid.keep[:-1], True])
        z = x.detach()
        settings: dict[str, Any] = dict(atol=problem.atol, rtol=problem.rtol, interpolator=problem.interpolator)
        record = problem.interpolated
        cost = None
        if problem.running_cost is None:
            f = Watched(problem.f, differentiated, info["search"])
            solution = integrate(f, z, plain, problem.stepper, record=record, **settings)
        else:
            with problem.restored():
                flat_field, y = with_running_cost(problem.f, problem.running_cost, z, grid.nodes[0])
            f = Watched(flat_field, differentiated, info["search"])
            flat = integrate(f, y, plain, problem.stepper, error_size=z.numel(), record=record, **settings)
            cut = z.numel()
            cost = flat.states[-1, cut:].clone()
            path = [(t, y[:cut].view(z.shape), None if k is None else k[:cut].view(z.shape)) for t, y, k in flat.path]
            solution = Solution(flat.states[:, :cut].reshape(-1, *z.shape), flat.steps, path)
        ctx.problem, ctx.grid = problem, plain
        ctx.steps, ctx.times = solution.steps, [t for t, _, _ in solution.path]
        ctx.autocast = autocast_state(x.device.type)
        ctx.ends = (start is not None, end is not None)
        ctx.cost_used = ctx.cost_added = False
        ctx.set_materialize_grads(False)
        # An empty tensor stands for a derivative that was not recorded.
        points = [y for _, z, k in solution.path for y in (z, z.new_empty(0) if k is None else k)]
        returned = grid.keep is None or grid.keep[0]
        ctx.time_of_last, *last = f.last or (None, None, None)
        ctx.save_for_backward(None if returned else x, f.first, *last, solution.states, *differentiated, *points)
        info["steps"] = solution.steps
        return (solution.states if asked else solution.states[:-1].clone()), cost

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_states, grad_cost):
        problem, names = ctx.problem, list(ctx.problem.parameters)
        x, first, at_last, last, states, *saved = ctx.saved_tensors
        # The states are outputs: a field that differentiates inside would take them for part of its own graph.
        states = states.detach()
        x = states[0] if x is None else x.detach()
        count = len(names) + len(problem.outside)
        differentiated, points = saved[:count], saved[count:]
        path = list(zip(ctx.times, points[::2], (k if k.numel() else None for k in points[1::2]), strict=True))
        weights = _weights_of_cost(ctx, grad_cost, first.numel() - x.numel(), x)
        if grad_states is None:
            grad_states = torch.zeros_like(states)
        solver = _Backward(problem, names, ctx.grid, ctx.steps, path, ctx.ends, weights)
        # Where the module holds others by now than in the forward solve (functional_call), those of the solve are put
        # in their place. Else its own are used, which a field that is a closure holds too.
        own = dict(problem.module.named_parameters())
        leaves = {
            f"module.{n}": p.detach().requires_grad_()
            for n, p in zip(names, differentiated, strict=False)
            if own.get(n) is not p
        }
        outside = differentiated[len(names) :]
        evaluations = ((x.new_tensor(ctx.grid.nodes[0]), None, first), (ctx.time_of_last, at_last, last))
        with problem.restored(), autocast(*ctx.autocast), cut_at(outside), requiring_grad(differentiated):
            arguments = (x, evaluations, states, grad_states, outside)
            x, start, end, mu = torch.func.functional_call(solver, leaves, arguments)
        grads = [None if g is None else g.to(p.dtype) for g, p in zip(mu, differentiated, strict=True)]
        return (None, None, None, x, start, end, *grads)


def _weights_of_cost(ctx, arriving: Tensor | None, size: int, x: Tensor) -> Tensor:
    """Returns the weight in the loss of each entry of the running cost's integral, ``[size]``."""
    if arriving is not None:
        if ctx.cost_added:
            raise ValueError(
                "the gradient of the running cost was added by an earlier backward of this solve, whose loss did not have it "
                "(torchdyn's convention), and now it comes with a loss; put both on one loss, such as "
                "loss + span.running_cost.sum(), or call backward for the running cost first"
            )
        ctx.cost_used = True
        return arriving.reshape(-1)
    if ctx.cost_used:  # an earlier backward of the same solve had it on its loss, and this one is of another loss
        return x.new_zeros(size)
    _, enabled, dtype = ctx.autocast
    if size and enabled and dtype == torch.float16:
        raise ValueError(
            "the node has an integral_loss, whose gradient backward adds by itself under an adjoint. In float16 the loss is "
            "scaled (GradScaler), and that gradient would not be: put the running cost on the loss, such as "
            "loss + span.running_cost.sum(), and it is scaled like the rest"
        )
    ctx.cost_added = size > 0
    return x.new_ones(size)


class _Backward(nn.Module):
    """The backward solve, as a module, so that the parameters can be put in its place for its whole length."""

    def __init__(self, problem: AdjointProblem, names, grid: Grid, steps, path, ends, weights: Tensor):
        super().__init__()
        self.module = problem.module
        self._problem, self._names, self._weights = problem, names, weights
        self._grid, self._steps, self._path, self._ends = grid, steps, path, ends
        self._used: set[int] = set()

    def forward(self, x: Tensor, evaluations, states: Tensor, grad_states: Tensor, outside: Sequence[Tensor]):
        problem, grid = self._problem, self._grid
        # By attribute: FullyShardedDataParallel holds tensors there in backward, which are no parameters.
        parameters = [*(attrgetter(n)(self.module) for n in self._names), *outside]
        flat, y = problem.f, x
        if problem.running_cost is not None:
            flat, y = with_running_cost(problem.f, problem.running_cost, x, grid.nodes[0])
        # Of the forward solve, the first evaluation and the last: what changes as time goes on shows in the last alone.
        for t, at, value in evaluations:
            if value is not None:
                check_same(flat(t, y if at is None else at).detach(), value)
        last = len(grid.nodes) - 1
        kept = [i for i in range(last + 1) if grid.keep is None or grid.keep[i]]
        p, mu = torch.zeros_like(states[-1]), states.new_zeros(sum(q.numel() for q in parameters))
        scale = max((g.abs().max().item() for g in (grad_states, self._weights) if g.numel()), default=0.0)
        if scale == 0.0 or not math.isfinite(scale):  # a NaN gradient passes through as it is
            scale = 1.0
        path = Path(self._path, problem.f) if self._path else None
        start = end = None
        for n in range(len(kept) - 1, -1, -1):
            i, z = kept[n], states[n]
            if i == 0 and self._ends[0]:
                start = -self._rate(grid.nodes[0], z, p, scale)
            if n < len(grad_states):  # the last state is kept even where it was not asked for
                p = p + grad_states[n] / scale
            if i == last and self._ends[1]:
                end = self._rate(grid.nodes[last], z, p, scale)
            if i > 0:
                before = kept[n - 1] if n > 0 else 0
                p, mu, z = self._between(grid.nodes[i], grid.nodes[before], z, p, mu, parameters, scale, path)
        if kept[0] != 0 and self._ends[0]:
            start = -self._rate(grid.nodes[0], x, p, scale)
        sizes = [q.numel() for q in parameters]
        # As under autograd, a parameter that the field does not use has no gradient at all.
        grads = [
            m.view(q.shape) * scale if i in self._used else None
            for i, (m, q) in enumerate(zip(mu.split(sizes), parameters, strict=True))
        ]
        start, end = (None if rate is None else rate * scale for rate in (start, end))
        return p * scale, start, end, grads

    def _rate(self, t: float, z: Tensor, p: Tensor, scale: float) -> Tensor:
        """Returns p f + L, the Hamiltonian of eq. (21)."""
        time = z.new_tensor(t)
        rate = (p * self._problem.f(time, z)).sum()
        if self._problem.running_cost is not None:
            rate = rate + (self._problem.running_cost(time, z).reshape(-1) * self._weights).sum() / scale
        return rate.detach()

    def _between(self, t1: float, t0: float, z, p, mu, parameters, scale, path):
        """Solves p and mu (and z) from t1 back to t0, over the forward solve's steps where they are fixed."""
        problem, size, shape = self._problem, z.numel(), z.shape
        low, high = min(t0, t1), max(t0, t1)
        stepper = problem.backward_stepper
        inner = [t for t in self._steps if low < t < high] if path is not None or not stepper.adaptive else []
        nodes = [t0, *(inner if t0 < t1 else sorted(inner, reverse=True)), t1][::-1]

        def dynamics(t, y):
            state = y[:size].view(shape) if path is None else path(t.item())
            p = (y[size : 2 * size] if path is None else y[:size]).view(shape)
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                dz = problem.f(t, state)
                outputs: Sequence[Tensor] = [dz]
                weights: Sequence[Tensor] = [-p]
                cost: Tensor | None = None
                if problem.running_cost is not None:
                    cost = problem.running_cost(t, state)
                    outputs, weights = [dz, cost], [-p, self._weights.view(cost.shape) / -scale]
                pairs = [(o, w.to(o.dtype)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
                wanted = (state, *parameters)
                found = strangers([o for o, _ in pairs], parameters, (state, t)) if problem.searched else []
                grads: Sequence[Tensor | None] = [None] * len(wanted)
                if pairs:
                    outputs, weights = zip(*pairs, strict=True)
                    # What lies behind an outside tensor is passed again at every evaluation.
                    kept = bool(problem.outside)
                    grads = torch.autograd.grad(outputs, wanted, weights, allow_unused=True, retain_graph=kept)
                    self._used.update(i for i, g in enumerate(grads[1:]) if g is not None)
            if found:  # once the graph is gone, what is still there was made outside
                dz, outputs, pairs = dz.detach(), (), []
                cost = None
                check_outside(found)
            flat = [
                (torch.zeros_like(q) if g is None else g).reshape(-1).to(y.dtype)
                for g, q in zip(grads, wanted, strict=True)
            ]
            return torch.cat(flat if path is not None else [dz.detach().reshape(-1).to(y.dtype), *flat])

        head = [p.reshape(-1)] if path is not None else [z.reshape(-1), p.reshape(-1)]
        solution = integrate(
            dynamics,
            torch.cat([*head, mu]),
            Grid(nodes, keep=[False] * (len(nodes) - 1) + [True]),
            stepper,
            atol=problem.backward_atol,
            rtol=problem.backward_rtol,
            # The parameters' part is a quadrature: it does not feed back, and would only make steps shorter.
            error_size=size if path is not None else 2 * size,
        )
        y = solution.states[-1]
        if path is not None:
            return y[:size].view(shape), y[size:], z
        return y[size : 2 * size].view(shape), y[2 * size :], y[:size].view(shape)
