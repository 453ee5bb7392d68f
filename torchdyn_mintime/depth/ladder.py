"""The next depth to try: a pure function of what was tried.

Upward, a number of steps that failed is followed by more steps of the same solver. From the first depth that passed the
search only goes down: cheaper solvers, each at fewer evaluations than the best depth so far, by bisection.
"""

import math
from collections.abc import Sequence

from torchdyn_mintime.depth.trials import Trial
from torchdyn_mintime.numerics import make_stepper

__all__ = ["evaluations_of", "first_depth", "next_depth"]

CHEAPER = {"rk4": ("midpoint",)}
"""Solvers to try once one has passed. Euler is left out: no penalty was found that keeps its single step an ODE."""
ONE_BY_ONE = 4
"""Steps are added one at a time below this number."""
MORE_STEPS = 1.4
"""From there on the next number of steps is this many times the last one, rounded up."""


def evaluations_of(solver: str, steps: int) -> int:
    """Returns the evaluations of so many steps. An adaptive solver takes two more, for the size of its first step."""
    stepper = make_stepper(solver)
    return 2 + steps * (stepper.evaluations - 1) if stepper.adaptive else steps * stepper.evaluations


def first_depth(solver: str) -> tuple[str, int]:
    """Returns the depth to begin with: one step, or two of an adaptive solver.

    To take the whole way in its first step, an adaptive solver would have to find next to no movement.
    """
    return solver, 2 if make_stepper(solver).adaptive else 1


def next_depth(
    trials: Sequence[Trial], solvers: Sequence[str] | None = None, max_steps: int = 64
) -> tuple[str, int] | None:
    """Returns the depth to try next, (solver, steps), or None at the end.

    Args:
        trials: what was tried, one at least, the first of the model's own solver.
        solvers: cheaper solvers to try once one has passed. Default: midpoint, for rk4.
        max_steps: of a solve, at most.

    Example:
        >>> next_depth([Trial("rk4", 1, 4), Trial("rk4", 2, 8)])
        ('rk4', 3)
        >>> next_depth([Trial("rk4", 1, 4), Trial("rk4", 2, 8, passed=True)])
        ('midpoint', 2)
    """
    passed = [trial for trial in trials if trial.passed]
    if not passed:
        last = trials[-1]
        steps = last.steps + 1 if last.steps < ONE_BY_ONE else math.ceil(MORE_STEPS * last.steps)
        return (last.solver, steps) if steps <= max_steps else None
    best = min(passed, key=lambda trial: trial.evaluations)
    for name in CHEAPER.get(trials[0].solver, ()) if solvers is None else solvers:
        tried = [trial for trial in trials if trial.solver == name]
        failed = max((trial.steps for trial in tried if not trial.passed), default=0)
        most = (best.evaluations - 1) // make_stepper(name).evaluations
        if failed < most:
            return name, (failed + most + 1) // 2 if tried else min(most, best.steps)
    return None
