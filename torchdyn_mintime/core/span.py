r"""A learnable interval [t0, t_f] around a NeuralODE (Algorithm 1 and eq. (12) to (14) of the paper)."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.ode import SOLVER_DICT, str_to_solver

from torchdyn_mintime.core.field import Field, has_hooks
from torchdyn_mintime.core.interval import Interval, check_span
from torchdyn_mintime.core.learnable_interval import LearnableInterval, Plan
from torchdyn_mintime.core.series import Series
from torchdyn_mintime.core.solve import LastSolve, Method, interpolator_of
from torchdyn_mintime.numerics import Grid, IntegrationError, LearnableSolver, LearnedStepper, Stepper

__all__ = ["LOAD_HINT", "Call", "LearnableSpan"]

_log = logging.getLogger(__name__)

MANY_PIECES = 50
"""An adaptive solve that lands on the ends of so many pieces is worth a warning, if it hardly takes more steps than these."""


@dataclass(frozen=True)
class Call:
    """A call of a span, for what stands in its place (:func:`~torchdyn_mintime.core.reference.replaced_solves`).

    Calling it makes the span's own solve, and returns ``(t_eval, sol)``.

    Attributes:
        span: the span that is called.
        x, args: what it is called with.
        plan: what it is to solve.
        sensitivity: the way to gradients, where it is not the span's.
    """

    span: "LearnableSpan"
    x: Tensor
    plan: Plan
    args: Mapping[str, Any] | None = None
    sensitivity: str | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        last = self.span._solve(self.x, self.plan, self.args, self.sensitivity)
        return self.span._returned(last, self.plan.rows)

    def grid(self) -> Grid:
        """Returns the points that the call is solved on, without solving it."""
        return self.plan.grid


Solve = Callable[["LearnableSpan", Tensor, Call], tuple[Tensor, Tensor]]
"""``solve(span, x, call) -> (t_eval, sol)``: what stands in a span's place; ``call()`` is its own solve from ``x``."""

LOAD_HINT = (
    "(a callback has wrapped it: make the module, `from torchdyn_mintime import wrap; wrap(module)`, then load this "
    "state_dict; or give the Trainer the callback)"
)
"""The name of an empty entry in checkpoints of Lightning, which torch shows where the module that loads is a bare one."""


