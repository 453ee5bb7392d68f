"""What torchdyn's own tests and tutorials do, with wrapped models; and torchdyn's own suite, where a user has it.

`test_dropin.py` has the models that torchdyn documents. Here are the uses that its tests and tutorials make of them and
that are missing there: a Lightning learner that passes its own span, a trajectory drawn on a finer span than was trained
on, a random choice of points to save, a field made by `functools.partial`, a flow that is run backwards, and the layers
that no other test has.

`TORCHDYN_TESTS=/path/to/torchdyn/test pytest tests/trust/test_torchdyn_suite.py` runs the real suite three times, each
in a process of its own: bare, wrapped with t_f frozen, and wrapped with t_f learned.

Seen with torchdyn 1.0.6 and torch 2.14, over the 28 tests that build a NeuralODE or save a problem (those of roots,
cosine transforms, SDEs and bare `odeint` build none, and are the same with the plugin as without):

    bare      20 passed, 8 failed
    wrapped   18 passed, 10 failed, with t_f frozen and with t_f learned alike

The 8 are `test_problem_save`: `torch.load` refuses a whole model by default since torch 2.6, torchdyn's and the wrapped
one's alike (U17); four of them make no NeuralODE. The other two:

`test_dict_out_and_args`   a state that is a dict passes through torchdyn only with a solver of the test's own; wrapped,
                           it is refused with a TypeError (U18).
`test_arg_ode`             asks for equality to the last bit with torchdyn's `odeint`. The wrapped solve differs by one
                           unit in the last place of float32, since a learnable t_f makes the last step; the same
                           comparison to 1e-6 is `test_a_field_made_by_partial` below.
"""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from learners import Learner, loader, trainer
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE
from torchdyn.datasets import ToyDataset
from torchdyn.models import CNF, hutch_trace
from torchdyn.models.energy import GNF, HNN, LNN
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalConv2d, GalLinear
from torchdyn.nn.galerkin import Fourier, MultiquadRBF, Polynomial, VanillaRBF
from torchdyn.numerics import VanDerPol, odeint
from trust.comparing import POINTS, Last, build, compare, frozen, mlp, node_of, state, tolerances

import torchdyn_mintime as tm

double = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------------------------------
# Models


class Graph(nn.Module):
    """A layer over a graph of five nodes, the batch: torchdyn's classification of nodes."""

    def __init__(self):
        super().__init__()
        ring = torch.eye(5).roll(1, 0)
        self.register_buffer("adjacency", (torch.eye(5) + ring + ring.T) / 3)
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.adjacency @ self.linear(x)


def gal(inputs, outputs, basis):
    return nn.Sequential(DepthCat(1), GalLinear(inputs, outputs, expfunc=basis))


# name: (model for a solver, initial state, solvers for which bare torchdyn is right)
MODELS = {
    "Lagrangian network": (lambda s: node_of(LNN(mlp(4, 1)), s), (2, 4), ("euler", "rk4")),
    "Galerkin, plain radial": (
        lambda s: node_of(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), *gal(4, 2, VanillaRBF(3))), s),
        POINTS,
        ("midpoint", "tsit5"),
    ),
    "Galerkin, multiquadric": (
        lambda s: node_of(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), *gal(4, 2, MultiquadRBF(3))), s),
        POINTS,
        ("midpoint", "tsit5"),
    ),
    "two Galerkin layers, augmented": (
        lambda s: nn.Sequential(
            Augmenter(1, 2, nn.Linear(2, 2)),
            node_of(nn.Sequential(*gal(4, 6, Fourier(3)), nn.Tanh(), *gal(6, 4, Polynomial(2))), s),
            Last(),
        ),
        POINTS,
        ("midpoint", "dopri5"),
    ),
    "two Galerkin convolutions": (
        lambda s: node_of(
            nn.Sequential(
                DepthCat(1),
                GalConv2d(1, 2, 3, padding=1, expfunc=Fourier(2)),
                nn.Tanh(),
                DepthCat(1),
                GalConv2d(2, 1, 3, padding=1, expfunc=Fourier(2)),
            ),
            s,
        ),
        (2, 1, 4, 4),
        ("midpoint",),
    ),
    "data control, augmented": (
        lambda s: nn.Sequential(
            Augmenter(1, 2, nn.Linear(2, 2)), node_of(nn.Sequential(DataControl(), mlp(8, 4)), s), Last()
        ),
        POINTS,
        ("rk4", "dopri5"),
    ),
    "second order, augmented, of time": (
        lambda s: nn.Sequential(
            Augmenter(1, 2, nn.Linear(2, 2)),
            node_of(nn.Sequential(DepthCat(1), nn.Linear(5, 8), nn.Tanh(), DepthCat(1), nn.Linear(9, 2)), s, order=2),
            Last(),
        ),
        POINTS,
        ("midpoint", "dopri5"),
    ),
    "a graph": (
        lambda s: node_of(nn.Sequential(Graph(), nn.Softplus(), Graph()), s),
        POINTS,
        ("rk4", "dopri5"),
    ),
    "a system of torchdyn's": (lambda s: node_of(VanDerPol(0.5), s), POINTS, ("rk4", "dopri5")),
}  # fmt: skip
CASES = [(name, solver) for name, (_, _, solvers) in MODELS.items() for solver in solvers]


