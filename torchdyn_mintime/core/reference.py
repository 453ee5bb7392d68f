"""The ODE's own solution: in float64, by dopri5 at a tight tolerance, of the field as it is. And solves in a span's place.

The solver error of a model is rms(z(t_f) - z*(t_f)) / rms(z*(t_f) - z(t0)), z* being that solution: see
:func:`solver_error`. It is relative to the displacement, since an offset added to the state changes nothing of the ODE and
would buy any error relative to the state.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core.field import BoundField
from torchdyn_mintime.core.span import Call, LearnableSpan, Solve
from torchdyn_mintime.core.untraced import LastSolve, evaluating, last_solve, refine, undisturbed, untraced
from torchdyn_mintime.core.wrapping import require_spans
from torchdyn_mintime.numerics import AsynchronousLeapfrog, Grid, integrate, make_stepper
from torchdyn_mintime.numerics.step_control import rms

__all__ = [
    "TOLERANCE",
    "as_returned",
    "end_by_steps",
    "ending",
    "exact_solves",
    "in_float64",
    "position",
    "reference_end",
    "reference_solution",
    "reference_states",
    "relative_error",
    "replaced_solves",
    "rk4_solution",
    "solve_of_samples",
    "solved_spans",
    "solver_error",
]

_RK4, _DOPRI5 = make_stepper("rk4"), make_stepper("dopri5")

TOLERANCE = 1e-7
"""Of reference solutions: absolute and relative."""


def end_by_steps(span: LearnableSpan) -> Tensor:
    """Returns the last state that the last forward gave, without alf's velocity."""
    return position(span, last_solve(span).end)


def position(span: LearnableSpan, state: Tensor) -> Tensor:
    """Returns the ODE's own state: that of alf without its velocity."""
    return state.chunk(2, -1)[0] if isinstance(span.stepper, AsynchronousLeapfrog) else state


def reference_end(span: LearnableSpan, tolerance: float = TOLERANCE, share: float = 0.0) -> Tensor:
    """Returns the last state that the last forward gave, solved anew in float64.

    Args:
        span: the span.
        tolerance: absolute and relative.
        share: the absolute tolerance is this share of how far the steps went, rms(z(t_f) - z(t0)), where that is more.
    """
    last = last_solve(span)
    ends, atol = [last.seen[0], last.seen[-1]], _absolute(span, tolerance, share)
    with untraced(last.bound):
        return reference_solution(last.bound, position(span, last.x), ends, tolerance, atol)[-1]


def _absolute(span: LearnableSpan, tolerance: float, share: float) -> float:
    """Returns the absolute tolerance of a reference solve. An offset of the state does not change it."""
    if not share:
        return tolerance
    went = float(rms((end_by_steps(span) - position(span, last_solve(span).x)).detach().double()))
    return max(tolerance, share * went) if math.isfinite(went) else tolerance


def reference_states(span: LearnableSpan, t_eval: Tensor, tolerance: float = TOLERANCE, share: float = 0.0) -> Tensor:
    """Returns the ODE's own solution at the times ``t_eval`` of the last forward, ``[points, *x.shape]``, in float64.

    In the order of ``t_eval``, whatever it is; without the velocity of alf. The tolerances are those of :func:`reference_end`.
    """
    last = last_solve(span)
    atol = _absolute(span, tolerance, share)
    first, end = last.steps[0], last.steps[-1]
    asked = t_eval.tolist()
    later = sorted({t for t in asked if (t - first) * (end - first) > 0}, reverse=end < first)
    start = position(span, last.x)
    with untraced(last.bound):
        path = (
            reference_solution(last.bound, start, [first, *later], tolerance, atol) if later else start.double()[None]
        )
    row = {t: i for i, t in enumerate(later, 1)}
    return path[[row.get(t, 0) for t in asked]]


def relative_error(
    span: LearnableSpan,
    tolerance: float = TOLERANCE,
    relative_to: str = "displacement",
    exact: Tensor | None = None,
) -> float:
    """Returns the solver error of the last forward (see :func:`solver_error`).

    Args:
        span: the span.
        tolerance, relative_to: see :func:`solver_error`.
        exact: the end of the ODE's own solution, if it is known.
    """
    exact = reference_end(span, tolerance) if exact is None else exact
    scale = exact - position(span, last_solve(span).x).double() if relative_to == "displacement" else exact
    return float(rms(end_by_steps(span).double() - exact) / rms(scale).clamp_min(torch.finfo(torch.float64).tiny))