class LearnableSpan(LearnableInterval):
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
        step_size: the step of fixed-step solvers. Default: the template's first spacing; otherwise the template is made
            anew with this step.
        learn_t0: whether t0 is a parameter too. It is clipped to t_f - step_size.
        checkpoint: keep one state a step for backward, and evaluate the field once more there. The gradient is the
            same, to rounding, as without: exactly that of the discrete solution (sensitivity "autograd").

    Attributes:
        node: the NeuralODE.
        t_f: scalar ``nn.Parameter``, float32 at least.
        t0: scalar buffer, or parameter with ``learn_t0=True``.
        interval: the template, the bounds and what has laid them, a value that never changes; assign one that was read
            before to put it back.
        last: the record of the last forward (:class:`LastSolve`); None before the first, and in copies.
        field: the node's field, to be bound to one solve after another.

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

    _settles = True  # see core.untraced.never_first

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
        method = _method_of(node)
        stepper = method.stepper
        given = t_span if t_span is not None else node.t_span
        settled = given is not None
        if given is None:  # in float32 whatever the default type is: half precision would round the points
            points = 2 if stepper.adaptive or isinstance(stepper, LearnedStepper) else 101
            given = torch.linspace(0, 1, points, dtype=torch.float32)
        template, dtype = check_span(given, "t_span")
        interval = Interval(template, settled=settled, **_traits(stepper))
        if step_size is not None:
            interval = interval.with_step_size(step_size, dtype)
        super().__init__(interval.with_bounds(bounds), t_f, dtype, learn_t0)
        if checkpoint and node.sensitivity != "autograd":
            raise ValueError(
                f"checkpoint=True is for sensitivity='autograd'; the node has {node.sensitivity!r}, which keeps few states "
                "by itself"
            )
        _refuse_adjoint(node.solver, node)
        if has_hooks(node):
            warnings.warn(
                "the node has hooks, which a LearnableSpan does not call, since it solves by itself; register them on the span",
                stacklevel=2,
            )
        if isinstance(node.solver_adjoint, LearnableSolver):
            # Never used. functional_call does not restore a module that is there under two names.
            node.solver_adjoint = str_to_solver("rk4")
        self.node, self.field, self.checkpoint, self._method = node, Field(node), checkpoint, method
        self._by_autograd = False
        self.last: LastSolve | None = None
        self._series = Series()
        self._replacement: Solve | None = None  # see core.reference.replaced_solves
        self._steps_seen: _StepsSeen | None = _StepsSeen()
        self.release()
        self.register_state_dict_post_hook(_without_node_prefix)

    @torch.no_grad()
    def lay(self, nodes: Sequence[float], solver: str | nn.Module | None = None) -> None:
        """Takes steps between these times from now on, whatever span is passed, and ends at the last of them.

        Bounds that were given stay. t_f is not clipped to them: the caller must keep to them.

        Args:
            nodes: strictly ascending, two or more (units of time); the first is t0. An adaptive solver lands on each.
            solver: another solver for the node, if given.

        Raises:
            ValueError, TypeError: nodes or a solver that cannot be used. Nothing is changed then.
        """
        template, _ = check_span(torch.tensor(nodes, dtype=self.t_f.dtype), "nodes")
        interval = self.interval.with_template(template)
        if solver is not None:
            self._take_solver(solver)
        self.interval = replace(interval, pinned=True, **_traits(self.stepper))
        self.t0.fill_(template[0])
        self.t_f.fill_(template[-1])

    # --------------------------------------------------------------------------------------------------- the solve

    def forward(
        self,
        x: Tensor,
        t_span: Tensor | None = None,
        save_at: Iterable[float] | Tensor = (),
        args: Mapping[str, Any] | None = None,
        *,
        dense: bool = False,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Solves the ODE over the learned interval.

        Args:
            x: initial state, ``[batch, ...]``.
            t_span: a span of the caller's own, ascending or descending. It is solved at its points over its part in
                [t0, t_f], from where it starts to where it ends; one that starts or ends with the template does so at
                t0 or t_f. Where t_f is frozen at the template's end, with no bound above, it is solved as torchdyn would.
            save_at: times to return instead of all points, within the interval solved: a row for each, in this order.
            args: passed on to a field that takes ``args``.
            dense: take the steps of the template alone, and give the states at the asked times (``save_at``, else the points
                of ``t_span``) by the method's interpolant, so that they cost no evaluation. As accurate as the steps: their
                error has the order of the method for euler (1), midpoint (2) and rk4 (4). The interpolants of dopri5 and tsit5
                have the order 4, and their error is not controlled: it may be some ten times that at the ends of steps. Inside
                the one step of a LearnableSolver the order is 2, or 1 where the solver's is.

        Returns:
            ``(t_eval, sol)`` with ``t_eval`` ``[points]`` and ``sol`` ``[points, *x.shape]``; only ``sol`` where the
            node was made with ``return_t_eval=False``. ``sol[-1]`` is z(t_f), with its gradient in t_f.

        Raises:
            IntegrationError: the state is not finite, or the solver's steps ran out.
            ValueError, TypeError: an argument that cannot be used; nothing is changed then.
        """
        self._follow_node()
        plan = self._plan(t_span, save_at, dense)
        if self.training and t_span is not None:
            self._series.check(plan, t_span, self.t_f)
        if self._replacement is not None:
            t_eval, sol = self._replacement(self, x, Call(self, x, plan, args))
            return (t_eval, sol) if self.field.node.return_t_eval else sol
        t_eval, sol = self._returned(self._solve(x, plan, args), plan.rows)
        if self.training and t_span is not None and plan.grid.keep is None:
            sol = self._series.watch(t_eval, sol)
        return (t_eval, sol) if self.field.node.return_t_eval else sol

    def _returned(self, last: LastSolve, rows: list[int] | None) -> tuple[Tensor, Tensor]:
        t_f = self.t_f
        times, states = last.grid.times(t_f.dtype, t_f.device), last.states
        return (times, states) if rows is None else (times[rows], states[rows])

    def _solve(
        self, x: Tensor, plan: Plan, args: Mapping[str, Any] | None = None, sensitivity: str | None = None
    ) -> LastSolve:
        try:
            with self.field.bind(x, args) as bound:
                last = self._method.solve(bound, x, plan.grid, self.checkpoint, sensitivity)
        except IntegrationError as error:
            where = " (t_f = {:.6g}, bounds {:.6g} to {:.6g})".format(self.t_f.item(), *self.bounds)
            error.args = (f"{error.args[0]}{where}", *error.args[1:])
            raise
        self._warn_of_pieces(last)
        # A look in eval mode does not decide what is to be learned, and a call that fails does not either.
        learning = self.training and self._settles
        if plan.settles is not None and learning and isinstance(self.t_f, nn.Parameter):
            self._settle(plan)
        self.last = last.light()
        if (
            self._steps_seen is not None
            and self.training
            and torch.is_grad_enabled()
            and not self._steps_seen.go_on(self)
        ):
            self._steps_seen = None
        return last

    def _warn_of_pieces(self, last: LastSolve) -> None:
        """Says once where the times that a call asks for, and not the tolerance, decide the steps of an adaptive solver."""
        if not self._method.stepper.adaptive:
            return
        pieces, steps = len(last.grid.nodes) - 1, len(last.steps) - 1
        lands = self.interpolator is None and pieces >= len(self.interval.template)  # not its points
        if lands and pieces >= MANY_PIECES and steps < 2 * pieces and self._first_time("pieces"):
            warnings.warn(
                f"the {pieces + 1} times asked for have cut the solve by {self.stepper.name} into pieces: it lands on each, in "
                f"{steps} steps and {last.bound.nfe} evaluations. With dense=True it takes the steps that its tolerance needs, "
                "and gives the states between by interpolation",
                stacklevel=6,  # past forward and what torch calls it by
            )

    @torch.no_grad()
    def solve_again(self) -> None:
        """Solves the last call once more, with the parameters as they are now; :attr:`last` is then this one."""
        last = self.last
        if last is None:
            raise RuntimeError("no forward was made; call the model first")
        with last.bound.restored():
            before, last.bound.nfe = last.bound.nfe, 0
            try:
                self.last = self._method.solve(last.bound, last.x.detach(), Grid(last.grid.nodes), False)
            except IntegrationError:
                last.bound.nfe = before
                raise

    def trajectory(self, x: Tensor, t_span: Tensor | None = None, *, dense: bool = False) -> Tensor:
        """Returns the states at the points of ``t_span``, cut at t_f: ``[points, *x.shape]``.

        As torchdyn's own, it is differentiated by autograd whatever the node's sensitivity. Where the steps were laid
        (:meth:`lay`, a search), each time that is asked for is a point of the solve too, at the price of a step; a
        LearnableSolver has states at the two ends alone. ``dense=True`` needs no more steps.

        Args:
            x, t_span, dense: as those of :meth:`forward`.

        Raises:
            ValueError: there is no state for a time that is asked for, or the span starts later than the steps that were laid.
        """
        self._follow_node()
        plan = self._plan(t_span, (), dense)
        if self.training and t_span is not None:
            self._series.check(plan, t_span, self.t_f)
        if t_span is not None and not dense and (self.interval.pinned or self.interval.one_step):
            # These solve the whole interval by steps of their own, and the caller's points are others.
            plan = self._plan(t_span, self.interval.asked(t_span.tolist(), plan.grid.nodes, self.t_f.dtype))
        call = Call(self, x, plan, sensitivity="autograd")
        if self._replacement is not None:
            return self._replacement(self, x, call)[1]
        sol = call()[1]
        return sol if t_span is None or not self.training else self._series.watch(None, sol)

    # ---------------------------------------------------------------------------------------- what the last forward did

    @property
    def steps(self) -> int:
        """Steps of the last forward (adaptive: the accepted ones); before one, those of the grid (fixed steps)."""
        if self.last is not None:
            return len(self.last.steps) - 1
        if self.adaptive:
            raise AttributeError("an adaptive solver's steps are known after a forward call; make one first")
        return len(self.nodes) - 1

    @property
    def nfe(self) -> int:
        """Evaluations of the field in the last forward, and in its backward once that ran (adjoints)."""
        return 0 if self.last is None else self.last.bound.nfe

    @property
    def running_cost(self) -> Tensor:
        """The integral of ``node.integral_loss`` over the last forward, ``[batch]``.

        It carries its gradient: as the first column of the state under autograd, by the backward solve under an adjoint.
        Under an adjoint, backward adds the gradient of its sum by itself if the loss does not use it (torchdyn's
        convention). That gradient knows nothing of a scaled loss (GradScaler, accumulated batches), nor of a second
        backward: then put ``span.running_cost.sum()`` on the loss.
        """
        if self.node.integral_loss is None:
            raise AttributeError("the node has no integral_loss, so there is no running cost")
        if self.last is None:
            raise AttributeError("the running cost is known after a forward call; make one first")
        if self.node.sensitivity == "autograd":
            if not self.last.reaches_end:
                raise AttributeError(
                    f"the last forward was asked for no state at the end, {self.last.steps[-1]:g}, of its solve, and under "
                    "autograd the running cost is a part of the state there; ask for the end too"
                )
            return self.last.end[:, 0] - self.last.x[:, 0]
        if self.last.running_cost is None:
            raise AttributeError("trajectory() counts no running cost under an adjoint; call the span itself")
        return self.last.running_cost

    # -------------------------------------------------------------------------------------------- the node's own names

    @property
    def solver(self) -> nn.Module:
        """The node's solver. It can be set, by torchdyn's names or to an instance."""
        return self.node.solver

    @solver.setter
    def solver(self, value: str | nn.Module) -> None:
        if isinstance(value, LearnableSolver):
            _refuse_adjoint(value, self.node)
        self._take_solver(value)

    @property
    def by_autograd(self) -> bool:
        """Whether gradients are those of autograd whatever the node's own sensitivity. It can be set."""
        return self._by_autograd

    @by_autograd.setter
    def by_autograd(self, value: bool) -> None:
        self._method = Method(self.node, value)
        self._by_autograd = bool(value)

    def _take_solver(self, value: str | nn.Module) -> None:
        """Sets the solver; with a LearnableSolver gradients are those of autograd, whatever the node's sensitivity."""
        node = self.node
        before = node.solver, node.solver_adjoint
        node.solver = str_to_solver(value) if isinstance(value, str) and value in SOLVER_DICT else value
        if node.solver_adjoint is before[0] and not isinstance(node.solver, LearnableSolver):
            node.solver_adjoint = node.solver
        try:
            self._method = Method(node, self._by_autograd)
        except (TypeError, ValueError):
            node.solver, node.solver_adjoint = before
            raise
        self.interval = replace(self.interval, **_traits(self.stepper))

    def _follow_node(self) -> None:
        """Takes a solver that was set on the node, as ``span.node.solver = ..``, which torchdyn reads at every call."""
        node = self.node
        if self._method.solvers != (node.solver, node.solver_adjoint):  # modules: equal where they are the same
            self.solver = node.solver

    @property
    def stepper(self) -> Stepper:
        """The method that the span steps with: the node's solver, exact."""
        return self._method.stepper

    @property
    def interpolator(self) -> Callable | None:
        """The interpolant that gives points between t0 and t_f without landing on them (dopri5 on request), or None."""
        return interpolator_of(self.node, self.stepper)

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
        """The way to gradients: the node's, or autograd where :attr:`by_autograd` or a LearnableSolver says so."""
        return self._method.sensitivity

    @property
    def adaptive(self) -> bool:
        """Whether the node's solver chooses its steps."""
        return self.stepper.adaptive

    # -------------------------------------------------------------------------------------------- copies and checkpoints

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for kind in ("_parameters", "_buffers", "_modules"):  # at every call: torch's own way here is as long again
            if kind in own and name in own[kind]:
                return own[kind][name]
        if name == "odeint":
            raise AttributeError(
                "a LearnableSpan has no odeint: call the span itself, span(x, t_span), which ends at t_f; span.node.odeint "
                "is torchdyn's own solve over the span that is passed"
            )
        # A property that raises AttributeError ends up here, where torch's text would replace its reason.
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        return super().__getattr__(name)

    def release(self) -> None:
        """Lets go of graphs that torchdyn's modules keep of an evaluation."""
        if "vf_params" in vars(self.node):  # torchdyn 1.0.6 keeps it; a mended one makes it anew
            self.node.vf_params = self.node.vf_params.detach()
        self.field.release()

    def _graphs(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Returns the attributes of the field's modules that hold a graph, such as a condition that was set there."""
        found = [(m, name, value) for m in self.vf.modules() for name, value in vars(m).items()]
        return [entry for entry in found if isinstance(entry[2], Tensor) and entry[2].grad_fn is not None]

    def __setattr__(self, name, value):
        # A module would be registered as a solver, and the property passed by; a record is no module, and set at every call.
        if name in ("solver", "last"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self):
        self.release()
        for module, name, value in self._graphs():  # what has a graph can be neither copied nor pickled
            setattr(module, name, value.detach())
        return {**self.__dict__, "last": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LearnableSpan":
        graphs = self._graphs()
        made = memo[id(self)] = type(self).__new__(type(self))
        try:
            made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        finally:
            for module, name, value in graphs:  # the copy has none, this one goes on with them
                setattr(module, name, value)
        self.release()
        return made

    @property
    def template(self) -> Tensor:
        """The template as the state_dict has it, in float64. torch.distributed.checkpoint asks for entries by their names."""
        return self._template

    @template.setter
    def template(self, value: Any) -> None:
        raise AttributeError(
            "the template is set by span.t_span. If this is torch.func.functional_call: give it dict(span.named_parameters()), "
            "and not the state_dict, which holds the interval too"
        )

    @property
    def filled(self) -> Tensor:
        """Whether the template is settled, as the state_dict has it."""
        return torch.tensor(self.interval.settled)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The buffers themselves, not copies: averages are kept by writing to what a state_dict holds.
        tensors = {"template": self._template, "bounds": self._bounds}
        destination.update({prefix + name: t if keep_vars else t.detach() for name, t in tensors.items()})
        interval = self.interval
        flags = {"filled": interval.settled, "pinned": interval.pinned}
        destination.update({prefix + name: torch.tensor(flag) for name, flag in flags.items()})
        if self.pinned:  # the steps were laid for this solver
            destination[prefix + "solver"] = torch.tensor(list(self.stepper.name.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        # The names are those of the bare node, so that checkpoints of the bare and the wrapped model fit both.
        for key in [k for k in state_dict if k.startswith(prefix)]:
            name = key[len(prefix) :]
            if name.startswith("solver_adjoint.") and not self.node.solver_adjoint.state_dict():
                del state_dict[key]  # a bare node has its LearnableSolver there too
            elif "." in name and not name.startswith("node."):
                state_dict[prefix + "node." + name] = state_dict.pop(key)
        own = {k: v for k, v in state_dict.items() if "." not in k[len(prefix) :] or k.startswith(prefix + "node.")}
        # Lightning's sharded strategies load a tensor only where it is computed with.
        lazy = [
            k for k, v in own.items() if "." not in k[len(prefix) :] and v is not None and not isinstance(v, Tensor)
        ]
        own.update({k: torch.clone(own[k]) for k in lazy})
        for key in [k for k in own if k.startswith(prefix + "(")]:  # this module needs no hint, in whatever words
            del own[key], state_dict[key]
        extra = {k: own.pop(prefix + k, None) for k in ("template", "bounds", "filled", "pinned", "solver")}
        if prefix + "t_f" not in own:  # a checkpoint of the bare model says nothing of times
            own.update({prefix + "t_f": self.t_f, prefix + "t0": self.t0})
        # Looked at before anything is taken over.
        for name in ("t0", "t_f"):
            if prefix + name in own and own[prefix + name].dim():  # of a vector, torch 2.9 takes the first entry
                raise ValueError(
                    f"{prefix}{name} must be one time; the state has the shape {tuple(own[prefix + name].shape)}"
                )
        interval, solver = self._interval_of(extra, prefix), extra["solver"]
        if (made := _learned_solver(own, prefix + "node.solver.", self.solver)) is not None:
            self._take_solver(made.to(self.t_f.device))
        super()._load_from_state_dict(own, prefix, metadata, strict, missing, unexpected, errors)
        name = self.stepper.name if solver is None else bytes(solver.tolist()).decode()
        if name != self.stepper.name and name in SOLVER_DICT:
            self._take_solver(name)
        self.interval = replace(interval, **_traits(self.stepper))

    def _interval_of(self, state: Mapping[str, Tensor | None], prefix: str) -> Interval:
        """Returns the interval of a state_dict; what is None there stays as it is here."""
        template, bounds, filled, pinned = (state[name] for name in ("template", "bounds", "filled", "pinned"))
        # What is loaded whole does not ask for what is here, which may be no numbers yet (`to_empty`).
        here = self.interval if template is None or bounds is None else self._interval
        interval = here.from_numbers(
            template,
            None if bounds is None else bounds.tolist(),
            self.t_f.dtype,
            None if pinned is None else bool(pinned),
            name=f"{prefix}template",
        )
        return interval if filled is None else replace(interval, settled=bool(filled))

    def extra_repr(self) -> str:
        lower, upper = self.bounds
        return f"t0={self.t0.item():.4g}, t_f={self.t_f.item():.4g}, bounds=({lower:.4g}, {upper:.4g}), {self.stepper.name}"


def _traits(stepper: Stepper) -> dict[str, Any]:
    """Returns what an interval knows of the method that takes its steps."""
    return {"solver": stepper.name, "adaptive": stepper.adaptive, "one_step": isinstance(stepper, LearnedStepper)}


class _StepsSeen:
    """Looks, in training forwards, whether an optimizer steps the field and leaves t_f out, until t_f has moved."""

    LIMIT = 20
    """Steps after which it is said. In fewer, t_f may wait for its turn (Algorithm 1 steps it in alternation)."""

    def __init__(self) -> None:
        self.time: int | None = None
        self.first: nn.Parameter | None = None
        self.field, self.steps, self.depended = -1, 0, False

    def go_on(self, span: LearnableSpan) -> bool:
        """Returns whether to look further; warns where the field was stepped ``LIMIT`` times and t_f never."""
        if not (isinstance(span.t_f, nn.Parameter) and span.t_f.requires_grad):
            return True
        if self.first is None or not self.first.requires_grad:
            self.first = next((p for p in span.vf.parameters() if p.requires_grad), None)
        first = self.first
        if first is None or (self.time is not None and span.t_f._version != self.time):
            return False
        if first._version != self.field:  # each step of an optimizer writes in place
            # The gradient may be cleared by now, with those of the whole model.
            self.steps += self.time is not None and (self.depended or span.t_f.grad is not None)
            self.time, self.field = span.t_f._version, first._version
        assert span.last is not None
        self.depended = span.last.grid.end is not None and span.last.reaches_end
        if self.steps < self.LIMIT:
            return True
        warnings.warn(
            f"the vector field was stepped {self.steps} times, and t_f, which requires a gradient, never: an optimizer that "
            "was made before the model was wrapped has no times. Make it after wrap(model), or "
            "optimizer.add_param_group({'params': [span.t_f]}); span.t_f.requires_grad_(False) keeps t_f as it is",
            stacklevel=5,
        )
        return False


def _without_node_prefix(module: nn.Module, state_dict: dict, prefix: str, _: Any) -> None:
    if getattr(module, "_is_fsdp_managed_module", False):
        return  # what shares out the weights looks for them by their own names
    inner = prefix + "node."
    for key in [k for k in state_dict if k.startswith(inner)]:
        state_dict[prefix + key[len(inner) :]] = state_dict.pop(key)


def _refuse_adjoint(solver: nn.Module, node: NeuralODE) -> None:
    if isinstance(solver, LearnableSolver) and node.sensitivity != "autograd":
        raise ValueError(
            f"a LearnableSolver has no adjoint, and the node has sensitivity={node.sensitivity!r}; make the node with "
            "sensitivity='autograd', which costs little for so few evaluations"
        )


def _learned_solver(state: Mapping[str, Tensor], prefix: str, present: nn.Module) -> LearnableSolver | None:
    """Returns the solver to put in for the one that a state holds; None where there is none, or the present one fits."""
    made = LearnableSolver.of_state(state, prefix)
    if made is None or (isinstance(present, LearnableSolver) and present.extra_repr() == made.extra_repr()):
        return None
    return made


def _method_of(node: Any) -> Method:
    if isinstance(node, LearnableSpan):
        raise TypeError("this NeuralODE is wrapped already: got a LearnableSpan; use it as it is, or wrap its `node`")
    if not isinstance(node, NeuralODE):
        raise TypeError(
            f"LearnableSpan wraps a torchdyn NeuralODE; got {type(node).__name__}. ODEProblem (make it a NeuralODE), "
            "NeuralSDE, HybridNeuralDE and MultipleShootingLayer are not supported; for a module that contains NeuralODEs use "
            "`wrap(module)`"
        )
    return Method(node)
