"""The certificate of Theorem 2 against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from losses_common import T_SPAN, square
from problems import closed_form
from torch import nn
from torchdyn.core import NeuralODE

from torchdyn_mintime import LearnableSpan, LyapunovRegularizer
from torchdyn_mintime.losses.certificate import doubtful


@given(
    a=st.floats(0.2, 6), b=st.floats(0.2, 6), rate=st.floats(0.2, 12), seed=st.integers(0, 1000), wrapped=st.booleans()
)
@example(a=2.0, b=4.15625, rate=8.0, seed=861, wrapped=False)  # the ODE holds the bound, its steps of rk4 do not
def test_the_certificate_of_a_linear_system_is_the_closed_form(a, b, rate, seed, wrapped):
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([-a, -b], dtype=torch.float64)))
    node = NeuralODE(linear, solver="rk4")
    model = LearnableSpan(node, T_SPAN) if wrapped else node
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    certificate = LyapunovRegularizer(model, square, rate).certificate(x, t_span=T_SPAN)
    t = certificate.t[:, None]
    assert len(t) >= 201
    values = x[:, 0] ** 2 * torch.exp(-2 * a * t) + x[:, 1] ** 2 * torch.exp(-2 * b * t)
    ratio = values / (values[0] * torch.exp(-rate * t))
    assert torch.allclose(certificate.values, values, rtol=1e-6)
    assert torch.allclose(certificate.worst_ratio, ratio.amax(0), rtol=1e-6)
    assert torch.allclose(certificate.rates, (-torch.log(values[1:] / values[0]) / t[1:]).amin(0), rtol=1e-5)
    # The states that the model itself reaches, by steps of rk4, must stay below the bound too.
    z = -torch.tensor([a, b], dtype=torch.float64) * T_SPAN.diff()[0]
    growth = (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24) ** 2
    own = (x.square() * growth ** torch.arange(len(T_SPAN))[:, None, None]).sum(2)
    own_ratio = own / (own[0] * torch.exp(-rate * (T_SPAN - T_SPAN[0]))[:, None])
    assert torch.allclose(certificate.own_ratio, own_ratio.amax(0), rtol=1e-6)
    worst = torch.maximum(ratio[1:].amax(0), own_ratio[1:].amax(0))
    clear = (worst - 1).abs() > 1e-5
    assert torch.equal(certificate.held[clear], (worst <= 1)[clear])


def test_the_second_order_certificate_of_a_critically_damped_oscillator():
    class Damped(nn.Module):
        def forward(self, t, x, **kwargs):
            q, v = x.chunk(2, 1)
            return -2 * 3.0 * v - 9.0 * q  # q'' + 2 kappa q' + kappa^2 q = 0 at kappa = 3

    node = NeuralODE(Damped(), solver="rk4", order=2)
    regularizer = LyapunovRegularizer(node, lambda z: z[:, 0], 3.0, order=2)
    x = torch.tensor([[1.0, 0.5], [2.0, -1.0]], dtype=torch.float64)
    certificate = regularizer.certificate(x, t_span=T_SPAN)
    since = certificate.t[:, None]
    assert torch.allclose(
        certificate.values, torch.exp(-3 * since) * (x[:, 0] + since * (x[:, 1] + 3 * x[:, 0])), rtol=1e-6
    )
    assert torch.allclose(certificate.worst_ratio, torch.ones(2, dtype=torch.float64), rtol=1e-6)
    assert bool(
        (LyapunovRegularizer(node, lambda z: z[:, 0], 4.0, order=2).certificate(x, t_span=T_SPAN)).held.sum() == 0
    )
    sol = node(x, T_SPAN)[1]
    assert regularizer.penalty(T_SPAN, sol).item() == pytest.approx(0.0, abs=1e-12)


def test_the_certificate_prints_a_short_table_and_handles_samples_at_the_minimum():
    node, _, x = closed_form("decay", solver="rk4")
    x = torch.cat([x, torch.zeros_like(x[:1])])  # V = 0 from the start: every rate held
    certificate = LyapunovRegularizer(node, square, 1.5).certificate(x, t_span=T_SPAN)
    assert certificate.fraction == 1.0 and certificate.rates[-1] == math.inf
    assert certificate.quantiles((0.0, 0.5)) == pytest.approx([2.0, 2.0], rel=1e-4)
    text = str(certificate)
    assert (
        "4 of 4 samples" in text
        and "on [0, 1]" in text
        and len(text.splitlines()) == 4
        and "by the model's own steps" in text
    )
    # Five samples of different rates: their least, their middle and their largest stand where they are named.
    rates = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0], dtype=torch.float64)
    spread = replace(certificate, rates=rates)
    assert spread.quantiles() == pytest.approx([1.0, 1.2, 3.0, 4.8, 5.0])
    assert "min 1, 5 % 1.2, median 3, 95 % 4.8, max 5" in str(spread)


def test_a_bare_node_takes_the_whole_span_that_it_is_given():
    node, _, x = closed_form("decay", solver="rk4")
    certificate = LyapunovRegularizer(node, square, 1.0).certificate(x, t_span=T_SPAN[1:])
    assert certificate.t[0] == T_SPAN[1] and certificate.t[-1] == T_SPAN[-1]
    with pytest.raises(ValueError, match="t_eval must be .points. and sol .points, batch"):
        LyapunovRegularizer(node, square, 1.0).penalty(T_SPAN, torch.ones(len(T_SPAN), dtype=torch.float64))


def test_the_certificate_at_no_fewer_points_than_the_model_has_and_for_adaptive_solvers():
    node, _, x = closed_form("decay", solver="rk4")
    fine = LearnableSpan(node, torch.linspace(0, 1, 301, dtype=torch.float64))
    assert len(LyapunovRegularizer(fine, square, 1.0).certificate(x).t) == 601
    node, _, x = closed_form("decay", solver="dopri5", atol=1e-8, rtol=1e-8)
    adaptive = LyapunovRegularizer(LearnableSpan(node, T_SPAN), square, 1.0).certificate(x)
    assert len(adaptive.t) == 201
    assert torch.allclose(adaptive.rates, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-4)


class Bump(nn.Module):
    """z = height exp(-((t - at) / width)^2 / 2) - t: falls, with one bump on its way."""

    def __init__(self, height, at, width):
        super().__init__()
        self.height, self.at, self.width = height, at, width

    def value(self, t):
        return self.height * torch.exp(-(((t - self.at) / self.width) ** 2) / 2) - t

    def forward(self, t, z, args=None):
        since = (t - self.at) / self.width
        return -self.height / self.width * since * torch.exp(-(since**2) / 2) - 1 + 0 * z


@given(
    height=st.floats(0.05, 1.5),
    at=st.floats(0.15, 0.95),
    width=st.floats(0.01, 0.05),
    solver=st.sampled_from(["euler", "rk4", "dopri5"]),
)
def test_what_happens_between_the_points_counts(height, at, width, solver):
    """V = exp(z) with z' known: of 11 points, 0.1 apart, most see nothing of a bump that is 0.01 wide."""
    field = Bump(height, at, width)
    span = LearnableSpan(NeuralODE(field, solver=solver), torch.linspace(0, 1, 21, dtype=torch.float64))
    regularizer = LyapunovRegularizer(span, lambda z: z[:, 0].exp(), 0.5)
    x = field.value(torch.zeros(1, 1, dtype=torch.float64))
    found = regularizer.certificate(x, points=11)
    fine = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    ratio = torch.exp(field.value(fine) - field.value(fine[0]) + 0.5 * fine).max().item()
    if abs(ratio - 1) > 1e-5:  # else it is a matter of rounding
        curve_held = bool(found.worst_ratio <= 1 + 1e-6)
        assert curve_held == (ratio <= 1), (ratio, found.worst_ratio)
        assert found.held.item() == (ratio <= 1 and found.own_ratio.item() <= 1 + 1e-6)


