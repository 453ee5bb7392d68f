"""Integrals over the trajectory: values in closed form, gradients against central differences in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_common import assert_gradients, make_span
from problems import FIELDS, ByArgs, closed_form
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DataControl

import torchdyn_mintime as tm
from torchdyn_mintime.losses.trajectory import JacobianNorm, KineticEnergy, TaylorRegularizer


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


def controlled_span():
    net = nn.Sequential(DataControl(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    return tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 11, dtype=torch.float64))


@pytest.mark.parametrize("regularizer", ["kinetic", "jacobian", "taylor 2", "taylor 3"])
def test_in_inference_mode_the_value_is_that_of_no_grad(regularizer):
    """Lightning validates in inference mode, in which autograd records nothing."""
    span, values = controlled_span(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            span(torch.ones(4, 2, dtype=torch.float64) * torch.arange(1, 5)[:, None])
            values.append(regularizer_of(regularizer, span).penalty().item())
    assert values[0] == values[1] > 0


def test_a_given_trajectory_has_the_control_and_the_args_of_its_solve():
    span, x = controlled_span(), torch.randn(4, 2, dtype=torch.float64)
    t_eval, sol = span(x)
    late, states = span(x, save_at=t_eval[5:].tolist())
    integrand = [KineticEnergy(span).penalty(t_eval[i : i + 2], sol[i : i + 2]).item() for i in range(5, 10)]
    assert KineticEnergy(span).penalty(late, states).item() == pytest.approx(sum(integrand), rel=1e-9)
    node = NeuralODE(ByArgs(), solver="rk4")
    span, args = tm.LearnableSpan(node, torch.linspace(0, 1, 11)), {"scale": 10.0}
    t_eval, sol = span(torch.randn(4, 2), args=args)
    expected = KineticEnergy(span).penalty().item()
    assert KineticEnergy(span).penalty(t_eval, sol).item() == expected
    assert KineticEnergy(node).penalty(t_eval, sol, args=args).item() == expected


def test_an_integral_over_a_part_of_the_solve_is_refused():
    span = controlled_span()
    span(torch.randn(4, 2, dtype=torch.float64), save_at=[0.9, 1.0])
    with pytest.raises(ValueError, match="left out one of its ends"):
        KineticEnergy(span).penalty()


def test_squares_of_half_precision_are_taken_in_float32():
    """400^2 is no number of float16, and at t = 300 bfloat16 has no two times in [300, 301]."""
    net = nn.Linear(2, 2)
    nn.init.zeros_(net.weight)
    nn.init.constant_(net.bias, 400.0)
    for start, dtype in ((0.0, torch.float16), (300.0, torch.bfloat16)):
        span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(start, start + 1, 6))
        with torch.autocast("cpu", dtype):
            span(torch.randn(4, 2))
            assert KineticEnergy(span).penalty().item() == pytest.approx(80000, rel=1e-4)


def test_of_alf_the_state_without_its_velocity_is_looked_at():
    net, x = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(4, 2).double()
    values = []
    for solver, start in (("rk4", x), ("alf", torch.cat([x, net(x)], 1))):
        span = tm.LearnableSpan(NeuralODE(net, solver=solver), torch.linspace(0, 1, 101, dtype=torch.float64))
        t_eval, sol = span(start)
        values += [TaylorRegularizer(span).penalty().item(), TaylorRegularizer(span).penalty(t_eval, sol).item()]
    assert values == pytest.approx([values[0]] * 4, rel=1e-3)  # alf has order 2
