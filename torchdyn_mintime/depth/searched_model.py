"""The model whose depth is searched for, and its optimizers: how steps are laid, and how a training begins again."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from torchdyn_mintime.core import LearnableSpan, require_spans
from torchdyn_mintime.depth.rollback import Snapshot
from torchdyn_mintime.depth.trials import Trial
from torchdyn_mintime.losses.step_count import StepCount
from torchdyn_mintime.losses.step_doubling import StepDoubling
from torchdyn_mintime.numerics import RungeKutta, Stepper

__all__ = ["SearchedModel", "set_steps"]


def set_steps(span: LearnableSpan, steps: int, solver: str | None = None) -> None:
    """Makes a fixed-step span take ``steps`` equal steps over its present interval, by ``solver`` if given.

    An adaptive one gets no points but the ends, whatever ``steps`` is.
    """
    if solver is not None and span.stepper.name != solver:
        span.solver = solver
    settled, points = span.interval.settled, 2 if span.adaptive else steps + 1
    span.lay(torch.linspace(span.t0.item(), span.t_f.item(), points, dtype=span.t_f.dtype).tolist())
    # Where no span was given yet, the first one passed still says what the interval is.
    span.interval = replace(span.interval, settled=settled)


class SearchedModel:
    """A model with the optimizers that train it at one depth after another.

    Args:
        model: with LearnableSpans of fixed steps, or of one adaptive solver.
        optimizers: one or several.

    Attributes:
        model, optimizers: as above.
        spans: the LearnableSpans of the model.

    Raises:
        ValueError: the model has no span, or spans of different adaptive solvers.
        TypeError: the step control of the adaptive solver cannot be followed.
    """

    def __init__(self, model: nn.Module, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]):
        self.model, self.spans = model, require_spans(model)
        names = sorted({span.stepper.name for span in self.spans})
        if any(span.adaptive for span in self.spans) and len(names) > 1:
            raise ValueError(
                f"the spans have the solvers {', '.join(names)}; a search takes steps of fixed size, or one adaptive solver"
            )
        if self.stepper.adaptive and not isinstance(self.stepper, RungeKutta):
            raise TypeError(
                f"the search follows the step control of tsit5 and dopri5, not that of {self.stepper.name}; set "
                "`span.solver` to one of these, or to a solver of fixed steps"
            )
        self.optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)

    @property
    def stepper(self) -> Stepper:
        """The solver in use."""
        return self.spans[0].stepper

    @property
    def rates(self) -> list[list[float]]:
        """The learning rates, a list for each optimizer. They can be set."""
        return [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @rates.setter
    def rates(self, values: list[list[float]]) -> None:
        for optimizer, rates in zip(self.optimizers, values, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def lay(self, trial: Trial, refinement: int = 0) -> StepDoubling | StepCount:
        """Makes every span take the steps of a trial, and returns the penalty that keeps to them.

        Args:
            trial: the depth.
            refinement: into how many parts StepDoubling splits each step; 0 is as many as the solver needs.
        """
        for span in self.spans:
            set_steps(span, trial.steps, trial.solver)
        if self.stepper.adaptive:
            return StepCount(self.model, trial.steps)
        # A step of low order hides too much of its error from one half as long.
        return StepDoubling(self.model, 1.0, refinement or (2 if self.stepper.order > 2 else 4))

    def penalty_bound(self, solver_tol: float) -> float:
        """Returns the bound of that penalty: the square of the one of the solver error, or 1 where StepCount counts."""
        return 1.0 if self.stepper.adaptive else solver_tol**2

    def go_back(self, state: Snapshot) -> None:
        """Restores the model, and lets the optimizers forget what came after."""
        state.restore(self.model)
        for optimizer in self.optimizers:
            optimizer.state.clear()
