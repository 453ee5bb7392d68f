r"""The certificate of Theorem 2: whether V(z(t)) <= V(z(t0)) exp(-rate (t - t0)), eq. (18), held along a solve.

It is one of two curves: the ODE's own solution, which the theorem is about, and the states that the model itself reaches,
which differ from it by the error of its solver. Between the points that are looked at, V is taken for the cubic that has
its values and slopes at both ends, and where that comes near the bound, more points are looked at.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Certificate", "certify", "doubtful"]

GOLDEN = (3 - math.sqrt(5)) / 2
"""Where an interval is split, as a share of it. An oscillation cannot hide in splits that have no common measure."""


@dataclass
class Certificate:
    """Theorem 2 checked on data: eq. (18), V(z(t)) <= V(z(t0)) exp(-rate (t - t0)), along the ODE's own solution.

    Attributes:
        rate: the rate asked for, per unit of time.
        t: ``[points]``, the times looked at.
        values: ``[points, batch]``, V along the trajectories.
        bound: ``[points, batch]``, what V may be at most.
        held: ``[batch]``, whether V stayed below the bound for sure, up to rounding: along the ODE's own solution, between
            the points too, and at the states that the model itself reaches.
        worst_ratio: ``[batch]``, the largest V / bound of the ODE's own solution.
        rates: ``[batch]``, the largest rate for which exp(-rate (t - t0)) V(z(t0)) was not exceeded there.
        own_ratio: ``[batch]``, the largest V / bound at the states that the model itself reaches; None where only the
            ODE's own solution was looked at.
    """

    rate: float
    t: Tensor
    values: Tensor
    bound: Tensor
    held: Tensor
    worst_ratio: Tensor
    rates: Tensor
    own_ratio: Tensor | None = None

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
        own = "" if self.own_ratio is None else f", {self.own_ratio.max():.4g} by the model's own steps"
        return "\n".join(
            [
                f"V(z(t)) <= V(z(t0)) exp(-{self.rate:g} (t - t0)) on [{self.t[0]:.4g}, {self.t[-1]:.4g}]",
                f"  held for       {int(self.held.sum())} of {self.held.numel()} samples ({100 * self.fraction:.1f} %)",
                f"  worst ratio    {self.worst_ratio.max():.4g} along the ODE's own solution{own}",
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
    bound = torch.exp(-rate * since) * _undecayed_bound(rate, since, start, slope)
    values = values.clamp_min(0.0)
    worst = torch.where(values > 0, values / bound.clamp_min(0.0), torch.zeros_like(values)).amax(0)
    rates = (-torch.log(values[1:] / start) / since[1:]).amin(0)
    rates = torch.where(start > 0, rates, torch.where(worst > 0, -math.inf, math.inf))
    return Certificate(rate, t, values, bound, worst <= 1 + rounding, worst, rates)


def doubtful(rate: float, t: Tensor, values: Tensor, slopes: Tensor, slope: Tensor | None, rounding: float) -> Tensor:
    """Returns between which points V may exceed its bound, though it does not at the points: ``[points - 1, batch]``.

    There V is estimated by a cubic, and the error of that by how well the cubic of the two points beside a point gives V at
    that one. A sample that has exceeded its bound somewhere is in no doubt.

    Args:
        rate: the rate asked for, per unit of time.
        t: ``[points]``, ascending, 3 points or more.
        values, slopes: ``[points, batch]``, V and V-dot along the trajectories.
        slope, rounding: as for :func:`certify`.

    Example:
        >>> t = torch.linspace(0, 1, 11, dtype=torch.float64)
        >>> values = torch.exp(-2 * t)[:, None]
        >>> doubtful(1.0, t, values, -2 * values, None, 1e-6).any().item()
        False
    """
    since, start = (t - t[0])[:, None], values[0]
    # Without the decay the bound is constant or a line, and what is above it is as smooth as V.
    grown = torch.exp((rate * since).clamp_max(600.0))
    limit = 1 + rounding
    above = values.clamp_min(0.0) * grown - limit * _undecayed_bound(rate, since, start, slope)
    rise = (slopes + rate * values) * grown - (0.0 if slope is None else limit * (slope + rate * start))
    width = t.diff()[:, None]
    missed = (
        above[1:-1] - _cubic(above[:-2], above[2:], rise[:-2], rise[2:], width[:-1] + width[1:], width[:-1])
    ).abs()
    ends = torch.zeros_like(missed[:1])
    # Over a half of the distance the error of a cubic is a sixteenth; a quarter is on the safe side.
    error = torch.maximum(torch.cat([ends, missed]), torch.cat([missed, ends])) / 4
    inside = [_cubic(above[:-1], above[1:], rise[:-1], rise[1:], width, width * (k / 8)) for k in range(1, 8)]
    peak = torch.stack([above[:-1], above[1:], *inside]).amax(0)
    return (peak + error > 0) & (above <= 0).all(0)


def _undecayed_bound(rate: float, since: Tensor, start: Tensor, slope: Tensor | None) -> Tensor:
    """Returns the bound of V without its factor exp(-rate (t - t0)): V at the start, and of second order a line."""
    return start if slope is None else start + since * (slope + rate * start)


def _cubic(a: Tensor, b: Tensor, slope_a: Tensor, slope_b: Tensor, width: Tensor, after: Tensor) -> Tensor:
    """Returns the cubic with values a and b and these slopes at both ends of ``width``, at ``after`` from the first."""
    u = after / width
    rest = 1 - u
    start = a * (1 + 2 * u) + slope_a * after
    end = b * (3 - 2 * u) - slope_b * (width - after)
    return start * rest.square() + end * u.square()