def rk4_solution(last: LastSolve, steps: int) -> tuple[Tensor, Tensor]:
    """Returns times ``[steps + 1]`` and states ``[steps + 1, *x.shape]`` over the interval of a solve, by equal steps of rk4.

    Both carry the gradients of t0, t_f, x and the field's parameters. To be called inside ``untraced``.
    """
    split = refine([last.steps[0], last.steps[-1]], last.grid.start, last.grid.end, steps)
    grid = replace(split, keep=None)
    times = [torch.as_tensor(grid.left(i), dtype=torch.float64) for i in range(steps)]
    end = torch.as_tensor(last.steps[-1] if grid.end is None else grid.end, dtype=torch.float64)
    states = integrate(last.bound.function, last.x, grid, _RK4).states
    return torch.stack([t.to(states) for t in (*times, end)]), states


@torch.no_grad()
def reference_solution(
    bound: BoundField, x: Tensor, times: list[float], tolerance: float = TOLERANCE, atol: float | None = None
) -> Tensor:
    """Returns z at ``times`` from z(times[0]) = x, in float64, ``[len(times), *x.shape]``; to be called inside ``untraced``.

    The absolute tolerance is ``atol``, if given.
    """
    z, method = x.detach().double(), _DOPRI5
    with in_float64(bound, x, times[0]) as field:
        return integrate(field, z, Grid(times), method, atol=tolerance if atol is None else atol, rtol=tolerance).states


@contextmanager
def in_float64(bound: BoundField, x: Tensor, t: float) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Gives the field on states of float64, to be used inside ``untraced``: ``bound.function`` with its module in float64.

    A field that cannot be evaluated so is evaluated in its own type, and is another function.

    Args:
        bound: the field, as it was bound to a solve.
        x: a state of the solve, in its own type.
        t: a time to try the field at.
    """
    modules = list(bound.node.vf.modules())
    # Put in by hand: torch's functional_call leaves a module that stands under two names with the tensors it was given.
    stores: list[tuple[dict[str, Any], str, Tensor]] = [
        (store, name, value)
        for module in modules
        for store in (module._parameters, module._buffers)
        for name, value in store.items()
        if value is not None and value.is_floating_point()
    ]
    captured = [(m, name, v) for m, name, v in bound.captured if isinstance(v, Tensor)]

    def put_back() -> None:
        for store, name, value in stores:
            store[name] = value
        for module, name, value in captured:
            setattr(module, name, value)

    def rounded(t: Tensor, z: Tensor) -> Tensor:
        return bound.function(t.to(x.dtype), z.to(x.dtype)).double()

    try:
        for store, name, value in stores:
            store[name] = value.detach().double()
        for module, name, value in captured:
            setattr(module, name, value.double())
        try:
            z = x.detach().double()
            fits = bound.function(z.new_tensor(t), z).dtype == torch.float64
        except RuntimeError:  # a constant, or a tensor that no module holds, is of another type
            fits = False
        if not fits:
            put_back()
        yield bound.function if fits else rounded
    finally:
        put_back()


@contextmanager
def replaced_solves(found: Iterable[LearnableSpan], solve: Solve) -> Iterator[None]:
    """Puts another solve in the place of those of ``found``. The rest of their model runs as ever.

    Args:
        found: the spans.
        solve: ``solve(span, x, call) -> (t_eval, sol)``: what the span returns for the state ``x``; ``call()`` is what it
            would return by itself (:class:`~torchdyn_mintime.core.span.Call`).

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Tanh(), solver="rk4"))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> with replaced_solves([span], lambda span, x, call: ending(call, 2 * x)):
        ...     span(torch.ones(1, 2))[1][-1]
        tensor([[2., 2.]])
    """
    held = [(span, span._replacement) for span in found]
    for span, _ in held:
        span._replacement = solve
    try:
        yield
    finally:
        for span, before in held:
            span._replacement = before


def ending(call: Call, end: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what a call of a span returns whose state is ``end`` at every time that it asks for, t_f with them."""
    span = call.span
    t_eval = call.grid().times(span.t_f.dtype, span.t_f.device).detach()
    return t_eval, end.expand(len(t_eval), *end.shape)


