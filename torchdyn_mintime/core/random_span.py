"""End times drawn at random in training (STEER; Ghosh et al., 2020)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import checks
from torchdyn_mintime.core.wrapping import require_spans
from torchdyn_mintime.numerics import cut

__all__ = ["RandomSpan"]


class RandomSpan(nn.Module):
    """A model whose solves, in training, end at a time drawn from U(t_f - width, t_f + width), anew for each call.

    In eval mode they end at t_f. Gradients pass to t_f through the drawn time. The width is cut to what the interval
    leaves: a drawn duration is at least a thousandth of t_f - t0. Beyond the template's end a fixed-step solver goes on
    with its last spacing. On average this costs nothing.

    Args:
        model: a LearnableSpan, a module that holds some, or a bare NeuralODE (which is then called with a span of its
            own: the points of the one passed, of ``t_span``, or [0, 1], cut at the drawn time).
        width: half the width of the interval that is drawn from, in units of time: up to nearly t_f - t0.
        generator: the generator that the times are drawn with.

    Attributes:
        model: as given. Calls go through to it.
        drawn: the times of the last call in training, one for each span.

    Raises:
        TypeError: ``model`` is not a module, or ``width`` not a number.
        ValueError: ``model`` has no LearnableSpan, or ``width`` is negative or not finite.

    Example:
        >>> from torchdyn_mintime import LearnableSpan
        >>> span = LearnableSpan(NeuralODE(lambda t, z: -z, solver="rk4"), torch.linspace(0, 1, 11))
        Your vector field ...
        >>> model = RandomSpan(span, width=0.5)
        >>> t_eval, sol = model(torch.ones(4, 2))
        >>> 0.5 <= t_eval[-1].item() <= 1.5, model.drawn[0] == t_eval[-1].item()
        (True, True)
    """

    def __init__(self, model: nn.Module, width: float, *, generator: torch.Generator | None = None):
        super().__init__()
        if not isinstance(model, NeuralODE):
            require_spans(model)
        self.width = checks.number(width, "width", least=0)
        self.model, self.generator = model, generator
        self.drawn: list[float] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, up to a drawn time in training."""
        if not self.training:
            return self.model(x, *args, **kwargs)
        self.drawn = []
        if isinstance(self.model, NeuralODE):
            given = args[0] if args else kwargs.pop("t_span", None)
            return self.model(x, self._own_span(x, given), *args[1:], **kwargs)
        with self._drawn_ends():
            return self.model(x, *args, **kwargs)

    def _shift(self, t0: float, t_f: float) -> float:
        width = min(self.width, (1 - 1e-3) * (t_f - t0))
        device = None if self.generator is None else self.generator.device
        uniform = torch.rand((), generator=self.generator, dtype=torch.float64, device=device).item()
        return (2 * uniform - 1) * width

    @contextmanager
    def _drawn_ends(self) -> Iterator[None]:
        found = require_spans(self.model)
        try:
            for span in found:
                _, _, t0, t_f = span._times(*span._look())
                span._end_shift = self._shift(t0, t_f)
                self.drawn.append(span._times(*span._look())[3])
            yield
        finally:
            for span in found:
                span._end_shift = 0.0

    def _own_span(self, x: Tensor, given: Tensor | None) -> Tensor:
        node: Any = self.model
        own = given if given is not None else node.t_span
        template: Tensor = torch.linspace(0, 1, 2).to(x) if own is None else own
        points = template.detach().tolist()
        end = points[-1] + self._shift(points[0], points[-1])
        adaptive = getattr(node.solver, "stepping_class", "fixed") == "adaptive"
        points = cut(points, points[0], end, extend=not adaptive)
        drawn = torch.tensor(points, dtype=template.dtype, device=template.device)
        self.drawn = [drawn[-1].item()]
        return drawn

    def extra_repr(self) -> str:
        return f"width={self.width:g}"
