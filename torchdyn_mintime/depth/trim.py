"""Trimming: takes from a trained model the steps and the time that its loss does not need. Nothing is trained.

A model learned on many small steps often reaches its loss on few large ones, and before t_f. First the earliest time at
which the loss is kept is found on the steps as they are. Then, to an end there, half-way and at t_f, for every number of
equal steps, the state is marched and the loss looked at after every step. The least number of steps at which the loss is
kept is taken, and of those the latest end: an earlier one changes what the model returns and saves nothing.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    BoundField,
    Call,
    LearnableSpan,
    Loss,
    as_batches,
    as_number,
    check_end_alone,
    checks,
    evaluating,
    last_solve,
    mean_loss,
    named_spans,
    replaced_solves,
    require_spans,
    rest_of,
    solver_error,
    undisturbed,
    untraced,
)
from torchdyn_mintime.numerics import Grid, IntegrationError, integrate

__all__ = ["StepsTried", "Trimmed", "TrimmedSpan", "trim"]

SHOWN = 3
"""Of the numbers of steps that were tried, so many on each side of the one that was taken are printed."""


@dataclass(frozen=True)
class StepsTried:
    """What a number of steps would have cost.

    Attributes:
        steps: how many.
        t_f: the end that was best for so many steps, in units of time.
        loss: there, as a mean over the batches; infinite where the solve failed.
    """

    steps: int
    t_f: float
    loss: float


@dataclass(frozen=True)
class TrimmedSpan:
    """One span before and after.

    Attributes:
        name: of the span in its model; empty for the model itself.
        t_f: (before, after), units of time.
        steps: (before, after), of a forward of the first batch.
        nfe: (before, after), evaluations of the field in it.
        tried: what each number of steps that was tried would have cost, the fewest first; the last one is as it was.
    """

    name: str
    t_f: tuple[float, float]
    steps: tuple[int, int]
    nfe: tuple[int, int]
    tried: tuple[StepsTried, ...] = ()

    def __str__(self) -> str:
        head = (
            f"{self.name or 'span'}: {self.nfe[0]} -> {self.nfe[1]} evaluations, {self.steps[0]} -> {self.steps[1]} steps, "
            f"t_f {self.t_f[0]:.4g} -> {self.t_f[1]:.4g}"
        )
        taken = sum(row.steps < self.steps[1] for row in self.tried)
        shown = [row for i, row in enumerate(self.tried) if abs(i - taken) <= SHOWN or i == len(self.tried) - 1]
        return head + "".join(f"\n  {t.steps:4d} steps: loss {t.loss:.4g} at t_f {t.t_f:.4g}" for t in shown)


@dataclass(frozen=True)
class Trimmed:
    """The model before and after :func:`trim`.

    Attributes:
        spans: each span of the model.
        loss: (before, after), mean over the batches.
        solver_error: (before, after), see :func:`torchdyn_mintime.diagnostics.solver_error`, on the first batch.
        threshold: the bound of the loss.
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
        lines = [str(span) for span in self.spans]
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
    slack: float | None = None,
    solver_tol: float | None = None,
    keep_step: bool = False,
) -> Trimmed:
    """Sets the fewest steps that keep the loss of a trained model, and an earlier t_f where that saves evaluations.

    Every span of the model is trimmed in turn, in eval mode; the parameters of the field stay. A fixed-step span gets a
    new template of equal steps, a frozen one too. A span with an adaptive solver only gets an earlier t_f, one of 100
    equal parts of its interval. Few large steps may keep the loss and be a discrete network rather than the ODE: look
    at ``solver_error`` of the result, or give ``solver_tol``.

    The end stays, and a span of fixed steps takes fewer of them, where the model asks for times by ``save_at=`` or
    ``dense=True``, solves from t_f back to t0, or uses more of the trajectory than its last state, such as a loss on a series.
    The model must ask for the times of a series by ``save_at=``.

    Args:
        model: a LearnableSpan, or a module that holds some.
        batches: of ``x`` or ``(x, *target)``; each is solved some thirty times, mostly with few steps.
        loss: ``loss(output, *target)``, the mean over a batch; of a span itself the output is z(t_f).
        threshold: the loss, as a mean over all batches, may be at most this.
        slack: asks for a short interval instead. The end is then at most this share of the duration later than the earliest
            possible one, and the earliest of these that takes the fewest steps. Default: the latest end that takes the fewest
            evaluations.
        solver_tol: the solver error on the first batch may be at most this, for each span (default: not asked).
        keep_step: leave the step size as it is, and only move t_f (to a point of the grid).

    Returns:
        The model before and after, and what each number of steps would have cost. It is as before where nothing could be
        saved.

    Raises:
        ValueError: the loss is above the threshold as it is, or the solver error above its tolerance; or the model uses the
            states at the points of a span that it passes, or asks for a part of the learned interval, or for different
            intervals.
        TypeError, ValueError: an argument cannot be used.

        Whatever is raised, the model is as before.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 5, 101))
        Your vector field ...
        >>> x = torch.ones(8, 2)
        >>> result = trim(span, [x], lambda z: z.square().mean(), threshold=0.05)  # exp(-2 t): reached at t = 1.5
        >>> span.steps, round(span.t_f.item(), 2), round(result.saved)
        (2, 3.33, 50)
    """
    require_spans(model)
    if not callable(loss):
        raise TypeError(f"loss must be callable as loss(output, *target); got {loss!r}")
    threshold = checks.number(threshold, "threshold")
    if slack is not None and not (isinstance(slack, float) and slack == math.inf):
        slack = checks.number(slack, "slack", least=0, wanted="a share of the duration, 0 or more, or math.inf")
    if solver_tol is not None:
        solver_tol = checks.positive(solver_tol, "solver_tol")
    prepared = as_batches(batches)
    x = prepared[0][0]
    with evaluating(model), undisturbed(model), _put_back_on_error(model):
        with _solves(model) as solves:
            before = mean_loss(model, prepared, loss)[0]
        if not math.isfinite(before):
            raise ValueError(f"the loss is {before} as the model is; nothing can be kept of it")
        if not before <= threshold:
            raise ValueError(f"the loss is {before:.6g}, above threshold={threshold:.6g} already; give a higher one")
        found = [(name, span) for name, span in named_spans(model) if span.last is not None]
        error = solver_error(model, x)  # also says if none was solved
        if solver_tol is not None and not error <= solver_tol:
            raise ValueError(f"the solver error is {error:.3g}, above solver_tol={solver_tol:.3g} already")
        _refuse_parts(found, solves)
        _settle(model, [span for _, span in found], x)
        with _solves(model) as again:
            mean_loss(model, prepared, loss)
        _refuse_others(found, solves, again)
        _refuse_parts(found, again)
        settled = {span for _, span in found if _settles_the_end(span)}
        for _, span in found:
            if _uses_trajectory(model, span, x):
                settled.add(span)
                if not (keep_step or span.adaptive or span.pinned):  # of a pinned one no span that is passed counts
                    _refuse_passed_points(model, span, x)

        def figures() -> list[tuple[Any, ...]]:
            model(x)
            return [(span.t_f.item(), span.steps, span.nfe) for _, span in found]

        old = figures()
        search = _Search(model, prepared, loss, threshold, slack, solver_tol, keep_step)
        tried = [search.trim(span, span in settled) for _, span in found]
        saved = [
            TrimmedSpan(name, t_f=(was[0], now[0]), steps=(was[1], now[1]), nfe=(was[2], now[2]), tried=tuple(rows))
            for (name, _), was, now, rows in zip(found, old, figures(), tried, strict=True)
        ]
        after = mean_loss(model, prepared, loss)[0]
        return Trimmed(tuple(saved), (before, after), (error, solver_error(model, x)), threshold, search.evaluations)


