r"""Measures a trained model: how far its solver is from its ODE, its loss along the path, and its Hamiltonian.

The Hamiltonian, with Phi the loss as a function of z(t_f), w the price of time, and L the running cost,

    H(t) = p(t) f(t, z(t)) + L(t, z(t)) + w,        p = d(Phi + int L dt)/dz,                     eq. (21)

is constant along the path of every autonomous field, whether its parameters are optimal or not, and 0 where t_f is
optimal, since H(t_f) is the derivative of Phi + int L dt + w t_f in t_f: eq. (27). Its derivative in the parameters is 0 at
every time where parameters that may change with time are optimal: eq. (24).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from torchdyn_mintime.core import (
    LearnableSpan,
    Loss,
    as_batches,
    as_number,
    check_end_alone,
    evaluate_with_reference,
    evaluate_without_ode,
    evaluating,
    last_solve,
    mean_loss,
    named_spans,
    only_span,
    position,
    reference_solution,
    rest_of,
    solve_of_samples,
    solved_spans,
    solver_error,
    undisturbed,
    untraced,
)
from torchdyn_mintime.losses.trajectory import own_entries, recorded
from torchdyn_mintime.numerics import AsynchronousLeapfrog, Grid, integrate, with_running_cost
from torchdyn_mintime.numerics.step_control import rms

__all__ = [
    "Hamiltonian",
    "Profile",
    "Report",
    "SpanReport",
    "Stationarity",
    "Turnpike",
    "evaluate_with_reference",
    "evaluate_without_ode",
    "hamiltonian",
    "loss_profile",
    "path_ratio",
    "report",
    "skipped",
    "solved_exactly",
    "solver_error",
    "stationarity",
    "turnpike",
]

solved_exactly, skipped = evaluate_with_reference, evaluate_without_ode  # the names of older versions


# ------------------------------------------------------------------------------------------------- along the trajectory


@dataclass(frozen=True)
class Profile:
    """Loss against time: what the loss would be if the span ended earlier (figure 1a).

    Attributes:
        times: ``[points]`` from the start of the solve to its end: from t0 to t_f, unless the model asks for less, or for
            the way back.
        loss: ``[points]``, the mean over the batches.
        accuracy: ``[points]``, or None.
    """

    times: Tensor
    loss: Tensor
    accuracy: Tensor | None = None

    @property
    def rate(self) -> float:
        """The largest kappa with loss(t) <= loss(t0) exp(-kappa (t - t0)) at every point, per unit of time.

        The rate of exponential convergence that the mean loss held; negative where it rose above its start, infinite where it
        was never above 0 after that, and minus infinity where it started at 0 and rose. A loss that starts below 0, as a
        negative log-likelihood may, has no such rate: NaN.
        """
        first, later = self.loss[0], self.loss[1:]
        if first < 0:
            return math.nan
        rates = (first / later).log() / (self.times[1:] - self.times[0]).abs()
        rates = torch.where(later <= 0, math.inf, rates)
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
    """Returns the loss along the model's own trajectory, in eval mode: the rest of the model is applied to every state.

    Args:
        model: a LearnableSpan, or a module that holds some.
        batches: of ``x`` or ``(x, *target)``.
        loss, accuracy: ``function(output, *target)``, the mean over a batch; of a span itself the output is z(t).
        span: which one, if the model has several; the others are solved to their ends.
        points: how many times, evenly spread, for an adaptive solver. A fixed-step solver takes its own steps.

    Raises:
        ValueError: there is no such span, or the model uses more of its trajectory than the last state.

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
    with evaluating(model), undisturbed(model):
        check_end_alone(model, target_span, prepared[0][0])
    totals, count, nodes = torch.zeros((), dtype=torch.float64), 0, [0.0]
    with evaluating(model), undisturbed(model):
        for x, *target in prepared:
            model(x)
            last, node = last_solve(target_span), target_span.node
            nodes, stepper = _even(last.seen, points) if target_span.adaptive else last.seen, target_span.stepper
            # A solver that lands on so many points is better than the model's own: its steps are held where it can.
            held = stepper.adaptive and stepper.interpolant is not None
            grid = Grid(last.steps, dense=nodes) if held else Grid(nodes)
            with untraced(last.bound):
                states = integrate(
                    last.bound.function, last.x, grid, stepper, atol=node.atol, rtol=node.rtol, adapt=not held
                ).states
            outputs = (rest_of(model, target_span, state, x) for state in states)
            rows = [[as_number(f(output, *target), "the loss or accuracy") for f in functions] for output in outputs]
            totals = totals + torch.tensor(rows, dtype=torch.float64) * len(x)
            count += len(x)
    values = totals / count
    times = torch.tensor(nodes, dtype=torch.float64)
    return Profile(times, values[:, 0], values[:, 1] if accuracy is not None else None)


