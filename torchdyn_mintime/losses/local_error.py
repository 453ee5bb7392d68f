r"""The error that each step makes by itself, as a penalty: sum_i dt_i |local error of step i|.

Pal et al., 2021 (ERNODE), and 2022 (one random step).
"""

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import LastSolve, LearnableSpan, refine
from torchdyn_mintime.losses.penalty import Penalty
from torchdyn_mintime.numerics import (
    Grid,
    RungeKutta,
    Stepper,
    VectorField,
    evaluating_in,
    in_half_precision,
    integrate,
)
from torchdyn_mintime.numerics.step_control import rms

__all__ = ["LocalError"]


class LocalError(Penalty):
    """The sum over the steps of step size times the norm of the local error (ERNODE); or of one step drawn at random.

    The local error is that of one step from the state before it. For a solver with an error estimate (dopri5, tsit5) it
    is that estimate, for another one the difference between the step and two of half its size. Norms are root mean
    squares over all entries of the state. Steps that an adaptive solver accepted are held.

    Unlike step doubling, which compares the ends, it does not see how errors add up, cancel or grow along the way.

    Cost: as much as the forward for a solver with an estimate, since stages are not kept; twice the forward for another
    one. With ``sampled``, twice one step where the trajectory holds the states of all steps; for an adaptive solver,
    and under an adjoint, also the steps up to it.

    Args:
        model: a LearnableSpan, or a module that holds some (their penalties are added).
        weight: the weight of the penalty, in units of loss; 10 to 100 in the paper.
        sampled: one step, drawn with equal chances, times the number of steps: the same in the mean.
        generator: the generator that the step is drawn with.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 3))
        Your vector field ...
        >>> local = LocalError(span, sampled=True)
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> (sol[-1].square().mean() + local.penalty()).backward()
        >>> span.nfe, local.nfe
        (8, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        *,
        sampled: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(model, weight)
        self.sampled, self.generator = sampled, generator

    def of_span(self, span: LearnableSpan, last: LastSolve) -> Tensor:
        f, z, stepper, steps = last.bound.function, last.x, span.stepper, len(last.steps) - 1
        if half := in_half_precision(z, stepper):  # whose rounding would be larger than the error
            f, z = evaluating_in(z.dtype, f), z.float()
        chosen = range(steps)
        if self.sampled:
            device = None if self.generator is None else self.generator.device
            drawn = int(torch.randint(steps, (), generator=self.generator, device=device))
            chosen = range(drawn, drawn + 1)
        grid = Grid(last.steps, last.grid.start, last.grid.end)
        # Under an adjoint the states carry the ODE's gradient, not that of the steps.
        exact = span.sensitivity == "autograd" or not torch.is_grad_enabled()
        kept = not half and exact and not stepper.adaptive and last.grid.keep is None and last.grid.dense is None

        def end(z: Tensor, i: int, parts: int) -> Tensor:
            ends = None if i else grid.start, grid.end if i == steps - 1 else None
            return integrate(f, z, refine(last.steps[i : i + 2], *ends, parts), stepper, adapt=False).states[-1]

        terms = []
        with self.beside(last.bound):
            for i in chosen if kept else range(chosen.stop):
                if stepper.adaptive:
                    after, error = _step_and_error(f, z, grid, i, stepper)
                else:
                    z, after = (last.states[i], last.states[i + 1]) if kept else (z, end(z, i, 1))
                if i in chosen:
                    norm = rms(error if stepper.adaptive else after - end(z, i, 2))
                    terms.append(torch.as_tensor(grid.size(i), dtype=torch.float64).abs().to(norm) * norm)
                z = after
        return torch.stack(terms).sum() * (steps / len(chosen))


def _step_and_error(f: VectorField, z: Tensor, grid: Grid, i: int, stepper: Stepper) -> tuple[Tensor, Tensor]:
    """Returns the state after the i-th step and the step's own error estimate, dt sum_i e_i k_i, with their gradients."""
    stepper.prepare(z)
    size, left = (torch.as_tensor(v, dtype=torch.float64) for v in (grid.size(i), grid.left(i)))
    dt, times = size.to(z), [(left + c * size).to(z) for c in stepper.nodes]
    after, stages = stepper.step(f, z, times, dt)
    error = stepper.error(stages, 1.0) * dt if isinstance(stepper, RungeKutta) else stepper.error(stages, float(dt))
    return after, error
