"""Samplers of states, for the Lyapunov loss without a solve."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import checks

__all__ = ["Sampler", "ball", "box"]

Sampler = Callable[[int, Tensor], Tensor]
"""``sampler(n, like) -> [n, *like.shape]``: n states, of the shape, dtype and device of the state ``like``."""


def ball(radius: float, *, uniform_radius: bool = False) -> Sampler:
    """Returns a sampler of states in a ball around 0, uniform in its volume.

    Args:
        radius: the radius of the ball, in units of the state.
        uniform_radius: the radius is uniform instead, which puts more states near 0 (LyaNet's way).

    Example:
        >>> states = ball(2.0)(100, torch.zeros(3))
        >>> states.shape, bool(states.norm(dim=1).max() <= 2)
        (torch.Size([100, 3]), True)
    """
    radius = checks.positive(radius, "the ball's radius")

    def draw(n: int, like: Tensor) -> Tensor:
        normal = torch.randn(n, like.numel(), dtype=like.dtype, device=like.device)
        u = torch.rand(n, 1, dtype=like.dtype, device=like.device)
        size = radius * (u if uniform_radius else u ** (1 / like.numel()))
        return (size * nn.functional.normalize(normal)).reshape(n, *like.shape)

    return draw


def box(low: float | Tensor, high: float | Tensor) -> Sampler:
    """Returns a sampler of states that are uniform between two corners, numbers or tensors of one state's shape.

    Example:
        >>> box(-1.0, 1.0)(5, torch.zeros(2, 4)).shape
        torch.Size([5, 2, 4])
    """
    for name, value in (("low", low), ("high", high)):
        if not isinstance(value, Tensor):
            checks.number(value, name)
    if not bool((torch.as_tensor(low) < torch.as_tensor(high)).all()):
        raise ValueError(f"the box must have low < high; got low={low}, high={high}")

    def draw(n: int, like: Tensor) -> Tensor:
        a, b = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (low, high))
        return a + (b - a) * torch.rand(n, *like.shape, dtype=like.dtype, device=like.device)

    return draw
