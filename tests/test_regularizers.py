"""Regularizers: values in closed form, gradients against central differences in float64, and no trace left behind."""

import math
from itertools import pairwise

import pytest
import torch
from differences import assert_close, difference, directions_like
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import FIELDS, closed_form, random_model
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DataControl

import torchdyn_mintime as tm
from torchdyn_mintime.numerics.integrate import Grid, IntegrationError, integrate
from torchdyn_mintime.optim import CoordinateDescent, GaussNewtonTime
from torchdyn_mintime.regularizers import JacobianNorm, KineticEnergy, LocalError, StepDoubling, TaylorRegularizer
from torchdyn_mintime.speed import SpeedLimit
from torchdyn_mintime.steer import RandomSpan

FIXED, ADAPTIVE = ("euler", "midpoint", "rk4"), ("dopri5", "tsit5")
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
# Five-point differences of a value that may be as small as 1e-6 itself: its rounding error, 1e-16 of the states, is
# 1e-12 over a step of 1e-4.
EXACT = 1e-5


def make_span(kind, solver, seed=0, steps=4, t_f=0.75, **options):
    model = random_model(kind, seed=seed, solver=solver, **options)
    points = 2 if solver in ADAPTIVE else steps + 1
    template = torch.linspace(0, 1, points, dtype=torch.float64)
    span = tm.LearnableSpan(model.node, template, t_f=t_f, bounds=(0.01, 2.0), learn_t0=True).eval()
    return span, model


def assert_gradients(value, held, tensors, rtol=EXACT):
    """value().backward() against differences of held(), for every group of tensors; held() keeps what is detached."""
    flat = [t for group in tensors.values() for t in group]
    for tensor in flat:
        tensor.grad = None
    value().backward()
    norm = math.sqrt(sum(float(t.grad.square().sum()) for t in flat if t.grad is not None))
    for name, group in tensors.items():
        directions = directions_like(group, 1)
        analytic = sum(float((t.grad * d).sum()) for t, d in zip(group, directions, strict=True) if t.grad is not None)
        assert_close(analytic, difference(held, group, directions), norm, rtol, name)


# ---------------------------------------------------------------------------------------------------------------------
# Step doubling


def two_ends(span, x, steps, parts):
    """z at the steps and at each step refined, over plain grids without any tensor of time."""
    steps = [span.t0.item(), *steps[1:-1], span.t_f.item()]
    with span._field.beside(x) as bound:
        ends = []
        for r in (1, parts):
            nodes = [a + (b - a) * k / r for a, b in pairwise(steps) for k in range(r)]
            grid = Grid([*nodes, steps[-1]])
            ends.append(integrate(bound.function, x, grid, span._stepper, adapt=False).states[-1])
    return ends


@given(
    kind=st.sampled_from(FIELDS),
    solver=st.sampled_from(FIXED + ADAPTIVE),
    sensitivity=st.sampled_from(SENSITIVITIES),
    refinement=st.integers(2, 4),
    t_f=st.floats(0.55, 1.6),
    seed=st.integers(0, 100),
)
def test_step_doubling_is_the_difference_of_two_discrete_solutions_with_its_exact_gradient(
    kind, solver, sensitivity, refinement, t_f, seed
):
    span, model = make_span(kind, solver, seed, steps=2, t_f=t_f, sensitivity=sensitivity)
    # Scaled up, so that the difference of a fifth-order step does not drown in rounding.
    x = (3 * model.x).requires_grad_()
    doubling = StepDoubling(span, 2.0, refinement)
    out = span(x)[1]
    steps, size = span._last.steps, out[-1].detach().square().mean()

    def held():
        first, second = two_ends(span, x, steps, refinement)
        return 2 * (first - second).square().mean() / size

    value = doubling.penalty()
    expected = held()
    assert torch.allclose(value, expected, rtol=1e-6, atol=1e-20)
    if expected < 1e-7:
        return  # below it, differences in float64 no longer resolve a gradient
    parameters = {"t_f": [span.t_f], "t0": [span.t0], "x": [x], "theta": model.parameters}
    assert_gradients(lambda: (span(x), doubling.penalty())[1], held, parameters)


