"""The records of a search: each depth that was tried, and what was found."""

import math
from dataclasses import dataclass

__all__ = ["Trial", "Verdict"]


@dataclass
class Trial:
    """A depth that was tried: a number of steps of a solver.

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
