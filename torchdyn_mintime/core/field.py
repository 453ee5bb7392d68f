"""The vector field of a NeuralODE, bound to one solve.

torchdyn's ``DEFunc`` looks through all modules at every evaluation. Here that is done once a solve: the modules that
want the time, the control or the noise are found, the field becomes a plain function of (t, z), and what the solve drew
(Hutchinson's noise, the data control) is kept with it, so that its backward and every secondary solve see the same.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core.defunc import DEFuncBase
from torchdyn.nn.galerkin import GalLayer

from torchdyn_mintime.core import exact_trace
from torchdyn_mintime.core.lock import BESIDE, NOT_LOCKED, Lock, alone_in_backward
from torchdyn_mintime.core.shards import error_of_shards, naming_shards

__all__ = [
    "STATEFUL",
    "BoundField",
    "Field",
    "cost_columns",
    "evaluating",
    "has_hooks",
    "kept",
    "random_kept",
    "takes",
    "tensors_with_gradient",
    "written_by_evaluations",
]

STATEFUL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Modules whose evaluations in training mode do not repeat, or depend on the batch."""


_WRITTEN = ("nfe", "t", "_control", "noise", "noise_dist")
"""What torchdyn, and the field's layers, write to modules as they are evaluated, beside tensors."""


@contextmanager
def kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back what evaluations write to ``modules``: attributes, and buffers such as batch statistics.

    So too any tensor that a field sets as an attribute: an activation, a cache, the weight that a normalization computes.
    """
    attributes = [(module, vars(module).copy()) for module in modules]
    # Clones stand in for the buffers, since a buffer that is written in place may be part of a graph that is alive.
    buffers = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    with _standing_in([(m, name, b.clone()) for m, name, b in buffers]):
        try:
            yield
        finally:
            for module, before in attributes:
                now = vars(module)
                changed = [n for n in {*before, *now} if now.get(n, _ABSENT) is not before.get(n, _ABSENT)]
                for name in changed:
                    was = before.get(name, _ABSENT)
                    if name in _WRITTEN or isinstance(was, Tensor) or isinstance(now.get(name), Tensor):
                        _set(module, name, was)


def random_kept(x: Tensor) -> AbstractContextManager[None]:
    """Puts torch's random numbers back afterwards, with those of the GPU that ``x`` is on."""
    return torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])


@contextmanager
def _standing_in(buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Puts tensors in the places of buffers, (module, name, tensor), and the buffers back afterwards."""
    held = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    for module, name, value in buffers:
        module._buffers[name] = value
    try:
        yield
    finally:
        for module, name, buffer in held:
            module._buffers[name] = buffer


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts modules into eval mode; afterwards each module in them is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def takes(function: Callable, name: str, *, or_any: bool = False) -> bool:
    """Returns whether a function (of a module: its forward) has a parameter ``name``; ``or_any``: or takes any keyword.

    A function that does not tell its parameters counts as one that takes any keyword, and has no name.
    """
    try:
        target = function.forward if isinstance(function, nn.Module) else function
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return or_any
    return any(p.name == name or (or_any and p.kind is p.VAR_KEYWORD) for p in parameters)


def _size(module: nn.Module) -> int:
    """Returns the number of attributes and buffers of a module."""
    own = module.__dict__
    return len(own) + len(own["_buffers"])


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
"""Attributes in which torch keeps parameters, children and hooks."""

_ABSENT = object()


def written_by_evaluations(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Returns where an evaluation of torchdyn's layers leaves tensors: the time, and the Galerkin weights made of it."""
    found = [(m, "t") for m in modules if hasattr(m, "t")]
    return found + [(m, name) for m in modules if isinstance(m, GalLayer) for name in ("weight", "bias")]


class _Roles:
    """Which of a field's modules want what. Looking for it is most of the cost of a call, so it is kept."""

    def __init__(self, field: nn.Module):
        modules: list[Any] = list(field.modules())
        self.modules = modules
        self.outer: Any = field
        self.base: Any = field.vf if isinstance(field.vf, DEFuncBase) else None
        own = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]  # which keeps its attributes elsewhere
        self._seen = [(m, _size(m), tuple(m._modules.values())) for m in own]
        self.traces: list[Any] = [m for m in modules if hasattr(m, "trace_estimator")]
        self.controlled: list[Any] = [m for m in modules if hasattr(m, "_control")]
        self.timed = [m for m in modules if hasattr(m, "t")]
        self.stateful = [m for m in modules if isinstance(m, STATEFUL)]
        self.written = written_by_evaluations(modules)
        self.captured = [(m, name) for m in modules for name in ("_control", "noise") if hasattr(m, name)]
        self.buffers = [(m, name) for m in modules for name, b in m._buffers.items() if b is not None]
        # What a user may set on the field between two forwards: flags, labels, conditions. Times and Galerkin weights are
        # written at every evaluation; a count goes on in backward.
        of_evaluations = {(id(m), name) for m, name in self.written} | {(id(m), "nfe") for m in modules}
        self.attributes = [
            (m, name)
            for m in own
            for name in vars(m)
            if name not in _OF_EVERY_MODULE and (id(m), name) not in of_evaluations
        ]

        # Whether solves keep something of their own on the modules, so that two cannot run at once.
        self.shared = bool(self.traces or self.captured or self.written)

    def fit(self, field: nn.Module) -> bool:
        """Returns whether no module was added, removed or replaced, and none has gained or lost an attribute."""
        if self.outer is not field:
            return False
        for module, size, children in self._seen:
            own = module.__dict__
            if len(own) + len(own["_buffers"]) != size or tuple(own["_modules"].values()) != children:
                return False
        return True


