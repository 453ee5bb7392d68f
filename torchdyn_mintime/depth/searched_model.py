"""The model whose depth is searched for, and its optimizers: how steps are laid, what is trained, and how all is put back."""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.numerics.solvers.ode import SOLVER_DICT

from torchdyn_mintime.core import (
    Call,
    Interval,
    LastSolve,
    LearnableSpan,
    evaluating,
    freeze_times,
    last_solve,
    named_spans,
    random_kept,
    replaced_solves,
    require_spans,
    rk4_solution,
    times_of,
    undisturbed,
    untraced,
)
from torchdyn_mintime.depth.rates import rates_of, set_rates
from torchdyn_mintime.depth.rollback import Snapshot
from torchdyn_mintime.depth.trials import Depth
from torchdyn_mintime.depth.verification import NEAR, refuse_times_beyond
from torchdyn_mintime.losses.step_count import StepCount
from torchdyn_mintime.losses.step_doubling import refined_end, relative_square
from torchdyn_mintime.numerics import (
    AsynchronousLeapfrog,
    Grid,
    IntegrationError,
    LearnableSolver,
    LearnedStepper,
    RungeKutta,
    integrate,
    make_stepper,
)

__all__ = ["SearchedModel", "refuse_other_intervals", "set_steps"]

SOLVER_RATE = 0.03
"""Learning rate of a LearnableSolver's coefficients, under Adam."""
FITTED = 30
"""Iterations of the fit that a new LearnableSolver begins with."""
WARM_UP = 20
"""Steps after each beginning over which the learning rates rise to their full size."""
MOST_GRADIENT = 2.0
"""Gradients of the sum of both losses, at the steps and at the reference, are clipped to this norm."""


def set_steps(span: LearnableSpan, steps: int, solver: str | nn.Module | None = None) -> None:
    """Makes a fixed-step span take ``steps`` equal steps over its present interval, by ``solver`` if given.

    An adaptive span, or one with a LearnableSolver, gets the two ends as its only points, whatever ``steps`` is.
    """
    settled = span.interval.settled
    stepper = make_stepper(span.solver if solver is None else solver)
    whole = stepper.adaptive or isinstance(stepper, LearnedStepper)
    points = 2 if whole else steps + 1
    span.lay(torch.linspace(span.t0.item(), span.t_f.item(), points, dtype=span.t_f.dtype).tolist(), solver)
    # Where no span was given yet, the first one passed still says what the interval is.
    span.interval = replace(span.interval, settled=settled)


@dataclass
class _Kept:
    """What a span was before the search."""

    span: LearnableSpan
    interval: Interval
    solvers: tuple[str | nn.Module, nn.Module]
    by_autograd: bool
    times: tuple[float, float]
    frozen: bool

    @classmethod
    def of(cls, span: LearnableSpan) -> "_Kept":
        solvers, times = (span.node.solver, span.node.solver_adjoint), (span.t0.item(), span.t_f.item())
        return cls(
            span, span.interval, solvers, span.by_autograd, times, not any(t.requires_grad for t in times_of([span]))
        )


