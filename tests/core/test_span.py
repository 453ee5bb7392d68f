"""LearnableSpan apart from its gradients: the grid, clipping, dtypes, copies, checkpoints, errors."""

import copy
import io
import logging
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Counted, Decay, random_model, reference
from torch import nn
from torch.func import functional_call
from torchdyn.core import NeuralODE
from torchdyn.nn import Augmenter, DataControl, DepthCat
from torchdyn.numerics.solvers.ode import str_to_solver

import torchdyn_mintime as tm

SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")


def _node(solver="rk4", dtype=torch.float64, **options):
    return NeuralODE(Decay(dtype=dtype), solver=solver, **options)


def _span(*args, solver="rk4", dtype=torch.float64, node_options=None, **options):
    return tm.LearnableSpan(_node(solver, dtype, **(node_options or {})), *args, **options)


def _set(span, t_f=None, t0=None):
    with torch.no_grad():
        if t_f is not None:
            span.t_f.fill_(t_f)
        if t0 is not None:
            span.t0.fill_(t0)


def _double(*values):
    return torch.tensor(values, dtype=torch.float64)


def _points(span, *args):
    return span.grid(*args).detach()


NEAR = 1e-3
"""The share of the step there within which the contract drops a template point beside t_f."""


X = torch.tensor([[1.0, -2.0], [0.5, 0.25]], dtype=torch.float64)

# ---------------------------------------------------------------------------------------------------------------------
# What is there after one line


def test_the_defaults_of_a_fixed_step_solver():
    span = tm.LearnableSpan(_node("rk4"))
    assert torch.equal(span.t_span, torch.linspace(0, 1, 101))
    assert span.step_size == pytest.approx(0.01, abs=1e-7)
    assert (float(span.t0), float(span.t_f.detach())) == (0.0, 1.0)
    assert span.bounds == pytest.approx((0.01, 1.0), abs=1e-7)


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_the_defaults_of_an_adaptive_solver(solver):
    span = tm.LearnableSpan(_node(solver))
    assert torch.equal(span.t_span, torch.tensor([0.0, 1.0]))
    assert span.bounds == pytest.approx((1e-3, 1.0), abs=1e-7)


def test_the_nodes_own_span_is_the_template():
    node = _node()
    node.t_span = torch.linspace(-1, 2, 7, dtype=torch.float64)
    span = tm.LearnableSpan(node)
    assert torch.equal(span.t_span, node.t_span)
    assert (float(span.t0), float(span.t_f.detach())) == (-1.0, 2.0)


def test_a_template_that_is_given_goes_before_the_nodes():
    node = _node()
    node.t_span = torch.linspace(-1, 2, 7)
    assert torch.equal(tm.LearnableSpan(node, torch.linspace(0, 1, 3)).t_span, torch.linspace(0, 1, 3))


def test_times_are_a_parameter_and_a_buffer():
    span = _span(torch.linspace(0, 1, 11))
    assert isinstance(span.t_f, nn.Parameter) and span.t_f.shape == () and span.t_f.requires_grad
    assert not isinstance(span.t0, nn.Parameter) and "t0" in dict(span.named_buffers())
    learned = _span(torch.linspace(0, 1, 11), learn_t0=True)
    assert isinstance(learned.t0, nn.Parameter) and learned.t0.shape == ()
    assert "t0" not in dict(learned.named_buffers())


def test_a_shallower_start():
    span = _span(torch.linspace(0, 1, 11), t_f=0.35)
    assert float(span.t_f.detach()) == pytest.approx(0.35)
    assert torch.equal(span.t_span, torch.linspace(0, 1, 11))
    torch.testing.assert_close(_points(span), torch.tensor([0.0, 0.1, 0.2, 0.3, 0.35]))


def test_it_reads_the_nodes_own_names():
    node = random_model("second order", solver="rk4", sensitivity="adjoint").node
    span = tm.LearnableSpan(node)
    assert (span.node, span.vf, span.order, span.sensitivity) == (node, node.vf, 2, "adjoint")


def test_it_answers_as_the_node_does():
    t_span = torch.linspace(0, 1, 11, dtype=torch.float64)
    plain = _node()(X, t_span)
    ours = _span(t_span)(X)
    torch.testing.assert_close(ours[0].detach(), plain[0])
    # torchdyn's rk4 is right for a field without time, but for its tableau in float32 (U9).
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-6, atol=1e-7)
    only = _span(t_span, node_options={"return_t_eval": False})(X)
    torch.testing.assert_close(only, ours[1], rtol=0, atol=0)
    torch.testing.assert_close(_span(t_span).trajectory(X, t_span), ours[1], rtol=0, atol=0)


@pytest.mark.parametrize("solver, evaluations", [("euler", 10), ("midpoint", 20), ("rk4", 40)])
def test_it_takes_a_solver_that_is_set_on_the_node(solver, evaluations):
    span, t_span = _span(torch.linspace(0, 1, 11)), torch.linspace(0, 1, 11, dtype=torch.float64)
    span(X)
    span.node.solver = str_to_solver(solver)
    sol = span(X)[1]
    assert (span.nfe, span.stepper.name) == (evaluations, solver)
    torch.testing.assert_close(sol, _span(t_span, solver=solver)(X)[1])
    torch.testing.assert_close(span.trajectory(X), sol)
    copied = copy.deepcopy(span)
    torch.testing.assert_close(copied(X)[1], sol)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_the_vector_field_run_at_every_evaluation(order, sensitivity, register):
    changes = {
        "register_forward_hook": lambda module, given, rate: 2 * rate,
        "register_forward_pre_hook": lambda module, given: (given[0], given[1] + 0.1),
    }
    found = []
    for wrapped in (False, True):
        node = random_model("second order" if order == 2 else "linear", solver="euler", sensitivity=sensitivity).node
        getattr(node.vf, register)(changes[register])
        x = torch.ones(3, 4 if order == 2 else 2, dtype=torch.float64)
        t_span = torch.linspace(0, 1, 11, dtype=torch.float64)
        sol = (tm.LearnableSpan(node, t_span) if wrapped else node)(x, t_span)[1]
        found.append((sol.detach(), node.vf.nfe))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert found[1][1] == 10


def test_hooks_on_the_node_are_said_not_to_run():
    model = nn.Sequential(_node())
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="register them on the span"):
        tm.wrap(model)


def test_sol_of_a_trajectory_is_alone_whatever_the_node_returns():
    t_span = torch.linspace(0, 1, 11, dtype=torch.float64)
    for flag in (True, False):
        assert _span(t_span, node_options={"return_t_eval": flag}).trajectory(X, t_span).shape == (11, 2, 2)


