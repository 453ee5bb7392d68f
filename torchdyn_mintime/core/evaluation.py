"""The loss of a model over batches: as it is, solved exactly, and with its ODE skipped.

Convention for all that take ``model``, ``batches`` and ``loss``: a batch is ``x`` or ``(x, *target)``; the loss is
called as ``loss(output, *target)`` and returns the mean over the batch. ``output`` is what the model returns; where the
model is a span itself, which returns times and states, it is z(t_f) alone.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.field import random_kept
from torchdyn_mintime.core.reference import TOLERANCE, ending, exact_solves, replaced_solves
from torchdyn_mintime.core.span import Call, LearnableSpan
from torchdyn_mintime.core.untraced import evaluating, undisturbed
from torchdyn_mintime.core.wrapping import require_spans

__all__ = [
    "Loss",
    "as_batches",
    "as_number",
    "check_end_alone",
    "evaluate_with_reference",
    "evaluate_without_ode",
    "looks_between",
    "mean_loss",
    "model_output",
    "of_output",
    "rest_of",
    "with_note",
]

Loss = Callable[..., Tensor | float]


def as_batches(batches: Any) -> list[tuple[Tensor, ...]]:
    """Returns the batches as a list of ``(x, *target)``, since most figures pass over them more than once.

    Raises:
        ValueError: there is none.
        TypeError: one of them does not begin with a tensor, or ``batches`` is a tensor itself, or a tuple of tensors.
    """
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be a list, or a loader, of x or (x, *target); got {type(batches).__name__}: pass [x] for one"
        )
    if isinstance(batches, tuple) and len(batches) > 1 and all(isinstance(part, Tensor) for part in batches):
        raise TypeError(
            f"batches must be a list, or a loader, of x or (x, *target); got a tuple of {len(batches)} tensors: "
            "pass [(x, y)] for one batch, or a list of tensors for several batches of x alone"
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


def with_note(loss: Callable[..., Any], note: str) -> Callable[..., Any]:
    """Returns the loss with a note on its errors, unless they have one: they are often about arguments in another order."""

    @functools.wraps(loss)
    def noted(*args: Any) -> Any:
        try:
            return loss(*args)
        except Exception as error:
            if not getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    return noted


def model_output(model: nn.Module, x: Tensor) -> Any:
    """Returns what the loss is given for ``x``: the model's output, or z(t_f) where the model is a span itself."""
    return of_output(model, model(x))


def of_output(model: nn.Module, out: Any) -> Any:
    """Returns what the loss is given for an output of ``model``: that, or z(t_f) where the model is a span itself."""
    if isinstance(model, LearnableSpan):
        return (out[1] if isinstance(out, tuple) else out)[-1]
    return out


def rest_of(model: nn.Module, span: LearnableSpan, state: Tensor, x: Tensor) -> Any:
    """Returns what the rest of ``model`` makes of ``state`` at the end of the span, for the input ``x``."""
    if model is span:
        return state
    with replaced_solves([span], lambda span, z, call: ending(call, state)):
        return model_output(model, x)


