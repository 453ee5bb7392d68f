"""The speed limit: what it leaves of a field, and that minimum time is well posed under it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime import SpeedLimit


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
