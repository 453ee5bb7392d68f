"""The field at every point of a trajectory: all points in one evaluation where that gives the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import STATEFUL, BoundField

__all__ = ["BatchedPoints"]

At = Callable[[Tensor, Tensor, int], Sequence[Tensor]]
"""``at(t, z, copies)``: some values of each sample, ``[batch]``, at one time; in z the batch stands ``copies`` times."""

MEASURED_EVERY = 100
"""After this many trajectories of a kind it is measured again whether points may be put together."""


class BatchedPoints:
    """Evaluates a function of the field at every point of a trajectory.

    A field that ignores time sees the points as one large batch, which is many times faster for small networks. Whether
    that gives the same is not assumed but measured (U11): at some trajectories of each kind, two points are evaluated both
    ways. These are the first, the fourth, the eighth and so on, and every hundredth: a field that is trained may begin to
    couple its samples, as with a gate that is zero at first. Points that were different once are evaluated one by one from
    then on.
    """

    def __init__(self) -> None:
        self._equal: dict[tuple | None, bool | None] = {}
        self._seen: dict[tuple | None, int] = {}

    def __call__(
        self, at: At, bound: BoundField, t: Tensor, sol: Tensor, others: Sequence[Any] = (), together: bool = True
    ) -> list[Tensor]:
        """Returns what ``at`` gives at all points, each ``[points, batch]``.

        ``bound.nfe`` counts one evaluation a point, also where one evaluation saw them all.

        Args:
            at: evaluates at one time.
            bound: the field.
            t, sol: the trajectory, ``[points]`` and ``[points, batch, ...]``.
            others: what ``at`` calls besides the field, such as a potential.
            together: False where ``at`` itself needs the points one by one.
        """
        key = _kind(bound, sol, others) if together else None
        before = bound.nfe
        if key is not None and self._equal.get(key) is not False:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            again = (seen > 2 and seen & (seen - 1) == 0) or seen % MEASURED_EVERY == 0
            if self._equal.get(key) is None or again:
                self._equal[key] = _same(at, t.detach(), sol.detach())
                bound.nfe = before
        if not self._equal.get(key):
            one_by_one = (at(t[i], sol[i], 1) for i in range(len(t)))
            return [torch.stack(values) for values in zip(*one_by_one, strict=True)]
        in_one = _in_one(at, t, sol)
        bound.nfe = before + (bound.nfe - before) * len(t)
        return in_one

    def __getstate__(self) -> dict:
        return {}  # kinds are known by their very field

    def __setstate__(self, state: dict) -> None:
        self._equal, self._seen = {}, {}


def _in_one(at: At, t: Tensor, sol: Tensor) -> list[Tensor]:
    return [values.unflatten(0, sol.shape[:2]) for values in at(t[0], sol.flatten(0, 1), len(t))]


def _kind(bound: BoundField, sol: Tensor, others: Sequence[Any]) -> tuple | None:
    """Returns what the comparison is remembered by; None where points must not be put together at all."""
    called = (bound.node.vf, *others)
    modules = (m for other in others if isinstance(other, nn.Module) for m in other.modules())
    stateful = bound.random_or_stateful() or any(isinstance(m, STATEFUL) and m.training for m in modules)
    # What a solve has drawn (data control, noise) is that of one batch.
    if getattr(bound.function, "timed", True) or bound.captured or sol.dim() < 3 or stateful:
        return None
    # The batch too: a field may keep something of its size.
    return called, tuple(getattr(c, "training", None) for c in called), sol.shape[1:], sol.dtype, sol.device


def _same(at: At, t: Tensor, sol: Tensor) -> bool | None:
    """Returns whether two points are the same as one batch and apart; None where all is zero, which shows nothing.

    The second is a point pushed off the trajectory: two points of a slow one are too much alike to show what a batch mean does.
    """
    states = torch.stack([sol[0], 1.5 * sol[-1]])
    try:
        apart = torch.stack([torch.stack([*at(t[0], z, 1)]) for z in states], 1).detach()
        at_once = torch.stack(_in_one(at, t[:2], states)).detach()
    except Exception:  # whatever a user's field says to a batch that is not its own
        return False
    largest = apart.abs().amax((1, 2)) if apart.numel() else apart.new_zeros(1)
    if not bool(((largest > 0) & (largest < torch.inf)).all()):
        return None
    return bool(((at_once - apart).abs().amax((1, 2)) <= 1000 * torch.finfo(sol.dtype).eps * largest).all())
