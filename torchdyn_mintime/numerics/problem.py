"""What a solve with a gradient of its own needs to know."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.numerics.steppers import Stepper

__all__ = ["Problem"]

VectorField = Callable[[Any, Tensor], Tensor]


@dataclass
class Problem:
    """A field, its parameters and a method.

    Attributes:
        f: the field. It must give the same again when it is evaluated again.
        module: the module that holds the parameters which f uses, by the names in ``parameters``.
        parameters: those that require a gradient.
        stepper, atol, rtol, interpolator: of the solve (see :func:`integrate`).
        restored: a context in which the field is as it was in the forward solve (data control, noise).
    """

    f: VectorField
    module: nn.Module
    parameters: dict[str, Tensor]
    stepper: Stepper
    atol: float
    rtol: float
    interpolator: Callable | None = None
    restored: Callable[[], AbstractContextManager] = nullcontext


def autocast_state(device: str) -> tuple[str, bool, torch.dtype]:
    """Returns what :func:`autocast` needs to evaluate in backward as in forward."""
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@contextmanager
def autocast(device: str, enabled: bool, dtype: torch.dtype) -> Iterator[None]:
    """Sets mixed precision as it was in the forward solve."""
    # Without the cache: a cast that was made without gradient would be taken where one is asked for (torch 2.9).
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield
