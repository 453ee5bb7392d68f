"""Every diagnostic on a system whose answer is known in closed form."""

import copy
import math

import pytest
import torch
from problems import closed_form, random_model
from rich.console import Console
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DataControl

import torchdyn_mintime as tm
from torchdyn_mintime.diagnostics import (
    Profile,
    hamiltonian,
    loss_profile,
    path_ratio,
    report,
    skipped,
    solved_exactly,
    solver_error,
    stationarity,
    turnpike,
)

QUIET = Console(quiet=True)


def relative(a, exact, start=None):
    """The difference of two states over the displacement from ``start``, or over the state."""
    a, exact = a.double(), exact.double()
    scale = exact if start is None else exact - start.double()
    return ((a - exact).square().mean().sqrt() / scale.square().mean().sqrt()).item()


# ---------------------------------------------------------------------------------------------------------------------
# The solver's error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["decay", "cosine", "linear", "breathing", "oscillator"])
def test_solver_error_is_the_distance_from_the_closed_form(name, dtype):
    node, field, x = closed_form(name, solver="midpoint")
    end = torch.tensor(1.0, dtype=torch.float64)
    exact = field.exact(torch.zeros(()), end, x).detach().expand_as(x)
    span = tm.LearnableSpan(node.to(dtype), torch.linspace(0, 1, 6, dtype=dtype))
    x = x.to(dtype)
    reached = span(x)[1][-1].detach()
    dtypes = {n: t.dtype for n, t in span.state_dict().items()}
    assert solver_error(span, x) == pytest.approx(relative(reached, exact, x), rel=1e-3)
    assert solver_error(span, x, relative_to="state") == pytest.approx(relative(reached, exact), rel=1e-3)
    assert {n: t.dtype for n, t in span.state_dict().items()} == dtypes


def test_solver_error_falls_with_the_order_of_the_method():
    for solver, order, steps in (("euler", 1, 32), ("midpoint", 2, 16), ("rk4", 4, 4)):
        node, _, x = closed_form("breathing", solver=solver)
        errors = [
            solver_error(tm.LearnableSpan(node, torch.linspace(0, 1, n + 1, dtype=torch.float64)), x)
            for n in (steps, 2 * steps)
        ]
        # Large steps for rk4, whose error would else be that of the reference; hence not yet quite its order.
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.7)


def test_solver_error_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 3))
    x = torch.randn(6, 2)
    span(x)
    before, last, nfe = copy.deepcopy(span.state_dict()), span.last, span.vf.nfe
    assert solver_error(span, x) > 0
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())
    assert (span.last, span.vf.nfe, net.training, net[2].training) == (last, nfe, True, True)


class Remembering(nn.Module):
    """A field that keeps an activation with its graph, and constants that it makes at its first evaluation."""

    def __init__(self):
        super().__init__()
        self.net, self.constants = nn.Linear(2, 2), None

    def forward(self, x):
        if self.constants is None:
            self.constants = torch.arange(1, 3).to(x)
        self.hidden = torch.tanh(self.net(x)) * self.constants
        return self.hidden


@pytest.mark.parametrize("called", [False, True])
def test_solver_error_leaves_what_a_field_keeps(called):
    field, x = Remembering(), torch.randn(6, 2)
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 3))
    if called:
        span(x)
    before = vars(field).copy()
    assert solver_error(span, x) > 0
    assert all(vars(field)[name] is value for name, value in before.items()) and vars(field).keys() == before.keys()
    assert span(x)[1].dtype == torch.float32
    (span(x)[1][-1].sum() + field.hidden.sum()).backward()  # a penalty on the activation


