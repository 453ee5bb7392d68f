r"""The exact gradient of the discrete solution, with the memory of one state a step.

autograd keeps what every evaluation of the field used. Here the solve keeps the states z_i that its steps started from;
backward takes the steps in reverse, each once more with a graph of its own, and carries lambda_i = dl/dz_i,

    lambda_i = lambda_{i+1} dS_i/dz + dPhi/dz(t_i),    dl/dtheta = sum_i lambda_{i+1} dS_i/dtheta,    z_{i+1} = S_i(z_i),

and the same for the times that the first and the last step depend on. The graph is the one that autograd would have
kept, so the gradient is the same to rounding, for one more evaluation of every stage. Adaptive steps are held as accepted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.numerics.integrate import Grid, Solution, _cast, _interpolate, _stage_times, integrate
from torchdyn_mintime.numerics.problem import (
    Problem,
    Watched,
    autocast,
    autocast_state,
    check_outside,
    cut_at,
    deviation,
    refuse_other,
    requiring_grad,
    strangers,
)

__all__ = ["solve_checkpointed"]


def solve_checkpointed(problem: Problem, x: Tensor, grid: Grid) -> Solution:
    """Solves along a grid; ``solution.states`` carries the gradients of the discrete solution.

    Raises:
        IntegrationError: as :func:`integrate`.
        OutsideTensors: the field uses tensors that require a gradient and that the problem does not name.
        ValueError: from the backward pass, where the field is not the one of the forward solve any more.
    """
    info: dict[str, Any] = {}
    differentiated = (*problem.parameters.values(), *problem.outside)
    states = _Checkpointed.apply(problem, info, grid, x, grid.start, grid.end, *differentiated)
    return Solution(states, info["steps"])


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, info, grid: Grid, x, start, end, *differentiated):
        stepper, fixed = problem.stepper, not problem.stepper.adaptive
        # Copies: t_f may be clipped in place before the backward.
        start, end = (None if t is None else t.detach().clone() for t in (start, end))
        solution = integrate(
            Watched(problem.f, differentiated, problem.searched),
            x.detach(),
            Grid(grid.nodes, start, end, None if fixed else grid.keep),
            stepper,
            atol=problem.atol,
            rtol=problem.rtol,
            interpolator=problem.interpolator,
            record=not fixed,
        )
        returned = solution.states
        if not fixed:
            started = torch.stack([z for _, z, _ in solution.path])
        else:
            started = returned  # no second copy of them
            if grid.keep is not None:
                returned = returned[[i for i, kept in enumerate(grid.keep) if kept]]
        ctx.problem, ctx.steps = problem, solution.steps
        ctx.grid = Grid(grid.nodes, start, end, grid.keep)
        ctx.autocast = autocast_state(x.device.type)
        ctx.save_for_backward(started, *differentiated)
        info["steps"] = solution.steps
        return returned

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_states):
        started, *differentiated = ctx.saved_tensors
        started = started.detach()
        problem, names = ctx.problem, list(ctx.problem.parameters)
        parameters, outside = differentiated[: len(names)], differentiated[len(names) :]
        replay = _Replay(problem, ctx.grid, ctx.steps)
        current = dict(problem.module.named_parameters())
        with problem.restored(), autocast(*ctx.autocast), cut_at(outside), requiring_grad(differentiated):
            if all(current.get(n) is p for n, p in zip(names, parameters, strict=True)):
                x, start, end, totals = replay(started, grad_states, differentiated)
            else:  # the module holds others by now (functional_call): put those of the forward solve in their place
                leaves = [p.detach().requires_grad_() for p in parameters]
                named = {f"module.{n}": leaf for n, leaf in zip(names, leaves, strict=True)}
                x, start, end, totals = torch.func.functional_call(
                    replay, named, (started, grad_states, [*leaves, *outside])
                )
        return (None, None, None, x, start, end, *totals)


class _Replay(nn.Module):
    """The steps taken once more, last one first. A module, so that parameters can be put in its field's place."""

    def __init__(self, problem: Problem, grid: Grid, steps: Sequence[float]):
        super().__init__()
        self.module = problem.module
        self._problem, self._grid, self._steps = problem, grid, steps

    def forward(self, started: Tensor, grad_states: Tensor, parameters: Sequence[Tensor]):
        grid, steps, stepper, f = self._grid, self._steps, self._problem.stepper, self._problem.f
        nodes, last = grid.nodes, len(steps) - 2
        keep = grid.keep or [True] * len(nodes)
        kept = [t for t, k in zip(nodes, keep, strict=True) if k]
        incoming = dict(zip(kept, grad_states, strict=True))  # by time; landing on a point is exact
        start, end = (None if t is None else t.detach().requires_grad_() for t in (grid.start, grid.end))
        passes = self._passes()
        totals: list[Tensor | None] = [None] * (len(parameters) + 2)
        carried: Tensor | None = None
        deviations: list[Tensor] = []
        for i in range(last, -1, -1):
            t, t_new = steps[i], steps[i + 1]
            if (arriving := incoming.get(t_new)) is not None and (passes is None or i == last):
                carried = arriving if carried is None else carried + arriving
            inside = [] if passes is None else [incoming[nodes[k]] for k in range(*passes[i]) if keep[k]]
            if carried is None and not inside:  # nothing was asked for from here on
                continue
            with torch.enable_grad():
                z = started[i].detach().requires_grad_()
                ends = start if i == 0 else None, end if i == last else None
                step = Grid([t, t_new], *ends)
                # With a graph of its own: its coefficients may be learned.
                method = stepper.toward(t_new - t).prepare(z)
                times = _stage_times(f, step, method, z)[0]
                z_new, stages = method.step(f, z, times, _cast(step.size(0), z.dtype))
                outputs: list[Tensor] = []
                if passes is not None and inside:
                    interpolator = self._problem.interpolator
                    _interpolate(interpolator, passes[i][0], nodes, keep, outputs, step, z, z_new, stages)
            before, after = started[i], started[i + 1]
            deviations.append(deviation(z_new.detach() - before, after - before, scale=after))
            weights = inside
            if carried is not None:
                outputs, weights = [*outputs, z_new], [*inside, carried]
            wanted = [z, *parameters, *(time for time in ends if time is not None)]
            found_outside = strangers(outputs, parameters, (z, start, end)) if self._problem.searched else []
            # What lies behind an outside tensor is passed again at every step.
            kept_graph = bool(self._problem.outside)
            carried, *found = torch.autograd.grad(outputs, wanted, weights, allow_unused=True, retain_graph=kept_graph)
            places = [*range(len(parameters)), *(len(parameters) + k for k in (0, 1) if ends[k] is not None)]
            for k, g in zip(places, found, strict=True):
                if g is not None:
                    total = totals[k]
                    # The first is copied: what autograd returns may be shared with something else.
                    totals[k] = g.clone() if total is None else total.add_(g)
            del z_new, stages, outputs
            check_outside(found_outside)
        if deviations:
            refuse_other(deviations)
        if (arriving := incoming.get(nodes[0])) is not None:
            carried = arriving if carried is None else carried + arriving
        *totals, start, end = totals
        return carried, start, end, totals

    def _passes(self) -> list[tuple[int, int]] | None:
        """Returns the interior points that each step's interpolation gave, as ranges; None where every point was landed on."""
        if self._problem.interpolator is None or not self._problem.stepper.adaptive:
            return None
        nodes, begin, passes = self._grid.nodes, 1, []
        for t, t_new in zip(self._steps, self._steps[1:], strict=False):
            end = begin
            while end < len(nodes) - 1 and min(t, t_new) <= nodes[end] <= max(t, t_new):
                end += 1
            passes.append((begin, end))
            begin = end
        return passes
