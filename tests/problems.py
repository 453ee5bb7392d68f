"""The problems of all tests: equations with closed-form solutions, small random fields, and NeuralODEs over them.

Nothing here uses the package under test. `rhs(t, x)` is always the plain right-hand side, written without torchdyn, so
that a reference solution does not share torchdyn's faults either.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat

# ---------------------------------------------------------------------------------------------------------------------
# Equations with closed-form solutions: `exact(t0, t, x)` is z(t) from z(t0) = x, differentiable in every argument and in
# the parameters. Fields that take a time accept **kwargs: bare torchdyn calls them with `args=` (U13).


class Decay(nn.Module):
    """x' = -a x."""

    def __init__(self, rate=1.0, dtype=torch.float64):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=dtype))

    def forward(self, t, x, **kwargs):
        return -self.rate * x

    def exact(self, t0, t, x):
        return x * torch.exp(-self.rate * (t - t0))


class Cosine(nn.Module):
    """x' = a cos 3t: the state plays no part, so a stepper's error is that of its quadrature in time."""

    def __init__(self, amplitude=1.0, dtype=torch.float64):
        super().__init__()
        self.amplitude = nn.Parameter(torch.tensor(amplitude, dtype=dtype))

    def forward(self, t, x, **kwargs):
        return self.amplitude * torch.cos(3 * t) + 0 * x

    def exact(self, t0, t, x):
        return x + self.amplitude * (torch.sin(3 * t) - torch.sin(3 * t0)) / 3


class Linear(nn.Module):
    """x' = A x, solved by the matrix exponential; a damped rotation by default."""

    def __init__(self, matrix=((-0.3, -1.2), (1.2, -0.3)), dtype=torch.float64):
        super().__init__()
        self.matrix = nn.Parameter(torch.as_tensor(matrix, dtype=dtype).clone())

    def forward(self, t, x, **kwargs):
        return x @ self.matrix.T

    def exact(self, t0, t, x):
        return x @ torch.linalg.matrix_exp(self.matrix * (t - t0)).T


class Breathing(nn.Module):
    """x' = a x cos t: time and state together; x(t) = x exp(a (sin t - sin t0))."""

    def __init__(self, rate=0.7, dtype=torch.float64):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=dtype))

    def forward(self, t, x, **kwargs):
        return self.rate * torch.cos(t) * x

    def exact(self, t0, t, x):
        return x * torch.exp(self.rate * (torch.sin(t) - torch.sin(t0)))


class Oscillator(nn.Module):
    """q'' = -w^2 q, second order: the state is (q, q') side by side, the field returns the acceleration."""

    order = 2

    def __init__(self, frequency=1.3, dtype=torch.float64):
        super().__init__()
        self.frequency = nn.Parameter(torch.tensor(frequency, dtype=dtype))

    def forward(self, t, x, **kwargs):
        q, _ = x.chunk(2, dim=1)
        return -(self.frequency**2) * q

    def exact(self, t0, t, x):
        q, v = x.chunk(2, dim=1)
        angle = self.frequency * (t - t0)
        return torch.cat(
            [
                q * torch.cos(angle) + v / self.frequency * torch.sin(angle),
                v * torch.cos(angle) - q * self.frequency * torch.sin(angle),
            ],
            dim=1,
        )


CLOSED_FORMS = {"decay": Decay, "cosine": Cosine, "linear": Linear, "breathing": Breathing, "oscillator": Oscillator}


def closed_form(name: str, **options) -> tuple[NeuralODE, nn.Module, Tensor]:
    """The node, its field (with `.exact`) and a batch of float64 initial states."""
    equation = CLOSED_FORMS[name]()
    x = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-1.1, 0.2]], dtype=torch.float64)
    return NeuralODE(equation, order=getattr(equation, "order", 1), **options), equation, x


# ---------------------------------------------------------------------------------------------------------------------
# Small random fields


@dataclass
class Model:
    """A NeuralODE over a random field, a batch of initial states, and the same right-hand side without torchdyn."""

    node: NeuralODE
    x: Tensor
    rhs: Callable[[Tensor, Tensor], Tensor]
    kind: str = ""
    parameters: list[nn.Parameter] = field(default_factory=list)


def _mlp(inputs, outputs, width=8):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


class KeywordTime(nn.Module):
    """`forward(t, x, **kwargs)`: the one form with a time that bare torchdyn calls without an error."""

    def __init__(self, dim):
        super().__init__()
        self.net = _mlp(dim + 2, dim)

    def forward(self, t, x, **kwargs):
        clock = torch.stack([torch.sin(2 * t), torch.cos(2 * t)]).reshape(1, 2).to(x).expand(x.shape[0], 2)
        return self.net(torch.cat([x, clock], 1))


class PlainTime(nn.Module):
    """`forward(t, x)`: what one would write first, and what bare torchdyn cannot call (U13)."""

    def __init__(self, dim):
        super().__init__()
        self.net = _mlp(dim, dim)

    def forward(self, t, x):
        return torch.cos(t).to(x) * self.net(x) - 0.3 * x


class FloatTime(nn.Module):
    """A field that reads the time as a Python number, which a batch of times would not survive (U11)."""

    def __init__(self, dim):
        super().__init__()
        self.net = _mlp(dim, dim)

    def forward(self, t, x, **kwargs):
        return self.net(x) * (1 + 0.5 * math.cos(float(t.detach())))


