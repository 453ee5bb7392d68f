r"""The fewest evaluations at which a loss is met and the model is still its own ODE.

For an autonomous field, (f, t_f) and (c f, t_f / c) trace the same path, so a short interval proves nothing. What costs is
the number of evaluations, and what keeps it honest is the solver error. The interval is therefore left as it is, and
the search goes over the number of steps, and over solvers of lower order, while the field is trained on

    loss + w * step doubling,

with w = target / tolerance^2 at first, so that both terms reach their bounds together. Once the loss is near its target,
w follows the two constraints: it grows while the error is further from its bound than the loss is from its own, and falls
in the other case. Before that it stays: a weight that falls early lets the model leave the ODE while it learns.

An adaptive solver keeps to its tolerance by itself and chooses its steps. There the field is trained with
:class:`~torchdyn_mintime.step_count.StepCount` until so many steps are what it chooses.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from torchdyn_mintime import checks
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.numerics.steppers import RungeKutta, make_stepper
from torchdyn_mintime.reference import TOLERANCE, reference_end, relative_error
from torchdyn_mintime.regularizers import StepDoubling
from torchdyn_mintime.secondary import last_solve
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.step_count import StepCount
from torchdyn_mintime.wrapping import spans

__all__ = ["Shallowest", "Trial", "Verdict", "referenced"]

_log = logging.getLogger(__name__)

WEIGHT_RATE = 0.02
"""By how much the penalty's weight may change in an iteration: with 2 % the network can follow."""
SMOOTHING = 0.95
PROGRESS = 0.02
"""A relative gain in the worse of the two constraints that counts as progress."""
NEAR = 10.0
"""The loss over its target, below which the weight moves."""
WEIGHT_RANGE = (0.25, 100.0)
"""Of the weight, relative to its first value."""
LEARNT = 0.3
"""The part of the first loss above which a stalled training has not begun to learn: it starts again, more slowly."""
MOST_PATIENCE = 10
"""Times the patience, after which a number of steps is given up however slowly it still improves."""
MOST_HIDDEN, MOST_REFINED = 4.0, 8
"""The squared solver error over the penalty above which finer steps are compared with, and the finest."""
EXPLODED = 10.0
"""A loss so many times the first and the best one is a training that went astray."""
BACK_OFF = 0.3
"""The learning rate's factor when progress stalls or the loss explodes."""
LOWER_ORDER = {"rk4": ("midpoint",), "midpoint": (), "euler": ()}
"""Cheaper solvers to try. Euler's single step is left out: no penalty was found that keeps it an ODE."""


@dataclass
class Trial:
    """A number of steps of a solver that was tried.

    Attributes:
        solver, steps, evaluations: what was tried.
        iterations: of training.
        passed: whether loss, reference loss and solver error were all within their bounds.
        loss, reference_loss, solver_error: at the best moment.
    """

    solver: str
    steps: int
    evaluations: int
    iterations: int = 0
    passed: bool = False
    loss: float = math.inf
    reference_loss: float = math.inf
    solver_error: float = math.inf


@dataclass
class Verdict:
    """What a search found.

    Attributes:
        feasible: whether some trial passed.
        best: that with the fewest evaluations among those that passed; else the last one tried.
        trials: all, in the order of trying.
        target, solver_tol: the bounds.
        iterations: of training, altogether.
    """

    feasible: bool
    best: Trial
    trials: list[Trial]
    target: float
    solver_tol: float
    iterations: int

    def __str__(self) -> str:
        head = "found" if self.feasible else "NOT found: the last trial was"
        best = self.best
        lines = [
            f"{head} {best.evaluations} evaluations ({best.steps} x {best.solver}): loss {best.loss:.4g} and "
            f"{best.reference_loss:.4g} solved exactly (target {self.target:g}), solver error {best.solver_error:.3g} "
            f"(tolerance {self.solver_tol:g}), {self.iterations} iterations"
        ]
        lines += [
            f"  {t.steps} x {t.solver}: {'passed' if t.passed else 'failed'} after {t.iterations} iterations, "
            f"loss {t.loss:.4g} / {t.reference_loss:.4g}, solver error {t.solver_error:.3g}"
            for t in self.trials
        ]
        return "\n".join(lines)


