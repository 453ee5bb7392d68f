r"""The certificate of Theorem 2: whether V(z(t)) <= V(z(t0)) exp(-rate (t - t0)), eq. (18), held along a solve."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Certificate", "certify"]


@dataclass
class Certificate:
    """Theorem 2 checked on data: eq. (18), V(z(t)) <= V(z(t0)) exp(-rate (t - t0)), at every point of a solve.

    Attributes:
        rate: the rate asked for, per unit of time.
        t: ``[points]``, the times looked at.
        values: ``[points, batch]``, V along the trajectories.
        bound: ``[points, batch]``, what V may be at most.
        held: ``[batch]``, whether V stayed below the bound at every point, up to rounding.
        worst_ratio: ``[batch]``, the largest V / bound.
        rates: ``[batch]``, the largest rate for which exp(-rate (t - t0)) V(z(t0)) was not exceeded.
    """

    rate: float
    t: Tensor
    values: Tensor
    bound: Tensor
    held: Tensor
    worst_ratio: Tensor
    rates: Tensor

    @property
    def fraction(self) -> float:
        """The share of samples for which the bound held, from 0 to 1."""
        return self.held.double().mean().item()

    def quantiles(self, q: tuple[float, ...] = (0.0, 0.05, 0.5, 0.95, 1.0)) -> list[float]:
        """Returns quantiles over samples of the rate that did hold."""
        # Finite stand-ins, since between two infinite rates torch.quantile would give NaN.
        return torch.quantile(self.rates.double().clamp(-1e300, 1e300), torch.tensor(q, dtype=torch.float64)).tolist()

    def __str__(self) -> str:
        names = ("min", "5 %", "median", "95 %", "max")
        return "\n".join(
            [
                f"V(z(t)) <= V(z(t0)) exp(-{self.rate:g} (t - t0)) on [{self.t[0]:.4g}, {self.t[-1]:.4g}]",
                f"  held for       {int(self.held.sum())} of {self.held.numel()} samples ({100 * self.fraction:.1f} %)",
                f"  worst ratio    {self.worst_ratio.max():.4g}",
                "  rate that held "
                + ", ".join(f"{name} {value:.4g}" for name, value in zip(names, self.quantiles(), strict=True)),
            ]
        )


def certify(rate: float, t: Tensor, values: Tensor, slope: Tensor | None, rounding: float) -> Certificate:
    """Returns the certificate of the potential's values along trajectories.

    Args:
        rate: the rate asked for, per unit of time.
        t: ``[points]``, ascending.
        values: ``[points, batch]``, V along the trajectories.
        slope: ``[batch]``, V-dot at the first point, for a condition of second order; None for one of first order.
        rounding: by how much, relative to 1, V / bound may exceed 1 where the bound still counts as held.

    Example:
        >>> t = torch.linspace(0, 1, 11)
        >>> certificate = certify(1.0, t, torch.exp(-2 * t)[:, None], None, 1e-6)
        >>> certificate.fraction, round(certificate.rates.item(), 3)
        (1.0, 2.0)
    """
    since, start = (t - t[0])[:, None], values[0]
    bound = torch.exp(-rate * since) * (start if slope is None else start + since * (slope + rate * start))
    values = values.clamp_min(0.0)
    worst = torch.where(values > 0, values / bound.clamp_min(0.0), torch.zeros_like(values)).amax(0)
    rates = (-torch.log(values[1:] / start) / since[1:]).amin(0)
    rates = torch.where(start > 0, rates, torch.where(worst > 0, -math.inf, math.inf))
    return Certificate(rate, t, values, bound, worst <= 1 + rounding, worst, rates)
