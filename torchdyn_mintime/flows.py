r"""Continuous normalizing flows over a learned interval: densities, samples, and the paper's time-dependent field.

A flow carries data x at t0 to a base distribution at t_f, with the change of log-density beside it (eq. 5):

    d/dt [l, z] = [-Tr(df/dz), f(t, z)],    l(t0) = 0, z(t0) = x,
    log p(x) = log p_base(z(t_f)) - l(t_f),

and is trained on the mean negative log-likelihood, eq. (6). Samples start from the base at t_f and run back to t0. The
state is torchdyn's own, ``[batch, 1 + dim]`` with l in the first column, so that ``torchdyn.models.CNF`` fits as it is. Fields
that were trained by flow matching run the other way, from the base at t0 to data at t_f.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import REQUIRES_NOISE

from torchdyn_mintime.core import (
    LearnableSpan,
    checks,
    cost_columns,
    evaluating,
    freeze_times,
    parameter_groups,
    random_kept,
    undisturbed,
    with_solver,
)
from torchdyn_mintime.depth.solver_fit import SolverFit, fit_solver
from torchdyn_mintime.numerics import LearnableSolver

__all__ = ["ContextCat", "FlowFit", "FlowModel", "Gaussian", "HyperCNF", "HyperNet"]


class Gaussian(nn.Module):
    r"""The base N(mean, variance I), which moves with the model (a ``torch.distributions`` object does not).

    Args:
        dim: number of dimensions.
        variance: of each dimension. The Neural ODEs example and the paper take 0.1.
        mean: of each dimension.

    Raises:
        TypeError: ``dim`` or ``variance`` is not a number.
        ValueError: ``dim`` below 1, or a variance that is not positive and finite.

    Example:
        >>> base = Gaussian(2, variance=0.1)
        >>> base.log_prob(base.sample((4,))).shape
        torch.Size([4])
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, dim: int, variance: float = 1.0, mean: float = 0.0):
        super().__init__()
        dim = checks.count(dim, "dim", 1)
        self.register_buffer("mean", torch.full((dim,), float(mean)))
        self.register_buffer("scale", torch.full((dim,), math.sqrt(checks.positive(variance, "variance"))))

    @property
    def event_shape(self) -> torch.Size:
        """``(dim,)``."""
        return self.mean.shape

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log N(z; mean, variance I), ``[..., dim] -> [...]`` (nats)."""
        standard = (z - self.mean) / self.scale
        return -0.5 * (standard.square() + math.log(2 * math.pi)).sum(-1) - self.scale.log().sum()

    def sample(self, shape: Sequence[int] = ()) -> Tensor:
        """Returns independent draws, ``[*shape, dim]``."""
        noise = torch.randn(*shape, len(self.mean), dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.scale * noise

    def extra_repr(self) -> str:
        return f"{len(self.mean)}, variance={self.scale[0].item() ** 2:.4g}"


class HyperNet(nn.Module):
    r"""The field of the Neural ODEs flow example, whose weights are a small network of the time:

        f(t, z) = 1/width sum_k v_k(t) tanh(w_k(t) . z + b_k(t)),    v_k = u_k sigmoid(g_k).

    ``self.t`` is set by torchdyn before every evaluation, as for ``DepthCat``, so that ``CNF(HyperNet(2))`` works. The
    trace of its Jacobian has a closed form, which :class:`HyperCNF` uses.

    Args:
        dim: number of dimensions of z.
        hidden: width of the network of the time.
        width: number of terms.

    Example:
        >>> net = HyperNet(2)
        >>> net.t = torch.tensor(0.5)
        >>> net(torch.zeros(8, 2)).shape
        torch.Size([8, 2])
    """

    def __init__(self, dim: int = 2, hidden: int = 32, width: int = 64):
        super().__init__()
        self.dim, self.width = dim, width
        self.net = nn.Sequential(
            nn.Linear(1, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 3 * width * dim + width),
        )
        self.t: Tensor | None = None

    def weights(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns w ``[width, dim]``, b ``[width]`` and v / width ``[width, dim]`` at the time ``self.t``."""
        if self.t is None:
            raise RuntimeError("HyperNet has no time yet: solve it in a NeuralODE, or set its `t` to a tensor first")
        size, first = self.width * self.dim, next(self.net.parameters())
        # Times come in the state's dtype; under autocast or in mixed models the network may have another.
        out = self.net(torch.as_tensor(self.t).reshape(1, 1).to(first))[0].to(z)
        w, u, g, b = out.split([size, size, size, self.width])
        v = (u * torch.sigmoid(g)).view(self.width, self.dim) / self.width
        return w.view(self.width, self.dim), b, v

    def forward(self, z: Tensor) -> Tensor:
        """Returns f(t, z), ``[batch, dim] -> [batch, dim]``."""
        w, b, v = self.weights(z)
        return torch.tanh(torch.addmm(b, z, w.T)) @ v

    def value_and_trace(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f ``[batch, dim]`` and Tr(df/dz) = 1/width sum_k (1 - h_k^2) v_k . w_k ``[batch]``, with h the tanh above."""
        w, b, v = self.weights(z)
        h = torch.tanh(torch.addmm(b, z, w.T))
        c = (w * v).sum(1)
        return h @ v, c.sum() - (h * h) @ c


class HyperCNF(nn.Module):
    r"""The field [-Tr(df/dz), f] of a net that knows its own trace, in the place of ``torchdyn.models.CNF``.

    Same values as ``CNF(net)`` with its exact trace, without a call of autograd for each dimension: half the time.

    Args:
        net: a module with ``value_and_trace(z) -> (f [batch, dim], trace [batch])``; default ``HyperNet(dim)``.
        dim, hidden, width: of the default net.

    Example:
        >>> span = LearnableSpan(NeuralODE(HyperCNF(dim=2), solver="rk4"))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> t_eval, sol = span(torch.zeros(8, 3))
        >>> sol[-1].shape
        torch.Size([8, 3])
    """

    # torchdyn's marks of a flow: its solve draws the noise and keeps the first column for the log-density by them.
    noise_dist = None
    noise = None

    def __init__(self, net: nn.Module | None = None, *, dim: int = 2, hidden: int = 32, width: int = 64):
        super().__init__()
        self.net: Any = HyperNet(dim, hidden, width) if net is None else net
        if not hasattr(self.net, "value_and_trace"):
            raise TypeError(
                f"HyperCNF takes a net with value_and_trace(z) -> (f, trace); {type(net).__name__} has none; "
                "use torchdyn.models.CNF, which finds the trace by autograd"
            )

    def trace_estimator(self, z: Tensor) -> Tensor:
        """Returns Tr(df/dz), ``[batch]``: exact."""
        return self.net.value_and_trace(z)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Returns d/dt [l, z], ``[batch, 1 + dim]``."""
        value, trace = self.net.value_and_trace(x[:, 1:])
        return torch.cat([-trace[:, None], value], 1)


class ContextCat(nn.Module):
    """Appends the context of a conditional flow to the state, as torchdyn's ``DepthCat`` appends the time.

    :class:`FlowModel` sets ``context`` for the length of a solve, here and on every other module of the field that has an
    attribute of this name.

    Attributes:
        context: ``[batch, n]``, or None.

    Example:
        >>> cat = ContextCat()
        >>> cat.context = torch.ones(4, 3)
        >>> cat(torch.zeros(4, 2)).shape
        torch.Size([4, 5])
    """

    def __init__(self) -> None:
        super().__init__()
        self.context: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Returns [z, context], ``[batch, dim] -> [batch, dim + n]``."""
        if self.context is None:
            raise RuntimeError(
                "ContextCat has no context yet: pass it to the FlowModel, or set its `context` to a tensor"
            )
        return torch.cat([z, self.context.to(z)], 1)


class FlowModel(pl.LightningModule):
    r"""A continuous normalizing flow with a learned interval, ready to train with Lightning or by hand.

    Args:
        flow: a ``NeuralODE`` over ``torchdyn.models.CNF`` or :class:`HyperCNF`, or its :class:`LearnableSpan`. A bare
            node is wrapped. For an interval that stays as it is, freeze it: ``model.span.t_f.requires_grad_(False)``.
        base: the distribution of z(t_f): a ``torch.distributions.Distribution`` over vectors (``event_shape``
            ``(dim,)``), or a module with ``event_shape``, ``log_prob`` and ``sample``, such as :class:`Gaussian`. A
            module moves with the model and its parameters are trained; a Distribution must be on the data's device
            and of its dtype.
        lr: Adam's learning rate of the field.
        span_lr: that of the times, in units of time a step; default ``lr``.
        log_density: where the state has it: "first", [l, z] with dl/dt = -Tr(df/dz), as ``torchdyn.models.CNF``; or "last",
            [z, l] with dl/dt = +Tr(df/dz), as the wrapper in torchcfm's examples.
        base_at: "end", data at t0 and the base at t_f as above; or "start", as for a field of flow matching.

    A flow is conditional if some module of its field has an attribute ``context`` (:class:`ContextCat`); methods then take a
    context: ``[batch, ...]`` with a row for each sample, or ``[1, ...]`` for all.

    The price of time is not set here: add ``weight * model.span.duration`` to ``model.nll(x)`` (eq. 13), or give the
    trainer ``torchdyn_mintime.lightning.MinimumTime(weight)``. Under Hutchinson's trace :meth:`log_prob` is an unbiased
    estimate; a regularizer that looks at the last solve sees the noise of that solve.

    Raises:
        TypeError: ``flow`` is no flow, ``base`` is no distribution, or a rate is not a number.
        ValueError: base, field and noise do not fit one another.

    Example:
        >>> from torchdyn.models import CNF
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> model = FlowModel(NeuralODE(CNF(net), solver="rk4"), Gaussian(2))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> x = torch.randn(64, 2)
        >>> loss = model.nll(x) + 0.1 * model.span.duration
        >>> loss.backward()
        >>> model.sample(5).shape, model.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([64]))
    """

    def __init__(
        self,
        flow: "NeuralODE | LearnableSpan",
        base: "Distribution | nn.Module",
        *,
        lr: float = 1e-3,
        span_lr: float | None = None,
        log_density: str = "first",
        base_at: str = "end",
    ):
        super().__init__()
        for name, choice, known in (
            ("log_density", log_density, ("first", "last")),
            ("base_at", base_at, ("start", "end")),
        ):
            if choice not in known:
                raise ValueError(f"{name} must be one of {known}; got {choice!r}")
        for name, value in {"lr": lr, "span_lr": lr if span_lr is None else span_lr}.items():
            checks.number(value, name, least=0)
        dim = _check_base(base)
        if not isinstance(flow, NeuralODE | LearnableSpan):
            raise TypeError(f"flow must be a NeuralODE over a CNF, or its LearnableSpan; got {type(flow).__name__}")
        self.flow = flow if isinstance(flow, LearnableSpan) else LearnableSpan(flow)
        _check_field(self.flow, dim, log_density)
        self.base: Any = base
        self.dim, self.lr, self.span_lr = dim, lr, span_lr
        self.log_density, self.base_at = log_density, base_at
        self._said_ignored = False

    # ------------------------------------------------------------------------------------------ the two directions

    @property
    def span(self) -> LearnableSpan:
        """The span over which the flow runs: ``span.t_f``, ``span.duration``, ``span.nfe``, ``span.steps``."""
        if not isinstance(self.flow, LearnableSpan):
            raise TypeError(
                "the flow's LearnableSpan was taken out (unwrap); put it back: torchdyn_mintime.wrap(model)"
            )
        return self.flow

    @property
    def conditional(self) -> bool:
        """Whether the field has a place for a context."""
        return any(_has_context(module) for module in self.span.vf.modules())

    def encode(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Carries data to the base, from t0 to t_f (from t_f to t0 where the base is at the start).

        Args:
            x: ``[batch, dim]``.
            context: ``[batch, ...]`` or ``[1, ...]``, of a conditional flow.

        Returns:
            The base point z ``[batch, dim]``, and l = -int Tr(df/dz) dt along the way there ``[batch]`` of eq. (5), in nats.
        """
        self._check(x, "data x")
        return self._run(x, self.base_at == "start", context)

    def decode(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Carries the base to data, the other way over the same grid.

        Args:
            z: ``[batch, dim]``.
            context: ``[batch, ...]`` or ``[1, ...]``, of a conditional flow.

        Returns:
            x ``[batch, dim]``, and l of the same path ``[batch]``, so that log p(x) = log p_base(z) - l.
        """
        self._check(z, "base points z")
        x, change = self._run(z, self.base_at == "end", context)
        return x, -change

    def _run(self, start: Tensor, reverse: bool, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if torch.is_inference_mode_enabled():
            # Lightning validates in inference mode, where no trace can be taken by autograd.
            with torch.inference_mode(False), torch.no_grad():
                return self._run(start.clone(), reverse, None if context is None else context.clone())
        span = self.span
        costs, last = cost_columns(span.node), self.log_density == "last"
        state, solver = self._state(start), span.solver
        if (
            isinstance(solver, LearnableSolver)
            and solver.direction == 0  # it is written in place, so only where it changes
            and solver.free.requires_grad
            and torch.is_grad_enabled()
        ):
            # What is trained one way may err as much as midpoint does on the way back.
            solver.direction = -1 if reverse else 1
        # The span's own template, the other way; it must not be taken for a caller's first span, which fills t_f.
        if not span.interval.settled:
            span.interval = replace(span.interval, settled=True)
        # A solver of one step has no states at the points of a template that was made for another.
        points = span.t_span[[0, -1]] if span.interval.one_step else span.t_span
        with self._given(context, len(start)):
            end = span.trajectory(state, points.flip(0) if reverse else None)[-1, :, costs:]
        return (end[:, :-1], -end[:, -1]) if last else (end[:, 1:], end[:, 0])

    def _state(self, start: Tensor) -> Tensor:
        """Returns the state that a solve from data or base points begins with."""
        zero = start.new_zeros(len(start), 1)
        both = (start, zero) if self.log_density == "last" else (zero, start)
        return torch.cat([zero.expand(-1, cost_columns(self.span.node)), *both], 1)

    @contextmanager
    def _given(self, context: Tensor | None, n: int) -> Iterator[None]:
        """Sets the context on the modules of the field that have a place for it."""
        places: list[Any] = [module for module in self.span.vf.modules() if _has_context(module)]
        if context is None:
            if any(module.context is None for module in places):
                raise ValueError("this flow is conditional and has no context; pass context=, a tensor [batch, ...]")
            yield
            return
        if not isinstance(context, Tensor):
            raise TypeError(f"context must be a tensor [batch, ...]; got {type(context).__name__}")
        if not places:
            raise ValueError(
                "a context was given, but no module of the field has an attribute `context` to take it; put "
                "torchdyn_mintime.flows.ContextCat() before its first layer"
            )
        if context.dim() == 0 or len(context) not in (1, n):
            raise ValueError(
                f"context must have a row for each of the {n} samples, or one for all; got the shape {tuple(context.shape)}"
            )
        rows = context if len(context) == n else context.expand(n, *context.shape[1:])
        held = [(module, module.context) for module in places]
        try:
            for module in places:
                module.context = rows
            yield
        finally:
            for module, before in held:
                module.context = before

    # ------------------------------------------------------------------------------------------ densities and samples

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns log p(x) = log p_base(z(t_f)) - l(t_f), eq. (5), differentiable in x, the field and the times.

        Args:
            x: ``[batch, dim]``.
            context: ``[batch, ...]`` or ``[1, ...]``, of a conditional flow.

        Returns:
            ``[batch]``, nats.

        Raises:
            TypeError, ValueError: x is not a finite floating-point tensor of the base's dimension, or the context does not fit.
            IntegrationError: the solve failed.
        """
        z, change = self.encode(x, context)
        return self.base.log_prob(z) - change

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns :meth:`log_prob`."""
        return self.log_prob(x, context)

    def nll(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the mean negative log-likelihood, eq. (6), in nats: the terminal loss.

        Raises:
            ValueError: those of :meth:`log_prob`, or x has no rows.
        """
        found = self.log_prob(x, context)
        if not len(found):
            raise ValueError(f"nll is a mean over samples, and x of the shape {tuple(x.shape)} has none")
        return -found.mean()

    @torch.no_grad()
    def sample(self, n: int, context: Tensor | None = None) -> Tensor:
        """Returns ``n`` draws from the flow as it is, ``[n, dim]``: trained or not, they follow its :meth:`log_prob`, within
        the solver's error. Of a conditional flow, a context ``[n, ...]``, or ``[1, ...]`` for all."""
        n = checks.count(n, "n, the number of draws,", 1)
        return self.decode(self.base.sample((n,)).to(_like(self.span)), context)[0]

    def _check(self, x: Any, what: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{what} must be a tensor [batch, {self.dim}]; got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{what} must be of a floating-point type; got {x.dtype}; use .float()")
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(
                f"{what} must have the shape [batch, {self.dim}], the base's dimension; got {tuple(x.shape)} "
                "(the column of the log-density is added by the model)"
            )
        # One reduction where all is well. Of finite entries too, the sum may be infinite.
        if not math.isfinite(x.detach().sum().item()) and len(bad := (~torch.isfinite(x).all(1)).nonzero().flatten()):
            raise ValueError(
                f"{what} holds NaN or infinite entries in {len(bad)} of {len(x)} rows, first in row {bad[0].item()}; "
                "remove or impute them"
            )

    # ------------------------------------------------------------------------------------------ few evaluations

    @torch.inference_mode(False)  # the solvers are to be used outside it too
    def fit_solvers(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        evaluations: int = 8,
        tol: float | None = None,
        progress: bool = True,
    ) -> "FlowFit":
        """Fits a solver to each direction of the trained flow, for densities and samples at few evaluations.

        A fit bounds the error in its own direction alone: in the other it may be as large as that of midpoint. The two solvers
        are therefore fitted apart (:func:`~torchdyn_mintime.fit_solver`), to states with their log-density: one from the data
        ``x``, one from as many draws of the base. The flow itself is not changed; the new one has the same field, and takes the
        right solver by the direction of a solve.

        Args:
            x: data as it will be in use, ``[n, dim]``, some 1,000.
            context: ``[n, ...]`` or ``[1, ...]``, of a conditional flow.
            evaluations, tol, progress: those of ``fit_solver``, for each direction.

        Raises:
            TypeError, ValueError, IntegrationError: those of :meth:`log_prob` and of ``fit_solver``.

        Example:
            >>> from torchdyn.models import CNF
            >>> net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
            >>> model = FlowModel(NeuralODE(CNF(net), solver="rk4"), Gaussian(2))  # doctest: +ELLIPSIS
            Your vector field ...
            >>> fit = model.fit_solvers(torch.randn(256, 2), evaluations=2, progress=False)
            >>> fit.model.log_prob(torch.randn(4, 2)).shape, fit.model.sample(5).shape
            (torch.Size([4]), torch.Size([5, 2]))
            >>> fit.model.span.nfe
            2
        """
        self._check(x, "data x")
        with torch.no_grad(), random_kept(x):
            drawn = self.base.sample((len(x),)).to(x)

        def fit(start: Tensor, inverse: bool) -> SolverFit:
            with self._given(context, len(x)):
                return fit_solver(
                    self.span,
                    self._state(start.detach()),
                    evaluations=evaluations,
                    tol=tol,
                    inverse=inverse,
                    log_density=-1 if self.log_density == "last" else cost_columns(self.span.node),
                    progress=progress,
                )

        at_start = self.base_at == "start"
        density, samples = fit(x, at_start), fit(drawn, not at_start)
        forward, backward = (samples, density) if at_start else (density, samples)
        # Those of the fits stay as they are, each for one direction, whatever becomes of the new flow.
        solver: Any = copy.deepcopy(forward.node.solver)
        solver.other = copy.deepcopy(backward.node.solver)
        few = LearnableSpan(with_solver(forward.node, solver, forward.node.t_span))
        freeze_times([few])
        made = FlowModel(
            few,
            self.base,
            lr=self.lr,
            span_lr=self.span_lr,
            log_density=self.log_density,
            base_at=self.base_at,
        )
        return FlowFit(made, density, samples)

    # ------------------------------------------------------------------------------------------ Lightning

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam, with the times in a group of their own."""
        groups = parameter_groups(self, lr=self.lr, span_lr=self.span_lr)
        return torch.optim.Adam([group for group in groups if group["params"]])

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Returns the loss of a batch ``[batch, dim]``, or of a tuple that begins with it and the context; logs ``nll``."""
        return self._step(batch, "nll")

    def validation_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Logs ``val_nll``."""
        return self._step(batch, "val_nll")

    def test_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Logs ``test_nll``."""
        return self._step(batch, "test_nll")

    def _step(self, batch: Any, name: str) -> Tensor:
        x, *others = batch if isinstance(batch, tuple | list) else (batch,)
        context = others.pop(0) if others and self.conditional else None
        if others and not self._said_ignored:
            self._said_ignored = True
            warnings.warn(
                f"FlowModel learns p(x), or p(x | context) if its field has a place for one (flows.ContextCat): of a batch of "
                f"{len(batch)} entries the last {len(others)} are ignored",
                stacklevel=3,
            )
        loss = self.nll(x, context)
        self.log(name, loss.detach(), prog_bar=True, batch_size=len(x))
        return loss


@dataclass(frozen=True)
class FlowFit:
    """Solvers fitted to a flow, one for each direction (:meth:`FlowModel.fit_solvers`).

    Attributes:
        model: a :class:`FlowModel` over the same field, with these solvers and frozen times.
        density: the fit of the way from data to the base, which ``model.log_prob`` takes.
        samples: the fit of the way from the base to data, which ``model.sample`` takes.
    """

    model: FlowModel
    density: SolverFit
    samples: SolverFit

    def __str__(self) -> str:
        return f"density: {self.density}\nsamples: {self.samples}"


# ------------------------------------------------------------------------------------------------------------- checks


def _check_base(base: Any) -> int:
    """Returns the base's dimension."""
    missing = [name for name in ("log_prob", "sample", "event_shape") if not hasattr(base, name)]
    if missing:
        raise TypeError(
            f"base must be a distribution; {type(base).__name__} has no {', '.join(missing)}; try Gaussian(dim)"
        )
    event, batch = tuple(base.event_shape), tuple(getattr(base, "batch_shape", ()))
    if len(event) != 1 or batch:
        hint = "; wrap it in torch.distributions.Independent(base, 1)" if len(batch) == 1 and not event else ""
        raise ValueError(
            f"base must be one distribution over vectors, event_shape (dim,); got event_shape {event} and "
            f"batch_shape {batch}{hint}"
        )
    return event[0]


def _check_field(span: LearnableSpan, dim: int, log_density: str) -> None:
    """Raises where the field is not a flow's, of the base's dimension, or its noise does not fit."""
    modules = list(span.node.vf.modules())
    flows = [m for m in modules if hasattr(m, "trace_estimator")]
    if not flows and log_density == "first":
        raise TypeError(
            "the NeuralODE's field has no trace: it must give [-Tr(df/dz), f] for a state [l, z]; "
            "put the net in torchdyn.models.CNF(net), or use HyperCNF; a field that gives [f, Tr(df/dz)] for [z, l] needs "
            "log_density='last'"
        )
    if flows and log_density == "last":
        raise ValueError(f"log_density='last' is for fields of a state [z, l]; {type(flows[0]).__name__} has [l, z]")
    if span.order > 1:
        raise ValueError(f"a flow's ODE is of order 1; this NeuralODE has order={span.order}")
    if any(hasattr(m, "_control") for m in modules):
        raise ValueError(
            "the field uses DataControl, which reads the initial state: forwards that is x, backwards z, so the two "
            "directions would be different flows; remove it"
        )
    for flow in flows:
        noise = flow.noise_dist
        if noise is None and flow.trace_estimator in REQUIRES_NOISE:
            raise ValueError(
                "Hutchinson's trace needs noise_dist, a distribution over vectors of the data's dimension, such as "
                f"MultivariateNormal(torch.zeros({dim}), torch.eye({dim})); got None"
            )
        if hasattr(noise, "event_shape") and (shape := tuple(noise.batch_shape + noise.event_shape)) != (dim,):
            raise ValueError(f"noise_dist draws vectors of shape {shape}, but the base has the dimension {dim}")
    _probe(span, dim)


def _like(span: LearnableSpan) -> Tensor:
    """Returns a tensor of the field's dtype and device."""
    return next(span.node.vf.parameters(), span.t_f)


def _has_context(module: nn.Module) -> bool:
    return hasattr(module, "context")


@torch.no_grad()
def _probe(span: LearnableSpan, dim: int) -> None:
    """Evaluates once, without a trace, to see that the field takes the base's dimension.

    With as many rows as conditions have that are set on the field already; one that waits for its context is seen later.
    """
    modules = list(span.vf.modules())
    if any(_has_context(module) and module.context is None for module in modules):
        return
    set_before = [v for m in modules for v in vars(m).values() if isinstance(v, Tensor) and v.dim()]
    refused: RuntimeError | None = None
    for rows in dict.fromkeys([2, *map(len, set_before)]):
        x = torch.zeros(rows, 1 + cost_columns(span.node) + dim).to(_like(span))
        with undisturbed(span), evaluating(span), random_kept(x):
            bound = span.field.bind(x)
            try:
                out = bound.function(span.t0.detach().to(x), x)
            except RuntimeError as error:
                refused = refused or error
                continue
        if out.shape != x.shape:
            raise ValueError(f"the field gave the shape {tuple(out.shape)} for a state of shape {tuple(x.shape)}")
        return
    raise ValueError(f"the field does not accept data of the base's dimension {dim}: {refused}") from refused
