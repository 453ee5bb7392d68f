"""End times drawn at random (STEER)."""

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.core.random_span import RandomSpan


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
    assert span.train().grid()[-1].item() == 1  # nothing of the last draw is left


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
