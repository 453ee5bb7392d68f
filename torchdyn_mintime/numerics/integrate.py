r"""The drives over a stepper: fixed steps along a grid, and adaptive steps that land on every point of it.

Both keep the steps that were taken as plain numbers. Where a gradient of the first or last time is wanted, the grid
holds that time as a tensor too, and only the step that touches it depends on it: the gradient is exactly that of the
discrete solution, and costs no evaluation of the field.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchdyn_mintime.numerics.dense import InsideSteps
from torchdyn_mintime.numerics.step_control import error_norm, factor, first_step
from torchdyn_mintime.numerics.steppers import Stepper

__all__ = ["MAX_STEPS", "Grid", "IntegrationError", "Solution", "integrate"]

MAX_STEPS = 100_000
"""Steps, rejected ones included, after which an adaptive solve is given up."""

VectorField = Callable[[Any, Tensor], Tensor]


class IntegrationError(RuntimeError):
    """A solve failed: the state or the field is not finite, or the steps ran out.

    Attributes:
        time: where it failed (units of time).
        step: number of the failing step, from 1 (0: before the first).
        solver: name of the stepper.
    """

    def __init__(self, message: str, *, time: float = math.nan, step: int = 0, solver: str = ""):
        super().__init__(message)
        self.time, self.step, self.solver = time, step, solver


@dataclass(frozen=True)
class Grid:
    """The points of a solve, strictly monotone in either direction.

    Attributes:
        nodes: the times as numbers.
        start, end: the first and the last time as tensors, where their gradient is wanted.
        keep: which points are returned; None is all.
        dense: the times to return instead, without landing on them: strictly monotone, from the first point to the last at
            most. Those that are equal to an end are that end.
    """

    nodes: Sequence[float]
    start: Tensor | None = None
    end: Tensor | None = None
    keep: Sequence[bool] | None = None
    dense: Sequence[float] | None = None

    @property
    def returned(self) -> Sequence[float]:
        """The times of the returned states, as numbers."""
        if self.dense is not None:
            return self.dense
        return self.nodes if self.keep is None else [t for t, k in zip(self.nodes, self.keep, strict=True) if k]

    @property
    def returns_end(self) -> bool:
        """Whether the state at the last point is returned, as the last one."""
        return bool(self.returned) and self.returned[-1] == self.nodes[-1]

    def times(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns the returned points as one tensor, which carries the gradient of ``start`` and ``end``."""
        kept = self.returned
        head = [self.start.reshape(1)] if self.start is not None and kept[0] == self.nodes[0] else []
        tail = [self.end.reshape(1)] if self.end is not None and kept[-1] == self.nodes[-1] else []
        plain = torch.tensor(kept[len(head) : len(kept) - len(tail)], dtype=dtype, device=device)
        if not head and not tail:
            return plain
        return torch.cat([*(t.to(plain) for t in head), plain, *(t.to(plain) for t in tail)])

    def size(self, i: int) -> float | Tensor:
        """Returns the size of the i-th step: a number, or a tensor where it carries a gradient."""
        a: float | Tensor = self.nodes[i]
        b: float | Tensor = self.nodes[i + 1]
        # In float64, so that a step has the same size with and without a gradient.
        if i == 0 and self.start is not None:
            a = self.start.double()
        if i == len(self.nodes) - 2 and self.end is not None:
            if isinstance(a, float) and a == 0.0:  # one step from 0: no difference, and nothing to round
                return self.end
            b = self.end.double()
        return b - a

    def sizes(self, dtype: torch.dtype) -> list[float | Tensor]:
        """Returns the sizes of all steps; those that carry a gradient in ``dtype``."""
        return [_cast(self.size(i), dtype) for i in range(len(self.nodes) - 1)]

    def left(self, i: int) -> float | Tensor:
        """Returns the time at which the i-th step starts."""
        if i == 0 and self.start is not None:
            # A view: a field that keeps the time on a module (DepthCat.t) would else register the parameter t0 there.
            return self.start.double().view(())
        return self.nodes[i]