def test_solver_error_of_fields_with_state_of_their_own():
    """Data control, Hutchinson's noise, a second-order equation, a function with a tensor of its own: all in float64."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    weight = torch.randn(2, 2)
    controlled = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    cases = {
        "control": (NeuralODE(controlled, solver="euler"), torch.randn(5, 2)),
        "flow": (NeuralODE(CNF(net), solver="euler"), torch.randn(5, 3)),
        "noise": (NeuralODE(CNF(net, hutch_trace, noise), solver="euler"), torch.randn(5, 3)),
        "function": (NeuralODE(lambda t, z: torch.tanh(z @ weight), solver="euler"), torch.randn(5, 2)),
        "second order": (
            NeuralODE(random_model("second order").node.vf.vf.float(), order=2, solver="euler"),
            torch.randn(5, 4),
        ),
    }
    for name, (node, x) in cases.items():
        errors = []
        for n in (10, 20):
            torch.manual_seed(2)  # the same noise
            errors.append(solver_error(tm.LearnableSpan(node, torch.linspace(0, 1, n + 1)), x))
        # First order: half the step, half the error.
        assert errors[0] / errors[1] == pytest.approx(2, abs=0.3), name


def test_solver_error_of_alf_is_that_of_its_position():
    node = NeuralODE(lambda t, z: -z, solver="alf")
    x = torch.tensor([[1.0, -0.5, -1.0, 0.5]], dtype=torch.float64)  # [z, f(z)]
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 11, dtype=torch.float64))
    reached = span(x)[1][-1][:, :2]
    start = x[:, :2]
    assert solver_error(span, x) == pytest.approx(relative(reached, start * math.exp(-1), start), rel=1e-3)


def test_an_offset_of_the_state_does_not_change_the_solver_error():
    """The same field, and the same steps, of z + c: relative to the state any error could be bought."""

    class Shifted(nn.Module):
        def __init__(self, offset):
            super().__init__()
            self.offset = offset

        def forward(self, z):
            return torch.tanh(z - self.offset)

    x = torch.randn(16, 2, dtype=torch.float64)
    spans = [
        tm.LearnableSpan(NeuralODE(Shifted(c), solver="euler"), torch.linspace(0, 1, 2, dtype=torch.float64))
        for c in (0.0, 100.0)
    ]
    own, shifted = (solver_error(span, x + c) for span, c in zip(spans, (0.0, 100.0), strict=True))
    assert shifted == pytest.approx(
        own, rel=1e-4
    )  # the reference is known to 1e-7 of a state of 100, 2e-5 of the displacement
    assert solver_error(spans[1], x + 100.0, relative_to="state") < own / 50
    with pytest.raises(ValueError, match="relative_to must be"):
        solver_error(spans[0], x, relative_to="time")


def test_solver_error_needs_a_span():
    with pytest.raises(ValueError, match="wrap it first"):
        solver_error(nn.Linear(2, 2), torch.randn(3, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The Hamiltonian


class Feedforward(nn.Module):
    """z' = a z + u(t): the linear-quadratic problem with its optimal control put in.

    Minimise c z(t_f)^2 / 2 + int u^2 / 2 dt + w t_f. The maximum principle gives p' = -a p, p(t_f) = c z(t_f) and u = -p.
    """

    def __init__(self, a, c, x, t_f):
        super().__init__()
        self.a, self.t_f = a, t_f
        # z(t_f) = e^(a t_f) x - q S with S = int e^(2 a (t_f - t)) dt, and q = p(t_f) = c z(t_f)
        s = t_f if a == 0 else (math.exp(2 * a * t_f) - 1) / (2 * a)
        self.q = nn.Parameter(torch.tensor(c * math.exp(a * t_f) * x / (1 + c * s), dtype=torch.float64))

    def control(self, t):
        return -self.q * torch.exp(self.a * (self.t_f - t))

    def forward(self, t, z):
        return self.a * z + self.control(t)


def linear_quadratic(a, c, x, t_f, w, sensitivity):
    field = Feedforward(a, c, x, t_f)

    def cost(t, z):
        return field.control(t).square() / 2 + 0 * z[:, 0]

    node = NeuralODE(field, solver="rk4", sensitivity=sensitivity, integral_loss=cost)
    span = tm.LearnableSpan(node, torch.linspace(0, t_f, 41, dtype=torch.float64))
    carried = sensitivity == "autograd"  # the state has the running cost in front
    start = torch.tensor([[0.0, x]] if carried else [[x]], dtype=torch.float64)

    def loss(z):
        return c * z[:, -1].square().sum() / 2 + (z[:, 0].sum() if carried else 0)

    return hamiltonian(span, start, loss, weight=w), field


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
@pytest.mark.parametrize("a", [0.0, 0.5, -0.8])
def test_the_hamiltonian_of_a_linear_quadratic_problem_is_constant_and_0_at_the_optimal_time(a, sensitivity):
    c, x, t_f = 3.0, 1.5, 0.9
    # H(t_f) = q (a z + u) + u^2 / 2 + w with u = -q, z = q / c: 0 for this price of time.
    q = Feedforward(a, c, x, t_f).q.item()
    optimal_price = q * q / 2 - a * q * q / c
    found, _ = linear_quadratic(a, c, x, t_f, optimal_price, sensitivity)
    assert found.drift < 1e-6
    assert abs(found.at_end) < 1e-6
    dearer, _ = linear_quadratic(a, c, x, t_f, optimal_price + 0.25, sensitivity)
    assert dearer.drift < 1e-6
    assert dearer.at_end == pytest.approx(0.25, abs=1e-6)


def test_the_hamiltonian_ends_at_the_derivative_of_the_loss_in_t_f():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 21, dtype=torch.float64), t_f=0.83)

    def loss(z):
        return torch.tanh(z).sum()

    (loss(span(model.x)[1][-1]) + 0.2 * span.duration).backward()
    found = hamiltonian(span, model.x, loss, weight=0.2)
    assert found.at_end == pytest.approx(span.t_f.grad.item(), rel=1e-5)
    assert len(found.times) == span.steps + 1


def test_the_hamiltonians_drift_shows_solver_error_and_nothing_of_optimality():
    """An untrained autonomous model: constant all the same, the better the finer the steps."""
    model = random_model("mlp", solver="rk4", seed=4)
    drifts = []
    for n in (4, 8):
        span = tm.LearnableSpan(model.node, torch.linspace(0, 2, n + 1, dtype=torch.float64))
        drifts.append(hamiltonian(span, model.x, lambda z: z.square().sum()).drift)
    assert math.log2(drifts[0] / drifts[1]) == pytest.approx(4, abs=1)


def test_the_hamiltonian_of_alf_is_refused():
    span = tm.LearnableSpan(NeuralODE(lambda t, z: -z, solver="alf"), torch.linspace(0, 1, 11))
    with pytest.raises(ValueError, match="alf steps"):
        hamiltonian(span, torch.randn(2, 4), lambda z: z.sum())


# ---------------------------------------------------------------------------------------------------------------------
# Along the trajectory


def decay_model(head=False, solver="rk4", points=21, rate=1.5):
    node, _, _ = closed_form("decay", solver=solver)
    node.vf.vf.rate.data.fill_(rate)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, points, dtype=torch.float64))
    if not head:
        return span
    node.return_t_eval = False

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.span = span

        def forward(self, x):
            return 2 * self.span(x + 1)[-1]

    return Doubled()


@pytest.mark.parametrize(("solver", "points"), [("rk4", 21), ("tsit5", 2)])
def test_loss_profile_and_the_rate_that_held(solver, points):
    span, x = decay_model(solver=solver, points=points), torch.randn(6, 2, dtype=torch.float64)
    profile = loss_profile(span, [x[:4], x[4:]], lambda z: z.square().mean(), lambda z: z.abs().amax())
    assert len(profile.times) == (21 if solver == "rk4" else 101)
    expected = x.square().mean() * torch.exp(-3 * profile.times)
    tolerance = 1e-3 if solver == "rk4" else 1e-2  # that of an adaptive solver is torchdyn's default, 1e-3 a step
    assert torch.allclose(profile.loss, expected, rtol=tolerance)
    assert profile.rate == pytest.approx(3, rel=tolerance)
    assert profile.accuracy is not None


def test_the_rate_of_a_loss_that_rises_is_negative():
    span = decay_model(rate=-1.0)
    assert loss_profile(span, [torch.ones(2, 2).double()], lambda z: z.square().mean()).rate == pytest.approx(
        -2, rel=1e-4
    )


def test_with_a_model_around_the_span_its_rest_is_applied():
    model, x = decay_model(head=True), torch.randn(3, 2, dtype=torch.float64)
    target = 2 * (x + 1)
    profile = loss_profile(model, [(x, target)], lambda out, y: (out / y).mean())
    assert torch.allclose(profile.loss, torch.exp(-1.5 * profile.times), rtol=1e-5)
    batches = [(x, target)]
    assert skipped(model, batches, lambda out, y: (out - y).abs().max())[0] == 0
    exact = solved_exactly(model, batches, lambda out, y: (out / y).mean(), lambda out, y: 0.5)
    assert exact == pytest.approx((math.exp(-1.5), 0.5), rel=1e-6)
    assert "forward" not in vars(model.span)


def test_solved_exactly_is_not_the_model_of_few_steps():
    span, x = decay_model(solver="euler", points=2), torch.ones(3, 2, dtype=torch.float64)
    assert span(x)[1][-1].mean().item() == pytest.approx(-0.5)
    assert solved_exactly(span, [x], lambda z: z.mean())[0] == pytest.approx(math.exp(-1.5), rel=1e-6)


def test_path_over_distance():
    assert path_ratio(decay_model(), torch.randn(4, 2).double()) == pytest.approx(1, rel=1e-6)
    node, _, _ = closed_form("oscillator", solver="euler")
    node.vf.vf.frequency.data.fill_(1.0)  # (q, q') turns on a circle
    # One step of euler, whose own line is straight: the path is the ODE's.
    span = tm.LearnableSpan(node, torch.tensor([0.0, math.pi], dtype=torch.float64))
    assert path_ratio(span, torch.randn(4, 2).double()) == pytest.approx(math.pi / 2, rel=1e-3)


def test_with_several_spans_one_must_be_named():
    spans = nn.Sequential(decay_model(), decay_model())
    with pytest.raises(ValueError, match="pass span="):
        path_ratio(spans, torch.randn(4, 2).double())
    with pytest.raises(ValueError, match="not one of this"):
        path_ratio(spans, torch.randn(4, 2).double(), span=decay_model())


# ---------------------------------------------------------------------------------------------------------------------
# All in one


@pytest.mark.parametrize("head", [False, True])
def test_report(head):
    model, x = decay_model(head=head), torch.randn(6, 2, dtype=torch.float64)
    model.train()
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    last = [span.last for span in tm.spans(model)]
    found = report(model, [(x, x)], lambda z, y: z.square().mean(), lambda z, y: 0.75, weight=0.3, console=console)
    console.file.close()
    assert found.nfe == 80
    assert found.spans[0].t_f == 1
    assert found.spans[0].steps == 20
    assert found.loss[0] == pytest.approx(found.loss[1], rel=1e-5)
    assert found.loss[1] == pytest.approx(found.loss[2] * math.exp(-3), rel=1e-6)
    assert found.accuracy == (0.75, 0.75, 0.75)
    assert 0 < found.solver_error < 1e-5
    # d/dt_f of exp(-3 t_f) l0 + 0.3 t_f
    assert found.spans[0].hamiltonian.at_end == pytest.approx(-3 * found.loss[1] + 0.3, rel=1e-5)
    assert found.spans[0].profile.rate == pytest.approx(3, rel=1e-4)
    text = console.export_text()
    for words in ("solved at 1e-7", "ODE skipped", "20, 80", "solver error", "Hamiltonian at t_f"):
        assert words in text
    assert model.training
    assert [span.last for span in tm.spans(model)] == last


def test_report_says_what_a_batch_is():
    with pytest.raises(TypeError, match="pass \\[\\(x, y\\)\\]"):
        report(decay_model(), [1.0], lambda z: z.mean(), console=QUIET)
    with pytest.raises(ValueError, match="batches is empty"):
        report(decay_model(), [], lambda z: z.mean(), console=QUIET)
    with pytest.raises(ValueError, match="take its mean"):
        report(decay_model(), [torch.randn(3, 2).double()], lambda z: z.square().sum(1), console=QUIET)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. (24) and the turnpike


class Constant(nn.Module):
    """z' = a z + u with the same u at all times."""

    def __init__(self, a, u):
        super().__init__()
        self.a, self.u = a, nn.Parameter(torch.tensor(u, dtype=torch.float64))

    def forward(self, t, z):
        return self.a * z + self.u


