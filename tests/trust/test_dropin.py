"""Drop-in: what torchdyn documents for `NeuralODE` gives the same, bare and wrapped, where bare torchdyn is right.

Every model is built twice from one seed. The bare one runs on torchdyn alone; the other is wrapped, its t_f frozen at the
end of the same interval. Compared are the kind of what is returned, its shapes and values, and the gradient of every
parameter and of the input.

Where torchdyn 1.0.6 is wrong the case is left out, and `tests/upstream` holds the row: rk4 with a field of time (U1), an
adjoint with inner points or a running cost (U4, U5, U7), second order with a running cost (U15). torchdyn's tableau is
given in float64 (U9).
"""

import itertools

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, autograd_trace, hutch_trace
from torchdyn.models.energy import GNF, HNN
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalConv2d, GalLinear
from torchdyn.nn.galerkin import Chebychev, Fourier, GaussianRBF, Polynomial
from torchdyn.numerics.solvers.hyper import HyperEuler, HyperMidpoint, HyperRungeKutta4
from trust.comparing import ADAPTIVE, POINTS, Last, build, compare, frozen, mlp, node_of, state, tolerances, weights

from torchdyn_mintime import spans

pytestmark = pytest.mark.usefixtures("float64")


class PlainNet(nn.Module):
    """`forward(t, x, args)`: torchdyn's own form of a field that takes everything."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2, 2)

    def forward(self, t, x, args=None):
        scale = 1.0 if not args else args["scale"]
        return scale * torch.cos(t) * self.net(x)


class Controlled(nn.Module):
    """A damped pendulum under a learned controller: torchdyn's optimal control."""

    def __init__(self):
        super().__init__()
        self.controller = mlp(2, 1)

    def forward(self, t, x, args=None):
        q, v = x[:, :1], x[:, 1:]
        return torch.cat([v, -torch.sin(q) - 0.1 * v + self.controller(x)], 1)


class Correction(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, t, x):
        return self.net(x)


def galerkin(basis):
    return nn.Sequential(DepthCat(1), GalLinear(2, 2, expfunc=basis))


def normal(dim):
    return MultivariateNormal(torch.zeros(dim), torch.eye(dim))


def augmented_zero(x):
    """A column in front: of the running cost, or of the log-density."""
    return torch.cat([torch.zeros(len(x), 1), x], 1)


