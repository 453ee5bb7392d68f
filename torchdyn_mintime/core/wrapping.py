"""Putting learnable spans into a model, and taking them out again."""

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from types import CellType
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.numerics.solvers.ode import RungeKutta4

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.field import evaluating, kept, random_kept
from torchdyn_mintime.core.span import LearnableSpan
from torchdyn_mintime.numerics import IntegrationError, LearnableSolver

__all__ = [
    "freeze_times",
    "has_bare",
    "named_spans",
    "only_span",
    "parameter_groups",
    "require_spans",
    "spans",
    "times_of",
    "unwrap",
    "with_solver",
    "wrap",
]


def named_spans(model: nn.Module) -> Iterator[tuple[str, LearnableSpan]]:
    """Yields (name, span) of every LearnableSpan in ``model``, each once. The name of ``model`` itself is empty."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module that holds LearnableSpans; got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, LearnableSpan):
            yield name, module


def spans(model: nn.Module) -> Iterator[LearnableSpan]:
    """Yields every LearnableSpan in ``model``, itself included, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> model = wrap(nn.Sequential(nn.Linear(4, 2), NeuralODE(net, return_t_eval=False)))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> [round(span.duration.item(), 2) for span in spans(model)]
        [1.0]
    """
    for _, span in named_spans(model):
        yield span


def require_spans(model: nn.Module) -> list[LearnableSpan]:
    """Returns the spans of ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no LearnableSpan.
    """
    found = list(spans(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no LearnableSpan; wrap it first: torchdyn_mintime.wrap(model)")
    return found


def only_span(model: nn.Module, span: LearnableSpan | None = None) -> LearnableSpan:
    """Returns the span to look at: ``span`` if it is given, else the only one of ``model``.

    Raises:
        ValueError: ``model`` has no span, several and none was given, or not the one that was given.
    """
    require_spans(model)
    found = dict(named_spans(model))
    if span is not None:
        if all(span is not s for s in found.values()):
            raise ValueError(f"the span given is not one of this {type(model).__name__}: {list(found)}")
        return span
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} LearnableSpans, {list(found)}: pass span=, one of them"
        )
    return next(iter(found.values()))


def times_of(found: Iterable[LearnableSpan]) -> list[nn.Parameter]:
    """Returns the times of the spans that are parameters, frozen or not: t_f, and t0 where it is learned; each once."""
    return list(dict.fromkeys(time for span in found for time in span.parameters(recurse=False)))


def freeze_times(found: Iterable[LearnableSpan]) -> list[Tensor]:
    """Takes the times of the spans from the optimizers, and returns those that were free."""
    free: list[Tensor] = [time for time in times_of(found) if time.requires_grad]
    for time in free:
        time.requires_grad_(False)
        time.grad = None  # an optimizer would go on applying a gradient that is left there
    return free


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, NeuralODE]]:
    """Yields where a bare NeuralODE hangs in ``model``: (parent, name of the child, node)."""
    seen: set[int] = set()

    def walk(parent: nn.Module) -> Iterator[tuple[nn.Module, str, NeuralODE]]:
        if id(parent) in seen or isinstance(parent, LearnableSpan):
            return
        seen.add(id(parent))
        for name, child in parent._modules.items():
            if isinstance(child, NeuralODE):
                yield parent, name, child
            elif child is not None:
                yield from walk(child)

    return walk(model)


def has_bare(model: nn.Module) -> bool:
    """Returns whether some NeuralODE in ``model`` is not wrapped."""
    return isinstance(model, NeuralODE) or next(_places(model), None) is not None


def wrap(model: nn.Module, t_span: Tensor | None = None, **options: Any) -> nn.Module:
    """Puts a :class:`LearnableSpan` around every ``NeuralODE`` inside ``model``, in place, and returns it.

    Args:
        model: any module. Given a NeuralODE itself, its span is returned.
        t_span: the template of every span; default: each node's own.
        options: those of :class:`LearnableSpan`.

    Returns:
        ``model``, or the span of a NeuralODE. A node that is used twice gets one span. Where a flow (``torchdyn.models.CNF``)
        has a second node over it or its net, such as one for samples alone, both share their times: what one learns is where
        the other ends.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is nothing to wrap, or an option cannot be used. Nothing is changed then.

    Warns:
        UserWarning: some solve stays as it is: an ODEProblem, a node that a list, a dict or a function holds, or a
            method of either.

    Example:
        >>> node = NeuralODE(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> wrap(node).t_f.item()
        1.0
    """
    if isinstance(model, NeuralODE):
        return LearnableSpan(model, t_span, **options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap takes a torch.nn.Module; got {type(model).__name__}")
    places, out_of_reach = list(_places(model)), list(_out_of_reach(model))
    if not places:
        wrapped = sum(1 for _ in spans(model))
        if wrapped and not out_of_reach:
            raise ValueError(f"the model is wrapped already: it holds {wrapped} LearnableSpan and no bare NeuralODE")
        raise ValueError(
            f"there is no NeuralODE to wrap in {type(model).__name__}"
            + (f"; out of reach are {', '.join(out_of_reach)}" if out_of_reach else "")
            + ". A node is seen where it is an attribute of a module, or in an nn.ModuleList or nn.ModuleDict. One that "
            "forward makes at every call, or another function, is not: make it in __init__. Of an ODEProblem, which has no "
            "interval of its own, make a NeuralODE"
        )
    made = {id(node): LearnableSpan(node, t_span, **options) for _, _, node in places}
    for parent, name, node in places:
        parent._modules[name] = made[id(node)]
    _share_times_of_flows(model)
    if out_of_reach:
        warnings.warn(
            f"{', '.join(out_of_reach)} stay as they are: wrap replaces NeuralODEs that are attributes of modules, and no "
            "ODEProblem",
            stacklevel=2,
        )
    return model


def _out_of_reach(model: nn.Module) -> Iterator[str]:
    """Yields, in words, what solves ODEs in ``model`` but cannot be replaced: ODEProblems, and nodes that are no children.

    Looked through are attributes that are lists, tuples, dicts or functions that hold a node, one level deep, and its methods.
    """
    for path, module in model.named_modules():
        if isinstance(module, ODEProblem):
            if type(module) is ODEProblem:
                yield f"{path or 'the model'} ({type(module).__name__})"
            continue
        for name, value in vars(module).items():
            held: Iterable[Any] = ()
            if isinstance(value, list | tuple | dict) and not name.startswith("_"):
                held = value.values() if isinstance(value, dict) else value
            elif inspect.isfunction(value):
                held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
            elif inspect.ismethod(value):
                held = [value.__self__]
            for one in held:
                if isinstance(one, ODEProblem):
                    kind = "function" if inspect.isfunction(value) else type(value).__name__
                    yield f"the {type(one).__name__} in the {kind} {f'{path}.' if path else ''}{name}"


def _share_times_of_flows(model: nn.Module) -> None:
    """Lets spans over one flow, or over its net, have the same t_f (and the same learned t0).

    Of other fields two nodes are two layers that share weights, each with a time of its own.
    """
    found = list(spans(model))
    for span in found:
        flows = [module for module in span.vf.modules() if hasattr(module, "trace_estimator")]
        nets = {module for flow in flows for module in (flow, getattr(flow, "net", flow))}
        ends = span.interval.template[0], span.interval.template[-1]
        for other in found:
            same = (other.interval.template[0], other.interval.template[-1]) == ends and other.learn_t0 == span.learn_t0
            if other is not span and same and not nets.isdisjoint(other.vf.modules()):
                other.t_f = span.t_f
                if span.learn_t0:
                    other.t0 = span.t0


def unwrap(model: nn.Module, x: Any = None) -> nn.Module:
    """Takes the spans out of ``model``, in place: plain NeuralODEs remain, whose ``t_span`` is the learned grid.

    For each one a solve by torchdyn is compared with the span's own. torchdyn's adaptive solvers sometimes lose the last
    point; t_f is then moved by units in the last place until they do not. With ``x``, the spans that the model passes in its
    forward are compared too.

    Args:
        model: the wrapped model, or a span.
        x: what the model is called with, for the check. Default, also for a span that this call does not solve: random
            states of the shape of the span's last forward, or of its first layer.

    Returns:
        ``model``, or the node of a span. Call it without a span: one that is passed would be used instead of the grid. A node
        with a LearnableSolver has the state_dict of ``NeuralODE(field, solver=LearnableSolver(stages))``; only under an
        adjoint its ``solver_adjoint`` stays as it is.

    Raises:
        ValueError: nothing to unwrap, no shape to check with, or torchdyn cannot solve over the learned grid. Nothing is
            changed then.

    Warns:
        UserWarning: torchdyn's result differs, as with rk4 and a field that depends on time; the model passes a span to the
            node, over which torchdyn ends elsewhere or takes other steps; or a node keeps a LearnableSolver, whose class must
            be there where the model is loaded.
    """
    found = list(named_spans(model))
    if not found:
        raise ValueError(f"there is no LearnableSpan to unwrap in {type(model).__name__}")
    held = [(span, span.last) for _, span in found]
    try:
        calls = {} if x is None else _calls(model, x)
        grids = {}
        for name, span in found:
            state, t_span = calls.get(span, (None, None))
            grids[name] = _checked_grid(span, state, name)
            if state is not None and t_span is not None:
                _warn_of_a_passed_span(span, state, t_span, name)
    finally:
        for span, last in held:
            span.last = last
    for name, span in found:
        span.node.t_span = grids[name]
        span.release()
        if isinstance(span.node.solver, LearnableSolver):
            if span.node.sensitivity == "autograd":  # which never uses it; the span has put another one there
                span.node.solver_adjoint = span.node.solver
            warnings.warn(
                f"{name or 'the span'} is solved by a LearnableSolver, which runs in plain torchdyn, but whoever loads the "
                "model needs its class: from torchdyn_mintime import LearnableSolver",
                stacklevel=2,
            )
    if isinstance(model, LearnableSpan):
        return model.node
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, LearnableSpan):
                parent._modules[name] = child.node
    return model


def with_solver(node: NeuralODE, solver: nn.Module, t_span: Tensor) -> NeuralODE:
    """Returns a node over the field of ``node`` itself, solved over ``t_span`` by a solver of fixed steps, under autograd."""
    made: Any = copy.copy(node)
    made._modules = dict(node._modules)
    made.solver = made.solver_adjoint = solver
    made.sensitivity = made.sensalg = "autograd"
    made.t_span = t_span
    made.atol = made.rtol = 1e-3  # torchdyn warns of others where steps are fixed
    return made


@torch.no_grad()
def _calls(model: nn.Module, x: Any) -> dict[LearnableSpan, tuple[Tensor, Tensor | None]]:
    """Returns the state from which each span of ``model`` is solved when it is called with ``x``, and the span it is passed."""
    before = {span: span.last for span in spans(model)}
    others = [module for module in model.modules() if not isinstance(module, LearnableSpan)]
    passed: dict[nn.Module, Tensor | None] = {}

    def look(span: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        passed[span] = args[1] if len(args) > 1 else kwargs.get("t_span")

    hooks = [span.register_forward_pre_hook(look, with_kwargs=True) for span in before]
    with evaluating(model), kept(others), random_kept(next(iter(before)).t_f):
        try:
            model(x)
        except NotImplementedError as error:  # as of a LightningModule that has its steps alone
            error.add_note(
                "unwrap calls the model with x. If it has no forward, unwrap the network in it, such as unwrap(module.net, x), "
                "or leave x out"
            )
            raise
        except KeyError as error:
            error.add_note(
                "unwrap calls the model with x alone. If the field looks for this in args: plain torchdyn passes none on to "
                "it, and torchdyn_mintime.as_network(model) takes them"
            )
            raise
        finally:
            for hook in hooks:
                hook.remove()
    solved = {span: span.last for span, last in before.items() if span.last is not last}
    return {span: (last.x, passed.get(span)) for span, last in solved.items() if last is not None}


def _checked_grid(span: LearnableSpan, x: Tensor | None, name: str) -> Tensor:
    """Returns the learned grid, such that torchdyn's own solve over it ends at t_f."""
    node, guessed = span.node, x is None and span.last is None
    if x is None:
        x = _random_state(span, name)
    before = node.t_span
    try:
        with evaluating(span), kept(list(node.vf.modules())), torch.no_grad(), random_kept(x):
            grid = span.grid().detach()
            if span.adaptive and x.dtype.itemsize >= 4:
                # In torchdyn's step control a span of another precision moves the state to its own.
                grid = grid.to(x.dtype)
            torch.manual_seed(0)
            ours = _solved_from(span, x, guessed, name)
            for _ in range(64):
                torch.manual_seed(0)  # the same noise for both, where the field draws some
                node.t_span = grid
                theirs = node(x)
                times = theirs[0] if node.return_t_eval else None
                states, own = (out[1] if node.return_t_eval else out for out in (theirs, ours))
                # torchdyn's interpolated adjoint returns every step of the solver, whatever was asked.
                points = states.shape == own.shape or (node.sensitivity == "interpolated_adjoint" and span.adaptive)
                if points and (times is None or times[-1] == grid[-1]):
                    break
                # To a multiple of the largest time's unit in the last place: one that torchdyn's own sum of times can hit,
                # also where t_f is near 0 and has far finer units.
                unit = math.ldexp(torch.finfo(grid.dtype).eps, math.frexp(grid.abs().max().item())[1] - 1)
                grid = grid.clone()
                grid[-1] = (math.ceil(grid[-1].item() / unit) - 1) * unit
            else:
                raise ValueError(
                    f"{name or 'the span'}: torchdyn's {span.stepper.name} gave no state at t_f = {grid[-1]:g}"
                )
    except AssertionError as error:
        if "once and only once" not in str(error):
            raise
        raise ValueError(
            f"{name or 'the span'}: torchdyn refuses the learned grid: it takes times that differ by 1e-8 + 1e-5 |t| or less "
            f"for the same, and the closest two differ by {grid.diff().min().item():.3g}, up to t = {grid[-1].item():g}; set "
            "`span.t_span` to a coarser template, or times nearer to 0"
        ) from error
    except TypeError as error:
        raise ValueError(
            f"{name or 'the span'}: plain torchdyn cannot call this vector field ({error}); "
            "give its forward the signature (t, x, args=None)"
        ) from error
    finally:
        node.t_span = before
    if difference := _difference(span, states[-1], own[-1]):
        reason = (
            "; torchdyn's rk4 is first order for a field that depends on time, ours is fourth order"
            if isinstance(node.solver, RungeKutta4)
            else ""
        )
        warnings.warn(
            f"{name or 'the span'}: torchdyn's own solve differs by {difference:.3g} from the wrapped one{reason}. "
            "The unwrapped model will differ as much",
            stacklevel=3,
        )
    return grid


@torch.no_grad()
def _warn_of_a_passed_span(span: LearnableSpan, x: Tensor, t_span: Tensor, name: str) -> None:
    """Warns where torchdyn ends elsewhere, or takes other steps, over the span that the model passes to the node."""
    node = span.node
    with evaluating(span), kept(list(node.vf.modules())), random_kept(x):
        ends = []
        for solve in (node, span):
            torch.manual_seed(0)
            out = solve(x, t_span)
            ends.append((out[1] if node.return_t_eval else out)[-1])
    difference, steps = _difference(span, *ends), span.steps
    if difference or (not span.adaptive and len(t_span) != steps + 1):
        found = f"; torchdyn's own solve differs by {difference:.3g} from the wrapped one" if difference else ""
        call = "without a span" if t_span[0] < t_span[-1] else "with its own t_span, turned round by flip(0)"
        warnings.warn(
            f"{name}: the model passes the node a span of {len(t_span)} points from {t_span[0]:g} to {t_span[-1]:g}, and plain "
            f"torchdyn solves over this one, not over the learned grid of {steps} steps{found}. Let the model call the node "
            f"{call}",
            stacklevel=4,
        )


def _difference(span: LearnableSpan, theirs: Tensor, ours: Tensor) -> float:
    """Returns how far two ends are apart; 0 where that is rounding, or within the tolerance of an adaptive solver."""
    node = span.node
    difference = (theirs - ours).abs().max().item() if ours.numel() else 0.0
    scale = ours.abs().max().item() if ours.numel() else 0.0
    # Fixed steps should agree to rounding; adaptive ones may choose other steps, within the tolerance.
    allowed = 10 * (node.atol + node.rtol * scale) if span.adaptive else 1e-4 * (1 + scale)
    return 0.0 if difference <= allowed else difference


def _solved_from(span: LearnableSpan, x: Tensor, guessed: bool, name: str) -> Any:
    try:
        return span(x)
    except (ValueError, RuntimeError) as error:
        if not guessed or isinstance(error, IntegrationError):
            raise
        raise ValueError(
            f"pass x, which the model is called with, to check {name or 'the span'}: no forward has shown its state's shape, "
            f"and it is not {tuple(x.shape)}, as the field's first layer suggests"
        ) from error


def _random_state(span: LearnableSpan, name: str) -> Tensor:
    parameter = next(iter(span.node.vf.parameters()))
    shape: tuple[int, ...] = () if span.last is None else tuple(span.last.x.shape)
    if not shape:
        first = next((m for m in span.node.vf.modules() if isinstance(m, nn.Linear)), None)
        if first is None:
            raise ValueError(
                f"pass x, which the model is called with, to check {name or 'the span'}: no forward has shown its state's shape"
            )
        shape = (8, first.in_features)
    return torch.randn(shape, dtype=parameter.dtype, device=parameter.device)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    span_lr: float | None = None,
    solver_lr: float = 0.01,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Returns optimizer groups in which times, and learned solvers, have their own learning rates and never decay.

    Args:
        model: a wrapped model.
        lr: learning rate of everything else.
        span_lr: learning rate of the times, in units of time per step for Adam; default ``lr``.
        solver_lr: learning rate of the coefficients of LearnableSolvers, which are mostly between -1 and 1.
        weight_decay: decay of everything else. On times it would act as a second price of time.

    Returns:
        Two groups, the times last, and a third one where a span has a LearnableSolver; parameters that require no gradient
        are left out.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> groups = parameter_groups(wrap(NeuralODE(net)), lr=0.1, span_lr=0.01)  # doctest: +ELLIPSIS
        Your vector field ...
        >>> [(group["lr"], len(group["params"])) for group in groups]
        [(0.1, 4), (0.01, 1)]
    """
    span_lr = lr if span_lr is None else span_lr
    rates = {"lr": lr, "span_lr": span_lr, "solver_lr": solver_lr, "weight_decay": weight_decay}
    for key, value in rates.items():
        checks.number(value, key, least=0)
    found = require_spans(model)
    times = times_of(found)
    learned = {m for span in found for m in span.node.modules() if isinstance(m, LearnableSolver)}
    coefficients = [solver.free for solver in learned]
    ids = {id(p) for p in (*times, *coefficients)}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": times, "lr": span_lr, "weight_decay": 0.0},
    ]
    groups += [{"params": coefficients, "lr": solver_lr, "weight_decay": 0.0}] if coefficients else []
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
