"""A trained model made shallow: the search, from a copy of it."""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import (
    as_batches,
    evaluate_without_ode,
    evaluating,
    has_bare,
    mean_loss,
    of_output,
    undisturbed,
    with_note,
    wrap,
)
from torchdyn_mintime.depth.shallowest import Shallowest
from torchdyn_mintime.depth.trials import Verdict

__all__ = ["compress"]


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., Tensor],
    *,
    slack: float = 0.02,
    target: float | None = None,
    solver_tol: float = 0.1,
    lr: float = 0.003,
    held_out: Iterable[Any] | None = None,
    accept: Callable[[nn.Module], bool] | None = None,
    max_iterations: int = 20_000,
    progress: bool = True,
    **options: Any,
) -> tuple[nn.Module, Verdict]:
    """Returns a copy of a trained model that takes fewer evaluations of its fields. The model itself stays as it is.

    The copy is wrapped if the model is not. :class:`~torchdyn_mintime.Shallowest` trains the copy further: with four steps of
    rk4 until it is a true model at the target, and then with fewer and fewer evaluations. An adaptive solver stays, and takes
    fewer steps, unless ``solvers`` are named.

    Args:
        model: a NeuralODE, a LearnableSpan, or a module that holds some.
        batches: batches of ``x`` or ``(x, *target)``, used many times.
        loss: ``loss(output, *target)``, the mean over a batch. If the model is a NeuralODE itself, the output is z(t_f).
        slack: how much the loss may rise, as a share of what the ODE does for it: the loss with the ODE skipped, less the
            model's own loss, each on its worst batch, those of ``held_out`` included.
        target: the most that the loss may be on every batch; it replaces ``slack``.
        solver_tol, options: those of Shallowest (``budget``, ``solvers``).
        lr: learning rate of Adam; low, since the model is trained already.
        accept: one more condition on the copy, such as an accuracy: ``accept(copy)`` returns a bool. It is called when all
            other conditions are met, in eval mode and without gradients.
        held_out, max_iterations, progress: those of :meth:`Shallowest.fit`.

    Returns:
        The copy, and the verdict. Where nothing was found, the copy has the steps of the model as it was.

    Raises:
        TypeError, ValueError: an argument that cannot be used.

    Example:
        >>> import torch
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(nn.Linear(2, 2), solver="rk4")  # doctest: +ELLIPSIS
        Your vector field ...
        >>> x = torch.randn(16, 2)
        >>> shallow, verdict = compress(node, [x], lambda z: z.square().mean(), target=10.0, progress=False)
        >>> verdict.feasible, verdict.best.evaluations <= 4
        (True, True)
    """
    if accept is not None and not callable(accept):
        raise TypeError(f"accept must be a function of the copy; got {accept!r}")
    loss = with_note(loss, "compress calls loss(output, *target), where (x, *target) is an element of batches")
    prepared = as_batches(batches)
    unseen = [] if held_out is None else as_batches(held_out)
    made = copied(model)
    made = wrap(made) if has_bare(made) else made
    if target is None:
        every = [*prepared, *unseen]
        with evaluating(made), undisturbed(made):
            own = max(mean_loss(made, [batch], loss)[0] for batch in every)
        skipped = max(evaluate_without_ode(made, [batch], loss)[0] for batch in every)
        target = own + slack * (skipped - own if skipped > own else abs(own))

    def criterion(out: Any, batch: tuple) -> Tensor:
        return loss(of_output(made, out), *batch[1:])

    condition = None if accept is None else functools.partial(accept, made)
    search = Shallowest(target, slack, solver_tol, accept=condition, **options)
    verdict = search.fit(
        made, criterion, prepared, lr=lr, held_out=unseen, max_iterations=max_iterations, progress=progress
    )
    return made, verdict


def copied(model: nn.Module) -> nn.Module:
    """Returns a copy; torchdyn's nodes keep a tensor with a graph, which cannot be copied."""
    nodes = [module for module in model.modules() if isinstance(module, NeuralODE) and "vf_params" in vars(module)]
    held = [node.vf_params for node in nodes]
    try:
        for node in nodes:
            node.vf_params = node.vf_params.detach()
        return copy.deepcopy(model)
    finally:
        for node, parameters in zip(nodes, held, strict=True):
            node.vf_params = parameters
