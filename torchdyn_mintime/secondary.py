"""A second solve or evaluation of a model's field that leaves no trace.

Penalties and diagnostics evaluate the field beside the solve that the model is used for. What such evaluations would
change (counters, times and weights that torchdyn keeps on its modules, batch statistics, what the spans remember) is
put back, and what the first solve drew (data control, Hutchinson's noise) is seen by the second one too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torchdyn.nn.galerkin import GalLayer

from torchdyn_mintime.field import BoundField
from torchdyn_mintime.numerics.integrate import Grid, Solution, integrate
from torchdyn_mintime.numerics.steppers import Stepper
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import spans

__all__ = ["LastSolve", "RefinedGrid", "evaluating", "last_solve", "refine", "solve_again", "undisturbed", "untraced"]

# What torchdyn, and the field's layers, write to modules as they are evaluated.
_WRITTEN = ("nfe", "t", "_control", "noise")


@dataclass(frozen=True)
class LastSolve:
    """What a span remembers of its last forward.

    Attributes:
        bound: the field as it was bound to that solve.
        x: the initial state, with its graph.
        steps: the times between which steps were taken.
        grid: the points asked for.
        states: ``[points, *x.shape]``.
    """

    bound: BoundField
    x: Tensor
    steps: list[float]
    grid: Grid
    states: Tensor

    @property
    def reaches_end(self) -> bool:
        """Whether the last of the states is that at the end of the solve: ``save_at`` may have left it out."""
        return self.grid.keep is None or self.grid.keep[-1]


def last_solve(span: LearnableSpan) -> LastSolve:
    """What ``span`` remembers of its last forward.

    Raises:
        RuntimeError: no forward was made, or the span was copied or loaded since.
    """
    last = span._last
    if last.bound is None or last.x is None or last.grid is None or last.states is None:
        raise RuntimeError("this needs the last forward of the span; call the model first")
    return LastSolve(last.bound, last.x, last.steps, last.grid, last.states)


@contextmanager
def _kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What evaluations write to ``modules`` is put back: attributes, and buffers such as batch statistics."""
    attributes = []
    for module in modules:
        names = (*_WRITTEN, "weight", "bias") if isinstance(module, GalLayer) else _WRITTEN
        kind = type(module)
        held = [name for name in names if hasattr(module, name) and not isinstance(getattr(kind, name, None), property)]
        attributes += [(module, name, getattr(module, name)) for name in held]
    # Clones stand in for the buffers, since a buffer that is written in place may be part of a graph that is alive.
    buffers = [
        (m, name, b)
        for m in modules
        if m.training
        for name, b in m.named_buffers(recurse=False)
        if not isinstance(m, LearnableSpan)
    ]
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
def _without_dropout(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Dropout draws a new mask at every evaluation, so that with it there is no field to compare two solves of."""
    active = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


@contextmanager
def untraced(bound: BoundField) -> Iterator[None]:
    """The field as it was in the solve that ``bound`` belongs to, dropout off; afterwards all is as it was before."""
    modules = bound._modules
    nfe = bound.nfe
    try:
        with _kept(modules), _without_dropout(modules), bound.restored():
            yield
    finally:
        bound.nfe = nfe


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Calls of ``model`` inside leave no trace: what its spans remember and count, batch statistics, mode."""
    modules = list(model.modules())
    held = [(span, span._last) for span in spans(model)]
    with _kept(modules):
        try:
            yield
        finally:
            for span, last in held:
                span._last = last


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards each of its modules in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class RefinedGrid(Grid):
    """A grid whose every step is split into ``parts`` equal ones; all parts of a step that moves with an end move too.

    Attributes:
        nodes: all points, the new ones included.
        parts: into how many each step is split.
    """

    parts: int = 1

    def _step(self, i: int) -> tuple[float | Tensor, float | Tensor, int]:
        """The whole step that part ``i`` lies in: its start, its size, and which part of it ``i`` is."""
        first = i - i % self.parts
        a: float | Tensor = self.nodes[first]
        b: float | Tensor = self.nodes[first + self.parts]
        if first == 0 and self.start is not None:
            a = self.start.double().view(())  # see Grid.left
        if first + self.parts == len(self.nodes) - 1 and self.end is not None:
            b = self.end.double()
        return a, b - a, i - first

    def size(self, i: int) -> float | Tensor:
        return self._step(i)[1] / self.parts

    def left(self, i: int) -> float | Tensor:
        a, whole, part = self._step(i)
        return a + whole * (part / self.parts) if part else a


def refine(steps: Sequence[float], start: Tensor | None, end: Tensor | None, parts: int) -> RefinedGrid:
    """The grid of ``steps``, each split into ``parts`` equal ones, of which only the last point is returned.

    Example:
        >>> refine([0.0, 0.5, 1.0], None, None, 2).nodes
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    nodes = [a + (b - a) * (k / parts) for a, b in pairwise(steps) for k in range(parts)]
    nodes.append(steps[-1])
    return RefinedGrid(nodes, start, end, [False] * (len(nodes) - 1) + [True], parts)


def solve_again(bound: BoundField, x: Tensor, grid: Grid, stepper: Stepper) -> tuple[Solution, int]:
    """Solve over a grid whose steps are held, by plain autograd, inside :func:`untraced`.

    Returns:
        The solution, and how many evaluations of the field it took.
    """
    before = bound.nfe
    solution = integrate(bound.function, x, grid, stepper, adapt=False)
    return solution, bound.nfe - before