@contextmanager
def referenced(model: nn.Module) -> Iterator[None]:
    """Within it every span of ``model`` gives, as its last state, the ODE's own solution at tolerance 1e-7."""

    def replace(span: LearnableSpan, _: Any, out: Any) -> Any:
        sol = out[1] if isinstance(out, tuple) else out
        exact = torch.cat([sol[:-1], reference_end(span).to(sol)[None]])
        return (out[0], exact) if isinstance(out, tuple) else exact

    handles = [span.register_forward_hook(replace) for span in spans(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluations_noted(found: Sequence[LearnableSpan]) -> Iterator[list[int]]:
    """Within it the evaluations of every solve of the spans are noted."""
    counted: list[int] = []
    handles = [span.register_forward_hook(lambda span, _, out: counted.append(span.nfe)) for span in found]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Rung:
    """Training at one number of steps, so far."""

    trial: Trial
    weight: float = math.nan
    smooth: float | None = None
    best: float = math.inf
    since: int = 0
    drops: int = 0
    next_check: int = 0
    mean_loss: float | None = None
    refinement: int = 0
    scale: float = 1.0
    """The squared solver error over the penalty, where a look at the exact solution has shown that it is more."""


class Shallowest:
    """Finds the fewest evaluations at which a loss is met and the solver error stays below a tolerance.

    It starts at one step (an adaptive solver at two), trains with step doubling (with the count of steps), adds steps
    only when progress stalls, and, once a number of steps has passed, tries cheaper solvers from the model found. The
    learning rate is lowered when progress stalls or the loss explodes, in which case the last good state comes back.
    Nothing is swept.

    In a plain loop use :meth:`fit`, or drive it yourself::

        search = Shallowest(target=0.01, solver_tol=0.1)
        search.start(model, optimizer)
        while not search.done:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            (loss + search.penalty()).backward()
            optimizer.step()
            search.step(loss, lambda: criterion(model(x), y))
        print(search.finish())

    Args:
        target: the loss to reach, at the steps taken and with the ODE solved exactly alike.
        solver_tol: the relative solver error allowed at t_f (see :func:`diagnostics.solver_error`). An adaptive solver
            keeps to its own tolerances besides; there the fewest evaluations at these are looked for.
        solvers: cheaper solvers to try once one has passed. Default: midpoint, for rk4.
        max_steps: of a solve, at most.
        patience: iterations without progress before the learning rate is lowered, and then the steps are changed.
        accept: one more condition on the model, such as an accuracy; asked when the loss is met.

    Attributes:
        done: whether the search has ended.
        reduce: takes the mean of a number over the processes, where several run.
        trials: what was tried (:class:`Trial`).

    Raises:
        ValueError: a bound that is not positive and finite, or an unknown solver.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> from torchdyn_mintime import wrap
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...
        >>> span = wrap(NeuralODE(nn.Linear(2, 2), solver="rk4"))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> x = torch.randn(16, 2)
        >>> verdict = Shallowest(target=0.05, solver_tol=0.1).fit(
        ...     span, lambda out, batch: out[1][-1].square().mean(), [x], lr=0.05, progress=False)
        >>> verdict.feasible, verdict.best.evaluations <= 16
        (True, True)
    """

    def __init__(
        self,
        *,
        target: float,
        solver_tol: float = 0.1,
        solvers: Sequence[str] | None = None,
        max_steps: int = 64,
        patience: int = 150,
        accept: Callable[[], bool] | None = None,
    ):
        self.target = checks.positive(target, "target")
        self.solver_tol = checks.positive(solver_tol, "solver_tol")
        if not TOLERANCE <= solver_tol <= 10.0:
            raise ValueError(
                f"solver_tol is relative to the state: at least {TOLERANCE:g}, which the exact solution is known to, and at "
                f"most 10; got {solver_tol:g}"
            )
        self.max_steps = checks.count(max_steps, "max_steps", 1)
        self.patience = checks.count(patience, "patience", 1)
        if solvers is not None:
            solvers = _fixed_step(solvers)
        if accept is not None and not callable(accept):
            raise TypeError(f"accept must be a function without arguments; got {accept!r}")
        self._term: StepDoubling | StepCount
        self.solvers = solvers
        self.accept = accept
        self.reduce: Callable[[float], float] = lambda value: value
        self.trials: list[Trial] = []
        self.done = False
        self._rung: _Rung | None = None
        self._model: nn.Module | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._base_lr: list[list[float]] = []
        self._own_solver = ""
        self._thawed: list[Tensor] = []
        self.batches_seen_together = 1  # over how many batches a loss must stay met before it is believed
        self._iterations = 0
        self._first_loss: float | None = None
        self._restarts = 0
        self._initial: dict[str, Any] | None = None
        self._good: dict[str, Any] | None = None
        self._found: dict[str, Any] | None = None

    # ----------------------------------------------------------------------------------------------- driving a search

    def start(self, model: nn.Module, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Takes hold of the model and its optimizers, and sets every span to few steps. Times are frozen meanwhile."""
        found = list(spans(model))
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no LearnableSpan; wrap it first: torchdyn_mintime.wrap(model)"
            )
        names = sorted({span._stepper.name for span in found})
        if any(span.adaptive for span in found) and len(names) > 1:
            raise ValueError(
                f"the spans have the solvers {', '.join(names)}; a search takes steps of fixed size, or one adaptive solver"
            )
        for span in found:
            if span.adaptive and not isinstance(span._stepper, RungeKutta):
                raise TypeError(
                    f"the search follows the step control of tsit5 and dopri5, not that of {span._stepper.name}; set "
                    "`span.solver` to one of these, or to a solver of fixed steps"
                )
        self._model, self._spans = model, found
        self._optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        if self._rung is None:
            self._base_lr = [[group["lr"] for group in o.param_groups] for o in self._optimizers]
            self._own_solver = found[0]._stepper.name
        self._thawed = freeze_times(found)
        if self._rung is None:
            # To take the whole way in its first step, an adaptive solver would have to find next to no movement.
            self._enter(self._own_solver, 2 if found[0].adaptive else 1)
            self._initial = self._good
        else:  # resumed from a checkpoint
            self._use(self._rung.trial.solver, self._rung.trial.steps)

    def penalty(self) -> Tensor:
        """The term on the last forward that keeps to the steps, at its present weight: to be added to the loss."""
        rung = self._current()
        value = self._term.penalty()
        self._last_penalty = value.detach()
        return rung.weight * value

    def step(self, loss: float | Tensor, measure: Callable[[], float | Tensor] | None = None) -> None:
        """After the optimizer's step: looks at the progress and decides.

        Args:
            loss: of the last forward, averaged over the processes where several run.
            measure: computes the loss once more with the model as it is now; called under ``no_grad``, and with the
                ODE solved exactly. Of this process alone: :attr:`reduce` takes the mean where several run. Without it only
                the solver error of the last batch is held against its bound.
        """
        rung = self._current()
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        penalty = self.reduce(float(self._last_penalty))
        self._iterations += 1
        rung.trial.iterations += 1
        if self._first_loss is None and math.isfinite(value):
            self._first_loss = value
        lowest = min(rung.trial.loss, self._first_loss or value)
        if not (math.isfinite(value) and math.isfinite(penalty)) or value > EXPLODED * max(
            lowest, self._first_loss or 0
        ):
            self.diverged(f"the loss exploded to {value:.3g}")
            return
        rung.trial.loss = min(rung.trial.loss, value)
        gap, error_gap = value / self.target, rung.scale * penalty / self._bound**2
        if gap < NEAR:
            low, high = (r * self._first_weight for r in WEIGHT_RANGE)
            wanted = rung.weight * math.exp(WEIGHT_RATE * _unit(math.log((error_gap + 1e-12) / (gap + 1e-12))))
            rung.weight = min(max(wanted, low), high)
        score = math.log(max(gap, error_gap, 1e-3))
        rung.smooth = score if rung.smooth is None else SMOOTHING * rung.smooth + (1 - SMOOTHING) * score
        if rung.smooth < rung.best - PROGRESS:
            rung.best, rung.since = rung.smooth, 0
            if rung.trial.iterations % 10 == 0:
                self._good = self._snapshot()
        else:
            rung.since += 1
        # The penalty is about the square of the solver error: below its bound a look at the exact solution is worth it.
        # One lucky batch is no proof: the mean over as many batches as there are must be below the target.
        beta = 1.0 - 1.0 / self.batches_seen_together
        rung.mean_loss = value if rung.mean_loss is None else beta * rung.mean_loss + (1 - beta) * value
        met = max(value, rung.mean_loss) <= self.target
        if met and error_gap <= 1.0 and rung.trial.iterations >= rung.next_check:
            rung.next_check = rung.trial.iterations + max(10, self.batches_seen_together)
            if self._check(measure):
                self._passed()
                return
            if not self._spans[0].adaptive and math.isfinite(rung.trial.solver_error):
                self._compare_with_exact(penalty)
            return
        if rung.trial.iterations > MOST_PATIENCE * self._patience():
            self._failed()
        elif rung.since > self._patience():
            if self._found is None and rung.trial.loss > LEARNT * (self._first_loss or 0) and self._restarts < 3:
                self._begin_again(BACK_OFF, f"nothing learnt in {self.patience} iterations")
            elif rung.drops < (2 if rung.best < math.log(NEAR) else 1):
                self._slower(f"no progress in {self.patience} iterations")
            else:
                self._failed()

    def finish(self) -> Verdict:
        """The verdict so far; the best model found is loaded, and times may be trained again.

        A search that is not :attr:`done` can go on, after another :meth:`start`: from the model found, if there is one,
        at the steps it was trying.
        """
        if self._model is None:
            raise RuntimeError("the search was not started; call start(model, optimizer), or fit(...)")
        passed = [t for t in self.trials if t.passed]
        best = min(passed, key=lambda t: t.evaluations) if passed else self.trials[-1]
        if self._found is not None:
            self._use(best.solver, best.steps)
            self._model.load_state_dict(self._found)
        for time in self._thawed:
            time.requires_grad_(True)
        verdict = Verdict(bool(passed), best, self.trials, self.target, self.solver_tol, self._iterations)
        (_log.info if passed else _log.warning)("%s", verdict)
        return verdict

    def fit(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        lr: float = 0.03,
        max_iterations: int = 20_000,
        progress: bool = True,
    ) -> Verdict:
        """Trains ``model`` with Adam until the search ends.

        Args:
            model: a wrapped model.
            loss: ``loss(model(x), batch)``, a scalar; ``batch`` is an element of ``batches``.
            batches: gone through again and again; each is ``(x, ...)`` or the tensor ``x`` itself.
                The loss is met when its mean over all of them is.
            lr: the learning rate to begin with.
            max_iterations: after which the search ends with what it has.
            progress: whether to show a progress bar.

        Returns:
            The verdict; ``model`` is the best one found.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=checks.positive(lr, "lr"))
        self.start(model, optimizer)
        model.train()
        if not isinstance(batches, Sized):
            batches = list(batches)  # gone through many times
        self.batches_seen_together = len(batches)
        measure = partial(_mean_loss, model, loss, batches)
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=None)
            while not self.done and self._iterations < max_iterations:
                for batch in batches:
                    x = batch if isinstance(batch, Tensor) else batch[0]
                    try:
                        value = loss(model(x), batch)
                        optimizer.zero_grad()
                        (value + self.penalty()).backward()
                        optimizer.step()
                    except IntegrationError as error:
                        self.diverged(str(error))
                    else:
                        self.step(value, measure)
                    if self.done or self._iterations >= max_iterations:
                        break
                    bar.update(task, advance=1, description=self.status())
        return self.finish()

    def status(self) -> str:
        """One line on where the search is."""
        rung = self._current()
        t = rung.trial
        return f"{t.steps} x {t.solver}: loss {t.loss:.3g} (target {self.target:g}), iteration {self._iterations}"

    # --------------------------------------------------------------------------------------------------- its decisions

    def _patience(self) -> int:
        """At least a pass: the mean loss of a pass cannot settle in less."""
        return max(self.patience, self.batches_seen_together)

    @property
    def _bound(self) -> float:
        """The penalty's bound is the square of this one: of the solver error, or 1 where StepCount counts."""
        return 1.0 if self._spans[0].adaptive else self.solver_tol

    @property
    def _first_weight(self) -> float:
        return self.target / self._bound**2

    def _current(self) -> _Rung:
        if self._rung is None:
            raise RuntimeError("the search was not started; call start(model, optimizer), or fit(...)")
        return self._rung

    def _enter(self, solver: str, steps: int) -> None:
        evaluations = _evaluations(solver, steps)
        self._rung = rung = _Rung(Trial(solver, steps, evaluations))
        self.trials.append(rung.trial)
        self._use(solver, steps)
        rung.weight = self._first_weight  # which the solver, in use by now, decides
        self._reset_rates()
        self._good = self._snapshot()
        _log.info("trying %d x %s (%d evaluations)", steps, solver, evaluations)

    def _use(self, solver: str, steps: int) -> None:
        assert self._model is not None
        for span in self._spans:
            set_steps(span, steps, solver)
        rung = self._current()
        # A step of low order hides too much of its error from one half as long.
        stepper = self._spans[0]._stepper
        if stepper.adaptive:
            assert self._model is not None
            self._term = StepCount(self._model, steps)
        else:
            self._refine(rung.refinement or (2 if stepper.order > 2 else 4))

    def _reset_rates(self) -> None:
        """The learning rates that a number of steps begins with."""
        for optimizer, rates in zip(self._optimizers, self._base_lr, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _snapshot(self) -> dict[str, Any]:
        assert self._model is not None
        return copy.deepcopy(self._model.state_dict())

    def diverged(self, why: str) -> None:
        """Back to the last good state, with a lower learning rate: after a loss or a solve that failed."""
        if self._slower(why) and self._good is not None:
            self._go_back(self._good)

    def _go_back(self, state: dict[str, Any] | None) -> None:
        """The model as it was, and optimizers that know nothing of what came after."""
        assert self._model is not None and state is not None
        self._model.load_state_dict(state)
        for optimizer in self._optimizers:
            optimizer.state.clear()

    def _slower(self, why: str) -> bool:
        """Lowers the learning rate; False where that was done too often, and the number of steps is given up instead."""
        rung = self._current()
        rung.drops += 1
        rung.since, rung.smooth = 0, None
        if rung.drops > 8:
            self._failed()
            return False
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= BACK_OFF
        _log.info("%s: learning rate times %g", why, BACK_OFF)
        return True

    def _compare_with_exact(self, penalty: float) -> None:
        """What a look at the exact solution says about the penalty: it may stand for more of an error than it shows."""
        rung = self._current()
        ratio = rung.trial.solver_error**2 / max(penalty, 1e-30)
        rung.scale = min(max(ratio, 1.0), MOST_HIDDEN)
        if ratio > MOST_HIDDEN:
            # The steps and their parts agree on something that is not the ODE: a field too steep for either. Training
            # does not find back from there, so it starts again, and is held against finer steps from the start.
            if rung.refinement < MOST_REFINED:
                self._refine(2 * rung.refinement)
                self._begin_again(1.0, "the penalty missed most of the solver error")
            else:
                self._failed()

    def _refine(self, parts: int) -> None:
        assert self._model is not None
        self._current().refinement = parts
        self._term = StepDoubling(self._model, 1.0, parts)

    def _begin_again(self, slower: float, why: str) -> None:
        """The model as it was when this search, or its way down, began; ``slower`` stays on the learning rate."""
        rung, start = self._current(), self._initial if self._found is None else self._found
        self._restarts += 1
        self._go_back(start)
        # The state holds the steps and the solver that it was saved with.
        for span in self._spans:
            set_steps(span, rung.trial.steps, rung.trial.solver)
        self._base_lr = [[rate * slower for rate in rates] for rates in self._base_lr]
        self._reset_rates()
        rung.smooth, rung.best, rung.since, rung.weight = None, math.inf, 0, self._first_weight
        rung.mean_loss = None
        rung.scale = 1.0
        _log.info("%s: once more from the start, learning rate times %g", why, slower)

    @torch.no_grad()
    def _check(self, measure: Callable[[], float | Tensor] | None) -> bool:
        """Whether the model as it is now is within all bounds, the cheap ones first."""
        trial, model = self._current().trial, self._model
        assert model is not None
        training = model.training
        model.eval()
        trial.solver_error = math.inf
        try:
            with _evaluations_noted(self._spans) as counted:
                loss = self._of_all(measure or self._solve_again)
            if not loss <= self.target:
                return False
            if measure is not None:
                trial.loss = loss
            few = self._of_all(lambda: max(counted) <= trial.evaluations) == 1.0
            trial.solver_error = self._of_all(lambda: max(relative_error(span) for span in self._spans))
            if not (few and trial.solver_error <= self.solver_tol):
                return False
            if measure is not None:
                with referenced(model):
                    trial.reference_loss = self._of_all(measure)
                if not trial.reference_loss <= self.target:
                    return False
            return self.accept is None or self._of_all(self.accept) == 1.0
        finally:
            model.train(training)

    def _solve_again(self) -> float:
        """The last batch, with the field as it is now."""
        for span in self._spans:
            span(last_solve(span).x)
        return 0.0

    def _of_all(self, figure: Callable[[], Any]) -> float:
        """The mean of a figure over the processes, which must decide the same; infinite where a solve failed."""
        value, broken = math.inf, None
        try:
            value = float(figure())
        except IntegrationError:
            pass
        except Exception as other:  # the other processes wait for this one's word
            broken = other
        if self.reduce(float(broken is None)) < 1.0:
            raise broken or RuntimeError("the look at the model failed in another process; see its own error")
        return self.reduce(value)

    def _passed(self) -> None:
        rung = self._current()
        rung.trial.passed = True
        self._found = self._snapshot()
        self._next()

    def _failed(self) -> None:
        rung = self._current()
        _log.info("%d x %s is not enough", rung.trial.steps, rung.trial.solver)
        if self._found is not None:
            self._next()
            return
        steps = rung.trial.steps + 1 if rung.trial.steps < 4 else math.ceil(rung.trial.steps * 1.4)
        if steps > self.max_steps:
            self.done = True
        else:
            # What was learned with too few steps is no good start for more: it is stuck, or no longer the ODE.
            self._go_back(self._initial)
            self._enter(rung.trial.solver, steps)

    def _next(self) -> None:
        """On to fewer evaluations, from the best model found, or to the end."""
        option = self._cheaper()
        if option is None:
            self.done = True
            return
        self._go_back(self._found)
        self._enter(*option)

    def _cheaper(self) -> tuple[str, int] | None:
        """What to try next with fewer evaluations than the best so far: as many steps of a cheaper solver, then between."""
        best = min((t for t in self.trials if t.passed), key=lambda t: t.evaluations)
        lower = self.solvers if self.solvers is not None else LOWER_ORDER.get(self._own_solver, ())
        for name in lower:
            cost = make_stepper(name).evaluations
            failed = max((t.steps for t in self.trials if t.solver == name and not t.passed), default=0)
            most = (best.evaluations - 1) // cost
            if failed < most:
                first = not any(t.solver == name for t in self.trials)
                return name, min(most, best.steps) if first else (failed + most + 1) // 2
        return None

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint in the middle of a search."""
        rung = self._rung
        return {
            "trials": [asdict(t) for t in self.trials],
            "rung": None if rung is None else {**asdict(rung), "trial": len(self.trials) - 1},
            "iterations": self._iterations,
            "first_loss": self._first_loss,
            "done": self.done,
            "good": copy.deepcopy(self._good),
            "found": copy.deepcopy(self._found),
            "initial": copy.deepcopy(self._initial),
            "restarts": self._restarts,
            "base_lr": copy.deepcopy(self._base_lr),
            "own_solver": self._own_solver,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; call it before :meth:`start`.

        Raises:
            ValueError: the state is not that of a search, or is that of an older version.
        """
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"this is no state of a Shallowest: {missing} are missing; got the keys {sorted(state)}")
        self.trials = [Trial(**t) for t in state["trials"]]
        rung = state["rung"]
        self._rung = None if rung is None else _Rung(**{**rung, "trial": self.trials[rung["trial"]]})
        self._iterations, self._first_loss = state["iterations"], state["first_loss"]
        self.done, self._good, self._found = state["done"], state["good"], state["found"]
        self._initial, self._restarts = state["initial"], state["restarts"]
        self._base_lr, self._own_solver = state["base_lr"], state["own_solver"]


def set_steps(span: LearnableSpan, steps: int, solver: str | None = None) -> None:
    """Makes a fixed-step span take ``steps`` equal steps over its present interval, by ``solver`` if given.

    An adaptive one gets no points but the ends, whatever ``steps`` is.
    """
    t0, t_f = span.t0.item(), span.t_f.item()
    if solver is not None and span._stepper.name != solver:
        span.solver = solver
    steps = 1 if span.adaptive else steps
    filled = span._filled
    span.t_span = torch.linspace(t0, t_f, steps + 1, dtype=span.t_f.dtype)
    span._filled = filled  # where no span was given yet, the first one passed still says what the interval is
    span.pinned = True  # whatever span the model's own code passes


def _evaluations(solver: str, steps: int) -> int:
    """Of so many steps. An adaptive solver takes one more at the start, and one for the size of its first step."""
    stepper = make_stepper(solver)
    return 2 + steps * (stepper.evaluations - 1) if stepper.adaptive else steps * stepper.evaluations


def _mean_loss(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: Iterable[Any]) -> float:
    values = [float(loss(model(b if isinstance(b, Tensor) else b[0]), b)) for b in batches]
    return sum(values) / len(values)


def freeze_times(found: Sequence[LearnableSpan]) -> list[Tensor]:
    """Takes the times of the spans from the optimizers, and returns those that were free."""
    free: list[Tensor] = [time for span in found for time in span.parameters(recurse=False) if time.requires_grad]
    for time in free:
        time.requires_grad_(False)
        time.grad = None  # an optimizer would go on applying a gradient that is left there
    return free


def _fixed_step(solvers: Any) -> tuple[str, ...]:
    """The names of solvers, all of fixed steps."""
    if isinstance(solvers, str) or not isinstance(solvers, Iterable):
        raise TypeError(f"solvers must be a list of names, such as ['midpoint']; got {solvers!r}")
    names = tuple(solvers)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"solvers must be a list of names, such as ['midpoint']; got {name!r} in it")
        try:
            stepper = make_stepper(name)
        except ValueError as error:
            raise ValueError(f"solvers={list(names)}: {error}") from None
        if stepper.adaptive:
            raise ValueError(f"solvers={list(names)} must be of fixed steps; {name!r} chooses its own")
    return names


def _unit(value: float) -> float:
    return min(max(value, -1.0), 1.0)
