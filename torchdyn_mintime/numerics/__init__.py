"""Steppers, drives and adjoints: what torchdyn.numerics does, exact. Stands on torch and torchdyn alone."""

from torchdyn_mintime.numerics.adjoint import solve_adjoint
from torchdyn_mintime.numerics.integrate import Grid, IntegrationError, Solution, integrate
from torchdyn_mintime.numerics.steppers import Stepper, make_stepper

__all__ = ["Grid", "IntegrationError", "Solution", "Stepper", "integrate", "make_stepper", "solve_adjoint"]
