"""What belongs to the rows of a batch beside their states: tensors in ``args``, and on the modules of a field."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

TRIED = (0.31, 0.57, 0.83)
"""Shares of the interval at which it is tried: what is multiplied by the time shows nothing at 0."""

MOST = 64
"""Choices of tensors that are tried, at most."""

_ABSENT = object()


class RowsOf:
    """What goes with the rows of the states that a field is bound to: data control, noise, labels, contexts.

    A tensor with as many rows as there are states may also be a weight. So the field is tried with a few rows, at several times
    inside the interval: with no such tensor cut to them, with all, with one, with two, until each row has the rates that it
    has among all. To be made without gradient, inside ``untraced`` or
    :meth:`~torchdyn_mintime.core.field.Field.beside`.

    Args:
        bound: the field, bound to all states.
        x: these states, ``[n, ...]``.
        ends: of the interval.

    Attributes:
        args: the ``args`` of the field; inside :meth:`of` those of some rows.
    """

    def __init__(self, bound: BoundField, x: Tensor, ends: tuple[float, float]):
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
        self._held = drawn
        if not found or len(x) == 1:
            self._held = [*drawn, *found]
            return
        few = torch.arange(len(x), device=x.device)[-min(FEW, len(x) - 1) :]
        times = [x.new_tensor(ends[0] + share * (ends[1] - ends[0])) for share in TRIED]
        some = chain.from_iterable(combinations(found, count) for count in range(1, len(found)))
        with suppress(Exception):  # the solve says what is wrong
            whole = [bound.function(time, x)[few] for time in times]
            for chosen in islice(chain([(), tuple(found)], some), MOST):
                self._held = [*drawn, *chosen]
                if self._fits(bound, times, x[few], few, whole):
                    return
        self._held = drawn

    def _fits(self, bound: BoundField, times: list[Tensor], x: Tensor, rows: Tensor, wanted: list[Tensor]) -> bool:
        """Returns whether these rows have the rates ``wanted`` with what is held cut to them."""
        try:
            with self.of(rows):
                found = [bound.function(time, x) for time in times]
        except Exception:  # whatever a user's field says to tensors that do not fit
            return False
        return all(
            rates.shape == right.shape and bool((rates - right).norm() <= AGREES * right.norm())
            for rates, right in zip(found, wanted, strict=True)
        )

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
