r"""Lyapunov conditions along a neural ODE: the penalty of eq. (15) to (17), and the certificate of Theorem 2.

For a potential V >= 0 of the state z(t), with z' = f(t, z, theta), the chain rule gives

    V-dot = dV/dz f + dV/dt,

and wherever V-dot + kappa V <= 0 along a trajectory, V(z(t)) <= V(z(t0)) exp(-kappa (t - t0)), eq. (8) and (9). The
point-wise violation is relu(V-dot + kappa V), eq. (16); its mean over samples, integrated over time, is eq. (17).

With ``order=2`` the condition is V-dotdot + 2 kappa V-dot + kappa^2 V <= 0 (a double root at -kappa), which a potential
of positions alone needs when the field gives accelerations: its first derivative does not contain the field yet. It
implies V(t) <= exp(-kappa s) (V0 + s (V-dot0 + kappa V0)) with s = t - t0.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.interpolators import str_to_interp

from torchdyn_mintime import checks
from torchdyn_mintime.field import BoundField, Field
from torchdyn_mintime.numerics.integrate import Grid, integrate
from torchdyn_mintime.numerics.steppers import make_stepper
from torchdyn_mintime.points import AtPoints
from torchdyn_mintime.secondary import last_solve
from torchdyn_mintime.span import LearnableSpan

__all__ = [
    "Certificate",
    "CrossEntropy",
    "LyapunovRegularizer",
    "SquaredDistance",
    "TruncatedCrossEntropy",
    "ball",
    "box",
]

Potential = Callable[..., Tensor]
Sampler = Callable[[int, Tensor], Tensor]

REDUCTIONS = ("mean", "integral", "points")

MIN_POINTS = 5
"""A trajectory shown at fewer points says too little of what lies between them."""


# --------------------------------------------------------------------------------------------------------- potentials


class CrossEntropy(nn.Module):
    """V(z, y) = cross entropy of the logits, eq. (15).

    Args:
        head: makes logits ``[batch, classes]`` of the state; its parameters are trained with the rest. None: the state
            itself, flattened, holds them.
        classes: how many of the state's first entries are logits, where there is no head. None is all of them.

    Example:
        >>> CrossEntropy(classes=2)(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))
        tensor([0.6931, 0.6931, 0.6931, 0.6931])
    """

    def __init__(self, head: nn.Module | None = None, *, classes: int | None = None):
        super().__init__()
        if head is not None and classes is not None:
            raise ValueError(f"classes={classes} picks logits out of the state, but a head was given; give one of them")
        self.head, self.classes = head, classes

    def logits(self, z: Tensor) -> Tensor:
        """The logits ``[batch, classes]`` at the states ``z``, ``[batch, ...]``."""
        return self.head(z) if self.head is not None else z.flatten(1)[:, : self.classes]

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """V ``[batch]`` at states ``[batch, ...]`` for the labels ``y``, ``[batch]`` of integers."""
        if y.is_floating_point():
            raise TypeError(f"cross entropy needs integer labels; got {y.dtype}: pass y.long()")
        return F.cross_entropy(self.logits(z), y, reduction="none")


class TruncatedCrossEntropy(CrossEntropy):
    """V(z, y) = max(0, cross entropy - floor): the truncated form below eq. (15).

    With ``floor=0``, as printed, nothing is cut, since cross entropy is positive. With a floor below the loss that is
    asked for, samples that are good enough have V = 0 and ask nothing more of the field.

    Args:
        head, classes: those of :class:`CrossEntropy`.
        floor: the cross entropy of one sample below which V is 0.

    Example:
        >>> TruncatedCrossEntropy(classes=2, floor=0.01)(torch.tensor([[9.0, 0.0]]), torch.tensor([0]))
        tensor([0.])
    """

    def __init__(self, head: nn.Module | None = None, *, classes: int | None = None, floor: float = 0.0):
        super().__init__(head, classes=classes)
        self.floor = checks.number(floor, "floor", least=0)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """V ``[batch]``; see :class:`CrossEntropy`."""
        return F.relu(super().forward(z, y) - self.floor)


class SquaredDistance(nn.Module):
    """V(z, target) = the squared Euclidean distance of the head's output (or the state) to a target.

    Args:
        head: maps the state to where targets live; None is the identity.

    Example:
        >>> SquaredDistance()(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([3., 3.])
    """

    def __init__(self, head: nn.Module | None = None):
        super().__init__()
        self.head = head

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """V ``[batch]`` at states ``[batch, ...]`` and targets of the output's shape."""
        output = z if self.head is None else self.head(z)
        if output.shape != target.shape:  # broadcasting would compare every sample with every target
            raise ValueError(
                f"the target has the shape {tuple(target.shape)}, the state's output {tuple(output.shape)}"
            )
        return (output - target).square().reshape(output.shape[0], -1).sum(1)


# ----------------------------------------------------------------------------------------------------------- samplers


def ball(radius: float, *, uniform_radius: bool = False) -> Sampler:
    """States drawn in a ball around 0, uniformly in its volume.

    Args:
        radius: of the ball, in units of the state.
        uniform_radius: the radius is uniform instead, which puts more states near 0 (LyaNet's way).

    Example:
        >>> states = ball(2.0)(100, torch.zeros(3))
        >>> states.shape, bool(states.norm(dim=1).max() <= 2)
        (torch.Size([100, 3]), True)
    """
    radius = checks.positive(radius, "the ball's radius")

    def draw(n: int, like: Tensor) -> Tensor:
        direction = torch.randn(n, like.numel(), dtype=like.dtype, device=like.device)
        direction = direction / direction.norm(dim=1, keepdim=True)
        u = torch.rand(n, 1, dtype=like.dtype, device=like.device)
        size = radius * (u if uniform_radius else u ** (1 / like.numel()))
        return (size * direction).reshape(n, *like.shape)

    return draw


def box(low: float | Tensor, high: float | Tensor) -> Sampler:
    """States drawn uniformly between two corners, numbers or tensors of one state's shape.

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


# -------------------------------------------------------------------------------------------------------- certificate


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
        """Quantiles over samples of the rate that did hold."""
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


# -------------------------------------------------------------------------------------------------------- regularizer


class LyapunovRegularizer(nn.Module):
    r"""A NeuralODE, bare or in a :class:`LearnableSpan`, with the Lyapunov loss of a potential beside it.

    Calls go through to the model. The evaluations made here are not counted in the node's ``nfe``.

    Args:
        model: the NeuralODE or LearnableSpan.
        potential: ``potential(z, *target) -> [batch]``, V >= 0, each entry of its own sample's state and target alone. A
            keyword ``t`` is passed the time where it asks for one. Ready ones: :class:`CrossEntropy`,
            :class:`TruncatedCrossEntropy`, :class:`SquaredDistance`. A module's parameters are parameters here too.
        rate: kappa, per unit of time.
        detach_potential: V gets no gradient in V-dot + kappa V, as in LyaNet and the paper's code: the loss then asks for
            a faster decay instead of states that merely have a smaller V.
        order: 1, or 2 for the second-order condition (see the module's text).

    Raises:
        TypeError: the model is neither, or the potential is not callable.
        ValueError: a rate or order that cannot be used.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 0.05, 6))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> model = LyapunovRegularizer(span, CrossEntropy(classes=2), rate=20.0)
        >>> x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
        >>> t_eval, sol = model(x)
        >>> model.penalty(t_eval, sol, y).backward()
        >>> model.violation(t_eval, sol, y).shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        model: NeuralODE | LearnableSpan,
        potential: Potential,
        rate: float,
        *,
        detach_potential: bool = True,
        order: int = 1,
    ):
        super().__init__()
        if not isinstance(model, NeuralODE | LearnableSpan):
            raise TypeError(
                f"LyapunovRegularizer takes a NeuralODE or a LearnableSpan; got {type(model).__name__}. For one inside a "
                "larger model, pass it alone: LyapunovRegularizer(next(spans(model)), ...)"
            )
        if not callable(potential):
            raise TypeError(f"potential must be callable as potential(z, *target); got {potential!r}")
        self.model = model
        self.potential = potential
        self.rate = checks.positive(rate, "rate")
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2; got {order!r}")
        self.order = order
        self.detach_potential = detach_potential
        self._takes_time = _takes_time(potential)
        self._args: Mapping[str, Any] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._points = AtPoints()
        self._depends: bool | None = None

    def forward(self, x: Tensor, *inputs: Any, **options: Any) -> Any:
        """As the model's own forward."""
        out = self.model(x, *inputs, **options)
        self._args = options.get("args")
        self._last = out if isinstance(self.model, NeuralODE) and isinstance(out, tuple) else None
        return out

    # ------------------------------------------------------------------------------------------------------ the loss

    def penalty(self, t_eval: Tensor, sol: Tensor, *target: Any, reduction: str = "mean") -> Tensor:
        """Eq. (17), a scalar: what a forward call returned, looked at by the point-wise violation.

        Args:
            t_eval: ``[points]``, ascending, 5 points or more.
            sol: ``[points, batch, ...]``.
            target: passed on to the potential; tensors of the batch's size.
            reduction: ``"mean"``, the average over time weighted by the steps; ``"integral"``, the integral over time
                (trapezoid rule), whose gradient in t_f is that of eq. (12)'s running cost; ``"points"``, the plain mean
                over points, as in the paper's code.

        Raises:
            ValueError: too few points, shapes that do not fit, or a potential that is negative or NaN.
            TypeError: the potential does not return a tensor.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}; got {reduction!r}")
        per_point = self.violation(t_eval, sol, *target).mean(1)
        if reduction == "points":
            return per_point.mean()
        steps = t_eval.to(per_point).diff()
        integral = (steps * (per_point[1:] + per_point[:-1]) / 2).sum()
        return integral if reduction == "integral" else integral / steps.sum()

    def penalty_of_last(self, *target: Any, reduction: str = "mean") -> Tensor:
        """:meth:`penalty` of the model's last forward, for where it sits inside a larger model."""
        return self.penalty(*self._last_solve(), *target, reduction=reduction)

    def _last_solve(self) -> tuple[Tensor, Tensor]:
        if isinstance(self.model, LearnableSpan):
            last = last_solve(self.model)
            return last.grid.times(self.model.t_f.dtype, self.model.t_f.device), last.states
        if self._last is not None:
            return self._last
        raise RuntimeError(
            "there is no last forward to look at; call the NeuralODE through this regularizer first, with return_t_eval=True"
        )

    def violation(self, t_eval: Tensor, sol: Tensor, *target: Any) -> Tensor:
        """relu(V-dot + rate V) of eq. (16) at every point, ``[points, batch]``, in units of V per unit of time."""
        terms = self.derivatives(t_eval, sol, *target)
        return self._violation(terms)

    def _violation(self, terms: list[Tensor]) -> Tensor:
        v = terms[0].detach() if self.detach_potential else terms[0]
        if self.order == 1:
            return F.relu(terms[1] + self.rate * v)
        return F.relu(terms[2] + 2 * self.rate * terms[1] + self.rate**2 * v)

    def derivatives(self, t_eval: Tensor, sol: Tensor, *target: Any) -> list[Tensor]:
        """[V, V-dot], and V-dotdot with ``order=2``, along the field, each ``[points, batch]``."""
        self._check_trajectory(t_eval, sol, target)
        with self._field().beside(sol[0].detach(), self._args) as bound:
            return self._along(bound, t_eval.to(sol.dtype), sol, target)

    def sampled_penalty(
        self, x: Tensor, *target: Any, sampler: Sampler, samples: int = 512, t_span: Tensor | None = None
    ) -> Tensor:
        """The mean violation at drawn states and one drawn time, without any solve: LyaNet's training.

        Every state is looked at with every sample's control and target, ``samples * batch`` pairs in all. No gradient
        reaches t_f, nor a potential's way to it: freeze t_f (``span.t_f.requires_grad_(False)``) and choose it later.

        Args:
            x: initial states ``[batch, ...]``, which set the data control.
            target: passed on to the potential.
            sampler: ``sampler(n, like) -> [n, *like.shape]``; :func:`ball`, :func:`box` or the user's own.
            samples: how many states.
            t_span: where the time is drawn between; default: the model's interval.
        """
        if not (isinstance(samples, int) and samples > 0):
            raise ValueError(f"samples must be a positive number of states; got {samples!r}")
        _check_targets(target, x.shape[0])
        first, last = self._interval(t_span)
        states = sampler(samples, x[0])
        if states.shape != (samples, *x.shape[1:]):
            raise ValueError(
                f"the sampler returned the shape {tuple(states.shape)}; asked were {(samples, *x.shape[1:])}"
            )
        z = states.repeat_interleave(x.shape[0], 0)
        repeated = tuple(_repeat(v, samples) for v in target)
        t = (first + (last - first) * torch.rand((), device=x.device)).to(x.dtype)
        with self._field().beside(x.repeat(samples, *[1] * (x.dim() - 1)), self._args) as bound:
            return self._violation(self._at(bound.function, t, z, repeated)).mean()

    # ---------------------------------------------------------------------------------------------- V and its derivatives

    def _node(self) -> NeuralODE:
        # Read anew each time: `wrap` may have put a span around the node since.
        return self.model.node if isinstance(self.model, LearnableSpan) else self.model

    def _field(self) -> Field:
        return self.model._field if isinstance(self.model, LearnableSpan) else Field(self.model)

    def _along(self, bound: BoundField, t: Tensor, sol: Tensor, target: tuple) -> list[Tensor]:
        """The terms at every point."""

        def at(t: Tensor, z: Tensor, copies: int) -> list[Tensor]:
            return self._at(bound.function, t, z, target if copies == 1 else tuple(_repeat(v, copies) for v in target))

        together = not self._takes_time and all(isinstance(v, Tensor) for v in target)
        return self._points(at, bound, t, sol, [self.potential], together)

    def _at(self, function: Callable, t: Tensor, z: Tensor, target: tuple) -> list[Tensor]:
        """The terms at one time, for states ``[batch, ...]``: each ``[batch]``."""
        if self.order == 1 and not self._takes_time:
            return self._reverse(function, t, z, target)
        return self._forward_mode(function, t, z, target)

    def _reverse(self, function: Callable, t: Tensor, z: Tensor, target: tuple) -> list[Tensor]:
        """V and dV/dz f by reverse mode.

        Measured on a 3-32-3 net, 512 samples and 6 points, gradient included: 1.3 ms (points together) or 2.4 (one by
        one), against 1.4 and 3.3 by ``torch.func.jvp``. torch's lighter ``forward_ad`` cannot be used at all: the
        backward of its cross entropy fails ("modified by an inplace operation", torch 2.14).
        """
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            point = z if graph and z.requires_grad else z.detach().requires_grad_()
            v = self._potential(t, point, target)
            found = (
                torch.autograd.grad(v.sum(), point, create_graph=graph, allow_unused=True)
                if v.requires_grad
                else [None]
            )
            slope = found[0]
        if slope is None:
            raise ValueError(_NO_GRADIENT)
        rate = (slope * function(t, z)).reshape(z.shape[0], -1).sum(1)
        return [v if graph else v.detach(), rate]

    def _forward_mode(self, function: Callable, t: Tensor, z: Tensor, target: tuple) -> list[Tensor]:
        """V, V-dot (and V-dotdot) by forward mode, which gives dV/dt for each sample apart, and can be nested."""
        self._check_depends(t, z, target)

        def along(g: Callable) -> Callable:
            # d/dt g(t, z(t)): the tangent of (t, z) along the flow is (1, f).
            return lambda t, z: torch.func.jvp(g, (t, z), (torch.ones_like(t), function(t, z)))[1]

        def value(t: Tensor, z: Tensor) -> Tensor:
            return self._raw(t, z, target)

        terms = [self._potential(t, z, target), along(value)(t, z)]
        if self.order == 2:
            terms.append(along(along(value))(t, z))
        return terms

    def _check_depends(self, t: Tensor, z: Tensor, target: tuple) -> None:
        """Once: forward mode returns zeros, and no complaint, for a potential that is cut off from the state."""
        if self._depends is None:
            with torch.enable_grad():
                self._depends = self._potential(t, z.detach().requires_grad_(), target).requires_grad
        if not self._depends:
            raise ValueError(_NO_GRADIENT)

    def _raw(self, t: Tensor, z: Tensor, target: tuple) -> Tensor:
        node = self._node()
        if node.integral_loss is not None and node.sensitivity == "autograd":
            z = z[:, 1:]  # the running cost's column is no part of the state
        return self.potential(z, *target, t=t) if self._takes_time else self.potential(z, *target)

    def _potential(self, t: Tensor, z: Tensor, target: tuple) -> Tensor:
        v = self._raw(t, z, target)
        if not isinstance(v, Tensor):
            raise TypeError(f"the potential must return a tensor [batch]; got {type(v).__name__}")
        if v.shape != z.shape[:1]:
            raise ValueError(
                f"the potential must return one value a sample, {tuple(z.shape[:1])}; got {tuple(v.shape)}"
            )
        lowest = v.detach().min().item() if v.numel() else 0.0
        if not lowest >= -_ROUNDING:
            cause = "is NaN" if math.isnan(lowest) else f"is negative ({lowest:.6g})"
            where = "" if bool(torch.isfinite(z).all()) else "; the state itself is not finite"
            raise ValueError(
                f"the potential {cause} at t = {t.item() if t.dim() == 0 else float('nan'):.6g}{where}; it must be 0 or more: "
                "subtract its minimum"
            )
        return v

    # -------------------------------------------------------------------------------------------------- the certificate

    @torch.no_grad()
    def certificate(
        self, x: Tensor, *target: Any, rate: float | None = None, points: int = 101, t_span: Tensor | None = None
    ) -> Certificate:
        """For which samples eq. (18) held, and the rate that did hold (Theorem 2 checked on data).

        The ODE is solved anew, at ``points`` points at least and no fewer than the model's own grid has, without
        touching counters or the last forward.

        Args:
            x: initial states ``[batch, ...]``.
            target: passed on to the potential.
            rate: default: the regularizer's own.
            points: how many points, evenly spaced.
            t_span: first and last time, for a bare node without a span of its own.
        """
        rate = self.rate if rate is None else checks.positive(rate, "rate")
        if not (isinstance(points, int) and points >= MIN_POINTS):
            raise ValueError(f"points must be a whole number, {MIN_POINTS} or more; got {points!r}")
        _check_targets(target, x.shape[0])
        node = self._node()
        first, last = self._interval(t_span)
        own = (
            len(self.model._grid(None, ()).nodes)
            if isinstance(self.model, LearnableSpan) and not self.model.adaptive
            else 0
        )
        nodes = torch.linspace(first, last, max(points, own), dtype=torch.float64).tolist()
        stepper = make_stepper(node.solver)
        interpolator = None
        if stepper.adaptive and node.interpolator is not None and stepper.name != "tsit5":
            interpolator = (
                str_to_interp(node.interpolator, torch.float64)
                if isinstance(node.interpolator, str)
                else node.interpolator
            )
        with self._field().beside(x, self._args) as bound:
            solution = integrate(
                bound.function, x, Grid(nodes), stepper, atol=node.atol, rtol=node.rtol, interpolator=interpolator
            )
            t = torch.tensor(nodes, dtype=x.dtype, device=x.device)
            values = torch.stack([self._potential(t[i], z, target) for i, z in enumerate(solution.states)]).double()
            slope = 0.0 if self.order == 1 else self._at(bound.function, t[0], x, target)[1].double()
        return _certify(rate, torch.tensor(nodes, dtype=torch.float64).to(x.device), values, self.order, slope, x.dtype)

    def _interval(self, t_span: Tensor | None) -> tuple[float, float]:
        if isinstance(self.model, LearnableSpan) and t_span is None:
            nodes = self.model._grid(None, ()).nodes
            return nodes[0], nodes[-1]
        span = t_span if t_span is not None else self._node().t_span
        if span is None:
            raise ValueError("the NeuralODE has no span of its own; pass t_span=")
        return span[0].item(), span[-1].item()

    # ------------------------------------------------------------------------------------------------------------ checks

    def _check_trajectory(self, t_eval: Tensor, sol: Tensor, target: tuple) -> None:
        if not (isinstance(t_eval, Tensor) and isinstance(sol, Tensor)):
            raise TypeError(f"t_eval and sol must be tensors; got {type(t_eval).__name__} and {type(sol).__name__}")
        if t_eval.dim() != 1 or sol.dim() < 2 or len(t_eval) != len(sol):
            raise ValueError(
                "t_eval must be [points] and sol [points, batch, ...], as a forward call returns them; got the shapes "
                f"{tuple(t_eval.shape)} and {tuple(sol.shape)}"
            )
        if len(t_eval) < MIN_POINTS:
            raise ValueError(
                f"the trajectory has {len(t_eval)} points, and {MIN_POINTS} at least are needed to see what lies between "
                "the ends; give the span a template with more points, or ask for them with save_at="
            )
        if not bool((t_eval.detach().diff() > 0).all()):
            raise ValueError(
                f"t_eval must ascend: the rate is one of decay in time; it runs from {t_eval[0]:g} to {t_eval[-1]:g}"
            )
        _check_targets(target, sol.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        # Graphs can be neither copied nor pickled.
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, order={self.order}, detach_potential={self.detach_potential}"


_NO_GRADIENT = (
    "the potential has no gradient with respect to the state: it is detached from z, or does not use it, so V-dot would be "
    "0 whatever the field does; compute it from z with differentiable operations"
)

# Cross entropies computed as a difference of two logits may be a rounding error below 0.
_ROUNDING = 1e-5


def _certify(
    rate: float, t: Tensor, values: Tensor, order: int, slope: Tensor | float, dtype: torch.dtype
) -> Certificate:
    since = (t - t[0])[:, None]
    start = values[0]
    bound = torch.exp(-rate * since) * (start if order == 1 else start + since * (slope + rate * start))
    values = values.clamp_min(0.0)
    ratio = torch.where(values > 0, values / bound.clamp_min(0.0), torch.zeros_like(values))
    worst = ratio.amax(0)
    rates = (-torch.log(values[1:] / start) / since[1:]).amin(0)
    rates = torch.where(start > 0, rates, torch.where(worst > 0, -math.inf, math.inf))
    held = worst <= 1 + math.sqrt(torch.finfo(dtype).eps)
    return Certificate(rate, t, values, bound, held, worst, rates)


def _takes_time(potential: Potential) -> bool:
    function = potential.forward if isinstance(potential, nn.Module) else potential
    try:
        return "t" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _check_targets(target: tuple, batch: int) -> None:
    for value in target:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != batch:
            raise ValueError(
                f"a target has {value.shape[0]} rows for a batch of {batch} states; pass the batch's own targets"
            )


def _repeat(value: Any, times: int) -> Any:
    """The rows of a target, once for every point. What has no rows is shared."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value.repeat(times, *[1] * (value.dim() - 1))
