"""The learning rates of an optimizer, which are numbers or tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["rates_of", "set_rates"]


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    """Returns the learning rates of an optimizer's groups, as numbers."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Sets the learning rates of an optimizer's groups. One that is a tensor stays the tensor it is."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
