r"""The search for the fewest evaluations at which a loss is met and the model is still its own ODE.

For an autonomous field, (f, t_f) and (c f, t_f / c) trace the same path, so a short interval proves nothing. What costs is
the number of evaluations, and what keeps it honest is the solver error. The interval is therefore left as it is, and the
search goes down. It begins with a model at a few steps of rk4, which solve nearly any field well. From the model found it goes
on to fewer steps, and to learned solvers of fewer and fewer stages
(:class:`~torchdyn_mintime.numerics.learned.LearnableSolver`), while the field is trained further. The objective is

    (loss at the steps + loss at the reference) / 2 + w |z - z_ref|^2 / |z_ref - z(t0)|^2,

with z_ref the end that finer steps of rk4 reach.

An adaptive solver keeps to its own tolerances and chooses its steps by itself. Its field is trained with
:class:`~torchdyn_mintime.losses.step_count.StepCount` until the solver chooses as few steps as are wanted.

:mod:`~torchdyn_mintime.depth.ladder` decides which depth comes next, :mod:`~torchdyn_mintime.depth.stage` how the training
at one depth goes on, and :mod:`~torchdyn_mintime.depth.verification` whether a model is within its bounds. This module has
the loop that puts them together.
"""

import copy
import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    TOLERANCE,
    LearnableSpan,
    checks,
    looks_between,
    refuse_shards,
    require_spans,
    times_of,
    with_note,
)
from torchdyn_mintime.depth.ladder import STOCK, first_depth, next_depths
from torchdyn_mintime.depth.progress import progress_shown
from torchdyn_mintime.depth.rollback import Snapshot
from torchdyn_mintime.depth.searched_model import SearchedModel, refuse_other_intervals, set_steps
from torchdyn_mintime.depth.stage import Stage
from torchdyn_mintime.depth.trials import MISSED, Depth, Trial, Verdict, counted, fewest
from torchdyn_mintime.depth.verification import Look, Verification, verify
from torchdyn_mintime.numerics import IntegrationError, LearnableSolver

__all__ = ["Depth", "Shallowest", "Trial", "Verdict", "set_steps"]

_log = logging.getLogger(__name__)

PATIENCE = 150
"""After so many iterations without progress the learning rate is lowered; when that does not help, the depth ends."""
LIGHT = 0.1
"""At the first depth the penalty begins with this share of its weight on the way down, so that the model can learn."""
PLATEAU = 100
"""After so many iterations without progress, far from the bounds, four steps count as too few to learn with."""
SELDOM = 4
"""The first depth is compared with its reference once in so many iterations, until it is near its bounds."""
MOST_STEPS = 64
"""The most steps of a solve."""
EXPLODED = 10.0
"""A loss of this many times the largest of the first one, the first at this depth and the target has exploded: the training
goes back to its last good state."""
BACK_OFF = 0.3
"""The learning rate is multiplied by this where progress stalls, the loss explodes or nothing is learned."""
FAR = 2.0
"""Above this many times its bounds a first depth that makes no progress gets more steps, or a higher rate, and no lower one. On
the way down a depth that comes to rest below it gets the rest of its budget at a lower rate."""
MOST_DROPS = 8
"""A depth is given up where its learning rate would be lowered more often than this, for whatever reason."""
DROPS_NEAR, DROPS_FAR = 2, 1
"""The learning rate is lowered this often where progress stalls near the bounds, and far from them; then the depth ends."""
LEARNT = 0.3
"""Start the training again, at a lower rate, if it stalls far from its bounds, or above this share of the way from the target
to the first loss."""
MOST_RESTARTS = 3
"""At most so many times in a search the training starts again because the first depth makes no progress."""
MOST_PATIENCE = 10
"""The first depth is given up after this many times the patience, however slowly it still improves. Each new start has
as many."""
RAISE, RAISE_AFTER = 3.0, 400
"""The learning rate is multiplied by RAISE, once, if the first depth stalls far from its bounds, or is still far after
RAISE_AFTER iterations. Near them a higher rate would spoil what was learned."""
MOST_REFERENCE = 64
"""The most steps of the reference."""
LEAST_REFERENCE = 4
"""The fewest steps of the reference. It also has at least twice as many steps as the model."""
OF_THE_REFERENCE = ("solver error", "exact loss")
"""The bounds that a finer reference can help to meet. Where the loss at the steps misses its own, the error is not measured."""
KEEP_EVERY = 10
"""Every so many iterations the state is kept as the last good one, if the iteration made progress."""
SETTLED, WINDOW = 0.01, 100
"""Without a target: the loss has settled when its mean over WINDOW iterations fell by less than this share of all its fall."""
FAILED_SETTLINGS = 3
"""Without a target: how often the weight of the penalty is multiplied by four if the first model is not a true one yet."""
LEAST_ITERATIONS = 300
"""A depth on the way down has the evaluations of so many iterations, at least."""
BUDGET = 2.0
"""A depth on the way down may spend this many times the evaluations that led to the model from which it starts."""
GENTLE = 10.0
"""On the way down, a loss at the steps that is above its target by more than this many units has less weight than the loss at
the reference. With fewer steps the model is another network at first, and its large gradients would spoil the field."""


