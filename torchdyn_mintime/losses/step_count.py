r"""How many steps an adaptive solver takes, as something that a field can be trained on.

The number of steps is an integer, and its gradient is 0. What decides it has one: the size h_1 of the first step (Hairer,
Norsett and Wanner I, II.4), the error ratio r_k of each step, at most 1 where the step is accepted, and the size that the
control proposes next, h_{k+1} = h_k min(10, 0.9 r_k^{-1/p}), no less than h_k where r_k < 1. With n steps asked for, n - 1
are taken as proposed and the last one goes to the end, and the penalty is

    sum_k r_k^2 + 1.1 ((t_f - t0) / (h_1 + ... + h_n))^2.

Where it is 1 or less, the steps are accepted and reach the end: the solver takes n steps or fewer.
"""

import functools

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import LastSolve, LearnableSpan, checks, spans
from torchdyn_mintime.losses.penalty import Penalty
from torchdyn_mintime.numerics import Grid, IntegrationError, RungeKutta
from torchdyn_mintime.numerics.step_control import error_norm, factor, first_step

__all__ = ["StepCount"]

MARGIN = 1.1
"""Above 1, so that other data of the same kind are solved in as few steps."""


class StepCount(Penalty):
    """A penalty that is 1 or less where an adaptive solver takes no more than so many steps.

    Add :meth:`penalty` to the loss. It follows the solver's own control of its steps at the node's tolerances, for the batch
    of the last forward as a whole, so that training lowers what makes the solver take more: a fast start, and curvature.

    Cost: a solve of ``steps`` steps, 2 + 6 ``steps`` evaluations for tsit5 and dopri5, all kept for backward.

    Args:
        model: a LearnableSpan with ``tsit5`` or ``dopri5``, or a module that holds some (their penalties are added).
        steps: how many steps each is to take, 1 or more. At tolerance 1e-3 the first step is some seventh of the way
            or less, so that 2 are the fewest.
        weight: of the penalty, in units of loss. A hundredth fits a target loss of that size.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Raises:
        TypeError: ``model`` is not a module, or a span's solver has no error estimate of its own.
        ValueError: ``model`` has no LearnableSpan, or a value cannot be used.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> span = LearnableSpan(NeuralODE(net, solver="tsit5"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> count = StepCount(span, steps=2, weight=0.01)
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> (sol[-1].square().mean() + count.penalty()).backward()
        >>> count.nfe
        14
    """

    def __init__(self, model: nn.Module, steps: int, weight: float = 1.0):
        super().__init__(model, weight)
        self.steps = checks.count(steps, "steps", 1)
        for span in spans(model):
            if not (isinstance(span.stepper, RungeKutta) and span.adaptive):
                raise TypeError(
                    "StepCount follows the step control of tsit5 and dopri5; the model has a span with "
                    f"{span.stepper.name}, which has none. For fixed steps see StepDoubling"
                )

    def of_span(self, span: LearnableSpan, last: LastSolve) -> Tensor:
        """Returns the penalty of one span.

        Raises:
            ValueError: the solver had to land on points between t0 and t_f.
            IntegrationError: the state is not finite in so few steps.
        """
        stepper = span.stepper
        if span.interpolator is None and len(last.grid.nodes) > 2:
            raise ValueError(
                f"{stepper.name} lands on each of the {len(last.grid.nodes) - 2} points between t0 and t_f, and takes its "
                "steps between these; give the span its two ends alone, or dopri5's interpolator"
            )
        x, f = last.x, last.bound.function
        norm = functools.partial(error_norm, atol=float(span.node.atol), rtol=float(span.node.rtol))
        whole = Grid([last.steps[0], last.steps[-1]], last.grid.start, last.grid.end)
        start, length = (torch.as_tensor(v, dtype=torch.float64) for v in (whole.left(0), whole.size(0)))
        direction, length = 1.0 if length > 0 else -1.0, length.abs().to(x)

        def time(passed: float | Tensor) -> Tensor:
            return (start + direction * passed).to(x)

        covered, cost = torch.zeros_like(length), torch.zeros_like(length)
        with self.beside(last.bound):
            k1 = f(time(0.0), x)
            h = first_step(f, x, k1, time, direction, length, stepper.order, norm)
            for i in range(self.steps):
                reach = covered + h
                left = (length - covered).clamp_min(1e-3 * length.detach())
                size = left if i == self.steps - 1 else min(h, left)
                dt, times = direction * size, [time(covered + c * size) for c in stepper.nodes]
                x_new, stages = stepper.step(f, x, times, dt, k1)
                ratio = norm(stepper.error(stages, 1.0) * dt, x, x_new)
                cost = cost + ratio.square()
                # A rejected step has no lower limit here: the worse it is, the less the next one covers.
                covered, h = covered + size, size * factor(ratio, stepper.order, least=0.0)
                x, k1 = x_new, stages[-1]
        penalty = cost + MARGIN * (length / reach).square()
        if not torch.isfinite(penalty):
            raise IntegrationError(
                f"the state is not finite within {self.steps} steps of {stepper.name} from t = {last.steps[0]:.6g}; the "
                "field is too steep for so few: ask for more of them, or lower the learning rate",
                time=last.steps[0],
                step=self.steps,
                solver=stepper.name,
            )
        return penalty
