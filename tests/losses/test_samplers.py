"""The samplers of states, and the penalty at the states that they draw."""

import math

import pytest
import torch
import torch.nn.functional as F
from losses_common import T_SPAN, square
from problems import closed_form
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DataControl

from torchdyn_mintime import LearnableSpan, LyapunovRegularizer
from torchdyn_mintime.losses.potentials import CrossEntropy
from torchdyn_mintime.losses.samplers import ball, box


def test_samplers_stay_where_they_should():
    like = torch.zeros(2, 3)
    for sampler, inner in ((ball(2.0), 0.5**6), (ball(2.0, uniform_radius=True), 0.5)):
        states = sampler(4000, like)
        norms = states.flatten(1).norm(dim=1)
        assert states.shape == (4000, 2, 3) and norms.max() <= 2 * (1 + 1e-5)
        share = (norms < 1.0).double().mean().item()
        assert share == pytest.approx(inner, abs=4 * math.sqrt(inner / 4000))
    low = torch.tensor([[0.0, 1.0, 2.0]] * 2)
    states = box(low, low + 1)(100, like)
    assert bool(((states >= low) & (states <= low + 1)).all())


def test_what_samplers_refuse():
    with pytest.raises(ValueError, match="radius must be positive and finite; got -1"):
        ball(-1)
    with pytest.raises(ValueError, match="low < high; got low=1.0, high=0.0"):
        box(1.0, 0.0)


def test_sampled_states_need_no_solve_and_meet_every_target():
    net = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 11))
    regularizer = LyapunovRegularizer(span, CrossEntropy(), 20.0)
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 1])
    states = torch.randn(5, 2)
    penalty = regularizer.sampled_penalty(x, y, sampler=lambda n, like: states, samples=5)
    assert span.nfe == 0 and span.vf.nfe == 0
    expected = []
    for z in states:  # by hand: every state, with the control and the label of every sample
        for control, label in zip(x, y, strict=True):
            point = z[None].clone().requires_grad_()
            v = F.cross_entropy(point, label[None])
            slope = torch.autograd.grad(v, point)[0]
            f = net[1:](torch.cat([z, control])[None])
            expected.append(F.relu((slope * f).sum() + 20 * v.detach()))
    assert torch.allclose(penalty, torch.stack(expected).mean(), rtol=1e-5)
    penalty.backward()
    assert span.t_f.grad is None and net[1].weight.grad is not None


def test_as_many_states_are_drawn_as_in_lyanet():
    drawn = []

    def sampler(n, like):
        drawn.append(n)
        return torch.zeros(n, *like.shape, dtype=like.dtype)

    node, _, x = closed_form("decay")
    LyapunovRegularizer(LearnableSpan(node, T_SPAN), square, 1.0).sampled_penalty(x, sampler=sampler)
    assert drawn == [512]


def test_one_drawn_state_is_enough():
    node, _, x = closed_form("decay")
    regularizer = LyapunovRegularizer(LearnableSpan(node, T_SPAN), square, 3.0)
    # V = |z|^2 falls at the rate 2, so the violation of 3 is V itself.
    value = regularizer.sampled_penalty(
        x[:1], sampler=lambda n, like: torch.full((n, *like.shape), 0.5, dtype=like.dtype), samples=1
    )
    assert value.item() == pytest.approx(0.25 * x.shape[1])
