r"""The torch side of an interval: its ends as tensors that are learned, clipped by eq. (14) and differentiated."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.interval import SAME_TIME, Interval, check_span
from torchdyn_mintime.numerics import Grid, IntegrationError, merge

__all__ = ["LearnableInterval"]

_log = logging.getLogger(__name__)


class LearnableInterval(nn.Module):
    """An interval [t0, t_f] whose terminal time, and t0 on request, are parameters: the base of a LearnableSpan.

    Args:
        interval: where t_f may lie and where steps are.
        t_f: the initial terminal time; None is the template's end.
        dtype: of the times, float32 or float64.
        learn_t0: whether t0 is a parameter too.

    Attributes:
        t_f: scalar ``nn.Parameter``.
        t0: scalar buffer, or parameter with ``learn_t0=True``.
        interval: the template and the bounds, a value that never changes; assign another to change them.

    Raises:
        ValueError: t_f, or the template's end, lies outside the bounds.
    """

    t0: Tensor

    def __init__(self, interval: Interval, t_f: float | None, dtype: torch.dtype, learn_t0: bool):
        super().__init__()
        lower, upper = interval.bounds
        initial = interval.template[-1] if t_f is None else checks.finite(t_f, "t_f")
        nearest = min(max(initial, lower), upper)
        # One step of 0.1 is a little less than float32's 0.1, which the template has.
        if abs(initial - nearest) > 1e-6 * max(1.0, abs(initial)):
            if t_f is None:
                raise ValueError(
                    f"the template's end {initial:g} lies outside bounds=({lower:g}, {upper:g}); give t_f= inside them"
                )
            raise ValueError(
                f"t_f = {initial:g} lies outside its bounds [{lower:g}, {upper:g}]; change it or give bounds="
            )
        self.interval = interval
        self.t_f = nn.Parameter(torch.tensor(nearest, dtype=dtype))
        t0 = torch.tensor(interval.template[0], dtype=dtype)
        if learn_t0:
            self.t0 = nn.Parameter(t0)
        else:
            self.register_buffer("t0", t0)
        self._end_shift = 0.0  # see core.random_span
        self._said: set[str] = set()

    @property
    def t_span(self) -> Tensor:
        """The template, in the dtype and on the device of the times."""
        return torch.tensor(self.interval.template, dtype=self.t_f.dtype, device=self.t_f.device)

    @t_span.setter
    def t_span(self, value: Tensor) -> None:
        self.interval = self.interval.with_template(check_span(value, "t_span")[0])
        with torch.no_grad():
            self.t0.fill_(self.interval.template[0])
        self.clip_()

    @property
    def step_size(self) -> float:
        """The template's first spacing (fixed-step solvers), in units of time."""
        if not self.interval.has_step_size:
            raise AttributeError(f"{self.interval.whose_steps}; only fixed-step solvers have a step_size")
        return self.interval.step_size

    @step_size.setter
    def step_size(self, value: float) -> None:
        made = self.interval.with_step_size(value, self.t_f.dtype)
        length = self.t_f.item() - self.t0.item()
        if made.step_size > length * (1 + 1e-6):
            raise ValueError(
                f"step_size {made.step_size:g} is longer than the interval learned, {length:g}; t_f would have to move"
            )
        self.interval = made
        self.clip_()

    @property
    def bounds(self) -> tuple[float, float]:
        """(lower, upper) of t_f, eq. (14). Set None for the default."""
        return self.interval.bounds

    @bounds.setter
    def bounds(self, value: tuple[float, float]) -> None:
        self.interval = self.interval.with_bounds(value, frozen=not self.t_f.requires_grad)
        self.clip_()

    @property
    def pinned(self) -> bool:
        """Whether the template holds even where a call passes a span of its own, whose direction still counts.

        What lays the steps itself (:meth:`lay`) sets it; it is part of the state_dict.
        """
        return self.interval.pinned

    @pinned.setter
    def pinned(self, value: bool) -> None:
        self.interval = replace(self.interval, pinned=bool(value))

    def raise_to_default(self) -> float:
        """Raises the upper bound as far as t_f may grow by default, and returns it; one that is higher stays."""
        raised = self.interval.given_bounds is None or self.interval.raised
        lower, upper = self.bounds
        self.bounds = (lower, max(upper, self.default_max_t_f()))
        self.interval = replace(self.interval, raised=raised)
        return self.bounds[1]

    def default_max_t_f(self) -> float:
        """Returns how far t_f may grow where nothing else is said: 2 T_f - t0 - eps of eq. (41), at least t0 + 1."""
        return self.interval.default_max_t_f

    @property
    def duration(self) -> Tensor:
        """The length t_f - t0 of the interval, differentiable; the integral of eq. (13)."""
        t0, t_f, _, _ = self._times()
        return t_f - t0

    @torch.no_grad()
    def clip_(self) -> bool:
        """Puts t_f (and a learnable t0) inside its bounds, eq. (14), writing only what lies outside.

        Returns:
            Whether anything was written.

        Raises:
            IntegrationError: a time is NaN.
        """
        now = self.t0.item(), self.t_f.item()
        written = False
        for tensor, is_, value, name in zip((self.t0, self.t_f), now, self._clipped(*now), ("t0", "t_f"), strict=True):
            if is_ != value:
                tensor.fill_(value)
                written = True
                self._warn_once(name, value)
        return written

    def _clipped(self, t0: float, t_f: float) -> tuple[float, float]:
        if not (math.isfinite(t0) and math.isfinite(t_f)):
            raise IntegrationError(
                f"the interval is [{t0}, {t_f}]: a gradient or a learning rate was not finite; "
                "load the last checkpoint and lower the learning rate of the times"
            )
        return self.interval.clipped(t0, t_f, self.t_f.dtype, isinstance(self.t0, nn.Parameter))

    def _warn_once(self, name: str, value: float) -> None:
        key = f"{name} {value:.9g}"
        if key not in self._said:
            self._said.add(key)
            _log.warning("%s was clipped to its bound %.6g (bounds of t_f: %.6g, %.6g)", name, value, *self.bounds)

    def _times(self) -> tuple[Tensor, Tensor, float, float]:
        """Returns t0 and t_f as they are to be used now: the parameters, or clipped values that pass the gradient.

        And both as numbers: on a GPU each reading of a tensor waits for all work before it.
        """
        t0: Tensor = self.t0
        t_f: Tensor = self.t_f
        now = _number(t0, "t0"), _number(t_f, "t_f")
        value = self._clipped(*now)
        if value != now:
            if self.training and isinstance(t_f, nn.Parameter):
                self.clip_()
            else:
                # A clamp would have no gradient outside the bounds, and the optimizer could not come back.
                # The difference is zero: a sum with the distance would be rounded to the units of a t_f far away.
                t0, t_f = (v + (t - t.detach()) for v, t in zip(value, (t0, t_f), strict=True))
            value = t0.item(), t_f.item()
        if self._end_shift:
            t_f = t_f + self._end_shift
            value = value[0], t_f.item()
        return t0, t_f, *value

    # ---------------------------------------------------------------------------------------------------- the grid

    def grid(self, t_span: Tensor | None = None) -> Tensor:
        """Returns the points of a forward call: t0, the template's (or ``t_span``'s) points before t_f, then t_f.

        Args:
            t_span: a span as it would be passed to :meth:`forward`.

        Returns:
            ``[points]``, with the gradient of t_f and a learnable t0.
        """
        return self._grid(t_span, ()).times(self.t_f.dtype, self.t_f.device)

    @property
    def nodes(self) -> list[float]:
        """The points of :meth:`grid` as numbers."""
        return list(self._grid(None, ()).nodes)

    def _grid(self, t_span: Tensor | None, save_at: Iterable[float] | Tensor) -> Grid:
        span, descending = (None, False) if t_span is None else self._read_span(t_span)
        t0, t_f, first, last = self._times()
        nodes = self.interval.nodes(first, last, isinstance(self.t0, nn.Parameter), span)
        keep = None
        if len(asked := _as_numbers(save_at)):
            tolerance = SAME_TIME * max(1.0, abs(nodes[-1]))
            if not all(nodes[0] - tolerance <= t <= nodes[-1] + tolerance for t in asked):
                raise ValueError(f"save_at={asked} must lie between t0 = {nodes[0]:.6g} and t_f = {nodes[-1]:.6g}")
            if self.interval.one_step and not all(min(abs(t - n) for n in nodes) <= tolerance for t in asked):
                raise ValueError(
                    f"save_at={asked} asks for times between t0 = {nodes[0]:.6g} and t_f = {nodes[-1]:.6g}, but "
                    f"{self.interval.solver} takes the whole interval in one step; ask for its ends, or use another solver"
                )
            template = self.interval.template if span is None else span
            nodes, keep = merge(nodes, asked, step=template[1] - template[0])
        start, end = (t if _differentiated(t) else None for t in (t0, t_f))
        if descending:
            return Grid(nodes[::-1], end, start, None if keep is None else keep[::-1])
        return Grid(nodes, start, end, keep)

    def _read_span(self, t_span: Tensor) -> tuple[Sequence[float] | None, bool]:
        """Returns the points of a span that was passed, ascending (None: the template holds), and if it descends."""
        values, _ = check_span(t_span, "t_span", either_direction=True)
        descending = values[0] > values[-1]
        points = values[::-1] if descending else values
        if not self.interval.settled:  # this first one is what the user meant
            self.interval = self.interval.settle(points, self.t_f.dtype)
            points = self.interval.template
            with torch.no_grad():
                self.t0.fill_(points[0])
                self.t_f.fill_(points[-1])
        elif self.pinned:
            return None, descending
        first = self.interval.template[0]
        if abs(points[0] - first) > SAME_TIME * max(1.0, abs(first)):
            raise ValueError(
                f"the span passed starts at {points[0]:g}, but this LearnableSpan at t0 = {first:g}; "
                "pass a span that starts there, or set `span.t_span` to a new template"
            )
        return points, descending

    def _put_back(self, interval: Interval, t0: float, t_f: float) -> None:
        self.interval = interval
        with torch.no_grad():
            self.t0.fill_(t0)
            self.t_f.fill_(t_f)

    def _apply(self, fn, recurse=True):
        def keep_precise(t: Tensor) -> Tensor:
            out = fn(t)
            # Half precision has about 3 digits: far too few for a time that steps are subtracted from.
            return t.to(out.device) if out.is_floating_point() and out.dtype.itemsize < 4 else out

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_precise, recurse=False)


def _number(time: Tensor, name: str) -> float:
    try:
        return time.item()
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise ValueError(
            f"{name} is a batch of times (torch.vmap), and each of them has a grid of its own; loop over them instead"
        ) from error


def _differentiated(time: Tensor) -> bool:
    """Returns whether a gradient of ``time`` is wanted, in reverse mode or in forward mode."""
    return (time.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(time).tangent is not None


def _as_numbers(save_at: Iterable[float] | Tensor) -> list[float]:
    if isinstance(save_at, Tensor):
        if save_at.layout != torch.strided:
            raise TypeError(f"save_at must be a dense tensor; got {save_at.layout}")
        save_at = save_at.detach().reshape(-1)
    return [checks.finite(t, "a time in save_at") for t in save_at]
