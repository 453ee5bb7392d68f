"""All points of a trajectory in one evaluation: only where that gives the same, whatever the loss makes of it."""

import math

import pytest
import torch
from losses_common import T_SPAN, square
from problems import random_model
from torch import nn
from torchdyn.core import NeuralODE

import torchdyn_mintime as tm
from torchdyn_mintime.core.field import Field
from torchdyn_mintime.losses.batched_points import BatchedPoints
from torchdyn_mintime.losses.trajectory import JacobianNorm, KineticEnergy, TaylorRegularizer

PENALTIES = [KineticEnergy, JacobianNorm, TaylorRegularizer, lambda model: TaylorRegularizer(model, derivative=3)]


def batches_seen(node):
    """A list that gets the number of states of every evaluation of the node's linear layer."""
    seen = []
    layer = next(m for m in node.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


def test_points_together_equal_points_one_by_one():
    model = random_model("mlp", 3, batch=16)
    regularizer = tm.LyapunovRegularizer(model.node, square, 1.0)
    sol = torch.randn(7, 16, 2, dtype=torch.float64)
    t_eval = torch.linspace(0, 1, 7, dtype=torch.float64)
    one_by_one = [torch.stack(v) for v in zip(*(slope_of_square(model.node, z) for z in sol), strict=True)]
    seen = batches_seen(model.node)
    for _ in range(2):
        seen.clear()
        together = regularizer.derivatives(t_eval, sol)
        assert seen[-1] == 7 * 16
        for a, b in zip(one_by_one, together, strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
    assert seen == [7 * 16]


def slope_of_square(node, z):
    """V and V-dot of the squared norm, by hand."""
    return square(z), (2 * z * node.vf(None, z)).sum(1)


@pytest.mark.parametrize("together", [True, False])
def test_one_evaluation_a_point_is_counted_however_many_there_were(together):
    node = random_model("mlp").node
    seen, points = batches_seen(node), BatchedPoints()
    sol = torch.randn(6, 3, 2, dtype=torch.float64)

    def at(t, z, copies):
        assert len(z) == 3 * copies
        return [square(bound.function(t, z))]

    for _ in range(2):
        with Field(node).beside(sol[0]) as bound:
            seen.clear()
            (values,) = points(at, bound, T_SPAN, sol, together=together)
            assert bound.nfe == 6
    assert seen == ([18] if together else [3] * 6)
    assert torch.allclose(values, torch.stack([square(node.vf(None, z)) for z in sol]), rtol=1e-12)


def test_a_field_that_looks_across_the_batch_is_never_given_all_points_at_once():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x - x.mean(0))

    node = NeuralODE(Mean(), solver="rk4")
    regularizer = tm.LyapunovRegularizer(node, square, 1.0)
    sol = torch.randn(6, 5, 2, dtype=torch.float64)
    for _ in range(2):
        _, rate = regularizer.derivatives(T_SPAN, sol)
        expected = torch.stack([(2 * z * node.vf(None, z)).sum(1) for z in sol])
        assert torch.allclose(rate, expected, rtol=1e-10)


class Slowly(nn.Module):
    """A field whose dependence on time is a parameter that starts at 0."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, t, x, args=None):
        return -x + self.c * t * x


def test_points_of_a_field_with_time_are_never_put_together_however_equal_they_look():
    node = NeuralODE(Slowly(), solver="rk4")
    regularizer = tm.LyapunovRegularizer(node, square, 1.0)
    x = torch.ones(4, 2, dtype=torch.float64)

    def slopes():
        t, sol = node(x, T_SPAN)
        return sol, regularizer.derivatives(t, sol)[1]

    slopes()
    with torch.no_grad():
        node.vf.vf.c.fill_(0.5)
    sol, found = slopes()
    expected = 2 * (-1 + 0.5 * T_SPAN)[:, None] * sol.square().sum(2)
    torch.testing.assert_close(found, expected)


class Counted(nn.Module):
    """Counts its calls; `coupled` makes each sample's slope depend on the others."""

    def __init__(self, coupled=False):
        super().__init__()
        self.coupled, self.calls = coupled, 0

    def forward(self, x):
        self.calls += 1
        return x.mean(0) - x if self.coupled else -x


@pytest.mark.parametrize(("coupled", "calls"), [(False, 1), (True, 6)])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_points_go_together_in_one_call_unless_samples_are_coupled(coupled, calls, shape, capsys):
    field = Counted(coupled)
    node = NeuralODE(field, solver="rk4")
    regularizer = tm.LyapunovRegularizer(node, square, 1.0)
    sol = torch.randn(len(T_SPAN), 4, *shape, dtype=torch.float64)
    regularizer.penalty(T_SPAN, sol)  # the first look compares both ways
    for _ in range(2):
        field.calls = 0
        regularizer.penalty(T_SPAN, sol)
        assert field.calls == calls


@pytest.mark.parametrize("make", PENALTIES)
def test_points_go_together_where_the_field_ignores_time_and_looks_at_each_sample_alone(make):
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x - x.mean(0)).tanh()

    def evaluations(node):
        span = tm.LearnableSpan(node, torch.linspace(0, 1, 5, dtype=torch.float64))
        penalty, seen = make(span), batches_seen(node)
        for _ in range(2):
            span(torch.randn(6, 2, dtype=torch.float64))
            seen.clear()
            penalty.penalty()
            assert penalty.nfe == 5
        return seen

    assert evaluations(random_model("mlp", solver="rk4").node) == [30]
    assert evaluations(random_model("depthcat", solver="rk4").node) == [6] * 5
    assert evaluations(NeuralODE(Coupled(), solver="rk4")) == [6] * 5


