"""The certificate of Theorem 2 against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses_common import T_SPAN, square
from problems import closed_form
from torch import nn
from torchdyn.core import NeuralODE

from torchdyn_mintime import LearnableSpan, LyapunovRegularizer


@given(
    a=st.floats(0.2, 6), b=st.floats(0.2, 6), rate=st.floats(0.2, 12), seed=st.integers(0, 1000), wrapped=st.booleans()
)
def test_the_certificate_of_a_linear_system_is_the_closed_form(a, b, rate, seed, wrapped):
    linear = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([-a, -b], dtype=torch.float64)))
    node = NeuralODE(linear, solver="rk4")
    model = LearnableSpan(node, T_SPAN) if wrapped else node
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.01
    certificate = LyapunovRegularizer(model, square, rate).certificate(x, t_span=T_SPAN)
    t = certificate.t[:, None]
    assert len(t) == 101
    values = x[:, 0] ** 2 * torch.exp(-2 * a * t) + x[:, 1] ** 2 * torch.exp(-2 * b * t)
    ratio = values / (values[0] * torch.exp(-rate * t))
    assert torch.allclose(certificate.values, values, rtol=1e-6)
    assert torch.allclose(certificate.worst_ratio, ratio.amax(0), rtol=1e-6)
    assert torch.allclose(certificate.rates, (-torch.log(values[1:] / values[0]) / t[1:]).amin(0), rtol=1e-5)
    clear = (ratio[1:].amax(0) - 1).abs() > 1e-6
    assert torch.equal(certificate.held[clear], (ratio[1:].amax(0) <= 1)[clear])


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
    assert "4 of 4 samples" in text and "on [0, 1]" in text and len(text.splitlines()) == 4
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
    assert len(LyapunovRegularizer(fine, square, 1.0).certificate(x).t) == 301
    node, _, x = closed_form("decay", solver="dopri5", atol=1e-8, rtol=1e-8)
    adaptive = LyapunovRegularizer(LearnableSpan(node, T_SPAN), square, 1.0).certificate(x)
    assert len(adaptive.t) == 101
    assert torch.allclose(adaptive.rates, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-4)
