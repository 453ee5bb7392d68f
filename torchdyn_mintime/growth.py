"""Growing t_f until the loss is met: the second stage of Algorithm 2, and the way back when a loss explodes."""

import copy
import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from torchdyn_mintime import checks
from torchdyn_mintime.span import LearnableSpan

__all__ = ["DepthGrowth", "DivergedError", "Growth", "Rescue"]

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
        # Of a span that waits for its first call to tell the interval, the defaults are taken once it has been told.
        self._awaits = (
            ()
            if span._filled
            else tuple(name for name, value in (("increment", increment), ("max_t_f", max_t_f)) if value is None)
        )
        if increment is None:
            if span.adaptive:
                raise ValueError(
                    "increment=None, but an adaptive solver has no step size to take it from; give increment= in units of time"
                )
            increment = span.step_size
        self.threshold = checks.number(threshold, "threshold", above=0)
        self.increment = checks.number(increment, "increment", above=0)
        self.max_t_f = (
            max(span.bounds[1], span.default_max_t_f()) if max_t_f is None else checks.number(max_t_f, "max_t_f")
        )
        self.patience = checks.count(patience, "patience", of=" of steps")
        self.improvement = checks.number(improvement, "improvement", least=0, below=1, wanted="a share from 0 to 1")
        t_f = span.t_f.item()
        if self.max_t_f < t_f * (1 - 1e-6):
            raise ValueError(f"max_t_f = {self.max_t_f:g} lies below t_f = {t_f:g}: there is nothing to grow into")
        self.span = span
        self.steps = 0
        self.best = math.inf
        self.waited = 0
        self.done = self.exhausted = False
        self.history: list[Growth] = []
        self._gradient_before = span.t_f.requires_grad
        self._take()

    def _take(self) -> None:
        """Takes t_f from the optimizer, and makes room above it."""
        span = self.span
        span.t_f.requires_grad_(False)
        span.t_f.grad = None  # an optimizer would go on applying a gradient that is left there
        lower, upper = span.bounds
        if self.max_t_f > upper:
            # What the user asked for explicitly is overruled aloud.
            level = logging.INFO if span._given_bounds is None else logging.WARNING
            _log.log(
                level,
                "the upper bound of t_f was raised from %.6g to max_t_f = %.6g, to grow into",
                upper,
                self.max_t_f,
            )
            if "max_t_f" in self._awaits:
                span.raise_to_default()
            else:
                span.bounds = (lower, self.max_t_f)

    def _hear(self) -> None:
        """Takes the defaults from the interval that the span has been told by now."""
        span = self.span
        if "increment" in self._awaits:
            self.increment = span.step_size
        if "max_t_f" in self._awaits:
            self.max_t_f = span.raise_to_default()
        self._awaits = ()

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
                "to the last good state with a lower learning rate (torchdyn_mintime.growth.Rescue does)"
            )
        if self.done:
            return False
        if self._awaits and self.span._filled:
            self._hear()
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
        if self.patience:
            reason = f"metric {value:.4g} > {self.threshold:.4g}, not improved for {self.waited} steps (best {self.best:.4g})"
        else:
            reason = f"metric {value:.4g} > {self.threshold:.4g}"
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
        """Everything but the span, as plain values. The span's own state_dict holds t_f and its bounds."""
        names = (
            "threshold",
            "increment",
            "max_t_f",
            "patience",
            "improvement",
            "steps",
            "best",
            "waited",
            "done",
            "exhausted",
        )
        return {**{name: getattr(self, name) for name in names}, "history": [asdict(g) for g in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a saved one was. Load the model first: its state holds t_f."""
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ValueError(f"this is no state of a DepthGrowth: {missing} are missing; got the keys {sorted(state)}")
        for name in self.state_dict():
            if name != "history":
                setattr(self, name, state[name])
        self.history = [Growth(**growth) for growth in state["history"]]
        self._take()

    def __repr__(self) -> str:
        state = "done" if self.done else "exhausted" if self.exhausted else "growing"
        return (
            f"DepthGrowth({state} at t_f={self.span.t_f.item():.4g}, threshold={self.threshold:g}, "
            f"increment={self.increment:g}, max_t_f={self.max_t_f:g}, patience={self.patience}, growths={len(self.history)})"
        )


class DivergedError(RuntimeError):
    """A loss exploded again and again, whatever the learning rate."""


class Rescue:
    """The last good state of a training, and the way back to it when the loss explodes.

    Args:
        model: whose parameters and buffers are kept.
        optimizer: whose state is kept too, and whose learning rates are lowered on the way back.
        jump: a loss this many times the best one so far (and above ``floor``) has exploded, as has one that is not
            finite.
        floor: losses below it never count as exploded; None is the first loss looked at, where training began.
        stuck: after so many looks in a row above twice the best loss the training counts as spoiled, and goes back as
            well; 0 is never.
        factor: what learning rates are multiplied by on the way back.
        limit: how often to go back before giving up.
        every: a good state is kept at the first look and at every so many after it. Good is a loss of at most one and a
            half times the best: a state at the brink would explode again.

    Attributes:
        count: how often it went back.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> rescue = Rescue(net, torch.optim.SGD(net.parameters(), lr=1.0))
        >>> rescue.look(0.5)
        False
        >>> net.weight.data.fill_(float("nan")) is net.weight.data, rescue.look(float("nan"))
        (False, True)
        >>> bool(net.weight.isfinite()), rescue.optimizer.param_groups[0]["lr"]
        (True, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        jump: float = 2.0,
        floor: float | None = None,
        stuck: int = 0,
        factor: float = 0.5,
        limit: int = 8,
        every: int = 5,
    ):
        self.model, self.optimizer = model, optimizer
        self.jump = checks.number(jump, "jump", above=1)
        self.floor = None if floor is None else checks.number(floor, "floor", above=0)
        self.factor = checks.number(factor, "factor", above=0)
        if self.factor >= 1:
            raise ValueError(f"factor must lower the learning rate, so lie below 1; got {factor}")
        self.stuck, self.limit, self.every = stuck, limit, every
        self.count = self._looks = self._above = 0
        self.best = math.inf
        self._good: tuple[dict, dict] | None = None

    def exploded(self, loss: float) -> bool:
        """Whether the loss is not finite, or many times the best one so far."""
        return not math.isfinite(loss) or loss > max(self.jump * self.best, self.floor or 0.0)

    def look(self, loss: float) -> bool:
        """Keeps the present state if the loss is good, and goes back to the last good one if it exploded.

        ``loss`` must be that of the parameters as they are now: look before the optimizer's step.

        Returns:
            Whether it went back.

        Raises:
            ValueError: the loss was not finite from the start.
            DivergedError: it exploded more than ``limit`` times.
        """
        self._above = self._above + 1 if loss > 2 * self.best else 0
        spoiled = self.stuck > 0 and self._above >= self.stuck
        if not (spoiled or self.exploded(loss)):
            self.best = min(self.best, loss)
            if self.floor is None:
                self.floor = loss
            if self._good is None or (self._looks % self.every == 0 and loss <= 1.5 * self.best):
                self._good = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
            self._looks += 1
            return False
        what = f"stayed at {loss:.4g}, far above its best {self.best:.4g}" if spoiled else f"exploded to {loss:.4g}"
        if self._good is None:
            raise ValueError(
                f"the loss is {loss} before anything was learned; lower the learning rate or check the data"
            )
        if self.count >= self.limit:
            raise DivergedError(f"the loss {what} after {self.count} rescues, at the learning rates {self._rates()}")
        self.count += 1
        self._looks = self._above = 0
        self.back()
        _log.warning("the loss %s; back to the last good state, learning rates now %s", what, self._rates())
        return True

    def back(self) -> None:
        """Restores the last good state, with lower learning rates."""
        rates = [group["lr"] * self.factor for group in self.optimizer.param_groups]
        assert self._good is not None
        self.model.load_state_dict(self._good[0])
        # A copy: the optimizer takes the tensors it is given as its own, and would write into what is kept here.
        self.optimizer.load_state_dict(copy.deepcopy(self._good[1]))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """What it keeps and has counted, for a checkpoint."""
        kept = {"best": self.best, "floor": self.floor, "count": self.count, "looks": self._looks, "above": self._above}
        return {**kept, "good": copy.deepcopy(self._good)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"this is no state of a Rescue: {missing} are missing; got the keys {sorted(state)}")
        self.best, self.floor, self.count = state["best"], state["floor"], state["count"]
        self._looks, self._above, self._good = state["looks"], state["above"], copy.deepcopy(state["good"])

    def _rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]
