"""What a solve with a gradient of its own needs to know, and the looks at a field that such a solve stands on."""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchdyn_mintime.numerics.step_control import rms
from torchdyn_mintime.numerics.steppers import Stepper

__all__ = ["OutsideTensors", "Problem", "leaves"]

VectorField = Callable[[Any, Tensor], Tensor]


@dataclass
class Problem:
    """A field, its parameters and a method.

    Attributes:
        f: the field. It must give the same again when it is evaluated again.
        module: the module that holds the parameters which f uses, by the names in ``parameters``.
        parameters: those that require a gradient.
        stepper, atol, rtol, interpolator: of the solve (see :func:`integrate`).
        restored: a context in which the field is as it was in the forward solve (data control, noise).
        outside: further tensors that f uses and that get a gradient: conditions, parameters of other modules.
        searched: whether f is searched for tensors that would get none. A field that makes leaves of its own at every
            evaluation, and keeps them, cannot be.
    """

    f: VectorField
    module: nn.Module
    parameters: dict[str, Tensor]
    stepper: Stepper
    atol: float
    rtol: float
    interpolator: Callable | None = None
    restored: Callable[[], AbstractContextManager] = nullcontext
    outside: Sequence[Tensor] = ()
    searched: bool = True


class OutsideTensors(Exception):
    """A field uses, in its first evaluation, tensors that require a gradient and that its :class:`Problem` does not name.

    Attributes:
        tensors: the leaves of the graph that these tensors are made of.
    """

    def __init__(self, tensors: list[Tensor]):
        super().__init__(f"{len(tensors)} tensors that the problem does not name")
        self.tensors = tensors


class Watched:
    """A field whose first and last evaluations are kept; the first is searched for tensors that would get no gradient.

    Args:
        f: the field.
        known: the tensors that get one.
        search: False searches nothing.

    Attributes:
        first: the value of the first evaluation.
        last: the time, the state and the value of the last one; None before the second.

    Raises:
        OutsideTensors: from that evaluation, where it used others.
    """

    def __init__(self, f: VectorField, known: Iterable[Tensor], search: bool = True):
        self.timed = getattr(f, "timed", True)
        self.first: Tensor | None = None
        self.last: tuple[Any, Tensor, Tensor] | None = None
        self._f, self._known, self._search = f, list(known), search

    def __call__(self, t: Any, z: Tensor) -> Tensor:
        if self.first is not None:
            dz = self._f(t, z)
            self.last = t, z, dz
            return dz
        if not self._search:
            self.first = self._f(t, z)
            return self.first
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            dz = self._f(t, z)
        found = strangers([dz], self._known, (z, t))
        self.first = dz = dz.detach()
        if outside := still_there(found):
            raise OutsideTensors(outside)
        return dz


def strangers(outputs: Iterable[Tensor], known: Sequence[Tensor], inputs: Iterable[Any]) -> list[weakref.ref]:
    """Returns the leaves of a graph that are not ``known`` and no ``inputs``; see :func:`still_there`."""
    own = {*map(id, inputs), *map(id, known)}
    return [weakref.ref(leaf) for output in outputs for leaf in leaves(output, known) if id(leaf) not in own]


def still_there(found: Iterable[weakref.ref]) -> list[Tensor]:
    """Returns which of :func:`strangers` are held outside: what a field makes for itself is gone with the graph."""
    return [leaf for stranger in found if (leaf := stranger()) is not None]


def check_outside(found: Iterable[weakref.ref]) -> None:
    """Checks, in a backward, that no evaluation has used a tensor that gets no gradient. The graph must be gone.

    Raises:
        ValueError: one has.
    """
    if outside := still_there(found):
        raise ValueError(
            f"the vector field uses a tensor of shape {tuple(outside[0].shape)} that requires a gradient, but not yet in its "
            "first evaluation, so that its gradient would be lost. Pass it in `args`, or use sensitivity='autograd' without "
            "checkpoints"
        )


@contextmanager
def requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets a gradient be asked for of tensors that were frozen since the forward solve, as autograd would give it."""
    frozen = [t for t in tensors if not t.requires_grad]
    for t in frozen:
        t.requires_grad_()
    try:
        yield
    finally:
        for t in frozen:
            t.requires_grad_(False)


def leaves(output: Tensor, known: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yields the leaves of a graph, without what lies behind ``known`` (a condition is the output of an encoder)."""
    seen: set[Any] = {p.grad_fn for p in known}
    nodes = [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes.extend(following for following, _ in node.next_functions)


@contextmanager
def cut_at(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets no gradient pass behind these tensors, so that each of them gets its partial derivative.

    One may be made of another, as a scale of the condition that is used beside it. The backward that goes on after this
    one passes from the first to the second; the total derivative would count that path twice.
    """
    handles = [t.grad_fn.register_prehook(partial(_stop, t.output_nr)) for t in tensors if t.grad_fn is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stop(place: int, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    # Before a node runs, and after its incoming gradient is taken where it was asked for.
    return tuple(torch.zeros_like(g) if i == place and g is not None else g for i, g in enumerate(grads))


def check_same(again: Tensor, first: Tensor) -> None:
    """Checks that an evaluation in backward repeats that of the forward solve.

    Args:
        again, first: both values.

    Raises:
        ValueError: they differ in more than the last third of their digits.
    """
    refuse_other([deviation(again, first)])


def deviation(again: Tensor, first: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns by how much two values differ, by how much they may, and their size, all as root mean squares.

    Args:
        again, first: both values.
        scale: where the values are sums with something larger: that, whose rounding they carry.
    """
    _, mixed, dtype = autocast_state(first.device.type)
    # Under autocast the field rounds what it is given: a state that differs in its last place may give another rounding.
    eps = torch.finfo(dtype if mixed else first.dtype).eps
    # Rounding is some units in the last place, more where a GPU adds in another order. A field that has changed, or that
    # draws anew, differs by far more; one that still does by less gives a gradient that is as good.
    size = rms(first)
    allowed = eps ** (2 / 3) * size + (0.0 if scale is None else 10 * eps * rms(scale))
    return torch.stack([rms(again - first), allowed, size])


def refuse_other(deviations: Sequence[Tensor]) -> None:
    """Refuses a backward in which some value does not repeat that of the forward solve (:func:`deviation`).

    Raises:
        ValueError: one differs in more than the last third of its digits.
    """
    # Of NaN it is not true: the gradient will show it.
    differing = [(found, size) for found, allowed, size in torch.stack([*deviations]).tolist() if found > allowed]
    if differing:
        found, size = differing[0]
        raise ValueError(
            f"the vector field is not the one of the forward solve any more: in backward, the same state gives a value that "
            f"differs by {found / size if size else math.inf:.2g} of its size. Something that the field reads has changed in "
            "between, or changes with every evaluation (dropout, spectral norm in training mode, random numbers, a tensor "
            "written in place); keep it fixed from forward to backward, or use sensitivity='autograd' without checkpoints"
        )


def autocast_state(device: str) -> tuple[str, bool, torch.dtype]:
    """Returns what :func:`autocast` needs to evaluate in backward as in forward."""
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@contextmanager
def autocast(device: str, enabled: bool, dtype: torch.dtype) -> Iterator[None]:
    """Sets mixed precision as it was in the forward solve."""
    # Without the cache: a cast that was made without gradient would be taken where one is asked for (torch 2.9).
    with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
        yield
