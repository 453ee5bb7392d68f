r"""Regularizers of the field's other papers, as integrals over the trajectory.

Each is the trapezoid rule over the trajectory's points, of a mean over the batch and all dimensions of the sample (running
costs and log-densities in the state left out).

    TaylorRegularizer    int mean (d^K z / dt^K)^2 dt           Kelly et al., 2020 (TayNODE)
    KineticEnergy        int mean f^2 / 2 dt                    Finlay et al., 2020 (RNODE)
    JacobianNorm         int mean (J^T eps)^2 dt, eps ~ N(0, I)  the same

The points of a field that ignores time are evaluated as one batch, once the first trajectory has shown that it gives the same.
It takes the time of a few evaluations instead of one a point; ``nfe`` counts them as if they were made one by one.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import BoundField, Field, LastSolve, LearnableSpan, checks, cost_columns, position
from torchdyn_mintime.losses.batched_points import BatchedPoints
from torchdyn_mintime.losses.penalty import Penalty

__all__ = ["JacobianNorm", "KineticEnergy", "TaylorRegularizer", "TrajectoryPenalty"]


class TrajectoryPenalty(Penalty):
    """An integral over the trajectory's points, of what a subclass makes of the field at each (:meth:`integrand`).

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: of the penalty, in units of loss.
    """

    takes_bare = True

    def __init__(self, model: nn.Module, weight: float = 1.0):
        super().__init__(model, weight)
        self._points = BatchedPoints()

    def penalty(
        self, t_eval: Tensor | None = None, sol: Tensor | None = None, *, args: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Returns the weighted integral, with its gradient in everything that the trajectory depends on.

        Args:
            t_eval, sol: what a call of the model returned, ``[points]`` and ``[points, batch, ...]``: for a bare
                NeuralODE, whose data control is set from ``sol[0]``. It returns the times of a descending span with the
                opposite sign: pass ``-t_eval`` then. Default: the last forward of every span in the model.
            args: what a bare NeuralODE was called with.

        Returns:
            A scalar.

        Raises:
            RuntimeError: no forward was made.
            ValueError: there are too few points to integrate over.
        """
        # Derivatives of the field are needed for the value itself.
        with torch.inference_mode(False), torch.enable_grad():
            given = t_eval is not None or sol is not None or isinstance(self.model, NeuralODE)
            value = self._of_given(t_eval, sol, args) if given else super().penalty()
        return value if torch.is_grad_enabled() else value.detach()

    def of_span(self, span: LearnableSpan, last: LastSolve) -> Tensor:
        t_eval, states = last.grid.times(span.t_f.dtype, span.t_f.device), position(span, last.states)
        if not last.is_whole:
            raise ValueError(
                f"the integral is over the solve, from {last.steps[0]:g} to {last.steps[-1]:g}, and save_at has left out one "
                "of its ends; ask for both"
            )
        return self._integral(last.bound, t_eval, states, 5 if span.adaptive else 2)

    def _of_given(self, t_eval: Tensor | None, sol: Tensor | None, args: Mapping[str, Any] | None) -> Tensor:
        if t_eval is None or sol is None or t_eval.dim() != 1 or len(t_eval) != len(sol):
            raise ValueError(
                "a bare NeuralODE remembers no forward: pass what one call returned, t_eval [points] and "
                "sol [points, batch, ...], to penalty(t_eval, sol)"
            )
        if not isinstance(self.model, NeuralODE | LearnableSpan):
            raise ValueError("t_eval and sol are those of one NeuralODE or span; this model has others around it")
        if isinstance(self.model, LearnableSpan):
            field, last, sol = self.model.field, self.model.last, position_of(self.model, sol)
            args = last.bound.args if args is None and last is not None else args
        else:
            field, last = Field(self.model), None
        self.nfe = 0
        with field.beside(start_of(last, t_eval, sol), args) as bound:
            return self.weight * self._integral(bound, t_eval, sol, 2)

    def _integral(self, bound: BoundField, t_eval: Tensor, sol: Tensor, least: int) -> Tensor:
        if len(t_eval) < least:
            raise ValueError(
                f"the trajectory has {len(t_eval)} points, too few to integrate over: give the span a template of "
                f"{least} points or more, or ask for them by save_at"
            )
        t_eval, sol = recorded(t_eval), recorded(sol)
        with self.beside(bound):
            self.prepare(bound, sol[0])
            (values,) = self._points(lambda t, z, copies: [self.integrand(bound, t, z, copies)], bound, t_eval, sol)
        return torch.trapezoid(values.mean(1), t_eval.to(values)).abs()

    def prepare(self, bound: BoundField, z: Tensor) -> None:
        """Prepares for a trajectory, of which ``z`` is the first state."""

    def integrand(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        """Returns the integrand of each sample, ``[batch]``, at one time; in z the batch stands ``copies`` times."""
        raise NotImplementedError


class KineticEnergy(TrajectoryPenalty):
    """The integral of half the mean square of the state's speed: short, straight paths cost least (RNODE).

    Cost: one evaluation a point.

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: .01 in the paper.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(lambda t, z, args: -z, solver="rk4")
        Your vector field ...
        >>> t_eval, sol = node(torch.ones(4, 2), torch.linspace(0, 1, 101))
        >>> round(KineticEnergy(node).penalty(t_eval, sol).item(), 3)  # (1 - exp(-2)) / 4
        0.216
    """

    def integrand(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        return _mean_square(bound, bound.function(t.to(z), z)) / 2


class JacobianNorm(TrajectoryPenalty):
    """The integral of the mean square of J^T eps, an estimate of the field's Jacobian's Frobenius norm (RNODE).

    eps is one draw a trajectory: Hutchinson's noise where the field has one (a CNF), else from N(0, I). Its mean over
    eps is |J|^2 divided by the dimensions of a sample.

    Cost: one evaluation and one backward pass through it a point.

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: .01 in the paper.
        generator: of the draws.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.
        noise: the eps of the last trajectory.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(lambda t, z, args: -3 * z, solver="rk4")
        Your vector field ...
        >>> t_eval, sol = node(torch.randn(4096, 2), torch.linspace(0, 1, 5))
        >>> round(JacobianNorm(node).penalty(t_eval, sol).item())  # 9 |eps|^2 / 2
        9
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, *, generator: torch.Generator | None = None):
        super().__init__(model, weight)
        self.generator = generator
        self.noise: Tensor | None = None

    def prepare(self, bound: BoundField, z: Tensor) -> None:
        sample = own_entries(bound, z)
        noises = [getattr(m, "noise", None) for m in bound.modules if hasattr(m, "trace_estimator")]
        found = next((n for n in noises if isinstance(n, Tensor) and n.shape == sample.shape), None)
        if found is None:
            # Drawn as numbers of the state's dtype, on the generator's device if there is one.
            found = torch.randn(
                sample.shape,
                generator=self.generator,
                dtype=sample.dtype,
                device=sample.device if self.generator is None else self.generator.device,
            )
        self.noise = found.detach().to(sample)

    def integrand(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        z = differentiable(z)
        velocity = own_entries(bound, bound.function(t.to(z), z))
        assert self.noise is not None
        (product,) = gradients(velocity, (z,), self.noise.repeat(copies, *[1] * (self.noise.dim() - 1)))
        return _mean_square(bound, product)


class TaylorRegularizer(TrajectoryPenalty):
    """The integral of the mean square of the K-th total derivative of the state in time (TayNODE).

    d^K z / dt^K is taken along the solution: d^2 z / dt^2 = df/dt + J f, and so on. K = 2 leaves straight lines at a
    constant speed free, K = 3 parabolas.

    Cost: one evaluation and 2 (K - 1) backward passes through it, each of the graph that those before made, a point.

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: 6e-5 for MNIST (K = 3), 3e-4 for flows (K = 2) in the paper's code.
        derivative: K, 1 or more.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(lambda t, z, args: -2 * z, solver="rk4")
        Your vector field ...
        >>> t_eval, sol = node(torch.ones(4, 2), torch.linspace(0, 1, 101))
        >>> round(TaylorRegularizer(node).penalty(t_eval, sol).item(), 2)  # 16 exp(-4 t): 4 (1 - exp(-4))
        3.93
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, derivative: int = 2):
        super().__init__(model, weight)
        self.derivative = checks.count(derivative, "derivative", 1)

    def integrand(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        z, t = differentiable(z), differentiable(t.to(z))
        velocity = value = bound.function(t, z)
        for _ in range(self.derivative - 1):
            value = rate_of_change(value, t, z, velocity)
        return _mean_square(bound, value)


def own_entries(bound: BoundField, z: Tensor) -> Tensor:
    """Returns the entries of a state that are the sample's own: no running cost, no log-density."""
    excess = cost_columns(bound.node) + sum(hasattr(m, "trace_estimator") for m in bound.modules)
    return z[:, excess:] if excess else z


def _mean_square(bound: BoundField, z: Tensor) -> Tensor:
    """Returns the mean square of each sample's own entries, ``[batch]``. A state may be one number a sample, or one number."""
    own = own_entries(bound, z)
    square = own.to(torch.promote_types(own.dtype, torch.float32)).square()  # in half precision it overflows soon
    return square.flatten(1).mean(1) if square.dim() > 1 else square.reshape(-1)


# ------------------------------------------------------------------------------- derivatives in time along the flow
# d/dt g(t, z(t)) = dg/dt + dg/dz f for z' = f(t, z).


def recorded(x: Any) -> Any:
    """Returns a tensor that autograd takes: of one that was made in inference mode, a copy."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def position_of(span: LearnableSpan, sol: Tensor) -> Tensor:
    """Returns states of a trajectory without the velocity of ``alf``, where they still have it."""
    return position(span, sol) if span.last is not None and sol.shape[1:] == span.last.x.shape else sol


def start_of(last: LastSolve | None, t_eval: Tensor, sol: Tensor) -> Tensor:
    """Returns the state that a trajectory began with, which sets the data control.

    It is that of the last solve of the span where ``save_at`` has left it out of ``sol``.
    """
    if last is None or last.x.shape != sol.shape[1:] or math.isclose(t_eval[0].item(), last.steps[0], abs_tol=1e-6):
        return sol[0]
    return last.x


def differentiable(x: Tensor) -> Tensor:
    """Returns ``x`` itself where it carries a gradient, else a copy of it that does."""
    return x if x.requires_grad else x.detach().requires_grad_()


def gradients(output: Tensor, inputs: tuple[Tensor, ...], weights: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns weights^T d output / d inputs, with a graph; zero where ``output`` does not depend on an input."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(i) for i in inputs)
    return torch.autograd.grad(output, inputs, weights, create_graph=True, materialize_grads=True)


def rate_of_change(value: Tensor, t: Tensor, z: Tensor, velocity: Tensor) -> Tensor:
    """Returns d value / dt + (d value / dz) velocity: the derivative of value(t, z(t)) in time.

    Two reverse passes, since v^T J is linear in v: its derivative in v, along the velocity, is J velocity. Forward-mode
    derivatives would not pass through fields that take gradients themselves (a CNF's divergence).

    Args:
        value: any shape, made of ``t`` and ``z`` with their graph.
        t: a scalar.
        z: the state, ``[batch, ...]``.
        velocity: f(t, z), of the shape of ``z``.

    Example:
        >>> t, z = torch.tensor(0.5, requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)
        >>> rate_of_change(t * z, t, z, velocity=-z)  # z + t z'
        tensor([1.5000, 2.0000], grad_fn=...)
    """
    v = torch.zeros_like(value, requires_grad=True)
    by_t, by_z = gradients(value, (t, z), v)
    (rate,) = gradients((by_z * velocity).sum() + by_t.sum(), (v,))
    return rate
