"""Ready potentials V(z, target) >= 0 of the Lyapunov loss: one value a sample, ``[batch]``."""

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import checks

__all__ = ["CrossEntropy", "SquaredDistance", "TruncatedCrossEntropy"]


class CrossEntropy(nn.Module):
    """V(z, y) = cross entropy of the logits, eq. (15).

    Args:
        head: makes logits ``[batch, classes]`` of the state; its parameters are trained with the rest. None: the state
            itself, flattened, holds them.
        classes: how many of the state's first entries are logits, where there is no head. None is all of them.

    Example:
        >>> CrossEntropy(classes=2)(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))
        tensor([0.6931, 0.6931, 0.6931, 0.6931])
    """

    def __init__(self, head: nn.Module | None = None, *, classes: int | None = None):
        super().__init__()
        if head is not None and classes is not None:
            raise ValueError(f"classes={classes} picks logits out of the state, but a head was given; give one of them")
        self.head, self.classes = head, classes

    def logits(self, z: Tensor) -> Tensor:
        """Returns the logits ``[batch, classes]`` at the states ``z``, ``[batch, ...]``."""
        return self.head(z) if self.head is not None else z.flatten(1)[:, : self.classes]

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Returns V ``[batch]`` at states ``[batch, ...]`` for the labels ``y``, ``[batch]`` of integers."""
        if y.is_floating_point():
            raise TypeError(f"cross entropy needs integer labels; got {y.dtype}: pass y.long()")
        return nn.functional.cross_entropy(self.logits(z), y.long(), reduction="none")


class TruncatedCrossEntropy(CrossEntropy):
    """V(z, y) = max(0, cross entropy - floor): the truncated form below eq. (15).

    With ``floor=0``, as printed, nothing is cut, since cross entropy is positive. With a floor below the loss that is
    asked for, samples that are good enough have V = 0 and ask nothing more of the field.

    Args:
        head, classes: those of :class:`CrossEntropy`.
        floor: the cross entropy of one sample below which V is 0.

    Example:
        >>> TruncatedCrossEntropy(classes=2, floor=0.01)(torch.tensor([[9.0, 0.0]]), torch.tensor([0]))
        tensor([0.])
    """

    def __init__(self, head: nn.Module | None = None, *, classes: int | None = None, floor: float = 0.0):
        super().__init__(head, classes=classes)
        self.floor = checks.number(floor, "floor", least=0)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Returns V ``[batch]``; see :class:`CrossEntropy`."""
        return torch.relu(super().forward(z, y) - self.floor)


class SquaredDistance(nn.Module):
    """V(z, target) = the squared Euclidean distance of the head's output (or the state) to a target.

    Args:
        head: maps the state to where targets live; None is the identity.

    Example:
        >>> SquaredDistance()(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([3., 3.])
    """

    def __init__(self, head: nn.Module | None = None):
        super().__init__()
        self.head = head

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Returns V ``[batch]`` at states ``[batch, ...]`` and targets of the output's shape."""
        output = z if self.head is None else self.head(z)
        if output.shape != target.shape:  # broadcasting would compare every sample with every target
            raise ValueError(
                f"the target has the shape {tuple(target.shape)}, the state's output {tuple(output.shape)}"
            )
        return (output - target).square().reshape(output.shape[0], -1).sum(1)
