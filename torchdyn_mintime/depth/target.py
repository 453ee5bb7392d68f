r"""The price of time that holds a loss on its target.

    minimise t_f - t0   subject to   loss <= target.

Its Lagrangian is, up to a factor, loss + w (t_f - t0) as in eq. (13), with a price w that is right when the loss sits on
the target. The dual update raises w while the loss is below the target and lowers it while it is above, and t_f follows
the gradient of eq. (12) plus w. Both move by factors, and the gradient counts relative to its own size, so that neither
the unit of time nor the learning rate of the network matters.
"""

import itertools
import logging
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    LearnableSpan,
    Loss,
    as_batches,
    checks,
    evaluating,
    mean_loss,
    require_spans,
    undisturbed,
)
from torchdyn_mintime.depth.rollback import Snapshot

__all__ = ["LONGEST_WINDOW", "TargetLoss"]

_log = logging.getLogger(__name__)

TIME_RATE, PRICE_RATE = 0.02, 0.05
"""The duration and its price change by these shares a step, at most, so that the network has time to follow."""
LONGEST_WINDOW = 50
"""Over so many steps a mean is of the model as it is: t_f changes by a share of itself meanwhile."""
SMOOTHING = 0.9
"""The share of the last mean of the loss, and of the gradient's size, in the next: about ten steps are remembered."""