@contextmanager
def _put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Puts the spans of ``model`` back as they are now if something is raised."""
    held = [(span, span.interval, span.t0.item(), span.t_f.item()) for _, span in named_spans(model)]
    try:
        yield
    except BaseException:
        for span, interval, t0, t_f in held:
            span.interval = interval
            span.t0.fill_(t0)
            span.t_f.fill_(t_f)
        raise


def _settles_the_end(span: LearnableSpan) -> bool:
    """Returns whether another t_f would change more of the last call than where its solve ends: its start, its times."""
    last = last_solve(span)
    return last.steps[0] > last.steps[-1] or last.grid.keep is not None or last.grid.dense is not None


def _uses_trajectory(model: nn.Module, span: LearnableSpan, x: Tensor) -> bool:
    """Returns whether the rest of the model sees more of the span's solve than its end."""
    try:
        check_end_alone(model, span, x)
        return False
    except ValueError:
        return True


def _refuse_parts(
    found: list[tuple[str, LearnableSpan]], solves: list[tuple[LearnableSpan, tuple[float, float]]]
) -> None:
    """Raises a ValueError where the model has asked for a part of the interval: steps are laid over the whole of it."""
    names = {span: name or "the span" for name, span in found}
    for span, solved in solves:
        if not span.interval.settled:  # what the model asks for is the whole of it
            continue
        nodes = span.nodes  # up to the t_f that is solved: an optimizer may have left the parameter outside its bounds
        asked, ends = (min(solved), max(solved)), (nodes[0], nodes[-1])
        if math.dist(asked, ends) > 1e-6 * (ends[1] - ends[0]):
            raise ValueError(
                f"the model asks {names[span]} for [{asked[0]:.6g}, {asked[1]:.6g}], a part of its interval [{ends[0]:.6g}, "
                f"{ends[1]:.6g}], and trim lays the steps of the whole; set `span.t_span` to a template of that part"
            )


