"""Growing t_f until the loss is met: the second stage of Algorithm 2."""

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchdyn_mintime.core import LearnableSpan, checks

__all__ = ["DepthGrowth", "Growth"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growth:
    """One growth of t_f.

    Attributes:
        step: the call of :meth:`DepthGrowth.step` that grew, from 1.
        metric: the metric it was told.
        t_f: the new terminal time.
        reason: why, in words.
    """

    step: int
    metric: float
    t_f: float
    reason: str


class DepthGrowth:
    """Grows t_f while a metric stays above a threshold, in the manner of ``ReduceLROnPlateau``.

    Call :meth:`step` with the metric once an iteration or epoch. While this drives, ``span.t_f`` requires no gradient,
    so that an optimizer does not move it too; :meth:`release` gives it back.

    Args:
        span: whose t_f grows.
        threshold: the metric at or below which t_f is deep enough (epsilon of Algorithm 2, in units of the metric).
        increment: what t_f grows by (gamma, units of time). Default: ``span.step_size``; adaptive solvers must give it.
        max_t_f: how far t_f may grow; the span's upper bound is raised to it. Default: ``span.default_max_t_f()``.
        patience: how many steps without improvement are waited for; 0 is Algorithm 2 to the letter, where t_f grows at
            every step until the threshold is met.
        improvement: by which share of itself the best metric since the last growth must fall to count as improved.

    Attributes:
        done: the threshold was met. Nothing changes any more.
        exhausted: t_f is at ``max_t_f`` and the threshold is not met, so that no step can grow. The training may go on,
            and ``done`` may still come.
        history: the :class:`Growth` s.

    Raises:
        TypeError: ``span`` is not a LearnableSpan.
        ValueError: a threshold, increment, max_t_f or patience that cannot be used.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 0.05, 6))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> growth = DepthGrowth(span, threshold=0.01)
        >>> growth.step(0.3), round(span.t_f.item(), 3)
        (True, 0.06)
        >>> growth.step(0.009), growth.done
        (False, True)
    """

    def __init__(
        self,
        span: LearnableSpan,
        threshold: float,
        increment: float | None = None,
        *,
        max_t_f: float | None = None,
        patience: int = 0,
        improvement: float = 0.01,
    ):
        if not isinstance(span, LearnableSpan):
            raise TypeError(
                f"DepthGrowth grows a LearnableSpan; got {type(span).__name__}: wrap the model and pass its span"
            )
        if increment is None and span.adaptive:
            raise ValueError(
                "increment=None, but an adaptive solver has no step size to take it from; give increment= in units of time"
            )
        self.span = span
        self.threshold = checks.number(threshold, "threshold", above=0)
        self.patience = checks.count(patience, "patience", of=" of steps")
        self.improvement = checks.number(improvement, "improvement", least=0, below=1, wanted="a share from 0 to 1")
        self._defaults = [name for name, value in (("increment", increment), ("max_t_f", max_t_f)) if value is None]
        self._read_defaults()
        if increment is not None:
            self.increment = checks.number(increment, "increment", above=0)
        if max_t_f is not None:
            self.max_t_f = checks.number(max_t_f, "max_t_f")
        t_f = span.t_f.item()
        if self.max_t_f < t_f * (1 - 1e-6):
            raise ValueError(f"max_t_f = {self.max_t_f:g} lies below t_f = {t_f:g}: there is nothing to grow into")
        self.steps = self.waited = 0
        self.best = math.inf
        self.done = self.exhausted = False
        self.history: list[Growth] = []
        self._gradient_before = span.t_f.requires_grad
        self._take()

    def _read_defaults(self) -> None:
        """Takes from the span's interval what was not given; a span may wait for its first call to tell it."""
        self._settled = self.span.interval.settled
        if "increment" in self._defaults:
            self.increment = self.span.step_size
        if "max_t_f" in self._defaults:
            self.max_t_f = max(self.span.bounds[1], self.span.default_max_t_f())

    def _take(self) -> None:
        """Takes t_f from the optimizer, and makes room above it."""
        span = self.span
        span.t_f.requires_grad_(False)
        span.t_f.grad = None  # an optimizer would go on applying a gradient that is left there
        lower, upper = span.bounds
        if self.max_t_f > upper:
            # A bound that the user has set is raised with a warning.
            level = logging.INFO if span.interval.given_bounds is None else logging.WARNING
            text = "the upper bound of t_f was raised from %.6g to max_t_f = %.6g, to grow into"
            _log.log(level, text, upper, self.max_t_f)
            if "max_t_f" in self._defaults and not self._settled:
                span.raise_to_default()  # a bound that follows the interval that the first call will tell
            else:
                span.bounds = (lower, self.max_t_f)

    def release(self) -> None:
        """Gives t_f back: it requires a gradient again if it did before."""
        self.span.t_f.requires_grad_(self._gradient_before)

    def step(self, metric: float | torch.Tensor) -> bool:
        """Looks at the metric, and grows t_f if it must.

        Returns:
            Whether t_f grew.

        Raises:
            ValueError: the metric is NaN or infinite; t_f stays as it was.
        """
        value = checks.scalar(metric, "the metric")
        if not math.isfinite(value):
            raise ValueError(
                f"the metric is {value} at t_f = {self.span.t_f.item():.6g}: growing would hide a training that broke; go back "
                "to the last good state with a lower learning rate (torchdyn_mintime.depth.rollback.Rollback does)"
            )
        if self.done:
            return False
        if not self._settled and self.span.interval.settled:
            self._read_defaults()
        self.steps += 1
        if value <= self.threshold:
            self.done, self.exhausted = True, False
            _log.info(
                "the metric %.4g met the threshold %.4g at t_f = %.6g", value, self.threshold, self.span.t_f.item()
            )
            return False
        if value < self.best * (1 - self.improvement):
            self.best, self.waited = value, 0
            if self.patience > 0:
                return False
        self.waited += 1
        if self.waited < self.patience:
            return False
        return self._grow(value)

    def _grow(self, value: float) -> bool:
        span = self.span
        t_f = span.t_f.item()
        # Half a thousandth of an increment short of the end is the end: a sliver of a step helps nobody.
        if t_f >= self.max_t_f - 5e-4 * self.increment:
            if not self.exhausted:
                self.exhausted = True
                _log.warning(
                    "t_f = %.6g reached max_t_f = %.6g and the metric %.4g is still above the threshold %.4g after %d steps "
                    "and %d growths; a deeper model alone does not help: look at the loss, the learning rate and the field",
                    *(t_f, self.max_t_f, value, self.threshold, self.steps, len(self.history)),
                )
            return False
        reason = f"metric {value:.4g} > {self.threshold:.4g}"
        if self.patience:
            reason += f", not improved for {self.waited} steps (best {self.best:.4g})"
        with torch.no_grad():
            span.t_f.fill_(min(t_f + self.increment, self.max_t_f))
        self.history.append(Growth(self.steps, value, span.t_f.item(), reason))
        self.restart()
        _log.info("t_f grew from %.6g to %.6g: %s", t_f, span.t_f.item(), reason)
        return True

    def restart(self) -> None:
        """Waits anew for an improvement, as after a growth: for when the training has gone back to an earlier state."""
        self.best, self.waited = math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the span, as plain values. The span's own state_dict holds t_f and its bounds."""
        limits = ("threshold", "increment", "max_t_f", "patience", "improvement")
        names = (*limits, "steps", "best", "waited", "done", "exhausted")
        return {**{name: getattr(self, name) for name in names}, "history": [asdict(g) for g in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a saved one was. Load the model first: its state holds t_f."""
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"this is no state of a DepthGrowth: {missing} are missing; got the keys {sorted(state)}")
        vars(self).update({name: state[name] for name in self.state_dict()})
        self.history = [Growth(**growth) for growth in state["history"]]
        self._take()

    def __repr__(self) -> str:
        state = "done" if self.done else "exhausted" if self.exhausted else "growing"
        return (
            f"DepthGrowth({state} at t_f={self.span.t_f.item():.4g}, threshold={self.threshold:g}, "
            f"increment={self.increment:g}, max_t_f={self.max_t_f:g}, patience={self.patience}, growths={len(self.history)})"
        )
