"""The ODE's own solution: in float64, by dopri5 at a tight tolerance, of the field as it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.field import BoundField
from torchdyn_mintime.numerics.integrate import Grid, integrate
from torchdyn_mintime.numerics.steppers import AsynchronousLeapfrog, make_stepper
from torchdyn_mintime.secondary import last_solve, untraced
from torchdyn_mintime.span import LearnableSpan

__all__ = ["TOLERANCE", "end_by_steps", "position", "reference_end", "reference_solution", "relative_error"]

TOLERANCE = 1e-7
"""Of reference solutions: absolute and relative."""


def end_by_steps(span: LearnableSpan) -> Tensor:
    """The state at the end of the last forward, without alf's velocity."""
    last = last_solve(span)
    state = last.states[-1]
    if not last.reaches_end:
        with untraced(last.bound):
            state = integrate(last.bound.function, last.x, Grid(last.steps), span._stepper, adapt=False).states[-1]
    return position(span, state)


def position(span: LearnableSpan, state: Tensor) -> Tensor:
    return state.chunk(2, -1)[0] if isinstance(span._stepper, AsynchronousLeapfrog) else state


def reference_end(span: LearnableSpan, tolerance: float = TOLERANCE) -> Tensor:
    """The end of the last forward's interval, solved anew in float64 at ``tolerance``."""
    last = last_solve(span)
    with untraced(last.bound):
        return reference_solution(last.bound, position(span, last.x), [last.steps[0], last.steps[-1]], tolerance)[-1]


def relative_error(span: LearnableSpan, tolerance: float = TOLERANCE) -> float:
    """rms(z(t_f) - z*(t_f)) / rms(z*(t_f)) of the last forward, z* being the solution at ``tolerance``."""
    exact = reference_end(span, tolerance)
    return _rms(end_by_steps(span).double() - exact) / max(_rms(exact), torch.finfo(torch.float64).tiny)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def reference_solution(bound: BoundField, x: Tensor, times: list[float], tolerance: float = TOLERANCE) -> Tensor:
    """z at ``times`` from z(times[0]) = x, in float64, ``[len(times), *x.shape]``; to be called inside ``untraced``."""
    own_dtype = x.dtype
    x = x.detach().double()

    def solve(f: Callable) -> Tensor:
        return integrate(f, x, Grid(times), make_stepper("dopri5"), atol=tolerance, rtol=tolerance).states

    with _in_float64(bound, x, times[0]) as run:
        if run is not None:
            return run(lambda: solve(bound.function))

    # The field in its own type; only the states between its evaluations are of float64.
    def rounded(t: Tensor, z: Tensor) -> Tensor:
        return bound.function(t.to(own_dtype), z.to(own_dtype)).double()

    return solve(rounded)


class _Holder(nn.Module):
    """Runs an action while ``functional_call`` has other tensors in the place of ``vf``'s own."""

    def __init__(self, vf: Any):
        super().__init__()
        self.vf = vf

    def forward(self, action: Callable[[], Tensor]) -> Tensor:
        return action()


@contextmanager
def _in_float64(bound: BoundField, x: Tensor, t: float) -> Iterator[Callable | None]:
    """A function that runs an action with the field in float64; None if the field does not take that."""
    holder = _Holder(bound.node.vf)
    named = (*holder.named_parameters(), *holder.named_buffers())
    tensors = {n: v.detach().double() for n, v in named if v.is_floating_point() and v.dtype != torch.float64}
    captured = [(m, name, v) for m, name, v in bound._captured if isinstance(v, Tensor)]
    for module, name, value in captured:
        setattr(module, name, value.double())

    def run(action: Callable[[], Tensor]) -> Tensor:
        return torch.func.functional_call(holder, tensors, (action,))

    try:
        try:
            fits = run(lambda: bound.function(x.new_tensor(t), x)).dtype == torch.float64
        except RuntimeError:  # a constant, or a tensor that no module holds, is of another type
            fits = False
        yield run if fits else None
    finally:
        for module, name, value in captured:
            setattr(module, name, value)
