"""The vector field of a NeuralODE, bound to one solve.

torchdyn's ``DEFunc`` looks through all modules at every evaluation. Here that is done once a solve: the modules that
want the time, the control or the noise are found, the field becomes a plain function of (t, z), and what the solve drew
(Hutchinson's noise, the data control) is kept with it, so that its backward and every secondary solve see the same.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core.defunc import DEFuncBase
from torchdyn.nn.galerkin import GalLayer

__all__ = ["STATEFUL", "BoundField", "Field"]

STATEFUL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
"""Modules whose evaluations in training mode do not repeat, or depend on the batch."""


def _takes_args(function: Callable) -> bool:
    """Whether a field is called with torchdyn's ``args`` keyword, or plainly with (t, x)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return True
    return any(p.kind is p.VAR_KEYWORD or p.name == "args" for p in parameters)


def _walk(module: nn.Module, seen: dict[nn.Module, int]) -> dict[nn.Module, int]:
    """``module.modules()``, several times faster, each with its number of attributes and buffers."""
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
        self.modules = list(modules)
        self.traces: list[Any] = [m for m in modules if hasattr(m, "trace_estimator")]
        self.controlled: list[Any] = [m for m in modules if hasattr(m, "_control")]
        self.timed = [m for m in modules if hasattr(m, "t")]
        self.galerkin = [m for m in modules if isinstance(m, GalLayer)]
        self.captured = [(m, name) for m in modules for name in ("_control", "noise") if hasattr(m, name)]
        self.batchnorms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Field:
    """The field of ``node``, to be bound to one solve after another."""

    def __init__(self, node: NeuralODE):
        self.node: Any = node  # torchdyn's attributes have no types
        self._known: tuple[Any, bool] | None = None
        self._kept_roles: _Roles | None = None

    def _roles(self) -> _Roles:
        """Found anew where a module was added, removed or replaced, or has gained or lost an attribute."""
        seen = _walk(self.node.vf, {})
        if self._kept_roles is None or seen != self._kept_roles.seen:
            self._kept_roles = _Roles(seen)
        return self._kept_roles

    def __getstate__(self):
        return {**self.__dict__, "_known": None, "_kept_roles": None}

    def bind(self, x: Tensor, args: Mapping | None = None) -> "BoundField":
        """Draws the noise and sets the control for the initial state ``x``, as torchdyn does before a solve."""
        node, roles = self.node, self._roles()
        if roles.traces or roles.controlled:
            excess = 1 if node.integral_loss is not None and node.sensitivity == "autograd" else 0
            module: Any
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
        """The field for evaluations beside a solve from ``x``, such as V-dot along its states.

        The data control is set from ``x``, as in the solve; noise stays as the last solve drew it. Afterwards modules,
        batch statistics and counters are as before, so that the solve's own backward is not touched (U19).
        """
        vf = self.node.vf
        modules = list(vf.modules())
        held = [
            (m, name, getattr(m, name))
            for m in modules
            for name in (
                "_control",
                "noise",
                "noise_dist",
                "t",
                *(("weight", "bias") if isinstance(m, GalLayer) else ()),
            )
            if hasattr(m, name)
        ]
        counters = [(m, m.nfe) for m in (vf, vf.vf) if isinstance(getattr(m, "nfe", None), int | float)]
        controlled = self.node.controlled
        for module in modules:
            noise = getattr(module, "noise", None)
            if hasattr(module, "trace_estimator") and noise is not None and noise.shape[0] == x.shape[0]:
                module.noise_dist = None  # nothing to draw: the solve's own noise fits
        bound = None
        try:
            bound = self.bind(x, args)
            yield bound
        finally:
            for module, name, value in held:
                setattr(module, name, value)
            for module, count in counters:
                module.nfe = count
            self.node.controlled = controlled
            if bound is not None:
                bound.undo()

    def _calls_with_args(self) -> bool:
        core = self.node.vf.vf
        function = core.vf if isinstance(core, DEFuncBase) else core.forward
        key = core.vf if isinstance(core, DEFuncBase) else core
        if self._known is None or self._known[0] is not key:
            target = function.forward if isinstance(function, nn.Module) else function
            self._known = (key, _takes_args(target))
        return self._known[1]


