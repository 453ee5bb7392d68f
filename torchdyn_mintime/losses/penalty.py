"""The base of the penalties that look at the last forward of every span of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import (
    BoundField,
    LastSolve,
    LearnableSpan,
    checks,
    last_solve,
    require_spans,
    spans,
    untraced,
)

__all__ = ["Penalty"]


class Penalty:
    """A weighted penalty on the last forward of every span of a model, added up.

    A subclass writes :meth:`of_span`, and evaluates the field inside :meth:`beside`.

    Args:
        model: a LearnableSpan, or a module that holds some.
        weight: of the penalty, in units of loss.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Raises:
        TypeError: ``model`` is not a module, or ``weight`` is not a number.
        ValueError: ``model`` has no LearnableSpan, or ``weight`` is negative or not finite.

    Example:
        >>> class EndSize(Penalty):
        ...     def of_span(self, span, last):
        ...         return last.states[-1].square().mean()
        >>> span = LearnableSpan(NeuralODE(lambda t, z: 0 * z, solver="rk4"), torch.linspace(0, 1, 3))
        Your vector field ...
        >>> penalty = EndSize(span, weight=0.5)
        >>> t_eval, sol = span(torch.ones(4, 2))
        >>> penalty, penalty.penalty().item()
        (EndSize(weight=0.5), 0.5)
    """

    takes_bare = False
    """Whether ``model`` may be a bare NeuralODE, without any span."""

    def __init__(self, model: nn.Module, weight: float = 1.0):
        if not (self.takes_bare and isinstance(model, NeuralODE)):
            require_spans(model)
        self.model, self.weight = model, checks.number(weight, "weight", least=0)
        self.nfe = 0

    def penalty(self) -> Tensor:
        """Returns the weighted penalty of the last forward, a scalar.

        Raises:
            RuntimeError: no forward was made.
        """
        self.nfe = 0
        values = [self.of_span(span, last_solve(span)) for span in spans(self.model)]
        return self.weight * torch.stack([v.to(values[0]) for v in values]).sum()

    def of_span(self, span: LearnableSpan, last: LastSolve) -> Tensor:
        """Returns the penalty of one span, a scalar without the weight."""
        raise NotImplementedError

    @contextmanager
    def beside(self, bound: BoundField) -> Iterator[None]:
        """Counts evaluations of the field inside in :attr:`nfe`; they leave no other trace. Dropout is off."""
        with untraced(bound):
            before = bound.nfe
            yield
            self.nfe += bound.nfe - before

    def __repr__(self) -> str:
        options = {k: v for k, v in vars(self).items() if isinstance(v, int | float) and k[0] != "_" and k != "nfe"}
        shown = (f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items())
        return f"{type(self).__name__}({', '.join(shown)})"