def test_the_duration_is_differentiable():
    span = _span(torch.linspace(0.2, 1, 9, dtype=torch.float64), learn_t0=True)
    assert float(span.duration.detach()) == pytest.approx(0.8)
    span.duration.backward()
    assert (float(span.t_f.grad), float(span.t0.grad)) == (1.0, -1.0)


def test_steps_and_evaluations_of_the_last_forward():
    span = _span(torch.linspace(0, 1, 11), dtype=torch.float32)
    assert span.steps == 10
    span(X.float())
    assert (span.steps, span.nfe) == (10, 40)
    _set(span, 0.42)
    span(X.float())
    assert (span.steps, span.nfe) == (5, 20)


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_steps_of_an_adaptive_solver_are_the_accepted_ones(solver):
    field = Counted(lambda t, x: -x * (1 + torch.sin(9 * t)))
    steps = []
    for tolerance in (1e-3, 1e-8):
        field.count = 0
        span = tm.LearnableSpan(NeuralODE(field, solver=solver, atol=tolerance, rtol=tolerance))
        span(X)
        assert span.nfe == field.count
        # Six evaluations an accepted step (first same as last), two to begin with, six for every rejected one.
        assert 1 <= span.steps <= (field.count - 1) / 6
        steps.append(span.steps)
    assert steps[1] > 3 * steps[0]


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_the_evaluations_include_the_backward_once_it_ran(solver, sensitivity):
    field = Counted(lambda t, x: -x, 100_000)
    span = tm.LearnableSpan(NeuralODE(field, solver=solver, sensitivity=sensitivity), torch.linspace(0, 1, 11))
    for _ in range(2):
        field.count = 0
        _, sol = span(X.float())
        assert span.nfe == field.count
        sol[-1].sum().backward()
        assert span.nfe == field.count


# ---------------------------------------------------------------------------------------------------------------------
# The grid


def test_the_template_is_cut_at_t_f():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, 0.57)
    torch.testing.assert_close(_points(span), _double(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.57))
    _set(span, 0.5)
    torch.testing.assert_close(_points(span), _double(0, 0.1, 0.2, 0.3, 0.4, 0.5))


def test_an_uneven_template_keeps_its_own_points():
    span = _span(_double(0, 0.1, 0.3, 0.35, 0.9, 1.0))
    _set(span, 0.5)
    torch.testing.assert_close(_points(span), _double(0, 0.1, 0.3, 0.35, 0.5))


def test_a_fixed_step_solver_goes_on_with_the_last_spacing():
    span = _span(_double(0, 0.5, 0.7, 0.8), bounds=(0.1, 2))
    _set(span, 1.05)
    torch.testing.assert_close(_points(span), _double(0, 0.5, 0.7, 0.8, 0.9, 1.0, 1.05))


def test_an_adaptive_solver_only_adds_t_f():
    span = _span(_double(0, 0.5, 1.0), solver="tsit5", bounds=(0.1, 9))
    _set(span, 7.25)
    torch.testing.assert_close(_points(span), _double(0, 0.5, 1.0, 7.25))
    t_eval, sol = span(X)
    assert len(t_eval) == len(sol) == 4


@pytest.mark.parametrize("offset", [1e-9, -1e-9, 1e-6, -1e-6, 1.5e-5, -1.5e-5, 9e-5, -9e-5])
def test_a_template_point_too_close_to_t_f_goes(offset):
    # 1e-3 of the step .1 is 1e-4: within it, the point goes and t_f stays.
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, 0.5 + offset)
    grid = _points(span)
    assert len(grid) == 6 and float(grid[-1]) == 0.5 + offset


def test_a_template_point_far_enough_stays():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, 0.5 + 1.2e-4)
    assert len(_points(span)) == 7


def test_closeness_is_measured_by_the_step_and_never_by_the_size_of_t():
    span = _span(torch.linspace(1e6, 1e6 + 1, 11, dtype=torch.float64))
    _set(span, 1e6 + 0.5 + 0.8e-4)
    assert len(_points(span)) == 6
    _set(span, 1e6 + 0.5 + 1.2e-4)
    assert len(_points(span)) == 7


@st.composite
def _cuts(draw):
    start = draw(st.sampled_from([0.0, -2.0, 0.3, 40.0]))
    length = draw(st.sampled_from([0.05, 1.0, 10.0]))
    points = draw(st.integers(2, 60))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    solver = draw(st.sampled_from(["rk4", "tsit5"]))
    where = draw(st.one_of(st.floats(0.0, 1.7), st.integers(0, points).map(lambda k: k / (points - 1))))
    ulps = draw(st.integers(-8, 8))
    return torch.linspace(start, start + length, points, dtype=dtype), solver, where, ulps


@given(_cuts())
def test_every_grid_ascends_has_both_ends_and_no_near_duplicate(case):
    template, solver, where, ulps = case
    start, end = float(template[0]), float(template[-1])
    step = float(template[1] - template[0])
    span = _span(template, solver=solver, bounds=(start + 0.05 * min(step, end - start), end + (end - start)))
    t_f = torch.tensor(start + where * (end - start), dtype=template.dtype)
    for _ in range(abs(ulps)):
        t_f = torch.nextafter(t_f, torch.tensor(math.copysign(math.inf, ulps), dtype=t_f.dtype))
    _set(span, float(t_f))
    span.clip_()
    grid = _points(span)
    assert grid.dtype == template.dtype
    assert torch.equal(grid[0], span.t0) and torch.equal(grid[-1], span.t_f.detach())
    assert (grid.diff() > 0).all()
    # The times are rounded to their type, and so are the steps between them.
    slack = 2 * torch.finfo(template.dtype).eps * float(grid.abs().max())
    if len(grid) > 2:
        assert float(grid.double().diff().min()) >= NEAR * step - slack
    # Nothing is lost: every template point that is clearly before t_f is there.
    end = float(span.t_f.detach())
    kept = [t for t in template if float(t) < end - 1.01 * NEAR * step - slack]
    assert len(kept) <= len(grid) - 1
    assert all(bool((grid == t).any()) for t in kept)
    if solver == "rk4":
        assert float(grid.diff().max()) <= step * (1 + 2e-3) + slack


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_thousands_of_float32_updates_never_spoil_the_grid(solver, draws):
    generator = torch.Generator().manual_seed(1)
    span = _span(torch.linspace(0, 1, 101), solver=solver, dtype=torch.float32)
    optimizer = torch.optim.SGD([span.t_f], lr=1.0)
    lowest = 1.0
    for i in range(draws(20_000, 3_000)):
        # Steps of every size, a few of them onto a template point and a few ulps beside it.
        size = 10 ** float(-6 * torch.rand((), generator=generator))
        span.t_f.grad = torch.randn((), generator=generator) * size
        if i % 10 == 0:
            point = float(span.t_span[int(torch.randint(len(span.t_span), (), generator=generator))])
            nudge = int(torch.randint(-5, 6, (), generator=generator)) * 2**-24
            span.t_f.grad = span.t_f.detach() - torch.tensor(point + nudge)
        optimizer.step()
        span.clip_()
        grid = _points(span)
        assert torch.equal(grid[-1], span.t_f.detach()) and torch.equal(grid[0], span.t0)
        gaps = grid.diff()
        # A thousandth of the step .01, less the rounding of two times of float32.
        assert float(gaps.min()) >= 9.8e-6, (i, span.t_f.item())
        lowest = min(lowest, span.t_f.item())
        if i % 50 == 0:
            with torch.no_grad():
                t_eval, sol = span(torch.ones(1, 1))
            assert torch.equal(t_eval, grid)
            assert float(sol[-1]) == pytest.approx(math.exp(-span.t_f.item()), rel=5e-3)
    assert lowest < 0.1, "the walk never came near the lower bound"