@double
@pytest.mark.parametrize("name, solver", CASES, ids=[f"{n}, {s}" for n, s in CASES])
def test_the_models_of_its_tests_and_tutorials(name, solver):
    make, shape, _ = MODELS[name]
    rtol, atol = tolerances(solver)
    if name in ("Lagrangian network", "two Galerkin convolutions"):
        # A pseudo-inverse, or a sum over many weights, stands between the state and its derivative.
        rtol, atol = 1e-6, 1e-7
    compare(build(make, solver), frozen(build(make, solver)), state(shape), rtol, atol)


@double
@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
def test_the_gradient_of_an_oscillator_by_the_adjoints(sensitivity, solver):
    # torchdyn's own test, but against the exact gradient by autograd: bare, it must come within 1e-3.
    x, t_span = state(POINTS), torch.linspace(0, 1, 20)
    options = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}

    def gradient(model):
        return torch.autograd.grad(model(x, t_span)[1][-1].sum(), x)[0]

    exact = gradient(frozen(NeuralODE(VanDerPol(0.5), solver=solver, **options)))
    wrapped = gradient(frozen(NeuralODE(VanDerPol(0.5), solver=solver, sensitivity=sensitivity, **options)))
    torch.testing.assert_close(wrapped, exact, rtol=1e-6, atol=1e-7)


@double
@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
@pytest.mark.filterwarnings("ignore:the .* times asked for have cut")  # torchdyn asks for them all
def test_an_integral_loss_by_the_adjoints_and_by_a_column(sensitivity):
    """The gradient that an adjoint adds of a running cost is that of the cost as a column of the state."""

    def cost(t, x):
        return 0.1 * x[:, :1]

    t_span = torch.linspace(0, 1, 101)
    x = state(POINTS)
    column = frozen(NeuralODE(VanDerPol(0.5), solver="rk4", integral_loss=cost))
    sol = column(torch.cat([torch.zeros(len(x), 1), x], 1), t_span)[1]
    (by_column,) = torch.autograd.grad(sol[-1, :, 0].sum(), x)
    # The running cost's gradient comes with the backward of anything, here of nothing.
    tight = {"atol": 1e-7, "rtol": 1e-7, "atol_adjoint": 1e-7, "rtol_adjoint": 1e-7}
    adjoint = frozen(NeuralODE(VanDerPol(0.5), solver="dopri5", sensitivity=sensitivity, integral_loss=cost, **tight))
    (0.0 * adjoint(x, t_span)[1][-1].sum()).backward()
    torch.testing.assert_close(x.grad, by_column, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to use them


@pytest.fixture(scope="module")
def moons():
    # Once: torchdyn draws it from numpy's global state.
    x, y = ToyDataset().generate(n_samples=32, dataset_type="moons", noise=0.1)
    return x, y.long()


def fit(model, data, t_span, epochs=4):
    x, y = data
    # torchdyn's: it passes a span of its own with every batch, and takes the last state for logits.
    learner = Learner(model, t_span, lambda parameters: torch.optim.Adam(parameters, lr=0.005))
    trainer(epochs).fit(learner, loader((x.to(torch.get_default_dtype()), y), batch=len(x)))
    return learner.losses


FIELDS = {
    "plain": lambda: mlp(2, 2),
    "data control": lambda: nn.Sequential(DataControl(), mlp(4, 2)),
    "stable": lambda: GNF(mlp(2, 1)),
    "Hamiltonian": lambda: HNN(mlp(2, 1)),
    "Galerkin": lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), *gal(4, 2, Fourier(3))),
}


