"""The loss of a model over batches, as it is, and with something else in the place of a span's solve.

Convention for all that take ``model``, ``batches`` and ``loss``: a batch is ``x`` or ``(x, *target)``; the loss is
called as ``loss(output, *target)`` and returns the mean over the batch. ``output`` is what the model returns; where the
model is a span itself, which returns times and states, it is z(t_f) alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime import checks
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import named_spans

__all__ = ["Loss", "as_batches", "mean_loss", "only_span", "outcome", "rest_of", "substituted"]

Loss = Callable[..., Tensor | float]


def as_batches(batches: Any) -> list[tuple[Tensor, ...]]:
    """The batches as a list of ``(x, *target)``, since most figures pass over them more than once.

    Raises:
        ValueError: there is none.
        TypeError: one of them does not begin with a tensor, or ``batches`` is a tensor itself.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list, or a loader, of x or (x, *target); got {type(batches).__name__}: pass [x] for one"
        )
    found = []
    for batch in batches:
        parts = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, Sequence) else None
        if not parts or not isinstance(parts[0], Tensor):
            raise TypeError(
                f"a batch is a tensor x, or (x, *target); got {type(batch).__name__}: pass [(x, y)] for one"
            )
        if parts[0].dim() < 1 or not len(parts[0]):
            raise ValueError(f"a batch must have rows, [batch, ...]; got x of the shape {tuple(parts[0].shape)}")
        found.append(parts)
    if not found:
        raise ValueError("batches is empty; give at least one (x, *target)")
    return found


def outcome(model: nn.Module, x: Tensor) -> Any:
    """What the loss is given for ``x``: the model's output, or z(t_f) where the model is a span itself."""
    out = model(x)
    if isinstance(model, LearnableSpan):
        return (out[1] if isinstance(out, tuple) else out)[-1]
    return out


def only_span(model: nn.Module, span: LearnableSpan | None = None) -> LearnableSpan:
    """The span to look at: ``span`` if given, else the only one of ``model``."""
    found = dict(named_spans(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no LearnableSpan; wrap it first, by torchdyn_mintime.wrap")
    if span is not None:
        if all(span is not s for s in found.values()):
            raise ValueError(f"the span given is not one of this {type(model).__name__}: {list(found)}")
        return span
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} LearnableSpans, {list(found)}: pass span=, one of them"
        )
    return next(iter(found.values()))


@contextmanager
def substituted(span: LearnableSpan, solve: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``solve``, from the initial state to z(t_f), in the place of the span's own. The rest of its model runs as ever.

    What the model sees of the trajectory is its last point alone.
    """

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor] | Tensor:
        end = solve(x)[None]
        return (span.t_f.detach().reshape(1), end) if span.node.return_t_eval else end

    span.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del span.forward


def rest_of(model: nn.Module, span: LearnableSpan, state: Tensor, x: Tensor) -> Any:
    """What the rest of ``model`` makes of ``state`` at the end of the span, for the input ``x``."""
    if model is span:
        return state
    with substituted(span, lambda _: state):
        return outcome(model, x)


def mean_loss(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], loss: Loss, others: Sequence[Loss] = ()
) -> list[float]:
    """The mean of ``loss``, and of further functions of the same arguments, over all entries of the batches."""
    totals, count = [0.0] * (1 + len(others)), 0
    with torch.no_grad():
        for x, *target in batches:
            output = outcome(model, x)
            for i, function in enumerate((loss, *others)):
                value = function(output, *target)
                totals[i] += as_number(value, "the loss" if i == 0 else "accuracy") * len(x)
            count += len(x)
    return [total / count for total in totals]


def as_number(value: Tensor | float, name: str) -> float:
    """A scalar's value; a vector is a loss without a reduction, which would pass unseen otherwise."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number for a batch; got the shape {tuple(value.shape)}: take its mean")
    return checks.scalar(value, name)