# ---------------------------------------------------------------------------------------------------------------------
# A learnable t0


def _learned(template, **options):
    return _span(template, learn_t0=True, **options)


def test_the_first_point_is_t0_and_moves_with_it():
    span = _learned(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, t0=0.04)
    torch.testing.assert_close(_points(span)[:3], _double(0.04, 0.1, 0.2))
    _set(span, t0=0.33)
    torch.testing.assert_close(_points(span)[:3], _double(0.33, 0.4, 0.5))
    _set(span, t0=0.3)
    torch.testing.assert_close(_points(span)[:3], _double(0.3, 0.4, 0.5))


def test_before_the_template_the_first_step_grows_to_two_step_sizes_then_splits():
    span = _learned(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, t0=-0.05)
    torch.testing.assert_close(_points(span)[:3], _double(-0.05, 0.1, 0.2))
    for t0 in (-0.099, -0.101, -0.17, -0.25, -0.5, -1.23):
        _set(span, t0=t0)
        grid = _points(span)
        assert float(grid[0]) == t0
        assert float(grid.diff().max()) <= 0.2 * (1 + 1e-9), t0
        # Splitting makes steps of about the template's size, not ever smaller ones.
        assert float(grid.diff()[1:].min()) >= 0.05, t0
        assert any(abs(float(t) - 0.2) < 1e-12 for t in grid) and float(grid[-1]) == 1.0


@given(st.floats(-2.0, 0.95))
def test_every_grid_with_a_learned_start_ascends(t0):
    span = _learned(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, t0=t0)
    span.clip_()
    grid = _points(span)
    assert torch.equal(grid[0], span.t0.detach()) and torch.equal(grid[-1], span.t_f.detach())
    assert (grid.diff() > 2e-5).all() and float(grid.diff().max()) <= 0.2 * (1 + 1e-9)


def test_t0_is_clipped_to_one_step_before_t_f():
    span = _learned(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, t_f=0.6, t0=0.59)
    span.clip_()
    assert float(span.t0.detach()) == pytest.approx(0.5) and float(span.t_f.detach()) == 0.6
    _set(span, t0=2.0)
    span.clip_()
    assert float(span.t0.detach()) == pytest.approx(0.5)


def test_a_fixed_t0_is_never_moved():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, t_f=-5.0)
    span.clip_()
    assert float(span.t0) == 0.0 and float(span.t_f.detach()) == pytest.approx(0.1)


def test_the_solution_starts_at_the_learned_t0():
    model = random_model("keyword", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 41, dtype=torch.float64), learn_t0=True)
    _set(span, t0=-0.13)
    t_eval, sol = span(model.x)
    assert float(t_eval[0].detach()) == -0.13
    exact = reference(model.rhs, model.x, _double(-0.13, 1.0))[-1]
    # rk4 with steps of .025: about 1e-8.
    torch.testing.assert_close(sol[-1], exact, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# Spans that are passed


def test_a_passed_span_is_cut_the_same_way():
    span = _span(torch.linspace(0, 1, 101, dtype=torch.float64))
    _set(span, 0.6)
    passed = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(_points(span, passed), _double(0, 0.25, 0.5, 0.6))
    t_eval, sol = span(X, passed)
    torch.testing.assert_close(t_eval.detach(), _double(0, 0.25, 0.5, 0.6))
    assert len(sol) == 4
    # The template is still its own.
    assert len(span.t_span) == 101 and len(span(X)[0]) == 61


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_the_first_span_passed_becomes_the_template(solver):
    span = tm.LearnableSpan(_node(solver))
    parameter = span.t_f
    t_eval, _ = span(X, torch.linspace(0, 2, 21, dtype=torch.float64))
    assert span.t_f is parameter and float(span.t_f.detach()) == 2.0
    assert len(span.t_span) == 21 and len(t_eval) == 21
    assert span.bounds[1] == pytest.approx(2.0)
    # Once: the next one is cut.
    _set(span, 1.5)
    with pytest.warns(UserWarning, match=r"from 0 to 5, reaches beyond .* cut to \[0, 1\.5\]"):
        t_eval, _ = span(X, torch.linspace(0, 5, 11, dtype=torch.float64))
    assert float(t_eval[-1].detach()) == 1.5 and len(span.t_span) == 21


def test_a_forward_without_a_span_settles_the_template_too():
    # Two readings are possible of a first call without a span; what may never happen is that t_f jumps after training.
    span = tm.LearnableSpan(_node("rk4"))
    _set(span, 0.4)
    span.train()
    _, sol = span(X, torch.linspace(0, 1, 11))
    assert torch.isfinite(sol).all()


def test_a_given_template_is_not_replaced():
    for span in (tm.LearnableSpan(_node(), torch.linspace(0, 1, 11)), _span_from_node()):
        with pytest.warns(UserWarning, match="from 0 to 3, reaches beyond"):
            span(X, torch.linspace(0, 3, 7))
        assert float(span.t_f.detach()) == 1.0 and len(span.t_span) == 11


def _span_from_node():
    node = _node()
    node.t_span = torch.linspace(0, 1, 11)
    return tm.LearnableSpan(node)


def test_that_the_template_was_filled_survives_a_checkpoint():
    span = tm.LearnableSpan(_node())
    span(X, torch.linspace(0, 2, 21, dtype=torch.float64))
    _set(span, 0.7)
    fresh = tm.LearnableSpan(_node())
    fresh.load_state_dict(span.state_dict())
    assert float(fresh.t_f.detach()) == pytest.approx(0.7)
    t_eval, _ = fresh(X, torch.linspace(0, 2, 21, dtype=torch.float64))
    assert float(fresh.t_f.detach()) == pytest.approx(0.7) and float(t_eval[-1].detach()) == pytest.approx(0.7)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_a_descending_span_runs_over_the_same_nodes_reversed(solver):
    template = torch.linspace(0, 1, 11, dtype=torch.float64)
    model = random_model("keyword", solver=solver, **({"atol": 1e-9, "rtol": 1e-9} if solver == "tsit5" else {}))
    span = tm.LearnableSpan(model.node, template, t_f=0.73)
    forward = span(model.x)
    backward = span(forward[1][-1], template.flip(0))
    torch.testing.assert_close(backward[0].detach(), forward[0].detach().flip(0), rtol=0, atol=0)
    torch.testing.assert_close(_points(span, template.flip(0)), _points(span).flip(0), rtol=0, atol=0)
    # There and back again: ten steps of rk4 each way leave about 1e-5.
    torch.testing.assert_close(backward[1], forward[1].flip(0), rtol=1e-4, atol=1e-4 if solver == "rk4" else 1e-7)


def test_save_at_returns_each_time_once():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    asked = (0.25, 0.5, 0.83)
    t_eval, sol = span(X, save_at=asked)
    torch.testing.assert_close(t_eval.detach(), _double(*asked))
    for t, z in zip(asked, sol, strict=True):
        # The asked times are added to the grid of step .1: rk4 is good to 1e-6 there.
        torch.testing.assert_close(z, X * math.exp(-t), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("kind", [tuple, list, torch.tensor])
def test_save_at_takes_what_torchdyn_takes(solver, kind):
    t_eval, sol = _span(torch.linspace(0, 1, 11), solver=solver, dtype=torch.float32)(
        X.float(), save_at=kind([0.0, 0.4, 1.0])
    )
    torch.testing.assert_close(t_eval.detach(), torch.tensor([0.0, 0.4, 1.0]))
    torch.testing.assert_close(sol[0], X.float())
    torch.testing.assert_close(sol[-1], X.float() * math.exp(-1), rtol=2e-3, atol=2e-3)


def test_save_at_keeps_the_gradient_of_t_f_where_it_asks_for_it():
    span = _span(torch.linspace(0, 1, 101, dtype=torch.float64))
    _, sol = span(X, save_at=(0.5, 1.0))
    sol[-1].sum().backward()
    assert float(span.t_f.grad) == pytest.approx(float(-X.sum()) * math.exp(-1), rel=1e-3)


def test_save_at_after_t_f_is_refused():
    span = _span(torch.linspace(0, 1, 11))
    _set(span, 0.5)
    with pytest.raises(ValueError, match=r"0\.7"):
        span(X, save_at=(0.2, 0.7))


# ---------------------------------------------------------------------------------------------------------------------
# Bounds and clipping, eq. (14)


def test_clip_writes_only_what_is_outside():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64), bounds=(0.2, 0.9), t_f=0.5)
    for t_f, expected in ((0.5, 0.5), (0.2, 0.2), (0.9, 0.9), (0.05, 0.2), (-3.0, 0.2), (1.7, 0.9)):
        _set(span, t_f)
        version = span.t_f._version
        span.clip_()
        assert float(span.t_f.detach()) == expected
        assert (span.t_f._version != version) == (t_f != expected)