def constant_control(a, c, x, t_f, u):
    """Minimise c z(t_f)^2 / 2 + int u^2 / 2 dt over one u for all times: (the span, its start, its loss)."""
    field = Constant(a, u)
    node = NeuralODE(
        field, solver="rk4", sensitivity="adjoint", integral_loss=lambda t, z: field.u**2 / 2 + 0 * z[:, 0]
    )
    span = tm.LearnableSpan(node, torch.linspace(0, t_f, 41, dtype=torch.float64))
    return span, torch.tensor([[x]], dtype=torch.float64), lambda z: c * z.square().sum() / 2


@pytest.mark.parametrize("a", [0.0, 0.7, -1.1])
def test_the_best_constant_control_meets_eq_24_only_where_the_costate_is_constant(a):
    """dH/du = p + u with p = c z(t_f) exp(a (t_f - t)). At the best u its integral is 0; itself it is 0 for a = 0 alone."""
    c, x, t_f = 3.0, 1.5, 0.9
    growth, reach = math.exp(a * t_f), t_f if a == 0 else math.expm1(a * t_f) / a
    best = -c * growth * x * reach / (t_f + c * reach**2)  # c (growth x + reach u) reach + t_f u = 0
    span, start, loss = constant_control(a, c, x, t_f, best)
    found = stationarity(span, start, loss)
    end = growth * x + reach * best
    expected = c * end * torch.exp(a * (t_f - found.times)) + best
    # rk4 with 40 steps has an error of 1e-8, its interpolation by trapezoids one of 1e-4.
    assert torch.allclose(found.gradient[:, 0], expected, atol=1e-6)
    assert found.total == pytest.approx(0, abs=1e-3)
    if a == 0:
        assert found.norms.max() < 1e-6  # so that eq. (24) holds at every time
    else:
        assert found.norms.max() > 0.1 and found.imbalance == pytest.approx(1, abs=1e-2)


