"""The vector field of a NeuralODE, bound to one solve.

torchdyn's ``DEFunc`` looks through all modules at every evaluation. Here that is done once a solve: the modules that
want the time, the control or the noise are found, the field becomes a plain function of (t, z), and what the solve drew
(Hutchinson's noise, the data control) is kept with it, so that its backward and every secondary solve see the same.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core.defunc import DEFuncBase
from torchdyn.nn.galerkin import GalLayer

__all__ = ["STATEFUL", "BoundField", "Field", "cost_columns", "evaluating", "kept", "takes"]

STATEFUL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Modules whose evaluations in training mode do not repeat, or depend on the batch."""


_WRITTEN = ("nfe", "t", "_control", "noise", "noise_dist")
"""What torchdyn, and the field's layers, write to modules as they are evaluated."""


@contextmanager
def kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts back what evaluations write to ``modules``: attributes, and buffers such as batch statistics."""
    attributes = []
    for module in modules:
        names = (*_WRITTEN, "weight", "bias") if isinstance(module, GalLayer) else _WRITTEN
        kind = type(module)
        held = [name for name in names if hasattr(module, name) and not isinstance(getattr(kind, name, None), property)]
        attributes += [(module, name, getattr(module, name)) for name in held]
    # Clones stand in for the buffers, since a buffer that is written in place may be part of a graph that is alive.
    buffers = [(m, name, b) for m in modules if m.training for name, b in m.named_buffers(recurse=False)]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, value in attributes:
            setattr(module, name, value)
        for module, name, buffer in buffers:
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


def _walk(module: nn.Module, seen: dict[nn.Module, int]) -> dict[nn.Module, int]:
    """Returns ``module.modules()``, several times faster, each with its number of attributes and buffers."""
    if module not in seen:
        seen[module] = len(vars(module)) + len(module._buffers)
        for child in module._modules.values():
            if child is not None:
                _walk(child, seen)
    return seen


class _Roles:
    """Which of a field's modules want what. Looking for it is most of the cost of a call, so it is kept."""

    def __init__(self, modules: dict[nn.Module, int]):
        self.seen = modules
        self.modules: list[Any] = list(modules)
        self.traces: list[Any] = [m for m in modules if hasattr(m, "trace_estimator")]
        self.controlled: list[Any] = [m for m in modules if hasattr(m, "_control")]
        self.timed = [m for m in modules if hasattr(m, "t")]
        self.written = [(m, "t") for m in self.timed]
        self.written += [(m, name) for m in modules if isinstance(m, GalLayer) for name in ("weight", "bias")]
        self.captured = [(m, name) for m in modules for name in ("_control", "noise") if hasattr(m, name)]
        self.batchnorms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Field:
    """The field of ``node``, to be bound to one solve after another."""

    def __init__(self, node: NeuralODE):
        self.node: Any = node  # torchdyn's attributes have no types
        self._known: tuple[Any, bool] | None = None
        self._kept_roles: _Roles | None = None

    def _roles(self) -> _Roles:
        """Finds the roles, anew where a module was added, removed or replaced, or has gained or lost an attribute."""
        seen = _walk(self.node.vf, {})
        if self._kept_roles is None or seen != self._kept_roles.seen:
            self._kept_roles = _Roles(seen)
        return self._kept_roles

    def __getstate__(self):
        return {**self.__dict__, "_known": None, "_kept_roles": None}

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
        if args is not None and not isinstance(args, Mapping):
            raise TypeError(f"args must be a mapping, which the field gets as its `args`; got {type(args).__name__}")
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
        takes_args = self._calls_with_args()
        if args and not takes_args:
            raise ValueError(
                f"args={dict(args)!r} was given, but the vector field takes no `args`; add it to its forward"
            )
        return BoundField(node, roles, takes_args, args or {})

    @contextmanager
    def beside(self, x: Tensor, args: Mapping | None = None) -> Iterator["BoundField"]:
        """Binds the field for evaluations beside a solve from ``x``, such as V-dot along its states.

        The data control is set from ``x``, as in the solve; noise stays as the last solve drew it. Afterwards modules,
        batch statistics and counters are as before, so that the solve's own backward is not touched (U19).
        """
        modules, controlled = list(self.node.vf.modules()), self.node.controlled
        with kept(modules):
            for module in modules:
                noise = getattr(module, "noise", None)
                if hasattr(module, "trace_estimator") and noise is not None and noise.shape[0] == x.shape[0]:
                    module.noise_dist = None  # nothing to draw: the solve's own noise fits
            try:
                yield self.bind(x, args)
            finally:
                self.node.controlled = controlled

    def _calls_with_args(self) -> bool:
        core = self.node.vf.vf
        called = core.vf if isinstance(core, DEFuncBase) else core
        if self._known is None or self._known[0] is not called:
            self._known = (called, takes(called, "args", or_any=True))
        return self._known[1]