@dataclass
class Solution:
    """What a solve found.

    Attributes:
        states: the state at the returned points, stacked: ``[points, *x.shape]``.
        steps: the times between which steps were taken, as numbers (all points of a fixed grid; accepted adaptive steps).
        path: with ``record=True``, (time, state, derivative or None) at every one of those times.
    """

    states: Tensor
    steps: list[float]
    path: list[tuple[float, Tensor, Tensor | None]] = field(default_factory=list)


def integrate(
    f: VectorField,
    x: Tensor,
    grid: Grid,
    stepper: Stepper,
    *,
    atol: float = 1e-3,
    rtol: float = 1e-3,
    interpolator: Callable | None = None,
    error_size: int | None = None,
    max_steps: int = MAX_STEPS,
    record: bool = False,
    adapt: bool = True,
) -> Solution:
    """Solves z' = f(t, z), z(t_0) = x along a grid.

    Args:
        f: the field; an attribute ``timed = False`` says that it ignores t, which is then None.
        x: initial state, any shape.
        grid: the points; a fixed-step stepper takes one step between any two, an adaptive one lands on each.
        stepper: the method; for a ``grid.dense`` one that has an interpolant.
        atol, rtol: tolerances (adaptive steppers).
        interpolator: torchdyn's interpolator, which gives the interior points without landing on them (dopri5).
        error_size: how many entries of a flat state the error norm sees; None is all.
        max_steps: limit of adaptive steps.
        record: keep the whole path (see :class:`Solution`).
        adapt: False holds the steps: an adaptive stepper too takes one step between any two points.

    Raises:
        IntegrationError: the state or field is not finite, or the step limit was reached.

    Example:
        >>> from torchdyn_mintime.numerics import make_stepper
        >>> x = torch.ones(1, dtype=torch.float64)
        >>> solution = integrate(lambda t, z: -z, x, Grid([0.0, 0.5, 1.0]), make_stepper("rk4"))
        >>> solution.states.shape
        torch.Size([3, 1])
    """
    if in_half_precision(x, stepper):
        settings: dict[str, Any] = {"atol": atol, "rtol": rtol, "interpolator": interpolator, "error_size": error_size}
        settings |= {"max_steps": max_steps, "record": record, "adapt": adapt}
        solution = integrate(evaluating_in(x.dtype, f), x.float(), grid, stepper, **settings)
        return rounded(solution, x.dtype, grid, stepper)
    stepper = stepper.toward(grid.nodes[-1] - grid.nodes[0]).prepare(x)
    if stepper.adaptive and adapt:
        return _adaptive(f, x, grid, stepper, atol, rtol, interpolator, error_size, max_steps, record)
    return _fixed(f, x, grid, stepper, record)


# ------------------------------------------------------------------------------------------------ half precision


def in_half_precision(x: Tensor, stepper: Stepper) -> bool:
    """Returns whether a solve from ``x`` keeps its state in float32 and evaluates the field in the type of ``x``.

    A step is a small part of the state: in bfloat16 an increment below 1/256 of it is lost. With the sum in float32 the end
    is as exact as the field.
    """
    # A stepper that wants times evaluates something of its own, in a type of its own.
    return x.dtype.itemsize < 4 and not stepper.timed


def evaluating_in(dtype: torch.dtype, f: VectorField) -> VectorField:
    """Returns ``f`` for a state in float32, evaluated in ``dtype``."""

    def evaluate(t: Any, z: Tensor) -> Tensor:
        return f(t.to(dtype) if isinstance(t, Tensor) else t, z.to(dtype)).float()

    evaluate.timed = getattr(f, "timed", True)  # type: ignore[attr-defined]
    return evaluate


