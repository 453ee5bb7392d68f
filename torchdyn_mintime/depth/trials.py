"""The records of a search: a depth, what was tried at it, and what was found."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torchdyn_mintime.numerics import make_stepper

__all__ = ["Depth", "Trial", "Verdict", "fewest"]

MISSED = {
    "loss": "the {} missed the target",
    "training loss": "the loss in training missed its target",
    "exact loss": "the {} missed the target when solved exactly",
    "held-out loss": "the {} on held-out batches missed the target",
    "solver error": "the solver error was above the tolerance",
    "evaluations": "the solver took more steps",
    "accept": "accept returned False",
    "settling": "the loss had not settled",
    "solve": "the solve failed or the loss exploded",
}
"""Says in words which bound a depth missed; ``{}`` is the figure that is held against the target."""


@dataclass(frozen=True)
class Depth:
    """How one span is solved.

    Attributes:
        solver: torchdyn's name, or "learned-s" for a LearnableSolver of s stages.
        steps: the number of its equal steps; for an adaptive solver, of accepted steps.

    Example:
        >>> Depth("rk4", 2).evaluations, Depth("learned-3", 1).evaluations, str(Depth("rk4", 2))
        (8, 3, '2 x rk4')
    """

    solver: str
    steps: int

    @property
    def stages(self) -> int | None:
        """The stages of a LearnableSolver; None of another solver."""
        return int(self.solver.removeprefix("learned-")) if self.solver.startswith("learned-") else None

    @property
    def evaluations(self) -> int:
        """Evaluations of the field. An adaptive solver takes two more, for the size of its first step."""
        if self.stages is not None:
            return self.steps * self.stages
        stepper = make_stepper(self.solver)
        return 2 + self.steps * (stepper.evaluations - 1) if stepper.adaptive else self.steps * stepper.evaluations

    def __str__(self) -> str:
        return self.solver if self.stages is not None else f"{self.steps} x {self.solver}"


@dataclass
class Trial:
    """A depth that was tried.

    Attributes:
        solver, steps: what was tried; with several spans, for the first one.
        evaluations: evaluations of the field in a forward, of all spans together.
        iterations: iterations of training.
        passed: whether loss, reference loss and solver error were all within their bounds.
        loss, reference_loss: the loss with the steps taken, and with the ODE solved exactly, on the worst batch. Infinite
            if it was not measured. With a metric in the place of the loss they are this metric; where a larger one is
            better, with a minus sign.
        training_loss: the lowest loss of a batch in training.
        held_out_loss: the largest loss on the held-out batches that the last check looked at, with the steps taken or with the
            ODE solved exactly; infinite if it looked at none.
        solver_error: relative to the displacement, on the worst batch and span. Infinite if it was not measured.
        changed: the share of predictions that change if the ODE is solved exactly; None if the model predicts no classes.
        seconds: seconds of training at this depth, with the checks against the exact solution.
        spent: forward evaluations of the field at this depth in training, those of the reference included.
        depths: of each span, in their order.
        missed: the bound that was not met last: "loss", "exact loss", "held-out loss", "solver error", "evaluations" or
            "accept"; "training loss" where a metric is the target, and was not looked at since; "settling" while a loss
            without a target still falls, and "solve" where the solve failed or the loss exploded. Empty if the depth passed.
    """

    solver: str
    steps: int
    evaluations: int
    iterations: int = 0
    passed: bool = False
    loss: float = math.inf
    reference_loss: float = math.inf
    solver_error: float = math.inf
    changed: float | None = None
    seconds: float = field(default=0.0, compare=False)
    spent: int = 0
    held_out_loss: float = math.inf
    depths: tuple[tuple[str, int], ...] = ()
    training_loss: float = math.inf
    missed: str = ""

    @classmethod
    def at(cls, depths: Iterable[Depth]) -> "Trial":
        """Returns a new trial of these depths, one for each span."""
        every = tuple(depths)
        evaluations = sum(depth.evaluations for depth in every)
        pairs = tuple((depth.solver, depth.steps) for depth in every)
        return cls(every[0].solver, every[0].steps, evaluations, depths=pairs)

    @property
    def every(self) -> tuple[Depth, ...]:
        """The depth of each span."""
        return tuple(Depth(*pair) for pair in self.depths) or (Depth(self.solver, self.steps),)

    @property
    def label(self) -> str:
        """The depth in words."""
        return " + ".join(str(depth) for depth in self.every)


def fewest(trials: Iterable[Trial]) -> Trial | None:
    """Returns the passed trial of the fewest evaluations, the last one of equals; None where none passed."""
    passed = [trial for trial in trials if trial.passed]
    return min(reversed(passed), key=lambda trial: trial.evaluations) if passed else None


@dataclass
class Verdict:
    """What a search found.

    Attributes:
        feasible: whether some trial passed.
        best: the trial with the fewest evaluations among those that passed; if none passed, the last one.
        trials: all trials, in the order in which they were tried.
        target, solver_tol: the bounds. The target may have been found by the search.
        iterations: iterations of training, altogether.
        figure: the name of what is held against the target: "loss", or a metric.
        sign: -1 for a metric of which a larger value is better. The losses of the trials and the target are then the metric
            with a minus sign; the text shows it without.
    """

    feasible: bool
    best: Trial
    trials: list[Trial]
    target: float | None
    solver_tol: float
    iterations: int
    figure: str = "loss"
    sign: float = 1.0

    @property
    def front(self) -> list[Trial]:
        """The depths passed on the way, from the most evaluations to the fewest."""
        return sorted((t for t in self.trials if t.passed), key=lambda t: -t.evaluations)

    def __str__(self) -> str:
        head = "found" if self.feasible else "NOT found: the last trial was"
        best, target = self.best, "none"
        if self.target is not None and math.isfinite(self.target):
            target = f"{self.sign * self.target:g}"
        figures = _measured(
            (f"{self.figure} {{:.4g}}", self.sign * best.loss),
            (" and {:.4g} solved exactly", self.sign * best.reference_loss),
        )
        figures = figures or f"{self.figure} not measured"
        figures += _measured((", at most {:.4g} on held-out batches", best.held_out_loss))
        error = _measured(("solver error {:.3g} of the displacement", best.solver_error))
        said = [
            f"{figures} (target {target})",
            f"{error or 'solver error not measured'} (tolerance {self.solver_tol:g})",
            *([] if best.changed is None else [f"{best.changed:.1%} of predictions change when solved exactly"]),
            f"{self.iterations} iterations",
        ]
        lines = [f"{head} {counted(best.evaluations)} ({best.label}): {', '.join(said)}"]
        return "\n".join([*lines, *(self._line(trial) for trial in self.trials)])

    def _line(self, trial: Trial) -> str:
        """Returns what is said about one depth."""
        if not (trial.passed or trial.missed or trial.iterations or math.isfinite(trial.loss)):
            return f"  {trial.label}: not tried any more"
        said = [f"{'passed' if trial.passed else 'failed'} after {trial.iterations} iterations, {trial.seconds:.1f} s"]
        if not trial.passed and trial.missed:
            said.append(MISSED[trial.missed].format(self.figure))
        figures = _measured(
            (f"{self.figure} {{:.4g}}", self.sign * trial.loss), (" / {:.4g}", self.sign * trial.reference_loss)
        )
        # Nothing looked at this depth: all that is known is how low the loss came on a batch of the training.
        figures = figures or _measured(("lowest loss in training {:.4g}", trial.training_loss))
        figures = figures or f"{self.figure} not measured"
        figures += _measured((", held out {:.4g}", trial.held_out_loss), (", solver error {:.3g}", trial.solver_error))
        return f"  {trial.label}: {', '.join([*said, figures])}"


def counted(evaluations: int) -> str:
    """Returns "1 evaluation" or "2 evaluations"."""
    return f"{evaluations} evaluation{'' if evaluations == 1 else 's'}"


def _measured(*figures: tuple[str, float]) -> str:
    """Returns the figures that were measured, each in its words, one behind the other."""
    return "".join(words.format(value) for words, value in figures if math.isfinite(value))