class BoundField:
    """``node.vf`` for one solve; see :meth:`Field.bind`.

    Attributes:
        node: the NeuralODE.
        modules: all modules of the field.
        captured: (module, name, value) of what the solve drew: data control and noise.
        function: (t, z) -> dz/dt. ``function.timed`` is False where t is ignored (it may then be None).
        nfe: how often it was evaluated.
    """

    def __init__(self, node: Any, roles: _Roles, takes_args: bool, args: Mapping):
        self.node = node
        self.modules = roles.modules
        self._timed_modules = roles.timed
        self._written = roles.written
        self.captured = [(m, name, getattr(m, name)) for m, name in roles.captured]
        # Batch statistics would keep the NaN of a failed solve.
        self._statistics = [(b, b.clone()) for m in roles.batchnorms if m.training for b in m.buffers(recurse=False)]
        self.nfe = 0
        self.function = self._build(takes_args, args)

    def _build(self, takes_args: bool, args: Mapping) -> Callable[[Any, Tensor], Tensor]:
        own, own_timed, kwargs = self._core(takes_args, args)
        timed_modules, order = self._timed_modules, self.node.order
        integral_loss = self.node.vf.integral_loss if self.node.vf.sensitivity == "autograd" else None
        timed = own_timed or bool(timed_modules) or integral_loss is not None

        if not timed and order == 1:  # the most common field, and the shortest way to it

            def evaluate_state(t, x):
                self.nfe += 1
                return own(t, x)

            evaluate_state.timed = False  # type: ignore[attr-defined]
            return evaluate_state

        def evaluate(t, x):
            self.nfe += 1
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
            return dx

        evaluate.timed = timed  # type: ignore[attr-defined]
        return evaluate

    def _core(self, takes_args: bool, args: Mapping):
        """Returns the innermost callable past torchdyn's wrappers that nothing hooks into, if it is timed, its keywords."""
        vf = self.node.vf
        core = vf.vf
        if isinstance(core, DEFuncBase) and not _has_hooks(core):
            if not core.has_time_arg:
                return _without_time(core.vf), False, {}
            core = core.vf
        elif isinstance(core, DEFuncBase):
            return core, True, {"args": args}
        return core, True, ({"args": args} if takes_args else {})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that require a gradient, by their names in ``node.vf``."""
        return {name: p for name, p in self.node.vf.named_parameters() if p.requires_grad}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts back what the solve drew, whatever was solved since; afterwards all is as it was before."""
        held = [(m, name, getattr(m, name)) for m, name, _ in self.captured]
        held += [(m, "t", m.t) for m in self._timed_modules]
        for module, name, value in self.captured:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in held:
                setattr(module, name, value)

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Puts back what the solve drew, for its backward, and lets go of the graphs that are left on modules."""
        with self.restored():
            yield
        self.release()

    def __enter__(self) -> "BoundField":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.undo()
            return
        # A backward is no part of the solve, and counts here alone.
        vf = self.node.vf
        vf.nfe += self.nfe
        if isinstance(vf.vf, DEFuncBase) and not _has_hooks(vf.vf):
            vf.vf.nfe += self.nfe
        self.release()

    def release(self) -> None:
        """Detaches the times and Galerkin weights that torchdyn keeps on its modules, which hold a graph alive."""
        for module, name in self._written:
            if isinstance(value := getattr(module, name), Tensor):
                setattr(module, name, value.detach())

    def undo(self) -> None:
        """Puts batch statistics back, as before a solve that failed."""
        # Past autograd's version count, as batch norm itself writes them: a graph that is alive holds these buffers too.
        for buffer, value in self._statistics:
            buffer.data.copy_(value)

    def random_or_stateful(self) -> list[str]:
        """Returns the kinds of modules in training mode whose evaluations do not repeat."""
        return sorted({type(m).__name__ for m in self.modules if isinstance(m, STATEFUL) and m.training})


def _without_time(function: Callable) -> Callable[[Any, Tensor], Tensor]:
    return lambda t, x: function(x)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def cost_columns(node: Any) -> int:
    """Returns how many first columns of the state hold a running cost: one under autograd with an ``integral_loss``."""
    return int(node.integral_loss is not None and node.sensitivity == "autograd")


def _check_state(x: Any, node: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"the initial state must be a tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"the initial state must be of a floating-point type; got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"the initial state must be a dense tensor; got {x.layout}; use x.to_dense()")
    if node.order > 1:
        columns = x.shape[1] if x.dim() > 1 else 0
        columns -= cost_columns(node)
        if columns <= 0 or columns % node.order:
            raise ValueError(
                f"an ODE of order {node.order} needs a state [batch, {node.order} * n]; got the shape {tuple(x.shape)}"
            )
