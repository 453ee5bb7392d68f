r"""How many steps an adaptive solver takes, as something that a field can be trained on.

The number of steps is an integer, and its gradient is 0. What decides it has one: the size h_1 of the first step (Hairer,
Norsett and Wanner I, II.4), the error ratio r_k of each step, at most 1 where the step is accepted, and the size that the
control proposes next, h_{k+1} = h_k min(10, 0.9 r_k^{-1/p}), no less than h_k where r_k < 1. With n steps asked for, n - 1
are taken as proposed and the last one goes to the end, and the penalty is

    sum_k r_k^2 + 1.1 ((t_f - t0) / (h_1 + ... + h_n))^2.

Where it is 1 or less, the steps are accepted and reach the end: the solver takes n steps or fewer.
"""

import torch
from torch import Tensor, nn

from torchdyn_mintime import checks
from torchdyn_mintime.numerics.integrate import MAX_FACTOR, SAFETY, IntegrationError
from torchdyn_mintime.numerics.steppers import RungeKutta
from torchdyn_mintime.regularizers import OverSpans
from torchdyn_mintime.secondary import last_solve, refine, untraced
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import spans

__all__ = ["StepCount"]

MARGIN = 1.1
"""Above 1, so that other data of the same kind are solved in as few steps."""
LEAST_RATIO = 1e-6
"""Smaller error ratios allow no larger a step, and have no gradient that is worth following."""


class StepCount(OverSpans):
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
            if not (isinstance(span._stepper, RungeKutta) and span.adaptive):
                raise TypeError(
                    f"StepCount follows the step control of tsit5 and dopri5; {span._stepper.name} has none. For fixed steps "
                    "see StepDoubling"
                )

    def penalty(self) -> Tensor:
        """The weighted penalty of the last forward of every span, a scalar.

        Raises:
            RuntimeError: no forward was made.
            ValueError: the solver had to land on points between t0 and t_f.
            IntegrationError: the state is not finite in so few steps.
        """
        self.nfe = 0
        return self.weight * self._of_all()

    def _of_span(self, span: LearnableSpan) -> Tensor:
        last, stepper = last_solve(span), span._stepper
        assert isinstance(stepper, RungeKutta)
        if span._interpolator() is None and len(last.grid.nodes) > 2:
            raise ValueError(
                f"{stepper.name} lands on each of the {len(last.grid.nodes) - 2} points between t0 and t_f, and takes its "
                "steps between these; give the span its two ends alone, or dopri5's interpolator"
            )
        bound, x = last.bound, last.x
        atol, rtol = float(span.node.atol), float(span.node.rtol)
        whole = refine([last.steps[0], last.steps[-1]], last.grid.start, last.grid.end, 1)
        start, length = (torch.as_tensor(v, dtype=torch.float64) for v in (whole.left(0), whole.size(0)))
        direction, length = torch.sign(length.detach()), length.abs().to(x)

        def time(passed: Tensor | float) -> Tensor:
            return (start + direction * torch.as_tensor(passed, dtype=torch.float64)).to(x)

        with untraced(bound):
            before, f = bound.nfe, bound.function
            k1: Tensor | None = f(time(0.0), x)
            assert k1 is not None
            h = self._first_step(f, x, k1, time, direction.to(x), length, stepper.order, atol, rtol)
            covered, cost = torch.zeros_like(length), torch.zeros_like(length)
            for i in range(self.steps):
                left = (length - covered).clamp_min(1e-3 * length.detach())
                size = left if i == self.steps - 1 else torch.minimum(h, left)
                times = [time(covered + c * size) for c in stepper.nodes]
                dt = direction.to(x) * size
                x_new, stages = stepper.step(f, x, times, dt, k1)
                scale = torch.maximum(x.abs(), x_new.abs()) * rtol + atol
                ratio = _rms(stepper.error(stages, 1.0) * dt / scale)
                cost = cost + ratio.square()
                if i < self.steps - 1:
                    covered = covered + size
                    h = size * _factor(ratio, stepper.order)
                    x, k1 = x_new, stages[-1]
            self.nfe += bound.nfe - before
        penalty = cost + MARGIN * (length / (covered + h)).square()
        if not torch.isfinite(penalty):
            raise IntegrationError(
                f"the state is not finite within {self.steps} steps of {stepper.name} from t = {float(start):.6g}; the field "
                "is too steep for so few: ask for more of them, or lower the learning rate",
                time=float(start),
                step=self.steps,
                solver=stepper.name,
            )
        return penalty

    @staticmethod
    def _first_step(f, x, k1, time, direction, length, order, atol, rtol) -> Tensor:
        """The first step that the solver proposes, with its gradient (the drive has it in plain numbers)."""
        scale = x.abs() * rtol + atol
        d0, d1 = _rms(x / scale), _rms(k1 / scale)
        h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1.clamp_min(1e-30))
        h0 = torch.minimum(h0, length)
        d2 = _rms((f(time(h0), x + direction * h0 * k1) - k1) / scale) / h0
        steepest = torch.maximum(d1, d2)
        h1 = (0.01 / steepest.clamp_min(1e-15)) ** (1.0 / (order + 1))
        h1 = torch.where(steepest <= 1e-15, (1e-3 * h0).clamp_min(1e-6), h1)
        return torch.minimum(100 * h0, h1)

    def __repr__(self) -> str:
        return f"StepCount(steps={self.steps}, weight={self.weight:g})"


def _factor(ratio: Tensor, order: int) -> Tensor:
    """By how much the control changes the step size; where the step is rejected, without its lower limit."""
    grown = SAFETY * ratio.clamp_min(LEAST_RATIO) ** (-1.0 / order)
    return torch.where(ratio < 1, grown.clamp(1.0, MAX_FACTOR), grown)


def _rms(x: Tensor) -> Tensor:
    # A square in half precision overflows soon.
    square = (x.float() if x.dtype.itemsize < 4 else x).square().mean()
    # The root has no gradient at 0.
    return torch.where(square == 0, 0.0, square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()).to(x.dtype)
