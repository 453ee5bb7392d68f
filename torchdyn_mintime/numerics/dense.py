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

from torchdyn_mintime.numerics.learned import precise

__all__ = ["InsideSteps"]


class InsideSteps:
    """Gathers the states at given times as the steps pass them.

    Args:
        times: strictly monotone, in the direction of the solve, from its first point to its last at most.
        interpolant: the d_ip, ``[stages, degree]``, numbers or a tensor.
        x: a state, for the type and the device.
        steps: the times between which steps will be taken, where they are known before.

    Attributes:
        states: what was found so far, ``[times, *x.shape]`` in all.
    """

    def __init__(self, times: Sequence[float], interpolant: Any, x: Tensor, steps: Sequence[float] | None = None):
        self._times, self._next = times, 0
        self._interpolant = torch.as_tensor(interpolant, dtype=torch.float64, device=x.device)
        self._powers = torch.arange(1, 1 + self._interpolant.shape[1], device=x.device)
        self.states: list[Tensor] = []
        # All at once, where they are plain numbers: one by one they cost as much as a step of a small network.
        self._weights: Tensor | None = None
        if steps is not None:
            forwards = steps[-1] > steps[0]
            lefts, i = [], 0
            for t in times:
                while i < len(steps) - 2 and (t > steps[i + 1] if forwards else t < steps[i + 1]):
                    i += 1
                lefts.append((t, steps[i], steps[i + 1] - steps[i]))
            t, left, size = torch.tensor(lefts, dtype=torch.float64, device=x.device).T
            self._weights = self._weights_at((t - left) / size, size[:, None]).to(x)

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
        begin, end = ends
        if self._next == 0 and self._times[0] == begin:
            self.states.append(x[None])
            self._next = 1
        first = self._next
        while self._next < len(self._times) and (self._times[self._next] - end) * (end - begin) < 0:
            self._next += 1
        if self._next > first:
            weights = None if self._weights is None else self._weights[first : self._next]
            if weights is None or isinstance(start, Tensor) or isinstance(size, Tensor):
                times = torch.tensor(self._times[first : self._next], dtype=torch.float64, device=x.device)
                weights = self._weights_at((times - start) / size, size).to(x)
            with precise(x):
                inside = torch.addmm(x.reshape(1, -1), weights, torch.stack(tuple(stages)).flatten(1).to(x))
            self.states.append(inside.view(len(weights), *x.shape))
        if self._next < len(self._times) and self._times[self._next] == end:
            self.states.append(x_new[None])
            self._next += 1

    def _weights_at(self, share: Tensor, size: float | Tensor) -> Tensor:
        return size * (share[:, None] ** self._powers @ self._interpolant.T)
