r"""What a trained model is: how far its solver is from its ODE, and what an optimal-control eye sees along its path.

The Hamiltonian, with Phi the loss as a function of z(t_f), w the price of time, and L the running cost,

    H(t) = p(t) f(t, z(t)) + L(t, z(t)) + w,        p = d(Phi + int L dt)/dz,                     eq. (21)

is constant along the path of every autonomous field, whether its parameters are optimal or not, and 0 where t_f is
optimal, since H(t_f) is the derivative of Phi + int L dt + w t_f in t_f: eq. (27).
"""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from torchdyn_mintime.evaluation import Loss, as_batches, as_number, mean_loss, only_span, rest_of, substituted
from torchdyn_mintime.numerics.integrate import Grid, integrate
from torchdyn_mintime.numerics.steppers import AsynchronousLeapfrog
from torchdyn_mintime.reference import TOLERANCE, position, reference_end, reference_solution, relative_error
from torchdyn_mintime.secondary import evaluating, last_solve, undisturbed, untraced
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import named_spans, spans

__all__ = [
    "Hamiltonian",
    "Profile",
    "Report",
    "SpanReport",
    "hamiltonian",
    "loss_profile",
    "path_ratio",
    "report",
    "skipped",
    "solved_exactly",
    "solver_error",
]


@torch.no_grad()
def solver_error(model: nn.Module, x: Tensor, tolerance: float = TOLERANCE) -> float:
    """How far the model's solver is from the ODE that its field describes.

    The model is called in eval mode. For each of its spans, the state z(t_f) is compared with z*(t_f), the end of a
    solve from the same initial state over the same interval in float64, by dopri5 at ``tolerance``, with the data
    control and noise of the first solve:

        rms(z(t_f) - z*(t_f)) / rms(z*(t_f)),

    rms being the root of the mean square over all entries, a running cost or log-density in the state included.
    Nothing of the model is changed or copied. A field that cannot be evaluated in float64 is evaluated in its own type,
    and only the solve is in float64.

    Args:
        model: a LearnableSpan, or a module that holds some.
        x: what it is called with.
        tolerance: absolute and relative, of the reference solve.

    Returns:
        That figure, a pure number; the largest where there are several spans.

    Raises:
        ValueError: ``model`` has no LearnableSpan.
        IntegrationError: the solve, or the reference solve, failed.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Tanh(), solver="rk4"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> 0 < solver_error(span, torch.randn(8, 2)) < 1e-2
        True
    """
    with evaluating(model), undisturbed(model):
        return max(relative_error(span, tolerance) for span in solved_spans(model, x))


