r"""Lyapunov conditions along a neural ODE: the penalty of eq. (15) to (17).

For a potential V >= 0 of the state z(t), with z' = f(t, z, theta), the chain rule gives

    V-dot = dV/dz f + dV/dt,

and wherever V-dot + kappa V <= 0 along a trajectory, V(z(t)) <= V(z(t0)) exp(-kappa (t - t0)), eq. (8) and (9). The
point-wise violation is relu(V-dot + kappa V), eq. (16); its mean over samples, integrated over time, is eq. (17).

With ``order=2`` the condition is V-dotdot + 2 kappa V-dot + kappa^2 V <= 0 (a double root at -kappa), which a potential
of positions alone needs when the field gives accelerations: its first derivative does not contain the field yet. It
implies V(t) <= exp(-kappa s) (V0 + s (V-dot0 + kappa V0)) with s = t - t0.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import (
    BoundField,
    Field,
    LearnableSpan,
    checks,
    cost_columns,
    evaluating,
    last_solve,
    only_span,
    position,
    reference_solution,
    rk4_solution,
    takes,
    undisturbed,
    untraced,
)
from torchdyn_mintime.losses.batched_points import BatchedPoints
from torchdyn_mintime.losses.certificate import GOLDEN, Certificate, certify, doubtful
from torchdyn_mintime.losses.samplers import Sampler
from torchdyn_mintime.losses.trajectory import differentiable, position_of, rate_of_change, recorded, start_of

__all__ = ["LyapunovRegularizer", "keep_points", "regularizer_for"]

REDUCTIONS = ("mean", "integral", "points")

MIN_POINTS = 5
"""A trajectory shown at fewer points says too little of what lies between them."""

REFERENCE_STEPS = 8
"""Steps of rk4 whose points are looked at where a LearnableSolver takes the whole interval in one step."""

MAX_ROUNDS = 12
"""How often a certificate looks at more points where it is in doubt. A sample in doubt for longer counts as not held."""

CERTIFICATE_TOLERANCE = 1e-9
"""Of the solve that a certificate is of: absolute and relative."""

ROUNDING = 1e-5
"""How far below 0 a potential may be: cross entropies that are a difference of two logits are a rounding error below."""


class LyapunovRegularizer(nn.Module):
    r"""Adds the Lyapunov loss of a potential to a NeuralODE, bare or in a :class:`LearnableSpan`.

    Calls go through to the model. The evaluations made here are not counted in the node's ``nfe``. Where a LearnableSolver
    takes the whole interval in one step, the trajectory looked at is that of 8 steps of rk4.

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
        >>> from torchdyn_mintime.losses.potentials import CrossEntropy
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
        potential: Callable[..., Tensor],
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
        self._takes_time = takes(potential, "t")
        self._called_with: Mapping[str, Any] | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._points = BatchedPoints()

    def forward(self, x: Tensor, *inputs: Any, **options: Any) -> Any:
        """Calls the model."""
        out = self.model(x, *inputs, **options)
        self._called_with = options.get("args", inputs[2] if len(inputs) > 2 else None)
        self._last = out if isinstance(self.model, NeuralODE) and isinstance(out, tuple) else None
        return out

    # ------------------------------------------------------------------------------------------------------ the loss

    @property
    def _args(self) -> Mapping[str, Any] | None:
        """The ``args`` of the last forward, whether it was called here, or the span by a model around it."""
        if isinstance(self.model, LearnableSpan) and self.model.last is not None:
            return self.model.last.bound.args
        return self._called_with

    def penalty(self, t_eval: Tensor, sol: Tensor, *target: Any, reduction: str = "mean") -> Tensor:
        """Returns eq. (17), a scalar, for what a forward call returned.

        Args:
            t_eval: ``[points]``, ascending, 5 points or more. (A bare NeuralODE that solves a descending span returns
                ascending times, of the opposite sign: they are not of this field.)
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
        t_eval, sol = self._with_points(t_eval, sol)
        violation = self.violation(t_eval, sol, *target)
        # Times of half precision may be equal, and their differences 0.
        per_point = violation.to(torch.promote_types(violation.dtype, torch.float32)).mean(1)
        if reduction == "points":
            # Each state counts at its own time, wherever t_f is: a gradient of t_eval, here 0, says so (core.series).
            return per_point.mean() + 0 * t_eval[-1].to(per_point)
        t = t_eval.to(per_point)
        integral = torch.trapezoid(per_point, t)
        return integral if reduction == "integral" else integral / (t[-1] - t[0])

    def penalty_of_last(self, *target: Any, reduction: str = "mean") -> Tensor:
        """Returns the :meth:`penalty` of the model's last forward, for where it sits inside a larger model.

        Raises:
            RuntimeError: no forward was made.
        """
        if isinstance(self.model, LearnableSpan):
            last = last_solve(self.model)
            trajectory = last.grid.times(self.model.t_f.dtype, self.model.t_f.device), last.states
        elif self._last is not None:
            trajectory = self._last
        else:
            raise RuntimeError(
                "there is no last forward to look at; call the NeuralODE through this regularizer first, with "
                "return_t_eval=True"
            )
        return self.penalty(*trajectory, *target, reduction=reduction)

    def violation(self, t_eval: Tensor, sol: Tensor, *target: Any) -> Tensor:
        """Returns relu(V-dot + rate V) of eq. (16) at every point, ``[points, batch]``, in units of V per unit of time."""
        return self._violation(self.derivatives(t_eval, sol, *target))

    def _with_points(self, t_eval: Tensor, sol: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the trajectory that is looked at: by steps of rk4 where a LearnableSolver has given its ends alone."""
        span = self.model
        one_step = isinstance(span, LearnableSpan) and span.interval.one_step and span.last is not None
        if not one_step or len(t_eval) != 2:
            return t_eval, sol
        last = last_solve(span)
        with untraced(last.bound):
            return rk4_solution(last, REFERENCE_STEPS)

    def _violation(self, terms: list[Tensor]) -> Tensor:
        v = terms[0].detach() if self.detach_potential else terms[0]
        if self.order == 1:
            return F.relu(terms[1] + self.rate * v)
        return F.relu(terms[2] + 2 * self.rate * terms[1] + self.rate**2 * v)

    def derivatives(self, t_eval: Tensor, sol: Tensor, *target: Any) -> list[Tensor]:
        """Returns [V, V-dot], and V-dotdot with ``order=2``, along the field, each ``[points, batch]``."""
        t_eval, sol = self._with_points(t_eval, sol)
        _check_trajectory(t_eval, sol, target)
        together = not self._takes_time and all(isinstance(v, Tensor) for v in target)
        last = None
        if isinstance(self.model, LearnableSpan):
            last, sol = self.model.last, position_of(self.model, sol)
        with _recording(), self._field().beside(start_of(last, t_eval, sol).detach(), self._args) as bound:
            t_eval, sol, target = recorded(t_eval), recorded(sol), tuple(map(recorded, target))

            def at(t: Tensor, z: Tensor, copies: int) -> list[Tensor]:
                return self._terms(bound.function, t, z, tuple(_repeat(v, copies) for v in target))

            return self._points(at, bound, t_eval.to(sol.dtype), sol, [self.potential], together)

    def sampled_penalty(
        self, x: Tensor, *target: Any, sampler: Sampler, samples: int = 512, t_span: Tensor | None = None
    ) -> Tensor:
        """Returns the mean violation at drawn states and one drawn time, without any solve: LyaNet's training.

        Every state is looked at with every sample's control and target, ``samples * batch`` pairs in all. No gradient
        reaches t_f, nor a potential's way to it: freeze t_f (``span.t_f.requires_grad_(False)``) and choose it later.

        Args:
            x: initial states ``[batch, ...]``, which set the data control.
            target: passed on to the potential.
            sampler: ``sampler(n, like) -> [n, *like.shape]``; :func:`~torchdyn_mintime.losses.samplers.ball`,
                :func:`~torchdyn_mintime.losses.samplers.box` or the user's own.
            samples: how many states.
            t_span: where the time is drawn between; default: the model's interval.
        """
        samples = checks.count(samples, "samples", 1, " of states")
        _check_targets(target, x.shape[0])
        first, last = self._interval(t_span)
        states = sampler(samples, x[0])
        if states.shape != (samples, *x.shape[1:]):
            raise ValueError(
                f"the sampler returned the shape {tuple(states.shape)}; asked were {(samples, *x.shape[1:])}"
            )
        z = states.repeat_interleave(x.shape[0], 0)
        t = (first + (last - first) * torch.rand((), device=x.device)).to(x.dtype)
        args = {k: _repeat(v, samples) if _has_rows(v, len(x)) else v for k, v in (self._args or {}).items()}
        with _recording(), self._field().beside(_repeat(recorded(x), samples), args or None) as bound:
            terms = self._terms(
                bound.function, recorded(t), recorded(z), tuple(_repeat(recorded(v), samples) for v in target)
            )
            return self._violation(terms).mean()

    # ---------------------------------------------------------------------------------------------- V and its derivatives

    def _field(self) -> Field:
        # Asked for anew each time: `wrap` may have put a span around the node since.
        return self.model.field if isinstance(self.model, LearnableSpan) else Field(self.model)

    def _terms(self, function: Callable, t: Tensor, z: Tensor, target: tuple) -> list[Tensor]:
        """Returns V, V-dot (and V-dotdot) at one time, for states ``[batch, ...]``: each ``[batch]``."""
        # V-dot needs the field's value alone, V-dotdot its derivatives in t and z too.
        velocity = function(t, z) if self.order == 1 else None
        with torch.enable_grad():
            t, z = differentiable(t), differentiable(z)
            v = self._potential(t, z, target)
            slope = (
                torch.autograd.grad(v.sum(), z, create_graph=True, allow_unused=True)[0] if v.requires_grad else None
            )
            if slope is None:
                raise ValueError(
                    "the potential has no gradient with respect to the state: it is detached from z, or does not use it, so "
                    "V-dot would be 0 whatever the field does; compute it from z with differentiable operations"
                )
            if velocity is None:
                velocity = function(t, z)
            if self.order == 1 and not self._takes_time:
                # One reverse pass less, since each sample's V is its own.
                terms = [v, (slope * velocity).reshape(z.shape[0], -1).sum(1)]
            else:
                terms = [v]
                for _ in range(self.order):
                    terms.append(rate_of_change(terms[-1], t, z, velocity))
        return terms if torch.is_grad_enabled() else [term.detach() for term in terms]

    def _potential(self, t: Tensor, z: Tensor, target: tuple) -> Tensor:
        node = self._field().node
        # The running cost's column is no part of the state.
        state = z[:, cost_columns(node) :] if cost_columns(node) else z
        v = self.potential(state, *target, t=t) if self._takes_time else self.potential(state, *target)
        if not isinstance(v, Tensor):
            raise TypeError(f"the potential must return a tensor [batch]; got {type(v).__name__}")
        if v.shape != z.shape[:1]:
            raise ValueError(
                f"the potential must return one value a sample, {tuple(z.shape[:1])}; got {tuple(v.shape)}"
            )
        lowest = v.detach().min().item() if v.numel() else 0.0
        if not lowest >= -ROUNDING:
            cause = "is NaN" if math.isnan(lowest) else f"is negative ({lowest:.6g})"
            where = "" if bool(torch.isfinite(z).all()) else "; the state itself is not finite"
            raise ValueError(
                f"the potential {cause} at t = {t.item():.6g}{where}; it must be 0 or more: subtract its minimum"
            )
        return v

    # -------------------------------------------------------------------------------------------------- the certificate

    @torch.inference_mode(False)
    @torch.no_grad()
    def certificate(
        self, x: Tensor, *target: Any, rate: float | None = None, points: int = 101, t_span: Tensor | None = None
    ) -> Certificate:
        """Returns for which samples eq. (18) held, and the rate that did hold (Theorem 2 checked on data).

        Two curves are looked at, in eval mode: the ODE's own solution, in float64 by an adaptive solve at 1e-9, and the
        states that the model itself reaches by its own steps. A sample counts as held where both stay below the bound. The
        first is looked at ``points`` times at least and as often as the model's own grid, and between those wherever V may
        come above the bound, until it is sure. What the points do not show at all, such as a spike of the field narrower than
        a tenth of their distance, may pass unseen: take more points. Counters and the last forward stay as they are.

        Args:
            x: initial states ``[batch, ...]``.
            target: passed on to the potential.
            rate: default: the regularizer's own.
            points: how many points, evenly spaced, to begin with.
            t_span: the span of a bare node without one of its own.
        """
        rate = self.rate if rate is None else checks.positive(rate, "rate")
        points = checks.count(points, "points", MIN_POINTS)
        if not len(x):
            raise ValueError(f"a certificate is of samples; got x of the shape {tuple(x.shape)}")
        _check_targets(target, x.shape[0])
        x, target = recorded(x), tuple(map(recorded, target))
        with evaluating(self), undisturbed(self):
            own_t, own_states = self._own(x, t_span)
            t = torch.linspace(own_t[0], own_t[-1], max(points, len(own_t)), dtype=torch.float64)
            spacing = (t[1] - t[0]).item()
            t = _split(t, torch.ones(len(t) - 1, dtype=torch.bool))
            with self._field().beside(x, self._args) as bound:
                # In float64 the solve is exact to 1e-9; where the states are of less, V is rounded as they are.
                rounding = max(1e-6, math.sqrt(torch.finfo(x.dtype).eps))
                for rounds in range(MAX_ROUNDS):
                    values, slopes = self._along(bound, x, t, target)
                    slope = slopes[0] if self.order == 2 else None
                    doubts = doubtful(rate, t, values, slopes, slope, rounding)
                    if not doubts.any() or rounds + 1 == MAX_ROUNDS:
                        break
                    t = _split(t, doubts.any(1).cpu())
            own = torch.stack(
                [self._potential(time, z, target) for time, z in zip(own_t.to(x), own_states.to(x), strict=True)]
            ).double()
        found = certify(rate, t.to(x.device), values, slope, rounding)
        # Right after the start V / V(t0) is 1 up to rounding, and its slope says the rate that held.
        at_start = torch.where(values[0] > 0, -slopes[0] / values[0], math.inf)
        late = certify(rate, *_without_first(t.to(x.device), values, spacing), slope, rounding)
        by_steps = certify(rate, own_t.to(x.device), own, slope, rounding)
        held = found.held & by_steps.held & ~doubts.any(0)
        rates = torch.minimum(at_start, late.rates)
        return replace(found, held=held, rates=rates, own_ratio=by_steps.worst_ratio)

    def _own(self, x: Tensor, t_span: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the times, in float64, and the states that the model itself reaches from ``x``."""
        options = {} if self._args is None else {"args": self._args}
        if isinstance(self.model, LearnableSpan):
            self.model(x, **options)
            last = last_solve(self.model)
            return last.grid.times(torch.float64, torch.device("cpu")).detach(), position(self.model, last.states)
        t_span = self.model.t_span if t_span is None else t_span
        if t_span is None:
            raise ValueError("the NeuralODE has no span of its own; pass t_span=")
        if not bool((t_span.diff() > 0).all()):
            raise ValueError(
                f"t_span must ascend: the rate is one of decay in time; got {t_span[0]:g} to {t_span[-1]:g}"
            )
        out = self.model(x, t_span, **options)
        times, states = out if isinstance(out, tuple) else (t_span, out)
        return times.detach().double().cpu()[: len(states)], states

    def _along(self, bound: BoundField, x: Tensor, t: Tensor, target: tuple) -> tuple[Tensor, Tensor]:
        """Returns V and V-dot at the times ``t`` of the ODE's own solution from ``x``, each ``[points, batch]``."""
        start = position(self.model, x) if isinstance(self.model, LearnableSpan) else x
        with untraced(bound):
            states = reference_solution(bound, start, t.tolist(), CERTIFICATE_TOLERANCE).to(x.dtype)
            terms = [self._terms(bound.function, time, z, target)[:2] for time, z in zip(t.to(x), states, strict=True)]
        return torch.stack([v for v, _ in terms]).double(), torch.stack([slope for _, slope in terms]).double()

    def _interval(self, t_span: Tensor | None) -> tuple[float, float]:
        if t_span is None:
            t_span = self.model.grid() if isinstance(self.model, LearnableSpan) else self.model.t_span
        if t_span is None:
            raise ValueError("the NeuralODE has no span of its own; pass t_span=")
        return t_span[0].item(), t_span[-1].item()

    def __getstate__(self) -> dict[str, Any]:
        # Graphs can be neither copied nor pickled.
        return {**self.__dict__, "_last": None}

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, order={self.order}, detach_potential={self.detach_potential}"


def _check_trajectory(t_eval: Tensor, sol: Tensor, target: tuple) -> None:
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


def _check_targets(target: tuple, batch: int) -> None:
    for value in target:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] != batch:
            raise ValueError(
                f"a target has {value.shape[0]} rows for a batch of {batch} states; pass the batch's own targets"
            )