class SearchedModel:
    """A model with the optimizers that train it at one depth after another.

    Times are frozen, gradients are those of autograd, and each optimizer clips what it gets, until :meth:`release`.

    Args:
        model: with LearnableSpans of fixed steps, or of one adaptive solver.
        optimizers: one or several.
        instead: the solver of fixed steps that takes the place of adaptive ones; None leaves them.

    Attributes:
        model, optimizers: as above.
        spans: the LearnableSpans of the model.
        own: names of their own solvers, or of what takes the place of adaptive ones.
        adaptive: whether they choose their steps in the search.
        spent: forward evaluations of the field so far, those of the reference included.
        penalty: of the last :meth:`objective`, detached; not weighted.
        reference_loss: the loss at the reference's end there; None where it was not asked for.
        fresh_solver: makes the LearnableSolver of so many stages that a span begins a depth with, fitted; None: one near the
            solver before it, which :meth:`objective` fits to its first batch.
        share_gradients: called with the gradients of learned solvers before they are used; what runs on several
            processes takes their mean here.

    Raises:
        ValueError: the model has no span, spans of different adaptive solvers, or nothing to train.
        TypeError: the step control of the adaptive solver cannot be followed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        instead: str | None = None,
    ):
        self.model, self.spans = model, require_spans(model)
        self.own = [instead if instead and span.adaptive else span.stepper.name for span in self.spans]
        self.adaptive = instead is None and any(span.adaptive for span in self.spans)
        if self.adaptive and len(set(self.own)) > 1:
            raise ValueError(
                f"the spans have the solvers {', '.join(sorted(set(self.own)))}; a search takes steps of fixed size, or one "
                "adaptive solver"
            )
        if self.adaptive and not isinstance(self.spans[0].stepper, RungeKutta):
            raise TypeError(
                f"the search follows the step control of tsit5 and dopri5, not that of {self.own[0]}; set "
                "`span.solver` to one of these, or to a solver of fixed steps"
            )
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self.spent, self.penalty = 0, 0.0
        self.reference_loss: float | None = None
        self.fresh_solver: Callable[[LearnableSpan, int], LearnableSolver] | None = None
        self.share_gradients: Callable[[list[Tensor]], None] = lambda gradients: None
        self._kept = [_Kept.of(span) for span in self.spans]
        self._held_rates: list[list[float]] = []  # within a step, whose own may be smaller
        self._rates_before = self.rates
        self._coefficients: torch.optim.Optimizer | None = None
        self._count: StepCount | None = None
        self._unfitted = False
        # Those that the model calls more than once: such a span remembers its last call alone.
        self._shared: set[LearnableSpan] = set()
        for span in self.spans:
            span.by_autograd = True
        self._thawed = freeze_times(self.spans)
        self._warm = WARM_UP
        self._hooks = [optimizer.register_step_pre_hook(self._before_step) for optimizer in self.optimizers]
        self._hooks += [optimizer.register_step_post_hook(self._after_step) for optimizer in self.optimizers]

    # ------------------------------------------------------------------------------------------------- rates and states

    @property
    def rates(self) -> list[list[float]]:
        """The learning rates, a list for each optimizer. They can be set, within a step too, where they hold after it."""
        return self._held_rates or [rates_of(optimizer) for optimizer in self.optimizers]

    @rates.setter
    def rates(self, values: list[list[float]]) -> None:
        if self._held_rates:
            self._held_rates = values
            return
        for optimizer, rates in zip(self.optimizers, values, strict=True):
            set_rates(optimizer, rates)

    def scale_rates(self, factor: float) -> None:
        """Multiplies all learning rates, those of learned solvers too."""
        self.rates = [[factor * rate for rate in own] for own in self.rates]
        for group in self._coefficients.param_groups if self._coefficients else ():
            group["lr"] *= factor

    def lay(self, depths: Sequence[Depth]) -> None:
        """Makes every span take the steps of its depth, and begins anew; a LearnableSolver starts near the one before it."""
        self._lay(depths)
        self._unfitted = not (self.adaptive or self.fresh_solver)
        self.begin_anew()

    def _lay(self, depths: Sequence[Depth]) -> None:
        for span, depth in zip(self.spans, depths, strict=True):
            solver: str | nn.Module = depth.solver
            if depth.stages is not None:
                present = span.solver if isinstance(span.solver, LearnableSolver) else None
                if present is not None and present.stages == depth.stages:
                    solver = present
                elif self.fresh_solver is not None:
                    solver = self.fresh_solver(span, depth.stages)
                else:
                    solver = LearnableSolver(depth.stages, present).to(span.t_f.device)
            set_steps(span, depth.steps, solver)
        self._count = StepCount(self.model, depths[0].steps) if self.adaptive else None

    def resume(self, depths: Sequence[Depth], state: dict[str, Any] | None) -> None:
        """Goes on at a depth as :attr:`state` was; the optimizers keep what they know."""
        self._lay(depths)
        self._hold_coefficients()
        if state is not None:
            for i, before in enumerate(state.get("before", ())):
                interval, kept = Interval(**before["interval"]), self._kept[i]
                solver = interval.solver if interval.solver in SOLVER_DICT else kept.solvers[0]
                self._kept[i] = replace(
                    kept, interval=interval, times=before["times"], solvers=(solver, kept.solvers[1])
                )
            self._rates_before = state.get("rates", self._rates_before)
            self._warm, self._unfitted = state["warm"], state["unfitted"]
            if self._coefficients is not None and state["coefficients"] is not None:
                self._coefficients.load_state_dict(copy.deepcopy(state["coefficients"]))

    @property
    def state(self) -> dict[str, Any]:
        """What a search needs to go on in the middle of a depth, beside the model and its optimizers."""
        coefficients = None if self._coefficients is None else copy.deepcopy(self._coefficients.state_dict())
        return {
            "warm": self._warm,
            "unfitted": self._unfitted,
            "coefficients": coefficients,
            "before": [{"interval": asdict(kept.interval), "times": kept.times} for kept in self._kept],
            "rates": self._rates_before,
        }

    def begin_anew(self) -> None:
        """Lets the optimizers forget what came before, and take short steps for a while.

        The first steps of Adam are of full length whatever the gradients are, and would undo what was learned.
        """
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self._hold_coefficients()
        self._warm = 0

    def go_back(self, state: Snapshot) -> None:
        """Restores the model, and lets the optimizers forget what came after."""
        state.restore(self.model)
        self.begin_anew()

    def copy_of(self, state: Snapshot) -> nn.Module:
        """Returns a copy of the model in another state, its times and sensitivities as before the search."""
        made = copy.deepcopy(self.model)
        state.restore(made)  # with its steps and solvers
        for span, kept in zip(require_spans(made), self._kept, strict=True):
            span.by_autograd = kept.by_autograd
        names = {name for name, p in self.model.named_parameters() if any(p is time for time in self._thawed)}
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in names)
        return made

    def release(self, found: bool) -> None:
        """Ends the search: times, learning rates and sensitivities are as before, and so are the steps if nothing was found."""
        if not self._hooks:  # it has ended before
            return
        while self._hooks:
            self._hooks.pop().remove()
        for kept in self._kept:
            span = kept.span
            span.last = None  # it speaks of other steps
            span.by_autograd = False  # a LearnableSolver has autograd's gradients in any case
            if not found:
                span.node.solver_adjoint = kept.solvers[1]
                span.lay(kept.interval.template, kept.solvers[0])
                span.interval = kept.interval
                with torch.no_grad():
                    span.t0.fill_(kept.times[0])
                    span.t_f.fill_(kept.times[1])
            span.by_autograd = kept.by_autograd
        for time in self._thawed:
            time.requires_grad_(True)
        self.rates = self._rates_before

    def _hold_coefficients(self) -> None:
        found = [span.solver.free for span in self.spans if isinstance(span.solver, LearnableSolver)]
        self._coefficients = torch.optim.Adam(found, lr=SOLVER_RATE) if found else None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Clips the gradients that an optimizer is about to use, and lets its first steps be short."""
        self._held_rates = self.rates
        factor = min(1.0, (self._warm + 1) / WARM_UP)
        if factor < 1.0:
            set_rates(optimizer, [factor * rate for rate in rates_of(optimizer)])
        given = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer
        if given is None:
            self._clip(optimizer)
            return None
        several = isinstance(optimizer, torch.optim.LBFGS)  # calls, whose gradients it compares
        calls = itertools.count()

        @functools.wraps(given)
        def closure() -> Any:  # the gradients are made in it
            if several and next(calls) and self._coefficients is not None:
                self._coefficients.zero_grad()
            try:
                value = given()
            except BaseException:
                self._end_step()
                raise
            if not several:
                self._clip(optimizer)
            return value

        return args[:1], {**kwargs, "closure": closure}

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        self._share(optimizer)
        for p in self._learned_beside(optimizer):
            # A step that a gradient scaler left out has left them.
            p.grad = p.grad if p.grad is not None and bool(p.grad.isfinite().all()) else None
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_([*own, *self._learned_beside(optimizer)], MOST_GRADIENT)

    def _share(self, optimizer: torch.optim.Optimizer) -> None:
        if gradients := [p.grad for p in self._learned_beside(optimizer) if p.grad is not None]:
            self.share_gradients(gradients)

    def _end_step(self) -> None:
        rates, self._held_rates = self._held_rates, []
        self.rates = rates

    def _learned_beside(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Returns the coefficients with a gradient that the optimizer does not have itself."""
        own = {p for group in optimizer.param_groups for p in group["params"]}
        held = [] if self._coefficients is None else self._coefficients.param_groups[0]["params"]
        return [p for p in held if p.grad is not None and p not in own]

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Steps the learned solvers beside an optimizer, by the gradients that it has used."""
        if isinstance(optimizer, torch.optim.LBFGS):
            self._share(optimizer)
        if self._coefficients is not None and self._learned_beside(optimizer):
            self._coefficients.step()
            self._coefficients.zero_grad()
        self._end_step()
        self._warm += optimizer is self.optimizers[-1]

    # --------------------------------------------------------------------------------------------------- what is trained

    def refuse_other_intervals(self, look: Callable[[], Any]) -> None:
        """See :func:`refuse_other_intervals`. The intervals are those before the search."""
        _refuse_other_intervals(self.model, look, self._kept)

    def objective(
        self, weight: float, steps: int, closure: Callable[[], Tensor] | None = None, share: float = 1.0
    ) -> Tensor:
        """Returns what is added to the loss of the last forward, a scalar.

        Args:
            weight: of the penalty, in units of loss.
            steps: of rk4 in the reference.
            share: the weight of the loss at the steps; all else is divided by it.
            closure: computes the loss of the same batch again. With it the sum is twice the mean of the loss at the steps
                and at the reference, and of the weighted penalty.
        """
        solved = [(span, last_solve(span)) for span in self.spans if span.last is not None]
        if self._unfitted:
            self._unfitted = False
            for span, last in solved:
                self._fit_coefficients(span, last, steps)
        self.spent += sum(last.bound.nfe for _, last in solved)
        self.reference_loss = None
        if self._count is not None:
            value = self._count.penalty()
            self.spent += self._count.nfe
            self.penalty = float(value.detach())
            return weight * value
        ends: list[tuple[Tensor, Tensor, Tensor]] = []
        called: list[LearnableSpan] = []

        def by_reference(span: LearnableSpan, x: Tensor, own: Call) -> tuple[Tensor, Tensor]:
            if span in self._shared:
                own()  # the steps of this call
                last = start = last_solve(span)
                self.spent += last.bound.nfe
            else:
                last = next(last for owner, last in solved if owner is span)
                # What comes before the first span may draw anew: its own state is the one to compare with.
                start = replace(last, x=x) if called else last
            called.append(span)
            taken, reference = self._ends(span, last, start, steps)
            ends.append((taken, reference, start.x))
            times, states = last.grid.times(span.t_f.dtype, span.t_f.device), last.states
            if last.reaches_end:
                states = torch.cat([states[:-1], reference[None]])
            rows = own.plan.rows
            return (times, states) if rows is None else (times[rows], states[rows])

        if closure is None:
            for span, last in solved:
                ends.append((*self._ends(span, last, last, steps), last.x))
            value = torch.zeros((), device=self.spans[0].t_f.device)
        else:
            while True:
                with undisturbed(self.model), replaced_solves(self.spans, by_reference):
                    value = closure()
                shared = {span for span in called if called.count(span) > 1} - self._shared
                if not shared:
                    break
                self._shared |= shared  # now that it is known, each of their calls is compared with its own end
                called.clear()
                ends.clear()
            self.reference_loss = float(value.detach())
        parts = [relative_square(taken, reference, reference - x) for taken, reference, x in ends]
        penalty = torch.stack(parts).sum()
        self.penalty = float(penalty.detach())
        return (value + (weight if closure is None else 2 * weight) * penalty) / share

    def nothing_added(self) -> Tensor:
        """Returns 0 in the place of :meth:`objective`, and counts the steps taken."""
        self.spent += sum(span.nfe for span in self.spans)
        self.reference_loss = None
        return torch.zeros((), device=self.spans[0].t_f.device)

    def _fit_coefficients(self, span: LearnableSpan, last: LastSolve, steps: int) -> None:
        """Fits a new LearnableSolver to the reference, the field as it is: what is trained next begins nearer to the ODE."""
        if not isinstance(span.solver, LearnableSolver):
            return
        change = last.steps[-1] - last.steps[0]
        solver = span.solver.toward(change)  # the one that took these steps, which may be its `other`
        if solver.stages < 2:
            return
        start = replace(last, x=last.x.detach(), grid=Grid([last.steps[0], last.steps[-1]]))
        optimizer = torch.optim.LBFGS([solver.free], max_iter=FITTED, line_search_fn="strong_wolfe")
        kept = solver.free.detach().clone()
        with untraced(last.bound):
            before = last.bound.nfe
            with torch.no_grad():
                reference = rk4_solution(start, steps)[1][-1]

            def closure() -> Tensor:
                with torch.enable_grad():
                    taken = integrate(last.bound.function, start.x, start.grid, span.stepper).states[-1]
                    value = relative_square(taken, reference, reference - start.x)
                (solver.free.grad,) = torch.autograd.grad(value, [solver.free])
                return value

            try:
                first = float(closure().detach())
                optimizer.step(closure)
                if not float(closure().detach()) <= first:
                    raise IntegrationError("the fit went astray")
                if span not in self._shared:  # one that is called twice may run both ways
                    solver.direction = 1 if change > 0 else -1
            except IntegrationError:
                with torch.no_grad():
                    solver.free.copy_(kept)
            finally:
                solver.free.grad = None
            self.spent += last.bound.nfe - before
        with torch.no_grad():  # each process has fitted them to its own batch
            self.share_gradients([solver.free])

    def _ends(self, span: LearnableSpan, last: LastSolve, start: LastSolve, steps: int) -> tuple[Tensor, Tensor]:
        """Returns the end of the steps that were taken, and that of the reference."""
        taken = last.states[-1]
        drops_out = last.bound.drops_out  # beside the solve it is off
        with untraced(last.bound):
            before = last.bound.nfe
            if drops_out or not last.reaches_end:
                taken = refined_end(span, last, 1)
            if isinstance(span.stepper, AsynchronousLeapfrog):  # whose state [z, v] rk4 cannot step
                reference = refined_end(span, start, max(2, steps // (len(last.steps) - 1)))
            else:
                reference = rk4_solution(start, steps)[1][-1]
            self.spent += last.bound.nfe - before
        return taken, reference


Ends = tuple[float, float]


@dataclass
class _Asked:
    """What a call asks a span for.

    Attributes:
        passed: the ends of the span that it passes, or None.
        solved: the ends of its solve.
        dense: whether the steps are the span's own all the same.
    """

    passed: Ends | None
    solved: Ends
    dense: bool


def refuse_other_intervals(model: nn.Module, look: Callable[[], Any]) -> None:
    """Raises where a call asks a span for another interval than its own, over which the search lays the steps of all calls.

    Nothing is changed, and no random number is drawn.

    Args:
        model: whose calls are looked at, in eval mode.
        look: calls it on a batch.

    Raises:
        ValueError: a span is asked for different intervals, for a part of its own, or by ``dense=True`` for times beyond it.
    """
    _refuse_other_intervals(model, look, [_Kept.of(span) for span in require_spans(model)])


def _refuse_other_intervals(model: nn.Module, look: Callable[[], Any], before: Sequence[_Kept]) -> None:
    asked: dict[LearnableSpan, list[_Asked]] = {}

    def watching(span: LearnableSpan, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        plan = call.plan
        nodes = plan.grid.nodes
        solved = min(nodes[0], nodes[-1]), max(nodes[0], nodes[-1])
        asked.setdefault(span, []).append(_Asked(plan.passed, solved, plan.dense))
        return call()

    kept = {entry.span: entry for entry in before}
    with (
        torch.no_grad(),
        random_kept(before[0].span.t_f),
        evaluating(model),
        undisturbed(model),
        replaced_solves(kept, watching),
        contextlib.suppress(Exception),  # what is wrong shows in the training
    ):
        look()
    for name, span in named_spans(model):
        if span in asked:
            _refuse_others(name, kept[span], asked[span])


def _refuse_others(name: str, kept: _Kept, calls: Sequence[_Asked]) -> None:
    """Raises where calls ask for other intervals than that which the search lays the steps of."""
    interval, span = kept.interval, kept.span
    if interval.settled:
        own = interval.clipped(*kept.times, span.t_f.dtype, span.learn_t0)
        template = interval.template[0], interval.template[-1]
    else:  # the first call says what it is
        own = calls[0].solved
        template = calls[0].passed or own
    near = NEAR * (max(map(abs, template)) + template[1] - template[0])

    def meant(passed: Ends) -> Ends:  # from where the template begins is from t0, wherever that is
        pairs = zip(passed, own, template, strict=True)
        first, last = (end if min(end, given) - near <= t <= max(end, given) + near else t for t, end, given in pairs)
        return first, last

    for call in calls:
        if call.dense and call.passed is not None:
            refuse_times_beyond(name, call.passed, own)
    found = [own if call.passed is None else meant(call.passed) for call in calls if not call.dense]
    other = next((ends for ends in found if math.dist(ends, own) > near), None)
    if other is None:
        return
    rests = kept.frozen and max(abs(own[1] - template[1]), interval.bounds[1] - template[1]) <= near
    # Steps that were laid before hold whatever is passed, and a learned t_f cuts what lies beyond it.
    keeps = interval.pinned or (not rests and other[0] <= own[0] + near and other[1] >= own[1] - near)
    differing = next((ends for ends in found if math.dist(ends, other) > near), None)
    if differing is None and keeps:
        return
    who, (one, two) = name or "the span", ("[{:.6g}, {:.6g}]".format(*ends) for ends in (other, differing or own))
    if differing is None:
        raise ValueError(
            f"the model asks {who} for {one}, which is not its interval {two}, over which a search lays the steps; set "
            "`span.t_span` to a template of what is asked for"
        )
    raise ValueError(
        f"the model asks {who} for {one} and for {two}, and a search lays the steps of one interval for all calls, whatever "
        "they ask for; put the length of each interval into the state and solve over [0, 1]: see "
        "docs/howto/time-series.md, 'If the intervals differ'"
    )
