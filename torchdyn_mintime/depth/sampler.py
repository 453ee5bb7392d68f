"""A trained sampler made shallow: its field trained further, beside a learned solver, to reach the ends that it reaches now.

Pairs of states and their exact ends come from the sampler itself; no data is needed. Solvers of more and more evaluations are
fitted to the field as it is, until one meets the tolerance. From there the search of
:class:`~torchdyn_mintime.depth.shallowest.Shallowest` trains a copy, with fewer and fewer evaluations, each time from a solver
fitted to the field of that moment. The field is changed only where that saves evaluations. The times stay.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
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
    random_kept,
    reference_solution,
)
from torchdyn_mintime.depth.compress import copied
from torchdyn_mintime.depth.rows import RowsOf
from torchdyn_mintime.depth.shallowest import Shallowest
from torchdyn_mintime.depth.solver_fit import (
    HELD_OUT,
    SolverFit,
    check_repeats,
    check_states,
    displacement,
    fit_solver,
    interval_of,
    log_density_column,
)
from torchdyn_mintime.depth.trials import Depth, Trial, Verdict
from torchdyn_mintime.numerics import LearnableSolver
from torchdyn_mintime.numerics.step_control import rms

__all__ = ["compress_sampler"]

BATCH = 256
"""States in a batch of training, at most."""

FIRST = 8
"""Evaluations of the solvers that are fitted before the field is trained, at most."""

FITTED = 2048
"""Solvers are fitted to so many states, at most."""


@torch.inference_mode(False)  # it trains, whatever mode it is called in
@torch.enable_grad()
def compress_sampler(
    model: NeuralODE | LearnableSpan,
    x0: Tensor,
    *,
    tol: float = 0.05,
    solver_tol: float = 0.1,
    lr: float = 0.001,
    inverse: bool = False,
    args: Mapping[str, Any] | None = None,
    max_iterations: int = 20_000,
    progress: bool = True,
    **options: Any,
) -> tuple[LearnableSpan, Verdict]:
    """Returns a copy of a trained sampler that takes fewer evaluations of its field to the same ends. The model itself stays.

    :func:`~torchdyn_mintime.fit_solver` leaves the field as it is, and needs some seconds. It comes first here too; then the
    field is trained, for some minutes, and this is kept if it saves evaluations. A quarter of the states is held out: a fitted
    solver must meet ``tol`` on all of it, and a field that was trained on each batch of it.

    What belongs to the rows of ``x0`` goes with them: Hutchinson's noise, which is drawn once and held, tensors in ``args``,
    and labels or contexts as attributes or buffers of the field's modules (tensors with as many rows as ``x0``).

    Args:
        model: a ``NeuralODE`` or a :class:`LearnableSpan`, whose field is trained. Its solver plays no part. The interval is
            that of a LearnableSpan, or the first and last time of a bare node's ``t_span`` ([0, 1] where it has none), which
            must ascend: ``inverse=True`` is for solves down.
        x0: initial states ``[n, ...]`` as they will be in use, some thousands: the field is fitted to them.
        tol: how far the copy's ends may be from those of ``model``, as root of the mean square relative to the displacement.
        solver_tol, options: those of :class:`~torchdyn_mintime.Shallowest` (``budget``, ``solvers``, ``accept``).
        lr: learning rate of Adam.
        inverse: the states are those at the last time, and are carried to the first. Call the copy with that span, such as
            ``sampler(x, torch.tensor([1.0, 0.0]))``: it is trained for this direction alone.
        args: passed on to a field that takes ``args``. The copy is then called with ``args=`` too.
        max_iterations, progress: those of :meth:`Shallowest.fit`.

    Returns:
        The copy, and the verdict, whose losses are those ``tol`` is about. The times of the copy are frozen. Where nothing was
        found, it is the model as it was.

    Raises:
        TypeError: ``model`` is neither, or ``x0`` is no tensor of floating-point numbers.
        ValueError: an argument that cannot be used, a field that does not repeat (dropout in training mode), or one without a
            parameter that requires a gradient.
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
    made: Any = copied(model)
    if not any(parameter.requires_grad for parameter in made.vf.parameters()):
        raise ValueError(
            "no parameter of the field requires a gradient, so that its copy cannot be trained; call requires_grad_() on the "
            "field, or use fit_solver, which leaves it as it is"
        )
    times = interval_of(made)
    if times[0] > times[1]:
        up, call = times[::-1], "without a span" if inverse else f"as sampler(x, torch.tensor({times}))"
        raise ValueError(
            f"the node's t_span descends, from {times[0]:g} to {times[1]:g}, but those of the copy, a LearnableSpan, ascend: "
            f"set node.t_span = torch.tensor({up}), give inverse={not inverse}, and call the copy {call}"
        )
    times = times[:: -1 if inverse else 1]
    x0 = x0.detach().clone()
    states = _States(made, x0, args, (times[0], times[-1]))
    exact = _ends(made, states, times)
    order = torch.randperm(len(x0), generator=torch.Generator().manual_seed(0)).to(x0.device)
    kept = max(1, len(x0) // HELD_OUT)
    held, fitted = order[:kept], order[kept:]
    few = fitted[:FITTED]

    def fit(of: NeuralODE | LearnableSpan, evaluations: int, reference: Tensor | None = None) -> SolverFit:
        with states.of(few) as (x, own):
            return fit_solver(
                of, x, evaluations=evaluations, reference=reference, inverse=inverse, args=own, progress=False
            )

    def refitted(span: LearnableSpan, stages: int) -> LearnableSolver:
        solver: Any = fit(span, stages).node.solver
        return solver.requires_grad_(True)

    scale = displacement(exact - x0, log_density_column(made.node if isinstance(made, LearnableSpan) else made))

    def off(out: Any, batch: Any) -> Tensor:
        return rms((of_output(span, out) - batch[1]) / scale)

    span: Any = None
    begun, met, evaluations = perf_counter(), False, 0
    while not met and evaluations < FIRST:
        evaluations += 1
        span = _span(fit(made, evaluations, exact[few]).node)
        called = _Called(span, states, times)
        with torch.no_grad():
            error = off(called(held), (held, exact[held])).item()
        met = error <= min(tol, solver_tol)
    search.first, search.fresh_solver = Depth(f"learned-{evaluations}", 1), refitted
    frozen = Trial.at([search.first])
    frozen.loss = frozen.held_out_loss = frozen.solver_error = error
    frozen.reference_loss = 0.0
    frozen.passed, frozen.seconds = met, perf_counter() - begun
    start = copied(span)  # what the fit alone gives
    solver: Any = span.solver
    solver.requires_grad_(True)
    verdict = search.fit(
        called,
        off,
        [(rows, exact[rows]) for rows in fitted.split(BATCH)],
        lr=lr,
        held_out=[(rows, exact[rows]) for rows in held.split(BATCH)],
        max_iterations=max_iterations,
        progress=progress,
    )
    # A look without training is the fitted solver's own; on the batches, one by one, it may pass where it does not on all.
    looked = [trial for trial in verdict.trials if not trial.iterations and trial is verdict.best and not met]
    verdict.trials = [*(looked or [frozen]), *(trial for trial in verdict.trials if trial.iterations)]
    if met and not (verdict.feasible and verdict.best.evaluations < evaluations):  # the field may stay as it is
        span = start
        verdict.feasible, verdict.best = True, frozen
    elif not verdict.feasible:  # its weights have moved all the same
        span = copied(model)
        span = span if isinstance(span, LearnableSpan) else LearnableSpan(span)
        freeze_times([span])
    for module, own in zip(span.vf.modules(), model.vf.modules(), strict=True):
        module.training = own.training
        if hasattr(own, "noise_dist"):
            module.noise_dist, module.noise = own.noise_dist, own.noise
    return span, verdict


class _States:
    """The states of a sampler, and what belongs to their rows."""

    def __init__(self, model: Any, x0: Tensor, args: Mapping[str, Any] | None, ends: tuple[float, float]):
        self.x0 = x0
        with random_kept(x0):
            for module in model.vf.modules():
                if getattr(module, "noise_dist", None) is not None:
                    module.noise, module.noise_dist = module.noise_dist.sample((len(x0),)).to(x0), None
            with torch.no_grad(), _field(model).beside(x0, args) as bound:
                self._rows = RowsOf(bound, x0, ends)

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Gives the states of some rows and their ``args``; what the field's modules hold is of these rows meanwhile."""
        with self._rows.of(rows):
            yield self.x0[rows], self._rows.args


class _Called(nn.Module):
    """A span that is called with rows of the states. Its mode stays as it is."""

    def __init__(self, span: LearnableSpan, states: _States, times: list[float]):
        super().__init__()
        self.span, self._states = span, states
        self._t_span = torch.tensor(times, dtype=span.t_f.dtype)

    def forward(self, rows: Tensor) -> Any:
        with self._states.of(rows) as (x, args):
            return self.span(x, self._t_span, args=args)

    def train(self, mode: bool = True) -> "_Called":
        return self  # the ends that are learned are those of the field in eval mode


def _span(node: Any) -> LearnableSpan:
    """Returns a span in eval mode around a node with a fitted solver, with times that stay."""
    x = next(node.vf.parameters(), node.t_span)
    span = LearnableSpan(node, node.t_span.sort().values).to(x.device).eval()
    freeze_times([span])
    return span


def _field(model: Any) -> Field:
    return Field(model.node if isinstance(model, LearnableSpan) else model)


@torch.no_grad()
def _ends(model: Any, states: _States, times: list[float]) -> Tensor:
    """Returns the exact ends of the states."""
    field, ends = _field(model), []
    for rows in torch.arange(len(states.x0), device=states.x0.device).split(BATCH):
        with states.of(rows) as (x, args), field.beside(x, args) as bound:
            check_repeats(bound, x, times[0])
            ends.append(reference_solution(bound, x, times)[-1].to(x.dtype))
    return torch.cat(ends)
