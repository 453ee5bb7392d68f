r"""The torch side of an interval: its ends as tensors that are learned, clipped by eq. (14) and differentiated."""

import logging
import math
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.interval import Interval, check_span, resolution
from torchdyn_mintime.numerics import Grid, IntegrationError, merge
from torchdyn_mintime.numerics.problem import leaves

__all__ = ["LearnableInterval"]

_log = logging.getLogger(__name__)

# Every span that is alive: whether a time with a gradient is made of the t_f of another one cannot be seen from the tensor.
_ALL: "weakref.WeakSet[LearnableInterval]" = weakref.WeakSet()


@dataclass(frozen=True)
class Plan:
    """What a call is to solve.

    Attributes:
        grid: the points.
        rows: which of the returned points ``save_at`` asked for, in its order; None is all, as they come.
        settles: the interval that the call makes of one that is not settled, or None.
        ends: t0 and t_f of it, where they are other than before.
        cut: whether t_f has cut the span that was passed, so that its last state is not at the span's own end.
        dense: whether the times asked for stay the same whatever the steps are.
        passed: the ends of the span that was passed, the earlier one first; None where there was none.
    """

    grid: Grid
    rows: list[int] | None = None
    settles: Interval | None = None
    ends: tuple[float, float] | None = None
    cut: bool = False
    dense: bool = False
    passed: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Laid:
    """The grid of the last call without times of its own: most calls are for the same one.

    Attributes:
        interval, dtype, ends: what it follows from; the ends are those of t0 and t_f, inside their bounds.
        plan: of such a call, where no gradient of the times is wanted.
    """

    interval: Interval
    dtype: torch.dtype
    ends: tuple[float, float]
    plan: Plan


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
    _bounds: Tensor
    _pinned: Tensor
    _template: Tensor

    def __init__(self, interval: Interval, t_f: float | None, dtype: torch.dtype, learn_t0: bool):
        super().__init__()
        lower, upper = interval.bounds
        initial = interval.template[-1] if t_f is None else checks.finite(t_f, "t_f")
        nearest = min(max(initial, lower), upper)
        # One step of 0.1 is a little less than float32's 0.1, which the template has.
        if abs(initial - nearest) > 1e-6 * interval.length + 2 * resolution(dtype, initial):
            if t_f is None:
                raise ValueError(
                    f"the template's end {initial:g} lies outside bounds=({lower:g}, {upper:g}); give t_f= inside them"
                )
            raise ValueError(
                f"t_f = {initial:g} lies outside its bounds [{lower:g}, {upper:g}]; change it or give bounds="
            )
        self.learn_t0 = learn_t0
        self.t_f = nn.Parameter(torch.tensor(nearest, dtype=dtype))
        t0 = torch.tensor(interval.template[0], dtype=dtype)
        if learn_t0:
            self.t0 = nn.Parameter(t0)
        else:
            self.register_buffer("t0", t0)
        # The interval once more, for whoever averages, broadcasts or shards a model: they know tensors alone.
        # Those of the state_dict, which this class writes and reads by itself.
        for name, value in self._as_tensors(interval, even=not interval.settled).items():
            self.register_buffer(name, value, persistent=False)
        self._interval, self._read = interval, self._numbers()
        self._laid: _Laid | None = None
        self._end_shift = 0.0  # see core.random_span
        self._said: set[str] = set()
        _ALL.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        super().__setstate__(state)
        _ALL.add(self)

    # ------------------------------------------------------------------------------------------------- its state

    @property
    def interval(self) -> Interval:
        """The template and the bounds, a value that never changes; assign another to change them."""
        return self._interval_of_numbers(self._numbers())

    @interval.setter
    def interval(self, value: Interval) -> None:
        made = self._as_tensors(value, even=self._template.dim() == 2)
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in made.items():
                buffer = getattr(self, name)
                # In place: DDP broadcasts the buffers that it has seen at its start.
                if buffer.shape == tensor.shape and not buffer.is_meta:
                    buffer.copy_(tensor)
                else:
                    self._buffers[name] = tensor.to(self.t_f.device)
        self._interval, self._read = value, self._numbers()

    def _interval_of_numbers(self, numbers: list[list]) -> Interval:
        if numbers != self._read:  # someone has written to the buffers: an average, a broadcast
            bounds, pinned, template = numbers
            self._interval = self._interval.from_numbers(template, bounds, self.t_f.dtype, pinned[0] > 0.5)
            self._read = numbers
        return self._interval

    @staticmethod
    def _as_tensors(interval: Interval, even: bool) -> dict[str, Tensor]:
        template, bounds = interval.numbers(even)
        values = {"_bounds": bounds, "_pinned": [float(interval.pinned)], "_template": template}
        # On the processor, whatever the default device is: they follow the module, not the call.
        return {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in values.items()}

    def _numbers(self, *times: Tensor) -> list[Any]:
        """Returns the buffers as numbers, bounds, pinned and template, and then the times."""
        buffers = self._buffers  # at every call of a span: torch's way to an attribute is a slow one
        parts: list[Any] = [buffers["_bounds"], buffers["_pinned"], buffers["_template"], *times]
        if not (parts[0].is_cpu and parts[-1].is_cpu):
            # In one piece: on a GPU each reading waits for all work before it.
            sizes, shapes = [part.numel() for part in parts], [part.shape for part in parts]
            there = next(part.device for part in parts if not part.is_cpu)
            flat = [part.detach().to(there, torch.float64).flatten() for part in parts]
            whole = torch.cat(flat).cpu().split(sizes)
            parts = [part.view(shape) for part, shape in zip(whole, shapes, strict=True)]
        try:
            # What torch.func puts in the place of a time has no list, but a number.
            return [part.tolist() if part.dim() else part.item() for part in parts]
        except RuntimeError as error:
            text = str(error)
            if "storage" in text:  # a batched tensor has none
                raise ValueError(
                    "the interval is a batch of intervals (torch.vmap over the buffers of a span), and each of them has a grid "
                    "of its own; leave the span's buffers out, or loop over them instead"
                ) from error
            if "vmap" in text:
                raise ValueError(
                    "t0 or t_f is a batch of times (torch.vmap), and each of them has a grid of its own; loop over them instead"
                ) from error
            if "tracing" in text:
                raise ValueError(
                    "t0 or t_f is traced (torch.func.linearize), and the grid follows from its value; trace the other "
                    "arguments alone, or take torch.func.jvp"
                ) from error
            raise

    def _look(self) -> tuple[Interval, tuple[float, float]]:
        """Returns the interval, and t0 and t_f as they are, as numbers."""
        *interval, t0, t_f = self._numbers(self.t0, self.t_f)
        return self._interval_of_numbers(interval), (t0, t_f)

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
        """Returns how far t_f may grow by default: 2 T_f - t0 - eps of eq. (41), at least t0 + 1."""
        return self.interval.default_max_t_f

    @property
    def duration(self) -> Tensor:
        """The length t_f - t0 of the interval, differentiable; the integral of eq. (13)."""
        t0, t_f, _, _ = self._times(*self._look())
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
        clipped = self._clipped(self.interval, *now)
        written = False
        for tensor, is_, value, name in zip((self.t0, self.t_f), now, clipped, ("t0", "t_f"), strict=True):
            if is_ != value:
                tensor.fill_(value)
                written = True
                if self._first_time(f"{name} {value:.9g}"):
                    text = "%s was clipped to its bound %.6g (bounds of t_f: %.6g, %.6g)"
                    _log.warning(text, name, value, *self.bounds)
        return written

    def _clipped(self, interval: Interval, t0: float, t_f: float) -> tuple[float, float]:
        if not (math.isfinite(t0) and math.isfinite(t_f)):
            raise IntegrationError(
                f"the interval is [{t0}, {t_f}]: a gradient or a learning rate was not finite; "
                "load the last checkpoint and lower the learning rate of the times"
            )
        return interval.clipped(t0, t_f, self.t_f.dtype, self.learn_t0)

    def _first_time(self, what: str) -> bool:
        """Returns whether this was not said before; what is said once is remembered."""
        if what in self._said:
            return False
        self._said.add(what)
        return True

    def _times(
        self, interval: Interval, now: tuple[float, float], ends: tuple[float, float] | None = None
    ) -> tuple[Tensor, Tensor, float, float]:
        """Returns t0 and t_f as they are to be used now: the parameters, or other values that pass their gradient.

        And both as numbers.

        Args:
            interval, now: of :meth:`_look`.
            ends: other values; default: those of t0 and t_f, clipped.
        """
        t0: Tensor = self.t0
        t_f: Tensor = self.t_f
        if ends is not None:
            value = ends
        elif self._is_laid(interval, now, t_f.dtype):
            value = now
        else:
            value = self._clipped(interval, *now)
        if value != now:
            if ends is None and self.training and isinstance(t_f, nn.Parameter):
                self.clip_()
            else:
                # A clamp would have no gradient outside the bounds, and the optimizer could not come back.
                # The difference is zero: a sum with the distance would be rounded to the units of a t_f far away.
                t0, t_f = (v + (t - t.detach()) for v, t in zip(value, (t0, t_f), strict=True))
                # An optimizer's last step leaves a t_f that presses on its bound a little outside until it is clipped.
                far = abs(value[1] - now[1]) > max(interval.least_length, 0.05 * interval.length)
                if ends is None and far and self._first_time("outside"):
                    _log.warning("t_f = %.6g lies outside its bounds, and is taken as %.6g", now[1], value[1])
            value = t0.item(), t_f.item()
        if self._end_shift:
            t_f = t_f + self._end_shift
            value = value[0], t_f.item()
        return t0, t_f, *value

    def _is_laid(self, interval: Interval | None, ends: tuple[float, float], dtype: torch.dtype) -> bool:
        laid = self._laid
        return laid is not None and laid.interval is interval and laid.ends == ends and laid.dtype is dtype

    # ---------------------------------------------------------------------------------------------------- the grid

    def grid(self, t_span: Tensor | None = None) -> Tensor:
        """Returns the points of a forward call. It changes nothing.

        Args:
            t_span: a span as it would be passed to :meth:`forward`. Default: t0, the template's points before t_f, t_f.

        Returns:
            ``[points]``, with the gradient of t_f and a learnable t0.
        """
        return self._plan(t_span, ()).grid.times(self.t_f.dtype, self.t_f.device)

    @property
    def nodes(self) -> list[float]:
        """The points of :meth:`grid` as numbers."""
        return list(self._plan(None, ()).grid.nodes)

    def _plan(self, t_span: Tensor | None, save_at: Iterable[float] | Tensor, dense: bool = False) -> Plan:
        """Returns what a call is to solve. Nothing is changed, but t_f clipped in training.

        Args:
            t_span, save_at, dense: as they are passed to the span.
        """
        interval, now = self._look()
        settles, descending, cut, passed = None, False, False, None
        if t_span is None and isinstance(save_at, tuple) and not save_at and interval.settled:
            return self._plan_of_template(interval, now)
        span: Sequence[float] | None = None
        ends = None
        for name, times in (("t_span", t_span), ("save_at", save_at)):
            self._check_constant(times, name)
        asked = _as_numbers(save_at)
        dtype = own = self.t_f.dtype
        for given in (t_span, save_at):  # times are compared to the rounding of the coarsest of them
            if isinstance(given, Tensor) and given.is_floating_point() and given.dtype.itemsize < dtype.itemsize:
                dtype = given.dtype
        if t_span is not None:
            values, _ = check_span(t_span, "t_span", either_direction=True)
            descending = values[0] > values[-1]
            span = values[::-1] if descending else values
            passed = span[0], span[-1]
            if not interval.settled:  # this first one is what the user meant
                before = interval.template[-1]
                interval = settles = interval.settle(span, own)
                # A t_f that lies elsewhere was given, or is an average that knows of no span yet.
                last = interval.template[-1] if abs(now[1] - before) <= 4 * resolution(own, before) else now[1]
                ends = interval.clipped(interval.template[0], last, own, self.learn_t0)  # to bounds that were given
            # Dense keeps to a pinned template's steps anyway; one that settles otherwise is the span itself.
            if (not dense) if interval.pinned else settles is not None:
                span = None
        elif not interval.settled:
            settles = replace(interval, settled=True)
            if interval.given_bounds is None and now[1] > interval.bounds[1]:  # an average that knows of no span yet
                settles = replace(settles, given_bounds=(interval.bounds[0], now[1]))
            interval = settles
        t0, t_f, first, last = self._times(interval, now, ends)
        rounding = resolution(dtype, first, last)
        start: Tensor | None = t0
        end: Tensor | None = t_f
        if span is None:
            nodes = interval.nodes(first, last, self.learn_t0, own)
        elif self._at_rest(interval, first, last):
            nodes, start, end = [*span], None, None
        else:
            nodes, from_t0, to_t_f = interval.part(span, first, last, self.learn_t0, rounding)
            start, end = t0 if from_t0 else None, t_f if to_t_f else None
            cut = span[-1] > nodes[-1] + 4 * rounding
            self._warn_of_a_cut(span, nodes, interval)
        keep = rows = inside = None
        if dense:
            inside = nodes if span is not None and not asked else None
            nodes = self._steps_between(interval, nodes[0], nodes[-1], own)
        if interval.one_step:
            nodes = [nodes[0], nodes[-1]]
        start = start if start is not None and _differentiated(start) else None
        end = end if end is not None and _differentiated(end) else None
        if asked:
            if not all(nodes[0] - rounding <= t <= nodes[-1] + rounding for t in asked):
                raise ValueError(
                    f"save_at={_short(asked)} must lie within the interval solved, from {nodes[0]:.6g} to {nodes[-1]:.6g}"
                    f" (t_f = {last:.6g})"
                )
            if dense:
                near = (nodes[0], nodes[-1])
                asked = [next((end for end in near if abs(t - end) <= rounding), t) for t in asked]
                inside = sorted(set(asked))
                place = {t: i for i, t in enumerate(inside)}
                rows = [place[t] for t in asked]
            else:
                if interval.one_step and not all(min(t - nodes[0], nodes[-1] - t) <= rounding for t in asked):
                    raise ValueError(
                        f"save_at={_short(asked)} asks for times between {nodes[0]:.6g} and {nodes[-1]:.6g}, but "
                        f"{interval.solver} takes the whole interval in one step; ask for its ends, give dense=True for "
                        "states inside the step, or use another solver"
                    )
                nodes, keep, rows = merge(nodes, asked, rounding=rounding)
        if descending:
            nodes, start, end = nodes[::-1], end, start
            if rows is not None:
                count = len(inside) if inside is not None else sum(keep or ())
                rows = [count - 1 - row for row in rows]
            keep, inside = keep and keep[::-1], inside and inside[::-1]
        if rows is not None and rows == list(range(len(rows))):
            rows = None
        return Plan(Grid(nodes, start, end, keep, inside), rows, settles, ends, cut, dense, passed)

    def _check_constant(self, times: Any, name: str) -> None:
        """Refuses times that require a gradient, which no call gives. Those made of t0 and t_f, as ``t_eval``, may be passed.

        They may be those of another span too, such as the model's whose copy is solved over the same points.

        Raises:
            ValueError: they are made of something else.
        """
        parts = times if isinstance(times, list | tuple) else [times]
        learned = [t for t in parts if isinstance(t, Tensor) and t.requires_grad]
        if not learned or not torch.is_grad_enabled() or not isinstance(self.t_f, nn.Parameter):
            return
        made_of = [leaf for t in learned for leaf in ([t] if t.is_leaf else leaves(t, ()))]
        times_of_spans = {id(time) for span in [self, *_ALL] for time in (span.t_f, span.t0)}
        if any(id(leaf) not in times_of_spans for leaf in made_of):
            raise ValueError(
                f"{name} requires a gradient of what is no time of a span: what is learned is the span's own t_f. Pass "
                f"{name}.detach(), and learn span.t_f; span.node(x, t_span) is torchdyn's own solve over times of yours"
            )

    def _steps_between(self, interval: Interval, begin: float, end: float, dtype: torch.dtype) -> list[float]:
        """Returns the ends, and the points of the template between them."""
        # A span that starts before the template is entered in its steps, not in one long one.
        return interval.nodes(begin, end, not interval.adaptive or self.learn_t0, dtype)

    def _plan_of_template(self, interval: Interval, now: tuple[float, float]) -> Plan:
        """Returns what a call without times of its own is to solve."""
        t0, t_f, *numbers = self._times(interval, now)
        ends, dtype = (numbers[0], numbers[1]), t_f.dtype
        if not self._is_laid(interval, ends, dtype):
            nodes = interval.nodes(*ends, self.learn_t0, self.t_f.dtype)
            plan = Plan(Grid([nodes[0], nodes[-1]] if interval.one_step else nodes))
            self.__dict__["_laid"] = _Laid(interval, dtype, ends, plan)
        assert self._laid is not None
        plan = self._laid.plan
        start, end = t0 if _differentiated(t0) else None, t_f if _differentiated(t_f) else None
        return plan if start is None and end is None else Plan(Grid(plan.grid.nodes, start, end))

    def _at_rest(self, interval: Interval, t0: float, t_f: float) -> bool:
        """Returns whether there is no time to honour: t_f is frozen where the template ends, so that it cuts nothing.

        A frozen t_f that was learned before lies elsewhere. One that ``DepthGrowth`` moves has a bound above the template.
        """
        times = (self.t_f, self.t0) if self.learn_t0 else (self.t_f,)
        # Under functional_call they are no parameters, and whether the caller learns them is not known here.
        frozen = all(isinstance(t, nn.Parameter) and not t.requires_grad for t in times)
        ends = interval.template[0], interval.template[-1]
        near = 2 * resolution(self.t_f.dtype, *ends)
        at_ends = abs(t0 - ends[0]) <= near and abs(t_f - ends[1]) <= near
        return frozen and at_ends and not self._end_shift and interval.bounds[1] <= ends[1] + near

    def _warn_of_a_cut(self, span: Sequence[float], nodes: Sequence[float], interval: Interval) -> None:
        template = interval.template
        near = 1e-3 * interval.length  # the template of an average comes to within a little of the model's
        early = span[0] < min(template[0], nodes[0]) - near
        late = span[-1] > max(template[-1], nodes[-1]) + near
        if (early or late) and self._first_time("span"):
            warnings.warn(
                f"the span passed, from {span[0]:g} to {span[-1]:g}, reaches beyond the template's, from {template[0]:g} to "
                f"{template[-1]:g}: it was cut to [{nodes[0]:g}, {nodes[-1]:g}], the learned interval. For a longer one set "
                "`span.t_span` to another template; to solve spans as they are, freeze t_f at the template's end",
                stacklevel=7,  # past forward and what torch calls it by
            )

    @torch.no_grad()
    def _settle(self, plan: Plan) -> None:
        """Takes over the interval that the first call has settled."""
        assert plan.settles is not None
        self.interval = plan.settles
        if plan.ends is not None:
            for tensor, value in zip((self.t0, self.t_f), plan.ends, strict=True):
                tensor.fill_(value)

    def _apply(self, fn, recurse=True):
        interval = [id(t) for t in (self._bounds, self._pinned, self._template)]

        def keep_precise(t: Tensor) -> Tensor:
            out = fn(t)
            # Half precision has about 3 digits: far too few for a time that steps are subtracted from.
            least = 8 if id(t) in interval else 4
            return t.to(out.device) if out.is_floating_point() and out.dtype.itemsize < least else out

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(keep_precise, recurse=False)


def _differentiated(time: Tensor) -> bool:
    """Returns whether a gradient of ``time`` is wanted, in reverse mode or in forward mode."""
    return (time.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(time).tangent is not None


def _as_numbers(save_at: Iterable[float] | Tensor) -> list[float]:
    if isinstance(save_at, Tensor):
        if save_at.layout != torch.strided:
            raise TypeError(f"save_at must be a dense tensor; got {save_at.layout}")
        save_at = save_at.detach().reshape(-1)
    return [checks.finite(t, "a time in save_at") for t in save_at]


def _short(times: list[float]) -> str:
    return str(times if len(times) < 9 else [*times[:4], "..", *times[-4:]])