# name: (model for a solver, initial state, solvers for which bare torchdyn is right)
EVERY = ("euler", "midpoint", "rk4", "tsit5", "dopri5")
OF_TIME = ("euler", "midpoint", "tsit5", "dopri5")
MODELS = {
    "quickstart": (lambda s: node_of(mlp(2, 2), s), POINTS, EVERY),
    "quickstart, states alone": (lambda s: node_of(mlp(2, 2), s, return_t_eval=False), POINTS, EVERY),
    "several nodes in a Sequential": (
        lambda s: nn.Sequential(
            nn.Linear(2, 3), node_of(mlp(3, 3), s), Last(), nn.Linear(3, 2), node_of(mlp(2, 2), s, return_t_eval=False)
        ),
        POINTS,
        EVERY,
    ),
    "depth-varying": (
        lambda s: node_of(nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.Tanh(), DepthCat(1), nn.Linear(9, 2)), s),
        POINTS,
        OF_TIME,
    ),
    "a field of time": (lambda s: node_of(PlainNet(), s), POINTS, OF_TIME),
    "augmentation by zeros": (
        lambda s: nn.Sequential(Augmenter(1, 3), node_of(mlp(5, 5), s), Last(), nn.Linear(5, 2)),
        POINTS,
        EVERY,
    ),
    "augmentation by a layer": (
        lambda s: nn.Sequential(Augmenter(1, 2, nn.Linear(2, 2), order="last"), node_of(mlp(4, 4), s), Last()),
        POINTS,
        EVERY,
    ),
    "second order": (lambda s: node_of(mlp(4, 2), s, order=2), (5, 4), EVERY),
    "third order": (lambda s: node_of(mlp(6, 2), s, order=3), (5, 6), ("midpoint", "tsit5")),
    "data control": (lambda s: node_of(nn.Sequential(DataControl(), mlp(4, 2)), s), POINTS, EVERY),
    "Galerkin, Fourier": (lambda s: node_of(galerkin(Fourier(3)), s), POINTS, OF_TIME),
    "Galerkin, polynomial": (lambda s: node_of(galerkin(Polynomial(2)), s), POINTS, ("midpoint", "tsit5")),
    "Galerkin, Chebychev": (lambda s: node_of(galerkin(Chebychev(2)), s), POINTS, ("midpoint",)),
    "Galerkin, radial": (lambda s: node_of(galerkin(GaussianRBF(2)), s), POINTS, ("midpoint", "tsit5")),
    "Galerkin, convolution": (
        lambda s: node_of(nn.Sequential(DepthCat(1), GalConv2d(1, 1, 3, padding=1, expfunc=Fourier(2))), s),
        (2, 1, 4, 4),
        ("midpoint", "tsit5"),
    ),
    "CNF, exact trace": (
        lambda s: nn.Sequential(Augmenter(1, 1), node_of(CNF(mlp(2, 2), trace_estimator=autograd_trace), s)),
        POINTS,
        EVERY,
    ),
    "CNF, Hutchinson's trace": (
        lambda s: nn.Sequential(
            Augmenter(1, 1), node_of(CNF(mlp(2, 2), trace_estimator=hutch_trace, noise_dist=normal(2)), s)
        ),
        POINTS,
        EVERY,
    ),
    "integral loss": (
        lambda s: nn.Sequential(
            Augmenter(1, 1), node_of(mlp(2, 2), s, integral_loss=lambda t, x: x.square().sum(1) * (1 + t))
        ),
        POINTS,
        OF_TIME,
    ),
    "optimal control": (
        lambda s: nn.Sequential(
            Augmenter(1, 1), node_of(Controlled(), s, integral_loss=lambda t, x: x.square().sum(1, keepdim=True))
        ),
        POINTS,
        EVERY,
    ),
    "Hamiltonian network": (lambda s: node_of(HNN(mlp(4, 1)), s), (5, 4), EVERY),
    "stable network": (lambda s: node_of(GNF(mlp(2, 1)), s), POINTS, EVERY),
    "image classifier": (
        lambda s: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            Augmenter(1, 1),
            node_of(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), nn.Conv2d(4, 3, 3, padding=1)), s),
            Last(),
            nn.Flatten(),
            nn.Linear(3 * 16, 3),
        ),
        (2, 1, 4, 4),
        EVERY,
    ),
    "image classifier, batch norm": (
        lambda s: nn.Sequential(
            node_of(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh()), s), Last(), nn.Flatten()
        ),
        (3, 2, 4, 4),
        ("euler", "rk4"),
    ),
}  # fmt: skip
CASES = [(name, solver) for name, (_, _, solvers) in MODELS.items() for solver in solvers]


@pytest.mark.parametrize("name, solver", CASES, ids=[f"{n}, {s}" for n, s in CASES])
def test_wrapped_is_as_bare(name, solver):
    make, shape, _ = MODELS[name]
    bare, wrapped = build(make, solver), frozen(build(make, solver))
    rtol, atol = tolerances(solver)
    if name == "Galerkin, convolution" and solver not in ADAPTIVE:
        rtol, atol = 1e-10, 1e-11
    compare(bare, wrapped, state(shape), rtol, atol)
    # Batch statistics too; a span has buffers of its own for t0, template and bounds.
    own = {id(b) for span in spans(wrapped) for b in span.buffers(recurse=False)}
    ours = {n.replace(".node.", "."): b for n, b in wrapped.named_buffers() if id(b) not in own}
    theirs = dict(bare.named_buffers())
    assert [n.replace("node.", "", 1) if n.startswith("node.") else n for n in ours] == list(theirs)
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("which", [HyperEuler, HyperMidpoint, HyperRungeKutta4])
def test_hypersolvers(which):
    def make(_):
        return node_of(mlp(2, 2), which(Correction(), torch.float64), torch.linspace(0, 1, 6))

    compare(build(make, None), frozen(build(make, None)), state(POINTS), 1e-11, 1e-12)