def rounded(solution: Solution, dtype: torch.dtype, grid: Grid, stepper: Stepper) -> Solution:
    """Returns a solution in float32 with the returned states in ``dtype``.

    Raises:
        IntegrationError: the last one is finite in float32, but too large for ``dtype``.
    """
    states = solution.states.to(dtype)
    if not _is_finite(states[-1:]):
        raise _failure(f"the state is too large for {dtype}", grid.nodes[-1], len(solution.steps) - 1, stepper, grid)
    return Solution(states, solution.steps, solution.path)


# ---------------------------------------------------------------------------------------------------- fixed steps


def _fixed(f: VectorField, x: Tensor, grid: Grid, stepper: Stepper, record: bool) -> Solution:
    n = len(grid.nodes) - 1
    keep = grid.keep if grid.dense is None else [False] * (n + 1)
    inside = None if grid.dense is None else InsideSteps(grid.dense, stepper.interpolant, x, grid.nodes)
    sizes = grid.sizes(x.dtype)
    times = _stage_times(f, grid, stepper, x)
    x0, states, path, k1 = x, [], [], None
    for i in range(n):
        if keep is None or keep[i]:
            states.append(x)
        x_new, stages = stepper.step(f, x, times[i], sizes[i], k1)
        if stepper.adaptive and stepper.first_same_as_last:
            k1 = stages[-1]
        if i == 0:
            _check_shape(x, stages)
        if inside is not None:
            ends = grid.nodes[i], grid.nodes[i + 1]
            inside.passed(ends, grid.left(i), grid.size(i), x, x_new, stages)
        if record:
            path.append((grid.nodes[i], x, stages[0] if stepper.nodes[0] == 0.0 and stages else None))
        x = x_new
    if keep is None or keep[n]:
        states.append(x)
    if record:
        path.append((grid.nodes[n], x, None))
    if not _is_finite(x):
        _raise_at_first_failure(f, x0, grid, stepper)
    return Solution(torch.stack(states) if inside is None else torch.cat(inside.states), list(grid.nodes), path)


