r"""The step control of adaptive solvers: torchdyn's, which is that of Hairer, Norsett and Wanner I, II.4.

The error of a step is measured entry by entry in units of its tolerance atol + rtol |z|; the root mean square of that is
the error ratio r. A step is accepted where r <= 1. The next one is h min(10, max(0.2, 0.9 r^(-1/p))) for a method of order
p, and after an accepted step no shorter than h.

All functions take Python numbers, as the drive does, and scalar tensors that carry a gradient, as a penalty on the number
of steps does. A comparison of tensors picks a branch by their values, and the gradient is that of the branch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MAX_FACTOR", "MIN_FACTOR", "SAFETY", "error_norm", "factor", "first_step", "rms"]

SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0


def rms(x: Tensor) -> Tensor:
    """Returns the root mean square of all entries, a scalar of float32 at least. Its gradient at 0 is 0."""
    x = x.float() if x.dtype.itemsize < 4 else x  # a square in half precision overflows soon
    return torch.linalg.vector_norm(x) / math.sqrt(max(x.numel(), 1))


def error_norm(error: Tensor, x: Tensor, x_new: Tensor | None = None, *, atol: float, rtol: float) -> Tensor:
    """Returns the norm of ``error`` in units of the tolerance, a scalar tensor.

    Args:
        error: an error, or any tensor of the state's shape.
        x, x_new: the states before and after the step; the tolerance follows the larger one, entry by entry.
        atol, rtol: absolute (units of state) and relative tolerance.

    Example:
        >>> round(error_norm(torch.tensor([0.3]), torch.tensor([2.0]), torch.tensor([-3.0]), atol=0.0, rtol=0.1).item(), 6)
        1.0
    """
    size = x.abs() if x_new is None else torch.maximum(x.abs(), x_new.abs())
    return rms(error / size.mul_(rtol).add_(atol))


def factor(ratio: Any, order: int, least: float = MIN_FACTOR) -> Any:
    """Returns by how much the step size changes after a step of error ``ratio``.

    Args:
        ratio: the step's error norm; infinity and NaN count as a step that failed.
        order: order of the method.
        least: the smallest factor after a rejected step.

    Example:
        >>> factor(0.0, 5), factor(0.9**5, 5), factor(32.0, 5), factor(math.nan, 5)
        (10.0, 1.0, 0.45, 0.2)
    """
    if ratio <= (SAFETY / MAX_FACTOR) ** order:
        return MAX_FACTOR
    # In this order, `max` of a NaN is the limit.
    return max(1.0 if ratio < 1.0 else least, SAFETY * ratio ** (-1.0 / order))


def first_step(
    f: Callable[[Any, Tensor], Tensor],
    x: Tensor,
    k1: Tensor,
    time: Callable[[Any], Tensor | None],
    direction: float,
    length: Any,
    order: int,
    norm: Callable[[Tensor, Tensor], Any],
) -> Any:
    """Returns the size of the first step, at the cost of one evaluation of the field.

    Args:
        f: the field.
        x: the initial state, any shape.
        k1: the field there.
        time: gives the time, as ``f`` takes it, after so much of the interval.
        direction: 1 or -1, the sign of dt.
        length: of the interval, which the trial step does not leave.
        order: order of the method.
        norm: ``norm(value, x)``, such as :func:`error_norm` at given tolerances, as a number or as a scalar tensor.
    """
    d0, d1 = norm(x, x), norm(k1, x)
    # Where the state or the field say nothing of a scale, that of the interval: time has none of its own.
    tiny = 1e-6 * length
    h0 = tiny if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, length)
    d2 = norm(f(time(h0), x + direction * h0 * k1) - k1, x) / h0
    if not d2 < math.inf:
        return h0
    steepest = max(d1, d2)
    h1 = max(tiny, h0 * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1.0 / (order + 1))
    return min(100 * h0, h1)
