"""What a span keeps from one call to the next is never seen: after any change, a call is as a first one."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import closed_form
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat

import torchdyn_mintime as tm


def set_time(span, value):
    with torch.no_grad():
        span.t_f.fill_(value)


def write_past_autograd(span, value):
    span.t_f.data = torch.full_like(span.t_f, value)


def write_template(span, value):
    """As an average does, or a broadcast."""
    span.interval  # noqa: B018 - was read before
    span._buffers["_template"].data[-1] += 0.01 * value


def write_bounds(span, value):
    span._buffers["_bounds"].data.copy_(torch.tensor([0.1, 0.2 + value]))


def replace_parameter(span, value):
    span.t_f = nn.Parameter(torch.tensor(value, dtype=span.t_f.dtype))


CHANGES = {
    "t_f": set_time,
    "t_f.data": write_past_autograd,
    "another parameter": replace_parameter,
    "template": write_template,
    "bounds": write_bounds,
    "t_span": lambda span, value: setattr(span, "t_span", torch.linspace(0, 1 + value, 5)),
    "lay": lambda span, value: span.lay([0.0, value / 2, value]),
    "interval": lambda span, value: setattr(span, "interval", replace(span.interval, pinned=value > 0.5)),
    "frozen": lambda span, value: span.t_f.requires_grad_(value > 0.5),
    "float64": lambda span, value: span.double(),
    "float32": lambda span, value: span.float(),
    "solver": lambda span, value: setattr(span, "solver", "rk4" if value > 0.5 else tm.LearnableSolver(2)),
    "train": lambda span, value: span.train(value > 0.5),
    "state": lambda span, value: span.load_state_dict(copy.deepcopy(span.state_dict())),
    "nothing": lambda span, value: None,
}


@given(
    changes=st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.floats(0.3, 1.0)), min_size=1, max_size=8),
    learn_t0=st.booleans(),
    grad=st.booleans(),
)
def test_a_call_after_any_change_is_as_a_first_one(changes, learn_t0, grad):
    field = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 6), learn_t0=learn_t0)
    x = torch.randn(3, 2)
    for name, value in [("nothing", 0.5), *changes]:
        CHANGES[name](span, value)
        first = copy.deepcopy(span)
        first._laid = None
        state = x.to(next(field.parameters()).dtype)
        with torch.set_grad_enabled(grad):
            calls = [m(state) for m in (span, first, span)]
        for t_eval, sol in calls[1:]:
            assert torch.equal(t_eval, calls[0][0]) and torch.equal(sol, calls[0][1])
        assert calls[0][0].requires_grad == (grad and any(t.requires_grad for t in (span.t_f, span.t0)))
        assert span.nfe == first.nfe and span.steps == first.steps
        assert span.t_f.item() == first.t_f.item()


@pytest.mark.parametrize("points", [2, 3, 4, 5, 9])
def test_the_states_of_the_last_forward_are_at_hand_however_many(points):
    """A few are held; of more, those that the caller has let go are solved for again."""
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, points))
    with torch.no_grad():
        expected = span(torch.randn(3, 2))[1].clone()
    assert torch.equal(span.last.states, expected) and torch.equal(span.last.end, expected[-1])
    assert span.nfe == 4 * (points - 1)


@given(shared=st.booleans(), nested=st.booleans())
def test_changes_deep_in_the_field_are_seen(shared, nested):
    layer = nn.Linear(2, 2)
    inner = nn.Sequential(layer, nn.Tanh(), layer if shared else nn.Linear(2, 2))
    field = nn.Sequential(nn.Sequential(inner) if nested else inner)
    x = torch.randn(3, 2)
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 3))

    def agrees():
        fresh = tm.LearnableSpan(NeuralODE(copy.deepcopy(field), solver="rk4"), torch.linspace(0, 1, 3))
        with torch.no_grad():
            return torch.equal(span(x)[1], fresh(x)[1])

    assert agrees()
    inner[0], inner[1] = nn.Sequential(DepthCat(1), nn.Linear(3, 2)), nn.SiLU()
    assert agrees()
    inner[0][1] = nn.Linear(3, 2)
    assert agrees()
    inner[0][0].register_buffer("unused", torch.ones(1))
    assert agrees()


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", tm.LearnableSolver(3)])
def test_one_step_from_zero_has_the_times_of_a_solve_without_gradient(solver):
    """Also where the times have fewer digits than the state."""
    node, _, x = closed_form("cosine", solver=solver)
    span = tm.LearnableSpan(node, torch.tensor([0.0, 0.7]))
    with torch.no_grad():
        plain = span(x)[1]
    assert span.steps == 1 and span.t_f.dtype == torch.float32 and x.dtype == torch.float64
    # The size of the step is that of t_f in either case; rounding of float64 alone is left.
    torch.testing.assert_close(span(x)[1].detach(), plain, rtol=1e-14, atol=1e-14)
    refined = [tm.StepDoubling(span, refinement=3).penalty().item()]
    with torch.no_grad():
        span(x)
        refined.append(tm.StepDoubling(span, refinement=3).penalty().item())
    assert refined[0] == pytest.approx(refined[1], rel=1e-9)
