"""The proof of a depth: the model meets its loss on every batch, and is its own ODE, within so many evaluations.

A small loss proves nothing by itself: a few large steps may be a discrete network that has little to do with its field.
The loss is therefore measured twice, at the steps taken and with the ODE solved exactly, and the solver error with it.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import (
    Call,
    LastSolve,
    LearnableSpan,
    as_returned,
    evaluating,
    exact_solves,
    last_solve,
    named_spans,
    reference_end,
    reference_states,
    relative_error,
    replaced_solves,
    require_spans,
    undisturbed,
)
from torchdyn_mintime.numerics import IntegrationError

__all__ = ["NEAR", "Look", "Verification", "refuse_times_beyond", "verify"]

SHARE = 1e-4
"""The absolute tolerance of the exact solves is this share of ``solver_tol``, relative to the displacement. A field with
kinks, as one with ReLU, takes several times the evaluations at 1e-7."""
LOOSEST = 1e-5
"""Of that share of ``solver_tol``, at most."""
NEAR = 1e-6
"""Times that differ by this share of their size and interval are the same: they may be computed in float32."""
UNSURE = 10.0
"""The end of an exact solve is known to this many times its tolerance; so much is added to the solver error that is judged."""

Look = Callable[[], Any]
"""Calls the model on one batch; returns the loss, or (loss, predictions ``[batch]``) where the model predicts classes."""


@dataclass(frozen=True)
class Verification:
    """The figures of a model on its worst batch, held against their bounds. A solve that failed makes a figure infinite.

    Attributes:
        passed: whether all bounds hold.
        loss: at the steps taken.
        solver_error: relative to the displacement, the largest of the spans.
        reference_loss: the loss with the ODE solved exactly.
        changed: the share of predictions that change when solved exactly, of all batches; None where there are none.
        missed: the bound that does not hold, as in :class:`Trial`; empty if all hold.
    """

    passed: bool
    loss: float
    solver_error: float = math.inf
    reference_loss: float = math.inf
    changed: float | None = None
    missed: str = ""


@torch.no_grad()
def verify(
    model: nn.Module,
    looks: Iterable[Look],
    *,
    target: float | None,
    solver_tol: float,
    evaluations: float = math.inf,
    accept: Callable[[], bool] | None = None,
    reduce: Callable[[float], float] = float,
) -> Verification:
    """Measures a model in eval mode against its bounds, batch by batch, until one is not met.

    Args:
        model: a LearnableSpan, or a module that holds some.
        looks: one for each batch.
        target: the most that the loss may be, with the steps taken and with the ODE solved exactly. None: no limit.
        solver_tol: of the solver error (see :func:`torchdyn_mintime.diagnostics.solver_error`).
        evaluations: the most evaluations of the field in each look, of all spans together.
        accept: one more condition, asked last.
        reduce: takes the mean of a number over the processes if several run, so that all find the same.

    Raises:
        ValueError: ``model`` has no LearnableSpan.
        Exception: that of a look or ``accept``; the other processes raise a RuntimeError.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Tanh(), solver="rk4"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> x = torch.tensor([[0.1, 0.2]])
        >>> verify(span, [lambda: span(x)[1][-1].square().mean()], target=1.0, solver_tol=0.01, evaluations=4).passed
        True
    """
    found = require_spans(model)
    worst = Verification(True, -math.inf, 0.0, -math.inf)
    share = min(SHARE * solver_tol, LOOSEST)
    bound = math.inf if target is None else target
    changes = samples = 0
    with evaluating(model), undisturbed(model):
        for look in looks:
            one, predicted, exactly = _look(model, found, look, bound, solver_tol, evaluations, reduce, share)
            worst = Verification(
                one.passed,
                max(worst.loss, one.loss),
                max(worst.solver_error, one.solver_error),
                max(worst.reference_loss, one.reference_loss),
                missed=one.missed,
            )
            if predicted is not None and exactly is not None:
                changes += int((predicted != exactly).sum())
                samples += predicted.numel()
            if not one.passed:
                return worst
        passed = accept is None or _agreed(reduce, accept)[0] == 1.0
    changed = reduce(changes / samples) if samples else None
    missed = "" if passed else "accept"
    return Verification(passed, worst.loss, worst.solver_error, worst.reference_loss, changed, missed)


def _look(
    model: nn.Module,
    found: list[LearnableSpan],
    look: Look,
    target: float,
    solver_tol: float,
    evaluations: float,
    reduce: Callable[[float], float],
    share: float,
) -> tuple[Verification, Tensor | None, Tensor | None]:
    """Returns the figures of one batch, and what the model predicts as it is and solved exactly."""
    solved: list[tuple[LearnableSpan, LastSolve]] = []
    asked: list[tuple[float, float] | None] = []  # the ends of dense times that were passed
    begun: tuple[Tensor, Tensor] | None = None  # what the first call returned, if its last state is the one at t_f
    first: tuple[Tensor, Tensor, Tensor] | None = None  # that call solved exactly, which is looked at once more

    def watching(span: LearnableSpan, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        nonlocal begun
        out = call()
        last = last_solve(span)
        if not solved and last.reaches_end and call.plan.rows is None:
            begun = out
        solved.append((span, last))
        asked.append(call.plan.passed if call.plan.dense else None)
        return out

    def errors() -> float:
        nonlocal first
        found = [0.0]
        for i, (span, last) in enumerate(solved):
            span.last = last
            if i == 0 and begun is not None:
                t_eval, sol = begun
                states = reference_states(span, t_eval, share=share)
                first, exact = (last.x, t_eval, as_returned(span, states, sol)), states[-1]
            else:
                exact = reference_end(span, share=share)
            found.append(relative_error(span, exact=exact))
        return max(found)

    def count() -> int:  # a span that is called twice has the depth of one call
        return sum(max(last.bound.nfe for owner, last in solved if owner is span) for span in {s for s, _ in solved})

    def few_enough() -> bool:
        if count() <= evaluations:
            return True
        names = {span: name for name, span in named_spans(model)}
        for (span, _), passed in zip(solved, asked, strict=True):
            if passed is not None:
                refuse_times_beyond(names[span], passed, (span.nodes[0], span.nodes[-1]))
        return False

    with replaced_solves(found, watching):
        loss, predicted = _agreed(reduce, look)
    if not (loss <= target and loss < math.inf):  # without a target, too
        return Verification(False, loss, missed="loss" if loss < math.inf else "solve"), None, None
    few = _agreed(reduce, few_enough)[0] == 1.0
    error, _ = _agreed(reduce, errors)
    if not (few and error + UNSURE * share <= solver_tol):
        return Verification(False, loss, error, missed="solver error" if few else "evaluations"), None, None
    with exact_solves(model, share=share, first=first):
        reference, exactly = _agreed(reduce, look)
    within = reference <= target and reference < math.inf
    missed = "" if within else "exact loss" if reference < math.inf else "solve"
    return Verification(within, loss, error, reference, missed=missed), predicted, exactly


def refuse_times_beyond(name: str, asked: tuple[float, float], own: tuple[float, float]) -> None:
    """Raises a ValueError where dense times reach beyond the interval of a span: more steps than it has lead to them.

    Args:
        name: of the span in its model; empty for the model itself.
        asked: the earliest and the latest of the times.
        own: the interval.
    """
    near = NEAR * (max(map(abs, own)) + own[1] - own[0])
    if asked[0] < own[0] - near or asked[1] > own[1] + near:
        raise ValueError(
            f"the model asks {name or 'the span'} by dense=True for times from {asked[0]:.6g} to {asked[1]:.6g}, beyond its "
            f"interval [{own[0]:.6g}, {own[1]:.6g}], over which a search lays the steps; ask for times in it, or set "
            "`span.t_span` to a template of all of them"
        )


def _agreed(reduce: Callable[[float], float], figure: Callable[[], Any]) -> tuple[float, Tensor | None]:
    """Returns the mean of a figure over the processes, which must decide the same; infinite where a solve failed."""
    value, predicted, broken = math.inf, None, None
    try:
        found = figure()
        found, predicted = found if isinstance(found, tuple) else (found, None)
        value = float(found)
    except IntegrationError:
        pass
    except Exception as other:  # the other processes wait for this one's word
        broken = other
    if reduce(float(broken is None)) < 1.0:
        raise broken or RuntimeError("the look at the model failed in another process; see its own error")
    value = reduce(value)
    return (math.inf if math.isnan(value) else value), predicted
