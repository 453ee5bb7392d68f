"""The static network of a model: what the model gives, through every way to deploy it, or a refusal in words."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FIELDS, KeywordTime, random_model
from sklearn.datasets import load_digits
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models import CNF
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalLinear
from torchdyn.nn.galerkin import Fourier

import torchdyn_mintime as tm
from torchdyn_mintime.core.network import StaticSolve

SOLVERS = ["euler", "midpoint", "rk4", 1, 2, 3, 5]
"""Names, and the stages of learned solvers."""


def solver(name):
    return name if isinstance(name, str) else tm.LearnableSolver(name)


def mlp(inputs, outputs, width=8):
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def span_of(field, *, how="rk4", points=4, **options):
    return tm.LearnableSpan(NeuralODE(field, solver=solver(how), **options), torch.linspace(0, 1, points), t_f=0.83)


def assert_same(network, model, *inputs):
    """To the rounding of float32: the operations are the same, but a backend may fuse two of them."""
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What the model gives


@given(
    kind=st.sampled_from([*FIELDS, "float time"]),
    how=st.sampled_from(SOLVERS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    t_f=st.floats(0.3, 1.0),
    points=st.integers(2, 6),
    reverse=st.booleans(),
    dense=st.booleans(),
    returns_times=st.booleans(),
    data=st.data(),
)
def test_the_network_gives_what_the_span_gives(kind, how, dtype, t_f, points, reverse, dense, returns_times, data):
    model = random_model(kind, dtype=dtype, solver=solver(how), return_t_eval=returns_times)
    template = torch.linspace(0, 1, points, dtype=dtype)
    span, x = tm.LearnableSpan(model.node, template, t_f=t_f, bounds=(0.1, 1.0)).eval(), model.x
    given_span = template.flip(0) if reverse else None
    inside = [] if span.interval.one_step and not dense else [0.05, 0.1, 0.21]
    save_at = data.draw(st.lists(st.sampled_from([0.0, *inside, span.t_f.item()]), max_size=3))

    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.span = span

        def forward(self, x):
            return self.span(x, given_span, save_at, dense=dense)

    model = Caller()
    network = tm.as_network(model, x)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=0, atol=0)
        # A trajectory has a state for each time asked for, which one step gives by its interpolant alone.
        if not save_at and (dense or not (span.interval.one_step and reverse and points > 2)):
            found, expected = (m.span.trajectory(x, given_span, dense=dense) for m in (network, model))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert network.span.evaluations == span.nfe


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mlp", "depthcat"])
def test_half_precision_sums_in_float32_as_the_span_does(kind, dtype):
    model = random_model(kind, dtype=torch.float32)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5), t_f=0.7).to(dtype).eval()
    x = model.x.to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(tm.as_network(span)(x)[1], span(x)[1], rtol=0, atol=0)


def test_the_parameters_of_the_network_are_copies_that_can_be_trained():
    model = random_model("depthcat")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 4, dtype=torch.float64))
    network = tm.as_network(span)
    span(model.x)[1][-1].square().sum().backward()
    network(model.x)[1][-1].square().sum().backward()
    theirs = {id(p) for p in span.parameters()}
    for own, p in zip(network.parameters(), span.vf.parameters(), strict=True):
        assert id(own) not in theirs
        # The same operations in the same order; only the gradient of t_f takes the last step another way.
        torch.testing.assert_close(own.grad, p.grad, rtol=1e-12, atol=1e-14)


class Classifier(nn.Module):
    """Two solves of one span and one of another, each called in its own way."""

    def __init__(self):
        super().__init__()
        self.augment = Augmenter(1, 1)
        self.first = NeuralODE(nn.Sequential(DepthCat(1), nn.Linear(4, 3), nn.Tanh()), solver="rk4")
        self.second = NeuralODE(mlp(3, 3), solver=tm.LearnableSolver(2), return_t_eval=False)
        self.norm, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        _, sol = self.first(self.augment(x), torch.linspace(0, 0.9, 5))
        sol = self.second(self.norm(self.second(sol[-1])[-1]))
        return {"logits": self.head(sol[-1])}


def test_a_model_with_several_solves_that_passes_spans_of_its_own():
    x = torch.randn(6, 2)
    model = tm.wrap(Classifier())
    model(x)  # settles the first template; a bounded t_f cuts it
    with torch.no_grad():
        model.first.t_f.fill_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = tm.as_network(model, x)
    assert model.training and not any(m.training for m in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.evaluations for m in network.modules() if isinstance(m, StaticSolve)] == [12, 2]
    with torch.no_grad():
        torch.testing.assert_close(network(x), model.eval()(x), rtol=0, atol=0)
    with pytest.raises(
        ValueError, match=r"first: .* made for no t_span, and is called with t_span from 0 to 0.9 .*as_netw"
    ):
        tm.as_network(model)(x)


def test_the_look_at_a_model_leaves_no_trace():
    span = span_of(mlp(2, 2))
    span(torch.randn(3, 2))
    last, nfe = span.last, span.vf.nfe
    network = tm.as_network(span, torch.randn(5, 2))
    assert span.last is last and span.vf.nfe == nfe and span.training
    assert isinstance(network, StaticSolve) and "3 steps, 12 evaluations" in repr(network)


def test_a_node_without_a_span_and_a_fitted_solver():
    x = torch.randn(5, 2)
    fitted = tm.fit_solver(NeuralODE(mlp(2, 2)), torch.randn(40, 2), evaluations=2).node
    assert_same(tm.as_network(fitted), fitted, x)
    node = NeuralODE(mlp(2, 2), solver="rk4")
    assert_same(tm.as_network(node), node, x)
    node.t_span = torch.linspace(0, 2, 4)
    assert_same(tm.as_network(node), node, x)
    node.t_span, other = None, torch.linspace(0, 0.7, 3)
    assert_same(tm.as_network(node, x, other), node, x, other)
    plain = tm.unwrap(span_of(mlp(2, 2)), x)
    assert_same(tm.as_network(plain), plain, x)


def test_a_field_takes_its_arguments():
    class Scaled(nn.Module):
        def forward(self, t, x, args=None):
            return -(args or {}).get("gain", 1.0) * x

    span, x = span_of(Scaled()).eval(), torch.randn(3, 2)
    network = tm.as_network(span)
    with torch.no_grad():
        assert torch.equal(network(x, args={"gain": 2.0})[1], span(x, args={"gain": 2.0})[1])
        assert torch.equal(network(x)[1], span(x)[1])


# ---------------------------------------------------------------------------------------------------------------------
# The ways to deploy it

GRID = torch.linspace(0, 1, 3)
GALERKIN = nn.Sequential(DepthCat(1), GalLinear(2, 2, expfunc=Fourier(3)))


def deployed():
    """Models and inputs, by name."""
    x = torch.randn(4, 2)
    yield "rk4", span_of(mlp(2, 2)), x
    yield "learned", span_of(KeywordTime(2), how=3, points=2), x
    yield "depthcat", span_of(nn.Sequential(DepthCat(1), nn.Linear(3, 8), nn.Tanh(), DepthCat(1), nn.Linear(9, 2))), x
    yield "galerkin", span_of(GALERKIN, how="midpoint"), x
    yield "order 2", span_of(mlp(4, 2), order=2), torch.randn(4, 4)
    yield "alf", span_of(mlp(2, 2), how="alf"), torch.randn(4, 4)
    yield "running cost", span_of(mlp(2, 2), integral_loss=lambda t, x: x.square().sum(1)), torch.randn(4, 3)
    yield "flow", span_of(nn.Sequential(CNF(mlp(2, 2)))), torch.randn(4, 3)
    yield "flow of its own trace", span_of(tm.flows.HyperCNF(hidden=4, width=8), how="euler"), torch.randn(4, 3)
    inside = [NeuralODE(mlp(3, 3), solver=how, return_t_eval=False) for how in ("euler", "rk4")]
    last = [type("Last", (nn.Module,), {"forward": lambda self, sol: sol[-1]})() for _ in inside]
    yield (
        "sequential",
        tm.wrap(nn.Sequential(nn.Linear(2, 3), *itertools.chain(*zip(inside, last, strict=True))), GRID),
        x,
    )


CASES = [name for name, _, _ in deployed()]


@pytest.fixture
def case(request):
    model, x = next((model, x) for name, model, x in deployed() if name == request.param)
    return tm.as_network(model), model.eval(), x


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_torch_export(case):
    network, model, x = case
    assert_same(torch.export.export(network, (x,)).module(), model, x)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_torch_compile_in_one_graph(case):
    network, model, x = case
    torch._dynamo.reset()
    assert_same(torch.compile(network, fullgraph=True, backend="aot_eager"), model, x)


# torch 2.14 says that tracing is deprecated; alf looks at the size of its state.
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_torch_jit_trace(case):
    network, model, x = case
    traced = torch.jit.trace(network, (x,), check_trace=False)
    for other in (x, torch.randn_like(x)):
        assert_same(traced, model, other)


def export_to_onnx(network, x, path):
    torch.onnx.export(network, (x,), path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)


RUN = """
import sys

