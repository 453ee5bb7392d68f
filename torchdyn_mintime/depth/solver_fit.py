r"""A solver fitted to a field that is trained already: few evaluations, and the same end.

The field f stays as it is. The coefficients of a LearnableSolver are learned, one step over the whole interval, such that it
ends where the ODE does: with z_s(x) its end from x and z*(x) that of the ODE, over some 1,000 states x,

    min over a, b, c of  sum_x |(z_s(x) - z*(x)) / scale|^2,    scale = rms(z*(x) - x),

by the method of Levenberg and Marquardt in float64. All derivatives are differences, which work for any field. For states of
few dimensions they are taken of the field at each stage, in each entry of the state and in time, and the chain rule gives the
rest: (d + 1) s evaluations for s stages and d entries. This needs a field that takes each row alone, which one difference of
the solve checks. Else they are taken of the solve, in each coefficient: s^3 / 6 + s^2 / 2 evaluations, since the stages before
the one that a coefficient moves stay. Those in b are known in closed form. A log-density in the state has a scale of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import (
    BoundField,
    Field,
    LearnableSpan,
    checks,
    cost_columns,
    evaluating,
    in_float64,
    random_kept,
    reference_solution,
    with_solver,
)
from torchdyn_mintime.depth.progress import progress_shown
from torchdyn_mintime.depth.trials import counted
from torchdyn_mintime.numerics import Grid, IntegrationError, LearnableSolver, Stepper, integrate, make_stepper
from torchdyn_mintime.numerics.step_control import rms

__all__ = ["EndError", "SolverFit", "fit_solver"]

ITERATIONS = 100
"""Iterations of Levenberg and Marquardt, at most."""

SETTLED = 1e-3
"""The fit ends where three iterations in a row each gain less than this share of the squared error."""

ENTRIES = 100_000
"""The squared error is taken over so many entries of the ends at most: the same ones, drawn at random, all along."""

BLOCK = 4_000_000
"""Derivatives of stages in coefficients that are held at once."""

MOST_SLOPES = 20_000_000
"""Derivatives of stages in states that are held at most."""

CHAINED = 0.05
"""How far, relatively, the chain rule may be from a difference of the solve. Both are differences, of other quantities."""

HELD_OUT = 4
"""One in so many states is held out of the fit."""


@dataclass(frozen=True)
class EndError:
    """How far ends are from the exact ones, relative to the displacement rms(z* - x), over states held out of the fit.

    Attributes:
        rms: root of the mean square over all entries.
        most: what 95 % of the states stay below, each with its own root of the mean square.
        worst: the largest of the states.
        log_density: for a flow, the root mean square error of its log-density (nats); else None.
    """

    rms: float
    most: float
    worst: float
    log_density: float | None = None


@dataclass(frozen=True)
class SolverFit:
    """A solver fitted to a field.

    Attributes:
        node: a ``NeuralODE`` over the same field, whose ``solver`` is the fitted one, frozen. It runs in plain torchdyn where
            the field does: one that takes the time needs the signature ``(t, x, args=None)``. Call it without a span, since
            it takes one step between any two points of the span it is given. Its ``t_span`` has two points, descending for
            ``inverse=True``. torchdyn's own nodes do not pass ``args`` on. Where the field takes some, or has the signature
            ``(t, x)``, solve by ``span = LearnableSpan(fit.node)`` and ``span(x, args=args)``. For ``inverse=True`` these
            are ``LearnableSpan(fit.node, fit.node.t_span.flip(0))``, since the times of a span ascend, and
            ``span(x, fit.node.t_span, args=args)``.
        evaluations: how often a solve evaluates the field.
        error: the error of the fitted solver, on states held out of the fit.
        others: that of stock solvers with as many evaluations, by name, where their number divides.
    """

    node: NeuralODE
    evaluations: int
    error: EndError
    others: dict[str, EndError]

    def __str__(self) -> str:
        flow = self.error.log_density is not None
        lines = [f"{'':9} {'rms':>9} {'95 %':>9} {'worst':>9}" + (f" {'nats':>9}" if flow else "")]
        for name, error in {"fitted": self.error, **self.others}.items():
            figures = [error.rms, error.most, error.worst] + ([error.log_density] if flow else [])
            lines.append(f"{name:9} " + " ".join(f"{v:9.3g}" for v in figures))
        return f"{self.evaluations} evaluations; error of the end, relative to the displacement\n" + "\n".join(lines)


@torch.inference_mode(False)  # in which no parameter can be made that is trained elsewhere
@torch.no_grad()
def fit_solver(
    model: nn.Module,
    x0: Tensor,
    *,
    evaluations: int = 8,
    tol: float | None = None,
    reference: Tensor | None = None,
    inverse: bool = False,
    args: Mapping[str, Any] | None = None,
    log_density: int | None = None,
    progress: bool = True,
) -> SolverFit:
    """Fits a LearnableSolver to a trained field, for samples and likelihoods at few evaluations. The field is not changed.

    The interval is that of a LearnableSpan, or the first and last time of a bare node's ``t_span`` ([0, 1] where it has
    none). A quarter of the states is held out, and the errors are those on it. A field with labels or contexts as its
    attributes, data control or Hutchinson's noise is evaluated on all of ``x0`` at once, with the noise held.

    Args:
        model: a ``NeuralODE`` or a :class:`LearnableSpan`, whose field is trained. Its solver plays no part.
        x0: initial states ``[n, ...]`` as they will be in use; some 1,000 for states of few dimensions, 100 for images.
        evaluations: how often a solve evaluates the field; with ``tol``, the most that it may.
        tol: take the fewest evaluations whose held-out rms error is at most this share of the displacement.
        reference: the exact ends ``[n, ...]``, where they are known; default: by dopri5 in float64 at 1e-7.
        inverse: solve from the last time to the first. The states are then those at the end, such as data for which a
            likelihood is wanted. A solver fitted forward may be no better than midpoint there, and a LearnableSpan warns. A
            span takes both, each in its direction, after ``forward.node.solver.other = backward.node.solver``; for flows
            :meth:`FlowModel.fit_solvers <torchdyn_mintime.flows.FlowModel.fit_solvers>` does so.
        args: passed on to a field that takes ``args``; tensors in it belong to the rows of ``x0``. Solves then need a
            LearnableSpan, see :class:`SolverFit`.
        log_density: which column of the state is a log-density, whose error has a size of its own. Default: the first one of
            the rates of torchdyn's ``CNF``, and none of other fields.
        progress: whether to show a bar, or a line in 20 seconds where there is no terminal.

    Raises:
        TypeError: ``model`` is neither, or ``x0`` is no tensor of floating-point numbers.
        ValueError: an argument that cannot be used, a field that does not repeat (dropout in training mode), or no number
            of evaluations that meets ``tol``. Nothing is changed.
        IntegrationError: the exact solve failed.

    Example:
        >>> node = NeuralODE(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> fit = fit_solver(node, torch.randn(256, 2), evaluations=2, progress=False)
        >>> fit.node(torch.randn(5, 2))[1][-1].shape
        torch.Size([5, 2])
        >>> fit.error.rms < fit.others["midpoint"].rms
        True
    """
    if not isinstance(model, NeuralODE | LearnableSpan):
        raise TypeError(
            f"fit_solver takes a NeuralODE or a LearnableSpan; got {type(model).__name__}. For one inside a larger model, "
            "pass it alone, with the states that reach it"
        )
    evaluations = checks.count(evaluations, "evaluations", 1)
    tol = None if tol is None else checks.positive(tol, "tol")
    node: Any = model.node if isinstance(model, LearnableSpan) else model
    field = model.field if isinstance(model, LearnableSpan) else Field(node)
    times = interval_of(model)[:: -1 if inverse else 1]
    numbers = range(1, evaluations + 1) if tol is not None else [evaluations]
    check_states(x0, reference, evaluations)
    x0 = x0.clone()  # a field that differentiates inside cannot do so at a tensor of inference mode
    if log_density is not None and not (x0.dim() == 2 and -x0.shape[1] <= log_density < x0.shape[1]):
        raise ValueError(
            f"log_density={log_density} must be a column of the states; x0 has the shape {tuple(x0.shape)}"
        )
    with random_kept(x0), field.beside(x0, args) as bound:
        check_repeats(bound, x0, times[0])
        exact = reference_solution(bound, x0, times)[-1] if reference is None else reference.detach().double()
        with in_float64(bound, x0, times[0]) as function, progress_shown(progress) as show:
            column = log_density_column(node) if log_density is None else range(x0.shape[1])[log_density]
            ends = _Ends(bound, function, x0, exact, times, column)
            solvers = []
            for stages in numbers:
                solver = ends.fit(stages, show)
                solvers.append((ends.error(make_stepper(solver), 1), solver))
                if tol is not None and solvers[-1][0].rms <= tol:
                    break
            error, solver = solvers[-1]
            if tol is not None and not error.rms <= tol:
                best, of = min(solvers, key=lambda found: found[0].rms)
                raise ValueError(
                    f"no solver of up to {evaluations} evaluations meets tol={tol:g}; the least error on states held out is "
                    f"{best.rms:.3g}, with {of.stages}. Give a larger tol or more evaluations"
                )
            others = ends.others(solver.stages)
    span = torch.tensor(times, dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device)
    return SolverFit(with_solver(node, solver, span), solver.stages, error, others)


class _Ends:
    """The ends of solves from fixed states, beside the exact ones."""

    def __init__(
        self,
        bound: BoundField,
        function: Callable,
        x0: Tensor,
        exact: Tensor,
        times: list[float],
        log_density: int | None,
    ):
        self._function, self._times, self._length = function, times, times[1] - times[0]
        self._timed = getattr(bound.function, "timed", True)
        self._chains: bool | None = None  # whether the chain rule holds for the field; None: a fit has not tried it yet
        self._x, self._exact = x0.double(), exact.to(x0.device)
        generator = torch.Generator().manual_seed(0)  # the user's random numbers stay as they are
        order = torch.randperm(len(x0), generator=generator)
        held = max(1, len(x0) // HELD_OUT)
        self._held, fitted = order[:held].to(x0.device), order[held:]
        self._log_density = log_density
        self._scale = displacement((self._exact - self._x)[self._held], self._log_density)
        size = math.prod(x0.shape[1:])
        picked = torch.randperm(len(fitted) * size, generator=generator)[:ENTRIES].sort().values
        self._picked = (fitted[picked // size] * size + picked % size).to(x0.device)
        # A field in single precision is smooth to about 1e-7 of its size: a difference must be larger than that. Many fields
        # that take float64 round to single precision somewhere inside, such as in the softmax of attention.
        self._shift = 1e-4 if function is bound.function else 1e-3

    def _end(self, stepper: Stepper, steps: int = 1) -> Tensor:
        t0, t_f = self._times
        nodes = [t0 + (t_f - t0) * k / steps for k in range(steps)] + [t_f]
        grid = Grid(nodes, keep=[False] * steps + [True])
        return integrate(self._function, self._x, grid, stepper).states[-1]

    def error(self, stepper: Stepper, steps: int) -> EndError:
        """Returns the error of a stepper with so many equal steps, on the states held out; infinite where it fails."""
        try:
            off = (self._end(stepper, steps) - self._exact)[self._held]
        except IntegrationError:
            return EndError(math.inf, math.inf, math.inf, None if self._log_density is None else math.inf)
        relative = (off / self._scale).reshape(len(off), -1)
        each = relative.square().mean(1).sqrt()
        nats = None if self._log_density is None else rms(off[:, self._log_density]).item()
        return EndError(rms(relative).item(), each.quantile(0.95).item(), each.max().item(), nats)

    def others(self, evaluations: int) -> dict[str, EndError]:
        """Returns the errors of stock solvers with as many evaluations."""
        methods = [make_stepper(name) for name in ("euler", "midpoint", "rk4")]
        fitting = [method for method in methods if evaluations % method.evaluations == 0]
        return {method.name: self.error(method, evaluations // method.evaluations) for method in fitting}

    def _stages(self, table: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        """Returns the stages of a step, those ``before`` being known. ``table`` holds the rows of a, then b and c."""
        t0, h = self._times[0], self._length
        stages = list(before)
        for i in range(len(before), table.shape[1]):
            state = self._moved(table[i, :i], stages)
            stages.append(self._function(state.new_tensor(t0 + h * float(table[-1, i])), state))
        return stages

    def _moved(self, weights: Tensor, stages: Sequence[Tensor]) -> Tensor:
        """Returns the states that a step reaches from x by a weighted sum of stages."""
        state = self._x
        for weight, k in zip(weights.tolist(), stages, strict=True):
            state = torch.add(state, k, alpha=self._length * weight)
        return state

    def _residual(self, table: Tensor, stages: Sequence[Tensor]) -> Tensor:
        return self._entries(self._moved(_weights(table), stages) - self._exact)

    def _entries(self, ends: Tensor) -> Tensor:
        return (ends / self._scale).flatten()[self._picked]

    def _jacobian(self, table: Tensor, entries: Sequence[tuple[int, int]], stages: Sequence[Tensor]) -> Tensor:
        """Returns the derivatives of the residual in the entries of the table, ``[entries of the ends, entries]``."""
        n = len(stages)
        if self._chains is not False and self._chain_pays(entries, n):
            jacobian = self._by_chain(table, entries, stages)
            if self._chains is None:
                self._chains = self._agrees(jacobian, table, entries, stages)
            if self._chains and bool(jacobian.isfinite().all()):
                return jacobian
            self._chains = False
        now, columns = self._residual(table, stages), []
        for i, j in entries:
            if i == n:
                columns.append(self._entries(self._in_weight(j, stages)))
                continue
            moved = table.clone()
            moved[i, j] += self._shift
            kept = stages[: _first_moved(i, j, n)]
            columns.append((self._residual(moved, self._stages(moved, kept)) - now) / self._shift)
        return torch.stack(columns, 1)

    def _in_weight(self, j: int, stages: Sequence[Tensor]) -> Tensor:
        """Returns the derivative of the end in b_j; the sum of b stays 1."""
        return self._length * (stages[j] - torch.stack(list(stages)).mean(0))

    def _chain_pays(self, entries: Sequence[tuple[int, int]], n: int) -> bool:
        """Whether the chain rule takes less than half of the evaluations, and its derivatives little memory."""
        size = self._x[0].numel()
        solves = sum(n - _first_moved(i, j, n) for i, j in entries if i != n)
        return 2 * n * (size + self._timed) < solves and n * len(self._x) * size**2 <= MOST_SLOPES

    def _agrees(
        self, jacobian: Tensor, table: Tensor, entries: Sequence[tuple[int, int]], stages: Sequence[Tensor]
    ) -> bool:
        """Whether the chain rule gives one difference of the solve, in all coefficients at once, for each entry of a state.

        It does not where the rows of a batch act on each other.
        """
        signs = 1.0 - 2.0 * (torch.arange(len(entries)) % 2).to(table)
        moved = table.clone()
        moved[tuple(zip(*entries, strict=True))] += self._shift * signs
        ahead = (self._residual(moved, self._stages(moved, [])) - self._residual(table, stages)) / self._shift
        squares = torch.stack([ahead - jacobian @ signs, ahead]).square()
        size = self._x[0].numel()
        off, found = squares.new_zeros(2, size).index_add_(1, self._picked % size, squares)
        return bool((off <= CHAINED**2 * found).all())

    def _by_chain(self, table: Tensor, entries: Sequence[tuple[int, int]], stages: Sequence[Tensor]) -> Tensor:
        """Returns the same as the differences from derivatives of the field at each stage, if it takes each row alone."""
        n, h, size = len(stages), self._length, self._x[0].numel()
        rows, place = (self._picked // size).unique(return_inverse=True)
        ks = torch.stack([k.reshape(len(k), -1) for k in stages])
        # Each row is shifted as far as its own path would be, so that a state near the end of the field's domain stays inside.
        speed = ks.abs().amax(0)
        step = self._shift * abs(h) * torch.maximum(speed, 0.01 * speed.square().mean(0).sqrt())
        slopes = [tuple(slope[rows] for slope in self._slopes(table, m, stages, step)) for m in range(n)]
        ks = ks[:, rows]
        # In the order of the stages that they move first, so that a stage is moved by those up to some one.
        inner = sorted(
            (entry for entry in entries if entry[0] != n), key=lambda entry: _first_moved(entry[0], entry[1], n)
        )
        count = max(1, BLOCK // (n * len(inner) * size))
        blocks = []
        for start in range(0, len(rows), count):
            part = slice(start, start + count)
            # For each coefficient, how the stages move: [stages, coefficients, rows, entries of a state].
            moved = ks.new_zeros(n, len(inner), len(ks[0, part]), size)
            for m, (in_state, in_time) in enumerate(slopes):
                so_far = sum(_first_moved(i, j, n) <= m for i, j in inner)
                states = h * torch.tensordot(table[m, :m], moved[:m, :so_far], 1)
                for p, (i, j) in enumerate(inner[:so_far]):
                    if i == m:
                        states[p] += h * ks[j, part]
                moved[m, :so_far] = torch.einsum("nij,pnj->pni", in_state[part], states)
                if (n + 1, m) in inner:
                    moved[m, inner.index((n + 1, m))] += in_time[part]
            ends = h * torch.tensordot(_weights(table), moved, 1) / self._scale.flatten()
            here = (place >= start) & (place < start + count)
            blocks.append(ends[:, place[here] - start, self._picked[here] % size])
        columns = dict(zip(inner, torch.cat(blocks, 1), strict=True))
        columns |= {(n, j): self._entries(self._in_weight(j, stages)) for i, j in entries if i == n}
        return torch.stack([columns[entry] for entry in entries], 1)

    def _slopes(self, table: Tensor, m: int, stages: Sequence[Tensor], step: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the derivatives of stage m in its state, ``[rows, d, d]``, and in c, ``[rows, d]``.

        The state is shifted by ``step``, ``[rows, d]``; an entry that stands still everywhere, such as a label, is not. The
        state of the first stage is x, which no coefficient moves.
        """
        state, now = self._moved(table[m, :m], stages[:m]), stages[m].reshape(step.shape)
        t = self._times[0] + self._length * float(table[-1, m])
        in_state, in_time = step.new_zeros(*step.shape, step.shape[1]), torch.zeros_like(step)
        for e in range(step.shape[1]) if m else ():
            if bool(step[:, e].any()):
                ahead = state.reshape(step.shape).clone()
                ahead[:, e] += step[:, e]
                moved = self._function(state.new_tensor(t), ahead.view_as(state)).reshape(step.shape) - now
                in_state[:, :, e] = moved / step[:, e, None]
        if self._timed:
            later = self._function(state.new_tensor(t + self._length * self._shift), state)
            in_time = (later.reshape(step.shape) - now) / self._shift
        return in_state, in_time

    def fit(self, stages: int, show: Callable[[str, int, int | None], None]) -> LearnableSolver:
        """Returns the solver of least squared error, from equal steps of midpoint; the start where it fails."""
        solver = LearnableSolver(stages, order=1, first_node=self._timed).to(self._x.device)
        solver.direction = 1 if self._times[1] > self._times[0] else -1
        self._chains = None
        mask = solver.entries(self._timed)
        entries = [(int(i), int(j)) for i, j in mask.nonzero().tolist()]
        table, small, damping = solver.free.detach().clone(), 0, 1e-2
        known = self._stages(table, [])
        now = self._residual(table, known)
        if not 0 < float(now.square().sum()) < math.inf:  # a field of zeros, or steps too large for it
            return solver.requires_grad_(False)
        for i in range(ITERATIONS):
            show(f"fitting {counted(stages)}", i, ITERATIONS)
            jacobian = self._jacobian(table, entries, known)
            normal, slope = jacobian.T @ jacobian, jacobian.T @ now
            diagonal = normal.diagonal() + 1e-10 * normal.diagonal().max().clamp_min(torch.finfo(torch.float64).tiny)
            gain = math.nan
            while not gain > 0 and damping < 1e8:
                tried = table.clone()
                tried[mask] -= torch.linalg.solve_ex(normal + torch.diag(damping * diagonal), slope).result
                found = self._stages(tried, [])
                residual = self._residual(tried, found)
                gain = 1 - float(residual.square().sum() / now.square().sum())
                damping *= 0.2 if gain > 0 else 5
            if not gain > 0:
                if not self._chains:
                    break
                self._chains, damping = False, 1e-2  # differences of the solve may lead further
                continue
            table, known, now = tried, found, residual
            small = small + 1 if gain < SETTLED else 0
            if small == 3:
                break
        solver.free.copy_(table)
        return solver.requires_grad_(False)


def _weights(table: Tensor) -> Tensor:
    """Returns b, whose sum is 1."""
    return table[-2] + (1 - table[-2].sum()) / table.shape[1]


def _first_moved(i: int, j: int, n: int) -> int:
    """Returns the first of n stages whose state, or time, an entry of the table moves: of a its row, of c its column."""
    return i if i < n else j


def log_density_column(node: Any) -> int | None:
    """Returns which column of the state is the log-density of a flow; None where the field is no flow."""
    return cost_columns(node) if any(hasattr(module, "trace_estimator") for module in node.vf.modules()) else None


def displacement(moved: Tensor, log_density: int | None) -> Tensor:
    """Returns the size of a displacement ``[n, ...]`` for each entry of a state, ``[1, ...]``: a log-density has its own."""
    tiny = torch.finfo(moved.dtype).tiny
    scale = rms(moved).clamp_min(tiny).expand_as(moved[:1]).clone()
    if log_density is not None:
        for columns in ([i for i in range(moved.shape[1]) if i != log_density], [log_density]):
            scale[:, columns] = rms(moved[:, columns]).clamp_min(tiny)
    return scale


def interval_of(model: NeuralODE | LearnableSpan) -> list[float]:
    """Returns the first and last time of a sampler: a bare node without a ``t_span`` has [0, 1]."""
    if isinstance(model, LearnableSpan):
        with evaluating(model):  # in training mode the parameter would be clipped to its bounds
            nodes = model.nodes
        return [nodes[0], nodes[-1]]
    span = model.t_span
    times = [0.0, 1.0] if span is None else [float(span[0]), float(span[-1])]
    if not 0 < abs(times[1] - times[0]) < math.inf:
        raise ValueError(
            f"the node's t_span must run from one finite time to another; got {times[0]:g} to {times[1]:g}"
        )
    return times


def check_states(x0: Any, reference: Tensor | None, evaluations: int) -> None:
    """Raises where states, or their ends, cannot be fitted to."""
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        raise TypeError(
            f"x0 must be a tensor of floating-point numbers, [n, ...]; got {getattr(x0, 'dtype', type(x0))}"
        )
    if not bool(x0.isfinite().all()):
        raise ValueError("x0 holds NaN or infinite entries; check the data")
    least = LearnableSolver(evaluations, order=1, first_node=True).entries().sum().item()
    fitted = (x0.numel() // max(1, len(x0))) * (len(x0) - max(1, len(x0) // HELD_OUT)) if x0.dim() else 0
    if fitted < 2 * least:
        raise ValueError(
            f"{evaluations} evaluations have {least} coefficients, too many for x0 of the shape {tuple(x0.shape)}: "
            f"{fitted} numbers to fit; give more states"
        )
    if reference is not None and (not isinstance(reference, Tensor) or reference.shape != x0.shape):
        raise ValueError(
            f"reference must hold the exact end of each row of x0, {tuple(x0.shape)}; got "
            f"{tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__}"
        )
    if reference is not None and not bool(reference.isfinite().all()):
        raise ValueError("reference holds NaN or infinite entries; leave out the states whose ends are not known")


def check_repeats(bound: BoundField, x: Tensor, t: float) -> None:
    """Raises where two evaluations of a field differ, or it does not take the states."""
    if kinds := bound.random_or_stateful():
        raise ValueError(
            f"{', '.join(kinds)} in training mode within the field, so that no two evaluations are equal; call .eval() first"
        )
    time = x.new_tensor(t)
    try:
        first = bound.function(time, x)
    except RuntimeError as error:
        raise bound.refusal(x, error) from error
    if first.shape != x.shape:
        raise ValueError(f"the vector field returned the shape {tuple(first.shape)} for states of {tuple(x.shape)}")
    if not torch.equal(first, bound.function(time, x)):
        raise ValueError(
            "two evaluations of the field at the same state differ: a field that draws at random has no one end"
        )