def test_a_training_forward_clips_by_itself():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64)).train()
    _set(span, 1.4)
    t_eval, _ = span(X)
    assert float(span.t_f.detach()) == 1.0 and float(t_eval[-1].detach()) == 1.0
    _set(span, -1.0)
    span(X)
    assert float(span.t_f.detach()) == pytest.approx(0.1)


def test_an_eval_forward_uses_the_clipped_value_without_writing():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64)).eval()
    _set(span, 1.4)
    t_eval, sol = span(X)
    assert float(span.t_f.detach()) == 1.4 and float(t_eval[-1].detach()) == 1.0
    # A functional clamp would have no gradient here, and the optimizer could never come back.
    sol[-1].sum().backward()
    assert float(span.t_f.grad) != 0.0


def test_clipping_never_breaks_a_graph_that_is_alive():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64)).train()
    _, sol = span(X)
    loss = sol[-1].sum() + span.duration
    other = span(X)[1]
    loss = loss + other[-1].sum()
    loss.backward()
    assert torch.isfinite(span.t_f.grad)


def test_two_forwards_with_a_step_between_them_and_t_f_outside():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64)).train()
    optimizer = torch.optim.SGD(span.parameters(), lr=10.0)
    for _ in range(5):
        optimizer.zero_grad()
        (span(X)[1][-1].sum() + span(X)[1][-1].square().sum() + 0.1 * span.duration).backward()
        optimizer.step()
    span(X)
    low, high = span.bounds
    assert low <= float(span.t_f.detach()) <= high


def test_bounds_can_be_read_and_set():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    span.bounds = (0.3, 3.0)
    assert span.bounds == pytest.approx((0.3, 3.0))
    _set(span, 2.5)
    span.clip_()
    assert float(span.t_f.detach()) == 2.5
    span.bounds = (0.3, 2.0)
    span.clip_()
    assert float(span.t_f.detach()) == 2.0


def test_the_default_lower_bound_is_at_most_half_the_template():
    assert _span(_double(0, 1)).bounds == pytest.approx((0.5, 1.0))
    assert _span(_double(2, 2.6, 3)).bounds == pytest.approx((2.5, 3.0))
    assert _span(torch.linspace(2, 3, 11, dtype=torch.float64)).bounds == pytest.approx((2.1, 3.0))


def test_equal_bounds_need_a_frozen_t_f():
    with pytest.raises(ValueError, match=r"0\.5"):
        _span(torch.linspace(0, 1, 11), bounds=(0.5, 0.5), t_f=0.5)
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64), t_f=0.5)
    with pytest.raises(ValueError, match=r"0\.5"):
        span.bounds = (0.5, 0.5)
    span.t_f.requires_grad_(False)
    span.bounds = (0.5, 0.5)
    span.clip_()
    assert float(span.t_f) == 0.5


def test_reaching_a_bound_is_said_once_and_is_no_error(caplog, recwarn):
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64)).train()
    with caplog.at_level(logging.DEBUG):
        for _ in range(4):
            _set(span, -1.0)
            span(X)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO] + [str(w.message) for w in recwarn]
    assert len([m for m in said if "t_f" in m]) == 1


def test_step_size_can_be_set():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    span.step_size = 0.05
    assert span.step_size == pytest.approx(0.05)
    assert span.bounds[0] == pytest.approx(0.05)
    given = _span(torch.linspace(0, 1, 11, dtype=torch.float64), step_size=0.02)
    assert given.step_size == pytest.approx(0.02) and given.bounds[0] == pytest.approx(0.02)