@pytest.mark.parametrize("solver", FIXED)
def test_step_doubling_estimates_the_error_of_the_solution(solver):
    """z' = -z: the difference is 1 - 2^-p of the error, to leading order."""
    node, field, x = closed_form("decay", solver=solver)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 21, dtype=torch.float64))
    end = span(x)[1][-1].detach()
    exact = field.exact(0.0, 1.0, x).detach()
    order = {"euler": 1, "midpoint": 2, "rk4": 4}[solver]
    relative = (end - exact).square().mean() / end.square().mean()
    assert StepDoubling(span).penalty().item() == pytest.approx(relative.item() * (1 - 2.0**-order) ** 2, rel=0.1)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_step_doubling_counts_its_evaluations_and_leaves_the_model_as_it_was(solver, sensitivity):
    span, model = make_span("depthcat", solver, sensitivity=sensitivity)
    doubling = StepDoubling(span, refinement=2)
    t_eval, sol = span(model.x)
    depth = [m for m in span.modules() if hasattr(m, "t")]
    before = span.nfe, span.vf.nfe, [m.t for m in depth]
    penalty = doubling.penalty()
    assert (span.nfe, span.vf.nfe, [m.t for m in depth]) == before
    stages = {"rk4": 4, "tsit5": 6}[solver]
    first = 0 if solver == "rk4" else 1
    again = 0 if sensitivity == "autograd" else span.steps * stages + first
    assert doubling.nfe == 2 * span.steps * stages + first + again
    (sol[-1].square().sum() + t_eval[-1] + penalty).backward()
    assert all(t is now for t, now in zip(before[2], [m.t for m in depth], strict=True)) or sensitivity == "adjoint"


def test_step_doubling_leaves_batch_statistics_and_dropout_alone():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)).double()
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 3))
    x = torch.randn(6, 2, dtype=torch.float64)
    span(x)
    statistics = {k: v.clone() for k, v in net[1].state_dict().items()}
    random = torch.get_rng_state()
    doubling = StepDoubling(span)
    penalty = doubling.penalty()
    assert all(torch.equal(v, statistics[k]) for k, v in net[1].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert net[2].training
    assert doubling.nfe == 24  # both solutions, without masks
    assert doubling.penalty().item() == penalty.item()
    penalty.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_step_doubling_reuses_the_data_control_and_the_noise_of_its_forward(float64):
    field = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    for node, x in (
        (NeuralODE(field, solver="rk4"), torch.randn(5, 2)),
        (
            NeuralODE(CNF(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), hutch_trace, noise), solver="rk4"),
            torch.randn(5, 3),
        ),
    ):
        span = tm.LearnableSpan(node, torch.linspace(0, 1, 2))
        doubling = StepDoubling(span)
        span(x)
        value = doubling.penalty()
        with torch.no_grad():
            last = span._last
            tm.LearnableSpan.forward(span, torch.randn(7, x.shape[1]))  # another batch in between
            span._last = last
        assert torch.equal(doubling.penalty(), value)
        value.backward()


def test_step_doubling_of_several_spans_is_the_sum_and_of_x_leaves_no_trace():
    first, second = (make_span("mlp", "rk4", seed)[0] for seed in (1, 2))
    for span in (first, second):
        span.node.return_t_eval = False

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(self.first(x)[-1])[-1]

    model, x = Stacked(), torch.randn(4, 2, dtype=torch.float64)
    model(x)
    both = StepDoubling(model, 3.0).penalty()
    assert both.item() == pytest.approx(sum(StepDoubling(s, 3.0).penalty().item() for s in (first, second)))
    last, counts = first._last, (first.vf.nfe, second.nfe)
    doubling = StepDoubling(model, 3.0)
    other = doubling.penalty(x + 1)
    assert (first._last, first.vf.nfe, second.nfe) == (last, *counts)
    assert doubling.nfe == 3 * (first.nfe + second.nfe)
    model(x + 1)
    assert other.item() == pytest.approx(StepDoubling(model, 3.0).penalty().item())