class BoundField:
    """``node.vf`` for one solve.

    Attributes:
        function: (t, z) -> dz/dt. ``function.timed`` is False where t is ignored (it may then be None).
        nfe: how often it was evaluated.
    """

    def __init__(self, node: Any, roles: _Roles, takes_args: bool, args: Mapping):
        self.node = node
        self._modules = roles.modules
        self._timed_modules = roles.timed
        self._galerkin = roles.galerkin
        self._captured = [(m, name, getattr(m, name)) for m, name in roles.captured]
        # Batch statistics would keep the NaN of a failed solve.
        self._statistics = [(b, b.clone()) for m in roles.batchnorms if m.training for b in m.buffers(recurse=False)]
        self.nfe = 0
        self.function = self._build(takes_args, args)

    def _build(self, takes_args: bool, args: Mapping) -> Callable[[Any, Tensor], Tensor]:
        core, kwargs = self._core(takes_args, args)
        timed_modules = self._timed_modules
        node = self.node
        integral_loss = node.vf.integral_loss if node.vf.sensitivity == "autograd" else None
        order = node.order
        timed = core.timed or bool(timed_modules) or integral_loss is not None
        own = core.function

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
        """The innermost callable, past torchdyn's wrappers where nothing hooks into them."""
        vf = self.node.vf
        core = vf.vf
        if isinstance(core, DEFuncBase) and not _has_hooks(core):
            if not core.has_time_arg:
                return _Core(_without_time(core.vf), False), {}
            return _Core(core.vf, True), ({"args": args} if takes_args else {})
        if isinstance(core, DEFuncBase):
            return _Core(core, True), {"args": args}
        return _Core(core, True), ({"args": args} if takes_args else {})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that require a gradient, by their names in ``node.vf``."""
        return {name: p for name, p in self.node.vf.named_parameters() if p.requires_grad}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The field as it was in its solve, whatever was solved since; afterwards as it was before."""
        held = [(m, name, getattr(m, name)) for m, name, _ in self._captured]
        held += [(m, "t", m.t) for m in self._timed_modules]
        for module, name, value in self._captured:
            setattr(module, name, value)
        try:
            yield
        finally:
            for module, name, value in held:
                setattr(module, name, value)

    def finish(self) -> None:
        """After the solve: count as torchdyn does. A backward is no part of it, and counts here alone."""
        vf = self.node.vf
        vf.nfe += self.nfe
        if isinstance(vf.vf, DEFuncBase) and not _has_hooks(vf.vf):
            vf.vf.nfe += self.nfe
        self.release()

    def release(self) -> None:
        """Lets go of the graph that times and Galerkin weights hold."""
        for module in self._timed_modules:
            if isinstance(module.t, Tensor):
                module.t = module.t.detach()
        for module in self._galerkin:
            for name in ("weight", "bias"):
                if isinstance(value := getattr(module, name), Tensor):
                    setattr(module, name, value.detach())

    def undo(self) -> None:
        """After a failed solve: batch statistics as they were."""
        # Past autograd's version count, as batch norm itself writes them: a graph that is alive holds these buffers too.
        for buffer, value in self._statistics:
            buffer.data.copy_(value)

    def random_or_stateful(self) -> list[str]:
        """Names of the kinds of modules in training mode whose evaluations do not repeat."""
        return sorted({type(m).__name__ for m in self._modules if isinstance(m, STATEFUL) and m.training})


class _Core:
    def __init__(self, function: Callable, timed: bool):
        self.function, self.timed = function, timed


def _without_time(function: Callable) -> Callable[[Any, Tensor], Tensor]:
    return lambda t, x: function(x)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