@pytest.mark.parametrize("frequency", [10, 100, 101, 300])
def test_an_oscillation_in_time_with_the_points_is_seen(frequency):
    """V / bound is 1 at every one of the points, and up to 1.8 between them."""

    class Wave(nn.Module):
        def forward(self, t, z, args=None):
            omega = 2 * math.pi * frequency
            return math.log(1.8) / 2 * omega * torch.sin(omega * t) - 1e-3 + 0 * z

    span = LearnableSpan(NeuralODE(Wave(), solver="dopri5"), torch.tensor([0.0, 1.0], dtype=torch.float64))
    regularizer = LyapunovRegularizer(span, lambda z: z[:, 0].exp(), 1e-3)
    found = regularizer.certificate(torch.zeros(1, 1, dtype=torch.float64))
    # Once a sample has exceeded its bound somewhere, no more points are looked at for its sake.
    assert not found.held and found.worst_ratio > 1.1


@given(rate=st.floats(0.5, 10.0), steps=st.integers(1, 4), asked=st.floats(0.5, 5.0), dtype=st.sampled_from([32, 64]))
def test_both_the_ode_and_the_models_own_steps_are_certified(rate, steps, asked, dtype):
    """z' = -rate z by Euler: z(t_f) = (1 - rate h)^n, which grows where the ODE's own solution falls."""
    dtype = {32: torch.float32, 64: torch.float64}[dtype]
    linear = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(linear.weight, -rate)
    span = LearnableSpan(NeuralODE(linear, solver="euler"), torch.linspace(0, 1, steps + 1, dtype=dtype))
    found = LyapunovRegularizer(span, square, asked).certificate(torch.full((2, 1), 1.5, dtype=dtype))
    t = torch.arange(steps + 1) / steps
    own = max((1 - rate / steps) ** (2 * i) * math.exp(asked * t[i]) for i in range(steps + 1))
    exact = max(1.0, math.exp(asked - 2 * rate))
    # Half of float32's digits for V and a large exponent.
    assert found.own_ratio.tolist() == pytest.approx([own] * 2, rel=1e-4)
    assert found.worst_ratio.tolist() == pytest.approx([exact] * 2, rel=1e-4)
    if all(abs(r - 1) > 1e-3 or r == 1 for r in (own, exact)):
        assert found.held.tolist() == [own <= 1 and exact <= 1] * 2
    assert f"{found.own_ratio.max():.4g} by the model's own steps" in str(found)


