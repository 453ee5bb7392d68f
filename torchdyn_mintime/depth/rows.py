"""What belongs to the rows of a batch beside their states: tensors in ``args``, and on the modules of a field."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, combinations, islice
from typing import Any

import torch
from torch import Tensor

from torchdyn_mintime.core import STATEFUL, BoundField

__all__ = ["RowsOf"]

FEW = 2
"""Rows that the field is tried with."""

AGREES = 1e-2
"""How far, relatively, the rates of these rows may be from those among all: batches of two sizes are rounded in two ways."""

MOST = 64
"""Choices of tensors that are tried, at most."""

_ABSENT = object()


class RowsOf:
    """What goes with the rows of the states that a field is bound to: data control, noise, labels, contexts.

    A tensor with as many rows as there are states may also be a weight. So the field is tried with a few rows and with all such
    tensors cut to them, then with fewer and fewer of them cut, until each row has the rate that it has among all. To be made
    without gradient, inside ``untraced`` or :meth:`~torchdyn_mintime.core.field.Field.beside`.

    Args:
        bound: the field, bound to all states.
        x: these states, ``[n, ...]``.
        t: a time to try the field at.

    Attributes:
        args: the ``args`` of the field; inside :meth:`of` those of some rows.
    """

    def __init__(self, bound: BoundField, x: Tensor, t: float):
        self.args: Any = bound.args

        def of_rows(place: Any, values: Any) -> list[tuple[Any, str, Tensor]]:
            named = [(name, value) for name, value in values if isinstance(value, Tensor) and value.dim()]
            return [(place, name, value) for name, value in named if len(value) == len(x)]

        drawn = [held for m, name, value in bound.captured for held in of_rows(vars(m), [(name, value)])]
        known = {(id(place), name) for place, name, _ in drawn}
        found = of_rows(self.args, self.args.items())
        for module in bound.modules:
            found += of_rows(vars(module), vars(module).items())
            if not isinstance(module, STATEFUL):
                # Put as attributes, they hide the buffers: secondary solves, such as penalties, see them again.
                found += of_rows(vars(module), module.named_buffers(recurse=False))
        found = [held for held in found if (id(held[0]), held[1]) not in known]
        self._held = [*drawn, *found]
        if not found or len(x) == 1:
            return
        few, time = torch.arange(len(x), device=x.device)[-min(FEW, len(x) - 1) :], x.new_tensor(t)
        choices = chain.from_iterable(combinations(found, count) for count in range(len(found), -1, -1))
        try:
            whole = bound.function(time, x)[few]
            for chosen in islice(choices, MOST):
                self._held = [*drawn, *chosen]
                if self._fits(bound, time, x[few], few, whole):
                    return
        except RuntimeError:  # the solve says what is wrong
            pass
        self._held = [*drawn, *found]

    def _fits(self, bound: BoundField, time: Tensor, x: Tensor, rows: Tensor, wanted: Tensor) -> bool:
        """Returns whether these rows have the rates ``wanted`` with what is held cut to them."""
        try:
            with self.of(rows):
                rates = bound.function(time, x)
        except (RuntimeError, IndexError):
            return False
        return rates.shape == wanted.shape and bool((rates - wanted).norm() <= AGREES * wanted.norm())

    @contextmanager
    def of(self, rows: Tensor) -> Iterator[None]:
        """Puts what belongs to these rows on the field's modules and into :attr:`args`; afterwards all is as it was."""
        before = [(place, name, place.get(name, _ABSENT)) for place, name, _ in self._held]
        try:
            for place, name, value in self._held:
                place[name] = value[rows]
            yield
        finally:
            for place, name, value in before:
                if value is _ABSENT:
                    del place[name]
                else:
                    place[name] = value
