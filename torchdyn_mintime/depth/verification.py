"""The proof of a depth: the model meets its loss, and is its own ODE, within so many evaluations.

A small loss proves nothing by itself: a few large steps may be a discrete network that has little to do with its field.
The loss is therefore measured twice, at the steps taken and with the ODE solved exactly, and the solver error with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    LearnableSpan,
    evaluating,
    exact_solves,
    last_solve,
    relative_error,
    replaced_solves,
    require_spans,
)
from torchdyn_mintime.numerics import IntegrationError

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """The figures of a model against their bounds. A solve that failed makes a figure infinite.

    Attributes:
        passed: whether all bounds hold.
        loss: at the steps taken; 0 where nothing was given to measure it.
        solver_error: the largest of the spans; infinite where the loss was too high already.
        reference_loss: the loss with the ODE solved exactly; None where a cheaper figure was out of its bounds already.
    """

    passed: bool
    loss: float
    solver_error: float = math.inf
    reference_loss: float | None = None


@torch.no_grad()
def verify(
    model: nn.Module,
    measure: Callable[[], float | Tensor] | None = None,
    *,
    target: float,
    solver_tol: float,
    evaluations: float = math.inf,
    accept: Callable[[], bool] | None = None,
    reduce: Callable[[float], float] = float,
) -> Verification:
    """Measures a model in eval mode against its bounds, the cheap ones first, until one is not met.

    Args:
        model: a LearnableSpan, or a module that holds some.
        measure: calls the model and returns its loss. Default: every span solves its last initial state again, and no
            loss is held against the target.
        target: of the loss, at the steps taken and with the ODE solved exactly alike.
        solver_tol: of the solver error (see :func:`torchdyn_mintime.diagnostics.solver_error`) of the last solve.
        evaluations: of the field, at most, in each solve of ``measure``.
        accept: one more condition, asked last.
        reduce: takes the mean of a number over the processes, where several run; all then find the same.

    Raises:
        ValueError: ``model`` has no LearnableSpan.
        Exception: that of ``measure`` or ``accept``; the other processes raise a RuntimeError.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Tanh(), solver="rk4"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> x = torch.tensor([[0.1, 0.2]])
        >>> verify(span, lambda: span(x)[1][-1].square().mean(), target=1.0, solver_tol=0.01, evaluations=4).passed
        True
    """
    found = require_spans(model)
    agreed = partial(_agreed, reduce)
    counted: list[int] = []

    def counting(span: LearnableSpan, x: Tensor, own: Callable[[], Any]) -> Any:
        out = own()
        counted.append(span.nfe)
        return out

    def solve_again() -> float:
        for span in found:
            span(last_solve(span).x)
        return 0.0

    with evaluating(model):
        with replaced_solves(found, counting):
            loss = agreed(measure or solve_again)
        if not loss <= target:
            return Verification(False, loss)
        few = agreed(lambda: max(counted) <= evaluations) == 1.0
        error = agreed(lambda: max(relative_error(span) for span in found))
        if not (few and error <= solver_tol):
            return Verification(False, loss, error)
        reference = None
        if measure is not None:
            with exact_solves(model):
                reference = agreed(measure)
            if not reference <= target:
                return Verification(False, loss, error, reference)
        return Verification(accept is None or agreed(accept) == 1.0, loss, error, reference)


def _agreed(reduce: Callable[[float], float], figure: Callable[[], Any]) -> float:
    """Returns the mean of a figure over the processes, which must decide the same; infinite where a solve failed."""
    value, broken = math.inf, None
    try:
        value = float(figure())
    except IntegrationError:
        pass
    except Exception as other:  # the other processes wait for this one's word
        broken = other
    if reduce(float(broken is None)) < 1.0:
        raise broken or RuntimeError("the look at the model failed in another process; see its own error")
    return reduce(value)