def test_step_doubling_of_every_kth_batch():
    span, model = make_span("mlp", "rk4")
    span(model.x)
    now = StepDoubling(span).penalty().item()
    doubling = StepDoubling(span, every=3)
    assert [doubling.penalty().item() for _ in range(4)] == pytest.approx([3 * now, 0, 0, 3 * now])


def test_step_doubling_with_save_at_that_leaves_the_end_out():
    span, model = make_span("mlp", "rk4")
    span(model.x)
    whole = StepDoubling(span).penalty().item()
    span(model.x, save_at=[0.25])
    assert StepDoubling(span).penalty().item() == pytest.approx(whole)


def test_step_doubling_says_what_is_wrong():
    span, model = make_span("mlp", "rk4")
    doubling = StepDoubling(span)
    with pytest.raises(RuntimeError, match="call the model first"):
        doubling.penalty()
    with torch.no_grad():
        span(model.x)
        assert doubling.penalty() > 0
    with pytest.raises(RuntimeError, match="without gradients"):
        doubling.penalty()
    with pytest.raises(ValueError, match="wrap it first"):
        StepDoubling(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="refinement must be 2 or more; got 1"):
        StepDoubling(span, refinement=1)
    with pytest.raises(ValueError, match="weight must be finite"):
        StepDoubling(span, weight=float("nan"))
    with pytest.raises(TypeError, match="weight must be a number"):
        StepDoubling(span, weight="1")


def test_step_doubling_names_a_refined_solve_that_blows_up():
    """z' = z^2 from 1 blows up at t = 1: one step passes over it, many do not."""
    node = NeuralODE(lambda t, z: z**2, solver="rk4")
    span = tm.LearnableSpan(node, torch.tensor([0.0, 3.0]))
    span(torch.ones(1, 1))
    with pytest.raises(IntegrationError, match="not finite") as caught:
        StepDoubling(span, refinement=30).penalty()
    assert any("step doubling" in note for note in caught.value.__notes__)


# ---------------------------------------------------------------------------------------------------------------------
# Along the trajectory


def regularizer_of(kind, model):
    return {
        "kinetic": lambda: KineticEnergy(model, 0.7),
        "jacobian": lambda: JacobianNorm(model, 0.7, generator=torch.Generator().manual_seed(3)),
        "taylor 2": lambda: TaylorRegularizer(model, 0.7, 2),
        "taylor 3": lambda: TaylorRegularizer(model, 0.7, 3),
    }[kind]()


@settings(max_examples=12)
@given(
    regularizer=st.sampled_from(["kinetic", "jacobian", "taylor 2", "taylor 3"]),
    kind=st.sampled_from(FIELDS),
    t_f=st.floats(0.5, 1.4),
    seed=st.integers(0, 100),
)
def test_trajectory_regularizers_have_exact_gradients(regularizer, kind, t_f, seed):
    """On the first trajectory, whose points are evaluated one by one, and on later ones, where they may go together."""
    span, model = make_span(kind, "rk4", seed, t_f=t_f)
    x, later = model.x.clone().requires_grad_(), regularizer_of(regularizer, span)

    def first():
        span(x)
        return regularizer_of(regularizer, span).penalty()

    def again():
        span(x)
        if regularizer == "jacobian":
            later.generator.manual_seed(3)  # the same draw
        return later.penalty()

    tensors = {"t_f": [span.t_f], "t0": [span.t0], "x": [x], "theta": model.parameters}
    assert_gradients(first, first, tensors, 1e-6)
    one_by_one, evaluations = again().item(), later.nfe
    assert again().item() == pytest.approx(one_by_one, rel=1e-10)
    assert later.nfe == evaluations == len(span.grid())
    assert_gradients(again, first, tensors, 1e-6)