def looks_between(model: nn.Module, look: Callable[[], Any]) -> bool:
    """Returns whether ``look``, which calls ``model``, uses states of a span between its ends that change with its steps.

    Those that are asked for with ``dense=True`` do not: they are at the same times whatever the steps are. Nothing is changed,
    and no random number is drawn.
    """

    def spoiled(
        span: LearnableSpan, x: Tensor, call: Call, others: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        t_eval, sol = call()
        if not call.plan.dense:
            times, first, last = t_eval.double(), call.grid().nodes[0], call.grid().nodes[-1]
            near = 1e-6 * max(abs(first), abs(last))
            between = ((times - first).abs() > near) & ((times - last).abs() > near)
            sol = torch.where(between.reshape(-1, *[1] * (sol.dim() - 1)), others(sol), sol)
        return t_eval, sol

    def loss() -> Tensor:
        with random_kept(found[0].t_f):  # every look draws the same
            value = look()
        return torch.as_tensor(value[0] if isinstance(value, tuple) else value).double()

    def changes(others: Callable[[Tensor], Tensor]) -> bool:
        with replaced_solves(found, functools.partial(spoiled, others=others)):
            value = loss()
        return not torch.allclose(value, plain, rtol=1e-5, atol=0.0)  # a NaN is close to nothing

    found = require_spans(model)
    with torch.no_grad(), evaluating(model), undisturbed(model):
        try:
            plain = loss()
        except Exception:  # what is wrong shows in the training
            return False
        if not bool(plain.isfinite().all()):
            return False
        # A loss may leave out what is NaN, and a model may refuse it although it does not use it: numbers have the last word.
        with contextlib.suppress(Exception):
            if changes(lambda sol: torch.full_like(sol, math.nan)):
                return True
        try:
            looks = changes(_elsewhere)
        except Exception:  # such as of a solve that begins with such a state
            return True
        # A loss that draws random numbers of its own is another one at every look.
        return looks and not changes(torch.Tensor.clone)


def _elsewhere(sol: Tensor) -> Tensor:
    """Returns other states of the same size, each entry moved by another amount."""
    moves = torch.arange(1, sol.numel() + 1, dtype=torch.float64).cos().reshape(sol.shape)
    return sol + (1.0 + sol.abs().mean()) * moves.to(sol)


def check_end_alone(model: nn.Module, span: LearnableSpan, x: Tensor) -> None:
    """Raises where the end of one solve of ``span`` is not all that the rest of ``model`` sees of it.

    Figures that put another state in the place of that end (:func:`rest_of`) would be of another model then.

    Raises:
        ValueError: the model calls the span not once, or uses more of its trajectory than the last state.
    """
    if model is span:
        return
    seen: list[Tensor] = []

    def spoiled(span: LearnableSpan, z: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        t_eval, sol = ending(call, z)
        seen.append(z)
        return t_eval, torch.cat([torch.full_like(sol[:-1], math.nan), sol[-1:]])

    with torch.no_grad():
        with replaced_solves([span], spoiled):
            out = model_output(model, x)
        calls = len(seen)
        if calls != 1:
            raise ValueError(
                f"the model calls the span {calls} times for one input; this figure is of exactly one call"
            )
        plain = rest_of(model, span, seen[0], x)
    pairs = zip(_tensors(out), _tensors(plain), strict=True)
    if any(not torch.equal(a.isnan(), b.isnan()) for a, b in pairs):
        raise ValueError(
            "the model uses more of the span's trajectory than its last state, and this figure puts another state in the "
            "place of that one alone; take a model whose output depends on sol[-1]"
        )


def _tensors(value: Any) -> list[Tensor]:
    """Returns the tensors of floating point in what a model returned."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def mean_loss(
    model: nn.Module, batches: Iterable[tuple[Tensor, ...]], loss: Loss, others: Sequence[Loss] = ()
) -> list[float]:
    """Returns the mean of ``loss``, and of further functions of the same arguments, over all entries of the batches."""
    totals, count = [0.0] * (1 + len(others)), 0
    with torch.no_grad():
        for x, *target in batches:
            output = model_output(model, x)
            for i, function in enumerate((loss, *others)):
                value = function(output, *target)
                totals[i] += as_number(value, "the loss" if i == 0 else "accuracy") * len(x)
            count += len(x)
    return [total / count for total in totals]


def evaluate_with_reference(
    model: nn.Module, batches: Iterable[Any], loss: Loss, accuracy: Loss | None = None, tolerance: float = TOLERANCE
) -> tuple[float, float | None]:
    """Returns loss and accuracy with every span solved in float64 at ``tolerance`` instead of by its own solver.

    The model is called in eval mode, and with what it passes to its spans: args, times, direction. Every state that they
    return is that of the reference.

    Args:
        model: a LearnableSpan, or a module that holds some.
        batches: of ``x`` or ``(x, *target)``.
        loss, accuracy: ``function(output, *target)``, the mean over a batch; of a span itself the output is z(t_f).
        tolerance: absolute and relative, of the reference solve.

    Returns:
        (loss, accuracy), the latter None without a function for it.
    """
    with exact_solves(model, tolerance):
        return _evaluate(model, batches, loss, accuracy)


def evaluate_without_ode(
    model: nn.Module, batches: Iterable[Any], loss: Loss, accuracy: Loss | None = None
) -> tuple[float, float | None]:
    """Returns loss and accuracy with every ODE skipped, z(t_f) = z(t0): what the rest of the model does by itself.

    Arguments and result are those of :func:`evaluate_with_reference`.
    """
    with replaced_solves(require_spans(model), lambda span, x, call: ending(call, x)):
        return _evaluate(model, batches, loss, accuracy)


def _evaluate(
    model: nn.Module, batches: Iterable[Any], loss: Loss, accuracy: Loss | None
) -> tuple[float, float | None]:
    with evaluating(model), undisturbed(model):
        values = mean_loss(model, as_batches(batches), loss, () if accuracy is None else (accuracy,))
    return values[0], None if accuracy is None else values[1]


def as_number(value: Tensor | float, name: str) -> float:
    """Returns a scalar's value; a vector is a loss without a reduction, which would pass unseen otherwise."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be one number for a batch; got the shape {tuple(value.shape)}: take its mean")
    return checks.scalar(value, name)