def test_the_template_can_be_set():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    span.t_span = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert len(span.t_span) == 5 and span.step_size == pytest.approx(0.25)
    torch.testing.assert_close(_points(span), torch.linspace(0, 1, 5, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# dtypes


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_times_are_float32_at_least(template, expected):
    span = _span(torch.linspace(0, 1, 5).to(template))
    assert span.t_f.dtype == span.t0.dtype == expected


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_times(half):
    for learn_t0 in (False, True):
        span = _span(torch.linspace(0, 1, 11), dtype=torch.float32, learn_t0=learn_t0)
        span = span.half() if half == torch.float16 else span.bfloat16()
        assert span.t_f.dtype == span.t0.dtype == torch.float32
        assert span.node.vf.vf.rate.dtype == half
        t_eval, sol = span(X.to(half))
        assert sol.dtype == half and t_eval.dtype == torch.float32
        # Three digits for half precision, two for bfloat16, a step's rounding at a time.
        torch.testing.assert_close(sol[-1].float(), X.float() * math.exp(-1), rtol=5e-2, atol=5e-2)
        sol[-1].float().sum().backward()
        assert span.t_f.grad.dtype == torch.float32


def test_half_precision_of_a_model_around_it_leaves_the_times():
    model = nn.Sequential(
        nn.Linear(2, 2), tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4", return_t_eval=False))
    )
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16 and model[1].t_f.dtype == torch.float32
    model.double()
    assert model[0].weight.dtype == torch.float64 and model[1].t_f.dtype in (torch.float32, torch.float64)
    t_f = float(model[1].t_f.detach())
    model.half()
    assert model[1].t_f.dtype.itemsize >= 4 and float(model[1].t_f.detach()) == t_f


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_autocast_to_bfloat16(solver, sensitivity):
    model = random_model("mlp", dtype=torch.float32, solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11))
    exact = span(model.x)[1][-1].detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        t_eval, sol = span(model.x)
        loss = sol[-1].float().square().sum()
    loss.backward()
    assert t_eval.dtype == torch.float32 and torch.equal(t_eval[-1], span.t_f)
    # bfloat16 has eight bits: a percent or so after ten steps.
    torch.testing.assert_close(sol[-1].float(), exact, rtol=5e-2, atol=5e-2)
    assert torch.isfinite(span.t_f.grad) and all(torch.isfinite(p.grad).all() for p in model.parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Copies and checkpoints


def _trained(kind="mlp", **options):
    model = random_model(kind, solver=options.pop("solver", "rk4"))
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11, dtype=torch.float64), **options)
    _set(span, 0.77)
    return span, model


@pytest.mark.parametrize("kind", ["mlp", "depthcat", "keyword", "second order"])
@pytest.mark.parametrize("when", ["fresh", "after a forward", "after a backward"])
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_pickle_and_deepcopy_give_the_same_model(kind, when, solver):
    span, model = _trained(kind, solver=solver, learn_t0=True)
    if when != "fresh":
        loss = span(model.x)[1].sum()
        if when == "after a backward":
            loss.backward()
    for twin in (copy.deepcopy(span), pickle.loads(pickle.dumps(span))):
        assert torch.equal(twin.t_f, span.t_f) and torch.equal(twin.t0, span.t0)
        assert twin.bounds == span.bounds and torch.equal(twin.t_span, span.t_span)
        for a, b in zip(twin(model.x), span(model.x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        twin(model.x)[1].sum().backward()
        assert twin.t_f.grad is not None


def test_a_copy_can_be_trained_on_its_own():
    span, model = _trained()
    twin = copy.deepcopy(span)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
    twin(model.x)[1][-1].square().sum().backward()
    optimizer.step()
    assert not torch.equal(twin.t_f, span.t_f) and span.t_f.grad is None


def test_averaging_a_model_works():
    span, model = _trained()
    average = torch.optim.swa_utils.AveragedModel(span)
    _set(span, 0.57)
    average.update_parameters(span)
    assert float(average.module.t_f.detach()) == pytest.approx(0.67, abs=0.11)
    assert torch.isfinite(average(model.x)[1]).all()


def test_a_bare_state_dict_loads_strictly_into_the_wrapped_model():
    bare = random_model("mlp", seed=1, solver="rk4")
    span, model = _trained()
    span.load_state_dict(bare.node.state_dict(), strict=True)
    assert float(span.t_f.detach()) == 0.77
    torch.testing.assert_close(model.parameters[0], bare.parameters[0], rtol=0, atol=0)


def test_a_wrapped_state_dict_loads_into_the_bare_model():
    span, model = _trained()
    bare = random_model("mlp", seed=1, solver="rk4")
    result = bare.node.load_state_dict(span.state_dict(), strict=False)
    assert not result.missing_keys
    torch.testing.assert_close(bare.parameters[0], model.parameters[0], rtol=0, atol=0)


def test_the_same_inside_a_larger_model():
    def build(seed):
        torch.manual_seed(seed)
        return nn.Sequential(
            Augmenter(augment_dims=1),
            NeuralODE(nn.Sequential(DepthCat(1), nn.Linear(4, 3)), solver="rk4", return_t_eval=False),
            nn.Linear(3, 2),
        )

    bare, wrapped = build(0), tm.wrap(build(1), torch.linspace(0, 1, 11))
    wrapped.load_state_dict(bare.state_dict(), strict=True)
    x = torch.randn(3, 2)
    with torch.no_grad():
        other = build(2)
        assert not other.load_state_dict(wrapped.state_dict(), strict=False).missing_keys
        for a, b in zip(other.parameters(), bare.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert wrapped(x).shape == (11, 3, 2)


def test_loading_does_not_change_the_dict_it_is_given():
    bare = random_model("mlp", seed=1, solver="rk4").node.state_dict()
    keys = list(bare)
    span, _ = _trained()
    span.load_state_dict(bare)
    assert list(bare) == keys


@pytest.mark.parametrize("learn_t0", [False, True])
def test_a_checkpoint_restores_times_bounds_and_template(learn_t0):
    span, model = _trained(learn_t0=learn_t0, bounds=(0.2, 3.0))
    if learn_t0:
        _set(span, t0=0.04)
    file = io.BytesIO()
    torch.save(span.state_dict(), file)
    file.seek(0)
    fresh = tm.LearnableSpan(random_model("mlp", seed=5, solver="rk4").node, learn_t0=learn_t0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert float(fresh.t_f.detach()) == pytest.approx(0.77, abs=1e-7)
    assert fresh.bounds == pytest.approx(span.bounds)
    torch.testing.assert_close(_points(fresh).double(), _points(span), rtol=1e-6, atol=1e-6)
    fresh.node.double()
    torch.testing.assert_close(fresh(model.x)[1], span(model.x)[1], rtol=1e-5, atol=1e-6)


def test_the_state_dict_holds_tensors_only():
    span, _ = _trained(learn_t0=True)
    assert all(isinstance(v, torch.Tensor) for v in span.state_dict().values())
    assert {"t_f", "t0"} <= set(span.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# functional_call and torch.func


def test_functional_call_uses_the_given_times():
    span, model = _trained()
    parameters = {k: v.detach().clone() for k, v in span.named_parameters()}
    parameters["t_f"] = torch.tensor(0.31, dtype=torch.float64, requires_grad=True)
    t_eval, sol = functional_call(span, parameters, (model.x,))
    assert float(t_eval[-1].detach()) == 0.31 and float(span.t_f.detach()) == 0.77
    (gradient,) = torch.autograd.grad(sol[-1].sum(), parameters["t_f"])
    _set(span, 0.31)
    span(model.x)[1][-1].sum().backward()
    assert float(gradient) == pytest.approx(float(span.t_f.grad), rel=1e-12)


def test_functional_call_clips_without_writing():
    span, model = _trained()
    span.train()
    outside = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    t_eval, sol = functional_call(span, {"t_f": outside}, (model.x,))
    assert float(t_eval[-1].detach()) == 1.0
    assert float(outside.detach()) == 4.0 and float(span.t_f.detach()) == 0.77
    assert torch.autograd.grad(sol[-1].sum(), outside)[0] != 0


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_functional_call_under_an_adjoint_uses_its_parameters_in_the_backward_too(sensitivity):
    model = random_model("mlp", solver="rk4", sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 41, dtype=torch.float64))
    scaled = {k: (v.detach() * (1.0 if k == "t_f" else 0.5)).requires_grad_() for k, v in span.named_parameters()}
    _, sol = functional_call(span, scaled, (model.x,))
    got = torch.autograd.grad(sol[-1].sum(), [v for k, v in scaled.items() if k != "t_f"])
    with torch.no_grad():
        for p in model.parameters:
            p.mul_(0.5)
    exact = reference(model.rhs, model.x, _double(0, 1))[-1].sum()
    names = [k for k in scaled if k != "t_f"]
    own = dict(span.named_parameters())
    expected = torch.autograd.grad(exact, [own[k] for k in names])
    for a, b in zip(got, expected, strict=True):
        # 40 steps of rk4 and of its adjoint.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_torch_func_grad_and_vmap_over_the_state(solver):
    model = random_model("mlp", solver=solver, batch=5)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 6, dtype=torch.float64)).eval()
    loss = lambda x: span(x)[1][-1].square().sum()  # noqa: E731
    x = model.x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(model.x), expected)
    one = lambda x: span(x[None])[1][-1, 0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(model.x), span(model.x)[1][-1])
    per_sample = torch.func.vmap(torch.func.grad(lambda x: one(x).square().sum()))(model.x)
    torch.testing.assert_close(per_sample, expected)


def test_torch_func_over_the_parameters_and_the_time():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 6, dtype=torch.float64), t_f=0.83).eval()
    parameters = {k: v.detach() for k, v in span.named_parameters()}
    gradients = torch.func.grad(lambda p: functional_call(span, p, (model.x,))[1][-1].square().sum())(parameters)
    span(model.x)[1][-1].square().sum().backward()
    for name, parameter in span.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_torch_func_jvp_over_the_state():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 6, dtype=torch.float64)).eval()
    tangent, h = torch.randn_like(model.x), 1e-6
    _, forward = torch.func.jvp(lambda x: span(x)[1][-1], (model.x,), (tangent,))
    with torch.no_grad():
        numeric = (span(model.x + h * tangent)[1][-1] - span(model.x - h * tangent)[1][-1]) / (2 * h)
    # Plain central differences: about h^2 and 1e-16 / h.
    torch.testing.assert_close(forward, numeric, rtol=1e-6, atol=1e-8)