def _even(steps: list[float], points: int) -> list[float]:
    return torch.linspace(steps[0], steps[-1], points, dtype=torch.float64).tolist()


@torch.no_grad()
def path_ratio(model: nn.Module, x: Tensor, *, span: LearnableSpan | None = None, points: int = 101) -> float:
    """Returns the length of the paths over the straight distance between their ends, 1 at least: means over the batch.

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
        last = solve_of_samples(target_span)
        with untraced(last.bound):
            path = reference_solution(last.bound, position(target_span, last.x), _even(last.seen, points))
        path = torch.stack([own_entries(last.bound, z) for z in path])
    path = path.reshape(*path.shape[:2], -1) if path.dim() > 1 else path[:, None, None]
    length = path.diff(dim=0).norm(dim=2).sum()
    distance = (path[-1] - path[0]).norm(dim=1).sum()
    return (length / distance).item() if length > 0 else math.inf  # 0 / 0 would be NaN


@dataclass(frozen=True)
class Hamiltonian:
    """The Hamiltonian of eq. (21) along the steps that the solver took, summed over the batch.

    Constant for any autonomous model, trained or not: its drift shows the solver's error and nothing else. Only its
    distance from 0 at a free t_f speaks of optimality, and there of t_f alone.

    Attributes:
        times: ``[points]``, ascending.
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
    """Returns the Hamiltonian along the model's own steps, in eval mode.

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
        ValueError: there is no such span, its solver is alf, whose state holds more than that of the ODE, or the model uses
            more, or something else, of the trajectory than its end.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 1, 21))
        Your vector field ...
        >>> h = hamiltonian(span, torch.ones(1, 1), lambda z: 0.5 * z.square().sum())  # -exp(-2), at any t
        >>> round(h.at_end, 4), h.drift < 1e-6
        (-0.1353, True)
    """
    with _costates(model, x, loss, *target, span=span) as path, torch.no_grad():
        values = [path.sign * float((p * path.field(y.new_tensor(t), y)).sum().double()) for t, y, p in path.points]
    times, order = torch.tensor([t for t, _, _ in path.points], dtype=torch.float64).sort()
    return Hamiltonian(times, torch.tensor(values, dtype=torch.float64)[order] + weight)


@dataclass(frozen=True)
class _Path:
    """A solve with its costates.

    Attributes:
        field: f(t, y) of the states below, which hold a running cost where an adjoint counts one.
        points: (t, y, p) at the model's own steps, from the end of the solve to its start.
        sign: of dz per unit of the interval's length.
        parameters: of the field, those that require gradients.
    """

    field: Callable[[Tensor, Tensor], Tensor]
    points: list[tuple[float, Tensor, Tensor]]
    sign: float
    parameters: list[nn.Parameter]


@contextmanager
def _costates(
    model: nn.Module, x: Tensor, loss: Loss, *target: Any, span: LearnableSpan | None = None
) -> Iterator[_Path]:
    """Gives the states and the discrete costates along the model's own steps, in eval mode; the field is for use inside."""
    chosen = only_span(model, span)
    if isinstance(chosen.stepper, AsynchronousLeapfrog):
        raise ValueError(
            "alf steps [z, v], which has no Hamiltonian of its own; use another solver, such as 'midpoint'"
        )
    # In inference mode autograd records nothing, and outside it, it does not take the tensors that were made there.
    with torch.inference_mode(False), evaluating(model), undisturbed(model):
        x, *targets = map(recorded, (x, *target))
        check_end_alone(model, chosen, x)
        with torch.no_grad():
            model(x)
        last = solve_of_samples(chosen)
        if not last.reaches_end:
            raise ValueError(
                f"the model looks at z(t) up to a time before the end {last.steps[-1]:g} of the solve alone, so that its loss "
                "does not depend on t_f; ask for the end too"
            )
        with untraced(last.bound), torch.enable_grad():
            running_cost = chosen.node.integral_loss if chosen.sensitivity != "autograd" else None
            f, start = with_running_cost(last.bound.function, running_cost, last.x.detach(), last.steps[0])

            def solve(y: Tensor, steps: list[float]) -> Tensor:
                return integrate(f, y, Grid(steps), chosen.stepper, adapt=False).states

            with torch.no_grad():
                states = solve(start, last.steps)
            end, size = states[-1].requires_grad_(), last.x.numel()
            value = torch.as_tensor(loss(rest_of(model, chosen, end[:size].view_as(last.x), x), *targets))
            (p,) = torch.autograd.grad((value, end[size:].sum()), end)
            points = [(last.steps[-1], end.detach(), p)]
            for i in range(len(states) - 2, -1, -1):
                z = states[i].requires_grad_()
                (p,) = torch.autograd.grad(solve(z, last.steps[i : i + 2])[-1], z, p)
                points.append((last.steps[i], z.detach(), p))
            parameters = [each for each in chosen.vf.parameters() if each.requires_grad]
            yield _Path(f, points, 1.0 if last.steps[-1] > last.steps[0] else -1.0, parameters)