def test_the_integral_of_the_hamiltonians_derivative_is_the_gradient_of_the_loss():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 81, dtype=torch.float64))

    def loss(z):
        return torch.tanh(z).sum()

    found = stationarity(span, model.x, loss)
    loss(span(model.x)[1][-1]).backward()
    expected = torch.cat([p.grad.flatten() for p in span.vf.parameters()])
    integral = torch.trapezoid(found.gradient, found.times, dim=0)
    assert torch.allclose(integral, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())  # trapezoids
    assert found.total == pytest.approx(expected.norm().item(), rel=1e-3)


def test_stationarity_needs_parameters_and_leaves_no_gradients():
    span = decay_model()
    stationarity(span, torch.ones(2, 2).double(), lambda z: z.sum())
    assert all(p.grad is None for p in span.parameters())
    for p in span.vf.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"eq. \(24\)"):
        stationarity(span, torch.ones(2, 2).double(), lambda z: z.sum())


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01])
def test_the_turnpike_of_a_decay_is_known(tolerance):
    """The speed falls as exp(-rate t), below the tolerance from log(1 / tolerance) / rate on."""
    end, rate = 8.0, 1.5
    node, _, _ = closed_form("decay", solver="rk4")
    node.vf.vf.rate.data.fill_(rate)
    span = tm.LearnableSpan(node, torch.linspace(0, end, 41, dtype=torch.float64))
    x = torch.randn(5, 2, dtype=torch.float64)
    found = turnpike(span, x)
    assert torch.allclose(found.speed, found.speed[0] * torch.exp(-rate * found.times), rtol=1e-5)
    # 101 points; between them the speed is linear.
    assert found.share(tolerance) == pytest.approx(1 + math.log(tolerance) / (rate * end), abs=2e-3)


