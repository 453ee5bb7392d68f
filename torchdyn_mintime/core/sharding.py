"""Sharded training: every rank holds a part of the weights, and the times of spans whole."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from torchdyn_mintime.core.wrapping import require_spans, times_of

__all__ = ["replicate_times"]


def replicate_times(model: nn.Module) -> set[nn.Parameter]:
    """Keeps the times of spans out of sharding: returns them, and averages their gradients over the ranks from now on.

    A time is one number, which cannot be shared out. Every rank needs it whole, and the same. The average is taken in each
    backward, over all processes, as ``DistributedDataParallel`` takes it; in a single process nothing changes. Every rank's
    loss must depend on the same times, or the others wait for it.

    Args:
        model: a LearnableSpan, or a module that holds some, before it is sharded.

    Returns:
        The times, for ``ignored_params`` of ``fully_shard`` or ``ignored_states`` of ``FullyShardedDataParallel``.

    Raises:
        ValueError: ``model`` has no LearnableSpan.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> from torchdyn_mintime import LearnableSpan
        >>> span = LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> replicate_times(span) == {span.t_f}  # fully_shard(span, ignored_params=replicate_times(span))
        True
    """
    times: set[Any] = set(times_of(require_spans(model)))
    for time in times:
        if not getattr(time, "is_averaged", False):
            frozen = not time.requires_grad
            time.requires_grad_().register_post_accumulate_grad_hook(_average)  # torch takes none for a frozen one
            time.requires_grad_(not frozen)
            time.is_averaged = True
    return times


def _average(time: Tensor) -> None:
    # A gradient that is accumulated has the average of the earlier backwards, which averaging does not change.
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        assert time.grad is not None
        dist.all_reduce(time.grad)
        time.grad /= dist.get_world_size()