@dataclass(frozen=True)
class Stationarity:
    r"""How far the field's parameters are from a minimum of the Hamiltonian at each time: eq. (24), to first order.

    The derivative of H(t) in the parameters is 0 at every time where parameters that could change with time are optimal.
    The parameters of a neural ODE are the same at all times, and at their optimum only the integral is 0: it is the gradient
    of the loss. What is left of the derivative then is what parameters that change with time could gain.

    Attributes:
        times: ``[points]``, ascending.
        gradient: dH/dtheta at these times, ``[points, parameters]``: loss per unit of time and of parameter.
    """

    times: Tensor
    gradient: Tensor

    @property
    def norms(self) -> Tensor:
        """The norm of dH/dtheta at each time, ``[points]``."""
        return self.gradient.norm(dim=1)

    @property
    def total(self) -> float:
        """The norm of the integral of dH/dtheta over time, by trapezoids: that of the loss's gradient in the parameters."""
        return torch.trapezoid(self.gradient, self.times, dim=0).norm().item()

    @property
    def imbalance(self) -> float:
        """The integral of the norm less :attr:`total`, over the integral: 0 where dH/dtheta is the same at all times, 1 where
        the parameters are optimal as they are, shared over time, and would be better if they changed with it. NaN where
        dH/dtheta is 0 everywhere, as eq. (24) asks."""
        whole = torch.trapezoid(self.norms, self.times).item()
        return math.nan if whole == 0 else 1 - self.total / whole


def stationarity(
    model: nn.Module, x: Tensor, loss: Loss, *target: Any, span: LearnableSpan | None = None
) -> Stationarity:
    """Returns the derivative of the Hamiltonian in the field's parameters along the model's own steps, in eval mode.

    The costate is that of :func:`hamiltonian`, and so are the arguments and the errors. A running cost counts as there.

    Args:
        model: a LearnableSpan, or a module that holds some.
        x: what it is called with.
        loss: ``loss(output, *target)``; of a span itself the output is z(t_f).
        target: further arguments of the loss.
        span: which one, if the model has several.

    Raises:
        ValueError: as :func:`hamiltonian`, or no parameter of the field requires a gradient.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Linear(1, 1), solver="rk4"), torch.linspace(0, 1, 21))
        Your vector field ...
        >>> found = stationarity(span, torch.ones(8, 1), lambda z: z.square().mean())
        >>> found.gradient.shape, bool(found.total > 0)
        (torch.Size([21, 2]), True)
    """
    with _costates(model, x, loss, *target, span=span) as path, torch.enable_grad():
        if not path.parameters:
            raise ValueError("no parameter of the field requires a gradient, so that eq. (24) says nothing of it")
        rows = []
        for t, y, p in path.points:
            value = path.sign * (p * path.field(y.new_tensor(t), y)).sum()
            found = torch.autograd.grad(value, path.parameters, allow_unused=True)
            parts = zip(found, path.parameters, strict=True)
            rows.append(torch.cat([(torch.zeros_like(q) if g is None else g).flatten().double() for g, q in parts]))
    times, order = torch.tensor([t for t, _, _ in path.points], dtype=torch.float64).sort()
    return Stationarity(times, torch.stack(rows)[order])


