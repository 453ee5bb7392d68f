"""The networks of the experiments: a NeuralODE with the layers before and after it."""

import io
import math
from contextlib import redirect_stdout
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace

from torchdyn_mintime import FlowModel, LearnableSolver, LearnableSpan, fit_solver
from torchdyn_mintime.flows import Gaussian, HyperCNF

__all__ = [
    "ConvField",
    "FirstDimensions",
    "LogDensity",
    "Model",
    "NoODE",
    "conv_parts",
    "flow_of",
    "hyper_flow_parts",
    "mlp",
    "patch_parts",
    "span_of",
    "tutorial_flow_parts",
]


def span_of(steps: int, end: float = 1.0) -> Tensor:
    """Returns the points of ``steps`` equal steps on [0, end]."""
    return torch.linspace(0, end, steps + 1)


class Model(nn.Module):
    """The network ``head(node(before(x)))``, with torchdyn's own NeuralODE, as a user of torchdyn writes it.

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
        with redirect_stdout(io.StringIO()):  # torchdyn prints a note about a field that takes no time
            self.node = NeuralODE(field, **{"solver": "rk4", **options})
        self.head = head or FirstDimensions(2)

    @property
    def t_f(self) -> float:
        """The end of the interval, in units of time. If the ODE is skipped, its beginning."""
        if isinstance(self.node, NoODE):
            return self.t_span[0].item()
        return self.node.t_f.item() if isinstance(self.node, LearnableSpan) else self.t_span[-1].item()

    def trajectory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(t_eval, sol)``: the points ``[points]`` and the states ``[points, batch, ...]``."""
        return self.node(self.before(x), self.t_span)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``[batch, classes]``; of a flow, log-densities ``[batch]``."""
        return self.head(self.trajectory(x)[1][-1])


class NoODE(nn.Module):
    """Stands in the place of a NeuralODE and leaves the state as it is: z(t_f) = z(t0)."""

    def __init__(self) -> None:
        super().__init__()
        self.vf = SimpleNamespace(nfe=0.0)  # as torchdyn's fields have it

    def forward(self, z: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        return t_span[:1], z[None]


def mlp(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Returns linear layers with an activation between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


class FirstDimensions(nn.Module):
    """Gives the first ``n`` dimensions of the state as logits: a head without parameters, as in the paper's code."""

    def __init__(self, n: int):
        super().__init__()
        self.n = n

    def forward(self, z: Tensor) -> Tensor:
        return z[:, : self.n]


# ------------------------------------------------------------------------------------------------------------- images


def _norm(width: int) -> nn.GroupNorm:
    # Groups of two channels, as the paper has with 32 groups of 64. With groups of one, average pooling after the norm would
    # give the same for every image.
    return nn.GroupNorm(math.gcd(32, max(1, width // 2)), width)


class _ConvWithTime(nn.Module):
    """A 3 by 3 convolution with the time as one more channel.

    The time is the same in all places and for all images, so that its channel is convolved once and added. On a CPU that
    takes a third less time than to join the channels, since 17 of them are computed as 32.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width + 1, width, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        time = torch.as_tensor(t).to(x).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        of_time, of_state = self.conv.weight.split([1, x.shape[1]], 1)
        return conv2d(x, of_state, padding=1) + conv2d(time, of_time, self.conv.bias, padding=1)


class ConvField(nn.Module):
    """The field f(t, z) of feature maps ``[batch, channels, height, width]``: norm, ReLU and convolution, twice, and a norm.

    Args:
        width: number of channels.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.norms = nn.ModuleList(_norm(width) for _ in range(3))
        self.convolutions = nn.ModuleList(_ConvWithTime(width) for _ in range(2))

    def forward(self, t: Tensor, x: Tensor, args: dict | None = None) -> Tensor:
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = convolution(t, torch.relu(norm(x)))
        return self.norms[2](x)


def conv_parts(channels: int, width: int = 64) -> dict[str, nn.Module]:
    """Returns the paper's network for images, as keywords of ``Model``.

    Args:
        channels: channels of the images.
        width: channels inside the network; 64 in the paper.
    """
    before = nn.Sequential(
        nn.Conv2d(channels, width, 3),
        _norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, 2, 1),
        _norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, 2, 1),
    )
    head = nn.Sequential(_norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return {"field": ConvField(width), "before": before, "head": head}


def patch_parts(channels: int, width: int = 16) -> dict[str, nn.Module]:
    """Returns a network for images whose ODE does most of the work, as keywords of ``Model``.

    Before the ODE is one convolution of patches of 4 by 4; after it are pooling and a linear layer.

    Args:
        channels: channels of the images.
        width: channels inside the network.
    """
    before = nn.Conv2d(channels, width, 4, 4)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return {"field": ConvField(width), "before": before, "head": head}


# -------------------------------------------------------------------------------------------------------------- flows


FITTED, LOG_DENSITY = 1024, 0
"""How many states a solver is fitted to, and in which column a flow's state has the log-density."""


class LogDensity(nn.Module):
    """The head of a flow: gives log p(x) of eq. (5) from the state [l, z] at t_f.

    Args:
        base: the distribution at t_f.
    """

    def __init__(self, base: Gaussian):
        super().__init__()
        self.base: Gaussian = base

    def forward(self, z: Tensor) -> Tensor:
        return self.base.log_prob(z[:, 1:]) - z[:, 0]


def _flow_parts(field: nn.Module, base: Gaussian) -> dict[str, nn.Module]:
    return {"field": field, "before": nn.ConstantPad1d((1, 0), 0.0), "head": LogDensity(base)}  # l(t0) = 0


def hyper_flow_parts() -> dict[str, nn.Module]:
    """Returns the flow of the Neural ODEs example: a hypernetwork, with the base N(0, 0.1 I). As keywords of ``Model``."""
    return _flow_parts(HyperCNF(), Gaussian(2, variance=0.1))


def tutorial_flow_parts() -> dict[str, nn.Module]:
    """Returns the flow of torchdyn's tutorial, with Hutchinson's trace estimator. As keywords of ``Model``."""
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    net = mlp(2, 64, 64, 64, 2, activation=nn.Softplus)
    return _flow_parts(CNF(net, trace_estimator=hutch_trace, noise_dist=noise), Gaussian(2))


def flow_of(model: Model) -> FlowModel:
    """Returns a trained flow as a FlowModel, which has samples and a density, with the same steps and parameters.

    A solver that was learned for densities gets one of as many evaluations beside it, fitted to samples.
    """
    assert isinstance(model.head, LogDensity)
    span, base = model.node if isinstance(model.node, LearnableSpan) else None, model.head.base
    if span is None:
        span = LearnableSpan(model.node, model.t_span)
    elif isinstance(span.solver, LearnableSolver) and span.solver.other is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = model.before(base.sample((FITTED,)).to(model.t_span.device))
        fit = fit_solver(
            span, drawn, evaluations=span.solver.stages, inverse=True, log_density=LOG_DENSITY, progress=False
        )
        span.solver.other = fit.node.solver
    return FlowModel(span, base).eval()
