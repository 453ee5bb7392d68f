"""The step control by hand, and that numbers and tensors with a gradient are treated alike."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FIELDS, random_model
from torch import Tensor, nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.numerics import Grid, integrate, make_stepper
from torchdyn_mintime.numerics.step_control import MAX_FACTOR, MIN_FACTOR, SAFETY, error_norm, factor, first_step, rms

NORM = functools.partial(error_norm, atol=1e-3, rtol=1e-3)


def number(*tensors):
    return NORM(*tensors).item()


def test_the_first_step_is_that_of_hairer_norsett_and_wanner():
    """II.4, (4.14), by hand for z' = -3 z: with s = atol + rtol |z|, d_0 = |z / s|, d_1 = 3 d_0, d_2 = 9 d_0."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    d0 = ((x / (1e-3 + 1e-3 * x)).square().mean().sqrt()).item()
    h0 = 0.01 / 3
    h1 = (0.01 / (9 * d0)) ** (1 / 6)
    found = first_step(lambda t, z: -3 * z, x, -3 * x, lambda passed: None, 1.0, 1.0, 5, number)
    assert found == pytest.approx(min(100 * h0, h1), rel=1e-10) and h1 < 100 * h0


@pytest.mark.parametrize("kind", FIELDS)
def test_the_first_step_is_the_same_as_a_number_as_a_tensor_and_in_a_solve(kind):
    model = random_model(kind, solver="tsit5")
    model.node.atol = model.node.rtol = 1e-3
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 2, dtype=torch.float64), t_f=0.75, bounds=(0.01, 3.0))
    k1 = model.rhs(torch.tensor(0.0, dtype=torch.float64), model.x)
    start = model.rhs, model.x, k1, lambda passed: torch.as_tensor(passed, dtype=torch.float64), 1.0, 0.75, 5
    found, tensor = first_step(*start, number), first_step(*start, NORM)
    assert isinstance(tensor, Tensor) and tensor.requires_grad
    assert tensor.item() == pytest.approx(found, rel=1e-12)
    span(model.x)
    steps = span.last.steps
    if span.nfe == 2 + 6 * span.steps:  # none was rejected
        assert steps[1] - steps[0] == pytest.approx(min(found, 0.75), rel=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-20])
def test_a_field_next_to_zero_starts_the_same_as_a_number_and_as_a_tensor(scale):
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="tsit5"), torch.tensor([0.0, 1.0]))
    with torch.no_grad():
        for p in span.node.vf.parameters():
            p.mul_(scale)
    x = torch.ones(3, 2)
    start = span.node.vf, x, span.node.vf(0.0, x), lambda passed: torch.as_tensor(passed), 1.0, 1.0, 5
    found = first_step(*start, number)
    assert float(first_step(*start, NORM)) == pytest.approx(found, rel=1e-5)
    assert found == pytest.approx(1e-6)  # where there is nothing to go by


@pytest.mark.parametrize("length", [1e-12, 1e-3, 1e6, 1e12])
def test_a_solve_from_zero_takes_the_steps_of_its_interval(length):
    """z' = (1 - z) / length from 0, where the state says nothing of a scale."""
    f = lambda t, z: (1 - z) / length  # noqa: E731
    solution = integrate(f, torch.zeros(1, dtype=torch.float64), Grid([0.0, length]), make_stepper("dopri5"))
    assert len(solution.steps) < 20  # from a millionth of the interval each is at most ten times the last
    assert solution.states[-1].item() == pytest.approx(1 - math.exp(-1), abs=1e-3)


def test_a_trial_step_that_is_not_finite_is_the_first_step():
    x = torch.ones(2, dtype=torch.float64)
    steep = lambda t, z: torch.where(z == 1, -z, math.inf)  # noqa: E731
    assert first_step(steep, x, -x, lambda passed: None, 1.0, 1.0, 5, number) == pytest.approx(0.01)
    assert first_step(steep, x, -x, lambda passed: None, 1.0, 1e-4, 5, number) == 1e-4  # not beyond the end


@given(ratio=st.floats(0, 100), order=st.sampled_from([2, 3, 5, 8]), least=st.sampled_from([MIN_FACTOR, 0.0]))
def test_the_factor_by_hand_and_the_same_for_a_tensor(ratio, order, least):
    by_hand = min(MAX_FACTOR, SAFETY * ratio ** (-1 / order) if ratio else math.inf)
    by_hand = max(by_hand, 1.0 if ratio < 1 else least)
    assert factor(ratio, order, least) == pytest.approx(by_hand, rel=1e-12)
    tensor = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    found = factor(tensor, order, least)
    assert (found.item() if isinstance(found, Tensor) else found) == pytest.approx(by_hand, rel=1e-12)
    assert isinstance(found, Tensor) == (by_hand not in (1.0, least, MAX_FACTOR))


@pytest.mark.parametrize("ratio", [math.inf, math.nan, 1e30])
def test_a_step_that_failed_shrinks_to_the_limit(ratio):
    assert factor(ratio, 5) == MIN_FACTOR
    assert factor(ratio, 5, least=0.0) == pytest.approx(0.0, abs=1e-5)


def test_the_error_norm_follows_the_larger_state_entry_by_entry():
    x, x_new = torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 1.0])
    error = torch.tensor([0.4, 0.3])
    norm = error_norm(error, x, x_new, atol=0.1, rtol=0.1)
    assert norm.item() == pytest.approx(1.0, rel=1e-6)
    assert error_norm(error, x, atol=0.1, rtol=0.1).item() == pytest.approx(math.sqrt(2.5), rel=1e-6)
    assert torch.equal(x, torch.tensor([1.0, -2.0]))


def test_the_root_mean_square_in_half_precision_and_its_gradient_at_zero():
    """400 squared is beyond float16."""
    assert rms(torch.full((3,), 400.0, dtype=torch.float16)).item() == 400.0
    x = torch.zeros(3, requires_grad=True)
    rms(x).backward()
    assert torch.equal(x.grad, torch.zeros(3))
    assert rms(torch.zeros(0)).item() == 0.0
