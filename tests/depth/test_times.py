"""Update rules for times."""

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.depth.times import CoordinateDescent, GaussNewtonTime


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


def test_a_time_that_is_seldom_updated_is_not_taken_for_a_forgotten_one():
    """A span says where no optimizer has its t_f; every 50 iterations is what the paper has."""
    torch.manual_seed(0)
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 3))
    weights, times = torch.optim.SGD(span.vf.parameters(), 0.01), GaussNewtonTime([span.t_f])
    for _ in range(30):  # warnings are errors here
        for optimizer in (weights, times):
            optimizer.zero_grad()
        span(torch.ones(4, 2))[1][-1].square().mean().backward()
        for optimizer in (weights, times):
            optimizer.step()
    assert span.t_f.item() == 1.0
