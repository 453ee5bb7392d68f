"""A model with fixed steps as a static network, to be deployed."""

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.models import CNF

from torchdyn_mintime.core import exact_trace
from torchdyn_mintime.core.field import Field, cost_columns, evaluating, written_by_evaluations
from torchdyn_mintime.core.interval import check_span
from torchdyn_mintime.core.learnable_interval import Plan
from torchdyn_mintime.core.solve import Method
from torchdyn_mintime.core.span import LearnableSpan
from torchdyn_mintime.core.untraced import undisturbed
from torchdyn_mintime.numerics import Grid, LearnedStepper, Stepper, evaluating_in, in_half_precision, make_stepper
from torchdyn_mintime.numerics.dense import InsideSteps
from torchdyn_mintime.numerics.steppers import ForeignStepper

__all__ = ["StaticSolve", "as_network"]

Asked = tuple[tuple[float, ...] | None, tuple[float, ...], bool]
"""The times that a call asks for: its ``t_span`` as numbers, or None, its ``save_at``, and whether they are dense."""

NOTHING: Asked = (None, (), False)


def as_network(model: nn.Module, *inputs: Any) -> nn.Module:
    """Returns a model with fixed steps as a static network, to be exported, compiled or traced.

    A copy of the model in eval mode, in which every ``LearnableSpan`` and every ``NeuralODE`` is the sequence of its
    evaluations: the times, the steps and the coefficients of the solver are constants. It gives what the model in eval mode
    gives, to rounding, and goes through ``torch.export``, ``torch.onnx.export``, ``torch.jit.trace`` and
    ``torch.compile(fullgraph=True)``. It does not check that the state is finite, and counts nothing. A ``NeuralODE`` that is
    not wrapped is solved as its span would be, over its own ``t_span``, [0, 1] if it has none.

    Args:
        model: a LearnableSpan, a NeuralODE, or a module that holds some.
        inputs: what the model is called with. Needed where it passes ``t_span`` or ``save_at`` to its spans: it is called
            once to see them.

    Returns:
        The network. It is called as the model is. Its parameters are copies.

    Raises:
        TypeError: ``model`` is not a module, or a state is not a tensor.
        ValueError: there is nothing to solve in ``model``, or a solve is not the same sequence of operations for every input:
            the solver is adaptive or a class of your own, the field has a data control, noise or a trace by autograd, one span
            is called with different times.

    Example:
        >>> from torchdyn_mintime import wrap
        >>> field = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> node = NeuralODE(field, solver="rk4", return_t_eval=False)  # doctest: +ELLIPSIS
        Your vector field ...
        >>> span, x = LearnableSpan(node, torch.linspace(0, 1, 3)), torch.randn(4, 2)
        >>> network = as_network(span)
        >>> program = torch.export.export(network, (x,))
        >>> torch.allclose(program.module()(x)[-1], span(x)[-1], atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"as_network takes a torch.nn.Module; got {type(model).__name__}")
    solved = list(_solved(model))
    if not solved:
        raise ValueError(f"there is no LearnableSpan or NeuralODE in {type(model).__name__}; it is a network already")
    steppers = [_static_stepper(module, name) for name, module in solved]
    asked = _times_asked(model, [module for _, module in solved], inputs) if inputs else {}
    memo: dict[int, Any] = {}
    with evaluating(model), undisturbed(model):
        for (name, module), stepper in zip(solved, steppers, strict=True):
            times, plan = asked.get(module) or (NOTHING, _plan(module, None, (), False))
            memo[id(module)] = StaticSolve(module, stepper, plan, times, memo, name or type(module).__name__)
        return copy.deepcopy(model, memo).eval()


def _solved(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Yields the names and modules to replace: every span, and every node that is in none."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LearnableSpan | NeuralODE)]
    inside = {id(m.node) for _, m in found if isinstance(m, LearnableSpan)}
    return [(name, module) for name, module in found if id(module) not in inside]


def _node(module: Any) -> Any:
    return module.node if isinstance(module, LearnableSpan) else module


def _static_stepper(module: nn.Module, name: str) -> Stepper:
    """Returns the stepper of a solve that is the same for every input.

    Raises:
        ValueError: it is not.
    """
    node, who = _node(module), name or f"this {type(module).__name__}"
    stepper = module.stepper if isinstance(module, LearnableSpan) else Method(module).stepper
    if stepper.adaptive:
        raise ValueError(
            f"{who}: {stepper.name} chooses its steps for each input, which no static network can; take a solver of fixed "
            "steps, such as 'rk4', or fit one to the model: fit_solver(model, x0), compress(model, batches, loss)"
        )
    if isinstance(stepper, ForeignStepper):
        raise ValueError(
            f"{who}: whether a step of {stepper.name} is static cannot be known; take a solver of torchdyn, or a "
            "LearnableSolver"
        )
    for m in node.vf.modules():
        if hasattr(m, "_control"):
            raise ValueError(
                f"{who}: the field has a data control ({type(m).__name__}), which keeps a part of each input on the module; "
                "concatenate the input to the state instead"
            )
        if getattr(m, "noise_dist", None) is not None:
            raise ValueError(
                f"{who}: the field draws noise for each input ({type(m).__name__} with Hutchinson's trace); take the exact "
                "trace"
            )
    if any(isinstance(m, CNF) for m in node.vf.modules()) and not exact_trace.layers_of(Field(node).core()[0]):
        raise ValueError(
            f"{who}: torchdyn's CNF finds the trace by autograd, which cannot be exported. Its net may be "
            "nn.Sequential(Linear, Tanh, Linear); or put a net that knows its own trace in flows.HyperCNF"
        )
    if node.integral_loss is not None and not cost_columns(node):
        raise ValueError(
            f"{who}: under sensitivity={node.sensitivity!r} the running cost (integral_loss) is counted beside the solve and "
            "would be lost; make the node without it, or with sensitivity='autograd'"
        )
    return stepper


def _times_asked(
    model: nn.Module, solved: Sequence[nn.Module], inputs: tuple[Any, ...]
) -> dict[nn.Module, tuple[Asked, Plan]]:
    """Calls the model once, and returns what each solve is asked for.

    Raises:
        ValueError: one of them is asked for different times in one call.
    """
    seen: dict[nn.Module, tuple[Asked, Plan]] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("x", "t_span", "save_at"), args, strict=False)) | kwargs
        _check_state(given.get("x"))
        t_span, save_at, dense = given.get("t_span"), given.get("save_at", ()), given.get("dense", False)
        asked = _asked(t_span, save_at, dense)
        if module in seen and seen[module][0] != asked:
            raise ValueError(
                f"one {type(module).__name__} is asked for {_shown(seen[module][0])} and for {_shown(asked)} in one call of "
                "the model; a static network has one sequence of steps for it: use two spans"
            )
        seen[module] = asked, _plan(module, t_span, save_at, dense)

    handles = [module.register_forward_pre_hook(look, with_kwargs=True) for module in solved]
    try:
        with evaluating(model), undisturbed(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _asked(t_span: Tensor | None, save_at: Iterable[float] | Tensor, dense: bool) -> Asked:
    return None if t_span is None else tuple(t_span.tolist()), tuple(map(float, save_at)), dense


def _shown(asked: Asked) -> str:
    span = (
        "no t_span" if asked[0] is None else f"t_span from {asked[0][0]:g} to {asked[0][-1]:g} ({len(asked[0])} points)"
    )
    return span + (f" with save_at={list(asked[1])}" if asked[1] else "") + (" and dense=True" if asked[2] else "")


def _check_state(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"the state of a static network is one tensor; got {type(x).__name__}")


def _plan(module: Any, t_span: Tensor | None, save_at: Iterable[float] | Tensor, dense: bool) -> Plan:
    """Returns what the solve of a span, or of a bare node, is."""
    if isinstance(module, LearnableSpan):
        return module._plan(t_span, save_at, dense)
    if len(tuple(save_at)):
        raise ValueError("a NeuralODE of the model is called with save_at; wrap it first: wrap(model)")
    given = module.t_span if t_span is None else t_span
    nodes = (0.0, 1.0) if given is None else check_span(given, "t_span", either_direction=True)[0]
    return Plan(Grid(nodes))


class StaticSolve(nn.Module):
    """The evaluations of one solve, one after the other; made by :func:`as_network`.

    Args:
        module: the LearnableSpan or the NeuralODE.
        stepper: its method.
        plan: what a call solves.
        asked: the times that it is called with.
        memo: of the copies that were made so far, as ``copy.deepcopy`` keeps it.
        name: of the module, for errors.

    Attributes:
        field: the vector field.
        evaluations: how often a call evaluates the field.
        t_eval: the times of the returned states, ``[points]``.
        times: of the evaluations, ``[steps, stages]``.
    """

    t_eval: Tensor
    times: Tensor

    def __init__(self, module: Any, stepper: Stepper, plan: Plan, asked: Asked, memo: dict[int, Any], name: str):
        super().__init__()
        node = _node(module)
        core, self._takes_time, self._takes_args = Field(node).core()
        self.field: Any = copy.deepcopy(core, memo)
        self._flow = exact_trace.layers_of(self.field)
        self.integral_loss: Any = copy.deepcopy(node.integral_loss, memo)
        self._order, self._return_t_eval, self._name, self._asked = node.order, node.return_t_eval, name, asked
        if isinstance(stepper, LearnedStepper):
            taking: Any = stepper.toward(plan.grid.nodes[-1] - plan.grid.nodes[0])
            self._stepper: Stepper = taking.as_numbers()
        else:
            self.solver: nn.Module = copy.deepcopy(node.solver, memo)  # a hypersolver has parameters
            self._stepper = make_stepper(self.solver)
        self._grid, self._rows = Grid(plan.grid.nodes, keep=plan.grid.keep, dense=plan.grid.dense), plan.rows
        nodes = plan.grid.nodes
        self._sizes = [b - a for a, b in itertools.pairwise(nodes)]
        stages = [[t + c * size for c in self._stepper.nodes] for t, size in zip(nodes, self._sizes, strict=False)]
        self.evaluations = self._stepper.evaluations * len(self._sizes)
        times = module.t_f.dtype if isinstance(module, LearnableSpan) else torch.float32
        device = next((p.device for p in node.parameters()), torch.device("cpu"))
        t_eval = self._grid.times(times, device)
        self.register_buffer("t_eval", t_eval if self._rows is None else t_eval[self._rows], persistent=False)
        self.register_buffer("times", torch.tensor(stages, dtype=torch.float64, device=device), persistent=False)
        self._written = written_by_evaluations(list(self.field.modules()) if isinstance(self.field, nn.Module) else [])

    def forward(
        self,
        x: Tensor,
        t_span: Tensor | None = None,
        save_at: Iterable[float] | Tensor = (),
        args: Mapping[str, Any] | None = None,
        *,
        dense: bool = False,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Returns ``(t_eval, sol)``, or ``sol``, as the model's own solve does.

        Args:
            x: initial state, ``[batch, ...]``.
            t_span, save_at, dense: the times that the network was made for, or none.
            args: passed on to a field that takes ``args``.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: other times than those that the network was made for.
        """
        sol = self._solve(x, (t_span, save_at, dense), args)
        return (self.t_eval, sol) if self._return_t_eval else sol

    def trajectory(self, x: Tensor, t_span: Tensor | None = None, *, dense: bool = False) -> Tensor:
        """Returns the states alone, as ``trajectory`` of the model's own solve does."""
        return self._solve(x, (t_span, (), dense), None)

    def _solve(self, x: Tensor, asked: tuple, args: Mapping[str, Any] | None) -> Tensor:
        _check_state(x)
        self._check_times(*asked)
        kwargs = {"args": args or {}} if self._takes_args else {}

        def rate(t: Tensor, z: Tensor) -> Tensor:
            return self._rate(t, z, kwargs)

        half = in_half_precision(x, self._stepper)
        f, state = (evaluating_in(x.dtype, rate), x.float()) if half else (rate, x)
        held = [getattr(module, name) for module, name in self._written]
        states, nodes, dense = [state], self._grid.nodes, self._grid.dense
        inside = None if dense is None else InsideSteps(dense, self._stepper.interpolant, state, nodes)
        for i, (times, size) in enumerate(zip(self.times.to(state).unbind(), self._sizes, strict=True)):
            before = state
            state, stages = self._stepper.step(f, before, times.unbind(), size)
            states.append(state)
            if inside is not None:
                inside.passed((nodes[i], nodes[i + 1]), nodes[i], size, before, state, stages)
        # An exported program has no attributes to write to, and a traced one would keep the times of its trace.
        for (module, name), value in zip(self._written, held, strict=True):
            setattr(module, name, value)
        keep = self._grid.keep
        kept = [z for i, z in enumerate(states) if keep is None or keep[i]]
        sol = torch.stack(kept) if inside is None else torch.cat(inside.states)
        return (sol if self._rows is None else sol[self._rows]).to(x.dtype)

    def _rate(self, t: Tensor, z: Tensor, kwargs: dict[str, Any]) -> Tensor:
        for module, name in self._written:
            if name == "t":
                module.t = t
        if self.integral_loss is not None:
            z = z[:, 1:]
        if self._flow is not None:
            dz = exact_trace.rate(*self._flow, z)
        else:
            dz = self.field(t, z, **kwargs) if self._takes_time else self.field(z)
        if self._order > 1:  # z = [q, q', ..]: z' = [q', .., f(t, z)]
            dz = torch.cat([z[:, z.size(1) // self._order :], dz], 1)
        if self.integral_loss is not None:
            cost = self.integral_loss(t, z)
            dz = torch.cat([cost[:, None] if cost.dim() == 1 else cost, dz], 1)
        return dz

    def _check_times(self, t_span: Tensor | None, save_at: Iterable[float] | Tensor, dense: bool) -> None:
        # In a trace the times are constants of the model, which are seen as tensors without values.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        asked = _asked(t_span, save_at, dense)
        if asked != NOTHING and asked != self._asked:
            raise ValueError(
                f"{self._name}: the network was made for {_shown(self._asked)}, and is called with {_shown(asked)}; give an "
                "input, so that the times of the call are seen: as_network(model, x)"
            )

    def extra_repr(self) -> str:
        return f"{len(self._sizes)} steps, {self.evaluations} evaluations"
