"""The last good and the best state of a training: kept, saved, and brought back."""

import copy
import logging
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import checks
from torchdyn_mintime.depth.rates import rates_of, set_rates

__all__ = ["DivergedError", "Rescue", "Rollback", "Snapshot"]

_log = logging.getLogger(__name__)

Stateful: TypeAlias = nn.Module | torch.optim.Optimizer


class DivergedError(RuntimeError):
    """A loss exploded again and again, whatever the learning rate."""


class Snapshot:
    """Keeps a copy of the state of a model, and of its optimizers where they are given too.

    A snapshot is false until something was taken or loaded.

    Example:
        >>> net, best = nn.Linear(1, 1), Snapshot()
        >>> bool(best)
        False
        >>> best.take(net)
        >>> kept = net.weight.item()
        >>> _ = net.weight.data.fill_(5.0)
        >>> best.restore(net)
        >>> bool(best), net.weight.item() == kept
        (True, True)
    """

    def __init__(self, states: tuple[dict[str, Any], ...] = ()) -> None:
        self._states = states

    def __len__(self) -> int:
        return len(self._states)

    def take(self, *sources: Stateful) -> None:
        """Copies the states of ``sources``, in the place of what was kept before."""
        self._states = copy.deepcopy(tuple(source.state_dict() for source in sources))

    def restore(self, *targets: Stateful) -> None:
        """Loads the states into ``targets``, in the order that they were taken in.

        Raises:
            RuntimeError: nothing was taken yet.
            ValueError: there were more or fewer of them. Nothing is changed then.
        """
        if not self:
            raise RuntimeError("there is no state to restore; call take(model) first")
        if len(targets) != len(self):
            raise ValueError(f"{len(self)} states were taken; got {len(targets)} to restore")
        for target, state in zip(targets, self._states, strict=True):
            # An optimizer takes the tensors that it loads as its own, and would write into what is kept here.
            target.load_state_dict(state if isinstance(target, nn.Module) else copy.deepcopy(state))

    def of_model(self) -> "Snapshot":
        """Returns the first state alone, that of the model."""
        return Snapshot(self._states[:1])

    def state_dict(self) -> Any:
        """Returns None, the model's state, or with optimizers a tuple of states."""
        states = copy.deepcopy(self._states)
        return states[0] if len(states) == 1 else states or None

    def load_state_dict(self, state: Any) -> None:
        """Takes over what :meth:`state_dict` returned."""
        states = () if state is None else (state,) if isinstance(state, dict) else tuple(state)
        self._states = copy.deepcopy(states)


