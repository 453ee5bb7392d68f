"""Something of the field at every point of a trajectory: all points in one evaluation where that is the same."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.field import STATEFUL, BoundField

__all__ = ["AtPoints"]

At = Callable[[Tensor, Tensor, int], list[Tensor]]
"""``at(t, z, copies)``: some values of each sample, ``[batch]``, at one time; in z the batch stands ``copies`` times."""


class AtPoints:
    """Evaluates at every point of a trajectory.

    A field that ignores time sees the points as one large batch, which is many times faster for small networks. Whether that
    gives the same is not taken on trust (U11): at the first trajectory of each kind two points are evaluated both ways.

    Attributes:
        together: whether the last trajectory was evaluated as one batch.
    """

    def __init__(self) -> None:
        self._equal: dict[tuple, bool] = {}
        self.together = False

    def __call__(
        self, at: At, bound: BoundField, t: Tensor, sol: Tensor, others: Sequence[Any] = (), together: bool = True
    ) -> list[Tensor]:
        """What ``at`` returns, for all points: each ``[points, batch]``.

        Args:
            at: evaluates at one time.
            bound: the field.
            t, sol: the trajectory, ``[points]`` and ``[points, batch, ...]``.
            others: what ``at`` calls besides the field, such as a potential.
            together: False where ``at`` itself needs the points one by one.
        """
        key = _kind(bound, sol, others) if together else None
        self.together = key is not None and self._equal.get(key, False)
        if self.together:
            return _in_one(at, t, sol)
        values = [at(t[i], sol[i], 1) for i in range(len(t))]
        stacked = [torch.stack(column) for column in zip(*values, strict=True)]
        if key is not None and key not in self._equal:
            before = bound.nfe
            found = _same(at, t.detach(), sol.detach())
            bound.nfe = before
            if found is not None:
                self._equal[key] = found
        return stacked

    def __getstate__(self) -> dict:
        return {"_equal": {}, "together": False}  # kinds are known by their very field


def _in_one(at: At, t: Tensor, sol: Tensor) -> list[Tensor]:
    points = len(t)
    return [value.reshape(points, -1) for value in at(t[0], sol.flatten(0, 1), points)]


def _kind(bound: BoundField, sol: Tensor, others: Sequence[Any]) -> tuple | None:
    """What the comparison is remembered by; None where points must not be put together at all."""
    # What a solve has drawn (data control, noise) is that of one batch.
    if getattr(bound.function, "timed", True) or bound._captured or sol.dim() < 3 or bound.random_or_stateful():
        return None
    modules = [m for other in others if isinstance(other, nn.Module) for m in other.modules()]
    if any(isinstance(m, STATEFUL) and m.training for m in modules):
        return None
    called = (bound.node.vf, *others)
    # The batch too: a field may keep something of its size.
    return called, tuple(getattr(c, "training", None) for c in called), sol.shape[1:], sol.dtype, sol.device


def _same(at: At, t: Tensor, sol: Tensor) -> bool | None:
    """Whether two points are the same as one batch and apart; None where all is zero, which shows nothing.

    The second is a point pushed off the trajectory: two points of a slow one are too much alike to show what a batch mean does.
    """
    states = torch.stack([sol[0], 1.5 * sol[-1]])
    try:
        apart = [torch.stack(pair).detach() for pair in zip(*(at(t[0], z, 1) for z in states), strict=True)]
        at_once = [value.detach() for value in _in_one(at, t[:2], states)]
    except Exception:  # whatever a user's field says to a batch that is not its own
        return False
    sizes = [value.abs().max().item() if value.numel() else 0.0 for value in apart]
    if not all(0 < size < float("inf") for size in sizes):
        return None
    tolerance = 1000 * torch.finfo(sol.dtype).eps
    return all(
        bool(((a - b).abs().max() <= tolerance * size).item()) for a, b, size in zip(at_once, apart, sizes, strict=True)
    )
