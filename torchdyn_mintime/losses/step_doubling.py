r"""Step doubling: a penalty that keeps a model with few steps a true ODE.

With z_n the state at the end of the n steps that were taken, and z_rn that with each step split into r equal ones, the
penalty is

    weight * mean |z_n - z_rn|^2 / mean |z_n|^2,

the denominator being held constant. Both solutions tend to the ODE's own as steps shrink, and for a method of order p
the difference is 1 - r^-p of the error of z_n: a model in which it is small is the ODE that its field describes.
"""

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    LastSolve,
    LearnableSpan,
    checks,
    never_first,
    refine,
    rk4_solution,
    spans,
    undisturbed,
)
from torchdyn_mintime.losses.penalty import Penalty
from torchdyn_mintime.numerics import IntegrationError, integrate

__all__ = ["StepDoubling", "refined_end", "relative_square"]


class StepDoubling(Penalty):
    """The relative squared difference between the solution at the steps taken and the one with each step refined.

    Add :meth:`penalty` to the loss. Its gradient in the parameters, t_f, a learnable t0 and x is that of the two
    discrete solutions, under every sensitivity. Steps of an adaptive solver are held: the accepted ones are split.

    The field's data control and noise are those of the last forward. Batch statistics, ``nfe`` and the times that
    torchdyn keeps on modules stay as they are. With dropout active in the field both solutions are made without it, as
    masks that change with every evaluation leave no ODE to compare with.

    A LearnableSolver is no method whose steps can be halved: it is compared with ``refinement`` equal steps of rk4 over the
    interval, 4 at least.

    Cost: ``refinement`` times the evaluations of the forward. Under an adjoint, whose gradients are not those of the
    steps, and with active dropout, the forward's evaluations are added once more. The refined solution is always kept
    for backward.

    Args:
        model: a LearnableSpan, or a module that holds some (their penalties are added).
        weight: of the penalty, in units of loss; about 1 fits a loss of size 1.
        refinement: into how many parts each step is split, 2 or more. Methods of order 1 and 2 need 4: there half
            the step removes too little of the error to show it.
        every: the penalty is taken at every ``every``-th call, ``every`` times as heavy, and is 0 at the others. Every
            4th is as good as every one on two annuli, at a quarter of the cost.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Raises:
        TypeError: ``model`` is not a module, or a value is not a number.
        ValueError: ``model`` has no LearnableSpan, or a value cannot be used.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> doubling = StepDoubling(span)
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> loss = sol[-1].square().mean() + doubling.penalty()
        >>> loss.backward()
        >>> doubling.nfe, span.nfe
        (8, 4)
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, refinement: int = 2, *, every: int = 1):
        super().__init__(model, weight)
        self.refinement = checks.count(refinement, "refinement", 2)
        self.every = checks.count(every, "every", 1)
        self._calls = 0

    def penalty(self, x: Tensor | None = None) -> Tensor:
        """Returns the penalty of the last forward, or of a forward from ``x``.

        Args:
            x: what ``model`` is called with; the call leaves no trace. Default: the last forward of every span.

        Returns:
            A scalar, of float32 at least.

        Raises:
            RuntimeError: no forward was made, or it was made without gradients and they are wanted now.
            IntegrationError: the refined solution is not finite.
        """
        self._calls += 1
        if (self._calls - 1) % self.every:
            self.nfe = 0
            return next(spans(self.model)).t_f.new_zeros(())
        if x is None:
            return self.every * super().penalty()
        with undisturbed(self.model), never_first(self.model):
            self.model(x)
            value = self.every * super().penalty()
            self.nfe += sum(span.nfe for span in spans(self.model))
        return value

    def of_span(self, span: LearnableSpan, last: LastSolve) -> Tensor:
        wanted = torch.is_grad_enabled() and (span.t_f.requires_grad or bool(last.bound.parameters))
        if wanted and not last.states.requires_grad:
            raise RuntimeError(
                "the last forward was made without gradients; call the model with gradients enabled, pass x, "
                "or ask for the penalty under torch.no_grad()"
            )
        taken = last.states[-1]
        # An adjoint's gradient is the ODE's: both solutions would have the same one, and their difference none.
        exact = span.sensitivity == "autograd" or not torch.is_grad_enabled()
        drops_out = last.bound.drops_out  # beside the solve it is off
        with self.beside(last.bound):
            if not (last.reaches_end and exact) or drops_out:
                taken = refined_end(span, last, 1)
            if span.interval.one_step:
                refined = rk4_solution(last, max(self.refinement, 4))[1][-1]
            else:
                refined = refined_end(span, last, self.refinement)
        return relative_square(taken, refined, taken)


def relative_square(one: Tensor, other: Tensor, scale: Tensor) -> Tensor:
    """Returns the mean squared difference of two states over the mean square of ``scale``, which is held constant.

    Example:
        >>> relative_square(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([4.0])).item()
        0.25
    """
    dtype = torch.promote_types(one.dtype, torch.float32)  # a square in half precision overflows soon
    size = scale.detach().to(dtype).square().mean().clamp_min(torch.finfo(dtype).tiny)
    return (one - other).to(dtype).square().mean() / size


def refined_end(span: LearnableSpan, last: LastSolve, parts: int) -> Tensor:
    """Returns the state at the end of a solve's steps, each split into ``parts``; to be called inside ``untraced``."""
    grid = refine(last.steps, last.grid.start, last.grid.end, parts)
    try:
        return integrate(last.bound.function, last.x, grid, span.stepper, adapt=False).states[-1]
    except IntegrationError as error:
        error.add_note(f"in step doubling, where each step of the last forward is split into {parts}")
        raise