def test_what_turns_in_a_circle_never_rests():
    node, _, _ = closed_form("oscillator", solver="rk4")
    node.vf.vf.frequency.data.fill_(1.0)
    span = tm.LearnableSpan(node, torch.linspace(0, 6.0, 41, dtype=torch.float64))
    assert turnpike(span, torch.randn(4, 2).double()).share(0.9) == 0


def test_the_path_ratio_is_infinite_where_nothing_moves():
    span = tm.LearnableSpan(NeuralODE(lambda t, z: 0 * z, solver="rk4"), torch.linspace(0, 1, 5))
    assert path_ratio(span, torch.randn(4, 2)) == math.inf


def test_inference_mode_changes_no_figure():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 6, dtype=torch.float64))
    target = torch.randn_like(model.x)

    def figures(x, target):
        loss = nn.functional.mse_loss
        end, gradient = hamiltonian(span, x, loss, target).values, stationarity(span, x, loss, target).gradient
        return end, gradient, report(span, [(x, target)], loss, console=QUIET).spans[0].hamiltonian.values

    expected = figures(model.x, target)
    with torch.inference_mode():
        span(model.x)
        found = [figures(model.x, target), figures(model.x.clone(), target.clone())]
    assert all(torch.equal(a, b) for own in found for a, b in zip(own, expected, strict=True))
    span(model.x)[1][-1].sum().backward()  # nothing is left of that mode


