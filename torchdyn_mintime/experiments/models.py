"""The networks of the experiments: a NeuralODE with what comes before and after it."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

__all__ = ["Classifier", "FirstDimensions", "NoODE", "mlp", "quiet_node", "span_of"]


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class FirstDimensions(nn.Module):
    """The first ``n`` dimensions of the state as logits: a head that learns nothing, as the paper's code has it."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, z: Tensor) -> Tensor:
        return z[:, : self.n]


def quiet_node(field: Callable, **options: Any) -> NeuralODE:
    """A NeuralODE without torchdyn's printed note about a field that takes no time."""
    with redirect_stdout(io.StringIO()):
        return NeuralODE(field, **options)


class _NoField(nn.Module):
    nfe = 0.0  # counted as torchdyn's fields do


class NoODE(nn.Module):
    """In the place of a NeuralODE: z(t_f) = z(t0). What is left of the network must do without."""

    def __init__(self) -> None:
        super().__init__()
        self.vf = _NoField()

    def forward(self, z: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        return t_span[:1], z[None]


class Classifier(nn.Module):
    """``head(node(before(x)))``, with torchdyn's own NeuralODE as a user writes it today.

    Args:
        field: the vector field.
        t_span: the points of the solve, passed at every call.
        before, head: the layers around the NeuralODE.
        options: those of ``NeuralODE`` (solver, sensitivity, tolerances).

    Attributes:
        node: the NeuralODE; after ``wrap``, its LearnableSpan.
    """

    def __init__(
        self,
        field: nn.Module,
        t_span: Tensor,
        before: nn.Module | None = None,
        head: nn.Module | None = None,
        **options: Any,
    ):
        super().__init__()
        self.t_span = t_span
        self.before = before or nn.Identity()
        self.node = quiet_node(field, **{"solver": "rk4", **options})
        self.head = head or FirstDimensions(2)

    def trajectory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(t_eval, sol)``: the points ``[points]`` and the states ``[points, batch, ...]``."""
        return self.node(self.before(x), self.t_span)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        return self.head(self.trajectory(x)[1][-1])


def span_of(steps: int, end: float = 1.0) -> Tensor:
    """``steps`` equal steps on [0, end]."""
    return torch.linspace(0, end, steps + 1)