@contextmanager
def _recording() -> Iterator[None]:
    """Lets autograd record in inference mode too, where gradients of the result are no more wanted than before."""
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield


def _has_rows(value: Any, batch: int) -> bool:
    # One number for one sample is broadcast as it is.
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch and value.dim() + batch > 2


def _split(t: Tensor, where: Tensor) -> Tensor:
    """Returns the times with one more in each of the intervals that are marked."""
    more = t[:-1] + GOLDEN * t.diff()
    return torch.cat([t, more[where]]).sort().values


def _without_first(t: Tensor, values: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Returns the start, and the points that are ``least`` or more after it."""
    keep = (t - t[0] >= least * (1 - 1e-9)) | (t == t[0])
    return t[keep], values[keep]


def _repeat(value: Any, times: int) -> Any:
    """Returns the rows of a target, once for every point. What has no rows is shared."""
    rows = isinstance(value, Tensor) and value.dim() > 0
    return value.repeat(times, *[1] * (value.dim() - 1)) if rows else value


def regularizer_for(model: nn.Module, potential: nn.Module, rate: float) -> LyapunovRegularizer:
    """Returns the regularizer of the only span of ``model``.

    V gets a gradient in V-dot + rate V where layers around the field are trained too, as eq. (16) is printed: an encoder
    without that learns to start from a large V, which falls fast and never arrives. Where the field is all that is
    trained, V is detached, as in the paper's code.
    """
    regularizer = LyapunovRegularizer(only_span(model), potential, rate)
    own = set(regularizer.model.parameters())
    trained = [p for p in (*model.parameters(), *regularizer.parameters()) if p.requires_grad]
    regularizer.detach_potential = all(p in own for p in trained)
    return regularizer


def keep_points(span: LearnableSpan) -> None:
    """Sets bounds within which a learned t_f leaves the Lyapunov loss enough points to look at, and room to grow."""
    if span.adaptive:
        raise ValueError(
            f"the Lyapunov loss needs the points of a fixed-step solver to look at; {span.stepper.name} is adaptive"
        )
    least = span.t0.item() + (MIN_POINTS - 1) * span.step_size
    span.bounds = (least, max(span.bounds[1], span.default_max_t_f()))