@pytest.mark.parametrize(
    "measure",
    [tm.diagnostics.solver_error, tm.diagnostics.path_ratio, tm.diagnostics.turnpike],
    ids=lambda f: f.__name__,
)
def test_no_samples_have_no_figure(measure):
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 5))
    with pytest.raises(ValueError, match=r"there are no samples to solve: the state has the shape \(0, 2\)"):
        measure(span, torch.zeros(0, 2))


def test_path_ratio_is_of_each_sample_and_of_its_own_entries():
    span = tm.LearnableSpan(NeuralODE(lambda t, z: -(z**2), solver="rk4"), torch.linspace(0, 5, 51))
    x = torch.tensor([0.5, 1.0, 4.0])
    assert path_ratio(span, x) == pytest.approx(1.0, abs=1e-6) == path_ratio(span, x[:, None])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    node = NeuralODE(lambda t, z: z @ turn, solver="rk4", integral_loss=lambda t, z: 100 * z.square().sum(1))
    span = tm.LearnableSpan(node, torch.linspace(0, math.pi, 11))
    assert path_ratio(span, torch.cat([torch.zeros(8, 1), torch.randn(8, 2)], 1)) == pytest.approx(
        math.pi / 2, rel=1e-4
    )


@pytest.mark.parametrize(
    ("loss", "rate"),
    [
        ((2.0, 1.0, 0.5), math.log(2)),
        ((0.0, 0.0, 0.0), math.inf),
        ((2.0, -2.0, -3.0), math.inf),
        ((0.0, 1.0, 2.0), -math.inf),
        ((-1.0, -2.0, -3.0), math.nan),
    ],
)
def test_the_rate_of_losses_that_reach_zero(loss, rate):
    profile = Profile(torch.tensor([0.0, 1.0, 2.0]), torch.tensor(loss))
    assert profile.rate == pytest.approx(rate, nan_ok=True)


def test_the_profile_of_an_adaptive_solver_ends_at_the_models_own_loss():
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    nn.init.normal_(net[2].weight)
    node = NeuralODE(net, solver="tsit5", atol=1e-2, rtol=1e-2)
    span, x = tm.LearnableSpan(node, torch.tensor([0.0, 3.0], dtype=torch.float64)), torch.randn(8, 2).double()
    profile = loss_profile(span, [x], lambda z: z.square().mean())
    own = span(x)[1][-1].square().mean().item()
    assert profile.loss[-1].item() == pytest.approx(own, rel=1e-12)
