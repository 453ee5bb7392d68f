"""How a node is solved: its steppers, its sensitivity (autograd, checkpoints or an adjoint), and the record of a solve."""

import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torchdyn.core import NeuralODE
from torchdyn.numerics.interpolators import str_to_interp

from torchdyn_mintime.core.field import BoundField, kept, tensors_with_gradient
from torchdyn_mintime.core.shards import error_of_shards, sharded_by_themselves
from torchdyn_mintime.numerics import (
    AdjointProblem,
    AsynchronousLeapfrog,
    Grid,
    Hypersolver,
    IntegrationError,
    LearnedStepper,
    OutsideTensors,
    Problem,
    Solution,
    Stepper,
    evaluating_in,
    in_half_precision,
    integrate,
    make_stepper,
    rounded,
    solve_adjoint,
    solve_checkpointed,
)

__all__ = ["SENSITIVITIES", "LastSolve", "Method", "interpolator_of"]

P = TypeVar("P", bound=Problem)
T = TypeVar("T")

FEW = 4
"""Up to so many states the record of a forward without gradient holds them all; of a longer trajectory it holds the last."""

SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")


@dataclass(slots=True, eq=False)  # not frozen: it is made at every call, and each field would be set the long way
class LastSolve:
    """What a span remembers of its last forward. It is neither copied nor saved with the span.

    Attributes:
        bound: the field as it was bound to that solve.
        x: the initial state ``[batch, ...]``, with its graph.
        grid: the points asked for.
        steps: the times between which steps were taken (units of time).
        running_cost: under an adjoint, the integral of ``node.integral_loss``, ``[batch]``; else None.
    """

    bound: BoundField
    x: Tensor
    grid: Grid
    steps: list[float]
    running_cost: Tensor | None
    _states: Callable[[], Tensor]
    _again: Callable[[], Tensor] | None = None
    _end: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """The states ``[points, *x.shape]``, with their graph.

        Those of a forward without gradient, where there are more than four, are held as long as its caller holds them, and
        solved for again after that.

        Raises:
            RuntimeError: they would be solved for again, but the model or ``x`` has changed since.
        """
        return self._states()

    def light(self) -> "LastSolve":
        """Returns the record to keep: of a forward without gradient, that which holds the last of the states alone."""
        if self._again is None:
            return self
        # A trajectory may be large, and most often nobody asks for it.
        on_request = _OnRequest(self.bound, self.x, self.states, self._again)
        end = self.states[-1].clone()
        return LastSolve(self.bound, self.x, self.grid, self.steps, self.running_cost, on_request, None, end)

    @property
    def end(self) -> Tensor:
        """The last of ``states``, which is at hand without solving again."""
        return self.states[-1] if self._end is None else self._end

    @property
    def seen(self) -> list[float]:
        """The times of ``steps`` up to the last one that the caller sees: ``save_at`` may have left out the end."""
        last, forwards = self.grid.returned[-1], self.steps[-1] > self.steps[0]
        return [*(t for t in self.steps if (t < last if forwards else t > last)), last]

    @property
    def is_whole(self) -> bool:
        """Whether the states hold both ends of the solve: ``save_at`` may have left one out."""
        return self.reaches_end and self.grid.returned[0] == self.steps[0]

    @property
    def reaches_end(self) -> bool:
        """Whether the last of the states is that at the end of the solve: ``save_at`` may have left it out."""
        return self.grid.returns_end


