r"""A learnable interval [t0, t_f] around a NeuralODE (Algorithm 1 and eq. (12) to (14) of the paper)."""

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.interpolators import str_to_interp
from torchdyn.numerics.solvers.ode import SOLVER_DICT, str_to_solver

from torchdyn_mintime import checks
from torchdyn_mintime.field import BoundField, Field
from torchdyn_mintime.grid import MAX_POINTS, cut, merge
from torchdyn_mintime.numerics.adjoint import AdjointProblem, solve_adjoint
from torchdyn_mintime.numerics.checkpoint import CheckpointProblem, solve_checkpointed
from torchdyn_mintime.numerics.integrate import Grid, IntegrationError, Solution, integrate
from torchdyn_mintime.numerics.steppers import AsynchronousLeapfrog, Hypersolver, Stepper, make_stepper

__all__ = ["LearnableSpan"]

_log = logging.getLogger(__name__)

SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")


@dataclass
class _Last:
    """What is remembered of the last forward. Not copied, not saved."""

    x_shape: tuple[int, ...] = ()
    bound: BoundField | None = None
    steps: list[float] = field(default_factory=list)
    running_cost: Tensor | None = None
    x: Tensor | None = None
    grid: Grid | None = None
    states: Tensor | None = None


class LearnableSpan(nn.Module):
    r"""A ``NeuralODE`` whose terminal time t_f, and t0 on request, are parameters.

    Calls go through to the node: ``span(x)`` returns what ``node(x)`` would, solved up to the learned t_f. The template
    ``t_span`` is cut at t_f: the grid is t0, the template's points before t_f, then t_f itself.

    Args:
        node: a torchdyn ``NeuralODE``. Its solver, tolerances, sensitivity and other settings are used as they are.
        t_span: the template, 1-D, strictly ascending, two points or more (units of time). Its first time is t0, its
            last the initial t_f. Default: ``node.t_span``, else 101 points on [0, 1] for fixed-step solvers and [0, 1]
            for adaptive ones, until a forward call passes a span, which then becomes the template.
        t_f: the initial terminal time, where it is not the template's end.
        bounds: (lower, upper) of t_f, eq. (14). Default: t0 + min(step_size, half the template) and the template's end;
            for adaptive solvers the lower is t0 + 1e-3 of the template's length.
        step_size: of fixed-step solvers; where it is not the template's first spacing, the template is laid anew with it.
        learn_t0: whether t0 is a parameter too. It is clipped to t_f - step_size.
        checkpoint: keep one state a step for backward, and evaluate the field once more there. The gradient is the
            same, to rounding, as without: exactly that of the discrete solution (sensitivity "autograd").

    Attributes:
        node: the NeuralODE.
        t_f: scalar ``nn.Parameter``, float32 at least.
        t0: scalar buffer, or parameter with ``learn_t0=True``.
        pinned: whether the template holds even where a call passes a span of its own (whose direction still counts).
            What lays the steps itself (``Shallowest``, ``trim``) sets it; it is part of the state_dict.

    Raises:
        TypeError: ``node`` is not a NeuralODE, or a span is not a floating-point tensor.
        ValueError: a span, bounds or step size that cannot be used, or a solver that gives no right gradient.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 101))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> loss = sol[-1].square().mean() + 0.1 * span.duration  # eq. (13)
        >>> loss.backward()
        >>> span.t_f.grad is not None
        True
    """

    def __init__(
        self,
        node: NeuralODE,
        t_span: Tensor | None = None,
        *,
        t_f: float | None = None,
        bounds: tuple[float, float] | None = None,
        step_size: float | None = None,
        learn_t0: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        stepper, backward_stepper = _check_node(node)
        given = t_span if t_span is not None else node.t_span
        self._filled = given is not None
        if given is None:
            given = torch.linspace(0, 1, 2 if stepper.adaptive else 101)
        template, dtype = _check_span(given, "t_span")
        if step_size is not None:
            template = _regrid(template, _check_step_size(step_size, template, stepper), dtype)
        self._template = template
        self._stepper, self._backward_stepper = stepper, backward_stepper
        self._given_bounds = None if bounds is None else _check_bounds(bounds, template[0])
        lower, upper = self.bounds
        initial = template[-1] if t_f is None else checks.finite(t_f, "t_f")
        if t_f is not None:
            # One step of 0.1 is a little less than float32's 0.1, which the template has.
            slack = 1e-6 * max(1.0, abs(initial))
            if not lower - slack <= initial <= upper + slack:
                raise ValueError(
                    f"t_f = {initial:g} lies outside its bounds [{lower:g}, {upper:g}]; change it or give bounds="
                )
            initial = min(max(initial, lower), upper)
        if (
            bounds is not None
            and t_f is None
            and abs(initial - min(max(initial, lower), upper)) <= 1e-6 * max(1.0, abs(initial))
        ):
            initial = min(max(initial, lower), upper)  # float32's end of the template
        if bounds is not None and not lower <= initial <= upper:
            raise ValueError(
                f"the template's end {initial:g} lies outside bounds=({lower:g}, {upper:g}); give t_f= inside them"
            )
        self.t_f = nn.Parameter(torch.tensor(initial, dtype=dtype))
        t0 = torch.tensor(template[0], dtype=dtype)
        if learn_t0:
            self.t0 = nn.Parameter(t0)
        else:
            self.register_buffer("t0", t0)
        self.node = node
        self.pinned = False
        self._raised = False  # whether the upper bound was raised to the default of what may grow t_f
        self._field = Field(node)
        self._last = _Last()
        self._said: set[str] = set()
        if checkpoint and node.sensitivity != "autograd":
            raise ValueError(
                f"checkpoint=True is for sensitivity='autograd'; the node has {node.sensitivity!r}, which keeps few states "
                "by itself"
            )
        self.checkpoint = checkpoint
        self._release()
        self.register_state_dict_post_hook(_without_node_prefix)

    # ------------------------------------------------------------------------------------------------- the interval

    @property
    def t_span(self) -> Tensor:
        """The template, in the dtype and on the device of the times."""
        return torch.tensor(self._template, dtype=self.t_f.dtype, device=self.t_f.device)

    @t_span.setter
    def t_span(self, value: Tensor) -> None:
        template, _ = _check_span(value, "t_span")
        given, before = self._given_bounds, self._template
        self._template = template
        if given is not None and not template[0] < given[0]:
            # A lower bound at or before t0 would let t_f fall below t0.
            given = (self._default_bounds()[0], given[1])
            if not given[0] < given[1]:
                self._template = before
                raise ValueError(
                    f"the template starts at {template[0]:g}, too late for the upper bound {given[1]:g}; set `bounds` first"
                )
        self._given_bounds, self._filled = given, True
        with torch.no_grad():
            self.t0.fill_(template[0])
        self.clip_()

    @property
    def step_size(self) -> float:
        """The template's first spacing (fixed-step solvers), in units of time."""
        if self._stepper.adaptive:
            raise AttributeError(
                f"{self._stepper.name} chooses its own steps; only fixed-step solvers have a step_size"
            )
        return self._template[1] - self._template[0]

    @step_size.setter
    def step_size(self, value: float) -> None:
        template, length = self._template, self.t_f.item() - self.t0.item()
        step = _check_step_size(value, template, self._stepper)
        if step > length * (1 + 1e-6):
            raise ValueError(
                f"step_size {step:g} is longer than the interval learned, {length:g}; t_f would have to move"
            )
        self._template = _regrid(template, step, self.t_f.dtype)
        self.clip_()

    @property
    def bounds(self) -> tuple[float, float]:
        """(lower, upper) of t_f, eq. (14)."""
        return self._given_bounds or self._default_bounds()

    @bounds.setter
    def bounds(self, value: tuple[float, float]) -> None:
        self._given_bounds = _check_bounds(value, self._template[0], frozen=not self.t_f.requires_grad)
        self.clip_()

    def _default_bounds(self) -> tuple[float, float]:
        t0, end = self._template[0], self._template[-1]
        least = 1e-3 * (end - t0) if self._stepper.adaptive else min(self.step_size, (end - t0) / 2)
        # torchdyn takes times that are closer than 1e-5 |t| for the same.
        return min(t0 + max(least, 4e-5 * abs(t0)), end), end

    def raise_to_default(self) -> float:
        """Raises the upper bound as far as t_f may grow by default, and returns it; one that is higher stays."""
        lower, upper = self.bounds
        self._raised = self._given_bounds is None or self._raised
        self.bounds = (lower, max(upper, self.default_max_t_f()))
        return self.bounds[1]

    def default_max_t_f(self) -> float:
        """How far t_f may grow where nothing else is said: 2 T_f - t0 - eps of eq. (41), at least t0 + 1."""
        t0, end = self._template[0], self._template[-1]
        eps = 1e-3 * (end - t0) if self._stepper.adaptive else self.step_size
        return max(2 * end - t0 - eps, t0 + 1.0)

    @property
    def duration(self) -> Tensor:
        """The length t_f - t0 of the interval, differentiable; the integral of eq. (13)."""
        t0, t_f, _, _ = self._times()
        return t_f - t0

    @torch.no_grad()
    def clip_(self) -> bool:
        """Eq. (14): puts t_f (and a learnable t0) inside its bounds, writing only what lies outside.

        Returns:
            Whether anything was written.

        Raises:
            IntegrationError: a time is NaN.
        """
        now = self.t0.item(), self.t_f.item()
        written = False
        for tensor, is_, value, name in zip((self.t0, self.t_f), now, self._clipped(*now), ("t0", "t_f"), strict=True):
            if is_ != value:
                tensor.fill_(value)
                written = True
                self._say_once(name, value)
        return written

    def _clipped(self, t0: float, t_f: float) -> tuple[float, float]:
        """t0 and t_f inside their bounds, as numbers of the times' dtype."""
        if not (math.isfinite(t0) and math.isfinite(t_f)):
            raise IntegrationError(
                f"the interval is [{t0}, {t_f}]: a gradient or a learning rate was not finite; "
                "load the last checkpoint and lower the learning rate of the times"
            )
        lower, upper = (_rounded(b, self.t_f.dtype) for b in self.bounds)
        # Whatever the bounds: torchdyn, and float32 soon after, take times closer than 1e-5 |t| for the same.
        apart = _rounded(self._template[0] + 4e-5 * abs(self._template[0]), self.t_f.dtype)
        t_f = min(max(t_f, lower, apart), max(upper, apart))
        if isinstance(self.t0, nn.Parameter):
            least = 1e-3 * (self._template[-1] - self._template[0]) if self._stepper.adaptive else self.step_size
            if t0 > t_f - least:
                t0 = _rounded(t_f - least, self.t_f.dtype)
        return t0, t_f

    def _say_once(self, name: str, value: float) -> None:
        key = f"{name} {value:.9g}"
        if key not in self._said:
            self._said.add(key)
            _log.warning("%s was clipped to its bound %.6g (bounds of t_f: %.6g, %.6g)", name, value, *self.bounds)

    def _times(self) -> tuple[Tensor, Tensor, float, float]:
        """t0 and t_f as they are to be used now: the parameters themselves, or clipped values that pass the gradient.

        And both as numbers: on a GPU each reading of a tensor waits for all work before it.
        """
        t0: Tensor = self.t0
        t_f: Tensor = self.t_f
        now = t0.item(), t_f.item()
        value = self._clipped(*now)
        if value == now:
            return t0, t_f, *now
        if self.training and isinstance(t_f, nn.Parameter):
            self.clip_()
        else:
            # A clamp would have no gradient outside the bounds, and the optimizer could not come back.
            # The difference is zero: a sum with the distance would be rounded to the units of a t_f that ran far away.
            t0, t_f = (v + (t - t.detach()) for v, t in zip(value, (t0, t_f), strict=True))
        return t0, t_f, t0.item(), t_f.item()

    # ---------------------------------------------------------------------------------------------------- the grid

    def grid(self, t_span: Tensor | None = None) -> Tensor:
        """The points of a forward call: t0, the template's (or ``t_span``'s) points before t_f, then t_f.

        Args:
            t_span: a span as it would be passed to :meth:`forward`.

        Returns:
            ``[points]``, with the gradient of t_f and a learnable t0.
        """
        return self._grid(t_span, ()).times(self.t_f.dtype, self.t_f.device)

    def _grid(self, t_span: Tensor | None, save_at: Iterable[float] | Tensor) -> Grid:
        template, descending = self._template, False
        if t_span is not None:
            template, descending = self._read_span(t_span)
        t0, t_f, first, last = self._times()
        nodes = cut(
            template,
            first,
            last,
            step=template[1] - template[0],
            extend=not self._stepper.adaptive,
            moving_start=isinstance(self.t0, nn.Parameter),
        )
        keep = None
        if len(asked := _as_numbers(save_at)):
            tolerance = 2e-5 * max(1.0, abs(nodes[-1]))
            if not all(nodes[0] - tolerance <= t <= nodes[-1] + tolerance for t in asked):
                raise ValueError(f"save_at={asked} must lie between t0 = {nodes[0]:.6g} and t_f = {nodes[-1]:.6g}")
            nodes, keep = merge(nodes, asked, step=template[1] - template[0])
        start, end = (t if t.requires_grad and torch.is_grad_enabled() else None for t in (t0, t_f))
        if descending:
            return Grid(nodes[::-1], end, start, None if keep is None else keep[::-1])
        return Grid(nodes, start, end, keep)

    def _read_span(self, t_span: Tensor) -> tuple[list[float], bool]:
        values, _ = _check_span(t_span, "t_span", either_direction=True)
        descending = values[0] > values[-1]
        template = values[::-1] if descending else values
        if self.pinned and self._filled:
            return self._template, descending
        if not self._filled:
            # Neither the wrapper nor the node had a span: this first one is what the user meant.
            if self.pinned:  # as many steps as are wanted, over the interval that is
                points = torch.linspace(template[0], template[-1], len(self._template), dtype=torch.float64)
                template = points.to(self.t_f.dtype).tolist()
            self._template, self._filled = template, True
            if self._raised:  # to a default that was that of the template before
                lower, upper = self._default_bounds()
                self._given_bounds = lower, max(upper, self.default_max_t_f())
            with torch.no_grad():
                self.t0.fill_(template[0])
                self.t_f.fill_(template[-1])
        first = self._template[0]
        if abs(template[0] - first) > 2e-5 * max(1.0, abs(first)):
            raise ValueError(
                f"the span passed starts at {template[0]:g}, but this LearnableSpan at t0 = {first:g}; "
                "pass a span that starts there, or set `span.t_span` to a new template"
            )
        return template, descending

    # --------------------------------------------------------------------------------------------------- the solve

    def forward(
        self,
        x: Tensor,
        t_span: Tensor | None = None,
        save_at: Iterable[float] | Tensor = (),
        args: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Solve the ODE over the learned interval.

        Args:
            x: initial state, ``[batch, ...]``.
            t_span: a span of the caller's own. It is cut at t_f too, and must start at t0. A descending one integrates
                from t_f to t0.
            save_at: times to return instead of all points, within [t0, t_f].
            args: passed on to a field that takes ``args``.

        Returns:
            ``(t_eval, sol)`` with ``t_eval`` ``[points]`` and ``sol`` ``[points, *x.shape]``; only ``sol`` where the
            node was made with ``return_t_eval=False``. ``sol[-1]`` is z(t_f), with its gradient in t_f.

        Raises:
            IntegrationError: the state is not finite, or the solver's steps ran out.
            ValueError, TypeError: an argument that cannot be used; nothing is changed then.
        """
        _check_state(x, self.node)
        if args is not None and not isinstance(args, Mapping):
            raise TypeError(f"args must be a mapping, which the field gets as its `args`; got {type(args).__name__}")
        # The first span passed may become the template, but not that of a call that fails.
        before = None if self._filled else (self._template, False, self.t0.item(), self.t_f.item())
        bound = None
        try:
            grid = self._grid(t_span, save_at)
            bound = self._field.bind(x, args)
            solution, cost = self._solve(bound, x, grid)
        except Exception as error:
            if before is not None:
                self._restore(*before)
            if bound is not None:
                bound.undo()
                self._explain(error, bound, x)
            raise
        bound.finish()
        if before is not None and not self.training:
            self._restore(*before)  # a look in eval mode does not decide what is to be learned
        else:
            self._filled = True  # a span passed later is one of many, and must not reset what was learned
        self._last = _Last(tuple(x.shape), bound, solution.steps, cost, x, grid, solution.states)
        if not self.node.return_t_eval:
            return solution.states
        t_f = self.t_f
        return grid.times(t_f.dtype, t_f.device), solution.states

    def trajectory(self, x: Tensor, t_span: Tensor | None = None) -> Tensor:
        """The states at the points of ``t_span``, cut at t_f: ``[points, *x.shape]``, as ``NeuralODE.trajectory``."""
        out = self(x, t_span)
        return out[1] if isinstance(out, tuple) else out

    def _solve(self, bound: BoundField, x: Tensor, grid: Grid) -> tuple[Solution, Tensor | None]:
        node = self.node
        settings = dict(atol=node.atol, rtol=node.rtol, interpolator=self._interpolator())
        learning = torch.is_grad_enabled()
        checkpoint = learning and self.checkpoint and node.sensitivity == "autograd"
        # An adjoint counts the running cost beside the state, with or without a gradient.
        adjoint = node.sensitivity != "autograd" and (learning or node.integral_loss is not None)
        if not (adjoint or checkpoint):
            return integrate(bound.function, x, grid, self._stepper, **settings), None
        if learning and (kinds := bound.random_or_stateful()):
            under = "checkpoint=True" if checkpoint else f"sensitivity={node.sensitivity!r}"
            instead = "checkpoint=False" if checkpoint else "sensitivity='autograd'"
            raise ValueError(
                f"{', '.join(kinds)} in training mode within the field, under {under}: the "
                f"backward solve would see another field than the forward one; use {instead}, or .eval() them"
            )

        @contextmanager
        def restored():
            with bound.restored():
                yield
            bound.release()

        if checkpoint:
            if any(p.requires_grad for p in node.solver.parameters()):
                raise ValueError(
                    f"checkpoint=True gives the solver's own parameters ({self._stepper.name}) no gradient; freeze them, "
                    "or use checkpoint=False"
                )
            problem = CheckpointProblem(
                f=bound.function,
                module=node.vf,
                parameters=bound.parameters,
                stepper=self._stepper,
                restored=restored,
                **settings,
            )
            return solve_checkpointed(problem, x, grid), None
        interpolated = node.sensitivity == "interpolated_adjoint"
        tighter = min if interpolated else lambda forward, backward: backward  # torchdyn takes the forward's there

        adjoint_problem = AdjointProblem(
            f=bound.function,
            module=node.vf,
            parameters=bound.parameters,
            stepper=self._stepper,
            backward_stepper=self._backward_stepper,
            backward_atol=tighter(node.atol, node.atol_adjoint),
            backward_rtol=tighter(node.rtol, node.rtol_adjoint),
            running_cost=node.integral_loss,
            interpolated=interpolated,
            restored=restored,
            **settings,
        )
        return solve_adjoint(adjoint_problem, x, grid)

    def _interpolator(self):
        name = self.node.interpolator
        if name is None or not self._stepper.adaptive or self._stepper.name == "tsit5":  # torchdyn has none for tsit5
            return None
        return str_to_interp(name, torch.float64) if isinstance(name, str) else name

    def _restore(self, template: list[float], filled: bool, t0: float, t_f: float) -> None:
        self._template, self._filled = template, filled
        with torch.no_grad():
            self.t0.fill_(t0)
            self.t_f.fill_(t_f)

    def _explain(self, error: Exception, bound: BoundField, x: Tensor) -> None:
        """Says more about a failed solve: t_f, or that the field does not accept x at all."""
        if isinstance(error, IntegrationError):
            lower, upper = self.bounds
            where = f" (t_f = {self.t_f.item():.6g}, bounds {lower:.6g} to {upper:.6g})"
            error.args = (f"{error.args[0]}{where}", *error.args[1:])
        elif isinstance(error, RuntimeError):
            try:
                with torch.no_grad(), bound.restored():
                    bound.function(self.t0.detach().to(x), x)
            except RuntimeError as again:
                if str(again) == str(error):
                    raise ValueError(
                        f"the vector field does not accept a state of shape {tuple(x.shape)} and {x.dtype}: {error}"
                    ) from error

    # ---------------------------------------------------------------------------------------- what the last forward did

    @property
    def steps(self) -> int:
        """Steps of the last forward (adaptive: the accepted ones); before one, those of the grid (fixed steps)."""
        if self._last.steps:
            return len(self._last.steps) - 1
        if self._stepper.adaptive:
            raise RuntimeError("an adaptive solver's steps are known after a forward call; make one first")
        return len(self._grid(None, ()).nodes) - 1

    @property
    def nfe(self) -> int:
        """Evaluations of the field in the last forward, and in its backward once that ran (adjoints)."""
        return 0 if self._last.bound is None else self._last.bound.nfe

    @property
    def running_cost(self) -> Tensor:
        """The integral of ``node.integral_loss`` over the last forward, ``[batch]``.

        Under autograd it is the first column of the state and carries its gradient; under an adjoint it is a value
        alone, since the backward pass adds its gradient by itself (torchdyn's convention).
        """
        if self.node.integral_loss is None:
            raise RuntimeError("the node has no integral_loss, so there is no running cost")
        last = self._last
        if self.node.sensitivity == "autograd" and last.states is not None and last.x is not None:
            return last.states[-1][:, 0] - last.x[:, 0]
        if last.running_cost is None:
            raise RuntimeError("the running cost is known after a forward call; make one first")
        return last.running_cost

    # -------------------------------------------------------------------------------------------- the node's own names

    @property
    def solver(self) -> nn.Module:
        """The node's solver. It can be set, by torchdyn's names or to an instance."""
        return self.node.solver

    @solver.setter
    def solver(self, value: str | nn.Module) -> None:
        node = self.node
        before = node.solver, node.solver_adjoint
        node.solver = str_to_solver(value) if isinstance(value, str) and value in SOLVER_DICT else value
        if node.solver_adjoint is before[0]:
            node.solver_adjoint = node.solver
        try:
            self._stepper, self._backward_stepper = _check_node(node)
        except (TypeError, ValueError):
            node.solver, node.solver_adjoint = before
            raise

    @property
    def vf(self) -> nn.Module:
        """The node's vector field."""
        return self.node.vf

    @property
    def order(self) -> int:
        """The order of the node's ODE."""
        return self.node.order

    @property
    def sensitivity(self) -> str:
        """The node's way to gradients."""
        return self.node.sensitivity

    @property
    def adaptive(self) -> bool:
        """Whether the node's solver chooses its steps."""
        return self._stepper.adaptive

    # -------------------------------------------------------------------------------------------- copies and checkpoints

    def _apply(self, fn, recurse=True):
        def keep_precise(t: Tensor) -> Tensor:
            out = fn(t)
            # Half precision has about 3 digits: far too few for a time that steps are subtracted from.
            return t.to(out.device) if out.is_floating_point() and out.dtype.itemsize < 4 else out

        if recurse:
            self.node._apply(fn)
        return super()._apply(keep_precise, recurse=False)

    def _release(self) -> None:
        """Lets go of graphs that torchdyn's modules keep: a non-leaf tensor can be neither copied nor pickled."""
        self.node.vf_params = self.node.vf_params.detach()
        for module in self.node.vf.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    setattr(module, name, value.detach())

    def __getstate__(self):
        self._release()
        return {**self.__dict__, "_last": _Last()}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "template"] = torch.tensor(self._template, dtype=torch.float64)
        destination[prefix + "bounds"] = torch.tensor(self._given_bounds or (), dtype=torch.float64)
        destination[prefix + "filled"] = torch.tensor(self._filled)
        destination[prefix + "pinned"] = torch.tensor(self.pinned)
        if self.pinned:  # the steps were laid for this solver
            destination[prefix + "solver"] = torch.tensor(list(self._stepper.name.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # The names are those of the bare node, so that checkpoints of the bare and the wrapped model fit both.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            name = key[len(prefix) :]
            if "." in name and not name.startswith("node."):
                state_dict[prefix + "node." + name] = state_dict.pop(key)
        own = {k: v for k, v in state_dict.items() if "." not in k[len(prefix) :] or k.startswith(prefix + "node.")}
        template, bounds, filled, pinned, solver = (
            own.pop(prefix + k, None) for k in ("template", "bounds", "filled", "pinned", "solver")
        )
        if prefix + "t_f" not in own:  # a checkpoint of the bare model says nothing of times
            own.update({prefix + "t_f": self.t_f, prefix + "t0": self.t0})
        # Looked at before anything is taken over.
        for name in ("t0", "t_f"):
            if prefix + name in own and own[prefix + name].dim():  # of a vector, torch 2.9 takes the first entry
                raise ValueError(
                    f"{prefix}{name} must be one time; the state has the shape {tuple(own[prefix + name].shape)}"
                )
        loaded = self._template if template is None else _check_span(template, f"{prefix}template")[0]
        given = self._given_bounds
        if bounds is not None:
            given = _check_bounds(bounds.tolist(), loaded[0], frozen=True) if bounds.numel() else None
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        self._template, self._given_bounds = loaded, given
        if filled is not None:
            self._filled = bool(filled)
        if pinned is not None:
            self.pinned = bool(pinned)
        if (
            solver is not None
            and (name := bytes(solver.tolist()).decode()) != self._stepper.name
            and name in SOLVER_DICT
        ):
            self.solver = name

    def extra_repr(self) -> str:
        lower, upper = self.bounds
        return f"t0={self.t0.item():.4g}, t_f={self.t_f.item():.4g}, bounds=({lower:.4g}, {upper:.4g}), {self._stepper.name}"


@functools.lru_cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """The number of ``dtype`` next to ``value``. Bounds are asked for at every call and seldom change."""
    return torch.tensor(value, dtype=dtype).item()


def _without_node_prefix(module: nn.Module, state_dict: dict, prefix: str, _: Any) -> None:
    inner = prefix + "node."
    for key in [k for k in state_dict if k.startswith(inner)]:
        state_dict[prefix + key[len(inner) :]] = state_dict.pop(key)


# ------------------------------------------------------------------------------------------------------------- checks


def _check_node(node: Any) -> tuple[Stepper, Stepper]:
    if isinstance(node, LearnableSpan):
        raise TypeError("this NeuralODE is wrapped already: got a LearnableSpan; use it as it is, or wrap its `node`")
    if not isinstance(node, NeuralODE):
        raise TypeError(
            f"LearnableSpan wraps a torchdyn NeuralODE; got {type(node).__name__}. NeuralSDE, HybridNeuralDE and "
            "MultipleShootingLayer are not supported; for a module that contains NeuralODEs use `wrap(module)`"
        )
    if node.sensitivity not in SENSITIVITIES:
        raise ValueError(f"sensitivity={node.sensitivity!r} is unknown to torchdyn; it knows {SENSITIVITIES}")
    stepper = make_stepper(node.solver)
    backward = make_stepper(node.solver_adjoint)
    if node.sensitivity != "autograd":
        for role, method in (("solver", stepper), ("solver_adjoint", backward)):
            if isinstance(method, AsynchronousLeapfrog):
                raise ValueError(f"{role}='alf' cannot work under sensitivity={node.sensitivity!r}; use 'autograd'")
        if isinstance(backward, Hypersolver):
            raise ValueError(
                f"a hypersolver cannot solve the adjoint equation; give solver_adjoint, such as {backward.name[6:]!r}"
            )
    return stepper, backward


def _check_state(x: Any, node: NeuralODE) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"the initial state must be a tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"the initial state must be of a floating-point type; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"the initial state must be a dense tensor; got {x.layout}; use x.to_dense()")
    if node.order > 1:
        columns = x.shape[1] if x.dim() > 1 else 0
        columns -= 1 if node.integral_loss is not None and node.sensitivity == "autograd" else 0
        if columns <= 0 or columns % node.order:
            raise ValueError(
                f"an ODE of order {node.order} needs a state [batch, {node.order} * n]; got the shape {tuple(x.shape)}"
            )


def _check_span(t_span: Any, name: str, either_direction: bool = False) -> tuple[list[float], torch.dtype]:
    """The span's times as numbers, and the dtype that times of it have."""
    if not isinstance(t_span, Tensor):
        raise TypeError(f"{name} must be a 1-D tensor of times; got {type(t_span).__name__} ({t_span!r})")
    if not t_span.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point type; got {t_span.dtype}")
    if t_span.dim() != 1 or t_span.numel() < 2:
        raise ValueError(f"{name} must be 1-D with two points or more; got the shape {tuple(t_span.shape)}")
    times = t_span.detach().tolist()
    if not all(map(math.isfinite, times)):
        raise ValueError(f"{name} must be finite; got {times if len(times) < 9 else [*times[:4], '..', *times[-4:]]}")
    steps = [b - a for a, b in itertools.pairwise(times)]
    if not (all(s > 0 for s in steps) or (either_direction and all(s < 0 for s in steps))):
        along = steps[0] if either_direction else 1.0
        i = next(i for i, s in enumerate(steps) if s * along <= 0)
        order = "ascend or descend" if either_direction else "ascend"
        raise ValueError(
            f"{name} must strictly {order}; its points {i} and {i + 1} are {times[i]:g} and {times[i + 1]:g}"
        )
    return times, torch.float64 if t_span.dtype == torch.float64 else torch.float32


def _check_bounds(bounds: Any, t0: float, frozen: bool = False) -> tuple[float, float]:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise TypeError(f"bounds must be a pair (lower, upper) of times; got {bounds!r}")
    lower, upper = (checks.finite(b, "a bound of t_f") for b in bounds)
    if not t0 < lower <= upper:
        raise ValueError(f"bounds must satisfy t0 < lower <= upper; got t0 = {t0:g}, bounds = ({lower:g}, {upper:g})")
    if lower == upper and not frozen:
        raise ValueError(
            f"equal bounds {lower:g} leave t_f nothing to learn; freeze it (t_f.requires_grad_(False)) first"
        )
    return lower, upper


def _check_step_size(step_size: Any, template: Sequence[float], stepper: Stepper) -> float:
    if stepper.adaptive:
        raise ValueError(f"step_size={step_size!r} is for fixed-step solvers; {stepper.name} chooses its own steps")
    step = checks.finite(step_size, "step_size")
    length = template[-1] - template[0]
    if not 0 < step <= length * (1 + 1e-6):
        raise ValueError(f"step_size must be positive and at most the span's length {length:g}; got {step:g}")
    if length / step > MAX_POINTS:
        raise ValueError(
            f"step_size = {step:g} makes {length / step:.3g} steps of the span's length {length:g}; give a larger one"
        )
    return step


def _regrid(template: Sequence[float], step: float, dtype: torch.dtype) -> list[float]:
    """The template's interval with another step size; its end stays."""
    if abs(template[1] - template[0] - step) <= 1e-6 * step:
        return list(template)
    t0, end = template[0], template[-1]
    # No sliver of a step at the end: the grid would go on beyond it in steps of that size.
    sliver = max(1e-3 * step, 2e-5 * max(1.0, abs(end)))
    n = max(1, math.ceil((end - t0 - sliver) / step))
    inner = torch.tensor([t0 + k * step for k in range(1, n)], dtype=dtype).tolist()
    return [t0, *inner, end]


def _as_numbers(save_at: Iterable[float] | Tensor) -> list[float]:
    if isinstance(save_at, Tensor):
        if save_at.layout != torch.strided:
            raise TypeError(f"save_at must be a dense tensor; got {save_at.layout}")
        save_at = save_at.detach().reshape(-1)
    return [checks.finite(t, "a time in save_at") for t in save_at]