@dataclass(frozen=True)
class Turnpike:
    """How long the states rest on their way.

    On a turnpike the solution of an optimal control problem spends most of a long interval near a point where nothing moves:
    what comes after is depth that does nothing.

    Attributes:
        times: ``[points]``, in the order of the solve.
        speed: the root of the mean square of f over all entries of the state, at these times, ``[points]``.
    """

    times: Tensor
    speed: Tensor

    def share(self, tolerance: float = 0.1) -> float:
        """Returns the share of the interval on which the speed is below ``tolerance`` times its largest value.

        Between two points the speed is taken as linear in time.
        """
        bound = tolerance * self.speed.max()
        first, second = self.speed[:-1], self.speed[1:]
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        below = ((bound - low) / (high - low).clamp_min(torch.finfo(high.dtype).tiny)).clamp(0, 1)
        below = torch.where(high <= bound, torch.ones_like(below), below)
        lengths = self.times.diff().abs()
        return float((below * lengths).sum() / lengths.sum())


@torch.no_grad()
def turnpike(model: nn.Module, x: Tensor, *, span: LearnableSpan | None = None, points: int = 101) -> Turnpike:
    """Returns the speed of the states along the ODE's own solution, in eval mode: :meth:`Turnpike.share` is the measure.

    Args:
        model: a LearnableSpan, or a module that holds some.
        x: what it is called with.
        span: which one, if the model has several.
        points: at how many times, evenly spread.

    Raises:
        ValueError: there is no such span.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 10, 41))
        Your vector field ...
        >>> round(turnpike(span, torch.ones(4, 2)).share(0.1), 2)  # the speed exp(-t) is below a tenth from t = log(10) on
        0.77
    """
    target_span = only_span(model, span)
    with evaluating(model), undisturbed(model):
        model(x)
        last = solve_of_samples(target_span)
        times = _even(last.seen, points)
        start = position(target_span, last.x)
        with untraced(last.bound):
            states = reference_solution(last.bound, start, times)
            speeds = [
                rms(last.bound.function(start.new_tensor(t), z.to(start)).double())
                for t, z in zip(times, states, strict=True)
            ]
    return Turnpike(torch.tensor(times, dtype=torch.float64), torch.stack(speeds))


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
        hamiltonian: along the steps, on the first batch; None for alf, and where the model does not look at z(t_f).
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
        columns = (Column(name, justify="right") for name in ("as it is", "solved at 1e-7", "ODE skipped"))
        table = Table("", *columns, title="neural ODE report", header_style="")
        table.add_row("loss", *(f"{v:.4g}" for v in self.loss))
        if self.accuracy is not None:
            table.add_row("accuracy", *(f"{v:.2%}" for v in self.accuracy))
        table.add_row("solver error", f"{self.solver_error:.2g}", "", "")
        for span in self.spans:
            of = f" of {span.name}" if span.name else ""
            table.add_section()
            figures = {
                f"t_f{of}": f"{span.t_f:.4g}",
                "steps, evaluations": f"{span.steps}, {span.nfe}",
                "path over distance": f"{span.path_ratio:.3g}",
                "rate of convergence held": f"{span.profile.rate:.3g}",
            }
            if span.hamiltonian is not None:
                figures["Hamiltonian at t_f (0: t_f optimal)"] = f"{span.hamiltonian.at_end:.3g}"
                figures["its drift (solver error)"] = f"{span.hamiltonian.drift:.2g}"
            for name, value in figures.items():
                table.add_row(name, value)
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
    """Prints all figures of this module for one model as a table, and returns them. The model is left as it was.

    The Hamiltonian is constant for every autonomous model, so that its drift shows solver error alone; only its
    distance from 0 at a free t_f speaks of optimality. What a model reaches with the ODE skipped does not come from its ODE.

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
            counts = {name: (span.steps, span.nfe) for name, span in named_spans(model) if span in found}
            ending = {span for span in found if last_solve(span).reaches_end}
            own = mean_loss(model, prepared, loss, () if accuracy is None else (accuracy,))
        exact = evaluate_with_reference(model, prepared, loss, accuracy)
        without = evaluate_without_ode(model, prepared, loss, accuracy)
        parts = tuple(
            SpanReport(
                name,
                span.t_f.item(),
                span.duration.item(),
                *counts[name],
                path_ratio(model, x, span=span),
                loss_profile(model, prepared, loss, accuracy, span=span),
                None
                if isinstance(span.stepper, AsynchronousLeapfrog) or span not in ending
                else hamiltonian(model, x, loss, *target, weight=weight, span=span),
            )
            for name, span in named_spans(model)
            if name in counts
        )
    accuracies = None if exact[1] is None or without[1] is None else (own[1], exact[1], without[1])
    result = Report(parts, error, (own[0], exact[0], without[0]), accuracies, weight)
    (console or Console()).print(result)
    return result
