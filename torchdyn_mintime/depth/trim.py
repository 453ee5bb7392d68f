"""Trimming: takes from a trained model the steps and the time that its loss does not need. Nothing is trained.

A model learned on many small steps often reaches its loss before t_f, and on few large ones. First the
earliest time at which the loss is kept is found on the steps as they are. Then, to an end there or a little later, for
every number of equal steps, the state is marched and the loss looked at after every step. The least number of steps at
which the loss is kept is taken, and of those the earliest end.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    BoundField,
    LearnableSpan,
    Loss,
    as_batches,
    as_number,
    checks,
    evaluating,
    last_solve,
    mean_loss,
    named_spans,
    require_spans,
    rest_of,
    solver_error,
    undisturbed,
    untraced,
)
from torchdyn_mintime.numerics import Grid, IntegrationError, integrate

__all__ = ["Trimmed", "TrimmedSpan", "trim"]


@dataclass(frozen=True)
class TrimmedSpan:
    """One span before and after.

    Attributes:
        name: of the span in its model; empty for the model itself.
        t_f: (before, after), units of time.
        steps: (before, after), of a forward of the first batch.
        nfe: (before, after), evaluations of the field in it.
    """

    name: str
    t_f: tuple[float, float]
    steps: tuple[int, int]
    nfe: tuple[int, int]


@dataclass(frozen=True)
class Trimmed:
    """The model before and after :func:`trim`.

    Attributes:
        spans: each span of the model.
        loss: (before, after), mean over the batches.
        solver_error: (before, after), see :func:`torchdyn_mintime.diagnostics.solver_error`, on the first batch.
        threshold: what the loss was to stay below.
        evaluations: how many evaluations of the field the search itself took.
    """

    spans: tuple[TrimmedSpan, ...]
    loss: tuple[float, float]
    solver_error: tuple[float, float]
    threshold: float
    evaluations: int

    @property
    def saved(self) -> float:
        """The evaluations of a forward before, over those after."""
        return sum(s.nfe[0] for s in self.spans) / sum(s.nfe[1] for s in self.spans)

    def __str__(self) -> str:
        lines = [
            f"{s.name or 'span'}: {s.nfe[0]} -> {s.nfe[1]} evaluations, {s.steps[0]} -> {s.steps[1]} steps, "
            f"t_f {s.t_f[0]:.4g} -> {s.t_f[1]:.4g}"
            for s in self.spans
        ]
        lines.append(
            f"loss {self.loss[0]:.4g} -> {self.loss[1]:.4g} (threshold {self.threshold:.4g}), "
            f"solver error {self.solver_error[0]:.2g} -> {self.solver_error[1]:.2g}"
        )
        return "\n".join(lines)


@torch.no_grad()
def trim(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    threshold: float,
    *,
    slack: float = 0.02,
    solver_tol: float | None = None,
    keep_step: bool = False,
) -> Trimmed:
    """Sets the fewest steps and then the earliest t_f at which the loss is kept, for a trained model.

    Every span of the model is trimmed in turn, in eval mode; the parameters of the field stay. A fixed-step span gets a
    new template of equal steps, a frozen one too. A span with an adaptive solver only gets an earlier t_f, one of 100
    equal parts of its interval. Few large steps may keep the loss and be a discrete network rather than the ODE: look
    at ``solver_error`` of the result, or give ``solver_tol``.

    Args:
        model: a LearnableSpan, or a module that holds some.
        batches: of ``x`` or ``(x, *target)``; each is solved some thirty times, mostly with few steps.
        loss: ``loss(output, *target)``, the mean over a batch; of a span itself the output is z(t_f).
        threshold: the loss, as a mean over all batches, may be at most this.
        slack: the end may lie later than the earliest time by this share of the duration, if that saves steps. With
            ``math.inf`` the fewest steps are taken wherever they end.
        solver_tol: the solver error on the first batch may be at most this, for each span (default: not asked).
        keep_step: leave the step size as it is, and only move t_f (to a point of the grid).

    Returns:
        The model before and after. It is as before where nothing could be saved.

    Raises:
        ValueError: the loss is above the threshold as it is, or the solver error above its tolerance.
        TypeError, ValueError: an argument cannot be used. The model is as before.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 5, 101))
        Your vector field ...
        >>> x = torch.ones(8, 2)
        >>> result = trim(span, [x], lambda z: z.square().mean(), threshold=0.05)  # exp(-2 t): reached at t = 1.5
        >>> span.steps, round(span.t_f.item(), 2), round(result.saved)
        (2, 1.51, 50)
    """
    require_spans(model)
    if not callable(loss):
        raise TypeError(f"loss must be callable as loss(output, *target); got {loss!r}")
    threshold = checks.number(threshold, "threshold")
    if not (isinstance(slack, float) and slack == math.inf):
        slack = checks.number(slack, "slack", least=0, wanted="a share of the duration, 0 or more, or math.inf")
    if solver_tol is not None:
        solver_tol = checks.positive(solver_tol, "solver_tol")
    prepared = as_batches(batches)
    x = prepared[0][0]
    with evaluating(model), undisturbed(model):
        before = mean_loss(model, prepared, loss)[0]
        if not math.isfinite(before):
            raise ValueError(f"the loss is {before} as the model is; nothing can be kept of it")
        if not before <= threshold:
            raise ValueError(f"the loss is {before:.6g}, above threshold={threshold:.6g} already; give a higher one")
        found = [(name, span) for name, span in named_spans(model) if span.last is not None]
        error = solver_error(model, x)  # also says if none was solved
        if solver_tol is not None and not error <= solver_tol:
            raise ValueError(f"the solver error is {error:.3g}, above solver_tol={solver_tol:.3g} already")

        def figures() -> list[tuple[Any, ...]]:
            model(x)
            return [(span.t_f.item(), span.steps, span.nfe) for _, span in found]

        old = figures()
        search = _Search(model, prepared, loss, threshold, slack, solver_tol, keep_step)
        for _, span in found:
            search.trim(span)
        changes = zip(found, old, figures(), strict=True)
        saved = tuple(TrimmedSpan(name, *zip(was, is_, strict=True)) for (name, _), was, is_ in changes)
        after = mean_loss(model, prepared, loss)[0]
        return Trimmed(saved, (before, after), (error, solver_error(model, x)), threshold, search.evaluations)


def _ladder(n: int) -> list[int]:
    """Returns 1, 2, .., 12, then numbers that grow by a quarter to a sixth, up to n."""
    numbers = [*range(1, 13), 14, 16, 20, 24, 28]
    while numbers[-1] < n:
        numbers += [2 * m for m in numbers[-4:]]
    return [m for m in numbers if m < n] + [n]


class _Search:
    """The search over the ends and steps of one span after another.

    Attributes:
        evaluations: of the field, that it took.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list,
        loss: Loss,
        threshold: float,
        slack: float,
        solver_tol: float | None,
        keep_step: bool,
    ):
        self.model, self.batches, self.loss, self.keep_step = model, batches, loss, keep_step
        self.threshold, self.solver_tol = threshold, solver_tol
        self.slack, self.evaluations = slack, 0
        # The field and the initial state of the span at hand, for each batch.
        self._starts: list[tuple[BoundField, Tensor]] = []

    def trim(self, span: LearnableSpan) -> None:
        """Sets the first candidate that the whole model agrees to; the span stays as it is where there is none."""
        self._starts = []
        for x, *_ in self.batches:
            self.model(x)
            last = last_solve(span)
            self._starts.append((last.bound, last.x))
        only_time = span.adaptive or self.keep_step
        candidates = self._earlier_ends(span) if only_time else self._fewer_steps(span)
        kept, t_f, tol = span.interval, span.t_f.item(), self.solver_tol
        for nodes in candidates:
            if only_time:
                span.t_f.fill_(nodes[-1])
            else:
                span.lay(nodes)
            try:
                # The march saw the loss at these steps; the model itself has the last word.
                low = mean_loss(self.model, self.batches, self.loss)[0] <= self.threshold
                if low and (tol is None or solver_error(self.model, self.batches[0][0]) <= tol):
                    return
            except IntegrationError:
                pass
            span.interval = kept
            span.t_f.fill_(t_f)

    def _fewer_steps(self, span: LearnableSpan) -> list[list[float]]:
        """Returns grids on which the loss is kept, those of the fewest steps and then the earliest end first."""
        own = self._earlier_ends(span)
        t0, t_f, most = span.t0.item(), span.t_f.item(), span.steps
        lower = span.interval.given_bounds[0] if span.interval.given_bounds else t0
        earliest = own[0][-1] if own else t_f
        latest = min(t_f, earliest + self.slack * (earliest - t0))
        found: set[tuple[int, float]] = set()
        limit = most
        for end in sorted({earliest, (earliest + latest) / 2, latest}):
            for m in _ladder(most):
                nodes = [t0 + (end - t0) * k / m for k in range(min(m, limit) + 1)]
                losses = self._march(span, nodes)
                kept = [n for n, v in enumerate(losses, 1) if v <= self.threshold and nodes[n] >= lower]
                found |= {(n, nodes[n]) for n in kept if n < most or nodes[n] < t_f}
                if kept and self.solver_tol is None:
                    limit = min(limit, kept[0])  # more steps than the best so far are of no use
        return [[t0 + (end - t0) * k / n for k in range(n)] + [end] for n, end in sorted(found)]

    def _earlier_ends(self, span: LearnableSpan) -> list[list[float]]:
        """Returns [t0, t] for each t at which the loss is kept, the earliest first."""
        t0, t_f = span.t0.item(), span.t_f.item()
        lower = span.bounds[0] if span.adaptive or span.interval.given_bounds else t0
        nodes = [t0 + (t_f - t0) * k / 100 for k in range(100)] + [t_f] if span.adaptive else span.nodes
        losses = self._march(span, nodes)
        return [[t0, t] for t, v in zip(nodes[1:-1], losses, strict=False) if v <= self.threshold and t >= lower]

    def _march(self, span: LearnableSpan, nodes: list[float]) -> list[float]:
        """Returns the loss with the span ending at each of the nodes but the first, solved along them."""
        totals, count = torch.zeros(len(nodes) - 1, dtype=torch.float64), 0
        node = span.node
        for (x, *target), (bound, start) in zip(self.batches, self._starts, strict=True):
            with untraced(bound):
                before = bound.nfe
                try:
                    states = integrate(
                        bound.function, start, Grid(nodes), span.stepper, atol=node.atol, rtol=node.rtol
                    ).states
                except IntegrationError:  # steps too large for this field
                    return [math.inf] * (len(nodes) - 1)
                finally:
                    self.evaluations += bound.nfe - before
            for i, state in enumerate(states[1:]):
                output = rest_of(self.model, span, state, x)
                totals[i] += as_number(self.loss(output, *target), "the loss") * len(x)
            count += len(x)
        return (totals / count).tolist()
