"""The records of a search: a depth, what was tried at it, and what was found."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torchdyn_mintime.numerics import make_stepper

__all__ = ["Depth", "Trial", "Verdict", "fewest"]


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
            if it was not measured.
        held_out_loss: the largest loss on the held-out batches that the last check looked at, with the steps taken or with the
            ODE solved exactly; infinite if it looked at none.
        solver_error: relative to the displacement, on the worst batch and span. Infinite if it was not measured.
        changed: the share of predictions that change if the ODE is solved exactly; None if the model predicts no classes.
        seconds: seconds of training at this depth, with the checks against the exact solution.
        spent: forward evaluations of the field at this depth in training, those of the reference included.
        depths: of each span, in their order.
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
    """

    feasible: bool
    best: Trial
    trials: list[Trial]
    target: float | None
    solver_tol: float
    iterations: int

    @property
    def front(self) -> list[Trial]:
        """The depths passed on the way, from the most evaluations to the fewest."""
        return sorted((t for t in self.trials if t.passed), key=lambda t: -t.evaluations)

    def __str__(self) -> str:
        head = "found" if self.feasible else "NOT found: the last trial was"
        best, target = (
            self.best,
            f"{self.target:g}" if self.target is not None and math.isfinite(self.target) else "none",
        )
        loss = _measured(
            ("loss {:.4g}", best.loss),
            (" and {:.4g} solved exactly", best.reference_loss),
            (", at most {:.4g} on held-out batches", best.held_out_loss),
        )
        error = _measured(("solver error {:.3g} of the displacement", best.solver_error))
        said = [
            f"{loss or 'loss not measured'} (target {target})",
            f"{error or 'solver error not measured'} (tolerance {self.solver_tol:g})",
            *([] if best.changed is None else [f"{best.changed:.1%} of predictions change when solved exactly"]),
            f"{self.iterations} iterations",
        ]
        plural = "" if best.evaluations == 1 else "s"
        lines = [f"{head} {best.evaluations} evaluation{plural} ({best.label}): {', '.join(said)}"]
        for t in self.trials:
            figures = _measured(("loss {:.4g}", t.loss), (" / {:.4g}", t.reference_loss)) or "loss not measured"
            figures += _measured((", held out {:.4g}", t.held_out_loss), (", solver error {:.3g}", t.solver_error))
            passed = "passed" if t.passed else "failed"
            lines.append(f"  {t.label}: {passed} after {t.iterations} iterations, {t.seconds:.1f} s, {figures}")
        return "\n".join(lines)


def _measured(*figures: tuple[str, float]) -> str:
    """Returns the figures that were measured, each in its words, one behind the other."""
    return "".join(words.format(value) for words, value in figures if math.isfinite(value))