@double
@pytest.mark.parametrize("solver", ["midpoint", "tsit5"])
@pytest.mark.parametrize("field", FIELDS)
def test_its_learner_trains_the_same(moons, field, solver):
    t_span = torch.linspace(0, 1, 10)
    bare, wrapped = (build(lambda s: node_of(FIELDS[field](), s, t_span), solver) for _ in range(2))
    losses = [fit(bare, moons, t_span), fit(frozen(wrapped), moons, t_span)]
    assert losses[0][-1] != losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if solver == "tsit5" else 1e-9)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("field", ["plain", "data control"])
def test_its_learner_trains_a_model_of_all_defaults(moons, field, sensitivity):
    """float32, loose tolerances, t_f learned, 30 points: torchdyn's `test_default_run`, where no gradient is compared."""
    node = NeuralODE(FIELDS[field](), solver="dopri5", atol=1e-2, rtol=1e-2, sensitivity=sensitivity)
    before = [p.clone() for p in node.parameters()]
    span = tm.wrap(node)
    losses = fit(span, moons, torch.linspace(0, 1, 30), epochs=30)
    assert losses[-1] < 0.9 * losses[0]
    assert all((p != q).any() for p, q in zip(before, span.node.parameters(), strict=True))
    assert span.t_f.item() != 1.0  # nothing but the loss moves it here


def test_an_augmenting_layer_is_trained_through_the_span():
    augment = Augmenter(1, 2, nn.Linear(2, 2))
    model = tm.wrap(nn.Sequential(augment, NeuralODE(nn.Sequential(DataControl(), mlp(8, 4)), solver="dopri5"), Last()))
    before = [p.clone() for p in augment.parameters()]
    model(torch.randn(5, 2)).square().mean().backward()
    torch.optim.SGD(augment.parameters(), lr=0.1).step()
    assert all((p != q).any() for p, q in zip(before, augment.parameters(), strict=True))


@double
@pytest.mark.parametrize("solver", ["euler", "rk4", "tsit5"])
@pytest.mark.filterwarnings("ignore:the .* times asked for have cut")  # torchdyn asks for them all
def test_a_trajectory_on_a_finer_span_than_was_trained_on(solver):
    """The quickstart: two points to train, a hundred to draw; then the field on a grid of states."""
    few, many = torch.linspace(0, 1, 2), torch.linspace(0, 1, 100)
    bare, wrapped = (build(lambda s: node_of(mlp(2, 2), s, few), solver) for _ in range(2))
    wrapped = frozen(wrapped)
    x = state(POINTS).detach()
    for model in (bare, wrapped):
        model(x, few)
    drawn, ours = (model.trajectory(x, many) for model in (bare, wrapped))
    assert len(ours) == len(drawn) == 100
    rtol, atol = tolerances(solver)
    torch.testing.assert_close(ours, drawn, rtol=rtol, atol=atol)
    grid = torch.randn(50, 2)
    torch.testing.assert_close(wrapped.vf(0.0, grid), bare.vf(0.0, grid), rtol=0, atol=0)


