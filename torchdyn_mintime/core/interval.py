r"""The interval of a span: its template, the bounds of its terminal time, and what has laid them. Plain numbers.

An :class:`Interval` never changes. A span that gets another template or other bounds gets another interval, so that the
one before can be kept, compared and put back.

The terminal time is clipped to its bounds, eq. (14) and (41):

    t_f <- min(max(t_f, lower), upper).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdyn_mintime.core import checks
from torchdyn_mintime.numerics import MAX_POINTS, cut

__all__ = ["Interval", "check_span"]

SHORTEST = 1e-3
"""The shortest interval of an adaptive solver, as a share of its template."""


def resolution(dtype: torch.dtype, *times: float) -> float:
    """Returns how far the rounding to ``dtype`` moves one of ``times`` at most: less than the distance of any two numbers."""
    return torch.finfo(dtype).eps / 2 * max(map(abs, times))


@dataclass(frozen=True)
class Interval:
    """Where the terminal time of a span may lie, and where its steps are.

    Attributes:
        template: the points that are cut at t_f, strictly ascending (units of time). The first is t0.
        solver: name of the solver that takes the steps.
        adaptive: whether the solver chooses its steps; the template then holds the ends and the points asked for.
        given_bounds: (lower, upper) of t_f as they were set; None is :attr:`default_bounds`.
        settled: False while the first span that a call passes still becomes the template.
        pinned: whether the template holds even where a call passes a span of its own.
        raised: whether the upper bound is the default of what may grow t_f, and follows a new template.
        one_step: whether the solver takes the whole interval in one step (a LearnableSolver).

    Example:
        >>> Interval((0.0, 0.5, 1.0), "rk4", adaptive=False).bounds
        (0.5, 1.0)
    """

    template: tuple[float, ...]
    solver: str
    adaptive: bool
    given_bounds: tuple[float, float] | None = None
    settled: bool = True
    pinned: bool = False
    raised: bool = False
    one_step: bool = False

    @property
    def length(self) -> float:
        """The length of the template, in units of time."""
        return self.template[-1] - self.template[0]

    @property
    def step_size(self) -> float:
        """The first spacing of the template, in units of time."""
        return self.template[1] - self.template[0]

    @property
    def least_length(self) -> float:
        """The least t_f - t0: a step, or a thousandth of the template where the solver has no step size."""
        return self.step_size if self.has_step_size else SHORTEST * self.length

    @property
    def has_step_size(self) -> bool:
        """Whether the template says how long a step is."""
        return not (self.adaptive or self.one_step)

    @functools.cached_property
    def default_bounds(self) -> tuple[float, float]:
        """(lower, upper) of t_f where none were given."""
        t0, end = self.template[0], self.template[-1]
        least = min(self.step_size, self.length / 2) if self.has_step_size else self.least_length
        return t0 + least, end

    @property
    def bounds(self) -> tuple[float, float]:
        """(lower, upper) of t_f, eq. (14)."""
        return self.given_bounds or self.default_bounds

    @property
    def default_max_t_f(self) -> float:
        """How far t_f may grow by default: 2 T_f - t0 - eps of eq. (41), at least t0 + 1."""
        return max(2 * self.template[-1] - self.template[0] - self.least_length, self.template[0] + 1.0)

    @property
    def whose_steps(self) -> str:
        """Says in words why there is no step size."""
        own = "takes the whole interval in one step" if self.one_step else "chooses its own steps"
        return f"{self.solver} {own}"

    # ------------------------------------------------------------------------------------------------- other intervals

    def with_template(self, template: Sequence[float]) -> "Interval":
        """Returns the interval with another template. Bounds that were given stay, the lower one above the new t0."""
        given = self.given_bounds
        if given is not None and not template[0] < given[0]:
            lower = replace(self, template=tuple(template)).default_bounds[0]
            if not lower < given[1]:
                raise ValueError(
                    f"the template starts at {template[0]:g}, too late for the upper bound {given[1]:g}; set `bounds` first"
                )
            given = (lower, given[1])
        return replace(self, template=tuple(template), given_bounds=given, settled=True)

    def with_step_size(self, step_size: Any, dtype: torch.dtype) -> "Interval":
        """Returns the interval with its template laid anew; its end stays.

        Args:
            step_size: units of time.
            dtype: of the times, whose numbers the points are.
        """
        if not self.has_step_size:
            raise ValueError(f"step_size={step_size!r} is for solvers of fixed steps; {self.whose_steps}")
        step, length = checks.finite(step_size, "step_size"), self.length
        if not 0 < step <= length * (1 + 1e-6):
            raise ValueError(f"step_size must be positive and at most the span's length {length:g}; got {step:g}")
        if length / step > MAX_POINTS:
            raise ValueError(
                f"step_size = {step:g} makes {length / step:.3g} steps of the span's length {length:g}; give a larger one"
            )
        if abs(self.step_size - step) <= 1e-6 * step:
            return self
        t0, end = self.template[0], self.template[-1]
        # No sliver of a step at the end: the grid would go on beyond it in steps of that size.
        sliver = max(1e-3 * step, resolution(dtype, t0, end))
        n = max(1, math.ceil((length - sliver) / step))
        inner = torch.tensor([t0 + k * step for k in range(1, n)], dtype=dtype).tolist()
        return replace(self, template=(t0, *inner, end))

    def with_bounds(self, bounds: Any, frozen: bool = False) -> "Interval":
        """Returns the interval with other bounds of t_f.

        Args:
            bounds: (lower, upper), or None for the default.
            frozen: whether they may be equal.
        """
        if bounds is None:
            return replace(self, given_bounds=None)
        if not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise TypeError(f"bounds must be a pair (lower, upper) of times; got {bounds!r}")
        t0 = self.template[0]
        lower, upper = (checks.finite(b, "a bound of t_f") for b in bounds)
        if not t0 < lower <= upper:
            raise ValueError(
                f"bounds must satisfy t0 < lower <= upper; got t0 = {t0:g}, bounds = ({lower:g}, {upper:g})"
            )
        if lower == upper and not frozen:
            raise ValueError(
                f"equal bounds {lower:g} leave t_f nothing to learn; freeze it (t_f.requires_grad_(False)) first"
            )
        return replace(self, given_bounds=(lower, upper))

    def settle(self, span: Sequence[float], dtype: torch.dtype) -> "Interval":
        """Returns the interval that the first span of a call makes of one that is not settled."""
        template = tuple(span)
        if self.pinned:  # as many steps as are wanted, over the interval that is
            points = torch.linspace(template[0], template[-1], len(self.template), dtype=torch.float64)
            template = tuple(points.to(dtype).tolist())
        made = replace(self, template=template, settled=True)
        if made.raised and made.given_bounds is not None:  # to a default that was that of the template before
            lower, upper = made.default_bounds
            made = replace(made, given_bounds=(lower, max(upper, made.default_max_t_f)))
        return made

    # -------------------------------------------------------------------------------------------------- for the times

    def clipped(self, t0: float, t_f: float, dtype: torch.dtype, moving_start: bool) -> tuple[float, float]:
        """Returns t0 and t_f inside their bounds, as numbers of the times' dtype.

        Args:
            t0, t_f: the times.
            dtype: of the times.
            moving_start: whether t0 is learned; it then stays a step before t_f.
        """
        lower, upper = (_rounded(bound, dtype) for bound in self.bounds)
        # A lower bound may be t0 itself once it is rounded: t_f is then the next number.
        start = self.template[0]
        apart = _rounded(start + 2 * resolution(dtype, start), dtype)
        t_f = min(max(t_f, lower, apart), max(upper, apart))
        if moving_start and t0 > t_f - self.least_length:
            t0 = _rounded(t_f - self.least_length, dtype)
        return t0, t_f

    def nodes(self, t0: float, t_f: float, moving_start: bool, dtype: torch.dtype) -> list[float]:
        """Returns t0, the points of the template before t_f, then t_f."""
        return cut(
            self.template,
            t0,
            t_f,
            extend=not self.adaptive,
            moving_start=moving_start,
            rounding=resolution(dtype, t0, t_f),
        )

    def part(
        self, span: Sequence[float], t0: float, t_f: float, moving_start: bool, rounding: float
    ) -> tuple[list[float], bool, bool]:
        """Returns the points of a span's part in [t0, t_f], and whether it starts at t0 and ends at t_f themselves.

        A span that starts or ends where the template does means the whole interval on that side, wherever t0 and t_f are.

        Args:
            span: ascending times.
            t0, t_f: the interval.
            moving_start: whether t0 is learned.
            rounding: of the times, see :func:`resolution`.

        Raises:
            ValueError: that part is empty.
        """
        first, last = span[0], span[-1]
        # A few roundings: spans are computed, as arange(n) * dt is.
        near = min(4 * rounding, (span[1] - first) / 4, (last - span[-2]) / 4)
        from_t0 = first <= t0 + near or (moving_start and abs(first - self.template[0]) <= near)
        to_t_f = last >= t_f - near or abs(last - self.template[-1]) <= near
        begin, end = t0 if from_t0 else first, t_f if to_t_f else last
        if not begin + rounding < end:
            raise ValueError(
                f"the span passed, from {first:g} to {last:g}, has no part in the learned interval: t0 = {t0:g}, "
                f"t_f = {t_f:g}; pass one that has, or set `span.t_span` to a new template. Times of the data, such as gaps "
                "of a series, need the whole interval in `wrap(model, t_span)`, and a t_f that is frozen: "
                "`span.t_f.requires_grad_(False)`"
            )
        points = cut(
            span,
            begin,
            end,
            extend=to_t_f and not self.adaptive,
            moving_start=moving_start and from_t0,
            rounding=rounding,
        )
        return points, from_t0, to_t_f

    def asked(self, span: Sequence[float], nodes: Sequence[float], dtype: torch.dtype) -> list[float]:
        """Returns the times that a span asks for of a solve along ``nodes``, in its order; what lies beyond them is cut.

        A span that starts or ends where the template does asks for the solve's own start or end.

        Raises:
            ValueError: it starts inside, where the state that it is called with does not belong.
        """
        (first, last), template = (nodes[0], nodes[-1]), self.template[:: 1 if nodes[0] < nodes[-1] else -1]
        sign, near = (1.0 if first < last else -1.0), 4 * resolution(dtype, first, last)
        if sign * (span[0] - first) > near and abs(span[0] - template[0]) > near:
            raise ValueError(
                f"the span passed starts at {span[0]:g}, but this one is solved by the steps that were laid, from {first:g} to "
                f"{last:g}; start there"
            )
        inside = [t for t in span[1:] if sign * (t - first) > near and sign * (last - t) > near]
        reaches = sign * (span[-1] - last) >= -near or abs(span[-1] - template[-1]) <= near
        return [first, *inside, last] if reaches else [first, *inside]

    # ---------------------------------------------------------------------------------------------------- in checkpoints

    def numbers(self, even: bool) -> tuple[list, list[float]]:
        """Returns the template and the bounds as a state_dict holds them; :meth:`from_numbers` is the way back.

        Args:
            even: give the template as ``[[first], [last], [points], [settled]]``, of one shape whatever span settles it,
                if its points are evenly spaced. No list of points is copied into that shape by mistake.
        """
        template = self.template
        if even and _evenly_spaced(template):
            entries = template[0], template[-1], float(len(template)), float(self.settled)
            return [[entry] for entry in entries], [*self.bounds]
        return [*template], [*self.bounds]

    def from_numbers(
        self,
        template: Any,
        bounds: Sequence[float] | None,
        dtype: torch.dtype,
        pinned: bool | None = None,
        name: str = "template",
    ) -> "Interval":
        """Returns the interval of :meth:`numbers`, or of an average of some; what is None there stays as it is here.

        Args:
            template, bounds: as from :meth:`numbers`.
            dtype: of the times.
            pinned: whether the template is pinned.
            name: of the template, in errors.
        """
        made = self if pinned is None else replace(self, pinned=pinned)
        if template is not None:
            tensor = torch.as_tensor(template, dtype=torch.float64, device="cpu")
            settled = made.settled
            if tensor.dim() == 2:  # evenly spaced
                first, last, points, given = tensor.flatten().tolist()
                # Averaged with a copy that was made before: it has been settled in one of them.
                settled = given > 0
                tensor = torch.linspace(first, last, max(2, round(points)), dtype=dtype)
            made = replace(made, template=check_span(tensor, name)[0], settled=settled)
        if bounds is None:
            return made
        if not bounds:  # as 0.1.0 wrote it where none were given
            return made.with_bounds(None)
        given, default = made.with_bounds(bounds, frozen=True), made.default_bounds
        return made.with_bounds(None) if math.dist(bounds, default) <= 1e-9 * made.length else given


def _evenly_spaced(template: tuple[float, ...]) -> bool:
    """Returns whether the points are those of ``linspace``, to the rounding of float32."""
    n, first, last = len(template) - 1, template[0], template[-1]
    near = 8 * resolution(torch.float32, first, last)
    return all(abs(t - (first + (last - first) * (k / n))) <= near for k, t in enumerate(template))


@functools.lru_cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """Returns the number of ``dtype`` next to ``value``. Bounds are asked for at every call and seldom change."""
    return torch.tensor(value, dtype=dtype).item()


def check_span(t_span: Any, name: str, either_direction: bool = False) -> tuple[tuple[float, ...], torch.dtype]:
    """Returns the times of a span as numbers, and the dtype that times of it have."""
    if not isinstance(t_span, Tensor):
        raise TypeError(f"{name} must be a 1-D tensor of times; got {type(t_span).__name__} ({t_span!r})")
    if not t_span.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point type; got {t_span.dtype}")
    if t_span.dim() != 1 or t_span.numel() < 2:
        raise ValueError(f"{name} must be 1-D with two points or more; got the shape {tuple(t_span.shape)}")
    times = t_span.detach().tolist()
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{name} must be finite; got {times if len(times) < 9 else [*times[:4], '..', *times[-4:]]}")
    steps = [b - a for a, b in itertools.pairwise(times)]
    if not (all(s > 0 for s in steps) or (either_direction and all(s < 0 for s in steps))):
        along = steps[0] if either_direction else 1.0
        i = next(i for i, s in enumerate(steps) if s * along <= 0)
        order = "ascend or descend" if either_direction else "ascend"
        down = all(s < 0 for s in steps)
        what = "; give it t_span.flip(0), and call the span with the times that descend" if down else ""
        raise ValueError(
            f"{name} must strictly {order}; its points {i} and {i + 1} are {times[i]:g} and {times[i + 1]:g}{what}"
        )
    return tuple(times), torch.float64 if t_span.dtype == torch.float64 else torch.float32
