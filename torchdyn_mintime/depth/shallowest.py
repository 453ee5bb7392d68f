r"""The search for the fewest evaluations at which a loss is met and the model is still its own ODE.

For an autonomous field, (f, t_f) and (c f, t_f / c) trace the same path, so a short interval proves nothing. What costs is
the number of evaluations, and what keeps it honest is the solver error. The interval is therefore left as it is, and
the search goes over the number of steps, and over solvers of lower order, while the field is trained on the loss and on
:class:`~torchdyn_mintime.losses.step_doubling.StepDoubling`, whose weight follows the two constraints.

An adaptive solver keeps to its tolerance by itself and chooses its steps. There the field is trained with
:class:`~torchdyn_mintime.losses.step_count.StepCount` until so many steps are what it chooses.

Which depth comes next is decided in :mod:`~torchdyn_mintime.depth.ladder`, how the training at one depth goes on in
:mod:`~torchdyn_mintime.depth.stage`, and whether a model is within its bounds in
:mod:`~torchdyn_mintime.depth.verification`. Here is the loop that puts them together.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import asdict
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from torchdyn_mintime.core import TOLERANCE, checks, freeze_times
from torchdyn_mintime.depth.ladder import evaluations_of, first_depth, next_depth
from torchdyn_mintime.depth.rollback import Snapshot
from torchdyn_mintime.depth.searched_model import SearchedModel, set_steps
from torchdyn_mintime.depth.stage import Stage
from torchdyn_mintime.depth.trials import Trial, Verdict
from torchdyn_mintime.depth.verification import verify
from torchdyn_mintime.losses.step_count import StepCount
from torchdyn_mintime.losses.step_doubling import StepDoubling
from torchdyn_mintime.numerics import IntegrationError, make_stepper

__all__ = ["Shallowest", "Trial", "Verdict", "set_steps"]

_log = logging.getLogger(__name__)

EXPLODED = 10.0
"""A loss of this many times the first one has exploded: the training goes back to its last good state."""
BACK_OFF = 0.3
"""The learning rate is multiplied by this where progress stalls, the loss explodes or nothing is learned."""
MOST_DROPS = 8
"""A depth is given up where its learning rate would be lowered more often than this, for whatever reason."""
DROPS_NEAR, DROPS_FAR = 2, 1
"""The learning rate is lowered this often where progress stalls near the bounds, and far from them; then the depth ends."""
LEARNT = 0.3
"""A training that stalls above this share of its first loss has not begun to learn: it starts again, more slowly."""
MOST_RESTARTS = 3
"""The training starts again because nothing was learned this many times in a search, at most."""
MOST_PATIENCE = 10
"""A depth is given up after this many times the patience, however slowly it still improves."""
MOST_REFINED = 8
"""The penalty splits each step into this many parts, at most."""
KEEP_EVERY = 10
"""The good state is kept at iterations divisible by this, where they made progress."""


class Shallowest:
    """Finds the fewest evaluations at which a loss is met and the solver error stays below a tolerance.

    It starts at one step (an adaptive solver at two), trains with step doubling (with the count of steps), adds steps
    only when progress stalls, and, once a depth has passed, tries cheaper solvers from the model found. The learning rate
    is lowered when progress stalls or the loss explodes, in which case the last good state comes back.

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
        trials: what was tried (:class:`Trial`).
        reduce: takes the mean of a number over the processes, where several run.
        batches_seen_together: how many batches a pass has; the mean loss of a pass is held against the target.

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
        self.solvers = None if solvers is None else _fixed_step(solvers)
        if accept is not None and not callable(accept):
            raise TypeError(f"accept must be a function without arguments; got {accept!r}")
        self.accept = accept
        self.reduce: Callable[[float], float] = float
        self.batches_seen_together = 1
        self.trials: list[Trial] = []
        self.done = False
        self._searched: SearchedModel  # from start on
        self._stage: Stage
        self._term: StepDoubling | StepCount
        self._rates: list[list[float]] = []
        self._thawed: list[Tensor] = []
        self._iterations = self._restarts = 0
        self._first_loss: float | None = None
        self._initial, self._good, self._found = Snapshot(), Snapshot(), Snapshot()

    # ----------------------------------------------------------------------------------------------- driving a search

    def start(self, model: nn.Module, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Takes hold of the model and its optimizers, and sets every span to few steps. Times are frozen meanwhile."""
        self._searched = SearchedModel(model, optimizers)
        self._thawed = freeze_times(self._searched.spans)
        if self.trials:  # resumed from a checkpoint
            self._use(self.trials[-1])
        else:
            self._rates = self._searched.rates
            self._enter(*first_depth(self._searched.stepper.name))
            self._initial.take(model)

    def penalty(self) -> Tensor:
        """Returns the term on the last forward that keeps to the steps, at its present weight: add it to the loss."""
        self._require_start()
        value = self._term.penalty()
        self._last_penalty = value.detach()
        return self._stage.weight * value

    def step(self, loss: float | Tensor, measure: Callable[[], float | Tensor] | None = None) -> None:
        """Looks at the progress and decides; to be called after the optimizer's step.

        Args:
            loss: of the last forward, averaged over the processes where several run.
            measure: computes the loss once more with the model as it is now; called under ``no_grad``, and with the
                ODE solved exactly. Of this process alone: :attr:`reduce` takes the mean where several run. Without it only
                the solver error of the last batch is held against its bound.
        """
        self._require_start()
        stage, trial = self._stage, self._stage.trial
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        penalty = self.reduce(float(self._last_penalty))
        self._iterations += 1
        trial.iterations += 1
        if self._first_loss is None and math.isfinite(value):
            self._first_loss = value
        first = self._first_loss or 0.0
        if not (math.isfinite(value) and math.isfinite(penalty)) or value > EXPLODED * first:
            self.diverged(f"the loss exploded to {value:.3g}")
            return
        bound = self._searched.penalty_bound(self.solver_tol)
        met = stage.observe(value, penalty, target=self.target, bound=bound, batches=self.batches_seen_together)
        if stage.since == 0 and trial.iterations % KEEP_EVERY == 0:
            self._good.take(self._searched.model)
        # At least a pass: the mean loss of a pass cannot settle in less.
        patience = max(self.patience, self.batches_seen_together)
        if met:
            self._look(measure, penalty)
        elif trial.iterations > MOST_PATIENCE * patience:
            self._next()
        elif stage.since > patience:
            if not self._found and trial.loss > LEARNT * first and self._restarts < MOST_RESTARTS:
                self._begin_again(BACK_OFF, f"nothing learnt in {self.patience} iterations")
            elif stage.drops < (DROPS_NEAR if stage.near else DROPS_FAR):
                self._slower(f"no progress in {self.patience} iterations")
            else:
                self._next()

    def finish(self) -> Verdict:
        """Returns the verdict so far; the best model found is loaded, and times may be trained again.

        A search that is not :attr:`done` can go on, after another :meth:`start`: from the model found, if there is one,
        at the steps it was trying.
        """
        self._require_start()
        passed = [t for t in self.trials if t.passed]
        best = min(passed, key=lambda t: t.evaluations) if passed else self.trials[-1]
        if self._found:
            self._use(best)
            self._found.restore(self._searched.model)
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
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=checks.positive(lr, "lr"))
        self.start(model, optimizer)
        model.train()
        if not isinstance(batches, Sized):
            batches = list(batches)  # gone through many times
        self.batches_seen_together = count = len(batches)

        def of(batch: Any) -> Tensor:
            return loss(model(batch if isinstance(batch, Tensor) else batch[0]), batch)

        def measure() -> float:
            return sum(float(of(batch)) for batch in batches) / count

        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=None)
            while not self.done and self._iterations < max_iterations:
                for batch in batches:
                    try:
                        value = of(batch)
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
        """Returns one line on where the search is."""
        self._require_start()
        t = self._stage.trial
        return f"{t.steps} x {t.solver}: loss {t.loss:.3g} (target {self.target:g}), iteration {self._iterations}"

    def diverged(self, why: str) -> None:
        """Goes back to the last good state, with a lower learning rate: after a loss or a solve that failed."""
        self._require_start()
        if self._slower(why):
            self._searched.go_back(self._good)

    # ----------------------------------------------------------------------------------------------------- its actions

    def _require_start(self) -> None:
        if not hasattr(self, "_searched"):
            raise RuntimeError("the search was not started; call start(model, optimizer), or fit(...)")

    def _enter(self, solver: str, steps: int) -> None:
        """Begins the training at another depth."""
        trial = Trial(solver, steps, evaluations_of(solver, steps))
        self.trials.append(trial)
        self._stage = Stage(trial)
        self._use(trial)
        self._stage.weight = self.target / self._searched.penalty_bound(self.solver_tol)
        self._searched.rates = self._rates
        self._good.take(self._searched.model)
        _log.info("trying %d x %s (%d evaluations)", steps, solver, trial.evaluations)

    def _use(self, trial: Trial) -> None:
        """Lays the steps of a trial, and takes the penalty that keeps to them."""
        self._term = self._searched.lay(trial, self._stage.refinement)
        self._stage.refinement = getattr(self._term, "refinement", 0)

    def _look(self, measure: Callable[[], float | Tensor] | None, penalty: float) -> None:
        """Holds the model as it is now against all its bounds."""
        model, stage, trial = self._searched.model, self._stage, self._stage.trial
        found = verify(
            model,
            measure,
            target=self.target,
            solver_tol=self.solver_tol,
            evaluations=trial.evaluations,
            accept=self.accept,
            reduce=self.reduce,
        )
        trial.passed, trial.solver_error = found.passed, found.solver_error
        if measure is not None and found.loss <= self.target:
            trial.loss = found.loss
        if found.reference_loss is not None:
            trial.reference_loss = found.reference_loss
        if found.passed:
            self._found.take(model)
            self._next()
        elif not self._searched.stepper.adaptive and math.isfinite(found.solver_error) and stage.misled(penalty):
            # It starts again, and is held against finer steps from the start.
            if stage.refinement < MOST_REFINED:
                stage.refinement *= 2
                self._begin_again(1.0, "the penalty missed most of the solver error")
            else:
                self._next()

    def _next(self) -> None:
        """Goes on to the next depth, or to the end."""
        trial = self._stage.trial
        _log.info("%d x %s is %s", trial.steps, trial.solver, "enough" if trial.passed else "not enough")
        depth = next_depth(self.trials, self.solvers, self.max_steps)
        if depth is None:
            self.done = True
        else:
            # What was learned with too few steps is no good start for more: it is stuck, or no longer the ODE.
            self._searched.go_back(self._found or self._initial)
            self._enter(*depth)

    def _begin_again(self, slower: float, why: str) -> None:
        """Goes back to where this search, or its way down, began; ``slower`` stays on the learning rate."""
        self._restarts += 1
        self._searched.go_back(self._found or self._initial)
        self._use(self._stage.trial)  # the state holds the steps and the solver that it was saved with
        self._rates = self._searched.rates = _times(slower, self._rates)
        self._stage.restart(self.target / self._searched.penalty_bound(self.solver_tol))
        _log.info("%s: once more from the start, learning rate times %g", why, slower)

    def _slower(self, why: str) -> bool:
        """Lowers the learning rate; returns False where that was done too often, and the depth is given up instead."""
        stage = self._stage
        stage.drops += 1
        stage.since, stage.smooth = 0, None
        if stage.drops > MOST_DROPS:
            self._next()
            return False
        self._searched.rates = _times(BACK_OFF, self._searched.rates)
        _log.info("%s: learning rate times %g", why, BACK_OFF)
        return True

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, for a checkpoint in the middle of a search."""
        return {
            "trials": [asdict(t) for t in self.trials],
            "rung": {**asdict(self._stage), "trial": len(self.trials) - 1} if self.trials else None,
            "iterations": self._iterations,
            "first_loss": self._first_loss,
            "done": self.done,
            "good": self._good.state_dict(),
            "found": self._found.state_dict(),
            "initial": self._initial.state_dict(),
            "restarts": self._restarts,
            "base_lr": copy.deepcopy(self._rates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`; call it before :meth:`start`.

        Raises:
            ValueError: the state is not that of a search, or is that of an older version.
        """
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"this is no state of a Shallowest: {missing} are missing; got the keys {sorted(state)}")
        self.trials = [Trial(**t) for t in state["trials"]]
        if self.trials:
            self._stage = Stage(**{**state["rung"], "trial": self.trials[-1]})
        self._iterations, self._restarts = state["iterations"], state["restarts"]
        self._first_loss, self._rates, self.done = state["first_loss"], state["base_lr"], state["done"]
        for name in ("good", "found", "initial"):
            getattr(self, f"_{name}").load_state_dict(state[name])


def _times(factor: float, rates: list[list[float]]) -> list[list[float]]:
    return [[factor * rate for rate in own] for own in rates]


def _fixed_step(solvers: Any) -> tuple[str, ...]:
    """Returns the names of solvers, all of fixed steps."""
    names = None if isinstance(solvers, str) or not isinstance(solvers, Iterable) else tuple(solvers)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"solvers must be a list of names, such as ['midpoint']; got {solvers!r}")
    for name in names:
        if make_stepper(name).adaptive:
            raise ValueError(f"solvers={list(names)} must be of fixed steps; {name!r} chooses its own")
    return names