class Shallowest:
    """Finds the fewest evaluations at which a loss is met and the solver error stays below a tolerance.

    A model is true if the loss meets the target with the steps taken and with the ODE solved exactly, and if the solver error
    is within its tolerance. The search first trains a true model at four steps of rk4, or at as many as are needed. From this
    model it goes down: two steps, learned solvers of 4, 3 and 2 stages, one step of Euler. However the search ends, the
    model is then the true one with the fewest evaluations so far.

    In a plain loop use :meth:`fit`, or drive it yourself::

        search = Shallowest(target=0.01, solver_tol=0.1)
        search.start(model, optimizer)
        while not search.done:
            def closure():
                return criterion(model(x), y)

            loss = closure()
            optimizer.zero_grad()
            (loss + search.penalty(closure)).backward()
            optimizer.step()
            search.step(loss, closure)
        print(search.finish())

    Args:
        target: the loss to reach on every batch, at the steps taken and with the ODE solved exactly alike. Without one the
            first model trains until its loss settles, first at the learning rate and then at a lower one, and the target is
            that loss and ``slack`` more.
        slack: how much higher than the first model's the loss may be, as a share of how far it fell in that training.
        solver_tol: the solver error allowed at t_f, relative to the displacement (see :func:`diagnostics.solver_error`). An
            adaptive solver also keeps its own tolerances; the search looks for the fewest evaluations at these.
        budget: seconds of training, after which the search ends with what it has. Default: as long as it takes.
        solvers: names of the solvers that may be taken beside the spans' own, of "rk4", "midpoint", "euler" and "learned".
            They also take the place of adaptive solvers, which stay otherwise. Default: rk4, learned, and Euler for one step.
        accept: one more condition on the model, such as an accuracy: a function without arguments that returns a bool. It is
            called when all other conditions are met.
        max_steps, patience: accepted for one more release, with a warning. Leave them out.

    Attributes:
        done: whether the search has ended.
        target: the target of the loss, given or found by the search; None until it is known.
        trials: what was tried (:class:`Trial`).
        reduce: takes the mean of a number over the processes, where several run.
        share_gradients: takes the mean of gradients over the processes, in place.
        judge: a function that returns a figure, such as the loss on other data; lower is better. If it is set before the
            start, this figure is held against the target in the place of the training loss.
        figure, sign: the name of that figure, and -1 if it has a minus sign because a larger value is better: how the verdict
            shows it.
        batches_seen_together: how many batches a pass has; the mean loss of a pass is held against the target.
        first: the depth of every span to begin with, where a model is known to be nearly true. Set it before the start.
            :meth:`fit` looks at it before any training.
        fresh_solver: ``fresh_solver(span, stages)`` makes the LearnableSolver that a span begins a depth with, fitted to its
            field as it is then. It may be set before the start. By default it is near the solver before, and fitted to a batch.

    Raises:
        ValueError: a bound that cannot be used, or an unknown solver.

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
        >>> verdict.feasible, verdict.best.evaluations <= 4
        (True, True)
    """

    def __init__(
        self,
        target: float | None = None,
        slack: float = 0.02,
        solver_tol: float = 0.1,
        *,
        budget: float | None = None,
        solvers: Sequence[str] | None = None,
        accept: Callable[[], bool] | None = None,
        max_steps: int | None = None,
        patience: int | None = None,
    ):
        self.target = None if target is None else checks.number(target, "target")
        self.slack = checks.number(slack, "slack", least=0)
        self.solver_tol = checks.positive(solver_tol, "solver_tol")
        if not TOLERANCE <= solver_tol <= 10.0:
            raise ValueError(
                f"solver_tol is relative to the displacement: at least {TOLERANCE:g}, which the exact solution is known to, "
                f"and at most 10; got {solver_tol:g}"
            )
        self.budget = math.inf if budget is None else checks.positive(budget, "budget")
        self.solvers = None if solvers is None else _names_of(solvers)
        if accept is not None and not callable(accept):
            raise TypeError(f"accept must be a function without arguments; got {accept!r}")
        self.accept = accept
        old = {"max_steps": max_steps, "patience": patience}
        given = {name: checks.count(value, name, 1) for name, value in old.items() if value is not None}
        for name in given:
            warnings.warn(f"Shallowest chooses {name} by itself; leave it out", FutureWarning, stacklevel=2)
        self.max_steps, self.patience = max_steps or MOST_STEPS, patience or PATIENCE
        self.reduce: Callable[[float], float] = float
        self.share_gradients: Callable[[list[Tensor]], None] = lambda gradients: None
        self.judge: Callable[[], float] | None = None
        self.figure, self.sign = "loss", 1.0
        self.first: Depth | None = None
        self.fresh_solver: Callable[[LearnableSpan, int], LearnableSolver] | None = None
        self._judged: tuple[float, float] | None = None
        self.batches_seen_together = 1
        self.trials: list[Trial] = []
        self.done = False
        self._searched: SearchedModel | None = None
        self._stage: Stage
        self._looks: Callable[[], Iterable[Look]] | None = None
        self._held_out_losses: list[float] = []
        self._hardest: Look | None = None  # the batch that failed last is looked at first: most looks end there
        self._unit = math.nan
        self._rates: list[list[float]] = []
        self._losses: list[float] = []
        self._iterations = self._restarts = 0
        self._raised = False
        self._failed = self._looked = self._looks_checked = False
        self._share = 1.0
        self._first_loss: float | None = None
        self._initial, self._good = Snapshot(), Snapshot()
        self._found: dict[int, Snapshot] = {}
        self._resumed: dict[str, Any] | None = None
        self._own: list[str] | None = None
        self._clock = perf_counter()

    # ----------------------------------------------------------------------------------------------- driving a search

    def start(self, model: nn.Module, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Takes hold of the model and its optimizers, and sets every span to its first depth. Times are frozen meanwhile.

        Raises:
            ValueError: the search has begun with another model.
        """
        refuse_shards(model, "the search")
        if self._searched is not None:
            if self._searched.model is not model:
                raise ValueError("this search is that of another model; make a new Shallowest for each model")
            self._searched.release(True)
        self._searched = searched = SearchedModel(model, optimizers, self._instead)
        searched.fresh_solver = self.fresh_solver
        searched.share_gradients = lambda gradients: self.share_gradients(gradients)
        self._clock = perf_counter()
        if self.trials:  # resumed
            searched.own = self._own or searched.own  # a model that was loaded has the solver of its present depth
            searched.resume(self.trials[-1].every, self._resumed)
        else:
            self._rates, self._own = searched.rates, searched.own
            self._enter([self.first or first_depth(name, self.solvers) for name in searched.own])
            self._initial.take(model)
            if self.judge is not None:
                with torch.no_grad():
                    self._judged = self.reduce(self.judge()), math.inf if self.target is None else self.target
                self.target = None  # that of the training loss is where it settles

    def penalty(self, closure: Callable[[], Tensor] | None = None) -> Tensor:
        """Returns the search's part of what is trained, to be added to the loss of the last forward.

        Args:
            closure: computes the loss of the same batch again. It is called while every span returns the end of the
                reference. Without it the loss at the reference is not trained, and more searches fail.
        """
        searched = self._require_start()
        self._check_looks(closure)
        far = not self._found and not searched.adaptive and self._stage.best > math.log(FAR)
        if far and self._stage.trial.iterations % SELDOM:
            # Few steps of rk4 hardly leave the ODE, and the reference costs twice as much as they do.
            return searched.nothing_added()
        return searched.objective(self._stage.weight, self._stage.reference, closure, self._share)

    def step(self, loss: float | Tensor, measure: Callable[[], Any] | None = None) -> None:
        """Looks at the progress and decides; to be called after the optimizer's step.

        Args:
            loss: the loss of the last forward, averaged over the processes if several run.
            measure: computes the loss once more with the model as it is now. It is called under ``no_grad``, with the steps
                and with the ODE solved exactly. It returns the loss of this process alone; :attr:`reduce` takes the mean
                over several. Without it only the solver error of the last batch is checked.
        """
        searched, trial = self._require_start(), self._stage.trial
        self._check_looks(measure)
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if self._found and self.target is not None:
            excess = (value - self.target) / self._unit
            self._share = 1.0 / max(1.0, excess / GENTLE) if math.isfinite(excess) else 1.0 / GENTLE
        if searched.reference_loss is not None:
            value = max(self.reduce(searched.reference_loss), value)  # in this order, a NaN stays one
        penalty = self.reduce(searched.penalty)
        self._tick()
        trial.iterations += 1
        self._iterations += 1
        if self._first_loss is None and math.isfinite(value):
            self._first_loss = value
        if self._stage.first is None and math.isfinite(value):
            self._stage.first = value
        known = [x for x in (self._first_loss, self._stage.first, self.target) if x is not None]
        high = max(known, default=0.0)
        if not (math.isfinite(value) and math.isfinite(penalty)) or value > high + (EXPLODED - 1.0) * abs(high):
            self.diverged(f"the loss exploded to {value:.3g}")
        elif self.target is None:
            self._settle(value, measure)
        else:
            self._observe(value, penalty, measure)
        self._tick()
        if sum(t.seconds for t in self.trials) >= self.budget:
            self.done = True

    def _check_looks(self, look: Callable[[], Any] | None) -> None:
        if not (self._looks_checked or look is None):
            self._require_start().refuse_other_intervals(look)
            _refuse_states_between(self._require_start().model, look)
            self._looks_checked = True

    def finish(self) -> Verdict:
        """Returns the verdict so far; the best model found is loaded, and all else is as it was before the search.

        A search that is not :attr:`done` can go on, after another :meth:`start`, at the depth that it was trying.
        """
        searched = self._require_start()
        best = fewest(self.trials)
        if best is not None:
            searched.go_back(self._found[self.trials.index(best)])
        searched.release(best is not None)
        target = self.target if self._judged is None else self._judged[1]
        verdict = Verdict(
            best is not None,
            best or self.trials[-1],
            self.trials,
            target,
            self.solver_tol,
            self._iterations,
            self.figure,
            self.sign,
        )
        (_log.info if best else _log.warning)("%s", verdict)
        return verdict

    @property
    def best(self) -> nn.Module | None:
        """A copy of the model as the best true one so far; None where there is none yet."""
        return None if fewest(self.trials) is None else self.take()

    def take(self, evaluations: int | None = None, *, solver_tol: float | None = None) -> nn.Module:
        """Returns a copy of the model at one of the depths that passed.

        Args:
            evaluations: the most evaluations. The depth with the most that has no more than these is taken.
            solver_tol: the largest solver error. With it alone, or with neither argument, the depth with the fewest
                evaluations is taken.

        Raises:
            ValueError: no depth that passed fits.
        """
        searched = self._require_start()
        fit = [i for i, t in enumerate(self.trials) if t.passed]
        if evaluations is not None:
            fit = [i for i in fit if self.trials[i].evaluations <= checks.count(evaluations, "evaluations", 1)]
        if solver_tol is not None:
            fit = [i for i in fit if self.trials[i].solver_error <= checks.positive(solver_tol, "solver_tol")]
        if not fit:
            passed = [f"{t.evaluations} evaluations at {t.solver_error:.3g}" for t in self.trials if t.passed]
            raise ValueError(
                f"no depth with evaluations={evaluations} and solver_tol={solver_tol} has passed; passed have "
                f"{passed or 'none'}"
            )
        sign = 1 if evaluations is None else -1
        chosen = min(fit, key=lambda i: sign * self.trials[i].evaluations)
        return searched.copy_of(self._found[chosen])

    def fit(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batches: Iterable[Any],
        *,
        lr: float = 0.03,
        held_out: Iterable[Any] | None = None,
        max_iterations: int = 20_000,
        progress: bool = True,
    ) -> Verdict:
        """Trains ``model`` with Adam until the search ends.

        However it ends, also by Ctrl-C or an error, ``model`` is then the best true model found so far.

        Args:
            model: a wrapped model.
            loss: ``loss(model(x), batch)``, a scalar; ``batch`` is an element of ``batches``.
            batches: the training batches, used again and again. Each is ``(x, ...)``, a mapping whose first value is x, or the
                tensor ``x`` itself. The target must be met on every one of them.
            lr: the learning rate to begin with.
            held_out: batches that are never trained on; a depth must pass on them too.
            max_iterations: after so many iterations the search ends with the best model so far.
            progress: whether to show a bar, or a line in 20 seconds where there is no terminal.

        Returns:
            The verdict.

        Raises:
            ValueError: there is no batch, or none when they are gone through again, or the model has nothing to train.
        """
        for name, given in (("batches", batches), ("held_out", held_out)):
            if isinstance(given, Tensor):
                raise TypeError(f"{name} must be a list or a loader of batches; got a tensor: pass [x] for one batch")
        if not _can_be_used_again(batches):
            batches = list(batches)  # gone through many times
        kept = None if held_out is None else list(held_out)
        times = set(times_of(require_spans(model)))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in times}
        # torchdyn gives a field without parameters one that it does not use.
        if all(name.endswith("dummy_parameter") for name in trained):
            raise ValueError(f"{type(model).__name__} has no parameters to train but its times; unfreeze its field")
        optimizer = torch.optim.Adam(trained.values(), lr=checks.positive(lr, "lr"))
        first = next(iter(batches), None)
        if first is None:
            raise ValueError("batches is empty; give at least one (x, ...)")
        _input_of(first)
        loss = with_note(loss, "fit calls loss(model(x), batch), where batch is a whole element of batches")
        modes = [(module, module.training) for module in model.modules()]

        def of(batch: Any) -> Tensor:
            return loss(model(_input_of(batch)), batch)

        def look(batch: Any) -> tuple[Tensor, Tensor | None]:
            out = model(_input_of(batch))
            return loss(out, batch), _predicted(out, batch)

        def held_out_look(batch: Any) -> tuple[Tensor, Tensor | None]:
            value, predicted = look(batch)
            self._held_out_losses.append(float(value))
            return value, predicted

        def once_more() -> Iterator[Any]:
            any_came = False
            for batch in batches:
                any_came = True
                yield batch
            if not any_came:  # the training would wait for ever, and a look find nothing wrong
                raise ValueError(
                    "batches gave no batch when gone through again; give a list, or a loader that begins anew each time"
                )

        def looks() -> Iterator[Look]:
            yield from (functools.partial(look, batch) for batch in once_more())
            yield from (functools.partial(held_out_look, batch) for batch in kept or ())

        refuse_other_intervals(model, functools.partial(of, first))
        _refuse_states_between(model, functools.partial(of, first))  # with the steps that the model has
        self.start(model, optimizer)
        try:
            model.train()
            self._looks, self.batches_seen_together = looks, len(batches)  # type: ignore[arg-type]
            if (
                self.first is not None
                and not self._iterations
                and self.target is not None
                and self._verified(None).passed
            ):
                self._pass()
            with progress_shown(progress) as show:
                while not self.done and self._iterations < max_iterations:
                    for batch in once_more():
                        self._iterate(batch, of, optimizer)
                        if self.done or self._iterations >= max_iterations:
                            break
                        show(self.status(), self._iterations, None)
        finally:
            for module, mode in modes:
                module.training = mode
            self._looks = self._hardest = None
            verdict = self.finish()
        return verdict

    def _iterate(self, batch: Any, of: Callable[[Any], Tensor], optimizer: torch.optim.Optimizer) -> None:
        def closure() -> Tensor:
            return of(batch)

        try:
            value = closure()
            if not getattr(value, "requires_grad", False):  # the penalty has a gradient of its own, and would hide it
                raise ValueError(
                    "the loss has no gradient, so it cannot be trained. A count, such as an accuracy, can be one more "
                    "condition: accept=function. Parameters that are frozen, or torch.no_grad() around, leave it none either"
                )
            checks.scalar(value, "the loss")
            optimizer.zero_grad()
            (value + self.penalty(closure)).backward()
            optimizer.step()
        except IntegrationError as error:
            self.diverged(str(error))
        else:
            self.step(value, closure)

    def status(self) -> str:
        """Returns one line on where the search is."""
        self._require_start()
        t, best = self._stage.trial, fewest(self.trials)
        target = "until it settles" if self.target is None else f"target {self.target:.3g}"
        found = "" if best is None else f"; best so far: {counted(best.evaluations)}"
        low = f"lowest loss {t.training_loss:.3g} ({target}), " if math.isfinite(t.training_loss) else ""
        return f"{t.label}: {low}iteration {self._iterations}{found}"

    def diverged(self, why: str) -> None:
        """Goes back to the last good state, with a lower learning rate. Call it after a loss or a solve that failed.

        If the first depth cannot solve the untrained model on every batch of a pass, more steps are tried at once.
        """
        searched = self._require_start()
        self._stage.trial.missed = "solve"
        if self.trials[-1].iterations < self.batches_seen_together and not self._found:
            self._failed, self._stage.short = True, False
            _log.info("%s", why)
            self._next()
        elif self._slower(why):
            searched.go_back(self._good)

    # ----------------------------------------------------------------------------------------------------- its actions

    def _require_start(self) -> SearchedModel:
        if self._searched is None:
            raise RuntimeError("the search was not started; call start(model, optimizer), or fit(...)")
        return self._searched

    @property
    def _instead(self) -> str | None:
        """The solver in the place of adaptive ones: who names solvers, which all have fixed steps, does not want those."""
        return next((name for name in self.solvers if name in STOCK), "rk4") if self.solvers else None

    def _tick(self) -> None:
        """Adds the time since the last tick to the present trial, and the evaluations of the field with it."""
        now = perf_counter()
        self._stage.trial.seconds += now - self._clock
        self._clock = now
        searched = self._require_start()
        self._stage.trial.spent += searched.spent
        searched.spent = 0

    def _enter(self, depths: Sequence[Depth]) -> None:
        """Begins the training at another depth."""
        searched, trial = self._require_start(), Trial.at(depths)
        passed = sum(t.spent for t in self.trials if t.passed)
        self.trials.append(trial)
        self._failed = self._looked = False
        steps = max(depth.steps if depth.stages is None else 1 for depth in depths)
        self._stage = Stage(trial, reference=max(LEAST_REFERENCE, 2 * steps))
        self._share = 1.0 / GENTLE if self._found else 1.0
        an_iteration = trial.evaluations + Depth("rk4", self._stage.reference).evaluations
        self._stage.budget = max(BUDGET * passed, LEAST_ITERATIONS * an_iteration) if self._found else math.inf
        searched.lay(depths)
        searched.rates = self._rates
        self._stage.weight = self._first_weight()
        self._good.take(searched.model)
        _log.info("trying %s (%s)", trial.label, counted(trial.evaluations))

    @property
    def _bound(self) -> float:
        """The bound of the penalty: the square of that of the solver error, or 1 where the steps are counted."""
        return 1.0 if self._require_start().adaptive else self.solver_tol**2

    def _first_weight(self) -> float:
        unit = self.target if self.target is not None and self.target > 0 and math.isnan(self._unit) else self._unit
        self._unit = 0.0 if unit is None or math.isnan(unit) else unit
        return (1.0 if self._found else LIGHT) * self._unit / self._bound

    def _observe(self, value: float, penalty: float, measure: Callable[[], Any] | None) -> None:
        """Takes in an iteration with a target; looks at the exact solution, or gives up, where it is time for that."""
        searched, stage, trial = self._require_start(), self._stage, self._stage.trial
        assert self.target is not None and self._first_loss is not None
        if self._unit <= 0.0:  # a target below zero has no size of its own
            self._unit = max(abs(self._first_loss - self.target), 1e-12)
            stage.weight = self._first_weight()
        met = stage.observe(
            value,
            penalty,
            target=self.target,
            unit=self._unit,
            bound=self._bound,
            batches=self.batches_seen_together,
        )
        if stage.smooth is not None and stage.smooth > 0:  # else the last look says what is missing
            step = "evaluations" if searched.adaptive else "solver error"
            trial.missed = step if stage.pull > 0 else "loss" if self.judge is None else "training loss"
        if stage.since == 0 and trial.iterations % KEEP_EVERY == 0:
            self._good.take(searched.model)
        # At least a pass: the mean loss of a pass cannot settle in less.
        descending = bool(self._found)
        patience = max(self.patience, self.batches_seen_together)
        if met:
            self._look(measure, penalty)
        elif stage.hopeless and stage.drops == 0 and stage.best < math.log(FAR) and trial.spent < stage.budget:
            self._slower("little progress near the bounds")
            stage.path.clear()
        elif stage.hopeless or (not descending and trial.iterations > MOST_PATIENCE * patience * (1 + self._restarts)):
            self._next()
        elif self._rests_far and trial.iterations >= RAISE_AFTER and self._may_raise:
            self._faster(f"not met in {trial.iterations} iterations")
        elif stage.since > patience or (stage.since > PLATEAU and self._rests_far and len(self.trials) == 1):
            self._stalled(patience)

    @property
    def _rests_far(self) -> bool:
        return self._stage.best > math.log(FAR) and not self._found

    def _stalled(self, patience: int) -> None:
        searched, stage, first = self._require_start(), self._stage, self._first_loss or 0.0
        nothing_learnt = self.target is not None and stage.trial.training_loss > self.target + LEARNT * abs(
            first - self.target
        )
        far = self._rests_far
        if far and not searched.adaptive and len(self.trials) == 1 and not self._restarts:
            # Four steps may be too few to learn with: some trainings rest on a plateau that only the ODE itself leaves.
            self._failed = True
            self._next()
        elif far and self._may_raise:
            self._faster(f"no progress in {patience} iterations")
        elif not self._found and (far or nothing_learnt) and self._restarts < MOST_RESTARTS:
            # A rate that was raised in vain was too high before, if anything.
            undone = RAISE if self._raised and not self._restarts else 1.0
            self._begin_again(BACK_OFF / undone, f"no progress in {patience} iterations")
        elif stage.drops < (DROPS_NEAR if stage.near else DROPS_FAR):
            self._slower(f"no progress in {patience} iterations")
        else:
            self._next()

    def _settle(self, value: float, measure: Callable[[], Any] | None) -> None:
        """Trains the first model until its loss settles at a lower rate too, which then says what the target is."""
        searched, stage, trial = self._require_start(), self._stage, self._stage.trial
        assert self._first_loss is not None
        self._losses.append(value)
        trial.training_loss = min(trial.training_loss, value)
        if not self._looked:  # else the last look says what is missing
            trial.missed = "settling"
        window = max(WINDOW, self.batches_seen_together)
        recent = self._losses[-window:]
        fallen = self._first_loss - sum(recent) / len(recent)
        self._unit = max(self.slack * fallen, 0.0)
        stage.weight = 4.0**stage.failed_looks * self._unit / self._bound
        if trial.iterations % KEEP_EVERY == 0:
            self._good.take(searched.model)
        late = sum(t.seconds for t in self.trials) >= self.budget / 2
        before = self._losses[-2 * window : -window]
        settled = len(before) == window and (sum(before) - sum(recent)) / window < SETTLED * max(fallen, 0.0)
        if not (late or settled) or trial.iterations < stage.next_check:
            return
        if not (late or stage.drops):  # what the loss rests at is the noise of this rate
            stage.next_check = trial.iterations + 2 * window
            self._slower("the loss has settled")
            return
        found = self._verified(measure)
        if found.passed:
            self._set_target(max(found.loss, found.reference_loss), sum(recent) / len(recent))
            self._pass()
            return
        stage.next_check = trial.iterations + window
        if found.solver_error <= self.solver_tol:
            self._slower("the loss has settled, and not all bounds are met")
        elif stage.failed_looks < FAILED_SETTLINGS:
            stage.failed_looks += 1
            self._refine()
        else:
            stage.short = True
            self._next()

    def _set_target(self, reached: float, mean: float) -> None:
        """Sets the target, from what the first model has reached and the mean of its last losses."""
        assert self._first_loss is not None
        if self._judged is not None:
            first, wanted = self._judged
            if reached > first:
                before, now = self.sign * first, self.sign * reached
                warnings.warn(
                    f"{self.figure} was {before:.4g} before the training and is {now:.4g} after it, which counts as worse. "
                    f"If a {'larger' if self.sign > 0 else 'smaller'} value is better, change the mode to "
                    f"'{'max' if self.sign > 0 else 'min'}'",
                    stacklevel=2,
                )
            if math.isinf(wanted):
                self._judged = first, reached + self.slack * max(first - reached, 0.0)
            at, wanted = self.sign * reached, self.sign * self._judged[1]
            _log.info("%s is %.4g; the target, which decides, is %.4g", self.figure, at, wanted)
            reached = mean
        if not math.isfinite(reached):  # nothing was measured but the loss of training
            reached = mean
        self._unit = max(self.slack * (self._first_loss - reached), 1e-12)
        self.target = reached + self._unit
        _log.info("the loss in training has settled at %.4g; its target is %.4g", reached, self.target)

    def _verified(self, measure: Callable[[], Any] | None) -> Verification:
        """Holds the model as it is now against all its bounds, and writes the figures down."""
        searched, trial = self._require_start(), self._stage.trial
        looks = self._looks() if self._looks is not None else [measure or self._solve_again]
        target = self.target
        if self.judge is not None and self._judged is not None:
            looks, target = [self.judge], self._judged[1]
        self._looked = True
        self._held_out_losses.clear()
        one = functools.partial(
            verify,
            searched.model,
            target=target,
            solver_tol=self.solver_tol,
            evaluations=trial.evaluations,
            reduce=self.reduce,
        )
        found = None if self._hardest is None else one([self._hardest])
        if found is None or found.passed:
            self._held_out_losses.clear()
            found = one(self._remembered(looks), accept=self.accept)
            self._hardest = None if found.passed or self._looks is None else self._hardest
        trial.solver_error, trial.changed = found.solver_error, found.changed
        # Held-out batches are looked at last: if one of them was, it is the one that failed.
        held_out = bool(self._held_out_losses) and found.missed in ("loss", "exact loss")
        if math.isfinite(found.loss) and not held_out:
            trial.loss = found.loss
        if math.isfinite(found.reference_loss) and not held_out:
            trial.reference_loss = found.reference_loss
        trial.held_out_loss = max(self._held_out_losses, default=math.inf)
        trial.missed = "held-out loss" if held_out else found.missed
        return found

    def _remembered(self, looks: Iterable[Look]) -> Iterator[Look]:
        """Remembers the last of the looks that were taken: where they end early, it is the one that failed."""
        for self._hardest in looks:
            yield self._hardest

    def _solve_again(self) -> float:
        for span in self._require_start().spans:
            span.solve_again()
        return -math.inf

    def _look(self, measure: Callable[[], Any] | None, penalty: float) -> None:
        found = self._verified(measure)
        if found.passed:
            self._pass()
        elif (
            found.missed in OF_THE_REFERENCE
            and not self._require_start().adaptive
            and self._stage.misled(penalty, self.solver_tol)
        ):
            self._refine()

    def _refine(self) -> bool:
        """Gives the reference twice the steps; returns whether it may have them."""
        if self._stage.reference >= MOST_REFERENCE:
            return False
        self._stage.reference *= 2
        _log.info("the reference missed some of the solver error: %d steps of rk4", self._stage.reference)
        return True

    def _pass(self) -> None:
        state = Snapshot()
        state.take(self._require_start().model)
        self._found[len(self.trials) - 1] = state
        self._stage.trial.passed = True  # only now: what ends the search before must not look for the state
        if self._stage.drops:  # the rate before was too high to come to rest within the bounds
            self._rates = self._require_start().rates
        self._next()

    def _next(self) -> None:
        """Goes on to the next depth, or to the end."""
        searched, trial = self._require_start(), self._stage.trial
        self._tick()
        why = MISSED[trial.missed].format(self.figure) if trial.missed else ""
        _log.info("%s is %s%s", trial.label, "enough" if trial.passed else "not enough", f": {why}" if why else "")
        depths = None
        if self._found or self._solver_was_short():
            depths = next_depths(self.trials, searched.own, self.solvers, self.max_steps)
        if depths is None:
            self.done = True
            return
        best = fewest(self.trials)
        if best is None:
            # Where the steps left the ODE, the loss at the reference was learned all the same. Else the model is stuck.
            if searched.adaptive or not self._stage.short:
                searched.go_back(self._initial)
        elif not trial.passed:
            searched.go_back(self._found[self.trials.index(best)])
        self._enter(depths)

    def _solver_was_short(self) -> bool:
        """Whether a first depth that failed did so for its solver, which more steps mend, and not for its loss."""
        error = self._stage.trial.solver_error
        return self._failed or (self._looked and error > self.solver_tol)

    def _begin_again(self, slower: float, why: str) -> None:
        """Goes back to where this search began; ``slower`` stays on the learning rate."""
        searched = self._require_start()
        self._restarts += 1
        searched.go_back(self._initial)
        searched.rates = self._rates
        searched.scale_rates(slower)
        self._rates = searched.rates
        self._stage.restart(self._first_weight())
        _log.info("%s: once more from the start, learning rate times %g", why, slower)

    @property
    def _may_raise(self) -> bool:
        """Whether the learning rate may be raised: once, where nothing has shown yet that it is too high."""
        return not (self._raised or self._restarts or self._stage.drops)

    def _faster(self, why: str) -> None:
        searched, stage = self._require_start(), self._stage
        self._raised, stage.since, stage.smooth = True, 0, None
        searched.scale_rates(RAISE)
        self._rates = searched.rates
        _log.info("%s: learning rate times %g", why, RAISE)

    def _slower(self, why: str) -> bool:
        """Lowers the learning rate; returns False where that was done too often, and the depth is given up instead."""
        stage = self._stage
        stage.drops += 1
        stage.since, stage.smooth = 0, None
        if stage.drops > MOST_DROPS:
            self._next()
            return False
        self._require_start().scale_rates(BACK_OFF)
        _log.info("%s: learning rate times %g", why, BACK_OFF)
        return True

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, for a checkpoint in the middle of a search."""
        return {
            "trials": [asdict(t) for t in self.trials],
            "stage": {**asdict(self._stage), "trial": len(self.trials) - 1} if self.trials else None,
            "iterations": self._iterations,
            "first_loss": self._first_loss,
            "losses": list(self._losses),
            "target": self.target,
            "unit": self._unit,
            "done": self.done,
            "raised": self._raised,
            "own": self._own,
            "failed": self._failed,
            "looked": self._looked,
            "judged": self._judged,
            "restarts": self._restarts,
            "base_lr": copy.deepcopy(self._rates),
            "good": self._good.state_dict(),
            "initial": self._initial.state_dict(),
            "found": {i: state.state_dict() for i, state in self._found.items()},
            "share": self._share,
            "batches": self.batches_seen_together,
            "searched": None if self._searched is None else self._searched.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`; call it before :meth:`start`.

        Raises:
            ValueError: the state is not that of a search.
        """
        if missing := [name for name in ("trials", "iterations", "initial") if name not in state]:
            raise ValueError(f"this is no state of a Shallowest: {missing} are missing; got the keys {sorted(state)}")
        judged, given = state.get("judged"), self.target
        kept = state.get("target") if judged is None else judged[1]
        if given is not None and kept is not None and not math.isclose(given, kept) and state["trials"]:
            warnings.warn(f"the search goes on with its own target, {kept:.4g}, and not with {given:.4g}", stacklevel=2)
        if self._searched is not None:
            self._searched.release(True)
            self._searched = None  # the state may be that of a search of another model
        # Before this version the loss was that of the training until a look had measured it.
        self.trials = [Trial(**{"training_loss": t["loss"], **t}) for t in state["trials"]]
        self._iterations, self._restarts = state["iterations"], state["restarts"]
        self._first_loss, self._rates, self.done = state["first_loss"], state["base_lr"], state["done"]
        for name in ("good", "initial"):
            getattr(self, f"_{name}").load_state_dict(state[name])
        if "rung" in state:
            self._from_version_0_1(state)
            return
        if self.trials:
            self._stage = Stage(**{**state["stage"], "trial": self.trials[-1]})
        self.target, self._unit, self._raised = state["target"], state["unit"], state["raised"]
        self._failed, self._looked = state.get("failed", False), state.get("looked", False)
        self._own, self.batches_seen_together = state.get("own"), state.get("batches", self.batches_seen_together)
        self._judged = None if state["judged"] is None else tuple(state["judged"])
        self._losses, self._resumed, self._share = list(state["losses"]), state["searched"], state["share"]
        self._found = {}
        for i, kept in state["found"].items():
            self._found[int(i)] = Snapshot()
            self._found[int(i)].load_state_dict(kept)

    def _from_version_0_1(self, state: Mapping[str, Any]) -> None:
        """Takes over a search of version 0.1, which kept the best state alone, and nothing of the others that passed."""
        best = fewest(self.trials)
        for trial in self.trials:
            trial.passed = trial is best
        if best is not None:
            kept = Snapshot()
            kept.load_state_dict(state["found"])
            self._found = {self.trials.index(best): kept}
        rung = state["rung"]
        if rung is not None:
            same = {k: rung[k] for k in ("weight", "smooth", "best", "since", "drops", "next_check", "mean_loss")}
            self._stage = Stage(self.trials[-1], **same)
        self._unit = self.target if self.target is not None else math.nan


def _refuse_states_between(model: nn.Module, look: Callable[[], Any]) -> None:
    """Raises where a loss would be of states at other times when the steps change."""
    if looks_between(model, look):
        raise ValueError(
            f"the loss of {type(model).__name__} depends on states between the ends of a span. The search changes the steps, "
            "which decide the times of these states, or must land on them: ask for them by node(x, times, dense=True), which "
            "gives them at the same times whatever the steps are"
        )


def _names_of(solvers: Any) -> tuple[str, ...]:
    """Returns the names of solvers that a search may take."""
    names = None if isinstance(solvers, str) or not isinstance(solvers, Iterable) else tuple(solvers)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"solvers must be a list of names, such as ['midpoint']; got {solvers!r}")
    known = (*STOCK, "learned")
    for name in names:
        if name not in known:
            raise ValueError(
                f"solvers={list(names)} must be of {', '.join(known)}, which have fixed steps; got {name!r}"
            )
    return names


def _can_be_used_again(batches: Iterable[Any]) -> bool:
    """Returns whether it is known how many batches there are, and each pass over them begins anew.

    A loader of a data set that is a stream does not know how many. An iterator may know, and ends with its first pass.
    """
    try:
        known = len(batches) >= 0  # type: ignore[arg-type]
    except TypeError:
        return False
    # A loader is no Iterator. It is not asked for one here, which would draw a random number.
    return known and not (isinstance(batches, Iterator) and iter(batches) is batches)


def _input_of(batch: Any) -> Any:
    """Returns what the model is called with."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping) and batch:
        return next(iter(batch.values()))
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        return batch[0]
    raise ValueError(f"a batch must be x, (x, ...) or a mapping that begins with x; got {type(batch).__name__}")


def _predicted(out: Any, batch: Any) -> Tensor | None:
    """Returns the classes that a model predicts, where its output and the batch's second entry say that it does."""
    target = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not (isinstance(target, Tensor) and not target.is_floating_point() and target.dim() == 1):
        return None
    fits = isinstance(out, Tensor) and out.dim() == 2 and out.shape[0] == len(target) and out.shape[1] > 1
    return out.argmax(1) if fits else None