def test_second_derivatives_under_autograd():
    model = random_model("mlp", solver="rk4")
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 6, dtype=torch.float64), t_f=0.9)
    value = span(model.x)[1][-1].square().sum()
    (first,) = torch.autograd.grad(value, span.t_f, create_graph=True)
    (second,) = torch.autograd.grad(first, span.t_f)
    slopes = []
    for h in (1e-4, -1e-4):
        _set(span, 0.9 + h)
        slopes.append(float(torch.autograd.grad(span(model.x)[1][-1].square().sum(), span.t_f)[0]))
    assert float(second) == pytest.approx((slopes[0] - slopes[1]) / 2e-4, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

NAN, INF = math.nan, math.inf

BAD_SPANS = {
    "empty": (torch.tensor([]), ValueError),
    "one point": (torch.tensor([0.0]), ValueError),
    "scalar": (torch.tensor(1.0), ValueError),
    "2-D": (torch.zeros(2, 2), ValueError),
    "unsorted": (torch.tensor([0.0, 0.7, 0.3, 1.0]), ValueError),
    "repeated point": (torch.tensor([0.0, 0.5, 0.5, 1.0]), ValueError),
    "equal ends": (torch.tensor([0.5, 0.5]), ValueError),
    "NaN": (torch.tensor([0.0, NAN, 1.0]), ValueError),
    "infinite": (torch.tensor([0.0, INF]), ValueError),
    "integer": (torch.tensor([0, 1]), (TypeError, ValueError)),
    "boolean": (torch.tensor([False, True]), (TypeError, ValueError)),
    "complex": (torch.tensor([0j, 1 + 0j]), (TypeError, ValueError)),
    "a string": ("linspace", (TypeError, ValueError)),
    "a number": (1.0, (TypeError, ValueError)),
}


@pytest.mark.parametrize("name", BAD_SPANS)
def test_a_bad_template_is_refused(name):
    value, error = BAD_SPANS[name]
    node = _node()
    before = copy.copy(node.__dict__)
    with pytest.raises(error, match="(?i)span"):
        tm.LearnableSpan(node, value)
    assert {k: v for k, v in node.__dict__.items() if k != "vf_params"} == {
        k: v for k, v in before.items() if k != "vf_params"
    }


@pytest.mark.parametrize("name", BAD_SPANS)
@pytest.mark.parametrize("given", [True, False], ids=["with a template", "without one"])
def test_a_bad_passed_span_is_refused_and_changes_nothing(name, given):
    value, error = BAD_SPANS[name]
    span = tm.LearnableSpan(_node(), torch.linspace(0, 1, 11)) if given else tm.LearnableSpan(_node())
    before, counted = copy.deepcopy(span.state_dict()), span.node.vf.nfe
    with pytest.raises(error, match="(?i)span"):
        span(X, value)
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())
    assert span.node.vf.nfe == counted


def test_a_descending_template_is_refused():
    with pytest.raises(ValueError, match="(?i)span|ascend"):
        tm.LearnableSpan(_node(), torch.linspace(1, 0, 11))


