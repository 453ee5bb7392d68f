"""A trained sampler made shallow: its field trained further, beside a learned solver, to reach the ends that it reaches now.

Pairs of states and their exact ends come from the sampler itself; no data is needed. A solver of a few evaluations is fitted
to the field as it is. From there the search of :class:`~torchdyn_mintime.depth.shallowest.Shallowest` trains a copy, with
fewer and fewer evaluations. The times stay.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import (
    Field,
    LearnableSpan,
    checks,
    freeze_times,
    of_output,
    reference_solution,
)
from torchdyn_mintime.depth.compress import copied
from torchdyn_mintime.depth.shallowest import Shallowest
from torchdyn_mintime.depth.solver_fit import (
    HELD_OUT,
    check_repeats,
    check_states,
    displacement,
    fit_solver,
    interval_of,
    log_density_column,
)
from torchdyn_mintime.depth.trials import Depth, Verdict
from torchdyn_mintime.numerics.step_control import rms

__all__ = ["compress_sampler"]

BATCH = 256
"""States in a batch of training, at most."""

FIRST = 8
"""Evaluations of the solver that is fitted first."""

FITTED = 1024
"""It is fitted to so many states, at most."""


def compress_sampler(
    model: NeuralODE | LearnableSpan,
    x0: Tensor,
    *,
    tol: float = 0.05,
    solver_tol: float = 0.1,
    lr: float = 0.001,
    args: Mapping[str, Any] | None = None,
    max_iterations: int = 20_000,
    progress: bool = True,
    **options: Any,
) -> tuple[LearnableSpan, Verdict]:
    """Returns a copy of a trained sampler that takes fewer evaluations of its field to the same ends. The model itself stays.

    :func:`~torchdyn_mintime.fit_solver` leaves the field as it is, and needs some seconds; here the field is trained too, for
    some minutes. Fewer evaluations are then often enough; at a small ``tol`` they may be more. A quarter of the states is held
    out, and each depth must pass on it.

    Args:
        model: a ``NeuralODE`` or a :class:`LearnableSpan`, whose field is trained. Its solver plays no part. The interval is
            that of a LearnableSpan, or the first and last time of a bare node's ``t_span`` ([0, 1] where it has none).
        x0: initial states ``[n, ...]`` as they will be in use, some thousands: the field is fitted to them.
        tol: how far the copy's ends may be from those of ``model``, as root of the mean square relative to the displacement.
        solver_tol, options: those of :class:`~torchdyn_mintime.Shallowest` (``budget``, ``solvers``, ``accept``).
        lr: learning rate of Adam.
        args: passed on to a field that takes ``args``; tensors in it belong to the rows of ``x0``. The copy is then called
            with ``args=`` too. Labels that a field keeps as attributes cannot be cut into batches.
        max_iterations, progress: those of :meth:`Shallowest.fit`.

    Returns:
        The copy, and the verdict, whose losses are those ``tol`` is about. The times of the copy are frozen. Where nothing was
        found, it is the model as it was.

    Raises:
        TypeError: ``model`` is neither, or ``x0`` is no tensor of floating-point numbers.
        ValueError: an argument that cannot be used, or a field that does not repeat (dropout in training mode).
        IntegrationError: the exact solve failed.

    Example:
        >>> node = NeuralODE(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> sampler, verdict = compress_sampler(node, torch.randn(256, 2), progress=False)
        >>> verdict.feasible, verdict.best.evaluations <= 4
        (True, True)
        >>> t_eval, sol = sampler(torch.randn(5, 2))
    """
    if not isinstance(model, NeuralODE | LearnableSpan):
        raise TypeError(
            f"compress_sampler takes a NeuralODE or a LearnableSpan; got {type(model).__name__}. For one inside a larger "
            "model, pass it alone, with the states that reach it; to keep a loss on data use compress"
        )
    tol, lr = checks.positive(tol, "tol"), checks.positive(lr, "lr")
    search = Shallowest(tol, solver_tol=solver_tol, **options)
    check_states(x0, None, 1)
    check_states(x0[len(x0) // HELD_OUT :], None, FIRST)
    if any(getattr(module, "noise_dist", None) is not None for module in model.vf.modules()):
        raise ValueError(
            "Hutchinson's trace draws new noise in every solve, so that a log-density has no end to learn; give the CNF the "
            "exact trace (autograd_trace), or use fit_solver, which holds the noise"
        )
    x0 = x0.detach()
    exact = _ends(model, x0, args)
    order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(0)).to(x0.device)
    kept = max(1, len(x0) // HELD_OUT)
    held, fitted = order[:kept], order[kept:]
    span = _copy(model, _pairs(x0, args, exact, fitted[:FITTED], FITTED)[0])
    scale = displacement(exact - x0, log_density_column(span.node))

    def off(out: Any, batch: Any) -> Tensor:
        return rms((of_output(span, out) - batch[1]) / scale)

    batches = _pairs(x0, args, exact, fitted)
    search.first = Depth(span.stepper.name, 1)
    verdict = search.fit(
        _Called(span),
        off,
        batches,
        lr=lr,
        held_out=_pairs(x0, args, exact, held),
        max_iterations=max_iterations,
        progress=progress,
    )
    if not verdict.feasible:  # its weights have moved all the same
        made = copied(model)
        span = made if isinstance(made, LearnableSpan) else LearnableSpan(made)
        freeze_times([span])
    for module, own in zip(span.vf.modules(), model.vf.modules(), strict=True):
        module.training = own.training
    return span, verdict


class _Called(nn.Module):
    """A span that is called with one batch of states and what its field takes beside them. Its mode stays as it is."""

    def __init__(self, span: LearnableSpan):
        super().__init__()
        self.span = span

    def forward(self, inputs: tuple[Tensor, Mapping[str, Any] | None]) -> Any:
        x, args = inputs
        return self.span(x, args=args or {})

    def train(self, mode: bool = True) -> "_Called":
        return self  # the ends that are learned are those of the field in eval mode


def _copy(model: NeuralODE | LearnableSpan, pair: "Pair") -> LearnableSpan:
    """Returns a copy in eval mode with a solver that is fitted to its field, and times that stay."""
    (x, args), exact = pair
    fit = fit_solver(copied(model), x, evaluations=FIRST, reference=exact, args=args, progress=False)
    fit.node.solver.requires_grad_(True)
    span = LearnableSpan(fit.node).to(x.device).eval()
    freeze_times([span])
    return span


Pair = tuple[tuple[Tensor, Mapping[str, Any] | None], Tensor]
"""((states, args), their exact ends)"""


def _pairs(x0: Tensor, args: Mapping[str, Any] | None, exact: Tensor, rows: Tensor, size: int = BATCH) -> list[Pair]:
    """Returns batches of some rows of the states, with what belongs to them in ``args``."""
    return [((x0[part], _own(args, x0, part)), exact[part]) for part in rows.split(size)]


def _own(args: Mapping[str, Any] | None, x0: Tensor, rows: Tensor) -> dict[str, Any] | None:
    """Returns ``args`` for some rows of the states: of a tensor with as many rows, these."""
    if args is None:
        return None
    of_rows = {k for k, v in args.items() if isinstance(v, Tensor) and v.dim() > 0 and len(v) == len(x0)}
    return {k: v[rows] if k in of_rows else v for k, v in args.items()}


@torch.no_grad()
def _ends(model: NeuralODE | LearnableSpan, x0: Tensor, args: Mapping[str, Any] | None) -> Tensor:
    """Returns the exact ends of the states."""
    node: Any = model.node if isinstance(model, LearnableSpan) else model
    field, times, ends = Field(node), interval_of(model), []
    for part in torch.arange(len(x0), device=x0.device).split(BATCH):
        x = x0[part]
        with field.beside(x, _own(args, x0, part)) as bound:
            check_repeats(bound, x, times[0])
            ends.append(reference_solution(bound, x, times)[-1].to(x.dtype))
    return torch.cat(ends)