class Method:
    """How a node is solved.

    Args:
        node: the NeuralODE.
        by_autograd: take the gradients of autograd whatever the node's sensitivity says.

    Attributes:
        solvers: the node's ``solver`` and ``solver_adjoint`` that the steppers were made of.
        stepper: the method of the solve.
        backward_stepper: that of an adjoint's backward solve.
        sensitivity: the way to gradients. A LearnableSolver, which no adjoint differentiates, has those of autograd.

    Raises:
        ValueError, TypeError: a solver or sensitivity that gives no right gradient.
    """

    def __init__(self, node: NeuralODE, by_autograd: bool = False):
        if node.sensitivity not in SENSITIVITIES:
            raise ValueError(f"sensitivity={node.sensitivity!r} is unknown to torchdyn; it knows {SENSITIVITIES}")
        self.solvers = node.solver, node.solver_adjoint
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

    def solve(
        self, bound: BoundField, x: Tensor, grid: Grid, checkpoint: bool, sensitivity: str | None = None
    ) -> LastSolve:
        """Solves along ``grid``, with the gradients that the node's sensitivity gives.

        Args:
            bound: the field.
            x: initial state, ``[batch, ...]``.
            grid: the points.
            checkpoint: keep one state a step for backward, where the sensitivity is autograd.
            sensitivity: another one than that of this method.

        Raises:
            IntegrationError: the solve failed.
            ValueError: the field cannot be evaluated again in backward, or does not accept ``x``.
        """
        node = bound.node
        sensitivity = sensitivity or self.sensitivity
        learning = torch.is_grad_enabled()
        settings: dict[str, Any] = {
            "stepper": self.stepper,
            "atol": node.atol,
            "rtol": node.rtol,
            "interpolator": interpolator_of(node, self.stepper),
        }
        checkpoint = learning and checkpoint and sensitivity == "autograd"
        # An adjoint counts the running cost beside the state, with or without a gradient.
        adjoint = sensitivity != "autograd" and (learning or node.integral_loss is not None)
        if grid.dense is not None:
            self._check_dense(sensitivity if adjoint else "checkpoint" if checkpoint else None)
        cost = None
        f, start, running_cost = bound.function, x, node.integral_loss
        if half := in_half_precision(x, self.stepper):
            f, start = evaluating_in(x.dtype, f), x.float()
            running_cost = None if running_cost is None else evaluating_in(x.dtype, running_cost)
        try:
            if not (adjoint or checkpoint):
                solution = integrate(f, start, grid, **settings)
            else:
                if learning:
                    self._check_repeats(bound, checkpoint)
                    self._check_whole(bound, checkpoint)
                # A checkpoint takes the steps again, with the parameters of what takes them.
                module = node if checkpoint else node.vf
                free = {name: p for name, p in module.named_parameters() if p.requires_grad}
                named = {id(p) for p in free.values()}
                outside = [t for t in bound.tensors(sure=True) if id(t) not in named] if learning else []
                if checkpoint:  # a tableau is no parameter of its module
                    tableau = tensors_with_gradient(vars(node.solver))
                    outside += [t for t in tableau if id(t) not in named]
                problem = Problem(f, module, free, restored=bound.in_backward, outside=outside, **settings)
                if checkpoint:
                    solution = _naming_outside(bound, problem, lambda p: solve_checkpointed(p, start, grid))
                else:
                    solution, cost = _naming_outside(
                        bound, self._adjoint(node, problem, running_cost), lambda p: solve_adjoint(p, start, grid)
                    )
                if learning:
                    bound.remember_buffers()
        except IntegrationError:
            raise
        except RuntimeError as error:
            if (clearer := error_of_shards(error, bound.modules)) is not None:
                raise clearer from error
            if (adjoint or checkpoint) and re.search("setup_context|forward AD|forward mode", str(error)):
                raise ValueError(
                    "torch.func's transforms and forward mode pass a span with sensitivity='autograd' and without "
                    f"checkpoints alone; this one has {sensitivity!r}, checkpoint={checkpoint}"
                ) from error
            if self.stepper.adaptive and "vmap" in str(error):
                raise ValueError(
                    f"{self.stepper.name} chooses its steps by the values of the state, which torch.vmap hides; take a solver "
                    "of fixed steps such as 'rk4', or loop"
                ) from error
            _explain(error, bound, x)
            raise

        def finished(found: Solution) -> Tensor:
            return rounded(found, x.dtype, grid, self.stepper).states if half else found.states

        states = finished(solution)
        repeats = len(states) > FEW and not (learning or bound.random_or_stateful())
        again = (lambda: finished(integrate(f, start, grid, **settings))) if repeats else None
        return LastSolve(bound, x, grid, solution.steps, cost, lambda: states, again)

    def _check_dense(self, own_gradient: str | None) -> None:
        """Raises where no states inside the steps can be given."""
        if self.stepper.interpolant is None:
            raise ValueError(
                f"{self.stepper.name} has no interpolant, which dense=True needs; leave it out, so that the solver lands on "
                "each time, or take 'rk4', 'dopri5' or 'tsit5'"
            )
        if own_gradient is not None:
            how = "checkpoint=True" if own_gradient == "checkpoint" else f"sensitivity={own_gradient!r}"
            raise ValueError(
                f"dense=True has the gradients of autograd alone, and the span has {how}; call it under torch.no_grad(), or "
                "leave dense out"
            )

    def _check_repeats(self, bound: BoundField, checkpoint: bool) -> None:
        """Raises where a second evaluation of the field would give something else."""
        if kinds := bound.random_or_stateful():
            under = "checkpoint=True" if checkpoint else f"sensitivity={bound.node.sensitivity!r}"
            instead = "checkpoint=False" if checkpoint else "sensitivity='autograd'"
            raise ValueError(
                f"{', '.join(kinds)} in training mode within the field, under {under}: the "
                f"backward solve would see another field than the forward one; use {instead}, or .eval() them"
            )
        if not checkpoint and any(True for _ in tensors_with_gradient(vars(bound.node.solver))):
            raise ValueError(
                f"sensitivity={bound.node.sensitivity!r} gives what the solver learns ({self.stepper.name}) no "
                "gradient; freeze them, or use sensitivity='autograd'"
            )

    @staticmethod
    def _check_whole(bound: BoundField, checkpoint: bool) -> None:
        """Raises where backward would find parts of weights: layers that are sharded by themselves are whole one by one."""
        if kinds := sharded_by_themselves(bound.modules):
            under = "checkpoint=True" if checkpoint else f"sensitivity={bound.node.sensitivity!r}"
            instead = "checkpoint=False" if checkpoint else "sensitivity='autograd'"
            raise ValueError(
                f"layers of the vector field are sharded by themselves ({', '.join(kinds)}), under {under}: the backward solve "
                f"needs the whole field; shard the span, or the model around it, and no layer of the field, or use {instead}"
            )

    def _adjoint(self, node: Any, problem: Problem, running_cost: Callable | None) -> AdjointProblem:
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
            running_cost=running_cost,
            interpolated=interpolated,
        )