@pytest.mark.parametrize("regularizer", ["kinetic", "jacobian", "taylor 2", "taylor 3"])
def test_points_go_together_where_the_field_ignores_time_and_looks_at_each_sample_alone(regularizer):
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x - x.mean(0)).tanh()

    def evaluations(node):
        span = tm.LearnableSpan(node, torch.linspace(0, 1, 5, dtype=torch.float64))
        reg, seen = regularizer_of(regularizer, span), []
        layer = next(m for m in node.modules() if isinstance(m, nn.Linear))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        for _ in range(2):
            span(torch.randn(6, 2, dtype=torch.float64))
            seen.clear()
            reg.penalty()
            assert reg.nfe == 5
        return seen

    assert evaluations(random_model("mlp", solver="rk4").node) == [30]
    assert evaluations(random_model("depthcat", solver="rk4").node) == [6] * 5
    assert evaluations(NeuralODE(Coupled(), solver="rk4")) == [6] * 5


@pytest.mark.parametrize("first", [0.0, 1e-3], ids=["zero", "slow"])
@pytest.mark.parametrize("make", [KineticEnergy, TaylorRegularizer, JacobianNorm])
def test_a_field_that_starts_small_does_not_hide_that_it_looks_across_the_batch(make, first):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(first))

        def forward(self, x):
            return self.scale * (x - x.mean(0)).tanh()

    span = tm.LearnableSpan(NeuralODE(Scaled(), solver="rk4"), torch.linspace(0, 1, 5))
    regularizer, x = make(span), torch.randn(6, 2)
    span(x)
    regularizer.penalty()
    with torch.no_grad():
        span.vf.vf.vf.scale.fill_(2.0)
    span(x)
    regularizer.penalty()
    assert not regularizer._points.together


def test_a_field_that_refuses_another_batch_is_seen_point_by_point():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.context = nn.Linear(2, 2), torch.ones(1, 2)

        def forward(self, x):
            assert len(self.context) in (1, len(x)), "a context for each sample"
            return self.layer(x) * self.context

    span = tm.LearnableSpan(NeuralODE(Picky(), solver="rk4"), torch.linspace(0, 1, 5))
    kinetic, field = KineticEnergy(span), span.vf.vf.vf
    for batch in (1, 4, 4, 1):
        field.context = torch.full((batch, 2), 0.5)
        span(torch.randn(batch, 2))
        assert kinetic.penalty() > 0
    field.context = torch.ones(1, 2)
    span(torch.randn(0, 2))
    assert math.isnan(kinetic.penalty().item())  # the mean over no sample, as torch has it


def test_a_state_of_one_number():
    span = tm.LearnableSpan(NeuralODE(lambda t, z, args: -z, solver="rk4"), torch.linspace(0, 1, 101))
    span(torch.tensor(1.0))
    assert KineticEnergy(span).penalty().item() == pytest.approx((1 - math.exp(-2)) / 4, rel=1e-4)


@pytest.mark.parametrize("wrapped", [True, False])
def test_trajectory_regularizers_in_closed_form(wrapped):
    """z' = A z: d^K z / dt^K = A^K z, along z(t) = exp(A t) x."""
    node, field, x = closed_form("linear", solver="rk4")
    times = torch.linspace(0, 1, 21, dtype=torch.float64)
    model = tm.LearnableSpan(node, times) if wrapped else node
    t_eval, sol = model(x) if wrapped else node(x, times)
    given_ = () if wrapped else (t_eval, sol)
    path = torch.stack([field.exact(0.0, t, x) for t in times]).detach()
    a = field.matrix.detach()

    def integral(values):
        return torch.trapezoid(values.flatten(1).square().mean(1), times).item()

    assert KineticEnergy(model).penalty(*given_).item() == pytest.approx(integral(path @ a.T) / 2, rel=1e-5)
    for k in (1, 2, 3):
        expected = integral(path @ torch.linalg.matrix_power(a, k).T)
        assert TaylorRegularizer(model, derivative=k).penalty(*given_).item() == pytest.approx(expected, rel=1e-5)
    jacobian = JacobianNorm(model)
    value = jacobian.penalty(*given_).item()
    assert value == pytest.approx((jacobian.noise @ a).square().mean().item(), rel=1e-6)
    assert jacobian.nfe == 21
    if wrapped:
        assert model.nfe == 80