@pytest.mark.parametrize("first", [0.0, 1e-3], ids=["zero", "slow"])
@pytest.mark.parametrize("make", PENALTIES[:3])
def test_a_field_that_starts_small_does_not_hide_that_it_looks_across_the_batch(make, first):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.seen = nn.Parameter(torch.tensor(first)), []

        def forward(self, x):
            self.seen.append(len(x))
            return self.scale * (x - x.mean(0)).tanh()

    field = Scaled()
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 5))
    penalty, x = make(span), torch.randn(6, 2)
    span(x)
    penalty.penalty()
    with torch.no_grad():
        field.scale.fill_(2.0)
    span(x)
    field.seen.clear()
    penalty.penalty()
    assert field.seen[-5:] == [6] * 5


def test_a_field_that_refuses_another_batch_is_seen_point_by_point():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.context = nn.Linear(2, 2), torch.ones(1, 2)

        def forward(self, x):
            assert len(self.context) in (1, len(x)), "a context for each sample"
            return self.layer(x) * self.context

    span = tm.LearnableSpan(NeuralODE(Picky(), solver="rk4"), torch.linspace(0, 1, 5))
    kinetic, field = KineticEnergy(span), span.vf.vf.vf
    for batch in (1, 4, 4, 1):
        field.context = torch.full((batch, 2), 0.5)
        span(torch.randn(batch, 2))
        assert kinetic.penalty() > 0
    field.context = torch.ones(1, 2)
    span(torch.randn(0, 2))
    assert math.isnan(kinetic.penalty().item())  # the mean over no sample, as torch has it


def test_a_field_that_begins_to_couple_its_samples_is_noticed():
    """A gate that is zero at first lets the measurement of the first trajectory through."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gate = nn.Linear(2, 2), nn.Parameter(torch.zeros(()))

        def forward(self, z):
            return torch.tanh(self.layer(z)) + self.gate * (z.mean(0, keepdim=True) - z)

    torch.manual_seed(0)
    node = NeuralODE(Gated().double(), solver="rk4")
    regularizer = tm.LyapunovRegularizer(node, square, 1.0)
    sol, t_eval = torch.randn(7, 16, 2, dtype=torch.float64), torch.linspace(0, 1, 7, dtype=torch.float64)
    for calls in range(1, 5):  # the fourth is measured again, and the gate has opened by the third
        with torch.no_grad():
            next(p for p in node.parameters() if not p.dim()).fill_(2.0 if calls > 2 else 0.0)
        found = regularizer.derivatives(t_eval, sol)
    fresh = tm.LyapunovRegularizer(node, square, 1.0).derivatives(t_eval, sol)
    for a, b in zip(found, fresh, strict=True):
        assert torch.equal(a, b)