for name in ("torch", "torchdyn", "torchdyn_mintime"):
    sys.modules[name] = None  # importing it is an error

import numpy
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], session.run(None, {session.get_inputs()[0].name: x})[0])
"""


def test_digits_are_recognised_alike_in_a_process_without_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    node = NeuralODE(mlp(16, 16, 32), solver=tm.LearnableSolver(3), return_t_eval=False)

    class Digits(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.node, self.head = nn.Linear(64, 16), node, nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.node(self.encode(x))[-1])

    model = tm.wrap(Digits())
    optimizer = torch.optim.Adam(tm.parameter_groups(model, lr=0.01))
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y) + 0.1 * model.node.duration
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(x)
    export_to_onnx(tm.as_network(model), x[:8], tmp_path / "digits.onnx")
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "x.npy", x.numpy())
    files = [str(tmp_path / name) for name in ("digits.onnx", "x.npy", "out.npy")]
    subprocess.run([sys.executable, "-c", RUN, *files], check=True)
    found = torch.from_numpy(numpy.load(files[-1]))
    assert (expected.argmax(1) == y).float().mean() > 0.9  # so that there is something to agree on
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # another order of sums in float32
    assert torch.equal(found.argmax(1), expected.argmax(1))


# ---------------------------------------------------------------------------------------------------------------------
# What is no static network


def controlled():
    return span_of(nn.Sequential(DataControl(), nn.Linear(4, 2)))


def noisy():
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    return span_of(CNF(mlp(2, 2), trace_estimator=hutch_trace, noise_dist=normal))


class Own(nn.Module):
    """A solver of a user's own."""

    order, stepping_class, tableau = 1, "fixed", None

    def sync_device_dtype(self, x, t_span):
        return x, t_span

    def step(self, f, x, t, dt, k1=None, args=None):
        return None, x + dt * f(t, x), None


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: tm.LearnableSpan(NeuralODE(mlp(2, 2))), ValueError, "tsit5 chooses its steps .*fit_solver"),
        (lambda: NeuralODE(mlp(2, 2)), ValueError, "tsit5 chooses its steps"),
        (controlled, ValueError, "data control"),
        (noisy, ValueError, "draws noise"),
        (lambda: span_of(CNF(nn.Sequential(nn.Linear(2, 2), nn.SiLU()))), ValueError, "trace by autograd"),
        (lambda: tm.LearnableSpan(NeuralODE(mlp(2, 2), solver=Own())), ValueError, "Own is static"),
        (
            lambda: span_of(mlp(2, 2), sensitivity="adjoint", integral_loss=lambda t, x: x.square().sum(1)),
            ValueError,
            "running cost .*sensitivity='autograd'",
        ),
        (lambda: mlp(2, 2), ValueError, "no LearnableSpan or NeuralODE in Sequential"),
        (lambda: torch.tanh, TypeError, "torch.nn.Module; got builtin_function"),
    ],
)
def test_refusals(model, error, says):
    with pytest.raises(error, match=says):
        tm.as_network(model())


def test_one_span_with_different_times_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.span = span_of(mlp(2, 2), return_t_eval=False)

        def forward(self, x):
            return self.span(self.span(x)[-1], save_at=[0.5])[-1]

    with pytest.raises(ValueError, match=r"asked for no t_span and for no t_span with save_at=\[0.5\].*use two spans"):
        tm.as_network(Twice(), torch.randn(3, 2))


def test_a_state_that_is_no_tensor_is_refused():
    span, x = span_of(mlp(2, 2)), torch.randn(3, 2)
    for call in (lambda: tm.as_network(span, {"x": x}), lambda: tm.as_network(span)({"x": x})):
        with pytest.raises(TypeError, match="one tensor; got dict"):
            call()
    assert torch.equal(span(x)[1], span(x)[1])