def test_taylor_counts_the_fields_own_dependence_on_time():
    """z' = cos 3t: z'' = -3 sin 3t, z''' = -9 cos 3t."""
    node, _, x = closed_form("cosine", solver="rk4")
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    span = tm.LearnableSpan(node, times)
    span(x)
    for k, rate in ((2, -3 * torch.sin(3 * times)), (3, -9 * torch.cos(3 * times))):
        expected = torch.trapezoid(rate.square(), times).item()
        assert TaylorRegularizer(span, derivative=k).penalty().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("regularizer", ["kinetic", "jacobian", "taylor 2"])
def test_trajectory_regularizers_of_a_flow_leave_the_log_density_out(regularizer, float64):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    flow = tm.LearnableSpan(NeuralODE(CNF(net), solver="rk4"), torch.linspace(0, 1, 5))
    plain = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 5))
    x = torch.randn(4, 2)
    flow(torch.cat([torch.zeros(4, 1), x], 1))
    plain(x)
    a, b = (regularizer_of(regularizer, span).penalty() for span in (flow, plain))
    assert a.item() == pytest.approx(b.item(), rel=1e-9)
    a.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_jacobian_norm_reuses_hutchinsons_noise(float64):
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    flow = tm.LearnableSpan(NeuralODE(CNF(nn.Linear(2, 2), hutch_trace, noise), solver="rk4"), torch.linspace(0, 1, 5))
    flow(torch.randn(4, 3))
    jacobian = JacobianNorm(flow)
    jacobian.penalty()
    assert torch.equal(jacobian.noise, flow.vf.vf.vf.noise)


def test_trajectory_regularizers_say_what_is_wrong():
    span, model = make_span("mlp", "tsit5")
    span(model.x)
    with pytest.raises(ValueError, match="2 points, too few"):
        KineticEnergy(span).penalty()
    with pytest.raises(ValueError, match=r"penalty\(t_eval, sol\)"):
        KineticEnergy(model.node).penalty()
    with pytest.raises(ValueError, match="derivative must be 1 or more"):
        TaylorRegularizer(span, derivative=0)


# ---------------------------------------------------------------------------------------------------------------------
# Local errors


@settings(max_examples=8)
@given(
    kind=st.sampled_from(FIELDS),
    solver=st.sampled_from(FIXED),
    sensitivity=st.sampled_from(SENSITIVITIES),
    seed=st.integers(0, 100),
)
def test_local_error_of_fixed_steps_has_exact_gradients(kind, solver, sensitivity, seed):
    span, model = make_span(kind, solver, seed, steps=2, sensitivity=sensitivity)
    x = (3 * model.x).requires_grad_()

    def value():
        span(x)
        return LocalError(span).penalty()

    if value() > 1e-5:
        tensors = {"t_f": [span.t_f], "t0": [span.t0], "x": [x], "theta": model.parameters}
        assert_gradients(value, value, tensors)


@pytest.mark.parametrize("solver", ["dopri5", "tsit5", "rk4", "euler"])
def test_local_error_in_closed_form_and_its_draws_agree_in_the_mean(solver):
    """Of z' = -z, whose local error over a step is a number times the state before it."""
    node, _, x = closed_form("decay", solver=solver, atol=1e-4, rtol=1e-4)
    points = 2 if solver in ADAPTIVE else 5
    span = tm.LearnableSpan(node, torch.linspace(0, 1, points, dtype=torch.float64))
    span(x)
    steps, local = span._last.steps, LocalError(span, 2.0)
    expected = 0.0
    with torch.no_grad():
        bound, z = span._last.bound, x
        for a, b in pairwise(steps):
            nodes = [a, b]
            new = integrate(bound.function, z, Grid(nodes), span._stepper, adapt=False).states[-1]
            if solver in ADAPTIVE:
                _, stages = span._stepper.step(bound.function, z, [None] * 7, b - a)
                error = span._stepper.error(stages, b - a)
            else:
                error = new - integrate(bound.function, z, Grid([a, (a + b) / 2, b]), span._stepper).states[-1]
            expected += 2 * (b - a) * error.square().mean().sqrt().item()
            z = new
    assert local.penalty().item() == pytest.approx(expected, rel=1e-9)
    sampled = LocalError(span, 2.0, sampled=True, generator=torch.Generator().manual_seed(0))
    values = {round(sampled.penalty().item(), 15) for _ in range(60)}
    assert len(values) == len(steps) - 1  # every step was drawn
    assert sum(values) / len(values) == pytest.approx(expected, rel=1e-6)


