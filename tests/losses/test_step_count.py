"""The number of steps of an adaptive solver as a penalty: against the drive's own step control, and its gradient."""

import math

import pytest
import torch
from differences import assert_close, difference, directions_like
from hypothesis import given
from hypothesis import strategies as st
from learners import annuli
from problems import FIELDS, random_model
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.depth.shallowest import Shallowest
from torchdyn_mintime.losses.step_count import StepCount


def make(kind, solver="tsit5", seed=0, size=1.0, tolerance=1e-3, t_f=0.75):
    model = random_model(kind, seed=seed, solver=solver)
    model.node.atol = model.node.rtol = tolerance
    span = tm.LearnableSpan(
        model.node, torch.linspace(0, 1, 2, dtype=torch.float64), t_f=t_f, bounds=(0.01, 3.0)
    ).eval()
    with torch.no_grad():
        for p in model.node.vf.parameters():
            p.mul_(size)
    return span, model.x


@given(
    kind=st.sampled_from(FIELDS),
    solver=st.sampled_from(["tsit5", "dopri5"]),
    seed=st.integers(0, 50),
    size=st.floats(0.1, 3.0),
    tolerance=st.sampled_from([1e-1, 1e-2, 1e-3]),
    steps=st.integers(1, 6),
)
def test_at_1_or_less_the_solver_takes_no_more_steps(kind, solver, seed, size, tolerance, steps):
    span, x = make(kind, solver, seed, size, tolerance)
    span(x)
    value = StepCount(span, steps).penalty().item()
    assert value > 0
    if value <= 1:
        assert span.steps <= steps and span.nfe <= 2 + 6 * steps


@given(kind=st.sampled_from(FIELDS), seed=st.integers(0, 50), steps=st.integers(1, 4))
def test_asking_for_one_step_fewer_than_the_solver_takes_is_not_met(kind, seed, steps):
    """Where the solver rejected nothing, its own number costs at most a bounded error per step, and one fewer more than 1."""
    span, x = make(kind, seed=seed)
    span(x)
    if span.nfe == 2 + 6 * span.steps:
        assert StepCount(span, span.steps).penalty().item() <= span.steps + 1.1
        if span.steps > 1:
            # One step fewer does not reach the end, or is rejected on the way.
            assert StepCount(span, span.steps - 1).penalty().item() > 1


@given(kind=st.sampled_from(FIELDS), seed=st.integers(0, 50), steps=st.integers(1, 3))
def test_the_gradient_is_the_difference(kind, seed, steps):
    span, x = make(kind, seed=seed, tolerance=1e-2)
    count = StepCount(span, steps)

    def value():
        span(x)
        return count.penalty()

    tensors = [span.t_f, *(p for p in span.node.vf.parameters() if p.requires_grad)]
    for p in tensors:
        p.grad = None
    value().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
    directions = directions_like(tensors, seed)
    analytic = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    # The factor of the step control is clipped at 10 and the first step is the smaller of two: at such a corner, which a
    # random point meets with a chance of about the difference's width, the derivative jumps; both sides bound it then.
    one_sided = [difference(value, tensors, directions, h=s * 1e-6, stencil=((-1, -1.0), (0, 1.0))) for s in (1, -1)]
    if abs(one_sided[0] - one_sided[1]) < 1e-3 * (norm + abs(analytic)):
        assert_close(analytic, difference(value, tensors, directions), norm, 1e-5, f"{kind} {steps}")


def test_points_that_the_solver_lands_on_are_refused():
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="tsit5"), torch.linspace(0, 1, 5))
    span(torch.randn(3, 2))
    with pytest.raises(ValueError, match="tsit5 lands on each of the 3 points between t0 and t_f"):
        StepCount(span, 2).penalty()
    node = NeuralODE(nn.Linear(2, 2), solver="dopri5", interpolator="4th")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 5))
    span(torch.randn(3, 2))
    assert StepCount(span, 2).penalty().isfinite()  # read off the steps, which do not end there


def test_a_field_too_steep_for_so_few_steps_is_an_integration_error():
    span = tm.LearnableSpan(NeuralODE(lambda t, z: -1e9 * z**5, solver="tsit5"), torch.tensor([0.0, 1e-2]))
    span(torch.ones(2, 1))
    with pytest.raises(tm.IntegrationError, match="not finite within 1 steps of tsit5 .* ask for more of them"):
        StepCount(span, 1).penalty()


def test_half_precision_does_not_overflow():
    """A state of 400 tolerances, whose square is beyond float16."""
    node = NeuralODE(nn.Linear(2, 2), solver="tsit5", atol=1e-3, rtol=1e-3)
    span = tm.LearnableSpan(node, torch.tensor([0.0, 1.0])).to(torch.float16)
    span(torch.full((4, 2), 400.0, dtype=torch.float16))
    assert StepCount(span, 2).penalty().isfinite()


def test_it_counts_its_evaluations_and_leaves_no_trace():
    span, x = make("mlp")
    span(x)
    nfe, vf = span.nfe, span.node.vf.nfe
    count = StepCount(span, 3, weight=2.0)
    two = count.penalty()
    assert (count.nfe, span.nfe, span.node.vf.nfe) == (20, nfe, vf)
    assert two.item() == pytest.approx(2 * StepCount(span, 3).penalty().item())
    assert "steps=3" in repr(count)


def test_what_it_cannot_follow_is_refused():
    span, _ = make("mlp", "rk4")
    with pytest.raises(TypeError, match="rk4, which has none. For fixed steps see StepDoubling"):
        StepCount(span, 2)
    with pytest.raises(ValueError, match="has no LearnableSpan"):
        StepCount(nn.Linear(2, 2), 2)
    with pytest.raises(TypeError, match="model must be a module"):
        StepCount(3, 2)
    span, _ = make("mlp")
    for steps, error in ((0, ValueError), (-1, ValueError), (1.5, ValueError), (True, TypeError)):
        with pytest.raises(error, match="steps must be"):
            StepCount(span, steps)
    with pytest.raises(ValueError, match="weight must be"):
        StepCount(span, 2, weight=-1.0)
    with pytest.raises(RuntimeError):
        StepCount(span, 2).penalty()


def test_the_search_makes_an_adaptive_solver_take_two_steps():
    def criterion(out, batch):
        return nn.functional.cross_entropy(out[1][-1][:, :2], batch[1])

    torch.manual_seed(0)
    node = NeuralODE(nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 3)), solver="tsit5", atol=1e-3, rtol=1e-3)
    span, batch = tm.wrap(node, torch.linspace(0, 1, 11)), annuli()
    verdict = Shallowest(target=0.02).fit(span, criterion, [batch], lr=0.03, progress=False)
    assert verdict.feasible and verdict.best.solver == "tsit5"
    with torch.no_grad():
        assert criterion(span(batch[0]), batch).item() <= 0.02
    assert span.adaptive and span.nfe == verdict.best.evaluations
    assert verdict.best.evaluations <= 2 + 6 * verdict.best.steps <= 20
    assert span.t_f.item() == 1.0 and span.t_f.requires_grad