def solved_spans(model: nn.Module, x: Tensor) -> list[LearnableSpan]:
    """Calls ``model`` and returns those of its spans that this call has solved; to be called inside ``undisturbed``."""
    found = list(spans(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no LearnableSpan; wrap it first: torchdyn_mintime.wrap(model)")
    before = [span._last for span in found]
    model(x)
    solved = [span for span, last in zip(found, before, strict=True) if span._last is not last]
    if not solved:
        raise ValueError(f"calling {type(model).__name__} solved none of its LearnableSpans")
    return solved


# ------------------------------------------------------------------------------- the solve replaced by something else


def solved_exactly(
    model: nn.Module, batches: Iterable[Any], loss: Loss, accuracy: Loss | None = None, tolerance: float = TOLERANCE
) -> tuple[float, float | None]:
    """Loss and accuracy with every span solved in float64 at ``tolerance`` instead of by its own solver.

    The same call as :func:`mean_loss` otherwise, in eval mode. A model that looks at more than the last point of a
    trajectory sees that one alone.

    Returns:
        (loss, accuracy), the latter None without a function for it.
    """

    def exact(span: LearnableSpan, x: Tensor) -> Tensor:
        span(x)  # binds the field to this x: data control, noise
        state = last_solve(span).states[-1]
        end = reference_end(span, tolerance).to(state.dtype)
        return torch.cat([end, state.chunk(2, -1)[1]], -1) if isinstance(span._stepper, AsynchronousLeapfrog) else end

    return _with_solves(model, batches, loss, accuracy, exact)


def skipped(
    model: nn.Module, batches: Iterable[Any], loss: Loss, accuracy: Loss | None = None
) -> tuple[float, float | None]:
    """Loss and accuracy with every ODE skipped: z(t_f) is z(t0). What the rest of the model does by itself.

    Returns:
        (loss, accuracy), the latter None without a function for it.
    """
    return _with_solves(model, batches, loss, accuracy, lambda span, x: x)


def _with_solves(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    accuracy: Loss | None,
    solve: Callable[[LearnableSpan, Tensor], Tensor],
) -> tuple[float, float | None]:
    prepared, found = as_batches(batches), list(spans(model))

    def replaced(span: LearnableSpan) -> Callable[[Tensor], Tensor]:
        own = span.forward

        def end(x: Tensor) -> Tensor:
            now, span.forward = span.forward, own  # type: ignore[method-assign]
            try:
                return solve(span, x)
            finally:
                span.forward = now  # type: ignore[method-assign]

        return end

    with evaluating(model), undisturbed(model), ExitStack() as stack:
        for span in found:
            stack.enter_context(substituted(span, replaced(span)))
        values = mean_loss(model, prepared, loss, () if accuracy is None else (accuracy,))
    return values[0], values[1] if accuracy is not None else None


# ------------------------------------------------------------------------------------------------- along the trajectory


@dataclass(frozen=True)
class Profile:
    """Loss against time: what the loss would be, did the span end earlier (figure 1a).

    Attributes:
        times: ``[points]`` from t0 to t_f.
        loss: ``[points]``, mean over the batches.
        accuracy: ``[points]``, or None.
    """

    times: Tensor
    loss: Tensor
    accuracy: Tensor | None = None

    @property
    def rate(self) -> float:
        """The largest kappa with loss(t) <= loss(t0) exp(-kappa (t - t0)) at every point, per unit of time.

        The rate of exponential convergence that the mean loss held; negative where it rose above its start, and minus
        infinity where it started at 0 and did not stay there.
        """
        first, later = self.loss[0], self.loss[1:]
        rates = (first / later).log() / (self.times[1:] - self.times[0])
        return rates.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).min().item()


@torch.no_grad()
def loss_profile(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    accuracy: Loss | None = None,
    *,
    span: LearnableSpan | None = None,
    points: int = 101,
) -> Profile:
    """The loss along the model's own trajectory, in eval mode: the rest of the model is applied to every state.

    Args:
        model: a LearnableSpan, or a module that holds some.
        batches: of ``x`` or ``(x, *target)``.
        loss, accuracy: ``function(output, *target)``, the mean over a batch; of a span itself the output is z(t).
        span: which one, if the model has several; the others are solved to their ends.
        points: equal parts of the interval and one, of an adaptive solver; of a fixed-step one its own steps are taken.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 1, 5))
        Your vector field ...
        >>> profile = loss_profile(span, [torch.ones(8, 2)], lambda z: z.square().mean())  # exp(-2 t)
        >>> profile.times.tolist(), round(profile.rate, 2)
        ([0.0, 0.25, 0.5, 0.75, 1.0], 2.0)
    """
    prepared, target_span = as_batches(batches), only_span(model, span)
    functions = [loss] if accuracy is None else [loss, accuracy]
    totals, count, nodes = torch.zeros((), dtype=torch.float64), 0, [0.0]
    with evaluating(model), undisturbed(model):
        for x, *target in prepared:
            model(x)
            last, node = last_solve(target_span), target_span.node
            first, end = last.steps[0], last.steps[-1]
            nodes = _even(first, end, points) if target_span.adaptive else last.steps
            with untraced(last.bound):
                states = integrate(
                    last.bound.function, last.x, Grid(nodes), target_span._stepper, atol=node.atol, rtol=node.rtol
                ).states
            rows = []
            for state in states:
                output = rest_of(model, target_span, state, x)
                rows.append([as_number(f(output, *target), "the loss or accuracy") for f in functions])
            totals = totals + torch.tensor(rows, dtype=torch.float64) * len(x)
            count += len(x)
    values = totals / count
    times = torch.tensor(nodes, dtype=torch.float64)
    return Profile(times, values[:, 0], values[:, 1] if accuracy is not None else None)


def _even(first: float, last: float, points: int) -> list[float]:
    return [first + (last - first) * k / (points - 1) for k in range(points - 1)] + [last]


@torch.no_grad()
def path_ratio(model: nn.Module, x: Tensor, *, span: LearnableSpan | None = None, points: int = 101) -> float:
    """Length of the paths over the straight distance between their ends, 1 at least: the mean of both over the batch.

    Of the ODE's own paths, not of the solver's points (which few steps draw straight): a reference solve at ``points``
    times. Infinite where no sample moves from its start.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> span = LearnableSpan(NeuralODE(lambda t, z: z @ turn, solver="rk4"), torch.linspace(0, 3.14159, 9))
        Your vector field ...
        >>> round(path_ratio(span, torch.randn(8, 2)), 3)  # half a circle: pi / 2
        1.571
    """
    target_span = only_span(model, span)
    with evaluating(model), undisturbed(model):
        model(x)
        last = last_solve(target_span)
        with untraced(last.bound):
            times = _even(last.steps[0], last.steps[-1], points)
            path = reference_solution(last.bound, position(target_span, last.x), times)
    path = path.flatten(2) if path.dim() > 2 else path[:, None]
    length = path.diff(dim=0).norm(dim=2).sum()
    distance = (path[-1] - path[0]).norm(dim=1).sum()
    return (length / distance).item()


@dataclass(frozen=True)
class Hamiltonian:
    """The Hamiltonian of eq. (21) along the steps that the solver took, summed over the batch.

    Constant for any autonomous model, trained or not: its drift shows the solver's error and nothing else. Only its
    distance from 0 at a free t_f speaks of optimality, and there of t_f alone.

    Attributes:
        times: ``[points]``.
        values: ``[points]``, loss per unit of time; the last one is the derivative of the whole loss in t_f.
    """

    times: Tensor
    values: Tensor

    @property
    def drift(self) -> float:
        """Largest less smallest value."""
        return (self.values.max() - self.values.min()).item()

    @property
    def at_end(self) -> float:
        """H(t_f), 0 where a free t_f is optimal."""
        return self.values[-1].item()


def hamiltonian(
    model: nn.Module,
    x: Tensor,
    loss: Loss,
    *target: Any,
    weight: float = 0.0,
    span: LearnableSpan | None = None,
) -> Hamiltonian:
    """The Hamiltonian along the model's own steps, in eval mode.

    p is the gradient of the loss in the state at each step, taken step by step backwards through the solver (the
    discrete adjoint); the steps of an adaptive solver are held. A running cost that the state carries
    (``integral_loss`` under autograd) counts as far as ``loss`` uses it; under an adjoint, where torchdyn adds its
    integral over the batch to every loss, it is L.

    Args:
        model: a LearnableSpan, or a module that holds some.
        x: what it is called with.
        loss: ``loss(output, *target)``; of a span itself the output is z(t_f).
        target: further arguments of the loss.
        weight: the price of time, eq. (13): loss per unit of time.
        span: which one, if the model has several.

    Raises:
        ValueError: there is no such span, or its solver is alf, whose state holds more than that of the ODE.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 1, 21))
        Your vector field ...
        >>> h = hamiltonian(span, torch.ones(1, 1), lambda z: 0.5 * z.square().sum())  # -exp(-2), at any t
        >>> round(h.at_end, 4), h.drift < 1e-6
        (-0.1353, True)
    """
    chosen = only_span(model, span)
    if isinstance(chosen._stepper, AsynchronousLeapfrog):
        raise ValueError(
            "alf steps [z, v], which has no Hamiltonian of its own; use another solver, such as 'midpoint'"
        )
    with evaluating(model), undisturbed(model):
        with torch.no_grad():
            model(x)
        last = last_solve(chosen)
        with untraced(last.bound), torch.enable_grad():
            flow = _Augmented(chosen)
            states = flow.states()
            end = states[-1].detach().requires_grad_()
            value = torch.as_tensor(loss(rest_of(model, chosen, flow.state(end), x), *target))
            (p,) = torch.autograd.grad(value, end, allow_unused=True)
            p = torch.zeros_like(end) if p is None else p
            p = p + flow.cost_gradient
            values = [flow.rate(-1, end, p)]
            for i in range(len(states) - 2, -1, -1):
                z = states[i].detach().requires_grad_()
                (p,) = torch.autograd.grad(flow.step(i, z), z, p)
                values.append(flow.rate(i, z, p))
    times = torch.tensor(last.steps, dtype=torch.float64)
    return Hamiltonian(times, torch.tensor(values[::-1], dtype=torch.float64) + weight)


class _Augmented:
    """The last forward of a span, step by step; a running cost's integral is a further part of a flat state."""

    def __init__(self, span: LearnableSpan):
        last = last_solve(span)
        self.steps, self._stepper = last.steps, span._stepper
        self._field, self._shape, self._size = last.bound.function, last.x.shape, last.x.numel()
        self._cost: Callable | None = span.node.integral_loss if span.sensitivity != "autograd" else None
        self._start = last.x.detach().reshape(-1)
        if self._cost is not None:
            self._start = torch.cat([self._start, 0 * self._costs(last.steps[0], last.x).detach()])
        self.cost_gradient = torch.zeros_like(self._start)
        self.cost_gradient[self._size :] = 1.0

    def _costs(self, t: float | Tensor, z: Tensor) -> Tensor:
        assert self._cost is not None
        return self._cost(torch.as_tensor(t).to(z), z).reshape(-1)

    def state(self, y: Tensor) -> Tensor:
        return y[: self._size].view(self._shape)

    def _f(self, t: Tensor, y: Tensor) -> Tensor:
        z = self.state(y)
        dz = self._field(t, z).reshape(-1)
        return dz if self._cost is None else torch.cat([dz, self._costs(t, z)])

    def step(self, i: int, y: Tensor) -> Tensor:
        # All steps are held as they were taken, adaptive ones too.
        return integrate(self._f, y, Grid(self.steps[i : i + 2]), self._stepper, adapt=False).states[-1]

    def states(self) -> list[Tensor]:
        found = [self._start]
        with torch.no_grad():
            for i in range(len(self.steps) - 1):
                found.append(self.step(i, found[-1]))
        return found

    def rate(self, i: int, y: Tensor, p: Tensor) -> float:
        with torch.no_grad():
            return float((p * self._f(y.new_tensor(self.steps[i]), y.detach())).sum().double())


# ------------------------------------------------------------------------------------------------------ all in one


@dataclass(frozen=True)
class SpanReport:
    """What :func:`report` says of one span.

    Attributes:
        name: in its model; empty for the model itself.
        t_f, duration: units of time.
        steps, nfe: of a forward of the first batch.
        path_ratio: length of the ODE's paths over the straight distance.
        profile: loss against time; ``profile.rate`` is the rate of convergence that held.
        hamiltonian: along the steps, on the first batch; None for alf.
    """

    name: str
    t_f: float
    duration: float
    steps: int
    nfe: int
    path_ratio: float
    profile: Profile
    hamiltonian: Hamiltonian | None


@dataclass(frozen=True)
class Report:
    """What :func:`report` found. A figure that was not asked for is None.

    Attributes:
        spans: each span of the model.
        nfe: evaluations of the field in a forward, all spans together.
        solver_error: on the first batch.
        loss, accuracy: (as the model is, solved at tolerance 1e-7, with the ODE skipped), means over the batches.
        weight: the price of time that the Hamiltonian counts.
    """

    spans: tuple[SpanReport, ...]
    solver_error: float
    loss: tuple[float, float, float]
    accuracy: tuple[float, float, float] | None
    weight: float

    @property
    def nfe(self) -> int:
        return sum(span.nfe for span in self.spans)

    def __rich__(self) -> Table:
        table = Table(title="neural ODE report", show_header=True, header_style="")
        for column in ("", "as it is", "solved at 1e-7", "ODE skipped"):
            table.add_column(column, justify="left" if not column else "right")
        table.add_row("loss", *(f"{v:.4g}" for v in self.loss))
        if self.accuracy is not None:
            table.add_row("accuracy", *(f"{v:.2%}" for v in self.accuracy))
        table.add_row("solver error", f"{self.solver_error:.2g}", "", "")
        for span in self.spans:
            of = f" of {span.name}" if span.name else ""
            table.add_section()
            table.add_row(f"t_f{of}", f"{span.t_f:.4g}")
            table.add_row("steps, evaluations", f"{span.steps}, {span.nfe}")
            table.add_row("path over distance", f"{span.path_ratio:.3g}")
            table.add_row("rate of convergence held", f"{span.profile.rate:.3g}")
            if span.hamiltonian is not None:
                table.add_row("Hamiltonian at t_f (0: t_f optimal)", f"{span.hamiltonian.at_end:.3g}")
                table.add_row("its drift (solver error)", f"{span.hamiltonian.drift:.2g}")
        return table


def report(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    accuracy: Loss | None = None,
    *,
    weight: float = 0.0,
    console: Console | None = None,
) -> Report:
    """All figures of this module for one model, printed as a table and returned. The model is left as it was.

    The Hamiltonian is constant for every autonomous model, so that its drift shows solver error alone; only its
    distance from 0 at a free t_f speaks of optimality. What a model reaches with the ODE skipped is no merit of it.

    Args:
        model: a LearnableSpan, or a module that holds some.
        batches: of ``x`` or ``(x, *target)``.
        loss: ``loss(output, *target)``, the mean over a batch; of a span itself the output is z(t_f).
        accuracy: likewise, or any other figure between 0 and 1.
        weight: the price of time in the training loss, eq. (13).
        console: where to print; ``Console(quiet=True)`` prints nothing.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 1, 5))
        Your vector field ...
        >>> found = report(span, [torch.ones(8, 2)], lambda z: z.square().mean(), console=Console(quiet=True))
        >>> found.nfe, [round(value, 3) for value in found.loss]
        (16, [0.135, 0.135, 1.0])
    """
    prepared = as_batches(batches)
    x, *target = prepared[0]
    error = solver_error(model, x)
    with evaluating(model):
        with undisturbed(model), torch.no_grad():
            found = solved_spans(model, x)
            chosen = {name: span for name, span in named_spans(model) if span in found}
            counts = {name: (span.steps, span.nfe) for name, span in chosen.items()}
            own = mean_loss(model, prepared, loss, () if accuracy is None else (accuracy,))
        exact, without = solved_exactly(model, prepared, loss, accuracy), skipped(model, prepared, loss, accuracy)
        parts = []
        for name, span in chosen.items():
            alf = isinstance(span._stepper, AsynchronousLeapfrog)
            parts.append(
                SpanReport(
                    name,
                    span.t_f.item(),
                    span.duration.item(),
                    *counts[name],
                    path_ratio(model, x, span=span),
                    loss_profile(model, prepared, loss, accuracy, span=span),
                    None if alf else hamiltonian(model, x, loss, *target, weight=weight, span=span),
                )
            )
    accuracies = None
    if exact[1] is not None and without[1] is not None:
        accuracies = (own[1], exact[1], without[1])
    result = Report(tuple(parts), error, (own[0], exact[0], without[0]), accuracies, weight)
    (console or Console()).print(result)
    return result