class SecondOrder(nn.Module):
    """The acceleration of a second-order equation from position, velocity and time."""

    def __init__(self, dim):
        super().__init__()
        self.net = _mlp(dim, dim // 2)

    def forward(self, t, x, **kwargs):
        return self.net(x) * torch.cos(t).to(x)


class Convolution(nn.Module):
    """A field on images: states of shape [batch, channels, height, width]."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, channels, 1))

    def forward(self, x):
        return self.net(x)


class Componentwise(nn.Module):
    """A field on states of shape [n], without a batch dimension."""

    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(dim))
        self.shift = nn.Parameter(torch.randn(dim))

    def forward(self, x):
        return torch.tanh(self.scale * x + self.shift)


FIELDS = ("linear", "mlp", "depthcat", "keyword", "plain", "lambda", "second order", "conv", "1-D state")
AUTONOMOUS = ("linear", "mlp", "conv", "1-D state")


def random_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, batch: int = 3, **options) -> Model:
    """A NeuralODE over a random field of the given kind; `options` go to NeuralODE. The same seed gives the same model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dim, order, extra = 2, 1, {}
        shape: tuple[int, ...] = (batch, dim)
        if kind == "linear":
            module = nn.Linear(dim, dim).to(dtype)
            rhs = lambda t, x: module(x)  # noqa: E731
        elif kind == "mlp":
            module = _mlp(dim, dim).to(dtype)
            rhs = lambda t, x: module(x)  # noqa: E731
        elif kind == "depthcat":
            module = nn.Sequential(DepthCat(1), nn.Linear(dim + 1, 8), nn.Tanh(), DepthCat(1), nn.Linear(9, dim)).to(
                dtype
            )

            def rhs(t, x):
                column = t * torch.ones(x.shape[0], 1, dtype=x.dtype)
                hidden = torch.tanh(module[1](torch.cat([x, column], 1)))
                return module[4](torch.cat([hidden, column], 1))

        elif kind == "keyword":
            module = KeywordTime(dim).to(dtype)
            rhs = module
        elif kind == "plain":
            module = PlainTime(dim).to(dtype)
            rhs = module
        elif kind == "float time":
            module = FloatTime(dim).to(dtype)
            rhs = module
        elif kind == "lambda":
            weight = nn.Parameter(torch.randn(dim, dim, dtype=dtype))
            module = lambda t, x: torch.tanh(x @ weight) * torch.cos(t)  # noqa: E731
            rhs, extra = module, {"optimizable_params": [weight]}
        elif kind == "second order":
            dim, order, shape = 4, 2, (batch, 4)
            module = SecondOrder(dim).to(dtype)
            rhs = lambda t, x: torch.cat([x[:, 2:], module(t, x)], 1)  # noqa: E731
        elif kind == "conv":
            module, shape = Convolution(2).to(dtype), (2, 2, 4, 4)
            rhs = lambda t, x: module(x)  # noqa: E731
        elif kind == "1-D state":
            module, shape = Componentwise(5).to(dtype), (5,)
            rhs = lambda t, x: module(x)  # noqa: E731
        else:
            raise ValueError(f"no field of the kind {kind!r}")
        node = NeuralODE(module, order=order, **{"solver": "rk4", **extra, **options})
        x = torch.randn(shape, dtype=dtype)
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else extra["optimizable_params"]
    return Model(node, x, rhs, kind, parameters)


# ---------------------------------------------------------------------------------------------------------------------
# A reference solution


def rk4_step(rhs, t, x, dt):
    """One step of the classical Runge-Kutta method, its four nodes at t, t + dt/2, t + dt/2, t + dt."""
    k1 = rhs(t, x)
    k2 = rhs(t + dt / 2, x + dt / 2 * k1)
    k3 = rhs(t + dt / 2, x + dt / 2 * k2)
    k4 = rhs(t + dt, x + dt * k3)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def reference(rhs, x: Tensor, times: Tensor, steps: int = 200) -> Tensor:
    """z at the given times (ascending or descending, the first is x's own), by about `steps` classical RK4 steps.

    In float64 and for fields of size one the error is near 1e-10 for 200 steps on a unit span. Differentiable in all.
    Every interval gets the same number of steps, whatever its length: a number that followed the length would jump as
    a difference moves a time, and put the jump, divided by h, into the derivative.
    """
    substeps = math.ceil(steps / (len(times) - 1))
    states = [x]
    for a, b in itertools.pairwise(times):
        dt, z = (b - a) / substeps, states[-1]
        for i in range(substeps):
            z = rk4_step(rhs, a + i * dt, z, dt)
        states.append(z)
    return torch.stack(states)


class Stuck(Exception):
    """Raised from inside a field that has been evaluated more often than any solve that ends would need."""


class ByArgs(nn.Module):
    """A field that is scaled, and may be shifted, by what is in ``args``."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t, x, args):
        return self.net(x) * args["scale"] + args.get("shift", 0)


class Counted(nn.Module):
    """A field that counts its evaluations and stops a solve that would hang by raising `Stuck`."""

    def __init__(self, function, limit=5_000):
        super().__init__()
        self.function, self.limit, self.count = function, limit, 0
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, t, x, **kwargs):
        self.count += 1
        if self.count > self.limit:
            raise Stuck(f"{self.count} evaluations")
        return self.weight.to(x) * self.function(t, x)
