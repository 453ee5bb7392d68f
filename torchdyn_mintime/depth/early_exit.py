"""Depth per input: each sample leaves the solve once its own criterion holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    STATEFUL,
    Call,
    LearnableSpan,
    check_end_alone,
    checks,
    ending,
    model_output,
    only_span,
    replaced_solves,
    rest_of,
    undisturbed,
    untraced,
)
from torchdyn_mintime.depth.rows import RowsOf
from torchdyn_mintime.numerics import Grid, integrate

__all__ = ["EarlyExit", "early_exit"]


@dataclass(frozen=True)
class EarlyExit:
    """The outputs of :func:`early_exit`, and when each sample left.

    Attributes:
        output: what the model returned for each sample at its exit, ``[batch, ...]``; of a span itself z there.
        times: ``[batch]``, when each sample left, in units of time.
        nfe: ``[batch]``, evaluations of the field for each sample.
        met: ``[batch]``, whether the criterion held; else the sample left at t_f.
    """

    output: Tensor
    times: Tensor
    nfe: Tensor
    met: Tensor

    @property
    def mean_nfe(self) -> float:
        """Evaluations of the field per sample, the mean over the batch."""
        return self.nfe.double().mean().item()


@torch.no_grad()
def early_exit(
    model: nn.Module,
    x: Tensor,
    criterion: Callable[[Any], Tensor],
    *,
    span: LearnableSpan | None = None,
    every: int = 1,
) -> EarlyExit:
    """Solves, at inference, until each sample's own criterion holds; the batch shrinks as samples leave.

    The criterion is asked at t0 and after every step, for the samples that are still there: the rest of the model is
    applied to their states. Data control, noise, labels and contexts follow the samples: tensors with a row for each sample, in
    ``args`` or as attributes and buffers of the field's modules. The solver must have fixed steps, which do not depend on the
    other samples. Layers that couple samples (batch statistics) or draw anew (dropout) must be in eval mode. The solve is
    the one that the model asks for: with its args, its own span and direction, up to the last time that it looks at.

    Args:
        model: a LearnableSpan, or a module that holds some, whose output is a tensor ``[batch, ...]``.
        x: what it is called with, ``[batch, ...]``.
        criterion: from the output (of a span itself, z(t)) to booleans ``[batch]``: True lets the sample leave. Such as
            ``lambda out: out.softmax(1).amax(1) > 0.99``.
        span: which one, if the model has several; the others are solved to their ends.
        every: steps between two looks at the criterion, where the rest of the model is expensive.

    Raises:
        ValueError: the solver is adaptive, a layer couples samples, the model uses more of the trajectory than its last
            state, or the criterion returns another shape.
        TypeError: the model's output is not a tensor.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 3, 31))
        Your vector field ...
        >>> found = early_exit(span, torch.tensor([[0.5], [1.0], [2.0]]), lambda z: z.norm(dim=1) < 0.9)
        >>> [round(t, 2) for t in found.times.tolist()], found.nfe.tolist()
        ([0.0, 0.2, 0.8], [0, 8, 32])
    """
    chosen = only_span(model, span)
    _check(model, chosen, x, every)
    with undisturbed(model):
        call, output = _start(model, chosen, x)
        start = call.x
        bound = chosen.field.bind(start, call.args)
        for module, name, value in bound.captured:
            if isinstance(value, Tensor) and value.dim() == 0:
                raise ValueError(f"{type(module).__name__}.{name} has no batch dimension to follow the samples")
        grid = call.grid()
        # The model sees no state after the last one that it asks for.
        last, forwards = grid.returned[-1], grid.nodes[-1] > grid.nodes[0]
        nodes = [*(t for t in grid.nodes if (t < last if forwards else t > last)), last]
        times = torch.full((len(x),), float(nodes[0]), dtype=torch.float64, device=x.device)
        nfe = torch.zeros(len(x), dtype=torch.long, device=x.device)
        met = _holds(criterion, output, len(x))
        active = torch.nonzero(~met).squeeze(1)
        state = start[active]
        with untraced(bound):
            rows = RowsOf(bound, start, (nodes[0], nodes[-1]))
            for i in range(len(nodes) - 1):
                if not len(active):
                    break
                before = bound.nfe
                with rows.of(active):
                    state = integrate(bound.function, state, Grid(nodes[i : i + 2]), chosen.stepper).states[-1]
                nfe[active] += bound.nfe - before
                times[active] = nodes[i + 1]
                if (i + 1) % every and i + 2 < len(nodes):
                    continue
                now = rest_of(model, chosen, state, x[active])
                output[active] = now
                leaving = _holds(criterion, now, len(active))
                met[active] = leaving
                active, state = active[~leaving], state[~leaving]
    return EarlyExit(output, times, nfe, met)


def _start(model: nn.Module, span: LearnableSpan, x: Tensor) -> tuple[Call, Tensor]:
    """Returns the call of the span that the model would make, and the model's output with its ODE skipped."""
    seen: list[Call] = []

    def skip(span: LearnableSpan, z: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        seen.append(call)
        return ending(call, z)

    check_end_alone(model, span, x)
    with replaced_solves([span], skip):
        output = model_output(model, x)
    if not isinstance(output, Tensor) or len(output) != len(x) or len(seen[0].x) != len(x):
        raise TypeError(f"early exit needs an output of one tensor, [batch, ...]; got {type(output).__name__}")
    return seen[0], output.clone()


def _holds(criterion: Callable[[Any], Tensor], output: Tensor, size: int) -> Tensor:
    held = criterion(output)
    if not isinstance(held, Tensor) or held.shape != (size,) or held.dtype != torch.bool:
        shown = f"{tuple(held.shape)} {held.dtype}" if isinstance(held, Tensor) else type(held).__name__
        raise ValueError(f"the criterion must return booleans [{size}], one for each sample; got {shown}")
    return held.clone()


def _check(model: nn.Module, span: LearnableSpan, x: Tensor, every: int) -> None:
    if span.adaptive:
        raise ValueError(
            f"{span.stepper.name} chooses its steps for the whole batch at once, so that samples cannot leave by "
            "themselves; use a fixed-step solver such as 'rk4'"
        )
    checks.count(every, "every", 1)
    if x.dim() < 1 or not len(x):
        raise ValueError(f"x must be a batch [batch, ...]; got the shape {tuple(x.shape)}")
    if coupled := sorted({type(m).__name__ for m in model.modules() if isinstance(m, STATEFUL) and m.training}):
        raise ValueError(
            f"{', '.join(coupled)} in training mode couples samples or draws anew; call model.eval() first"
        )
