"""How a node is solved: its steppers, its sensitivity (autograd, checkpoints or an adjoint), and the record of a solve."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchdyn.core import NeuralODE
from torchdyn.numerics.interpolators import str_to_interp

from torchdyn_mintime.core.field import BoundField
from torchdyn_mintime.numerics import (
    AdjointProblem,
    AsynchronousLeapfrog,
    Grid,
    Hypersolver,
    IntegrationError,
    LearnedStepper,
    Problem,
    Stepper,
    integrate,
    make_stepper,
    solve_adjoint,
    solve_checkpointed,
)

__all__ = ["SENSITIVITIES", "LastSolve", "Method", "interpolator_of"]

SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")


@dataclass(frozen=True)
class LastSolve:
    """What a span remembers of its last forward. It is neither copied nor saved with the span.

    Attributes:
        bound: the field as it was bound to that solve.
        x: the initial state ``[batch, ...]``, with its graph.
        grid: the points asked for.
        steps: the times between which steps were taken (units of time).
        states: ``[points, *x.shape]``, with their graph.
        running_cost: under an adjoint, the integral of ``node.integral_loss``, ``[batch]``; else None.
    """

    bound: BoundField
    x: Tensor
    grid: Grid
    steps: list[float]
    states: Tensor
    running_cost: Tensor | None = None

    @property
    def reaches_end(self) -> bool:
        """Whether the last of the states is that at the end of the solve: ``save_at`` may have left it out."""
        return self.grid.keep is None or self.grid.keep[-1]


class Method:
    """How a node is solved.

    Args:
        node: the NeuralODE.
        by_autograd: take the gradients of autograd whatever the node's sensitivity says.

    Attributes:
        stepper: the method of the solve.
        backward_stepper: that of an adjoint's backward solve.
        sensitivity: the way to gradients. A LearnableSolver, which no adjoint differentiates, has those of autograd.

    Raises:
        ValueError, TypeError: a solver or sensitivity that gives no right gradient.
    """

    def __init__(self, node: NeuralODE, by_autograd: bool = False):
        if node.sensitivity not in SENSITIVITIES:
            raise ValueError(f"sensitivity={node.sensitivity!r} is unknown to torchdyn; it knows {SENSITIVITIES}")
        self.stepper, self.backward_stepper = make_stepper(node.solver), make_stepper(node.solver_adjoint)
        by_autograd = by_autograd or isinstance(self.stepper, LearnedStepper)
        self.sensitivity: str = "autograd" if by_autograd else node.sensitivity
        if self.sensitivity != node.sensitivity and node.integral_loss is not None:
            raise ValueError(
                f"the node has an integral_loss under sensitivity={node.sensitivity!r}, which keeps no column of the state "
                "for it, so that autograd would lose its gradient; make the node with sensitivity='autograd'"
            )
        if self.sensitivity == "autograd":
            return
        for role, method in (("solver", self.stepper), ("solver_adjoint", self.backward_stepper)):
            if isinstance(method, AsynchronousLeapfrog):
                raise ValueError(f"{role}='alf' cannot work under sensitivity={node.sensitivity!r}; use 'autograd'")
        if isinstance(self.backward_stepper, Hypersolver):
            raise ValueError(
                f"a hypersolver cannot solve the adjoint equation; give solver_adjoint, such as "
                f"{self.backward_stepper.name[6:]!r}"
            )

    def solve(self, bound: BoundField, x: Tensor, grid: Grid, checkpoint: bool) -> LastSolve:
        """Solves along ``grid``, with the gradients that the node's sensitivity gives.

        Args:
            bound: the field.
            x: initial state, ``[batch, ...]``.
            grid: the points.
            checkpoint: keep one state a step for backward, where the sensitivity is autograd.

        Raises:
            IntegrationError: the solve failed.
            ValueError: the field cannot be evaluated again in backward, or does not accept ``x``.
        """
        node = bound.node
        learning = torch.is_grad_enabled()
        settings: dict[str, Any] = {
            "stepper": self.stepper,
            "atol": node.atol,
            "rtol": node.rtol,
            "interpolator": interpolator_of(node, self.stepper),
        }
        checkpoint = learning and checkpoint and self.sensitivity == "autograd"
        # An adjoint counts the running cost beside the state, with or without a gradient.
        adjoint = self.sensitivity != "autograd" and (learning or node.integral_loss is not None)
        cost = None
        try:
            if not (adjoint or checkpoint):
                solution = integrate(bound.function, x, grid, **settings)
            else:
                if learning:
                    self._check_repeats(bound, checkpoint)
                if checkpoint:  # the steps are taken again, with the parameters of what takes them
                    free = {name: p for name, p in node.named_parameters() if p.requires_grad}
                    problem = Problem(bound.function, node, free, restored=bound.in_backward, **settings)
                    solution = solve_checkpointed(problem, x, grid)
                else:
                    problem = Problem(bound.function, node.vf, bound.parameters, restored=bound.in_backward, **settings)
                    solution, cost = solve_adjoint(self._adjoint(node, problem), x, grid)
        except IntegrationError:
            raise
        except RuntimeError as error:
            _explain(error, bound, x, grid)
            raise
        return LastSolve(bound, x, grid, solution.steps, solution.states, cost)

    def _check_repeats(self, bound: BoundField, checkpoint: bool) -> None:
        """Raises where a second evaluation of the field would give something else."""
        if kinds := bound.random_or_stateful():
            under = "checkpoint=True" if checkpoint else f"sensitivity={bound.node.sensitivity!r}"
            instead = "checkpoint=False" if checkpoint else "sensitivity='autograd'"
            raise ValueError(
                f"{', '.join(kinds)} in training mode within the field, under {under}: the "
                f"backward solve would see another field than the forward one; use {instead}, or .eval() them"
            )

    def _adjoint(self, node: Any, problem: Problem) -> AdjointProblem:
        interpolated = node.sensitivity == "interpolated_adjoint"
        # For the interpolated adjoint torchdyn takes the forward solve's tolerances where they are tighter.
        atol, rtol = (
            min(forward, backward) if interpolated else backward
            for forward, backward in ((node.atol, node.atol_adjoint), (node.rtol, node.rtol_adjoint))
        )
        return AdjointProblem(
            **vars(problem),
            backward_stepper=self.backward_stepper,
            backward_atol=atol,
            backward_rtol=rtol,
            running_cost=node.integral_loss,
            interpolated=interpolated,
        )


def interpolator_of(node: Any, stepper: Stepper) -> Callable | None:
    """Returns what gives the points between two ends without landing on them; None where the solver lands on each."""
    name = node.interpolator
    if name is None or not stepper.adaptive or stepper.name == "tsit5":  # torchdyn has none for tsit5
        return None
    return str_to_interp(name, torch.float64) if isinstance(name, str) else name


def _explain(error: RuntimeError, bound: BoundField, x: Tensor, grid: Grid) -> None:
    """Raises a clearer error where the field does not accept the state at all."""
    try:
        with torch.no_grad(), bound.restored():
            bound.function(x.new_tensor(grid.nodes[0]), x)
    except RuntimeError as again:
        if str(again) == str(error):
            raise ValueError(
                f"the vector field does not accept a state of shape {tuple(x.shape)} and {x.dtype}: {error}"
            ) from error
