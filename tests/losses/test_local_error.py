"""Local errors: values in closed form, and gradients against central differences in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses_common import ADAPTIVE, FIXED, SENSITIVITIES, assert_gradients, make_span
from problems import FIELDS, closed_form
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.losses.local_error import LocalError
from torchdyn_mintime.numerics import Grid, integrate


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
    steps, local = span.last.steps, LocalError(span, 2.0)
    expected = 0.0
    with torch.no_grad():
        bound, z = span.last.bound, x
        for a, b in pairwise(steps):
            nodes = [a, b]
            new = integrate(bound.function, z, Grid(nodes), span.stepper, adapt=False).states[-1]
            if solver in ADAPTIVE:
                _, stages = span.stepper.step(bound.function, z, [None] * 7, b - a)
                error = span.stepper.error(stages, b - a)
            else:
                error = new - integrate(bound.function, z, Grid([a, (a + b) / 2, b]), span.stepper).states[-1]
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


def test_in_half_precision_the_error_is_that_of_the_steps_and_not_of_rounding():
    values = []
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)
        span = tm.LearnableSpan(NeuralODE(net, solver="euler"), torch.linspace(0, 1, 101))
        span(torch.randn(64, 2).to(dtype))
        values.append(LocalError(span).penalty().item())
    # The field itself is rounded to 8 bits. The difference of two states of that type is a thousand times as large.
    assert values[1] < 10 * values[0]
