"""A second solve or evaluation of a model's field that leaves no trace.

Penalties and diagnostics evaluate the field beside the solve that the model is used for. What such evaluations would
change (counters, times and weights that torchdyn keeps on its modules, batch statistics, what the spans remember) is
put back, and what the first solve drew (data control, Hutchinson's noise) is seen by the second one too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchdyn_mintime.core.field import BoundField, evaluating, kept
from torchdyn_mintime.core.lock import BESIDE
from torchdyn_mintime.core.shards import naming_shards
from torchdyn_mintime.core.solve import LastSolve
from torchdyn_mintime.core.span import LearnableSpan
from torchdyn_mintime.core.wrapping import spans
from torchdyn_mintime.numerics import Grid

__all__ = ["LastSolve", "RefinedGrid", "evaluating", "last_solve", "never_first", "refine", "undisturbed", "untraced"]


def last_solve(span: LearnableSpan) -> LastSolve:
    """Returns the record of the last forward of ``span``.

    Raises:
        RuntimeError: no forward was made, or the span was copied or loaded since.
    """
    if span.last is None:
        raise RuntimeError("this needs the last forward of the span; call the model first")
    return span.last


@contextmanager
def untraced(bound: BoundField) -> Iterator[None]:
    """Puts the field as it was in the solve that ``bound`` belongs to, dropout off; afterwards all is as it was before."""
    # Dropout draws a new mask at every evaluation, so that two solves have no field in common.
    dropout = [m for m in bound.modules if isinstance(m, nn.modules.dropout._DropoutNd)]
    nfe = bound.nfe
    try:
        with (
            BESIDE,
            bound.alone,
            kept(bound.modules),
            bound.restored(),
            evaluating(*dropout),
            naming_shards(bound.modules),
        ):
            yield
    finally:
        bound.nfe = nfe


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Lets calls of ``model`` leave no trace: what its spans remember and count, batch statistics, mode."""
    held = [(span, span.last) for span in spans(model)]
    with kept([module for module in model.modules() if not isinstance(module, LearnableSpan)]):
        try:
            yield
        finally:
            for span, last in held:
                span.last = last


@contextmanager
def never_first(model: nn.Module) -> Iterator[None]:
    """Keeps calls of ``model`` in training from deciding what its spans learn: the first one outside still does."""
    held = [(span, span._settles) for span in spans(model)]
    try:
        for span, _ in held:
            span._settles = False
        yield
    finally:
        for span, before in held:
            span._settles = before


@dataclass(frozen=True)
class RefinedGrid(Grid):
    """A grid whose every step is split into ``parts`` equal ones; all parts of a step that moves with an end move too.

    Attributes:
        nodes: all points, the new ones included.
        parts: into how many each step is split.
    """

    parts: int = 1

    def _whole(self, i: int) -> tuple[Grid, int]:
        """Returns the whole step that part ``i`` lies in, as a grid, and which part of it ``i`` is."""
        first = i - i % self.parts
        last = first + self.parts
        ends = self.start if first == 0 else None, self.end if last == len(self.nodes) - 1 else None
        return Grid((self.nodes[first], self.nodes[last]), *ends), i - first

    def size(self, i: int) -> float | Tensor:
        return _exact(self._whole(i)[0].size(0)) / self.parts

    def sizes(self, dtype: torch.dtype) -> list[float | Tensor]:
        sizes: list[float | Tensor] = []
        for i in range(0, len(self.nodes) - 1, self.parts):  # once for all parts of a step
            size = self.size(i)
            sizes += [size.to(dtype) if isinstance(size, Tensor) else size] * self.parts
        return sizes

    def left(self, i: int) -> float | Tensor:
        whole, part = self._whole(i)
        if part == 0:
            return whole.left(0)
        return whole.left(0) + _exact(whole.size(0)) * (part / self.parts)


def _exact(size: float | Tensor) -> float | Tensor:
    """Returns the size of a step as a number, or in float64, so that a part has one size with and without a gradient."""
    return size.double() if isinstance(size, Tensor) else size


def refine(steps: Sequence[float], start: Tensor | None, end: Tensor | None, parts: int) -> RefinedGrid:
    """Returns the grid of ``steps``, each split into ``parts`` equal ones, of which only the last point is returned.

    Example:
        >>> refine([0.0, 0.5, 1.0], None, None, 2).nodes
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    nodes = [a + (b - a) * (k / parts) for a, b in pairwise(steps) for k in range(parts)]
    nodes.append(steps[-1])
    return RefinedGrid(nodes, start, end, [False] * (len(nodes) - 1) + [True], parts=parts)