def _settle(model: nn.Module, found: list[LearnableSpan], x: Tensor) -> None:
    """Makes of each span's interval the one that the eval mode solves: that of its first call, with t_f inside its bounds."""
    for span in found:
        span.training = True  # of the span alone: its field is evaluated as before
    try:
        model(x)
    finally:
        for span in found:
            span.training = False


@contextmanager
def _solves(model: nn.Module) -> Iterator[list[tuple[LearnableSpan, tuple[float, float]]]]:
    """Notes the span and the ends of each solve inside."""
    seen: list[tuple[LearnableSpan, tuple[float, float]]] = []

    def watching(span: LearnableSpan, z: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        nodes = call.grid().nodes
        seen.append((span, (nodes[0], nodes[-1])))
        return call()

    with replaced_solves(require_spans(model), watching):
        yield seen


def _refuse_others(
    found: list[tuple[str, LearnableSpan]],
    before: list[tuple[LearnableSpan, tuple[float, float]]],
    after: list[tuple[LearnableSpan, tuple[float, float]]],
) -> None:
    """Raises a ValueError where the interval that the first call has settled is not that of another call."""
    names = {span: name or "the span" for name, span in found}
    for (span, asked), (_, taken) in zip(before, after, strict=True):
        if math.dist(asked, taken) > 1e-6 * abs(asked[1] - asked[0]):
            raise ValueError(
                f"{names[span]} is called over different intervals: the first call says that it is [{taken[0]:.6g}, "
                f"{taken[1]:.6g}], and another asks for [{asked[0]:.6g}, {asked[1]:.6g}]; put the length of each into the "
                "state and solve over [0, 1]: see docs/howto/time-series.md, 'If the intervals differ'"
            )


def _refuse_passed_points(model: nn.Module, span: LearnableSpan, x: Tensor) -> None:
    """Raises a ValueError where the model passes the points that it sees; with fewer steps they would be others."""

    def look(span: LearnableSpan, z: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        raise _Points(len(call.plan.grid.nodes) if call.plan.rows is None and call.plan.grid.keep is None else 0)

    kept = span.interval
    try:
        # With a template of its two ends alone: more points are those of a span that is passed.
        span.interval = replace(kept, template=(kept.template[0], kept.template[-1]), settled=True)
        with replaced_solves([span], look):
            model(x)
    except _Points as passed:
        if passed.number > 2:
            raise ValueError(
                f"the model passes a span of {passed.number} points, which are the steps too, and uses the states at all of "
                "them; ask for these times by save_at=, so that there may be fewer steps"
            ) from None
    finally:
        span.interval = kept


class _Points(Exception):
    """Ends a call of a model once it is known how many points it asks a span for."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


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
        slack: float | None,
        solver_tol: float | None,
        keep_step: bool,
    ):
        self.model, self.batches, self.loss, self.keep_step = model, batches, loss, keep_step
        self.threshold, self.solver_tol = threshold, solver_tol
        self.slack, self.evaluations = slack, 0
        # The field and the initial state of the span at hand, and the times of its steps, for each batch.
        self._starts: list[tuple[BoundField, Tensor]] = []
        self._steps: list[list[float]] = []
        # (steps, end) -> loss, of what was looked at.
        self._losses: dict[tuple[int, float], float] = {}

    def trim(self, span: LearnableSpan, settled: bool) -> list[StepsTried]:
        """Sets the first candidate that the whole model agrees to; the span stays as it is where there is none.

        Args:
            settled: whether the end stays.

        Returns:
            What each number of steps would have cost.
        """
        self._starts, self._steps, self._losses = [], [], {}
        for x, *_ in self.batches:
            self.model(x)
            last = last_solve(span)
            self._starts.append((last.bound, last.x))
            self._steps.append(last.steps)
        kept, t_f, tol = span.interval, span.t_f.item(), self.solver_tol
        only_time = span.adaptive or self.keep_step
        candidates: Iterable[list[float]] = ()
        if not settled:
            candidates = self._earlier_ends(span) if only_time else self._fewer_steps(span)
        elif not only_time:
            t0 = span.t0.item()
            candidates = (_equal(t0, t_f, m) for m in _ladder(span.steps)[:-1])
        own = mean_loss(self.model, self.batches, self.loss)[0]
        for nodes in candidates:
            if only_time:
                span.t_f.fill_(nodes[-1])
            else:
                span.lay(nodes)
            try:
                # The march saw the loss at these steps; the model itself has the last word.
                before = span.node.vf.nfe
                value = mean_loss(self.model, self.batches, self.loss)[0]
                if settled:
                    self._losses[len(nodes) - 1, t_f] = value
                    self.evaluations += int(span.node.vf.nfe - before)
                if value <= self.threshold and (tol is None or solver_error(self.model, self.batches[0][0]) <= tol):
                    break
            except IntegrationError:
                pass
            span.interval = kept
            span.t_f.fill_(t_f)
        self._losses[len(self._steps[0]) - 1, t_f] = own
        return self._tried()

    def _tried(self) -> list[StepsTried]:
        """Returns the best end of each number of steps: the one to take of those that keep the loss, else the least loss."""
        rows = []
        for steps, ends in groupby(sorted(self._losses), key=lambda pair: pair[0]):
            losses = {end: self._losses[steps, end] for _, end in ends}
            good = self._in_order(end for end, value in losses.items() if value <= self.threshold)
            best = good[0] if good else min(losses, key=losses.__getitem__)
            rows.append(StepsTried(steps, best, losses[best]))
        return rows

    def _in_order(self, ends: Iterable[float]) -> list[float]:
        """Returns ends that cost the same, the best one first: the latest, or the earliest if a short interval is asked for."""
        return sorted(ends, reverse=self.slack is None)

    def _fewer_steps(self, span: LearnableSpan) -> Iterator[list[float]]:
        """Yields grids on which the loss is kept, those of the fewest steps first, and of these those of the best end."""
        kept = self._ends(span)
        t0, t_f, most = span.t0.item(), span.t_f.item(), span.steps
        lower = span.interval.given_bounds[0] if span.interval.given_bounds else t0
        earliest = kept[0] if kept else t_f
        latest = t_f if self.slack is None else min(t_f, earliest + self.slack * (earliest - t0))
        self._losses.clear()
        limit = most
        for end in sorted({earliest, (earliest + latest) / 2, latest}):
            for m in _ladder(most):
                nodes = _equal(t0, end, m)[: min(m, limit) + 1]
                values = dict(enumerate(self._march(span, nodes), 1))
                self._losses |= {(n, nodes[n]): value for n, value in values.items() if nodes[n] >= lower}
                low = [n for n, value in values.items() if value <= self.threshold and nodes[n] >= lower]
                if low and self.solver_tol is None:
                    limit = min(limit, low[0])  # more steps than the best so far are of no use
        good = [pair for pair in sorted(self._losses) if self._losses[pair] <= self.threshold]
        for n, pairs in groupby(good, key=lambda pair: pair[0]):
            # As many steps save nothing by themselves, only the time of those who ask for a short interval.
            ends = self._in_order(end for _, end in pairs if n < most or (self.slack is not None and end < t_f))
            # If the solver error is too large at the best end, it seldom fits at its neighbours.
            for i in sorted({0, len(ends) // 2, len(ends) - 1}) if ends else ():
                yield _equal(t0, ends[i], n)

    def _earlier_ends(self, span: LearnableSpan) -> Iterator[list[float]]:
        """Yields [t0, t] for times at which the loss is kept and fewer steps lead to, those of the fewest steps first."""
        t0, t_f = span.t0.item(), span.t_f.item()
        ends = self._ends(span)
        if self.slack is not None:
            yield from ([t0, t] for t in ends)
            return

        def steps(t: float) -> int:
            return sum(bisect_left(times, t) for times in self._steps)

        for _, same in groupby(sorted((t for t in ends if steps(t) < steps(t_f)), key=steps), key=steps):
            yield from ([t0, t] for t in self._in_order(same))

    def _ends(self, span: LearnableSpan) -> list[float]:
        """Returns the times before t_f at which the loss is kept, the earliest first."""
        t0, t_f = span.t0.item(), span.t_f.item()
        lower = span.bounds[0] if span.adaptive or span.interval.given_bounds else t0
        nodes = [*_equal(t0, t_f, 100)] if span.adaptive else span.nodes
        losses = dict(zip(nodes[1:-1], self._march(span, nodes), strict=False))
        allowed = [t for t in losses if t >= lower]
        self._losses |= {(bisect_left(self._steps[0], t), t): losses[t] for t in allowed}
        return [t for t in allowed if losses[t] <= self.threshold]

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


def _equal(t0: float, end: float, steps: int) -> list[float]:
    """Returns the ends of equal steps; the last one is ``end`` itself."""
    return [t0 + (end - t0) * k / steps for k in range(steps)] + [end]