def test_local_error_of_a_field_without_error_has_a_finite_gradient():
    span = tm.LearnableSpan(NeuralODE(lambda t, z: 0 * z + 1, solver="rk4"), torch.linspace(0, 1, 3))
    x = torch.randn(3, 2, requires_grad=True)
    span(x)
    LocalError(span).penalty().backward()
    assert x.grad.isfinite().all()
    assert span.t_f.grad.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# STEER


def test_random_span_draws_evenly_in_training_only():
    node = NeuralODE(lambda t, z: torch.ones_like(z), solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 11))
    model = RandomSpan(span, 0.5, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(1, 1)
    ends = []
    for _ in range(200):
        t_eval, sol = model(x)
        assert sol[-1].item() == pytest.approx(t_eval[-1].item(), rel=1e-5)  # z' = 1
        ends.append(t_eval[-1].item())
    assert 0.5 <= min(ends) < 0.52
    assert 1.48 < max(ends) <= 1.5
    assert sum(ends) / len(ends) == pytest.approx(1, abs=0.06)
    sol[-1].sum().backward()
    assert span.t_f.grad.item() == pytest.approx(1)
    assert span.t_f.item() == 1
    model.eval()
    assert model(x)[0][-1].item() == 1
    assert "_times" not in vars(span)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_random_span_of_a_bare_node(solver):
    node = NeuralODE(nn.Linear(2, 2), solver=solver)
    model = RandomSpan(node, 5.0, generator=torch.Generator().manual_seed(1))  # wider than the interval: cut to it
    for _ in range(20):
        t_eval, _ = model(torch.randn(3, 2), torch.linspace(0, 1, 5))
        assert 0 < model.drawn[0] < 2
        assert t_eval[-1].item() == pytest.approx(model.drawn[0])


def test_random_span_says_what_is_wrong():
    with pytest.raises(ValueError, match="width must be finite"):
        RandomSpan(NeuralODE(nn.Linear(2, 2)), -1.0)
    with pytest.raises(ValueError, match="wrap it first"):
        RandomSpan(nn.Linear(2, 2), 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Rules for times


def test_gauss_newton_time_is_its_formula():
    t_f = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = GaussNewtonTime([t_f], lr=0.2, price=0.1, decay=0.9, every=2)
    slope = curvature = None
    value = 1.0
    for n, g in enumerate([2.0, -1.0, 0.5, 3.0], 1):
        optimizer.zero_grad()
        (g * t_f).backward()
        optimizer.step()
        new = g + 0.1 * value, g * g + 0.1
        slope = new[0] if slope is None else 0.9 * slope + 0.1 * new[0]
        curvature = new[1] if curvature is None else 0.9 * curvature + 0.1 * new[1]
        if n % 2 == 0:
            value -= 0.2 * slope / curvature
        assert t_f.item() == pytest.approx(value, rel=1e-12)


def test_gauss_newton_time_finds_the_best_time_of_a_span():
    """z' = 1 from 0, loss (z - 0.6)^2 / 2 + 0.1 t_f^2 / 2: the best t_f is 0.6 / 1.1."""
    node = NeuralODE(lambda t, z: torch.ones_like(z), solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 11, dtype=torch.float64))
    optimizer = GaussNewtonTime([span.t_f], lr=0.1, price=0.1, decay=0.5, every=1)
    for _ in range(60):
        optimizer.zero_grad()
        (span(torch.zeros(1, 1, dtype=torch.float64))[1][-1] - 0.6).square().sum().div(2).backward()
        optimizer.step()
    assert span.t_f.item() == pytest.approx(0.6 / 1.1, abs=1e-3)


def test_gauss_newton_time_and_coordinate_descent_resume():
    def run(steps, state=None):
        net, t_f = nn.Linear(1, 1), nn.Parameter(torch.tensor(1.0))
        nn.init.ones_(net.weight)
        nn.init.zeros_(net.bias)
        if state:
            net.load_state_dict(state[0])
            t_f.data.fill_(state[1])
        both = CoordinateDescent(torch.optim.SGD(net.parameters(), 0.1), GaussNewtonTime([t_f], every=1), turns=(2, 1))
        if state:
            both.load_state_dict(state[2])
        for _ in range(steps):
            both.zero_grad()
            (net(t_f.reshape(1, 1)) - 0.3).square().sum().backward()
            both.step()
        return net.state_dict(), t_f.item(), both.state_dict()

    whole = run(7)
    resumed = run(3, run(4))
    assert resumed[1] == whole[1]
    assert torch.equal(resumed[0]["weight"], whole[0]["weight"])
    with pytest.raises(ValueError, match="scalars"):
        GaussNewtonTime([nn.Parameter(torch.ones(2))])


# ---------------------------------------------------------------------------------------------------------------------
# The speed limit


class Push(nn.Module):
    """z' = theta, the same for every state."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return self.theta.expand_as(x)


@given(scale=st.floats(1e-3, 1e6), seed=st.integers(0, 100))
def test_speed_limit_keeps_direction_and_stays_below(scale, seed):
    torch.manual_seed(seed)
    field = nn.Linear(3, 3).double()
    x = scale * torch.randn(5, 3, dtype=torch.float64)
    free, limited = field(x), SpeedLimit(field, 2.0)(x)
    assert (limited.norm(dim=1) <= 2.0 * (1 + 1e-12)).all()
    assert torch.allclose(torch.cosine_similarity(free, limited), torch.ones(5, dtype=torch.float64))
    expected = free.norm(dim=1) / (1 + free.norm(dim=1) ** 2 / 4).sqrt()
    assert torch.allclose(limited.norm(dim=1), expected)


def test_minimum_time_is_well_posed_under_a_speed_limit():
    """From 0 to (1, 0), loss |z - (1, 0)|^2 / 2 + w t_f: at most v t_f is covered, so t_f tends to (1 - w/v) / v.

    Without the limit t_f would go to 0 as theta grows; with it, t_f ends at that limit from above.
    """
    v, w = 4.0, 0.4
    push = Push()
    node = NeuralODE(SpeedLimit(push, v), solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 11, dtype=torch.float64), bounds=(0.01, 1.0))
    goal = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    limit = (1 - w / v) / v
    for start, near in ((1.0, 1.2), (1e3, 1 + 1e-3)):
        push.theta.data[0], span.t_f.data = start, torch.tensor(1.0, dtype=torch.float64)
        optimizer = torch.optim.Adam([{"params": [push.theta], "lr": 0.3}, {"params": [span.t_f], "lr": 0.01}])
        for _ in range(200):
            optimizer.zero_grad()
            end = span(torch.zeros(1, 2, dtype=torch.float64))[1][-1]
            ((end - goal).square().sum() / 2 + w * span.duration).backward()
            optimizer.step()
        assert limit < span.t_f.item() * (1 + 1e-5)
        assert span.t_f.item() < near * limit


def test_speed_limit_takes_what_torchdyn_takes():
    x = torch.randn(4, 2)
    timed = SpeedLimit(lambda t, z: torch.cos(t) * z, 1.0)
    assert timed(torch.tensor(0.0), x).norm(dim=1).max() < 1
    for field in (timed, SpeedLimit(nn.Linear(2, 2), 1.0)):
        node = NeuralODE(field, solver="rk4")
        assert node(x, torch.linspace(0, 1, 3))[1].shape == (3, 4, 2)
    assert SpeedLimit(nn.Linear(5, 5), 1.0)(torch.randn(5)).norm() < 1
    with pytest.raises(ValueError, match="max_speed must be positive"):
        SpeedLimit(nn.Linear(2, 2), 0.0)