@pytest.mark.parametrize("name", BAD_SPANS)
def test_a_bad_template_set_later_is_refused(name):
    value, error = BAD_SPANS[name]
    span = _span(torch.linspace(0, 1, 11))
    before = copy.deepcopy(span.state_dict())
    with pytest.raises(error):
        span.t_span = value
    assert torch.equal(span.t_span, torch.linspace(0, 1, 11))
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())


BAD_OPTIONS = {
    "crossed bounds": ({"bounds": (0.9, 0.2)}, "0.9"),
    "lower bound at t0": ({"bounds": (0.0, 1.0)}, "0"),
    "lower bound before t0": ({"bounds": (-0.5, 1.0)}, "-0.5"),
    "NaN bound": ({"bounds": (NAN, 1.0)}, "nan"),
    "infinite bound": ({"bounds": (0.1, INF)}, "inf"),
    "the template's end outside": ({"bounds": (0.1, 0.5)}, "0.5"),
    "t_f outside the bounds": ({"bounds": (0.1, 0.5), "t_f": 0.7}, "0.7"),
    "t_f above the template": ({"t_f": 1.5}, "1.5"),
    "t_f below the lower bound": ({"t_f": 0.01}, "0.01"),
    "t_f before t0": ({"t_f": -1.0}, "-1"),
    "NaN t_f": ({"t_f": NAN}, "nan"),
    "zero step_size": ({"step_size": 0.0}, "0"),
    "negative step_size": ({"step_size": -0.1}, "-0.1"),
    "step_size longer than the span": ({"step_size": 1.5}, "1.5"),
    "NaN step_size": ({"step_size": NAN}, "nan"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_bad_option_is_refused_and_names_the_value(name):
    options, value = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=value.replace(".", r"\.")):
        _span(torch.linspace(0, 1, 11, dtype=torch.float64), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"bounds": 3.0},
        {"bounds": (0.1,)},
        {"bounds": "wide"},
        {"t_f": "late"},
        {"step_size": "small"},
        {"t_f": [0.5, 0.6]},
    ],
    ids=str,
)
def test_an_option_of_the_wrong_kind_is_refused(options):
    with pytest.raises((TypeError, ValueError)):
        _span(torch.linspace(0, 1, 11, dtype=torch.float64), **options)


def test_a_step_size_is_refused_where_the_solver_chooses_its_own():
    # Silently ignoring it would leave the user with another grid than asked for.
    with pytest.raises(ValueError, match="(?i)step"):
        _span(torch.linspace(0, 1, 11), solver="tsit5", step_size=0.1)


@pytest.mark.parametrize("value", [(0.9, 0.2), (NAN, 1.0), (-1.0, 1.0), (0.0, 1.0)], ids=str)
def test_bad_bounds_set_later_are_refused_and_change_nothing(value):
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    before = span.bounds
    with pytest.raises(ValueError, match="(?i)bound"):
        span.bounds = value
    assert span.bounds == before and float(span.t_f.detach()) == 1.0


@pytest.mark.parametrize("value", [0.0, -0.1, NAN, 1.5])
def test_a_bad_step_size_set_later_is_refused_and_changes_nothing(value):
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    with pytest.raises(ValueError, match="(?i)step"):
        span.step_size = value
    assert span.step_size == pytest.approx(0.1) and len(span.t_span) == 11


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_a_state_of_the_wrong_shape_is_an_error_that_changes_nothing(solver, sensitivity):
    model = random_model("mlp", solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node)
    before = copy.deepcopy(span.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"shape|size|7"):
        span(torch.randn(3, 7, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in span.state_dict().items())
    assert torch.isfinite(span(model.x)[1]).all()


@pytest.mark.parametrize("x", [None, [1.0, 2.0], "x", 3.0], ids=str)
def test_a_state_that_is_no_tensor_is_a_type_error(x):
    with pytest.raises(TypeError):
        _span(torch.linspace(0, 1, 11))(x)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_a_failed_solve_leaves_the_model_as_it_was(solver, sensitivity):
    field = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    if sensitivity != "autograd":
        field = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    span = tm.LearnableSpan(NeuralODE(field, solver=solver, sensitivity=sensitivity), torch.linspace(0, 1, 5))
    span(torch.randn(6, 2))
    before, counters = copy.deepcopy(span.state_dict()), (span.nfe, span.steps, span.node.vf.nfe)
    x = torch.randn(6, 2)
    x[0, 0] = NAN
    with pytest.raises((ValueError, tm.IntegrationError)):
        span(x)
    for key, value in span.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert (span.nfe, span.steps, span.node.vf.nfe) == counters


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_an_integration_error_names_time_step_solver_and_t_f(solver):
    field = Counted(lambda t, x: x + torch.where(t > 0.5, NAN, 0.0), 400_000)
    span = tm.LearnableSpan(NeuralODE(field, solver=solver), torch.linspace(0, 0.9, 10, dtype=torch.float64))
    with pytest.raises(tm.IntegrationError) as caught:
        span(X)
    text = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert solver in text or {"rk4": "RungeKutta4", "tsit5": "Tsitouras45"}[solver] in text
    assert "t_f" in text and "0.9" in text
    # The field turns NaN just past .5: the failing step begins at or shortly before it.
    assert any(s in text for s in ("0.5", "0.4")), text


def test_non_finite_parameters_are_caught_too():
    model = random_model("mlp", solver="rk4", dtype=torch.float32)
    span = tm.LearnableSpan(model.node)
    with torch.no_grad():
        model.parameters[0].fill_(NAN)
    with pytest.raises(tm.IntegrationError):
        span(model.x)


def test_a_t_f_that_became_nan_is_an_error():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    _set(span, NAN)
    with pytest.raises((ValueError, tm.IntegrationError), match="(?i)nan"):
        span(X)


# ---------------------------------------------------------------------------------------------------------------------
# Training, in plain PyTorch


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_joint_updates_shorten_the_span_and_lower_the_loss(solver, sensitivity):
    model = random_model("mlp", seed=2, dtype=torch.float32, solver=solver, sensitivity=sensitivity, batch=16)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11))
    # A target close by: the terminal loss alone does not ask for a long way.
    target = 0.8 * model.x
    optimizer = torch.optim.Adam(span.parameters(), lr=0.03)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (span(model.x)[1][-1] - target).square().mean()
        (loss + span.duration).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and float(span.t_f.detach()) < 0.95