class Rollback:
    """Keeps the last good state of a training, and goes back to it when the loss explodes.

    Args:
        model: whose parameters and buffers are kept.
        optimizer: whose state is kept too, and whose learning rates are lowered on the way back; one, or several.
        jump: a loss this many times the best one so far (and above ``floor``) has exploded, as has one that is not
            finite. Multiples of a best loss below zero, as an NLL may have, are counted upwards: twice -3 is 0.
        floor: losses below it never count as exploded; None is the first loss looked at, where training began.
        stuck: after so many looks in a row above twice the best loss the training counts as spoiled, and goes back as
            well; 0 is never.
        factor: what learning rates are multiplied by on the way back.
        limit: how often to go back before giving up.
        every: a good state is kept at the first look and at every so many after it. Good is a loss of at most one and a
            half times the best: a state at the brink would explode again.

    Attributes:
        count: how often it went back.
        optimizers: all of them.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> rollback = Rollback(net, torch.optim.SGD(net.parameters(), lr=1.0))
        >>> rollback.look(0.5)
        False
        >>> net.weight.data.fill_(float("nan")) is net.weight.data, rollback.look(float("nan"))
        (False, True)
        >>> bool(net.weight.isfinite()), rollback.optimizers[0].param_groups[0]["lr"]
        (True, 0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        jump: float = 2.0,
        floor: float | None = None,
        stuck: int = 0,
        factor: float = 0.5,
        limit: int = 8,
        every: int = 5,
    ):
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self.jump = checks.number(jump, "jump", above=1)
        self.floor = None if floor is None else checks.number(floor, "floor", above=0)
        self.factor = checks.number(factor, "factor", above=0, below=1, wanted="above 0 and below 1, to lower the rate")
        self.stuck, self.limit, self.every = stuck, limit, every
        self.count = self._looks = self._above = 0
        self.best = math.inf
        self._good = Snapshot()

    def _above_best(self, factor: float) -> float:
        """Returns ``factor`` times the best loss; of one below zero ``best + (factor - 1) |best|``, which is above it too."""
        return (factor if self.best >= 0 else 2.0 - factor) * self.best

    def exploded(self, loss: float) -> bool:
        """Returns whether the loss is not finite, or many times the best one so far."""
        return not math.isfinite(loss) or loss > max(self._above_best(self.jump), self.floor or 0.0)

    def take(self) -> Snapshot:
        """Returns the present state of the model and the optimizers."""
        state = Snapshot()
        state.take(self.model, *self.optimizers)
        return state

    def look(self, loss: float | Tensor, state: Snapshot | None = None) -> bool:
        """Keeps a state if its loss is good, and goes back to the last good one if it exploded.

        Args:
            loss: a scalar.
            state: what :meth:`take` returned when the loss was that of the model. Without it the loss must be that of the
                parameters as they are now: look before the optimizer's step.

        Returns:
            Whether it went back.

        Raises:
            ValueError: the loss was not finite from the start.
            DivergedError: it exploded more than ``limit`` times.
        """
        loss = checks.scalar(loss, "the loss")
        self._above = self._above + 1 if loss > self._above_best(2.0) else 0
        spoiled = self.stuck > 0 and self._above >= self.stuck
        if not (spoiled or self.exploded(loss)):
            self.best = min(self.best, loss)
            if self.floor is None:
                self.floor = loss
            if not self._good or (self._looks % self.every == 0 and loss <= self._above_best(1.5)):
                self._good = self.take() if state is None else state
            self._looks += 1
            return False
        what = f"stayed at {loss:.4g}, far above its best {self.best:.4g}" if spoiled else f"exploded to {loss:.4g}"
        if not self._good:
            raise ValueError(
                f"the loss is {loss} before anything was learned; lower the learning rate or check the data"
            )
        if self.count >= self.limit:
            raise DivergedError(
                f"the loss {what}, also after {self.count} returns to the last good state, at the learning rates "
                f"{self._rates()}; begin with a lower one, or look at the data"
            )
        self.count += 1
        self._looks = self._above = 0
        self.back()
        _log.warning("the loss %s; back to the last good state, learning rates now %s", what, self._rates())
        return True

    def back(self) -> None:
        """Restores the last good state, with lower learning rates."""
        lowered = [[rate * self.factor for rate in rates_of(optimizer)] for optimizer in self.optimizers]
        self._good.restore(self.model, *self.optimizers)
        for optimizer, rates in zip(self.optimizers, lowered, strict=True):
            set_rates(optimizer, rates)

    def state_dict(self) -> dict[str, Any]:
        """Returns what it keeps and has counted, for a checkpoint."""
        kept = {"best": self.best, "floor": self.floor, "count": self.count, "looks": self._looks, "above": self._above}
        return {**kept, "good": self._good.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        if missing := [name for name in self.state_dict() if name not in state]:
            raise ValueError(f"this is no state of a Rollback: {missing} are missing; got the keys {sorted(state)}")
        self.best, self.floor, self.count = state["best"], state["floor"], state["count"]
        self._looks, self._above = state["looks"], state["above"]
        self._good.load_state_dict(state["good"])
        if len(self._good) != 1 + len(self.optimizers):  # older versions kept the first optimizer alone
            self._good = Snapshot()

    def _rates(self) -> list[float]:
        return [rate for optimizer in self.optimizers for rate in rates_of(optimizer)]


Rescue = Rollback  # the name of older versions
