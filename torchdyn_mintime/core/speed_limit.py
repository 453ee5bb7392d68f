r"""A limit on the state's speed, under which minimum time is well posed.

For an autonomous field, (f, t_f) and (c f, t_f / c) trace the same path: a field that may grow without bound makes any
task as short as one likes. With |z'| < v, a path of length d takes more than d / v.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.field import takes

__all__ = ["SpeedLimit"]


class SpeedLimit(nn.Module):
    """A vector field whose speed is smoothly held below ``max_speed``: f / sqrt(1 + |f|^2 / max_speed^2).

    |f| is the Euclidean norm over all dimensions but the first, the batch (of a 1-D state: over all of it). The
    direction stays. Slow fields pass almost unchanged: a speed of a tenth of the limit changes by half a percent. Use it as the
    vector field of a ``NeuralODE``; it takes the time if ``field`` does. For an ODE of order 2 or more it limits what the
    field returns, the highest derivative. In a CNF put it around the inner network, where it limits the sample's speed
    and not that of its log-density.

    Args:
        field: a module or function of ``(x)`` or ``(t, x)``.
        max_speed: units of state per unit of time.

    Raises:
        TypeError: ``field`` is not callable, or ``max_speed`` is not a number.
        ValueError: ``max_speed`` is not positive and finite.

    Example:
        >>> field = SpeedLimit(nn.Linear(2, 2), max_speed=3.0)
        >>> bool((field(100 * torch.randn(8, 2)).norm(dim=1) < 3.0).all())
        True
    """

    def __new__(cls, field: Callable[..., Tensor] | None = None, max_speed: float = math.inf) -> "SpeedLimit":
        # torchdyn asks forward's signature whether it takes t.
        return super().__new__(_TimedSpeedLimit if field is not None and takes(field, "t") else cls)

    def __init__(self, field: Callable[..., Tensor], max_speed: float):
        super().__init__()
        if not callable(field):
            raise TypeError(f"field must be a module or a function of (x) or (t, x); got {type(field).__name__}")
        self.max_speed = checks.positive(max_speed, "max_speed")
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        return self._limited(self.field(x))

    def _limited(self, velocity: Tensor) -> Tensor:
        # Scaled first, so that the square of a large field does not overflow in half precision.
        square = (velocity / self.max_speed).square()
        total = square.flatten(1).sum(1) if velocity.dim() > 1 else square.sum()
        shape = (-1, *[1] * (velocity.dim() - 1)) if velocity.dim() > 1 else ()
        return velocity * torch.rsqrt(1 + total).reshape(shape)

    def extra_repr(self) -> str:
        return f"max_speed={self.max_speed:g}"


class _TimedSpeedLimit(SpeedLimit):
    def forward(self, t: Any, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self._limited(self.field(t, x, **(kwargs if self._takes_kwargs else {})))

    def __init__(self, field: Callable[..., Tensor], max_speed: float):
        super().__init__(field, max_speed)
        self._takes_kwargs = takes(field, "args", or_any=True)