class _OnRequest:
    """The states of a solve without gradient: those that the caller holds, else ``solve()`` once more."""

    def __init__(self, bound: BoundField, x: Tensor, states: Tensor, solve: Callable[[], Tensor]):
        self._bound, self._x, self._solve = bound, x, solve
        self._held = weakref.ref(states)
        self._before = self._stamp()

    def _stamp(self) -> list[tuple[int, int]]:
        """Returns what changes with the initial state, the parameters and the buffers."""
        modules = self._bound.modules
        tensors = [t for m in modules for held in (m._parameters, m._buffers) for t in held.values() if t is not None]
        return [(id(t), 0 if t.is_inference() else t._version) for t in (self._x, *tensors)]

    def __call__(self) -> Tensor:
        states = self._held()
        if states is not None:
            return states
        if self._stamp() != self._before:
            raise RuntimeError(
                "the states of the last forward, which was made without gradient, are gone, and the model or its input has "
                "changed since; hold what the forward returns, or call the model again"
            )
        bound = self._bound
        evaluations = bound.nfe
        with torch.no_grad(), bound.alone, kept(bound.modules), bound.restored():
            states = self._solve()
        bound.nfe = evaluations
        self._held = weakref.ref(states)
        return states


def interpolator_of(node: Any, stepper: Stepper) -> Callable | None:
    """Returns what gives the points between two ends without landing on them; None where the solver lands on each."""
    if not stepper.adaptive or stepper.name == "tsit5":  # torchdyn has none for tsit5
        return None
    name = node.interpolator
    if name is None:
        return None
    return str_to_interp(name, torch.float64) if isinstance(name, str) else name


def _naming_outside(bound: BoundField, problem: P, solve: Callable[[P], T]) -> T:
    """Returns ``solve(problem)``, once the problem names every tensor beside the parameters that needs a gradient.

    They are those among ``args`` and attributes (embeddings, conditions), so that what lies behind them is passed once
    in backward, and otherwise the leaves (a closure's parameters).
    """
    evaluations, before = bound.nfe, bound.tensors()
    named = {id(p) for p in (*problem.parameters.values(), *problem.outside)}

    def name(tensors: Iterable[Tensor]) -> bool:
        new = list({id(t): t for t in tensors if id(t) not in named}.values())
        named.update(map(id, new))
        problem.outside = [*problem.outside, *new]
        return bool(new)

    for _ in range(3):
        try:
            return solve(problem)
        except OutsideTensors as found:
            bound.nfe = evaluations  # the one that found them is no part of the solve
            # What the evaluation has left on a module, such as an activation, is no input: the next one makes another.
            still = {id(t) for t in bound.tensors()}
            if not name(t for t in before if id(t) in still):
                name(found.tensors)
    problem.searched = False  # they are others at every evaluation: the field makes them
    return solve(problem)


_NOT_ACCEPTED = (
    r"mat1 and mat2|cannot be multiplied|size of tensor a|Sizes of tensors|size mismatch|must match the (existing )?size"
    r"|[Ee]xpected (input|tensor|weight|\d+D|\d-D|more than 1 value|m1 and m2)|Given (groups|(normalized_)?shape)|channels"
    r"|input\.size|is invalid for input|should contain \d+ elements|inconsistent tensor size|imension out of range"
    r"|same dtype|scalar type|weight type|to be at least 1D"
)
"""In torch's own words. An error that a field raises by itself keeps its own text, and its own type."""


def _explain(error: RuntimeError, bound: BoundField, x: Tensor) -> None:
    """Raises a clearer error where the field does not accept the state, or cannot be evaluated without autograd."""
    text = str(error)
    if torch.is_inference_mode_enabled() and re.search("does not require grad|requires_grad|[Ii]nference", text):
        raise ValueError(
            "the vector field differentiates inside (a trace, an energy), which torch.inference_mode() forbids; use "
            f"torch.no_grad() instead: {error}"
        ) from error
    if isinstance(error, torch.OutOfMemoryError) or re.search("same device|CUDA error|CUBLAS|CUDNN", text):
        return  # such texts name sizes too
    if re.search(_NOT_ACCEPTED, text):
        raise bound.refusal(x, error) from error
