"""Something of the field at every point of a trajectory: all points in one evaluation where that is the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchdyn_mintime.field import BoundField

__all__ = ["AtPoints"]

At = Callable[[Tensor, Tensor, int], list[Tensor]]
"""``at(t, z, copies)``: some values of each sample, ``[batch]``, at one time; in z the batch stands ``copies`` times."""


class AtPoints:
    """Evaluates at every point of a trajectory.

    A field that ignores time sees the points as one large batch, which is many times faster for small networks. Whether that
    gives the same is not taken on trust (U11): the first trajectory of each kind is evaluated both ways and compared.

    Attributes:
        together: whether the last trajectory was evaluated as one batch.
    """

    def __init__(self) -> None:
        self._equal: dict[tuple, bool] = {}
        self.together = False

    def __call__(
        self, at: At, bound: BoundField, t: Tensor, sol: Tensor, others: Sequence[nn.Module] = (), together: bool = True
    ) -> list[Tensor]:
        """What ``at`` returns, for all points: each ``[points, batch]``.

        Args:
            at: evaluates at one time.
            bound: the field.
            t, sol: the trajectory, ``[points]`` and ``[points, batch, ...]``.
            others: modules besides the field's that ``at`` calls.
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
            self._equal[key] = _same(at, t.detach(), sol.detach(), stacked)
            bound.nfe = before
        return stacked

    def __getstate__(self) -> dict:
        return {"_equal": {}, "together": False}  # kinds are known by the identity of their field


def _in_one(at: At, t: Tensor, sol: Tensor) -> list[Tensor]:
    points = len(t)
    return [value.reshape(points, -1) for value in at(t[0], sol.flatten(0, 1), points)]


def _kind(bound: BoundField, sol: Tensor, others: Sequence[nn.Module]) -> tuple | None:
    """What the comparison is remembered by; None where points must not be put together at all."""
    modules = [bound.node.vf, *others]
    # What a solve has drawn (data control, noise) is that of one batch.
    if getattr(bound.function, "timed", True) or bound._captured or sol.dim() < 3:
        return None
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(isinstance(m, kinds) and m.training for module in modules for m in module.modules()):
        return None
    return id(bound.node.vf), sol.shape[2:], sol.dtype, sol.device, tuple(m.training for m in modules)


def _same(at: At, t: Tensor, sol: Tensor, stacked: list[Tensor]) -> bool:
    try:
        values = _in_one(at, t, sol)
    except (RuntimeError, ValueError, IndexError):
        return False
    tolerance = 64 * torch.finfo(sol.dtype).eps
    return all(
        bool(((a - b).detach().abs().max() <= tolerance * (1 + b.detach().abs().max())).item())
        for a, b in zip(values, stacked, strict=True)
    )
