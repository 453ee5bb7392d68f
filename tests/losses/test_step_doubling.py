"""Step doubling: values in closed form, gradients against central differences in float64, and no trace left behind."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses_common import ADAPTIVE, FIXED, SENSITIVITIES, assert_gradients, make_span
from problems import FIELDS, closed_form
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models.cnf import CNF, hutch_trace
from torchdyn.nn import DataControl

import torchdyn_mintime as tm
from torchdyn_mintime import IntegrationError, StepDoubling
from torchdyn_mintime.numerics import Grid, integrate


def two_ends(span, x, steps, parts):
    """z at the steps and at each step refined, over plain grids without any tensor of time."""
    steps = [span.t0.item(), *steps[1:-1], span.t_f.item()]
    with span.field.beside(x) as bound:
        ends = []
        for r in (1, parts):
            nodes = [a + (b - a) * k / r for a, b in pairwise(steps) for k in range(r)]
            grid = Grid([*nodes, steps[-1]])
            ends.append(integrate(bound.function, x, grid, span.stepper, adapt=False).states[-1])
    return ends


@given(
    kind=st.sampled_from(FIELDS),
    solver=st.sampled_from(FIXED + ADAPTIVE),
    sensitivity=st.sampled_from(SENSITIVITIES),
    refinement=st.integers(2, 4),
    t_f=st.floats(0.55, 1.6),
    seed=st.integers(0, 100),
)
def test_step_doubling_is_the_difference_of_two_discrete_solutions_with_its_exact_gradient(
    kind, solver, sensitivity, refinement, t_f, seed
):
    span, model = make_span(kind, solver, seed, steps=2, t_f=t_f, sensitivity=sensitivity)
    # Scaled up, so that the difference of a fifth-order step does not drown in rounding.
    x = (3 * model.x).requires_grad_()
    doubling = StepDoubling(span, 2.0, refinement)
    out = span(x)[1]
    steps, size = span.last.steps, out[-1].detach().square().mean()

    def held():
        first, second = two_ends(span, x, steps, refinement)
        return 2 * (first - second).square().mean() / size

    value = doubling.penalty()
    expected = held()
    assert torch.allclose(value, expected, rtol=1e-6, atol=1e-20)
    if expected < 1e-7:
        return  # below it, differences in float64 no longer resolve a gradient
    parameters = {"t_f": [span.t_f], "t0": [span.t0], "x": [x], "theta": model.parameters}
    assert_gradients(lambda: (span(x), doubling.penalty())[1], held, parameters)


@pytest.mark.parametrize("solver", FIXED)
def test_step_doubling_estimates_the_error_of_the_solution(solver):
    """z' = -z: the difference is 1 - 2^-p of the error, to leading order."""
    node, field, x = closed_form("decay", solver=solver)
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 21, dtype=torch.float64))
    end = span(x)[1][-1].detach()
    exact = field.exact(0.0, 1.0, x).detach()
    order = {"euler": 1, "midpoint": 2, "rk4": 4}[solver]
    relative = (end - exact).square().mean() / end.square().mean()
    assert StepDoubling(span).penalty().item() == pytest.approx(relative.item() * (1 - 2.0**-order) ** 2, rel=0.1)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_step_doubling_counts_its_evaluations_and_leaves_the_model_as_it_was(solver, sensitivity):
    span, model = make_span("depthcat", solver, sensitivity=sensitivity)
    doubling = StepDoubling(span, refinement=2)
    t_eval, sol = span(model.x)
    depth = [m for m in span.modules() if hasattr(m, "t")]
    before = span.nfe, span.vf.nfe, [m.t for m in depth]
    penalty = doubling.penalty()
    assert (span.nfe, span.vf.nfe, [m.t for m in depth]) == before
    stages = {"rk4": 4, "tsit5": 6}[solver]
    first = 0 if solver == "rk4" else 1
    again = 0 if sensitivity == "autograd" else span.steps * stages + first
    assert doubling.nfe == 2 * span.steps * stages + first + again
    (sol[-1].square().sum() + t_eval[-1] + penalty).backward()
    assert all(t is now for t, now in zip(before[2], [m.t for m in depth], strict=True)) or sensitivity == "adjoint"