def test_it_is_of_the_model_in_eval_mode_and_leaves_the_mode():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)).double()
    net[1].running_var.fill_(9.0)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).double()

    class Potential(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, z):
            return self.head(z).square().sum(1)

    regularizer = LyapunovRegularizer(LearnableSpan(NeuralODE(net, solver="rk4"), T_SPAN), Potential(), 1.0)
    x = torch.randn(6, 2, dtype=torch.float64)
    regularizer.eval()
    expected = regularizer.certificate(x)
    regularizer.train()
    net[1].eval()  # each module keeps its own mode
    random = torch.get_rng_state()
    found = regularizer.certificate(x)
    assert torch.equal(found.values, expected.values) and torch.equal(found.own_ratio, expected.own_ratio)
    assert torch.equal(random, torch.get_rng_state())
    assert [m.training for m in (regularizer, net, net[1], net[2], head[0])] == [True, True, False, True, True]


def test_nothing_is_in_doubt_far_from_the_bound_and_everything_at_a_jump():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    values = torch.stack([torch.exp(-3 * t), torch.exp(-3 * t)], 1)
    slopes = -3 * values
    slopes[5, 1] = 300.0  # V rises steeply between two points, and is back at the second
    doubts = doubtful(1.0, t, values, slopes, None, 1e-6)
    # At the start V is at its bound, and a cubic of steps of 0.1 is not sure to 1e-6.
    assert doubts[0, 0] and not doubts[1:, 0].any() and doubts[5, 1]


def test_a_certificate_of_no_samples_is_refused():
    regularizer = LyapunovRegularizer(NeuralODE(nn.Linear(2, 2), solver="rk4"), square, 1.0)
    with pytest.raises(ValueError, match=r"a certificate is of samples; got x of the shape \(0, 2\)"):
        regularizer.certificate(torch.zeros(0, 2), t_span=T_SPAN)
