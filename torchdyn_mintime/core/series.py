"""A loss on a whole observed series under a t_f that falls: seen, and refused before it compares different times.

A call is given the times of the data as its span, and the loss compares its states with the data, row by row. Once t_f has
cut the span, the last row is z(t_f) and no longer the state at the last time, often in a trajectory of the same length.
"""

import warnings
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from torchdyn_mintime.core.learnable_interval import Plan

__all__ = ["Series"]


class Series:
    """Learns from backward whether the loss compares rows, and refuses the call that would shift them.

    It takes a loss for such a one if it has a gradient in states between the ends and none in ``t_eval``. A gradient in
    ``t_eval`` at an end alone may be a price on the time, which says nothing of the data: then it warns, once. What the last
    backward before t_f cuts a span has shown holds from then on.
    """

    def __init__(self) -> None:
        self._seen: dict[str, bool] = {}
        self._compares: bool | None = None

    def watch(self, t_eval: Tensor | None, sol: Tensor) -> Tensor:
        """Returns ``sol``, whose backward is looked at unless it is known already."""
        if self._compares is not None or not (sol.requires_grad and torch.is_grad_enabled() and len(sol) > 2):
            return sol
        seen = self._seen = {}
        sol = sol.view_as(sol)  # what is made of the span's record, such as a penalty, is not the user's loss

        def look(gradient: Tensor | None, in_times: bool) -> None:
            if gradient is None:  # DDP passes it for what the loss does not use
                return
            with suppress(RuntimeError):  # of vmap, which hides the values
                between = bool(gradient[1:-1].any())
                if not in_times:
                    seen["states"] = between
                else:  # zeros everywhere: of a field without time, that a penalty has evaluated at all points
                    seen["price alone"] = bool(gradient.any()) and not between

        sol.register_hook(partial(look, in_times=False))
        if t_eval is not None and t_eval.requires_grad:
            t_eval.register_hook(partial(look, in_times=True))
        return sol

    def check(self, plan: Plan, t_span: Tensor, t_f: Tensor) -> None:
        """Raises where the rows of a call are no longer those of the data.

        Args:
            plan: of the call.
            t_span: that was passed.
            t_f: the terminal time.

        Raises:
            ValueError: t_f has cut the span, to as many rows as it has, and the loss compares rows.

        Warns:
            UserWarning: it may compare rows.
        """
        if not plan.cut:
            return
        if self._compares is None and "states" in self._seen:
            self._compares = self._seen["states"] and self._seen.get("price alone", True)
        if not self._compares or len(plan.grid.returned) != len(t_span):
            return
        row = "last" if t_span[0] < t_span[-1] else "first"
        cut = (
            f"t_f = {t_f.item():.6g} has cut the span passed, {t_span[0].item():g} to {t_span[-1].item():g}: its {row} state "
            "is now z(t_f), but the loss uses the states at all points and not t_eval"
        )
        instead = "Compare at the times of t_eval, or freeze t_f (span.t_f.requires_grad_(False)) to fit a whole series"
        if self._seen.get("price alone"):
            self._compares = False
            warnings.warn(
                f"{cut} between the ends: if it compares them with data, these are now at other times. {instead}",
                stacklevel=5,
            )
            return
        raise ValueError(f"{cut}, so it would compare them with data at other times. {instead}")
