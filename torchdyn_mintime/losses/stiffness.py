r"""How stiff a field is along the path, as a penalty: sum_i |k_x - k_y| / |g_x - g_y| over the steps.

k_x and k_y are two stages of one Runge-Kutta step at the same time, g_x and g_y the states at which they were taken: an
estimate of the largest eigenvalue of the field's Jacobian (Shampine, 1977). Pal et al., 2021 (SRNODE).
"""

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import LastSolve, LearnableSpan, spans
from torchdyn_mintime.losses.penalty import Penalty
from torchdyn_mintime.numerics import Grid, RungeKutta, Stepper
from torchdyn_mintime.numerics.step_control import rms

__all__ = ["Stiffness"]


class Stiffness(Penalty):
    """The sum over the steps of an estimate of the field's stiffness (SRNODE), in 1 over time.

    An explicit solver with error control needs steps of about 3 over the stiffness at most, so that a field which is less
    stiff is solved in fewer steps. Norms are root mean squares over all entries of the state. Steps that an adaptive solver
    accepted are held.

    Cost: that of the forward once more, with its graph.

    Args:
        model: a LearnableSpan, or a module that holds some (their penalties are added). Solvers with two stages at one time:
            rk4, dopri5, tsit5.
        weight: loss times time.

    Raises:
        ValueError: a solver that takes no two stages at the same time.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -3 * z, solver="rk4"), torch.linspace(0, 1, 3))
        Your vector field ...
        >>> stiffness = Stiffness(span)
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> round(stiffness.penalty().item(), 4)  # 3 in each of two steps
        6.0
    """

    def __init__(self, model: nn.Module, weight: float = 1.0):
        super().__init__(model, weight)
        for span in spans(model):
            _stages_at_one_time(span.stepper)

    def of_span(self, span: LearnableSpan, last: LastSolve) -> Tensor:
        f, stepper = last.bound.function, span.stepper
        first, second = _stages_at_one_time(stepper)
        grid, z, terms = Grid(last.steps, last.grid.start, last.grid.end), last.x, []
        states: list[Tensor] = []

        def noted(t: Tensor, y: Tensor) -> Tensor:
            states.append(y)
            return f(t, y)

        with self.beside(last.bound):
            stepper.prepare(z)
            for i in range(len(last.steps) - 1):
                size, left = (torch.as_tensor(v, dtype=torch.float64) for v in (grid.size(i), grid.left(i)))
                states.clear()
                times = [(left + c * size).to(z) for c in stepper.nodes]
                z, stages = stepper.step(noted, z, times, size.to(z))
                apart = rms(states[second] - states[first])
                terms.append(rms(stages[second] - stages[first]) / apart.clamp_min(torch.finfo(apart.dtype).tiny))
        return torch.stack(terms).sum()


def _stages_at_one_time(stepper: Stepper) -> tuple[int, int]:
    """Returns the last two stages of a Runge-Kutta method that are taken at the same time."""
    nodes = list(stepper.nodes) if isinstance(stepper, RungeKutta) else []
    pairs = [(i, i + 1) for i in range(len(nodes) - 1) if nodes[i] == nodes[i + 1]]
    if not pairs:
        raise ValueError(
            f"{stepper.name} takes no two stages at the same time, which an estimate of stiffness compares; use rk4, "
            "dopri5 or tsit5"
        )
    return pairs[-1]
