"""Steppers, drives and adjoints: what torchdyn.numerics does, exact. Stands on torch and torchdyn alone."""

from torchdyn_mintime.numerics.adjoint import AdjointProblem, solve_adjoint, with_running_cost
from torchdyn_mintime.numerics.checkpoint import solve_checkpointed
from torchdyn_mintime.numerics.grid import MAX_POINTS, cut, merge
from torchdyn_mintime.numerics.integrate import (
    Grid,
    IntegrationError,
    Solution,
    evaluating_in,
    in_half_precision,
    integrate,
    rounded,
)
from torchdyn_mintime.numerics.learned import LearnableSolver
from torchdyn_mintime.numerics.problem import OutsideTensors, Problem, VectorField
from torchdyn_mintime.numerics.steppers import (
    AsynchronousLeapfrog,
    Hypersolver,
    LearnedStepper,
    RungeKutta,
    Stepper,
    make_stepper,
)

__all__ = [
    "MAX_POINTS",
    "AdjointProblem",
    "AsynchronousLeapfrog",
    "Grid",
    "Hypersolver",
    "IntegrationError",
    "LearnableSolver",
    "LearnedStepper",
    "OutsideTensors",
    "Problem",
    "RungeKutta",
    "Solution",
    "Stepper",
    "VectorField",
    "cut",
    "evaluating_in",
    "in_half_precision",
    "integrate",
    "make_stepper",
    "merge",
    "rounded",
    "solve_adjoint",
    "solve_checkpointed",
    "with_running_cost",
]