class Field:
    """The field of ``node``, to be bound to one solve after another."""

    def __init__(self, node: NeuralODE):
        self.node: Any = node  # torchdyn's attributes have no types
        self._known: tuple[Any, bool] | None = None
        self._kept_roles: _Roles | None = None
        self._lock = Lock()

    def _roles(self) -> _Roles:
        """Finds the roles, anew where a module was added, removed or replaced, or has gained or lost an attribute."""
        field = self.node.vf
        if self._kept_roles is None or not self._kept_roles.fit(field):
            self._kept_roles = _Roles(field)
        return self._kept_roles

    def __getstate__(self):
        return {"node": self.node}

    def __setstate__(self, state):
        self.__init__(state["node"])  # type: ignore[misc]

    def _alone(self, roles: _Roles) -> AbstractContextManager:
        """Returns a lock for the length of a solve, of fields whose modules keep something of it."""
        return self._lock if roles.shared else NOT_LOCKED

    def release(self) -> None:
        """Detaches what solves have left on the modules, graphs of a bare node's solves too."""
        roles = self._roles()
        _detach([*roles.written, *roles.captured])

    def bind(self, x: Tensor, args: Mapping | None = None) -> "BoundField":
        """Returns the field bound to a solve from ``x``, a context manager for the length of that solve.

        Draws the noise and sets the control for ``x``, as torchdyn does before a solve. At the end of a ``with`` block the
        evaluations are counted as torchdyn counts them; after an error, batch statistics are as before.

        Args:
            x: initial state, ``[batch, ...]``.
            args: passed on to a field that takes ``args``.

        Raises:
            TypeError, ValueError: a state or ``args`` that cannot be used.
        """
        node, roles = self.node, self._roles()
        _check_state(x, node)
        if args is not None and not isinstance(args, Mapping | nn.ParameterDict | nn.ModuleDict):
            raise TypeError(f"args must be a mapping, which the field gets as its `args`; got {type(args).__name__}")
        core = self._core(roles)
        if args and not self._takes_args(roles):
            raise ValueError(
                f"args={dict(args)!r} was given, but the vector field takes no `args`; add it to its forward"
            )
        alone = self._alone(roles)
        with alone:
            if roles.traces or roles.controlled:
                excess = cost_columns(node)
                for module in roles.modules:
                    if module in roles.traces:
                        if module.noise_dist is not None:
                            module.noise = module.noise_dist.sample((x.shape[0],)).to(x)
                        excess += 1
                    if module in roles.controlled:
                        node.controlled = True
                        module._control = x[:, excess:].detach()
            # A copy: the caller may put other entries into the same mapping before the backward of this solve.
            return BoundField(node, roles, core, _copied(args) if args else {}, alone, x.is_cpu)

    @contextmanager
    def beside(self, x: Tensor, args: Mapping | None = None) -> Iterator["BoundField"]:
        """Binds the field for evaluations beside a solve from ``x``, such as V-dot along its states.

        The data control is set from ``x``, as in the solve; noise stays as the last solve drew it. Afterwards modules,
        batch statistics and counters are as before, so that the solve's own backward is not touched (U19).
        """
        modules, controlled = list(self.node.vf.modules()), self.node.controlled
        with BESIDE, self._alone(self._roles()), kept(modules), naming_shards(modules):
            for module in modules:
                noise = getattr(module, "noise", None)
                if hasattr(module, "trace_estimator") and noise is not None and noise.shape[0] == x.shape[0]:
                    module.noise_dist = None  # nothing to draw: the solve's own noise fits
            try:
                yield self.bind(x, args)
            finally:
                self.node.controlled = controlled

    def core(self) -> tuple[Callable, bool, bool]:
        """Returns the innermost callable past torchdyn's wrappers that nothing hooks into.

        And whether it is called with the time, and with ``args``.
        """
        return self._core(self._roles())

    def _core(self, roles: _Roles) -> tuple[Callable, bool, bool]:
        base, takes_args = roles.base, self._takes_args(roles)
        if has_hooks(roles.outer):
            return roles.outer, True, True
        if base is None:
            return roles.outer.vf, True, takes_args
        if has_hooks(base):
            return base, True, True
        return base.vf, base.has_time_arg, base.has_time_arg and takes_args

    def _takes_args(self, roles: _Roles) -> bool:
        called = (roles.base or roles.outer).vf
        if self._known is None or self._known[0] is not called:
            self._known = (called, takes(called, "args", or_any=True))
        return self._known[1]