def as_returned(span: LearnableSpan, states: Tensor, sol: Tensor) -> Tensor:
    """Returns states of :func:`reference_states` in the form of ``sol``, which a call of the span has returned."""
    exact = states.to(sol)
    if isinstance(span.stepper, AsynchronousLeapfrog):  # whose state is [z, v]
        exact = torch.cat([exact, sol.chunk(2, -1)[1]], -1)
    return exact


@contextmanager
def exact_solves(
    model: nn.Module,
    tolerance: float = TOLERANCE,
    share: float = 0.0,
    first: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Iterator[None]:
    """Gives, as the states that calls of the spans of ``model`` return, the ODE's own solution.

    Args:
        model: the model that is called.
        tolerance, share: see :func:`reference_end`.
        first: of the first call, if it was solved exactly before: its state, the times and the states to return. The later
            calls are solved, since they may depend on the exact end of this one.
    """
    waiting = [] if first is None else [first]

    def solve(span: LearnableSpan, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        if waiting:
            start, *returned = waiting.pop()
            if torch.equal(start, x):
                return returned[0], returned[1]
        t_eval, sol = call()
        return t_eval, as_returned(span, reference_states(span, t_eval, tolerance, share), sol)

    with replaced_solves(require_spans(model), solve):
        yield


@torch.no_grad()
def solver_error(model: nn.Module, x: Tensor, tolerance: float = TOLERANCE, relative_to: str = "displacement") -> float:
    """Returns how far the model's solver is from the ODE that its field describes.

    The model is called in eval mode. For each of its spans, the state z(t_f) is compared with z*(t_f), the end of a
    solve from the same initial state over the same interval in float64, by dopri5 at ``tolerance``, with the data
    control and noise of the first solve (where the model looks at an earlier state alone, that one and its time):

        rms(z(t_f) - z*(t_f)) / rms(z*(t_f) - z(t0)),

    rms being the root of the mean square over all entries, a running cost or log-density in the state included.
    Nothing of the model is changed or copied. A field that cannot be evaluated in float64 is evaluated in its own type,
    and only the solve is in float64.

    Args:
        model: a LearnableSpan, or a module that holds some.
        x: what it is called with.
        tolerance: absolute and relative, of the reference solve.
        relative_to: "displacement" as above, or "state": over rms(z*(t_f)), which an offset of the state makes small.

    Returns:
        That figure, a pure number; the largest where there are several spans.

    Raises:
        ValueError: ``model`` has no LearnableSpan.
        IntegrationError: the solve, or the reference solve, failed.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Tanh(), solver="rk4"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> 0 < solver_error(span, torch.randn(8, 2)) < 2e-2
        True
    """
    if relative_to not in ("displacement", "state"):
        raise ValueError(f"relative_to must be 'displacement' or 'state'; got {relative_to!r}")
    with evaluating(model), undisturbed(model):
        return max(relative_error(span, tolerance, relative_to) for span in solved_spans(model, x))


def solved_spans(model: nn.Module, x: Tensor) -> list[LearnableSpan]:
    """Calls ``model`` and returns those of its spans that this call has solved; to be called inside ``undisturbed``."""
    found = require_spans(model)
    before = [span.last for span in found]
    model(x)
    solved = [span for span, last in zip(found, before, strict=True) if span.last is not last]
    if not solved:
        raise ValueError(f"calling {type(model).__name__} solved none of its LearnableSpans")
    for span in solved:
        solve_of_samples(span)
    return solved


def solve_of_samples(span: LearnableSpan) -> LastSolve:
    """Returns the record of the last forward of ``span``.

    Raises:
        ValueError: it was of no samples, which have no figure.
    """
    last = last_solve(span)
    if not len(last.x):
        raise ValueError(f"there are no samples to solve: the state has the shape {tuple(last.x.shape)}")
    return last
