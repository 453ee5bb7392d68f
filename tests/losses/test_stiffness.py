"""The penalty on stiffness, on fields whose stiffness is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.losses.stiffness import Stiffness


class Turning(nn.Module):
    """z' = rate Q z with an orthogonal Q: it stretches every difference of states by the rate."""

    def __init__(self, rate, angle):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=torch.float64))
        c, s = math.cos(angle), math.sin(angle)
        self.turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)

    def forward(self, t, z, args=None):
        return self.rate * z @ self.turn


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "tsit5"])
@given(rate=st.floats(0.1, 20), angle=st.floats(0, 6))
def test_the_stiffness_of_a_turning_field_is_its_rate_at_every_step(solver, rate, angle):
    field = Turning(rate, angle)
    # A short interval, so that an adaptive solver takes few steps.
    span = tm.LearnableSpan(NeuralODE(field, solver=solver), torch.linspace(0, 0.2, 4, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    span(torch.randn(6, 2, generator=generator, dtype=torch.float64))
    penalty = Stiffness(span, weight=0.5)
    value = penalty.penalty()
    # Two stages of one time differ little where steps are short: their difference has a part of its digits only.
    assert value.item() == pytest.approx(0.5 * span.steps * rate, rel=1e-5)
    (slope,) = torch.autograd.grad(value, field.rate)
    assert slope.item() == pytest.approx(0.5 * span.steps, rel=1e-4)
    assert penalty.nfe == span.steps * span.stepper.evaluations


def test_training_on_it_makes_the_field_less_stiff():
    torch.manual_seed(0)
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2).double(), solver="rk4"), torch.linspace(0, 1, 5).double())
    penalty, x = Stiffness(span), torch.randn(16, 2, dtype=torch.float64)
    optimizer, values = torch.optim.SGD(span.vf.parameters(), lr=0.02), []
    for _ in range(20):
        span(x)
        value = penalty.penalty()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize("solver", ["euler", "midpoint"])
def test_a_solver_without_two_stages_at_one_time_is_refused(solver):
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver=solver), torch.linspace(0, 1, 5))
    with pytest.raises(ValueError, match=f"{solver} takes no two stages at the same time"):
        Stiffness(span)


def test_a_state_that_rests_has_no_stiffness_and_finite_gradients():
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2, bias=False), solver="rk4"), torch.linspace(0, 1, 3))
    nn.init.zeros_(span.vf.vf.vf.weight)
    span(torch.ones(4, 2))
    value = Stiffness(span).penalty()
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in span.vf.parameters())