def test_step_doubling_leaves_batch_statistics_and_dropout_alone():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)).double()
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 3))
    x = torch.randn(6, 2, dtype=torch.float64)
    span(x)
    statistics = {k: v.clone() for k, v in net[1].state_dict().items()}
    random = torch.get_rng_state()
    doubling = StepDoubling(span)
    penalty = doubling.penalty()
    assert all(torch.equal(v, statistics[k]) for k, v in net[1].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert net[2].training
    assert doubling.nfe == 24  # both solutions, without masks
    assert doubling.penalty().item() == penalty.item()
    penalty.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_step_doubling_reuses_the_data_control_and_the_noise_of_its_forward(float64):
    field = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    for node, x in (
        (NeuralODE(field, solver="rk4"), torch.randn(5, 2)),
        (
            NeuralODE(CNF(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), hutch_trace, noise), solver="rk4"),
            torch.randn(5, 3),
        ),
    ):
        span = tm.LearnableSpan(node, torch.linspace(0, 1, 2))
        doubling = StepDoubling(span)
        span(x)
        value = doubling.penalty()
        with torch.no_grad():
            span.node(torch.randn(7, x.shape[1]), torch.linspace(0, 1, 2))  # another batch in between
        assert torch.equal(doubling.penalty(), value)
        value.backward()


def test_step_doubling_of_several_spans_is_the_sum_and_of_x_leaves_no_trace():
    first, second = (make_span("mlp", "rk4", seed)[0] for seed in (1, 2))
    for span in (first, second):
        span.node.return_t_eval = False

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(self.first(x)[-1])[-1]

    model, x = Stacked(), torch.randn(4, 2, dtype=torch.float64)
    model(x)
    both = StepDoubling(model, 3.0).penalty()
    assert both.item() == pytest.approx(sum(StepDoubling(s, 3.0).penalty().item() for s in (first, second)))
    last, counts = first.last, (first.vf.nfe, second.nfe)
    doubling = StepDoubling(model, 3.0)
    other = doubling.penalty(x + 1)
    assert first.last is last
    assert (first.vf.nfe, second.nfe) == counts
    assert doubling.nfe == 3 * (first.nfe + second.nfe)
    model(x + 1)
    assert other.item() == pytest.approx(StepDoubling(model, 3.0).penalty().item())


def test_step_doubling_of_every_kth_batch():
    span, model = make_span("mlp", "rk4")
    span(model.x)
    now = StepDoubling(span).penalty().item()
    doubling = StepDoubling(span, every=3)
    assert [doubling.penalty().item() for _ in range(4)] == pytest.approx([3 * now, 0, 0, 3 * now])


def test_step_doubling_with_save_at_that_leaves_the_end_out():
    span, model = make_span("mlp", "rk4")
    span(model.x)
    whole = StepDoubling(span).penalty().item()
    span(model.x, save_at=[0.25])
    assert StepDoubling(span).penalty().item() == pytest.approx(whole)


def test_step_doubling_says_what_is_wrong():
    span, model = make_span("mlp", "rk4")
    doubling = StepDoubling(span)
    with pytest.raises(RuntimeError, match="call the model first"):
        doubling.penalty()
    with torch.no_grad():
        span(model.x)
        assert doubling.penalty() > 0
    with pytest.raises(RuntimeError, match="without gradients"):
        doubling.penalty()
    with pytest.raises(ValueError, match="wrap it first"):
        StepDoubling(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="refinement must be 2 or more; got 1"):
        StepDoubling(span, refinement=1)
    with pytest.raises(ValueError, match="weight must be finite"):
        StepDoubling(span, weight=float("nan"))
    with pytest.raises(TypeError, match="weight must be a number"):
        StepDoubling(span, weight="1")


def test_step_doubling_names_a_refined_solve_that_blows_up():
    """z' = z^2 from 1 blows up at t = 1: one step passes over it, many do not."""
    node = NeuralODE(lambda t, z: z**2, solver="rk4")
    span = tm.LearnableSpan(node, torch.tensor([0.0, 3.0]))
    span(torch.ones(1, 1))
    with pytest.raises(IntegrationError, match="not finite") as caught:
        StepDoubling(span, refinement=30).penalty()
    assert any("step doubling" in note for note in caught.value.__notes__)


def test_a_first_call_of_its_own_does_not_decide_the_interval():
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"))
    x = torch.randn(4, 2)
    StepDoubling(span).penalty(x).backward()
    assert span(x, torch.linspace(0, 2, 21))[0][-1].item() == 2.0