def _cast(dt: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return dt.to(dtype) if isinstance(dt, Tensor) else dt


def _stage_times(f: VectorField, grid: Grid, stepper: Stepper, x: Tensor) -> list[Sequence[Tensor | None]]:
    """Returns t_i + c_j dt_i for every step, in the state's dtype: one tensor for all steps that carry no gradient."""
    n, c = len(grid.nodes) - 1, stepper.nodes
    if not (getattr(f, "timed", True) or stepper.timed):
        return [(None,) * len(c)] * n
    left, sizes = [grid.left(i) for i in range(n)], [grid.size(i) for i in range(n)]
    size = [dt.double() if isinstance(dt, Tensor) else dt for dt in sizes]  # the sum is rounded once
    numbers = not isinstance(c[0], Tensor)
    plain = [i for i in range(n) if numbers and isinstance(left[i], float) and isinstance(size[i], float)]
    flat = [left[i] + cj * size[i] for i in plain for cj in c]
    views = torch.tensor(flat, dtype=x.dtype, device=x.device).unbind() if flat else ()
    times: list[Sequence[Tensor | None]] = [()] * n
    for k, i in enumerate(plain):
        times[i] = views[k * len(c) : (k + 1) * len(c)]
    for i in range(n):
        if not times[i]:
            times[i] = [torch.as_tensor(left[i] + cj * size[i]).to(x) for cj in c]
    return times


def _is_finite(x: Tensor) -> bool:
    """Returns whether all entries are finite. A sum may overflow while its terms are finite: it is a first, cheap look."""
    try:
        return math.isfinite(x.detach().sum().item()) or bool(torch.isfinite(x).all())
    except RuntimeError:  # under vmap there is no value to look at
        return True


def _check_shape(x: Tensor, stages: Sequence[Tensor]) -> None:
    if stages and stages[0] is not None and stages[0].shape != x.shape:
        raise ValueError(
            f"the vector field returned the shape {tuple(stages[0].shape)} for a state of shape {tuple(x.shape)}; "
            "it must return the time derivative of each entry of the state"
        )


def _raise_at_first_failure(f: VectorField, x: Tensor, grid: Grid, stepper: Stepper) -> None:
    """Walks the grid again, without gradient, to name the step that failed."""
    with torch.no_grad():
        if not _is_finite(x):
            raise ValueError("the initial state x holds NaN or infinite entries; check the data or the layer before")
        times = _stage_times(f, grid, stepper, x)
        for i in range(len(grid.nodes) - 1):
            x, _ = stepper.step(f, x, times[i], float(grid.size(i)))
            if not _is_finite(x):
                break
    raise IntegrationError(
        f"the state is not finite after step {i + 1} of {len(grid.nodes) - 1}, from t = {grid.nodes[i]:.6g} to "
        f"{grid.nodes[i + 1]:.6g} ({stepper.name}, last time {grid.nodes[-1]:.6g}); "
        "the field returned NaN or infinity, or the solution blows up: lower the learning rate or the interval, "
        "or take shorter steps",
        time=grid.nodes[i],
        step=i + 1,
        solver=stepper.name,
    )


# ------------------------------------------------------------------------------------------------- adaptive steps


def _adaptive(f, x, grid, stepper, atol, rtol, interpolator, error_size, max_steps, record) -> Solution:
    nodes, n = grid.nodes, len(grid.nodes) - 1
    keep = (grid.keep or [True] * (n + 1)) if grid.dense is None else [False] * (n + 1)
    inside = None if grid.dense is None else InsideSteps(grid.dense, stepper.interpolant, x)
    direction = 1.0 if nodes[-1] > nodes[0] else -1.0
    timed = getattr(f, "timed", True) or stepper.timed
    t = nodes[0]

    def tensor(t: float | Tensor) -> Tensor:  # a number straight to the state's type: torch's default has fewer digits
        return t.to(x) if isinstance(t, Tensor) else torch.tensor(t, dtype=x.dtype, device=x.device)

    k1 = f(tensor(grid.left(0)) if timed else None, x)
    _check_shape(x, [k1])
    if not _is_finite(k1):
        if not _is_finite(x):
            raise ValueError("the initial state x holds NaN or infinite entries; check the data or the layer before")
        raise _failure("the vector field is not finite", t, 0, stepper, grid)

    def norm(*tensors: Tensor) -> float:
        seen = tensors if error_size is None else [v[:error_size] for v in tensors]
        return error_norm(*seen, atol=atol, rtol=rtol).item()

    def time(passed: float) -> Tensor | None:
        return tensor(nodes[0] + direction * passed) if timed else None

    length = abs(nodes[-1] - t)
    with torch.no_grad():
        h = first_step(f, x.detach(), k1.detach(), time, direction, length, stepper.order, norm)
    states = [x] if keep[0] else []
    steps, path, accepted = [t], [], 0
    # With an interpolator only the end is landed on; the points between are read off the step that passes them.
    target = n if interpolator is not None else 1
    passed = 1
    for _ in range(max_steps):
        remaining = abs(nodes[target] - t)
        lands = h >= remaining
        size = remaining if lands else h
        if size <= 4 * torch.finfo(torch.float64).eps * max(abs(t), abs(nodes[-1])) and not lands:
            raise _failure(f"the step size fell to {size:.3g}", t, accepted + 1, stepper, grid)
        t_new = nodes[target] if lands else t + direction * size
        step_grid = Grid(
            [t, t_new],
            grid.start if accepted == 0 else None,
            grid.end if lands and target == n else None,
        )
        times = _stage_times(f, step_grid, stepper, x)[0]
        x_new, stages = stepper.step(f, x, times, _cast(step_grid.size(0), x.dtype), k1)
        with torch.no_grad():
            error = stepper.error([None if k is None else k.detach() for k in stages], t_new - t)
            ratio = norm(error, x.detach(), x_new.detach())
        if ratio <= 1.0:
            if record:
                path.append((t, x, k1))
            if inside is not None:
                inside.passed((t, t_new), step_grid.left(0), step_grid.size(0), x, x_new, stages)
            if interpolator is not None:
                passed = _interpolate(interpolator, passed, nodes, keep, states, step_grid, x, x_new, stages)
            t, x, accepted = t_new, x_new, accepted + 1
            k1 = stages[-1] if stepper.first_same_as_last else None
            steps.append(t)
            if lands:
                if keep[target]:
                    states.append(x)
                if target == n:
                    break
                target += 1
        grown = size * factor(ratio, stepper.order)
        # A step cut short to land on a point says little about the step that the field allows.
        h = max(h, grown) if lands and ratio <= 1.0 else grown
    else:
        raise _failure(f"no end after {max_steps} steps", t, max_steps, stepper, grid)
    if record:
        path.append((t, x, k1))
    if not _is_finite(x):
        raise _failure("the state is not finite", t, accepted, stepper, grid)
    return Solution(torch.stack(states) if inside is None else torch.cat(inside.states), steps, path)


def _failure(what: str, t: float, step: int, stepper: Stepper, grid: Grid) -> IntegrationError:
    return IntegrationError(
        f"{what} at t = {t:.6g} (step {step}, {stepper.name}, last time {grid.nodes[-1]:.6g}); the field is not finite "
        "there, too stiff, or the solution blows up: lower the learning rate or the interval, or loosen the tolerances",
        time=t,
        step=step,
        solver=stepper.name,
    )


def _interpolate(interpolator, passed, nodes, keep, states, step, x, x_new, stages) -> int:
    """Appends the kept interior points that lie within the step, and returns the next point's index."""
    low, high = sorted(step.nodes)
    coefficients = None
    while passed < len(nodes) - 1 and low <= nodes[passed] <= high:
        if keep[passed]:
            if coefficients is None:
                # The step's ends as tensors where they carry a gradient: a point inside moves relative to them.
                t, dt = step.left(0), step.size(0)
                t, dt = (v.to(x.dtype) if isinstance(v, Tensor) else v for v in (t, dt))
                middle = x + dt * sum(float(b) * k for b, k in zip(interpolator.bmid, stages, strict=True))
                coefficients = interpolator.fit(dt, stages[0], stages[-1], x, x_new, middle)
            states.append(interpolator.evaluate(coefficients, t, t + dt, nodes[passed]))
        passed += 1
    return passed


# ------------------------------------------------------------------------------------------------- a recorded path


class Path:
    """A recorded path as a function of time: piecewise cubic Hermite through its states and derivatives."""

    def __init__(self, path: list[tuple[float, Tensor, Tensor | None]], f: VectorField):
        self._points = path if path[0][0] < path[-1][0] else path[::-1]
        self._times = [t for t, _, _ in self._points]
        self._f = f
        self._slopes: list[Tensor | None] = [k for _, _, k in self._points]

    def _slope(self, i: int) -> Tensor:
        slope = self._slopes[i]
        if slope is None:
            t, x, _ = self._points[i]
            slope = self._slopes[i] = self._f(x.new_tensor(t), x)
        return slope

    def __call__(self, t: float) -> Tensor:
        i = min(max(bisect.bisect_right(self._times, t), 1), len(self._times) - 1)
        (t0, x0, _), (t1, x1, _) = self._points[i - 1], self._points[i]
        h = t1 - t0
        s = (t - t0) / h
        x = x0 * ((1 + 2 * s) * (1 - s) ** 2) + x1 * (s * s * (3 - 2 * s))
        return x.add_(self._slope(i - 1), alpha=h * s * (1 - s) ** 2).add_(self._slope(i), alpha=h * s * s * (s - 1))