class _Count:
    """How often a field was evaluated. Apart from the BoundField, which would else be in a reference cycle."""

    __slots__ = ("nfe",)

    def __init__(self) -> None:
        self.nfe = 0


class BoundField:
    """``node.vf`` for one solve; see :meth:`Field.bind`.

    Attributes:
        node: the NeuralODE.
        modules: all modules of the field.
        args: the extra arguments of the field.
        captured: (module, name, value) of what the solve drew: data control and noise.
        function: (t, z) -> dz/dt. ``function.timed`` is False where t is ignored (it may then be None).
        alone: a lock that keeps solves of other threads away, where the field's modules keep something of a solve.
    """

    def __init__(
        self,
        node: Any,
        roles: _Roles,
        core: tuple[Callable, bool, bool],
        args: Mapping,
        alone: Any,
        on_cpu: bool,
    ):
        self.node = node
        self.args = args
        self.alone = alone
        self._alone_in_backward = partial(alone_in_backward, alone, on_cpu)
        self.modules = roles.modules
        self._roles = roles
        self.captured = [(m, name, getattr(m, name)) for m, name in roles.captured]
        # Statistics of batches would keep the NaN of a failed solve.
        self._before = [
            (b, b.clone()) for m, name in roles.buffers if m.training and (b := m._buffers[name]) is not None
        ]
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._count = _Count()
        self.function = self._build(*core)
        self._attributes: dict[nn.Module, dict[str, Any]] = {}  # until the solve has ended, all is as it was

    @property
    def nfe(self) -> int:
        """How often the field was evaluated."""
        return self._count.nfe

    @nfe.setter
    def nfe(self, value: int) -> None:
        self._count.nfe = value

    def _build(self, core: Callable, own_timed: bool, takes_args: bool) -> Callable[[Any, Tensor], Tensor]:
        kwargs = {"args": self.args} if takes_args else {}
        own = core if own_timed else _without_time(core)
        if self._roles.traces and not own_timed and (layers := exact_trace.layers_of(core)):
            own = _without_time(partial(exact_trace.rate, *layers))
        timed_modules, order, count, outer = self._roles.timed, self.node.order, self._count, self._roles.outer
        integral_loss = outer.integral_loss if outer.sensitivity == "autograd" else None
        if core is outer:  # which does all of this by itself
            timed_modules, order, integral_loss = [], 1, None
        timed = own_timed or bool(timed_modules) or integral_loss is not None
        captured, alone, lock = self.captured, self._alone_in_backward, self.alone
        held: list[tuple[nn.Module, str, Any]] = []

        if not timed and order == 1 and not captured:  # the most common field, and the shortest way to it

            def evaluate_state(t, x):
                count.nfe += 1
                return own(t, x)

            evaluate_state.timed = False  # type: ignore[attr-defined]
            return evaluate_state

        def evaluate(t, x):
            count.nfe += 1
            for module in timed_modules:
                module.t = t
            if integral_loss is not None:
                x = x[:, 1:]
            dx = own(t, x, **kwargs)
            if order > 1:  # z = [q, q', ..]: z' = [q', .., f(t, z)]
                dx = torch.cat([x[:, x.size(1) // order :], dx], 1)
            if integral_loss is not None:
                cost = integral_loss(t, x)
                dx = torch.cat([cost[:, None] if cost.dim() == 1 else cost, dx], 1)
            if (timed_modules or captured) and dx.grad_fn is not None:
                # torch.utils.checkpoint evaluates parts of the field again in backward, which reads them off the modules.
                now = [*captured, *((module, "t", t) for module in timed_modules)]
                dx.grad_fn.register_prehook(partial(_put_in_backward, now, held, partial(alone, lock.hold)))
            return dx

        evaluate.timed = timed  # type: ignore[attr-defined]
        return evaluate

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that require a gradient, by their names in ``node.vf``."""
        return {name: p for name, p in self.node.vf.named_parameters() if p.requires_grad}

    def _remember(self) -> None:
        """Remembers what is set on the field's modules."""
        self._attributes = {module: vars(module).copy() for module in self.modules}

    def remember_buffers(self) -> None:
        """Remembers the buffers as they are now, for a backward that evaluates the field again."""
        found = [(m, name, b) for m, name in self._roles.buffers if (b := m._buffers.get(name)) is not None]
        # One with a graph is no state of the module, but a tensor that the gradient goes to.
        self._buffers = [(m, name, b if b.requires_grad else b.clone()) for m, name, b in found]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts back what the solve drew and what was set on the field then; afterwards all is as it was before.

        Flags (``training``), labels, conditions and other attributes of the field's modules, and where they were
        remembered its buffers. Counts and caches that an evaluation itself writes stay as they come out.
        """
        held = [(module, "t", module.t) for module in self._roles.timed]
        then = self._attributes
        changed = [
            (m, name, vars(m).get(name, _ABSENT), then[m].get(name, _ABSENT))
            for m, name in self._roles.attributes
            if m in then
        ]
        changed = [entry for entry in changed if entry[2] is not entry[3]]
        for module, name, _, value in changed:
            _set(module, name, value)
        try:
            with _standing_in([(m, name, b if b.requires_grad else b.clone()) for m, name, b in self._buffers]):
                yield
        finally:
            for module, name, value, _ in changed:
                _set(module, name, value)
            for module, name, value in held:
                setattr(module, name, value)

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Puts back what the solve saw, for its backward, and lets go of the graphs that are left on modules."""
        with self._alone_in_backward():
            with self.restored():
                yield
            self.release()

    def __enter__(self) -> "BoundField":
        self.alone.__enter__()
        _put(self.captured)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        try:
            if kind is not None:
                self.undo()
                return
            # A backward is no part of the solve, and counts here alone.
            roles, nfe = self._roles, self.nfe
            if not has_hooks(roles.outer):  # else it was called, and has counted
                vars(roles.outer)["nfe"] += nfe  # past torch's __setattr__, which is slow
                if roles.base is not None and not has_hooks(roles.base):
                    vars(roles.base)["nfe"] += nfe
            self.release()
            self._remember()  # with what the field has set by itself in its first evaluation
        finally:
            self.alone.__exit__(kind, *error)

    def release(self) -> None:
        """Detaches the times and Galerkin weights that torchdyn keeps on its modules, which hold a graph alive."""
        _detach(self._roles.written)

    def undo(self) -> None:
        """Puts buffers such as batch statistics back, as before a solve that failed."""
        # Past autograd's version count, as batch norm itself writes them: a graph that is alive holds these buffers too.
        for buffer, value in self._before:
            buffer.data.copy_(value)

    def tensors(self, sure: bool = False) -> list[Tensor]:
        """Returns the tensors that require a gradient among the field's ``args`` and its modules' attributes and buffers.

        Args:
            sure: leave out attributes with a graph, which may be what an earlier evaluation left there.
        """
        values = [vars(module).get(name) for module, name in self._roles.attributes]
        buffers = [module._buffers.get(name) for module, name in self._roles.buffers]
        held = [t for t in tensors_with_gradient([*values, *buffers]) if t.is_leaf or not sure]
        return list({id(t): t for t in (*tensors_with_gradient(self.args), *held)}.values())

    @property
    def drops_out(self) -> bool:
        """Whether dropout is active, so that no two evaluations are of one field."""
        return any("Dropout" in kind for kind in self.random_or_stateful())

    def refusal(self, x: Tensor, error: Exception) -> ValueError:
        """Returns the error to raise where the field did not accept a state, with the columns that it needs."""
        if isinstance(error, RuntimeError) and (clearer := error_of_shards(error, self.modules)) is not None:
            return clearer
        columns = ["the running cost"] * cost_columns(self.node)
        columns += ["the log-density"] if any(hasattr(m, "trace_estimator") for m in self.modules) else []
        wants = (
            f"; it wants [batch, {len(columns)} + dim], first {' and '.join(columns)}, 0 at the start, then the data"
        )
        return ValueError(
            f"the vector field does not accept a state of shape {tuple(x.shape)} and {x.dtype}{wants if columns else ''}: "
            f"{error}"
        )

    def random_or_stateful(self) -> list[str]:
        """Returns the kinds of modules in training mode whose evaluations do not repeat."""
        return sorted({type(m).__name__ for m in self._roles.stateful if m.training})


def _put(values: Iterable[tuple[nn.Module, str, Any]]) -> None:
    for module, name, value in values:
        setattr(module, name, value)


def _put_in_backward(
    values: Sequence[tuple[nn.Module, str, Any]], held: list, alone: Callable[[], AbstractContextManager], _: Any
) -> None:
    """Sets attributes for the part of a backward that follows; what was there before is held, and put back at its end."""
    with alone():
        if not held:
            held.extend((module, name, getattr(module, name)) for module, name, _ in values)
            torch.autograd.Variable._execution_engine.queue_callback(partial(_put_back, held, alone))
        _put(values)


def _put_back(held: list, alone: Callable[[], AbstractContextManager]) -> None:
    with alone():
        _put(held)
        held.clear()


def _detach(places: Iterable[tuple[nn.Module, str]]) -> None:
    for module, name in places:
        if isinstance(value := getattr(module, name), Tensor):
            setattr(module, name, value.detach())


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Sets a plain attribute, or removes one that was absent."""
    if value is _ABSENT:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = value


def _copied(args: Any) -> Any:
    try:
        copied = copy.copy(args)
    except TypeError:  # a read-only view of a dict
        return dict(args)
    if isinstance(args, nn.Module):  # its entries are in dicts of its own, which the copy shares
        vars(copied).update({name: value.copy() for name, value in vars(args).items() if isinstance(value, dict)})
    return copied


def tensors_with_gradient(value: Any) -> Iterator[Tensor]:
    """Yields the tensors that require a gradient in a value: itself, or what its lists, tuples, mappings and modules hold."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, nn.Module):
        yield from (p for p in value.parameters() if p.requires_grad)
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_with_gradient(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_with_gradient(entry)


def _without_time(function: Callable) -> Callable[[Any, Tensor], Tensor]:
    return lambda t, x: function(x)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward does."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def cost_columns(node: Any) -> int:
    """Returns how many first columns of the state hold a running cost: one under autograd with an ``integral_loss``."""
    return int(node.integral_loss is not None and node.sensitivity == "autograd")


def _check_state(x: Any, node: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"the initial state must be a tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"the initial state must be of a floating-point type; got {x.dtype}")
    if x.is_meta:
        raise TypeError(
            "the initial state has no data: it is on the device 'meta'; give it values on the model's device"
        )
    if x.layout != torch.strided:
        raise TypeError(f"the initial state must be a dense tensor; got {x.layout}; use x.to_dense()")
    if node.order > 1:
        columns = x.shape[1] if x.dim() > 1 else 0
        columns -= cost_columns(node)
        if columns <= 0 or columns % node.order:
            raise ValueError(
                f"an ODE of order {node.order} needs a state [batch, {node.order} * n]; got the shape {tuple(x.shape)}"
            )