ADJOINT = ("quickstart", "second order", "a field of time", "Hamiltonian network", "stable network", "CNF, exact trace")


@pytest.mark.parametrize("name", ADJOINT)
def test_the_adjoint_over_two_points(name):
    def make(solver):
        model = MODELS[name][0](solver)
        node = model if isinstance(model, NeuralODE) else model[1]
        again = node_of(node.vf.vf.vf if hasattr(node.vf.vf, "has_time_arg") else node.vf.vf, solver, order=node.order,
                        sensitivity="adjoint")  # fmt: skip
        return again if isinstance(model, NeuralODE) else nn.Sequential(model[0], again)

    bare, wrapped = build(make, "tsit5"), frozen(build(make, "tsit5"))
    # Two adaptive solves forwards and two backwards, each within 1e-8 of the ODE's own.
    compare(bare, wrapped, state(MODELS[name][1]), 1e-5, 1e-6)


CALLS = {
    "a span is passed": lambda model, x: model(x, torch.linspace(0, 1, 6)),
    "trajectory": lambda model, x: model.trajectory(x, torch.linspace(0, 1, 6)),
    "save_at": lambda model, x: model(x, torch.linspace(0, 1, 6), save_at=torch.tensor([0.0, 0.4, 1.0])),
    # Empty: torchdyn's fixed-step solvers take `args` and do not hand them to the field (U8), the wrapper does.
    "args": lambda model, x: model(x, torch.linspace(0, 1, 6), args={}),
    "a keyword": lambda model, x: model(x=x, t_span=torch.linspace(0, 1, 6)),
    # The states alone: torchdyn returns the times of a descending span with the wrong sign (U6).
    "descending": lambda model, x: model.trajectory(x, torch.linspace(1, 0, 6)),
}


@pytest.mark.parametrize("how, solver", list(itertools.product(CALLS, ("euler", "midpoint"))))
def test_every_way_to_call(how, solver):
    def make(s):
        return node_of(PlainNet(), s)

    compare(build(make, solver), frozen(build(make, solver)), state(POINTS), 1e-11, 1e-12, CALLS[how])


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_inner_points_of_an_adaptive_solve(solver):
    def make(s):
        return node_of(mlp(2, 2), s, torch.linspace(0, 1, 4))

    bare, wrapped = build(make, solver), frozen(build(make, solver))
    compare(bare, wrapped, state(POINTS), *tolerances(solver))


@pytest.mark.parametrize(
    "name, solver", [("quickstart", "rk4"), ("depth-varying", "midpoint"), ("data control", "tsit5")]
)
def test_a_training_is_the_same_step_for_step(name, solver):
    make, shape, _ = MODELS[name]
    losses = []
    for model in (build(make, solver), frozen(build(make, solver))):
        optimizer, x = torch.optim.Adam(weights(model), lr=0.01), state(shape).detach()
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x)[1][-1] - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.99 * losses[0][0]
    # Adam divides gradients by their size and so keeps relative differences: 1e-8 is left of 1e-16 at the worst.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if solver in ADAPTIVE else 1e-9)


def test_counters_and_names_read_as_the_nodes():
    bare, wrapped = (build(MODELS["quickstart"][0], "rk4") for _ in range(2))
    wrapped = frozen(wrapped)
    x = state(POINTS)
    bare(x), wrapped(x)
    assert wrapped.vf.nfe == bare.vf.nfe == 20
    assert (wrapped.order, wrapped.sensitivity) == (bare.order, bare.sensitivity)
    assert list(bare.state_dict()) == [k for k in wrapped.state_dict() if "." in k]


def test_the_suite_would_notice_another_interval():
    make = MODELS["quickstart"][0]
    bare, wrapped = build(make, "rk4"), frozen(build(make, "rk4"))
    with torch.no_grad():
        wrapped.t_f.fill_(1 - 1e-6)
    with pytest.raises(AssertionError):
        compare(bare, wrapped, state(POINTS), *tolerances("rk4"))