class TargetLoss:
    """Finds the shortest interval that meets a target loss, and the price of time that belongs to it.

    It moves the times itself: call :meth:`step` after backward and before the optimizer's step, which then passes the
    times over. The best feasible model (the smallest duration at which the mean loss of the last ``window`` steps was at
    most the target) is kept; :meth:`restore_best` brings it back.

    With ``batches`` the loss over all of them decides instead. It is measured every ``window`` steps, in eval mode, and the
    price holds this loss on the target. A loop that measures such a loss by itself passes it to :meth:`judge`.

    Args:
        model: a LearnableSpan, or a module that holds some; they share one price.
        target: the loss to reach.
        max_t_f: how far t_f may grow. Default: 2 T_f - t0 - eps of eq. (41), at least t0 + 1.
        window: how many of the last losses have their mean held against the target: as many as an epoch has steps, and 1
            where each loss is of all data. The loss of one minibatch is often far below that mean. Two standard errors are
            added to it. A longer window averages over a model that has changed meanwhile.
        batches: a list or a loader of ``x`` or ``(x, *target)``, on the model's device. Where several processes run, give each
            the same: their losses are not averaged.
        loss: with ``batches``, ``loss(output, *target)``, the mean over a batch; of a span itself the output is z(t_f).

    Attributes:
        weight: the price of time (loss per unit of time); None before the first step.
        best: {"duration", "loss", "step"} of the best feasible model, the loss being that mean, or that over ``batches``;
            or None.

    Raises:
        ValueError: a target that is not positive and finite, no span, ``max_t_f`` below t_f, or ``batches`` without ``loss``.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> price, optimizer = TargetLoss(span, target=0.1), torch.optim.Adam(span.parameters(), lr=0.01)
        >>> for _ in range(3):
        ...     loss = span(torch.ones(4, 2))[1][-1].square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     price.step(loss)
        ...     optimizer.step()
        >>> price.weight > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        *,
        max_t_f: float | None = None,
        window: int = LONGEST_WINDOW,
        batches: Iterable[Any] | None = None,
        loss: Loss | None = None,
    ):
        self.model, self.target = model, checks.positive(target, "target")
        if (batches is None) != (loss is None):
            raise ValueError(f"batches and loss go together; got batches={batches!r} and loss={loss!r}")
        self._batches, self._loss = batches, loss
        self._recent: deque[float] = deque(maxlen=checks.count(window, "window", 1, " of steps"))
        self._durations: deque[float] = deque(maxlen=self._recent.maxlen)
        self._spans = require_spans(model)
        if max_t_f is not None:
            longest = max(span.t_f.item() for span in self._spans)
            max_t_f = checks.number(max_t_f, "max_t_f", least=longest, wanted=f"finite and at least t_f = {longest:g}")
        for span in self._spans:
            lower, upper = span.bounds
            if max_t_f is None:
                span.raise_to_default()
            else:
                span.bounds = (lower, max_t_f)
            if span.bounds[1] != upper:
                _log.info("the upper bound of t_f is now %g (it was %g)", span.bounds[1], upper)
        self.weight: float | None = None
        self.best: dict[str, Any] | None = None
        self._steps = 0
        self._log_loss = 0.0
        self._ratio: float | None = None  # of the loss that was judged to the level of the steps then
        self._size = [0.0] * (2 * len(self._spans))  # of the gradients of every t_f, and then of every t0
        self._state = Snapshot()

    @property
    def feasible(self) -> bool:
        """Whether the target was met at some step."""
        return self.best is not None

    @property
    def duration(self) -> float:
        """The durations of the spans together, in units of time."""
        return sum(span.duration.item() for span in self._spans)

    def step(self, loss: float | Tensor) -> None:
        """Moves the times and their price, from the gradients that backward has left on the times.

        Args:
            loss: of this batch, averaged over the processes where several run.

        Raises:
            ValueError: the loss, or that over ``batches``, is not finite; nothing is changed then.
        """
        value = _finite(loss)
        window = self._recent.maxlen
        assert window is not None
        judged = self._over_batches() if self._batches is not None and (self._steps + 1) % window == 0 else None
        self._recent.append(value)
        self._durations.append(self.duration)
        if judged is not None:
            self.judge(judged)
        value = self._level() * (1.0 if self._ratio is None else self._ratio)
        # In the logarithm: a loss falls by orders of magnitude, and its mean would be that of the early steps.
        log_loss = math.log(max(value, 1e-12))
        self._steps += 1
        beta = min(SMOOTHING, 1 - 1 / self._steps)
        self._log_loss = beta * self._log_loss + (1 - beta) * log_loss
        smooth = math.exp(self._log_loss)
        if self._ratio is None and self._holds(value, smooth):
            self._keep(value)
        if self.weight is None:
            self.weight = max(value, 1e-3 * self.target) / self.duration
        gap = math.log(self.target / smooth)
        self.weight *= math.exp(PRICE_RATE * min(max(gap, -1.0), 1.0))
        # The part of the price that answers at once damps the swing between the two updates.
        price = self.weight * min(max(self.target / max(value, 1e-12), 0.1), 10.0)
        for i, (end, span) in enumerate(itertools.product((True, False), self._spans)):
            if (span.t_f if end else span.t0).grad is not None:
                self._move(i, span, end, price, beta)

    def judge(self, loss: float | Tensor) -> None:
        """Compares the loss of the model as it is with the target: the loss over all data that count, such as validation data.

        From the first call on, only models that are judged so count as feasible, and the price follows this loss.

        Args:
            loss: averaged over the processes where several run.

        Raises:
            ValueError: the loss is not finite; nothing is changed then.
        """
        value = _finite(loss)
        self._ratio = max(value, 1e-12) / max(self._level(), 1e-12) if self._recent else 1.0
        if value <= self.target:
            self._keep(value)

    def _over_batches(self) -> float:
        assert self._batches is not None and self._loss is not None
        with evaluating(self.model), undisturbed(self.model):
            # One by one: a loader may hold more than the memory does.
            prepared = (as_batches([batch])[0] for batch in self._batches)
            first = next(prepared, None)
            if first is None:
                raise ValueError("batches is empty; give a list or a loader, which can be gone through again and again")
            return _finite(mean_loss(self.model, itertools.chain([first], prepared), self._loss)[0])

    def _level(self) -> float:
        """Returns what is held against the target: the mean of the last losses, and two standard errors of it above."""
        count = len(self._recent)
        mean = math.fsum(self._recent) / count
        squares = math.fsum((loss - mean) ** 2 for loss in self._recent)
        return mean if count == 1 else mean + 2 * math.sqrt(squares / (count - 1) / count)

    @torch.no_grad()
    def _move(self, i: int, span: LearnableSpan, end: bool, price: float, beta: float) -> None:
        """Moves t_f, or t0 where it is learned, by its gradient in the logarithm of the duration."""
        t0, t_f = span.t0.item(), span.t_f.item()
        duration, time = t_f - t0, span.t_f if end else span.t0
        assert time.grad is not None
        gradient = time.grad.item() * (duration if end else -duration)
        time.grad = None  # left here, it would make the optimizer move the time once more
        if not math.isfinite(gradient):  # a gradient scaler skips such a step too
            return
        self._size[i] = beta * self._size[i] + (1 - beta) * abs(gradient)
        cost = price * duration
        # Relative to its own size; a gradient far above its usual size counts as one of that size.
        size = max(self._size[i], 1e-30)
        slope = (min(max(gradient, -3 * size), 3 * size) + cost) / (size + cost)
        factor = math.exp(-TIME_RATE * min(max(slope, -1.0), 1.0))
        time.fill_(t0 + duration * factor if end else t_f - duration * factor)
        span.clip_()

    def _holds(self, value: float, smooth: float) -> bool:
        """Returns whether the mean of the last steps is at most the target, and of this model."""
        if len(self._recent) != self._recent.maxlen or max(value, smooth) > self.target:
            return False
        # While t_f falls, the mean is of deeper models than this one.
        return self.duration >= 0.995 * math.fsum(self._durations) / len(self._durations)

    def _keep(self, loss: float) -> None:
        duration = self.duration
        # A percent is too little to copy the model for.
        if self.best is None or duration < 0.99 * self.best["duration"]:
            self.best = {"duration": duration, "loss": loss, "step": self._steps}
            self._state.take(self.model)

    def restore_best(self) -> bool:
        """Loads the best feasible model, as it was when its loss was measured. False if there was none."""
        if not self._state:
            _log.warning("no step met the target loss %g; the model is left as it is", self.target)
            return False
        self._state.restore(self.model)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, for a checkpoint."""
        plain = {"weight": self.weight, "best": self.best and dict(self.best), "steps": self._steps}
        smooth = {
            "log_loss": self._log_loss,
            "ratio": self._ratio,
            "recent": list(self._recent),
            "durations": list(self._durations),
            "size": list(self._size),
        }
        return {**plain, **smooth, "state": self._state.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.weight, self.best, self._steps = state["weight"], state["best"], state["steps"]
        self._log_loss = state["log_loss"]
        self._size = [*state["size"], *[0.0] * (2 * len(self._spans) - len(state["size"]))]  # once of t_f alone
        self._ratio = state.get("ratio")
        self._recent.clear()
        self._recent.extend(state.get("recent", ()))  # version 0.1.0 knew the last loss alone
        self._durations.clear()
        self._durations.extend(state.get("durations", ()))
        self._state.load_state_dict(state["state"])

    def __repr__(self) -> str:
        return f"TargetLoss(target={self.target:g}, weight={self.weight}, best={self.best})"


def _finite(loss: float | Tensor) -> float:
    value = checks.scalar(loss, "the loss")
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}; the times and their price were left as they are")
    return value
