r"""States inside the steps of a solve, from the evaluations that the steps make anyway.

For a method with the stages k_i, the state at the share theta of a step from z of size h is

    z(t + theta h) = z + h sum_i b_i(theta) k_i,    b_i(theta) = sum_p d_ip theta^p,    b_i(1) = b_i.

The error of one such state is one order of h below that of a step. It is not carried on, so that a solve is as accurate inside
its steps as at their ends, up to a factor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["InsideSteps"]


class InsideSteps:
    """Gathers the states at given times as the steps pass them.

    Args:
        times: strictly monotone, in the direction of the solve, from its first point to its last at most.
        interpolant: the d_ip, ``[stages, degree]``, numbers or a tensor.

    Attributes:
        states: what was found so far, ``[times, *x.shape]`` each.
    """

    def __init__(self, times: Sequence[float], interpolant: Any):
        self._times, self._interpolant, self._next = times, interpolant, 0
        self.states: list[Tensor] = []

    def passed(
        self,
        ends: tuple[float, float],
        start: float | Tensor,
        size: float | Tensor,
        x: Tensor,
        x_new: Tensor,
        stages: Sequence[Tensor],
    ) -> None:
        """Finds the states at the times up to the end of a step.

        Args:
            ends: of the step, as numbers.
            start, size: of the step; tensors where they carry a gradient.
            x, x_new: the state before and after it.
            stages: its evaluations.
        """
        first, end = ends
        inside: list[float] = []
        tail: list[Tensor] = []
        while self._next < len(self._times) and not tail:
            t = self._times[self._next]
            if t == first:
                self.states.append(x[None])
            elif t == end:
                tail.append(x_new[None])
            elif (t - end) * (end - first) < 0:
                inside.append(t)
            else:
                break
            self._next += 1
        if inside:
            times = torch.tensor(inside, dtype=torch.float64, device=x.device)
            self.states.append(self._at((times - start) / size, size, x, stages))
        self.states += tail

    def _at(self, share: Tensor, size: float | Tensor, x: Tensor, stages: Sequence[Tensor]) -> Tensor:
        interpolant = torch.as_tensor(self._interpolant, dtype=torch.float64, device=x.device)
        powers = share[:, None] ** torch.arange(1, 1 + interpolant.shape[1], device=x.device)
        weights = (size * (powers @ interpolant.T)).to(x)
        return x + (weights @ torch.stack(tuple(stages)).flatten(1)).view(len(share), *x.shape)
