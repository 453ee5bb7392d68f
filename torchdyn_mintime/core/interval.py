r"""The interval of a span: its template, the bounds of its terminal time, and what has laid them. Plain numbers.

An :class:`Interval` never changes. A span that gets another template or other bounds gets another interval, so that the
one before can be kept, compared and put back.

The terminal time is clipped to its bounds, eq. (14) and (41):

    t_f <- min(max(t_f, lower), upper).
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchdyn_mintime.core import checks
from torchdyn_mintime.numerics import MAX_POINTS, cut

__all__ = ["Interval", "check_span"]

SHORTEST = 1e-3
"""The shortest interval of an adaptive solver, as a share of its template."""

SAME_TIME = 2e-5
"""Two times closer than this, relative to the larger one, are one: torchdyn compares them to 1e-8 + 1e-5 |t|."""


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
        """Of the template, in units of time."""
        return self.template[-1] - self.template[0]

    @property
    def step_size(self) -> float:
        """The first spacing of the template, in units of time."""
        return self.template[1] - self.template[0]

    @property
    def least_length(self) -> float:
        """Below which t_f - t0 never falls: a step, or a thousandth of the template where the solver has no step size."""
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
        return min(t0 + max(least, 2 * SAME_TIME * abs(t0)), end), end

    @property
    def bounds(self) -> tuple[float, float]:
        """(lower, upper) of t_f, eq. (14)."""
        return self.given_bounds or self.default_bounds

    @property
    def default_max_t_f(self) -> float:
        """How far t_f may grow where nothing else is said: 2 T_f - t0 - eps of eq. (41), at least t0 + 1."""
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
        sliver = max(1e-3 * step, SAME_TIME * max(1.0, abs(end)))
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
        # Whatever the bounds: torchdyn, and float32 soon after, take times closer than this for the same.
        apart = _rounded(self.template[0] + 2 * SAME_TIME * abs(self.template[0]), dtype)
        t_f = min(max(t_f, lower, apart), max(upper, apart))
        if moving_start and t0 > t_f - self.least_length:
            t0 = _rounded(t_f - self.least_length, dtype)
        return t0, t_f

    def nodes(self, t0: float, t_f: float, moving_start: bool, span: Sequence[float] | None = None) -> list[float]:
        """Returns t0, the points of the template (or of another ``span``) before t_f, then t_f; no points with one step."""
        if self.one_step:
            return [t0, t_f]
        template = self.template if span is None else span
        step = template[1] - template[0]
        return cut(template, t0, t_f, step=step, extend=not self.adaptive, moving_start=moving_start)

    # ---------------------------------------------------------------------------------------------------- in checkpoints

    def state(self) -> dict[str, Tensor]:
        """Returns what a state_dict holds of it."""
        return {
            "template": torch.tensor(self.template, dtype=torch.float64),
            "bounds": torch.tensor(self.given_bounds or (), dtype=torch.float64),
            "filled": torch.tensor(self.settled),
            "pinned": torch.tensor(self.pinned),
        }

    def loaded(self, state: Mapping[str, Tensor | None], prefix: str) -> "Interval":
        """Returns the interval of a :meth:`state`; what is None there stays as it is here."""
        template, bounds, settled, pinned = (state[name] for name in ("template", "bounds", "filled", "pinned"))
        made = replace(
            self,
            template=self.template if template is None else check_span(template, f"{prefix}template")[0],
            settled=self.settled if settled is None else bool(settled),
            pinned=self.pinned if pinned is None else bool(pinned),
        )
        return made if bounds is None else made.with_bounds(bounds.tolist() or None, frozen=True)


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
        raise ValueError(
            f"{name} must strictly {order}; its points {i} and {i + 1} are {times[i]:g} and {times[i + 1]:g}"
        )
    return tuple(times), torch.float64 if t_span.dtype == torch.float64 else torch.float32