def test_alternating_updates_of_algorithm_1():
    model = random_model("mlp", seed=2, dtype=torch.float32, solver="rk4", batch=16)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11))
    weights, times = torch.optim.Adam(span.node.parameters(), lr=0.03), torch.optim.SGD([span.t_f], lr=0.01)
    for i in range(20):
        before = float(span.t_f.detach()), [p.detach().clone() for p in model.parameters]
        loss = (span(model.x)[1][-1] - 0.8 * model.x).square().mean() + span.duration
        weights.zero_grad(), times.zero_grad()
        loss.backward()
        (times if i % 2 else weights).step()
        span.clip_()
        if i % 2:
            assert float(span.t_f.detach()) != before[0]
            assert all(torch.equal(p, q) for p, q in zip(model.parameters, before[1], strict=True))
        else:
            assert float(span.t_f.detach()) == before[0]


# ------------------------------------------------------------------------------------- the edges of what is accepted


def test_a_step_may_be_as_long_as_the_span_and_longer_than_its_first_spacing():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    for step, points in ((0.5, 3), (1.0, 2), (1.0 + 1e-7, 2)):
        span.step_size = step
        assert len(span.t_span) == points
    with pytest.raises(ValueError, match="at most the span's length 1; got 1.00001"):
        span.step_size = 1.00001


def test_a_step_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match=r"step_size = 1e-09 makes 2e\+09 steps of the span's length 2; give a larger"):
        _span(torch.linspace(0, 2, 11), step_size=1e-9)


@pytest.mark.parametrize(("solver", "least"), [("tsit5", 2e-3), ("rk4", 0.5)])
def test_how_far_a_span_may_grow_where_nothing_is_said(solver, least):
    """Eq. (41): 2 T_f - t0 less a step, or less a thousandth of the interval where the solver has none of its own."""
    span = _span(torch.linspace(1, 3, 5, dtype=torch.float64), solver=solver)
    assert span.default_max_t_f() == pytest.approx(5 - least, abs=1e-12)
    assert span.bounds == pytest.approx((1 + least, 3.0), abs=1e-12)


def test_far_from_zero_the_lower_bound_is_as_near_as_at_zero():
    span = _span(torch.tensor([100.0, 101.0], dtype=torch.float64), solver="tsit5")
    assert span.bounds[0] == pytest.approx(100.001, abs=1e-9)


def test_a_template_that_starts_behind_the_lower_bound_moves_it():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64), bounds=(0.2, 2.0))
    span.t_span = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)
    assert span.bounds == pytest.approx((0.6, 2.0))
    with pytest.raises(ValueError, match="too late for the upper bound 2; set `bounds` first"):
        span.t_span = torch.linspace(2, 3, 11, dtype=torch.float64)
    assert span.t_span[0] == 0.5 and span.bounds == pytest.approx((0.6, 2.0))


def test_t_f_stays_after_t0_where_the_lower_bound_is_rounded_to_it():
    span = _span(torch.tensor([1e5, 1e5 + 1]), bounds=(1e5 + 1e-4, 1e5 + 1))  # float32 has steps of 1/128 there
    _set(span, 1e5)
    span.clip_()
    assert 1e5 < span.t_f.item() <= 1e5 + 2 / 128 and len(_points(span)) == 2


@pytest.mark.parametrize(
    ("times", "places"),
    [
        ([0.0, 0.5, 0.4, 1.0], "1 and 2 are 0.5 and 0.4"),
        ([1.0, 0.5, 0.7, 0.0], "1 and 2 are 0.5 and 0.7"),
        ([0.0, 0.0, 1.0], "0 and 1 are 0 and 0"),
    ],
)
def test_of_a_span_that_turns_back_the_place_is_named(times, places):
    with pytest.raises(ValueError, match=f"t_span must strictly ascend or descend; its points {places}"):
        _span(torch.linspace(0, 1, 3))(X, torch.tensor(times, dtype=torch.float64))


def test_an_upper_bound_that_is_the_end_but_for_the_rounding_of_float32_is_the_end():
    end = torch.linspace(0, 0.1, 11)
    assert end[-1].item() > 0.1
    span = _span(end, bounds=(0.01, 0.1))
    assert span.t_f.item() == pytest.approx(0.1, abs=1e-8)


def test_times_follow_the_model_to_float32():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    assert span.t_f.dtype == torch.float64
    assert span.float().t_f.dtype == torch.float32 and span.double().t_f.dtype == torch.float64


def test_a_point_within_a_thousandth_of_a_step_of_one_asked_for_makes_room_for_it():
    span = _span(torch.linspace(0, 1, 11, dtype=torch.float64))
    for t, steps in ((0.5 + 9e-5, 10), (0.5 + 2e-4, 11)):  # a thousandth of .1 is 1e-4
        t_eval, _ = span(X, save_at=(t,))
        assert t_eval.tolist() == pytest.approx([t]) and span.steps == steps


def test_another_solver_leaves_one_that_was_chosen_for_the_adjoint():
    span = _span(torch.linspace(0, 1, 11), node_options={"sensitivity": "adjoint", "solver_adjoint": "tsit5"})
    chosen = span.node.solver_adjoint
    span.solver = "euler"
    assert span.node.solver_adjoint is chosen
    span = _span(torch.linspace(0, 1, 11), node_options={"sensitivity": "adjoint"})
    span.solver = "euler"
    assert span.node.solver_adjoint is span.node.solver


def test_graphs_that_the_bare_node_left_in_its_layers_do_not_hinder_a_copy():
    timed = DepthCat(1)
    node = NeuralODE(nn.Sequential(timed, nn.Linear(3, 2)), solver="rk4")
    x, end = torch.randn(3, 2), torch.ones((), requires_grad=True)
    node(x, torch.linspace(0, 1, 3) * end)  # the time is kept with the graph that leads to its end
    assert timed.t.grad_fn is not None
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 3))
    twin = copy.deepcopy(span)
    assert torch.equal(twin(x)[1], span(x)[1])


def test_a_call_refused_for_its_span_draws_nothing_and_leaves_the_control():
    control, x = DataControl(), torch.ones(4, 2)
    field = nn.Sequential(control, nn.Linear(4, 2))
    span = tm.LearnableSpan(NeuralODE(field, solver="rk4"), torch.linspace(0, 1, 5))
    span(x)
    with pytest.raises(ValueError, match="has no part in the learned interval"):
        span(x + 5, torch.linspace(1.5, 2, 3))
    assert torch.equal(next(m._control for m in span.vf.modules() if hasattr(m, "_control")), x)


def test_a_step_size_of_one_entry_that_is_too_long_is_refused_clearly():
    span = tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 11), t_f=0.5)
    with pytest.raises(ValueError, match=r"longer than the interval learned, 0\.5"):
        span.step_size = torch.tensor([0.7])


def test_a_template_that_descends_says_how_a_span_is_solved_down():
    with pytest.raises(ValueError, match=r"must strictly ascend; .* give it t_span.flip\(0\), and call the span with"):
        tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.tensor([1.0, 0.0]))
