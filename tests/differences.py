"""Finite differences in float64, and the comparison of a gradient with them."""

from collections.abc import Callable

import torch
from torch import Tensor

# Five-point formulas of fourth order: with h = 1e-4 the truncation error is about h^4 = 1e-16 of the fifth derivative and
# the rounding error about 1e-16 / h = 1e-12 of the value, so both stay far below the tolerance of 1e-6 asked of gradients.
CENTRAL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))
BACKWARD = ((0, 25 / 12), (-1, -48 / 12), (-2, 36 / 12), (-3, -16 / 12), (-4, 3 / 12))
FORWARD = tuple((-k, -c) for k, c in BACKWARD)


@torch.no_grad()
def difference(value: Callable[[], Tensor], tensors, directions, h: float = 1e-4, stencil=CENTRAL) -> float:
    """The derivative of `value()` as the tensors move, in place, along the directions; they are put back afterwards."""
    before = [t.detach().clone() for t in tensors]
    total = 0.0
    try:
        for k, coefficient in stencil:
            for tensor, start, direction in zip(tensors, before, directions, strict=True):
                tensor.copy_(start + k * h * direction)
            total += coefficient * float(value())
    finally:
        for tensor, start in zip(tensors, before, strict=True):
            tensor.copy_(start)
    return total / h


def directions_like(tensors, seed: int = 0) -> list[Tensor]:
    """One random direction of unit length over all the tensors together."""
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in tensors]
    norm = torch.sqrt(sum(r.square().sum() for r in raw))
    return [r / norm for r in raw]


def assert_close(analytic: float, numeric: float, scale: float, rtol: float, what: str = "") -> None:
    """|analytic - numeric| <= rtol * max(|numeric|, 1e-2 scale).

    The scale is that of the terms: a derivative in which they happen to cancel is not asked for more digits than they have.
    """
    error = abs(analytic - numeric) / max(abs(numeric), 1e-2 * scale, 1e-300)
    assert error <= rtol, (
        f"{what}: gradient {analytic!r}, difference {numeric!r}, relative error {error:.2e} > {rtol:.0e}"
    )