def test_a_random_choice_of_points_to_save():
    t_span, x = torch.linspace(0, 1, 30), torch.randn(64, 2)
    for _ in range(20):
        save_at = t_span[torch.randint(1, 30, [int(torch.randint(1, 15, [1]))]).unique()]
        bare = NeuralODE(mlp(2, 2), solver="euler")
        expected_times, expected = bare(x, t_span, save_at)
        times, sol = frozen(bare)(x, t_span, save_at)
        assert len(sol) == len(save_at)
        torch.testing.assert_close(times, expected_times)
        torch.testing.assert_close(sol, expected)


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
def test_a_field_made_by_partial(sensitivity):
    """torchdyn's issue 118: a bound method with further arguments; its parameters are named to the node."""

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, t, x, u, v, args={}):  # noqa: B006 (torchdyn's own form)
            return self.linear(x + u + v)

    field, u = Field(), torch.randn(1, 1)
    f, t_span = partial(field.forward, u=u, v=u), torch.linspace(0, 5, 10)
    x = torch.randn(1, 1, requires_grad=True)
    _, expected = odeint(f, x, t_span, solver="euler")
    node = NeuralODE(f, "euler", sensitivity=sensitivity, optimizable_params=field.parameters())
    _, sol = frozen(node)(x, t_span=t_span)
    # One unit in the last place a step; the test of torchdyn's asks for equality to the bit, with its own odeint.
    torch.testing.assert_close(sol, expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(sol.sum(), [x, *field.parameters()], allow_unused=True)
    assert found[0] is not None and torch.isfinite(found[0]).all()
    if sensitivity == "autograd":
        exact = torch.autograd.grad(expected.sum(), [x, *field.parameters()])
        for mine, theirs in zip(found, exact, strict=True):
            torch.testing.assert_close(mine, theirs)


@double
@pytest.mark.parametrize("trace", ["exact", "Hutchinson's"])
def test_a_flow_is_trained_forwards_and_sampled_backwards(trace):
    """The tutorials on flows: the log-density through the Augmenter, and samples by the span turned round."""

    def make(solver):
        noise = MultivariateNormal(torch.zeros(2), torch.eye(2))
        options = {} if trace == "exact" else {"trace_estimator": hutch_trace, "noise_dist": noise}
        field = nn.Sequential(CNF(mlp(2, 2), **options)) if options else CNF(mlp(2, 2))
        node = node_of(field, solver, return_t_eval=False, sensitivity="adjoint")
        return nn.Sequential(Augmenter(1, 1), node)

    bare, wrapped = build(make, "dopri5"), frozen(build(make, "dopri5"))
    compare(bare, wrapped, state(POINTS), 1e-5, 1e-6, lambda model, x: model(x)[-1])
    back = torch.linspace(1, 0, 2)
    sample = torch.cat([torch.zeros(5, 1), state(POINTS, seed=2).detach()], 1)
    found = []
    for model in (bare, wrapped):
        torch.manual_seed(5)
        with torch.no_grad():
            model(sample[:, 1:])
            found.append(model[1].trajectory(sample, back)[-1])
    torch.testing.assert_close(found[1][:, 1:], found[0][:, 1:], rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        there = wrapped[1].trajectory(found[1], torch.linspace(0, 1, 2))[-1]
    torch.testing.assert_close(there[:, 1:], sample[:, 1:], rtol=1e-5, atol=1e-6)


def test_the_text_of_a_model_has_its_evaluations():
    text = repr(tm.wrap(NeuralODE(mlp(2, 2))))
    assert "LearnableSpan" in text and "NFE" in text


# ---------------------------------------------------------------------------------------------------------------------
# The suite itself

SUITE = os.environ.get("TORCHDYN_TESTS")
# Why a test of torchdyn's may fail wrapped that passes bare; see above.
ALLOWED = {"test_dict_out_and_args", "test_arg_ode"}


def run_suite(folder, where, plugin=None, t_f="frozen"):
    """{test: outcome}. Run from an empty folder: its tests write files where they run."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder]
        + (["-p", plugin] if plugin else []),
        cwd=where,
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "WRAPPED_T_F": t_f, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if re.match(r"(PASSED|FAILED|ERROR) \S+::", line)]
    found = dict(_entry(line) for line in lines)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return found, done.stdout


def _entry(line):
    outcome, name = line.split()[:2]
    # The class that stands in for NeuralODE has another name in a test's parameters.
    return name.replace("-Wrapped]", "-NeuralODE]"), outcome


@pytest.mark.slow
@pytest.mark.skipif(not SUITE, reason="TORCHDYN_TESTS does not name the test folder of a copy of torchdyn")
def test_its_own_suite_passes_wrapped_as_it_does_bare(tmp_path):
    folder = str(Path(SUITE).resolve())
    bare, _ = run_suite(folder, tmp_path)
    for t_f in ("frozen", "learned"):
        wrapped, said = run_suite(folder, tmp_path, "wrapped_plugin", t_f)
        assert wrapped.keys() == bare.keys()
        assert int(re.search(r"(\d+) NeuralODEs were wrapped", said).group(1)) > 0
        worse = {n for n in bare if bare[n] == "PASSED" and wrapped[n] != "PASSED"}
        count = {
            who: sum(o == "PASSED" for o in found.values()) for who, found in (("bare", bare), ("wrapped", wrapped))
        }
        print(f"t_f {t_f}: {count} passed of {len(bare)}; only bare: {sorted(worse)}")
        assert {n.split("::")[-1].split("[")[0] for n in worse} <= ALLOWED
